"""The benchmark's own claims: arithmetic, memory, and that the parts are the whole."""

import argparse
import json

import pytest
import torch

from model import MaskSAM, MaskSAMConfig
from support.sam import BACKBONES
from tools import benchmark

CPU = torch.device("cpu")
SMALL = [
    "--data",
    "phantom",
    "--sam",
    "tiny",
    "--patch",
    "2",
    "32",
    "32",
    "--encoder",
    "64",
    "64",
    "--repeat",
    "1",
]


@pytest.fixture(scope="module")
def bench() -> benchmark.Bench:
    options = {
        "device": "cpu",
        "amp": "off",
        "repeat": 1,
        "batch_size": 1,
        "checkpointing": False,
        "compile": False,
    }
    config = MaskSAMConfig("tiny", "b9", 1, 4, 6, (2, 32, 32), (64, 64))
    return benchmark.Bench(config, argparse.Namespace(**options))


def test_arithmetic_and_the_peak_of_memory_are_measured_and_only_a_slow_first_run_counts(monkeypatch):
    a, b, runs = torch.randn(30, 40), torch.randn(40, 50), []
    monkeypatch.setattr(benchmark, "SLOW", float("inf"))
    cost = benchmark.measure(lambda: runs.append(a @ b), CPU, 5)
    assert cost["gflop"] == pytest.approx(2 * 30 * 40 * 50 / 1e9) and len(runs) == 6
    assert benchmark.measure_once(lambda: torch.ones(2**26).sum(), CPU)["gib"] == pytest.approx(
        0.25, abs=0.05
    )
    monkeypatch.setattr(benchmark, "SLOW", 0.0)
    benchmark.measure(lambda: runs.append(a @ b), CPU, 1)
    assert len(runs) == 7


def test_the_parts_together_do_the_arithmetic_of_the_whole_and_leave_the_weights_alone(bench):
    """A part that is left out, or measured on other sizes, is missed here."""
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    prediction, step = (cost["gflop"] for cost in bench.totals())
    rows = bench.parts()
    parts = ["stem", "encoder", "prompt generator", "prompt encoder", "decoder"]
    assert sum(rows[name]["gflop"] for name in parts) == pytest.approx(prediction, rel=0.02)
    trained = sum(rows[name]["training"]["gflop"] for name in [*parts, "costs of all pairs"])
    assert trained == pytest.approx(step, rel=0.05)
    bench.model.gradient_checkpointing = True  # computes the encoder once more
    assert bench.measure(bench.step)["gflop"] == pytest.approx(step + rows["encoder"]["gflop"], rel=0.1)
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())


def test_the_command_prints_and_writes_parts_curves_and_a_case(tmp_path, monkeypatch, capsys):
    rows = benchmark.main([*SMALL, "--volume", "4", "40", "40"])["rows"]  # this one is really measured
    assert rows["predict 4 x 40 x 40, 12 windows"]["seconds"] > 0 and "a patch from the cache" in rows
    cost = {"seconds": 1.0, "spread": 0.0, "cpu_seconds": 1.0, "gib": 0.0, "gflop": 1.0}
    monkeypatch.setattr(benchmark, "measure", lambda run, *_: cost)
    for more, names in (
        ([], ["prediction", "training step", "decoder", "matching", "optimizer", "plain SAM: decoder"]),
        (["--curve", "depth"], ["depth 1", "depth 2", "depth 4", "depth 8"]),
        (["--curve", "queries"], ["queries 4", "queries 8", "queries 16", "queries 32"]),
    ):
        results = benchmark.main([*SMALL, *more, "--json", str(tmp_path / "cost.json")])
        assert json.loads((tmp_path / "cost.json").read_text())["rows"] == results["rows"]
        printed = capsys.readouterr().out
        assert all(name in printed and name in results["rows"] for name in names)
    with pytest.raises(SystemExit, match=r"^benchmark.py: encoder_size is \(100, 100\), expected 2 .* of 16"):
        benchmark.main([*SMALL, "--encoder", "100", "100"])


def test_the_table_of_parameters_is_that_of_models_that_are_built(capsys):
    rows = benchmark.main(["--parameters", "--sam", "tiny"])["rows"]
    assert (
        list(rows)[: len(BACKBONES)] == [f"{name} b9" for name in BACKBONES]
        and len(rows) == len(BACKBONES) + 8
    )
    model, row = MaskSAM(MaskSAMConfig("tiny", "b4", 1, 4, 8, (4, 160, 160), (320, 320))), rows["tiny b4"]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert row["total"] == sum(trained) == sum(row[part] for part in benchmark.PARTS if part != "total")
    assert row["frozen"] == sum(parameter.numel() for parameter in model.parameters()) - sum(trained)
    for part in ("stem", "encoder_adapters", "prompt_generator"):
        assert row[part] == sum(parameter.numel() for parameter in getattr(model, part).parameters())
    assert "release, ACDC" in capsys.readouterr().out
