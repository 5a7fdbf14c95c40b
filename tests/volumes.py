"""Small NIfTI files and data sets for the tests."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
from support.nifti import Geometry
from support.presets import PRESETS, Task

REAL = Path(os.environ.get("MASKSAM_TEST_DATA", "/nowhere")).resolve()  # a folder with data/ and weights/


def refuses(words: str, function: Callable, *arguments, **options) -> None:
    """Call a function that must raise one of our errors, or end the program, with these words."""
    with pytest.raises((ValueError, OSError, SystemExit), match=words):
        function(*arguments, **options)


def save(path: Path | str, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    """Write an array (x, y, z); voxels are of 1 mm and not shifted unless an affine says so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def spaced(depth: float, height: float, width: float) -> np.ndarray:
    return np.diag([width, height, depth, 1.0])


def acdc_tree(base: Path, numbers=range(1, 101)) -> None:
    """Write the folders and Info.cfg of patients, without their volumes."""
    for number in numbers:
        patient = base / ("training" if number <= 100 else "testing") / f"patient{number:03d}"
        patient.mkdir(parents=True)
        frames = "ED: 4\nES: 11" if number == 90 else "ED: 1\nES: 12"
        (patient / "Info.cfg").write_text(f"{frames}\nGroup: DCM\nHeight: 184.0\n")


def decathlon(root: Path, number: int = 5, modality: str = "MRI", affine: np.ndarray | None = None) -> Path:
    """Write a folder with cases of 8 x 10 x 12 voxels (D, H, W), labels 0 to 2, class 2 brighter than 1."""
    rng = np.random.default_rng(0)
    for i in range(number):
        label = np.zeros((12, 10, 8), np.uint8)
        label[3:7, 3:6, 2:6], label[7:9, 3:6, 2:6] = 1, 2
        image = (label * 100 + rng.normal(50, 10, label.shape)).astype(np.float32)
        save(root / f"imagesTr/case_{i}.nii.gz", image, affine)
        save(root / f"labelsTr/case_{i}.nii.gz", label, affine)
    content = {"labels": {"0": "background", "1": "head", "2": "tail"}, "modality": {"0": modality}}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def plan_for(spacing=(1.0, 1.0, 1.0), flip_axes=(), modality=("MR",), intensity=(None,)) -> data.Plan:
    labels = tuple(f"class {i}" for i in range(3))
    return data.Plan("x", Task(labels, modality, modality, flip_axes), spacing, intensity)


def planned(source) -> data.Plan:
    """Return the plan of a data set, which must have no problem."""
    return data.make_plan(source, [*data.survey(source.splits["train"], source.task).values()])


def to_native(semantic: torch.Tensor, geometry: Geometry, slab: int = 3) -> np.ndarray:
    """Return the label map (D, H, W) of a semantic map (K, D, H, W) that comes in slabs of a few slices."""
    scores = data.resample_scores(semantic.split(slab, dim=1), semantic.shape[1], geometry.shape)
    return torch.cat([part.argmax(0) for part in scores]).to(torch.uint8).numpy()


def write_case(image, label, num_classes: int, seed: int, lacking: int = 0) -> None:
    """Write touching blocks, 9 x 80 x 72 voxels, stored backwards in x and z, without one of the classes."""
    ids = np.zeros((72, 80, 9), np.uint8)
    for class_id in set(range(1, num_classes)) - {lacking}:
        row, column = divmod(class_id - 1, 4)
        ids[8 + 14 * column : 22 + 14 * column, 8 + 16 * row : 24 + 16 * row, 2:7] = class_id
    affine = np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -70], [0, 0, -5.0, 900], [0, 0, 0, 1]])
    save(image, (ids * 20 + np.random.default_rng(seed).normal(100, 15, ids.shape)).astype(np.int16), affine)
    if label:
        save(label, ids, affine)


def write_tree(root: Path, name: str) -> None:
    """Write a small data set in the original layout of a preset, with the traps that its users know."""
    num = len(PRESETS[name].task.labels)
    if name == "acdc":  # 1 to train, 2 and 3 to test, 90 with frames 04 and 11, 101 without labels
        acdc_tree(root / "database", (1, 2, 3, 90, 101))
        for patient in (root / "database").glob("*/*"):
            number = int(patient.name[7:])
            for frame in (4, 11) if number == 90 else (1, 12):
                stem = patient / f"{patient.name}_frame{frame:02d}"
                label = f"{stem}_gt.nii.gz" if number < 101 else None
                write_case(f"{stem}.nii.gz", label, num, number + frame, 3 * (number == 2))
        (root / "database/training/patient090/patient090_frame01.nii.gz").write_text("neither ED nor ES")
    elif name == "synapse":  # 2 and 6 have no gallbladder, 61 has no label
        for number in (1, 2, 5, 6, 27, 61):
            folder = root / f"Abdomen/RawData/{'Testing' if number == 61 else 'Training'}"
            image, label = (folder / f"{kind}/{kind}{number:04d}.nii.gz" for kind in ("img", "label"))
            write_case(image, None if number == 61 else label, num, number, 4 * (number in (2, 6)))
    else:
        parts = {8: "Va", 22: "Va", 200: "Ts", 201: "Ts"}
        for number in (1, 4, 5, 7, 9, 500, *parts):
            file = f"{parts.get(number, 'Tr')}/amos_{number:04d}.nii.gz"
            label = None if number in (200, 201) else root / f"amos22/labels{file}"
            write_case(root / f"amos22/images{file}", label, num, number, 15 * (number == 8))
        (root / "amos22/imagesTr/amos_0507.nii.gz").write_text("MR: must not be opened")
        (root / "amos22/dataset.json").write_text('{"labels": {"10": "pancrease"}}')  # the file's own typo
