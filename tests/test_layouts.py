"""Layouts, splits and folds of the presets and of any folder."""

import json
import re
from pathlib import Path

import pytest

from support import layouts
from support.layouts import Case, find_data
from support.presets import PRESETS
from volumes import acdc_tree, refuses


def touch(base: Path, *files: str) -> None:
    for file in files:
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        (base / file).touch()


def folder(root: Path, cases: str, images: str | None = None, **content) -> str:
    """Write empty labels CASE and images, those of the labels unless others are given, and dataset.json."""
    touch(root, *(f"labelsTr/{name}.nii.gz" for name in cases.split()))
    touch(root, *(f"imagesTr/{name}.nii.gz" for name in (images or cases).split()))
    content = {"labels": {"0": "background", "1": "a"}, "modality": {"0": "MRI"}} | content
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte-order mark
    return str(root)


def names(*arguments, **options) -> dict[str, list[str]]:
    splits = find_data(*arguments, **options).splits
    return {split: [case.name for case in cases] for split, cases in splits.items()}


def test_acdc_has_the_papers_split(tmp_path):
    acdc_tree(tmp_path / "database")
    splits, folds = names("acdc", tmp_path), [names("acdc", tmp_path, fold) for fold in range(5)]
    found = {split: sorted({int(name[7:10]) for name in cases}) for split, cases in splits.items()}
    assert found["test"] == [2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95]
    assert found["val"] == [89, 90, 91, 93, 94, 96, 97, 98, 99, 100]
    assert sorted(sum(found.values(), [])) == list(range(1, 101))
    for fold in folds:  # of patients, each with both frames; no test patient is trained on
        assert fold["test"] == splits["test"] and len({name[:10] for name in fold["val"]}) == 16
    source = find_data("acdc", tmp_path, "all")  # val is trained on too, and test is not
    parts = {split: {*cases} for split, cases in source.splits.items()}
    assert parts["val"] < parts["train"] and parts["train"] | parts["test"] == {*source.cases}
    assert len(source.cases) == 200 and "The 20 cases of val are trained on too" in source.notes[-1]
    refuses("--group .* found the published split of acdc", find_data, "acdc", tmp_path, group="(.)")
    refuses("Info.cfg: found a patient of acdc.* --data acdc", find_data, "phantom", tmp_path)
    for number in ("001", "090"):  # both are listed
        (tmp_path / f"database/training/patient{number}/Info.cfg").write_text("ED: 1\n")
    refuses("patient001/Info.cfg: found 'ED: 1.*\n.*patient090/Info.cfg", find_data, "acdc", tmp_path)


def test_synapse_has_transunets_split_less_three_and_amos_takes_ct_alone(tmp_path):
    base = tmp_path / "Abdomen/RawData/Training"
    files = [f"img/img{number:04d}.nii.gz" for number in (*range(1, 11), *range(21, 41))]
    touch(base, *files, "../Testing/img/img0061.nii.gz")
    splits = find_data("synapse", tmp_path).splits
    found = {split: [int(case.name[4:]) for case in cases] for split, cases in splits.items()}
    assert found["test"] == [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert found["val"] == [27, 34, 40] and len(found["train"]) == 15
    assert splits["test"][0].label == str(base / "label/label0001.nii.gz")
    for part, numbers in (("Tr", [*range(1, 11), 501, 507]), ("Va", (45, 46, 500, 599))):
        touch(tmp_path, *(f"amos22/images{part}/amos_{number:04d}.nii" for number in numbers))
    assert find_data("amos", tmp_path).notes[0].startswith("3 cases with ids above 500, which are MR, are")
    folds = [names("amos", tmp_path, fold) for fold in (None, 0, 4)]
    assert folds[0] == folds[1] and folds[2]["test"] == ["amos_0045", "amos_0046", "amos_0500"]
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(8, 2)] * 3


