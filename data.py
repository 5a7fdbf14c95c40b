"""Data sets: finding, checking and preparing NIfTI files, training patches, label maps to segments (paper 2.2, 3).

    find_data      --data and --root -> the cases of each split         (ACDC, Synapse, AMOS, any dataset.json folder)
    check_source   every file of them -> a list of all that is wrong
    prepare_case   one case -> normalised and resampled arrays, and the geometry of its file
    prepare        all cases checked, then prepared, as memory-mapped .npy files in a cache
    PatchDataset   cached cases -> augmented patches, a pure function of (seed, index)
    label_map_to_segments        a patch's labels -> one mask, box and class per segment: the "dataset mapping" of 2.2
    to_native, write_label_map   a semantic map -> a label map in the geometry of the file it was made from

NIfTI's (x, y, z) is turned to RAS and then to (D, H, W) in `read_volume`, and back in `write_label_map`; nowhere else.

Letters: C channels, D slices, H rows, W columns, K classes with background. Spacing is (D, H, W) in mm.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
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
        CARDIAC, "MR", (4, 80, 80), (240, 240), 8, sam="tiny", epochs=8, iterations=250, batch_size=1,
        flip_axes=(1, 2), home="phantom.py writes it", tree=ACDC_TREE,
    ),
    "acdc": Preset(
        CARDIAC, "MR", (4, 256, 256), (1024, 1024), 8, epochs=500, flip_axes=(1, 2),
        home="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html", tree=ACDC_TREE,
    ),
    "synapse": Preset(
        ("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
         "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal", "left adrenal"),
        "CT", (26, 256, 256), (256, 256), 24, scored=(1, 2, 3, 4, 6, 7, 8, 11),
        home="https://www.synapse.org/#!Synapse:syn3193805 (RawData.zip)",
        tree="ROOT/[Abdomen/RawData/]Training/{img/img0001.nii.gz,label/label0001.nii.gz}",
    ),
    "amos": Preset(
        ("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach",
         "aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder",
         "prostate/uterus"),
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
# Ours: held out of the 18 to choose a checkpoint; what others call validation is the test set.
SYNAPSE_VAL = {27, 34, 40}


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
    if not splits:
        found = "found no cases" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path}: {found}. Expected {data}, from {preset.home}:\n{preset.tree}\nSee --root.")
    return DataSource(data, str(path), preset.modality, (preset.modality,), preset.labels, preset.flip_axes, splits)


def _find_acdc(root: Path, data: str, seed: int) -> dict[str, tuple[Case, ...]]:
    base = root / "database" if (root / "database").is_dir() else root
    patients = {split: sorted((base / split).glob("patient[0-9]*")) for split in ("training", "testing")}
    test, val = ACDC_TEST, ACDC_VAL
    if data == "phantom":  # Ours: of 34 patients the last 6 to test, 4 before them to validate
        numbers = [int(patient.name[7:]) for patient in patients["training"]]
        size = [max(1, round(share / 34 * len(numbers))) for share in (4, 6)]
        val, test = set(numbers[-sum(size) : -size[1]]), set(numbers[-size[1] :])
    splits: dict[str, list[Case]] = {"train": [], "val": [], "test": [], "testing": []}
    problems = []
    for patient in patients["training"] + patients["testing"]:
        number = int(patient.name[7:])
        split = "test" if number in test else "val" if number in val else "train"
        try:
            splits["testing" if patient in patients["testing"] else split] += _acdc_frames(patient)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return {name: tuple(cases) for name, cases in splits.items() if cases}


def _acdc_frames(patient: Path) -> list[Case]:
    """End-diastole and end-systole of one patient. Only Info.cfg says which frames: patient 90 has 04, 11."""
    file = patient / "Info.cfg"
    text = file.read_text() if file.is_file() else "no such file"
    info = dict(re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE))
    if len(info) < 2:
        raise ValueError(f"{file}: found {text[:60]!r}, expected the lines 'ED: frame' and 'ES: frame'")
    cases = []
    for phase in ("ED", "ES"):
        name = f"{patient.name}_frame{int(info[phase]):02d}"
        label = patient / f"{name}_gt.nii.gz"
        hidden = patient.parent.name == "testing" and not label.exists()
        cases.append(Case(name, (str(patient / f"{name}.nii.gz"),), None if hidden else str(label)))
    return cases


def _find_synapse(root: Path, data: str, seed: int) -> dict[str, tuple[Case, ...]]:
    levels = ("Abdomen/RawData/Training", "RawData/Training", "Training", ".")
    base = next(root / level for level in levels if (root / level).is_dir())
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
        files = sorted((base / images).glob("amos_[0-9][0-9][0-9][0-9].nii.gz"))
        files = [file for file in files if int(file.name[5:9]) <= 500]  # above are MR
        return [Case(file.name[:9], (str(file),), str(base / labels / file.name)) for file in files]

    train, val = split_cases(ct("imagesTr", "labelsTr"), seed)
    splits = {"train": train, "val": val, "test": tuple(ct("imagesVa", "labelsVa"))}
    return {name: cases for name, cases in splits.items() if cases}


def split_cases(cases: list[Case], seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Shuffle with a seed and hold a fifth out, the first of five folds: (train, val), each in the order given."""
    order = np.random.default_rng(seed).permutation(len(cases))
    held_out = set(order[: max(1, round(len(cases) / 5))].tolist())
    train = tuple(case for i, case in enumerate(cases) if i not in held_out)
    return train, tuple(case for i, case in enumerate(cases) if i in held_out)


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
        table = description["labels"]  # id -> name in Decathlon, name -> id in nnU-Net
        names = {int(key): name for key, name in table.items()} if "0" in table else {i: k for k, i in table.items()}
        labels = tuple(names[index] for index in range(len(names)))
        table = description.get("channel_names") or description["modality"]
        channels = tuple(table[str(index)] for index in range(len(table)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: found {type(error).__name__} {error}, expected labels 0, 1, 2, ... with their names, and "
            "modality or channel_names"
        ) from error
    cases = _folder_cases(root, len(channels), description.get("file_ending", ".nii.gz"))
    if len(cases) < 2:
        raise FileNotFoundError(f"{root}: found {len(cases)} cases, expected two or more in imagesTr and labelsTr")
    modality = "CT" if "ct" in channels[0].lower().split() else "MR"
    sided = any(word in label.lower() for label in labels for word in ("left", "right"))
    flip_axes = () if sided else (2,)  # Ours: as patients are nearly symmetric; what has a side keeps it
    splits = _folder_splits(root / "splits_final.json", cases, seed)
    return DataSource(root.resolve().name, str(root), modality, channels, labels, flip_axes, splits)


def _folder_cases(root: Path, num_channels: int, ending: str) -> list[Case]:
    """A case for every label, and for every image that none claims: `check_source` will miss its label."""
    cases, claimed = [], set()
    for label in sorted((root / "labelsTr").glob(f"[!.]*{ending}")):
        name = label.name.removesuffix(ending)
        images = [root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(num_channels)]
        if num_channels == 1 and not images[0].exists():  # Decathlon numbers no channels
            images = [root / "imagesTr" / f"{name}{ending}"]
        cases.append(Case(name, tuple(map(str, images)), str(label)))
        claimed.update(images)
    for image in sorted((root / "imagesTr").glob(f"[!.]*{ending}")):
        if image not in claimed:
            name = image.name.removesuffix(ending)
            cases.append(Case(name, (str(image),), str(root / "labelsTr" / image.name)))
    return cases


def find_images(folder: str | Path, num_channels: int) -> tuple[Case, ...]:
    """Unlabelled cases of a folder: CASE_0000.nii.gz and so on, one file a channel; of one channel CASE.nii.gz serves.

    Raises:
        FileNotFoundError: no such folder, no NIfTI file in it, or a channel is missing. ValueError: one is there twice.
    """
    endings = (".nii.gz", ".nii")
    files = sorted(file for file in Path(folder).glob("[!.]*") if file.name.endswith(endings))
    if not files:
        raise FileNotFoundError(f"{folder}: found no .nii or .nii.gz files, expected the images to predict")
    images: dict[str, dict[int, str]] = {}
    for file in files:
        stem = file.name.removesuffix(".gz").removesuffix(".nii")
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
        name, channel = stem, 0
        if numbered and int(numbered[2]) < num_channels:
            name, channel = numbered[1], int(numbered[2])
        other = images.setdefault(name, {}).setdefault(channel, str(file))
        if other != str(file):
            raise ValueError(f"{file}: found {other} as channel {channel} of {name} too, expected one file a channel")
    for name, files in images.items():
        if len(files) != num_channels:
            wanted = " ".join(f"{name}_{channel:04d}.nii.gz" for channel in range(num_channels))
            raise FileNotFoundError(f"{folder}: found {' '.join(files.values())} of {name}, expected {wanted}")
    return tuple(Case(name, tuple(files[c] for c in range(num_channels)), None) for name, files in images.items())


def _folder_splits(file: Path, cases: list[Case], seed: int) -> dict[str, tuple[Case, ...]]:
    """The first fold of nnU-Net's splits_final.json, or where there is none, 80/20 by case."""
    if not file.is_file():
        return dict(zip(("train", "val"), split_cases(cases, seed)))
    by_name = {case.name: case for case in cases}
    try:
        fold = json.loads(file.read_text())[0]
        splits = {split: tuple(by_name[name] for name in fold[split]) for split in ("train", "val")}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{file}: found {type(error).__name__} {error}, expected a list of folds with the keys train and val and "
            f"names such as {cases[0].name}"
        ) from error
    if not splits["train"] or not splits["val"]:
        raise ValueError(f"{file}: found an empty train or val in fold 0, expected one case or more in each")
    return splits


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
        ValueError: missing or no NIfTI file, not three dimensions, voxels that are no numbers, impossible affine.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: found no such file, expected a NIfTI volume")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises many kinds for what is not NIfTI
        raise ValueError(f"{path}: found no readable NIfTI file ({error}), expected .nii or .nii.gz") from error
    if len(image.shape) != 3 or 0 in image.shape:
        raise ValueError(f"{path}: found shape {image.shape}, expected three dimensions, one file a channel and frame")
    if image.get_data_dtype().kind not in "biuf":
        raise ValueError(f"{path}: found voxels of type {image.get_data_dtype()}, expected one real number each")
    axes = image.affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.isfinite(image.affine).all() or (spacing <= 0).any() or abs(np.linalg.det(axes / spacing)) < 1e-3:
        raise ValueError(f"{path}: found the affine {image.affine.tolist()}, expected three axes with spacings above 0")
    turn = orientations.io_orientation(image.affine)
    file_axes = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in (2, 1, 0)]  # which of the file's is D, H, W
    shape = tuple(image.shape[axis] for axis in file_axes)
    return image, Geometry(image.affine, shape, tuple(float(spacing[axis]) for axis in file_axes))


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
        raise ValueError(f"{path}: found a truncated file ({error}), expected {image.shape} voxels") from error
    array = orientations.apply_orientation(array, orientations.io_orientation(image.affine))
    return array.transpose(2, 1, 0), geometry


