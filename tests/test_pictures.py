"""Pictures: contours, errors and boxes lie where the voxels lie, and lengths are true in mm."""

import json
import shlex

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from support import pictures
from support.pictures import Picture, Query

CLASSES = ("background", "a", "b")


@pytest.fixture
def figures(monkeypatch):
    kept = []
    monkeypatch.setattr(pictures.plt, "close", kept.append)
    yield kept
    plt.close("all")


def picture(**changes) -> Picture:
    image = np.random.default_rng(0).normal(size=(6, 40, 50)).astype(np.float32)
    truth, prediction = np.zeros((2, 6, 40, 50), np.uint8)
    truth[1:5, 10:20, 12:30], prediction[1:5, 13:20, 12:25] = 2, 2
    return Picture("case", image, truth, prediction)._replace(**changes)


def corners(axis: plt.Axes) -> tuple:
    """Of the last contour. Pixel i reaches from i - 0.5 to i + 0.5."""
    vertices = np.concatenate([path.vertices for path in axis.collections[-1].get_paths()])
    return (*vertices.min(0), *vertices.max(0))


def test_contours_enclose_their_pixels_and_errors_are_the_voxels_that_differ(figures, tmp_path):
    shown = picture(spacing=(8.0, 3.0, 1.5), sides="RL")
    shown.prediction[1:5, 10:12, 12:15], shown.prediction[1:5, 22:24, 12:14] = 1, 1
    row = [(shown, 2, kind) for kind in ("truth", "prediction", "errors")]
    rows = [("other", [(picture(), 1, "truth")]), ("row", row)]
    pictures.draw_rows(rows, CLASSES, tmp_path / "x.png", pictures.ERRORS.items())
    axes, kinds = figures[0].subfigs[1].axes, figures[0].legends[0].legend_handles
    kinds = {handle.get_label(): handle.get_facecolor() for handle in kinds}
    window = pictures._window(shown.truth + shown.prediction > 0, (3.0, 1.5))
    true, found = shown.truth[2, *window], shown.prediction[2, *window]
    grey, drawn = axes[2].images
    for axis, label_map in zip(axes, (true, found, found)):
        y, x = np.nonzero(label_map == 2)
        assert np.allclose(corners(axis), (x.min() - 0.5, y.min() - 0.5, x.max() + 0.5, y.max() + 0.5))
    assert drawn.get_extent() == grey.get_extent()  # on the pixels of the image
    for name, where in {"too much": true == 0, "missed": found == 0, "wrong class": true * found > 0}.items():
        colours = drawn.get_array()[where & (true != found)]
        assert len(colours) and (colours == kinds[name]).all()
    assert (drawn.get_array()[true == found][:, 3] == 0).all()
    both = 2 * np.sum((true == 2) & (found == 2)) / (np.sum(true == 2) + np.sum(found == 2))
    dice = f"Dice {both / 2:.3f}"  # of class b, and 0 of class a
    titles = ["slice 2, truth", f"slice 2, prediction, {dice}", f"case, {dice}"]
    assert [axis.get_title() for axis in axes] == titles
    column, line = np.abs(np.diff(axes[0].transData.transform([(0, 0), (1, 1)]), axis=0))[0]
    assert np.isclose(line / column, 3.0 / 1.5)  # true to scale
    bar, *sides = axes[0].texts
    assert bar.get_text() == "20 mm" and np.isclose(np.ptp(axes[0].lines[0].get_xdata()) * 1.5, 20)
    assert [(side.get_text(), side.get_position()[0] < 0.5) for side in sides] == [("R", True), ("L", False)]


def test_the_sides_are_the_patients_where_w_runs_between_them():
    turned = np.array([[-0.9, 0.4, 0], [0.4, 0.9, 0], [0, 0, 1]])  # columns: directions of W, H, D
    for frame, sides in ((np.eye(3), "LR"), (turned, "RL"), (np.eye(3)[[1, 0, 2]], "")):
        assert pictures.sides_of(frame) == sides


def test_slices_window_and_contrast_are_those_of_the_labels():
    _, _, truth, prediction, *_ = picture()
    assert pictures.choose_slices(truth, prediction) == [1, 3, 4]
    assert pictures.choose_slices(truth * 0, truth * 0) == [1, 2, 4]  # no label
    for place, mm, expected in (
        (np.s_[40:50, 40:50], (3.0, 1.0), np.s_[38:53, 23:68]),  # 30 x 10 mm in a square of 45 mm
        (np.s_[89, 0], (1.0, 1.0), np.s_[89:90, 0:1]),
        (np.s_[0:0], (1.0, 1.0), np.s_[0:90, 0:90]),  # nothing to show: the whole image
    ):
        filled = np.zeros((3, 90, 90), bool)
        filled[1][place] = True
        assert pictures._window(filled, mm) == expected
    far = picture()
    far.image[:, 30:] = 30_000
    low, high = pictures._levels(picture())
    assert pictures._levels(far) == (low, high) and low <= far.image[truth > 0].min()
    assert high >= far.image[truth > 0].max() and pictures._levels(picture(image=truth * 0.0))[0] < 0


