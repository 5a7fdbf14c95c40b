"""Cases to training patches: plan, prepare and cache, cut and augment, label maps to segments (paper 2.2, 3).

    python data.py check --data X --root DIR     all that is wrong with a data set, at once
    python data.py prepare --data X --root DIR   what train.py would do first, ahead of it; goes on where it was stopped
    python data.py info --data X --root DIR      cases, sizes, spacings, intensities, classes

    prepare         all cases checked, planned from the training split, then written as memory-mapped .npy files
    prepare_case    one case -> normalised and resampled arrays, and the geometry of its file
    resample_scores    the way back: a semantic map -> the file's own grid, some slices at a time
    PatchDataset    cached cases -> augmented patches, a pure function of (seed, index)
    label_map_to_segments    a patch's labels -> one mask, box and class per segment: the "dataset mapping" of 2.2

Letters: C channels, D slices, H rows, W columns, K classes with background. Spacing is (D, H, W) in mm.
"""

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from matcher import Segments, masks_to_boxes
from support.files import default_workers, write_whole
from support.layouts import Case, DataSource, find_data
from support.nifti import Geometry, check_case, check_same_place, read_header, read_image, read_label
from support.presets import Preset

# ----------------------------------------------------------------------------------------------------------- whole sets


def parallel(function: Callable, items: Sequence, workers: int, desc: str) -> Iterator:
    """`function` of every item, in order, with a progress bar.

    In threads: gzip, NumPy and SciPy release the interpreter's lock (40 ACDC cases checked and prepared by two threads
    on two cores: 1.9 times as fast). The first error stops what has not begun.
    """
    if workers == 1:
        yield from map(function, tqdm(items, desc, leave=False, disable=not items))
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            yield from (future.result() for future in tqdm(futures, desc, leave=False, disable=not futures))
        finally:
            for future in futures:
                future.cancel()


def check_cases(
    cases: Sequence[Case], num_classes: int, workers: int = 1, others: Sequence[str | Path] | None = None
) -> list[str]:
    """Read every file of some cases; all problems, one line each: "FILE: found X, expected Y".

    Args:
        others: one more label map for each case, that should lie where the case lies.
    """

    def check(index: int) -> list[str]:
        return check_case(cases[index], num_classes, [] if others is None else [others[index]])

    return [problem for found in parallel(check, range(len(cases)), workers, "checking") for problem in found]


def check_source(source: DataSource, workers: int = 1) -> list[str]:
    """`check_cases` of all splits."""
    cases = [case for split in source.splits.values() for case in split]
    return check_cases(cases, len(source.labels), workers)


# ------------------------------------------------------------------------------------------------------------ preparing


@dataclasses.dataclass(frozen=True)
class Plan:
    """How cases are prepared; derived from the training split alone, and stored in every checkpoint.

    data: name of the set. spacing: (D, H, W) in mm to resample to; D is None where slices are kept as they are.
    intensity: per channel (low, high, mean, deviation) for CT; None for MR, which is normalised volume by volume.
    """

    data: str
    modality: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    flip_axes: tuple[int, ...]
    spacing: tuple[float | None, float, float]
    intensity: tuple[tuple[float, float, float, float], ...] | None

    def as_dict(self) -> dict:
        """Plain types, for a checkpoint and JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> "Plan":
        """Back from `as_dict`."""
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**tuples | {"intensity": values["intensity"] and tuple(map(tuple, values["intensity"]))})


def make_plan(source: DataSource, workers: int = 1) -> Plan:
    """Median spacing of the training cases, and for CT the intensities of their foreground.

    Slices are kept as they are where the median distance between them exceeds three times the median pixel.
    """
    cases = source.splits["train"]
    spacings = [read_header(case.images[0])[1].spacing for case in cases]
    depth, height, width = np.median(spacings, axis=0).tolist()
    spacing = (None if depth > 3 * min(height, width) else depth, height, width)
    intensity = None
    if source.modality == "CT":

        def sample(case: Case) -> list[np.ndarray]:
            foreground = read_label(case.label, len(source.labels))[0] > 0
            step = max(1, np.count_nonzero(foreground) // 10000)  # Ours: 10,000 voxels of each case are enough
            return [read_image(path)[0][foreground][::step] for path in case.images]

        samples = zip(*parallel(sample, cases, workers, "intensities"))
        intensity = tuple(_clip_and_scale(np.concatenate(channel)) for channel in samples)
    return Plan(source.name, source.modality, source.channels, source.labels, source.flip_axes, spacing, intensity)


def _clip_and_scale(foreground: np.ndarray) -> tuple[float, float, float, float]:
    low, high = np.percentile(foreground, (0.5, 99.5))
    clipped = foreground.clip(low, high)
    return float(low), float(high), float(clipped.mean()), float(clipped.std())


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case on the plan's grid.

    image: (C, D, H, W) float32, about mean 0 and deviation 1. label: (D, H, W) uint8, or None. geometry: of its file.
    prompts: (D, H, W) uint8, a label map whose segments' boxes are given, or None.
    """

    image: np.ndarray
    label: np.ndarray | None
    geometry: Geometry
    prompts: np.ndarray | None = None

    def network_input(self) -> Tensor:
        """(C, D, H, W), and behind the channels the prompts where there are any."""
        image = torch.from_numpy(np.array(self.image))
        return image if self.prompts is None else with_prompts(image, torch.from_numpy(np.array(self.prompts)))


