"""Layouts, splits and folds of the presets and of any folder."""

from pathlib import Path

import numpy as np
import pytest

import data
from support import layouts
from support.layouts import Case, find_data
from support.presets import PRESETS
from volumes import acdc_tree, decathlon, plan_for, save


def touch(base: Path, *files: str) -> None:
    for file in files:
        save(base / file, np.zeros((1, 1, 1), np.uint8))


def refuses(match: str, function, *arguments) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        function(*arguments)


def names(data_name: str, root: Path | None = None, fold: int | None = None) -> dict[str, list[str]]:
    source = find_data(data_name, root and str(root), fold)
    return {split: [case.name for case in cases] for split, cases in source.splits.items()}


def test_acdc_has_the_papers_split(tmp_path):
    acdc_tree(tmp_path / "database")
    splits, folds = names("acdc", tmp_path), [names("acdc", tmp_path, fold) for fold in range(5)]
    found = {split: sorted({int(name[7:10]) for name in cases}) for split, cases in splits.items()}
    assert found["test"] == [2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95]
    assert found["val"] == [89, 90, 91, 93, 94, 96, 97, 98, 99, 100]
    assert sorted(sum(found.values(), [])) == list(range(1, 101))
    assert sorted(sum((fold["val"] for fold in folds), [])) == sorted(splits["train"] + splits["val"])
    for fold in folds:  # both frames of a patient stay together, and no test patient is trained on
        held_out, trained_on = ({name[:10] for name in fold[split]} for split in ("val", "train"))
        assert fold["test"] == splits["test"] and not held_out & trained_on and len(held_out) == 16


def test_acdc_frames_come_from_info_cfg_and_testing_labels_may_be_hidden(tmp_path):
    acdc_tree(tmp_path, (1, 90, 101))
    touch(tmp_path, "testing/patient101/patient101_frame12_gt.nii.gz")
    touch(tmp_path, "training/patient090/patient090_frame01.nii.gz")  # a decoy
    splits = find_data("acdc", str(tmp_path)).splits
    assert [case.name for case in splits["val"]] == ["patient090_frame04", "patient090_frame11"]
    diastole, systole = splits["testing"]
    assert diastole.label is None and systole.label.endswith("patient101/patient101_frame12_gt.nii.gz")
    assert systole.aliases == ("patient101_ES",)
    for file in tmp_path.glob("training/*/Info.cfg"):
        file.write_text("ED: 1\n")
    refuses("patient001/Info.cfg: found 'ED: 1.*\n.*patient090/Info.cfg", find_data, "acdc", str(tmp_path))


def test_synapse_has_transunets_split_less_three_and_amos_takes_ct_alone(tmp_path):
    base = tmp_path / "Abdomen/RawData/Training"
    files = [f"img/img{number:04d}.nii.gz" for number in (*range(1, 11), *range(21, 41))]
    touch(base, *files, "../Testing/img/img0061.nii.gz")
    splits = find_data("synapse", str(tmp_path)).splits
    found = {split: [int(case.name[4:]) for case in cases] for split, cases in splits.items()}
    assert found["test"] == [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert found["val"] == [27, 34, 40] and len(found["train"]) == 15
    assert splits["test"][0].label == str(base / "label/label0001.nii.gz")
    assert splits["testing"][0].label is None and splits["testing"][0].aliases == ("label0061", "img0061")
    for part, numbers in (("Tr", [*range(1, 11), 501, 507]), ("Va", (45, 46, 599))):
        touch(tmp_path, *(f"amos22/images{part}/amos_{number:04d}.nii.gz" for number in numbers))
    folds = [names("amos", tmp_path, fold) for fold in (None, 0, 4)]
    assert folds[0] == folds[1] and folds[2]["test"] == ["amos_0045", "amos_0046"]
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(8, 2)] * 3


def test_a_missing_phantom_is_written_and_other_missing_data_print_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layouts, "write_phantom", lambda root: acdc_tree(root, range(1, 35)))
    splits = names("phantom")
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 48, "val": 8, "test": 12}
    assert names("phantom") == splits  # a second call of `acdc_tree` would fail
    for name, root in (("acdc", "nothing"), ("synapse", "."), ("amos", ".")):  # no folder, and an empty one
        with pytest.raises(FileNotFoundError) as raised:
            find_data(name, root)
        assert all(text in str(raised.value) for text in (root, PRESETS[name].home, PRESETS[name].tree))


