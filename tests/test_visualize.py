"""Pictures: contours, errors and boxes lie where the voxels lie, in mm; cases are ranked as they were scored."""

import json
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import data
import evaluate
from model import MaskSAMConfig
from support import layouts, nifti, phantom
from support.checkpoints import build_model, save_checkpoint
from tools import visualize

CLASSES = ("background", "a", "b")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, kept open to be looked at."""
    kept = []
    monkeypatch.setattr(visualize.plt, "close", kept.append)
    yield kept
    plt.close("all")


def picture(name: str = "case") -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(size=(6, 40, 50)).astype(np.float32)
    truth, prediction = np.zeros((6, 40, 50), np.uint8), np.zeros((6, 40, 50), np.uint8)
    truth[1:5, 10:20, 12:30], prediction[1:5, 13:20, 12:25] = 2, 2
    return name, image, truth, prediction


# ------------------------------------------------------------------------------------------------ truth and prediction


def test_contours_enclose_the_labelled_pixels_of_their_own_map(figures, tmp_path):
    visualize.draw_overlay([picture()], CLASSES, tmp_path / "x.png")
    axes = figures[0].axes
    rows, columns = visualize._window(picture()[2] > 0)  # the prediction lies inside the truth
    for axis, first_row, last_column in ((axes[0], 10, 30), (axes[1], 13, 25)):  # truth, then prediction
        (contour,) = axis.collections
        corners = np.concatenate([path.vertices for path in contour.get_paths()])
        low, high = corners.min(0), corners.max(0)
        # Pixel i reaches from i - 0.5 to i + 0.5; the contour runs half way between pixel centres, which is there.
        assert np.allclose(low, (12 - columns.start - 0.5, first_row - rows.start - 0.5))
        assert np.allclose(high, (last_column - columns.start - 0.5, 20 - rows.start - 0.5))


def test_every_case_has_its_row_and_every_class_its_name(figures, tmp_path):
    visualize.draw_overlay([picture("one"), picture("two")], CLASSES, tmp_path / "x.png")
    assert len(figures[0].axes) == 2 * 2 * visualize.NUM_SLICES
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    assert [part.get_suptitle() for part in figures[0].subfigs] == ["one", "two"]
    assert [len(part.axes) for part in figures[0].subfigs] == [2 * visualize.NUM_SLICES] * 2


def test_slices_are_chosen_where_something_is():
    _, _, truth, prediction = picture()
    assert visualize.choose_slices(truth, prediction) == [1, 3, 4]
    assert visualize.choose_slices(truth * 0, prediction * 0) == [1, 2, 4]
    assert visualize.choose_slices(truth[:1] * 0, prediction[:1] * 0) == [0]


def test_the_worst_slice_takes_the_place_of_its_neighbour():
    _, _, truth, prediction = picture()
    prediction[2, 30:35] = 1
    assert visualize.choose_slices(truth, prediction) == [1, 3, 4]
    assert visualize.choose_slices(truth, prediction, worst=True) in ([2, 3, 4], [1, 2, 4])
    prediction[4, 30:38] = 1
    assert visualize.choose_slices(truth, prediction, worst=True) == [1, 3, 4]
    assert visualize.choose_slices(truth, truth, worst=True) == [1, 3, 4]  # without errors none is the worst


def test_the_error_panel_marks_the_voxels_that_differ_and_no_others(figures, tmp_path):
    name, image, truth, prediction = picture()
    prediction[1:5, 10:12, 12:15], prediction[1:5, 22:24, 12:14] = 1, 1
    panels = ("image", "errors")
    visualize.draw_overlay([(name, image, truth, prediction)], CLASSES, tmp_path / "x.png", panels)
    axes, chosen = figures[0].axes[1::2], visualize.choose_slices(truth, prediction)
    rows, columns = visualize._window((truth > 0) | (prediction > 0))
    magenta, cyan, yellow = (1, 0, 1), (0, 1, 1), (1, 1, 0)
    legend = figures[0].legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    legend = dict(zip(names, (patch.get_facecolor()[:3] for patch in legend.legend_handles)))
    assert (legend["false positive"], legend["false negative"], legend["wrong class"]) == (magenta, cyan, yellow)
    for axis, d in zip(axes, chosen, strict=True):
        drawn = axis.images[1].get_array()
        assert axis.images[1].get_extent() == axis.images[0].get_extent()  # on the same pixels as the image
        for y in range(rows.start, rows.stop):
            for x in range(columns.start, columns.stop):
                red, green, blue, alpha = drawn[y - rows.start, x - columns.start]
                true, predicted = truth[d, y, x], prediction[d, y, x]
                if true == predicted:
                    assert alpha == 0
                else:
                    expected = magenta if true == 0 else cyan if predicted == 0 else yellow
                    assert (red, green, blue, alpha) == (*expected, 1)
        wrong = np.count_nonzero(truth[d] != prediction[d])
        assert wrong == 10 * 18 - 7 * 13 + 4 and axis.get_title() == f"slice {d}, errors: {wrong} voxels"


def test_a_millimetre_is_as_long_upwards_as_sideways(figures, tmp_path):
    spaced = visualize.Picture(*picture(), spacing=(8.0, 3.0, 1.5))
    visualize.draw_overlay([spaced], CLASSES, tmp_path / "x.png", ("image", "truth", "prediction", "errors"), False)
    for axis in figures[0].axes:
        per_column, per_row = np.abs(axis.transData.transform((1, 1)) - axis.transData.transform((0, 0)))
        assert np.isclose(per_row / per_column, 3.0 / 1.5)
    bar, label = figures[0].axes[0].lines[0], figures[0].axes[0].texts[0]
    assert label.get_text() == "20 mm" and np.isclose(np.ptp(bar.get_xdata()) * 1.5, 20)


def test_the_window_is_a_square_in_millimetres():
    filled = np.zeros((3, 90, 90), bool)
    filled[1, 40:50, 40:50] = True  # 30 x 10 mm
    rows, columns = visualize._window(filled, (3.0, 1.0))
    assert (rows.stop - rows.start) * 3 == columns.stop - columns.start == 45
    assert rows.start <= 40 and rows.stop >= 50 and columns.start <= 40 and columns.stop >= 50


def test_contrast_is_that_of_what_is_labelled():
    name, image, truth, prediction = picture()
    far = image.copy()
    far[:, 30:] = 30_000
    inside = [visualize._stretch(visualize.Picture(name, x, truth, prediction)).image[truth > 0] for x in (image, far)]
    assert np.array_equal(*inside) and inside[0].min() >= 0 and inside[0].max() <= 1
    empty = visualize._stretch(visualize.Picture(name, image * 0, truth * 0, prediction))
    assert np.isfinite(empty.image).all()


@pytest.mark.parametrize("place", [(0, 0), (39, 49), (20, 0)])
def test_the_window_stays_inside_the_image(place):
    filled = np.zeros((3, 40, 50), bool)
    filled[1][place] = True
    rows, columns = visualize._window(filled)
    assert filled[:, rows, columns].any()
    assert 0 <= rows.start < rows.stop <= 40 and 0 <= columns.start < columns.stop <= 50
    assert visualize._window(filled & False) == (slice(0, 40), slice(0, 50))


# -------------------------------------------------------------------------------------------------------------- ranking


def results(**dice: list[float | None]) -> dict:
    """As of metrics.json: classes a, b, c, of which a and b are scored; HD95 is ten times the Dice."""

    def scores(value: float | None) -> dict:
        return {"dice": value, "hd95": None if value is None else 10 * value}

    return {
        "scored": ["b", "a"],
        "per_case": {case: dict(zip("abc", map(scores, values))) for case, values in dice.items()},
    }


def test_worst_median_and_best_are_by_the_mean_over_scored_classes():
    made_up = results(
        p=[0.8, 0.8, 0], q=[0.9, None, 0], r=[0.1, 0.3, 1], s=[0.6, 0.2, 1], t=[0.7, 0.5, 1], u=[None, None, 1]
    )
    titles = visualize.rank_cases(made_up)
    assert list(titles.items()) == [
        ("r", "worst: r, mean Dice 0.200, HD95 2.0 mm"),
        ("t", "median: t, mean Dice 0.600, HD95 6.0 mm"),
        ("q", "best: q, mean Dice 0.900, HD95 9.0 mm"),
    ]
    assert visualize.rank_cases(made_up | {"convention": "nnformer"})["r"].endswith("2.0 voxels")


def test_few_cases_are_ranked_once():
    assert [title[:5] for title in visualize.rank_cases(results(p=[0.5, 0.5, 0])).values()] == ["worst"]
    assert list(visualize.rank_cases(results(p=[0.5, 0.5, 0], q=[0.4, 0.4, 0]))) == ["q", "p"]
    with pytest.raises(ValueError, match="no case"):
        visualize.rank_cases(results(p=[None, None, 0.5]))


# -------------------------------------------------------------------------------------------------------------- queries


def stub(form: str = "d") -> tuple[SimpleNamespace, torch.Tensor]:
    """A model of 4 queries, 3 classes and 2 slices of 20 x 40, and the boxes that it gives SAM."""
    probabilities = torch.tensor(
        [[0.1, 0.6, 0.1, 0.2], [0.1, 0.1, 0.1, 0.7], [0.0, 0.0, 0.9, 0.1], [0.4, 0.1, 0.2, 0.3]]
    )
    logits = torch.stack([torch.eye(4) * 9, probabilities.log()])  # another answer in slice 0
    masks = torch.full((2, 4, 20, 40), -9.0)
    masks[1, 2, 5:10, 20:30] = 9
    masks[1, 3] = -masks[1, 2]
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 1.0], [0.5, 0.25, 0.75, 0.5], [0.25, 0.1, 0.5, 0.9]])
    outputs = {"class_logits": logits, "mask_logits": masks, "aux_boxes": torch.rand(2, 4, 4)}
    outputs |= {} if form == "b" else {"aux_mask_logits": -masks}

    class Model(SimpleNamespace):
        def __call__(self, volume: torch.Tensor) -> dict:
            assert volume.shape == (1, 1, 2, 20, 40)
            return outputs

    generator = SimpleNamespace(prompts=lambda aux, size: (torch.stack([boxes.flip(0), boxes]), None))
    return Model(config=SimpleNamespace(num_classes=3), prompt_generator=generator), boxes


def test_queries_that_are_an_object_come_in_the_order_of_their_probability():
    model, boxes = stub()
    found, label_map = visualize.find_queries(model, torch.zeros(1, 2, 20, 40), 1)
    assert [(query.number, query.class_id) for query in found] == [(2, 2), (0, 1), (3, 0)]
    assert np.allclose([query.probability for query in found], [0.9, 0.6, 0.4])
    assert np.allclose([query.box for query in found], boxes[[2, 0, 3]])
    inside = np.zeros((20, 40), bool)
    inside[5:10, 20:30] = True
    assert np.array_equal(found[0].mask > 0.5, inside) and np.array_equal(found[0].aux_mask > 0.5, ~inside)
    assert np.array_equal(label_map == 2, inside)


@pytest.mark.parametrize("form", ["d", "b"])
def test_boxes_enclose_their_pixels_and_only_objects_have_one(figures, tmp_path, form):
    model, _ = stub(form)
    found, label_map = visualize.find_queries(model, torch.zeros(1, 2, 20, 40), 1)
    picture = visualize.Picture("x", np.zeros((1, 20, 40)), label_map[None], label_map[None], (9.0, 2.0, 1.0))
    visualize.draw_queries(picture, found, CLASSES, tmp_path / "x.png")
    upper, lower = figures[0].axes[:4], figures[0].axes[4:]
    assert [len(axis.patches) for axis in upper] == [0, 1, 1, 1] and not any(axis.patches for axis in lower)
    titles = [axis.get_title().splitlines()[0] for axis in upper]
    assert titles == ["truth", "query 2: b 0.90", "query 0: a 0.60", "query 3: background 0.40"]
    # x 0.5 ... 0.75 of 40 columns are pixels 20 ... 29, y 0.25 ... 0.5 of 20 rows are 5 ... 9: to their outer edges.
    (box,) = upper[1].patches
    assert np.allclose(box.get_bbox().extents, (19.5, 4.5, 29.5, 9.5))
    (outline,) = lower[1].collections  # and so is the outline of the mask that fills the box
    corners = np.concatenate([path.vertices for path in outline.get_paths()])
    assert np.allclose((corners.min(0), corners.max(0)), ((19.5, 4.5), (29.5, 9.5)))
    assert [len(axis.images) for axis in upper[1:]] == [1 if form == "b" else 2] * 3
    for axis in figures[0].axes:
        per_column, per_row = np.abs(axis.transData.transform((1, 1)) - axis.transData.transform((0, 0)))
        assert np.isclose(per_row / per_column, 2)


def test_many_queries_go_below_each_other(figures, tmp_path):
    query = visualize.Query(0, 1, 0.5, np.array([0, 0, 1, 1]), None, np.zeros((8, 8)))
    one = visualize.Picture("x", np.zeros((1, 8, 8)), *np.zeros((2, 1, 8, 8), np.uint8))
    visualize.draw_queries(one, [query._replace(number=n) for n in range(9)], CLASSES, tmp_path / "x.png", columns=4)
    grid = np.reshape(figures[0].axes, (6, 4))
    titles = [axis.get_title()[:7] for axis in grid[::2].flat]
    assert titles == ["truth", *(f"query {n}" for n in range(9)), "", ""]
    visualize.draw_queries(one, [], CLASSES, tmp_path / "x.png")
    assert [len(axis.images) for axis in figures[1].axes] == [1, 0, 1, 0]  # truth and prediction, and room for a title


@pytest.mark.parametrize(("d", "first"), [(0, 0), (5, 3), (9, 6)])
def test_the_window_of_the_model_is_centred_on_the_slice_and_its_labels(d, first):
    image = np.arange(10 * 30 * 40, dtype=np.float32).reshape(1, 10, 30, 40)
    label = np.zeros((10, 30, 40), np.uint8)
    label[:, 18:23, 7:12] = 1
    window, own_label, index = visualize.cut_window(data.Prepared(image, label, None), d, (4, 8, 10))
    assert np.allclose(window, image[:, first : first + 4, 16:24, 4:14]) and index == d - first
    assert np.array_equal(own_label, label[first : first + 4, 16:24, 4:14])


def test_a_volume_smaller_than_the_window_and_without_labels_is_all_inside():
    image = np.arange(2 * 6 * 6, dtype=np.float32).reshape(1, 2, 6, 6) + 5
    window, _, index = visualize.cut_window(data.Prepared(image, None, None), 1, (4, 8, 8))
    assert index == 2 and np.allclose(window[0, index, 1:7, 1:7], image[0, 1]) and window.min() == 5


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    """A phantom, an untrained checkpoint, and perturbed truths of the validation cases, scored."""
    folder = tmp_path_factory.mktemp("run")
    root, predictions = folder / "phantom", folder / "predictions"
    phantom.write_phantom(root, num_patients=6, seed=3)
    source = layouts.find_data("phantom", str(root))
    torch.manual_seed(0)
    model, sam = build_model(MaskSAMConfig("tiny", "b9", 1, 4, 8, (4, 64, 64), (64, 64)))
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.class_tokens, std=5)
    arguments = {"data": "phantom", "root": str(root)}
    plan = data.make_plan(source).as_dict()
    save_checkpoint(folder / "best.pt", model, sam, plan, epoch=1, arguments=arguments)
    predictions.mkdir()
    for shift, case in enumerate(source.splits["val"], 1):
        label, geometry = nifti.read_label(case.label, 4)
        nifti.write_label_map(predictions / f"{case.name}.nii.gz", np.roll(label, 3 * shift, 2), geometry)
    options = ["--data", "phantom", "--root", str(root), "--workers", "1"]
    evaluate.main(["--predictions", str(predictions), *options])
    return SimpleNamespace(folder=folder, root=str(root), predictions=str(predictions), cases=source.splits["val"])


def compare_options(run, *others: str) -> list[str]:
    return ["compare", "--predictions", run.predictions, "--data", "phantom", "--root", run.root, *others]


def test_compare_draws_the_named_cases_slice_by_slice(phantom_run, figures, tmp_path, capsys):
    case, path = phantom_run.cases[1], tmp_path / "new.png"
    visualize.main(compare_options(phantom_run, "--case", case.name, "--output", str(path)))
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in capsys.readouterr().out
    (part,) = figures[0].subfigs
    assert part.get_suptitle() == case.name and len(part.axes) == 4 * visualize.NUM_SLICES
    _, geometry = nifti.read_image(case.images[0])
    truth = nifti.read_label(case.label, 4)[0]
    prediction = np.roll(truth, 6, 2)  # the second case's
    d = visualize.choose_slices(truth, prediction)[0]
    assert part.axes[3].get_title() == f"slice {d}, errors: {np.count_nonzero(truth[d] != prediction[d])} voxels"
    assert np.isclose(part.axes[0].get_aspect(), geometry.spacing[1] / geometry.spacing[2])


def test_compare_spreads_its_cases_over_the_split(phantom_run, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "NUM_CASES", 2)
    cases = layouts.find_data("phantom", phantom_run.root).splits["train"]
    for case in cases:
        shutil.copy(case.label, tmp_path / f"{case.name}.nii.gz")
    options = compare_options(phantom_run, "--split", "train", "--output", str(tmp_path / "x.png"))
    options[2] = str(tmp_path)
    visualize.main(options)
    names = [case.name for case in cases]
    assert len(names) > 2
    assert [part.get_suptitle() for part in figures[0].subfigs] == [names[0], names[-1]]


def test_the_sheet_needs_only_the_folder_that_was_scored(phantom_run, figures, tmp_path):
    options = ["sheet", "--predictions", phantom_run.predictions, "--root", phantom_run.root]
    visualize.main([*options, "--output", str(tmp_path / "sheet.png")])
    titles = [part.get_suptitle() for part in figures[0].subfigs]
    assert [title.split(",")[0] for title in titles] == [  # the second case is shifted further
        f"worst: {phantom_run.cases[1].name}", f"best: {phantom_run.cases[0].name}"
    ]  # fmt: skip
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_queries_of_the_slice_with_most_foreground_or_of_another(phantom_run, figures, tmp_path):
    cases = layouts.find_data("phantom", phantom_run.root).splits["train"]
    fullest = [int((nifti.read_label(case.label, 4)[0] > 0).sum((1, 2)).argmax()) for case in cases]
    case, most = next((case, d) for case, d in zip(cases, fullest) if d > 0)  # in others it is the first slice
    options = ["queries", "--ckpt", str(phantom_run.folder / "best.pt"), "--split", "train", "--case", case.name]
    options += ["--output", str(tmp_path / "queries.png")]
    visualize.main(options)
    visualize.main([*options, "--slice", "0"])
    for figure, d in zip(figures, (most, 0)):
        title = figure.get_suptitle()
        boxes = sum(len(axis.patches) for axis in figure.axes)
        assert title == f"{case.name}, slice {d}\nqueries: {boxes}, left out as no object: {8 - boxes}"
    assert (tmp_path / "queries.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_message_with_the_way_out(phantom_run, tmp_path):
    name, checkpoint = phantom_run.cases[0].name, str(phantom_run.folder / "best.pt")
    few = tmp_path / "few"
    few.mkdir()
    queries = ["queries", "--ckpt", checkpoint, "--output", str(tmp_path / "x.png"), "--case"]
    depth = nifti.read_header(phantom_run.cases[0].images[0])[1].shape[0]
    for argv, words in (
        (compare_options(phantom_run, "--case", "nobody"), f"no case nobody in the split val.*: {name}, "),
        (["compare", "--predictions", str(few), *compare_options(phantom_run)[3:]], f"no file of {name}"),
        (["sheet", "--predictions", str(few)], "metrics.json: found no such file.*run evaluate.py"),
        (compare_options(phantom_run, "--split", "other"), "--split other: .* has train, val"),
        ([*queries, "nobody"], f"no case nobody in the split val.*: {name}, "),
        ([*queries, name, "--slice", str(depth)], f"--slice {depth}: {name} has the slices 0 to {depth - 1}"),
        ([*queries, name, "--slice", "-1"], f"--slice -1: {name} has the slices 0 to {depth - 1}"),
    ):
        with pytest.raises(SystemExit, match=f"^visualize.py: (?s:.*){words}"):
            visualize.main(argv)
    (few / "metrics.json").write_text('{"per_case": 3}')
    with pytest.raises(SystemExit, match="metrics.json: found .*expected what evaluate.py writes"):
        visualize.main(["sheet", "--predictions", str(few)])
    assert not (tmp_path / "x.png").exists()


def test_a_prediction_that_lies_elsewhere_is_refused(phantom_run):
    case = phantom_run.cases[0]
    other = f"{phantom_run.predictions}/{phantom_run.cases[1].name}.nii.gz"
    truth, geometry = nifti.read_label(case.label, 4)
    moved = phantom_run.folder / "moved.nii.gz"
    affine = geometry.affine.copy()
    affine[:3, 3] += 20
    nifti.write_label_map(moved, truth, nifti.Geometry(affine, geometry.shape, geometry.spacing))
    with pytest.raises(ValueError, match="moved.nii.gz: found the affine"):
        visualize.read_picture(case, moved, 4, "x")
    assert visualize.read_picture(phantom_run.cases[1], other, 4, "x").spacing == geometry.spacing


# --------------------------------------------------------------------------------------------------------------- curves


def test_curves_hold_every_term_and_gaps_where_nothing_was_measured(figures, tmp_path):
    entries = [
        {"epoch": 1, "loss": 3.0, "loss_class": 1.0, "val_dice": None},
        {"epoch": 2, "loss": 2.0, "loss_class": 0.5, "val_dice": 0.5, "val_dice_per_class": {"a": 0.5, "b": None}},
        {"epoch": 3, "loss": 1.0, "loss_class": 0.4, "val_dice": 0.6, "val_dice_per_class": {"a": 0.7, "b": 0.5}},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    visualize.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    left, right = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert drawn == {"loss": [3, 2, 1], "class": [1, 0.5, 0.4]}
    drawn = {line.get_label(): line.get_ydata() for line in right.lines}
    assert list(drawn["mean"]) == [0.5, 0.6] and np.isnan(drawn["b"][0]) and drawn["b"][1] == 0.5
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_validation_still_has_curves(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"epoch": 1, "loss": 3.0, "val_dice": None}) + "\n")
    visualize.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"old")

    def half(figure, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(visualize.plt.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        visualize.draw_overlay([picture()], CLASSES, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
