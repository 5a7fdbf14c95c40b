"""Layouts, splits and folds of the presets and of any folder."""

import json
import re
from pathlib import Path

import pytest

from support import layouts
from support.layouts import Case, find_data
from support.presets import PRESETS
from volumes import acdc_tree, decathlon


def touch(base: Path, *files: str) -> None:
    for file in files:
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        (base / file).touch()


def folder(root: Path, names: list[str], images: list[str] | None = None, **content) -> str:
    """Write a folder with empty labels NAME and images, those of the labels unless others are given."""
    touch(root, *(f"labelsTr/{name}.nii.gz" for name in names))
    touch(root, *(f"imagesTr/{name}.nii.gz" for name in images or names))
    content = {"labels": {"0": "background", "1": "a"}, "modality": {"0": "MRI"}} | content
    (root / "dataset.json").write_text(json.dumps(content))
    return str(root)


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
    stems = "testing/patient101/patient101_frame12_gt", "training/patient090/patient090_frame04"
    touch(
        tmp_path, *(f"{stem}.nii" for stem in stems), "training/patient090/patient090_frame01.nii"
    )  # a decoy
    splits = find_data("acdc", str(tmp_path)).splits
    assert [case.name for case in splits["val"]] == ["patient090_frame04", "patient090_frame11"]
    diastole, systole = splits["testing"]
    assert diastole.label is None and systole.label.endswith("patient101/patient101_frame12_gt.nii")
    assert splits["val"][0].images[0].endswith("patient090_frame04.nii")
    assert systole.aliases == ("patient101_ES",)
    refuses("patient001/Info.cfg: found a patient of acdc.* --data acdc", find_data, "phantom", str(tmp_path))
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
        touch(tmp_path, *(f"amos22/images{part}/amos_{number:04d}.nii" for number in numbers))
    assert (
        find_data("amos", str(tmp_path)).notes[0].startswith("3 cases with ids above 500, which are MR, are")
    )
    folds = [names("amos", tmp_path, fold) for fold in (None, 0, 4)]
    assert folds[0] == folds[1] and folds[2]["test"] == ["amos_0045", "amos_0046"]
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(8, 2)] * 3


def test_a_missing_phantom_is_written_and_other_missing_data_print_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_phantom(root: Path) -> None:  # a second call would fail
        acdc_tree(root, range(1, 35))
        for file in root.glob("*/*/Info.cfg"):
            file.write_text(file.read_text().replace("DCM", "SYN"))

    monkeypatch.setattr(layouts, "write_phantom", write_phantom)
    splits = names("phantom")
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 48, "val": 8, "test": 12}
    assert names("phantom") == splits
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
    assert "2 cases are not used: they are in no part" in " ".join(find_data(root, fold=1).notes)
    for wrong, found in {
        "[]": "no fold 0", "{}": "no fold 0", "[3]": "3 as", '[{"train": ["case_1"]}]': "{",
        '[{"train": [], "val": ["case_1"]}]': "{", '[{"train": ["case_0"], "val": ["case_9"]}]': '"case_9"',
        '[{"train": ["case_0", [7]], "val": ["case_1"]}]': "[7] in fold 0",
        '[{"train": ["case_0", "case_1"], "val": ["case_1"]}]': "case_1 twice",
        '[{"train": ["case_0", "case_0"], "val": ["case_1"]}]': "case_0 twice",
        '[{"train": ["case_0"], "val": ["case_1"], "test": []}]': '{"train": ',
    }.items():  # fmt: skip
        file.write_text(wrong)
        refuses(f"splits_final.json: found .*{re.escape(found)}", find_data, root)


@pytest.mark.parametrize("name, expected", [
    ("CT", "CT"), ("CT_portal", "CT"), ("CTA", "CT"), ("a CBCT", "CT"), ("Computed  Tomography", "CT"),
    ("PET", "MR"), ("MRI", "MR"), ("t1ct", "MR"), ("active", "MR"), ("zscore", "MR"), ("noNorm", "noNorm"),
    ("nonorm", "noNorm"), ("rescale_to_0_1", "rescale_to_0_1"), ("rgb_to_0_1", "rgb_to_0_1"),
])  # fmt: skip
def test_the_modality_of_a_channel_is_a_whole_word_of_its_name(name, expected):
    assert layouts.modality_of(name) == expected


