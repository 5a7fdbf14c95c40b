"""Small NIfTI files and data sets for the tests."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

import data
from data import Plan
from support.nifti import Geometry
from support.presets import PRESETS, Task

ACDC = Path(os.environ.get("MASKSAM_TEST_DATA", "MASKSAM_TEST_DATA is not set")) / "acdc"


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    """Write an array (x, y, z); voxels are of 1 mm and not shifted unless an affine says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def spaced(depth: float, height: float, width: float) -> np.ndarray:
    return np.diag([width, height, depth, 1.0])


def rotation(degrees: float) -> np.ndarray:
    """Return a rotation (3, 3) about an axis that is none of the grid's."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross, angle = np.cross(np.eye(3), axis), np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def stored_as(volume: np.ndarray, affine: np.ndarray, order, signs) -> tuple[np.ndarray, np.ndarray]:
    """Store the same voxels (x, y, z) in the same places with other axes and directions."""
    turn = np.array([[order[axis], signs[axis]] for axis in range(3)])
    inverse = nib.orientations.inv_ornt_aff(turn, volume.shape)
    return nib.orientations.apply_orientation(volume, turn), affine @ inverse


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def acdc_tree(base: Path, numbers=range(1, 101), folder: str = "training") -> None:
    """Write the folders and Info.cfg of patients, without their volumes."""
    for number in numbers:
        patient = base / f"{folder}/patient{number:03d}"
        patient.mkdir(parents=True)
        first, last = (4, 11) if number == 90 else (1, 12)
        (patient / "Info.cfg").write_text(f"ED: {first}\nES: {last}\nGroup: DCM\nHeight: 184.0\n")


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
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def plan_for(
    labels: int = 3, spacing=(1.0, 1.0, 1.0), intensity=None, flip_axes=(), channels=("MR",)
) -> Plan:
    names = tuple(f"class {i}" for i in range(labels))
    return Plan("x", Task(names, channels, "CT" if intensity else "MR", flip_axes), spacing, intensity)


def one_hot(label: np.ndarray, classes: int) -> torch.Tensor:
    return F.one_hot(torch.from_numpy(label).long(), classes).permute(3, 0, 1, 2).float()


def to_native(semantic, geometry: Geometry, slab: int = 3) -> np.ndarray:
    """Return the label map (D, H, W) of a semantic map (K, D, H, W) that comes in slabs of a few slices."""
    semantic = torch.as_tensor(semantic)
    scores = data.resample_scores(semantic.split(slab, dim=1), semantic.shape[1], geometry.shape)
    return torch.cat([part.argmax(0) for part in scores]).to(torch.uint8).numpy()


def write_case(image: Path, label: Path | None, num_classes: int, seed: int, lacking: int = 0) -> None:
    """Write touching blocks, 9 x 80 x 72 voxels, stored backwards in x and z, without one of the classes."""
    ids = np.zeros((72, 80, 9), np.uint8)
    for class_id in range(1, num_classes):
        column, row = (class_id - 1) % 4, (class_id - 1) // 4
        if class_id != lacking:
            ids[8 + 14 * column : 22 + 14 * column, 8 + 16 * row : 24 + 16 * row, 2:7] = class_id
    affine = np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -70], [0, 0, -5.0, 900], [0, 0, 0, 1]])
    noise = np.random.default_rng(seed).normal(100, 15, ids.shape)
    save(image, (ids * 20 + noise).astype(np.int16), affine)
    if label:
        save(label, ids, affine)


def write_tree(root: Path, name: str) -> None:
    """Write a small data set in the original layout of a preset, with the traps that its users know."""
    num = len(PRESETS[name].task.labels)
    if name == "acdc":  # 1 to train, 2 and 3 to test, 90 with frames 04 and 11, 101 without labels
        for number in (1, 2, 3, 90, 101):
            folder = "testing" if number > 100 else "training"
            acdc_tree(root / "database", [number], folder)
            patient = root / f"database/{folder}/patient{number:03d}"
            for frame in (4, 11) if number == 90 else (1, 12):
                stem = f"{patient.name}_frame{frame:02d}"
                label = None if number > 100 else patient / f"{stem}_gt.nii.gz"
                write_case(patient / f"{stem}.nii.gz", label, num, number + frame, lacking=3 * (number == 2))
            save(patient / f"{patient.name}_4d.nii.gz", np.zeros((4, 4, 3, 2), np.int16))
        (root / "database/training/patient090/patient090_frame01.nii.gz").write_text("neither ED nor ES")
    elif name == "synapse":
        base = root / "Abdomen/RawData"
        for number in (1, 2, 5, 6, 27):  # to test, train and validate; 2 and 6 have no gallbladder
            files = (base / f"Training/{kind}/{kind}{number:04d}.nii.gz" for kind in ("img", "label"))
            write_case(*files, num, number, lacking=4 * (number in (2, 6)))
        write_case(base / "Testing/img/img0061.nii.gz", None, num, 61)
    else:
        for part, numbers in (("Tr", (1, 4, 5, 7, 9, 500)), ("Va", (8, 22)), ("Ts", (200, 201))):
            for number in numbers:
                folders = (f"images{part}", None if part == "Ts" else f"labels{part}")
                files = (folder and root / f"amos22/{folder}/amos_{number:04d}.nii.gz" for folder in folders)
                write_case(*files, num, number, lacking=15 * (number == 8))
            (root / f"amos22/images{part}/amos_0507.nii.gz").write_text("MR: must not be opened")
        (root / "amos22/dataset.json").write_text('{"labels": {"10": "pancrease"}}')  # the file's own typo
