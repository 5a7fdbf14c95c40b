"""Data sets: finding, checking and preparing NIfTI files, training patches, label maps to segments (paper 2.2, 3).

    find_data     --data and --root -> the cases of each split          (ACDC, Synapse, AMOS, any dataset.json folder)
    check_source  every file of them -> a list of all that is wrong
    prepare       checked cases -> normalised, resampled, memory-mapped .npy files under the cache
    PatchDataset  prepared cases -> augmented patches, a pure function of (seed, index)
    label_map_to_segments   a patch's labels -> one mask, box and class per segment: the "dataset mapping" of 2.2
    to_native, write_label_map   a semantic map -> a label map in the geometry of the file it was made from

NIfTI's (x, y, z) is turned to RAS and then to (D, H, W) in `read_volume`, and back in `write_label_map`; nowhere else.

Letters: C channels, D slices, H rows, W columns, K classes with background. Spacing is (D, H, W) in mm.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel import orientations
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from matcher import Segments, masks_to_boxes
from phantom import write_phantom

# -------------------------------------------------------------------------------------------------------------- presets


@dataclasses.dataclass(frozen=True)
class Preset:
    """One `--data` name: what its labels are and the run that the paper made on it (the authors' published constants).

    labels: names by id, 0 is background. modality: "MR" or "CT". patch_size: (D, H, W) voxels. encoder_size: pixels.
    flip_axes: of (D, H, W), where a flipped patch keeps its labels. scored: ids in the paper's table, all if empty.
    home, tree: where to get the files, and what they should look like.
    """

    labels: tuple[str, ...]
    modality: str
    patch_size: tuple[int, int, int]
    encoder_size: tuple[int, int]
    num_queries: int
    sam: str = "vit_b"
    epochs: int = 1000
    iterations: int = 250
    batch_size: int = 2
    lr: float = 1e-3
    weight_decay: float = 3e-5
    adam_eps: float = 1e-8
    clip: float = 12.0
    mask_weight: float = 1.5
    flip_axes: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    home: str = ""
    tree: str = ""


CARDIAC = ("background", "RV", "Myo", "LV")
ACDC_TREE = """ROOT/[database/]training/patient001/Info.cfg
                                   patient001_frame01.nii.gz
                                   patient001_frame01_gt.nii.gz
                                   ..."""
# fmt: off
PRESETS = {
    # Ours: sizes and schedule for some minutes on two cores.
    "phantom": Preset(
        CARDIAC, "MR", (4, 96, 96), (192, 192), 8, sam="tiny", epochs=8, iterations=100, batch_size=2,
        flip_axes=(1, 2), home="phantom.py writes it", tree=ACDC_TREE,
    ),
    "acdc": Preset(
        CARDIAC, "MR", (4, 256, 256), (1024, 1024), 8, epochs=500, flip_axes=(1, 2),
        home="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html", tree=ACDC_TREE,
    ),
    "synapse": Preset(
        ("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
         "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal", "left adrenal"),
        "CT", (26, 256, 256), (256, 256), 24, scored=(1, 2, 3, 4, 6, 7, 8, 11),
        home="https://www.synapse.org/#!Synapse:syn3193805 (RawData.zip)",
        tree="ROOT/[Abdomen/RawData/]Training/img/img0001.nii.gz\nROOT/[Abdomen/RawData/]Training/label/label0001.nii.gz",
    ),
    "amos": Preset(
        ("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta",
         "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"),
        "CT", (9, 512, 512), (512, 512), 24, adam_eps=1e-4, mask_weight=1.2,
        home="https://zenodo.org/records/7155725 (amos22.zip)",
        tree="ROOT/[amos22/]{imagesTr,labelsTr,imagesVa,labelsVa}/amos_0001.nii.gz",
    ),
}
# fmt: on

# Patients and cases of the published splits (nnFormer's for ACDC, TransUNet's for Synapse).
ACDC_TEST = {2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95}
ACDC_VAL = {89, 90, 91, 93, 94, 96, 97, 98, 99, 100}
SYNAPSE_TEST = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}
SYNAPSE_VAL = {27, 34, 40}  # Ours: held out of the 18 to choose a checkpoint; what others call validation is the test set


@dataclasses.dataclass(frozen=True)
class Case:
    """One volume: name, one file per channel, and the label file, or None where it is hidden."""

    name: str
    images: tuple[str, ...]
    label: str | None


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A data set on disk. splits: "train", "val" and as far as they exist others, each a tuple of cases."""

    name: str
    root: str
    modality: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    flip_axes: tuple[int, ...]
    splits: dict[str, tuple[Case, ...]]


# -------------------------------------------------------------------------------------------------------------- layouts


def find_data(data: str, root: str | None = None, seed: int = 0) -> DataSource:
    """Find the files of a data set and split them.

    Args:
        data: name of a preset, or the path of a folder with a `dataset.json`. root: where a preset's files lie, by
            default data/<preset>; the phantom is written there if it is not. seed: of the 80/20 split of a folder
            that brings none.
    Raises:
        FileNotFoundError: with where to get the data and the expected tree. ValueError: an unusable dataset.json.
    """
    if data not in PRESETS:
        return _find_folder(Path(data), seed)
    preset = PRESETS[data]
    path = Path(root or Path("data") / data)
    if data == "phantom" and not path.exists():
        write_phantom(path)
    finder = {"phantom": _find_acdc, "acdc": _find_acdc, "synapse": _find_synapse, "amos": _find_amos}[data]
    splits = finder(path, data, seed) if path.is_dir() else {}
    if not splits.get("train") or not splits.get("val"):
        found = "no such folder" if not path.is_dir() else "found no cases to train and validate on"
        raise FileNotFoundError(f"{path}: {found}. Expected {data}, from {preset.home}:\n{preset.tree}\nSee --root.")
    return DataSource(data, str(path), preset.modality, (preset.modality,), preset.labels, preset.flip_axes, splits)


def _find_acdc(root: Path, data: str, seed: int) -> dict[str, tuple[Case, ...]]:
    base = root / "database" if (root / "database").is_dir() else root
    splits: dict[str, list[Case]] = {"train": [], "val": [], "test": []}
    patients = sorted((base / "training").glob("patient[0-9]*"))
    test, val = ACDC_TEST, ACDC_VAL
    if data == "phantom":  # Ours: the same shares, 70 / 10 / 20, of however many there are
        ids = [int(patient.name[7:]) for patient in patients]
        val, test = set(ids[round(0.7 * len(ids)) : round(0.8 * len(ids))]), set(ids[round(0.8 * len(ids)) :])
    for patient in patients:
        number = int(patient.name[7:])
        splits["test" if number in test else "val" if number in val else "train"] += _acdc_frames(patient)
    hidden = [case for patient in sorted((base / "testing").glob("patient[0-9]*")) for case in _acdc_frames(patient)]
    if hidden:
        splits["testing"] = hidden
    return {name: tuple(cases) for name, cases in splits.items() if cases}


def _acdc_frames(patient: Path) -> list[Case]:
    """End-diastole and end-systole of one patient. Which frames they are stands in Info.cfg alone: patient 90 has 04."""
    info = dict(re.findall(r"^(\w+):\s*(\S+)", (patient / "Info.cfg").read_text(), re.MULTILINE))
    cases = []
    for phase in ("ED", "ES"):
        name = f"{patient.name}_frame{int(info[phase]):02d}"
        label = patient / f"{name}_gt.nii.gz"
        hidden = patient.parent.name == "testing" and not label.exists()
        cases.append(Case(name, (str(patient / f"{name}.nii.gz"),), None if hidden else str(label)))
    return cases


def _find_synapse(root: Path, data: str, seed: int) -> dict[str, tuple[Case, ...]]:
    base = next((root / sub for sub in ("Abdomen/RawData/Training", "RawData/Training", "Training") if (root / sub).is_dir()), root)
    splits: dict[str, list[Case]] = {"train": [], "val": [], "test": []}
    for image in sorted((base / "img").glob("img[0-9]*.nii*")):
        number = int(re.search(r"\d+", image.name)[0])
        label = base / "label" / image.name.replace("img", "label")
        split = "test" if number in SYNAPSE_TEST else "val" if number in SYNAPSE_VAL else "train"
        splits[split].append(Case(f"case{number:04d}", (str(image),), str(label)))
    return {name: tuple(cases) for name, cases in splits.items() if cases}


def _find_amos(root: Path, data: str, seed: int) -> dict[str, tuple[Case, ...]]:
    base = root / "amos22" if (root / "amos22").is_dir() else root

    def ct(images: str, labels: str) -> list[Case]:
        files = [file for file in sorted((base / images).glob("amos_*.nii.gz")) if int(file.name[5:9]) <= 500]  # CT alone
        return [Case(file.name[:9], (str(file),), str(base / labels / file.name)) for file in files]

    train, val = split_cases(ct("imagesTr", "labelsTr"), seed)
    splits = {"train": train, "val": val, "test": tuple(ct("imagesVa", "labelsVa"))}
    return {name: cases for name, cases in splits.items() if cases}


def split_cases(cases: list[Case], seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Shuffle by name with a seed and hold a fifth out (the first of five folds)."""
    order = np.random.default_rng(seed).permutation(len(cases))
    held_out = set(order[: round(len(cases) / 5)].tolist())
    parts = ([case for i, case in enumerate(cases) if (i in held_out) is out] for out in (False, True))
    return tuple(map(tuple, parts))


def _find_folder(root: Path, seed: int) -> DataSource:
    """A Decathlon or nnU-Net raw folder, from its dataset.json."""
    file = root / "dataset.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {root}: neither a preset ({', '.join(PRESETS)}) nor a folder with a dataset.json. Expected\n"
            "DIR/dataset.json with labels and modality (Decathlon) or channel_names (nnU-Net raw)\n"
            "DIR/imagesTr/CASE[_0000].nii.gz\nDIR/labelsTr/CASE.nii.gz"
        )
    try:
        description = json.loads(file.read_text())
        table = description["labels"]
        names = {int(key): value for key, value in table.items()} if "0" in table else {v: k for k, v in table.items()}
        labels = tuple(names[index] for index in range(len(names)))
        channels = description.get("channel_names") or description["modality"]
        channels = tuple(channels[str(index)] for index in range(len(channels)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: {type(error).__name__} {error}; expected labels with the whole numbers 0, 1, 2, ... and modality or channel_names"
        ) from error
    end = description.get("file_ending", ".nii.gz")
    cases = []
    for label in sorted((root / "labelsTr").glob(f"[!.]*{end}")):
        name = label.name.removesuffix(end)
        several = [root / "imagesTr" / f"{name}_{channel:04d}{end}" for channel in range(len(channels))]
        single = root / "imagesTr" / f"{name}{end}"
        images = [single] if len(channels) == 1 and not several[0].exists() else several
        cases.append(Case(name, tuple(map(str, images)), str(label)))
    with_label = {path for case in cases for path in case.images}
    for image in sorted((root / "imagesTr").glob(f"[!.]*{end}")):
        if str(image) not in with_label:  # `check_source` says that its label is missing
            name = image.name.removesuffix(end)
            cases.append(Case(name, (str(image),), str(root / "labelsTr" / image.name)))
    if len(cases) < 2:
        raise FileNotFoundError(f"{root}: found {len(cases)} labelled cases, expected two or more in imagesTr and labelsTr")
    splits_file = root / "splits_final.json"
    if splits_file.is_file():
        fold, by_name = json.loads(splits_file.read_text())[0], {case.name: case for case in cases}
        unknown = [name for names in fold.values() for name in names if name not in by_name]
        if unknown:
            raise ValueError(f"{splits_file}: names {unknown[:5]}, for which there are no files in {root}/labelsTr")
        splits = {split: tuple(by_name[name] for name in fold[split]) for split in ("train", "val")}
    else:
        splits = dict(zip(("train", "val"), split_cases(cases, seed)))
    modality = "CT" if "ct" in channels[0].lower().split() else "MR"
    sided = any(word in label.lower() for label in labels for word in ("left", "right"))
    return DataSource(root.resolve().name, str(root), modality, channels, labels, () if sided else (2,), splits)


# ------------------------------------------------------------------------------------------------- reading and checking


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a volume lay in its file: what is needed to write a label map back into the same place.

    affine: (4, 4) of the file. shape: (D, H, W) after turning to RAS. spacing: (D, H, W) in mm.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


def read_header(path: str) -> tuple[nib.Nifti1Image, Geometry]:
    """Open a NIfTI file and check its header, without reading its voxels.

    Raises:
        ValueError: missing or no NIfTI file, not three dimensions, impossible affine.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, expected a NIfTI volume")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises many kinds for what is not NIfTI
        raise ValueError(f"{path}: found no readable NIfTI file ({error}), expected .nii or .nii.gz") from error
    if len(image.shape) != 3 or 0 in image.shape:
        raise ValueError(f"{path}: found shape {image.shape}, expected three dimensions; one file per channel and frame")
    axes = image.affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.isfinite(image.affine).all() or (spacing <= 0).any() or abs(np.linalg.det(axes / spacing)) < 1e-3:
        raise ValueError(f"{path}: found the affine {image.affine.tolist()}, expected spacings above 0 and three axes")
    turn = orientations.io_orientation(image.affine)
    file_axes = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in (2, 1, 0)]  # which of the file's is D, H, W
    geometry = Geometry(
        image.affine, tuple(image.shape[axis] for axis in file_axes), tuple(float(spacing[axis]) for axis in file_axes)
    )
    return image, geometry


def read_volume(path: str) -> tuple[np.ndarray, Geometry]:
    """Read a volume, turned to RAS and transposed from NIfTI's (x, y, z).

    Returns:
        (D, H, W), of the type that the file's scaling gives, and its geometry.
    Raises:
        ValueError: as `read_header`, or the file is truncated.
    """
    image, geometry = read_header(path)
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # gzip, zlib and nibabel each have their own words for a truncated file
        raise ValueError(f"{path}: found a truncated or damaged file ({error}), expected {image.shape} voxels") from error
    array = orientations.apply_orientation(array, orientations.io_orientation(image.affine))
    return array.transpose(2, 1, 0), geometry


def read_image(case: Case) -> tuple[np.ndarray, Geometry]:
    """All channels of a case, checked: (C, D, H, W) float32. Raises ValueError with file, found and expected."""
    channels = []
    for path in case.images:
        array, geometry = read_volume(path)
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: found {np.count_nonzero(~np.isfinite(array))} voxels of NaN or infinity, expected numbers")
        _check_same_place(path, geometry, case.images[0], channels[0][1] if channels else geometry)
        channels.append((array, geometry))
    return np.stack([array for array, _ in channels]), channels[0][1]


def read_label(case: Case, num_classes: int) -> tuple[np.ndarray, Geometry]:
    """The label map of a case, checked: (D, H, W) uint8. Raises ValueError with file, found and expected."""
    array, geometry = read_volume(case.label)
    ids = np.unique(array)
    if not np.isfinite(ids).all() or (ids != np.round(ids)).any() or ids[0] < 0 or ids[-1] >= num_classes:
        wrong = [float(i) for i in ids if not (np.isfinite(i) and i == np.round(i) and 0 <= i < num_classes)]
        raise ValueError(f"{case.label}: found label {wrong[:5]}, expected whole numbers from 0 to {num_classes - 1}")
    return array.astype(np.uint8), geometry


def _check_same_place(path: str, geometry: Geometry, reference_path: str, reference: Geometry) -> None:
    if geometry.shape != reference.shape:
        raise ValueError(f"{path}: found (D, H, W) = {geometry.shape}, expected {reference.shape} as {reference_path}")
    # 1e-2 mm at the far corner would be a real shift; header rounding of float32 affines stays far below 1e-3.
    if not np.allclose(geometry.affine, reference.affine, atol=1e-3, rtol=1e-4):
        raise ValueError(
            f"{path}: found the affine {np.round(geometry.affine, 4).tolist()}, expected that of {reference_path}, "
            f"{np.round(reference.affine, 4).tolist()}"
        )


def check_case(case: Case, num_classes: int) -> list[str]:
    """All that is wrong with one case, a line each: the image, the label, and whether they belong together."""
    problems, geometry = [], []
    readers = [lambda: read_image(case)[1]]
    if case.label is not None:
        readers.append(lambda: read_label(case, num_classes)[1])
    for reader in readers:
        try:
            geometry.append(reader())
        except ValueError as error:
            problems.append(str(error))
    if len(geometry) == 2:
        try:
            _check_same_place(case.label, geometry[1], case.images[0], geometry[0])
        except ValueError as error:
            problems.append(str(error))
    return problems


def check_source(source: DataSource) -> list[str]:
    """Read every file of a data set; all problems of all cases, a line each."""
    cases = [case for split in source.splits.values() for case in split]
    bar = tqdm(cases, desc="checking", leave=False)
    return [problem for case in bar for problem in check_case(case, len(source.labels))]


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


def make_plan(source: DataSource) -> Plan:
    """Spacing and intensities from the training cases.

    Ours: slices are kept as they are where the median distance between them exceeds three times the median pixel.
    """
    cases = source.splits["train"]
    spacings = np.array([read_header(case.images[0])[1].spacing for case in cases])
    depth, height, width = np.median(spacings, axis=0).tolist()
    spacing = (None if depth > 3 * max(height, width) else depth, height, width)
    intensity = None
    if source.modality == "CT":
        samples: list[list[np.ndarray]] = [[] for _ in source.channels]
        for case in tqdm(cases, desc="intensities", leave=False):
            foreground = read_label(case, len(source.labels))[0] > 0
            for channel, values in zip(read_image(case)[0], samples):
                values.append(channel[foreground][:: max(1, foreground.sum() // 10000)])  # Ours: 10,000 voxels a case
        intensity = tuple(_intensity(np.concatenate(values)) for values in samples)
    return Plan(source.name, source.modality, source.channels, source.labels, source.flip_axes, spacing, intensity)


def _intensity(values: np.ndarray) -> tuple[float, float, float, float]:
    low, high = np.percentile(values, (0.5, 99.5))
    clipped = values.clip(low, high)
    return float(low), float(high), float(clipped.mean()), float(clipped.std())


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case on the plan's grid. image: (C, D, H, W) float32, mean 0 and deviation 1. label: (D, H, W) uint8 or None.

    foreground: (n, 4) int of class, d, h, w: up to 1,000 voxels of each class, to centre patches on. geometry: the file's.
    """

    image: np.ndarray
    label: np.ndarray | None
    foreground: np.ndarray | None
    geometry: Geometry | None


def resample(volume: np.ndarray, shape: tuple[int, int, int], order: int, depth_order: int) -> np.ndarray:
    """Resample (D, H, W) to another grid over the same extent: in plane with one spline order, then over depth."""
    for zoom, spline in (((1, shape[1] / volume.shape[1], shape[2] / volume.shape[2]), order),
                         ((shape[0] / volume.shape[0], 1, 1), depth_order)):  # fmt: skip
        if zoom != (1, 1, 1):  # grid_mode: the volumes share their outer faces, not the centres of their corners
            volume = ndimage.zoom(volume, zoom, order=spline, mode="nearest", grid_mode=True)
    return volume


def prepare_case(case: Case, plan: Plan) -> Prepared:
    """Read, check, normalise and resample one case; its label too where it has one.

    Raises:
        ValueError: anything `check_case` finds, or another number of channels than the plan has.
    """
    if len(case.images) != len(plan.channels):
        raise ValueError(f"{case.name}: found {len(case.images)} channels, expected {len(plan.channels)}: {plan.channels}")
    image, geometry = read_image(case)
    label = None
    if case.label is not None:
        label, label_geometry = read_label(case, len(plan.labels))
        _check_same_place(case.label, label_geometry, case.images[0], geometry)
    if plan.intensity:
        image = np.stack([(channel.clip(low, high) - mean) / max(deviation, 1e-8)
                          for channel, (low, high, mean, deviation) in zip(image, plan.intensity)])  # fmt: skip
    else:
        mean, deviation = image.mean((1, 2, 3), keepdims=True), image.std((1, 2, 3), keepdims=True)
        image = (image - mean) / np.maximum(deviation, 1e-8)
    spacing = [old if new is None else new for new, old in zip(plan.spacing, geometry.spacing)]
    shape = tuple(max(1, round(n * old / new)) for n, old, new in zip(geometry.shape, geometry.spacing, spacing))
    # A thick slice is not interpolated with its neighbours, which may show something else.
    depth_order = 0 if max(geometry.spacing) > 3 * min(geometry.spacing) else 3
    image = np.stack([resample(channel, shape, 3, depth_order) for channel in image]).astype(np.float32)
    if label is None:
        return Prepared(image, None, None, geometry)
    label = resample(label, shape, 0, 0)
    rng, voxels = np.random.default_rng(0), [np.zeros((0, 4), np.int32)]
    for class_id in np.unique(label[label > 0]):
        places = np.argwhere(label == class_id)
        places = places[rng.permutation(len(places))[:1000]]
        voxels.append(np.insert(places, 0, class_id, axis=1).astype(np.int32))
    return Prepared(image, label, np.concatenate(voxels), geometry)


def cache_key(source: DataSource) -> str:
    """Changes with the files, the labels and this recipe."""
    cases = [case for split in sorted(source.splits) for case in source.splits[split]]
    paths = [path for case in cases for path in (*case.images, case.label) if path is not None]
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path)]
    training = [case.name for case in source.splits["train"]]
    return hashlib.sha256(json.dumps([1, files, len(paths), training, source.labels]).encode()).hexdigest()[:16]


def prepare(source: DataSource, cache_dir: str | Path) -> tuple[Plan, Path]:
    """Check all files, then write every labelled case as memory-mapped arrays. What is there already is kept.

    Args:
        source: of `find_data`. cache_dir: folder for the arrays; a changed data set gets a new sub-folder of it.
    Raises:
        ValueError: listing all that is wrong; nothing has been written then.
    """
    folder = Path(cache_dir) / cache_key(source)
    plan_file = folder / "plan.json"
    if plan_file.is_file():
        plan = Plan.from_dict(json.loads(plan_file.read_text()))
    else:
        problems = check_source(source)
        if problems:
            raise ValueError(f"{len(problems)} problems in {source.root}:\n  " + "\n  ".join(problems))
        plan = make_plan(source)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(plan_file, lambda file: file.write(json.dumps(plan.as_dict(), indent=1).encode()))
    cases = [case for name in ("train", "val") for case in source.splits[name]]
    missing = [case for case in cases if not (folder / f"{case.name}.label.npy").is_file()]
    for case in tqdm(missing, desc="preparing", leave=False, disable=not missing):
        prepared = prepare_case(case, plan)
        for part in ("image", "foreground", "label"):  # the label comes last: with it the case counts as whole
            array = getattr(prepared, part)
            write_whole(folder / f"{case.name}.{part}.npy", lambda file, array=array: np.save(file, array))
    return plan, folder


def write_whole(path: Path, write) -> None:
    """Call `write` with a temporary file beside `path`, then rename it: the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_cached(case: Case, folder: Path) -> Prepared:
    """The memory-mapped arrays of `prepare`; geometry is left to the file."""
    arrays = (np.load(folder / f"{case.name}.{part}.npy", mmap_mode="r") for part in ("image", "label", "foreground"))
    return Prepared(*arrays, geometry=None)


# ------------------------------------------------------------------------------------------------ back to native geometry


def to_native(semantic: Tensor, geometry: Geometry) -> np.ndarray:
    """Resample a semantic map to the file's own grid and take the best class.

    One class at a time with a running maximum: K maps of native size are never held together.

    Args:
        semantic: (K, D, H, W) float on the prepared grid. geometry: of the case.
    Returns:
        (D, H, W) uint8 on the grid of `read_volume`.
    """
    best, label = None, None
    for class_id, scores in enumerate(semantic):
        scores = F.interpolate(scores[None, None].float(), size=geometry.shape, mode="trilinear", align_corners=False)[0, 0]
        if best is None:
            best, label = scores, torch.zeros(scores.shape, dtype=torch.uint8)
        else:
            label[scores > best] = class_id
            best = torch.maximum(best, scores)
    return label.numpy()


def write_label_map(path: str | Path, label: np.ndarray, geometry: Geometry) -> None:
    """Write a label map with the orientation and affine of the file it belongs to; sform and qform are both set.

    Args:
        path: .nii or .nii.gz. label: (D, H, W) as `read_volume` would give it. geometry: of that file.
    """
    turn = orientations.io_orientation(geometry.affine)
    back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), turn)
    array = orientations.apply_orientation(label.transpose(2, 1, 0), back).astype(np.uint8)
    image = nib.Nifti1Image(array, geometry.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code="scanner")
    image.set_qform(geometry.affine, code="scanner")
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the ending, by which nibabel knows the format
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- patches and augmentation

FOREGROUND_SHARE = 1 / 3  # nnU-Net's share of patches centred on foreground
# Ours: (probability, range) of each augmentation; nnU-Net's kinds, with rotation and scaling in plane and more often.
ROTATION = (0.5, (-np.pi / 6, np.pi / 6))
SCALING = (0.5, (0.8, 1.25))
GAMMA = (0.3, (0.7, 1.5))
BRIGHTNESS = (0.3, (0.75, 1.25))
CONTRAST = (0.3, (0.75, 1.25))
NOISE = (0.15, (0.0, 0.3))
BLUR = (0.15, (0.5, 1.0))
LOW_RESOLUTION = (0.15, (0.5, 1.0))


class PatchDataset(torch.utils.data.Dataset):
    """Random patches of prepared cases. Item i depends on (seed, i) alone: not on workers, processes or resuming.

    Args:
        cases: of a split. folder: where `prepare` put them. plan: for the flips. patch_size: (D, H, W).
        length: number of items. seed: of all randomness. augment: False gives plain crops.
    """

    def __init__(self, cases, plan: Plan, folder, patch_size, length: int, seed: int = 0, augment: bool = True):
        self.cases, self.plan, self.folder, self.patch_size = cases, plan, Path(folder), tuple(patch_size)
        self.length, self.seed, self.augment = length, seed, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """image (C, D, H, W) float32 and labels (D, H, W) int64 of patch `index`."""
        rng = np.random.default_rng((self.seed, index))
        case = load_cached(self.cases[rng.integers(len(self.cases))], self.folder)
        low = self._corner(case, rng)
        angle, scale = 0.0, 1.0
        if self.augment:
            angle = rng.uniform(*ROTATION[1]) if rng.random() < ROTATION[0] else 0.0
            scale = np.exp(rng.uniform(*np.log(SCALING[1]))) if rng.random() < SCALING[0] else 1.0
        image, label = cut(case.image, case.label, low, self.patch_size, angle, scale)
        if self.augment:
            axes = [axis for axis in self.plan.flip_axes if rng.random() < 0.5]
            image, label = image.flip([axis + 1 for axis in axes]), label.flip(axes)
            image = change_intensities(image, rng)
        return image, label

    def _corner(self, case: Prepared, rng: np.random.Generator) -> list[int]:
        """First voxel of the patch, inside the volume where it fits, else so that the volume is centred."""
        spare = [n - p for n, p in zip(case.label.shape, self.patch_size)]
        if len(case.foreground) and rng.random() < FOREGROUND_SHARE:
            classes = np.asarray(case.foreground[:, 0])
            voxel = case.foreground[rng.choice(np.flatnonzero(classes == rng.choice(np.unique(classes)))), 1:]
            return [int(np.clip(v - p // 2, 0, s)) if s > 0 else s // 2 for v, p, s in zip(voxel, self.patch_size, spare)]
        return [int(rng.integers(s + 1)) if s > 0 else s // 2 for s in spare]


def cut(image: np.ndarray, label: np.ndarray, low: list[int], size: tuple[int, int, int], angle: float, scale: float):
    """Cut a patch, rotated and scaled about its centre in plane; of memory-mapped arrays only the part needed is read.

    Outside the volume the image has its minimum (of the part read) and the label is background.

    Args:
        image: (C, D, H, W). label: (D, H, W). low: first voxel, may be negative. size: (D, H, W) of the patch.
        angle: radians. scale: above 1 shows more.
    Returns:
        (C, *size) float32 and size int64 tensors.
    """
    depth, height, width = size
    y = (torch.arange(height) - (height - 1) / 2)[:, None]
    x = (torch.arange(width) - (width - 1) / 2)[None]
    rows = low[1] + (height - 1) / 2 + scale * (np.cos(angle) * y - np.sin(angle) * x)  # (H, W), in voxels of the volume
    columns = low[2] + (width - 1) / 2 + scale * (np.sin(angle) * y + np.cos(angle) * x)
    # The part of the volume that these places touch, with one voxel more for the interpolation.
    window = [slice(max(low[0], 0), min(low[0] + depth, label.shape[0]))]
    for places, n in ((rows, label.shape[1]), (columns, label.shape[2])):
        first = int(np.clip(np.floor(places.min()) - 1, 0, n - 1))
        window.append(slice(first, int(np.clip(np.ceil(places.max()) + 2, first + 1, n))))
    part = torch.from_numpy(np.array(image[(slice(None), *window)]))
    part_label = torch.from_numpy(np.array(label[tuple(window)])).float()
    grid = torch.stack([(2 * (places - part_of.start) + 1) / (part_of.stop - part_of.start) - 1
                        for places, part_of in ((columns, window[2]), (rows, window[1]))], dim=-1)  # fmt: skip
    floor = part.amin((1, 2, 3), keepdim=True)
    channels, slices = part.shape[:2]

    def sample(stack: Tensor, mode: str) -> Tensor:  # all slices of all channels share one grid
        return F.grid_sample(stack.flatten(0, -3)[None], grid[None].float(), mode, "zeros", align_corners=False)[0]

    cut_image = floor.expand(channels, depth, height, width).clone()
    cut_label = torch.zeros(size, dtype=torch.int64)
    inside = slice(window[0].start - low[0], window[0].stop - low[0])
    cut_image[:, inside] += sample(part - floor, "bilinear").unflatten(0, (channels, slices))
    cut_label[inside] = sample(part_label, "nearest").long()
    return cut_image, cut_label


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
        kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2).float()
        kernel = kernel / kernel.sum()
        slices = F.pad(image.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
        slices = F.conv2d(F.conv2d(slices, kernel[None, None, :, None]), kernel[None, None, None])
        image = slices[:, 0].unflatten(0, image.shape[:2])
    if (factor := draw(BRIGHTNESS)) is not None:
        image = image * factor
    if (factor := draw(CONTRAST)) is not None:
        mean = image.mean((1, 2, 3), keepdim=True)
        image = ((image - mean) * factor + mean).clamp(image.min(), image.max())
    if (factor := draw(LOW_RESOLUTION)) is not None:
        small = F.interpolate(image, size=[max(1, round(n * factor)) for n in image.shape[2:]])  # nearest, in plane
        image = F.interpolate(small, size=image.shape[2:], mode="bilinear", align_corners=False)
    if (power := draw(GAMMA)) is not None:
        low, span = image.min(), (image.max() - image.min()).clamp(min=1e-6)
        image = ((image - low) / span) ** power * span + low
    return image


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


def default_preset(source: DataSource, plan: Plan) -> Preset:
    """Ours: sizes for a folder of which nothing else is known, from the median training case.

    The patch is that case's slices, up to 256 x 256, and at most 8 deep; the encoder sees it four times as large, which
    gives SAM's masks the patch's own resolution, up to SAM's 1024. Queries: half as many again as classes, in eights.
    """
    sizes = []
    for case in source.splits["train"]:
        _, geometry = read_header(case.images[0])
        spacing = [old if new is None else new for new, old in zip(plan.spacing, geometry.spacing)]
        sizes.append([n * old / new for n, old, new in zip(geometry.shape, geometry.spacing, spacing)])
    depth, *plane = np.median(sizes, axis=0)
    height, width = (min(256, 16 * int(np.ceil(side / 16))) for side in plane)
    return Preset(
        plan.labels, plan.modality, (min(8, round(depth)), height, width), (min(1024, 4 * height), min(1024, 4 * width)),
        num_queries=8 * int(np.ceil(1.5 * len(plan.labels) / 8)), epochs=500, flip_axes=plan.flip_axes,
    )  # fmt: skip
