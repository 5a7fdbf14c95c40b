"""Files to patches and back: orientation, alignment, checks, splits, the cache, and patches as pure functions."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader

import data
from data import PRESETS, Case, Geometry, PatchDataset, Plan

SHARED = Path(__file__).parents[2] / "shared" / "data"
ACDC, HIPPOCAMPUS = SHARED / "acdc", SHARED / "Task04_Hippocampus"

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    """Write (x, y, z); 1 mm and no shift unless told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def spaced(depth: float, height: float, width: float) -> np.ndarray:
    return np.diag([width, height, depth, 1.0])


def rotation(degrees: float) -> np.ndarray:
    """About an axis that is none of the grid's."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.cross(np.eye(3), axis)
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def decathlon(root: Path, number: int = 5, modality: str = "MRI", affine: np.ndarray | None = None) -> Path:
    """A folder with `number` cases of 8 x 10 x 12 voxels (D, H, W), labels 0 to 2, class 2 brighter than 1."""
    rng = np.random.default_rng(0)
    for i in range(number):
        label = np.zeros((12, 10, 8), np.uint8)
        label[3:7, 3:6, 2:6], label[7:9, 3:6, 2:6] = 1, 2
        image = (label * 100 + rng.normal(50, 10, label.shape)).astype(np.float32)
        save(root / f"imagesTr/case_{i}.nii.gz", image, affine)
        save(root / f"labelsTr/case_{i}.nii.gz", label, affine)
    facts = {"labels": {"0": "background", "1": "head", "2": "tail"}, "modality": {"0": modality}}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def plan_for(labels: int = 3, spacing=(1.0, 1.0, 1.0), intensity=None, flip_axes=(), channels=("MR",)) -> Plan:
    names = tuple(f"class {i}" for i in range(labels))
    return Plan("x", "CT" if intensity else "MR", channels, names, flip_axes, spacing, intensity)


def one_hot(label: np.ndarray, classes: int) -> torch.Tensor:
    return F.one_hot(torch.from_numpy(label).long(), classes).permute(3, 0, 1, 2).float()


def dice(found: np.ndarray, truth: np.ndarray, class_id: int) -> float:
    a, b = found == class_id, truth == class_id
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# ----------------------------------------------------------------------------------------------- orientation, both ways


def stored_as(volume: np.ndarray, affine: np.ndarray, order, signs) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in the same places, (x, y, z) stored with other axes and directions."""
    turn = np.array([[order[axis], signs[axis]] for axis in range(3)])
    return (
        nib.orientations.apply_orientation(volume, turn),
        affine @ nib.orientations.inv_ornt_aff(turn, volume.shape),
    )


@pytest.mark.parametrize("degrees", [0, 20])
def test_one_volume_reads_the_same_however_it_is_stored(tmp_path, degrees):
    volume = np.random.default_rng(0).integers(0, 99, (5, 6, 7)).astype(np.int16)
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 2.0, 5.0]), [-40, 12, 7])
    for order, signs in ORIENTATIONS:
        read, geometry = data.read_volume(save(tmp_path / "v.nii", *stored_as(volume, affine, order, signs)))
        assert np.array_equal(read, volume.transpose(2, 1, 0)), (order, signs)
        assert geometry.shape == (7, 6, 5) and np.allclose(geometry.spacing, (5.0, 2.0, 1.5))


@pytest.mark.parametrize("degrees", [0, 20, 44])
def test_written_label_maps_return_to_their_place_bit_by_bit(tmp_path, degrees):
    volume = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    affine = nib.affines.from_matvec(rotation(degrees) @ np.diag([1.5, 2.0, 5.0]), [-40, 12, 7])
    for order, signs in ORIENTATIONS:
        array, stored = stored_as(volume, affine, order, signs)
        read, geometry = data.read_volume(save(tmp_path / "v.nii.gz", array, stored))
        data.write_label_map(tmp_path / "w.nii.gz", read, geometry)
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
    volume, _ = data.read_volume(save(tmp_path / "v.nii.gz", array, np.diag([-1.0, -1.0, 1.0, 1.0])))
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
    label = save(tmp_path / "l.nii", np.zeros((3, 4, 5), np.uint8))
    read, _ = data.read_for_picture(Case("v", (str(path),), label), 2)
    assert np.array_equal(read, 2 * array.transpose(2, 1, 0).astype(np.float32) - 10)


def test_a_label_map_of_another_shape_is_not_written(tmp_path):
    geometry = Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"found a label map of \(2, 3, 5\), expected \(2, 3, 4\)"):
        data.write_label_map(tmp_path / "x.nii.gz", np.zeros((2, 3, 5), np.uint8), geometry)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, geometry = tmp_path / "x.nii.gz", Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    data.write_label_map(path, np.ones((2, 3, 4), np.uint8), geometry)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(data.os, "replace", fail)  # the last step: all has been written to the temporary file
    with pytest.raises(OSError, match=f"{path} could not be written .disk full"):
        data.write_label_map(path, np.zeros((2, 3, 4), np.uint8), geometry)
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
    source = data.find_data(str(root))
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
        data.prepare(data.find_data(str(root)), tmp_path / "cache")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("4 problems")
    for name in ("labelsTr/case_0", "labelsTr/case_1", "imagesTr/case_3", "labelsTr/case_3"):
        assert sum(f"{name}.nii.gz: found" in line for line in lines[1:]) == 1