def with_prompts(image: Tensor, prompts: Tensor) -> Tensor:
    """(C, D, H, W), (D, H, W) int -> (C + 1, D, H, W): `MaskSAM` reads given boxes off the last channel."""
    return torch.cat([image, prompts[None].to(image)])


def prepare_case(case: Case, plan: Plan) -> Prepared:
    """Read, check, normalise and resample one case; its label too where it has one.

    Raises:
        ValueError: listing what `check_case` would find, or another number of channels than the plan has.
    """
    if len(case.images) != len(plan.channels):
        raise ValueError(f"{case.name}: found {len(case.images)} channels, expected the plan's: {plan.channels}")
    channels, geometries = zip(*map(read_image, case.images))
    geometry = geometries[0]
    for path, other in zip(case.images, geometries):
        check_same_place(path, other, case.images[0], geometry)
    spacing = [old if new is None else new for old, new in zip(geometry.spacing, plan.spacing)]
    shape = tuple(max(1, round(n * old / new)) for n, old, new in zip(geometry.shape, geometry.spacing, spacing))
    # Neighbours across a thick slice may show something else: no spline is drawn through them.
    depth_order = 0 if geometry.spacing[0] > 3 * min(geometry.spacing) else 3
    image = np.empty((len(channels), *shape), np.float32)
    for index, channel in enumerate(channels):
        if plan.intensity:
            low, high, mean, deviation = plan.intensity[index]
            channel = channel.clip(low, high)
        else:
            mean, deviation = channel.mean(), channel.std()
        image[index] = resample((channel - mean) / max(deviation, 1e-8), shape, 3, depth_order)

    def on_the_grid(path: str | None) -> np.ndarray | None:
        if path is None:
            return None
        label, label_geometry = read_label(path, len(plan.labels))
        check_same_place(path, label_geometry, case.images[0], geometry)
        return resample_label(label, shape, len(plan.labels))

    return Prepared(image, on_the_grid(case.label), geometry, on_the_grid(case.prompts))


def resample(volume: np.ndarray, shape: tuple[int, int, int], order: int, depth_order: int) -> np.ndarray:
    """Resample (D, H, W) to another shape over the same extent: in plane, then over depth, by splines of two orders."""
    plane = (1, shape[1] / volume.shape[1], shape[2] / volume.shape[2])
    depth = (shape[0] / volume.shape[0], 1, 1)
    for zoom, spline in ((plane, order), (depth, depth_order)):
        if zoom != (1, 1, 1):  # grid_mode: the outer faces stay in place, not the centres of the corner voxels
            volume = ndimage.zoom(volume, zoom, order=spline, mode="nearest", grid_mode=True)
    return volume


SLAB = 8  # slices that are held for all classes: 134 MB for 16 classes of 512 x 512


