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
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
from model import MaskSAM, load_checkpoint, resize, semantic_map
from support import layouts, nifti
from support.pictures import Picture, Query, draw_overlay, draw_queries

NUM_CASES = 3  # that "compare" draws unless told


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
