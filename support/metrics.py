"""Score label maps: Dice, HD95 and NSD per class, means, intervals and tables (paper 3, tables 1-3).

    two masks ── _surface ──> voxels ── _distances, both ways ──┬── 95th percentile ──> HD95
                                                                └── share within tolerance ──> NSD
    score_maps (one case) ──> summarize (all cases) ──> print_table, write_metrics

Dice and NSD are fractions. Spacings are (D, H, W) in mm. NaN means "undefined" and is left out of every mean.
"""

import csv
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from support.files import write_text

Array = np.ndarray
METRICS = ("dice", "hd95", "nsd")
PRESENCE = {"neither": 0, "only_truth": 1, "only_prediction": 2}  # which map has a class; 3 is both

# The values (dice, hd95, nsd) of a class that is in neither map, in the truth only, in the prediction only.
# Infinity stands for the diagonal of the image. The other programs publish no NSD, so theirs stays undefined.
ABSENT = {
    # Ours: a missed or invented class gets the worst value that the image allows.
    "masksam": ((np.nan, np.nan, np.nan), (0, np.inf, 0), (0, np.inf, 0)),
    # github.com/282857341/nnFormer, nnformer/inference_synapse.py and inference_acdc.py: `dice`, `hd`
    "nnformer": ((1, 0, np.nan), (0, 0, np.nan), (0, 0, np.nan)),
    # github.com/Beckschen/TransUNet, utils.py: `calculate_metric_percase`
    "transunet": ((0, 0, np.nan), (0, 0, np.nan), (1, 0, np.nan)),
}
CONVENTIONS = tuple(ABSENT)
RESAMPLES = 1000  # Ours: number of bootstrap samples


