"""From files to training patches and back: prepare, cut, augment, dataset mapping (paper 2.2, 3).

    files ── survey, make_plan ──> Plan ── prepare_case ──> image (C, D, H, W), label (D, H, W)
    ── prepare ──> cache ── PatchDataset ──> augmented patches ── label_map_to_segments ──> masks, boxes
    semantic map of the network ── resample_scores ──> semantic map on the grid of the file

    python data.py check --data X --root DIR     list all problems of a data set
    python data.py prepare --data X --root DIR   write the cache, as train.py does when it starts
    python data.py info --data X --root DIR      print cases, sizes, spacings, intensities and classes

A case is one patient or one frame. Its files are never changed; prepared arrays lie in the cache.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from matcher import Segments, masks_to_boxes
from support.files import default_workers, make_parser, one_sentence, total_memory, write_text, write_whole
from support.layouts import Case, DataSource, find_data
from support.nifti import Geometry, check_same_place, read_header, read_image, read_label
from support.planning import Measured, Plan, make_plan, parallel, survey
from support.presets import Task

Array, Shape = np.ndarray, Sequence[int]


def normalise(channel: Array, modality: str, intensity: Sequence[float] | None) -> Array:
    """Normalise a channel (D, H, W) as nnU-Net does: CT with numbers of the plan, MR with its own numbers."""
    if modality == "CT":
        low, high, mean, deviation = intensity
        return (channel.clip(low, high) - mean) / max(deviation, 1e-8)
    if modality == "noNorm":
        return channel
    if modality == "MR":
        shift, scale = channel.mean(dtype=np.float64), channel.std(dtype=np.float64)
    elif modality == "rgb_to_0_1":
        shift, scale = 0.0, 255.0
    else:  # rescale_to_0_1
        shift, scale = np.float64(channel.min()), np.float64(channel.max()) - channel.min()
    return ((channel - shift) / max(scale, 1e-8)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case on the plan's grid.

    Args:
        image, geometry: (C, D, H, W) float32, of about mean 0 and deviation 1. Geometry of its first file.
        label: (D, H, W) uint8, the true class ids; None if they are hidden.
        box_labels: (D, H, W) uint8, the class ids whose boxes the network is given; None if it makes its own.
    """

    image: Array
    label: Array | None
    geometry: Geometry
    box_labels: Array | None = None

    def network_input(self) -> Tensor:
        """Return the image (C, D, H, W), or (C + 1, D, H, W) with the class ids of given boxes at the end."""
        parts = [self.image] if self.box_labels is None else [self.image, self.box_labels[None]]
        return torch.from_numpy(np.concatenate(parts, dtype=np.float32))


def prepare_case(case: Case, plan: Plan) -> Prepared:
    """Read, check, normalise and resample a case and its label maps.

    Raises: ValueError if `survey` would list a problem, or if the case does not fit into memory on the grid.
    """
    channels, geometry = read_image(case.images[0])  # (C, D, H, W), turned as the first file decides
    for path in case.images[1:]:
        more, place = read_image(path, geometry)
        check_same_place(path, place, case.images[0], geometry)
        channels = np.concatenate([channels, more])
    num_classes = len(plan.task.labels)
    if len(channels) != len(plan.task.channels):
        expected = f"{len(plan.task.channels)}: {', '.join(plan.task.channels)}"
        raise ValueError(f"{case.images[0]}: found {len(channels)} channels, expected {expected}")
    axes = zip(geometry.shape, geometry.spacing, plan.spacing)
    shape = tuple(n if new is None else max(1, round(n * old / new)) for n, old, new in axes)
    needed = 32 * len(channels) * np.prod(shape, dtype=float)  # Ours: bytes while a case is prepared
    if needed > total_memory():
        raise ValueError(
            f"{case.images[0]}: found {shape} voxels after resampling to {plan.spacing} mm, which need "
            f"{needed / 2**30:.0f} GiB; expected spacings near those of the training cases"
        )
    # Ours (as nnU-Net): cubic splines, but no mixing of thick slices, which may show different things.
    depth_order = 0 if geometry.spacing[0] > 3 * min(geometry.spacing) else 3
    normal = map(normalise, channels, plan.task.modality, plan.intensity)
    image = np.stack([resample(each, shape, 3, depth_order) for each in normal], dtype=np.float32)
    if not np.isfinite(image).all():
        raise ValueError(f"{case.images[0]}: found numbers beyond float32 when normalised, expected an image")

    def on_the_grid(path: str | None) -> Array | None:
        if path is None:
            return None
        label, label_geometry = read_label(path, num_classes, geometry)
        check_same_place(path, label_geometry, case.images[0], geometry)
        return resample_label(label, shape)

    return Prepared(image, on_the_grid(case.label), geometry, on_the_grid(case.box_source))


