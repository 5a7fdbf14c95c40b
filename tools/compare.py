"""One table of training runs, from their logs (table 4 and any other ladder)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.metrics import _known_mean, _plain

OF_A_RUN = ("seed", "name", "root", "cache", "resume", "device", "workers", "sam_checkpoint", "val_every")


def compare_runs(folders: Sequence[str | Path]) -> list[dict]:
    """Print one table of training runs (the ladder of table 4, and any other), from config.json and log.jsonl alone.

    Runs that differ in nothing but their seed are one row: the mean of their best validation Dice, as measured while
    training, and the lowest and highest of them. The columns in front are the settings in which rows differ.

    Returns:
        The rows: "settings", "seeds", "millions" of trained parameters, "dice" of each seed, "per_class" means.
    Raises:
        ValueError: a folder is no run, or has not been validated yet.
    """
    groups: dict[str, list[tuple[dict, dict, float]]] = {}
    unfinished = []
    for folder in map(Path, folders):
        try:
            config = json.loads((folder / "config.json").read_text())
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            settings = {key: value for key, value in config["arguments"].items() if key not in OF_A_RUN}
            millions = config["parameters"]["total"][0] / 1e6
            best = max((entry for entry in log if entry["val_dice"] is not None), key=lambda entry: entry["val_dice"])
            if log[-1]["epoch"] < settings["epochs"]:
                unfinished.append(f"{folder} ({log[-1]['epoch']} of {settings['epochs']} epochs)")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: found {type(error).__name__} {error}, expected a validated run") from error
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append((settings, best, millions))
    runs = [group[0][0] for group in groups.values()]
    keys = list(dict.fromkeys(key for settings in runs for key in settings))
    differing = [key for key in keys if len({json.dumps(settings.get(key)) for settings in runs}) > 1]
    rows = []
    for group in groups.values():
        all_settings, best, millions = zip(*group)
        by_class = [entry["val_dice_per_class"] for entry in best]
        means = {name: np.array([dice[name] for dice in by_class], np.float64) for name in by_class[0]}
        rows.append({
            "settings": {key: all_settings[0].get(key) for key in differing or ("variant",)},
            "seeds": len(group), "millions": millions[0], "dice": [entry["val_dice"] for entry in best],
            "per_class": {name: _plain(_known_mean(dice, 0)) for name, dice in means.items()},
        })  # fmt: skip
    print_comparison(rows)
    if unfinished:
        print(f"Not finished: {', '.join(unfinished)}.")
    return rows


def print_comparison(rows: list[dict]) -> None:
    """The rows of `compare_runs`, in the order of their settings."""
    classes = list(dict.fromkeys(name for row in rows for name in row["per_class"]))
    table = [[*rows[0]["settings"], "trained M", "seeds", "Dice", "lowest", "highest", *classes]]
    for row in sorted(rows, key=lambda row: [str(value) for value in row["settings"].values()]):
        dice = [np.mean(row["dice"]), min(row["dice"]), max(row["dice"])]
        values = [f"{value:.4f}" for value in dice]
        values += ["-" if row["per_class"].get(name) is None else f"{row['per_class'][name]:.4f}" for name in classes]
        table.append([*map(str, row["settings"].values()), f"{row['millions']:.2f}", str(row["seeds"]), *values])
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    print("Best validation Dice while training, without mirroring: the same cases chose the epoch.")