def test_rounding_of_headers_is_no_mismatch_but_a_fifth_of_a_voxel_is(tmp_path):
    root = decathlon(tmp_path / "set", 2)
    ids = np.asarray(nib.load(root / "labelsTr/case_1.nii.gz").dataobj)
    for shift, count in ((0.01, 0), (0.2, 1)):
        save(root / "labelsTr/case_1.nii.gz", ids, nib.affines.from_matvec(np.eye(3), [shift, 0, 0]))
        assert len(data.check_source(data.find_data(str(root)))) == count
    # Spacings whose difference is small, but not at the other end of the volume.
    save(root / "labelsTr/case_1.nii.gz", ids, np.diag([1.02, 1, 1, 1]))
    assert len(data.check_source(data.find_data(str(root)))) == 1


# -------------------------------------------------------------------------------------------------------------- layouts


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def acdc_tree(base: Path, numbers=range(1, 101)) -> None:
    for number in numbers:
        folder = base / f"training/patient{number:03d}"
        folder.mkdir(parents=True)
        first, last = (4, 11) if number == 90 else (1, 12)
        (folder / "Info.cfg").write_text(f"ED: {first}\nES: {last}\nGroup: DCM\nHeight: 184.0\n")


def patients(cases) -> list[int]:
    return sorted({int(case.name[7:10]) for case in cases})


@pytest.mark.parametrize("level", ["", "database"])
def test_acdc_has_the_papers_split(tmp_path, level):
    acdc_tree(tmp_path / level)
    splits = data.find_data("acdc", str(tmp_path)).splits
    assert patients(splits["test"]) == [2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95]
    assert patients(splits["val"]) == [89, 90, 91, 93, 94, 96, 97, 98, 99, 100]
    assert sorted(sum((patients(cases) for cases in splits.values()), [])) == list(range(1, 101))
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 140, "val": 20, "test": 40}


def test_acdc_frames_come_from_info_cfg_and_testing_labels_may_be_hidden(tmp_path):
    acdc_tree(tmp_path, [1, 90])
    (tmp_path / "training/patient090/patient090_frame01.nii.gz").touch()  # a decoy
    acdc_tree(tmp_path / "more", [101])
    (tmp_path / "more/training").rename(tmp_path / "testing")
    touch(tmp_path / "testing/patient101/patient101_frame12_gt.nii.gz")
    splits = data.find_data("acdc", str(tmp_path)).splits
    assert [case.name for case in splits["val"]] == ["patient090_frame04", "patient090_frame11"]
    assert splits["val"][0].label.endswith("patient090/patient090_frame04_gt.nii.gz")
    diastole, systole = splits["testing"]
    assert diastole.label is None and systole.label.endswith("_frame12_gt.nii.gz")


def test_every_acdc_patient_without_frames_is_listed(tmp_path):
    acdc_tree(tmp_path, range(80, 100))
    (tmp_path / "training/patient083/Info.cfg").unlink()
    (tmp_path / "training/patient085/Info.cfg").write_text("ED: 1\n")
    with pytest.raises(ValueError) as raised:
        data.find_data("acdc", str(tmp_path))
    first, second = str(raised.value).splitlines()
    assert "patient083/Info.cfg: found 'no such file', expected" in first and "patient085" in second


def test_synapse_has_transunets_split_less_three(tmp_path):
    base = tmp_path / "Abdomen/RawData/Training"
    for number in [*range(1, 11), *range(21, 41)]:
        touch(base / f"img/img{number:04d}.nii.gz")
    splits = data.find_data("synapse", str(tmp_path)).splits
    numbers = {name: [int(case.name[4:]) for case in cases] for name, cases in splits.items()}
    assert numbers["test"] == [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert numbers["val"] == [27, 34, 40]
    assert numbers["train"] == [5, 6, 7, 9, 10, 21, 23, 24, 26, 28, 30, 31, 33, 37, 39]
    assert splits["test"][0].label == str(base / "label/label0001.nii.gz")
    assert data.find_data("synapse", str(base)).splits["test"] == splits["test"]


def test_amos_takes_ct_alone_and_tests_on_its_validation_folder(tmp_path):
    for number in [*range(1, 21), 501, 507]:
        touch(tmp_path / f"amos22/imagesTr/amos_{number:04d}.nii.gz")
    for number in (25, 26, 599):
        touch(tmp_path / f"amos22/imagesVa/amos_{number:04d}.nii.gz")
    splits = data.find_data("amos", str(tmp_path)).splits
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 16, "val": 4, "test": 2}
    assert not {case.name for case in splits["train"]} & {case.name for case in splits["val"]}
    assert splits["test"][1].label == str(tmp_path / "amos22/labelsVa/amos_0026.nii.gz")