def resample(volume: Array, shape: Shape, order: int, depth_order: int) -> Array:
    """Resample (D, H, W) to another shape over the same extent, by splines of two orders."""
    depth, *plane = np.divide(shape, volume.shape)
    options = {"mode": "nearest", "grid_mode": True}  # grid_mode keeps the volume's outer faces in place
    if plane != [1, 1]:  # slice by slice, since a spline along D costs time and changes nothing
        volume = np.stack([ndimage.zoom(part, plane, order=order, **options) for part in volume])
    return volume if depth == 1 else ndimage.zoom(volume, (depth, 1, 1), order=depth_order, **options)


SLAB = 8  # Ours: number of slices for which the scores of all classes are in memory at once


def resample_scores(slabs: Iterable[Tensor], depth: int, shape: Shape) -> Iterator[Tensor]:
    """Resample a semantic map to `shape` (D', H', W'), trilinearly and over the same extent as `resample`.

    Slices come in order, as (K, d, H, W) with `depth` in all, and go as (K, n, H', W') float32 with n up to
    `SLAB`, so neither grid is in memory as a whole for all classes.
    """
    slabs = iter(slabs)
    places = ((torch.arange(shape[0]) + 0.5) * (depth / shape[0]) - 0.5).clamp(0, depth - 1)  # (D')
    below = places.floor().long()
    above = (below + 1).clamp(max=depth - 1)
    held, first = next(slabs).float(), 0  # slices first, first + 1, ... of the source
    for start in range(0, shape[0], SLAB):
        part = slice(start, start + SLAB)
        while first + held.shape[1] <= above[part][-1]:
            done = min(int(below[start]) - first, held.shape[1])  # slices that are no longer needed
            held, first = torch.cat([held[:, done:], next(slabs).float()], dim=1), first + done
        weight = (places - below)[part, None, None]
        scores = torch.lerp(held[:, below[part] - first], held[:, above[part] - first], weight)
        yield F.interpolate(scores, size=shape[1:], mode="bilinear", align_corners=False)


def resample_label(label: Array, shape: Shape) -> Array:
    """Resample class ids (D, H, W) to another shape over the same extent.

    Ours: every class is resampled linearly and the largest wins. This keeps thin classes; "nearest" does not.
    """
    if label.shape == tuple(shape):
        return label
    ids = np.unique(label)  # absent classes cannot win
    slabs = (label[start : start + SLAB] == ids[:, None, None, None] for start in range(0, len(label), SLAB))
    scores = resample_scores(
        map(torch.from_numpy, slabs), len(label), shape
    )  # (classes, d, H, W) -> (.., n, H', W')
    return ids[torch.cat([part.argmax(0).to(torch.uint8) for part in scores]).numpy()]


# ------------------------------------------------------------------------------------------------------ cache

RECIPE = 4  # part of every file name: raise it when `prepare_case` or `Plan` change what they make
PARTS = (
    "image",
    "minimum",
    "foreground",
    "label",
)  # files of a case; CASE-KEY.json with their sums is the last


