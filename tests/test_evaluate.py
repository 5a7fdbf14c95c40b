"""Windows that cover everything, cases from file to file, and the command line from checkpoint to scores."""

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
from model import MaskSAMConfig, build_model, checkpoint_content
from support import layouts, metrics, nifti, phantom
from support.checkpoints import write_checkpoint
from volumes import one_hot, to_native, write_tree

# -------------------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_windows_cover_every_voxel_and_end_flush(overlap):
    for length in range(4, 40):
        starts = evaluate.window_starts(length, 4, overlap)
        assert {start + i for start in starts for i in range(4)} == set(range(length))
        assert starts[0] == 0 and starts[-1] == length - 4
        assert all(0 < b - a <= max(1, int(4 * (1 - overlap))) for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("shape", [(4, 8, 8), (5, 11, 17), (1, 5, 3), (23, 8, 8), (11, 9, 5)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_local_prediction_is_given_back_wherever_the_windows_lie(shape, batch_size):
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    seen = []

    def predict(patches):
        assert patches.shape[2:] == (4, 8, 8) and len(patches) <= batch_size
        seen.append(patches)
        return torch.cat([patches, patches.sum(1, keepdim=True)], dim=1)

    slabs = evaluate.sliding_window_inference(predict, volume, (4, 8, 8), batch_size=batch_size)
    slabs = list(slabs)
    assert batch_size > 1 or all(slab.shape[1] <= 4 for slab in slabs)
    out, expected = torch.cat(slabs, dim=1), torch.cat([volume, volume.sum(0, keepdim=True)])
    assert out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)
    for channel in (0, 1):  # A small volume is padded with its minimum.
        assert min(patches[:, channel].min() for patches in seen) == volume[channel].min()


@pytest.mark.parametrize("axis", [0, 2])
def test_overlapping_windows_are_averaged_with_gaussian_weights_that_have_a_floor(axis):
    """Three windows along one axis, each of which answers with its own number."""
    answers = iter([1.0, 2.0, 4.0])
    shape, patch = [1, 1, 1], [1, 1, 1]
    shape[axis], patch[axis] = 16, 8
    slabs = evaluate.sliding_window_inference(
        lambda _: torch.full((1, 1, *patch), next(answers)), torch.zeros(1, *shape), patch
    )
    gauss = np.exp(-0.5 * ((np.arange(8) - 3.5) / (8 / 8)) ** 2)
    gauss = np.maximum(gauss / gauss.max(), 1e-3)
    total, weight = np.zeros(16), np.zeros(16)
    for start, answer in zip((0, 4, 8), (1.0, 2.0, 4.0)):
        total[start : start + 8] += answer * gauss
        weight[start : start + 8] += gauss
    assert np.allclose(torch.cat(list(slabs), dim=1).flatten().numpy(), total / weight, rtol=1e-5)
    weights = evaluate.window_weights((8, 64, 64))
    assert weights.max() == 1 and weights.min() == pytest.approx(1e-3)


# --------------------------------------------------------------------------------------------------- one case


def test_mirroring_averages_the_flips_along_its_axes_alone():
    """A model that is surer of class 1 the further to the right it looks, at most 1."""

    def predict(volumes):
        ramp = torch.linspace(0, 1, 8).expand(len(volumes), 1, 2, 6, 8)
        return torch.cat([torch.full_like(ramp, 0.4), ramp], dim=1)

    model = types.SimpleNamespace(config=types.SimpleNamespace(patch_size=(2, 6, 8)), predict=predict)
    geometry = nifti.Geometry(np.eye(4), (2, 6, 8), (1, 1, 1))
    prepared = data.Prepared(np.zeros((1, 2, 6, 8), np.float32), None, geometry)
    right = np.broadcast_to(np.arange(8) >= 3, (2, 6, 8))
    for mirror_axes, expected in (((), right), ((1,), right), ((2,), True), ((1, 2), True)):
        label = evaluate.predict_case([model], [prepared], mirror_axes=mirror_axes)
        assert (label == expected).all(), mirror_axes


def fake(patch_size, value):
    """A model that answers with given class scores wherever it looks."""
    scores = torch.tensor(value).reshape(1, -1, 1, 1, 1)
    config = types.SimpleNamespace(patch_size=patch_size)
    predict = lambda volumes: scores.expand(len(volumes), -1, *patch_size).clone()  # noqa: E731
    return types.SimpleNamespace(config=config, predict=predict)


def test_several_models_are_averaged_on_the_native_grid_though_patch_and_spacing_differ():
    geometry = nifti.Geometry(np.eye(4), (11, 20, 30), (1.0, 1.0, 1.0))
    scores = {(2, 8, 8): [0.6, 0.4, 0.0], (4, 16, 8): [0.0, 0.45, 0.55], (3, 5, 7): [0.2, 0.5, 0.3]}
    models = [fake(*item) for item in scores.items()]
    shapes = ((11, 20, 30), (5, 31, 14), (22, 9, 9))
    prepared = [data.Prepared(np.zeros((1, *shape), np.float32), None, geometry) for shape in shapes]
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
    assert (kept[0] == label[0]).all() and kept[1, 3, 3] == 1
    assert not kept[3].any() and (kept[2] == label[2]).all()
    kept = evaluate.keep_largest_component(label.copy(), [2])
    assert (kept[2, :, 10] == [0] * 5 + [2] * 3 + [0] * 4).all()
    assert (evaluate.keep_largest_component(label.copy(), []) == label).all()
    names = ("background", "RV", "Myo")
    assert [evaluate.class_ids(given, names) for given in (None, [], ["Myo"])] == [[], [1, 2], [2]]


# ---------------------------------------------------------------------------------- from checkpoint to scores


def checkpoint(path: Path, plan: data.Plan, arguments: dict, seed: int = 0, queries: int = 4) -> None:
    """An untrained model, but with queries of different classes whose masks differ from place to place."""
    torch.manual_seed(seed)
    sizes = {"patch_size": (4, 32, 32), "encoder_size": (32, 32), "num_queries": queries}
    model, sam = build_model(
        MaskSAMConfig("tiny", num_channels=1, num_classes=len(plan.task.labels), **sizes)
    )
    with torch.no_grad():
        torch.nn.init.normal_(model.classifier.weight)
        torch.nn.init.normal_(model.class_tokens, std=5)
        model.sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight *= 100
    content = checkpoint_content(model, sam, plan.as_dict()) | {"epoch": 7, "arguments": arguments}
    write_checkpoint(path, content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A phantom of five patients, every second voxel, and the checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("evaluate")
    root, path = folder / "phantom", folder / "best.pt"
    phantom.write_phantom(root, num_patients=5, seed=3)
    for file in root.rglob("*.nii.gz"):
        nib.save(nib.load(file).slicer[16:80:2, ::2, :5], file)
    checkpoint(
        path, data.make_plan(layouts.find_data("phantom", str(root))), {"data": "phantom", "root": str(root)}
    )
    return root, path


def array(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("name", ["acdc", "synapse", "amos"])
def test_original_layouts_with_their_traps_end_to_end(name, tmp_path, monkeypatch, capsys):
    """Check, prepare, predict, score and submit; the truth scores perfectly as a prediction of itself."""
    monkeypatch.chdir(tmp_path)
    root, where = tmp_path / "download", ["--data", name, "--root", str(tmp_path / "download")]
    write_tree(root, name)
    for action in ("check", "info", "prepare"):
        data.main([action, *where])
    assert "no problems" in capsys.readouterr().out
    source = layouts.find_data(name, str(root))
    labels, cache = source.task.labels, tmp_path / "cache" / name
    labelled = [case for cases in source.splits.values() for case in cases if case.label]
    plan = data.prepare(source, cache)
    for case in labelled:
        prepared = data.load_cached(case, plan, cache)
        back = to_native(one_hot(prepared.label, len(labels)), prepared.geometry)
        assert np.array_equal(back, nifti.read_label(case.label, len(labels))[0])
    checkpoint(tmp_path / "best.pt", plan, {"data": name, "root": str(root)}, queries=8)
    quick = ["--ckpt", "best.pt", "--overlap", "0", "--no-mirror"]
    results = evaluate.main([*quick, "--split", "test", "--output", "predicted"])
    lacking = {"acdc": ("patient002_frame01", "LV"), "synapse": ("case0002", "gallbladder"),
               "amos": ("amos_0008", "prostate/uterus")}[name]  # fmt: skip
    assert results["per_case"][lacking[0]][lacking[1]]["dice"] in (None, 0)  # predicted or not
    assert results["scored"] == [labels[k] for k in source.task.scored or range(1, len(labels))]

    assert evaluate.main([*quick, "--split", "testing", "--output", "submitted", "--submission"]) is None
    with zipfile.ZipFile("submitted/submission.zip") as archive:
        names = archive.namelist()
    wanted = {"acdc": ["patient101_ED", "patient101_ES"], "synapse": ["label0061"]}
    assert names == [f"{stem}.nii.gz" for stem in wanted.get(name, ["amos_0200", "amos_0201"])]
    for case, file in zip(source.splits["testing"], names):
        one, other = nib.load(Path("submitted") / file), nib.load(case.images[0])
        assert one.shape == other.shape and np.array_equal(one.affine, other.affine)
    with pytest.raises(SystemExit, match="--split testing: found no labels in"):
        evaluate.main(["--predictions", "submitted", *where, "--split", "testing"])

    Path("truth").mkdir()
    for case in source.splits["test"]:
        shutil.copy(case.label, f"truth/{case.aliases[-1] if case.aliases else case.name}.nii.gz")
    results = evaluate.main(["--predictions", "truth", *where, "--split", "test"])
    assert results["mean"] == {"dice": 1, "hd95": 0, "nsd": 1}
    assert results["per_class"][lacking[1]]["neither"] == (2 if name == "acdc" else 1)
    assert results["per_case"][lacking[0]][lacking[1]]["dice"] is None


def test_the_checkpoint_alone_is_scored_and_written(trained, tmp_path, monkeypatch, capsys):
    root, path = trained
    monkeypatch.chdir(tmp_path)  # Nothing may depend on the working directory.
    results = evaluate.main(["--ckpt", str(path)])
    folder, cases = path.parent / "predictions-val", layouts.find_data("phantom", str(root)).splits["val"]
    assert json.loads((folder / "metrics.json").read_text()) == results
    assert list(results["per_case"]) == [case.name for case in cases] and results["epoch"] == [7]
    for case in cases:
        written, image = nib.load(folder / f"{case.name}.nii.gz"), nib.load(case.images[0])
        assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
        pair = [
            array(file).transpose(2, 1, 0).astype(np.uint8) for file in (written.get_filename(), case.label)
        ]
        scores = metrics.score_maps(*pair, nifti.read_header(case.label)[1].spacing, 4)
        for metric in metrics.METRICS:
            values = [result[metric] for result in results["per_case"][case.name].values()]
            assert values == [metrics.plain(value) for value in scores[metric]]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["case"] for row in rows[::3]] == [*results["per_case"], "mean"]
    assert "mean" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_unlabelled_files_are_predicted_as_in_scoring_and_no_label_is_opened(trained, tmp_path, monkeypatch):
    root, path = trained
    cases = layouts.find_data("phantom", str(root)).splits["test"]
    images, output, scored = tmp_path / "images", tmp_path / "out" / "deep", tmp_path / "scored"
    images.mkdir()
    for case in cases:
        os.link(case.images[0], images / f"{case.name}.nii.gz")
    evaluate.main(["--ckpt", str(path), "--split", "test", "--output", str(scored), "--no-mirror"])

    def refuse(*args):
        raise AssertionError("a label was opened")

    monkeypatch.setattr(nifti, "read_label", refuse)
    monkeypatch.setattr(data, "read_label", refuse)
    folders = ["--input", str(images), "--output", str(output)]
    assert evaluate.main(["--ckpt", str(path), *folders, "--no-mirror"]) is None
    assert sorted(file.name for file in output.iterdir()) == sorted(f"{case.name}.nii.gz" for case in cases)
    for file in output.iterdir():
        assert np.array_equal(array(file), array(scored / file.name))


def test_a_prediction_lies_where_its_image_lies_however_that_is_stored(trained, tmp_path):
    """One volume, stored in RAS and with axes flipped and swapped, has the same label at the same place."""
    root, path = trained
    image = nib.load(layouts.find_data("phantom", str(root)).splits["val"][0].images[0])
    (tmp_path / "in").mkdir()
    nib.save(image, tmp_path / "in" / "straight.nii.gz")
    nib.save(image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])), tmp_path / "in" / "turned.nii.gz")
    folders = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    evaluate.main(["--ckpt", str(path), *folders, "--amp", "off", "--no-mirror"])
    straight, turned = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in ("straight", "turned"))
    assert straight.shape != turned.shape or not np.allclose(straight.affine, turned.affine)
    one, other = (np.asarray(nib.as_closest_canonical(label).dataobj) for label in (straight, turned))
    # The mean over the voxels rounds differently in another order; a shift would change a tenth of them.
    assert (one == other).mean() > 0.999 and (one[1:] == other[:-1]).mean() < 0.95


