"""Predict whole cases with one checkpoint or several, and score label maps (paper 3, tables 1-3).

    case ── prepare_case ──> (C, D, H, W) ── sliding windows ──> (K, n, H, W) ── resample_scores ──> label map

    python evaluate.py --ckpt runs/acdc-vit_b/best.pt               the validation cases: files and scores
    python evaluate.py --ckpt FILE --split test                     the test cases; several FILEs are averaged
    python evaluate.py --ckpt FILE --input DIR --output OUT         images without labels
    python evaluate.py --ckpt FILE --split testing --submission     hidden labels: label maps and a zip file
    python evaluate.py --predictions DIR --data acdc --split test   score the label maps of another program

A model is rebuilt from its checkpoint, and SAM's own file if SAM is frozen. Predictions go to
predictions-<split> beside the checkpoint. Files from the same checkpoint, images and options are kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import dataclasses
import hashlib
import itertools
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

import data
from model import MaskSAM, load_checkpoint
from support import files, layouts, metrics, nifti
from support.presets import PRESETS, Task

Cases = Sequence[layouts.Case]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the first voxels of windows along one axis, evenly spread from one end to the other."""
    if not 0 <= overlap < 1:
        raise ValueError(f"--overlap: found {overlap}, expected a share from 0 to below 1")
    steps = -(-(length - window) // max(1, int(window * (1 - overlap))))  # rounded up
    return [round(i * (length - window) / max(steps, 1)) for i in range(steps + 1)]


def window_weights(size: Sequence[int]) -> Tensor:
    """Return the Gaussian weights of a window's voxels, at most 1.

    Release: nnU-Net's sigma, 1/8 of the window. Ours: at least 1e-3, because only one window sees the corners
    of a volume, where smaller weights would lose digits.
    """
    weights = torch.ones(())
    for n in size:
        distance = torch.arange(n) - (n - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (distance / (n / 8)) ** 2)
    return (weights / weights.max()).clamp(min=1e-3)


def pad_to_window(volume: Tensor, size: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Pad a volume (C, D, H, W) to `size` or more. Return it, and how many voxels lie before the old ones."""
    spare = [max(p - n, 0) for p, n in zip(size, volume.shape[1:])]
    before = [s // 2 for s in spare]
    if any(spare):
        sides = [side for s, b in zip(reversed(spare), reversed(before)) for side in (b, s - b)]
        floor = volume.amin((1, 2, 3), keepdim=True)  # each channel is padded with its minimum
        volume = F.pad(volume - floor, sides) + floor
    return volume, before


def sliding_window_inference(
    predict: Callable, volume: Tensor, patch_size: Sequence[int], overlap=0.5, batch_size=1, desc=None
) -> Iterator[Tensor]:
    """Average the semantic maps of overlapping windows, and yield slices as soon as they are complete.

    Args:
        predict: (B, C, d, h, w) -> (B, K, d, h, w). volume: (C, D, H, W), of any size.
        patch_size: (d, h, w), the size of a window. batch_size: number B of windows per call.
        overlap: share of a window that the next window covers too, in [0, 1). Release: 0.5.
        desc: title of a progress bar, or None.
    Yields: (K, n, H, W) float32 where `predict` makes its maps, D slices together.
    """
    depth, *plane = volume.shape[1:]
    volume, before = pad_to_window(volume, patch_size)
    inside = [slice(b, b + n) for b, n in zip(before[1:], plane)]
    shape, weight = volume.shape[1:], window_weights(patch_size)
    starts = [window_starts(n, p, overlap) for n, p in zip(shape, patch_size)]
    corners = list(itertools.product(*starts))  # The depth changes last, so slices are completed in order.
    total, weight_sum, done = None, torch.zeros(0, *shape[1:]), 0  # sums over windows, from slice `done` on
    for first in tqdm(range(0, len(corners), batch_size), desc, leave=False, disable=desc is None):
        batch = corners[first : first + batch_size]
        windows = [tuple(slice(s, s + p) for s, p in zip(corner, patch_size)) for corner in batch]
        maps = predict(torch.stack([volume[:, *window] for window in windows])).float()
        if total is None:
            total = maps.new_zeros(maps.shape[1], 0, *shape[1:])
            weight, weight_sum = weight.to(maps.device), weight_sum.to(maps.device)
        new = windows[-1][0].stop - done - len(weight_sum)  # slices that no window has reached before
        if new > 0:
            total, weight_sum = F.pad(total, (0, 0, 0, 0, 0, new)), F.pad(weight_sum, (0, 0, 0, 0, 0, new))
        for (slices, *place), semantic in zip(windows, maps):
            place = (slice(slices.start - done, slices.stop - done), *place)
            total[:, *place] += semantic * weight
            weight_sum[place] += weight
        final = corners[first + batch_size][0] if first + batch_size < len(corners) else shape[0]
        if final > done:  # No later window reaches the slices before `final`.
            mean = total[:, : final - done] / weight_sum[: final - done]
            total, weight_sum, done = total[:, final - done :], weight_sum[final - done :], final
            yield mean[:, before[0] : before[0] + depth, *inside]  # A padded depth is one window.


def predict_case(
    models: Sequence[MaskSAM], prepared, device="cpu", amp="off", mirror_axes=(), largest=(), **windows
) -> np.ndarray:
    """Predict the label map of a case, (D, H, W) uint8, on the grid of its file.

    Args:
        models: in evaluation mode, on the device. The average of their semantic maps counts.
        prepared: the case, as `data.prepare_case` or `data.load_cached` made it by the plan of each model.
        device, amp: where the models are, and a key of `files.AMP_TYPES`.
        mirror_axes: axes of (D, H, W). Ours, as in nnU-Net: the maps of all flips along them are averaged.
        largest: class ids for `keep_largest_component`. windows: options of `sliding_window_inference`.
    """
    axes = [axis - 3 for axis in mirror_axes]
    flips = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]

    def scores(model: MaskSAM, case: data.Prepared) -> Iterator[Tensor]:  # (K, n, H, W) of the file's grid
        def predict(volumes: Tensor) -> Tensor:
            volumes = volumes.to(device)
            with torch.no_grad(), files.autocast(device, amp):
                return sum(model.predict(volumes.flip(flip)).flip(flip) for flip in flips) / len(flips)

        volume = case.network_input()  # (C, D, H, W)
        slabs = sliding_window_inference(predict, volume, model.config.patch_size, **windows)
        return data.resample_scores(slabs, volume.shape[1], case.geometry.shape)

    slabs = map(sum, zip(*(scores(model, case) for model, case in zip(models, prepared))))
    label = torch.cat([label_of(slab) for slab in slabs]).numpy()
    return keep_largest_component(label, largest)


def label_of(scores: Tensor) -> Tensor:
    """Return the class of the largest score, (K, n, H, W) -> (n, H, W) uint8 on the CPU. ValueError: NaN."""
    largest, label = scores.max(0)
    if not torch.isfinite(largest.sum()):  # The maximum of numbers with a NaN is NaN.
        raise ValueError("found scores that are not numbers, expected an image and weights that are")
    return label.to(torch.uint8).cpu()


def keep_largest_component(label: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    """Set all but the largest component of some classes of (D, H, W) to background, in place.

    Ours: an option, as in nnU-Net. Voxels that touch at a corner are connected.
    """
    boxes = ndimage.find_objects(label)
    for class_id in class_ids:
        if class_id <= len(boxes) and boxes[class_id - 1] is not None:
            part = label[boxes[class_id - 1]]
            components, _ = ndimage.label(part == class_id, np.ones((3, 3, 3)))
            sizes = np.bincount(components.ravel())
            part[(components > 0) & (components != 1 + sizes[1:].argmax())] = 0
    return label


def find_cases(args: argparse.Namespace, contents: Sequence[dict]) -> tuple[layouts.DataSource, Cases]:
    """Find the cases that `args` (data, root, fold, group, split) name; the training gives the defaults.

    Raises: ValueError if one of the checkpoints (contents) was trained with a case that is to be scored.
    """
    first = contents[0]["arguments"] if contents else {"root": None}
    args.fold = first.get("fold") if args.fold is None else args.fold
    root = args.root if args.data or args.root else first["root"]
    group = args.group or first.get("group")
    source = layouts.find_data(args.data or first["data"], root, args.fold, group)
    splits = source.splits | {"all": tuple(case for split in source.splits.values() for case in split)}
    if args.split not in splits:
        raise ValueError(f"--split: found {args.split}, expected {', '.join(splits)} as in {source.root}")
    cases = splits[args.split]
    for path, content in zip(args.ckpt or (), contents):
        known = content["cases"]["train"] if content["plan"]["data"] == source.name else ()
        if seen := [case.name for case in cases if case.name in known]:
            found = f"found {len(seen)} of {len(cases)} cases that it was trained with, such as {seen[0]}"
            if args.split not in ("train", "all"):
                raise ValueError(f"{path}: {found}; expected the fold of its training, or --split all")
            print(f"remark: {path}: {found}")
    return source, cases


def predict_files(
    cases: Cases,
    paths: list[Path],
    task: Task,
    description: Callable,
    predict: Callable,
    workers=1,
    plan=None,
) -> None:
    """Predict the cases that are not done yet. ValueError: an image is wrong; then nothing is written.

    Args:
        cases, paths: the cases, and the file to write for each, all in one folder.
        task, workers: labels and channels, and the number of threads that check the images.
        description: case -> text for the header of its file. A file with this text is done.
        predict: case -> label map (D, H, W) and the geometry of its image.
        plan: of the model; images that are unlike its training images are remarked.
    """
    data.survey(cases, task, workers, plan=plan)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    todo = [pair for pair in zip(cases, paths) if nifti.read_description(pair[1]) != description(pair[0])]
    for case, path in tqdm(todo, "predicting"):
        nifti.write_label_map(path, *predict(case), description(case))
    print(f"{paths[0].parent}: wrote {len(todo)} label maps, {len(paths) - len(todo)} were there")


def score_files(cases: Cases, paths: Sequence[Path], source: layouts.DataSource, args) -> dict:
    """Compare label maps with the truth, after a check of all of them; see `report` for the arguments."""
    num_classes, scores = len(source.task.labels), {}
    truths = [dataclasses.replace(case, images=(), box_source=None) for case in cases]
    data.survey(truths, source.task, args.workers, paths)
    options = {"tolerance": args.tolerance, "convention": args.convention, "workers": args.workers}
    for case, path in zip(tqdm(cases, "scoring"), paths):
        truth, geometry = nifti.read_label(case.label, num_classes)
        prediction, _ = nifti.read_label(str(path), num_classes, geometry)
        scores[case.name] = metrics.score_maps(prediction, truth, geometry.spacing, num_classes, **options)
    return metrics.summarize(scores, source.task.labels, source.task.scored)


def report(
    cases: Cases, paths: list[Path], source: layouts.DataSource | None, args, facts: dict, suffix: str = ""
) -> dict | None:
    """Score the cases that have labels, print the table, and write metrics.json and metrics.csv.

    Args:
        cases, paths: the cases, and the label map of each. source: the data set; None without labels.
        args: with split, fold, tolerance, convention, workers and output (None: beside the label maps).
        facts: about the predictions, to be stored with the results. suffix: of the files' names.
    Returns: `metrics.summarize` and the facts; None if no case has a label.
    """
    labelled = [pair for pair in zip(cases, paths) if pair[0].label is not None]
    if not labelled:
        return None
    name = source.name if source.name in PRESETS else source.root
    facts |= {"data": name, "root": source.root, "split": args.split, "fold": args.fold}
    results = score_files(*zip(*labelled), source, args)
    results |= {"convention": args.convention, "tolerance_mm": args.tolerance, **facts}
    metrics.print_table(results)
    output = Path(args.output or paths[0].parent)
    output.mkdir(parents=True, exist_ok=True)
    metrics.write_metrics(output, results, suffix)
    return results


def describe_box_source(where: str) -> str:
    """Return the words for a file's header that name the source of given boxes, "" if there are none."""
    words = layouts.box_source_suffix(where).replace("-boxes-", ", boxes of ", 1)
    return words[:45]  # A header has room for 79 bytes.


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and refuse options that do not go together."""
    parser = files.make_parser(__doc__, *"data root fold group sam-checkpoint prompts device workers".split())
    add = parser.add_argument
    ckpt = "checkpoint of train.py, whose data, root and fold are the defaults; several are averaged"
    add("--ckpt", nargs="+", metavar="FILE", help=ckpt)
    add("--predictions", metavar="DIR", help="label maps of another program to score, instead of --ckpt")
    add("--split", default="val", help="cases: train, val, test, testing or all (default: %(default)s)")
    add("--input", metavar="DIR|FILE", help="images without labels to predict, instead of a split")
    add("--output", metavar="DIR", help="folder to write (default: predictions-<split> by the checkpoint)")
    add("--submission", action="store_true", help="name the files as the challenge does, and zip them")
    add("--overlap", type=float, default=0.5, help="overlap of neighbouring windows (default: %(default)s)")
    add("--batch", type=int, default=1, dest="batch_size", help="windows per call (default: %(default)s)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="average mirrored predictions")
    largest = "keep only the largest component of these classes, or of all if none is named"
    add("--largest-component", nargs="*", metavar="CLASS", dest="largest", help=largest)
    add("--amp", choices=files.AMP_TYPES, help="autocast type (default: what the hardware has)")
    add("--tolerance", type=float, default=1.0, help="tolerance of NSD in mm (default: %(default)s)")
    convention = {"choices": metrics.CONVENTIONS, "default": "masksam", "dest": "convention"}
    add("--metric-convention", help="how other papers score absent classes (default: masksam)", **convention)
    args = parser.parse_args(argv)
    given, unlabelled = args.prompts != "auto", args.input or args.submission
    output = args.output and Path(args.output).resolve()
    problems = {
        "expected either --ckpt FILE or --predictions DIR": (args.ckpt is None) == (args.predictions is None),
        "--predictions needs --data, the data set that they belong to": args.predictions and not args.data,
        "--input and --submission belong to --ckpt": args.predictions and unlabelled,
        "--predictions and --submission take no --prompts": given and (args.predictions or args.submission),
        "--input needs --output, the folder for the predictions": args.input and not args.output,
        f"--batch: found {args.batch_size}, expected 1 or more": args.batch_size < 1,
        f"--tolerance: found {args.tolerance}, expected more than 0 mm": args.tolerance <= 0,
    }
    for name, folder in (("--input", args.input), ("--prompts", given and args.prompts)):
        problem = f"{name}: found the folder of --output, expected another: its files would be replaced"
        problems[problem] = folder and output == Path(folder).resolve()
    if found := [problem for problem, applies in problems.items() if applies]:
        parser.error(found[0])
    args.workers = args.workers or files.default_workers()
    return args


def predict(args: argparse.Namespace) -> dict | None:
    """Predict cases with the models of `--ckpt`, and return their `report`."""
    models, contents = zip(*(load_checkpoint(path, args.sam_checkpoint) for path in args.ckpt))
    plans = [data.Plan.from_dict(content["plan"]) for content in contents]
    task, source = plans[0].task, None
    if args.input:
        cases = layouts.find_images(args.input, len(task.channels))
    else:
        source, cases = find_cases(args, contents)
    check_models(args, models, [plan.task for plan in plans], source)
    cases = layouts.with_box_source(cases, args.prompts)
    device = args.device or files.default_device()
    options = {"amp": args.amp or files.default_amp(device), "overlap": args.overlap}
    options["mirror_axes"] = list(plans[0].task.flip_axes) if args.mirror else []
    options["largest"] = class_ids(args.largest, task.labels)
    made_by = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.ckpt]

    def description(case: layouts.Case) -> str:
        inputs = [*case.images, *filter(None, [case.box_source])]
        return f"MaskSAM{describe_box_source(args.prompts)} {data.file_key([made_by, options], inputs)}"

    def predict_one(case: layouts.Case) -> tuple[np.ndarray, nifti.Geometry]:
        prepared = [data.prepare_case(dataclasses.replace(case, label=None), plan) for plan in plans]
        batches = {"device": device, "batch_size": args.batch_size, "desc": case.name}
        try:
            return predict_case(models, prepared, **batches, **options), prepared[0].geometry
        except ValueError as error:
            raise ValueError(f"{', '.join(args.ckpt)}, case {case.name}: {error}") from error

    for model in models:
        model.to(device)
    suffix = layouts.box_source_suffix(args.prompts)
    middle = "" if args.output else differences(args, contents, source)
    output = Path(args.output or Path(args.ckpt[0]).parent / f"predictions{suffix}{middle}-{args.split}")
    names = [case.aliases[0] if args.submission and case.aliases else case.name for case in cases]
    paths = [output / f"{name}.nii.gz" for name in names]
    predict_files(cases, paths, task, description, predict_one, args.workers, plans[0])
    if args.submission:
        files.write_whole(output / "submission.zip", lambda file: zip_files(file, paths))
        print(f"{output / 'submission.zip'}: {len(paths)} files")
    facts = {"checkpoint": args.ckpt, "epoch": [content["epoch"] for content in contents]}
    return report(cases, paths, source, args, facts | {"prompts": args.prompts} | options, suffix)


def differences(args: argparse.Namespace, contents: Sequence[dict], source: layouts.DataSource) -> str:
    """Return the middle of the name of a folder for predictions: all that is not as in the training."""
    together = hashlib.sha256("\n".join(map(os.path.abspath, args.ckpt)).encode()).hexdigest()[:8]
    parts = {
        f"-{source.name}": source.name != contents[0]["plan"]["data"],
        f"-fold{args.fold}": args.fold != contents[0]["arguments"].get("fold"),
        f"-{len(args.ckpt)}models-{together}": len(args.ckpt) > 1,
    }
    return "".join(part for part, applies in parts.items() if applies)


def check_models(args, models: Sequence[MaskSAM], tasks: Sequence, source: layouts.DataSource | None) -> None:
    """Raise ValueError unless the models take `--prompts`, and agree with the data set in their task."""
    for path, model in zip(args.ckpt, models):
        if model.config.given_boxes != (args.prompts != "auto"):
            expected = "gt or a folder" if model.config.given_boxes else "auto"
            raise ValueError(f"--prompts: found {args.prompts}, expected {expected}, as {path} was trained")
    expected = tasks[0].labels, len(tasks[0].channels)
    for path, task in [*zip(args.ckpt, tasks), *([(source.root, source.task)] if source else [])]:
        if (found := (task.labels, len(task.channels))) != expected:
            raise ValueError(f"{path}: found task {found}, expected {expected} as in {args.ckpt[0]}")


def class_ids(names: Sequence[str] | None, labels: Sequence[str]) -> list[int]:
    """Return the ids of class names: all but background for an empty list, none for None."""
    if wrong := [name for name in names or () if name not in labels[1:]]:
        raise ValueError(f"--largest-component: found {' '.join(wrong)}, expected of {', '.join(labels[1:])}")
    return [] if names is None else [labels.index(name) for name in names or labels[1:]]


def zip_files(archive, paths: Sequence[Path]) -> None:
    """Write files, without their folders, into a zip archive, an open binary file."""
    with zipfile.ZipFile(archive, "w") as content:
        for path in paths:
            content.write(path, path.name)


def score_predictions(args: argparse.Namespace) -> dict:
    """Score the label maps of another program, and return their `report`."""
    source, cases = find_cases(args, [])
    paths = layouts.find_predictions(cases, args.predictions)
    # The headers of our own files say whose boxes were given, as `describe_box_source` puts it.
    given = re.findall(r", boxes of (\S+)", "\n".join(map(nifti.read_description, paths)))
    facts = {"predictions": args.predictions} | ({"prompts": given[0]} if given else {})
    results = report(cases, paths, source, args, facts, f"-boxes-{given[0]}" if given else "")
    if results is None:
        raise ValueError(f"--split {args.split}: found no labels in {source.root}, expected some")
    return results


def main(argv: list[str] | None = None) -> dict | None:
    """Predict or score as the command line says, and return the results."""
    args = parse_arguments(argv)
    with files.one_sentence("evaluate.py", args.debug):
        return score_predictions(args) if args.predictions else predict(args)


if __name__ == "__main__":
    main()
