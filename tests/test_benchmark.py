"""The benchmark's own claims: arithmetic, memory, and that the parts are the whole."""

import argparse
import json
import time

import pytest
import torch
import torch.nn.functional as F

from model import BACKBONES, MaskSAM, MaskSAMConfig
from tools import benchmark

CPU = torch.device("cpu")
SMALL = ["--data", "phantom", "--sam", "tiny", "--patch", "2", "32", "32", "--encoder", "64", "64", "--repeat", "1"]


def bench(**options) -> benchmark.Bench:
    args = argparse.Namespace(
        device="cpu", amp="off", repeat=1, batch_size=1, checkpointing=False, compile=False, **options
    )
    return benchmark.Bench(MaskSAMConfig("tiny", "b9", 1, 4, 6, (2, 32, 32), (64, 64)), args)


def test_a_matrix_product_has_its_arithmetic_and_every_run_counts():
    a, b, runs = torch.randn(30, 40), torch.randn(40, 50), []
    cost = benchmark.measure(lambda: runs.append(a @ b), CPU, 5)
    assert cost["gflop"] == pytest.approx(2 * 30 * 40 * 50 / 1e9) and len(runs) == 6
    assert 0 < cost["seconds"] < 1 and cost["spread"] >= 0


def test_a_slow_first_run_counts(monkeypatch):
    monkeypatch.setattr(benchmark, "SLOW", 0.01)
    runs = []
    cost = benchmark.measure(lambda: (time.sleep(0.02), runs.append(0)), CPU, 1)
    assert len(runs) == 1 and 0.02 <= cost["seconds"] < 0.5
    assert cost["cpu_seconds"] < cost["seconds"]  # sleeping costs none


def test_the_fused_attention_of_a_cpu_is_counted_both_ways():
    q, k, v = (torch.randn(2, 3, 1100, 16, requires_grad=True) for _ in range(3))
    forward = benchmark.measure(lambda: F.scaled_dot_product_attention(q, k, v), CPU, 1)["gflop"]
    both = benchmark.measure(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(), CPU, 1)["gflop"]
    assert forward == pytest.approx(2 * 2 * 2 * 3 * 1100 * 1100 * 16 / 1e9)
    assert both == pytest.approx(3.5 * forward)  # five products behind two


def test_memory_is_the_peak_and_not_what_is_left():
    with benchmark.Meter(CPU) as meter:
        block = torch.ones(2**26)  # 256 MiB
        time.sleep(0.05)
        del block
    assert meter.gib == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("fused", [(), ("cpu",)])
def test_the_parts_together_do_the_arithmetic_of_the_whole(fused, monkeypatch):
    """A part that is left out, or measured on other sizes, would be missed here."""
    monkeypatch.setattr("model.FUSED", fused)
    made = bench()
    whole = {"forward": made.measure(made.predict)["gflop"], "step": made.measure(made.step)["gflop"]}
    rows = made.parts()
    parts = ["stem", "encoder", "prompt generator", "prompt encoder", "decoder"]
    assert sum(rows[name]["gflop"] for name in parts) == pytest.approx(whole["forward"], rel=0.02)
    trained = sum(rows[name]["training"]["gflop"] for name in [*parts, "costs of all pairs"])
    assert trained == pytest.approx(whole["step"], rel=0.05)
    assert all(row["seconds"] > 0 for row in rows.values())


def test_checkpointing_computes_the_encoder_once_more():
    made = bench()
    plain = made.measure(made.step)["gflop"]
    encoder = made.parts()["encoder"]["gflop"]
    made.model.gradient_checkpointing = True
    assert made.measure(made.step)["gflop"] == pytest.approx(plain + encoder, rel=0.1)


def test_weights_stay_as_they_are_for_the_next_measurement():
    made = bench()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.step()
    made.parts()
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_the_command_prints_and_writes_every_row(tmp_path, capsys):
    file = tmp_path / "cost.json"
    results = benchmark.main([*SMALL, "--json", str(file)])
    printed = capsys.readouterr().out
    assert json.loads(file.read_text())["rows"].keys() == results["rows"].keys()
    for name in ("prediction", "training step", "decoder", "matching", "optimizer", "plain SAM: decoder",
                 "a patch from the cache", "score a case"):  # fmt: skip
        assert name in printed and results["rows"][name]["cpu_seconds"] >= 0


def test_a_case_goes_from_file_to_file(capsys):
    rows = benchmark.main([*SMALL, "--volume", "4", "40", "40"])["rows"]
    assert rows["predict 4 x 40 x 40, 12 windows"]["seconds"] > 0 and "prediction" not in rows


@pytest.mark.parametrize("curve", ["depth", "queries", "side", "batch"])
def test_a_curve_has_a_row_for_each_value(curve, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda run, *_: {"seconds": 1.0, "cpu_seconds": 1.0, "gib": 0.0})
    monkeypatch.setattr(benchmark, "machine_rates", lambda *_: (1.0, 1.0))
    rows = benchmark.main([*SMALL, "--curve", curve])["rows"]
    values = {"depth": (1, 2, 4, 8), "queries": (4, 8, 16, 32), "side": (256, 512, 1024), "batch": (1, 2, 4, 8)}[curve]
    assert list(rows) == [f"{curve} {value}" for value in values]


def test_a_size_that_does_not_fit_is_one_message():
    with pytest.raises(SystemExit, match=r"^benchmark.py: encoder_size is \(100, 100\), expected 2 .* of 16"):
        benchmark.main([*SMALL, "--encoder", "100", "100"])


def test_the_table_of_parameters_is_that_of_models_that_are_built(capsys):
    rows = benchmark.main(["--parameters", "--sam", "tiny"])["rows"]
    assert list(rows)[: len(BACKBONES)] == [f"{name} b9" for name in BACKBONES] and len(rows) == len(BACKBONES) + 8
    model = MaskSAM(MaskSAMConfig("tiny", "b4", 1, 4, 8, (4, 160, 160), (320, 320)))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    row = rows["tiny b4"]
    assert row["total"] == sum(trained) == sum(row[part] for part in benchmark.PARTS if part != "total")
    assert row["frozen"] == sum(parameter.numel() for parameter in model.parameters()) - sum(trained)
    for part in ("stem", "encoder_adapters", "prompt_generator"):
        assert row[part] == sum(parameter.numel() for parameter in getattr(model, part).parameters())
    assert "release, ACDC" in capsys.readouterr().out