def test_folders_split_the_same_way_every_time_or_by_their_splits_final(tmp_path):
    root, file = str(decathlon(tmp_path / "set")), tmp_path / "set/splits_final.json"
    folds = [names(root, fold=fold) for fold in (None, 0, 1, 2, 3, 4)]
    assert folds[0] == folds[1] and all(len(fold["train"]) == 4 for fold in folds)
    assert sorted(sum((fold["val"] for fold in folds[1:]), [])) == [f"case_{i}" for i in range(5)]
    refuses("--fold 5: expected 0 to 4", find_data, root, None, 5)
    file.write_text('[{}, {"train": ["case_4", "case_0"], "val": ["case_2"]}]')
    assert names(root, fold=1) == {"train": ["case_4", "case_0"], "val": ["case_2"]}
    for wrong in ('[{"train": ["case_9"]}]', '[{"train": ["case_1"]}]', '[{"train": [], "val": []}]', "[]"):
        file.write_text(wrong)
        refuses("splits_final.json: found", find_data, root)


def test_nnunet_folders_with_two_channels(tmp_path):
    for i, channel in ((0, 0), (0, 1), (1, 0), (1, 1)):
        save(tmp_path / f"imagesTr/p{i}_{channel:04d}.nii.gz", np.full((4, 4, 4), 10.0 * channel + i))
        save(tmp_path / f"labelsTr/p{i}.nii.gz", np.zeros((4, 4, 4), np.uint8))
    content = '{"labels": {"left lobe": 1, "background": 0}, "channel_names": {"0": "CT", "1": "PET"}}'
    (tmp_path / "dataset.json").write_text(content)
    source = find_data(str(tmp_path))
    assert source.task.labels == ("background", "left lobe") and source.task.channels == ("CT", "PET")
    assert source.task.modality == "CT" and source.task.flip_axes == ()  # left stays left
    plan = plan_for(2, intensity=((-99.0, 99.0, 0.0, 1.0),) * 2, channels=("CT", "PET"))
    image = data.prepare_case(source.splits["val"][0], plan).image
    assert image[1].min() == image[1].max() == image[0].min() + 10 == image[0].max() + 10
    refuses("found 2 channels, expected", data.prepare_case, source.splits["val"][0], plan_for(2))


def test_an_unusable_folder_says_what_is_expected(tmp_path):
    for text in ("{", '{"labels": {"0": "a"}}', '{"labels": {"0": "a", "2": "b"}, "modality": {"0": "MR"}}'):
        (tmp_path / "dataset.json").write_text(text)
        refuses("dataset.json: found .* expected labels 0, 1, 2", find_data, str(tmp_path))
    refuses("neither a preset .* dataset.json", find_data, "acdcc")
    refuses("found 1 cases, expected two", find_data, str(decathlon(tmp_path / "one", 1)))


def test_images_without_labels_are_grouped_by_case_and_channel(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii")
    cases = layouts.find_images(tmp_path, 2)
    assert [(case.name, len(case.images), case.label) for case in cases] == [("a", 2, None), ("b", 2, None)]
    (tmp_path / "b_0001.nii").unlink()
    refuses("of b, expected b_0000.nii.gz b_0001.nii.gz", layouts.find_images, tmp_path, 2)
    touch(tmp_path, "a.nii.gz")
    refuses("as channel 0 of a too, expected one file", layouts.find_images, tmp_path, 1)


def test_boxes_come_from_the_truth_or_from_another_programs_folder(tmp_path):
    cases = (Case("a", ("a.nii",), "truth.nii", ("label1",)), Case("b", ("b.nii",), None))
    assert layouts.with_box_source(cases[:1], "gt")[0].box_source == "truth.nii"
    refuses("--prompts gt: found no label of b", layouts.with_box_source, cases, "gt")
    touch(tmp_path, "label1.nii.gz", "b.nii", "other.nii.gz")
    files = [case.box_source for case in layouts.with_box_source(cases, str(tmp_path))]
    assert files == [str(tmp_path / "label1.nii.gz"), str(tmp_path / "b.nii")]
    touch(tmp_path, "b.nii.gz")
    refuses("^2 problems", layouts.find_predictions, cases, tmp_path)
