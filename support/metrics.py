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
    # github.com/282857341/nnFormer, nnformer/inference_synapse.py and inference_acdc.py
    "nnformer": ((1, 0, np.nan), (0, 0, np.nan), (0, 0, np.nan)),
    # github.com/Beckschen/TransUNet, utils.py: `calculate_metric_percase`
    "transunet": ((0, 0, np.nan), (0, 0, np.nan), (1, 0, np.nan)),
}
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
    counts = np.zeros((3, num_classes), np.int64)  # voxels of each class in prediction, truth and both
    for predicted, true in zip(prediction, truth):  # by slices: int64 ids of a whole CT take 600 MB
        regions = predicted, true, true[true == predicted]
        counts += [np.bincount(ids.ravel(), minlength=num_classes) for ids in regions]
    sizes, both = (counts[0] + counts[1])[1:], counts[2, 1:]
    return 2 * both / np.where(sizes > 0, sizes, np.nan)


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
        # A distance transform would fill the whole box, a tree does not. Without balancing and tight boxes
        # it is built fastest, and it stays fast where many voxels are equally near.
        tree = cKDTree(np.argwhere(others) * spacing, balanced_tree=False, compact_nodes=False)
        distances, _ = tree.query(np.argwhere(voxels & ~others) * spacing)
        found += [np.zeros(np.count_nonzero(voxels & others)), distances]
    return np.concatenate(found)


def score_maps(
    prediction: Array, truth: Array, spacing, num_classes: int, tolerance=1.0, convention="masksam", workers=1
) -> dict[str, Array]:
    """Return Dice, HD95 and NSD of the classes 1 to K-1 of one case, on the grid of its file.

    HD95 is the 95th percentile of the distances between both surfaces (`medpy.metric.binary.hd95`). NSD is
    the share of surface voxels within the tolerance of the other surface (Nikolov et al. 2018, as in MONAI).

    Args:
        prediction, truth: (D, H, W) uint8, ids 0 to K-1. num_classes: K. workers: number of threads.
        spacing: mm; HD95 of a foreign convention is in voxels instead. convention: key of `ABSENT`.
        tolerance: of NSD in mm. Ours: 1 mm, because the paper reports no NSD.
    Returns: dice, hd95, nsd: (K-1,) float64. presence: (K-1,) uint8, see `PRESENCE`.
    Raises: ValueError if the shapes differ, an id is not below K, or the convention is unknown.
    """
    if convention not in ABSENT:
        raise ValueError(f"metric convention: found {convention!r}, expected one of {', '.join(ABSENT)}")
    dice = dice_per_class(prediction, truth, num_classes)
    diagonal = np.linalg.norm(np.multiply(truth.shape, spacing))
    boxes = [ndimage.find_objects(labels, num_classes - 1) for labels in (truth, prediction)]

    def score_class(class_id: int, true_box, other_box) -> tuple[float, float, float, int]:
        presence = (true_box is not None) + 2 * (other_box is not None)
        if presence < 3:
            values = [diagonal if value == np.inf else value for value in ABSENT[convention][presence]]
            return *values, presence
        # Cropping to the box around both changes no surface, because all around it is background.
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(true_box, other_box))
        pair = [_surface(labels[box] == class_id) for labels in (truth, prediction)]
        in_mm = _distances(pair, spacing)
        hd95 = np.percentile(in_mm if convention == "masksam" else _distances(pair, (1, 1, 1)), 95)
        # Files hold float32 spacings, so ten voxels of 0.1 mm may be a little more than 1 mm.
        return dice[class_id - 1], hd95, np.mean(in_mm <= tolerance * (1 + 1e-6)), presence

    with ThreadPoolExecutor(workers) as pool:  # SciPy and NumPy release the GIL.
        rows = np.array(list(pool.map(score_class, range(1, num_classes), *boxes))).reshape(-1, 4)
    return dict(zip(METRICS, rows.T)) | {"presence": rows[:, 3].astype(np.uint8)}


def summarize(scores: dict[str, dict], labels: Sequence[str], scored: Sequence[int] = ()) -> dict:
    """Average each class over the cases, then average the scored classes.

    Args:
        scores: case name -> result of `score_maps`, or some of its entries, the same for every case.
        labels: names by id, with background. scored: ids in the order of the paper's table, or () for all.
    Returns: a dict for JSON, with None for NaN: "mean" {metric: value}; "interval" {metric: 95 % [low, high]
        or None}; "scored" [name]; "per_case" {case: {name: {metric: value}}}; "per_class" {name:
        {metric: mean}} with the number of "cases" that have a Dice, and if known of each key of `PRESENCE`.
    Raises: ValueError if there are no cases.
    """
    if not scores:
        raise ValueError("scores: found none, expected those of one case or more")
    names, cases = list(labels)[1:], list(scores.values())
    columns = [class_id - 1 for class_id in scored] or list(range(len(names)))
    values = {metric: np.stack([case[metric] for case in cases]) for metric in METRICS if metric in cases[0]}
    known = ~np.isnan(next(iter(values.values())))  # (cases, classes)
    totals = {metric: known_mean(table, 0) for metric, table in values.items()} | {"cases": known.sum(0)}
    if "presence" in cases[0]:
        totals |= {key: sum(case["presence"] == n for case in cases) for key, n in PRESENCE.items()}

    def by_class(table: dict[str, Array]) -> dict[str, dict]:
        return {name: {key: plain(row[i]) for key, row in table.items()} for i, name in enumerate(names)}

    return {
        "mean": {metric: plain(known_mean(table[:, columns], 0, 0)) for metric, table in values.items()},
        "interval": {metric: _interval(table[:, columns]) for metric, table in values.items()},
        "scored": [names[column] for column in columns],
        "per_class": by_class(totals),
        "per_case": {case: by_class({m: t[i] for m, t in values.items()}) for i, case in enumerate(scores)},
    }