def test_label_tables_and_the_scored_organs():
    synapse = PRESETS["synapse"]
    organs = {"spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"}
    assert {synapse.labels[i] for i in synapse.scored} == organs
    assert {name: len(preset.labels) for name, preset in PRESETS.items()} == {
        "phantom": 4, "acdc": 4, "synapse": 14, "amos": 16
    }  # fmt: skip
    assert PRESETS["acdc"].labels[1:] == ("RV", "Myo", "LV") and PRESETS["amos"].labels[13] == "duodenum"
    for preset in PRESETS.values():  # a mirrored left kidney would be a right one
        assert not preset.flip_axes or not any("left" in name for name in preset.labels)


@pytest.mark.parametrize("name", ["acdc", "synapse", "amos"])
def test_missing_data_prints_where_to_get_it_and_the_tree(tmp_path, name):
    for root in (tmp_path / "nothing", tmp_path):  # no folder, and an empty one
        with pytest.raises(FileNotFoundError) as raised:
            data.find_data(name, str(root))
        assert all(text in str(raised.value) for text in (str(root), PRESETS[name].home, PRESETS[name].tree))


def test_the_phantom_is_written_on_first_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = data.find_data("phantom").splits
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 48, "val": 8, "test": 12}
    written = (tmp_path / "data/phantom/training/patient001/Info.cfg").stat().st_mtime_ns
    assert data.find_data("phantom").splits == splits
    assert (tmp_path / "data/phantom/training/patient001/Info.cfg").stat().st_mtime_ns == written


