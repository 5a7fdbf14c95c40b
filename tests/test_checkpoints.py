"""Checkpoint files are whole or not there, cannot run code, and are refused by name if they are wrong."""

import pytest
import torch

from support.checkpoints import KEYS, read_checkpoint, write_checkpoint


class Foreign:
    """A class that a checkpoint must not be able to bring along."""


CONTENT = {"config": {"num_queries": 4}, "sam": {"sha256": None}, "plan": {"spacing": [None, 1.5]}}
CONTENT |= {"state": {"weight": torch.arange(6.0).reshape(2, 3)}, "epoch": 7}


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


@pytest.mark.parametrize("kind", ["empty", "truncated", "state dict", "pickled class"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, kind):
    contents = {"state dict": {"a": torch.zeros(1)}, "pickled class": CONTENT | {"a": Foreign()}}
    torch.save(contents.get(kind, CONTENT), path := tmp_path / "x.pt")
    if kind not in contents:
        path.write_bytes(path.read_bytes()[:-200] if kind == "truncated" else b"")
    with pytest.raises(ValueError, match=r"x\.pt: found .*, expected a checkpoint (of|that) train\.py"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_missing_key_or_file_is_named(tmp_path, key):
    write_checkpoint(tmp_path / "x.pt", {name: value for name, value in CONTENT.items() if name != key})
    with pytest.raises(ValueError, match=rf"x\.pt: found no {key} in it"):
        read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: found no such file"):
        read_checkpoint(tmp_path / "gone.pt")
