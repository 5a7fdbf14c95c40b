"""Orientation both ways, the header that is kept, and everything that can be wrong or odd in a file."""

import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support import nifti
from support.layouts import Case
from volumes import decathlon, refuses, save

ORIENTATIONS = [*itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))]
SHIFT = np.eye(4, k=3)  # added to an affine: 1 mm along x
THICK = np.diag([1.5, 1.5, 5.0, 1.0])
VALUES = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)  # (x, y, z)


def rotation(degrees: float, axis=(1.0, 2.0, 3.0)) -> np.ndarray:
    """Return a rotation (3, 3) about an axis; the usual one is none of the grid's."""
    cross, angle = np.cross(np.eye(3), np.array(axis) / np.linalg.norm(axis)), np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def stored_as(volume: np.ndarray, affine: np.ndarray, order, signs) -> tuple[np.ndarray, np.ndarray]:
    """Store the same voxels (x, y, z) in the same places with other axes and directions."""
    turn = np.array([*zip(order, signs)])
    inverse = nib.orientations.inv_ornt_aff(turn, volume.shape)
    return nib.orientations.apply_orientation(volume, turn), affine @ inverse


@pytest.mark.parametrize("degrees", [0, 20, 44, 46])
def test_one_volume_reads_the_same_however_its_axes_are_stored(degrees):
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 2.0, 5.0]), [-40, 12, 7])
    expected = nifti.Geometry.of(affine, VALUES.shape).from_file(VALUES)
    for order, signs in ORIENTATIONS:
        array, stored = stored_as(VALUES, affine, order, signs)
        geometry = nifti.Geometry.of(stored, array.shape)
        assert np.array_equal(geometry.from_file(array), expected)
        assert geometry.spacing[0] == pytest.approx(5)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (1, 2, 0)], ids=["axial", "coronal", "sagittal"])
def test_thick_slices_are_d_and_no_header_near_0_or_45_degrees_is_turned_otherwise(axes):
    aligned = np.eye(3)[:, axes] * (0.6, 0.6, 4.0)  # the patient's axis of W, H and slices
    geometry = nifti.Geometry.of(nib.affines.from_matvec(aligned), (5, 6, 7))
    assert geometry.shape == (7, 6, 5) and np.array_equal(np.abs(geometry.frame), np.eye(3)[:, axes])
    assert (geometry.frame[:, :2] >= 0).all() and np.linalg.det(geometry.frame) == pytest.approx(1)
    for about, angle in itertools.product(np.eye(3), range(-180, 180, 45)):
        tilted = [rotation(angle + more, about) @ aligned for more in (-14, -1, 1, 14)]
        turns = [nifti.Geometry.of(nib.affines.from_matvec(each), (5, 6, 7)).turn for each in tilted]
        assert np.array_equal(turns[:-1], turns[1:]), angle


def test_a_label_follows_its_image_and_may_differ_in_axes_and_rounding_not_by_a_fifth_of_a_voxel(tmp_path):
    affine = nib.affines.from_matvec(rotation(45, (1, 0, 0)) @ np.diag([1.5, 1.2, 1.2]), [-20, 30, 7])
    image = save(tmp_path / "image.nii", VALUES * np.float32(9), affine)
    noise = [affine + sign * np.diag([0, 1e-7, -1e-7, 0])[[0, 2, 1, 3]] for sign in (1, -1)]
    turns = [nifti.Geometry.of(each, VALUES.shape).turn for each in noise]
    assert not np.array_equal(*turns)  # at 45 degrees rounding decides which axis is D, but for the image
    same = [*(stored_as(VALUES, affine, *each) for each in ORIENTATIONS[::7]), *((VALUES, n) for n in noise)]
    changes = 0.01 * SHIFT, 0.2 * SHIFT, np.diag([0.04, 0, 0, 0])  # the last differs at the far end
    moved = [(VALUES, affine @ (np.eye(4) + change)) for change in changes]
    for number, stored in enumerate(same + moved):
        label = save(tmp_path / "label.nii", *stored)
        check = nifti.check_case(Case("x", (image,), label), 3, (), lambda *found: found)
        assert len(check.problems) == (number > len(same)) and not check.remarks
        assert check.problems or np.array_equal(check.measured[1] * 9, check.measured[0][0])