def plain(value: np.number) -> float | int | None:
    """Return a NumPy number as a Python number, and None for NaN, so that JSON can hold it."""
    return None if np.isnan(value) else value.item()


def known_mean(values: Array, *axes: int) -> Array:
    """Return the mean without NaN along one axis after the other; NaN where all are NaN (no warning)."""
    for axis in axes:
        known = ~np.isnan(values)
        values = np.where(known, values, 0).sum(axis) / np.where(known.any(axis), known.sum(axis), np.nan)
    return values


def _interval(values: Array) -> list[float] | None:
    """Return the 95 % bootstrap interval [low, high] of the class mean of (cases, classes)."""
    values = values[~np.isnan(values).all(1)]  # A case without any of the classes does not affect their mean.
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.percentile(known_mean(values[draws], 1, 1), (2.5, 97.5)).tolist()


def print_table(results: dict) -> None:
    """Print the scored classes in the paper's order, the other classes, and the mean of the scored ones.

    Results are of `summarize`, with Dice, and may have "tolerance_mm", "convention", "prompts", "baseline".
    """
    convention, rows = results.get("convention", "masksam"), {}
    unit, tolerance = "mm" if convention == "masksam" else "voxels", results.get("tolerance_mm")
    titles = {"dice": "Dice", "worst": "worst", "best": "best", "hd95": f"HD95 {unit}"}
    titles |= {"nsd": "NSD" if tolerance is None else f"NSD {tolerance:g} mm", "cases": "cases"}
    titles |= {"only_truth": "missed", "only_prediction": "false"}
    for name, row in results["per_class"].items():
        dice = [d for case in results["per_case"].values() if (d := case[name]["dice"]) is not None]
        rows[name] = row | {"worst": min(dice, default=None), "best": max(dice, default=None)}
    summary = {"mean": results["mean"]}
    intervals = {metric: ends for metric, ends in results["interval"].items() if ends}
    for end, name in enumerate(("95 % from", "to") if intervals else ()):
        summary[name] = {metric: ends[end] for metric, ends in intervals.items()}
    scored = {name: rows.pop(name) for name in results["scored"]}
    titles = {key: title.rjust(6) for key, title in titles.items() if key in next(iter(scored.values()))}
    width = max(map(len, [*scored, *rows, "95 % from"]))
    print(header := "  ".join(["class".ljust(width), *titles.values()]))
    for block in filter(None, (scored, rows, summary)):
        if block is not scored:
            print("-" * len(header))
        for name, values in block.items():
            text = name.ljust(width)
            for key, title in titles.items():
                cell = values.get(key, "")
                cell = f"{cell:.{2 if key == 'hd95' else 4}f}" if isinstance(cell, float) else cell
                text += "  " + str("-" if cell is None else cell).rjust(len(title))
            print(text.rstrip())
    if (origin := results.get("prompts", "auto")) != "auto":
        origin, model = "the truth" if origin == "gt" else origin, results.get("baseline", "the model")
        print(f"Not automatic: {model} was given the {results.get('prompt_kind', 'boxes')} of {origin}.")
    if convention != "masksam":
        print(f"As {convention} scores (HD95 in voxels): never compare with our columns.")


def write_metrics(folder: Path, results: dict, suffix: str = "") -> None:
    """Write metrics<suffix>.json, and metrics<suffix>.csv with a row per case and class and then the means.

    The names end in -<convention> if it is foreign. Undefined values are null or empty; NaN is a ValueError.
    """
    convention = results.get("convention", "masksam")
    stem = f"metrics{suffix}" + ("" if convention == "masksam" else f"-{convention}")
    write_text(folder / f"{stem}.json", json.dumps(results, indent=1, allow_nan=False))
    rows = [["case", "class", *results["mean"]]]
    for case, classes in (results["per_case"] | {"mean": results["per_class"]}).items():
        rows += [[case, name, *(row[metric] for metric in results["mean"])] for name, row in classes.items()]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_text(folder / f"{stem}.csv", table.getvalue())
