"""The benchmark's own claims: its arithmetic, its rows, and its table of parameters."""

import pytest
import torch

from model import MaskSAM, MaskSAMConfig
from support.sam import BACKBONES
from tools import benchmark

SMALL = "--data phantom --sam tiny --patch 2 32 32 --encoder 64 64 --queries 6 --repeat 1 --amp off".split()


def bench(*more: str) -> benchmark.Bench:
    args = benchmark.parse_arguments([*SMALL, "--device", "cpu", *more])
    return benchmark.Bench(*benchmark.choose(args, "phantom", "tiny"), args)


def test_the_arithmetic_is_counted_and_the_weights_stay():
    a, b = torch.randn(30, 40), torch.randn(40, 50)
    made = bench("--batch", "2")
    assert made.measure(lambda: a @ b)[0] == pytest.approx(2 * 30 * 40 * 50 / 1e12)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    muons, *_ = made.measure(made.step)
    made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.0)  # makes no matrix product
    (step, *_), (prediction, *_) = made.measure(made.step), made.measure(made.predict)
    assert muons > 1.5 * step and 2.5 * prediction < step < 3.5 * prediction  # backward: two
    made.model.gradient_checkpointing = True
    assert made.measure(made.step)[0] > 1.1 * step
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_a_row_follows_from_its_measurements():
    """A fake stopwatch: a step of 16 patches takes 8 s, a prediction of 16 takes 4."""
    made = bench("--batch", "16")
    made.measure = lambda run: (16.0, {made.step: 8, made.predict: 4}[run], 3.0)
    row = made.row((2, 32, 48))  # two windows along W, flipped in plane
    pyramid = benchmark.choose(benchmark.parse_arguments(SMALL), "phantom", "tiny_pyramid")[1]
    assert tuple(row) == benchmark.TITLES and pyramid.fine_masks
    hours = made.preset.epochs * made.preset.iterations * 8 / 3600
    assert [*row.values()] == pytest.approx([16, 8000, 16, 3, 2, hours, 2 * 4 * 4 / 16])


def test_a_gpu_is_waited_for_and_measured_by_its_own_memory(monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name) or 2**31)
    assert benchmark.measure(lambda: calls.append("run"), torch.device("cuda", 0), 1)[2] == 2
    assert calls == "run reset_peak_memory_stats synchronize run synchronize max_memory_allocated".split()


def test_the_command_prints_a_row_per_backbone(capsys):
    rows = benchmark.main([*SMALL, "--sam", "tiny", "mobile_sam"])
    assert [*rows] == ["phantom tiny", "phantom mobile_sam"]
    printed = capsys.readouterr().out
    assert all(title in printed for title in (*benchmark.TITLES, *rows))


def test_the_table_of_parameters_is_that_of_models_that_are_built(capsys):
    rows = benchmark.main(["--parameters", "--sam", "tiny"])
    assert [name for name in rows if name.endswith(" b9")] == [f"{name} b9" for name in BACKBONES]
    model, row = MaskSAM(MaskSAMConfig("tiny", "b4", 1, 4, 8, (4, 160, 160), (320, 320))), rows["tiny b4"]
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == x) for x in (1, 0))
    assert row["total"] == trained == sum(row[part] for part in benchmark.PARTS if part != "total")
    assert row["frozen"] == frozen
    assert row["prompt_generator"] == sum(p.numel() for p in model.prompt_generator.parameters())
    assert "release, ACDC" in capsys.readouterr().out
