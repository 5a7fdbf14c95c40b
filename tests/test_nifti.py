"""Orientation both ways, types and scaling, and everything that can be wrong with a file."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
from support import layouts, nifti
from support.layouts import Case
from support.nifti import Geometry
from volumes import decathlon, plan_for, rotation, save, stored_as

SIGNS = itertools.product((1, -1), repeat=3)
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), SIGNS))  # all 48
BOX = Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("degrees", [0, 20, 44])
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
        original, written = nib.load(tmp_path / "v.nii"), nib.load(tmp_path / "w.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), array) and written.get_data_dtype() == np.uint8
        assert np.array_equal(written.affine, original.affine)
        sform, sform_code = written.get_sform(coded=True)
        qform, qform_code = written.get_qform(coded=True)
        assert sform_code > 0 and qform_code > 0 and np.allclose(qform, sform, atol=1e-4)


def test_axes_are_right_anterior_superior_then_turned_around(tmp_path):
    array = np.zeros((4, 5, 6), np.int16)
    array[3, 0, 0], array[0, 4, 0], array[0, 0, 5] = 1, 2, 3  # stored with x to the left, y to the back
    volume, _ = nifti.read_volume(save(tmp_path / "v.nii.gz", array, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert volume.shape == (6, 5, 4)
    assert volume[0, 4, 0] == 1 and volume[0, 0, 3] == 2 and volume[5, 4, 3] == 3


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64])
def test_stored_types_and_scaling_give_the_meant_numbers(tmp_path, dtype):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    header = nib.Nifti1Image(array, np.eye(4)).header
    header["vox_offset"], header["magic"], header["scl_slope"], header["scl_inter"] = 352, b"n+1", 2.0, -10.0
    (tmp_path / "v.nii").write_bytes(header.binaryblock + b"\0" * 4 + array.tobytes(order="F"))
    read, _ = nifti.read_image(str(tmp_path / "v.nii"))
    assert np.array_equal(read, 2 * array.T.astype(np.float32) - 10)


def test_a_label_map_of_another_shape_and_a_failing_write_leave_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.nii.gz"
    nifti.write_label_map(path, np.ones((2, 3, 4), np.uint8), BOX, "made by a test")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"found a label map of \(2, 3, 5\), expected \(2, 3, 4\)"):
        nifti.write_label_map(path, np.zeros((2, 3, 5), np.uint8), BOX)

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(data.os, "replace", fail)  # the last step: the temporary file is complete
    with pytest.raises(OSError, match=f"{path} could not be written .disk full"):
        nifti.write_label_map(path, np.zeros((2, 3, 4), np.uint8), BOX)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.nii.gz"]
    assert nifti.read_description(path) == "made by a test" and not nifti.read_description(tmp_path / "y.nii")


# --------------------------------------------------------------------------------------------------- checking


def header_field(path: Path, offset: int, content: bytes) -> None:
    """Overwrite header bytes that nibabel itself would not write so."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(raw)))


def place(array: np.ndarray, value: float, dtype) -> np.ndarray:
    array = array.astype(dtype)
    array[0, 0, 0] = value
    return array


def moved(matrix=(1, 1, 1), shift=(0, 0, 0)) -> np.ndarray:
    return nib.affines.from_matvec(np.eye(3) * matrix if np.ndim(matrix) == 1 else matrix, shift)


