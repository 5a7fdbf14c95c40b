"""Print one table of training runs, for table 4 and any other series of experiments.

The columns in front are the settings in which the rows differ. Dice is each run's best validation Dice, as
train.py measured it during training; no prediction is made here.

    python -m tools.compare runs/*

    config.json, log.jsonl of each run ──> one row for all runs that differ in nothing but their seed
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import make_parser
from support.metrics import known_mean

# Arguments of train.py that say where and how it ran; runs that differ in them alone are repetitions.
NOT_COMPARED = ("seed", "name", "root", "cache", "resume", "device", "workers", "sam_checkpoint", "val_every")


def read_run(folder: Path) -> tuple[dict, dict, float, str]:
    """Read the settings, the best epoch, the trained parameters in millions, and a note on an unfinished run.

    Raises: ValueError: the folder holds no run, or a run that has not been validated yet.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        settings = {key: value for key, value in config["arguments"].items() if key not in NOT_COMPARED}
        best = max((line for line in log if line["val_dice"] is not None), key=lambda line: line["val_dice"])
        done, epochs = log[-1]["epoch"], settings["epochs"]
        unfinished = f"{folder} ({done} of {epochs} epochs)" if done < epochs else ""
        return settings, best, config["parameters"]["total"][0] / 1e6, unfinished
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__} {error}"
        raise ValueError(f"{folder}: found {found}, expected a validated run of train.py") from error


def compare_runs(folders: Sequence[str | Path]) -> None:
    """Print the table of some training runs, and which of them are not finished."""
    groups: dict[str, list[tuple]] = {}  # the runs of each row, by their settings
    for run in (runs := [read_run(Path(folder)) for folder in folders]):
        groups.setdefault(json.dumps(run[0], sort_keys=True), []).append(run)
    settings = [group[0][0] for group in groups.values()]
    keys = dict.fromkeys(key for row in settings for key in row)
    keys = [key for key in keys if len({json.dumps(row.get(key)) for row in settings}) > 1] or ["variant"]
    classes = list(dict.fromkeys(name for _, best, *_ in runs for name in best["val_dice_per_class"]))
    rows = []
    for group in groups.values():
        dice = [best["val_dice"] for _, best, *_ in group]
        by_class = [[best["val_dice_per_class"].get(name) for name in classes] for _, best, *_ in group]
        values = [np.mean(dice), min(dice), max(dice), *known_mean(np.array(by_class, np.float64), 0)]
        cells = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        own = [str(group[0][0].get(key)) for key in keys]
        rows.append([*own, f"{group[0][2]:.2f}", str(len(group)), *cells])
    table = [[*keys, "trained M", "seeds", "Dice", "lowest", "highest", *classes], *sorted(rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    print("Dice is the best one during training, without mirroring: its cases chose the epoch too.")
    if unfinished := [run[3] for run in runs if run[3]]:
        print(f"Not finished: {', '.join(unfinished)}.")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py wrote")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare the runs of the command line; a wrong folder becomes one message."""
    try:
        compare_runs(parse_arguments(argv).runs)
    except ValueError as error:
        raise SystemExit(f"compare.py: {error}") from error


if __name__ == "__main__":
    main()