def test_a_missing_phantom_is_written_and_other_missing_data_print_where_to_get_it(monkeypatch):
    def write_phantom(root: Path) -> None:  # a second call would fail
        acdc_tree(root / "database", range(1, 35))
        for file in root.rglob("Info.cfg"):
            file.write_text("ED: 1\nES: 12\nGroup: SYN")

    monkeypatch.setattr(layouts, "write_phantom", write_phantom)
    for splits in (names("phantom"), names("phantom")):
        assert [len(splits[split]) for split in ("train", "val", "test")] == [48, 8, 12]
    for name, root in (("acdc", "nothing"), ("synapse", "."), ("amos", ".")):  # no folder, and an empty one
        expected = re.escape(f"{PRESETS[name].home}:\n{PRESETS[name].tree}")
        refuses(f"{root}: found no cases of {name}, expected a folder .*{expected}", find_data, name, root)


def test_folders_split_the_same_way_every_time_or_by_their_splits_final_and_name_what_is_not_read(tmp_path):
    root = folder(tmp_path, "a b c d e", regions_class_order=[1], training=["x"])
    folds = [names(root, fold=fold) for fold in (0, 1, 2, 3, 4)]
    assert folds[0] == names(root) and sorted(fold["val"][0] for fold in folds) == [*"abcde"]
    assert "not read: regions_class_order. dataset.json lists 1 training" in " ".join(find_data(root).notes)
    (tmp_path / "splits_final.json").write_text('[{}, {"train": ["e", "a"], "val": ["c"]}]')
    assert names(root, fold=1) == {"train": ["e", "a"], "val": ["c"]}
    assert "2 cases are not used: they are in no part" in find_data(root, fold=1).notes[1]
    assert [len(find_data(folder(tmp_path / n, "a b", numTraining=n)).notes) for n in "23"] == [1, 2]
    refuses("--fold: found 7, expected 0 to 1", find_data, str(tmp_path / "2"), fold=7)
    refuses("--root x: found beside the folder", find_data, root, "x")
    refuses("neither a preset .* dataset.json", find_data, "acdcc")
    refuses("found 1 cases, expected two", find_data, folder(tmp_path / "one", "a"))


GOOD = '{"labels": {"a": 0, "b": 1}'
UNUSABLE = {  # a list is a splits_final.json, all others are a dataset.json -> what is found
    "[]": "null as fold 0", '[{"train": ["a"]}]': "{", '[{"train": [], "val": ["b"]}]': "{",
    '[{"train": "a", "val": "b"}]': "{", '[{"train": ["a"], "val": ["b"], "test": ["c"]}]': "{",
    '[{"train": ["a"], "val": ["x"]}]': '"x" in fold 0', '[{"train": ["a"], "val": ["a"]}]': '"a" in fold 0',
    '[{"train": ["a", [7]], "val": ["b"]}]': r"\[7\] in fold 0", "{": "no JSON in UTF-8, line 1",
    '{"labels": {"0": "b", "1": "a", "1": "c"}}': "a key twice among 0, 1, 1", "7": "no label with the id 0",
    '{"labels": {"0": "a"}}': "no label with the id 1", GOOD + ', "modality": "CT"}': 'the channels "CT"',
    '{"labels": {"a": 0, "b": 1, "whole": [0, 1]}}': r'the label "whole" with the id \[0, 1\], .*no regions',
    '{"labels": {"a": 0, "b": 1, "Ignore": 2}}': 'the label "Ignore" with the id 2, expected .*no ignore',
    '{"labels": {"a": 0, "b": 1.5}}': ".* with the id 1.5", '{"labels": {"a": true}}': '.*"a" .* true',
    '{"labels": {"a": 0, "b": 256}}': ".* with the id 256", '{"labels": {"a": 0, "b": 0}}': '.*"b" with',
    '{"labels": {"0": "a", "1": 5}}': "the label 5 with", '{"labels": {"0": " "}}': 'the label " " with',
    '{"labels": {"0": "a", "1": "a"}}': '.* with the id "1"', '{"labels": {"a": 0, "b": 2}}': ".*id 1, exp",
    '{"labels": {"0": "a", "1": "background"}}': '.*round" with', GOOD + ', "modality": {"1": ""}}': ".*s {",
}  # fmt: skip