def _read_finite(path: str) -> tuple[np.ndarray, Geometry]:
    array, geometry = read_volume(path)
    array = array.astype(np.float32)
    wrong = np.count_nonzero(~np.isfinite(array))
    if wrong:
        raise ValueError(f"{path}: found {wrong} voxels of NaN or infinity, expected finite numbers")
    return array, geometry


def _read_label(path: str, num_classes: int) -> tuple[np.ndarray, Geometry]:
    array, geometry = read_volume(path)
    ids = np.unique(array).astype(float)
    wrong = ids[~np.isin(ids, np.arange(num_classes))].tolist()
    if wrong:
        raise ValueError(f"{path}: found the labels {wrong[:5]}, expected whole numbers from 0 to {num_classes - 1}")
    return array.astype(np.uint8), geometry


def _check_same_place(path: str, geometry: Geometry, reference_path: str, reference: Geometry) -> None:
    """Ours: up to a tenth of a voxel, anywhere in the volume, is the rounding of headers."""
    if geometry.shape != reference.shape:
        raise ValueError(f"{path}: found (D, H, W) = {geometry.shape}, expected {reference.shape} as {reference_path}")
    corners = np.array(list(itertools.product((0, max(reference.shape)), repeat=3)))
    shifts = nib.affines.apply_affine(geometry.affine - reference.affine, corners)
    if np.linalg.norm(shifts, axis=1).max() > 0.1 * min(reference.spacing):
        found, expected = (np.round(g.affine, 4).tolist() for g in (geometry, reference))
        raise ValueError(f"{path}: found the affine {found}, expected {expected} as {reference_path}")


