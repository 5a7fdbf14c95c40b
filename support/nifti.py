"""NIfTI files: one file to one array and back, the place of the array in the patient, and all checks.

    file (x, y, z) or (x, y, z, C) ── read_image, read_label ──> array and its Geometry
    all files of a case ── check_case ──> problems, and remarks on what was decided for the user
    label map (D, H, W) ── write_label_map ──> file with the header of the image

`Geometry.of` decides which axis of a file becomes D, H and W: once, by the image. Labels follow the image.
"""

import collections
import contextlib
import dataclasses
import gzip
import itertools
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling

from support.files import refusal, write_whole
from support.layouts import Case

ANISOTROPIC = 1.5  # Ours: D is the axis whose spacing is more than this times the next largest
# Ours: W and H are nearest to these directions in the patient (right, anterior, superior): R and A in axial
# images, R and S in coronal, A and S in sagittal ones. They come from a search: all angles at which an image
# would be turned otherwise are 14 degrees or more away from 0, 45, 90 ... about each axis of the patient.
NEAR_W, NEAR_H = np.array([1.0, 0.35, 0.2]), np.array([0.8, 0.55, 1.0])
MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metre and micron; all others are read as mm
SPACING_RANGE = 0.01, 100.0  # Ours: in mm; a spacing outside comes from a wrong unit or a damaged header
SKEW = 1e-3  # Ours: the cosine between two axes from which they are said not to be at right angles
ROUNDED = 0.01  # Ours: how far a label may be from a whole number (a scaling makes 1.0001 of 1)
SILENT = logging.Logger("nifti", logging.CRITICAL + 1)  # nibabel's remarks on headers; we print our own
GZIP_RATIO = 1032  # gzip makes no file smaller than by this factor


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The place of a volume in its file and in the patient.

    Args:
        affine: (4, 4), from the file's voxels (x, y, z) to mm in the patient (right, anterior, superior).
        shape, spacing: (D, H, W) of the turned array; spacing in mm.
        turn: (3, 2), nibabel's orientation: each file axis -> (its axis of (W, H, D), sense 1 or -1).
        header: the file's own, which `write_label_map` copies; None if there is no file.
        remarks: a sentence for each thing that is odd in the file, but can be read.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    turn: np.ndarray
    header: nib.Nifti1Header | None = None
    remarks: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, affine: np.ndarray, file_shape: Sequence[int], like: "Geometry | None" = None) -> "Geometry":
        """Make the geometry of a file with this affine and this shape (x, y, z), in the directions of `like`.

        Ours, without `like`: D is the axis of thick slices, or else the one nearest to inferior-superior, and
        then W and H are chosen. The sense of D makes (W, H, D) right-handed, so anatomy is never mirrored.
        """
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if like:
            frame = like.frame
        else:
            directions = affine[:3, :3] / spacing
            _, second, largest = np.argsort(spacing)
            thick = spacing[largest] > ANISOTROPIC * spacing[second]
            d = largest if thick else np.abs(directions[2]).argmax()
            near = np.stack([NEAR_W, NEAR_H]) @ directions  # (2, file axes)
            w, h = max(itertools.permutations({0, 1, 2} - {d}), key=lambda wh: np.abs(near[[0, 1], wh]).sum())
            frame = directions[:, [w, h, d]] * np.copysign(1, [near[0, w], near[1, h], 1])
            frame[:, 2] *= np.sign(np.linalg.det(frame))
        turn = nib.orientations.io_orientation(nib.affines.from_matvec(np.linalg.inv(frame) @ affine[:3, :3]))
        file_axes = np.argsort(turn[:, 0])[::-1]  # the file's axes that become D, H, W
        shape, sizes = (tuple(np.array(each)[file_axes].tolist()) for each in (file_shape, spacing))
        return cls(affine, shape, sizes, turn)

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Turn an array of the file, (x, y, z) or (x, y, z, C), to (D, H, W) or (C, D, H, W)."""
        return nib.orientations.apply_orientation(array, self.turn).transpose()

    def array_affine(self) -> np.ndarray:
        """Return the affine (4, 4) from the turned array's voxels (w, h, d) to mm in the patient."""
        file_shape = [self.shape[2 - int(axis)] for axis in self.turn[:, 0]]
        return self.affine @ nib.orientations.inv_ornt_aff(self.turn, file_shape)

    @property
    def frame(self) -> np.ndarray:
        """Directions of W, H, D in the patient: (3, 3), a unit vector in each column."""
        return self.array_affine()[:3, :3] / self.spacing[::-1]


