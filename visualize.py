"""Pictures of a run and of predictions (fig. 6, 7).

    draw_curves     log.jsonl -> losses and validation Dice by epoch
    draw_overlay    some slices of some cases: contours of the truth beside contours of the prediction
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402

NUM_SLICES = 3  # of a case


def _save(figure: plt.Figure, path: str | Path) -> None:
    """Write a figure whole or not at all."""
    partial = Path(f"{path}.partial")
    try:
        figure.savefig(partial, format="png", dpi=110)
        partial.replace(path)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)


def draw_curves(log_path: str | Path, path: str | Path) -> None:
    """Losses, and validation Dice by class, over the epochs of a run.

    Args:
        log_path: log.jsonl of train.py. path: PNG to write.
    """
    log = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [entry["epoch"] for entry in log]
    for name in (key for key in log[0] if key.startswith("loss")):
        style = {"color": "black", "linewidth": 2} if name == "loss" else {}
        left.plot(epochs, [entry[name] for entry in log], label=name.removeprefix("loss_").replace("_", " "), **style)
    left.set(xlabel="epoch", title="training loss, and its terms before weighting", yscale="log")
    left.legend(fontsize=7, ncols=2)
    scored = [entry for entry in log if entry["val_dice"] is not None]
    epochs = [entry["epoch"] for entry in scored]
    right.plot(epochs, [entry["val_dice"] for entry in scored], "k.-", label="mean")
    for label in scored[-1]["val_dice_per_class"] if scored else ():
        dice = [entry["val_dice_per_class"][label] for entry in scored]
        right.plot(epochs, [np.nan if value is None else value for value in dice], ".-", label=label, linewidth=1)
    right.set(xlabel="epoch", title="Dice of whole validation cases", ylim=(0, 1))
    right.grid(alpha=0.3)
    if scored:
        right.legend(fontsize=7)
    _save(figure, path)


def choose_slices(truth: np.ndarray, prediction: np.ndarray) -> list[int]:
    """Slices evenly spread over those that hold something, in the truth or the prediction.

    Args:
        truth, prediction: (D, H, W) labels.
    """
    filled = np.flatnonzero(((truth > 0) | (prediction > 0)).any((1, 2)))
    filled = filled if len(filled) else np.arange(len(truth))
    return sorted({int(filled[round(place * (len(filled) - 1))]) for place in np.linspace(0.15, 0.85, NUM_SLICES)})


def draw_overlay(
    pictures: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], labels: Sequence[str], path: str | Path
) -> None:
    """One row a case, and for each of its slices the true contours at the left and the predicted at the right.

    Args:
        pictures: (name, image, truth, prediction) of each case, the last three (D, H, W). labels: names by id, 0 is
            background. path: PNG to write.
    """
    colours = matplotlib.colormaps["tab10" if len(labels) <= 11 else "tab20"].colors
    size = (2 * 2 * NUM_SLICES, 2.15 * len(pictures) + 0.4)
    figure, axes = plt.subplots(len(pictures), 2 * NUM_SLICES, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, image, truth, prediction) in zip(axes, pictures):
        rows, columns = _window((truth > 0) | (prediction > 0))
        low, high = np.percentile(image, (1, 99.5))
        for index, d in enumerate(choose_slices(truth, prediction)):
            for axis, label_map, what in zip(row[2 * index :], (truth, prediction), ("truth", "prediction")):
                # Rows run towards the patient's front: drawn upwards.
                axis.imshow(image[d, rows, columns], cmap="gray", vmin=low, vmax=high, origin="lower")
                for class_id in np.unique(label_map[d, rows, columns]):
                    if class_id > 0:
                        mask = np.pad(label_map[d, rows, columns] == class_id, 1)  # closed at the edge too
                        places = (np.arange(n) - 1 for n in mask.shape[::-1])
                        colour = colours[(class_id - 1) % len(colours)]
                        axis.contour(*places, mask, [0.5], colors=[colour], linewidths=1.2)
                axis.set(xlim=(-0.5, columns.stop - columns.start - 0.5), ylim=(-0.5, rows.stop - rows.start - 0.5))
                axis.set_title(f"{name if what == 'truth' else ''} {d} {what}".strip(), fontsize=6)
    lines = [plt.Line2D([], [], color=colours[i % len(colours)], label=label) for i, label in enumerate(labels[1:])]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 8), fontsize=8)
    _save(figure, path)


def _window(filled: np.ndarray) -> tuple[slice, slice]:
    """A square around what is filled in any slice, half as large again, inside the image: rows and columns."""
    window = []
    places = [np.flatnonzero(filled.any(axes)) for axes in ((0, 2), (0, 1))]
    side = max((int(1.5 * (np.ptp(p) + 1)) if len(p) else max(filled.shape[1:])) for p in places)
    for place, n in zip(places, filled.shape[1:]):
        width = min(side, n)
        centre = int(place.min() + place.max() + 1) // 2 if len(place) else n // 2
        low = min(max(centre - width // 2, 0), n - width)
        window.append(slice(low, low + width))
    return tuple(window)
