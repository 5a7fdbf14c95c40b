"""Layouts, splits and folds of the presets and of any folder."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import data
from support import layouts
from support.layouts import PRESETS
from volumes import acdc_tree, decathlon, patients, plan_for, save, touch


@pytest.mark.parametrize("level", ["", "database"])
def test_acdc_has_the_papers_split(tmp_path, level):
    acdc_tree(tmp_path / level)
    splits = layouts.find_data("acdc", str(tmp_path)).splits
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
    splits = layouts.find_data("acdc", str(tmp_path)).splits
    assert [case.name for case in splits["val"]] == ["patient090_frame04", "patient090_frame11"]
    assert splits["val"][0].label.endswith("patient090/patient090_frame04_gt.nii.gz")
    diastole, systole = splits["testing"]
    assert diastole.label is None and systole.label.endswith("_frame12_gt.nii.gz")


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
    splits = layouts.find_data("synapse", str(tmp_path)).splits
    numbers = {name: [int(case.name[4:]) for case in cases] for name, cases in splits.items()}
    assert numbers["test"] == [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert numbers["val"] == [27, 34, 40]
    assert numbers["train"] == [5, 6, 7, 9, 10, 21, 23, 24, 26, 28, 30, 31, 33, 37, 39]
    assert splits["test"][0].label == str(base / "label/label0001.nii.gz")
    assert layouts.find_data("synapse", str(base)).splits["test"] == splits["test"]
    touch(base.parent / "Testing/img/img0061.nii.gz")
    (hidden,) = layouts.find_data("synapse", str(tmp_path)).splits["testing"]
    assert hidden.label is None and hidden.aliases == ("label0061", "img0061")


def test_amos_takes_ct_alone_and_tests_on_its_validation_folder(tmp_path):
    for number in [*range(1, 21), 501, 507]:
        touch(tmp_path / f"amos22/imagesTr/amos_{number:04d}.nii.gz")
    for number in (25, 26, 599):
        touch(tmp_path / f"amos22/imagesVa/amos_{number:04d}.nii.gz")
    splits = layouts.find_data("amos", str(tmp_path)).splits
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
            layouts.find_data(name, str(root))
        assert all(text in str(raised.value) for text in (str(root), PRESETS[name].home, PRESETS[name].tree))


def test_the_phantom_is_written_on_first_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = layouts.find_data("phantom").splits
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 48, "val": 8, "test": 12}
    written = (tmp_path / "data/phantom/training/patient001/Info.cfg").stat().st_mtime_ns
    assert layouts.find_data("phantom").splits == splits
    assert (tmp_path / "data/phantom/training/patient001/Info.cfg").stat().st_mtime_ns == written


def test_folders_split_the_same_way_every_time(tmp_path):
    root = decathlon(tmp_path / "set", 11)
    splits = [layouts.find_data(str(root)).splits for _ in range(2)]
    assert splits[0] == splits[1]
    assert len(splits[0]["train"]) == 8 and len(splits[0]["val"]) == 3
    assert not set(splits[0]["train"]) & set(splits[0]["val"])
    two = layouts.find_data(str(decathlon(tmp_path / "two", 2))).splits
    assert len(two["train"]) == len(two["val"]) == 1


def fold_of(root: Path, data: str, fold: int | None) -> dict[str, set[str]]:
    splits = layouts.find_data(data, str(root), fold=fold).splits
    return {name: {case.name for case in cases} for name, cases in splits.items()}


def test_five_folds_hold_out_every_acdc_patient_once_with_both_frames_and_never_a_test_patient(tmp_path):
    acdc_tree(tmp_path)
    published = fold_of(tmp_path, "acdc", None)
    folds = [fold_of(tmp_path, "acdc", fold) for fold in range(5)]
    assert all(fold["test"] == published["test"] for fold in folds)
    assert sorted(sum((sorted(fold["val"]) for fold in folds), [])) == sorted(published["train"] | published["val"])
    for fold in folds:
        held_out, trained_on = ({name[:10] for name in fold[split]} for split in ("val", "train"))
        assert not held_out & trained_on and len(fold["val"]) == 2 * len(held_out) == 32


def test_amos_shuffles_five_folds_and_a_folder_too(tmp_path):
    for number in range(1, 41):
        touch(tmp_path / f"amos22/imagesTr/amos_{number:04d}.nii.gz")
    folds = [fold_of(tmp_path, "amos", fold) for fold in (None, 0, 1, 2, 3, 4)]
    assert folds[0] == folds[1] and [len(fold["val"]) for fold in folds] == [8] * 6
    assert len(set().union(*(fold["val"] for fold in folds))) == 40
    root = decathlon(tmp_path / "set", 11)
    held_out = [layouts.find_data(str(root), fold=fold).splits["val"] for fold in range(5)]
    assert sorted(case.name for cases in held_out for case in cases) == sorted(f"case_{i}" for i in range(11))


@pytest.mark.parametrize("fold", [-1, 5, 3])
def test_there_is_no_other_fold(tmp_path, fold):
    root = decathlon(tmp_path / "set", 3)
    with pytest.raises(ValueError, match=f"--fold {fold}: expected 0 to 2"):
        layouts.find_data(str(root), fold=fold)


def test_splits_final_decides_where_it_is(tmp_path):
    root = decathlon(tmp_path / "set")
    folds = [{"train": ["case_4", "case_0"], "val": ["case_2"]}, {"train": ["case_2"], "val": ["case_4"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    splits = layouts.find_data(str(root)).splits
    assert [[case.name for case in splits[name]] for name in ("train", "val")] == [["case_4", "case_0"], ["case_2"]]
    for wrong in ([{"train": ["case_9"], "val": ["case_2"]}], [{"train": ["case_1"]}], [],
                  [{"train": ["case_1"], "val": []}]):  # fmt: skip
        (root / "splits_final.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="splits_final.json: found"):
            layouts.find_data(str(root))
    (root / "splits_final.json").write_text(json.dumps(folds))
    assert [case.name for case in layouts.find_data(str(root), fold=1).splits["val"]] == ["case_4"]
    with pytest.raises(ValueError, match="splits_final.json: found 2 folds, expected one of the number 2"):
        layouts.find_data(str(root), fold=2)


def test_nnunet_folders_with_two_channels(tmp_path):
    for i, channel in itertools.product(range(3), range(2)):
        save(tmp_path / f"imagesTr/p{i}_{channel:04d}.nii.gz", np.full((4, 4, 4), 10 * channel + i, np.float32))
    for i in range(3):
        save(tmp_path / f"labelsTr/p{i}.nii.gz", np.zeros((4, 4, 4), np.uint8))
    facts = {"labels": {"left lobe": 1, "background": 0}, "channel_names": {"0": "CT", "1": "PET"}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    source = layouts.find_data(str(tmp_path))
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
        layouts.find_data(str(tmp_path))


def test_neither_preset_nor_folder_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a preset .* dataset.json"):
        layouts.find_data(str(tmp_path / "acdcc"))
    root = decathlon(tmp_path / "empty", 0)
    with pytest.raises(FileNotFoundError, match="found 0 cases, expected two or more"):
        layouts.find_data(str(root))
