"""Commands that draw: the right cases, slices and queries, ranked as they were scored."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import data
import evaluate
from model import MaskSAMConfig, build_model, checkpoint_content
from support import layouts, nifti, phantom, pictures
from support.checkpoints import write_checkpoint
from tools import visualize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A phantom, untrained checkpoints, and shifted truths of the validation cases, scored."""
    folder = tmp_path_factory.mktemp("run")
    root, predictions = folder / "phantom", folder / "predictions"
    phantom.write_phantom(root, num_patients=6, seed=3)
    source = layouts.find_data("phantom", str(root))
    torch.manual_seed(0)
    for name, given in (("auto", False), ("given", True)):
        config = MaskSAMConfig("tiny", "b9", 1, 4, 4, (4, 64, 64), (64, 64), given_boxes=given)
        model, sam = build_model(config)
        torch.nn.init.normal_(model.classifier.weight)
        torch.nn.init.normal_(model.class_tokens, std=5)
        content = checkpoint_content(model, sam, data.make_plan(source).as_dict())
        arguments = {"data": "phantom", "root": str(root)}
        write_checkpoint(folder / f"{name}.pt", content | {"epoch": 1, "arguments": arguments})
    predictions.mkdir()
    for shift, case in enumerate(source.splits["val"], 1):
        label, geometry = nifti.read_label(case.label, 4)
        nifti.write_label_map(predictions / f"{case.name}.nii.gz", np.roll(label, 3 * shift, 2), geometry)
    evaluate.main(
        ["--predictions", str(predictions), "--data", "phantom", "--root", str(root), "--workers", "1"]
    )
    compare = ["compare", "--predictions", str(predictions), "--data", "phantom", "--root", str(root)]
    queries = ["queries", "--ckpt", str(folder / "auto.pt"), "--case"]
    return SimpleNamespace(folder=folder, splits=source.splits, compare=compare, queries=queries)


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """The saved figures, kept open to be looked at, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    kept = []
    monkeypatch.setattr(pictures.plt, "close", kept.append)
    yield kept
    plt.close("all")


def test_worst_median_and_best_are_by_the_mean_over_scored_classes():
    def results(**dice) -> dict:
        scores = {case: [{"dice": d, "hd95": d and 10 * d} for d in values] for case, values in dice.items()}
        return {
            "scored": ["b", "a"],
            "per_case": {case: dict(zip("abc", each)) for case, each in scores.items()},
        }

    cases = {
        "p": [0.8, 0.8, 0],
        "q": [0.9, None, 0],
        "r": [0.1, 0.3, 1],
        "s": [0.6, 0.2, 1],
        "t": [0.7, 0.5, 1],
    }
    titles = visualize.rank_cases(results(**cases, u=[None, None, 1]))
    assert list(titles.items()) == [
        ("r", "worst: r, mean Dice 0.200, HD95 2.0 mm"),
        ("t", "median: t, mean Dice 0.600, HD95 6.0 mm"),
        ("q", "best: q, mean Dice 0.900, HD95 9.0 mm"),
    ]
    assert visualize.rank_cases(results(**cases) | {"convention": "nnformer"})["r"].endswith("2.0 voxels")
    few = visualize.rank_cases(results(p=[0.5, 0.5, 0], q=[0.4, 0.4, 0]))
    assert [title[:5] for title in few.values()] == ["worst", "best:"]
    with pytest.raises(ValueError, match="no case"):
        visualize.rank_cases(results(p=[None, None, 0.5]))


def test_queries_that_are_an_object_come_in_the_order_of_their_probability():
    """A stub of 4 queries, 3 classes and 2 slices; in slice 0 everything is different."""
    classes = [[0.1, 0.6, 0.1, 0.2], [0.1, 0.1, 0.1, 0.7], [0.0, 0.0, 0.9, 0.1], [0.4, 0.1, 0.2, 0.3]]
    masks, boxes = torch.full((2, 4, 20, 40), -9.0), torch.rand(2, 4, 4)
    masks[1, 2, 5:10, 20:30], masks[1, 3] = 9, 9
    masks[1, 3, 5:10, 20:30] = -9
    outputs = {"class_logits": torch.stack([torch.eye(4) * 9, torch.tensor(classes).log()])}
    outputs |= {"mask_logits": masks, "aux_mask_logits": -masks}
    generator = SimpleNamespace(prompts=lambda aux, size, given: (boxes, None))
    stub = SimpleNamespace(config=SimpleNamespace(num_classes=3), prompt_generator=generator)
    model = type("Model", (SimpleNamespace,), {"__call__": lambda self, volume: outputs})(**vars(stub))
    found, label_map = visualize.find_queries(model, torch.zeros(1, 2, 20, 40), 1)
    assert [(query.number, query.class_id) for query in found] == [(2, 2), (0, 1), (3, 0)]
    assert np.allclose([query.probability for query in found], [0.9, 0.6, 0.4])
    assert np.allclose([query.box for query in found], boxes[1, [2, 0, 3]])
    inside = (masks[1, 2] > 0).numpy()
    assert np.array_equal(found[0].mask > 0.5, inside) and np.array_equal(found[0].aux_mask > 0.5, ~inside)
    assert np.array_equal(label_map == 2, inside)


@pytest.mark.parametrize(("d", "first"), [(0, 0), (5, 3), (9, 6)])
def test_the_patch_is_centred_on_the_slice_and_its_labels(d, first):
    image = np.arange(10 * 30 * 40, dtype=np.float32).reshape(1, 10, 30, 40)
    label = np.zeros((10, 30, 40), np.uint8)
    label[:, 18:23, 7:12] = 1
    patch, own_label, index = visualize.cut_window(data.Prepared(image, label, None), d, (4, 8, 10))
    assert np.allclose(patch, image[:, first : first + 4, 16:24, 4:14]) and index == d - first
    assert np.array_equal(own_label, label[first : first + 4, 16:24, 4:14])
    small = image[:, :2, :6, :6] + 5  # a volume without labels that is smaller than the patch
    patch, _, index = visualize.cut_window(data.Prepared(small, None, None), 1, (4, 8, 8))
    assert index == 2 and np.allclose(patch[0, index, 1:7, 1:7], small[0, 1]) and patch.min() == 5


def test_each_command_draws_the_cases_that_it_was_asked_for(run, figures, tmp_path, monkeypatch, capsys):
    first, second, *_ = cases = run.splits["val"]
    visualize.main([*run.compare, "--case", second.name])
    assert "wrote compare.png" in capsys.readouterr().out
    truth = nifti.read_label(second.label, 4)[0]
    d, prediction = pictures.choose_slices(truth, np.roll(truth, 6, 2))[0], np.roll(truth, 6, 2)
    title = f"slice {d}, errors: {np.count_nonzero(truth[d] != prediction[d])} voxels"
    assert figures[0].axes[3].get_title() == title
    monkeypatch.setattr(visualize, "NUM_CASES", 2)
    visualize.main(run.compare)
    assert [part.get_suptitle() for part in figures[1].subfigs] == [cases[0].name, cases[-1].name]
    visualize.main(["sheet", *run.compare[1:3]])
    titles = [part.get_suptitle().split(",")[0] for part in figures[2].subfigs]
    assert titles[0].startswith("worst: ") and titles[-1] == f"best: {first.name}"  # which is shifted least
    assert all(
        (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("compare", "sheet")
    )


def test_queries_are_those_of_the_fullest_slice_or_of_another(run, figures):
    cases = run.splits["train"]
    fullest = [int((nifti.read_label(case.label, 4)[0] > 0).sum((1, 2)).argmax()) for case in cases]
    case, most = next((case, d) for case, d in zip(cases, fullest) if d > 0)
    for more in ([], ["--slice", "0"]):
        visualize.main([*run.queries, case.name, "--split", "train", *more])
    for figure, d in zip(figures, (most, 0), strict=True):
        boxes = sum(len(axis.patches) for axis in figure.axes)
        left_out = f"left out as no object: {4 - boxes}"
        assert figure.get_suptitle() == f"{case.name}, slice {d}\nqueries: {boxes}, {left_out}"


def test_errors_are_one_message_with_the_way_out(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = run.splits["val"][0]
    depth = nifti.read_header(case.images[0])[1].shape[0]
    (tmp_path / "metrics.json").write_text('{"per_case": 3}')
    (tmp_path / "empty").mkdir()
    given = [word.replace("auto.pt", "given.pt") for word in run.queries]
    for argv, words in (
        ([*run.compare, "--case", "nobody"], f"no case nobody in the split val.*: {case.name}, "),
        (["compare", "--predictions", "empty", *run.compare[3:]], f"no file of {case.name}"),
        (["sheet", "--predictions", "empty"], "metrics.json: found no such file.*run evaluate.py"),
        (["sheet", "--predictions", "."], "metrics.json: found .*expected what evaluate.py writes"),
        (
            [*run.queries, case.name, "--slice", str(depth)],
            f"--slice {depth}: {case.name} has the slices 0 to",
        ),
        ([*run.queries, case.name, "--slice", "-1"], "--slice -1: "),
        ([*given, case.name], "found a model that is given its boxes"),
    ):
        with pytest.raises(SystemExit, match=f"^visualize.py: (?s:.*){words}"):
            visualize.main(argv)
    truth, geometry = nifti.read_label(case.label, 4)
    geometry.affine[:3, 3] += 20
    nifti.write_label_map(tmp_path / "moved.nii.gz", truth, geometry)
    with pytest.raises(ValueError, match="moved.nii.gz: found the affine"):
        visualize.read_picture(case, "moved.nii.gz", 4, "x")
    assert not list(tmp_path.glob("*.png"))
