"""Commands that draw: the right cases, slices and queries, ranked as they were scored."""

from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import torch

import data
import evaluate
from networks import checkpoint
from support import layouts, nifti, phantom, pictures
from tools import visualize
from volumes import refuses, save


def test_worst_median_and_best_are_by_the_mean_over_scored_classes():
    def rank(convention="masksam", **dice) -> list[str]:
        cases = {case: dict(zip("abc", ({"dice": d, "hd95": d} for d in row))) for case, row in dice.items()}
        results = {"scored": ["b", "a"], "per_case": cases, "convention": convention}
        return list(visualize.rank_cases(results).values())

    dice = {"p": [0.8, 0.8, 0], "q": [0.9, None, 0], "r": [0.1, 0.3, 1], "t": [0.7, 0.5, 1]}
    worst, median, best = rank(**dice, u=[None, None, 1])
    assert worst == "worst: r, mean Dice 0.200, HD95 0.2 mm" and median.startswith("median: t, mean Dice 0.6")
    assert best.startswith("best: q, mean Dice 0.9") and rank("nnformer", **dice)[0].endswith("0.2 voxels")
    refuses("no case", rank, p=[None, None, 0.5])


def test_queries_come_with_their_boxes_objects_first_in_the_order_of_their_probability():
    """A stub of 4 queries, 3 classes and 2 slices; in slice 0 everything is different."""
    classes = [[0.1, 0.6, 0.1, 0.2], [0.1, 0.1, 0.1, 0.7], [0.0, 0.0, 0.9, 0.1], [0.4, 0.1, 0.2, 0.3]]
    masks, boxes, learned = torch.full((2, 4, 20, 40), -9.0), torch.rand(2, 4, 4), torch.rand(2, 4, 4)
    masks[1, 2, 5:10, 20:30] = 9
    masks[1, 3] = -masks[1, 2]
    outputs = {"class_logits": torch.stack([torch.eye(4) * 9, torch.tensor(classes).log()])}
    outputs |= {"mask_logits": masks, "aux_mask_logits": -masks, "aux_boxes": learned}
    model = Mock(return_value=outputs, config=Mock(num_classes=3))
    model.prompt_generator.prompts.return_value = boxes, None
    found, maps = visualize.find_queries(model, torch.zeros(1, 2, 20, 40), 1)
    assert [(query.number, query.class_id) for query in found] == [(2, 2), (0, 1), (3, 0), (1, 3)]
    assert np.allclose([query.probabilities for query in found], torch.tensor(classes)[[2, 0, 3, 1]])
    for name, expected in (("box prompt", boxes), ("learned box", learned)):
        assert np.allclose([query.boxes[name] for query in found], expected[1, [2, 0, 3, 1]])
    assert np.allclose(found[2].boxes["mask's box"], (0.5, 0.25, 0.75, 0.5))
    for drawn in (found[0].mask > 0.5, found[0].aux_mask < 0.5, maps.argmax(0) == 2):
        assert np.array_equal(drawn, masks[1, 2] > 0)


def test_the_patch_is_centred_on_the_slice_and_its_labels():
    image = np.arange(10 * 30 * 40, dtype=np.float32).reshape(1, 10, 30, 40)
    label = np.zeros((10, 30, 40), np.uint8)
    label[:, 18:23, 7:12] = 1
    for d, first in ((0, 0), (5, 3), (9, 6)):
        patch, own, index = visualize.cut_window(data.Prepared(image, label, None), d, (4, 8, 10))
        assert np.allclose(patch, image[:, first : first + 4, 16:24, 4:14]) and index == d - first
        assert own.sum() == 4 * 25
    small = data.Prepared(image[:, :2, :6, :6] + 5, None, None)  # smaller than the patch, without labels
    patch, _, index = visualize.cut_window(small, 1, (4, 8, 8))
    assert index == 2 and np.allclose(patch[0, 2, 1:7, 1:7], small.image[0, 1]) and patch.min() == 5


