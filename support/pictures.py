"""Draw runs, label maps and queries: arrays go in, a PNG file comes out (paper fig. 1, 6, 7).

The axis H of a volume is drawn upwards and W rightwards; the letters R and L show the patient's sides. Only
this file imports matplotlib. Ours: all sizes, all colours, and the choice of slices and windows.

    log.jsonl             ── draw_curves ───> losses and validation Dice over the epochs
    pictures of cases     ── draw_overlay ──> some slices of each case, truth beside prediction
    rows of panels        ── draw_rows ─────> cases x methods, with their errors (fig. 6, 7)
    a slice, its queries  ── draw_queries ──> the prompts of each query above its final mask (fig. 1)
    these and features    ── draw_walk ─────> a slice on its way through the network (fig. 2)
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from support.files import write_text, write_whole
from support.metrics import dice_per_class, known_mean

matplotlib.use("Agg")  # write files, open no window

NUM_SLICES = 3  # drawn of each case
PANEL, COLUMNS = 2.1, 7  # side of a panel in inches; panels beside each other in a picture of queries
# Colours of the kinds of wrong voxels and of boxes. No class has any of them.
ERRORS = {"too much": "#ff00ff", "missed": "#00ffff", "wrong class": "#ffff00"}
BOXES = {"learned box": "#ff00ff", "mask's box": "#00ffff", "box prompt": "#ffff00"}
# The rows of a walk, with the paper's places; {} is a shape.
WALK = (
    "Modality stem, 2.5 i: the input x (B, C, D, H, W) = {}, and what SAM sees",
    "Image encoder, 2.5 ii-iii, fig. 3a: taps, and the neck {}",
    "Prompt generator, 2.3, fig. 3b: auxiliary masks $m^{{aux}}$ (S, N, H, W) = {}, and boxes $b^{{aux}}$",
    "Mask decoder, 2.6, fig. 3c: class probabilities (S, N, K+1) = {}, from the class tokens",
    "Mask decoder, 2.6, fig. 3c: final masks {}, which are (S, N, H, W) if fine, else (S, N, 4h, 4w)",
    "Semantic map: the sum over queries of class probability x mask probability (K, H, W) = {}",
)


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
    class_id: int  # its most probable class; K is "no object"
    probabilities: np.ndarray  # (K+1,) of the classes
    boxes: dict[str, np.ndarray]  # name in `BOXES` -> (4,) x0, y0, x1, y1 in [0, 1]; a variant may lack some
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
    labels = [*scored[-1]["val_dice_per_class"]] if scored else []
    for label, colour in zip(labels, _colours(["background", *labels])[1:]):
        dice = np.array([entry["val_dice_per_class"][label] for entry in scored], np.float64)  # None: a gap
        right.plot(scored_epochs, dice, ".-", label=label, linewidth=1.5, color=colour)
    left.set(xlabel="epoch", title="training loss, and its terms before weighting", yscale="log")
    left.legend(fontsize=7, ncols=2)
    right.set(xlabel="epoch", title="Dice of whole validation cases", ylim=(0, 1))
    right.legend(fontsize=7)
    right.grid(alpha=0.3)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)  # epochs
    _finish(figure, path)


def choose_slices(truth: np.ndarray, prediction: np.ndarray) -> list[int]:
    """Choose slices evenly among those that have a label."""
    labelled = (truth > 0) | (prediction > 0)
    filled = np.flatnonzero(labelled.any((1, 2)) | ~labelled.any())  # all slices of a case without any label
    return sorted({int(filled[round(i * (len(filled) - 1))]) for i in np.linspace(0.15, 0.85, NUM_SLICES)})


def draw_overlay(pictures: Sequence[Picture], labels: Sequence[str], path: str | Path) -> None:
    """Draw a row per case: some of its slices, truth beside prediction. labels, path: as in `draw_rows`."""
    rows = []
    for picture in pictures:
        places = itertools.product(choose_slices(picture.truth, picture.prediction), ("truth", "prediction"))
        rows.append((picture.name, [(picture, *place) for place in places]))
    draw_rows(rows, labels, path)


def draw_rows(rows: Sequence[tuple[str, Sequence[tuple]]], labels: Sequence[str], path, legend=()) -> None:
    """Draw rows (title, panels). All panels of a row show one window at one scale.

    A panel is (picture, slice, kind). Kinds are "image", "truth", "prediction", and "errors": the prediction
    with its errors, under the picture's name. labels: names by id. path: PNG. legend: more (name, colour).
    """
    colours = _colours(labels)
    figure, grid = _start([title for title, _ in rows], max(len(panels) for _, panels in rows))
    for axes, (_, panels) in zip(grid, rows):
        filled = [(picture.truth[d] > 0) | (picture.prediction[d] > 0) for picture, d, _ in panels]
        window = _window(np.array(filled), panels[0][0].spacing[1:])
        for axis, (picture, d, kind) in zip(axes, panels):
            _draw_panel(axis, picture, kind, colours, d, window)
        _draw_scale(axes[0], panels[0][0])
    _finish(figure, path, [*zip(labels[1:], colours[1:]), *legend])


def _start(titles: Sequence[str], columns: int, **place) -> tuple[plt.Figure, list[np.ndarray]]:
    """Begin a figure of rows with a title each. Return it, and the panels (columns,) of each row."""
    width = max(PANEL * columns, 0.09 * max(map(len, titles)))  # inches; titles of 10 points must fit
    figure = plt.figure(figsize=(width, (PANEL + 0.6) * len(titles)), layout="constrained")
    for part, title in zip(figure.subfigures(len(titles), squeeze=False).flat, titles):
        part.suptitle(title, fontsize=10, fontweight="bold", **place)
        for axis in part.subplots(1, columns, squeeze=False).flat:
            axis.axis("off")
    return figure, [part.axes for part in figure.subfigs]


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
    colours, columns = _colours(labels), min(COLUMNS, max(2, len(queries) + 1))
    bands = -(-(len(queries) + 1) // columns)  # of two rows; the first place holds truth and prediction
    figure, rows = _start([picture.name, *[""] * (2 * bands - 1)], columns)
    for axes, kind in zip(rows, ("truth", "prediction")):
        _draw_panel(axes[0], picture, kind, colours)
    _draw_scale(rows[0][0], picture)
    for place, query in enumerate(queries, 1):
        upper, lower = (axes[place % columns] for axes in rows[2 * (place // columns) :][:2])
        _draw_query(upper, lower, picture, query, ["box prompt"], colours)
        title = f"query {query.number}: {labels[query.class_id]} {query.probabilities.max():.2f}"
        upper.set_title(title, fontsize=8)
    _finish(figure, path, [*zip(labels[1:], colours[1:]), ("box prompt", BOXES["box prompt"])])


def _draw_query(upper, lower, picture: Picture, query: Query, boxes: Sequence[str], colours: list) -> None:
    """Draw the auxiliary mask and the named boxes of a query in one panel, its final mask in another."""
    height, width = query.mask.shape
    for axis, mask in ((upper, query.aux_mask), (lower, query.mask)):
        _draw_panel(axis, picture, "image", colours)
        if mask is not None:
            shade = matplotlib.colors.to_rgba_array(colours[query.class_id], 0.5 * mask.ravel())
            axis.imshow(shade.reshape(height, width, 4), origin="lower", aspect=axis.get_aspect())
            _draw_contour(axis, mask > 0.5, colours[query.class_id])
    dice = _dice(picture.truth[0] == query.class_id, query.mask > 0.5, 2)
    lower.set_title(f"final mask{dice}", fontsize=8)
    for name in boxes:
        x0, y0, x1, y1 = query.boxes[name] * (width, height, width, height) - 0.5  # pixel i begins at i - 0.5
        style = {"fill": False, "edgecolor": BOXES[name], "clip_on": False}
        style["linestyle"] = "-" if name == "box prompt" else "--"
        upper.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, **style))


def colour_map(feature: np.ndarray) -> np.ndarray:
    """Show a feature (C, h, w) by its first three principal components, as red, green and blue (h, w, 3)."""
    tokens = feature.reshape(len(feature), -1).T.astype(np.float64)  # (h*w, C)
    tokens -= tokens.mean(0)
    parts = tokens @ np.linalg.eigh(tokens.T @ tokens)[1][:, :-4:-1]  # (h*w, 3), the largest variance first
    parts *= np.sign(parts[np.abs(parts).argmax(0), range(3)])  # the sign of a component is arbitrary
    low, high = np.percentile(parts, (1, 99), axis=0)
    return ((parts - low) / np.maximum(high - low, 1e-9)).clip(0, 1).reshape(*feature.shape[1:], 3)


def draw_walk(picture: Picture, guide: str, views, shapes, queries: Sequence[Query], maps, labels, path):
    """Draw a slice on its way through the network, in the paper's order: the rows of `WALK`.

    Args:
        picture, guide: the slice (D is 1), with its prediction; text beside it.
        views, shapes: (title, colours (h, w, 3)) of stem, taps and neck; for the titles of the rows.
        queries, maps: of `Query` the first five are drawn; the semantic map (K, H, W).
        labels, path: class names by id; PNG to write.
    """
    colours, names, truth = [*_colours(labels), "white"], [*labels, "no object"], picture.truth[0]
    titles = [row.format(shape) for row, shape in zip(WALK, shapes)]
    figure, rows = _start(titles, 5, x=0.01, horizontalalignment="left")
    _draw_panel(rows[0][0], picture, "image", colours)
    _draw_scale(rows[0][0], picture)
    rows[0][2].text(0.05, 1, guide, fontsize=9, verticalalignment="top", linespacing=1.6).set_in_layout(False)
    (height, width), aspect = truth.shape, rows[0][0].get_aspect()
    whole = {"origin": "lower", "extent": (-0.5, width - 0.5, -0.5, height - 0.5), "aspect": aspect}
    for axis, (title, view) in zip((rows[0][1], *rows[1]), views):
        axis.imshow(view, **whole)
        _draw_contour(axis, truth > 0, "white", 0.6)
        axis.set_title(title, fontsize=8)
    for query, upper, bars, lower in zip(queries, *rows[2:5]):
        _draw_query(upper, lower, picture, query, query.boxes, colours)
        upper.set_title(f"query {query.number}: auxiliary mask", fontsize=8)
        bars.barh(range(len(names)), query.probabilities, color=colours, edgecolor="0.5", linewidth=0.5)
        bars.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        bars.set_title(f"query {query.number}: {names[query.class_id]}", fontsize=8)
        for i, text in enumerate(map("{} {:.2f}".format, names, query.probabilities)):
            bars.text(0.02, i, text, fontsize=min(8, 90 / len(names)), verticalalignment="center_baseline")
    sizes = [np.sum((truth == i) | (picture.prediction[0] == i)) for i in range(1, len(labels))]
    for axis, i in zip(rows[5], sorted(1 + np.argsort(sizes)[:-4:-1])):  # the three largest classes
        axis.imshow(maps[i].clip(0, 1)[..., None] * matplotlib.colors.to_rgb(colours[i]), **whole)
        axis.set_title(labels[i], fontsize=8)
    for axis, kind in zip(rows[5][3:], ("prediction", "truth")):
        _draw_panel(axis, picture, kind, colours)
    _finish(figure, path, [*zip(labels[1:], colours[1:]), *((name, BOXES[name]) for name in query.boxes)])


def _colours(labels: Sequence[str]) -> list:
    """Return a colour per class id. They are lighter than matplotlib's, which are made for white paper."""
    palette = np.array(matplotlib.colormaps["tab10" if len(labels) <= 11 else "tab20"].colors) * 0.8 + 0.2
    return ["0.8", *itertools.islice(itertools.cycle(palette), len(labels) - 1)]  # grey for the background


