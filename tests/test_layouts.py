"""Layouts, splits and folds of the presets and of any folder."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import data
from support import layouts
from support.layouts import Case
from support.presets import PRESETS
from volumes import acdc_tree, decathlon, plan_for, save, touch


def names(data_name: str, root: Path, fold: int | None = None) -> dict[str, list[str]]:
    splits = layouts.find_data(data_name, str(root), fold).splits
    return {split: [case.name for case in cases] for split, cases in splits.items()}


@pytest.mark.parametrize("level", ["", "database"])
def test_acdc_has_the_papers_split(tmp_path, level):
    acdc_tree(tmp_path / level)
    splits = names("acdc", tmp_path)
    found = {split: sorted({int(name[7:10]) for name in cases}) for split, cases in splits.items()}
    assert found["test"] == [2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95]
    assert found["val"] == [89, 90, 91, 93, 94, 96, 97, 98, 99, 100]
    assert sorted(sum(found.values(), [])) == list(range(1, 101))
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 140, "val": 20, "test": 40}


def test_acdc_frames_come_from_info_cfg_and_testing_labels_may_be_hidden(tmp_path):
    acdc_tree(tmp_path, [1, 90])
    touch(tmp_path / "training/patient090/patient090_frame01.nii.gz")  # a decoy
    acdc_tree(tmp_path, [101], "testing")
    touch(tmp_path / "testing/patient101/patient101_frame12_gt.nii.gz")
    splits = layouts.find_data("acdc", str(tmp_path)).splits
    assert [case.name for case in splits["val"]] == ["patient090_frame04", "patient090_frame11"]
    assert splits["val"][0].label.endswith("patient090/patient090_frame04_gt.nii.gz")
    diastole, systole = splits["testing"]
    assert diastole.label is None and systole.label.endswith("_frame12_gt.nii.gz")
    assert systole.aliases == ("patient101_ES",)


def test_every_acdc_patient_without_frames_is_listed(tmp_path):
    acdc_tree(tmp_path, range(80, 100))
    (tmp_path / "training/patient083/Info.cfg").unlink()
    (tmp_path / "training/patient085/Info.cfg").write_text("ED: 1\n")
    with pytest.raises(ValueError) as raised:
        layouts.find_data("acdc", str(tmp_path))
    first, second = str(raised.value).splitlines()
    assert "patient083/Info.cfg: found 'no such file', expected" in first and "patient085" in second


def test_synapse_has_transunets_split_less_three(tmp_path):
    base = tmp_path / "Abdomen/RawData/Training"
    for number in [*range(1, 11), *range(21, 41)]:
        touch(base / f"img/img{number:04d}.nii.gz")
    touch(base.parent / "Testing/img/img0061.nii.gz")
    found = {split: [int(name[4:]) for name in cases] for split, cases in names("synapse", tmp_path).items()}
    assert found["test"] == [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38] and found["val"] == [27, 34, 40]
    assert found["train"] == [5, 6, 7, 9, 10, 21, 23, 24, 26, 28, 30, 31, 33, 37, 39]
    splits = layouts.find_data("synapse", str(tmp_path)).splits
    assert splits["test"][0].label == str(base / "label/label0001.nii.gz")
    assert splits["testing"][0].label is None and splits["testing"][0].aliases == ("label0061", "img0061")
    assert layouts.find_data("synapse", str(base)).splits["test"] == splits["test"]


def test_amos_takes_ct_alone_and_tests_on_its_validation_folder(tmp_path):
    for part, numbers in (("Tr", [*range(1, 41), 501, 507]), ("Va", (45, 46, 599))):
        for number in numbers:
            touch(tmp_path / f"amos22/images{part}/amos_{number:04d}.nii.gz")
    folds = [names("amos", tmp_path, fold) for fold in (None, 0, 1, 2, 3, 4)]
    assert folds[0] == folds[1] and folds[0]["test"] == ["amos_0045", "amos_0046"]
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(32, 8)] * 6
    assert len(set().union(*(fold["val"] for fold in folds))) == 40
    case = layouts.find_data("amos", str(tmp_path)).splits["test"][1]
    assert case.label == str(tmp_path / "amos22/labelsVa/amos_0046.nii.gz")


@pytest.mark.parametrize("name", ["acdc", "synapse", "amos"])
def test_missing_data_prints_where_to_get_it_and_the_tree(tmp_path, name):
    for root in (tmp_path / "nothing", tmp_path):  # no folder, and an empty one
        with pytest.raises(FileNotFoundError) as raised:
            layouts.find_data(name, str(root))
        assert all(text in str(raised.value) for text in (str(root), PRESETS[name].home, PRESETS[name].tree))


def test_the_phantom_is_written_on_first_use_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layouts, "write_phantom", lambda root: acdc_tree(root, range(1, 35)))
    splits = names("phantom", None)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 48, "val": 8, "test": 12}
    assert names("phantom", None) == splits  # a second call of `acdc_tree` would fail


def test_five_folds_hold_out_every_acdc_patient_once_with_both_frames_and_never_a_test_patient(tmp_path):
    acdc_tree(tmp_path)
    published, folds = names("acdc", tmp_path), [names("acdc", tmp_path, fold) for fold in range(5)]
    assert all(fold["test"] == published["test"] for fold in folds)
    assert sorted(sum((fold["val"] for fold in folds), [])) == sorted(published["train"] + published["val"])
    for fold in folds:
        held_out, trained_on = ({name[:10] for name in fold[split]} for split in ("val", "train"))
        assert not held_out & trained_on and len(fold["val"]) == 2 * len(held_out) == 32


def test_folders_split_the_same_way_every_time(tmp_path):
    root = decathlon(tmp_path / "set", 11)
    folds = [names(str(root), None, fold) for fold in (None, 0, 1, 2, 3, 4)]
    assert folds[0] == folds[1] and len(folds[0]["train"]) == 8 and len(folds[0]["val"]) == 3
    assert sorted(sum((fold["val"] for fold in folds[1:]), [])) == sorted(f"case_{i}" for i in range(11))
    two = names(str(decathlon(tmp_path / "two", 2)), None)
    assert len(two["train"]) == len(two["val"]) == 1
    for fold in (-1, 2, 5):
        with pytest.raises(ValueError, match=f"--fold {fold}: expected 0 to 1"):
            layouts.find_data(str(tmp_path / "two"), fold=fold)


def test_splits_final_decides_where_it_is(tmp_path):
    root = decathlon(tmp_path / "set")
    file = root / "splits_final.json"
    folds = [{"train": ["case_4", "case_0"], "val": ["case_2"]}, {"train": ["case_2"], "val": ["case_4"]}]
    file.write_text(json.dumps(folds))
    assert [names(str(root), None, fold) for fold in range(2)] == folds
    with pytest.raises(ValueError, match="splits_final.json: found 2 folds"):
        layouts.find_data(str(root), fold=2)
    empty = [{"train": ["case_1"], "val": []}]
    for wrong in ([{"train": ["case_9"], "val": ["case_2"]}], [{"train": ["case_1"]}], [], empty):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="splits_final.json: found"):
            layouts.find_data(str(root))


def test_nnunet_folders_with_two_channels(tmp_path):
    for i, channel in itertools.product(range(3), range(2)):
        image = np.full((4, 4, 4), 10 * channel + i, np.float32)
        save(tmp_path / f"imagesTr/p{i}_{channel:04d}.nii.gz", image)
        save(tmp_path / f"labelsTr/p{i}.nii.gz", np.zeros((4, 4, 4), np.uint8))
    content = {"labels": {"left lobe": 1, "background": 0}, "channel_names": {"0": "CT", "1": "PET"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    source = layouts.find_data(str(tmp_path))
    assert source.task.labels == ("background", "left lobe") and source.task.channels == ("CT", "PET")
    assert source.task.modality == "CT" and source.task.flip_axes == ()  # left stays left
    data.check_source(source)
    case = source.splits["val"][0]
    plan = plan_for(2, intensity=((-99.0, 99.0, 0.0, 1.0),) * 2, channels=("CT", "PET"))
    image, number = data.prepare_case(case, plan).image, int(case.name[1])
    assert (image[0] == number).all() and (image[1] == 10 + number).all()
    with pytest.raises(ValueError, match="found 2 channels, expected"):
        data.prepare_case(case, plan_for(2))
    Path(case.images[1]).unlink()
    with pytest.raises(ValueError, match=f"1 problems in .*\n{case.images[1]}: found no such file"):
        data.check_source(source)


WRONG_JSON = ["{", "{}", '{"labels": {"0": "a", "2": "b"}, "modality": {"0": "MR"}}']
WRONG_JSON += [
    '{"labels": {"a": 0, "b": [1, 2]}, "channel_names": {"0": "MR"}}',
    '{"labels": {"0": "a", "1": "b"}}',
]


@pytest.mark.parametrize("text", WRONG_JSON)
def test_an_unusable_dataset_json_says_what_is_expected(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="dataset.json: found .* expected labels 0, 1, 2"):
        layouts.find_data(str(tmp_path))


def test_neither_preset_nor_folder_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a preset .* dataset.json"):
        layouts.find_data(str(tmp_path / "acdcc"))
    with pytest.raises(FileNotFoundError, match="found 0 cases, expected two"):
        layouts.find_data(str(decathlon(tmp_path / "empty", 0)))


def test_images_without_labels_are_grouped_by_case_and_channel(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        touch(tmp_path / f"two/{name}.nii.gz")
    cases = layouts.find_images(tmp_path / "two", 2)
    assert [(case.name, len(case.images), case.label) for case in cases] == [("a", 2, None), ("b", 2, None)]
    (tmp_path / "two/b_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="of b, expected b_0000.nii.gz b_0001.nii.gz"):
        layouts.find_images(tmp_path / "two", 2)
    touch(tmp_path / "one/c.nii.gz")
    assert layouts.find_images(tmp_path / "one", 1)[0].name == "c"
    touch(tmp_path / "one/c_0000.nii.gz")
    with pytest.raises(ValueError, match="as channel 0 of c too, expected one file"):
        layouts.find_images(tmp_path / "one", 1)
    with pytest.raises(FileNotFoundError, match="found no .nii or .nii.gz files"):
        layouts.find_images(tmp_path, 1)


def test_boxes_come_from_the_truth_or_from_another_programs_folder(tmp_path):
    cases = (Case("a", ("a.nii",), "truth.nii", ("label1",)), Case("b", ("b.nii",), None))
    assert layouts.with_box_source(cases, "auto") == cases
    assert layouts.with_box_source(cases[:1], "gt")[0].box_source == "truth.nii"
    with pytest.raises(ValueError, match="--prompts gt: found no label of b"):
        layouts.with_box_source(cases, "gt")
    folder = tmp_path / "their maps"
    for name in ("label1.nii.gz", "b.nii", "other.nii.gz"):
        touch(folder / name)
    files = [case.box_source for case in layouts.with_box_source(cases, str(folder))]
    assert files == [str(folder / "label1.nii.gz"), str(folder / "b.nii")]
    touch(folder / "b.nii.gz")
    with pytest.raises(FileNotFoundError, match="^2 problems"):  # b twice, and a file of no case
        layouts.find_predictions(cases, folder)
    endings = [layouts.box_source_suffix(where) for where in ("auto", "gt", str(folder))]
    assert endings == ["", "-boxes-gt", f"-boxes-{tmp_path.name}_their_maps"]