def test_modality_and_flips_are_decided_per_channel_and_never_by_names_of_classes(tmp_path):
    labels, channels = {"left lobe": 1, "background": 0}, {"0": "PET", "1": "CT"}
    images = [f"p{i}_{channel:04d}" for i in range(2) for channel in range(2)]
    root = folder(tmp_path, ["p0", "p1"], images, labels=labels, channel_names=channels)
    source = find_data(root)
    assert source.task.labels == ("background", "left lobe") and source.task.flip_axes is None
    assert source.task.modality == ("MR", "CT") and "PET as MR, CT as CT" in source.notes[0]
    assert [Path(f).name for f in source.splits["val"][0].images] == ["p0_0000.nii.gz", "p0_0001.nii.gz"]
    task = find_data(root, modality=["ct"], flip=[]).task
    assert task.modality == ("CT", "CT") and task.flip_axes == ()
    task = find_data(root, modality=["MR", "nonorm"], flip=["w", "D"]).task
    assert task.modality == ("MR", "noNorm") and task.flip_axes == (0, 2)
    refuses("--modality: found PT, expected CT, MR, noNorm", find_data, root, None, None, None, ["PT"])
    refuses("found CT CT CT, expected .* each of 2", find_data, root, None, None, None, ["CT"] * 3)
    refuses("--flip X: expected letters of D H W", find_data, root, None, None, None, None, ["X"])


UNUSABLE = {  # labels of a dataset.json -> the sentence that refuses them
    '{"0": "background"}': "no two labels", "7": "no two labels",
    '{"background": 0, "a": 1, "whole": [1, 2]}': r'"whole" with the id \[1, 2\], expected one id',
    '{"background": 0, "a": 1, "ignore": 2}': '"ignore" with the id 2, expected no voxels to ignore',
    '{"background": 0, "a": 1.5, "b": null}': '"a" with the id 1.5, expected a whole number',
    '{"background": 0, "a": true}': '"a" with the id true, expected a whole number',
    '{"background": 0, "a": 256}': "expected a whole number in one byte",
    '{"0": "background", "1": 5}': '5 with the id "1", expected a name in quotes',
    '{"background": 0, "a": 1, "b": 1}': '"b" with the id 1, expected one name for each id, not a too',
    '{"0": "background", "1": "a", "2": "a"}': '"a" with the id "2", expected one id for each name',
    '{"background": 0, "a": 1, "a": 2}': "a twice",
    '{"0": "background", "1": "a", "4": "b"}': "no label with the id 2, expected ids 0, 1, 2",
    '{"0": "a", "1": "background"}': "expected the background as id 0",
}  # fmt: skip


@pytest.mark.parametrize("labels", UNUSABLE)
def test_every_kind_of_unusable_labels_has_its_own_sentence(tmp_path, labels):
    (tmp_path / "dataset.json").write_text(f'{{"labels": {labels}, "modality": {{"0": "MR"}}}}')
    refuses(f"dataset.json: found .*{UNUSABLE[labels]}", find_data, str(tmp_path))


def test_an_unusable_folder_says_what_is_expected(tmp_path):
    good = '"labels": {"0": "a", "1": "b"}'
    for text, found in {
        "{": "no JSON in UTF-8, line 1", "[]": "no keys", f"{{{good}}}": "the channels null",
        f'{{{good}, "modality": {{"1": "MR"}}}}': "the channels {",
        f'{{{good}, "modality": "CT"}}': 'the channels "CT"',
        '{"file_ending": ".png"}': 'the file_ending ".png", expected .nii.gz',
    }.items():  # fmt: skip
        (tmp_path / "dataset.json").write_text(text)
        refuses(f"dataset.json: found {re.escape(found)}", find_data, str(tmp_path))
    refuses("neither a preset .* dataset.json", find_data, "acdcc")
    refuses("found 1 cases, expected two", find_data, str(decathlon(tmp_path / "one", 1)))