def resample_scores(slabs: Iterable[Tensor], depth: int, shape: Sequence[int]) -> Iterator[Tensor]:
    """Resample a semantic map to another grid, trilinearly, over the same extent as `resample`.

    Slices come and go in order, so that neither grid is ever held as a whole for all classes.

    Args:
        slabs: (K, d, H, W) float each, together D = `depth` slices. shape: (D', H', W') to resample to.
    Yields:
        (K, n, H', W') float32, n up to `SLAB`.
    """
    slabs = iter(slabs)
    places = ((torch.arange(shape[0]) + 0.5) * (depth / shape[0]) - 0.5).clamp(0, depth - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=depth - 1)
    held, first = next(slabs).float(), 0
    for start in range(0, shape[0], SLAB):
        part = slice(start, start + SLAB)
        while first + held.shape[1] <= above[part][-1]:
            done = min(int(below[start]) - first, held.shape[1])  # slices that nothing needs any more
            held, first = torch.cat([held[:, done:], next(slabs).float()], dim=1), first + done
        weight = (places - below)[part, None, None]
        scores = torch.lerp(held[:, below[part] - first], held[:, above[part] - first], weight)
        yield F.interpolate(scores, size=shape[1:], mode="bilinear", align_corners=False)


def resample_label(label: np.ndarray, shape: Sequence[int], num_classes: int) -> np.ndarray:
    """Resample labels (D, H, W) to another shape over the same extent: the class that has most of each voxel.

    Ours: linear weights of every class. Nearest labels lose twice as much on the way there and back: of ACDC's
    myocardium 0.986 remains (Dice, mean of 40 volumes), with linear weights 0.996.
    """
    if label.shape == tuple(shape):
        return label
    slabs = (F.one_hot(torch.from_numpy(label[d : d + SLAB]).long(), num_classes) for d in range(0, len(label), SLAB))
    scores = resample_scores((slab.movedim(-1, 0) for slab in slabs), len(label), shape)
    return torch.cat([part.argmax(0).to(torch.uint8) for part in scores]).numpy()


# ---------------------------------------------------------------------------------------------------------------- cache

RECIPE = 2  # part of every key: raise it when `prepare_case` changes what it makes
PARTS = ("image", "minimum", "foreground", "label")  # the label is written last: with it a case counts as whole
LARGE = ("image", "label")  # memory-mapped


def prepare(source: DataSource, cache_dir: str | Path, workers: int = 1) -> Plan:
    """Check all files, plan, and write every labelled case as memory-mapped arrays. What is done is not done again.

    Args:
        source: of `find_data`. cache_dir: folder for the arrays, made if it is missing. workers: threads.
    Raises:
        ValueError: listing all that is wrong; nothing has been written then.
    """
    folder = Path(cache_dir)
    cases = [case for split in source.splits.values() for case in split]
    paths = [path for case in cases for path in (*case.images, case.label, case.prompts) if path is not None]
    plan_file = folder / f"plan-{file_key(dataclasses.asdict(source), paths)}.json"  # there once checked
    if plan_file.is_file():
        plan = Plan.from_dict(json.loads(plan_file.read_text()))
    else:
        problems = check_source(source, workers)
        if problems:
            raise ValueError(f"{len(problems)} problems in {source.root}:\n" + "\n".join(problems))
        plan = make_plan(source, workers)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(plan_file, lambda file: file.write(json.dumps(plan.as_dict(), indent=1).encode()))
    stems = {case: _stem(case, plan, folder) for case in cases if case.label is not None}
    missing = [case for case, stem in stems.items() if not Path(f"{stem}.label.npy").is_file()]

    def write(case: Case) -> None:
        prepared = prepare_case(case, plan)
        arrays = (prepared.image, prepared.image.min((1, 2, 3)), _foreground_voxels(prepared.label), prepared.label)
        for part, array in zip(PARTS, arrays):
            write_whole(Path(f"{stems[case]}.{part}.npy"), lambda file, array=array: np.save(file, array))

    def write_prompts(case: Case) -> None:
        label, shape = read_label(case.prompts, len(plan.labels))[0], np.load(f"{stems[case]}.label.npy", "r").shape
        array = resample_label(label, shape, len(plan.labels))
        write_whole(_prompts_file(case, plan, folder), lambda file: np.save(file, array))

    for _ in parallel(write, missing, workers, "preparing"):
        pass
    prompted = [case for case in stems if case.prompts and not _prompts_file(case, plan, folder).is_file()]
    for _ in parallel(write_prompts, prompted, workers, "preparing prompts"):
        pass
    return plan


