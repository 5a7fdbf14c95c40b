"""Draw runs, label maps and queries: arrays go in, a PNG file comes out (paper fig. 1, 6, 7).

The axis H of a volume is drawn upwards and W rightwards; the letters R and L show the patient's sides. Only
this file imports matplotlib. Ours: all sizes, all colours, and the choice of slices and windows.

    log.jsonl           ── draw_curves ───> losses and validation Dice over the epochs
    pictures of cases   ── draw_overlay ──> some slices of each case, with contours or errors (fig. 6, 7)
    a slice, its queries ─ draw_queries ──> the prompts of each query above its final mask (fig. 1)
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from support.files import write_whole

matplotlib.use("Agg")  # write files, open no window

NUM_SLICES = 3  # drawn of each case
PANEL, COLUMNS = 2.1, 7  # side of a panel in inches; panels beside each other in a picture of queries
# Colours of the kinds of wrong voxels and of box prompts. No class has any of them.
ERRORS = {"false positive": "#ff00ff", "false negative": "#00ffff", "wrong class": "#ffff00"}
BOX = {"box prompt": "#ffff00"}


class Picture(NamedTuple):
    """One case to draw, all of it on one grid."""

    name: str  # title
    image: np.ndarray  # (D, H, W), any intensities
    truth: np.ndarray  # (D, H, W) class ids
    prediction: np.ndarray  # (D, H, W) class ids
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # (D, H, W) in mm
    sides: str = ""  # letters of the patient's sides at the left and the right edge, see `sides_of`


class Query(NamedTuple):
    """One query in one slice, with its prompts and its mask."""

    number: int  # index of the query, from 0
    class_id: int  # its most probable class
    probability: float  # of that class, in [0, 1]
    box: np.ndarray  # (4,) x0, y0, x1, y1 in [0, 1], as SAM's prompt encoder got it
    aux_mask: np.ndarray | None  # (H, W) probabilities of the auxiliary mask; None if the variant has none
    mask: np.ndarray  # (H, W) probabilities of the final mask


def sides_of(frame: np.ndarray) -> str:
    """Return "LR" or "RL" for directions (3, 3) of W, H, D in the patient, or "" if W runs otherwise."""
    right, *others = frame[:, 0]
    return "" if abs(right) < max(map(abs, others)) else "LR" if right > 0 else "RL"


def draw_curves(log_path: str | Path, path: str | Path) -> None:
    """Draw the losses, and the validation Dice by class, over the epochs of a run's log.jsonl to a PNG."""
    log = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    scored = [entry for entry in log if entry["val_dice"] is not None]
    epochs, scored_epochs = ([entry["epoch"] for entry in entries] for entries in (log, scored))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in (key for key in log[0] if key.startswith("loss")):
        style = {"color": "black", "linewidth": 2} if name == "loss" else {}
        label = name.removeprefix("loss_").replace("_", " ")
        left.plot(epochs, [entry[name] for entry in log], label=label, **style)
    right.plot(scored_epochs, [entry["val_dice"] for entry in scored], "k.-", label="mean")
    for label in scored[-1]["val_dice_per_class"] if scored else ():
        dice = [entry["val_dice_per_class"][label] for entry in scored]
        right.plot(scored_epochs, np.array(dice, np.float64), ".-", label=label, linewidth=1)  # None: a gap
    left.set(xlabel="epoch", title="training loss, and its terms before weighting", yscale="log")
    left.legend(fontsize=7, ncols=2)
    right.set(xlabel="epoch", title="Dice of whole validation cases", ylim=(0, 1))
    right.legend(fontsize=7)
    right.grid(alpha=0.3)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)  # epochs
    _finish(figure, path)


def choose_slices(truth: np.ndarray, prediction: np.ndarray, worst: bool = False) -> list[int]:
    """Choose slices evenly among the labelled; with `worst`, that of most errors replaces the nearest one."""
    labelled = (truth > 0) | (prediction > 0)
    filled = np.flatnonzero(labelled.any((1, 2)) | ~labelled.any())  # all slices of a case without any label
    chosen = {int(filled[round(place * (len(filled) - 1))]) for place in np.linspace(0.15, 0.85, NUM_SLICES)}
    wrong = (truth != prediction).sum((1, 2))
    if worst and wrong.any():
        d = int(wrong.argmax())
        chosen = chosen - {min(chosen, key=lambda other: abs(other - d))} | {d}
    return sorted(chosen)


