"""Orientation both ways, types and scaling, and everything that can be wrong with a file."""

import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
from support import layouts, nifti
from support.layouts import Case
from volumes import decathlon, plan_for, save

SIGNS = itertools.product((1, -1), repeat=3)
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), SIGNS))  # all 48
SHIFT = np.eye(4, k=3)  # added to an affine: 1 mm along x


def rotation(degrees: float) -> np.ndarray:
    """Return a rotation (3, 3) about an axis that is none of the grid's."""
    cross, angle = np.cross(np.eye(3), np.array([1.0, 2.0, 3.0]) / np.sqrt(14)), np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def stored_as(volume: np.ndarray, affine: np.ndarray, order, signs) -> tuple[np.ndarray, np.ndarray]:
    """Store the same voxels (x, y, z) in the same places with other axes and directions."""
    turn = np.array([*zip(order, signs)])
    inverse = nib.orientations.inv_ornt_aff(turn, volume.shape)
    return nib.orientations.apply_orientation(volume, turn), affine @ inverse


@pytest.mark.parametrize("degrees", [20, 44])
def test_one_volume_reads_the_same_however_it_is_stored_and_returns_to_its_place(tmp_path, degrees):
    volume = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 2.0, 5.0]), [-40, 12, 7])
    for order, signs in ORIENTATIONS:
        array, stored = stored_as(volume, affine, order, signs)
        read, geometry = nifti.read_volume(save(tmp_path / "v.nii", array, stored))
        if degrees < 44:  # beyond, the axis that is nearest to each direction may be another
            assert np.array_equal(read, volume.T), (order, signs)
            assert geometry.shape == (7, 6, 5) and np.allclose(geometry.spacing, (5.0, 2.0, 1.5))
        nifti.write_label_map(tmp_path / "w.nii.gz", read, geometry)
        written = nib.load(tmp_path / "w.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), array) and written.get_data_dtype() == np.uint8
        assert np.array_equal(written.affine, nib.load(tmp_path / "v.nii").affine)
        (sform, code), (qform, other_code) = written.get_sform(coded=True), written.get_qform(coded=True)
        assert code > 0 and other_code > 0 and np.allclose(qform, sform, atol=1e-4)


def test_axes_are_right_anterior_superior_then_turned_around(tmp_path):
    array = np.zeros((4, 5, 6), np.int16)
    array[3, 0, 0], array[0, 4, 0], array[0, 0, 5] = 1, 2, 3  # stored with x to the left, y to the back
    volume, _ = nifti.read_volume(save(tmp_path / "v.nii.gz", array, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert volume.shape == (6, 5, 4) and [volume[0, 4, 0], volume[0, 0, 3], volume[5, 4, 3]] == [1, 2, 3]


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64])
def test_stored_types_and_scaling_give_the_meant_numbers(tmp_path, dtype):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    header = nib.Nifti1Image(array, np.eye(4)).header
    header["vox_offset"], header["magic"], header["scl_slope"], header["scl_inter"] = 352, b"n+1", 2.0, -10.0
    (tmp_path / "v.nii").write_bytes(header.binaryblock + b"\0" * 4 + array.tobytes(order="F"))
    assert np.array_equal(nifti.read_image(tmp_path / "v.nii")[0], 2 * array.T.astype(np.float32) - 10)


def test_a_label_map_of_another_shape_and_a_failing_write_leave_what_was_there(tmp_path, monkeypatch):
    path, box = tmp_path / "x.nii.gz", nifti.Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    nifti.write_label_map(path, np.ones((2, 3, 4), np.uint8), box, "made by a test")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"found a label map of \(2, 3, 5\), expected \(2, 3, 4\)"):
        nifti.write_label_map(path, np.zeros((2, 3, 5), np.uint8), box)
    monkeypatch.setattr(os, "replace", lambda source, target: open(target / "no folder"))  # the last step
    with pytest.raises(OSError, match=f"{path} could not be written .*Not a directory"):
        nifti.write_label_map(path, np.zeros((2, 3, 4), np.uint8), box)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.nii.gz"]
    assert nifti.read_description(path) == "made by a test" and not nifti.read_description(tmp_path / "y.nii")


def header_field(path: Path, offset: int, content: bytes) -> None:
    """Overwrite header bytes that nibabel itself would not write so."""
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:offset] + content + raw[offset + len(content) :]))


