"""Read a data set once, and decide from the training cases how all cases are prepared (paper 3).

    cases ── survey ──> a line for each problem and remark; Measured, numbers of each case
    Measured of the training cases ── make_plan ──> Plan: spacing, intensities, flips, and the reasons

Every decision that the user did not take is a sentence in `Plan.decisions`. `data.py info` prints them.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from support.layouts import Case, DataSource
from support.nifti import CaseCheck, Geometry, check_case
from support.presets import Task

Array = np.ndarray
PERCENTILES = (0.5, 50, 99.5)  # Ours: nnU-Net's ends of the intensities, and the median
PATIENT_AXES = ("left-right", "posterior-anterior", "inferior-superior")
# Ours: a class keeps to one side if it does so in 90 % of the cases, by more than 2 % of the volume.
SIDE_SHARE, SIDE_OFFSET = 0.9, 0.02


def parallel(function: Callable, items: Sequence, workers: int, desc: str) -> Iterator:
    """Call a function for every item in threads, and yield the results in order, with a progress bar."""
    with ThreadPoolExecutor(workers) as pool:  # if a call fails, `map` cancels those that wait
        results = (map if workers == 1 else pool.map)(function, items)
        yield from tqdm(results, desc, len(items), leave=False, disable=not items)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Numbers of one case.

    Args:
        geometry: of its first image. percentiles: (C, 3), the `PERCENTILES` of each channel.
        foreground: (C, n), values of about 10,000 voxels in objects. counts: (K), voxels of each class.
        centres: (K, 3), mean place of each class along D, H, W, from 0 to 1; NaN if the class is absent.
    """

    geometry: Geometry
    percentiles: Array
    foreground: Array
    counts: Array
    centres: Array


