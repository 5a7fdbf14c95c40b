"""A synthetic short-axis cardiac MR set in ACDC's layout: what `train.py` trains on when nothing else is given.

    python phantom.py [DIR]     writes DIR (default data/phantom) in some seconds:

    DIR/training/patient001/Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, ... (ED and ES)

Drawn per patient: position, orientation, size and shape of a left ventricle (3) with papillary muscles in its pool, its
muscular ring (2) and a right-ventricular crescent (1), slices that reach beyond base and apex, pixel and slice spacing;
around them chest wall, lungs, liver and vessels that share their intensities, a bias field, texture and noise.
The task is not one of intensity: with the best interval of intensities for each class, chosen again for every volume
with its truth at hand, the mean Dice is 0.30 (RV 0.34, Myo 0.29, LV 0.27 over the 68 volumes of seed 0, ends on 64
levels; `tests/test_phantom.py` measures the first of them). Ours: all shapes and numbers below.

Letters: D slices, H rows, W columns. Labels and file names are ACDC's.
"""

import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

# Mean intensities of tissues in 12 bits: blood is nearly fat, muscle is nearly liver.
BLOOD, MUSCLE, FAT, LIVER, LUNG, SOFT, AIR = 2400.0, 1000.0, 2700.0, 1150.0, 350.0, 1500.0, 60.0


