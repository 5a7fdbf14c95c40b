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


def header_field(path: Path, offset: int, content: bytes) -> None:
    """Overwrite header bytes that nibabel itself would not write so."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(raw)))


def shifted(x: float, y: float = 0, z: float = 0) -> np.ndarray:
    return nib.affines.from_matvec(np.eye(3), [x, y, z])


def place(array: np.ndarray, value: float, dtype) -> np.ndarray:
    array = array.astype(dtype)
    array[0, 0, 0] = value
    return array


# kind -> (which file of the case, how it is spoilt, what is found). The voxels a are (x, y, z) = (12, 10, 8).
MALFORMED = {
    "no label": ("label", lambda file, a: file.unlink(), "no such file"),
    "no image": ("image", lambda file, a: file.unlink(), "no such file"),
    "a slice less": ("label", lambda file, a: save(file, a[:, :, :-1]), "(D, H, W) = (7, 10, 12)"),
    "a row more": ("label", lambda file, a: save(file, np.pad(a, ((0, 0), (0, 1), (0, 0)))), "(D, H, W) = (8, 11"),
    "axes swapped": ("label", lambda file, a: save(file, a.transpose(1, 0, 2)), "(D, H, W) = (8, 12, 10)"),
    "half a voxel off": ("label", lambda file, a: save(file, a, shifted(0, 0, 0.5)), "the affine"),
    "a voxel off": ("label", lambda file, a: save(file, a, shifted(1)), "the affine"),
    "left for right": ("label", lambda file, a: save(file, a, np.diag([-1, 1, 1, 1])), "the affine"),
    "upside down": ("label", lambda file, a: save(file, a, np.diag([1, 1, -1, 1])), "the affine"),
    "turned by 5 degrees": ("label", lambda file, a: save(file, a, turned(5)), "the affine"),
    "2 % larger voxels": ("label", lambda file, a: save(file, a, np.diag([1.02, 1.02, 1.02, 1])), "the affine"),
    "voxels of 1 m": ("label", lambda file, a: save(file, a, np.diag([1e3, 1e3, 1e3, 1])), "the affine"),
    "label 7": ("label", lambda file, a: save(file, place(a, 7, np.uint8)), "the labels [7.0]"),
    "label 255": ("label", lambda file, a: save(file, place(a, 255, np.uint8)), "the labels [255.0]"),
    "label 256": ("label", lambda file, a: save(file, place(a, 256, np.int16)), "the labels [256.0]"),
    "label 1e9": ("label", lambda file, a: save(file, place(a, 1e9, np.float32)), "the labels [1000000000.0]"),
    "label 0.5": ("label", lambda file, a: save(file, place(a, 0.5, np.float32)), "the labels [0.5]"),
    "label 1.0001": ("label", lambda file, a: save(file, place(a, 1.0001, np.float64)), "the labels [1.0001]"),
    "label -1": ("label", lambda file, a: save(file, place(a, -1, np.int16)), "the labels [-1.0]"),
    "label -0.5": ("label", lambda file, a: save(file, place(a, -0.5, np.float32)), "the labels [-0.5]"),
    "label NaN": ("label", lambda file, a: save(file, place(a, np.nan, np.float32)), "the labels [nan]"),
    "label infinite": ("label", lambda file, a: save(file, place(a, np.inf, np.float32)), "the labels [inf]"),
    "an image as label": ("label", lambda file, a: save(file, a * 40), "the labels [40.0, 80.0]"),
    "NaN": ("image", lambda file, a: save(file, place(a, np.nan, np.float32)), "1 voxels of NaN or infinity"),
    "infinity": ("image", lambda file, a: save(file, place(a, np.inf, np.float32)), "1 voxels of NaN or infinity"),
    "minus infinity": ("image", lambda file, a: save(file, place(a, -np.inf, np.float32)), "1 voxels of NaN"),
    "beyond float32": ("image", lambda file, a: save(file, place(a, 1e300, np.float64)), "1 voxels of NaN"),
    "all NaN": ("image", lambda file, a: save(file, a * np.nan), "960 voxels of NaN"),
    "2-D": ("image", lambda file, a: save(file, a[:, :, 0]), "shape (12, 10), expected three dimensions"),
    "4-D": ("image", lambda file, a: save(file, a[..., None].repeat(2, 3)), "shape (12, 10, 8, 2)"),
    "4-D of one": ("image", lambda file, a: save(file, a[..., None]), "shape (12, 10, 8, 1)"),
    "5-D": ("image", lambda file, a: save(file, a[..., None, None].repeat(2, 4)), "shape (12, 10, 8, 1, 2)"),
    "4-D label": ("label", lambda file, a: save(file, a[..., None]), "shape (12, 10, 8, 1)"),
    "complex": ("image", lambda file, a: save(file, a.astype(np.complex64)), "voxels of type complex64"),
    "colours": ("image", lambda file, a: save(file, colours(a)), "voxels of type [('R'"),
    "truncated": ("image", lambda file, a: file.write_bytes(file.read_bytes()[:-600]), "a truncated file"),
    "truncated label": ("label", lambda file, a: file.write_bytes(file.read_bytes()[:-20]), "no readable NIfTI file"),
    "half a header": ("image", lambda file, a: file.write_bytes(file.read_bytes()[:60]), "no readable NIfTI file"),
    "empty": ("image", lambda file, a: file.write_bytes(b""), "no readable NIfTI file"),
    "text": ("image", lambda file, a: file.write_text("hello"), "no readable NIfTI file"),
    "zipped text": ("label", lambda file, a: file.write_bytes(gzip.compress(b"hello")), "no readable NIfTI file"),
    "a web page": ("label", lambda file, a: file.write_text("<html>" + 999 * "404 "), "no readable NIfTI file"),
    "a folder": ("label", lambda file, a: (file.unlink(), file.mkdir()), "no such file"),
    "not zipped": ("image", lambda file, a: file.write_bytes(gzip.decompress(file.read_bytes())), "no readable NIfTI"),
    "no spacing": ("image", lambda file, a: header_field(file, 312, bytes(16)), "the affine"),  # srow_z
    "parallel axes": ("image", lambda file, a: header_field(file, 296, np.float32([1, 0, 0, 0]).tobytes()), "the aff"),
    "affine NaN": ("image", lambda file, a: header_field(file, 280, np.float32([np.nan]).tobytes()), "the affine"),
    "no slices": ("image", lambda file, a: header_field(file, 46, bytes(2)), "shape (12, 10, 0)"),  # dim[3]
    "more slices than voxels": ("image", lambda file, a: header_field(file, 46, b"\x20\0"), "a truncated file"),
    "unknown type": ("image", lambda file, a: header_field(file, 70, b"\x03\x01"), "no readable NIfTI file"),
}  # fmt: skip


def turned(degrees: float) -> np.ndarray:
    return nib.affines.from_matvec(rotation(degrees))


def colours(array: np.ndarray) -> np.ndarray:
    kinds = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return np.zeros(array.shape, kinds)


def spoil(root: Path, kind: str) -> Path:
    """Spoil one file of case_1 of a decathlon folder; returns it."""
    which, change, _ = MALFORMED[kind]
    path = root / ("imagesTr" if which == "image" else "labelsTr") / "case_1.nii.gz"
    change(path, np.asarray(nib.load(path).dataobj).copy())
    return path


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_by_name_and_the_folder_works_once_it_is_mended(tmp_path, kind):
    root = decathlon(tmp_path / "set")
    before = {path: path.read_bytes() for path in root.glob("*/*.nii.gz")}
    path = spoil(root, kind)
    source = layouts.find_data(str(root))
    (problem,) = data.check_source(source)
    assert problem.startswith(f"{path}: found {MALFORMED[kind][2]}") and "expected" in problem and "\n" not in problem
    with pytest.raises(ValueError, match="1 problems in"):
        data.prepare(source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (case,) = (case for split in source.splits.values() for case in split if case.name == "case_1")
    with pytest.raises(ValueError) as raised:  # `prepare_case` reads without a check before it
        data.prepare_case(case, plan_for())
    assert " ".join(str(raised.value).split()) == problem
    if path.is_dir():
        path.rmdir()
    path.write_bytes(before[path])
    data.prepare(layouts.find_data(str(root)), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.label.npy"))) == 5


def test_there_are_forty_kinds_of_malformed_files():
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize("seed", range(4))
def test_a_file_cut_anywhere_is_refused(tmp_path, seed):
    rng = np.random.default_rng(seed)
    whole = Path(save(tmp_path / "whole.nii", rng.normal(size=(5, 6, 7)).astype(np.float32)))
    plain = whole.read_bytes()
    for path, content in ((tmp_path / "cut.nii", plain), (tmp_path / "cut.nii.gz", gzip.compress(plain))):
        for length in rng.integers(0, len(content) - 16, 25):
            path.write_bytes(content[:length])
            (problem,) = nifti.check_case(Case("x", (str(path),), None), 2)
            assert problem.startswith(f"{path}: found ")


def test_whatever_a_header_says_the_reader_answers_with_a_volume_or_a_reason(tmp_path):
    """Random bytes at random places of the header: nothing but a ValueError that names the file may be raised."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.nii"
    save(path, rng.integers(0, 2, (5, 6, 7)).astype(np.uint8))
    content, refused = path.read_bytes(), 0
    for _ in range(400):
        raw = bytearray(content)
        for offset in rng.integers(0, 348, 3):
            raw[offset] = rng.integers(0, 256)
        path.write_bytes(raw)
        problems = nifti.check_case(Case("x", (str(path),), str(path)), 2)
        assert all(problem.startswith(f"{path}: found ") for problem in problems)
        refused += bool(problems)
    assert 40 < refused < 400


def test_all_bad_cases_are_listed_at_once(tmp_path):
    root = decathlon(tmp_path / "set", 6)
    spoil(root, "a slice less")
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


@pytest.mark.parametrize("degrees", [0, 20])
def test_a_label_stored_with_other_axes_than_its_image_lies_in_the_same_place(tmp_path, degrees):
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 1.2, 4.0]), [-20, 30, 7])
    ids = np.random.default_rng(0).integers(0, 3, (6, 7, 5)).astype(np.uint8)  # (x, y, z)
    image = save(tmp_path / "image.nii", ids.astype(np.float32), affine)
    for order, signs in ORIENTATIONS:
        label = save(tmp_path / "label.nii", *stored_as(ids, affine, order, signs))
        assert nifti.check_case(Case("x", (image,), label), 3) == []
        assert np.array_equal(nifti.read_label(label, 3)[0], nifti.read_image(image)[0])
    mirrored = save(tmp_path / "mirrored.nii", ids, affine @ np.diag([-1, 1, 1, 1]))
    assert len(nifti.check_case(Case("x", (image,), mirrored), 3)) == 1
