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
import functools
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
from support.planning import Plan, make_plan, parallel, print_info, survey

Array, Shape = np.ndarray, Sequence[int]
SLAB = 8  # Ours: `resample_scores` makes the scores of all classes for at most 8 slices at once


def normalise(channel: Array, modality: str, intensity: Sequence[float] | None) -> Array:
    """Normalise a channel (D, H, W) as nnU-Net does: CT with numbers of the plan, MR with its own numbers."""
    if modality == "CT":
        low, high, mean, deviation = intensity
        return (channel.clip(low, high) - mean) / max(deviation, 1e-8)
    if modality == "MR":
        shift, scale = channel.mean(dtype=np.float64), channel.std(dtype=np.float64)
    elif modality == "rescale_to_0_1":
        shift, scale = np.float64(channel.min()), np.float64(channel.max()) - channel.min()
    else:
        shift, scale = 0.0, {"rgb_to_0_1": 255.0, "noNorm": 1.0}[modality]
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
    first, *others = case.images
    channels, geometry = read_image(first)  # (C, D, H, W), turned as this file decides
    for path in others:
        more, place = read_image(path, geometry)
        check_same_place(path, place, first, geometry)
        channels = np.concatenate([channels, more])
    image = prepare_image(channels, geometry, plan, first)
    label_maps = {None: None}  # file -> class ids on the plan's grid
    for path in filter(None, (case.label, case.box_source)):
        label, place = read_label(path, len(plan.task.labels), geometry)
        check_same_place(path, place, first, geometry)
        label_maps[path] = resample_label(label, image.shape[1:])
    return Prepared(image, label_maps[case.label], geometry, label_maps[case.box_source])


def prepare_image(channels: Array, geometry: Geometry, plan: Plan, name="image") -> Array:
    """Normalise and resample an image, (C, D, H, W) -> (C, D', H', W') float32.

    Raises: ValueError, with the name, for other channels than the plan's or too large a size on its grid.
    """
    if len(channels) != len(plan.task.channels):
        expected = f"{len(plan.task.channels)}: {', '.join(plan.task.channels)}"
        raise ValueError(f"{name}: found {len(channels)} channels, expected {expected}")
    axes = zip(geometry.shape, geometry.spacing, plan.spacing)
    shape = tuple(n if new is None else max(1, round(n * old / new)) for n, old, new in axes)
    needed = 32 * len(channels) * np.prod(shape, dtype=float)  # Ours: bytes to prepare a case
    if needed > total_memory():
        found = f"{shape} voxels after resampling to {plan.spacing} mm, which need {needed / 2**30:.0f} GiB"
        raise ValueError(f"{name}: found {found}; expected spacings near those of the training cases")
    # Ours (as nnU-Net): cubic splines, but thick slices are copied and not mixed: they may differ a lot.
    depth_order = 0 if geometry.spacing[0] > 3 * min(geometry.spacing) else 3
    normal = map(normalise, channels, plan.task.modality, plan.intensity)
    image = np.stack([resample(each, shape, depth_order) for each in normal], dtype=np.float32)
    if not np.isfinite(image).all():
        raise ValueError(f"{name}: found numbers beyond float32 when normalised, expected an image")
    return image


def resample(volume: Array, shape: Shape, depth_order: int) -> Array:
    """Resample (D, H, W) to a shape of the same extent by splines: cubic in plane, `depth_order` along D."""
    depth, *plane = np.divide(shape, volume.shape)
    zoom = functools.partial(ndimage.zoom, mode="nearest", grid_mode=True)  # grid_mode keeps the extent
    if plane != [1, 1]:  # slice by slice, since a spline along D would cost time and change nothing
        volume = np.stack([zoom(part, plane, order=3) for part in volume])
    return volume if depth == 1 else zoom(volume, (depth, 1, 1), order=depth_order)