@pytest.mark.parametrize("text", UNUSABLE)
def test_an_unusable_dataset_json_or_splits_final_is_refused_with_what_is_wrong(tmp_path, text):
    root, file = folder(tmp_path, "a b c"), "splits_final.json" if text[0] == "[" else "dataset.json"
    (tmp_path / file).write_text(text)
    refuses(f"{file}: found {UNUSABLE[text]}", find_data, root)


@pytest.mark.parametrize("name, expected", [
    ("CT", "CT"), ("CT_portal", "CT"), ("CTA", "CT"), ("Computed  Tomography", "CT"), ("t1ct", "MR"),
    ("active", "MR"), ("zscore", "MR"), ("nonorm", "noNorm"), ("rgb_to_0_1", "rgb_to_0_1"),
])  # fmt: skip
def test_the_modality_is_decided_for_each_channel_and_flips_never_by_names(tmp_path, name, expected):
    labels, channels = {"left lobe": 1, "background": 0}, {"0": "PET", "1": name}
    root = folder(tmp_path, "p q", "p_0000 p_0001 q_0000 q_0001", labels=labels, channel_names=channels)
    task, notes = find_data(root).task, find_data(root).notes
    assert task.labels == ("background", "left lobe") and task.flip_axes is None
    assert task.modality == ("MR", expected) and f"PET as MR, {name} as {expected}" in notes[0]
    assert find_data(root, modality=["ct"]).task.modality == ("CT", "CT")
    assert [find_data(root, flip=flip).task.flip_axes for flip in ([], ["W", "D"])] == [(), (0, 2)]
    for wrong in (["PT"], ["CT"] * 3):
        refuses(f"--modality: found {wrong[0]}.* each of 2, of CT, MR", find_data, root, modality=wrong)


@pytest.mark.parametrize("scans", [
    "patient#_frame01 patient#_frame12", "ED_A#S9V9_sa ES_A#S9V9_sa", "a#_t0 a#_t1", "v1-# v2-#",
    "#a_visit #a_visit2", "sub-#_ses-01_T1w sub-#_ses-02_T1w", "k#.tp1 k#.tp-2", "#_baseline #_follow-up",
])  # fmt: skip
def test_cases_of_a_patient_stay_together(tmp_path, scans):
    patient = {name: i for i in range(10) for name in scans.replace("#", str(i)).split()}
    root = folder(tmp_path, " ".join(patient))
    for fold in range(5):
        train, val = ({patient[name] for name in part} for part in names(root, fold=fold).values())
        assert len(train) == 8 and len(val) == 2 and not train & val
    assert "20 cases are of 10 patients by their names" in find_data(root).notes[-1]


def test_a_pattern_overrides_the_guess_of_patients(tmp_path):
    root = folder(tmp_path, " ".join(f"{site}{i}_x" for site in "abcde" for i in range(2)))
    assert [len(names(root, fold=fold, group="^(.)")["val"]) for fold in range(5)] == [2] * 5
    assert "10 cases are of 5 patients by the pattern ^(.)" in find_data(root, group="^(.)").notes[-1]
    for wrong in ("(", "x", "(a)(.)", "(a)", "(.*?)", "a{99999999999}"):
        refuses("--group .*: found no patient in [ab]0_x, expected a pattern", find_data, root, group=wrong)
    refuses(r"--group \(x\): found one patient, x", find_data, root, group="(x)")
    (tmp_path / "splits_final.json").write_text('[{"train": ["a0_x", "b0_x"], "val": ["a1_x"]}]')
    assert "1 patients, such as a, are in train and in val." in find_data(root, group="^(.)").notes
    stored = find_data(folder(tmp_path / "y", "p1_a p1_b p2_a", patient="^(..)")).notes[-1]  # in dataset.json
    assert "3 cases are of 2 patients by the pattern ^(..)" in stored
    assert names(folder(tmp_path / "x", "x_v0 x_v1"))["val"]  # a guess of one patient is not taken


