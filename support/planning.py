"""Read a data set once, and decide from the training cases how all cases are prepared (paper 3).

    cases ── survey ──> a line for each problem and remark; Measured, numbers of each case
    Measured of the training cases ── make_plan ──> Plan: spacing, intensities, flips, and the reasons

Every decision that the user did not take is a sentence in `Plan.decisions`. `data.py info` prints them.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.layouts import Case, DataSource
from support.nifti import CaseCheck, Geometry, check_case
from support.presets import Task

Array = np.ndarray
PERCENTILES = (0.5, 50, 99.5)  # Ours: nnU-Net's ends of the intensities, and the median


def parallel(function: Callable, items: Sequence, workers: int, desc: str) -> Iterator:
    """Call a function for every item in threads, and yield the results in order, with a progress bar."""
    if workers == 1:
        yield from map(function, tqdm(items, desc, leave=False, disable=not items))
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            yield from (future.result() for future in tqdm(futures, desc, leave=False, disable=not futures))
        finally:
            pool.shutdown(cancel_futures=True)  # the first error cancels all calls that have not begun


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

    def unlike(self, percentiles: Array) -> str:
        """Return a sentence if an image's percentiles (C, 3) are far from those of the training images.

        Ours: far is a range ten times as wide or as narrow, or one that does not meet the training range.
        """
        for name, (low, _, high), known in zip(self.task.channels, percentiles, self.ranges):
            least, most, narrow, wide = known
            if low > most or high < least or not narrow / 10 <= high - low <= wide * 10:
                expected = f"about {least:.5g} to {most:.5g} as in the training images"
                return f"found intensities {low:.5g} to {high:.5g} of {name}, expected {expected}"
        return ""


def survey(
    cases: Sequence[Case],
    task: Task,
    workers: int = 1,
    others: Sequence[str | Path] = (),
    plan: Plan | None = None,
) -> dict[Case, Measured]:
    """Read all files once, print a line for each remark, and measure the cases that have images.

    Args:
        others: one more label map for each case. plan: images that are unlike its own are remarked.
    Raises: ValueError with a line for each problem.
    """
    num_classes, problems, remarks, measured = len(task.labels), [], {}, {}

    def check(i: int) -> CaseCheck:
        def numbers(*arrays) -> Measured:
            return measure(*arrays, num_classes)

        return check_case(cases[i], num_classes, others[i : i + 1], numbers if cases[i].images else None)

    for case, found in zip(cases, parallel(check, range(len(cases)), workers, "checking")):
        problems += found.problems
        lines = list(found.remarks)
        if numbers := found.measured:
            measured[case] = numbers
            if (channels := len(numbers.percentiles)) != len(task.channels):
                expected = ", ".join(task.channels)
                problems.append(f"{case.images[0]}: found {channels} channels, expected {expected}")
            elif plan and (text := plan.unlike(numbers.percentiles)):
                lines.append(f"{case.images[0]}: {text}")
        for file, text in (line.split(": ", 1) for line in lines):
            remarks.setdefault(text, []).append(file)
    for text, names in remarks.items():
        print(f"remark: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {text}")
    if problems:
        raise ValueError(f"{len(problems)} problems:\n" + "\n".join(problems))
    return measured


def make_plan(source: DataSource, measured: Sequence[Measured]) -> Plan:
    """Decide how to prepare cases, from what `survey` measured in the training cases."""
    task, decisions = source.task, list(source.notes)
    if not any(each.counts[1:].any() for each in measured):
        raise ValueError(f"{source.root}: found no object in {len(measured)} training labels, expected some")
    depth, height, width = np.median([each.geometry.spacing for each in measured], axis=0).tolist()
    kept = (
        "every case keeps its slices, as the preset says"
        if task.keep_slices
        else f"slices {depth:.4g} mm apart"
    )
    decisions.append(
        f"Spacing: pixels of {height:.4g} x {width:.4g} mm, the median of the training cases; {kept}."
    )
    directions = Counter(each.geometry.slices for each in measured).most_common()
    found = " and ".join(f"{direction} in {number} training cases" for direction, number in directions)
    decisions.append(f"Slices: D goes {found}.")
    flips = task.flip_axes
    if flips is None:
        flips, reasons = decide_flips(np.stack([each.centres for each in measured]), task.labels)
        decisions += reasons
    else:
        names = ", ".join("DHW"[axis] for axis in flips) or "none"
        decisions.append(f"Flips: {names}, as the preset or --flip says.")
    intensity, ranges = [], []
    for channel, modality in enumerate(task.modality):
        voxels = np.concatenate([each.foreground[channel] for each in measured])
        intensity.append(clip_and_scale(voxels) if modality == "CT" else None)
        low, _, high = np.array([each.percentiles[channel] for each in measured]).T  # (cases) each
        ranges.append((low.min(), high.max(), (high - low).min(), (high - low).max()))
    task, spacing = (
        dataclasses.replace(task, flip_axes=flips),
        (None if task.keep_slices else depth, height, width),
    )
    ranges = tuple(tuple(map(float, ends)) for ends in ranges)
    return Plan(source.name, task, spacing, tuple(intensity), ranges, tuple(decisions))


# Ours: a class keeps to one side if it does so in 90 % of the cases, by more than 2 % of the volume.
SIDE_SHARE, SIDE_OFFSET = 0.9, 0.02


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
        if share[one, other] >= SIDE_SHARE:
            names = [f"class {labels[i]}" if i else "the middle of the volume" for i in (one, other)]
            why = (
                f"{names[0]} lies beyond {names[1]} in {100 * share[one, other]:.0f} % of the training cases"
            )
        else:
            flips.append(axis)
            why = "no class keeps to one side"
        reasons.append(f"Flips along {letter}: {'no' if axis not in flips else 'yes'}, since {why}.")
    return tuple(flips), reasons


def clip_and_scale(foreground: Array) -> tuple[float, float, float, float]:
    """Return (low, high, mean, deviation) of CT voxels. Ours: nnU-Net's percentiles, 0.5 and 99.5."""
    low, high = np.percentile(foreground, PERCENTILES[::2])
    clipped = foreground.clip(low, high).astype(np.float64)
    return float(low), float(high), float(clipped.mean()), float(clipped.std())