def read_label(case: Case, num_classes: int) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The label map of a case on its own grid, for scoring.

    Returns:
        (D, H, W) uint8, and the spacing (D, H, W) in mm.
    Raises:
        ValueError: with file, found and expected.
    """
    if case.label is None:
        raise ValueError(f"{case.name}: found no label file, expected one")
    label, geometry = _read_label(case.label, num_classes)
    return label, geometry.spacing


def read_for_picture(case: Case, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first channel (D, H, W) float32 and the label map (D, H, W) uint8 of a case, on its own grid."""
    return _read_finite(case.images[0])[0], read_label(case, num_classes)[0]


def check_case(case: Case, num_classes: int) -> list[str]:
    """All that is wrong with one case, a line each: every channel, the label, and whether they lie together."""
    problems: list[str] = []

    def attempt(check: Callable, *arguments):
        try:
            return check(*arguments)
        except ValueError as error:
            problems.append(" ".join(str(error).split()))

    read = {path: attempt(_read_finite, path) for path in case.images}
    if case.label is not None:
        read[case.label] = attempt(_read_label, case.label, num_classes)
    places = [(path, content[1]) for path, content in read.items() if content is not None]
    for path, geometry in places[1:]:
        attempt(_check_same_place, path, geometry, *places[0])
    return problems


