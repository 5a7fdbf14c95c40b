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


def picture(name: str = "case", **changes) -> Picture:
    image = np.random.default_rng(0).normal(size=(6, 40, 50)).astype(np.float32)
    truth, prediction = np.zeros((2, 6, 40, 50), np.uint8)
    truth[1:5, 10:20, 12:30], prediction[1:5, 13:20, 12:25] = 2, 2
    return Picture(name, image, truth, prediction)._replace(**changes)


def corners(axis: plt.Axes) -> tuple:
    (contour,) = axis.collections
    vertices = np.concatenate([path.vertices for path in contour.get_paths()])
    return (*vertices.min(0), *vertices.max(0))


def assert_true_to_scale(axes, ratio: float) -> None:
    for axis in (axis for axis in axes if axis.images):
        per_column, per_row = np.abs(axis.transData.transform((1, 1)) - axis.transData.transform((0, 0)))
        assert np.isclose(per_row / per_column, ratio)


def test_contours_enclose_the_labelled_pixels_of_their_own_map(figures, tmp_path):
    pictures.draw_overlay([picture("one"), picture("two")], CLASSES, tmp_path / "x.png")
    assert [part.get_suptitle() for part in figures[0].subfigs] == ["one", "two"]
    assert [len(part.axes) for part in figures[0].subfigs] == [2 * pictures.NUM_SLICES] * 2
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    rows, columns = pictures._window(picture().truth > 0)  # the prediction lies inside the truth
    for axis, first_row, last_column in zip(figures[0].axes, (10, 13), (30, 25)):  # truth, then prediction
        # Pixel i reaches from i - 0.5 to i + 0.5, and the contour runs half way between centres of pixels.
        expected = np.array([12, first_row, last_column, 20]) - 0.5
        assert np.allclose(corners(axis), expected - [columns.start, rows.start] * 2)


def test_slices_are_chosen_where_there_are_labels_and_the_worst_replaces_its_neighbour():
    _, _, truth, prediction, _ = picture()
    assert pictures.choose_slices(truth, prediction) == [1, 3, 4]
    assert pictures.choose_slices(truth * 0, prediction * 0) == [1, 2, 4]
    assert pictures.choose_slices(truth[:1] * 0, prediction[:1] * 0) == [0]
    assert pictures.choose_slices(truth, truth, worst=True) == [1, 3, 4]  # no slice has an error
    prediction[2, 30:35] = 1
    assert pictures.choose_slices(truth, prediction, worst=True) in ([2, 3, 4], [1, 2, 4])


def test_the_error_panel_marks_the_voxels_that_differ_and_no_others(figures, tmp_path):
    shown = picture(spacing=(8.0, 3.0, 1.5))
    shown.prediction[1:5, 10:12, 12:15], shown.prediction[1:5, 22:24, 12:14] = 1, 1
    pictures.draw_overlay([shown], CLASSES, tmp_path / "x.png", ("image", "errors"), one_row=False)
    window = pictures._window((shown.truth > 0) | (shown.prediction > 0), (3.0, 1.5))
    legend = figures[0].legends[0]
    colours = {
        text.get_text(): p.get_facecolor() for text, p in zip(legend.get_texts(), legend.legend_handles)
    }
    for axis, d in zip(figures[0].axes[1::2], pictures.choose_slices(*shown[2:4]), strict=True):
        drawn = axis.images[1].get_array()
        assert axis.images[1].get_extent() == axis.images[0].get_extent()  # on the pixels of the image
        true, predicted = shown.truth[d, *window], shown.prediction[d, *window]
        for name, where in (
            ("false positive", (true == 0) & (predicted > 0)),
            ("false negative", (true > 0) & (predicted == 0)),
            ("wrong class", (true != predicted) & (true > 0) & (predicted > 0)),
        ):
            assert where.any() and (drawn[where] == colours[name]).all()
        assert (drawn[true == predicted][:, 3] == 0).all()
        wrong = np.count_nonzero(shown.truth[d] != shown.prediction[d])
        assert axis.get_title() == f"slice {d}, errors: {wrong} voxels"
    assert_true_to_scale(figures[0].axes, 3.0 / 1.5)
    bar, label = figures[0].axes[0].lines[0], figures[0].axes[0].texts[0]
    assert label.get_text() == "20 mm" and np.isclose(np.ptp(bar.get_xdata()) * 1.5, 20)