def test_what_dataset_json_says_and_is_not_used_is_named(tmp_path):
    listed = {"training": [{"image": "./imagesTr/c.nii.gz"}, "./imagesTr/a.nii.gz"], "numTraining": 2}
    root, file = folder(tmp_path, ["a", "b"], regions_class_order=[1], **listed), tmp_path / "dataset.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    unread, differing = find_data(root).notes[1:]
    assert unread == "dataset.json: not read: regions_class_order."
    assert differing.endswith(
        "differs from the folder (for example in b); the 2 cases of the folder are used."
    )
    refuses("--root x: found beside the folder", find_data, root, "x")


@pytest.mark.parametrize("scans", [
    "patient#_frame01 patient#_frame12", "ED_A#S9V9_sa ES_A#S9V9_sa", "a#_t0 a#_t1", "v1-# v2-#",
    "#a_visit #a_visit2", "sub-#_ses-01_T1w sub-#_ses-02_T1w", "k#.tp1 k#.tp-2", "#_baseline #_follow-up",
])  # fmt: skip
def test_cases_of_a_patient_stay_together(tmp_path, scans):
    names_of = {name: i for i in range(10) for name in scans.replace("#", str(i)).split()}
    root = folder(tmp_path, list(names_of))
    for fold in range(5):
        source = find_data(root, None, fold)
        train, val = ({names_of[case.name] for case in source.splits[split]} for split in ("train", "val"))
        assert len(train) == 8 and len(val) == 2 and not train & val
    assert "20 cases are of 10 patients by their names" in source.notes[-1]


def test_a_pattern_overrides_the_guess_of_patients(tmp_path):
    names = [f"{site}{i}_x" for site in "abcde" for i in range(2)]
    root = folder(tmp_path, names, patient="^(.)")
    assert [len(find_data(root, None, fold).splits["val"]) for fold in range(5)] == [2] * 5
    assert "10 cases are of 5 patients by the pattern ^(.)" in find_data(root).notes[-1]
    assert "10 cases are of 10 patients" in find_data(root, None, 0, "(.+)_x").notes[-1]
    wrong = {"(": "no regular", "x": "0 groups", "(a)(.)": "2 groups", "(a)": "no match in b", "(.*?)": "no"}
    for group, found in wrong.items():
        refuses(re.escape(f"the pattern {group} (--group): found {found}"), find_data, root, None, 0, group)
    refuses(r"the pattern \(x\) \(--group\): found one patient, x", find_data, root, None, 0, "(x)")
    acdc_tree(tmp_path / "acdc")
    refuses("found the published split of acdc", find_data, "acdc", str(tmp_path / "acdc"), None, "(.)")
    (tmp_path / "splits_final.json").write_text('[{"train": ["a0_x", "b0_x"], "val": ["a1_x"]}]')
    assert "1 patients, such as a, are in train and in val." in find_data(root).notes
    assert [layouts.patient_of(name) for name in ("ED", "a_ED", "aED_ES")] == ["ED", "a", "aED"]
    alone = folder(tmp_path / "alone", [f"x_v{i}" for i in range(5)])  # no guess: it leaves one patient
    assert len(find_data(alone).splits["val"]) == 1 and len(find_data(alone).notes) == 1


@pytest.mark.parametrize("files, channels, expected", [
    ("a_0000 a_0001 b_0000 b_0001", 2, {"a": 2, "b": 2}),
    ("a b", 2, {"a": 1, "b": 1}),  # files of four axes
    ("a_0000 a_0001 b", 2, {"a": 2, "b": 1}),
    ("a_0000 a_0001 b_0000", 2, "found .*b_0000.nii.gz of b, expected b_0000.nii.gz b_0001.nii.gz"),
    ("a_0000 b_0000", 1, {"a": 1, "b": 1}),
    ("a_0000 b", 1, {"a_0000": 1, "b": 1}),  # not every name has a number
    ("amos_0001 amos_0022 mr_0003", 1, {"amos_0001": 1, "amos_0022": 1, "mr_0003": 1}),
    ("case_0000 case_0001 case_0002 case_0003", 1, "case_0003.nii.gz of case.*rename the files.* case-0001"),
    ("p_0000 p_0001 q", 1, "p_0001.nii.gz of p, expected p_0000.nii.gz"),
    ("p_0001 q_0001", 1, "p_0001.nii.gz of p, expected"),
    ("", 1, "found no .nii or .nii.gz files"),
])  # fmt: skip
def test_images_are_grouped_by_case_and_channel_or_keep_their_names(tmp_path, files, channels, expected):
    touch(tmp_path, *(f"{name}.nii.gz" for name in files.split()), "._a.nii.gz")
    if isinstance(expected, str):
        return refuses(expected, layouts.find_images, tmp_path, channels)
    cases = layouts.find_images(tmp_path, channels)
    assert {case.name: len(case.images) for case in cases} == expected and not any(c.label for c in cases)
    assert all([*case.images] == sorted(case.images) for case in cases)


