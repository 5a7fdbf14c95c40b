"""Windows that cover everything, Dice against brute force, and the command from checkpoint to files."""

import csv
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
from model import MaskSAMConfig
from support import layouts, metrics, nifti, phantom
from support.checkpoints import build_model, save_checkpoint
from volumes import one_hot, to_native, write_tree

PATCH = (4, 64, 64)


# ------------------------------------------------------------------------------------------------------- sliding window


@pytest.mark.parametrize("length", range(4, 40))
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_windows_cover_every_voxel_and_end_flush(length, overlap):
    starts = evaluate.window_starts(length, 4, overlap)
    covered = {start + i for start in starts for i in range(4)}
    assert covered == set(range(length)) and starts[0] == 0 and starts[-1] == length - 4
    assert all(0 < b - a <= max(1, int(4 * (1 - overlap))) for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("shape", [(4, 8, 8), (5, 11, 17), (3, 8, 20), (1, 5, 3), (23, 8, 8), (11, 9, 5)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_local_prediction_is_given_back_wherever_the_windows_lie(shape, batch_size):
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def predict(patches):
        assert patches.shape[2:] == (4, 8, 8) and len(patches) <= batch_size
        return torch.cat([patches, patches.sum(1, keepdim=True)], dim=1)

    slabs = list(evaluate.sliding_window_inference(predict, volume, (4, 8, 8), batch_size=batch_size))
    assert batch_size > 1 or all(slab.shape[1] <= 4 for slab in slabs)
    out = torch.cat(slabs, dim=1)
    expected = torch.cat([volume, volume.sum(0, keepdim=True)])
    assert out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("axis", [0, 2])
def test_overlapping_windows_are_averaged_with_their_weights(weights, axis):
    """Three windows along one axis, each of which answers with its own number."""
    answers = iter([1.0, 2.0, 4.0])
    shape, patch = [1, 1, 1], [1, 1, 1]
    shape[axis], patch[axis] = 16, 8

    def predict(patches):
        return torch.full((1, 1, *patch), next(answers))

    slabs = evaluate.sliding_window_inference(predict, torch.zeros(1, *shape), patch, weights=weights)
    gauss = np.exp(-0.5 * ((np.arange(8) - 3.5) / (8 / 8)) ** 2)
    gauss = np.maximum(gauss / gauss.max(), 1e-3) if weights == "gaussian" else np.ones(8)
    total, weight = np.zeros(16), np.zeros(16)
    for start, answer in zip((0, 4, 8), (1.0, 2.0, 4.0)):
        total[start : start + 8] += answer * gauss
        weight[start : start + 8] += gauss
    assert np.allclose(torch.cat(list(slabs), dim=1).flatten().numpy(), total / weight, rtol=1e-5)


def test_far_corners_keep_a_weight():
    weights = evaluate.window_weights((8, 64, 64))
    assert weights.max() == 1 and weights.min() == pytest.approx(1e-3)


def test_what_is_added_to_a_small_volume_is_its_minimum_and_is_cut_off_again():
    seen = []

    def predict(patches):
        seen.append(patches)
        return patches

    volume = torch.arange(2.0, 8.0).reshape(1, 1, 2, 3)
    (out,) = evaluate.sliding_window_inference(predict, volume, (2, 4, 4))
    assert torch.allclose(out, volume)
    assert seen[0].sum() == volume.sum() + 2.0 * (32 - 6)


def test_overlap_must_leave_a_step():
    with pytest.raises(ValueError, match="overlap is 1"):
        next(evaluate.sliding_window_inference(lambda x: x, torch.zeros(1, 2, 2, 2), (1, 1, 1), overlap=1))


def test_mirroring_averages_the_flips_along_its_axes_alone():
    """A model that is surer of class 1 the further to the right it looks, at most 1."""

    def predict(volumes):
        ramp = torch.linspace(0, 1, 8).expand(len(volumes), 1, 2, 6, 8)
        return torch.cat([torch.full_like(ramp, 0.4), ramp], dim=1)

    model = types.SimpleNamespace(config=types.SimpleNamespace(patch_size=(2, 6, 8), num_classes=2), predict=predict)
    prepared = data.Prepared(np.zeros((1, 2, 6, 8), np.float32), None, nifti.Geometry(np.eye(4), (2, 6, 8), (1, 1, 1)))
    right = np.broadcast_to(np.arange(8) >= 3, (2, 6, 8))
    for mirror_axes, expected in (((), right), ((1,), right), ((2,), True), ((1, 2), True)):
        assert (evaluate.predict_case([model], [prepared], mirror_axes=mirror_axes) == expected).all(), mirror_axes


def fake(patch_size, value):
    """A model that answers with given class scores wherever it looks."""
    scores = torch.tensor(value).reshape(1, -1, 1, 1, 1)
    config = types.SimpleNamespace(patch_size=patch_size, num_classes=scores.shape[1])
    predict = lambda volumes: scores.expand(len(volumes), -1, *patch_size).clone()  # noqa: E731
    return types.SimpleNamespace(config=config, predict=predict)


def test_several_models_are_averaged_on_the_native_grid_though_patch_and_spacing_differ():
    geometry = nifti.Geometry(np.eye(4), (11, 20, 30), (1.0, 1.0, 1.0))
    models = [fake((2, 8, 8), [0.6, 0.4, 0.0]), fake((4, 16, 8), [0.0, 0.45, 0.55]), fake((3, 5, 7), [0.2, 0.5, 0.3])]
    prepared = [data.Prepared(np.zeros((1, *shape), np.float32), None, geometry)
                for shape in ((11, 20, 30), (5, 31, 14), (22, 9, 9))]  # fmt: skip
    alone = [np.unique(evaluate.predict_case([m], [p])).tolist() for m, p in zip(models, prepared)]
    assert alone == [[0], [2], [1]]
    together = evaluate.predict_case(models, prepared)
    assert together.shape == geometry.shape and (together == 1).all()


def test_the_largest_component_of_each_named_class_is_kept():
    label = np.zeros((4, 12, 12), np.uint8)
    label[0, :3, :3], label[1, 3, 3] = 1, 1  # touching at a corner: one component
    label[3, 8:10, 8:10] = 1  # a smaller one elsewhere
    label[2, 0:2, 10], label[2, 5:8, 10], label[2, 11, 11] = 2, 2, 3
    kept = evaluate.keep_largest_component(label.copy(), [1, 3, 7])
    assert (kept[0] == label[0]).all() and kept[1, 3, 3] == 1 and not kept[3].any() and (kept[2] == label[2]).all()
    assert (evaluate.keep_largest_component(label.copy(), [2])[2, :, 10] == [0] * 5 + [2] * 3 + [0] * 4).all()
    assert (evaluate.keep_largest_component(label.copy(), []) == label).all()


# ---------------------------------------------------------------------------------------------------------- the command


def write_checkpoint(path: Path, plan: data.Plan, arguments: dict, num_queries: int = 4) -> None:
    """An untrained model, but with queries of different classes whose masks differ from place to place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model, sam = build_model(MaskSAMConfig("tiny", "b9", 1, len(plan.labels), num_queries, PATCH, (64, 64)))
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.class_tokens, std=5)
    with torch.no_grad():
        model.sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight *= 100
    save_checkpoint(path, model, sam, plan.as_dict(), epoch=7, arguments=arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A phantom of five patients and the checkpoint of a model that has seen none of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    root, path = folder / "phantom", folder / "run" / "best.pt"
    phantom.write_phantom(root, num_patients=5, seed=3)
    torch.manual_seed(0)
    plan = data.make_plan(layouts.find_data("phantom", str(root)))
    write_checkpoint(path, plan, {"data": "phantom", "root": str(root)})
    return root, path


@pytest.mark.parametrize("name", ["acdc", "synapse", "amos"])
def test_original_layouts_with_their_traps_end_to_end(name, tmp_path, monkeypatch, capsys):
    """check, info, prepare, predict, score, submit; what the truth scores as a prediction of itself."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "download"
    write_tree(root, name)
    where = ["--data", name, "--root", str(root)]
    for action in ("check", "info", "prepare", "prepare"):
        data.main([action, *where])
    assert "no problems" in capsys.readouterr().out
    source = layouts.find_data(name, str(root))
    labelled = [case for cases in source.splits.values() for case in cases if case.label]
    assert len(list((tmp_path / "cache" / name).glob("*.label.npy"))) == len(labelled)
    plan = data.prepare(source, tmp_path / "cache" / name)
    for case in labelled:
        prepared = data.load_cached(case, plan, tmp_path / "cache" / name)
        back = to_native(one_hot(prepared.label, len(plan.labels)), prepared.geometry)
        assert np.array_equal(back, nifti.read_label(case.label, len(plan.labels))[0])
    write_checkpoint(tmp_path / "best.pt", plan, {"data": name, "root": str(root)}, num_queries=8)
    quick = ["--ckpt", "best.pt", "--overlap", "0", "--no-mirror"]
    results = evaluate.main([*quick, "--split", "test", "--output", "predicted"])
    lacking = {"acdc": ("patient002_frame01", "LV"), "synapse": ("case0002", "gallbladder"),
               "amos": ("amos_0008", "prostate/uterus")}[name]  # fmt: skip
    scores = results["per_case"][lacking[0]][lacking[1]]
    assert scores["dice"] in (None, 0)  # predicted or not
    assert results["scored"] == [source.labels[k] for k in source.scored or range(1, len(source.labels))]

    assert evaluate.main([*quick, "--split", "testing", "--output", "submitted", "--submission"]) is None
    with zipfile.ZipFile("submitted/submission.zip") as archive:
        names = archive.namelist()
    wanted = {"acdc": ["patient101_ED", "patient101_ES"], "synapse": ["label0061"], "amos": ["amos_0200", "amos_0201"]}
    assert names == [f"{stem}.nii.gz" for stem in wanted[name]]
    for case, file in zip(source.splits["testing"], names):
        one, other = nib.load(Path("submitted") / file), nib.load(case.images[0])
        assert one.shape == other.shape and np.array_equal(one.affine, other.affine)

    Path("truth").mkdir()
    for case in source.splits["test"]:
        shutil.copy(case.label, f"truth/{case.aliases[-1] if case.aliases else case.name}.nii.gz")
    results = evaluate.main(["--predictions", "truth", *where, "--split", "test"])
    assert results["mean"] == {"dice": 1, "hd95": 0, "nsd": 1}
    assert results["per_class"][lacking[1]]["neither"] == (2 if name == "acdc" else 1)
    assert results["per_case"][lacking[0]][lacking[1]]["dice"] is None


def test_the_checkpoint_alone_is_scored_and_written(trained, tmp_path, monkeypatch, capsys):
    root, path = trained
    monkeypatch.chdir(tmp_path)  # nothing may depend on where it runs
    results = evaluate.main(["--ckpt", str(path)])
    folder = path.parent / "predictions-val"
    cases = layouts.find_data("phantom", str(root)).splits["val"]
    assert json.loads((folder / "metrics.json").read_text()) == results
    assert list(results["per_case"]) == [case.name for case in cases] and results["epoch"] == [7]
    for case in cases:
        written, image = nib.load(folder / f"{case.name}.nii.gz"), nib.load(case.images[0])
        assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
        prediction, truth = (np.asarray(nib.load(file).dataobj) for file in (written.get_filename(), case.label))
        scores = metrics.score_maps(*(a.transpose(2, 1, 0) for a in (prediction, truth.astype(np.uint8))),
                                    nifti.read_header(case.label)[1].spacing, 4)  # fmt: skip
        for metric in metrics.METRICS:
            values = [result[metric] for result in results["per_case"][case.name].values()]
            assert values == [None if np.isnan(value) else value for value in scores[metric]]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["case"] for row in rows[::3]] == [*results["per_case"], "mean"]
    assert float(rows[2]["dice"]) == results["per_case"][cases[0].name]["LV"]["dice"]
    assert "mean" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_unlabelled_files_are_predicted_as_in_scoring_and_no_label_is_opened(trained, tmp_path, monkeypatch):
    root, path = trained
    cases = layouts.find_data("phantom", str(root)).splits["test"]
    images, output = tmp_path / "images", tmp_path / "out" / "deep"
    images.mkdir()
    for case in cases:
        os.link(case.images[0], images / f"{case.name}.nii.gz")
    evaluate.main(["--ckpt", str(path), "--split", "test", "--output", str(tmp_path / "scored"), "--no-mirror"])

    def refuse(*args):
        raise AssertionError("a label was opened")

    monkeypatch.setattr(nifti, "read_label", refuse)
    monkeypatch.setattr(data, "read_label", refuse)
    folders = ["--input", str(images), "--output", str(output)]
    assert evaluate.main(["--ckpt", str(path), *folders, "--no-mirror"]) is None
    assert sorted(file.name for file in output.iterdir()) == sorted(f"{case.name}.nii.gz" for case in cases)
    for case in cases:
        both = [np.asarray(nib.load(f / f"{case.name}.nii.gz").dataobj) for f in (output, tmp_path / "scored")]
        assert np.array_equal(*both)


def test_a_prediction_lies_where_its_image_lies_however_that_is_stored(trained, tmp_path):
    """One volume, stored in RAS and with axes flipped and swapped: the same label at the same place of the world."""
    root, path = trained
    image = nib.load(layouts.find_data("phantom", str(root)).splits["val"][0].images[0])
    turned = image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    (tmp_path / "in").mkdir()
    nib.save(image, tmp_path / "in" / "straight.nii.gz")
    nib.save(turned, tmp_path / "in" / "turned.nii.gz")
    folders = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    evaluate.main(["--ckpt", str(path), *folders, "--amp", "off", "--no-mirror"])
    straight, turned = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in ("straight", "turned"))
    assert straight.shape != turned.shape or not np.allclose(straight.affine, turned.affine)
    one, other = (np.asarray(nib.as_closest_canonical(label).dataobj) for label in (straight, turned))
    # The mean over the voxels rounds differently in another order; a shift of one voxel would change a tenth of them.
    assert (one == other).mean() > 0.999 and (one[1:] == other[:-1]).mean() < 0.9


def test_channels_are_grouped_by_their_suffix(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        (tmp_path / f"{name}.nii.gz").touch()
    assert [(case.name, len(case.images)) for case in layouts.find_images(tmp_path, 2)] == [("a", 2), ("b", 2)]
    (tmp_path / "b_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="b_0000.nii.gz of b, expected b_0000.nii.gz b_0001.nii.gz"):
        layouts.find_images(tmp_path, 2)
    for name in ("b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz"):
        (tmp_path / name).unlink()
    (tmp_path / "amos_0001.nii.gz").touch()  # a number that is no channel
    (tmp_path / "c_0000.nii").touch()
    assert [case.name for case in layouts.find_images(tmp_path, 1)] == ["amos_0001", "c"]
    (tmp_path / "c.nii.gz").touch()
    with pytest.raises(ValueError, match="c_0000.nii: found .*c.nii.gz as channel 0 of c too, expected one file"):
        layouts.find_images(tmp_path, 1)


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (None, ["--ckpt", "nowhere.pt"], "nowhere.pt: no such file"),
        (None, ["--split", "holdout"], "--split holdout: .* has train, val, test, all"),
        (None, ["--data", "acdc", "--root", "/nonexistent"], "/nonexistent: no such folder"),
        (None, ["--overlap", "1"], "overlap is 1"),
        (None, ["--input", "empty"], "empty: found no .nii or .nii.gz files"),
        ("4-D", ["--input", "in"], r"a.nii.gz: found shape \(8, 8, 3, 2\), expected three dimensions"),
        ("NaN", ["--input", "in"], "a.nii.gz: found 1 voxels of NaN or infinity"),
        ("truncated", ["--input", "in"], "a.nii.gz: found a truncated file"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_message_and_no_output(trained, tmp_path, monkeypatch, spoil, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("empty").mkdir()
    array = np.random.default_rng(0).normal(size=(8, 8, 3, 2) if spoil == "4-D" else (64, 64, 9)).astype(np.float32)
    if spoil == "NaN":
        array[1, 2, 1] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), "in/a.nii.gz")
    nib.save(nib.Nifti1Image(array[..., :1].reshape(array.shape[0], -1, 1), np.eye(4)), "in/b.nii.gz")
    if spoil == "truncated":
        Path("in/a.nii.gz").write_bytes(Path("in/a.nii.gz").read_bytes()[:-2000])
    with pytest.raises(SystemExit, match=message):
        evaluate.main(["--ckpt", str(trained[1]), "--output", "out", *arguments])
    assert not list(tmp_path.glob("out/*"))


def test_a_model_of_other_labels_is_refused(trained, tmp_path):
    root = tmp_path / "set"
    for name in ("a", "b"):
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.zeros((9, 9, 3), np.uint8), np.eye(4)), root / folder / f"{name}.nii.gz")
    facts = {"labels": {"0": "background", "1": "spleen"}, "modality": {"0": "MRI"}}
    (root / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match="the model knows .*RV.* has .*spleen"):
        evaluate.main(["--ckpt", str(trained[1]), "--data", str(root)])


def test_predictions_never_replace_the_images(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--ckpt", str(trained[1]), "--input", str(tmp_path), "--output", str(tmp_path / "x" / "..")])
    assert "predictions would replace the images" in capsys.readouterr().err


def test_a_folder_of_test_patients_alone_is_scored(trained, tmp_path):
    patient = tmp_path / "acdc" / "training" / "patient088"  # one of ACDC's test patients
    shutil.copytree(trained[0] / "training" / "patient005", patient)
    for file in patient.glob("patient005*"):
        file.rename(patient / file.name.replace("005", "088"))
    arguments = ["--ckpt", str(trained[1]), "--data", "acdc", "--root", str(tmp_path / "acdc"), "--no-mirror"]
    test, everything = (
        evaluate.main([*arguments, "--split", split, "--output", str(tmp_path / split)]) for split in ("test", "all")
    )
    assert test["per_case"] == everything["per_case"] and len(test["per_case"]) == 2


def test_labels_that_are_hidden_are_predicted_without_a_score(trained, tmp_path):
    root = tmp_path / "acdc"
    phantom.write_phantom(root, num_patients=5, seed=3)
    (root / "training" / "patient005").rename(root / "training" / "patient089")  # the validation patient
    for file in (root / "training" / "patient089").glob("patient005*"):
        file.rename(file.with_name(file.name.replace("005", "089")))
    hidden = root / "testing" / "patient101"
    hidden.parent.mkdir()
    (root / "training" / "patient004").rename(hidden)
    for file in hidden.glob("patient004*"):
        file.unlink() if "_gt" in file.name else file.rename(hidden / file.name.replace("004", "101"))
    arguments = ["--ckpt", str(trained[1]), "--data", "acdc", "--root", str(root), "--output", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--split", "testing", "--no-mirror"]) is None
    assert len(list((tmp_path / "out").iterdir())) == 2


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.nii.gz")}


def test_a_stopped_prediction_goes_on_and_another_question_is_answered_anew(trained, tmp_path, monkeypatch):
    arguments = ["--ckpt", str(trained[1]), "--split", "test", "--output", str(tmp_path), "--no-mirror"]
    arguments += ["--overlap", "0"]
    predict_case, calls = evaluate.predict_case, []

    def stop_at_the_second(*args, **options):
        calls.append(options["desc"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict_case(*args, **options)

    monkeypatch.setattr(evaluate, "predict_case", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    assert [file.name for file in tmp_path.iterdir()] == [f"{calls[0]}.nii.gz"]
    before = times(tmp_path)
    results = evaluate.main(arguments)
    assert calls[2:] == list(results["per_case"])[1:] and len(calls) == 3  # the first case was done
    assert before.items() <= times(tmp_path).items()
    assert evaluate.main(arguments)["per_case"] == results["per_case"] and len(calls) == 3
    evaluate.main([*arguments, "--weights", "constant"])
    assert len(calls) == 5 and not before.items() <= times(tmp_path).items()
    (tmp_path / f"{calls[1]}.nii.gz").write_bytes(b"half a file")
    evaluate.main([*arguments, "--weights", "constant"])
    assert calls[5:] == calls[1:2]


def test_checkpoints_of_other_folds_are_averaged_on_the_test_split_alone(trained, tmp_path):
    root, path = trained
    plan = data.make_plan(layouts.find_data("phantom", str(root)))
    paths = [str(path)]
    for fold in (0, 1):
        torch.manual_seed(1 + fold)
        paths.append(str(tmp_path / f"fold{fold}.pt"))
        write_checkpoint(Path(paths[-1]), plan, {"data": "phantom", "root": str(root), "fold": fold})
    quick = ["--overlap", "0", "--no-mirror", "--split", "test"]
    results = evaluate.main(["--ckpt", *paths[1:], *quick, "--output", str(tmp_path / "both")])
    alone = evaluate.main(["--ckpt", paths[1], *quick, "--output", str(tmp_path / "alone")])
    assert results["checkpoint"] == paths[1:] and results["per_case"] != alone["per_case"]
    assert alone["fold"] == 0  # as it was trained
    with pytest.raises(SystemExit, match="the checkpoints are of folds .* and trained on each other's"):
        evaluate.main(["--ckpt", *paths[1:], "--split", "val", "--output", str(tmp_path / "none")])


def test_the_largest_component_of_a_prediction_is_kept_by_name(trained, tmp_path):
    arguments = ["--ckpt", str(trained[1]), "--overlap", "0", "--no-mirror"]
    evaluate.main([*arguments, "--output", str(tmp_path / "plain")])
    evaluate.main([*arguments, "--output", str(tmp_path / "kept"), "--largest-component", "LV"])
    for file in (tmp_path / "plain").glob("*.nii.gz"):
        plain, kept = (np.asarray(nib.load(tmp_path / folder / file.name).dataobj) for folder in ("plain", "kept"))
        assert np.array_equal(kept, evaluate.keep_largest_component(plain.copy(), [3]))
    with pytest.raises(SystemExit, match="--largest-component heart: expected of RV, Myo, LV"):
        evaluate.main([*arguments, "--largest-component", "heart"])


# ------------------------------------------------------------------------------------------------ other programs' files


@pytest.fixture
def others(trained, tmp_path) -> tuple[Path, list[str], tuple[layouts.Case, ...]]:
    """Another program's folder of the phantom's test cases, here the truth itself, and the arguments that score it."""
    cases = layouts.find_data("phantom", str(trained[0])).splits["test"]
    for case in cases:
        shutil.copy(case.label, tmp_path / f"{case.name}.nii.gz")
    arguments = ["--predictions", str(tmp_path), "--data", "phantom", "--root", str(trained[0]), "--split", "test"]
    return tmp_path, arguments, cases


def test_another_programs_files_are_scored_with_the_same_rules(others):
    folder, arguments, cases = others
    image = nib.load(cases[0].label)
    array = np.asarray(image.dataobj).copy()
    array[:, :, 0] = 0  # the first slice is missing
    array[array == 1] = 0  # and the RV everywhere
    nib.save(nib.Nifti1Image(array.astype(np.float64), image.affine), folder / f"{cases[0].name}.nii.gz")
    results = evaluate.main(arguments)
    truth = nifti.read_label(cases[0].label, 4)
    own = metrics.score_maps(nifti.read_label(str(folder / f"{cases[0].name}.nii.gz"), 4)[0], truth[0],
                             truth[1].spacing, 4)  # fmt: skip
    scores = results["per_case"][cases[0].name]
    assert [scores[name]["hd95"] for name in ("RV", "Myo", "LV")] == own["hd95"].tolist()
    assert scores["RV"]["dice"] == 0 and results["per_class"]["RV"]["only_truth"] == 1
    assert results["convention"] == "masksam" and results["tolerance_mm"] == 1 and results["split"] == "test"
    assert json.loads((folder / "metrics.json").read_text()) == results
    other = evaluate.main([*arguments, "--metric-convention", "transunet"])
    assert other["per_case"][cases[0].name]["RV"]["hd95"] == 0
    assert json.loads((folder / "metrics.json").read_text()) == results  # the others' columns lie in their own files
    assert json.loads((folder / "metrics-transunet.json").read_text()) == other
    looser = evaluate.main([*arguments, "--tolerance", "20"])
    assert looser["per_case"][cases[0].name]["LV"]["nsd"] >= scores["LV"]["nsd"] and looser["tolerance_mm"] == 20


def test_a_folder_that_is_not_there_is_one_line(others):
    _, arguments, _ = others
    with pytest.raises(SystemExit, match="^evaluate.py: /nowhere: no such folder, expected the label maps of 2"):
        evaluate.main([*arguments, "--predictions", "/nowhere"])


def turn(file: Path) -> None:
    """Store the same voxels with another axis first, running backwards."""
    image = nib.load(file)
    turned = image.as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj).copy(), turned.affine), file)


def resave(file: Path, change) -> None:
    image = nib.load(file)
    array, affine = change(np.asarray(image.dataobj).copy(), image.affine)
    nib.save(nib.Nifti1Image(array, affine), file)


@pytest.mark.parametrize("kind, change, found", [
    ("missing", lambda f: f.unlink(), "found no file of {name}, expected one, {name}.nii.gz"),
    ("twice", lambda f: shutil.copy(f, f.with_name("twice.nii.gz")), "and .*_ED.nii.gz of {name}"),
    ("extra", lambda f: shutil.copy(f, f.with_name("patient999.nii.gz")), "patient999.nii.gz: found a file of no case"),
    ("shape", lambda f: resave(f, lambda a, m: (a[:-1], m)), r"{name}.nii.gz: found \(D, H, W\) ="),
    ("no affine", lambda f: resave(f, lambda a, m: (a, np.eye(4))), "{name}.nii.gz: found the affine"),
    ("flipped", lambda f: resave(f, lambda a, m: (a, m @ np.diag([-1, 1, 1, 1]))), "{name}.nii.gz: found the affine"),
    ("label", lambda f: resave(f, lambda a, m: (a + 3, m)), "{name}.nii.gz: found the labels"),
    ("chances", lambda f: resave(f, lambda a, m: (a * np.float32(0.3), m)), "{name}.nii.gz: found the labels"),
    ("truncated", lambda f: f.write_bytes(f.read_bytes()[:-400]), "{name}.nii.gz: found"),
    ("one hot", lambda f: resave(f, lambda a, m: (np.stack([a == 1, a == 2], -1) * np.uint8(1), m)),
     "{name}.nii.gz: found shape"),
])  # fmt: skip
def test_files_that_do_not_fit_are_all_listed_and_the_folder_works_once_mended(others, kind, change, found):
    folder, arguments, cases = others
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for case in cases[:1] if kind in ("twice", "extra") else cases:
        file = folder / f"{case.name}.nii.gz"
        change(file)
        if kind == "twice":
            (folder / "twice.nii.gz").rename(folder / f"{case.aliases[0]}.nii.gz")
    with pytest.raises(SystemExit) as raised:
        evaluate.main(arguments)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"evaluate.py: {len(lines) - 1} problems")
    for case in cases[:1] if kind in ("twice", "extra") else cases:
        assert sum(bool(re.search(found.format(name=case.name), line)) for line in lines[1:]) == 1
    assert not list(folder.glob("metrics*"))
    for path in folder.iterdir():
        path.unlink()
    for path, content in whole.items():
        path.write_bytes(content)
    for case in cases:  # stored with another axis first, it is still the same
        turn(folder / f"{case.name}.nii.gz")
    assert evaluate.main(arguments)["mean"]["dice"] == 1


@pytest.mark.parametrize("arguments, message", [
    ([], "expected either --ckpt FILE or --predictions DIR"),
    (["--ckpt", "a", "--predictions", "b"], "expected either"),
    (["--predictions", "b"], "--predictions needs --data"),
    (["--predictions", "b", "--data", "acdc", "--input", "c"], "--input and --submission belong to --ckpt"),
    (["--ckpt", "a", "--input", "c"], "--input needs --output"),
    (["--ckpt", "a", "--batch", "0"], "--batch is 0, expected 1 or more"),
    (["--ckpt", "a", "--tolerance", "0"], "--tolerance is 0.0, expected millimetres above 0"),
    (["--ckpt", "a", "--metric-convention", "voxels"], "invalid choice: 'voxels'"),
])  # fmt: skip
def test_arguments_that_do_not_go_together_say_what_does(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_a_folder_without_labels_cannot_be_scored(trained, tmp_path):
    root = tmp_path / "set"
    write_tree(root, "acdc")
    arguments = ["--predictions", str(tmp_path), "--data", "acdc", "--root", str(root), "--split", "testing"]
    for phase in ("ED", "ES"):
        (tmp_path / f"patient101_{phase}.nii.gz").touch()
    with pytest.raises(SystemExit, match="--split testing: .* has no labels there to score against"):
        evaluate.main(arguments)
