"""Draw predictions beside the truth, the queries, and the way through the network (paper fig. 1, 2, 6, 7).

    python -m tools.visualize compare --predictions A B --names X Y   methods beside each other, with errors
    python -m tools.visualize queries --ckpt FILE --case NAME     prompts and masks of the queries in a slice
    python -m tools.visualize walk --ckpt FILE --case NAME        a slice on its way through the network

Each command writes one PNG. Without --case, compare draws the worst, the median and the best case.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
from matcher import masks_to_boxes
from model import MaskSAM, load_checkpoint, semantic_map
from prompt_generator import resize
from support import layouts, nifti, pictures
from support.files import COMMON_OPTIONS, make_parser, one_sentence
from support.metrics import known_mean
from support.pictures import Picture, Query


@torch.no_grad()
def find_queries(model: MaskSAM, patch: Tensor, index: int) -> tuple[list[Query], np.ndarray]:
    """Return the queries of a slice, objects first, most probable first, and its semantic map (K, H, W)."""
    outputs = model(patch[None])
    prompts, _ = model.prompt_generator.prompts(outputs, outputs["mask_logits"].shape[-2:], None)  # (D, N, 4)
    logits = resize(outputs["mask_logits"], patch.shape[-2:])  # (D, N, H, W)
    maps = semantic_map(outputs["class_logits"], logits)[index].numpy()
    boxes, aux = {"box prompt": prompts}, [None] * logits.shape[1]
    if "aux_mask_logits" in outputs:
        aux = outputs["aux_mask_logits"][index].sigmoid().numpy()
        boxes = {"mask's box": masks_to_boxes(outputs["aux_mask_logits"] > 0)} | boxes
    if "aux_boxes" in outputs:
        boxes = {"learned box": outputs["aux_boxes"]} | boxes
    found, masks = [], logits[index].sigmoid().numpy()
    for n, probabilities in enumerate(outputs["class_logits"][index].softmax(-1).numpy()):
        own = {name: box[index, n].numpy() for name, box in boxes.items()}
        found.append(Query(n, int(probabilities.argmax()), probabilities, own, aux[n], masks[n]))
    nothing = model.config.num_classes
    return sorted(found, key=lambda query: (query.class_id == nothing, -query.probabilities.max())), maps


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


def find_titles(args: argparse.Namespace) -> dict[str, str]:
    """Return case -> title: of --case, or of the worst, median and best case by the first folder's scores."""
    if args.case and args.data:
        return {name: name for name in args.case}
    folder = Path(args.predictions[0])  # the shortest name has our own metric convention
    path = min(folder.glob("metrics*.json"), key=lambda path: len(path.name), default=folder / "metrics.json")
    try:
        titles = rank_cases(results := json.loads(path.read_text()))
        if not args.data:
            args.data, args.root = results["data"], args.root or results["root"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"found no {'scores' if path.exists() else 'such file'}, expected those of evaluate.py"
        raise ValueError(f"{path}: {found}; run it first, or name --data and --case") from error
    return {name: name for name in args.case} if args.case else titles


def compare(args: argparse.Namespace) -> None:
    """Draw a row per case: the truth, and the errors of each method. Ours: where they err most together."""
    titles, names, rows = find_titles(args), args.names or args.predictions, []
    args.split, args.fold = "all", None
    source, known = evaluate.find_cases(args, [])
    cases, labels = [find_case(known, name) for name in titles], source.task.labels
    files = [layouts.find_predictions(cases, folder, spare=True) for folder in args.predictions]
    for case, *paths in zip(cases, *files):
        if case.label is None:
            raise ValueError(f"{case.name}: found no label file, expected a truth to compare with")
        (image, *_), place = nifti.read_image(case.images[0])
        maps = []
        for path in map(str, (case.label, *paths)):
            label_map, own_place = nifti.read_label(path, len(labels), place)
            nifti.check_same_place(path, own_place, case.images[0], place)
            maps.append(label_map)
        truth, rest = maps[0], (place.spacing, pictures.sides_of(place.frame))
        d = int(sum((truth != prediction).sum((1, 2)) for prediction in maps).argmax())
        row = [(Picture(name, image, truth, own, *rest), d, "errors") for name, own in zip(names, maps[1:])]
        rows.append((titles[case.name], [(row[0][0], d, "truth"), *row]))
    pictures.draw_rows(rows, labels, args.output, pictures.ERRORS.items())


def open_slice(args: argparse.Namespace) -> tuple[MaskSAM, Sequence[str], Tensor, int, Picture]:
    """Return the model, labels, a patch (C, D, H, W), the index of the asked slice in it, and its picture."""
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
    title = f"{case.name}, slice {args.slice}" + (", truth unknown" if unknown else "")
    spacing = [old if new is None else new for old, new in zip(geometry.spacing, plan.spacing)]
    image, label = patch[0, index, None].numpy(), label[index, None].numpy()
    picture = Picture(title, image, label, label, spacing, pictures.sides_of(geometry.frame))
    return model, plan.task.labels, patch, index, picture


def queries(args: argparse.Namespace) -> None:
    """Draw the prompts and the final masks of the queries in one slice of a case."""
    model, labels, patch, index, picture = open_slice(args)
    everything, maps = find_queries(model, patch, index)
    found = [query for query in everything if query.class_id < len(labels)]
    counts = f"queries: {len(found)}; no object, not drawn: {len(everything) - len(found)}"
    picture = picture._replace(name=f"{picture.name}\n{counts}", prediction=maps.argmax(0)[None])
    pictures.draw_queries(picture, found, labels, args.output)


def walk(args: argparse.Namespace) -> None:
    """Draw what each part of the network makes of one slice of a case (fig. 2)."""
    model, labels, patch, index, picture = open_slice(args)
    kept, config = {}, model.config  # name of a part -> its inputs and outputs
    for name, part in (("stem", model.stem), ("generator", model.prompt_generator), ("whole", model)):
        part.register_forward_hook(lambda _, *values, name=name: kept.update({name: values}))
    found, maps = find_queries(model, patch, index)
    ((volume,), outputs), (neck, taps, *_) = kept["whole"], kept["generator"][0]
    grey = kept["stem"][1] * model.sam.pixel_std + model.sam.pixel_mean  # (S, 3, *encoder_size)
    low, high = np.percentile(grey[index], (1, 99))
    view = ((grey[index] - low) / (high - low)).clip(0, 1).movedim(0, -1).numpy()
    views = [(f"stem's picture {tuple(grey.shape)}", view)]
    for name, feature in zip(("tap 1", "tap 2", "tap 3", "tap 4", "neck"), (*taps[-4:], neck)):  # no slices
        views.append((f"{name} {tuple(feature.shape)}", pictures.colour_map(feature[index].numpy())))
    names = ("aux_mask_logits", "class_logits", "mask_logits")
    shapes = [tuple(outputs[name].shape) if name in outputs else "none" for name in names]
    shapes = [tuple(volume.shape), tuple(neck.shape), *shapes, maps.shape]
    count, (h, w), n = sum(query.class_id == len(labels) for query in found), config.grid, config.num_queries
    guide = f"""{picture.name}, slice {index + 1} of {config.patch_size[0]} in its patch
S = B D slices, N = {n} queries, K = {len(labels)} classes, h x w = {h} x {w} tokens
White line in the first two rows: the outline of the true objects
A tap is the feature map behind a quarter of the encoder's blocks or, of a pyramid, a stage.
Colours of taps and neck: first three principal components
Dashed: the learned box, and the box of the auxiliary mask
Solid: the box prompt made of them, as in fig. 5{model.prompt_generator.form}
Queries: the most probable objects first; {count} of {n} are no object"""
    picture = picture._replace(prediction=maps.argmax(0)[None])
    pictures.draw_walk(picture, guide, views, shapes, found, maps, labels, args.output)


# The commands, and the options that each of them needs.
COMMANDS = {compare: ("predictions",), queries: ("ckpt", "case"), walk: ("ckpt", "case")}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `command` becomes the function of that name."""
    parser = make_parser(__doc__, "root fold group split sam-checkpoint")
    add, commands = parser.add_argument, {command.__name__: command for command in COMMANDS}
    add("command", choices=commands)
    add("--data", help=COMMON_OPTIONS["data"]["help"] + " (default: as in training, or as scored)")
    add("--predictions", nargs="+", metavar="DIR", help="compare: folders with label maps, of any program")
    add("--names", nargs="+", metavar="NAME", help="compare: names of the folders' methods")
    add("--ckpt", nargs=1, metavar="FILE", help="queries, walk: checkpoint that train.py wrote")
    add("--case", nargs="+", help="names of cases (default: by the scores), one for queries and walk")
    add("--slice", type=int, help="queries, walk: slice of the file, from 0 (default: with most labels)")
    add("--output", help="PNG to write (default: <command>.png)")
    args = parser.parse_args(argv)
    args.output, args.command = args.output or f"{args.command}.png", commands[args.command]
    if missing := [f"--{name}" for name in COMMANDS[args.command] if not getattr(args, name)]:
        parser.error(f"{args.command.__name__} needs {' and '.join(missing)}")
    if args.names and len(args.names) != (number := len(args.predictions or ())):
        parser.error(f"--names: found {len(args.names)}, expected {number} as in --predictions")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw one picture."""
    args = parse_arguments(argv)
    with one_sentence("visualize.py", args.debug):
        args.command(args)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
