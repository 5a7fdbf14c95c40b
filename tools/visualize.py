"""Draw predictions beside the truth, and the prompts and masks of the queries (paper fig. 1, 6, 7).

    python -m tools.visualize compare --predictions DIR --data acdc --root DIR   some cases, with their errors
    python -m tools.visualize sheet --predictions DIR             the worst, the median and the best case
    python -m tools.visualize queries --ckpt FILE --case NAME     prompts and masks of the queries in a slice

Each command writes one PNG.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
from model import MaskSAM, load_checkpoint, semantic_map
from prompt_generator import resize
from support import layouts, nifti
from support.files import COMMON_OPTIONS, make_parser, one_sentence
from support.metrics import known_mean
from support.pictures import Picture, Query, draw_overlay, draw_queries, sides_of

NUM_CASES = 3  # Ours: cases that "compare" draws by default


@torch.no_grad()
def find_queries(model: MaskSAM, patch: Tensor, index: int) -> tuple[list[Query], np.ndarray]:
    """Return the queries of a slice that are an object, most probable first, and its label map (H, W)."""
    outputs = model(patch[None])
    boxes, _ = model.prompt_generator.prompts(outputs, outputs["mask_logits"].shape[-2:], None)  # (D, N, 4)
    logits = resize(outputs["mask_logits"], patch.shape[-2:])  # (D, N, H, W)
    label_map = semantic_map(outputs["class_logits"], logits)[index].argmax(0).numpy()
    probabilities, class_ids = outputs["class_logits"][index].softmax(-1).max(-1)  # (N,) each
    masks, aux = logits[index].sigmoid().numpy(), [None] * len(class_ids)
    if "aux_mask_logits" in outputs:
        aux = outputs["aux_mask_logits"][index].sigmoid().numpy()
    found = [
        Query(n, int(class_ids[n]), float(probabilities[n]), boxes[index, n].numpy(), aux[n], masks[n])
        for n in probabilities.argsort(descending=True).tolist()
        if class_ids[n] < model.config.num_classes  # the last class is "no object"
    ]
    return found, label_map


def cut_window(prepared: data.Prepared, d: int, size: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Cut a patch around slice d and its labels: image (C, D, H, W), label (D, H, W), and the index of d."""
    shape = prepared.image.shape[1:]
    label = np.zeros(shape, np.uint8) if prepared.label is None else prepared.label
    filled = np.argwhere(label[d] > 0)
    centre = (d, *(filled.mean(0) if len(filled) else np.array(shape[1:]) / 2))
    spare = [n - p for n, p in zip(shape, size)]  # the patch stays inside the volume where it fits
    low = [min(max(int(c) - p // 2, 0), s) if s > 0 else s // 2 for c, p, s in zip(centre, size, spare)]
    return *data.cut(prepared.image, label, prepared.image.min((1, 2, 3)), low, size), d - low[0]


def rank_cases(results: dict) -> dict[str, str]:
    """Return titles for the cases of the worst, the median (the lower of two) and the best mean Dice."""
    ranked, titles = [], {}
    for case, scores in results["per_case"].items():
        values = [[scores[name]["dice"], scores[name]["hd95"]] for name in results["scored"]]
        dice, hd95 = known_mean(np.array(values, np.float64), 0)  # None becomes NaN
        if not np.isnan(dice):
            ranked.append((dice, hd95, case))
    if not ranked:
        raise ValueError("no case with a Dice")
    ranked.sort(key=lambda row: row[0])  # by Dice
    unit, last = "mm" if results["convention"] == "masksam" else "voxels", len(ranked) - 1
    for i, place in sorted({last: "best", last // 2: "median", 0: "worst"}.items()):  # the later name wins
        dice, hd95, case = ranked[i]
        titles[case] = f"{place}: {case}, mean Dice {dice:.3f}, HD95 {hd95:.1f} {unit}"
    return titles


def find_case(cases: Sequence[layouts.Case], name: str) -> layouts.Case:
    """Return the case of that name, or raise a ValueError with some of the names that there are."""
    known = {case.name: case for case in cases}
    if name not in known:
        raise ValueError(f"found no case {name}, expected one of {len(known)}: {', '.join([*known][:5])} ...")
    return known[name]


def draw(args, source: layouts.DataSource, cases: Sequence[layouts.Case], titles: dict, **options) -> None:
    """Draw the cases that have a title. Each case has a prediction, which lies where its image lies."""
    files = dict(zip(cases, layouts.find_predictions(cases, args.predictions)))
    pictures, labels = [], source.task.labels
    for name, title in titles.items():
        case, maps = find_case(cases, name), []
        if case.label is None:
            raise ValueError(f"{name}: found no label file, expected a truth to compare with")
        image, place = nifti.read_image(case.images[0])
        for path in (case.label, str(files[case])):
            label_map, own_place = nifti.read_label(path, len(labels), place)
            nifti.check_same_place(path, own_place, case.images[0], place)
            maps.append(label_map)
        pictures.append(Picture(title, image[0], *maps, place.spacing, sides_of(place.frame)))
    draw_overlay(pictures, labels, args.output, **options)


def compare(args: argparse.Namespace) -> None:
    """Draw image, truth, prediction and errors of some cases of a split."""
    source, cases = evaluate.find_cases(args, [])
    spread = np.linspace(0, len(cases) - 1, min(NUM_CASES, len(cases))).round().astype(int)
    titles = {name: name for name in args.case or [cases[i].name for i in spread]}
    draw(args, source, cases, titles, panels=("image", "truth", "prediction", "errors"), one_row=False)


def sheet(args: argparse.Namespace) -> None:
    """Draw the worst, the median and the best case of an evaluation."""
    folder = Path(args.predictions)  # the shortest name has our own metric convention
    path = min(folder.glob("metrics*.json"), key=lambda path: len(path.name), default=folder / "metrics.json")
    try:
        titles = rank_cases(results := json.loads(path.read_text()))
        if not args.data:
            args.data, args.root = results["data"], args.root or results["root"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "no scores" if path.exists() else "no such file"
        raise ValueError(f"{path}: found {found}, expected those of evaluate.py; run it first") from error
    args.split, args.fold = "all", None
    source, known = evaluate.find_cases(args, [])
    cases = [find_case(known, name) for name in results["per_case"]]
    draw(args, source, cases, titles, panels=("truth", "prediction", "errors"), worst=True)


def queries(args: argparse.Namespace) -> None:
    """Draw the prompts and the final masks of the queries in one slice of a case."""
    (file,) = args.ckpt
    model, content = load_checkpoint(file, args.sam_checkpoint)
    if model.config.given_boxes:
        raise ValueError(f"{file}: found a model that is given its boxes, expected one that makes them")
    plan = data.Plan.from_dict(content["plan"])
    case = find_case(evaluate.find_cases(args, [content])[1], args.case[0])
    prepared = data.prepare_case(case, plan)
    geometry, unknown = prepared.geometry, prepared.label is None
    # Slices on the plan's grid and in the file: the plan may change their distance.
    depth, native_depth = len(prepared.image[0]), geometry.shape[0]
    if args.slice is None:
        d = depth // 2 if unknown else int((prepared.label > 0).sum((1, 2)).argmax())
        args.slice = int((d + 0.5) * native_depth / depth)
    if not 0 <= args.slice < native_depth:
        raise ValueError(f"--slice {args.slice}: {case.name} has the slices 0 to {native_depth - 1}")
    d = int((args.slice + 0.5) * depth / native_depth)
    patch, label, index = cut_window(prepared, d, model.config.patch_size)
    found, label_map = find_queries(model, patch, index)
    title = f"{case.name}, slice {args.slice}" + (", truth unknown" if unknown else "")
    title += f"\nqueries: {len(found)}, left out as no object: {model.config.num_queries - len(found)}"
    spacing = [old if new is None else new for old, new in zip(geometry.spacing, plan.spacing)]
    maps = patch[0, index, None].numpy(), label[index, None].numpy(), label_map[None]
    picture = Picture(title, *maps, spacing, sides_of(geometry.frame))
    draw_queries(picture, found, plan.task.labels, args.output)


# The commands, and the options that each of them needs.
COMMANDS = {compare: ("predictions", "data"), sheet: ("predictions",), queries: ("ckpt", "case")}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `command` becomes the function of that name."""
    parser = make_parser(__doc__, "root", "fold", "group", "sam-checkpoint")
    add, commands = parser.add_argument, {command.__name__: command for command in COMMANDS}
    add("command", choices=commands)
    add("--data", help=COMMON_OPTIONS["data"]["help"] + " (default: as in training, or as scored)")
    add("--predictions", help="compare, sheet: folder with label maps of evaluate.py or another program")
    add("--ckpt", nargs=1, metavar="FILE", help="queries: checkpoint that train.py wrote")
    add("--case", nargs="+", help="names of cases, one for queries (default: some of the split)")
    add("--slice", type=int, help="queries: slice of the file, from 0 (default: the one with most labels)")
    add("--split", default="val", help="split of the data set, or all (default: %(default)s)")
    add("--output", help="PNG to write (default: <command>.png)")
    args = parser.parse_args(argv)
    args.output, args.command = args.output or f"{args.command}.png", commands[args.command]
    if missing := [f"--{name}" for name in COMMANDS[args.command] if not getattr(args, name)]:
        parser.error(f"{args.command.__name__} needs {' and '.join(missing)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw one picture."""
    args = parse_arguments(argv)
    with one_sentence("visualize.py", args.debug):
        args.command(args)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
