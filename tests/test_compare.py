"""One table of training runs, from the files that train.py writes."""

import json
from pathlib import Path

import pytest

from tools import compare


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> None:
    """Three runs that differ in variant and seed."""
    monkeypatch.chdir(tmp_path)
    for name, dice in {"b1-0": 0.5, "b1-1": 0.7, "b9-0": 0.8}.items():
        arguments = {"variant": name[:2], "seed": int(name[3]), "name": name, "epochs": 3, "lr": 1e-3}
        dices = (None, {}), (dice, {"a": dice + 0.1, "b": None}), (0.1, {"a": 0.1, "b": 0.1})
        log = [{"epoch": i, "val_dice": v, "val_dice_per_class": c} for i, (v, c) in enumerate(dices, 1)]
        config = {"arguments": arguments, "parameters": {"total": [12_340_000, 0]}}
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config))
        Path(name, "log.jsonl").write_text("\n".join(map(json.dumps, log)))


def test_runs_that_differ_in_their_seed_alone_are_one_row_of_their_best_epochs(capsys):
    compare.main(["b9-0", "b1-0", "b1-1"])
    header, b1, b9, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "trained", "M", "seeds", "Dice", "lowest", "highest", "a", "b"]
    assert b1.split() == ["b1", "12.34", "2", "0.6000", "0.5000", "0.7000", "0.7000", "-"]
    assert b9.split() == ["b9", "12.34", "1", "0.8000", "0.8000", "0.8000", "0.9000", "-"]
    assert "without mirroring" in note


def test_what_is_no_finished_run_is_skipped_with_a_line(capsys):
    log, (first, second, _) = Path("b9-0/log.jsonl"), Path("b9-0/log.jsonl").read_text().splitlines()
    nothing = "no config.json and log.jsonl of train.py"
    for text, found in (
        (f"{first}\n{second}", "2 of 3 epochs, 1 of them validated"),
        (first, "1 of 3 epochs, 0 of them validated"),
        (first.replace("1", "3"), "3 of 3 epochs, 0 of them validated"),
        ("", nothing),
        (first[:9], nothing),
    ):
        log.write_text(text)
        compare.main(["b1-0", "b9-0", "nowhere"])
        skipped, nowhere, _, row, _ = capsys.readouterr().out.splitlines()
        assert skipped == f"skipped b9-0: found {found}, expected a finished run"
        assert nowhere.startswith(f"skipped nowhere: found {nothing}") and row.split()[0] == "b1"
    with pytest.raises(SystemExit, match="^compare.py: found no finished run in 2 folders"):
        compare.main(["b9-0", "nowhere"])