def prepare(source: DataSource, cache_dir: str | Path, workers: int = 1, verify: bool = True) -> Plan:
    """Check all files, make the plan, and write the arrays of every labelled case that are not there yet.

    Arrays that do not match their stored checksums are made again, unless `verify` is off.
    If files have problems, nothing is written, and a ValueError lists them all.
    """
    folder, cases = Path(cache_dir), sum(source.splits.values(), ())
    paths = [path for case in cases for path in (*case.images, case.label, case.box_source) if path]
    plan_file = folder / f"plan-{file_key(dataclasses.asdict(source), paths)}.json"  # written after the check
    if plan_file.is_file():
        plan = Plan.from_dict(json.loads(plan_file.read_text()))
    else:
        measured = survey(cases, source.task, workers)
        plan = make_plan(source, [measured[case] for case in source.splits["train"]])
        print("\n".join(plan.decisions))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(plan_file, json.dumps(plan.as_dict(), indent=1))

    def write(case: Case) -> None:
        stem, box_part = _files(case, plan, folder)
        sums, sums_file = read_sums(stem), Path(f"{stem}.json")
        wanted = dict.fromkeys([*PARTS, *filter(None, [box_part])])
        if wrong := [
            part for part in wanted if part in sums and verify and sums[part] != checksum(stem, part)
        ]:
            print(f"{stem}: found damaged files ({', '.join(wrong)}); the case is prepared again")
        missing = [part for part in wanted if part not in sums or part in wrong]
        if not missing:
            return
        made = prepare_case(case, plan)
        arrays = (made.image, made.image.min((1, 2, 3)), _foreground_voxels(made.label), made.label)
        arrays = dict(zip(PARTS, arrays)) | ({box_part: made.box_labels} if box_part not in PARTS else {})
        for part in missing:
            write_whole(
                Path(f"{stem}.{part}.npy"), lambda file, part=part: np.save(file, arrays[part]), False
            )
            sums[part] = checksum(stem, part)
        write_text(sums_file, json.dumps(sums))

    list(parallel(write, [case for case in cases if case.label is not None], workers, "preparing"))
    return plan


def read_sums(stem: str) -> dict[str, list[int]]:
    """Return the stored checksums of the parts of a case; none if the case is not prepared."""
    try:
        return json.loads(Path(f"{stem}.json").read_text())
    except (OSError, ValueError):  # not there, or damaged
        return {}


def checksum(stem: str, part: str) -> list[int] | None:
    """Return the size and the CRC of a part of a case; None if it is not there."""
    file = Path(f"{stem}.{part}.npy")
    return [len(content := file.read_bytes()), zlib.crc32(content)] if file.is_file() else None


def load_cached(case: Case, plan: Plan, cache_dir: str | Path) -> Prepared:
    """Return a case that `prepare` has written, with memory-mapped arrays."""
    stem, box_part = _files(case, plan, cache_dir)
    parts, geometry = _open_parts(stem), read_header(case.images[0])[1]
    boxes = box_part and np.load(f"{stem}.{box_part}.npy", mmap_mode="r")
    return Prepared(parts["image"], parts["label"], geometry, boxes)


def cached_shapes(cases: Sequence[Case], plan: Plan, cache_dir: str | Path) -> list[tuple[int, ...]]:
    """Return (D, H, W) of each prepared case."""
    return [_open_parts(_files(case, plan, cache_dir)[0])["label"].shape for case in cases]


def _open_parts(stem: str) -> dict[str, Array]:
    if not Path(f"{stem}.json").is_file():
        raise FileNotFoundError(f"{stem}.json: found no such file; run `data.py prepare` first")
    large = ("image", "label")
    return {part: np.load(f"{stem}.{part}.npy", mmap_mode="r" if part in large else None) for part in PARTS}


