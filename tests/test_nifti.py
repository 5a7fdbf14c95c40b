"""Orientation both ways, types and scaling, and everything that can be wrong with a file."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
import layouts
import nifti
from nifti import Geometry
from volumes import decathlon, plan_for, rotation, save, stored_as

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]

# ----------------------------------------------------------------------------------------------- orientation, both ways


@pytest.mark.parametrize("degrees", [0, 20])
def test_one_volume_reads_the_same_however_it_is_stored(tmp_path, degrees):
    volume = np.random.default_rng(0).integers(0, 99, (5, 6, 7)).astype(np.int16)
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 2.0, 5.0]), [-40, 12, 7])
    for order, signs in ORIENTATIONS:
        read, geometry = nifti.read_volume(save(tmp_path / "v.nii", *stored_as(volume, affine, order, signs)))
        assert np.array_equal(read, volume.transpose(2, 1, 0)), (order, signs)
        assert geometry.shape == (7, 6, 5) and np.allclose(geometry.spacing, (5.0, 2.0, 1.5))


@pytest.mark.parametrize("degrees", [0, 20, 44])
def test_written_label_maps_return_to_their_place_bit_by_bit(tmp_path, degrees):
    volume = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 2.0, 5.0]), [-40, 12, 7])
    for order, signs in ORIENTATIONS:
        array, stored = stored_as(volume, affine, order, signs)
        read, geometry = nifti.read_volume(save(tmp_path / "v.nii.gz", array, stored))
        nifti.write_label_map(tmp_path / "w.nii.gz", read, geometry)
        original, written = nib.load(tmp_path / "v.nii.gz"), nib.load(tmp_path / "w.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), array), (order, signs)
        assert written.get_data_dtype() == np.uint8
        assert np.array_equal(written.affine, original.affine)
        sform, sform_code = written.get_sform(coded=True)
        qform, qform_code = written.get_qform(coded=True)
        assert sform_code > 0 and qform_code > 0
        assert np.allclose(qform, sform, atol=1e-4)  # quaternions of float32


def test_axes_are_right_anterior_superior_then_turned_around(tmp_path):
    array = np.zeros((4, 5, 6), np.int16)
    array[3, 0, 0], array[0, 4, 0], array[0, 0, 5] = 1, 2, 3  # the patient's right-most... in an LPS file
    volume, _ = nifti.read_volume(save(tmp_path / "v.nii.gz", array, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert volume.shape == (6, 5, 4)
    assert volume[0, 4, 0] == 1 and volume[0, 0, 3] == 2 and volume[5, 4, 3] == 3


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8, np.float32, np.float64])
def test_stored_types_and_scaling_give_the_meant_numbers(tmp_path, dtype):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    image = nib.Nifti1Image(array, np.eye(4))
    image.header.set_slope_inter(2.0, -10.0)
    # `to_file_map` would rescale what is stored: write header and voxels as they are.
    image.header.set_data_dtype(dtype)
    path = tmp_path / "v.nii"
    with open(path, "wb") as file:
        image.header["vox_offset"] = 352
        image.header["magic"] = b"n+1"
        image.header["scl_slope"], image.header["scl_inter"] = 2.0, -10.0
        file.write(image.header.binaryblock + b"\0" * 4 + array.tobytes(order="F"))
    read, _ = nifti.read_image(str(path))
    assert np.array_equal(read, 2 * array.transpose(2, 1, 0).astype(np.float32) - 10)


def test_a_label_map_of_another_shape_is_not_written(tmp_path):
    geometry = Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"found a label map of \(2, 3, 5\), expected \(2, 3, 4\)"):
        nifti.write_label_map(tmp_path / "x.nii.gz", np.zeros((2, 3, 5), np.uint8), geometry)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, geometry = tmp_path / "x.nii.gz", Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    nifti.write_label_map(path, np.ones((2, 3, 4), np.uint8), geometry)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(data.os, "replace", fail)  # the last step: all has been written to the temporary file
    with pytest.raises(OSError, match=f"{path} could not be written .disk full"):
        nifti.write_label_map(path, np.zeros((2, 3, 4), np.uint8), geometry)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.nii.gz"]


# ------------------------------------------------------------------------------------------------------------- checking


def bad_file(root: Path, kind: str) -> str:
    """Spoil one file of a decathlon folder; returns what the message must hold."""
    image, label = root / "imagesTr/case_1.nii.gz", root / "labelsTr/case_1.nii.gz"
    voxels, ids = np.asarray(nib.load(image).dataobj).copy(), np.asarray(nib.load(label).dataobj).copy()
    if kind == "no label":
        label.unlink()
        return f"{label}: found no such file"
    if kind == "no image":
        image.unlink()
        return f"{image}: found no such file"
    if kind == "shape":
        save(label, ids[:, :, :-1])
        return f"{label}: found (D, H, W) = (7, 10, 12), expected (8, 10, 12)"
    if kind == "affine":
        save(label, ids, nib.affines.from_matvec(np.eye(3), [0, 0, 0.5]))
        return f"{label}: found the affine"
    if kind == "label 7":
        ids[0, 0, 0] = 7
        save(label, ids)
        return f"{label}: found the labels [7.0], expected whole numbers from 0 to 2"
    if kind == "label 0.5":
        save(label, np.where(ids == 1, 0.5, ids).astype(np.float32))
        return f"{label}: found the labels [0.5], expected whole numbers from 0 to 2"
    if kind == "negative label":
        ids = ids.astype(np.int16)
        ids[0, 0, 0] = -1
        save(label, ids)
        return f"{label}: found the labels [-1.0]"
    if kind == "NaN label":
        ids = ids.astype(np.float32)
        ids[0, 0, 0] = np.nan
        save(label, ids)
        return f"{label}: found the labels [nan]"
    if kind in ("nan", "inf"):
        voxels[1, 2, 3] = float(kind)
        save(image, voxels)
        return f"{image}: found 1 voxels of NaN or infinity, expected finite numbers"
    if kind == "4-D":
        save(image, voxels[..., None])
        return f"{image}: found shape (12, 10, 8, 1), expected three dimensions"
    if kind == "complex":
        save(image, voxels.astype(np.complex64))
        return f"{image}: found voxels of type complex64"
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:-600])
        return f"{image}: found a truncated file"
    if kind == "no NIfTI":
        image.write_text("hello")
        return f"{image}: found no readable NIfTI file"
    assert kind == "zero spacing"
    raw = bytearray(nib.Nifti1Image(voxels, np.eye(4)).to_bytes())
    raw[312:328] = bytes(16)  # srow_z; nibabel itself would not write such an affine
    image.write_bytes(gzip.compress(raw))
    return f"{image}: found the affine"


KINDS = ["no label", "no image", "shape", "affine", "label 7", "label 0.5", "negative label", "NaN label", "nan", "inf",
         "4-D", "complex", "truncated", "no NIfTI", "zero spacing"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_named_with_what_was_found_and_expected(tmp_path, kind):
    root = decathlon(tmp_path / "set")
    expected = bad_file(root, kind)
    source = layouts.find_data(str(root))
    problems = data.check_source(source)
    assert len(problems) == 1 and problems[0].startswith(expected) and "expected" in problems[0]
    assert "\n" not in problems[0]
    with pytest.raises(ValueError, match="1 problems in"):
        data.prepare(source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (case,) = (case for split in source.splits.values() for case in split if case.name == "case_1")
    with pytest.raises(ValueError) as raised:  # `prepare_case` reads without a check before it
        data.prepare_case(case, plan_for())
    assert " ".join(str(raised.value).split()) == problems[0]


def test_all_bad_cases_are_listed_at_once(tmp_path):
    root = decathlon(tmp_path / "set", 6)
    bad_file(root, "shape")
    (root / "labelsTr/case_0.nii.gz").unlink()
    save(root / "imagesTr/case_3.nii.gz", np.full((12, 10, 8), np.nan, np.float32))
    save(root / "labelsTr/case_3.nii.gz", np.full((12, 10, 8), 9, np.uint8))  # both files of a case
    with pytest.raises(ValueError) as raised:
        data.prepare(layouts.find_data(str(root)), tmp_path / "cache")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("4 problems")
    for name in ("labelsTr/case_0", "labelsTr/case_1", "imagesTr/case_3", "labelsTr/case_3"):
        assert sum(f"{name}.nii.gz: found" in line for line in lines[1:]) == 1


def test_rounding_of_headers_is_no_mismatch_but_a_fifth_of_a_voxel_is(tmp_path):
    root = decathlon(tmp_path / "set", 2)
    ids = np.asarray(nib.load(root / "labelsTr/case_1.nii.gz").dataobj)
    for shift, count in ((0.01, 0), (0.2, 1)):
        save(root / "labelsTr/case_1.nii.gz", ids, nib.affines.from_matvec(np.eye(3), [shift, 0, 0]))
        assert len(data.check_source(layouts.find_data(str(root)))) == count
    # Spacings whose difference is small, but not at the other end of the volume.
    save(root / "labelsTr/case_1.nii.gz", ids, np.diag([1.02, 1, 1, 1]))
    assert len(data.check_source(layouts.find_data(str(root)))) == 1