def _levels(picture: Picture) -> tuple[float, float]:
    """Return the intensities for black and white: of labelled voxels, with a margin."""
    values = picture.image[picture.truth > 0]
    low, high = np.percentile(values if len(values) else picture.image, (1, 99))
    margin = max((high - low) / 3, 1e-6)
    return low - margin, high + margin


def _draw_panel(axis: plt.Axes, picture: Picture, kind: str, colours: list, d=0, window=np.s_[:, :]) -> None:
    """Draw a window of slice d in grey, in its true proportions, with the contours or errors of the kind."""
    truth, prediction = picture.truth[d, *window], picture.prediction[d, *window]
    aspect, levels = picture.spacing[1] / picture.spacing[2], dict(zip(("vmin", "vmax"), _levels(picture)))
    axis.imshow(picture.image[d, *window], cmap="gray", origin="lower", aspect=aspect, **levels)
    label_map = {"image": truth * 0, "truth": truth}.get(kind, prediction)
    for class_id in np.unique(label_map[label_map > 0]):
        _draw_contour(axis, label_map == class_id, colours[class_id])
    title = picture.name if kind == "errors" else f"slice {d}, {kind}" if len(picture.truth) > 1 else kind
    if label_map is prediction:
        title += _dice(picture.truth[d], picture.prediction[d], len(colours))
    if kind == "errors":
        # 0 where both agree, else 1, 2 or 3 in the order of `ERRORS`.
        errors = np.select([truth == prediction, truth == 0, prediction == 0], [0, 1, 2], 3)
        colour = matplotlib.colors.to_rgba_array(["none", *ERRORS.values()])
        axis.imshow(colour[errors], origin="lower", aspect=aspect)
    axis.set_title(title, fontsize=8)


def _dice(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> str:
    """Return the mean Dice of a slice for its title; nothing if there is no true label."""
    dice = known_mean(dice_per_class(prediction[None], truth[None], num_classes), 0)
    return f", Dice {dice:.3f}" if truth.any() else ""


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


def write_label_names(folder: Path, labels: Sequence[str]) -> None:
    """Write classes and their colours for ITK-SNAP (labels.txt) and 3D Slicer (labels.ctbl)."""
    snap, slicer = [], []
    for class_id, (name, colour) in enumerate(zip(labels, _colours(labels))):
        red, green, blue = (round(255 * part) for part in matplotlib.colors.to_rgb(colour))
        shown = int(class_id > 0)  # opacity, visibility, and visibility of the mesh
        snap.append(f'{class_id} {red} {green} {blue} {shown} {shown} {shown} "{name}"')
        slicer.append(f"{class_id} {name.replace(' ', '_')} {red} {green} {blue} {255 * shown}")
    write_text(folder / "labels.txt", "\n".join([*snap, ""]))
    write_text(folder / "labels.ctbl", "\n".join(["# Color table file", *slicer, ""]))