# kind -> (file of the case, how it is spoilt, what is found). The voxels a are (x, y, z) = (12, 10, 8).
MALFORMED = {
    "a slice less": ("label", lambda f, a: save(f, a[:, :, :-1]), "(D, H, W) = (7, 10, 12)"),
    "half a voxel off": ("label", lambda f, a: save(f, a, np.eye(4) + 0.5 * SHIFT), "the affine"),
    "left for right": ("label", lambda f, a: save(f, a, np.diag([-1, 1, 1, 1])), "the affine"),
    "label 7": ("label", lambda f, a: save(f, a + np.uint8(7)), "the labels [7.0, 8.0, 9.0]"),
    "label 1.0001": ("label", lambda f, a: save(f, a * 1.0001), "the labels [1.0001, 2.0002]"),
    "label NaN": ("label", lambda f, a: save(f, a * np.nan), "the labels [nan]"),
    "NaN": ("image", lambda f, a: save(f, a * np.nan), "960 voxels of NaN or infinity"),
    "beyond float32": ("image", lambda f, a: save(f, a * np.float64(1e300)), "960 voxels of NaN"),
    "2-D": ("image", lambda f, a: save(f, a[:, :, 0]), "shape (12, 10)"),
    "complex": ("image", lambda f, a: save(f, a.astype(np.complex64)), "voxels of type complex64"),
    "truncated": ("image", lambda f, a: f.write_bytes(f.read_bytes()[:-600]), "a truncated file"),
    "a web page": ("label", lambda f, a: f.write_text("<html>" + 999 * "404 "), "no readable NIfTI file"),
    "no spacing": ("image", lambda f, a: header_field(f, 312, bytes(16)), "the affine"),  # srow_z
    "affine NaN": ("image", lambda f, a: header_field(f, 280, b"\0\0\xc0\x7f"), "the affine"),
    "no slices": ("image", lambda f, a: header_field(f, 46, bytes(2)), "shape (12, 10, 0)"),  # dim[3]
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_by_name_by_the_check_and_by_the_reader(tmp_path, kind):
    which, spoil, found = MALFORMED[kind]
    root, path = decathlon(tmp_path, 1), tmp_path / f"{which}sTr/case_0.nii.gz"
    spoil(path, np.asarray(nib.load(path).dataobj))
    case = Case("case_0", (f"{root}/imagesTr/case_0.nii.gz",), f"{root}/labelsTr/case_0.nii.gz")
    (problem,) = nifti.check_case(case, 3)
    assert problem.startswith(f"{path}: found {found}") and "expected" in problem and "\n" not in problem
    with pytest.raises(ValueError) as raised:  # `prepare_case` reads without a check before it
        data.prepare_case(case, plan_for())
    assert " ".join(str(raised.value).split()) == problem


def test_all_bad_files_are_listed_at_once_and_nothing_is_prepared(tmp_path):
    root = decathlon(tmp_path / "set", 4)
    (root / "labelsTr/case_0.nii.gz").unlink()
    save(root / "imagesTr/case_3.nii.gz", np.full((12, 10, 8), np.nan, np.float32))
    save(root / "labelsTr/case_3.nii.gz", np.full((12, 10, 8), 9, np.uint8))  # both files of a case
    with pytest.raises(ValueError) as raised:
        data.prepare(layouts.find_data(str(root)), tmp_path / "cache")
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("3 problems") and not (tmp_path / "cache").exists()
    for name in ("labelsTr/case_0", "imagesTr/case_3", "labelsTr/case_3"):
        assert sum(f"{name}.nii.gz: found" in line for line in lines) == 1


def test_a_file_cut_anywhere_and_a_header_of_random_bytes_give_a_volume_or_a_reason(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.nii"
    plain = Path(save(path, rng.integers(0, 2, (5, 6, 7)).astype(np.uint8))).read_bytes()
    for cut, content in ((tmp_path / "cut.nii", plain), (tmp_path / "cut.nii.gz", gzip.compress(plain))):
        for length in rng.integers(0, len(content) - 16, 15):
            cut.write_bytes(content[:length])
            (problem,) = nifti.check_case(Case("x", (str(cut),), None), 2)
            assert problem.startswith(f"{cut}: found ")
    for _ in range(40):
        raw = np.array(bytearray(plain))
        raw[rng.integers(0, 348, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(raw.tobytes())
        problems = nifti.check_case(Case("x", (str(path),), str(path)), 2)
        assert all(problem.startswith(f"{path}: found ") for problem in problems)


def test_label_and_image_may_differ_in_axes_and_rounding_but_not_by_a_fifth_of_a_voxel(tmp_path):
    affine = nib.affines.from_matvec(rotation(20) @ np.diag([1.5, 1.2, 4.0]), [-20, 30, 7])
    ids = np.random.default_rng(0).integers(0, 3, (6, 7, 5)).astype(np.uint8)  # (x, y, z)
    image = save(tmp_path / "image.nii", ids.astype(np.float32), affine)
    for order, signs in ORIENTATIONS[::7]:
        label = save(tmp_path / "label.nii", *stored_as(ids, affine, order, signs))
        assert nifti.check_case(Case("x", (image,), label), 3) == []
        assert np.array_equal(nifti.read_label(label, 3)[0], nifti.read_image(image)[0])
    for change, count in ((0.01 * SHIFT, 0), (0.2 * SHIFT, 1), (np.diag([0.03, 0, 0, 0]), 1)):  # far end
        label = save(tmp_path / "label.nii", ids, affine @ (np.eye(4) + change))
        assert len(nifti.check_case(Case("x", (image,), label), 3)) == count