def test_a_stopped_prediction_goes_on_and_another_question_is_answered_anew(trained, tmp_path, monkeypatch):
    arguments = ["--ckpt", str(trained[1]), "--split", "test", "--output", str(tmp_path), "--no-mirror"]
    predict_case, calls = evaluate.predict_case, []

    def stop_at_the_second(*args, **options):
        calls.append(options["desc"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict_case(*args, **options)

    def times() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.nii.gz")}

    monkeypatch.setattr(evaluate, "predict_case", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    assert [file.name for file in tmp_path.iterdir()] == [f"{calls[0]}.nii.gz"]
    before = times()
    results = evaluate.main(arguments)
    assert calls[2:] == list(results["per_case"])[1:] and len(calls) == 3  # The first case was done.
    assert before.items() <= times().items()
    assert evaluate.main(arguments)["per_case"] == results["per_case"] and len(calls) == 3
    evaluate.main([*arguments, "--overlap", "0"])
    assert len(calls) == 5 and not before.items() <= times().items()
    (tmp_path / f"{calls[1]}.nii.gz").write_bytes(b"half a file")
    evaluate.main([*arguments, "--overlap", "0"])
    assert calls[5:] == calls[1:2]


def test_checkpoints_of_other_folds_are_averaged_on_the_test_split_alone(trained, tmp_path):
    root, _ = trained
    plan = data.make_plan(layouts.find_data("phantom", str(root)))
    paths = [str(tmp_path / f"fold{fold}.pt") for fold in (0, 1)]
    for fold, path in enumerate(paths):
        checkpoint(Path(path), plan, {"data": "phantom", "root": str(root), "fold": fold}, seed=fold)
    quick = ["--overlap", "0", "--no-mirror", "--split", "test"]
    results = evaluate.main(["--ckpt", *paths, *quick, "--output", str(tmp_path / "both")])
    alone = evaluate.main(["--ckpt", paths[0], *quick, "--output", str(tmp_path / "alone")])
    assert results["checkpoint"] == paths and results["per_case"] != alone["per_case"]
    assert alone["fold"] == 0  # as it was trained
    largest = ["--largest-component", "LV", "--output", str(tmp_path / "kept")]
    evaluate.main(["--ckpt", paths[0], *quick, *largest])
    for file in (tmp_path / "alone").glob("*.nii.gz"):
        expected = evaluate.keep_largest_component(array(file).copy(), [3])
        assert np.array_equal(array(tmp_path / "kept" / file.name), expected)
    with pytest.raises(SystemExit, match="found folds .*, which were trained on each other's cases"):
        evaluate.main(["--ckpt", *paths, "--split", "val", "--output", str(tmp_path / "none")])


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (None, ["--ckpt", "nowhere.pt"], "nowhere.pt: found no such file"),
        (None, ["--split", "holdout"], "--split: found holdout, expected train, val, test, all"),
        (None, ["--data", "acdc", "--root", "/nonexistent"], "/nonexistent: .*no such folder"),
        (None, ["--overlap", "1"], "--overlap: found 1.0"),
        (None, ["--largest-component", "heart"], "--largest-component: found heart, expected of RV, Myo, LV"),
        (None, ["--input", "empty"], "empty: found no"),
        (None, ["--data", "other"], "other: found .*spleen.*, expected .*RV.* as in"),
        ("4-D", ["--input", "in"], r"a.nii.gz: found shape \(8, 8, 3, 2\)"),
        ("NaN", ["--input", "in"], "a.nii.gz: found 1 voxels of NaN"),
        ("truncated", ["--input", "in"], "a.nii.gz: found a truncated file"),
    ],
)  # fmt: skip
def test_every_problem_is_one_message_and_no_output(
    trained, tmp_path, monkeypatch, spoil, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "empty", "other/imagesTr", "other/labelsTr"):
        Path(folder).mkdir(parents=True)
    for name in ("imagesTr/a", "labelsTr/a", "imagesTr/b", "labelsTr/b"):
        nib.save(nib.Nifti1Image(np.zeros((9, 9, 3), np.uint8), np.eye(4)), f"other/{name}.nii.gz")
    facts = {"labels": {"0": "background", "1": "spleen"}, "modality": {"0": "MRI"}}
    Path("other/dataset.json").write_text(json.dumps(facts))
    image = np.random.default_rng(0).normal(size=(8, 8, 3, 2) if spoil == "4-D" else (64, 64, 9))
    if spoil == "NaN":
        image[1, 2, 1] = np.nan
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), "in/a.nii.gz")
    if spoil == "truncated":
        Path("in/a.nii.gz").write_bytes(Path("in/a.nii.gz").read_bytes()[:-2000])
    with pytest.raises(SystemExit, match=f"(?s)^evaluate.py: .*{message}"):
        evaluate.main(["--ckpt", str(trained[1]), "--output", "out", *arguments])
    assert not list(tmp_path.glob("out/*"))