def test_the_window_is_a_square_in_mm_inside_the_image():
    filled = np.zeros((3, 90, 90), bool)
    filled[1, 40:50, 40:50] = True  # 30 x 10 mm
    rows, columns = pictures._window(filled, (3.0, 1.0))
    assert (rows.stop - rows.start) * 3 == columns.stop - columns.start == 45
    for place in ((0, 0), (39, 49), (20, 0)):
        filled = np.zeros((3, 40, 50), bool)
        filled[1][place] = True
        rows, columns = pictures._window(filled)
        assert filled[:, rows, columns].any() and rows.start >= 0 and rows.stop <= 40 and columns.stop <= 50
    assert pictures._window(filled & False) == (slice(0, 40), slice(0, 50))


def test_contrast_is_that_of_the_labelled_voxels():
    far = picture().image.copy()
    far[:, 30:] = 30_000
    inside = [
        pictures._stretch(picture(**change)).image[picture().truth > 0] for change in ({}, {"image": far})
    ]
    assert np.array_equal(*inside) and inside[0].min() >= 0 and inside[0].max() <= 1
    empty = picture(image=far * 0, truth=picture().truth * 0)
    assert np.isfinite(pictures._stretch(empty).image).all()


@pytest.mark.parametrize("aux", [True, False])
def test_box_prompts_and_outlines_enclose_their_pixels(figures, tmp_path, aux):
    mask = np.zeros((20, 40))
    mask[5:10, 20:30] = 1
    query = Query(2, 2, 0.9, np.array([0.5, 0.25, 0.75, 0.5]), mask if aux else None, mask)
    shown = Picture("x", np.zeros((1, 20, 40)), *np.zeros((2, 1, 20, 40), np.uint8), (9.0, 2.0, 1.0))
    pictures.draw_queries(shown, [query._replace(number=n) for n in range(4)], CLASSES, tmp_path / "x.png", 4)
    grid = np.reshape(figures[0].axes, (4, 4))  # two bands of prompts above final masks
    titles = [axis.get_title().splitlines() for axis in grid[::2].flat]
    prompts = "prompts: mask and box" if aux else "prompts: box"
    assert titles == [["truth"], *([f"query {n}: b 0.90", prompts] for n in range(4)), [], [], []]
    upper, lower = grid[:2, 1]
    (box,) = upper.patches
    assert np.allclose(box.get_bbox().extents, (19.5, 4.5, 29.5, 9.5))  # to the outer edges of the pixels
    assert np.allclose(corners(lower), (19.5, 4.5, 29.5, 9.5)) and not lower.patches
    assert len(upper.images) == 1 + aux
    assert_true_to_scale(figures[0].axes, 2)


def test_curves_hold_every_term_and_gaps_where_nothing_was_measured(figures, tmp_path):
    entries = [
        {"epoch": 1, "loss": 3.0, "loss_class": 1.0, "val_dice": None},
        {
            "epoch": 2,
            "loss": 2.0,
            "loss_class": 0.5,
            "val_dice": 0.5,
            "val_dice_per_class": {"a": 0.5, "b": None},
        },
        {
            "epoch": 3,
            "loss": 1.0,
            "loss_class": 0.4,
            "val_dice": 0.6,
            "val_dice_per_class": {"a": 0.7, "b": 0.5},
        },
    ]
    for used in (entries, entries[:1]):  # a run without any validation has curves too
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in used))
        pictures.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    left, right = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert drawn == {"loss": [3, 2, 1], "class": [1, 0.5, 0.4]}
    drawn = {line.get_label(): line.get_ydata() for line in right.lines}
    assert list(drawn["mean"]) == [0.5, 0.6] and np.isnan(drawn["b"][0]) and drawn["b"][1] == 0.5
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"old")

    def half(figure, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(plt.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        pictures.draw_overlay([picture()], CLASSES, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