def test_folders_split_by_seed_and_by_nothing_else(tmp_path):
    root = decathlon(tmp_path / "set", 11)
    splits = [data.find_data(str(root), seed=seed).splits for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert len(splits[0]["train"]) == 9 and len(splits[0]["val"]) == 2
    assert not set(splits[0]["train"]) & set(splits[0]["val"])
    two = data.find_data(str(decathlon(tmp_path / "two", 2))).splits
    assert len(two["train"]) == len(two["val"]) == 1


def test_splits_final_decides_where_it_is(tmp_path):
    root = decathlon(tmp_path / "set")
    folds = [{"train": ["case_4", "case_0"], "val": ["case_2"]}, {"train": ["case_2"], "val": ["case_4"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    splits = data.find_data(str(root)).splits
    assert [[case.name for case in splits[name]] for name in ("train", "val")] == [["case_4", "case_0"], ["case_2"]]
    for wrong in ([{"train": ["case_9"], "val": ["case_2"]}], [{"train": ["case_1"]}], [],
                  [{"train": ["case_1"], "val": []}]):  # fmt: skip
        (root / "splits_final.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="splits_final.json: found"):
            data.find_data(str(root))


def test_nnunet_folders_with_two_channels(tmp_path):
    for i, channel in itertools.product(range(3), range(2)):
        save(tmp_path / f"imagesTr/p{i}_{channel:04d}.nii.gz", np.full((4, 4, 4), 10 * channel + i, np.float32))
    for i in range(3):
        save(tmp_path / f"labelsTr/p{i}.nii.gz", np.zeros((4, 4, 4), np.uint8))
    facts = {"labels": {"left lobe": 1, "background": 0}, "channel_names": {"0": "CT", "1": "PET"}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    source = data.find_data(str(tmp_path))
    assert source.labels == ("background", "left lobe") and source.channels == ("CT", "PET")
    assert source.modality == "CT" and source.flip_axes == ()  # left stays left
    assert data.check_source(source) == []
    case = source.splits["val"][0]
    image = data.prepare_case(case, plan_for(2, intensity=((-99.0, 99.0, 0.0, 1.0),) * 2, channels=("CT", "PET"))).image
    number = int(case.name[1])
    assert (image[0] == number).all() and (image[1] == 10 + number).all()
    Path(case.images[1]).unlink()
    (problem,) = data.check_source(source)
    assert problem.startswith(f"{case.images[1]}: found no such file")
    with pytest.raises(ValueError, match="found 2 channels, expected the plan's"):
        data.prepare_case(case, plan_for(2))


@pytest.mark.parametrize("text", ["{", "{}", '{"labels": {"0": "a", "2": "b"}, "modality": {"0": "MR"}}',
                                  '{"labels": {"a": 0, "b": [1, 2]}, "channel_names": {"0": "MR"}}',
                                  '{"labels": {"0": "a", "1": "b"}}'])  # fmt: skip
def test_an_unusable_dataset_json_says_what_is_expected(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="dataset.json: found .* expected labels 0, 1, 2"):
        data.find_data(str(tmp_path))


def test_neither_preset_nor_folder_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a preset .* dataset.json"):
        data.find_data(str(tmp_path / "acdcc"))
    root = decathlon(tmp_path / "empty", 0)
    with pytest.raises(FileNotFoundError, match="found 0 cases, expected two or more"):
        data.find_data(str(root))


# ---------------------------------------------------------------------------------------------- preparing and alignment


def ramp(shape: tuple[int, int, int], axis: int) -> np.ndarray:
    """(D, H, W) whose value is the place of the voxel's centre along an axis, as a fraction of the extent."""
    return np.moveaxis(np.broadcast_to((np.arange(shape[axis]) + 0.5) / shape[axis], shape[:axis] + shape[axis + 1 :]
                       + (shape[axis],)), -1, axis).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [13, 20, 41])
def test_resampling_keeps_places_there_and_back(axis, size):
    shape = (20, 20, 20)
    target = shape[:axis] + (size,) + shape[axis + 1 :]
    there = data.resample(ramp(shape, axis), target, 3, 3)
    inner = [slice(None)] * 3
    inner[axis] = slice(4, -4)  # a mirrored ramp bends at the border
    assert np.allclose(there[tuple(inner)], ramp(target, axis)[tuple(inner)], atol=2e-3)
    # With a constant as the other class, the boundary is where the ramp crosses one half: at the same place again.
    semantic = np.stack([np.full(target, 0.5001, np.float32), ramp(target, axis)])
    assert np.array_equal(data.to_native(semantic, Geometry(np.eye(4), shape, (1.0,) * 3)), ramp(shape, axis) > 0.5)


def ball(shape, spacing, radius: float) -> np.ndarray:
    """Two nested ellipsoids of mm radii, labels 1 outside and 2 inside, off the centre of the volume."""
    places = [(np.arange(n) - 0.47 * n) * s for n, s in zip(shape, spacing)]
    distance = np.sqrt(sum(p**2 for p in np.meshgrid(*places, indexing="ij")))
    return ((distance < radius).astype(np.uint8) + (distance < 0.6 * radius)).astype(np.uint8)


@pytest.mark.parametrize("spacing, plan_spacing, radius", [
    ((1.0, 1.0, 1.0), (0.7, 0.7, 0.7), 22), ((10.0, 1.2, 1.2), (None, 0.9, 0.9), 32),
    ((2.0, 0.8, 0.9), (1.0, 0.7, 0.7), 21)])  # fmt: skip
def test_a_smooth_label_survives_the_way_there_and_back(tmp_path, spacing, plan_spacing, radius):
    shape = tuple(int(80 / s) for s in spacing)
    truth = ball(shape, spacing, radius)
    affine = spaced(*spacing)
    image = save(tmp_path / "i.nii", truth.T.astype(np.float32), affine)
    case = Case("a", (image,), save(tmp_path / "l.nii", truth.T, affine))
    prepared = data.prepare_case(case, plan_for(spacing=plan_spacing))
    assert prepared.label.shape == prepared.image.shape[1:] != shape
    back = data.to_native(one_hot(prepared.label, 3), prepared.geometry)
    assert back.shape == shape and min(dice(back, truth, 1), dice(back, truth, 2)) >= 0.99


def test_image_and_label_stay_together_when_resampled(tmp_path):
    truth = ball((60, 60, 60), (1, 1, 1), 22)
    case = Case("a", (save(tmp_path / "i.nii", (truth > 0).T.astype(np.float32)),), save(tmp_path / "l.nii", truth.T))
    prepared = data.prepare_case(case, plan_for(spacing=(1.0, 0.75, 1.3)))
    middle = (prepared.image.min() + prepared.image.max()) / 2
    assert dice(prepared.image[0] > middle, prepared.label > 0, 1) > 0.99


def test_thick_slices_are_kept_or_copied_never_mixed(tmp_path):
    array = np.random.default_rng(0).normal(size=(8, 8, 5)).astype(np.float32)  # (x, y, z)
    case = Case("a", (save(tmp_path / "i.nii", array, spaced(8, 1, 1)),), None)
    kept = data.prepare_case(case, plan_for(spacing=(None, 1.0, 1.0))).image[0]
    assert kept.shape == (5, 8, 8) and np.allclose(kept, (array.T - array.mean()) / array.std(), atol=1e-5)
    copied = data.prepare_case(case, plan_for(spacing=(3.0, 1.0, 1.0))).image[0]
    assert len(copied) == 13
    assert all(any(np.array_equal(slice_, original) for original in kept) for slice_ in copied)


def test_the_plan_is_made_of_training_cases_alone(tmp_path):
    root = decathlon(tmp_path / "set", affine=spaced(2.0, 1.0, 1.0))
    source = data.find_data(str(root))
    before = data.make_plan(source)
    assert before.spacing == (2.0, 1.0, 1.0) and before.intensity is None
    held_out = source.splits["val"][0]
    for path in (*held_out.images, held_out.label):
        save(Path(path), np.asarray(nib.load(path).dataobj), spaced(9.0, 9.0, 9.0))
    assert data.make_plan(source) == before
    thick = data.make_plan(data.find_data(str(decathlon(tmp_path / "thick", affine=spaced(3.5, 1.0, 1.0)))))
    assert thick.spacing == (None, 1.0, 1.0)


def test_ct_is_clipped_and_scaled_by_the_foreground_of_training(tmp_path):
    root = decathlon(tmp_path / "set", modality="CT")
    source = data.find_data(str(root))
    plan = data.make_plan(source)
    values = np.concatenate([
        np.asarray(nib.load(case.images[0]).dataobj)[np.asarray(nib.load(case.label).dataobj) > 0]
        for case in source.splits["train"]
    ])  # fmt: skip
    low, high = np.percentile(values, [0.5, 99.5])
    assert np.allclose(plan.intensity, [(low, high, values.clip(low, high).mean(), values.clip(low, high).std())])
    case = source.splits["val"][0]
    clipped = np.asarray(nib.load(case.images[0]).dataobj).T.clip(low, high)
    expected = (clipped - plan.intensity[0][2]) / plan.intensity[0][3]
    assert np.allclose(data.prepare_case(case, plan).image[0], expected, atol=1e-4)


def test_mr_is_normalised_by_itself_and_a_constant_image_is_no_nan(tmp_path):
    rng = np.random.default_rng(0)
    case = Case("a", (save(tmp_path / "i.nii", rng.normal(300, 40, (9, 8, 7)).astype(np.float32)),), None)
    prepared = data.prepare_case(case, plan_for())
    assert prepared.label is None
    assert abs(prepared.image.mean()) < 1e-3 and abs(prepared.image.std() - 1) < 1e-3
    constant = Case("b", (save(tmp_path / "c.nii", np.full((4, 4, 4), 7, np.int16)),), None)
    assert (data.prepare_case(constant, plan_for()).image == 0).all()


@pytest.mark.parametrize("modality", ["MRI", "CT"])
def test_a_plan_travels_in_a_checkpoint(tmp_path, modality):
    plan = data.make_plan(data.find_data(str(decathlon(tmp_path / "set", modality=modality))))
    torch.save(plan.as_dict(), tmp_path / "plan.pt")
    assert Plan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True)) == plan


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cached(tmp_path):
    source = data.find_data(str(decathlon(tmp_path / "set")))
    return source, data.prepare(source, tmp_path / "cache"), tmp_path / "cache"


def prepared_now(monkeypatch) -> list[str]:
    """The names of the cases that are prepared from here on."""
    names, prepare_case = [], data.prepare_case
    monkeypatch.setattr(data, "prepare_case", lambda case, plan: names.append(case.name) or prepare_case(case, plan))
    return names


def test_the_cache_holds_what_prepare_case_makes(cached):
    source, plan, cache = cached
    for case in (*source.splits["train"], *source.splits["val"]):
        now, stored = data.prepare_case(case, plan), data.load_cached(case, plan, cache)
        assert np.array_equal(stored.image, now.image) and np.array_equal(stored.label, now.label)
        assert isinstance(stored.image, np.memmap) and isinstance(stored.label, np.memmap)
        assert stored.geometry.shape == now.geometry.shape and (stored.geometry.affine == now.geometry.affine).all()
    assert not [path for path in Path(source.root).rglob("*") if path.suffix in (".npy", ".partial")]


def test_what_is_done_is_neither_checked_nor_prepared_again(cached, monkeypatch):
    source, plan, cache = cached
    names = prepared_now(monkeypatch)
    monkeypatch.setattr(data, "check_case", None)
    assert data.prepare(source, cache) == plan and names == []


def test_a_changed_file_is_checked_and_its_case_alone_prepared_again(cached, monkeypatch):
    source, plan, cache = cached
    path = source.splits["val"][0].images[0]
    save(Path(path), np.asarray(nib.load(path).dataobj) + np.arange(12, dtype=np.float32)[:, None, None] * 100)
    names = prepared_now(monkeypatch)
    assert data.prepare(source, cache) == plan and names == [source.splits["val"][0].name]
    save(Path(path), np.full((12, 10, 8), np.nan, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        data.prepare(source, cache)


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_an_interrupted_case_is_not_taken_for_whole(tmp_path, monkeypatch, part):
    source = data.find_data(str(decathlon(tmp_path / "set")))
    np_save, calls = np.save, []

    def fail_in_the_second_case(file, array):
        calls.append(file.name)
        if len(calls) == 4 + part + 1:
            file.write(b"half of it")
            raise KeyboardInterrupt
        np_save(file, array)

    monkeypatch.setattr(np, "save", fail_in_the_second_case)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))
    monkeypatch.setattr(np, "save", np_save)
    names = prepared_now(monkeypatch)
    plan = data.prepare(source, tmp_path / "cache")
    assert len(names) == 4  # all but the first
    for case in (*source.splits["train"], *source.splits["val"]):
        stored = data.load_cached(case, plan, tmp_path / "cache")
        assert np.array_equal(stored.image, data.prepare_case(case, plan).image)


def test_unprepared_cases_are_an_error_that_says_so(cached, tmp_path):
    source, plan, _ = cached
    with pytest.raises(FileNotFoundError, match="expected what `prepare` writes"):
        PatchDataset(source.splits["train"], plan, tmp_path / "elsewhere", (2, 8, 8), 4, seed=0)


# -------------------------------------------------------------------------------------------------------------- patches


def same(items, others) -> bool:
    return all(torch.equal(a, b) for item, other in zip(items, others, strict=True) for a, b in zip(item, other))


def test_a_patch_is_a_function_of_seed_and_index(cached):
    source, plan, cache = cached
    make = lambda seed: PatchDataset(source.splits["train"], plan, cache, (4, 8, 8), 24, seed)  # noqa: E731
    items = [make(0)[i] for i in range(24)]
    backwards = make(0)
    assert same(items, [backwards[i] for i in reversed(range(24))][::-1])  # a resumed run starts anywhere
    assert not same(items, [make(1)[i] for i in range(24)])
    assert len({float(image.sum()) for image, _ in items}) > 20


def test_four_workers_give_what_none_gives(cached):
    source, plan, cache = cached
    dataset = PatchDataset(source.splits["train"], plan, cache, (4, 8, 8), 12, seed=3)
    alone, four = (list(DataLoader(dataset, 2, num_workers=workers)) for workers in (0, 4))
    assert len(alone) == 6 and same(alone, four)


def test_plain_patches_are_crops_of_the_cache(cached):
    source, plan, cache = cached
    dataset = PatchDataset(source.splits["train"], plan, cache, (3, 6, 5), 30, seed=0, augment=False)
    volumes = [data.load_cached(case, plan, cache) for case in source.splits["train"]]
    for image, label in dataset:
        assert image.dtype == torch.float32 and label.dtype == torch.int64
        matches = 0
        for volume in volumes:
            windows = np.lib.stride_tricks.sliding_window_view(volume.image[0], (3, 6, 5))
            # Bilinear weights in float32 are 0 and 1 to about 1e-6 only.
            at = np.argwhere(np.abs(windows - image[0].numpy()).max((3, 4, 5)) < 1e-4)
            for d, h, w in at:
                matches += np.array_equal(volume.label[d : d + 3, h : h + 6, w : w + 5], label.numpy())
        assert matches == 1


class Recorder:
    """An array that remembers how many voxels were read of it."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.read = array, array.shape, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


def test_only_the_crop_is_read():
    image, label = Recorder(np.zeros((1, 20, 300, 300), np.float32)), Recorder(np.zeros((20, 300, 300), np.uint8))
    data.cut(image, label, np.zeros(1, np.float32), (5, 90, 80), (4, 64, 64))
    assert image.read <= 4 * 67 * 67 and label.read <= 4 * 67 * 67
    image.read = 0
    data.cut(image, label, np.zeros(1, np.float32), (5, 90, 80), (4, 64, 64), np.pi / 4, 1.25)
    assert image.read <= 4 * (64 * 1.25 * 2**0.5 + 4) ** 2


@pytest.mark.parametrize("angle, scale", [(0.0, 1.0), (0.4, 1.0), (-0.5, 1.25), (0.2, 0.8), (np.pi / 2, 1.0)])
@pytest.mark.parametrize("low", [(1, 6, 9), (-1, -4, 20), (3, 14, -5)])
def test_rotation_and_scaling_are_those_of_brute_force(angle, scale, low):
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(6, 30, 34)), 2).astype(np.float32) * 20
    label = (image > 0).astype(np.uint8)
    minimum, size = image.min(), (5, 16, 20)
    patch, patch_label = data.cut(image[None], label, np.array([minimum]), low, size, angle, scale)
    expected = np.full(size, minimum, np.float32)
    expected_label = np.zeros(size, np.int64)
    h, w = (np.indices(size[1:]).T - (np.array(size[1:]) - 1) / 2).T  # from the patch's centre
    rows = low[1] + (size[1] - 1) / 2 + scale * (np.cos(angle) * h - np.sin(angle) * w)
    columns = low[2] + (size[2] - 1) / 2 + scale * (np.sin(angle) * h + np.cos(angle) * w)
    for d in range(size[0]):
        if 0 <= low[0] + d < 6:
            places = [rows, columns]
            options = {"mode": "grid-constant", "cval": minimum}
            expected[d] = ndimage.map_coordinates(image[low[0] + d], places, order=1, **options)
            expected_label[d] = ndimage.map_coordinates(label[low[0] + d], places, order=0, mode="grid-constant")
    assert np.allclose(patch[0].numpy(), expected, atol=1e-3)
    # A place half-way between two voxels may go to either.
    assert (patch_label.numpy() != expected_label).mean() < (0.005 if angle else 1e-9)


def test_a_volume_smaller_than_the_patch_is_centred_in_its_minimum(cached):
    source, plan, cache = cached
    dataset = PatchDataset(source.splits["train"], plan, cache, (10, 14, 16), 6, seed=0, augment=False)
    for image, label in dataset:
        inside = torch.zeros(10, 14, 16, dtype=torch.bool)
        inside[1:9, 2:12, 2:14] = True
        floor = image[0][inside].min()
        assert torch.allclose(image[0][~inside], floor, atol=1e-4) and (label[~inside] == 0).all()
        assert label[inside].unique().tolist() == [0, 1, 2]


def test_the_padding_is_the_minimum_of_the_volume_not_of_the_part_read():
    image = np.ones((1, 6, 8, 8), np.float32)
    patch, _ = data.cut(image, np.zeros((6, 8, 8), np.uint8), np.array([-7.0], np.float32), (4, -4, 0), (4, 8, 8))
    expected = torch.full((4, 8, 8), -7.0)
    expected[:2, 4:] = 1
    assert torch.allclose(patch[0], expected, atol=1e-4)  # float32 coordinates miss a pixel's centre by 1e-6


def one_case(tmp_path, image: np.ndarray, label: np.ndarray, plan: Plan):
    """A cache of one case with these (D, H, W) arrays."""
    case = Case("a", (save(tmp_path / "i.nii.gz", image.T),), save(tmp_path / "l.nii.gz", label.T))
    source = data.DataSource("x", str(tmp_path), "MR", ("MR",), plan.labels, plan.flip_axes, {"train": (case,)})
    data.prepare(source, tmp_path / "cache")
    return (case,), data.prepare(source, tmp_path / "cache"), tmp_path / "cache"


def test_labels_follow_the_image_through_every_spatial_change(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "change_intensities", lambda image, rng: image)
    label = ball((12, 60, 60), (4, 1, 1), 20)
    cases, plan, cache = one_case(tmp_path, (label > 0).astype(np.float32), label, plan_for(flip_axes=(0, 1, 2)))
    dataset = PatchDataset(cases, plan, cache, (6, 40, 48), 40, seed=0)
    scores = []
    for image, patch_label in dataset:
        if (patch_label > 0).sum() > 200:
            middle = (image.min() + image.max()) / 2
            scores.append(dice((image[0] > middle).numpy(), (patch_label > 0).numpy(), 1))
    assert len(scores) > 20 and min(scores) > 0.97  # bilinear and nearest differ along the rim


@pytest.mark.parametrize("flip_axes", [(), (2,), (1, 2), (0,)])
def test_flips_happen_along_the_given_axes_alone(tmp_path, monkeypatch, flip_axes):
    monkeypatch.setattr(data, "change_intensities", lambda image, rng: image)
    monkeypatch.setattr(data, "ROTATION", (0.0, (0, 0)))
    image = sum(ramp((4, 8, 8), axis) * 10**axis for axis in range(3))
    cases, plan, cache = one_case(tmp_path, image, np.ones((4, 8, 8), np.uint8), plan_for(flip_axes=flip_axes))
    seen = {axis: set() for axis in range(3)}
    for patch, _ in PatchDataset(cases, plan, cache, (4, 8, 8), 60, seed=0):
        for axis in range(3):
            steps = patch[0].diff(dim=axis)
            seen[axis].add(bool(steps[1:3, 2:6, 2:6].sum() < 0))
    assert {axis for axis, directions in seen.items() if len(directions) == 2} == set(flip_axes)
    assert all(seen[axis] == {False} for axis in range(3) if axis not in flip_axes)


def test_a_third_of_the_patches_is_centred_on_foreground_by_class(tmp_path):
    label = np.zeros((10, 100, 100), np.uint8)
    label[2:8, 20:40, 20:40] = 1  # 2,400 voxels
    label[5, 70, 70] = 2  # one
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    cases, plan, cache = one_case(tmp_path, image, label, plan_for())
    dataset = PatchDataset(cases, plan, cache, (3, 9, 9), 1200, seed=0, augment=False)
    centres = [int(patch_label[1, 4, 4]) for _, patch_label in dataset]
    rare, common = centres.count(2) / 1200, centres.count(1) / 1200
    assert abs(rare - 1 / 6) < 0.04  # three deviations are 0.032; by voxel it would be 1 / 7,200
    assert abs(common - (1 / 6 + 2 / 3 * 0.036)) < 0.04  # a random centre is class 1 in about 3.6 per cent


def test_cases_without_foreground_and_foreground_at_the_border_give_patches(tmp_path):
    label = np.zeros((3, 10, 10), np.uint8)
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    cases, plan, cache = one_case(tmp_path / "none", image, label, plan_for())
    assert all(not patch_label.any() for _, patch_label in PatchDataset(cases, plan, cache, (2, 8, 8), 20, seed=0))
    label[0, 0, 0] = label[2, 9, 9] = 1
    cases, plan, cache = one_case(tmp_path / "corner", image, label, plan_for())
    patches = list(PatchDataset(cases, plan, cache, (2, 8, 8), 40, seed=0, augment=False))
    assert any(patch_label[0, 0, 0] == 1 for _, patch_label in patches)
    assert any(patch_label[1, 7, 7] == 1 for _, patch_label in patches)


@pytest.mark.parametrize("kind", ["NOISE", "BLUR", "BRIGHTNESS", "CONTRAST", "LOW_RESOLUTION", "GAMMA"])
def test_every_kind_of_augmentation_changes_intensities_and_no_place(monkeypatch, kind):
    names = ("NOISE", "BLUR", "BRIGHTNESS", "CONTRAST", "LOW_RESOLUTION", "GAMMA")
    for name in names:
        monkeypatch.setattr(data, name, (float(name == kind), getattr(data, name)[1]))
    image = torch.full((2, 3, 24, 24), -1.0)
    image[:, :, 6:14, 8:20] = 1.5  # one bright block: where it lies must not change
    image[:, :, 9:11, 12:16] = 1.0  # inside the range: gamma and contrast keep its ends
    changed = data.change_intensities(image.clone(), np.random.default_rng(1))
    assert changed.shape == image.shape and changed.dtype == torch.float32 and changed.isfinite().all()
    assert not torch.allclose(changed, image, atol=1e-3)
    assert torch.equal(changed[..., 8:12, 10:18] > 0, image[..., 8:12, 10:18] > 0)
    centre = lambda x: ((x > x.mean()).float().nonzero().float().mean(0))  # noqa: E731
    assert torch.allclose(centre(changed), centre(image), atol=0.6)
    monkeypatch.setattr(data, kind, (0.0, getattr(data, kind)[1]))
    assert torch.equal(data.change_intensities(image.clone(), np.random.default_rng(1)), image)


def test_gamma_keeps_the_range_and_bends_between():
    image = torch.linspace(-1, 2, 24)[None, None, None].repeat(1, 2, 24, 1)
    rng = np.random.default_rng(0)
    results = [data.change_intensities(image.clone(), rng) for _ in range(300)]
    assert all(result.isfinite().all() for result in results)
    assert sum(torch.equal(result, image) for result in results) in range(30, 150)  # 0.85^5 * 0.7 = 0.31 of 300


# ------------------------------------------------------------------------------------------------------ dataset mapping


def test_label_maps_become_one_segment_per_class_present():
    labels = torch.zeros(3, 6, 8, dtype=torch.int64)
    labels[0, 1:3, 2:7], labels[0, 4, 5] = 1, 3  # a block and one pixel
    labels[2] = 2  # nothing else, no background; slice 1 is empty
    segments = data.label_map_to_segments(labels, 4)
    assert segments.present.tolist() == [
        [True, True, False, True], [True, False, False, False], [False, False, True, False]
    ]  # fmt: skip
    assert torch.equal(segments.masks.float().argmax(1), labels) and (segments.masks.sum(1) == 1).all()
    assert segments.boxes[0, 1].tolist() == pytest.approx([2 / 8, 1 / 6, 7 / 8, 3 / 6])
    assert segments.boxes[0, 3].tolist() == pytest.approx([5 / 8, 4 / 6, 6 / 8, 5 / 6])  # one pixel has an area
    assert segments.boxes[1, 0].tolist() == [0, 0, 1, 1] and segments.boxes[1, 1].tolist() == [0, 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------- full sizes


def test_the_running_maximum_is_the_argmax_of_the_whole():
    semantic = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 6, 7, 8)).astype(np.float32))
    geometry = Geometry(np.eye(4), (9, 13, 6), (1.0, 1.0, 1.0))
    whole = F.interpolate(semantic[None], size=geometry.shape, mode="trilinear", align_corners=False)[0].argmax(0)
    found = data.to_native(semantic, geometry)
    assert found.dtype == np.uint8 and np.array_equal(found, whole.numpy())
    assert np.array_equal(data.to_native(semantic.numpy() - 100, geometry), found)  # no scale is assumed


def test_default_preset_fits_the_median_prepared_case(cached, tmp_path):
    source, plan, cache = cached
    preset = data.default_preset(source, plan, cache)
    assert preset.patch_size == (8, 12, 12) and preset.encoder_size == (48, 48)
    assert preset.num_queries >= len(plan.labels) and preset.labels == plan.labels
    large = np.zeros((20, 300, 100), np.uint8)
    cases, plan, cache = one_case(tmp_path / "large", large.astype(np.float32), large, plan_for())
    source = dataclasses.replace(source, splits={"train": cases})
    assert data.default_preset(source, plan, cache).patch_size == (8, 256, 100)
    assert data.default_preset(source, plan, cache).encoder_size == (1024, 400)


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.skipif(not ACDC.is_dir(), reason="the ACDC volumes are not beside the repository")
def test_acdc_on_disk():
    source = data.find_data("acdc", str(ACDC))
    assert {name: len(cases) for name, cases in source.splits.items()} == {"train": 140, "val": 20}
    assert "patient090_frame04" in {case.name for case in source.splits["val"]}
    few = dataclasses.replace(source, splits={"train": source.splits["train"][:2], "val": source.splits["val"][:2]})
    assert data.check_source(few) == []
    plan = data.make_plan(source)
    assert plan.spacing[0] is None and 1.3 < plan.spacing[1] < 1.7
    for case in few.splits["val"]:
        prepared = data.prepare_case(case, plan)
        truth, _ = data.read_label(case, 4)
        back = data.to_native(one_hot(prepared.label, 4), prepared.geometry)
        assert prepared.image.shape[1] == truth.shape[0]  # slices kept
        # A muscle ring of five pixels at 1.4 mm: nearest labels cost it about 0.013 of Dice on average.
        assert min(dice(back, truth, k) for k in (1, 3)) > 0.97 and dice(back, truth, 2) > 0.95


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus volumes are not beside the repository")
def test_hippocampus_on_disk():
    source = data.find_data(str(HIPPOCAMPUS))
    assert {name: len(cases) for name, cases in source.splits.items()} == {"train": 160, "val": 40}
    assert source.labels[1:] == ("anterior", "posterior") or len(source.labels) == 3
    assert data.check_source(source) == []
    assert np.allclose(data.make_plan(source).spacing, 1.0)
