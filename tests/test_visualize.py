"""Pictures: contours lie where the labels lie, curves hold what the log holds, and a failed write leaves nothing."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

import visualize


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


def test_contours_enclose_the_labelled_pixels_of_their_own_map(figures, tmp_path):
    visualize.draw_overlay([picture()], ("background", "a", "b"), tmp_path / "x.png")
    axes = figures[0].axes
    rows, columns = visualize._window(picture()[2] > 0)
    for axis, first_row, last_column in ((axes[0], 10, 30), (axes[1], 13, 25)):  # truth, then prediction
        (contour,) = axis.collections
        corners = np.concatenate([path.vertices for path in contour.get_paths()])
        low, high = corners.min(0), corners.max(0)
        # Pixel i reaches from i - 0.5 to i + 0.5; the contour runs half way between pixel centres, which is there.
        assert np.allclose(low, (12 - columns.start - 0.5, first_row - rows.start - 0.5))
        assert np.allclose(high, (last_column - columns.start - 0.5, 20 - rows.start - 0.5))


def test_every_case_has_its_row_and_every_class_its_name(figures, tmp_path):
    visualize.draw_overlay([picture("one"), picture("two")], ("background", "a", "b"), tmp_path / "x.png")
    assert len(figures[0].axes) == 2 * 2 * visualize.NUM_SLICES
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    assert figures[0].axes[0].get_title().startswith("one") and figures[0].axes[6].get_title().startswith("two")


def test_slices_are_chosen_where_something_is():
    _, _, truth, prediction = picture()
    assert visualize.choose_slices(truth, prediction) == [1, 3, 4]
    assert visualize.choose_slices(truth * 0, prediction * 0) == [1, 2, 4]
    assert visualize.choose_slices(truth[:1] * 0, prediction[:1] * 0) == [0]


@pytest.mark.parametrize("place", [(0, 0), (39, 49), (20, 0)])
def test_the_window_stays_inside_the_image(place):
    filled = np.zeros((3, 40, 50), bool)
    filled[1][place] = True
    rows, columns = visualize._window(filled)
    assert filled[:, rows, columns].any()
    assert 0 <= rows.start < rows.stop <= 40 and 0 <= columns.start < columns.stop <= 50
    assert visualize._window(filled & False) == (slice(0, 40), slice(0, 50))


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

    def half(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(visualize.plt.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        visualize.draw_overlay([picture()], ("background", "a", "b"), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
