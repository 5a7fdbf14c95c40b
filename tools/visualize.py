"""Draw predictions beside the truth, and the prompts and masks of the queries (paper fig. 1, 6, 7).

    python -m tools.visualize compare --predictions DIR --data acdc --root DIR
    python -m tools.visualize sheet --predictions DIR
    python -m tools.visualize queries --ckpt FILE --case NAME

    compare   image, truth, prediction and errors of some cases
    sheet     the worst, the median and the best case that evaluate.py scored
    queries   the prompts and the final masks of one slice

Each command writes one PNG. support/pictures.py draws it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
from model import MaskSAM, load_checkpoint, semantic_map
from prompt_generator import resize
from support import layouts, nifti
from support.files import COMMON_OPTIONS, make_parser
from support.metrics import known_mean
from support.pictures import Picture, Query, draw_overlay, draw_queries

NUM_CASES = 3  # Ours: cases that "compare" draws by default


@torch.no_grad()
def find_queries(model: MaskSAM, patch: torch.Tensor, index: int) -> tuple[list[Query], np.ndarray]:
    """Find the queries of one slice that are not "no object", the most probable first.

    Args:
        model: in evaluation mode, on the CPU.
        patch: (C, D, H, W), normalised.
        index: the slice in the patch.
    Returns:
        The queries, and the label map (H, W) that all of them give together.
    """
    outputs = model(patch[None])
    boxes, _ = model.prompt_generator.prompts(outputs, outputs["mask_logits"].shape[-2:], None)  # (D, N, 4)
    logits = resize(outputs["mask_logits"], patch.shape[-2:])  # (D, N, H, W)
    label_map = semantic_map(outputs["class_logits"], logits)[index].argmax(0).numpy()
    probabilities, class_ids = outputs["class_logits"][index].softmax(-1).max(-1)  # (N,) each
    found = []
    for n in probabilities.argsort(descending=True).tolist():
        if class_ids[n] < model.config.num_classes:  # the last class is "no object"
            aux = (
                outputs["aux_mask_logits"][index, n].sigmoid().numpy()
                if "aux_mask_logits" in outputs
                else None
            )
            mask, box = logits[index, n].sigmoid().numpy(), boxes[index, n].numpy()
            found.append(Query(n, int(class_ids[n]), float(probabilities[n]), box, aux, mask))
    return found, label_map


def cut_window(
    prepared: data.Prepared, d: int, size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Cut the patch that is centred on slice d and on its labels, inside the volume where it fits.

    Args:
        prepared: a case.
        d: slice on the grid of the prepared case.
        size: (D, H, W) of the patch.
    Returns:
        image (C, D, H, W), label (D, H, W), and the index of slice d in them.
    """
    shape = prepared.image.shape[1:]
    label = np.zeros(shape, np.uint8) if prepared.label is None else prepared.label
    filled = np.argwhere(label[d] > 0)
    centre = (d, *(filled.mean(0) if len(filled) else np.array(shape[1:]) / 2))
    spare = [n - p for n, p in zip(shape, size)]
    low = [min(max(int(c) - p // 2, 0), s) if s > 0 else s // 2 for c, p, s in zip(centre, size, spare)]
    return *data.cut(prepared.image, label, prepared.image.min((1, 2, 3)), low, size), d - low[0]


def rank_cases(results: dict) -> dict[str, str]:
    """Find the worst, the median (the lower of two) and the best case by the mean Dice of the scored classes.

    Args:
        results: content of metrics.json. A case without any scored class has no rank.
    Returns:
        case -> title, the worst first; fewer than three if there are fewer cases.
    """

    def mean(case: str, metric: str) -> float:
        values = [results["per_case"][case][name][metric] for name in results["scored"]]
        return float(known_mean(np.array(values, np.float64), 0))  # None becomes NaN

    dice = {case: mean(case, "dice") for case in results["per_case"]}
    ranked = sorted((case for case in dice if not np.isnan(dice[case])), key=dice.get)
    if not ranked:
        raise ValueError("no case with a Dice")
    unit = "mm" if results.get("convention", "masksam") == "masksam" else "voxels"
    last, titles = len(ranked) - 1, {}
    for i, place in sorted({last: "best", last // 2: "median", 0: "worst"}.items()):  # the later name wins
        scores = f"mean Dice {dice[ranked[i]]:.3f}, HD95 {mean(ranked[i], 'hd95'):.1f} {unit}"
        titles[ranked[i]] = f"{place}: {ranked[i]}, {scores}"
    return titles


def find_case(cases: Sequence[layouts.Case], name: str, split: str) -> layouts.Case:
    """Return the case of that name, or raise a ValueError with some of the names that there are."""
    found = next((case for case in cases if case.name == name), None)
    if found is None:
        known = ", ".join(case.name for case in cases[:5])
        raise ValueError(
            f"found no case {name} in the split {split}, expected one of {len(cases)}: {known} ..."
        )
    return found


def read_picture(case: layouts.Case, file: str | Path, num_classes: int, title: str) -> Picture:
    """Read a case and its prediction; all of it must lie in one place."""
    if case.label is None:
        raise ValueError(f"{case.name}: found no label file, expected a truth to compare with")
    image, place = nifti.read_image(case.images[0])
    maps = []
    for path in (case.label, str(file)):
        label_map, own_place = nifti.read_label(path, num_classes)
        nifti.check_same_place(path, own_place, case.images[0], place)
        maps.append(label_map)
    return Picture(title, image, *maps, place.spacing)


# ----------------------------------------------------------------------------------------------- command line


def compare(args: argparse.Namespace) -> None:
    """Draw image, truth, prediction and errors of some cases of a split."""
    source, cases = evaluate.find_cases(args, [])
    files = dict(zip(cases, layouts.find_predictions(cases, args.predictions)))
    spread = np.linspace(0, len(cases) - 1, min(NUM_CASES, len(cases))).round().astype(int)
    chosen = [find_case(cases, name, args.split) for name in args.case or [cases[i].name for i in spread]]
    labels, panels = source.task.labels, ("image", "truth", "prediction", "errors")
    pictures = [read_picture(case, files[case], len(labels), case.name) for case in chosen]
    draw_overlay(pictures, labels, args.output, panels, one_row=False)


def sheet(args: argparse.Namespace) -> None:
    """Draw the worst, the median and the best case of an evaluation."""
    folder = Path(args.predictions)
    scores = sorted(folder.glob("metrics*.json"), key=lambda path: len(path.name))
    if not scores:
        raise FileNotFoundError(f"{folder}/metrics.json: found no such file; run evaluate.py first")
    try:
        results = json.loads(scores[0].read_text())  # the shortest name has our own metric convention
        titles = rank_cases(results)
        if not args.data:
            args.data, args.root = results["data"], args.root or results["root"]
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__} {error}"
        raise ValueError(f"{scores[0]}: found {found}, expected what evaluate.py writes") from error
    args.split, args.fold = "all", None
    source, known = evaluate.find_cases(args, [])
    cases = [find_case(known, name, args.split) for name in results["per_case"]]
    labels = source.task.labels
    files = {case.name: (case, file) for case, file in zip(cases, layouts.find_predictions(cases, folder))}
    pictures = [read_picture(*files[name], len(labels), title) for name, title in titles.items()]
    draw_overlay(pictures, labels, args.output, ("truth", "prediction", "errors"), worst=True)


def queries(args: argparse.Namespace) -> None:
    """Draw the prompts and the final masks of the queries in one slice of a case."""
    model, content = load_checkpoint(args.ckpt, args.sam_checkpoint)
    if model.config.given_boxes:
        raise ValueError(f"{args.ckpt}: found a model that is given its boxes, expected one that makes them")
    plan = data.Plan.from_dict(content["plan"])
    _, cases = evaluate.find_cases(args, [content["arguments"]])
    case = find_case(cases, args.case[0], args.split)
    prepared = data.prepare_case(case, plan)
    # Slices on the plan's grid and in the file: the plan may change their distance.
    depth, native_depth = len(prepared.image[0]), prepared.geometry.shape[0]
    if args.slice is None:
        d = depth // 2 if prepared.label is None else int((prepared.label > 0).sum((1, 2)).argmax())
        args.slice = int((d + 0.5) * native_depth / depth)
    if not 0 <= args.slice < native_depth:
        raise ValueError(f"--slice {args.slice}: {case.name} has the slices 0 to {native_depth - 1}")
    d = int((args.slice + 0.5) * depth / native_depth)
    patch, label, index = cut_window(prepared, d, model.config.patch_size)
    found, label_map = find_queries(model, patch, index)
    spacing = [old if new is None else new for old, new in zip(prepared.geometry.spacing, plan.spacing)]
    left_out = model.config.num_queries - len(found)
    title = f"{case.name}, slice {args.slice}\nqueries: {len(found)}, left out as no object: {left_out}"
    title += ", truth unknown" if prepared.label is None else ""
    image, truth = patch[0, index].numpy(), label[index].numpy()
    picture = Picture(title, image[None], truth[None], label_map[None], spacing)
    draw_queries(picture, found, plan.task.labels, args.output)


# The commands, and the options that each of them needs.
COMMANDS = {compare: ("predictions", "data"), sheet: ("predictions",), queries: ("ckpt", "case")}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `command` becomes the function of that name."""
    parser = make_parser(__doc__, "root", "fold", "sam-checkpoint")
    add = parser.add_argument
    add("command", choices=[command.__name__ for command in COMMANDS])
    data_help = COMMON_OPTIONS["data"]["help"].split(" (")[0]
    add("--data", help=f"{data_help} (default: as in training, or as scored)")
    add("--predictions", help="compare, sheet: folder with label maps of evaluate.py or another program")
    add("--ckpt", help="queries: checkpoint that train.py wrote")
    add("--case", nargs="+", help="names of cases, one for queries (default: some of the split)")
    add("--slice", type=int, help="queries: slice of the file, from 0 (default: the one with most labels)")
    add("--split", default="val", help="split of the data set, or all (default: %(default)s)")
    add("--output", help="PNG to write (default: <command>.png)")
    args = parser.parse_args(argv)
    args.output = args.output or f"{args.command}.png"
    args.command = next(command for command in COMMANDS if command.__name__ == args.command)
    if missing := [f"--{name}" for name in COMMANDS[args.command] if not getattr(args, name)]:
        parser.error(f"{args.command.__name__} needs {' and '.join(missing)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw one picture; a wrong file or name becomes one message."""
    args = parse_arguments(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"visualize.py: {error}") from error
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