def test_commands_draw_the_cases_slices_queries_and_features_that_they_are_asked_for(monkeypatch):
    """On a phantom, an untrained checkpoint, and shifted truths of the validation cases, scored."""
    phantom.write_phantom("data/phantom", num_patients=4, seed=3)
    source = layouts.find_data("phantom", None)
    first, second = source.splits["val"]
    checkpoint("x.pt", source, (4, 64, 64), fine=True)
    for shift, case in ((3, first), (6, second)):
        label, geometry = nifti.read_label(case.label, 4)
        save(f"net/{case.name}.nii.gz", np.roll(label, shift, 2).T, geometry.affine)
        save(f"truth/{case.name}.nii.gz", label.T, geometry.affine)
    evaluate.main("--predictions net --data phantom --workers 1".split())

    figures, shown, net = [], [], "--predictions net --data phantom"
    for name, kept in (("draw_rows", 0), ("draw_walk", slice(None))):
        draw = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, lambda *a, d=draw, k=kept: shown.append(a[k]) or d(*a))
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, file, **options: file.write(b"png"))
    ask = f"--ckpt x.pt --case {second.name}"
    several = f"compare --predictions net truth --names A B --data phantom --case {second.name}"
    page = f"walk {ask} --slice 3"
    for line in (several, f"compare {net}", f"queries {ask}", f"queries {ask} --slice 0", page):
        visualize.main(line.split())
    compared, ranked, *asked = figures
    assert [part.get_suptitle() for part in compared.subfigs] == [second.name]
    arrays = nifti.read_image(second.images[0])[0][0], label
    (_, row), d = shown[0][0], (label != np.roll(label, 6, 2)).sum((1, 2)).argmax()
    assert [place[1:] for place in row] == [(d, "truth"), (d, "errors"), (d, "errors")]
    for (shape, *_), found in zip(row, (np.roll(label, 6, 2),) * 2 + (label,)):
        assert all(map(np.array_equal, shape[1:4], (*arrays, found)))
    titles = [axis.get_title() for axis in compared.axes]
    assert titles == [f"slice {d}, truth", titles[1], "B, Dice 1.000"] and titles[1].startswith("A, Dice 0.")
    titles = [part.get_suptitle().split(",")[0] for part in ranked.subfigs]
    assert titles == [f"worst: {second.name}", f"best: {first.name}"]  # which is shifted least
    for figure, d in zip(asked, ((label > 0).sum((1, 2)).argmax(), 0)):
        boxes = sum(len(axis.patches) for axis in figure.axes)
        title = f"{second.name}, slice {d}\nqueries: {boxes}; no object, not drawn: {4 - boxes}"
        assert figure.subfigs[0].get_suptitle() == title
    _, _, views, shapes, _, maps, *_ = shown[-1]
    network, _, patch, index, _ = visualize.open_slice(visualize.parse_arguments(page.split()))
    with torch.no_grad():
        neck, taps = network.encode(network.stem(patch.transpose(0, 1)))
    for (title, view), feature in zip(views[1:], (*taps, neck), strict=True):
        assert title.endswith(f" {tuple(feature.shape)}")
        assert np.allclose(view, pictures.colour_map(feature[index].numpy()))
    assert shapes == [(1, *patch.shape), neck.shape, (4, 4, 64, 64), (4, 4, 5), (4, 4, 64, 64), maps.shape]
    plt.close("all")

    moved = geometry.affine + 20 * np.eye(4, k=3)  # along x
    save(f"net/{second.name}.nii.gz", label.transpose(), moved)
    for line, words in (
        (f"compare {net} --case nobody", "no case nobody, expected one of 8: patient001_frame01, "),
        (f"compare {net}", f"{second.name}.nii.gz: found the affine"),
        ("compare --predictions data", "metrics.json: found no such file, .*; run it first"),
        (f"queries {ask} --slice -1", f"--slice -1: {second.name} has the slices 0 to"),
    ):
        refuses(f"^visualize.py: (?s:.*){words}", visualize.main, line.split())