def test_one_file_is_an_image_too_and_two_files_of_one_name_are_refused(tmp_path):
    touch(tmp_path, "a.nii", "b.nii.gz", "c.txt")
    assert layouts.find_images(tmp_path / "a.nii", 1) == (Case("a", (str(tmp_path / "a.nii"),), None),)
    refuses("c.txt: found no .nii", layouts.find_images, tmp_path / "c.txt", 1)
    touch(tmp_path, "a.nii.gz")
    refuses("a.nii.gz: found .*a.nii too", layouts.find_images, tmp_path, 1)


def test_a_folder_may_hold_all_channels_in_one_file_and_mix_endings(tmp_path):
    channels = {"0": "T1", "1": "T2"}
    root = folder(tmp_path, ["a", "b", "c"], ["a", "b_0000", "b_0001"], modality=channels)
    (tmp_path / "labelsTr/a.nii.gz").rename(tmp_path / "labelsTr/a.nii")
    cases = {case.name: case for case in sum(find_data(root).splits.values(), ())}
    assert [Path(file).name for case in cases.values() for file in case.images] == [
        "a.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "c.nii.gz"]  # fmt: skip


def test_what_is_missing_or_too_much_in_a_folder_is_named_by_its_case(tmp_path):
    channels = {"0": "T1", "1": "T2"}
    images = [f"{name}_{channel:04d}" for name in "abc" for channel in range(2)]
    root = folder(tmp_path, ["a", "b"], images, modality=channels)
    labels = [case.label for case in sum(find_data(root).splits.values(), ())]
    assert sorted(labels)[-1] == str(tmp_path / "labelsTr/c.nii.gz")
    touch(tmp_path, "imagesTr/a_0002.nii.gz")
    refuses("a_0002.nii.gz: found a further channel of a, expected 2", find_data, root)


def test_test_images_are_a_split_and_their_labels_may_be_hidden(tmp_path):
    root = folder(tmp_path, ["a", "b", "amos_0500", "amos_0501"])
    touch(tmp_path, "imagesTs/c.nii.gz", "imagesTs/amos_0600.nii")
    assert [case.label for case in find_data(root).splits["testing"]] == [None, None]
    touch(tmp_path, "labelsTs/c.nii.gz", "labelsTs/amos_0600.nii.gz")
    source = find_data(root)
    assert list(source.splits) == ["train", "val", "test"] and names(root)["test"] == ["amos_0600", "c"]
    assert source.notes[1:] == ("2 of 6 cases have ids above 500, which are MR in AMOS.",)
    touch(tmp_path, "imagesTs/a.nii.gz")
    refuses("found a in imagesTr and imagesTs", find_data, root)


def test_boxes_come_from_the_truth_or_from_another_programs_folder(tmp_path):
    cases = (Case("a", ("a.nii",), "truth.nii", ("label1",)), Case("b", ("b.nii",), None))
    assert layouts.with_box_source(cases[:1], "gt")[0].box_source == "truth.nii"
    refuses("--prompts gt: found no label of b", layouts.with_box_source, cases, "gt")
    touch(tmp_path, "label1.nii.gz", "b.nii", "other.nii.gz")
    files = [case.box_source for case in layouts.with_box_source(cases, str(tmp_path))]
    assert files == [str(tmp_path / "label1.nii.gz"), str(tmp_path / "b.nii")]
    touch(tmp_path, "b.nii.gz")
    refuses("^2 problems", layouts.find_predictions, cases, tmp_path)
