"""The benchmark's own claims: its arithmetic, and that the parts are the whole."""

import json

import pytest
import torch

from model import MaskSAM, MaskSAMConfig
from support.sam import BACKBONES
from tools import benchmark

SMALL = "--data phantom --sam tiny --patch 2 32 32 --encoder 64 64 --repeat 1".split()


def test_the_parts_together_do_the_arithmetic_of_the_whole_and_leave_the_weights_alone():
    """A part that is left out, or measured on other sizes, is missed here."""
    args = benchmark.parse_arguments([*SMALL, "--device", "cpu", "--amp", "off"])
    bench = benchmark.Bench(MaskSAMConfig("tiny", "b9", 1, 4, 6, (2, 32, 32), (64, 64)), args)
    a, b = torch.randn(30, 40), torch.randn(40, 50)
    assert bench.measure(lambda: a @ b)["gflop"] == pytest.approx(2 * 30 * 40 * 50 / 1e9)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    checkpointed, bench.model.gradient_checkpointing = bench.measure(bench.step)["gflop"], False
    prediction, step = (bench.measure(run)["gflop"] for run in (bench.predict, bench.step))
    rows, parts = bench.rows(), ["stem", "encoder", "prompt generator", "prompt encoder", "decoder"]
    assert sum(rows[name]["gflop"] for name in parts) == pytest.approx(prediction, rel=0.02)
    trained = sum(rows[name]["training"]["gflop"] for name in [*parts, "costs of all pairs"])
    assert trained == pytest.approx(step, rel=0.05)
    assert checkpointed == pytest.approx(step + rows["encoder"]["gflop"], rel=0.1)  # encoder once more
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())


def test_the_command_prints_and_writes_the_parts(tmp_path, capsys):
    results = benchmark.main([*SMALL, "--queries", "4", "--json", str(tmp_path / "cost.json")])
    assert json.loads((tmp_path / "cost.json").read_text())["rows"] == results["rows"]
    printed = capsys.readouterr().out
    for name in ("prediction, step", "decoder", "matching", "plain SAM: encoder"):
        assert name in printed and results["rows"][name]["seconds"] > 0
    with pytest.raises(SystemExit, match=r"^benchmark.py: encoder_size is \(100, 100\), expected 2 .* of 16"):
        benchmark.main([*SMALL, "--encoder", "100", "100"])


def test_the_table_of_parameters_is_that_of_models_that_are_built(capsys):
    rows = benchmark.main(["--parameters", "--sam", "tiny"])["rows"]
    assert [name for name in rows if name.endswith(" b9")] == [f"{name} b9" for name in BACKBONES]
    model, row = MaskSAM(MaskSAMConfig("tiny", "b4", 1, 4, 8, (4, 160, 160), (320, 320))), rows["tiny b4"]
    trained, frozen = (
        sum(p.numel() for p in model.parameters() if p.requires_grad == grad) for grad in (True, False)
    )
    assert row["total"] == trained == sum(row[part] for part in benchmark.PARTS if part != "total")
    assert row["frozen"] == frozen
    assert row["prompt_generator"] == sum(p.numel() for p in model.prompt_generator.parameters())
    assert "release, ACDC" in capsys.readouterr().out
