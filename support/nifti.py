"""NIfTI files: one file to one array and back, the place of the array in the patient, and all checks.

    file (x, y, z) or (x, y, z, C) ── read_image, read_label ──> array and its Geometry
    all files of a case ── check_case ──> problems, and remarks on what was decided for the user
    label map (D, H, W) ── write_label_map ──> file with the header of the image

`Geometry.of` decides which axis of a file becomes D, H and W: once, by the image. Labels follow the image.
"""

import contextlib
import dataclasses
import gzip
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from support.files import write_whole
from support.layouts import Case

ANISOTROPIC = 1.5  # Ours: D is the axis whose spacing is more than this times the next largest
# Ours: W and H are nearest to these directions in the patient (right, anterior, superior): R and A in axial
# images, R and S in coronal, A and S in sagittal ones. They come from a search: all angles at which an image
# would be turned otherwise are 14 degrees or more away from 0, 45, 90 ... about each axis of the patient.
NEAR_W, NEAR_H = np.array([1.0, 0.35, 0.2]), np.array([0.8, 0.55, 1.0])
PATIENT_AXES = ("left-right", "posterior-anterior", "inferior-superior")
MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metre and micron; all others are read as mm
SPACING_RANGE = 0.01, 100.0  # Ours: in mm; a spacing outside comes from a wrong unit or a damaged header
SKEW = 1e-3  # Ours: the cosine between two axes from which they are said not to be at right angles
ROUNDED = 0.01  # Ours: how far a label may be from a whole number (a scaling makes 1.0001 of 1)
GZIP_RATIO = 1032  # gzip makes no file smaller than by this factor
Remark = Callable[[str], None]
Volume = tuple[np.ndarray, "Geometry"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The place of a volume in its file and in the patient.

    Args:
        affine: (4, 4), from the file's voxels (x, y, z) to mm in the patient (right, anterior, superior).
        shape, spacing: (D, H, W) of the turned array; spacing in mm.
        turn: (3, 2), nibabel's orientation: each file axis -> (its axis of (W, H, D), sense 1 or -1).
        header: the file's own, which `write_label_map` copies; None makes a fresh one.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    turn: np.ndarray = dataclasses.field(default_factory=lambda: np.array([[0, 1], [1, 1], [2, 1]]))
    header: nib.Nifti1Header | None = None

    @classmethod
    def of(cls, affine: np.ndarray, file_shape: Sequence[int], frame=None, header=None) -> "Geometry":
        """Make the geometry of a file with this affine and this shape (x, y, z).

        Args:
            frame: (3, 3), the columns are the directions of W, H, D in the patient. None decides them. Ours:
                D is the axis of thick slices, or else the one nearest to inferior-superior; then W and H. The
                sense of D makes (W, H, D) right-handed, so the anatomy is never mirrored.
        """
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if frame is None:
            turn = _choose_turn(affine[:3, :3] / spacing, spacing)
        else:
            turn = orientations.io_orientation(nib.affines.from_matvec(np.linalg.inv(frame) @ affine[:3, :3]))
        file_axes = np.argsort(turn[:, 0])[::-1]  # the file's axes that become D, H, W
        shape, sizes = (tuple(np.array(each)[file_axes].tolist()) for each in (file_shape, spacing))
        return cls(affine, shape, sizes, turn, header)

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Turn an array of the file, (x, y, z) or (x, y, z, C), to (D, H, W) or (C, D, H, W)."""
        return orientations.apply_orientation(array, self.turn).transpose()

    def to_file(self, volume: np.ndarray) -> np.ndarray:
        """Turn a volume (D, H, W) back to the axes of the file: undo `from_file`."""
        back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), self.turn)
        return orientations.apply_orientation(volume.transpose(), back)

    def array_affine(self) -> np.ndarray:
        """Return the affine (4, 4) from the turned array's voxels (w, h, d) to mm in the patient."""
        file_shape = [self.shape[2 - int(axis)] for axis in self.turn[:, 0]]
        return self.affine @ orientations.inv_ornt_aff(self.turn, file_shape)

    @property
    def frame(self) -> np.ndarray:
        """Directions of W, H, D in the patient: (3, 3), a unit vector in each column."""
        return self.array_affine()[:3, :3] / self.spacing[::-1]

    @property
    def slices(self) -> str:
        """Axis of the patient that D is nearest to, such as "inferior-superior"."""
        return PATIENT_AXES[np.abs(self.frame[:, 2]).argmax()]


def _choose_turn(directions: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the `turn` of a file whose axes have these directions (3, 3), by the rule of `Geometry.of`."""
    _, second, largest = np.argsort(spacing)
    thick = spacing[largest] > ANISOTROPIC * spacing[second]
    d = largest if thick else np.abs(directions[2]).argmax()
    near = np.stack([NEAR_W, NEAR_H]) @ directions  # (2, file axes)
    w, h = max(itertools.permutations({0, 1, 2} - {d}), key=lambda pair: np.abs(near[[0, 1], pair]).sum())
    senses = np.where([near[0, w] < 0, near[1, h] < 0, False], -1, 1)
    senses[2] = np.sign(np.linalg.det(directions[:, [w, h, d]] * senses))
    turn = np.empty((3, 2), int)
    turn[[w, h, d]] = np.stack([np.arange(3), senses], axis=1)
    return turn


# ---------------------------------------------------------------------------------------------------- reading


def _problem(path: str | Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path}: found {found}, expected {expected}")


def _ignore(remark: str) -> None:
    """Take a remark that nobody asked for."""


@contextlib.contextmanager
def _content(path: str, remark: Remark) -> Iterator[tuple[BinaryIO, int]]:
    """Give the content of a file, unzipped, and the most bytes that it can have; name what damages it."""
    if not Path(path).is_file():
        raise _problem(path, "no such file", "a NIfTI volume")
    try:
        with open(path, "rb") as file:
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            if zipped != str(path).endswith(".gz"):
                remark(f"{path}: the file is {'' if zipped else 'not '}compressed, unlike its name.")
            size = Path(path).stat().st_size
            yield (gzip.GzipFile(fileobj=file), GZIP_RATIO * size) if zipped else (file, size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = "a truncated file" if isinstance(error, EOFError) else "a damaged file"
        raise _problem(path, found, "gzip's checksum at its end; copy the file again") from error
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory"
        raise _problem(path, f"a file that cannot be read ({reason})", "a NIfTI volume") from error


def _parse_header(path: str, stream: BinaryIO, limit: int):
    """Return a file's own header, the same with nibabel's repairs, the shape and the offset of its voxels."""
    start = stream.read(540)
    kind = nib.Nifti2Header if start[:4] in (b"\x1c\2\0\0", b"\0\0\2\x1c") else nib.Nifti1Header  # 540
    try:
        own = kind(start[: kind.sizeof_hdr], check=False)
        if own["magic"].item() != kind.single_magic:
            raise HeaderDataError("it has not the mark of a header with voxels")
        header = kind(own.binaryblock)
        full, offset = header.get_data_shape(), header.get_data_offset() or kind.single_vox_offset
        header.get_slope_inter()
    except Exception as error:  # nibabel raises many kinds of error for a header that is damaged
        reason = f" ({error})" if isinstance(error, HeaderDataError) else ""
        raise _problem(path, f"no readable NIfTI file{reason}", ".nii or .nii.gz") from error
    channels = full[3:] if any(n != 1 for n in full[3:]) else ()
    if len(full) < 3 or len(channels) > 1 or min(full) < 1:
        raise _problem(path, f"shape {full}", "three dimensions, or four with the channels last")
    if header.get_data_dtype().kind not in "biuf":
        raise _problem(path, f"voxels of type {header.get_value_label('datatype')}", "real numbers")
    claimed = offset + header.get_data_dtype().itemsize * math.prod(full)
    if claimed > limit:
        raise _problem(path, f"a truncated file, its header claims {claimed} bytes", f"at most {limit}")
    return own, header, full[:3] + channels, offset


def _form(header: nib.Nifti1Header, name: str) -> np.ndarray | None:
    """Return the affine of "sform" or "qform": None without a code, NaN if its numbers are no rotation."""
    try:
        return getattr(header, f"get_{name}")() if header[f"{name}_code"] else None
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _has_axes(affine: np.ndarray) -> bool:
    """Tell whether an affine has three axes. Ours: those spanning < 0.001 of a unit cube are parallel."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    possible = np.isfinite(affine).all() and spacing.all()
    return possible and abs(np.linalg.det(affine[:3, :3] / spacing)) >= 1e-3


def _largest_shift(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Return by how many mm two affines differ at most in a volume of this shape: at one of its corners."""
    corners = np.array(list(itertools.product(*((0, n) for n in shape))))
    return np.linalg.norm(nib.affines.apply_affine(one - other, corners), axis=1).max()


def _read_affine(path: str, header: nib.Nifti1Header, remark: Remark) -> np.ndarray:
    """Return the affine of a file in mm; remark on what is odd about it."""
    forms = [form for name in ("sform", "qform") if (form := _form(header, name)) is not None]
    given = forms or [header.get_base_affine()]
    if not (usable := [form for form in given if _has_axes(form)]):
        raise _problem(path, f"the affine {given[0].tolist()}", "three axes with a spacing")
    unit = MM_PER_UNIT.get(int(header["xyzt_units"]) % 8, 1.0)
    affine = np.diag([unit, unit, unit, 1.0]) @ usable[0]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        raise _problem(path, f"a spacing of {spacing.tolist()} mm", "0.01 to 100 mm; correct its header")
    shift = unit * _largest_shift(usable[0], usable[-1], header.get_data_shape()[:3])
    skew = np.abs(affine[:3, :3].T @ affine[:3, :3] / np.outer(spacing, spacing) - np.eye(3)).max()
    for is_so, sentence in (
        (
            shift > 0.1 * spacing.min(),
            f"its sform and qform differ by up to {shift:.3g} mm. The sform is used.",
        ),
        (len(usable) < len(forms) == 2, "one of its two forms has no three axes. The other is used."),
        (not forms, "no form has a code. Its directions are a guess: x from right to left."),
        (np.array_equal(affine, np.eye(4)), "its affine is the identity. Was it ever set?"),
        (skew > SKEW, "its axes are not at right angles. Distances are computed as if they were."),
    ):
        if is_so:
            remark(f"{path}: {sentence}")
    return affine


def read_header(path: str) -> tuple[nib.Nifti1Header, Geometry]:
    """Read the header of a file, but no voxels; raise a ValueError if it is unusable."""
    with _content(path, _ignore) as (stream, limit):
        own, header, shape, _ = _parse_header(path, stream, limit)
    return own, Geometry.of(_read_affine(path, header, _ignore), shape[:3], None, own)


def read_volume(path: str, like: Geometry | None = None, remark: Remark = _ignore) -> Volume:
    """Read a whole file, to the end of its gzip stream. Nothing may be missing or left over.

    Args:
        like: geometry of the image that this file belongs to: the array gets its directions.
        remark: called with a sentence for each thing that is odd but can be read.
    Returns:
        Array (D, H, W), or (C, D, H, W) for four axes, of the type that the scaling gives; geometry.
    Raises:
        ValueError: the file, what was found and what was expected.
    """
    with _content(path, remark) as (stream, limit):
        own, header, shape, offset = _parse_header(path, stream, limit)
        geometry = Geometry.of(_read_affine(path, header, remark), shape[:3], like and like.frame, own)
        size = header.get_data_dtype().itemsize * math.prod(shape)
        stream.seek(offset)
        if len(content := stream.read(size)) < size:
            raise _problem(path, f"a truncated file, {len(content)} bytes of voxels", f"{size} for {shape}")
        while rest := stream.read(2**20):  # to the end, where gzip's checksum is
            if rest.strip(b"\0"):
                raise _problem(path, "bytes behind the last voxel", f"{size} bytes for {shape}")
    array = np.frombuffer(content, header.get_data_dtype()).reshape(shape, order="F")
    return geometry.from_file(apply_read_scaling(array, *header.get_slope_inter())), geometry


def read_image(path: str, like: Geometry | None = None, remark: Remark = _ignore) -> Volume:
    """`read_volume` for an image: float32 (C, D, H, W), finite; C = 1 for a file with three axes."""
    array, geometry = read_volume(path, like, remark)
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, which is found below
        array = array.astype(np.float32)
    if wrong := array.size - np.count_nonzero(np.isfinite(array)):
        raise _problem(path, f"{wrong} voxels of NaN or infinity", "finite numbers")
    return array if array.ndim == 4 else array[None], geometry


def read_label(path: str, num_classes: int, like: Geometry | None = None, remark: Remark = _ignore) -> Volume:
    """`read_volume` for a label map: uint8 (D, H, W) below `num_classes`, nearly whole numbers rounded."""
    array, geometry = read_volume(path, like, remark)
    if array.ndim == 4:
        raise _problem(path, f"{len(array)} channels", "one label map")
    with np.errstate(invalid="ignore"):  # NaN and numbers beyond a byte change here and are found below
        label = (np.rint(array) if array.dtype.kind == "f" else array).astype(np.uint8)
    wrong, changed = label >= num_classes, label != array
    if changed.any():
        wrong |= changed & ~(np.abs(label - array.astype(float)) <= ROUNDED)
    if wrong.any():
        ids = np.unique(array[wrong]).astype(float).tolist()
        raise _problem(path, f"the labels {ids[:5]}", f"whole numbers from 0 to {num_classes - 1}")
    if changed.any():
        remark(f"{path}: its labels are not whole numbers. They are rounded.")
    return label, geometry


# --------------------------------------------------------------------------------------------------- checking


@dataclasses.dataclass(frozen=True)
class CaseCheck:
    """What `check_case` found: sentences that begin with a file's name, and what `measure` returned."""

    problems: list[str]
    remarks: list[str]
    measured: object = None


def check_same_place(path: str, geometry: Geometry, reference_path: str, reference: Geometry) -> None:
    """Raise a ValueError unless two volumes have the same shape and the same place.

    Ours: a tenth of a voxel, anywhere in the volume, is allowed for the rounding of headers.
    """
    if geometry.shape != reference.shape:
        raise _problem(path, f"(D, H, W) = {geometry.shape}", f"{reference.shape} as {reference_path}")
    affines = [each.array_affine() for each in (geometry, reference)]
    if _largest_shift(*affines, reference.shape[::-1]) > 0.1 * min(reference.spacing):
        found, expected = (np.round(affine, 4).tolist() for affine in affines)
        raise _problem(path, f"the affine {found} of (W, H, D)", f"{expected} as {reference_path}")


def _remark_on_values(path: str, image: np.ndarray, remark: Remark) -> None:
    """Remark on constant channels and on an image that looks like a label map."""
    low, high = image.min(axis=(1, 2, 3)), image.max(axis=(1, 2, 3))
    if (low == high).any():
        remark(f"{path}: all voxels of the image, or of one of its channels, have the same value.")
    elif low.min() >= 0 and high.max() < 10 and (image == np.rint(image)).all():
        remark(f"{path}: the image has only whole numbers from 0 to {high.max():.0f}. Is it a label map?")


def check_case(
    case: Case, num_classes: int, predictions: Sequence[str | Path] = (), measure: Callable | None = None
) -> CaseCheck:
    """Read each file of a case once, and more label maps, which must lie in the same place.

    Args:
        measure: called with image (C, D, H, W), label (D, H, W) or None, and geometry, if nothing is wrong.
    """
    problems, remarks, places, arrays = [], [], [], []
    labels = dict.fromkeys(str(path) for path in (case.label, case.box_source, *predictions) if path)
    for number, path in enumerate((*case.images, *labels)):
        more = places[0][1] if places else None, remarks.append
        try:
            if number < len(case.images):
                array, geometry = read_image(path, *more)
                _remark_on_values(path, array, remarks.append)
            else:
                array, geometry = read_label(path, num_classes, *more)
            places.append((path, geometry))
            check_same_place(path, geometry, *places[0])
        except ValueError as error:
            problems.append(" ".join(str(error).split()))
        else:
            arrays += [array] if measure else []
    if problems or measure is None:
        return CaseCheck(problems, remarks)
    images, label = arrays[: len(case.images)], arrays[len(case.images)] if case.label else None
    image = images[0] if len(images) == 1 else np.concatenate(images)
    return CaseCheck(problems, remarks, measure(image, label, places[0][1]))


# ---------------------------------------------------------------------------------------------------- writing


def write_label_map(path: str | Path, label: np.ndarray, geometry: Geometry, description: str = "") -> None:
    """Write class ids (D, H, W) with the axes and the header of the image that they belong to.

    Only the type, scaling, display range, description and number of channels of that header change. Its
    extensions are left out: they may tell who the patient is. The description, of up to 79 characters, stands
    in the header; `read_description` gives it back.
    """
    path = Path(path)
    if label.shape != geometry.shape:
        raise _problem(path, f"a label map of {label.shape}", f"{geometry.shape} as in its geometry")
    array = geometry.to_file(label).astype(np.uint8)
    if (header := geometry.header) is None:
        header = nib.Nifti1Image(array, geometry.affine).header
        header.set_xyzt_units("mm")
    header = header.copy()
    header.set_data_dtype(np.uint8)
    fields = {"scl_slope": 1, "scl_inter": 0, "cal_min": 0, "cal_max": 0, "descrip": description.encode()}
    fields |= {"magic": header.single_magic, "vox_offset": header.single_vox_offset}
    for name, value in fields.items():
        header[name] = value
    if header["dim"][0] > 3:
        header["dim"][0], header["dim"][4:] = 3, 1
    content = header.binaryblock + bytes(4) + array.tobytes(order="F")  # four zeros: no extensions
    content = gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content
    write_whole(path, lambda file: file.write(content))


def read_description(path: str | Path) -> str:
    """Return the description that `write_label_map` wrote, or "" if the file is missing or damaged."""
    try:
        return read_volume(str(path))[1].header["descrip"].item().decode(errors="replace")
    except ValueError:
        return ""