def write_phantom(root: str | Path, num_patients: int = 34, seed: int = 0) -> None:
    """Write the set; the folder appears only when it is whole.

    Args:
        root: folder to make; may exist if it is empty. num_patients: two frames each; patient i of a seed is the same
            in sets of every size. seed: of everything.
    Raises:
        FileExistsError: `root` has something in it already.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root}: found files in it, expected a new or empty folder for the phantom")
    partial = root.with_name(f"{root.name}.{os.getpid()}.partial")
    try:
        for number in range(1, num_patients + 1):
            _write_patient(partial / "training" / f"patient{number:03d}", np.random.default_rng((seed, number)))
        try:
            os.replace(partial, root)  # an empty folder is replaced
        except OSError:
            if not (root / "training").is_dir():  # else another process of torchrun was first, with the same files
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_patient(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    es = int(rng.integers(7, 14))
    (folder / "Info.cfg").write_text(f"ED: 1\nES: {es}\nGroup: SYN\n")
    spacing = np.array([rng.uniform(5, 10), *[rng.uniform(1.4, 1.8)] * 2])  # (D, H, W) in mm
    shape = tuple(int(rng.integers(low, high + 1)) for low, high in ((6, 12), (96, 128), (96, 128)))
    anatomy = draw_anatomy(rng, shape, spacing)
    for frame, contraction in ((1, 0.0), (es, rng.uniform(0.6, 1.0))):
        image, label = draw_frame(anatomy, contraction, shape, spacing, rng)
        for name, volume in ((f"frame{frame:02d}", image.astype(np.int16)), (f"frame{frame:02d}_gt", label)):
            nifti = nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / f"{folder.name}_{name}.nii.gz")


def draw_anatomy(rng: np.random.Generator, shape: tuple[int, int, int], spacing: np.ndarray) -> dict:
    """What both frames of a patient share. Lengths in mm, angles in radians, places from the volume's centre.

    Args:
        rng: of the patient. shape: (D, H, W). spacing: (D, H, W) in mm.
    """
    length = shape[0] * spacing[0]
    return {
        "centre": rng.uniform(-15, 15, 2),
        "tilt": rng.uniform(-0.12, 0.12, 2),  # the long axis drifts through the slices
        "base": -0.5 * length + rng.uniform(0.0, 0.2) * length,
        "apex": 0.5 * length - rng.uniform(0.0, 0.15) * length,
        "radius": rng.uniform(20, 27),
        "wall": rng.uniform(7, 10),
        "septum": rng.uniform(0, 2 * np.pi),  # direction from the left to the right ventricle
        "squeeze": rng.uniform(0.88, 1.0),
        "lobes": rng.uniform(0, 0.05, 3),
        "phases": rng.uniform(0, 2 * np.pi, 3),
        "rv_reach": rng.uniform(1.25, 1.6),
        "rv_width": rng.uniform(1.0, 1.25),
        "rv_end": rng.uniform(0.7, 0.9),
        "papillary": rng.uniform(0, 2 * np.pi) + np.array([0.0, rng.uniform(1.5, 2.5)]),
        "body": rng.uniform(0.9, 1.1, 2),
        "vessels": [(rng.uniform(0, 2 * np.pi), rng.uniform(1.9, 2.8), rng.uniform(6, 14)) for _ in range(5)],
        "gain": rng.uniform(0.85, 1.15, 6),
    }


def draw_frame(
    anatomy: dict, contraction: float, shape: tuple[int, int, int], spacing: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One frame of a patient.

    Args:
        anatomy: of `draw_anatomy`. contraction: 0 at end-diastole, 1 at a strong end-systole. shape: (D, H, W).
        spacing: (D, H, W) in mm. rng: of bias field, texture and noise.
    Returns:
        image (D, H, W) float in [0, 4095] and label map (D, H, W) uint8.
    """
    a = anatomy
    z, y, x = (((np.arange(n) - (n - 1) / 2) * s) for n, s in zip(shape, spacing))
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    dy, dx = y - a["centre"][0] - a["tilt"][0] * z, x - a["centre"][1] - a["tilt"][1] * z
    along = (z - a["base"]) / (a["apex"] - a["base"])  # 0 at the base, 1 at the apex
    inside = (along >= 0) & (along < 1)
    taper = np.sqrt(np.clip(1 - (0.93 * along.clip(0)) ** 2.5, 0, None))

    angle = np.arctan2(dy, dx)
    u, v = (dx * np.cos(a["septum"]) + dy * np.sin(a["septum"]), dy * np.cos(a["septum"]) - dx * np.sin(a["septum"]))
    wobble = 1 + sum(k * np.cos((i + 2) * angle + p) for i, (k, p) in enumerate(zip(a["lobes"], a["phases"])))
    distance = np.hypot(u / a["squeeze"], v) / wobble
    pool = a["radius"] * taper * (1 - 0.38 * contraction)
    outer = pool + a["wall"] * (0.75 + 0.25 * taper) * (1 + 0.45 * contraction)
    reach = outer + a["radius"] * (a["rv_reach"] - 0.85) * (1 - 0.35 * contraction)
    crescent = np.hypot((u - 0.55 * reach) / (0.62 * reach), v / (a["rv_width"] * outer)) < 1
    label = np.zeros(np.broadcast_shapes(distance.shape, shape), np.uint8)
    label[crescent & inside & (along < a["rv_end"]) & (distance >= outer)] = 1
    label[(distance < outer) & inside] = 2
    label[(distance < pool) & inside & (along < 0.92)] = 3

    gain = a["gain"]
    half_height, half_width = a["body"] * (0.46 * shape[1] * spacing[1], 0.47 * shape[2] * spacing[2])
    body = np.hypot(y / half_height, x / half_width)
    image = np.where(body < 1, np.where(body < 0.93, SOFT, FAT), AIR) * np.ones(shape)
    for side in (-1, 1):  # lungs beside, the liver below
        image[:, np.hypot((x - side * 52) / 24, (y + 8) / 42)[0] < 1] = LUNG * gain[0]
    image[:, np.hypot((x + 28) / 40, (y - 58) / 26)[0] < 1] = LIVER * gain[1]
    for turn, far, size in a["vessels"]:  # other blood: aorta, veins, atrium
        place = np.hypot(dx - far * a["radius"] * np.cos(turn), dy - far * a["radius"] * np.sin(turn))
        image[place < size] = BLOOD * gain[2]
    image[(distance < 1.12 * outer) & (along > -0.15) & (along < 1.1)] = FAT * gain[3] * 0.8  # the pericardium's fat
    above = (along < 0) & (distance < 0.9 * outer)  # atrium and great vessels above the base: blood without a label
    image[above] = BLOOD * gain[4]
    image[label == 1] = BLOOD * gain[4]
    image[label == 2] = MUSCLE * gain[5]
    image[label == 3] = BLOOD * gain[4]
    for turn in a["papillary"]:  # dark, but part of the pool
        place = np.hypot(dx - 0.6 * pool * np.cos(turn), dy - 0.6 * pool * np.sin(turn))
        image[(place < 0.16 * pool) & (label == 3)] = MUSCLE * gain[5]

    image = ndimage.gaussian_filter(image, (0, 0.7, 0.7))
    knots = rng.uniform(0.65, 1.35, (2, 4, 4))
    bias = ndimage.zoom(knots, np.divide(shape, knots.shape), order=1, grid_mode=True, mode="nearest")
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1.2, 1.2)) * 350
    noise = rng.normal(0, 110, (2, *shape))
    image = np.hypot(image * bias + texture + noise[0], noise[1])  # Rician, as magnitude images are
    return np.clip(image, 0, 4095), label


def main(argv: list[str] | None = None) -> None:
    """Write the default set to the folder given."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        write_phantom(arguments[0] if arguments else "data/phantom")
    except OSError as error:
        raise SystemExit(f"phantom.py: {error}") from error


if __name__ == "__main__":
    main()
