"""Pictures of a run, of predictions, and of what the model makes on the way to them (fig. 1, 6, 7).

    python visualize.py compare --predictions DIR --data X --root DIR   image, truth, prediction, errors of some cases
    python visualize.py sheet --predictions DIR         the worst, the median and the best case that evaluate.py scored
    python visualize.py queries --ckpt FILE --case NAME             the prompts and masks of the queries in one slice

    draw_curves     log.jsonl -> losses and validation Dice by epoch
    draw_overlay    cases -> panels of some of their slices: for "compare" and "sheet", and for train.py
    draw_queries    queries of a slice -> what the prompt generator made of it, above what the mask decoder made of that

Volumes are in RAS: a slice's rows run to the patient's front and are drawn upwards, its columns run to the patient's
right and are drawn rightwards. Letters: D slices, H rows, W columns, N queries, K classes with background. Spacing is
(D, H, W) in mm.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

import data
import evaluate
import layouts
import nifti
from model import MaskSAM, resize, semantic_map
from weights import load_checkpoint

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402

NUM_SLICES = 3  # of a case
NUM_CASES = 3  # that "compare" draws unless told
PANEL = 2.1  # inches, the side of a panel
# Kinds of wrong voxels, and the boxes of queries, in colours that no class has.
ERRORS = {"false positive": "#ff00ff", "false negative": "#00ffff", "wrong class": "#ffff00"}
BOX = {"box prompt": "#ffff00"}


def _save(figure: plt.Figure, path: str | Path) -> None:
    """Write a figure whole or not at all."""
    try:
        nifti.write_whole(Path(path), lambda file: figure.savefig(file, format="png", dpi=130))
    finally:
        plt.close(figure)


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


# -------------------------------------------------------------------------------------- truth and prediction, fig. 6, 7


class Picture(NamedTuple):
    """A case to draw, on one grid. name: its title. image, truth, prediction: (D, H, W). spacing: (D, H, W) in mm."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


def choose_slices(truth: np.ndarray, prediction: np.ndarray, worst: bool = False) -> list[int]:
    """Slices evenly spread over those that hold something, in the truth or the prediction.

    Args:
        truth, prediction: (D, H, W) labels. worst: put the slice with most wrong voxels in the place of its neighbour.
    """
    filled = np.flatnonzero(((truth > 0) | (prediction > 0)).any((1, 2)))
    filled = filled if len(filled) else np.arange(len(truth))
    chosen = {int(filled[round(place * (len(filled) - 1))]) for place in np.linspace(0.15, 0.85, NUM_SLICES)}
    wrong = (truth != prediction).sum((1, 2))
    if worst and wrong.any():
        d = int(wrong.argmax())
        chosen = chosen - {min(chosen, key=lambda other: abs(other - d))} | {d}
    return sorted(chosen)


