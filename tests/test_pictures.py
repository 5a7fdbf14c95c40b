"""Pictures: contours, errors and boxes lie where the voxels lie, and lengths are true in mm."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from support import pictures
from support.pictures import Picture, Query

CLASSES = ("background", "a", "b")


@pytest.fixture
def figures(monkeypatch):
    """The saved figures, kept open to be looked at."""
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
    """Of a contour. Pixel i reaches from i - 0.5 to i + 0.5."""
    vertices = np.concatenate([path.vertices for path in axis.collections[0].get_paths()])
    return (*vertices.min(0), *vertices.max(0))


def test_contours_enclose_the_labelled_pixels_of_their_own_map(figures, tmp_path):
    pictures.draw_overlay([picture(), picture(name="two")], CLASSES, tmp_path / "x.png")
    assert [part.get_suptitle() for part in figures[0].subfigs] == ["case", "two"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    rows, columns = pictures._window(picture().truth > 0)  # the prediction lies inside the truth
    for axis, first_row, last_column in zip(figures[0].axes, (10, 13), (30, 25)):  # truth, then prediction
        expected = np.array([12, first_row, last_column, 20]) - 0.5
        assert np.allclose(corners(axis), expected - [columns.start, rows.start] * 2)


def test_slices_are_chosen_where_there_are_labels_and_the_worst_replaces_its_neighbour():
    _, _, truth, prediction, _ = picture()
    assert pictures.choose_slices(truth, prediction) == [1, 3, 4]
    assert pictures.choose_slices(truth, truth, worst=True) == [1, 3, 4]  # no slice has an error
    assert pictures.choose_slices(truth * 0, truth * 0) == [1, 2, 4]
    prediction[2, 30:35] = 1
    assert 2 in pictures.choose_slices(truth, prediction, worst=True)


def test_the_error_panel_marks_the_voxels_that_differ_and_no_others(figures, tmp_path):
    shown = picture(spacing=(8.0, 3.0, 1.5))
    shown.prediction[1:5, 10:12, 12:15], shown.prediction[1:5, 22:24, 12:14] = 1, 1
    pictures.draw_overlay([shown], CLASSES, tmp_path / "x.png", ("image", "errors"), one_row=False)
    window, first = pictures._window(shown.truth + shown.prediction > 0, (3.0, 1.5)), figures[0].axes[0]
    kinds = {handle.get_label(): handle.get_facecolor() for handle in figures[0].legends[0].legend_handles}
    for axis, d in zip(figures[0].axes[1::2], pictures.choose_slices(*shown[2:4]), strict=True):
        drawn, true, found = axis.images[1].get_array(), shown.truth[d, *window], shown.prediction[d, *window]
        assert axis.images[1].get_extent() == axis.images[0].get_extent()  # on the pixels of the image
        wrong = {"false positive": true == 0, "false negative": found == 0, "wrong class": true * found > 0}
        for name, where in wrong.items():
            assert (drawn[where & (true != found)] == kinds[name]).all() and (where & (true != found)).any()
        assert (drawn[true == found][:, 3] == 0).all()
        assert axis.get_title() == f"slice {d}, errors: {np.count_nonzero(true != found)} voxels"
        column, row = np.abs(axis.transData.transform((1, 1)) - axis.transData.transform((0, 0)))
        assert np.isclose(row / column, 3.0 / 1.5)  # true to scale
    assert first.texts[0].get_text() == "20 mm" and np.isclose(np.ptp(first.lines[0].get_xdata()) * 1.5, 20)


def test_the_window_is_a_square_in_mm_inside_the_image_and_contrast_is_that_of_the_labels():
    for place, mm, expected in (
        (np.s_[40:50, 40:50], (3.0, 1.0), np.s_[38:53, 23:68]),  # 30 x 10 mm
        (np.s_[89, 0], (1.0, 1.0), np.s_[89:90, 0:1]),
        (np.s_[0:0], (1.0, 1.0), np.s_[0:90, 0:90]),  # nothing to show: the whole image
    ):
        filled = np.zeros((3, 90, 90), bool)
        filled[1][place] = True
        assert pictures._window(filled, mm) == expected
    far, truth = picture().image.copy(), picture().truth
    far[:, 30:] = 30_000
    inside = [pictures._stretch(shown).image[truth > 0] for shown in (picture(), picture(image=far))]
    assert np.array_equal(*inside) and inside[0].min() >= 0 and inside[0].max() <= 1
    assert np.isfinite(pictures._stretch(picture(image=far * 0, truth=truth * 0)).image).all()


def test_box_prompts_and_outlines_enclose_their_pixels(figures, tmp_path):
    mask, box = np.zeros((20, 40)), np.array([0.5, 0.25, 0.75, 0.5])
    mask[5:10, 20:30] = 1
    shown = Picture("x", np.zeros((1, 20, 40)), *np.zeros((2, 1, 20, 40), np.uint8))
    queries = [Query(n, 2, 0.9, box, aux, mask) for n, aux in enumerate([mask, None, mask, None])]
    pictures.draw_queries(shown, queries, CLASSES, tmp_path / "x.png", columns=4)
    grid = np.reshape(figures[0].axes, (4, 4))  # two bands of prompts above final masks
    titles = [axis.get_title().splitlines() for axis in grid[::2].flat]
    prompts = ["prompts: mask and box", "prompts: box"] * 2
    assert titles == [["truth"], *([f"query {n}: b 0.90", prompts[n]] for n in range(4)), [], [], []]
    for (upper, lower), images in zip((grid[:2, 1], grid[:2, 2]), (2, 1)):
        assert np.allclose(upper.patches[0].get_bbox().extents, (19.5, 4.5, 29.5, 9.5))
        assert np.allclose(corners(lower), (19.5, 4.5, 29.5, 9.5)) and not lower.patches
        assert len(upper.images) == images


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
    assert all(tick == int(tick) for axis in (left, right) for tick in axis.get_xticks())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
