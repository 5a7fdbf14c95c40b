"""Checkpoint files are whole or not there, cannot run code, and are refused by name if they are wrong."""

import pytest
import torch

from support.checkpoints import KEYS, read_checkpoint, write_checkpoint
from volumes import refuses

CONFIG = {"sam": "tiny", "num_channels": 1, "num_classes": 2, "num_queries": 4}
CONFIG |= {"patch_size": (2, 32, 32), "encoder_size": (32, 32)}
PLAN = {"spacing": [None, 1.5, 1.5], "task": {"labels": ["background", "LV"], "channels": ["MR"]}}
PLAN |= {"intensity": [None], "ranges": [[0, 900.5, 700, 900]], "decisions": ["No axis is flipped."]}
CONTENT = {"config": CONFIG, "sam": {"sha256": None}, "plan": PLAN, "epoch": 7}
CONTENT |= {"state": {"weight": torch.arange(6.0).reshape(2, 3)}, "cases": {"train": ["a"], "val": ["b"]}}


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("unexpected pos 64 vs 0\nmore")])
def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, error):
    write_checkpoint(path := tmp_path / "last.pt", CONTENT)
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    refuses(rf"last\.pt could not be written .{str(error).splitlines()[0]}.", write_checkpoint, path, CONTENT)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["empty", "truncated", "state dict", "pickled call", "one bit"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, kind):
    contents = {"state dict": {"a": torch.zeros(1)}, "pickled call": CONTENT | {"a": print}}
    torch.save(contents.get(kind, CONTENT), path := tmp_path / "x.pt")
    data = path.read_bytes()
    if kind == "one bit":  # of a weight, which torch would read as another number
        place = data.index(CONTENT["state"]["weight"].numpy().tobytes()) + 9
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    path.write_bytes({"empty": b"", "truncated": data[:-200]}.get(kind, data))
    found = "more than tensors and plain values" if kind == "pickled call" else ".*"  # and no advice of torch
    refuses(rf"x\.pt: found {found}, expected a checkpoint (of|that) train", read_checkpoint, path)


@pytest.mark.parametrize("part, change, message", [
    ("config", {"num_queries": 10**9}, "num_queries 1000000000, which is not between 1 and 1024"),
    ("config", {"encoder_size": (32, "32")}, "encoder_size .*, which is not between"),
    ("config", {"num_classes": 3}, "a model of other numbers than 2 classes, 1 channels"),
    ("config", {"fine_masks": "x"}, "no task, or a setting that is neither"),
    ("plan", {"task": {"labels": [0, 1], "channels": ["MR"]}}, "labels that are not names"),
    ("plan", {"task": {}}, "no labels in it"), ("plan", {"task": [1]}, "no task"),
    ("plan", {"spacing": [1.5, None, 1.5]}, "the spacing .1.5, None"),
    ("plan", {"spacing": [None, 1.5, 0]}, "the spacing .None, 1.5, 0., which is not three lengths"),
    ("plan", {"intensity": [[0, 1, 2, float("nan")]]}, "intensities that are not four"),
    ("plan", {"intensity": [None, None]}, "intensities that are not four"),
    ("plan", {"ranges": [[0, 1]]}, "intensities that are not four"),
    ("plan", {"decisions": [1]}, "decisions that are not names"),
    ("cases", {"val": "patient001"}, "val that are not names"),
    ("state", {"weight": 1.0}, "no numbers for weight"),
    ("state", {"weight": torch.zeros(1).expand(10**9)}, "no numbers for weight"),
    ("state", {"bias": torch.tensor([1.0, torch.nan])}, "numbers that are not finite in bias"),
    ("sam", {"sha256": 5}, "no sha256 of SAM's file"),
])  # fmt: skip
def test_a_wrong_entry_is_named_before_anything_is_built(tmp_path, part, change, message):
    torch.save(CONTENT | {part: CONTENT[part] | change}, path := tmp_path / "x.pt")
    refuses(rf"x\.pt: found {message}", read_checkpoint, path)
    torch.save(CONTENT | {part: [1]}, path)
    refuses(rf"x\.pt: found {part} of type list", read_checkpoint, path)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    write_checkpoint(path := tmp_path / "last.pt", CONTENT)
    before = path.read_bytes()
    content = CONTENT | {"state": {"bias": torch.tensor(-torch.inf)}}
    refuses(r"last\.pt: found numbers that are not finite in bias, so", write_checkpoint, path, content)
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_missing_key_or_file_is_named(tmp_path, key):
    write_checkpoint(tmp_path / "x.pt", {name: value for name, value in CONTENT.items() if name != key})
    refuses(rf"x\.pt: found no {key} in it", read_checkpoint, tmp_path / "x.pt")
    write_checkpoint(tmp_path / "x.pt", CONTENT)
    refuses(r"x\.pt: found no best, step", read_checkpoint, tmp_path / "x.pt", ["step", "best", "epoch"])
    refuses(r"gone\.pt: found no such file", read_checkpoint, tmp_path / "gone.pt")