def find_errors(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Voxel by voxel 0 where two label maps agree, else 1, 2, 3 in the order of `ERRORS`.

    A false positive is background in the truth, a false negative is background in the prediction.
    """
    return np.select([truth == prediction, truth == 0, prediction == 0], [0, 1, 2], 3)


def draw_overlay(
    pictures: Sequence[Picture | tuple], labels: Sequence[str], path: str | Path,
    panels: Sequence[str] = ("truth", "prediction"), one_row: bool = True, worst: bool = False,
) -> None:  # fmt: skip
    """Some slices of some cases, each in several panels, all of a case in one window with one scale.

    Args:
        pictures: the cases, or their fields. labels: names by id, 0 is background. path: PNG to write.
        panels: of "image", "truth", "prediction", "errors". one_row: all slices of a case beside each other, else below
            each other. worst: of `choose_slices`.
    """
    pictures = [_stretch(Picture(*picture)) for picture in pictures]
    slices = [choose_slices(picture.truth, picture.prediction, worst) for picture in pictures]
    most, colours = max(map(len, slices)), _colours(labels)
    rows, columns = (1, most * len(panels)) if one_row else (most, len(panels))
    size = (PANEL * columns, ((PANEL + 0.2) * rows + 0.3) * len(pictures))
    figure = plt.figure(figsize=size, layout="constrained")
    for part, picture, chosen in zip(figure.subfigures(len(pictures), squeeze=False)[:, 0], pictures, slices):
        part.suptitle(picture.name, fontsize=10, fontweight="bold")
        axes = part.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        window = _window(((picture.truth > 0) | (picture.prediction > 0))[chosen], picture.spacing[1:])
        for axis, (d, what) in zip(axes.flat, itertools.product(chosen, panels)):
            _draw_panel(axis, picture, d, what, window, colours)
        _draw_scale(axes[0, 0], picture.spacing)
    _draw_legend(figure, labels, colours, ERRORS if "errors" in panels else {})
    _save(figure, path)


def _window(filled: np.ndarray, spacing: Sequence[float] = (1.0, 1.0)) -> tuple[slice, slice]:
    """A square in mm around what is filled in any slice, half as large again, inside the image: rows and columns."""
    window = []
    places = [np.flatnonzero(filled.any(axes)) for axes in ((0, 2), (0, 1))]
    extents = [1.5 * (np.ptp(p) + 1) if len(p) else n for p, n in zip(places, filled.shape[1:])]
    side = max(extent * mm for extent, mm in zip(extents, spacing))
    for place, n, mm in zip(places, filled.shape[1:], spacing):
        width = min(max(1, int(side / mm)), n)
        centre = int(place.min() + place.max() + 1) // 2 if len(place) else n // 2
        low = min(max(centre - width // 2, 0), n - width)
        window.append(slice(low, low + width))
    return tuple(window)


# ----------------------------------------------------------------------------------------------------- parts of a panel


def _colours(labels: Sequence[str]) -> list:
    """A colour by class id, grey for the background; lighter than matplotlib's, which are made for white paper."""
    palette = np.array(matplotlib.colormaps["tab10" if len(labels) <= 11 else "tab20"].colors) * 0.8 + 0.2
    return ["0.8", *itertools.islice(itertools.cycle(palette), len(labels) - 1)]


def _stretch(picture: Picture) -> Picture:
    """Intensities to 0 ... 1 for what is labelled and a margin around: a CT's air and bone would leave no contrast."""
    values = picture.image[picture.truth > 0]
    low, high = np.percentile(values if len(values) else picture.image, (1, 99))
    margin = max((high - low) / 3, 1e-6)
    return picture._replace(image=(picture.image - (low - margin)) / (high - low + 2 * margin))


def _draw_panel(
    axis: plt.Axes, picture: Picture, d: int, what: str, window: tuple[slice, slice], colours: Sequence
) -> None:
    """A window of a slice in grey, as high and wide as its spacing makes it, and on it what the panel is for."""
    truth, prediction = picture.truth[d, *window], picture.prediction[d, *window]
    aspect = picture.spacing[1] / picture.spacing[2]
    axis.imshow(picture.image[d, *window], cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect)
    title = f"slice {d}, {what}"
    if what in ("truth", "prediction"):
        label_map = truth if what == "truth" else prediction
        for class_id in np.unique(label_map[label_map > 0]):
            _draw_contour(axis, label_map == class_id, colours[class_id])
    if what == "errors":
        errors = find_errors(truth, prediction)
        _draw_contour(axis, truth > 0, "white", 0.6)
        axis.imshow(matplotlib.colors.to_rgba_array(["none", *ERRORS.values()])[errors], origin="lower", aspect=aspect)
        title += f": {np.count_nonzero(errors)} voxels"
    axis.set_title(title, fontsize=8)


def _draw_contour(axis: plt.Axes, mask: np.ndarray, colour, linewidths: float = 1.2) -> None:
    """The outline of a mask (H, W), closed at the image's edge too; the panel keeps the image's limits."""
    if mask.any():
        height, width = mask.shape
        places = np.arange(width + 2) - 1, np.arange(height + 2) - 1
        axis.contour(*places, np.pad(mask, 1), [0.5], colors=[colour], linewidths=linewidths)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))


def _draw_scale(axis: plt.Axes, spacing: Sequence[float]) -> None:
    """A bar of so many mm, at the lower left, up to half as long as the panel is wide."""
    width = axis.get_xlim()[1] + 0.5
    mm = next((mm for mm in (100, 50, 20, 10, 5, 2) if mm <= width * spacing[2] / 2), 1)
    x, y = 0.05 * width, 0.05 * (axis.get_ylim()[1] + 0.5)
    axis.plot([x, x + mm / spacing[2]], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    shade = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1}
    axis.annotate(f"{mm} mm", (x, y), (1, 4), textcoords="offset points", color="white", fontsize=7, bbox=shade)