@contextlib.contextmanager
def _opened(path: str, like: Geometry | None = None) -> Iterator[tuple]:
    """Open a file, and give its unzipped content, header, shape, offset of the voxels, and geometry."""
    try:
        with open(path, "rb") as file:
            zipped, size = file.peek(2)[:2] == b"\x1f\x8b", Path(path).stat().st_size
            stream, limit = (gzip.GzipFile(fileobj=file), GZIP_RATIO * size) if zipped else (file, size)
            own, header, shape, offset = _parse_header(path, stream, limit)
            affine, remarks = _read_affine(path, header)
            if zipped != str(path).endswith(".gz"):
                remarks.append(f"the file is {'' if zipped else 'not '}compressed, unlike its name.")
            geometry = Geometry.of(affine, shape[:3], like)
            yield stream, header, shape, offset, dataclasses.replace(geometry, header=own, remarks=remarks)
    except (EOFError, MemoryError, OSError, zlib.error) as error:
        reasons = {EOFError: "a truncated file", MemoryError: "too little memory"}
        found = getattr(error, "strerror", None) or reasons.get(type(error), "a damaged file")
        again = "" if isinstance(error, FileNotFoundError) else "; copy it again"
        raise refusal(path, found.lower(), f"a whole NIfTI file{again}") from error


def _parse_header(path: str, stream: BinaryIO, limit: int) -> tuple:
    """Return a file's own header, the same with nibabel's repairs, the shape and the offset of its voxels."""
    start = stream.read(540)
    kind = nib.Nifti2Header if start[:4] in (b"\x1c\2\0\0", b"\0\0\2\x1c") else nib.Nifti1Header  # 540
    try:
        own = kind(start[: kind.sizeof_hdr], check=False)
        header = kind(own.binaryblock, check=False)
        header.check_fix(SILENT)
        full, offset = header.get_data_shape(), header.get_data_offset() or kind.single_vox_offset
        header.get_slope_inter()
        if own["magic"].item() != kind.single_magic:
            raise ValueError("the voxels are in another file")
    except Exception as error:  # nibabel raises many kinds of error for a header that is damaged
        raise refusal(path, "no readable NIfTI header", ".nii or .nii.gz with voxels") from error
    channels = full[3:] if any(n != 1 for n in full[3:]) else ()
    if len(full) < 3 or len(channels) > 1 or min(full) < 1:
        raise refusal(path, f"shape {full}", "three dimensions, or four with the channels last")
    if header.get_data_dtype().kind not in "biuf":
        raise refusal(path, f"voxels of type {header.get_value_label('datatype')}", "real numbers")
    if (claimed := offset + header.get_data_dtype().itemsize * math.prod(full)) > limit:
        raise refusal(path, f"a truncated file, its header claims {claimed} bytes", f"at most {limit}")
    return own, header, full[:3] + channels, offset


