"""Windows that cover everything, cases from file to file, and the command line from checkpoint to scores."""

import dataclasses
import json
import os
import re
import shutil
import types
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import evaluate
from networks import checkpoint
from support import layouts, metrics, nifti, phantom
from support.checkpoints import read_checkpoint
from volumes import plan_for, planned, refuses, save, write_tree

ROOT = Path(__file__).parents[1]
QUICK = "--overlap 0 --no-mirror --amp off"


def run(*words: str | Path) -> dict | None:
    """Call evaluate.py with the words of a command line."""
    return evaluate.main(" ".join(map(str, words)).split())


@pytest.mark.parametrize("shape, overlap", [((5, 11, 17), 0.5), ((1, 5, 3), 0.5), ((23, 8, 9), 0.9)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_local_prediction_is_given_back_wherever_the_windows_lie(shape, overlap, batch_size):
    volume, seen = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), []

    def predict(patches):
        assert patches.shape[2:] == (4, 8, 8) and len(patches) <= batch_size
        seen.append(patches)
        return torch.cat([patches, patches.sum(1, keepdim=True)], dim=1)

    slabs = [*evaluate.sliding_window_inference(predict, volume, (4, 8, 8), overlap, batch_size)]
    assert batch_size > 1 or all(slab.shape[1] <= 4 for slab in slabs)  # as soon as they are complete
    expected = torch.cat([volume, volume.sum(0, keepdim=True)])
    torch.testing.assert_close(torch.cat(slabs, dim=1), expected, atol=1e-5, rtol=0)  # and the same shape
    for channel in (0, 1):  # A small volume is padded with its minimum.
        assert min(patches[:, channel].min() for patches in seen) == volume[channel].min()


@pytest.mark.parametrize("axis", [0, 2])
def test_overlapping_windows_are_averaged_with_gaussian_weights_that_have_a_floor(axis):
    shape, patch = [1, 1, 1], [1, 1, 1]
    shape[axis], patch[axis] = 16, 8  # three windows
    answers = (torch.full((1, 1, *patch), value) for value in (1.0, 2.0, 4.0))
    slabs = evaluate.sliding_window_inference(lambda _: next(answers), torch.zeros(1, *shape), patch)
    gauss = np.exp(-0.5 * ((np.arange(8) - 3.5) / (8 / 8)) ** 2)
    gauss = np.maximum(gauss / gauss.max(), 1e-3)
    weights = np.stack([np.pad(gauss, (start, 8 - start)) for start in (0, 4, 8)])
    expected = [1, 2, 4] @ weights / weights.sum(0)
    assert np.allclose(torch.cat(list(slabs), dim=1).flatten().numpy(), expected, rtol=1e-5)
    assert evaluate.window_weights((8, 64, 64)).min() == pytest.approx(1e-3)
    refuses("overlap of windows: found 1.5", evaluate.window_starts, 9, 4, 1.5)


def fake(patch_size, scores):
    """A model that answers with given class scores, which broadcast to (K, d, h, w), wherever it looks."""
    scores = torch.broadcast_to(torch.as_tensor(scores), (len(scores), *patch_size))
    model = types.SimpleNamespace(config=types.SimpleNamespace(patch_size=patch_size))
    model.predict = lambda volumes: scores.expand(len(volumes), *scores.shape).clone()
    return model


def empty(shape, grid):
    return data.Prepared(np.zeros((1, *shape), np.float32), None, nifti.Geometry.of(np.eye(4), grid[::-1]))


def test_mirroring_averages_the_flips_along_its_axes_alone():
    """A model that is surer of class 1 the further to the right it looks, at most 1."""
    ramp = torch.linspace(0, 1, 8).repeat(2, 6, 1)
    ramp[0] = 0  # never in the first slice
    model = fake((2, 6, 8), torch.stack([torch.full_like(ramp, 0.4), ramp]))
    second, case = np.arange(2)[:, None, None] == 1, empty((2, 6, 8), (2, 6, 8))
    right = second & (np.arange(8) >= 3)
    for axes, expected in (((), right), ((1,), right), ((2,), second), ((1, 2), second)):
        assert (evaluate.predict_case([model], [case], mirror_axes=axes) == expected).all(), axes


def test_several_models_are_averaged_on_the_native_grid_though_patch_and_spacing_differ():
    scores = {(2, 8, 8): [0.6, 0.4, 0.0], (4, 16, 8): [0.0, 0.45, 0.55], (3, 5, 7): [0.2, 0.5, 0.3]}
    models = [fake(size, torch.tensor(values).reshape(3, 1, 1, 1)) for size, values in scores.items()]
    cases = [empty(shape, (11, 20, 30)) for shape in ((11, 20, 30), (5, 31, 14), (22, 9, 9))]
    alone = [np.unique(evaluate.predict_case([m], [p])).tolist() for m, p in zip(models, cases)]
    together = evaluate.predict_case(models, cases)
    assert alone == [[0], [2], [1]] and together.shape == (11, 20, 30) and (together == 1).all()
    models[1] = fake((4, 16, 8), torch.tensor([0.5, torch.nan, 0.1]).reshape(3, 1, 1, 1))
    refuses("found scores that are not numbers", evaluate.predict_case, models, cases)


def test_the_largest_component_of_each_named_class_is_kept():
    label = np.zeros((4, 12, 12), np.uint8)
    label[0, :3, :3], label[1, 3, 3] = 1, 1  # touching at a corner: one component
    label[3, 8:10, 8:10] = 1  # a smaller one elsewhere
    label[2, 0:2, 10], label[2, 5:8, 10], label[2, 11, 11] = 2, 2, 3
    for class_ids, second in (([1, 3, 7], label[2]), ([2, 1], label[2] * (np.arange(12)[:, None] >= 5))):
        kept = evaluate.keep_largest_component(label.copy(), class_ids)
        assert (kept[:2] == label[:2]).all() and (kept[2] == second).all() and not kept[3].any()
    names = ("background", "RV", "Myo")
    assert [evaluate.class_ids(given, names) for given in (None, [], ["Myo"])] == [[], [1, 2], [2]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, str]:
    """The folder of a small phantom of five patients, and the checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("evaluate")
    root, path = folder / "phantom", folder / "best.pt"
    phantom.write_phantom(root, num_patients=5, seed=3)
    for file in root.rglob("*.nii.gz"):
        save(file, array(file)[16:80:2, 24:72:2, :5], np.diag([3, 3, 8, 1]))
    checkpoint(path, layouts.find_data("phantom", str(root)))
    return str(root), str(path)


def array(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("name, case, lacking, submitted", [
    ("acdc", "patient002_frame01", "LV", ["patient101_ED", "patient101_ES"]),
    ("synapse", "case0002", "gallbladder", ["label0061"]),
    ("amos", "amos_0008", "prostate/uterus", ["amos_0200", "amos_0201"]),
])  # fmt: skip
def test_original_layouts_with_their_traps_end_to_end(name, case, lacking, submitted):
    """Check, prepare, predict, score and submit; the truth scores perfectly as a prediction of itself."""
    write_tree(Path("download"), name)
    for action in ("check", "info", "prepare"):
        data.main([action, "--data", name, "--root", "download"])
    source = layouts.find_data(name, "download")
    labels, plan = source.task.labels, data.prepare(source, Path("cache", name))
    checkpoint("best.pt", source, (9, 80, 72), queries=16, plan=plan)
    results = run("--ckpt best.pt --split test", QUICK, "--output predicted")
    assert results["per_case"][case][lacking]["dice"] in (None, 0)  # predicted or not
    assert results["scored"] == [labels[k] for k in source.task.scored or range(1, len(labels))]
    run("--ckpt best.pt --split testing --submission", QUICK, "--output out")
    assert zipfile.ZipFile("out/submission.zip").namelist() == [f"{stem}.nii.gz" for stem in submitted]
    refuses("testing: found no labels", run, "--predictions out --root download --split testing --data", name)
    Path("truth").mkdir()
    for each in source.splits["test"]:
        shutil.copy(each.label, f"truth/{each.aliases[-1] if each.aliases else each.name}.nii.gz")
    results = run("--predictions truth --root download --split test --data", name)
    assert results["mean"] == {"dice": 1, "hd95": 0, "nsd": 1}
    assert results["per_class"][lacking]["neither"] == (2 if name == "acdc" else 1)


def test_a_checkpoint_alone_is_scored_and_images_are_predicted_as_stored_without_labels(trained, monkeypatch):
    """One volume, stored in RAS and with axes flipped and swapped, has the same label at the same place."""
    cases = layouts.find_data("phantom", trained[0]).splits["val"]
    results, folder = run("--ckpt", trained[1], QUICK), Path(trained[1]).parent / "predictions-val"
    assert json.loads((folder / "metrics.json").read_text()) == results and results["epoch"] == [7]
    assert list(results["per_case"]) == [case.name for case in cases] and not os.listdir()
    Path("in").mkdir()
    for case in cases:
        pair = [nifti.read_label(str(f), 4)[0] for f in (folder / f"{case.name}.nii.gz", case.label)]
        hd95 = map(metrics.plain, metrics.score_maps(*pair, (8, 3, 3), 4)["hd95"])
        assert list(hd95) == [scores["hd95"] for scores in results["per_case"][case.name].values()]
        os.link(case.images[0], f"in/{case.name}.nii.gz")
    turned = nib.load(cases[0].images[0]).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    nib.save(turned, "in/turned.nii.gz")
    for module in (nifti, data):
        monkeypatch.delattr(module, "read_label")  # Whoever opens a label now fails.
    assert run("--ckpt", trained[1], "--input in --output out/deep", QUICK) is None
    beside = ["labels.ctbl", "labels.txt"]  # names and colours for viewers
    assert sorted(os.listdir("out/deep")) == beside + sorted(os.listdir("in"))
    for name in os.listdir("in"):
        image, written = nib.load(f"in/{name}"), nib.load(f"out/deep/{name}")
        assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
        assert name == "turned.nii.gz" or np.array_equal(array(f"out/deep/{name}"), array(folder / name))
    files = (f"out/deep/{name}.nii.gz" for name in (cases[0].name, "turned"))
    one, other = (np.asarray(nib.as_closest_canonical(nib.load(file)).dataobj) for file in files)
    # The mean over the voxels rounds differently in another order; a shift would change a tenth of them.
    assert (one == other).mean() > 0.999 and (one[1:] == other[:-1]).mean() < 0.95


def test_the_six_lines_of_the_readme_predict_a_file_as_evaluate_does_and_an_array():
    (lines,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)
    image = np.random.default_rng(0).normal(size=(20, 30, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([1, 1.1, 1.2, 1])), "IMAGE.nii.gz")
    known = {}
    exec(lines.replace("checkpoints/", f"{ROOT}/checkpoints/"), known)
    predictor, prediction = known["predictor"], known["prediction"]
    assert predictor.task.labels == ("background", "anterior", "posterior")
    assert prediction.scores.shape == (3, 18, 30, 20) and prediction.scores.dtype == np.float32
    assert (prediction.label == prediction.scores.argmax(0)).all() and prediction.label.dtype == np.uint8
    assert (predictor("IMAGE.nii.gz").label == prediction.label).all() and prediction.scores.std() > 0
    volume, geometry = nifti.read_image("IMAGE.nii.gz")
    again = predictor(volume[0], spacing=geometry.spacing, with_scores=True)
    assert np.array_equal(again.scores, prediction.scores)
    refuses("found an array of .18, 30, 20. and the spacing None", predictor, volume[0])
    refuses("image: found 2 channels, expected 1", predictor, volume.repeat(2, 0), spacing=(1, 1, 1))
    ckpt = f"{ROOT}/checkpoints/hippocampus-tiny.pt"
    run("--ckpt", ckpt, "--input IMAGE.nii.gz --output out")
    assert np.array_equal(nifti.read_label("out/IMAGE.nii.gz", 3)[0], prediction.label)


def test_a_stopped_prediction_goes_on_and_another_question_is_answered_anew(trained, monkeypatch):
    question = ("--ckpt", trained[1], "--split test", QUICK, "--output out")
    predict_case, calls = evaluate.predict_case, []

    def stop_at_the_second(*args, **options):
        calls.append(options["desc"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict_case(*args, **options)

    monkeypatch.setattr(evaluate, "predict_case", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(*question)
    assert os.listdir("out") == [f"{calls[0]}.nii.gz"]
    results = run(*question)
    assert calls[2:] == list(results["per_case"])[1:] and len(calls) == 3  # The first case was done.
    assert run(*question)["per_case"] == results["per_case"] and len(calls) == 3
    Path(f"out/{calls[1]}.nii.gz").write_bytes(b"half a file")
    run(*question)
    run(*question, "--largest-component")
    assert calls[3:] == [calls[1], *results["per_case"]]


def test_checkpoints_of_folds_are_averaged_and_never_score_what_they_were_trained_with(trained, capsys):
    for fold in (0, 1):
        checkpoint(f"{fold}.pt", layouts.find_data("phantom", trained[0], fold), seed=fold, fold=fold)
    results = run("--ckpt 0.pt 1.pt --split test", QUICK, "--output both")
    alone = run("--ckpt 0.pt --split test", QUICK, "--output alone")
    assert results["checkpoint"] == ["0.pt", "1.pt"] and results["per_case"] != alone["per_case"]
    assert alone["fold"] == 0  # as it was trained
    refuses("1.pt: found 2 of 2 cases that it was trained with", run, "--ckpt 0.pt 1.pt --split val")
    run("--ckpt 0.pt --split train --no-mirror")
    assert re.search("remark: 0.pt: found (.) of \\1 cases", capsys.readouterr().out)
    run("--ckpt 0.pt 1.pt --split test --no-mirror")
    source = layouts.find_data("phantom", trained[0], 1)
    checkpoint("4.pt", source, plan=dataclasses.replace(planned(source), data="copy"))
    run("--ckpt 4.pt --split val --fold 0 --no-mirror --output both")  # the same names in another data set
    assert "remark: 4.pt: found 2 of 2 cases" in capsys.readouterr().out
    folders = " ".join(sorted(folder.name for folder in Path().glob("predictions*")))
    assert re.fullmatch("predictions-2models-[0-9a-f]{8}-test predictions-train", folders)
    checkpoint("2.pt", layouts.find_data("phantom", trained[0]), plan=plan_for())
    refuses("2.pt: found task .*class 1.*, expected .*RV.* as in 0.pt", run, "--ckpt 0.pt 2.pt --split test")
    plan = planned(source := layouts.find_data("phantom", trained[0]))
    task = dataclasses.replace(plan.task, flip_axes=(0, 2))
    checkpoint("3.pt", source, plan=dataclasses.replace(plan, task=task), group="no such", fold=1)
    for paths in (("0.pt", "3.pt"), ("3.pt", "0.pt")):  # along the axes that both know
        assert evaluate.Predictor(*paths).settings["mirror_axes"] == [2]
    content = read_checkpoint("3.pt")  # fold and group of a training on other data are not those of this
    content["arguments"]["data"] = "elsewhere/heart"
    args = evaluate.parse_arguments(["--ckpt", "3.pt", "--data", "phantom", "--root", trained[0]])
    assert evaluate.find_cases(args, [content])[0].splits == source.splits and args.fold is None


def test_boxes_of_a_folder_are_named_in_at_most_45_bytes_of_whole_letters():
    assert evaluate.describe_box_source("/" + "盒" * 20) == ", boxes of /_" + "盒" * 10


def test_another_programs_files_are_scored_with_the_same_rules(trained):
    cases = layouts.find_data("phantom", trained[0]).splits["test"]
    question = "--predictions out --data phantom --split test --root", trained[0]
    first, second = [Path(f"out/{case.name}.nii.gz") for case in cases]
    turned = nib.load(cases[1].label).as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
    save(second, np.asarray(turned.dataobj).copy(), turned.affine)  # stored with another axis first
    label, affine = array(cases[0].label), nib.load(cases[0].label).affine
    save(first, label + 3, affine)
    refuses(f"(?s)1 problem:.*{first}: found the labels", run, *question)
    save(first, np.where(label == 1, 0, label).astype(np.float64), affine)  # no RV
    results = run(*question)
    assert results["per_case"][cases[1].name]["LV"] == {"dice": 1, "hd95": 0, "nsd": 1}
    scores = results["per_case"][cases[0].name]
    assert scores["RV"]["dice"] == 0 < scores["RV"]["hd95"] and results["per_class"]["RV"]["only_truth"] == 1
    other = run(*question, "--metric-convention transunet --tolerance 20")
    assert other["per_case"][cases[0].name]["RV"]["hd95"] == 0 and other["tolerance_mm"] == 20
    for name, expected in (("metrics", results), ("metrics-transunet", other)):  # in files of their own
        assert json.loads(Path(f"out/{name}.json").read_text()) == expected


@pytest.mark.parametrize("arguments, message", [
    ("--ckpt nowhere.pt", "nowhere.pt: found no such file"),
    ("--ckpt CKPT --overlap 1", "--overlap: found 1, expected at least 0 and below 1"),
    ("--ckpt CKPT --input in/a.nii.gz --output in", "in/a.nii.gz: found a file that is read"),
    ("--ckpt a --input b --output c --data acdc", "--input takes no --data and no --submission"),
    ("--ckpt CKPT --largest-component heart", "--largest-component: found heart, expected RV or Myo or LV"),
    ("--ckpt CKPT --input in --output out", "(?s)1 problem:.*in/a.nii.gz: found 1 voxels of NaN"),
    ("--ckpt a --predictions b", "expected either --ckpt FILE or --predictions DIR"),
    ("--predictions b", "--predictions needs --data"),
    ("--predictions b --data acdc --largest-component", "--largest-component belongs to --ckpt"),
])  # fmt: skip
def test_a_problem_is_one_message_and_no_output(arguments, message, trained, capsys):
    save("in/a.nii.gz", np.where(np.arange(192).reshape(8, 8, 3) == 9, np.nan, 1).astype(np.float32))
    with pytest.raises(SystemExit) as stopped:
        run(arguments.replace("CKPT", trained[1]))
    assert re.search(message, f"{stopped.value} {capsys.readouterr().err}") and not Path("out").exists()