def dice_per_class(prediction: Array, truth: Array, num_classes: int) -> Array:
    """Return the Dice (K-1,) of the classes 1 to K-1 of two label maps (D, H, W); NaN for a class in neither.

    Raises: ValueError if the shapes differ, or an id is not below K.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction: found shape {prediction.shape}, expected {truth.shape} of the truth")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        low, high = labels.min(initial=0), labels.max(initial=0)
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name}: found labels {low} to {high}, expected 0 to {num_classes - 1}")
    confusion = np.zeros(num_classes**2, np.int64)  # (truth, prediction) pairs, counted
    for predicted, true in zip(prediction, truth):  # by slices: int64 pairs of a whole CT take 600 MB
        pairs = true.astype(np.int64) * num_classes + predicted
        confusion += np.bincount(pairs.ravel(), minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    sizes = (confusion.sum(0) + confusion.sum(1)).astype(np.float64)
    return 2 * confusion.diagonal()[1:] / np.where(sizes > 0, sizes, np.nan)[1:]


def _surface(mask: Array) -> Array:
    """Return the voxels of a mask (D, H, W) that have a face neighbour outside the mask or the image."""
    inner = mask.copy()  # becomes the eroded mask, faster than with ndimage: medpy's definition of a surface
    for axis in range(mask.ndim):
        inside, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        inside[1:] &= whole[:-1]
        inside[:-1] &= whole[1:]
        inside[[0, -1]] = False
    return mask & ~inner


def _distances(pair: Sequence[Array], spacing: Sequence[float]) -> Array:
    """Return the distances of the voxels of each of two surfaces to the other surface, in any order."""
    found = []
    for voxels, others in (pair, pair[::-1]):
        # A k-d tree needs only the surface voxels, a distance transform fills the whole box. It is built
        # fastest without balancing and tight boxes, and stays fast where many voxels are equally near.
        tree = cKDTree(np.argwhere(others) * spacing, balanced_tree=False, compact_nodes=False)
        distances, _ = tree.query(np.argwhere(voxels & ~others) * spacing)
        found += [np.zeros(np.count_nonzero(voxels & others)), distances]
    return np.concatenate(found)


def score_maps(
    prediction: Array, truth: Array, spacing, num_classes: int, tolerance=1.0, convention="masksam", workers=1
) -> dict[str, Array]:
    """Return Dice, HD95 and NSD of the classes 1 to K-1 of one case, on the grid of its file.

    HD95 is the 95th percentile of the distances between both surfaces (`medpy.metric.binary.hd95`). NSD is
    the share of surface voxels within the tolerance of the other surface (Nikolov et al. 2018, counted as in
    MONAI's `compute_surface_dice`).

    Args:
        prediction, truth: (D, H, W) uint8, ids 0 to K-1. num_classes: K.
        spacing: mm. NSD always uses it; HD95 of a foreign convention is in voxels.
        tolerance: of NSD in mm. Ours: 1 mm, because the paper reports no NSD.
        convention: key of `ABSENT`. workers: number of threads.
    Returns: dice, hd95, nsd: (K-1,) float64. presence: (K-1,) uint8, see `PRESENCE`.
    Raises: ValueError if the shapes differ, an id is not below K, or the convention is unknown.
    """
    if convention not in ABSENT:
        raise ValueError(f"metric convention: found {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    dice = dice_per_class(prediction, truth, num_classes)
    diagonal = np.linalg.norm(np.multiply(truth.shape, spacing))
    boxes = [ndimage.find_objects(labels, num_classes - 1) for labels in (truth, prediction)]

    def score_class(class_id: int) -> tuple[float, float, float, int]:
        true_box, other_box = (found[class_id - 1] for found in boxes)
        presence = (true_box is not None) + 2 * (other_box is not None)
        if presence < 3:
            absent_dice, hd95, nsd = ABSENT[convention][presence]
            return absent_dice, diagonal if hd95 == np.inf else hd95, nsd, presence
        # Cropping to the box around both changes no surface, because all around it is background.
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(true_box, other_box))
        pair = [_surface(labels[box] == class_id) for labels in (truth, prediction)]
        in_mm = _distances(pair, spacing)
        hd95 = np.percentile(in_mm if convention == "masksam" else _distances(pair, (1, 1, 1)), 95)
        # Files hold float32 spacings, so ten voxels of 0.1 mm may be a little more than 1 mm.
        return dice[class_id - 1], hd95, np.mean(in_mm <= tolerance * (1 + 1e-6)), presence

    with ThreadPoolExecutor(workers) as pool:  # SciPy and NumPy release the GIL.
        rows = np.array(list(pool.map(score_class, range(1, num_classes)))).reshape(-1, 4)
    return dict(zip(METRICS, rows.T)) | {"presence": rows[:, 3].astype(np.uint8)}


def summarize(scores: dict[str, dict], labels: Sequence[str], scored: Sequence[int] = ()) -> dict:
    """Average each class over the cases, then average the scored classes.

    Args:
        scores: case name -> result of `score_maps`, or some of its entries, the same for every case.
        labels: names by id, with background. scored: ids in the order of the paper's table, or () for all.
    Returns:
        A dict for JSON, with None for NaN: "mean" {metric: value}; "interval" {metric: [low, high] of 95 %,
        None below two cases}; "scored" [name]; "per_case" {case: {name: {metric: value}}}; "per_class" {name:
        {metric: mean}} with the number of "cases" that have a Dice, and if the scores have a "presence", of
        those with the class in "neither" map, "only_truth" or "only_prediction".
    Raises: ValueError if there are no cases, or a scored id is not a class.
    """
    if not scores:
        raise ValueError("scores: found none, expected those of one case or more")
    names, cases = list(labels)[1:], list(scores.values())
    columns = [class_id - 1 for class_id in scored] or list(range(len(names)))
    if not set(columns) <= set(range(len(names))):
        raise ValueError(f"scored classes: found {tuple(scored)}, expected ids from 1 to {len(names)}")
    values = {metric: np.stack([case[metric] for case in cases]) for metric in METRICS if metric in cases[0]}
    known = ~np.isnan(next(iter(values.values())))  # (cases, classes)
    if known.shape[1] != len(names):
        raise ValueError(f"scores: found {known.shape[1]} classes, expected {len(names)}: {', '.join(names)}")
    totals = {metric: known_mean(table, 0) for metric, table in values.items()} | {"cases": known.sum(0)}
    if "presence" in cases[0]:
        presence = np.stack([case["presence"] for case in cases])
        totals |= {key: (presence == state).sum(0) for key, state in PRESENCE.items()}

    def by_class(columns: dict[str, Array]) -> dict[str, dict]:
        return {
            name: {key: plain(column[i]) for key, column in columns.items()} for i, name in enumerate(names)
        }

    return {
        "mean": {metric: plain(_class_mean(table[:, columns])) for metric, table in values.items()},
        "interval": {metric: _interval(table[:, columns]) for metric, table in values.items()},
        "scored": [names[column] for column in columns],
        "per_class": by_class(totals),
        "per_case": {case: by_class({m: t[i] for m, t in values.items()}) for i, case in enumerate(scores)},
    }


def plain(value: np.number) -> float | int | None:
    """Return a NumPy number as a Python number, and None for NaN, so that JSON can hold it."""
    return None if np.isnan(value) else value.item()


def known_mean(values: Array, axis: int) -> Array:
    """Return the mean without NaN along an axis, and NaN where all are NaN (np.nanmean warns there)."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis) / np.where(known.any(axis), known.sum(axis), np.nan)


def _class_mean(values: Array) -> Array:
    """Average (..., cases, classes) over the cases of each class, then over the classes: (...)."""
    return known_mean(known_mean(values, -2), -1)


def _interval(values: Array) -> list[float] | None:
    """Return the 95 % bootstrap interval [low, high] of the class mean of (cases, classes)."""
    values = values[~np.isnan(values).all(1)]  # A case without any of the classes does not affect their mean.
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.percentile(_class_mean(values[draws]), (2.5, 97.5)).tolist()


def print_table(results: dict) -> None:
    """Print the scored classes in the paper's order, the other classes, and the mean of the scored ones.

    Results are of `summarize`, and if known they have "tolerance_mm", "convention", "prompts" and "baseline".
    """
    ours = results.get("convention", "masksam") == "masksam"
    tolerance = f" {results['tolerance_mm']:g} mm" if "tolerance_mm" in results else ""
    titles = {"dice": "Dice", "worst": "worst", "best": "best", "hd95": "HD95 mm" if ours else "HD95 voxels"}
    titles |= {"nsd": f"NSD{tolerance}", "cases": "cases", "only_truth": "missed", "only_prediction": "false"}
    rows = {name: dict(row) for name, row in results["per_class"].items()}
    for name in rows if "dice" in results["mean"] else ():
        dice = [case[name]["dice"] for case in results["per_case"].values()]
        dice = [value for value in dice if value is not None]
        rows[name] |= {"worst": min(dice, default=None), "best": max(dice, default=None)}
    titles = {key: title.rjust(6) for key, title in titles.items() if key in next(iter(rows.values()))}
    summary = [("mean", results["mean"])]
    if intervals := {metric: ends for metric, ends in results["interval"].items() if ends}:
        for end, name in enumerate(("95 % from", "to")):
            summary.append((name, {metric: ends[end] for metric, ends in intervals.items()}))
    width = max(map(len, [*rows, "95 % from"]))

    def line(name: str, values: dict) -> str:
        text = name.ljust(width)
        for key, title in titles.items():
            value = values.get(key, "")
            digits = 0 if isinstance(value, int) else 2 if key == "hd95" else 4
            cell = value if value == "" else "-" if value is None else f"{value:.{digits}f}"
            text += "  " + cell.rjust(len(title))
        return text.rstrip()

    rule = "-" * len("  ".join([" " * width, *titles.values()]))
    others = [line(name, row) for name, row in rows.items() if name not in results["scored"]]
    print("  ".join(["class".ljust(width), *titles.values()]))
    print(*(line(name, rows[name]) for name in results["scored"]), *([rule] if others else []), sep="\n")
    print(*others, rule, *(line(*row) for row in summary), sep="\n")
    if (origin := results.get("prompts", "auto")) != "auto":
        origin, model = "the truth" if origin == "gt" else origin, results.get("baseline", "the model")
        print(f"Not automatic: {model} was given the boxes of {origin}.")
    if not ours:
        print(f"As {results['convention']} scores (HD95 in voxels): never compare with our columns.")


def write_metrics(folder: Path, results: dict, suffix: str = "") -> None:
    """Write metrics<suffix>.json, and metrics<suffix>.csv with a row per case and class and then the means.

    The names end in -<convention> if it is foreign. Undefined values are null or empty; NaN is a ValueError.
    """
    convention = results.get("convention", "masksam")
    stem = f"metrics{suffix}" + ("" if convention == "masksam" else f"-{convention}")
    write_text(folder / f"{stem}.json", json.dumps(results, indent=1, allow_nan=False))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", "class", *results["mean"]])
    for case, classes in (results["per_case"] | {"mean": results["per_class"]}).items():
        for name, scores in classes.items():
            writer.writerow([case, name, *(scores[metric] for metric in results["mean"])])
    write_text(folder / f"{stem}.csv", table.getvalue())
