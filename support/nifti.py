"""NIfTI files: one file to one array and back, the place of the array in the patient, and all checks.

    file (x, y, z) ── read_image, read_label ──> array (D, H, W) and its Geometry
    all files of a case ── check_case ──> one line for each problem
    label map (D, H, W) ── write_label_map ──> file with the axes and the affine of the image

Arrays are turned to RAS and then to (D, H, W) by `Geometry.from_file` and back by `Geometry.to_file`.
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


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The place of a volume in its file and in the patient.

    Args:
        affine: (4, 4), from the file's voxels (x, y, z) to mm.
        shape, spacing: (D, H, W) of the array, that is after turning it to RAS; spacing in mm.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @classmethod
    def of(cls, affine: np.ndarray, file_shape: Sequence[int]) -> "Geometry":
        """Make the geometry of a file with this affine and this shape (x, y, z)."""
        turned_to = orientations.io_orientation(affine)[:, 0].tolist()  # file axis -> axis of RAS
        file_axes = [turned_to.index(axis) for axis in (2, 1, 0)]  # the file's axes that become D, H, W
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        shape = tuple(file_shape[axis] for axis in file_axes)
        return cls(affine, shape, tuple(float(spacing[axis]) for axis in file_axes))

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Turn an array of the file, (x, y, z), to RAS and to (D, H, W)."""
        ras = orientations.apply_orientation(array, orientations.io_orientation(self.affine))
        return ras.transpose(2, 1, 0)

    def to_file(self, volume: np.ndarray) -> np.ndarray:
        """Turn a volume (D, H, W) back to the axes of the file: undo `from_file`."""
        ras = np.array([[0, 1], [1, 1], [2, 1]])
        back = orientations.ornt_transform(ras, orientations.io_orientation(self.affine))
        return orientations.apply_orientation(volume.transpose(2, 1, 0), back)

    def ras_affine(self) -> np.ndarray:
        """Return the affine (4, 4) of the array that is turned to RAS, whichever axes the file has."""
        turn = orientations.io_orientation(self.affine)
        file_shape = [self.shape[2 - int(axis)] for axis in turn[:, 0]]
        return self.affine @ orientations.inv_ornt_aff(turn, file_shape)


# ---------------------------------------------------------------------------------------------------- reading


def _problem(path: str | Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path}: found {found}, expected {expected}")


def read_header(path: str) -> tuple[nib.Nifti1Image, Geometry]:
    """Open a NIfTI file and check its header, but read no voxels; raise a ValueError if it is unusable."""
    if not Path(path).is_file():
        raise _problem(path, "no such file", "a NIfTI volume")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises many kinds of error for files that are not NIfTI
        raise _problem(path, f"no readable NIfTI file ({error})", ".nii or .nii.gz") from error
    if len(image.shape) != 3 or 0 in image.shape:
        raise _problem(path, f"shape {image.shape}", "three dimensions, one file a channel")
    if image.get_data_dtype().kind not in "biuf":
        raise _problem(path, f"voxels of type {image.get_data_dtype()}", "real numbers")
    axes = image.affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    # Ours: directions that span less than a thousandth of a unit cube are taken for parallel.
    possible = np.isfinite(axes).all() and spacing.all() and abs(np.linalg.det(axes / spacing)) >= 1e-3
    if not possible or not np.isfinite(image.affine).all():
        raise _problem(path, f"the affine {image.affine.tolist()}", "three axes with a spacing")
    return image, Geometry.of(image.affine, image.shape)


def read_volume(path: str) -> tuple[np.ndarray, Geometry]:
    """Read an array (D, H, W), of the type that the file's scaling gives, with its geometry."""
    image, geometry = read_header(path)
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # gzip, zlib and nibabel raise different errors for a truncated file
        raise _problem(path, f"a truncated file ({error})", f"{image.shape} voxels") from error
    return geometry.from_file(array), geometry