def load_cached(case: Case, plan: Plan, cache_dir: str | Path) -> Prepared:
    """A case that `prepare` has written, with memory-mapped arrays."""
    arrays, prompts = _open_parts(_stem(case, plan, Path(cache_dir))), _prompts_file(case, plan, Path(cache_dir))
    geometry = read_header(case.images[0])[1]
    return Prepared(arrays["image"], arrays["label"], geometry, prompts and np.load(prompts, mmap_mode="r"))


def _open_parts(stem: str) -> dict[str, np.ndarray]:
    if not Path(f"{stem}.label.npy").is_file():
        raise FileNotFoundError(f"{stem}.label.npy: found no such file, expected what `prepare` writes; run it first")
    return {part: np.load(f"{stem}.{part}.npy", mmap_mode="r" if part in LARGE else None) for part in PARTS}


def _stem(case: Case, plan: Plan, folder: Path) -> str:
    """What a case's cached files are called, up to their part: changes with the plan and the case's own files."""
    return str(folder / f"{case.name}-{file_key(plan.as_dict(), filter(None, (*case.images, case.label)))}")


def _prompts_file(case: Case, plan: Plan, folder: Path) -> Path | None:
    """Where the prompts of a case are cached: the label where they are the truth, else a file of their own."""
    if case.prompts is None or case.prompts == case.label:
        return case.prompts and Path(f"{_stem(case, plan, folder)}.label.npy")
    return Path(f"{_stem(case, plan, folder)}.prompts-{file_key(None, [case.prompts])}.npy")


def file_key(facts, paths: Iterable[str | Path]) -> str:
    """A name for what is made of files by some settings: another one once a file or a setting has changed.

    Args:
        facts: the settings, as JSON knows them.
    """
    stats = [(os.path.abspath(path), os.stat(path)) for path in paths if os.path.exists(path)]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(json.dumps([RECIPE, facts, files]).encode()).hexdigest()[:16]


def _foreground_voxels(label: np.ndarray) -> np.ndarray:
    """(n, 4) class, d, h, w of up to 1,000 voxels of each class, to centre patches on."""
    rng, voxels = np.random.default_rng(0), [np.zeros((0, 4), np.int32)]
    for class_id in np.unique(label[label > 0]):
        places = np.argwhere(label == class_id)
        places = places[rng.permutation(len(places))[:1000]]
        voxels.append(np.insert(places, 0, class_id, axis=1).astype(np.int32))
    return np.concatenate(voxels)


# --------------------------------------------------------------------------------------------- patches and augmentation

FOREGROUND_SHARE = 1 / 3  # nnU-Net's share of patches centred on foreground
# (probability, range). The kinds are nnU-Net's; where a number is its own, the comment says so.
ROTATION = (0.5, (-np.pi / 6, np.pi / 6))  # Ours: radians in plane; nnU-Net: 0.2 and up to pi for thick slices
SCALING = (0.5, (0.8, 1.25))  # Ours: in plane, symmetric in its logarithm; nnU-Net: 0.2, 0.7 to 1.4
NOISE = (0.15, (0.0, 0.3))  # Ours: deviation, image deviations; nnU-Net: 0.1, variance up to 0.1
BLUR = (0.15, (0.5, 1.0))  # Ours: sigma in pixels; nnU-Net: 0.2, 0.5 to 1
BRIGHTNESS = (0.15, (0.75, 1.25))  # nnU-Net's
CONTRAST = (0.15, (0.75, 1.25))  # nnU-Net's
LOW_RESOLUTION = (0.15, (0.5, 1.0))  # Ours: side; nnU-Net: 0.25, the same sides
GAMMA = (0.3, (0.7, 1.5))  # nnU-Net's