# kind -> (file of the case, how it is spoilt, what is found). The voxels a are (x, y, z) = (12, 10, 8).
COLOURS = np.zeros((12, 10, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
# fmt: off
MALFORMED = {
    "no label": ("label", lambda f, a: f.unlink(), "no such file"),
    "a slice less": ("label", lambda f, a: save(f, a[:, :, :-1]), "(D, H, W) = (7, 10, 12)"),
    "axes swapped": ("label", lambda f, a: save(f, a.transpose(1, 0, 2)), "(D, H, W) = (8, 12, 10)"),
    "half a voxel off": ("label", lambda f, a: save(f, a, moved(shift=(0, 0, 0.5))), "the affine"),
    "left for right": ("label", lambda f, a: save(f, a, moved((-1, 1, 1))), "the affine"),
    "turned by 5 degrees": ("label", lambda f, a: save(f, a, moved(rotation(5))), "the affine"),
    "2 % larger voxels": ("label", lambda f, a: save(f, a, moved((1.02, 1.02, 1.02))), "the affine"),
    "label 7": ("label", lambda f, a: save(f, place(a, 7, np.uint8)), "the labels [7.0]"),
    "label 256": ("label", lambda f, a: save(f, place(a, 256, np.int16)), "the labels [256.0]"),
    "label 1.0001": ("label", lambda f, a: save(f, place(a, 1.0001, np.float64)), "the labels [1.0001]"),
    "label -1": ("label", lambda f, a: save(f, place(a, -1, np.int16)), "the labels [-1.0]"),
    "label NaN": ("label", lambda f, a: save(f, place(a, np.nan, np.float32)), "the labels [nan]"),
    "an image as label": ("label", lambda f, a: save(f, a * 40), "the labels [40.0, 80.0]"),
    "NaN": ("image", lambda f, a: save(f, place(a, np.nan, np.float32)), "1 voxels of NaN or infinity"),
    "beyond float32": ("image", lambda f, a: save(f, place(a, 1e300, np.float64)), "1 voxels of NaN"),
    "2-D": ("image", lambda f, a: save(f, a[:, :, 0]), "shape (12, 10)"),
    "4-D": ("label", lambda f, a: save(f, a[..., None]), "shape (12, 10, 8, 1)"),
    "complex": ("image", lambda f, a: save(f, a.astype(np.complex64)), "voxels of type complex64"),
    "colours": ("image", lambda f, a: save(f, COLOURS), "voxels of type [('R'"),
    "truncated": ("image", lambda f, a: f.write_bytes(f.read_bytes()[:-600]), "a truncated file"),
    "a web page": ("label", lambda f, a: f.write_text("<html>" + 999 * "404 "), "no readable NIfTI file"),
    "a folder": ("label", lambda f, a: (f.unlink(), f.mkdir()), "no such file"),
    "not zipped": ("image", lambda f, a: f.write_bytes(gzip.decompress(f.read_bytes())), "no readable NIfTI"),
    "no spacing": ("image", lambda f, a: header_field(f, 312, bytes(16)), "the affine"),  # srow_z
    "parallel": ("image", lambda f, a: header_field(f, 296, np.float32([1, 0, 0]).tobytes()), "the affine"),
    "affine NaN": ("image", lambda f, a: header_field(f, 280, np.float32([np.nan]).tobytes()), "the affine"),
    "no slices": ("image", lambda f, a: header_field(f, 46, bytes(2)), "shape (12, 10, 0)"),  # dim[3]
    "too many slices": ("image", lambda f, a: header_field(f, 46, b"\x20\0"), "a truncated file"),
    "unknown type": ("image", lambda f, a: header_field(f, 70, b"\x03\x01"), "no readable NIfTI file"),
}
# fmt: on


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_by_name_by_the_check_and_by_the_reader(tmp_path, kind):
    which, spoil, found = MALFORMED[kind]
    root = decathlon(tmp_path, 1)
    images, labels = root / "imagesTr/case_0.nii.gz", root / "labelsTr/case_0.nii.gz"
    path = images if which == "image" else labels
    spoil(path, np.asarray(nib.load(path).dataobj).copy())
    case = Case("case_0", (str(images),), str(labels))
    (problem,) = nifti.check_case(case, 3)
    assert problem.startswith(f"{path}: found {found}") and "expected" in problem and "\n" not in problem
    with pytest.raises(ValueError) as raised:  # `prepare_case` reads without a check before it
        data.prepare_case(case, plan_for())
    assert " ".join(str(raised.value).split()) == problem


def test_all_bad_cases_are_listed_at_once_and_the_folder_works_once_they_are_mended(tmp_path):
    root = decathlon(tmp_path / "set", 4)
    before = {path: path.read_bytes() for path in root.glob("*/*.nii.gz")}
    (root / "labelsTr/case_0.nii.gz").unlink()
    save(root / "imagesTr/case_3.nii.gz", np.full((12, 10, 8), np.nan, np.float32))
    save(root / "labelsTr/case_3.nii.gz", np.full((12, 10, 8), 9, np.uint8))  # both files of a case
    with pytest.raises(ValueError) as raised:
        data.prepare(layouts.find_data(str(root)), tmp_path / "cache")
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("3 problems") and not (tmp_path / "cache").exists()
    for name in ("labelsTr/case_0", "imagesTr/case_3", "labelsTr/case_3"):
        assert sum(f"{name}.nii.gz: found" in line for line in lines) == 1
    for path, content in before.items():
        path.write_bytes(content)
    data.prepare(layouts.find_data(str(root)), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.label.npy"))) == 4


def test_a_file_cut_anywhere_and_a_header_of_random_bytes_give_a_volume_or_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    plain = Path(save(tmp_path / "whole.nii", rng.integers(0, 2, (5, 6, 7)).astype(np.uint8))).read_bytes()
    refused = 0
    for path, content in ((tmp_path / "cut.nii", plain), (tmp_path / "cut.nii.gz", gzip.compress(plain))):
        for length in rng.integers(0, len(content) - 16, 25):
            path.write_bytes(content[:length])
            (problem,) = nifti.check_case(Case("x", (str(path),), None), 2)
            assert problem.startswith(f"{path}: found ")
    path = tmp_path / "x.nii"
    for _ in range(100):
        raw = np.frombuffer(plain, np.uint8).copy()
        raw[rng.integers(0, 348, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(raw.tobytes())
        problems = nifti.check_case(Case("x", (str(path),), str(path)), 2)
        assert all(problem.startswith(f"{path}: found ") for problem in problems)
        refused += bool(problems)
    assert 10 < refused < 100


def test_label_and_image_may_differ_in_axes_and_rounding_but_not_by_a_fifth_of_a_voxel(tmp_path):
    affine = moved(rotation(20) @ np.diag([1.5, 1.2, 4.0]), [-20, 30, 7])
    ids = np.random.default_rng(0).integers(0, 3, (6, 7, 5)).astype(np.uint8)  # (x, y, z)
    image = save(tmp_path / "image.nii", ids.astype(np.float32), affine)
    for order, signs in ORIENTATIONS:
        label = save(tmp_path / "label.nii", *stored_as(ids, affine, order, signs))
        assert nifti.check_case(Case("x", (image,), label), 3) == []
        assert np.array_equal(nifti.read_label(label, 3)[0], nifti.read_image(image)[0])
    far_end = np.diag([1.03, 1, 1, 1])  # the first voxels agree, the last ones do not
    for change, count in ((moved(shift=(0.01, 0, 0)), 0), (moved(shift=(0.2, 0, 0)), 1), (far_end, 1)):
        label = save(tmp_path / "label.nii", ids, affine @ change)
        assert len(nifti.check_case(Case("x", (image,), label), 3)) == count