def write(path, array, affine=THICK, kind=nib.Nifti1Image, sform=1, qform=1, order="<", **fields) -> str:
    """Write an image with chosen codes, byte order and header fields, also what nibabel would not write."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(affine, sform)
    header.set_qform(affine, qform)
    fields = {"magic": header.single_magic, "vox_offset": header.single_vox_offset, "xyzt_units": 10} | fields
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + bytes(4) + array.astype(header.get_data_dtype()).tobytes("F")
    Path(path).write_bytes(gzip.compress(content) if str(path).endswith("gz") else content)
    return str(path)


# One image in the ways that it can be stored: voxels v (x, y, z), affine a in mm -> what `write` is given.
NO_ROWS = {"srow_x": 0, "srow_y": 0, "srow_z": 0}
STORINGS = {
    "permuted": lambda v, a: (stored_as(v, a, (2, 0, 1), (1, 1, 1)), {}),
    "mirrored": lambda v, a: (stored_as(v, a, (1, 0, 2), (1, -1, -1)), {"qform": 2}),
    "a slope": lambda v, a: ((v // 2 + 5, a), {"scl_slope": 2, "scl_inter": -10}),
    "big-endian, no offset": lambda v, a: ((v, a), {"order": ">", "vox_offset": 0}),
    "NIfTI-2, float64": lambda v, a: ((v.astype(np.float64), a, nib.Nifti2Image), {}),
    "qform only": lambda v, a: ((v, a), {"sform": 0} | NO_ROWS),
    "sform only": lambda v, a: ((v, a), {"qform": 0, "quatern_b": 0, "quatern_c": 0, "pixdim": 1}),
    "two forms that differ": lambda v, a: ((v, a), {"qoffset_x": 30}),
    "a zero sform": lambda v, a: ((v, a), NO_ROWS),
    "micron": lambda v, a: ((v, np.diag([1e3, 1e3, 1e3, 1]) @ a), {"xyzt_units": 3}),
    "metre": lambda v, a: ((v, np.diag([1e-3, 1e-3, 1e-3, 1]) @ a), {"xyzt_units": 1}),
    "(x, y, z, 1)": lambda v, a: ((v[..., None], a), {}),
}
OF_A_LABEL_MAP = {"datatype", "bitpix", "scl_slope", "scl_inter", "descrip", "dim", "cal_max", "vox_offset"}


@pytest.mark.parametrize("kind", STORINGS)
def test_however_an_image_is_stored_its_label_map_is_the_same_and_keeps_the_header(tmp_path, kind):
    values = 2 * np.random.default_rng(0).integers(0, 400, (9, 8, 4)).astype(np.int16)
    affine = nib.affines.from_matvec(rotation(20) @ np.diag([1.5, 1.25, 6.0]), [-40, 12, 7])
    arguments, fields = STORINGS[kind](values, affine)
    fields |= {"descrip": b"a patient", "intent_name": b"kept", "toffset": 2.5, "cal_max": 9}
    image, target = write(tmp_path / "image.nii.gz", *arguments, **fields), str(tmp_path / "label.nii.gz")
    read, geometry = nifti.read_image(image)
    reference = nifti.Geometry.of(affine, values.shape)
    assert np.array_equal(read, reference.from_file(values)[None]) and read.dtype == np.float32
    assert np.allclose(geometry.array_affine(), reference.array_affine(), atol=1e-4)
    nifti.write_label_map(target, (read[0] > 400).astype(np.uint8), geometry)
    assert np.array_equal(nifti.read_label(target, 2)[0], read[0] > 400)
    old, new = (nifti.read_header(path)[0] for path in (image, target))
    changed = {name for name in old.keys() if old[name].tobytes() != new[name].tobytes()}
    assert changed <= OF_A_LABEL_MAP and old == geometry.header
    assert new["dim"].tolist() == [3, *old["dim"][1:4], 1, 1, 1, 1] and new.get_data_dtype() == np.uint8
    assert (new["scl_slope"], new["scl_inter"], new["cal_max"], new["descrip"]) == (1, 0, 0, b"")
    itk = pytest.importorskip("SimpleITK")
    if "NIfTI-2" not in kind:  # which ITK cannot read
        one, other = map(itk.ReadImage, (image, target))
        for corner in ([0, 0, 0], [n - 1 for n in other.GetSize()]):
            place = one.TransformIndexToPhysicalPoint(corner + [0] * (one.GetDimension() - 3))[:3]
            assert np.allclose(place, other.TransformIndexToPhysicalPoint(corner))


def test_a_failing_write_leaves_what_was_there_and_a_damaged_file_has_no_description(tmp_path, monkeypatch):
    geometry, path = nifti.read_header(save(tmp_path / "image.nii", VALUES))[1], tmp_path / "x.nii.gz"
    nifti.write_label_map(path, VALUES.T, geometry, "made by a test")
    before, files = path.read_bytes(), sorted(tmp_path.iterdir())
    refuses("a label map of .5, 6, 7., expected .7, 6, 5", nifti.write_label_map, path, VALUES, geometry)
    monkeypatch.setattr(os, "replace", lambda source, target: open(target / "no folder"))  # the last step
    refuses(f"{path} could not be written", nifti.write_label_map, path, 0 * VALUES.T, geometry)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == files
    assert nifti.read_description(path) == "made by a test" and not nifti.read_description(tmp_path / "y.nii")
    path.write_bytes(before[:-8] + bytes(8))  # a wrong checksum
    assert nifti.read_description(path) == ""


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_file_that_is_cut_or_damaged_gives_a_reason_and_a_padded_one_its_volume(tmp_path, name):
    path, rng = tmp_path / name, np.random.default_rng(0)
    good = Path(write(path, VALUES)).read_bytes()
    bad = [good[:length] for length in rng.integers(0, len(good), 15)]
    flips = [bytearray(good) for _ in range(60)]
    for content in flips:  # one bit of a gzip stream (its own header has 10 bytes), or a byte of the header
        place = rng.integers(10, len(good) if name.endswith("gz") else 348)
        content[place] ^= 1 << rng.integers(0, 8)
    for number, content in enumerate(bad + flips):
        path.write_bytes(content)
        problems = nifti.check_case(Case("x", (str(path),), None), 3).problems
        assert all(problem.startswith(f"{path}: found ") for problem in problems)
        assert problems or (number >= len(bad) and name == "x.nii")
    for content in (good + bytes(9), good + gzip.compress(b"") * name.endswith("gz")):
        path.write_bytes(content)  # padding, and a stream of two parts
        assert np.array_equal(nifti.read_volume(str(path))[0], VALUES.T)


# kind -> (how the image or the label is spoilt, what is found). The voxels a are (x, y, z) = (12, 10, 8).
MALFORMED = {
    "label: a slice less": (lambda f, a: write(f, a[:, :, :-1]), "(D, H, W) = (7, 10, 12)"),
    "label: left for right": (lambda f, a: write(f, a, THICK * [-1, 1, 1, 1]), "the affine"),
    "label: 7": (lambda f, a: write(f, a + np.uint8(7)), "the labels [7.0, 8.0, 9.0]"),
    "label: 1.02": (lambda f, a: write(f, a * 1.02), "the labels [1.02, 2.04]"),
    "label: -32768": (lambda f, a: write(f, a * np.int16(-32768)), "the labels [-32768.0]"),
    "label: NaN": (lambda f, a: write(f, a * np.nan), "the labels [nan]"),
    "label: two label maps": (lambda f, a: write(f, np.stack([a, a], 3)), "2 channels"),
    "NaN": (lambda f, a: write(f, a * np.nan), "960 voxels of NaN or infinity"),
    "beyond float32": (lambda f, a: write(f, a * np.float64(1e300)), "960 voxels of NaN"),
    "no file": (lambda f, a: f.unlink(), "no such file"),
    "2-D": (lambda f, a: write(f, a[:, :, 0]), "shape (12, 10)"),
    "five axes": (lambda f, a: write(f, a[..., None, None].repeat(2, 4)), "shape (12, 10, 8, 1, 2)"),
    "no slices": (lambda f, a: write(f, a[:, :, :0]), "shape (12, 10, 0)"),
    "complex": (lambda f, a: write(f, a.astype(np.complex64)), "voxels of type complex64"),
    "garbage behind gzip": (lambda f, a: f.write_bytes(f.read_bytes() + b"x"), "a damaged file"),
    "more voxels": (lambda f, a: write(f, a, dim=[3, 12, 10, 7, 1, 1, 1, 1]), "bytes behind the last"),
    "fewer": (lambda f, a: write(f, a, dim=[3, 12, 10, 9, 1, 1, 1, 1]), "a truncated file, 3840 bytes"),
    "a claim": (lambda f, a: write(f, a, dim=[3] + 3 * [9999] + 4 * [1]), "a truncated file, its"),
    "an offset of 100": (lambda f, a: write(f, a, vox_offset=100), "no readable NIfTI header"),
    "half of a pair": (lambda f, a: write(f, a, magic=b"ni1"), "no readable NIfTI header"),
    "no spacing": (lambda f, a: write(f, a, srow_z=0, qform=0), "an affine without"),
    "affine NaN": (lambda f, a: write(f, a, srow_x=[1.5, 0, 0, np.nan], qform=0), "an affine without"),
    "1.5 m": (lambda f, a: write(f, a, xyzt_units=1), "a spacing of [1500.0, 1500.0, 5000.0] mm"),
}
REMARKS = {
    "two forms": (lambda f, a: write(f, a, qoffset_x=30), "its sform and qform differ by up to 30"),
    "a zero sform": (lambda f, a: write(f, a, **NO_ROWS), "one of its two forms has no three axes"),
    "a broken qform": (lambda f, a: write(f, a, quatern_b=2), "one of its two forms has no three axes"),
    "no form": (lambda f, a: write(f, a, sform=0, qform=0), "no form has a code"),
    "identity": (lambda f, a: write(f, a, np.eye(4)), "its affine is the identity, so spacing"),
    "skew": (lambda f, a: write(f, a, THICK + 0.01 * np.eye(4, k=1)), "its axes are not at right"),
    "unzipped": (lambda f, a: f.write_bytes(gzip.decompress(f.read_bytes())), "the file is not comp"),
    "constant": (lambda f, a: write(f, a * 0), "all voxels of the image"),
    "a label map": (lambda f, a: write(f, a.astype(int) % 3), "it has only whole numbers from 0 to 2"),
    "label: 0.999": (lambda f, a: write(f, a * 0.999), "its labels are not whole numbers"),
}


@pytest.mark.parametrize("kind", [*MALFORMED, *REMARKS])
def test_an_odd_file_is_refused_or_remarked_by_name(tmp_path, kind, caplog):
    spoil, found = (MALFORMED | REMARKS)[kind]
    which, refused = "label" if kind.startswith("label") else "image", kind in MALFORMED
    root, path = decathlon(tmp_path, 1, affine=THICK), tmp_path / f"{which}sTr/case_0.nii.gz"
    spoil(path, np.asarray(nib.load(path).dataobj))
    image, label = (str(root / f"{folder}/case_0.nii.gz") for folder in ("imagesTr", "labelsTr"))
    check = nifti.check_case(Case("x", (image,), label if refused or which == "label" else None), 3)
    (sentence,) = check.problems + check.remarks
    assert "\n" not in sentence and bool(check.problems) == refused
    assert sentence.startswith(f"{path}: found {found}" if refused else f"{path}: {found}")
    assert not caplog.records  # nibabel says nothing beside it


def test_a_check_reads_each_file_once_and_measures_all_channels(tmp_path, monkeypatch):
    values, ids, opened = np.random.default_rng(0).normal(size=(5, 6, 7, 2)), VALUES > 0, []
    one, two = write(tmp_path / "1.nii", values), write(tmp_path / "2.nii.gz", values[..., 0])
    label, other = (write(tmp_path / name, ids.astype(np.uint8)) for name in ("label.nii", "other.nii"))
    read = nifti.read_volume
    monkeypatch.setattr(nifti, "read_volume", lambda path, *more: opened.append(path) or read(path, *more))
    case = Case("x", (one, two), label, box_source=label)
    image, ids_read, _ = nifti.check_case(case, 2, [other], lambda *found: found).measured
    assert np.array_equal(image, np.stack([*values.T, values[..., 0].T]).astype(np.float32))
    assert np.array_equal(ids_read, ids.T) and opened == [one, two, label, other]
    assert nifti.check_case(case, 1, measure=lambda *found: found).measured is None
