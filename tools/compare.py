"""Print one table of training runs, for table 4 and any other series of experiments.

The columns in front are the settings in which the rows differ; runs that differ in their seed alone are one
row. Dice is each run's best validation Dice, as train.py measured it. Unfinished runs are skipped.

    python -m tools.compare runs/*
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import make_parser, one_sentence
from support.metrics import known_mean

# Arguments of train.py that say where and how it ran; runs that differ in them alone are repetitions.
NOT_COMPARED = "seed name root cache resume device workers sam_checkpoint val_every debug".split()


def read_run(folder: Path) -> tuple[dict, dict, float]:
    """Return the settings, the best epoch, and the trained parameters in millions of a finished run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        settings = {key: value for key, value in config["arguments"].items() if key not in NOT_COMPARED}
        validated = [line for line in log if line["val_dice"] is not None]
        done, epochs, parameters = log[-1]["epoch"], settings["epochs"], config["parameters"]["total"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder}: found no config.json and log.jsonl of train.py") from error
    if done < epochs or not validated:
        raise ValueError(f"{folder}: found {done} of {epochs} epochs, {len(validated)} of them validated")
    return settings, max(validated, key=lambda line: line["val_dice"]), parameters / 1e6


def compare_runs(folders: Sequence[str | Path]) -> None:
    """Print a line for each folder that holds no finished training run, and the table of the others."""
    groups: dict[str, list[tuple]] = {}  # the runs of each row, by their settings
    for folder in folders:
        try:
            run = read_run(Path(folder))
            groups.setdefault(json.dumps(run[0], sort_keys=True), []).append(run)
        except ValueError as error:
            print(f"skipped {error}, expected a finished run")
    if not groups:
        raise ValueError(f"found no finished run in {len(folders)} folders, expected one or more")
    runs = sum(groups.values(), [])
    keys = dict.fromkeys(key for settings, _, _ in runs for key in settings)
    keys = [key for key in keys if len({json.dumps(run[0].get(key)) for run in runs}) > 1] or ["variant"]
    classes = list(dict.fromkeys(name for _, best, _ in runs for name in best["val_dice_per_class"]))
    rows = []
    for group in groups.values():
        (settings, *_), bests, (millions, *_) = zip(*group)
        dice = [best["val_dice"] for best in bests]
        by_class = [[best["val_dice_per_class"].get(name) for name in classes] for best in bests]
        values = [np.mean(dice), min(dice), max(dice), *known_mean(np.array(by_class, np.float64), 0)]
        cells = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        rows.append([*(str(settings.get(key)) for key in keys), f"{millions:.2f}", str(len(group)), *cells])
    table = [[*keys, "trained M", "seeds", "Dice", "lowest", "highest", *classes], *sorted(rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(map(str.rjust, line, widths)))
    print("Dice is the best one during training, without mirroring: its cases chose the epoch too.")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py wrote")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare the runs of the command line."""
    args = parse_arguments(argv)
    with one_sentence("compare.py", args.debug):
        compare_runs(args.runs)


if __name__ == "__main__":
    main()