def _files(case: Case, plan: Plan, cache_dir: str | Path) -> tuple[str, str | None]:
    """Return the beginning of the names of a case's cached files, and its part with given boxes or None."""
    key = file_key(plan.as_dict(), filter(None, (*case.images, case.label)))
    stem = str(Path(cache_dir) / f"{case.name}-{key}")
    if case.box_source is None:
        return stem, None
    # The boxes are those of the case's own label, or of a further file.
    same = case.box_source == case.label
    return stem, "label" if same else f"boxes-{file_key(None, [case.box_source])}"


def file_key(settings, paths: Iterable[str | Path]) -> str:
    """Return 16 characters that change with a setting (of JSON's types), or a file's path, size or time."""
    paths = filter(os.path.exists, paths)
    files = [(os.path.abspath(path), (s := os.stat(path)).st_size, s.st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps([RECIPE, settings, files]).encode()).hexdigest()[:16]


def _foreground_voxels(label: Array) -> Array:
    """Draw up to 1,000 voxels of each class (Ours) to centre patches on: (n, 4) class, d, h, w."""
    rng, voxels = np.random.default_rng(0), [np.zeros((0, 4), np.int32)]
    for class_id in np.unique(label[label > 0]):
        places = np.argwhere(label == class_id)
        places = places[rng.permutation(len(places))[:1000]]
        voxels.append(np.insert(places, 0, class_id, axis=1).astype(np.int32))
    return np.concatenate(voxels)


# ----------------------------------------------------------------------------------- patches and augmentation

FOREGROUND_SHARE = 1 / 3  # Ours: nnU-Net's share of patches that are centred on a foreground voxel
# (probability, range) of each augmentation. The kinds are nnU-Net's, and so are some of the numbers.
ROTATION = (0.5, (-np.pi / 6, np.pi / 6))  # Ours: radians, in plane (nnU-Net: 0.2, up to pi for thick slices)
SCALING = (0.5, (0.8, 1.25))  # Ours: in plane, uniform in the logarithm (nnU-Net: 0.2, 0.7 to 1.4)
NOISE = (0.15, (0.0, 0.3))  # Ours: deviation, in deviations of the image (nnU-Net: 0.1, variance up to 0.1)
BLUR = (0.15, (0.5, 1.0))  # Ours: sigma in pixels (nnU-Net: 0.2, 0.5 to 1)
BRIGHTNESS = (0.15, (0.75, 1.25))  # Ours: nnU-Net's factor
CONTRAST = (0.15, (0.75, 1.25))  # Ours: nnU-Net's factor
LOW_RESOLUTION = (0.15, (0.5, 1.0))  # Ours: factor of the side (nnU-Net: 0.25, the same factor)
GAMMA = (0.3, (0.7, 1.5))  # Ours: nnU-Net's power
FLIP = 0.5  # Ours: nnU-Net's probability for each axis of `Task.flip_axes`


@dataclasses.dataclass(eq=False)
class PatchDataset(torch.utils.data.Dataset):
    """Random patches of cached cases. Item i depends on (seed, i) alone, not on workers or processes.

    Args:
        cases, plan, cache_dir: cases that `prepare` has written to this folder with this plan.
        patch_size, length: (D, H, W), and the number of items.
        seed, augment: number from 0 that decides all that is random; whether patches are changed.
    """

    cases: Sequence[Case]
    plan: Plan
    cache_dir: str | Path
    patch_size: Shape
    length: int
    seed: int
    augment: bool = True

    def __post_init__(self):
        self.files = [_files(case, self.plan, self.cache_dir) for case in self.cases]
        for stem, _ in self.files:
            _open_parts(stem)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image (C, D, H, W) float32 (C + 1 with given boxes) and class ids (D, H, W) int64."""
        if not 0 <= index < self.length:
            raise IndexError(f"patch {index} of {self.length}")  # this ends a `for` loop over the data set
        rng = np.random.default_rng((self.seed, index))
        stem, box_part = self.files[rng.integers(len(self.files))]
        case = _open_parts(stem)
        low = self._corner(case["label"].shape, case["foreground"], rng)
        angle, scale = 0.0, 1.0
        if self.augment:
            angle = rng.uniform(*ROTATION[1]) if rng.random() < ROTATION[0] else angle
            scale = np.exp(rng.uniform(*np.log(SCALING[1]))) if rng.random() < SCALING[0] else scale
        place = (case["minimum"], low, self.patch_size, angle, scale)
        image, label = cut(case["image"], case["label"], *place)
        axes = [axis for axis in self.plan.task.flip_axes if self.augment and rng.random() < FLIP]
        image, label = image.flip([axis + 1 for axis in axes]), label.flip(axes)
        if self.augment:
            image = change_intensities(image, rng)
        if box_part:  # this label map takes the same way as the true one
            _, box_labels = cut(case["image"], np.load(f"{stem}.{box_part}.npy", mmap_mode="r"), *place)
            image = torch.cat([image, box_labels.flip(axes)[None].to(image)])
        return image, label

    def _corner(self, shape: Shape, foreground: Array, rng: np.random.Generator) -> list[int]:
        """Return the patch's first voxel: inside the volume, or so that a smaller volume is centred."""
        spare = [n - p for n, p in zip(shape, self.patch_size)]
        if len(foreground) and rng.random() < FOREGROUND_SHARE:
            classes = foreground[:, 0]
            voxel = foreground[rng.choice(np.flatnonzero(classes == rng.choice(np.unique(classes)))), 1:]
            wanted = [int(v) - p // 2 for v, p in zip(voxel, self.patch_size)]
        else:
            wanted = [int(rng.integers(max(s, 0) + 1)) for s in spare]
        return [min(max(w, 0), s) if s > 0 else s // 2 for w, s in zip(wanted, spare)]


def cut(
    image: Array, label: Array, minimum: Array, low: Shape, size: Shape, angle: float = 0, scale: float = 1
) -> tuple[Tensor, Tensor]:
    """Cut a patch that is rotated and scaled in plane about its centre, and read only the part that it shows.

    Args:
        image, label: (C, D, H, W) and class ids (D, H, W); they may be memory-mapped.
        minimum: (C), values outside the volume (Ours). The class id is 0 there.
        low, size: first voxel, which may be negative, and shape of the patch, both (D, H, W).
        angle, scale: rotation in radians; a scale above 1 shows more of the volume.
    Returns: image (C, *size) float32 and class ids (*size) int64.
    """
    depth, height, width = size
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    # (H, W) each: row and column of the volume, in voxels, for each pixel of the patch
    rows = low[1] + (height - 1) / 2 + scale * (np.cos(angle) * y - np.sin(angle) * x)
    columns = low[2] + (width - 1) / 2 + scale * (np.sin(angle) * y + np.cos(angle) * x)
    window, grid = [slice(max(low[0], 0), min(low[0] + depth, label.shape[0]))], []
    for places, n in ((rows, label.shape[1]), (columns, label.shape[2])):
        first = min(max(int(places.min()) - 1, 0), n - 1)  # one more pixel on each side to interpolate
        stop = min(max(int(places.max()) + 3, first + 1), n)
        window.append(slice(first, stop))
        grid.insert(0, (2 * (places - first) + 1) / (stop - first) - 1)  # x before y, -1 to 1
    grid = torch.stack(grid, dim=-1)[None].float()  # (1, H, W, 2)
    part = torch.from_numpy(np.array(image[(slice(None), *window)]))
    part_label = torch.from_numpy(np.array(label[tuple(window)])).float()
    floor = torch.from_numpy(minimum)[:, None, None, None]

    def sample(stack: Tensor, mode: str) -> Tensor:  # all slices of all channels share one grid; 0 outside
        return F.grid_sample(stack.flatten(0, -3)[None], grid, mode, "zeros", align_corners=False)[0]

    patch, patch_label = floor.repeat(1, *size), torch.zeros(tuple(size), dtype=torch.int64)
    inside = slice(window[0].start - low[0], window[0].stop - low[0])  # slices of the patch that exist
    patch[:, inside] += sample(part - floor, "bilinear").unflatten(0, part.shape[:2])
    patch_label[inside] = sample(part_label, "nearest").long()
    return patch, patch_label


def change_intensities(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change an image (C, D, H, W), all channels alike, by each kind of augmentation with its probability."""

    def draw(kind: tuple[float, tuple[float, float]]) -> float | None:
        value = rng.uniform(*kind[1])  # always drawn, so a probability does not move the other kinds
        return value if rng.random() < kind[0] else None

    if (deviation := draw(NOISE)) is not None:
        image = image + deviation * torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    if (sigma := draw(BLUR)) is not None:
        kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)  # Ours: 5 taps
        kernel = kernel / kernel.sum()
        slices = F.pad(image.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")  # (C * D, 1, H, W)
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


def label_map_to_segments(labels: Tensor, num_classes: int) -> Segments:
    """Map class ids (S, H, W) to segments (paper 2.2): one mask, class and box per slice and class present.

    Release and Ours: background is one of the K classes, so that the semantic map needs no threshold.
    """
    masks = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None, None]  # (S, K, H, W)
    return Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def print_info(task: Task, measured: Sequence[Measured]) -> None:
    """Print sizes, spacings and intensities of all cases, and volumes of the classes of labelled cases."""
    print(f"\n{'over cases':32s}{'min':>12s}{'median':>12s}{'max':>12s}")
    names = ["slices D", "rows H", "columns W", "spacing D, mm", "spacing H, mm", "spacing W, mm"]
    values = ("0.5 percentile", "median", "99.5 percentile")
    names += [f"{channel[:14]}, {value}" for channel in task.channels for value in values]
    rows = [(*m.geometry.shape, *m.geometry.spacing, *m.percentiles.flat) for m in measured]
    for name, column in zip(names, zip(*rows)):
        print(f"{name:32s}{min(column):12.5g}{np.median(column):12.5g}{max(column):12.5g}")
    print(f"\n{'class':32s}{'cases':>12s}{'median ml':>12s}{'% voxels':>12s}")
    labelled = [m for m in measured if m.counts[1:].any()]
    counts = np.array([m.counts for m in labelled])  # (cases, K)
    ml = counts * np.array([[np.prod(m.geometry.spacing) / 1000] for m in labelled])
    for i, name in [*enumerate(task.labels)][1:]:
        present = counts[:, i] > 0
        median = np.median(ml[present, i]) if present.any() else np.nan
        print(
            f"{name:32s}{present.sum():12d}{median:12.4g}{100 * (counts[:, i] / counts.sum(1)).mean():12.3g}"
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    common = "data root fold group modality flip cache workers".split()
    parser = make_parser(__doc__, *common, data="phantom")
    parser.add_argument("action", choices=("check", "prepare", "info"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, prepare or describe a data set. A problem ends with exit status 1."""
    args = parse_arguments(argv)
    workers = args.workers or default_workers()
    with one_sentence("data.py", args.debug):
        source = find_data(args.data, args.root, args.fold, args.group, args.modality, args.flip)
        cases, cache = sum(source.splits.values(), ()), Path(args.cache) / source.name
        if args.action == "prepare":
            prepare(source, cache, workers)
            print(f"{cache}: found or made {sum(case.label is not None for case in cases)} prepared cases")
            return
        measured = survey(cases, source.task, workers)
        counts = ", ".join(f"{name} {len(cases)}" for name, cases in source.splits.items())
        print(f"{source.root}: no problems in {len(cases)} cases ({counts})")
        print("\n".join((plan := make_plan(source, [measured[c] for c in source.splits["train"]])).decisions))
        if args.action == "info":
            print_info(plan.task, list(measured.values()))


if __name__ == "__main__":
    main()
