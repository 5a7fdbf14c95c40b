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


@pytest.fixture
def cases(tmp_path, monkeypatch) -> tuple[layouts.Case, ...]:
    """A phantom, an untrained checkpoint, and shifted truths of the validation cases, scored."""
    monkeypatch.chdir(tmp_path)
    phantom.write_phantom("data/phantom", num_patients=4, seed=3)
    source = layouts.find_data("phantom", None)
    torch.manual_seed(0)
    model, sam = build_model(MaskSAMConfig("tiny", "b9", 1, 4, 4, (4, 64, 64), (64, 64)))
    torch.nn.init.normal_(model.class_tokens, std=5)
    content = checkpoint_content(model, sam, data.make_plan(source).as_dict()) | {"epoch": 1}
    write_checkpoint(tmp_path / "x.pt", content | {"arguments": {"data": "phantom", "root": "data/phantom"}})
    (tmp_path / "net").mkdir()
    for shift, case in enumerate(source.splits["val"], 1):
        label, geometry = nifti.read_label(case.label, 4)
        nifti.write_label_map(tmp_path / f"net/{case.name}.nii.gz", np.roll(label, 3 * shift, 2), geometry)
    evaluate.main("--predictions net --data phantom --workers 1".split())
    return source.splits["val"]


def test_worst_median_and_best_are_by_the_mean_over_scored_classes():
    def rank(convention="masksam", **dice) -> list[str]:
        cases = {case: [{"dice": d, "hd95": d and 10 * d} for d in values] for case, values in dice.items()}
        cases = {case: dict(zip("abc", each)) for case, each in cases.items()}
        results = {"scored": ["b", "a"], "per_case": cases, "convention": convention}
        return list(visualize.rank_cases(results).values())

    dice = {
        "p": [0.8, 0.8, 0],
        "q": [0.9, None, 0],
        "r": [0.1, 0.3, 1],
        "s": [0.6, 0.2, 1],
        "t": [0.7, 0.5, 1],
    }
    names, ends = (
        ("worst: r", "median: t", "best: q"),
        ("0.200, HD95 2.0", "0.600, HD95 6.0", "0.900, HD95 9.0"),
    )
    titles = [f"{name}, mean Dice {end}" for name, end in zip(names, ends)]
    assert rank(**dice, u=[None, None, 1]) == [f"{title} mm" for title in titles]
    assert rank("nnformer", **dice) == [f"{title} voxels" for title in titles]
    assert [title[:5] for title in rank(p=[0.5, 0.5, 0], q=[0.4, 0.4, 0])] == ["worst", "best:"]
    with pytest.raises(ValueError, match="no case"):
        rank(p=[None, None, 0.5])


def test_queries_that_are_an_object_come_in_the_order_of_their_probability():
    """A stub of 4 queries, 3 classes and 2 slices; in slice 0 everything is different."""
    classes = [[0.1, 0.6, 0.1, 0.2], [0.1, 0.1, 0.1, 0.7], [0.0, 0.0, 0.9, 0.1], [0.4, 0.1, 0.2, 0.3]]
    masks, boxes = torch.full((2, 4, 20, 40), -9.0), torch.rand(2, 4, 4)
    masks[1, 2, 5:10, 20:30], masks[1, 3] = 9, 9
    masks[1, 3, 5:10, 20:30] = -9
    outputs = {"class_logits": torch.stack([torch.eye(4) * 9, torch.tensor(classes).log()])}
    model = lambda volume: outputs | {"mask_logits": masks, "aux_mask_logits": -masks}  # noqa: E731
    model.config = SimpleNamespace(num_classes=3)
    model.prompt_generator = SimpleNamespace(prompts=lambda aux, size, given: (boxes, None))
    found, label_map = visualize.find_queries(model, torch.zeros(1, 2, 20, 40), 1)
    expected, inside = [(2, 2, 0.9), (0, 1, 0.6), (3, 0, 0.4)], (masks[1, 2] > 0).numpy()
    assert np.allclose([query[:3] for query in found], expected)
    assert np.allclose([query.box for query in found], boxes[1, [2, 0, 3]])
    assert np.array_equal(found[0].mask > 0.5, inside) and np.array_equal(found[0].aux_mask > 0.5, ~inside)
    assert np.array_equal(label_map == 2, inside)


def test_the_patch_is_centred_on_the_slice_and_its_labels():
    image = np.arange(10 * 30 * 40, dtype=np.float32).reshape(1, 10, 30, 40)
    label = np.zeros((10, 30, 40), np.uint8)
    label[:, 18:23, 7:12] = 1
    for d, first in ((0, 0), (5, 3), (9, 6)):
        patch, own, index = visualize.cut_window(data.Prepared(image, label, None), d, (4, 8, 10))
        assert np.allclose(patch, image[:, first : first + 4, 16:24, 4:14]) and index == d - first
        assert np.array_equal(own, label[first : first + 4, 16:24, 4:14])
    small = image[:, :2, :6, :6] + 5  # a volume without labels that is smaller than the patch
    patch, _, index = visualize.cut_window(data.Prepared(small, None, None), 1, (4, 8, 8))
    assert index == 2 and np.allclose(patch[0, index, 1:7, 1:7], small[0, 1]) and patch.min() == 5


def test_each_command_draws_the_cases_slices_and_queries_that_it_was_asked_for(cases, monkeypatch):
    figures, (first, second) = [], cases
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, file, **options: file.write(b"png"))
    ask, net = f"queries --ckpt x.pt --case {second.name}", "--predictions net --data phantom"
    for line in (f"compare {net} --case {second.name}", f"sheet {net}", ask, f"{ask} --slice 0"):
        visualize.main(line.split())
    compared, sheet, *asked = figures
    truth = nifti.read_label(second.label, 4)[0]
    d, prediction = pictures.choose_slices(truth, np.roll(truth, 6, 2))[0], np.roll(truth, 6, 2)
    title = f"slice {d}, errors: {np.count_nonzero(truth[d] != prediction[d])} voxels"
    assert compared.axes[3].get_title() == title and len(compared.subfigs) == 1
    titles = [part.get_suptitle().split(",")[0] for part in sheet.subfigs]
    assert titles == [f"worst: {second.name}", f"best: {first.name}"]  # which is shifted least
    for figure, d in zip(asked, (int((truth > 0).sum((1, 2)).argmax()), 0), strict=True):
        boxes = sum(len(axis.patches) for axis in figure.axes)
        name = f"{second.name}, slice {d}\nqueries: {boxes}, left out as no object: {4 - boxes}"
        assert figure.get_suptitle() == name
    plt.close("all")


def test_errors_are_one_message_with_the_way_out(cases, tmp_path):
    first, moved = cases[0].name, nifti.read_header(cases[0].images[0])[1]
    moved.affine[:3, 3] += 20
    for line, words in (
        ("compare --predictions net --data phantom --case nobody", f"no case nobody, .*: {first}, "),
        ("sheet --predictions data", "metrics.json: found FileNotFoundError.*run it first"),
        (f"queries --ckpt x.pt --case {first} --slice -1", f"--slice -1: {first} has the slices 0 to"),
        ("compare --predictions net --data phantom", f"{first}.nii.gz: found the affine"),
    ):
        if "affine" in words:
            nifti.write_label_map(tmp_path / f"net/{first}.nii.gz", np.zeros(moved.shape, np.uint8), moved)
        with pytest.raises(SystemExit, match=f"^visualize.py: (?s:.*){words}"):
            visualize.main(line.split())