def draw_overlay(
    pictures: Sequence, labels: Sequence[str], path, panels=("truth", "prediction"), one_row=True, worst=False
) -> None:
    """Draw some slices of some cases; all slices of a case show one window at one scale.

    Args:
        labels: class names by id; 0 is the background. path: PNG to write. worst: see `choose_slices`.
        panels: the panels of a slice, out of "image", "truth", "prediction" and "errors".
        one_row: whether the slices of a case stand beside each other, instead of below each other.
    """
    pictures, colours = [_stretch(picture) for picture in pictures], _colours(labels)
    slices = [choose_slices(picture.truth, picture.prediction, worst) for picture in pictures]
    most = max(map(len, slices))
    rows, columns = (1, most * len(panels)) if one_row else (most, len(panels))
    size = (PANEL * columns, ((PANEL + 0.2) * rows + 0.3) * len(pictures))
    figure = plt.figure(figsize=size, layout="constrained")
    for part, picture, chosen in zip(figure.subfigures(len(pictures), squeeze=False).flat, pictures, slices):
        part.suptitle(picture.name, fontsize=10, fontweight="bold")
        axes = part.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        window = _window(((picture.truth > 0) | (picture.prediction > 0))[chosen], picture.spacing[1:])
        for axis, (d, panel) in zip(axes.flat, itertools.product(chosen, panels)):
            _draw_panel(axis, picture, d, panel, window, colours)
        _draw_scale(axes[0, 0], picture)
    _finish(figure, path, [*zip(labels[1:], colours[1:]), *(ERRORS.items() if "errors" in panels else ())])


def _window(filled: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice]:
    """Return rows and columns of a square in mm around the filled pixels (n, H, W), half as large again."""
    filled = filled if filled.any() else ~filled  # nothing to show: the whole image
    places = [np.flatnonzero(filled.any(axes)) for axes in ((0, 2), (0, 1))]
    side = max(1.5 * (np.ptp(place) + 1) * mm for place, mm in zip(places, spacing))
    window = []
    for place, n, mm in zip(places, filled.shape[1:], spacing):
        width = min(max(1, int(side / mm)), n)
        low = int(place[0] + place[-1] + 1) // 2 - width // 2
        low = min(max(low, 0), n - width)  # the window stays inside the image
        window.append(slice(low, low + width))
    return tuple(window)


