"""One survey of a data set, and the decisions that are made from it."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch

import volumes
from support import layouts
from support.planning import Plan, decide_flips, make_plan, survey
from volumes import decathlon, refuses, save, spaced


def planned(root, **choices) -> Plan:
    return volumes.planned(layouts.find_data(str(root), **choices))


@pytest.mark.parametrize("modality", ["MRI", "CT"])
def test_the_plan_is_made_of_training_cases_alone_and_travels_in_a_checkpoint(tmp_path, modality):
    source = layouts.find_data(str(decathlon(tmp_path / "set", 5, modality, spaced(2.0, 1.0, 1.0))))
    plan, held_out, train = planned(tmp_path / "set"), source.splits["val"][0], source.splits["train"]
    assert plan.spacing == (2.0, 1.0, 1.0) and (plan.intensity == (None,)) == (modality == "MRI")
    if modality == "CT":  # clipped and scaled by the foreground of training
        image = np.stack([nib.load(case.images[0]).dataobj for case in train])
        label = np.stack([nib.load(case.label).dataobj for case in train])
        low, high = np.percentile(image[label > 0], [0.5, 99.5])
        clipped = image[label > 0].clip(low, high)
        assert np.allclose(plan.intensity, [(low, high, clipped.mean(), clipped.std())])
    assert "Slices: D goes inferior-superior in 4 training cases." in plan.decisions
    for file in (*held_out.images, held_out.label):
        save(file, np.zeros((12, 10, 8), np.uint8), spaced(9.0, 1.0, 1.0))
    assert planned(tmp_path / "set") == plan
    torch.save(plan.as_dict(), tmp_path / "plan.pt")
    assert Plan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True)) == plan
    refuses("plan: found .'data', 'labels'., expected .'data', 'ta", Plan.from_dict, {"data": 0, "labels": 0})
    for case in train:
        save(case.label, np.zeros((12, 10, 8), np.uint8), spaced(2.0, 1.0, 1.0))
    refuses("set: found no object in 4 training labels", planned, tmp_path / "set")


def test_thick_slices_are_resampled_to_the_median_unless_the_preset_keeps_them(tmp_path):
    source = layouts.find_data(str(decathlon(tmp_path, 5, "CT", spaced(8.0, 1.0, 1.0))))
    measured = [*survey(source.splits["train"], source.task).values()]
    kept = dataclasses.replace(source, task=dataclasses.replace(source.task, keep_slices=True))
    assert make_plan(source, measured).spacing[0] == 8 and make_plan(kept, measured).spacing == (None, 1, 1)


@pytest.mark.parametrize("names", [("left kidney", "Kidney_L"), ("rechte Niere", "linke Niere"), ("a", "b")])
def test_the_labels_decide_about_flips_and_their_names_do_not(tmp_path, names):
    rng, root = np.random.default_rng(0), decathlon(tmp_path, 8)
    for file in sorted((root / "labelsTr").glob("*")):  # two twins on both sides of a middle that moves
        label, middle = np.zeros((24, 10, 8), np.uint8), int(rng.choice([7, 12, 17]))
        row, depth = rng.integers(0, 8), rng.integers(0, 6)
        label[middle - 6 : middle - 3, row : row + 3, depth : depth + 2] = 1
        label[middle + 3 : middle + 6, row : row + 3, depth : depth + 2] = 2
        save(file, label)
        save(root / "imagesTr" / file.name, rng.normal(0, 1, label.shape).astype(np.float32))
    content = {"labels": dict(enumerate(["background", *names])), "modality": {"0": "MR"}}
    (root / "dataset.json").write_text(json.dumps(content))
    plan = planned(root)
    assert plan.task.flip_axes == (0, 1)  # not along W, although no class keeps to a side of the volume
    (reason,) = [text for text in plan.decisions if text.startswith("Flips along W: no")]
    assert f"class {names[1]} lies on one side of class {names[0]} in 100 % of the training cases" in reason
    assert planned(root, flip=["W"]).task.flip_axes == (2,) and planned(root, flip=[]).task.flip_axes == ()


def test_a_class_that_keeps_to_one_side_of_the_volume_forbids_a_flip():
    centres = np.full((20, 3, 3), 0.5)
    centres[:, 1] = np.random.default_rng(0).uniform(0.1, 0.9, (20, 3))
    centres[:, 2] = np.nan  # a class of no case
    assert decide_flips(centres, ("background", "x", "y"))[0] == (0, 1, 2)
    centres[:, 1, 1] = np.where(np.arange(20) < 18, 0.4, 0.6)  # 90 %
    flips, reasons = decide_flips(centres, ("background", "x", "y"))
    assert flips == (0, 2) and "class x lies on one side of the middle of the volume in 90 %" in reasons[1]
    centres[0, 1, 1] = 0.6
    assert decide_flips(centres, ("background", "x", "y"))[0] == (0, 1, 2)


def test_images_unlike_the_training_are_remarked_and_files_with_one_fault_share_a_line(tmp_path, capsys):
    source, plan = layouts.find_data(str(decathlon(tmp_path, 5))), planned(tmp_path)
    survey(source.splits["val"], source.task, plan=plan)
    assert "found intensities" not in capsys.readouterr().out
    for case in source.splits["train"][:2]:
        save(case.images[0], np.full((12, 10, 8), 5.0, np.float32))
    (case,) = source.splits["val"]
    thick = save(tmp_path / "thick.nii", nib.load(case.images[0]).get_fdata(), spaced(20.0, 1.0, 1.0))
    survey([layouts.Case("thick", (thick,), None)], source.task, plan=plan)
    assert "found a spacing of 20 x 1 x 1 mm, unlike the training's" in capsys.readouterr().out
    save(case.images[0], np.random.default_rng(0).normal(-1000, 2000, (12, 10, 8)).astype(np.float32))
    survey([case, *source.splits["train"]], source.task, plan=plan)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"remark: {case.images[0]}: found intensities -") for line in lines)
    assert any(" and 1 more: " in line and "constant" in line or "same value" in line for line in lines)
