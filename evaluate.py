"""Predict whole cases with one or several checkpoints, and score label maps of any origin (paper 3, tables 1-3).

    python evaluate.py --ckpt runs/acdc-vit_b/best.pt                  validation cases: NIfTI, metrics.json and .csv
    python evaluate.py --ckpt FILE --split test                        another split of the training data
    python evaluate.py --ckpt A B C --split test                       the mean of several checkpoints
    python evaluate.py --ckpt FILE --input DIR --output DIR            unlabelled files; no label is ever opened
    python evaluate.py --ckpt FILE --split testing --submission        hidden labels: files and a zip for the challenge
    python evaluate.py --predictions DIR --data acdc --split test      score another program's files by the same rules
    python evaluate.py --ckpt FILE --prompts gt|DIR                    of a model trained with given boxes
    python evaluate.py --baseline sam --prompts gt --data acdc         plain SAM, MedSAM, ... with boxes from the truth
    python evaluate.py --compare runs/*                                one table of training runs, from their logs

    case ── prepare_case ──> (C, D, H, W) ── sliding windows ──> slabs (K, d, H, W) ── resample_scores ──> label map

The model is rebuilt from the checkpoint alone, and SAM's own file where SAM is frozen. Predictions go to
predictions-<split> beside the checkpoint unless `--output` says otherwise; what is there already, made by the same
checkpoint, options and images, is not made again.

Letters: C channels, D H W a whole volume, d h w a patch, K classes with background.
"""

import argparse
import dataclasses
import hashlib
import itertools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

import data
from model import MaskSAM, load_checkpoint
from support import layouts, metrics, nifti
from support.files import AMP_TYPES, default_amp, default_device, default_workers, write_whole
from support.presets import PRESETS
from tools import baselines, compare