def test_box_prompts_and_outlines_enclose_their_pixels(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COLUMNS", 4)
    mask, box = np.zeros((20, 40)), np.array([0.5, 0.25, 0.75, 0.5])
    mask[5:10, 20:30] = 1
    shown = Picture("x", np.zeros((1, 20, 40)), *np.zeros((2, 1, 20, 40), np.uint8))
    chances, boxes = np.array([0.0, 0.1, 0.9, 0.0]), {"learned box": box / 2, "box prompt": box}
    queries = [Query(n, 2, chances, boxes, aux, mask) for n, aux in enumerate([mask, None, mask, None])]
    pictures.draw_queries(shown, queries, CLASSES, tmp_path / "x.png")
    grid = np.reshape(figures[0].axes, (4, 4))  # two bands of prompts above final masks
    for n in range(1, 5):
        upper, lower = grid[n // 4 * 2 :, n % 4][:2]
        assert upper.get_title() == f"query {n - 1}: b 0.90"
        assert np.allclose(upper.patches[0].get_bbox().extents, (19.5, 4.5, 29.5, 9.5)) and not lower.patches
        assert np.allclose(corners(lower), (19.5, 4.5, 29.5, 9.5)) and len(upper.images) == 1 + n % 2


def test_curves_have_whole_epochs_every_term_and_gaps_where_nothing_was_measured(figures, tmp_path):
    lines = [{"epoch": 1, "loss": 3.0, "loss_class": 1.0, "val_dice": None}]
    for epoch, dice in ((2, None), (3, 0.5)):
        scores = {"val_dice": 0.5, "val_dice_per_class": {"b": dice}}
        lines.append({"epoch": epoch, "loss": 1.0, "loss_class": 0.5, **scores})
    for used in (lines, lines[:1]):  # a run without any validation has curves too
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in used))
        pictures.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    left, right = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in (*left.lines, right.lines[0])}
    assert drawn == {"loss": [3, 1, 1], "class": [1, 0.5, 0.5], "mean": [0.5, 0.5]}
    assert np.array_equal(right.lines[1].get_ydata(), [np.nan, 0.5], equal_nan=True)
    assert np.array_equal(right.lines[1].get_color(), pictures._colours(["background", "b"])[1])
    assert all(tick == int(tick) for axis in (left, right) for tick in axis.get_xticks())


def test_a_walk_draws_features_by_their_strongest_components_queries_and_the_semantic_map(figures, tmp_path):
    patterns, directions = np.random.default_rng(0).normal(size=(2, 30)), np.eye(8)[[5, 2]]
    colours = pictures.colour_map((directions.T * (3, 1) @ patterns).reshape(8, 5, 6) + 7)
    for pattern, channel in zip(patterns, colours.reshape(30, 3).T):
        assert abs(np.corrcoef(pattern, channel)[0, 1]) > 0.9
    truth = np.zeros((1, 20, 40), np.uint8)
    truth[0, 5:10, 20:30] = 2
    boxes = {"box prompt": np.array([0, 0, 1, 1])}
    query = Query(3, 2, np.array([0.1, 0.2, 0.7, 0]), boxes, None, truth[0] / 2)
    shown, maps = Picture("x", truth * 1.0, truth, truth), np.stack([truth[0] == i for i in range(3)])
    views = [(name, colours) for name in ("stem", "1", "2", "3", "4", "neck")]
    shapes = [(i,) for i in range(6)]
    pictures.draw_walk(shown, "guide", views, shapes, [query], maps, CLASSES, tmp_path / "x.png")
    rows = [part.axes for part in figures[0].subfigs]
    places = ("2.5 i", "3a", "3b", "3c", "3c", "(K, H, W)")
    for i, (part, place) in enumerate(zip(figures[0].subfigs, places)):
        assert place in part.get_suptitle() and f"({i},)" in part.get_suptitle()
    assert [axis.images[0].get_extent() for axis in (rows[0][1], *rows[1])] == [[-0.5, 39.5, -0.5, 19.5]] * 6
    assert np.allclose([bar.get_width() for bar in rows[3][0].patches], query.probabilities)
    assert [axis.get_title() for axis in rows[5][3:]] == ["prediction, Dice 1.000", "truth"]
    assert np.array_equal(rows[5][1].images[0].get_array().any(-1), truth[0] == 2)


def test_viewers_get_an_id_a_name_and_a_colour_for_each_class(tmp_path):
    pictures.write_label_names(tmp_path, ("background", "left lung", "RV"))
    rows = [shlex.split(line) for line in (tmp_path / "labels.txt").read_text().splitlines()]
    shown = [",".join((row[0], *row[4:])) for row in rows]
    assert shown == ["0,0,0,0,background", "1,1,1,1,left lung", "2,1,1,1,RV"]
    table = np.loadtxt(tmp_path / "labels.ctbl", dtype=np.str_, encoding="utf-8")
    assert " ".join(table[:, 1]) == "background left_lung RV" and " ".join(table[:, 5]) == "0 255 255"
    assert [row[1:4] for row in rows] == table[:, 2:5].tolist()
    drawn = matplotlib.colors.to_rgb(pictures._colours(["background", "left lung", "RV"])[2])
    assert rows[2][1:4] == [str(round(255 * part)) for part in drawn]


def test_a_long_title_of_a_single_panel_is_not_cut_off():
    figure, _ = pictures._start(["median: hippocampus_338, mean Dice 0.874, HD95 1.4 mm"], 1)
    figure.draw_without_rendering()
    title = figure.subfigs[0]._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
