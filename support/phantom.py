"""A synthetic short-axis cardiac MR set in ACDC's layout: the data set that needs no download.

    DIR/training/patient001/Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, ...

Each patient has a left ventricle (3) with papillary muscles, its muscular ring (2) and a right ventricle (1),
at end-diastole and end-systole. Position, size, shape and spacing are random. Chest wall, lungs, liver and
vessels have the same intensities, so thresholds on the intensity fail (Dice 0.30, see tests/test_phantom.py).
Ours: all shapes and numbers below. Scripts that miss the set write it to data/phantom.
"""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from scipy import ndimage

Array = np.ndarray
# Ours: mean intensities of tissues, in 12 bits. Blood is nearly fat, and muscle is nearly liver.
BLOOD, MUSCLE, FAT, LIVER, LUNG, SOFT, AIR = 2400.0, 1000.0, 2700.0, 1150.0, 350.0, 1500.0, 60.0


def write_phantom(root: str | Path, num_patients: int = 34, seed: int = 0) -> None:
    """Write the data set to a new or empty folder, whole or not at all. Patient i depends on (seed, i)."""
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root}: found files, expected a new or an empty folder for the phantom")
    partial = root.with_name(f"{root.name}.{os.getpid()}.partial")
    try:
        for number in range(1, num_patients + 1):
            _write_patient(partial / f"training/patient{number:03d}", np.random.default_rng((seed, number)))
        os.replace(partial, root)  # an empty folder is replaced
    except OSError:
        if not (root / "training").is_dir():  # else another process was first, with the same files
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_patient(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    es = int(rng.integers(7, 14))
    (folder / "Info.cfg").write_text(f"ED: 1\nES: {es}\nGroup: SYN\n")
    spacing = np.array([rng.uniform(5, 10), *[rng.uniform(1.4, 1.8)] * 2])  # (D, H, W) in mm
    shape = tuple(int(rng.integers(low, high + 1)) for low, high in ((6, 12), (96, 128), (96, 128)))
    length = shape[0] * spacing[0]  # along D
    anatomy = SimpleNamespace(  # what both frames share, in mm and radians
        shape=shape,
        spacing=spacing,
        centre=rng.uniform(-15, 15, 2),
        tilt=rng.uniform(-0.12, 0.12, 2),  # drift of the long axis, mm per mm of depth
        ends=(rng.uniform(0, 0.2) * length - 0.5 * length, 0.5 * length - rng.uniform(0, 0.15) * length),
        radius=rng.uniform(20, 27),
        wall=rng.uniform(7, 10),
        septum=rng.uniform(0, 2 * np.pi),  # direction from the left to the right ventricle
        squeeze=rng.uniform(0.88, 1.0),
        lobes=[*zip(rng.uniform(0, 0.05, 3), rng.uniform(0, 2 * np.pi, 3))],
        right=rng.uniform((1.25, 1.0, 0.7), (1.6, 1.25, 0.9)),  # reach, width, end
        papillary=rng.uniform(0, 2 * np.pi) + np.array([0.0, rng.uniform(1.5, 2.5)]),
        body=rng.uniform(0.9, 1.1, 2),
        vessels=rng.uniform((0, 1.9, 6), (2 * np.pi, 2.8, 14), (5, 3)),  # turn, distance, size
        gain=rng.uniform(0.85, 1.15, 6),
    )
    for frame, contraction in ((1, 0.0), (es, rng.uniform(0.6, 1.0))):
        image, label = _draw_frame(anatomy, contraction, rng)
        for name, volume in ((f"frame{frame:02d}", image.astype(np.int16)), (f"frame{frame:02d}_gt", label)):
            nifti = nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / f"{folder.name}_{name}.nii.gz")