class PatchDataset(torch.utils.data.Dataset):
    """Random patches of cached cases. Item i depends on (seed, i) alone: not on workers, processes or resuming.

    Args:
        cases: of a split. plan, cache_dir: of `prepare`. patch_size: (D, H, W). length: number of items.
        seed: of all randomness, from 0. augment: False gives plain crops.
    Raises:
        FileNotFoundError: a case that `prepare` has not written.
    """

    def __init__(
        self, cases: Sequence[Case], plan: Plan, cache_dir: str | Path, patch_size: Sequence[int],
        length: int, seed: int, augment: bool = True,
    ):  # fmt: skip
        self.stems = [_stem(case, plan, Path(cache_dir)) for case in cases]
        self.prompts = [_prompts_file(case, plan, Path(cache_dir)) for case in cases]
        for stem in self.stems:
            _open_parts(stem)
        self.flip_axes, self.patch_size = plan.flip_axes, tuple(patch_size)
        self.length, self.seed, self.augment = length, seed, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """image (C, D, H, W) float32, with prompts if its case has any (C + 1), and labels (D, H, W) int64."""
        if not 0 <= index < self.length:
            raise IndexError(f"patch {index} of {self.length}")  # ends a `for` loop over the data set
        rng = np.random.default_rng((self.seed, index))
        number = rng.integers(len(self.stems))
        case = _open_parts(self.stems[number])
        low = self._corner(case["label"].shape, case["foreground"], rng)
        angle, scale = 0.0, 1.0
        if self.augment:
            angle = rng.uniform(*ROTATION[1]) if rng.random() < ROTATION[0] else angle
            scale = np.exp(rng.uniform(*np.log(SCALING[1]))) if rng.random() < SCALING[0] else scale
        place = (case["minimum"], low, self.patch_size, angle, scale)
        image, label = cut(case["image"], case["label"], *place)
        axes = [axis for axis in self.flip_axes if self.augment and rng.random() < 0.5]
        image, label = image.flip([axis + 1 for axis in axes]), label.flip(axes)
        if self.augment:
            image = change_intensities(image, rng)
        if self.prompts[number]:
            _, prompts = cut(case["image"], np.load(self.prompts[number], mmap_mode="r"), *place)
            image = with_prompts(image, prompts.flip(axes))
        return image, label

    def _corner(self, shape: tuple[int, ...], foreground: np.ndarray, rng: np.random.Generator) -> list[int]:
        """First voxel of the patch, inside the volume where it fits, else so that the volume is centred."""
        spare = [n - p for n, p in zip(shape, self.patch_size)]
        if len(foreground) and rng.random() < FOREGROUND_SHARE:
            classes = foreground[:, 0]
            voxel = foreground[rng.choice(np.flatnonzero(classes == rng.choice(np.unique(classes)))), 1:]
            wanted = [int(v) - p // 2 for v, p in zip(voxel, self.patch_size)]
        else:
            wanted = [int(rng.integers(max(s, 0) + 1)) for s in spare]
        return [min(max(w, 0), s) if s > 0 else s // 2 for w, s in zip(wanted, spare)]


def cut(
    image: np.ndarray, label: np.ndarray, minimum: np.ndarray, low: Sequence[int], size: Sequence[int],
    angle: float = 0.0, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cut a patch, rotated and scaled about its centre in plane; of memory-mapped arrays only the part needed is read.

    Args:
        image: (C, D, H, W). label: (D, H, W). minimum: (C,) what the image is outside the volume; the label is 0 there.
        low: first voxel of the patch (D, H, W), may be negative. size: (D, H, W). angle: radians. scale: above 1 shows
            more of the volume.
    Returns:
        (C, *size) float32 and size int64.
    """
    depth, height, width = size
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    # (H, W) each: the place in the volume, in voxels, that every pixel of the patch shows.
    rows = low[1] + (height - 1) / 2 + scale * (np.cos(angle) * y - np.sin(angle) * x)
    columns = low[2] + (width - 1) / 2 + scale * (np.sin(angle) * y + np.cos(angle) * x)
    window = [slice(max(low[0], 0), min(low[0] + depth, label.shape[0]))]
    grid = []
    for places, n in ((rows, label.shape[1]), (columns, label.shape[2])):
        first = min(max(int(places.min()) - 1, 0), n - 1)  # one pixel more on each side for the interpolation
        stop = min(max(int(places.max()) + 3, first + 1), n)
        window.append(slice(first, stop))
        grid.insert(0, (2 * (places - first) + 1) / (stop - first) - 1)  # grid_sample wants x before y, -1 to 1
    grid = torch.stack(grid, dim=-1)[None].float()
    part = torch.from_numpy(np.array(image[(slice(None), *window)]))
    part_label = torch.from_numpy(np.array(label[tuple(window)])).float()
    floor = torch.from_numpy(minimum)[:, None, None, None]

    def sample(stack: Tensor, mode: str) -> Tensor:  # all slices of all channels share one grid; 0 outside
        return F.grid_sample(stack.flatten(0, -3)[None], grid, mode, "zeros", align_corners=False)[0]

    patch = floor.repeat(1, *size)
    patch_label = torch.zeros(tuple(size), dtype=torch.int64)
    inside = slice(window[0].start - low[0], window[0].stop - low[0])
    patch[:, inside] += sample(part - floor, "bilinear").unflatten(0, part.shape[:2])
    patch_label[inside] = sample(part_label, "nearest").long()
    return patch, patch_label


def change_intensities(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise, blur, brightness, contrast, low resolution and gamma, each with its probability, on all channels alike.

    Args:
        image: (C, D, H, W) of about mean 0 and deviation 1.
    """

    def draw(kind: tuple[float, tuple[float, float]]) -> float | None:
        value = rng.uniform(*kind[1])  # drawn in any case: one kind's probability does not move the others
        return value if rng.random() < kind[0] else None

    if (deviation := draw(NOISE)) is not None:
        image = image + deviation * torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    if (sigma := draw(BLUR)) is not None:
        kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
        kernel = kernel / kernel.sum()
        slices = F.pad(image.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
        slices = F.conv2d(F.conv2d(slices, kernel[None, None, :, None]), kernel[None, None, None])
        image = slices[:, 0].unflatten(0, image.shape[:2])
    if (factor := draw(BRIGHTNESS)) is not None:
        image = image * factor
    if (factor := draw(CONTRAST)) is not None:
        mean = image.mean((1, 2, 3), keepdim=True)
        image = ((image - mean) * factor + mean).clamp(image.min(), image.max())
    if (factor := draw(LOW_RESOLUTION)) is not None:  # in plane: C and D are batch and channels here
        size = [max(1, round(n * factor)) for n in image.shape[2:]]
        small = F.interpolate(image, size=size, mode="nearest-exact")  # "nearest" would shift by half a pixel
        image = F.interpolate(small, size=image.shape[2:], mode="bilinear", align_corners=False)
    if (power := draw(GAMMA)) is not None:
        low, span = image.min(), (image.max() - image.min()).clamp(min=1e-6)
        image = ((image - low) / span) ** power * span + low
    return image


# -------------------------------------------------------------------------------------------------- dataset mapping 2.2


def label_map_to_segments(labels: Tensor, num_classes: int) -> Segments:
    """The dataset mapping of 2.2: per slice one binary mask per class present, its class id and its box.

    Ours: background is a class like the others (as in the release), so that the semantic map needs no threshold.

    Args:
        labels: (S, H, W) int, ids from 0 to num_classes - 1.
    Returns:
        Segments on the labels' device; a class that a slice lacks is marked absent.
    """
    masks = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None, None]
    return Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def default_preset(source: DataSource, plan: Plan, cache_dir: str | Path) -> Preset:
    """Ours: sizes for a folder of which nothing else is known, from the median cached training case.

    The patch is that case's slices, in multiples of 4 up to 256 x 256, and at most 8 deep; the encoder sees it four
    times as large, which gives SAM's masks the patch's own resolution, up to SAM's 1024. Queries: half as many again as
    classes, in eights.
    """
    shapes = [load_cached(case, plan, cache_dir).label.shape for case in source.splits["train"]]
    depth, *plane = np.median(shapes, axis=0)
    height, width = (min(256, 4 * int(np.ceil(side / 4))) for side in plane)
    return Preset(
        plan.labels, plan.modality, (min(8, round(depth)), height, width), (4 * height, 4 * width),
        num_queries=8 * int(np.ceil(1.5 * len(plan.labels) / 8)), epochs=500, flip_axes=plan.flip_axes,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- command line


def describe(source: DataSource, workers: int = 1) -> dict:
    """Facts of a checked data set, for `info`: arrays over cases, or over the cases with labels.

    Returns:
        shape (n, 3) and spacing (n, 3) as (D, H, W); percentiles (n, 3), the 0.5, 50 and 99.5 of the first channel;
        volume (m, K-1) of each class in ml; share (m, K-1) of all voxels.
    """

    def facts(case: Case) -> tuple:
        image, geometry = read_image(case.images[0])
        percentiles = np.percentile(image, (0.5, 50, 99.5))
        if case.label is None:
            return geometry.shape, geometry.spacing, percentiles, None
        label = read_label(case.label, len(source.labels))[0]
        counts = np.array([np.count_nonzero(label == class_id) for class_id in range(1, len(source.labels))])
        return geometry.shape, geometry.spacing, percentiles, counts

    cases = [case for split in source.splits.values() for case in split]
    shape, spacing, percentiles, counts = zip(*parallel(facts, cases, workers, "reading"))
    known = [i for i, count in enumerate(counts) if count is not None]
    counts = np.array([counts[i] for i in known]).reshape(len(known), len(source.labels) - 1)
    shape, spacing = np.array(shape), np.array(spacing)
    voxel = spacing[known].prod(1, keepdims=True) / 1000
    share = counts / shape[known].prod(1, keepdims=True)
    percentiles = np.array(percentiles)
    return {"shape": shape, "spacing": spacing, "percentiles": percentiles, "volume": counts * voxel, "share": share}


def print_description(source: DataSource, facts: dict) -> None:
    """Tables of `describe`."""
    print(f"{source.name} in {source.root}, {source.modality}, channels {', '.join(source.channels)}")
    print("cases: " + ", ".join(f"{name} {len(cases)}" for name, cases in source.splits.items()))
    print(f"\n{'over cases':32s}{'min':>12s}{'median':>12s}{'max':>12s}")
    rows = [("slices D", 0), ("rows H", 1), ("columns W", 2)]
    rows = [(name, facts["shape"][:, i]) for name, i in rows]
    rows += [(f"spacing {name}, mm", facts["spacing"][:, i]) for i, name in enumerate("DHW")]
    names = ("0.5 percentile", "median", "99.5 percentile")
    rows += [(f"intensity, {name}", facts["percentiles"][:, i]) for i, name in enumerate(names)]
    for name, values in rows:
        print(f"{name:32s}{values.min():12.5g}{np.median(values):12.5g}{values.max():12.5g}")
    print(f"\n{'class':32s}{'cases':>12s}{'median ml':>12s}{'% voxels':>12s}")
    for name, volume, share in zip(source.labels[1:], facts["volume"].T, facts["share"].T):
        present = volume > 0
        median = np.median(volume[present]) if present.any() else np.nan
        percent = 100 * share.mean() if len(share) else np.nan
        print(f"{name:32s}{present.sum():12d}{median:12.4g}{percent:12.3g}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("check", "prepare", "info"))
    parser.add_argument("--data", default="phantom", help="preset, or a folder with a dataset.json (default: phantom)")
    parser.add_argument("--root", help="where a preset's files lie (default: data/<preset>)")
    parser.add_argument("--fold", type=int, help="0 to 4 of five (default: the published split, else 0)")
    parser.add_argument("--cache", default="cache", help="where prepared cases are kept (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="threads (default: all cores, 4 GiB of memory each)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, prepare or describe a data set; a problem ends with exit status 1."""
    args = parse_arguments(argv)
    workers = args.workers or default_workers()
    try:
        source = find_data(args.data, args.root, args.fold)
        if args.action == "prepare":
            plan = prepare(source, Path(args.cache) / source.name, workers)
            print(json.dumps(plan.as_dict(), indent=1))
            return
        problems = check_source(source, workers)
        if problems:
            raise ValueError(f"{len(problems)} problems in {source.root}:\n" + "\n".join(problems))
        if args.action == "info":
            print_description(source, describe(source, workers))
        else:
            counts = ", ".join(f"{name} {len(cases)}" for name, cases in source.splits.items())
            print(f"{source.root}: no problems in {sum(map(len, source.splits.values()))} cases ({counts})")
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from error


if __name__ == "__main__":
    main()