def _draw_legend(figure: plt.Figure, labels: Sequence[str], colours: Sequence, others: dict[str, str]) -> None:
    """The classes and other colours below the panels, in as many columns as there is room; the figure grows by that."""
    entries = [*zip(labels[1:], colours[1:]), *others.items()]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in entries]
    room = figure.get_figwidth() / (0.65 + 0.075 * max(len(name) for name, _ in entries))  # inches, of 9 points
    columns = min(len(handles), max(1, int(room)))
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.2 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


# ------------------------------------------------------------------------------------------------------ queries, fig. 1


class Query(NamedTuple):
    """One query in one slice: its number, its most probable class and how probable that is, its prompts and its mask.

    box: x0, y0, x1, y1 in [0, 1], what SAM's prompt encoder got. aux_mask (None in a variant without), mask: (H, W),
    probabilities.
    """

    number: int
    class_id: int
    probability: float
    box: np.ndarray
    aux_mask: np.ndarray | None
    mask: np.ndarray


@torch.no_grad()
def find_queries(model: MaskSAM, patch: torch.Tensor, index: int) -> tuple[list[Query], np.ndarray]:
    """The queries of one slice that are not "no object", most probable first.

    Args:
        model: in evaluation mode. patch: (C, D, H, W), normalised. index: of the slice in the patch.
    Returns:
        The queries, and the label map (H, W) that all of them together give.
    """
    outputs = model(patch[None])
    boxes, _ = model.prompt_generator.prompts(outputs, outputs["mask_logits"].shape[-2:])
    logits = resize(outputs["mask_logits"], patch.shape[-2:])
    label_map = semantic_map(outputs["class_logits"], logits)[index].argmax(0).numpy()
    probabilities, class_ids = outputs["class_logits"][index].softmax(-1).max(-1)
    queries = []
    for n in probabilities.argsort(descending=True).tolist():
        if class_ids[n] < model.config.num_classes:
            aux = outputs["aux_mask_logits"][index, n].sigmoid().numpy() if "aux_mask_logits" in outputs else None
            mask, box = logits[index, n].sigmoid().numpy(), boxes[index, n].numpy()
            queries.append(Query(n, int(class_ids[n]), float(probabilities[n]), box, aux, mask))
    return queries, label_map