def _draw_frame(a: SimpleNamespace, contraction: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return image (D, H, W) in [0, 4095] and class ids uint8; contraction: 0 diastole, 1 strong systole."""
    shape, spacing = a.shape, a.spacing
    places = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing))
    z, y, x = np.meshgrid(*places, indexing="ij", sparse=True)  # in mm from the volume's centre
    dy, dx = y - a.centre[0] - a.tilt[0] * z, x - a.centre[1] - a.tilt[1] * z  # from the long axis
    along = (z - a.ends[0]) / (a.ends[1] - a.ends[0])  # from 0 at the base to 1 at the apex
    label, distance, pool, outer = _draw_heart(a, contraction, along, dy, dx)

    def around(turn: float, far: Array | float) -> Array:  # distance from a point beside the long axis
        return np.hypot(dx - far * np.cos(turn), dy - far * np.sin(turn))

    half_height, half_width = a.body * (0.46 * shape[1] * spacing[1], 0.47 * shape[2] * spacing[2])
    body = np.hypot(y / half_height, x / half_width)
    image = np.where(body < 1, np.where(body < 0.93, SOFT, FAT), AIR) * np.ones(shape)
    for side in (-1, 1):
        image[:, np.hypot((x - side * 52) / 24, (y + 8) / 42)[0] < 1] = LUNG * a.gain[0]
    image[:, np.hypot((x + 28) / 40, (y - 58) / 26)[0] < 1] = LIVER * a.gain[1]
    for turn, far, size in a.vessels:  # more blood: aorta, veins, atrium
        image[around(turn, far * a.radius) < size] = BLOOD * a.gain[2]
    image[(distance < 1.12 * outer) & (along > -0.15) & (along < 1.1)] = FAT * a.gain[3] * 0.8  # pericardium
    image[(along < 0) & (distance < 0.9 * outer)] = BLOOD * a.gain[4]  # atrium: blood without a label
    image[(label == 1) | (label == 3)] = BLOOD * a.gain[4]
    image[label == 2] = MUSCLE * a.gain[5]
    for turn in a.papillary:  # papillary muscles are dark, but belong to class 3
        image[(around(turn, 0.6 * pool) < 0.16 * pool) & (label == 3)] = MUSCLE * a.gain[5]
    image = ndimage.gaussian_filter(image, (0, 0.7, 0.7))
    knots = rng.uniform(0.65, 1.35, (2, 4, 4))
    bias = ndimage.zoom(knots, np.divide(shape, knots.shape), order=1, grid_mode=True, mode="nearest")
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1.2, 1.2)) * 350
    noise = rng.normal(0, 110, (2, *shape))
    return np.hypot(image * bias + texture + noise[0], noise[1]).clip(0, 4095), label  # Rician noise


def _draw_heart(a: SimpleNamespace, contraction: float, along: Array, dy: Array, dx: Array) -> tuple:
    """Return class ids (D, H, W), distances from the long axis, and the radii of pool and ring, in mm."""
    inside = (along >= 0) & (along < 1)
    taper = np.sqrt(np.clip(1 - (0.93 * along.clip(0)) ** 2.5, 0, None))
    angle, turn, (rv_reach, rv_width, rv_end) = np.arctan2(dy, dx), a.septum, a.right
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)  # u: to the septum
    wobble = 1 + sum(k * np.cos((i + 2) * angle + p) for i, (k, p) in enumerate(a.lobes))
    distance = np.hypot(u / a.squeeze, v) / wobble
    pool = a.radius * taper * (1 - 0.38 * contraction)
    outer = pool + a.wall * (0.75 + 0.25 * taper) * (1 + 0.45 * contraction)
    reach = outer + a.radius * (rv_reach - 0.85) * (1 - 0.35 * contraction)
    crescent = np.hypot((u - 0.55 * reach) / (0.62 * reach), v / (rv_width * outer)) < 1
    label = np.zeros(distance.shape, np.uint8)
    label[crescent & inside & (along < rv_end) & (distance >= outer)] = 1
    label[(distance < outer) & inside] = 2
    label[(distance < pool) & inside & (along < 0.92)] = 3
    return label, distance, pool, outer