def _largest_shift(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Return by how many mm two affines differ at most in a volume of this shape: at one of its corners."""
    corners = np.array(list(itertools.product(*((0, n) for n in shape))))
    return np.linalg.norm(nib.affines.apply_affine(one - other, corners), axis=1).max()


def _read_affine(path: str, header: nib.Nifti1Header) -> tuple[np.ndarray, list[str]]:
    """Return a file's affine in mm, and remarks. Ours: axes that span < 0.001 of a unit cube are parallel."""
    unit = MM_PER_UNIT.get(int(header["xyzt_units"]) % 8, 1.0)
    coded, forms = [name for name in ("sform", "qform") if header[f"{name}_code"]], []
    for name in coded or ["base_affine"]:
        with contextlib.suppress(ValueError):  # the numbers of a qform may be no rotation
            form = np.diag([unit, unit, unit, 1.0]) @ getattr(header, f"get_{name}")()
            spacing = np.linalg.norm(form[:3, :3], axis=0)
            if np.isfinite(form).all() and abs(np.linalg.det(form[:3, :3])) >= 1e-3 * spacing.prod() > 0:
                forms.append(form)
    if not forms:
        raise refusal(path, "an affine without three axes", "a sform or a qform with three")
    affine, spacing = forms[0], np.linalg.norm(forms[0][:3, :3], axis=0)
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        raise refusal(path, f"a spacing of {spacing.tolist()} mm", "0.01 to 100 mm; correct its header")
    shift = _largest_shift(forms[0], forms[-1], header.get_data_shape()[:3])
    skew = np.abs(affine[:3, :3].T @ affine[:3, :3] / np.outer(spacing, spacing) - np.eye(3)).max()
    differ, unset = shift > 0.1 * spacing.min(), np.array_equal(affine, np.eye(4))
    remarks = {
        f"its sform and qform differ by up to {shift:.3g} mm. The sform is used.": differ,
        "one of its two forms has no three axes. The other is used.": len(forms) < len(coded),
        "no form has a code. Its directions are a guess: x from right to left.": not coded,
        "its affine is the identity, so spacing and directions may never have been set.": unset,
        "its axes are not at right angles. Distances are computed as if they were.": skew > SKEW,
    }
    return affine, [sentence for sentence, holds in remarks.items() if holds]


def read_header(path: str) -> tuple[nib.Nifti1Header, Geometry]:
    """Read the header of a file, but no voxels; raise a ValueError if it is unusable."""
    with _opened(path) as (*_, geometry):
        return geometry.header, geometry


def read_volume(path: str, like: Geometry | None = None) -> tuple[np.ndarray, Geometry]:
    """Read a whole file, to gzip's checksum; raise a ValueError if anything is missing or left over.

    The array is (D, H, W), or (C, D, H, W) for four axes, of the type that the scaling gives. It is turned by
    the directions of `like`, the geometry of the image that the file belongs to, or else by its own.
    """
    with _opened(path, like) as (stream, header, shape, offset, geometry):
        size = header.get_data_dtype().itemsize * math.prod(shape)
        stream.seek(offset)
        if len(content := stream.read(size)) < size:
            raise refusal(path, f"a truncated file, {len(content)} bytes of voxels", f"{size} for {shape}")
        while rest := stream.read(2**20):  # to the end, where gzip's checksum is
            if rest.strip(b"\0"):
                raise refusal(path, "bytes behind the last voxel", f"{size} bytes for {shape}")
    array = np.frombuffer(content, header.get_data_dtype()).reshape(shape, order="F")
    return geometry.from_file(apply_read_scaling(array, *header.get_slope_inter())), geometry


def read_image(path: str, like: Geometry | None = None) -> tuple[np.ndarray, Geometry]:
    """`read_volume` for an image: float32 (C, D, H, W), finite; C = 1 for a file with three axes."""
    array, geometry = read_volume(path, like)
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, which is found below
        image = (array if array.ndim == 4 else array[None]).astype(np.float32)
    low, high = image.min(axis=(1, 2, 3)), image.max(axis=(1, 2, 3))
    if not np.isfinite([low, high]).all():
        raise refusal(path, f"{np.sum(~np.isfinite(image))} voxels of NaN or infinity", "finite numbers")
    if (low == high).any():
        geometry.remarks.append("all voxels of the image, or of one of its channels, have the same value.")
    elif low.min() >= 0 and high.max() < 10 and (image == np.rint(image)).all():
        geometry.remarks.append(f"it has only whole numbers from 0 to {high.max():.0f}. Is it a label map?")
    return image, geometry


def read_label(path: str, num_classes: int, like: Geometry | None = None) -> tuple[np.ndarray, Geometry]:
    """`read_volume` for a label map: uint8 (D, H, W) below `num_classes`, nearly whole numbers rounded."""
    array, geometry = read_volume(path, like)
    if array.ndim == 4:
        raise refusal(path, f"{len(array)} channels", "one label map")
    with np.errstate(invalid="ignore"):  # NaN and numbers beyond a byte change here and are found below
        label = (np.rint(array) if array.dtype.kind == "f" else array).astype(np.uint8)
    wrong = label >= num_classes
    if changed := (label != array).any():
        wrong |= ~(np.abs(label - array.astype(float)) <= ROUNDED)
    if wrong.any():
        ids = np.unique(array[wrong]).astype(float).tolist()
        raise refusal(path, f"the labels {ids[:5]}", f"whole numbers from 0 to {num_classes - 1}")
    if changed:
        geometry.remarks.append("its labels are not whole numbers. They are rounded.")
    return label, geometry


def check_same_place(path: str, geometry: Geometry, reference_path: str, reference: Geometry) -> None:
    """Raise a ValueError unless two volumes lie in the same place. Ours: 0.1 voxels are left to rounding."""
    if geometry.shape != reference.shape:
        raise refusal(path, f"(D, H, W) = {geometry.shape}", f"{reference.shape} as {reference_path}")
    affines = [each.array_affine() for each in (geometry, reference)]
    if _largest_shift(*affines, reference.shape[::-1]) > 0.1 * min(reference.spacing):
        found, expected = (np.round(affine, 4).tolist() for affine in affines)
        raise refusal(path, f"the affine {found} of (W, H, D)", f"{expected} as {reference_path}")


# What `check_case` found: two lists of sentences that begin with a file's name, and what `measure` returned.
CaseCheck = collections.namedtuple("CaseCheck", "problems remarks measured", defaults=[None])


def check_case(case: Case, num_classes: int, predictions: Sequence = (), measure=None) -> CaseCheck:
    """Read each file of a case once, and more label maps (predictions); all must lie in the same place.

    If nothing is wrong, `measure` is called with image (C, D, H, W), label (D, H, W) or None, and geometry.
    """
    problems, remarks, arrays, places = [], [], [], []
    labels = dict.fromkeys(str(path) for path in (case.label, case.box_source, *predictions) if path)
    for path in (*case.images, *labels):
        like = places[0][1] if places else None
        try:
            image = path not in labels
            array, geometry = read_image(path, like) if image else read_label(path, num_classes, like)
            arrays.append(array)
            places.append((path, geometry))
            remarks += [f"{path}: {sentence}" for sentence in geometry.remarks]
            check_same_place(path, geometry, *places[0])
        except ValueError as error:
            problems.append(" ".join(str(error).split()))
    if problems or measure is None:
        return CaseCheck(problems, remarks)
    images, label = arrays[: len(case.images)], arrays[len(case.images)] if case.label else None
    image = images[0] if len(images) == 1 else np.concatenate(images)
    return CaseCheck(problems, remarks, measure(image, label, places[0][1]))


def write_label_map(path: str | Path, label: np.ndarray, geometry: Geometry, description: str = "") -> None:
    """Write class ids (D, H, W) with the axes and the header of the image that they belong to.

    Only the type, scaling, display range, description and number of channels of that header change. Its
    extensions are left out: they may tell who the patient is. The description has up to 79 characters.
    """
    if label.shape != geometry.shape:
        raise refusal(path, f"a label map of {label.shape}", f"{geometry.shape} as in its geometry")
    back = nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), geometry.turn)
    array = nib.orientations.apply_orientation(label.transpose(), back).astype(np.uint8)  # as in the file
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    header["dim"] = [3, *array.shape, 1, 1, 1, 1]
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    header["scl_slope"], header["scl_inter"], header["cal_min"], header["cal_max"] = 1, 0, 0, 0
    header["descrip"] = description.encode()
    content = header.binaryblock + bytes(4) + array.tobytes(order="F")  # four zeros: no extensions
    content = gzip.compress(content, compresslevel=1, mtime=0) if str(path).endswith(".gz") else content
    write_whole(Path(path), lambda file: file.write(content))


def read_description(path: str | Path) -> str:
    """Return the description that `write_label_map` wrote, or "" if the file is missing or damaged."""
    try:
        return read_volume(str(path))[1].header["descrip"].item().decode(errors="replace")
    except ValueError:
        return ""
