"""Print one table of training runs, for table 4 and other series, or of methods, for tables 1 to 3.

The columns in front are the settings in which the rows differ; runs that differ in their seed alone are one
row. Dice is each run's best validation Dice, as train.py measured it. Unfinished runs are skipped.

    python -m tools.compare runs/*
    python -m tools.compare 'runs/acdc-vit_b-fold*/predictions-val' nnunet --names MaskSAM nnU-Net

With --names, each argument is a method: a folder that evaluate.py has scored, or a pattern in quotes for
several. A row pools the cases of all its folders (folds). A case that is in several (seeds) counts with its
mean. Below stand the differences to the first method, on common cases, with paired bootstrap intervals.
"""

import argparse
import glob
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import make_parser, one_sentence
from support.metrics import RESAMPLES, known_mean

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


def read_method(pattern: str, how: dict) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the prompts of each folder of a method, and the Dice (classes,) of each of its cases.

    All folders must be scored as the first one, which `how` keeps. Raises: ValueError.
    """
    prompts, found = [], {}
    files = glob.glob(pattern if pattern.endswith(".json") else f"{pattern}/metrics*.json")
    files.sort(key=len, reverse=True)  # The shortest name of a folder has our own metric convention.
    for file in sorted({Path(file).parent: file for file in files}.values()):
        try:
            results = json.loads(Path(file).read_text())
            own = {key: results[key] for key in ("scored", "convention")}
            for case, by_class in results["per_case"].items():
                dice = np.array([by_class[name]["dice"] for name in own["scored"]], np.float64)  # None is NaN
                found.setdefault(case, []).append(dice)
            kind, source = results.get("prompt_kind", "boxes"), results.get("prompts", "auto")
            prompts.append(source if source == "auto" else f"{kind} of {source}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file}: found no scores, expected a file that evaluate.py wrote") from error
        if own != how.setdefault("first", own):
            raise ValueError(f"{file}: found {own}, expected {how['first']} as in the first folder")
    if not found:
        raise ValueError(f"{pattern}: found no metrics*.json, expected a folder that evaluate.py has scored")
    return prompts, {case: known_mean(np.stack(dice), 0) for case, dice in found.items()}


def means(scores: dict[str, np.ndarray], cases: Sequence[str]) -> np.ndarray:
    """Return the mean Dice of cases, that of each class, and the mean of each bootstrap sample of cases."""
    dice = np.stack([scores[case] for case in cases])
    draws = np.random.default_rng(0).integers(len(dice), size=(RESAMPLES, len(dice)))
    return np.concatenate([[known_mean(dice, 0, 0)], known_mean(dice, 0), known_mean(dice[draws], 1, 1)])


def compare_methods(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Print a row for each method, and one for its difference to the first one, as a table in Markdown."""
    if len(patterns) != len(names):
        raise ValueError(f"--names: found {len(names)}, expected {len(patterns)}; put patterns in quotes")
    how, rows = {}, []  # title, prompts, number of folders, cases, and what `means` returns
    methods = [read_method(pattern, how) for pattern in patterns]
    first = methods[0][1]
    for name, (prompts, scores) in zip(names, methods):
        origin, count = " and ".join(dict.fromkeys(prompts)), len(prompts)
        rows.append((name, origin, count, len(scores), means(scores, list(scores))))
    for name, (_, scores) in zip(names[1:], methods[1:]):
        if common := [case for case in scores if case in first]:
            difference = means(scores, common) - means(first, common)
            rows.append((f"{name} - {names[0]}", "", "", len(common), difference))
    header = ["method", "prompts", "folders", "cases", "Dice", "95 % from", "to", *how["first"]["scored"]]
    print("| " + " | ".join(header) + " |", "|" + "---|" * len(header), sep="\n")
    for *facts, values in rows:
        mean, *by_class = values[:-RESAMPLES]
        values = [mean, *np.percentile(values[-RESAMPLES:], (2.5, 97.5)), *by_class]
        cells = [*map(str, facts), *("-" if np.isnan(value) else f"{value:.4f}" for value in values)]
        print("| " + " | ".join(cells) + " |")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folder of a run, or of scored label maps")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of methods, one for each DIR")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare the runs of the command line."""
    args = parse_arguments(argv)
    with one_sentence("compare.py", args.debug):
        compare_methods(args.runs, args.names) if args.names else compare_runs(args.runs)


if __name__ == "__main__":
    main()