def measure(image: Array, label: Array | None, geometry: Geometry, num_classes: int) -> Measured:
    """Measure an image (C, D, H, W) and its label map (D, H, W)."""
    step = max(1, round((image[0].size / 2**20) ** 0.5))  # Ours: about a million voxels suffice
    percentiles = np.percentile(image[:, :, ::step, ::step], PERCENTILES, axis=(1, 2, 3)).T
    places = np.nonzero(np.zeros(geometry.shape, np.uint8) if label is None else label)
    ids = np.zeros(0, np.uint8) if label is None else label[places]
    counts = np.bincount(ids, minlength=num_classes)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an absent class is NaN
        sums = [np.bincount(ids, axis + 0.5, num_classes) / n for axis, n in zip(places, geometry.shape)]
        centres = np.stack(sums, axis=-1) / counts[:, None]
    every = max(1, len(ids) // 10000)  # Ours: 10,000 voxels of each case suffice
    counts[0] = image[0].size - len(ids)
    return Measured(geometry, percentiles, image[:, *(axis[::every] for axis in places)], counts, centres)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How cases are prepared. It is derived from the training split alone, and every checkpoint carries it.

    Args:
        data, task: name of the data set; its labels, channels, modality and flips.
        spacing: (D, H, W) in mm to which cases are resampled; D is None if every case keeps its slices.
        intensity: of each channel, (low, high, mean, deviation) for CT, None for others.
        ranges: of each channel, the lowest and the highest intensity of the training cases (percentiles), and
            the narrowest and the widest range of a single case.
        decisions: sentences that tell what was decided for the user, and from what.
    """

    data: str
    task: Task
    spacing: tuple[float | None, float, float]
    intensity: tuple[tuple[float, float, float, float] | None, ...]
    ranges: tuple[tuple[float, float, float, float], ...] = ()
    decisions: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """Return plain types, for a checkpoint and for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> "Plan":
        """Make a plan of the plain types; raise a ValueError if another version of this file wrote them."""
        if list(values) != (expected := list(cls.__dataclass_fields__)):
            raise ValueError(f"plan: found {list(values)}, expected {expected}; train again")

        def frozen(value):
            return tuple(map(frozen, value)) if isinstance(value, list) else value

        task = Task(**{key: frozen(value) for key, value in values["task"].items()})
        return cls(**{key: frozen(value) for key, value in values.items()} | {"task": task})

    def unlike(self, percentiles: Array, spacing: Sequence[float]) -> str:
        """Return a sentence if an image's percentiles (C, 3) or spacing are far from the training's.

        Ours: far is a range ten times as wide or as narrow, or one that does not meet the training range; or
        a spacing that is more than three times as large or as small.
        """
        if any(mm and not mm / 3 <= found <= mm * 3 for found, mm in zip(spacing, self.spacing)):
            found = f"found a spacing of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm"
            return f"{found}, unlike the training's {self.spacing}. Is it the same kind of image?"
        channels = zip(self.task.channels, percentiles, self.ranges)
        for name, (low, _, high), (least, most, narrow, wide) in channels:
            if low > most or high < least or not narrow / 10 <= high - low <= wide * 10:
                expected = f"about {least:.5g} to {most:.5g} as in the training images"
                return f"found intensities {low:.5g} to {high:.5g} of {name}, expected {expected}"
        return ""


def survey(cases: Sequence[Case], task: Task, workers=1, others=(), plan=None) -> dict[Case, Measured]:
    """Read all files once, print a line for each remark, and measure the cases that have images.

    `others` has one more label map per case, `plan` finds unlike images, and a ValueError lists all problems.
    """
    problems, remarks, measured = [], {}, {}

    def check(i: int) -> CaseCheck:
        numbers = functools.partial(measure, num_classes=len(task.labels)) if cases[i].images else None
        return check_case(cases[i], len(task.labels), others[i : i + 1], numbers)

    for case, found in zip(cases, parallel(check, range(len(cases)), workers, "checking")):
        problems += found.problems
        if numbers := found.measured:
            measured[case] = numbers
            if (channels := len(numbers.percentiles)) != len(task.channels):
                expected = f"{len(task.channels)}: {', '.join(task.channels)}"
                problems.append(f"{case.images[0]}: found {channels} channels, expected {expected}")
            elif plan and (text := plan.unlike(numbers.percentiles, numbers.geometry.spacing)):
                found.remarks.append(f"{case.images[0]}: {text}")
        for file, text in (line.split(": ", 1) for line in found.remarks):
            remarks.setdefault(text, []).append(file)
    for text, files in remarks.items():
        print(f"remark: {files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}: {text}")
    if problems:
        raise ValueError(f"{len(problems)} problem{'s'[: len(problems) - 1]}:\n" + "\n".join(problems))
    return measured


def make_plan(source: DataSource, measured: Sequence[Measured]) -> Plan:
    """Decide how to prepare cases, from what `survey` measured in the training cases."""
    task = source.task
    if not any(each.counts[1:].any() for each in measured):
        raise ValueError(f"{source.root}: found no object in {len(measured)} training labels, expected some")
    depth, height, width = np.median([each.geometry.spacing for each in measured], axis=0).tolist()
    kept = f"slices {depth:.4g} mm apart"
    if task.keep_slices:
        depth, kept = None, "every case keeps its slices, as the preset says"
    frames = [each.geometry.frame for each in measured]
    directions = Counter(PATIENT_AXES[np.abs(frame[:, 2]).argmax()] for frame in frames).most_common()
    decisions = [
        *source.notes,
        f"Spacing: pixels of {height:.4g} x {width:.4g} mm, the median of the training cases; {kept}.",
        f"Slices: D goes {' and '.join(f'{axis} in {n} training cases' for axis, n in directions)}.",
    ]
    if task.flip_axes is None:
        flips, reasons = decide_flips(np.stack([each.centres for each in measured]), task.labels)
        task = dataclasses.replace(task, flip_axes=flips)
        decisions += reasons
    else:
        names = ", ".join("DHW"[axis] for axis in task.flip_axes) or "none"
        decisions.append(f"Flips: {names}, as the preset or --flip says.")
    intensity, ranges = [], []
    for channel, modality in enumerate(task.modality):
        voxels = np.concatenate([each.foreground[channel] for each in measured])
        intensity.append(clip_and_scale(voxels) if modality == "CT" else None)
        low, _, high = np.array([each.percentiles[channel] for each in measured]).T  # (cases) each
        ranges.append(tuple(map(float, (low.min(), high.max(), (high - low).min(), (high - low).max()))))
    return Plan(source.name, task, (depth, height, width), *map(tuple, (intensity, ranges, decisions)))


def decide_flips(centres: Array, labels: Sequence[str]) -> tuple[tuple[int, ...], list[str]]:
    """Return the axes of (D, H, W) along which patches may be flipped, and a sentence for each axis.

    Ours: a class that keeps to one side of the volume, or of another class, forbids a flip. The names of the
    classes decide nothing. centres: (cases, K, 3), each from 0 to 1; NaN if a class is absent.
    """
    flips, reasons = [], []
    for axis, letter in enumerate("DHW"):
        places = np.insert(centres[:, 1:, axis], 0, 0.5, axis=1)  # (cases, K): the middle, then the classes
        offsets = places[:, :, None] - places[:, None]  # (cases, K, K)
        share = (offsets > SIDE_OFFSET).sum(0) / np.maximum(np.isfinite(offsets).sum(0), 1)
        one, other = np.unravel_index(share.argmax(), share.shape)
        if share[one, other] < SIDE_SHARE:
            flips.append(axis)
            reasons.append(f"Flips along {letter}: yes, since no class keeps to one side.")
        else:
            cases = f"{100 * share[one, other]:.0f} % of the training cases"
            where = f"class {labels[other]}" if one and other else "the middle of the volume"
            why = f"class {labels[one or other]} lies on one side of {where} in {cases}"
            reasons.append(f"Flips along {letter}: no, since {why}.")
    return tuple(flips), reasons


def clip_and_scale(foreground: Array) -> tuple[float, float, float, float]:
    """Return (low, high, mean, deviation) of CT voxels. Ours: nnU-Net's percentiles, 0.5 and 99.5."""
    low, high = np.percentile(foreground, PERCENTILES[::2])
    clipped = foreground.clip(low, high).astype(np.float64)
    return float(low), float(high), float(clipped.mean()), float(clipped.std())


def print_info(task: Task, measured: Sequence[Measured]) -> None:
    """Print sizes, spacings and intensities of all cases, and volumes of the classes of labelled cases."""
    names = ["slices D", "rows H", "columns W", "spacing D, mm", "spacing H, mm", "spacing W, mm"]
    values = ("0.5 percentile", "median", "99.5 percentile")
    names += [f"{channel[:14]}, {value}" for channel in task.channels for value in values]
    rows = [(*each.geometry.shape, *each.geometry.spacing, *each.percentiles.flat) for each in measured]
    print(f"\n{'over cases':32s}{'min':>12s}{'median':>12s}{'max':>12s}")
    for name, column in zip(names, zip(*rows)):
        print(f"{name:32s}{min(column):12.5g}{np.median(column):12.5g}{max(column):12.5g}")
    if labelled := [each for each in measured if each.counts[1:].any()]:
        print(f"\n{'class':32s}{'cases':>12s}{'median ml':>12s}{'% voxels':>12s}")
    for i, name in [*enumerate(task.labels)][1:] if labelled else ():
        ml = [each.counts[i] * np.prod(each.geometry.spacing) / 1000 for each in labelled if each.counts[i]]
        share = np.mean([each.counts[i] / each.counts.sum() for each in labelled])
        print(f"{name:32s}{len(ml):12d}{np.median(ml) if ml else np.nan:12.4g}{100 * share:12.3g}")