def check_source(source: DataSource) -> list[str]:
    """Read every file of a data set; all problems of all cases, one line each: "FILE: found X, expected Y"."""
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
    """Median spacing of the training cases, and for CT the intensities of their foreground.

    Slices are kept as they are where the median distance between them exceeds three times the median pixel.
    """
    cases = source.splits["train"]
    spacings = [read_header(case.images[0])[1].spacing for case in cases]
    depth, height, width = np.median(spacings, axis=0).tolist()
    spacing = (None if depth > 3 * min(height, width) else depth, height, width)
    intensity = None
    if source.modality == "CT":
        samples: list[list[np.ndarray]] = [[] for _ in source.channels]
        for case in tqdm(cases, desc="intensities", leave=False):
            foreground = _read_label(case.label, len(source.labels))[0] > 0
            step = max(1, np.count_nonzero(foreground) // 10000)  # Ours: 10,000 voxels of each case are enough
            for path, sample in zip(case.images, samples):
                sample.append(_read_finite(path)[0][foreground][::step])
        intensity = tuple(_clip_and_scale(np.concatenate(sample)) for sample in samples)
    return Plan(source.name, source.modality, source.channels, source.labels, source.flip_axes, spacing, intensity)


def _clip_and_scale(foreground: np.ndarray) -> tuple[float, float, float, float]:
    low, high = np.percentile(foreground, (0.5, 99.5))
    clipped = foreground.clip(low, high)
    return float(low), float(high), float(clipped.mean()), float(clipped.std())


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case on the plan's grid.

    image: (C, D, H, W) float32, about mean 0 and deviation 1. label: (D, H, W) uint8, or None. geometry: of its file.
    """

    image: np.ndarray
    label: np.ndarray | None
    geometry: Geometry


def prepare_case(case: Case, plan: Plan) -> Prepared:
    """Read, check, normalise and resample one case; its label too where it has one.

    Raises:
        ValueError: listing what `check_case` would find, or another number of channels than the plan has.
    """
    if len(case.images) != len(plan.channels):
        raise ValueError(f"{case.name}: found {len(case.images)} channels, expected the plan's: {plan.channels}")
    channels, geometries = zip(*map(_read_finite, case.images))
    geometry = geometries[0]
    for path, other in zip(case.images, geometries):
        _check_same_place(path, other, case.images[0], geometry)
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
    label = None
    if case.label is not None:
        label, label_geometry = _read_label(case.label, len(plan.labels))
        _check_same_place(case.label, label_geometry, case.images[0], geometry)
        label = resample(label, shape, 0, 0)
    return Prepared(image, label, geometry)


def resample(volume: np.ndarray, shape: tuple[int, int, int], order: int, depth_order: int) -> np.ndarray:
    """Resample (D, H, W) to another shape over the same extent: in plane, then over depth, by splines of two orders."""
    plane = (1, shape[1] / volume.shape[1], shape[2] / volume.shape[2])
    depth = (shape[0] / volume.shape[0], 1, 1)
    for zoom, spline in ((plane, order), (depth, depth_order)):
        if zoom != (1, 1, 1):  # grid_mode: the outer faces stay in place, not the centres of the corner voxels
            volume = ndimage.zoom(volume, zoom, order=spline, mode="nearest", grid_mode=True)
    return volume


# ---------------------------------------------------------------------------------------------------------------- cache

RECIPE = 1  # part of every key: raise it when `prepare_case` changes what it makes
PARTS = ("image", "minimum", "foreground", "label")  # the label is written last: with it a case counts as whole
LARGE = ("image", "label")  # memory-mapped


def prepare(source: DataSource, cache_dir: str | Path) -> Plan:
    """Check all files, plan, and write every labelled case as memory-mapped arrays. What is done is not done again.

    Args:
        source: of `find_data`. cache_dir: folder for the arrays, made if it is missing.
    Raises:
        ValueError: listing all that is wrong; nothing has been written then.
    """
    folder = Path(cache_dir)
    cases = [case for split in source.splits.values() for case in split]
    paths = [path for case in cases for path in (*case.images, case.label) if path is not None]
    plan_file = folder / f"plan-{_key(dataclasses.asdict(source), paths)}.json"  # is there once the check has passed
    if plan_file.is_file():
        plan = Plan.from_dict(json.loads(plan_file.read_text()))
    else:
        problems = check_source(source)
        if problems:
            raise ValueError(f"{len(problems)} problems in {source.root}:\n" + "\n".join(problems))
        plan = make_plan(source)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(plan_file, lambda file: file.write(json.dumps(plan.as_dict(), indent=1).encode()))
    stems = {case: _stem(case, plan, folder) for case in cases if case.label is not None}
    missing = [case for case, stem in stems.items() if not Path(f"{stem}.label.npy").is_file()]
    for case in tqdm(missing, desc="preparing", leave=False, disable=not missing):
        prepared = prepare_case(case, plan)
        arrays = (prepared.image, prepared.image.min((1, 2, 3)), _foreground_voxels(prepared.label), prepared.label)
        for part, array in zip(PARTS, arrays):
            write_whole(Path(f"{stems[case]}.{part}.npy"), lambda file, array=array: np.save(file, array))
    return plan


def load_cached(case: Case, plan: Plan, cache_dir: str | Path) -> Prepared:
    """A case that `prepare` has written, with memory-mapped arrays."""
    arrays = _open_parts(_stem(case, plan, Path(cache_dir)))
    return Prepared(arrays["image"], arrays["label"], read_header(case.images[0])[1])


def _open_parts(stem: str) -> dict[str, np.ndarray]:
    if not Path(f"{stem}.label.npy").is_file():
        raise FileNotFoundError(f"{stem}.label.npy: found no such file, expected what `prepare` writes; run it first")
    return {part: np.load(f"{stem}.{part}.npy", mmap_mode="r" if part in LARGE else None) for part in PARTS}


def _stem(case: Case, plan: Plan, folder: Path) -> str:
    """What a case's cached files are called, up to their part: changes with the plan and the case's own files."""
    return str(folder / f"{case.name}-{_key(plan.as_dict(), filter(None, (*case.images, case.label)))}")


def _key(facts: dict, paths: Iterable[str]) -> str:
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


def write_whole(path: Path, write: Callable) -> None:
    """Call `write` with a temporary file beside `path`, then rename it: the file is whole or as it was before.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}): is there space, and may you write?") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- back to the file's grid


