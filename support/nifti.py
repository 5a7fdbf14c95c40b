"""One NIfTI file to one array and back, and all that can be wrong with it.

    read_volume        file -> (D, H, W) in RAS, and where it lay
    check_case         all files of a case -> a line for everything that is wrong
    write_label_map    (D, H, W) -> file, in the orientation and affine of the image it belongs to

NIfTI's (x, y, z) is turned to RAS and then to (D, H, W) in `read_volume`, and back in `write_label_map`; nowhere else.
Errors read "FILE: found X, expected Y". Letters: D slices, H rows, W columns. Spacing is (D, H, W) in mm.
"""

import dataclasses
import gzip
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

from support.files import write_whole
from support.layouts import Case

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


def read_image(path: str) -> tuple[np.ndarray, Geometry]:
    """`read_volume` as (D, H, W) float32; NaN and infinity are a ValueError."""
    array, geometry = read_volume(path)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity and is found below
        array = array.astype(np.float32)
    wrong = array.size - np.count_nonzero(np.isfinite(array))
    if wrong:
        raise ValueError(f"{path}: found {wrong} voxels of NaN or infinity, expected finite numbers")
    return array, geometry


def read_label(path: str, num_classes: int) -> tuple[np.ndarray, Geometry]:
    """`read_volume` as (D, H, W) uint8; an id that is not whole or not below `num_classes` is a ValueError."""
    array, geometry = read_volume(path)
    with np.errstate(invalid="ignore"):  # NaN and what a byte cannot hold change in the cast and are found below
        label = array.astype(np.uint8)
    wrong = (label != array) | (label >= num_classes)
    if wrong.any():
        ids = np.unique(array[wrong]).astype(float).tolist()
        raise ValueError(f"{path}: found the labels {ids[:5]}, expected whole numbers from 0 to {num_classes - 1}")
    return label, geometry


def canonical_affine(geometry: Geometry) -> np.ndarray:
    """The affine (4, 4) of the volume once it is turned to RAS, for (x, y, z): the same however it is stored."""
    turn = orientations.io_orientation(geometry.affine)
    file_shape = [geometry.shape[2 - int(axis)] for axis in turn[:, 0]]
    return geometry.affine @ orientations.inv_ornt_aff(turn, file_shape)


def check_same_place(path: str, geometry: Geometry, reference_path: str, reference: Geometry) -> None:
    """Raise a ValueError unless two volumes have one shape and one place.

    Ours: up to a tenth of a voxel, anywhere in the volume, is the rounding of headers.
    """
    if geometry.shape != reference.shape:
        raise ValueError(f"{path}: found (D, H, W) = {geometry.shape}, expected {reference.shape} as {reference_path}")
    corners = np.array(list(itertools.product(*((0, n) for n in reversed(reference.shape)))))
    affines = [canonical_affine(each) for each in (geometry, reference)]
    shifts = nib.affines.apply_affine(affines[0] - affines[1], corners)
    if np.linalg.norm(shifts, axis=1).max() > 0.1 * min(reference.spacing):
        found, expected = (np.round(affine, 4).tolist() for affine in affines)
        raise ValueError(f"{path}: found the affine {found} in RAS, expected {expected} as {reference_path}")


def check_case(case: Case, num_classes: int, predictions: Sequence[str | Path] = ()) -> list[str]:
    """All that is wrong with one case, a line each: every channel, the label maps, and whether they lie together.

    Args:
        predictions: more label maps, that should lie where the case lies.
    """
    problems, places = [], []

    def attempt(check: Callable, *arguments):
        try:
            return check(*arguments)
        except ValueError as error:
            problems.append(" ".join(str(error).split()))

    labels = dict.fromkeys(path for path in (case.label, case.prompts) if path is not None)
    for read, path, *arguments in (
        *((read_image, path) for path in case.images),
        *((read_label, str(path), num_classes) for path in (*labels, *predictions)),
    ):
        content = attempt(read, path, *arguments)
        if content is not None:
            places.append((path, content[1]))
    for path, geometry in places[1:]:
        attempt(check_same_place, path, geometry, *places[0])
    return problems


# -------------------------------------------------------------------------------------------------------------- writing


def write_label_map(path: str | Path, label: np.ndarray, geometry: Geometry, description: str = "") -> None:
    """Write a label map with the orientation and affine of the file it belongs to; sform and qform are both set.

    Args:
        path: .nii or .nii.gz. label: (D, H, W) as `read_volume` would give it. geometry: of that file.
        description: up to 79 characters for the header, see `read_description`.
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
    image.header["descrip"] = description.encode()
    image.set_sform(geometry.affine, code="scanner")
    image.set_qform(geometry.affine, code="scanner")
    content = image.to_bytes()
    content = gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content
    write_whole(path, lambda file: file.write(content))


def read_description(path: str | Path) -> str:
    """The description that `write_label_map` gave a file; "" where there is no readable file."""
    try:
        return read_header(str(path))[0].header["descrip"].item().decode(errors="replace")
    except ValueError:
        return ""