# ------------------------------------------------------------------------------ label maps of another program


@pytest.fixture
def others(trained, tmp_path) -> tuple[Path, list[str], tuple[layouts.Case, ...]]:
    """Another program's folder of the phantom's test cases, here the truth, and the arguments for it."""
    cases = layouts.find_data("phantom", str(trained[0])).splits["test"]
    for case in cases:
        shutil.copy(case.label, tmp_path / f"{case.name}.nii.gz")
    arguments = [
        "--predictions",
        str(tmp_path),
        "--data",
        "phantom",
        "--root",
        str(trained[0]),
        "--split",
        "test",
    ]
    return tmp_path, arguments, cases


def resave(file: Path, change) -> None:
    image = nib.load(file)
    changed, affine = change(np.asarray(image.dataobj).copy(), image.affine)
    nib.save(nib.Nifti1Image(changed, affine), file)


def test_another_programs_files_are_scored_with_the_same_rules(others):
    folder, arguments, cases = others
    file = folder / f"{cases[0].name}.nii.gz"
    resave(file, lambda a, affine: (np.where(a == 1, 0, a).astype(np.float64), affine))  # no RV
    results = evaluate.main(arguments)
    truth, geometry = nifti.read_label(cases[0].label, 4)
    own = metrics.score_maps(nifti.read_label(str(file), 4)[0], truth, geometry.spacing, 4)
    scores = results["per_case"][cases[0].name]
    assert [scores[name]["hd95"] for name in ("RV", "Myo", "LV")] == own["hd95"].tolist()
    assert scores["RV"]["dice"] == 0 and results["per_class"]["RV"]["only_truth"] == 1
    assert (results["convention"], results["tolerance_mm"], results["split"]) == ("masksam", 1, "test")
    assert json.loads((folder / "metrics.json").read_text()) == results
    other = evaluate.main([*arguments, "--metric-convention", "transunet", "--tolerance", "20"])
    assert other["per_case"][cases[0].name]["RV"]["hd95"] == 0 and other["tolerance_mm"] == 20
    assert (
        json.loads((folder / "metrics.json").read_text()) == results
    )  # Other conventions have their own files.
    assert json.loads((folder / "metrics-transunet.json").read_text()) == other
    for path in folder.glob("*.nii.gz"):  # The truth, stored with another axis first, is still the truth.
        turned = nib.load(cases[[c.name for c in cases].index(path.name[:-7])].label)
        turned = turned.as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj).copy(), turned.affine), path)
    assert evaluate.main(arguments)["mean"]["dice"] == 1


