"""Scores of label maps: Dice, HD95 and NSD by case and class, their means, intervals and tables (paper 3, tables 1-3).

    score_maps     prediction and truth of one case -> one value per metric and class   (dice_per_class: Dice alone)
    summarize      all cases -> mean over cases by class, mean over classes, bootstrap interval
    print_table, write_metrics   what a reader sees: the paper's classes in the paper's order, .json and .csv
    compare_runs   the logs of several trainings -> one table, such as table 4

    masks ── surface ──> boundary voxels ── nearest_distances, both ways ──┬─ 95th percentile ──> HD95
                                                                           └─ share within the tolerance ──> NSD

A class that one map or both lack follows the chosen convention of `ABSENT`; NaN is left out of every mean.

Letters: D slices, H rows, W columns, K classes with background. Spacing is (D, H, W) in mm. Dice and NSD are fractions.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

METRICS = ("dice", "hd95", "nsd")
IN_TRUTH, IN_PREDICTION = 1, 2  # bits of "presence"
IN_BOTH = IN_TRUTH | IN_PREDICTION

# What (dice, hd95, nsd) are of a class that is in neither map, in the truth alone, in the prediction alone. Infinity
# stands for the image's diagonal. The others publish no NSD: theirs stays undefined where a surface is missing.
ABSENT = {
    "masksam": ((np.nan, np.nan, np.nan), (0, np.inf, 0), (0, np.inf, 0)),
    # github.com/282857341/nnFormer, nnformer/inference_synapse.py and inference_acdc.py: `dice`, `hd`
    "nnformer": ((1, 0, np.nan), (0, 0, np.nan), (0, 0, np.nan)),
    # github.com/Beckschen/TransUNet, utils.py: `calculate_metric_percase`
    "transunet": ((0, 0, np.nan), (0, 0, np.nan), (1, 0, np.nan)),
}
CONVENTIONS = tuple(ABSENT)
RESAMPLES = 1000  # Ours: of the bootstrap

# ----------------------------------------------------------------------------------------------------- one pair of maps


def dice_per_class(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Dice of the classes 1 ... K-1 of two label maps of one shape.

    Args:
        prediction, truth: (D, H, W) int, ids from 0 to K-1. num_classes: K.
    Returns:
        (K-1,) float64: NaN for a class that is in neither map, 0 for one that is in one of them only.
    Raises:
        ValueError: the shapes differ, or a label id is not below K.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, the truth {truth.shape}: expected one shape")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        low, high = labels.min(initial=0), labels.max(initial=0)
        if low < 0 or high >= num_classes:
            raise ValueError(f"the {name} has labels {low} to {high}, expected 0 to {num_classes - 1}")
    confusion = np.zeros(num_classes**2, np.int64)
    for predicted, true in zip(prediction, truth):  # slice by slice: a CT of int64 pairs would be 600 MB
        pairs = true.astype(np.int64) * num_classes + predicted
        confusion += np.bincount(pairs.ravel(), minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    sizes = (confusion.sum(0) + confusion.sum(1)).astype(np.float64)
    return 2 * confusion.diagonal()[1:] / np.where(sizes > 0, sizes, np.nan)[1:]


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask that have a face neighbour outside it; what lies outside the image is outside the mask.

    The same as the mask minus its erosion (medpy's definition), by slices: several times faster than ndimage's.

    Args:
        mask: (D, H, W) bool.
    Returns:
        (D, H, W) bool.
    """
    inner = mask.copy()
    for axis in range(mask.ndim):
        inside, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        inside[1:] &= whole[:-1]
        inside[:-1] &= whole[1:]
        inside[[0, -1]] = False
    return mask & ~inner