def to_native(semantic: Tensor | np.ndarray, geometry: Geometry) -> np.ndarray:
    """Resample a semantic map to the file's own grid and take the best class.

    One class at a time with a running maximum: K maps of native size are never held together.

    Args:
        semantic: (K, D, H, W) float on the prepared grid. geometry: of the case.
    Returns:
        (D, H, W) uint8 on the grid of `read_volume`.
    """
    best = torch.full(geometry.shape, -torch.inf)
    label = torch.zeros(geometry.shape, dtype=torch.uint8)
    for class_id, scores in enumerate(torch.as_tensor(semantic)):
        scores = scores[None, None].float()  # align_corners=False shares outer faces, as `resample` does
        scores = F.interpolate(scores, size=geometry.shape, mode="trilinear", align_corners=False)[0, 0].cpu()
        label[scores > best] = class_id
        best = torch.maximum(best, scores)
    return label.numpy()


def write_label_map(path: str | Path, label: np.ndarray, geometry: Geometry) -> None:
    """Write a label map with the orientation and affine of the file it belongs to; sform and qform are both set.

    Args:
        path: .nii or .nii.gz. label: (D, H, W) as `read_volume` would give it. geometry: of that file.
    Raises:
        ValueError: the label map has another shape than the geometry.
    """
    path = Path(path)
    if label.shape != geometry.shape:
        raise ValueError(f"{path}: found a label map of {label.shape}, expected {geometry.shape} as in its geometry")
    canonical = np.array([[0, 1], [1, 1], [2, 1]])
    back = orientations.ornt_transform(canonical, orientations.io_orientation(geometry.affine))
    array = orientations.apply_orientation(label.transpose(2, 1, 0), back).astype(np.uint8)
    image = nib.Nifti1Image(array, geometry.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code="scanner")
    image.set_qform(geometry.affine, code="scanner")
    content = image.to_bytes()
    content = gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content
    write_whole(path, lambda file: file.write(content))


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
        for stem in self.stems:
            _open_parts(stem)
        self.flip_axes, self.patch_size = plan.flip_axes, tuple(patch_size)
        self.length, self.seed, self.augment = length, seed, augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """image (C, D, H, W) float32 and labels (D, H, W) int64 of patch `index`."""
        if not 0 <= index < self.length:
            raise IndexError(f"patch {index} of {self.length}")  # ends a `for` loop over the data set
        rng = np.random.default_rng((self.seed, index))
        case = _open_parts(self.stems[rng.integers(len(self.stems))])
        low = self._corner(case["label"].shape, case["foreground"], rng)
        angle, scale = 0.0, 1.0
        if self.augment:
            angle = rng.uniform(*ROTATION[1]) if rng.random() < ROTATION[0] else angle
            scale = np.exp(rng.uniform(*np.log(SCALING[1]))) if rng.random() < SCALING[0] else scale
        image, label = cut(case["image"], case["label"], case["minimum"], low, self.patch_size, angle, scale)
        if self.augment:
            axes = [axis for axis in self.flip_axes if rng.random() < 0.5]
            image, label = image.flip([axis + 1 for axis in axes]), label.flip(axes)
            image = change_intensities(image, rng)
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