def read_image(path: str) -> tuple[np.ndarray, Geometry]:
    """Read an image as float32 (D, H, W) with its geometry; raise a ValueError for NaN and infinity."""
    array, geometry = read_volume(path)
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, which is found below
        array = array.astype(np.float32)
    if wrong := array.size - np.count_nonzero(np.isfinite(array)):
        raise _problem(path, f"{wrong} voxels of NaN or infinity", "finite numbers")
    return array, geometry


def read_label(path: str, num_classes: int) -> tuple[np.ndarray, Geometry]:
    """Read a label map as uint8 (D, H, W) with its geometry; raise a ValueError for ids that are no class."""
    array, geometry = read_volume(path)
    with np.errstate(invalid="ignore"):  # NaN and numbers beyond a byte change here and are found below
        label = array.astype(np.uint8)
    wrong = (label != array) | (label >= num_classes)
    if wrong.any():
        ids = np.unique(array[wrong]).astype(float).tolist()
        raise _problem(path, f"the labels {ids[:5]}", f"whole numbers from 0 to {num_classes - 1}")
    return label, geometry


# --------------------------------------------------------------------------------------------------- checking


def check_same_place(path: str, geometry: Geometry, reference_path: str, reference: Geometry) -> None:
    """Raise a ValueError unless two volumes have the same shape and the same place.

    Ours: a tenth of a voxel, anywhere in the volume, is allowed for the rounding of headers.
    """
    if geometry.shape != reference.shape:
        raise _problem(path, f"(D, H, W) = {geometry.shape}", f"{reference.shape} as {reference_path}")
    corners = np.array(list(itertools.product(*((0, n) for n in reversed(reference.shape)))))
    affines = [each.ras_affine() for each in (geometry, reference)]
    shifts = nib.affines.apply_affine(affines[0] - affines[1], corners)  # (8, 3) in mm
    if np.linalg.norm(shifts, axis=1).max() > 0.1 * min(reference.spacing):
        found, expected = (np.round(affine, 4).tolist() for affine in affines)
        raise _problem(path, f"the affine {found} in RAS", f"{expected} as {reference_path}")


def check_case(case: Case, num_classes: int, predictions: Sequence[str | Path] = ()) -> list[str]:
    """Read all files of a case and more label maps, which must lie there too; return a line per problem."""
    problems, places = [], []

    def attempt(check: Callable, *arguments):
        try:
            return check(*arguments)
        except ValueError as error:
            problems.append(" ".join(str(error).split()))

    labels = dict.fromkeys(path for path in (case.label, case.box_source) if path is not None)
    reads = [(read_image, path) for path in case.images]
    reads += [(read_label, str(path), num_classes) for path in (*labels, *predictions)]
    for read, path, *arguments in reads:
        if content := attempt(read, path, *arguments):
            places.append((path, content[1]))
    for path, geometry in places[1:]:
        attempt(check_same_place, path, geometry, *places[0])
    return problems


# ---------------------------------------------------------------------------------------------------- writing


def write_label_map(path: str | Path, label: np.ndarray, geometry: Geometry, description: str = "") -> None:
    """Write class ids (D, H, W) with the axes and the affine of the image that they belong to.

    The description, of up to 79 characters, stands in the header; `read_description` gives it back.
    """
    path = Path(path)
    if label.shape != geometry.shape:
        raise _problem(path, f"a label map of {label.shape}", f"{geometry.shape} as in its geometry")
    image = nib.Nifti1Image(geometry.to_file(label).astype(np.uint8), geometry.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    image.set_sform(geometry.affine, code="scanner")
    image.set_qform(geometry.affine, code="scanner")
    content = image.to_bytes()
    content = gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content
    write_whole(path, lambda file: file.write(content))


def read_description(path: str | Path) -> str:
    """Return the description that `write_label_map` wrote, or "" if there is no readable file."""
    try:
        return read_header(str(path))[0].header["descrip"].item().decode(errors="replace")
    except ValueError:
        return ""