def nearest_distances(voxels: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance from each voxel of one set to the nearest of another, centre to centre, in no particular order.

    A k-d tree of the few surface voxels: a distance transform is as exact but fills the whole box around both.

    Args:
        voxels, others: (D, H, W) bool, neither empty. spacing: mm, or ones for distances in voxels.
    Returns:
        (number of voxels,) float64.
    """
    # An unbalanced tree without tight boxes is built fastest, and stays fast where many voxels are equally near.
    tree = cKDTree(np.argwhere(others) * spacing, balanced_tree=False, compact_nodes=False)
    distances, _ = tree.query(np.argwhere(voxels & ~others) * spacing)
    return np.concatenate([np.zeros(np.count_nonzero(voxels & others)), distances])


def score_maps(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], num_classes: int,
    tolerance: float = 1.0, convention: str = "masksam", workers: int = 1,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Dice, HD95 and NSD of the classes 1 ... K-1 of one case, on the grid that it is given on.

    HD95 is the 95th percentile of both surfaces' distances together (`medpy.metric.binary.hd95`), in mm, and in voxels
    by the conventions of others. NSD is the share of both surfaces' voxels within the tolerance of the other surface
    (Nikolov et al. 2018, counted in voxels as MONAI's `compute_surface_dice`), in mm always.

    Args:
        prediction, truth: (D, H, W) uint8, ids from 0 to K-1. spacing: (D, H, W) mm. num_classes: K.
        tolerance: of NSD, mm. convention: key of `ABSENT`. workers: threads; they share the maps and one class each.
    Returns:
        dice, hd95, nsd: (K-1,) float64. presence: (K-1,) uint8, `IN_TRUTH` and `IN_PREDICTION` added.
    Raises:
        ValueError: the shapes differ, a label id is not below K, or an unknown convention.
    """
    if convention not in ABSENT:
        raise ValueError(f"the metric convention is {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    dice = dice_per_class(prediction, truth, num_classes)
    spacing = np.asarray(spacing, np.float64)
    diagonal = np.linalg.norm(np.multiply(truth.shape, spacing))
    boxes = [ndimage.find_objects(labels, num_classes - 1) for labels in (truth, prediction)]

    def score_class(class_id: int) -> tuple[float, float, float, int]:
        true_box, predicted_box = (found[class_id - 1] for found in boxes)
        presence = IN_TRUTH * (true_box is not None) + IN_PREDICTION * (predicted_box is not None)
        if presence != IN_BOTH:
            absent = dict(zip(METRICS, ABSENT[convention][presence]))
            hd95 = diagonal if absent["hd95"] == np.inf else absent["hd95"]
            return absent["dice"], hd95, absent["nsd"], presence
        # The class ends with this box, so that what lies outside may be taken for background, as outside the image.
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(true_box, predicted_box))
        surfaces = [surface(labels[box] == class_id) for labels in (truth, prediction)]

        def distances(unit: Sequence[float]) -> np.ndarray:
            return np.concatenate([nearest_distances(*pair, unit) for pair in (surfaces, surfaces[::-1])])

        in_mm = distances(spacing)
        hd95 = np.percentile(in_mm if convention == "masksam" else distances((1, 1, 1)), 95)
        nsd = np.mean(in_mm <= tolerance * (1 + 1e-6))  # files hold float32 spacings: ten times 0.1 mm is within 1 mm
        return dice[class_id - 1], hd95, nsd, presence

    with ThreadPoolExecutor(workers) as pool:  # scipy's trees and numpy's slices release the interpreter's lock
        rows = np.array(list(pool.map(score_class, range(1, num_classes)))).reshape(-1, 4)
    return dict(zip(METRICS, rows.T)) | {"presence": rows[:, 3].astype(np.uint8)}


# ------------------------------------------------------------------------------------------------------------ all cases
def summarize(
    scores: dict[str, dict[str, np.ndarray]], labels: Sequence[str], scored: Sequence[int] = (), seed: int = 0
) -> dict:
    """Results of all cases: the mean over cases of each class, then the mean over the scored classes.

    Args:
        scores: case -> `score_maps`, or any of its metrics, the same of every case. labels: names by id, with
            background. scored: ids in the order of the paper's table; all classes in the order of their ids if empty.
        seed: of the bootstrap over cases.
    Returns:
        mean {metric: value}, interval {metric: [low, high] of 95 % or None below two cases}, scored [names],
        per_class {name: {metric: mean, "cases": number of cases with a Dice, and of those scores that say where a
        class is, how often it was in "neither", "only_truth" or "only_prediction"}}, per_case {case: {name: {metric:
        value}}}. None stands for NaN: json takes all of it.
    Raises:
        ValueError: no cases, or a scored id that is no class.
    """
    if not scores:
        raise ValueError("found no scores of any case, expected one or more to summarize")
    names = list(labels)[1:]
    columns = [class_id - 1 for class_id in scored] or list(range(len(names)))
    if not set(columns) <= set(range(len(names))):
        raise ValueError(f"the scored classes are {tuple(scored)}, expected ids from 1 to {len(names)}")
    cases = list(scores.values())
    values = {metric: np.stack([case[metric] for case in cases]) for metric in METRICS if metric in cases[0]}
    per_class = {name: {} for name in names}
    for metric, table in values.items():
        for name, mean in zip(names, _known_mean(table, 0), strict=True):
            per_class[name][metric] = _plain(mean)
    for name, known in zip(names, (~np.isnan(next(iter(values.values())))).sum(0)):
        per_class[name]["cases"] = int(known)
    if "presence" in cases[0]:
        presence = np.stack([case["presence"] for case in cases])
        for key, state in (("neither", 0), ("only_truth", IN_TRUTH), ("only_prediction", IN_PREDICTION)):
            for name, count in zip(names, (presence == state).sum(0)):
                per_class[name][key] = int(count)
    return {
        "mean": {metric: _plain(_class_mean(table[:, columns])) for metric, table in values.items()},
        "interval": {metric: _interval(table[:, columns], seed) for metric, table in values.items()},
        "scored": [names[column] for column in columns],
        "per_class": per_class,
        "per_case": {
            case: {name: {metric: _plain(values[metric][i, k]) for metric in values} for k, name in enumerate(names)}
            for i, case in enumerate(scores)
        },
    }


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN along an axis; NaN where nothing is known (of which np.nanmean warns)."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis) / np.where(known.any(axis), known.sum(axis), np.nan)


def _class_mean(values: np.ndarray) -> np.ndarray:
    """(..., cases, classes) -> (...): over the cases of each class, then over the classes."""
    return _known_mean(_known_mean(values, -2), -1)


def _interval(values: np.ndarray, seed: int) -> list[float] | None:
    """95 % of the class means of resampled cases: (cases, classes) -> low, high."""
    values = values[~np.isnan(values).all(1)]  # a case without any of the classes says nothing of their mean
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.percentile(_class_mean(values[draws]), (2.5, 97.5)).tolist()


def print_table(results: dict) -> None:
    """The scored classes in the paper's order, the others below a line, then the mean over the scored ones.

    Args:
        results: of `summarize`, and where known "tolerance_mm" of NSD, the "convention" of absent classes, and the
            "prompts" of the model or "baseline".
    """
    convention = results.get("convention", "masksam")
    tolerance = f" {results['tolerance_mm']:g} mm" if "tolerance_mm" in results else ""
    titles = {"dice": "Dice", "worst": "worst", "best": "best", "hd95": "HD95 mm", "nsd": f"NSD{tolerance}"}
    titles |= {"cases": "cases", "only_truth": "missed", "only_prediction": "false"}
    if convention != "masksam":
        titles["hd95"] = "HD95 voxels"
    rows = {}
    for name, scores in results["per_class"].items():
        known = [case[name]["dice"] for case in results["per_case"].values() if case[name].get("dice") is not None]
        extremes = {"worst": min(known, default=None), "best": max(known, default=None)} if "dice" in scores else {}
        rows[name] = scores | extremes
    present = next(iter(rows.values()))
    titles = {key: title for key, title in titles.items() if key in present}
    width = max(map(len, [*rows, "95 % from"]))
    rule = "-" * (width + sum(len(title.rjust(6)) + 2 for title in titles.values()))

    def line(name: str, values: dict) -> str:
        cells = []
        for key, title in titles.items():
            value = values.get(key)
            digits = 0 if isinstance(value, int) else 2 if key == "hd95" else 4
            cell = "" if key not in values else "-" if value is None else f"{value:.{digits}f}"
            cells.append(cell.rjust(max(6, len(title))))
        return "  ".join([name.ljust(width), *cells]).rstrip()

    print("  ".join(["class".ljust(width), *(title.rjust(6) for title in titles.values())]))
    others = [name for name in rows if name not in results["scored"]]
    for name in results["scored"]:
        print(line(name, rows[name]))
    if others:
        print("\n".join([rule, *(line(name, rows[name]) for name in others)]))
    print(rule)
    print(line("mean", results["mean"]))
    intervals = {metric: ends for metric, ends in results["interval"].items() if ends}
    for end, name in enumerate(("95 % from", "to") if intervals else ()):
        print(line(name, {metric: ends[end] for metric, ends in intervals.items()}))
    if results.get("prompts", "auto") != "auto":
        origin = "the truth" if results["prompts"] == "gt" else results["prompts"]
        print(f"Not automatic: {results.get('baseline', 'the model')} was given the boxes of {origin}.")
    if convention != "masksam":
        print(f"Absent classes are scored as {convention} does, HD95 is in voxels: never compare with our columns.")


def write_metrics(folder: Path, results: dict, write_whole: Callable, suffix: str = "") -> None:
    """metrics.json, all of `results`; metrics.csv, one row a case and class, then the means. Undefined is empty.

    By another convention than ours the files are called metrics-<convention>.

    Args:
        results: of `summarize`, with what else should be kept. write_whole: `nifti.write_whole`, path and writer.
        suffix: of the names, for results with given prompts.
    """
    content = json.dumps(results, indent=1, allow_nan=False)
    convention = results.get("convention", "masksam")
    name = f"metrics{suffix}" + ("" if convention == "masksam" else f"-{convention}")
    write_whole(folder / f"{name}.json", lambda file: file.write(content.encode()))
    metrics = list(results["mean"])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", "class", *metrics])
    for case, classes in (results["per_case"] | {"mean": results["per_class"]}).items():
        writer.writerows([case, name, *(scores[metric] for metric in metrics)] for name, scores in classes.items())
    write_whole(folder / f"{name}.csv", lambda file: file.write(table.getvalue().encode()))
