"""One table of training runs, from the files that train.py writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from support import metrics
from tools import compare


@pytest.fixture(autouse=True)
def runs() -> None:
    """Three runs that differ in variant and seed."""
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
    header, b1, b9, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "trained", "M", "seeds", "Dice", "lowest", "highest", "a", "b"]
    assert b1.split() == ["b1", "12.34", "2", "0.6000", "0.5000", "0.7000", "0.7000", "-"]
    assert b9.split() == ["b9", "12.34", "1", "0.8000", "0.8000", "0.8000", "0.9000", "-"]


def test_what_is_no_finished_run_is_skipped_with_a_line(capsys):
    log, (first, second, _) = Path("b9-0/log.jsonl"), Path("b9-0/log.jsonl").read_text().splitlines()
    nothing = "no config.json and log.jsonl of train.py"
    for text, found in (
        (f"{first}\n{second}", "2 of 3 epochs, 1 of them validated"),
        (first, "1 of 3 epochs, 0 of them validated"),
        (first.replace("1", "3"), "3 of 3 epochs, 0 of them validated"),
    ):
        log.write_text(text)
        compare.main(["b1-0", "b9-0", "nowhere"])
        skipped, nowhere, _, row, _ = capsys.readouterr().out.splitlines()
        assert skipped == f"skipped b9-0: found {found}, expected a finished run"
        assert nowhere.startswith(f"skipped nowhere: found {nothing}") and row.split()[0] == "b1"
    with pytest.raises(SystemExit, match="^compare.py: found no finished run in 2 folders"):
        compare.main(["b9-0", "nowhere"])


def scored(folder: str, prompts="auto", convention="masksam", **cases) -> None:
    """Write a file as evaluate.py does, with the Dice of the classes a and b of each case."""
    per_case = {case: {"a": {"dice": a}, "b": {"dice": b}} for case, (a, b) in cases.items()}
    results = {"scored": ["b", "a"], "convention": convention, "prompts": prompts, "per_case": per_case}
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "metrics.json").write_text(json.dumps(results))


def test_a_method_pools_cases_of_folds_and_means_of_seeds_and_its_difference_is_paired(capsys):
    scored("fold0", p=(0.5, 0.1), q=(0.7, 0.3))
    scored("fold1", r=(0.9, 0.5))
    scored("net", "gt", p=(0.6, 0.2), q=(0.8, 0.4), r=(1.0, 0.6), s=(0.1, 0.1))
    scored("seed0", p=(0.4, None)), scored("seed1", p=(0.6, None), t=(0.0, 0.0))
    Path("net/metrics-nnformer.json").write_text("{}")  # of another convention: not read
    compare.main("fold? net seed? --names ours net seeds".split())
    rows = [[cell.strip() for cell in line.split("|")][1:-1] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["method", "prompts", "folders", "cases", "Dice", "95 % from", "to", "b", "a"]
    ours, net, seeds, net_less, seeds_less = rows[2:]
    cases = {"p": (0.5, 0.1), "q": (0.7, 0.3), "r": (0.9, 0.5)}
    results = metrics.summarize({case: {"dice": np.array(dice)} for case, dice in cases.items()}, "xab")
    interval = [f"{end:.4f}" for end in results["interval"]["dice"]]
    assert ours == ["ours", "auto", "2", "3", "0.5000", *interval, "0.3000", "0.7000"]
    assert net[:5] == ["net", "boxes of gt", "1", "4", "0.4750"]
    assert seeds[:5] + seeds[7:] == ["seeds", "auto", "2", "2", "0.1250", "0.0000", "0.2500"]
    assert net_less == ["net - ours", "", "", "3", *["0.1000"] * 5]  # in every sample of the same cases
    assert seeds_less == ["seeds - ours", "", "", "1", "0.2000", "0.2000", "0.2000", "-", "0.0000"]


def test_methods_that_cannot_stand_in_one_table_are_refused():
    scored("net", p=(0.6, 0.2)), scored("other", convention="transunet", p=(0.6, 0.2)), scored("bad")
    Path("bad/metrics.json").write_text("{}")
    for line, message in (
        ("net bad --names a", "--names: found 1, expected 2; put patterns in quotes"),
        ("net other --names a b", "other/metrics.json: found .*transunet.*, expected .*masksam.* as in"),
        ("bad --names a", "bad/metrics.json: found no scores, expected a file that evaluate.py wrote"),
        ("b1-* --names a", r"b1-\*: found no metrics\*.json, expected a folder that evaluate.py has scored"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare.main(line.split())