def resample_scores(slabs: Iterable[Tensor], depth: int, shape: Shape) -> Iterator[Tensor]:
    """Resample a semantic map (K, depth, H, W) trilinearly to `shape` (D', H', W') over the same extent.

    The scores of all classes may not fit into memory, so the map comes in parts (K, d, H, W) of any depth d,
    and leaves in parts (K, n, H', W') float32, n <= `SLAB`.
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
        weight = (places - below)[part, None, None].to(held.device)
        scores = torch.lerp(held[:, below[part] - first], held[:, above[part] - first], weight)
        yield F.interpolate(scores, size=shape[1:], mode="bilinear", align_corners=False)


def resample_label(label: Array, shape: Shape) -> Array:
    """Resample class ids (D, H, W) to another shape over the same extent.

    Ours: each class is resampled linearly, and the largest wins. This keeps thin classes; "nearest" does not.
    """
    if label.shape == tuple(shape):
        return label
    ids = np.unique(label)  # absent classes cannot win
    starts = range(0, len(label), SLAB)
    slabs = (torch.from_numpy(label[i : i + SLAB] == ids[:, None, None, None]) for i in starts)
    winners = [scores.argmax(0).to(torch.uint8) for scores in resample_scores(slabs, len(label), shape)]
    return ids[torch.cat(winners).numpy()]


# ------------------------------------------------------------------------------------------------------ cache
RECIPE = 4  # part of every file name: raise it when `prepare_case` or `Plan` change what they make
# Each case has the files CASE-KEY.PART.npy, which are memory-mapped ("r") or read, and CASE-KEY.json.
PARTS = {"image": "r", "minimum": None, "foreground": None, "label": "r"}


def prepare(source: DataSource, cache_dir: str | Path, workers: int = 1) -> Plan:
    """Check all files, make the plan, and write the arrays of labelled cases that are missing or damaged.

    If files have problems, nothing is written, and a ValueError lists them all.
    """
    folder, cases = Path(cache_dir), source.cases
    paths = [path for case in cases for path in (*case.images, case.label, case.box_source)]
    plan_file = folder / f"plan-{file_key(dataclasses.asdict(source), paths)}.json"  # written after the check
    try:
        plan = Plan.from_dict(json.loads(plan_file.read_text()))
    except (OSError, ValueError):  # not there, or damaged
        measured = survey(cases, source.task, workers)
        plan = make_plan(source, [measured[case] for case in source.splits.get("train", ())])
        print("\n".join(plan.decisions))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(plan_file, json.dumps(plan.as_dict(), indent=1))
    write = functools.partial(_write_missing_parts, plan=plan, folder=folder)
    list(parallel(write, [case for case in cases if case.label is not None], workers, "preparing"))
    return plan


def _write_missing_parts(case: Case, plan: Plan, folder: Path) -> None:
    """Write the arrays of a case that are not there or damaged, and after them the checksums of all."""
    stem, box_part = _cached_files(case, plan, folder)
    files = {part: Path(f"{stem}.{part}.npy") for part in (*PARTS, box_part) if part}
    try:
        sums = json.loads(Path(f"{stem}.json").read_text())
    except (OSError, ValueError):  # not there, or damaged
        sums = {}
    missing = [part for part, file in files.items() if sums.get(part) != _checksum(file)]
    if not missing:
        return
    if damaged := [part for part in missing if part in sums]:
        print(f"{stem}: found damaged files ({', '.join(damaged)}); the case is prepared again")
    made = prepare_case(case, plan)
    arrays = (made.image, made.image.min((1, 2, 3)), _foreground_voxels(made.label), made.label)
    arrays = {box_part: made.box_labels} | dict(zip(PARTS, arrays))
    for part in missing:
        write_whole(files[part], lambda file, part=part: np.save(file, arrays[part]), sync=False)
        sums[part] = _checksum(files[part])
    write_text(Path(f"{stem}.json"), json.dumps(sums))


def _checksum(file: Path) -> list[int]:
    """Return the size and the CRC of a file; those of an empty file if it is not there."""
    content = file.read_bytes() if file.is_file() else b""
    return [len(content), zlib.crc32(content)]


def load_cached(case: Case, plan: Plan, cache_dir: str | Path) -> Prepared:
    """Return a case that `prepare` has written, with memory-mapped arrays."""
    parts = _open_parts(*_cached_files(case, plan, cache_dir))
    return Prepared(parts["image"], parts["label"], read_header(case.images[0])[1], parts["boxes"])


def cached_shapes(cases: Sequence[Case], plan: Plan, cache_dir: str | Path) -> list[tuple[int, ...]]:
    """Return (D, H, W) of each prepared case."""
    return [_open_parts(*_cached_files(case, plan, cache_dir))["label"].shape for case in cases]


def _open_parts(stem: str, box_part: str | None) -> dict[str, Array | None]:
    """Open the arrays of `PARTS`, and "boxes": the label map whose boxes are given, or None."""
    if not Path(f"{stem}.json").is_file():
        raise FileNotFoundError(f"{stem}.json: found no such file; run `data.py prepare` first")
    parts = {part: np.load(f"{stem}.{part}.npy", mode) for part, mode in PARTS.items()}
    return parts | {"boxes": box_part and np.load(f"{stem}.{box_part}.npy", "r")}


def _cached_files(case: Case, plan: Plan, cache_dir: str | Path) -> tuple[str, str | None]:
    """Return how the paths of a case's cached files begin, and which part has the given boxes, if any."""
    stem = str(Path(cache_dir) / f"{case.name}-{file_key(plan.as_dict(), (*case.images, case.label))}")
    if case.box_source is None:
        return stem, None
    own = case.box_source == case.label  # The boxes of the true label map need no file of their own.
    return stem, "label" if own else f"boxes-{file_key(None, [case.box_source])}"


