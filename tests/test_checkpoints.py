"""Checkpoint files are whole or not there, cannot run code, and are refused by name if they are wrong."""

import pytest
import torch

from support.checkpoints import KEYS, read_checkpoint, write_checkpoint


class Foreign:
    """A class that a checkpoint must not be able to bring along."""


CONFIG = {"sam": "tiny", "num_channels": 1, "num_classes": 2, "num_queries": 4}
CONFIG |= {"patch_size": (2, 32, 32), "encoder_size": (32, 32)}
PLAN = {"spacing": [None, 1.5, 1.5], "task": {"labels": ["background", "LV"], "channels": ["MR"]}}
PLAN |= {"intensity": [None], "ranges": [[0, 900.5, 700, 900]], "decisions": ["No axis is flipped."]}
CONTENT = {"config": CONFIG, "sam": {"sha256": None}, "plan": PLAN, "epoch": 7}
CONTENT |= {"state": {"weight": torch.arange(6.0).reshape(2, 3)}, "cases": {"train": ["a"], "val": ["b"]}}


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    write_checkpoint(tmp_path / "best.pt", CONTENT)
    content = read_checkpoint(tmp_path / "best.pt")
    assert torch.equal(content.pop("state")["weight"], CONTENT["state"]["weight"])
    assert content == {key: value for key, value in CONTENT.items() if key != "state"}


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("unexpected pos 64 vs 0\nmore")])
def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, error):
    write_checkpoint(path := tmp_path / "last.pt", CONTENT)
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=rf"last\.pt could not be written .{str(error).splitlines()[0]}."):
        write_checkpoint(path, CONTENT)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["empty", "truncated", "state dict", "pickled class", "one bit"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, kind):
    contents = {"state dict": {"a": torch.zeros(1)}, "pickled class": CONTENT | {"a": Foreign()}}
    torch.save(contents.get(kind, CONTENT), path := tmp_path / "x.pt")
    data = path.read_bytes()
    if kind == "one bit":  # of a weight, which torch would read as another number
        place = data.index(CONTENT["state"]["weight"].numpy().tobytes()) + 9
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    path.write_bytes({"empty": b"", "truncated": data[:-200]}.get(kind, data))
    with pytest.raises(
        ValueError, match=r"x\.pt: found .*, expected a checkpoint (of|that) train\.py"
    ) as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)  # torch's advice would run the code of the file


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("config", {"num_queries": 10**9}, "num_queries 1000000000, which is not between 1 and 1024"),
        ("config", {"encoder_size": (32, "32")}, "encoder_size .*, which is not between"),
        ("config", {"num_classes": 3}, "a model of other numbers than 2 classes, 1 channels"),
        ("plan", {"task": {"labels": [0, 1], "channels": ["MR"]}}, "labels that are not names"),
        ("plan", {"task": {}}, "no labels in it"),
        ("plan", {"task": [1]}, "no task"),
        ("plan", {"spacing": [1.5, None, 1.5]}, "the spacing .1.5, None"),
        ("plan", {"spacing": [None, 1.5, 0]}, "the spacing .None, 1.5, 0., which is not three lengths"),
        ("plan", {"intensity": [[0, 1, 2, float("nan")]]}, "intensities that are not four"),
        ("plan", {"ranges": [[0, 1]]}, "intensities that are not four"),
        ("plan", {"intensity": [None, None]}, "intensities that are not four"),
        ("plan", {"decisions": [1]}, "decisions that are not names"),
        ("config", {"given_boxes": "x"}, "no task, or a setting that is neither"),
        ("cases", {"val": "patient001"}, "val that are not names"),
        ("state", {"weight": 1.0}, "no numbers for weight"),
        ("state", {"weight": torch.zeros(1).expand(10**9)}, "no numbers for weight"),
        ("state", {"bias": torch.tensor([1.0, torch.nan])}, "numbers that are not finite in bias"),
        ("sam", {"sha256": 5}, "no sha256 of SAM's file"),
    ],
)
def test_a_wrong_entry_is_named_before_anything_is_built(tmp_path, part, change, message):
    torch.save(CONTENT | {part: CONTENT[part] | change}, path := tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: found {message}"):
        read_checkpoint(path)
    torch.save(CONTENT | {part: [1]}, path)
    with pytest.raises(ValueError, match=rf"x\.pt: found {part} of type list"):
        read_checkpoint(path)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    write_checkpoint(path := tmp_path / "last.pt", CONTENT)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"last\.pt: found numbers that are not finite in bias, so nothing"):
        write_checkpoint(path, CONTENT | {"state": {"bias": torch.tensor(-torch.inf)}})
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_missing_key_or_file_is_named(tmp_path, key):
    write_checkpoint(tmp_path / "x.pt", {name: value for name, value in CONTENT.items() if name != key})
    with pytest.raises(ValueError, match=rf"x\.pt: found no {key} in it"):
        read_checkpoint(tmp_path / "x.pt")
    write_checkpoint(tmp_path / "x.pt", CONTENT)
    with pytest.raises(ValueError, match=r"x\.pt: found no best, step in it"):
        read_checkpoint(tmp_path / "x.pt", ["step", "best", "epoch"])
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: found no such file"):
        read_checkpoint(tmp_path / "gone.pt")
