"""Whole files, messages, and calls that other systems do not have."""

import os

import pytest

import train
from support import files


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original, n=name: (calls.append(n), f(*a)))
    files.write_text(tmp_path / "x.txt", "whole")
    assert calls == ["fsync", "replace"] and (tmp_path / "x.txt").read_text() == "whole"


@pytest.mark.parametrize("error, message", [
    (ValueError("two\nlines"), "x.py: two\nlines"),
    (FileNotFoundError("ours\nlisted"), "x.py: ours\nlisted"),
    (PermissionError(13, "Permission denied", "a.pt"), "x.py: a.pt: Permission denied"),
    (RuntimeError("torch\nmore"), "x.py: torch (--debug shows the place)"),
    (MemoryError(), "x.py: found too little memory (MemoryError); "),
    (RuntimeError("[enforce fail] can't allocate memory"), "x.py: found too little memory ("),
    (ImportError("No module named 'nibabel'"), "x.py: No module named 'nibabel'; pip install -r "),
])  # fmt: skip
def test_errors_end_in_one_sentence_and_with_debug_in_a_traceback(error, message):
    with pytest.raises(SystemExit) as end, files.one_sentence("x.py", False):
        raise error
    assert end.value.code.startswith(message)
    with pytest.raises(type(error)), files.one_sentence("x.py", True):
        raise error


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:x", "cpu:-1"])
def test_a_device_that_is_not_here_is_refused(device, capsys, monkeypatch):
    parser = files.make_parser("Do it.", "device flip")
    assert parser.parse_args(["--flip"]).flip == [] and parser.parse_args([]).debug is False
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", device])
    assert f"--device: found {device}, " in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", (chosen := []).append)
    assert parser.parse_args(["--device", "cuda:1"]).device == "cuda:1" and chosen == [1]


@pytest.mark.parametrize("options, expected", [("--lr nan", "above 0"), ("--augment -1", "at least 0")])
def test_a_number_that_cannot_be_is_refused_before_anything_is_read(options, expected, capsys):
    assert train.parse_arguments(["--augment", "0"]).augment == 0
    with pytest.raises(SystemExit):
        train.parse_arguments(options.split())
    message = f"{options.replace(' ', ': found ')}, expected {expected} and below inf\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize("missing", [["sched_getaffinity"], ["sched_getaffinity", "sysconf_names"]])
def test_macos_and_windows_have_a_number_of_workers_too(missing, monkeypatch):
    for name in missing:
        monkeypatch.delattr(os, name)
    assert 1 <= files.default_workers() <= os.cpu_count()