def file_key(settings, paths: Iterable[str | Path | None]) -> str:
    """Return 16 characters that stand for settings (JSON's types) and for paths, sizes and times of files."""
    there = [path for path in paths if path and os.path.exists(path)]
    files = [(os.path.abspath(path), (s := os.stat(path)).st_size, s.st_mtime_ns) for path in there]
    return hashlib.sha256(json.dumps([RECIPE, settings, files]).encode()).hexdigest()[:16]


def _foreground_voxels(label: Array) -> Array:
    """Draw up to 1,000 voxels of each class (Ours) to centre patches on: (n, 4) class, d, h, w."""
    rng, voxels = np.random.default_rng(0), [np.zeros((0, 4), np.int32)]
    for class_id in np.unique(label[label > 0]):
        places = rng.permutation(np.argwhere(label == class_id))[:1000]
        voxels.append(np.insert(places, 0, class_id, axis=1).astype(np.int32))
    return np.concatenate(voxels)


# ----------------------------------------------------------------------------------- patches and augmentation
FOREGROUND_SHARE = 1 / 3  # Ours: nnU-Net's share of patches that are centred on a foreground voxel
# (probability, range) of each augmentation. The kinds are nnU-Net's, and so are some of the numbers.
ROTATION = (0.5, (-np.pi / 6, np.pi / 6))  # Ours: radians, in plane (nnU-Net: 0.2, up to pi for thick slices)
SCALING = (0.5, (0.8, 1.25))  # Ours: in plane, uniform in the logarithm (nnU-Net: 0.2, 0.7 to 1.4)
NOISE = (0.15, (0.0, 0.3))  # Ours: deviation, in those of the image, 1 for CT and MR (nnU-Net: 0.1, to 0.3)
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
        seed, augment: number from 0 that decides all that is random; factor of all probabilities of changes.
    """

    cases: Sequence[Case]
    plan: Plan
    cache_dir: str | Path
    patch_size: Shape
    length: int
    seed: int
    augment: float = 1.0

    def __post_init__(self):
        self.files = [_cached_files(case, self.plan, self.cache_dir) for case in self.cases]
        for files in self.files:
            _open_parts(*files)  # A case that is not prepared is refused at the start.

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image (C, D, H, W) float32 (C + 1 with given boxes) and class ids (D, H, W) uint8."""
        if not 0 <= index < self.length:
            raise IndexError(f"patch {index} of {self.length}")  # this ends a `for` loop over the data set
        rng = np.random.default_rng((self.seed, index))
        case = _open_parts(*self.files[rng.integers(len(self.files))])
        low = self._corner(case["label"].shape, case["foreground"], rng)
        angle = rng.uniform(*ROTATION[1]) if rng.random() < self.augment * ROTATION[0] else 0
        scale = np.exp(rng.uniform(*np.log(SCALING[1]))) if rng.random() < self.augment * SCALING[0] else 1
        place = (case["minimum"], low, self.patch_size, angle, scale)
        image, label = cut(case["image"], case["label"], *place)
        axes = [axis for axis in self.plan.task.flip_axes if rng.random() < self.augment * FLIP]
        image, label = image.flip([axis + 1 for axis in axes]), label.flip(axes)
        image = change_intensities(image, rng, self.augment, self.plan.task.modality)
        if case["boxes"] is not None:  # cut and flipped as the true label map
            _, box_labels = cut(case["image"], case["boxes"], *place)
            image = torch.cat([image, box_labels.flip(axes)[None].to(image)])
        return image, label

    def _corner(self, shape: Shape, foreground: Array, rng: np.random.Generator) -> list[int]:
        """Return the patch's first voxel: inside the volume, or so that a smaller volume is centred."""
        spare = [n - p for n, p in zip(shape, self.patch_size)]
        if len(foreground) and rng.random() < FOREGROUND_SHARE:
            voxel = rng.choice(foreground[foreground[:, 0] == rng.choice(np.unique(foreground[:, 0])), 1:])
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
    Returns: image (C, *size) float32 and class ids (*size) uint8.
    """
    depth, height, width = size
    y, x = (torch.arange(n) - (n - 1) / 2 for n in (height, width))  # pixels, from the patch's centre
    # (H, W) each: the row and the column of the volume that each pixel of the patch shows
    rows = low[1] + (height - 1) / 2 + scale * (np.cos(angle) * y[:, None] - np.sin(angle) * x)
    columns = low[2] + (width - 1) / 2 + scale * (np.sin(angle) * y[:, None] + np.cos(angle) * x)
    window, grid = [slice(max(low[0], 0), min(low[0] + depth, label.shape[0]))], []
    for places, n in ((rows, label.shape[1]), (columns, label.shape[2])):
        first = min(max(int(places.min()) - 1, 0), n - 1)  # one more pixel on each side to interpolate
        stop = min(max(int(places.max()) + 3, first + 1), n)
        window.append(slice(first, stop))
        grid.insert(0, (2 * (places - first) + 1) / (stop - first) - 1)  # x before y, -1 to 1
    grid = torch.stack(grid, dim=-1)[None].float()  # (1, H, W, 2)
    part = torch.from_numpy(np.array(image[:, *window]))
    part_label = torch.from_numpy(np.array(label[tuple(window)])).float()
    floor = torch.from_numpy(minimum)[:, None, None, None]

    def sample(stack: Tensor, mode: str) -> Tensor:  # all slices of all channels share one grid; 0 outside
        return F.grid_sample(stack.flatten(0, -3)[None], grid, mode, "zeros", align_corners=False)[0]

    patch, patch_label = floor.repeat(1, *size), torch.zeros(tuple(size), dtype=torch.uint8)
    inside = slice(window[0].start - low[0], window[0].stop - low[0])  # slices of the patch that exist
    patch[:, inside] += sample(part - floor, "bilinear").unflatten(0, part.shape[:2])
    patch_label[inside] = sample(part_label, "nearest").byte()
    return patch, patch_label


def change_intensities(image: Tensor, rng: np.random.Generator, augment=1.0, modality=("MR",)) -> Tensor:
    """Change an image (C, D, H, W), all channels alike, by each kind with its probability times `augment`."""

    def draw(kind: tuple[float, tuple[float, float]]) -> float | None:
        value = rng.uniform(*kind[1])  # drawn even if it is not used
        return value if rng.random() < augment * kind[0] else None

    if (deviation := draw(NOISE)) is not None:
        deviation *= 1.0 if {"CT", "MR"}.issuperset(modality) else float(image.std())
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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, "data root fold group modality flip cache workers", data="phantom")
    parser.add_argument("action", choices=("check", "prepare", "info"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, prepare or describe a data set. A problem ends with exit status 1."""
    args = parse_arguments(argv)
    with one_sentence("data.py", args.debug):
        source = find_data(args.data, args.root, args.fold, args.group, args.modality, args.flip)
        cases, cache = source.cases, Path(args.cache) / source.name
        if args.action == "prepare":
            prepare(source, cache, args.workers or default_workers())
            print(f"{cache}: found or made {sum(case.label is not None for case in cases)} prepared cases")
            return
        measured = survey(cases, source.task, args.workers or default_workers())
        counts = ", ".join(f"{name} {len(part)}" for name, part in source.splits.items())
        print(f"{source.root}: no problems in {len(cases)} cases ({counts})")
        if train := [measured[case] for case in source.splits.get("train", ())]:
            print("\n".join(make_plan(source, train).decisions))
        if args.action == "info":
            print_info(source.task, list(measured.values()))


if __name__ == "__main__":
    main()