# ------------------------------------------------------------------------------------------------------- sliding window


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spread, the first and the last flush with the ends."""
    steps = -(-(length - window) // max(1, int(window * (1 - overlap))))  # rounded up
    return [round(i * (length - window) / max(steps, 1)) for i in range(steps + 1)]


def window_weights(size: Sequence[int], kind: str = "gaussian") -> Tensor:
    """Weights of a window's voxels: "constant", or a "gaussian" of sigma 1/8 of the window, at most 1 (nnU-Net's).

    Ours: at least 1e-3, so that the far corners of a volume, which only one window sees, keep their digits.
    """
    if kind == "constant":
        return torch.ones(tuple(size))
    weights = torch.ones(())
    for n in size:
        distance = torch.arange(n) - (n - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (distance / (n / 8)) ** 2)
    return (weights / weights.max()).clamp(min=1e-3)


def sliding_window_inference(
    predict: Callable[[Tensor], Tensor], volume: Tensor, patch_size: Sequence[int], overlap: float = 0.5,
    batch_size: int = 1, weights: str = "gaussian", device: str | torch.device = "cpu", desc: str | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Average the semantic maps of overlapping windows, and give away slices as soon as no window will add to them.

    Args:
        predict: (B, C, d, h, w) on `device` -> (B, K, d, h, w). volume: (C, D, H, W) of any size; where it is smaller
            than a window it is padded with each channel's minimum. patch_size: (d, h, w).
        overlap: share of a window that the next one covers again, in [0, 1). batch_size: windows in one call.
        weights: of `window_weights`. desc: of a progress bar; None shows none.
    Yields:
        (K, n, H, W) float32 on the CPU: slabs in order, together D slices; no more than a window's depth and a batch
        are held.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected a share from 0 up to but not including 1")
    depth, *plane = volume.shape[1:]
    spare = [max(p - n, 0) for p, n in zip(patch_size, volume.shape[1:])]
    before = [s // 2 for s in spare]
    if any(spare):
        sides = [side for s, b in zip(reversed(spare), reversed(before)) for side in (b, s - b)]
        floor = volume.amin((1, 2, 3), keepdim=True)
        volume = F.pad(volume - floor, sides) + floor
    inside = tuple(slice(b, b + n) for b, n in zip(before[1:], plane))
    shape, weight = volume.shape[1:], window_weights(patch_size, weights)
    starts = [window_starts(n, p, overlap) for n, p in zip(shape, patch_size)]
    corners = list(itertools.product(*starts))  # depth changes last: all windows of some slices follow each other
    total, weight_sum, done = None, torch.zeros(0, *shape[1:]), 0  # sums from slice `done` on
    for first in tqdm(range(0, len(corners), batch_size), desc, leave=False, disable=desc is None):
        batch = corners[first : first + batch_size]
        windows = [tuple(slice(s, s + p) for s, p in zip(corner, patch_size)) for corner in batch]
        maps = predict(torch.stack([volume[:, *window] for window in windows]).to(device)).float().cpu()
        total = maps.new_zeros(maps.shape[1], 0, *shape[1:]) if total is None else total
        new = windows[-1][0].stop - done - len(weight_sum)  # slices that no window has reached before
        if new > 0:
            total, weight_sum = F.pad(total, (0, 0, 0, 0, 0, new)), F.pad(weight_sum, (0, 0, 0, 0, 0, new))
        for (slices, *place), semantic in zip(windows, maps):
            place = (slice(slices.start - done, slices.stop - done), *place)
            total[:, *place] += semantic * weight
            weight_sum[place] += weight
        final = corners[first + batch_size][0] if first + batch_size < len(corners) else shape[0]
        if final > done:
            mean = total[:, : final - done] / weight_sum[: final - done]
            total, weight_sum = total[:, final - done :], weight_sum[final - done :]
            low = before[0] if spare[0] else 0  # then one window is the whole depth
            yield mean[:, low : low + depth, *inside]
            done = final


# ----------------------------------------------------------------------------------------------------------- prediction


def predict_scores(
    model: MaskSAM, prepared: data.Prepared, device: str | torch.device = "cpu", amp: str = "off",
    mirror_axes: Sequence[int] = (), **windows,
) -> Iterator[Tensor]:  # fmt: skip
    """The semantic map of a prepared case on the grid of its own file, some slices (K, n, H, W) at a time.

    Args:
        model: in evaluation mode, on `device`. prepared: of `prepare_case` or `load_cached`. amp: key of `AMP_TYPES`.
        mirror_axes: of (D, H, W); the semantic maps of all combinations of flips along them are averaged. Those of a
            plan keep the labels right. windows: of `sliding_window_inference`.
    """
    axes = [axis - 3 for axis in mirror_axes]
    flips = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]

    def predict(volumes: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(torch.device(device).type, AMP_TYPES[amp], enabled=amp != "off"):
            return sum(model.predict(volumes.flip(flip)).flip(flip) for flip in flips) / len(flips)

    volume = prepared.network_input()
    slabs = sliding_window_inference(predict, volume, model.config.patch_size, device=device, **windows)
    return data.resample_scores(slabs, volume.shape[1], prepared.geometry.shape)


def predict_case(
    models: Sequence[MaskSAM], prepared: Sequence[data.Prepared], largest: Sequence[int] = (), **options
) -> np.ndarray:
    """The label map (D, H, W) uint8 of a case on the grid of its own file.

    Args:
        models: whose semantic maps are averaged, on the file's grid: they may differ in patch and spacing.
        prepared: the case, as the plan of each model prepares it. largest: ids for `keep_largest_component`.
        options: of `predict_scores`.
    """
    streams = [predict_scores(model, case, **options) for model, case in zip(models, prepared)]
    label = np.concatenate([sum(parts).argmax(0).to(torch.uint8).numpy() for parts in zip(*streams)])
    return keep_largest_component(label, largest)


def keep_largest_component(label: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    """Make background of all but the largest connected component (with corners, as in nnU-Net) of each given class.

    Args:
        label: (D, H, W), changed in place.
    """
    boxes = ndimage.find_objects(label)
    for class_id in class_ids:
        if class_id <= len(boxes) and boxes[class_id - 1] is not None:
            part = label[boxes[class_id - 1]]
            components, _ = ndimage.label(part == class_id, np.ones((3, 3, 3)))
            sizes = np.bincount(components.ravel())
            part[(components > 0) & (components != 1 + sizes[1:].argmax())] = 0
    return label


def score_case(model: MaskSAM, case: layouts.Case, prepared: data.Prepared, **options) -> dict[str, np.ndarray]:
    """Predict a case and compare with its own label file, by Dice alone: what validation while training has time for.

    Args:
        options: of `predict_scores`.
    """
    num_classes = model.config.num_classes
    truth, _ = nifti.read_label(case.label, num_classes)
    return {"dice": metrics.dice_per_class(predict_case([model], [prepared], **options), truth, num_classes)}


# ------------------------------------------------------------------------------------------------ folders of label maps


def describe_prompts(prompts: str) -> str:
    """The part of a label map's description that says which boxes it was made with; `read_prompts` reads it again."""
    return layouts.prompts_name(prompts).replace("-boxes-", ", boxes of ", 1)[:45]  # of the 79 of a header


def read_prompts(files: Iterable[Path]) -> str | None:
    """Where the boxes of label maps that this program wrote are from; None where none of them had any."""
    found = {re.search(r", boxes of (\S+)", nifti.read_description(file)) for file in files}
    return next((match[1] for match in found if match), None)