FLIP = np.diag([-1, 1, 1, 1])


@pytest.mark.parametrize("change, found", [
    (lambda f: f.unlink(), "found no file of {name}, expected one, {name}.nii.gz"),
    (lambda f: shutil.copy(f, f.with_name("patient999.nii.gz")), "patient999.nii.gz: found a file of no"),
    (lambda f: resave(f, lambda a, m: (a[:-1], m)), r"{name}.nii.gz: found \(D, H, W\) ="),
    (lambda f: resave(f, lambda a, m: (a, m @ FLIP)), "{name}.nii.gz: found the affine"),
    (lambda f: resave(f, lambda a, m: (a + 3, m)), "{name}.nii.gz: found the labels"),
    (lambda f: resave(f, lambda a, m: (a * np.float32(0.3), m)), "{name}.nii.gz: found the labels"),
    (lambda f: f.write_bytes(f.read_bytes()[:-400]), "{name}.nii.gz: found"),
])  # fmt: skip
def test_files_that_do_not_fit_are_all_listed(others, change, found):
    folder, arguments, cases = others
    for case in cases:
        change(folder / f"{case.name}.nii.gz")
    with pytest.raises(SystemExit) as raised:
        evaluate.main(arguments)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"evaluate.py: {len(lines) - 1} problem")
    for case in cases:
        assert sum(bool(re.search(found.format(name=case.name), line)) for line in lines[1:]) == 1
    assert not list(folder.glob("metrics*"))
    with pytest.raises(SystemExit, match="^evaluate.py: /nowhere: .*no such folder"):
        evaluate.main([*arguments, "--predictions", "/nowhere"])


@pytest.mark.parametrize("arguments, message", [
    ("", "expected either --ckpt FILE or --predictions DIR"),
    ("--ckpt a --predictions b", "expected either"),
    ("--predictions b", "--predictions needs --data"),
    ("--predictions b --data acdc --input c", "--input and --submission belong to --ckpt"),
    ("--predictions b --data acdc --prompts gt", "--predictions and --submission take no --prompts"),
    ("--ckpt a --input c", "--input needs --output"),
    ("--ckpt a --input c --output c/../c", "--input: found the folder of --output"),
    ("--ckpt a --prompts c --output c", "--prompts: found the folder of --output"),
    ("--ckpt a --batch 0", "--batch: found 0, expected 1 or more"),
    ("--ckpt a --tolerance 0", "--tolerance: found 0.0, expected more than 0 mm"),
    ("--ckpt a --metric-convention voxels", "invalid choice: 'voxels'"),
])  # fmt: skip
def test_arguments_that_do_not_go_together_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(arguments.split())
    assert message in capsys.readouterr().err