@pytest.mark.parametrize("files, channels, expected", [
    ("a_0000 a_0001 b_0000 b_0001", 2, {"a": 2, "b": 2}), ("a_0000 b_0000", 1, {"a": 1, "b": 1}),
    ("a b", 2, {"a": 1, "b": 1}), ("a_0000 a_0001 b", 2, {"a": 2, "b": 1}),  # files of four axes
    ("a_0000 b", 1, {"a_0000": 1, "b": 1}), ("a_0000 b_0000", 2, {"a": 2, "b": 2}),  # files are missing
    ("amos_0001 amos_0022 mr_0003", 1, {"amos_0001": 1, "amos_0022": 1, "mr_0003": 1}),
    ("c_0000 c_0001 c_0002", 1, "c_0002.nii.gz of c, expected c_0000; .* rename them, as c-0001"),
    ("p_0000 p_0001 q", 1, "p_0001.nii.gz of p, expected p_0000"), ("", 1, "found no .nii or .nii.gz files"),
])  # fmt: skip
def test_images_are_grouped_by_case_and_channel_or_keep_their_names(tmp_path, files, channels, expected):
    touch(tmp_path, *(f"{name}.nii.gz" for name in files.split()), "._a.nii.gz", "a.txt")
    if isinstance(expected, str):
        return refuses(expected, layouts.find_images, tmp_path, channels)
    cases = layouts.find_images(tmp_path, channels)
    assert {case.name: len(case.images) for case in cases} == expected and not any(c.label for c in cases)
    assert all([*case.images] == sorted(case.images) for case in cases)


def test_a_folder_may_mix_files_and_channels_and_hide_the_labels_of_its_test_images(tmp_path):
    root = folder(tmp_path, "a b c", "a b_0000 b_0001 amos_0500", modality={"0": "T1", "1": "T2"})
    (tmp_path / "labelsTr/a.nii.gz").rename(tmp_path / "labelsTr/a.nii")
    touch(tmp_path, "imagesTs/d.nii.gz", "imagesTs/amos_0600.nii")
    assert [case.label for case in find_data(root).splits["testing"]] == [None, None]
    touch(tmp_path, "labelsTs/d.nii.gz", "labelsTs/amos_0600.nii.gz")
    cases = sorted(sum(find_data(root).splits.values(), ()), key=lambda case: case.name)
    files = [Path(file).name.replace(".nii.gz", "") for case in cases for file in (*case.images, case.label)]
    assert " ".join(files) == "a a.nii amos_0500 amos_0500 amos_0600.nii amos_0600 b_0000 b_0001 b c c d d"
    assert [*names(root)] == ["train", "val", "test"] and names(root)["test"] == ["amos_0600", "d"]
    touch(tmp_path, "imagesTs/a.nii.gz")
    refuses("found a in imagesTr and imagesTs", find_data, root)
    touch(tmp_path, "imagesTr/b_0002.nii.gz")
    refuses("b_0002.nii.gz of b, expected b_0000 b_0001;", find_data, root)


def test_one_file_is_an_image_and_boxes_come_from_the_truth_or_from_another_programs_folder(tmp_path):
    touch(tmp_path, "label1.nii.gz", "b.nii", "o_0000.nii")
    cases = (Case("a", (), "truth.nii", ("label1",)), *layouts.find_images(tmp_path / "b.nii", 1))
    files = layouts.find_images(tmp_path / "o_0000.nii", 2)[0].images  # the check will name the second
    assert files == (str(tmp_path / "o_0000.nii"), str(tmp_path / "o_0001.nii.gz"))
    assert layouts.with_box_source(cases[:1], "gt")[0].box_source == "truth.nii"
    refuses("--prompts gt: found no label of b", layouts.with_box_source, cases, "gt")
    maps = [Path(case.box_source).name for case in layouts.with_box_source(cases, str(tmp_path))]
    assert maps == ["label1.nii.gz", "b.nii"]
    refuses("found files of no case, o_0000, expected", layouts.find_predictions, cases, tmp_path)
    touch(tmp_path, "a.nii.gz")
    refuses("no file of 1 cases, or two, such as of a;", layouts.find_predictions, cases, tmp_path)
    touch(tmp_path, "b.nii.gz")
    refuses("b.nii.gz: found .*b.nii too", layouts.find_images, tmp_path, 1)