def score_files(
    cases: Sequence[layouts.Case], files: Sequence[Path], source: layouts.DataSource, tolerance: float = 1.0,
    convention: str = "masksam", workers: int = 1,
) -> dict:  # fmt: skip
    """Read the label maps of cases and compare them with the truth, all files checked before the first is scored.

    Args:
        files: one for each case. source: for labels and the scored subset. tolerance: of NSD, in mm. convention: of
            `metrics.score_maps`. workers: threads.
    Returns:
        `metrics.summarize`.
    Raises:
        ValueError: listing every file with another shape, another place or other labels than the truth.
    """
    num_classes = len(source.labels)

    truths = [dataclasses.replace(case, images=()) for case in cases]
    problems = data.check_cases(truths, num_classes, workers, files)
    if problems:
        raise ValueError(f"{len(problems)} problems, nothing was scored:\n" + "\n".join(problems))
    scores = {}
    for case, file in zip(tqdm(cases, "scoring"), files):
        truth, geometry = nifti.read_label(case.label, num_classes)
        prediction, _ = nifti.read_label(str(file), num_classes)
        options = {"tolerance": tolerance, "convention": convention, "workers": workers}
        scores[case.name] = metrics.score_maps(prediction, truth, geometry.spacing, num_classes, **options)
    return metrics.summarize(scores, source.labels, source.scored)