def cut_window(prepared: data.Prepared, d: int, patch_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The window of the model that is centred on a slice and on what is labelled in it, inside the volume if it fits.

    Args:
        prepared: a case. d: slice on its grid. patch_size: (D, H, W).
    Returns:
        image (C, D, H, W), label (D, H, W), and which slice of the window is d.
    """
    shape = prepared.image.shape[1:]
    label = np.zeros(shape, np.uint8) if prepared.label is None else prepared.label
    filled = np.argwhere(label[d] > 0)
    centre = (d, *(filled.mean(0) if len(filled) else np.array(shape[1:]) / 2))
    spare = [n - p for n, p in zip(shape, patch_size)]
    low = [min(max(int(c) - p // 2, 0), s) if s > 0 else s // 2 for c, p, s in zip(centre, patch_size, spare)]
    return *data.cut(prepared.image, label, prepared.image.min((1, 2, 3)), low, patch_size), d - low[0]


def draw_queries(
    picture: Picture, queries: Sequence[Query], labels: Sequence[str], path: str | Path, columns: int = 7
) -> None:
    """Truth and prediction of a slice, then of each query its auxiliary mask and box above its final mask.

    Args:
        picture: of one slice (D is 1). queries: of `find_queries`. labels: names by id. path: PNG to write.
        columns: before the next queries go below.
    """
    picture, colours, (height, width) = _stretch(picture), _colours(labels), picture.image.shape[1:]
    whole = (slice(0, height), slice(0, width))
    bands, columns = -(-(len(queries) + 1) // columns), min(columns, max(2, len(queries) + 1))
    size = (PANEL * columns, 2 * (PANEL + 0.3) * bands + 0.3)
    figure, axes = plt.subplots(2 * bands, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, what in zip(axes[:2, 0], ("truth", "prediction")):
        _draw_panel(axis, picture, 0, what, whole, colours)
        axis.set_title(what, fontsize=8)
    _draw_scale(axes[0, 0], picture.spacing)
    for place, query in enumerate(queries, 1):
        upper, lower = axes.reshape(bands, 2, columns)[place // columns, :, place % columns]
        for axis, mask in ((upper, query.aux_mask), (lower, query.mask)):
            _draw_panel(axis, picture, 0, "image", whole, colours)
            if mask is not None:
                shade = matplotlib.colors.to_rgba_array(colours[query.class_id], 0.5 * mask.ravel())
                axis.imshow(shade.reshape(height, width, 4), origin="lower", aspect=axis.get_aspect())
                _draw_contour(axis, mask > 0.5, colours[query.class_id])
        x0, y0, x1, y1 = query.box * (width, height, width, height)
        corner = (x0 - 0.5, y0 - 0.5)  # pixel i reaches from i - 0.5 to i + 0.5
        box = plt.Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=BOX["box prompt"], clip_on=False)
        upper.add_patch(box)
        name = f"query {query.number}: {labels[query.class_id]} {query.probability:.2f}"
        upper.set_title(f"{name}\nprompts: {'box' if query.aux_mask is None else 'mask and box'}", fontsize=8)
        lower.set_title("final mask", fontsize=8)
    figure.suptitle(picture.name, fontsize=10, fontweight="bold")
    _draw_legend(figure, labels, colours, BOX)
    _save(figure, path)


# --------------------------------------------------------------------------------------------------------- command line


def compare(args: argparse.Namespace) -> None:
    """Image, truth, prediction and errors of some cases of a split."""
    source, cases = evaluate.find_cases(args, [])
    files = dict(zip(cases, layouts.find_predictions(cases, args.predictions)))
    spread = np.linspace(0, len(cases) - 1, min(NUM_CASES, len(cases))).round().astype(int)
    chosen = [find_case(cases, name, args.split) for name in args.case] if args.case else [cases[i] for i in spread]
    pictures = [read_picture(case, files[case], len(source.labels), case.name) for case in chosen]
    draw_overlay(pictures, source.labels, args.output, ("image", "truth", "prediction", "errors"), one_row=False)


def sheet(args: argparse.Namespace) -> None:
    """The worst, the median and the best case of an evaluation, a row each."""
    scores = sorted(Path(args.predictions).glob("metrics*.json"), key=lambda path: len(path.name))
    file = next(iter(scores), None)  # by our own convention, if there are several
    if file is None:
        raise FileNotFoundError(f"{args.predictions}/metrics.json: found no such file, expected the scores; run "
                                "evaluate.py first")  # fmt: skip
    try:
        results = json.loads(file.read_text())
        ranked, names = rank_cases(results), list(results["per_case"])
        if not args.data:
            args.data, args.root = results["data"], args.root or results["root"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: found {type(error).__name__} {error}, expected what evaluate.py writes") from error
    source, known = evaluate.find_cases(args, [])  # of all splits: which fold it was does not matter
    cases = [find_case(known, name, args.split) for name in names]
    files = dict(zip(names, zip(cases, layouts.find_predictions(cases, args.predictions))))
    pictures = [read_picture(*files[name], len(source.labels), title) for name, title in ranked.items()]
    draw_overlay(pictures, source.labels, args.output, ("truth", "prediction", "errors"), worst=True)


def queries(args: argparse.Namespace) -> None:
    """The queries of one slice of a case."""
    model, content = load_checkpoint(args.ckpt, args.sam_checkpoint)
    if model.config.prompts != "auto":
        raise ValueError(f"{args.ckpt}: found a model that is given its boxes, expected one that makes them")
    plan = data.Plan.from_dict(content["plan"])
    _, cases = evaluate.find_cases(args, [content["arguments"]])
    case = find_case(cases, args.case, args.split)
    prepared = data.prepare_case(case, plan)
    depth, native_depth = prepared.image.shape[1], prepared.geometry.shape[0]
    if args.slice is None:
        d = depth // 2 if prepared.label is None else int((prepared.label > 0).sum((1, 2)).argmax())
        args.slice = int((d + 0.5) * native_depth / depth)  # the plan may change the distance of slices
    if not 0 <= args.slice < native_depth:
        raise ValueError(f"--slice {args.slice}: {case.name} has the slices 0 to {native_depth - 1}")
    d = int((args.slice + 0.5) * depth / native_depth)
    patch, label, index = cut_window(prepared, d, model.config.patch_size)
    found, label_map = find_queries(model, patch, index)
    spacing = [old if new is None else new for old, new in zip(prepared.geometry.spacing, plan.spacing)]
    left_out = model.config.num_queries - len(found)
    title = f"{case.name}, slice {args.slice}\nqueries: {len(found)}, left out as no object: {left_out}"
    title += ", truth unknown" if prepared.label is None else ""
    picture = Picture(title, patch[0, index][None].numpy(), label[index][None].numpy(), label_map[None], spacing)
    draw_queries(picture, found, plan.labels, args.output)


def rank_cases(results: dict) -> dict[str, str]:
    """The worst, the median (the lower of two) and the best case by the mean Dice over the scored classes.

    Args:
        results: of metrics.json. Cases without any of the scored classes have no rank.
    Returns:
        case -> title, worst first; fewer than three where there are fewer cases.
    """

    def mean(case: str, metric: str) -> float:
        values = [results["per_case"][case][name][metric] for name in results["scored"]]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else np.nan

    dice = {case: mean(case, "dice") for case in results["per_case"]}
    ranked = sorted((case for case in dice if not np.isnan(dice[case])), key=dice.get)
    if not ranked:
        raise ValueError("no case with a Dice")
    last = len(ranked) - 1
    places = {last: "best", last // 2: "median", 0: "worst"}  # of one or two cases the later name holds
    unit = "mm" if results.get("convention", "masksam") == "masksam" else "voxels"
    titles = {}
    for i in sorted(places):
        scores = f"mean Dice {dice[ranked[i]]:.3f}, HD95 {mean(ranked[i], 'hd95'):.1f} {unit}"
        titles[ranked[i]] = f"{places[i]}: {ranked[i]}, {scores}"
    return titles


def find_case(cases: Sequence[layouts.Case], name: str, split: str) -> layouts.Case:
    """The case of that name. Raises ValueError with the first few that there are."""
    for case in cases:
        if case.name == name:
            return case
    known = ", ".join(case.name for case in cases[:5])
    raise ValueError(f"found no case {name} in the split {split}, expected one of {len(cases)}: {known} ...")


def read_picture(case: layouts.Case, file: Path, num_classes: int, title: str) -> Picture:
    """Read a case and its prediction, which have to lie in one place."""
    if case.label is None:
        raise ValueError(f"{case.name}: found no label file, expected a truth to compare with")
    image, place = nifti.read_image(case.images[0])
    maps = []
    for path in (case.label, str(file)):
        label_map, own_place = nifti.read_label(path, num_classes)
        nifti.check_same_place(path, own_place, case.images[0], place)
        maps.append(label_map)
    return Picture(title, image, *maps, place.spacing)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="compare | sheet | queries")
    for run in (compare, sheet, queries):
        name = run.__name__
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, split="all", fold=None)
        add = command.add_argument
        if run is queries:
            add("--ckpt", required=True, help="checkpoint that train.py wrote")
            add("--sam-checkpoint", help="SAM's own weights, if not in the cache")
            add("--case", required=True, help="name of the case")
            add("--slice", type=int, help="of the case's file, from 0 (default: the one with most foreground)")
        else:
            add("--predictions", required=True, help="folder of label maps, of evaluate.py or another program")
        if run is compare:
            add("--case", nargs="+", help=f"names of cases (default: {NUM_CASES} spread over the split)")
        from_where = {compare: "", sheet: " (default: as scored)", queries: " (default: what it was trained on)"}[run]
        add("--data", required=run is compare, help=f"preset or folder{from_where}")
        add("--root", help="where a preset's files lie")
        if run is not sheet:
            add("--split", default="val", help="of the data set, or all (default: %(default)s)")
            add("--fold", type=int, help="0 to 4 of five")
        add("--output", default=f"{name}.png", help="PNG to write (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw one picture; what is wrong with files or names is one message."""
    args = parse_arguments(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"visualize.py: {error}") from error
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