def draw_queries(picture: Picture, queries: Sequence[Query], labels: Sequence[str], path: str | Path) -> None:
    """Draw truth and prediction of a slice (D is 1), then for each query its prompts above its final mask.

    Further queries than there are `COLUMNS` go below. labels: class names by id. path: PNG to write.
    """
    picture, colours, (height, width) = _stretch(picture), _colours(labels), picture.image.shape[1:]
    bands = -(-(len(queries) + 1) // COLUMNS)  # the first place holds truth and prediction
    columns = min(COLUMNS, max(2, len(queries) + 1))
    size = (PANEL * columns, 2 * (PANEL + 0.3) * bands + 0.3)
    figure, axes = plt.subplots(2 * bands, columns, squeeze=False, figsize=size, layout="constrained")
    figure.suptitle(picture.name, fontsize=10, fontweight="bold")
    for axis in axes.flat:
        axis.axis("off")
    for axis, panel in zip(axes[:2, 0], ("truth", "prediction")):
        _draw_panel(axis, picture, 0, panel, np.s_[:, :], colours)
        axis.set_title(panel, fontsize=8)
    _draw_scale(axes[0, 0], picture)
    for place, query in enumerate(queries, 1):
        upper, lower = axes.reshape(bands, 2, columns)[place // columns, :, place % columns]
        for axis, mask in ((upper, query.aux_mask), (lower, query.mask)):
            _draw_panel(axis, picture, 0, "image", np.s_[:, :], colours)
            if mask is not None:
                shade = matplotlib.colors.to_rgba_array(colours[query.class_id], 0.5 * mask.ravel())
                axis.imshow(shade.reshape(height, width, 4), origin="lower", aspect=axis.get_aspect())
                _draw_contour(axis, mask > 0.5, colours[query.class_id])
        x0, y0, x1, y1 = query.box * (width, height, width, height) - 0.5  # pixel i begins at i - 0.5
        style = {"fill": False, "edgecolor": BOX["box prompt"], "clip_on": False}
        upper.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
        name = f"query {query.number}: {labels[query.class_id]} {query.probability:.2f}"
        upper.set_title(f"{name}\nprompts: {'box' if query.aux_mask is None else 'mask and box'}", fontsize=8)
        lower.set_title("final mask", fontsize=8)
    _finish(figure, path, [*zip(labels[1:], colours[1:]), *BOX.items()])


def _colours(labels: Sequence[str]) -> list:
    """Return a colour per class id. They are lighter than matplotlib's, which are made for white paper."""
    palette = np.array(matplotlib.colormaps["tab10" if len(labels) <= 11 else "tab20"].colors) * 0.8 + 0.2
    return ["0.8", *itertools.islice(itertools.cycle(palette), len(labels) - 1)]  # grey for the background


def _stretch(picture: Picture) -> Picture:
    """Scale the intensities of labelled voxels, and a margin, to [0, 1]; a CT's air and bone go outside."""
    values = picture.image[picture.truth > 0]
    low, high = np.percentile(values if len(values) else picture.image, (1, 99))
    margin = max((high - low) / 3, 1e-6)
    return picture._replace(image=(picture.image - (low - margin)) / (high - low + 2 * margin))


def _draw_panel(axis: plt.Axes, picture: Picture, d: int, panel: str, window: tuple, colours: list) -> None:
    """Draw a window of slice d in grey, in its true proportions, with the contours or errors of the panel."""
    truth, prediction = picture.truth[d, *window], picture.prediction[d, *window]
    aspect = picture.spacing[1] / picture.spacing[2]
    axis.imshow(picture.image[d, *window], cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect)
    title = f"slice {d}, {panel}"
    label_map = {"truth": truth, "prediction": prediction}.get(panel, truth * 0)
    for class_id in np.unique(label_map[label_map > 0]):
        _draw_contour(axis, label_map == class_id, colours[class_id])
    if panel == "errors":
        # 0 where both agree, else 1, 2 or 3 in the order of `ERRORS`.
        errors = np.select([truth == prediction, truth == 0, prediction == 0], [0, 1, 2], 3)
        _draw_contour(axis, truth > 0, "white", 0.6)
        colour = matplotlib.colors.to_rgba_array(["none", *ERRORS.values()])
        axis.imshow(colour[errors], origin="lower", aspect=aspect)
        title += f": {np.count_nonzero(errors)} voxels"
    axis.set_title(title, fontsize=8)


def _draw_contour(axis: plt.Axes, mask: np.ndarray, colour, linewidths: float = 1.2) -> None:
    """Draw the outline of a mask (H, W), closed at the edge of the image too."""
    if mask.any():
        height, width = mask.shape
        places = np.arange(width + 2) - 1, np.arange(height + 2) - 1
        axis.contour(*places, np.pad(mask, 1), [0.5], colors=[colour], linewidths=linewidths)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))  # the limits of the image


def _draw_scale(axis: plt.Axes, picture: Picture) -> None:
    """Draw a bar of a round length in mm, at most half the width of the panel, and the patient's sides."""
    width, millimetres, black = axis.get_xlim()[1] + 0.5, picture.spacing[2], {"facecolor": "black"}
    mm = next((mm for mm in (100, 50, 20, 10, 5, 2) if mm <= width * millimetres / 2), 1)
    x, y = 0.05 * width, 0.05 * (axis.get_ylim()[1] + 0.5)
    axis.plot([x, x + mm / millimetres], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    text = axis.annotate(f"{mm} mm", (x, y), (1, 4), textcoords="offset points", color="white", fontsize=7)
    text.set_bbox(black | {"alpha": 0.6, "linewidth": 0, "pad": 1})
    for letter, x, side in zip(picture.sides, (0.02, 0.98), ("left", "right")):
        place = {"transform": axis.transAxes, "horizontalalignment": side, "verticalalignment": "center"}
        axis.text(x, 0.5, letter, color="white", fontsize=8, bbox=black | {"alpha": 0.6, "pad": 1}, **place)


def _finish(figure: plt.Figure, path: str | Path, entries: Sequence[tuple] = ()) -> None:
    """Name colours, entries (name, colour), below the panels; write the figure whole, and close it."""
    if entries:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in entries]
        entry_width = 0.65 + 0.075 * max(len(name) for name, _ in entries)  # inches, for letters of 9 points
        columns = min(len(handles), max(1, int(figure.get_figwidth() / entry_width)))
        figure.set_figheight(figure.get_figheight() + 0.2 + 0.2 * -(-len(handles) // columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    try:
        write_whole(Path(path), lambda file: figure.savefig(file, format="png", dpi=130))
    finally:
        plt.close(figure)