# --------------------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None stands for what the checkpoint says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", nargs="+", help="checkpoint that train.py wrote; of several the semantic maps are averaged")
    add("--predictions", help="folder of another program's label maps to score, instead of --ckpt")
    add("--baseline", choices=baselines.BASELINES, help="a plain member of the SAM family, instead of --ckpt")
    add("--prompts", default="auto", metavar="auto|gt|DIR", help="boxes for --baseline, or for a model trained with "
        "given ones: of the truth, or of another program's label maps (default: %(default)s)")  # fmt: skip
    add("--compare", nargs="+", metavar="RUN", help="folders of train.py to compare in one table")
    add("--box-margin", type=float, metavar="PIXELS", help="added around boxes, in pixels of the encoder's picture "
        "(default: 0, tight; MedSAM's scripts add 20 of 1024, LiteMedSAM's 5 of 256)")  # fmt: skip
    add("--sam-checkpoint", help="SAM's own weights, if not in the cache")
    add("--data", help="preset or folder (default: what it was trained on)")
    add("--root", help="where a preset's files lie (default: as in training)")
    add("--split", default="val", help="cases: val, test, testing, ... or all (default: %(default)s)")
    add("--fold", type=int, help="0 to 4 of five (default: as in training)")
    add("--input", help="folder of unlabelled NIfTI files to predict, instead of a split")
    add("--output", help="folder for predictions and metrics (default: predictions-<split> beside the checkpoint; of "
        "--baseline runs/<data>/predictions-<baseline>-boxes-<prompts>-<split>)")  # fmt: skip
    add("--submission", action="store_true", help="name the files as the challenge does, and zip them")
    add("--overlap", type=float, default=0.5, help="of neighbouring windows (default: %(default)s)")
    add("--weights", choices=("gaussian", "constant"), default="gaussian", help="of a window's voxels")
    add("--batch", type=int, default=1, dest="batch_size", help="windows in one call (default: %(default)s)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="average flips that keep labels right")
    add("--largest-component", nargs="*", metavar="CLASS", dest="largest", help="keep only that (no name: of all)")
    add("--amp", choices=AMP_TYPES, help="autocast type (default: bf16 where the device has it, else fp16 or off)")
    add("--device", help="default: cuda if there is one")
    add("--tolerance", type=float, default=1.0, help="of NSD, in mm (default: %(default)s)")
    add("--metric-convention", choices=metrics.CONVENTIONS, default="masksam", dest="convention",
        help="how other papers score absent classes (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, help="threads to check and score with (default: all cores)")
    args = parser.parse_args(argv)
    if sum(source is not None for source in (args.ckpt, args.predictions, args.baseline, args.compare)) != 1:
        parser.error("expected either --ckpt FILE or --predictions DIR or --baseline NAME or --compare RUN ...")
    given = args.prompts != "auto"
    if args.baseline and not (args.data and given):
        parser.error("--baseline needs --data, and --prompts gt or DIR: where its boxes are from")
    if args.baseline and (args.input or args.submission or args.largest is not None):
        parser.error("--input, --submission and --largest-component belong to --ckpt")
    if given and args.output and Path(args.output).resolve() == Path(args.prompts).resolve():
        parser.error(f"--prompts and --output are both {args.output}: predictions would replace the prompts")
    if not args.baseline and args.box_margin is not None:
        parser.error("--box-margin belongs to --baseline")
    if given and (args.predictions or args.submission):
        parser.error("--predictions and --submission take no --prompts: those of a challenge are automatic")
    if args.box_margin is not None and not 0 <= args.box_margin < float("inf"):
        parser.error(f"--box-margin is {args.box_margin:g}, expected pixels, 0 or more")
    if args.predictions and not args.data:
        parser.error("--predictions needs --data, the data set that they belong to")
    if args.predictions and (args.input or args.submission):
        parser.error("--predictions are scored: --input and --submission belong to --ckpt")
    if args.input and not args.output:
        parser.error("--input needs --output, the folder for the predictions")
    if args.input and Path(args.input).resolve() == Path(args.output).resolve():
        parser.error(f"--input and --output are both {args.input}: predictions would replace the images")
    if args.batch_size < 1:
        parser.error(f"--batch is {args.batch_size}, expected 1 or more")
    if args.tolerance <= 0:
        parser.error(f"--tolerance is {args.tolerance}, expected millimetres above 0")
    args.workers = args.workers or default_workers()
    return args


def find_cases(
    args: argparse.Namespace, trained_with: Sequence[dict]
) -> tuple[layouts.DataSource, Sequence[layouts.Case]]:
    """The data set, and the cases of `--split`. `--fold` is filled in where the user left it open.

    Args:
        trained_with: train.py's arguments, from the checkpoints.
    """
    first = trained_with[0] if trained_with else {"root": None}
    args.fold = first.get("fold") if args.fold is None else args.fold
    root = args.root if args.data or args.root else first["root"]
    source = layouts.find_data(args.data or first["data"], root, args.fold)
    splits = source.splits | {"all": tuple(case for split in source.splits.values() for case in split)}
    if args.split not in splits:
        raise ValueError(f"--split {args.split}: {source.root} has {', '.join(splits)}")
    folds = {trained.get("fold") for trained in trained_with}
    if len(folds) > 1 and args.split in ("train", "val"):
        raise ValueError(f"--split {args.split}: the checkpoints are of folds {folds} and trained on each other's")
    return source, splits[args.split]


def main(argv: list[str] | None = None) -> dict | None:
    """Predict, write, and where there are labels, score. Returns the results."""
    args = parse_arguments(argv)
    try:
        if args.compare:
            return compare.compare_runs(args.compare)
        return evaluate(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error


def evaluate(args: argparse.Namespace) -> dict | None:
    """What `main` does with the arguments; all files are checked before anything is written."""
    suffix = layouts.prompts_name(args.prompts)
    if args.predictions:
        source, cases = find_cases(args, [])
        files, output = layouts.find_predictions(cases, args.predictions), Path(args.output or args.predictions)
        facts = {"predictions": args.predictions}
        if origin := read_prompts(files):
            facts["prompts"], suffix = origin, f"-boxes-{origin}"
    elif args.baseline:
        source, cases, files, facts = predict_baseline(args)
        output = files[0].parent
    else:
        source, cases, files, facts = predict(args)
        output = files[0].parent
    labelled = [(case, file) for case, file in zip(cases, files) if case.label is not None]
    if not labelled:
        if args.predictions:
            raise ValueError(f"--split {args.split}: {source.root} has no labels there to score against")
        return None
    results = score_files(*zip(*labelled), source, args.tolerance, args.convention, args.workers)
    name = source.name if source.name in PRESETS else source.root
    facts |= {"data": name, "root": source.root, "split": args.split, "fold": args.fold}
    results |= {"convention": args.convention, "tolerance_mm": args.tolerance, **facts}
    metrics.print_table(results)
    output.mkdir(parents=True, exist_ok=True)
    metrics.write_metrics(output, results, write_whole, suffix)
    return results


def predict(args: argparse.Namespace) -> tuple[layouts.DataSource | None, Sequence[layouts.Case], list[Path], dict]:
    """Predict all cases that are not done yet.

    Returns:
        The data set (None for `--input`), the cases, the label map of each, and facts for the results.
    """
    models, contents = zip(*(load_checkpoint(path, args.sam_checkpoint) for path in args.ckpt))
    plans = [data.Plan.from_dict(content["plan"]) for content in contents]
    plan, device = plans[0], args.device or default_device()
    source = None
    if args.input:
        cases = layouts.find_images(args.input, len(plan.channels))
    else:
        source, cases = find_cases(args, [content["arguments"] for content in contents])
    for path, model in zip(args.ckpt, models):
        if (model.config.prompts == "boxes") != (args.prompts != "auto"):
            expected = "--prompts gt or DIR" if model.config.prompts == "boxes" else "--prompts auto"
            raise ValueError(f"--prompts {args.prompts}: {path} was trained for {expected}")
    for path, other in zip((*args.ckpt, source and source.root), (*plans, source)):
        if other and (other.labels, len(other.channels)) != (plan.labels, len(plan.channels)):
            raise ValueError(
                f"{args.ckpt[0]}: the model knows {plan.labels} from {len(plan.channels)} channels, "
                f"{path} has {other.labels} from {len(other.channels)}"
            )
    amp = args.amp or default_amp(device)
    options = {"amp": amp, "overlap": args.overlap, "weights": args.weights}
    options["mirror_axes"] = list(plan.flip_axes) if args.mirror else []
    options["largest"] = class_ids(args.largest, plan.labels)
    made_by = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.ckpt]
    cases = layouts.give_prompts(cases, args.prompts)

    def description(case: layouts.Case) -> str:  # of what a label map depends on
        key = data.file_key([made_by, options], [*case.images, *filter(None, [case.prompts])])
        return f"MaskSAM{describe_prompts(args.prompts)} {key}"

    if problems := data.check_cases(cases, len(plan.labels), args.workers):
        raise ValueError(f"{len(problems)} problems, nothing was predicted:\n" + "\n".join(problems))
    for model in models:
        model.to(device)
    folder = f"predictions{layouts.prompts_name(args.prompts)}-{args.split}"
    output = Path(args.output or Path(args.ckpt[0]).parent / folder)
    output.mkdir(parents=True, exist_ok=True)
    names = [case.aliases[0] if args.submission and case.aliases else case.name for case in cases]
    files = [output / f"{name}.nii.gz" for name in names]
    todo = [pair for pair in zip(cases, files) if nifti.read_description(pair[1]) != description(pair[0])]
    for case, file in tqdm(todo, "predicting"):
        prepared = [data.prepare_case(dataclasses.replace(case, label=None), plan) for plan in plans]
        label = predict_case(models, prepared, device=device, batch_size=args.batch_size, desc=case.name, **options)
        nifti.write_label_map(file, label, prepared[0].geometry, description(case))
    print(f"{output}: wrote {len(todo)} label maps, {len(files) - len(todo)} were there")
    if args.submission:
        write_whole(output / "submission.zip", lambda file: zip_files(file, files))
        print(f"{output / 'submission.zip'}: {len(files)} files")
    facts = {"checkpoint": args.ckpt, "epoch": [content["epoch"] for content in contents], "prompts": args.prompts}
    return source, cases, files, facts | options


def predict_baseline(args: argparse.Namespace) -> tuple[layouts.DataSource, Sequence[layouts.Case], list[Path], dict]:
    """Predict all cases that are not done yet with a plain member of the SAM family and given boxes; as `predict`.

    The folder's name carries the source of the boxes, and the results do.
    """
    source, cases = find_cases(args, [])
    cases = layouts.give_prompts(cases, args.prompts)
    margin = f"-margin{args.box_margin:g}" if args.box_margin else ""
    folder = f"predictions-{args.baseline}{layouts.prompts_name(args.prompts)}{margin}-{args.split}"
    output = Path(args.output or Path("runs") / source.name / folder)
    files = [output / f"{case.name}.nii.gz" for case in cases]
    device = args.device or default_device()
    amp = args.amp or default_amp(device)
    facts = baselines.predict_files(
        args.baseline, cases, files, source.modality, len(source.labels), describe_prompts(args.prompts),
        args.sam_checkpoint, args.box_margin or 0.0, device, AMP_TYPES[amp], args.workers,
    )  # fmt: skip
    return source, cases, files, facts | {"prompts": args.prompts, "amp": amp}


def class_ids(names: Sequence[str] | None, labels: Sequence[str]) -> list[int]:
    """Ids of class names; of all but the background for an empty list, none for None."""
    wrong = [name for name in names or () if name not in labels[1:]]
    if wrong:
        raise ValueError(f"--largest-component {' '.join(wrong)}: expected of {', '.join(labels[1:])}")
    return [] if names is None else [labels.index(name) for name in names or labels[1:]]


def zip_files(archive, files: Sequence[Path]) -> None:
    """Write files, without their folders, into a zip archive (an open binary file)."""
    with zipfile.ZipFile(archive, "w") as content:
        for file in files:
            content.write(file, file.name)


if __name__ == "__main__":
    main()
