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
from typing import NamedTuple

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
from support.sam import store_frozen

Cases = Sequence[layouts.Case]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the first voxels of windows along one axis, evenly spread from one end to the other."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap of windows: found {overlap}, expected a share from 0 to below 1")
    steps = -(-(length - window) // max(1, int(window * (1 - overlap))))  # rounded up
    return [round(i * (length - window) / max(steps, 1)) for i in range(steps + 1)]


def window_weights(size: Sequence[int]) -> Tensor:
    """Return the Gaussian weights of a window's voxels, at most 1.

    Release: nnU-Net's sigma, 1/8 of the window. Ours: at least 1e-3. Only one window covers a corner of the
    volume, and the division by a smaller weight would lose digits there.
    """
    depth, height, width = (torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size)
    weights = depth[:, None, None] * height[:, None] * width
    return (weights / weights.max()).clamp(min=1e-3)


def sliding_window_inference(
    predict: Callable, volume: Tensor, patch_size: Sequence[int], overlap=0.5, batch_size=1, desc=None
) -> Iterator[Tensor]:
    """Average the semantic maps of overlapping windows, and yield slices as soon as they are complete.

    Args:
        predict: (B, C, d, h, w) -> (B, K, d, h, w). volume: (C, D, H, W), of any size.
        patch_size, batch_size: (d, h, w) of a window, and the number B of windows per call.
        overlap: share of a window that the next window covers too, in [0, 1). Release: 0.5.
        desc: title of a progress bar, or None.
    Yields: (K, n, H, W) float32 where `predict` makes its maps, D slices together.
    """
    spare = [max(p - n, 0) for p, n in zip(patch_size, volume.shape[1:])]
    inside = [slice(s // 2, s // 2 + n) for s, n in zip(spare, volume.shape[1:])]
    if any(spare):  # A volume that is smaller than a window is padded, each channel with its minimum.
        sides = [side for s in reversed(spare) for side in (s // 2, s - s // 2)]
        floor = volume.amin((1, 2, 3), keepdim=True)
        volume = F.pad(volume - floor, sides) + floor
    shape, weight = volume.shape[1:], window_weights(patch_size)
    starts = [window_starts(n, p, overlap) for n, p in zip(shape, patch_size)]
    corners = list(itertools.product(*starts))  # The depth changes last, so slices are completed in order.
    sums, done = None, 0  # (K + 1, n, H, W) from slice `done` on: the weighted maps, and last the weights
    for first in tqdm(range(0, len(corners), batch_size), desc, leave=False, disable=desc is None):
        batch = corners[first : first + batch_size]
        windows = [tuple(slice(s, s + p) for s, p in zip(corner, patch_size)) for corner in batch]
        maps = predict(torch.stack([volume[:, *window] for window in windows])).float()
        maps = F.pad(maps, (0, 0, 0, 0, 0, 0, 0, 1), value=1)  # a map of ones, whose sum is that of weights
        if sums is None:
            sums, weight = maps.new_zeros(maps.shape[1], 0, *shape[1:]), weight.to(maps.device)
        new = windows[-1][0].stop - done - sums.shape[1]  # slices that no window has reached before
        sums = F.pad(sums, (0, 0, 0, 0, 0, new)) if new > 0 else sums
        for (slices, *place), semantic in zip(windows, maps):
            sums[:, slices.start - done : slices.stop - done, *place] += semantic * weight
        final = corners[first + batch_size][0] if first + batch_size < len(corners) else shape[0]
        if final > done:  # No later window reaches the slices before `final`.
            mean = sums[:-1, : final - done] / sums[-1, : final - done]
            sums, done = sums[:, final - done :], final
            yield mean[:, *inside]  # A padded depth is a single window, so it comes as one part.


def predict_scores(
    models: Sequence[MaskSAM], prepared, device="cpu", amp="off", mirror_axes=(), **windows
) -> Iterator[Tensor]:
    """Predict the semantic map of a case in slabs, (K, n, H, W) float32, on the grid of its file.

    Args:
        models, device: in evaluation mode, and where they are. Their semantic maps are averaged.
        prepared: for each model, the case as `data.prepare_case` or `data.load_cached` made it by its plan.
        amp: key of `files.AMP_TYPES`. windows: options of `sliding_window_inference`.
        mirror_axes: axes of (D, H, W). Ours, as in nnU-Net: the maps of all flips along them are averaged.
    Raises: ValueError if a score is NaN.
    """
    axes = [axis - 3 for axis in mirror_axes]
    flips = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]

    def scores(model: MaskSAM, case: data.Prepared) -> Iterator[Tensor]:
        def predict(volumes: Tensor) -> Tensor:
            volumes = volumes.to(device)
            with torch.no_grad(), files.autocast(device, amp):
                return sum(model.predict(volumes.flip(flip)).flip(flip) for flip in flips) / len(flips)

        volume = case.network_input()  # (C, D, H, W)
        slabs = sliding_window_inference(predict, volume, model.config.patch_size, **windows)
        return data.resample_scores(slabs, volume.shape[1], case.geometry.shape)

    for slabs in zip(*map(scores, models, prepared)):
        mean = sum(slabs) / len(slabs) if len(slabs) > 1 else slabs[0]
        if not torch.isfinite(mean.amax(0).sum()):  # The maximum of numbers with a NaN is NaN.
            raise ValueError("found scores that are not numbers, expected an image and weights that are")
        yield mean


def predict_case(models: Sequence[MaskSAM], prepared, *where, largest=(), **options) -> np.ndarray:
    """Predict the label map of a case, (D, H, W) uint8: the class of the highest score in each voxel.

    The arguments are those of `predict_scores`, and `largest`, class ids for `keep_largest_component`.
    """
    slabs = predict_scores(models, prepared, *where, **options)
    label = torch.cat([scores.argmax(0).to(torch.uint8).cpu() for scores in slabs])
    return keep_largest_component(label.numpy(), largest)


def keep_largest_component(label: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    """Set all but the largest component of each given class in (D, H, W) to background, in place.

    Ours: an option, as in nnU-Net. Voxels that touch at a corner are connected.
    """
    for class_id, box in enumerate(ndimage.find_objects(label), start=1):
        if box is not None and class_id in class_ids:
            part = label[box]
            components, _ = ndimage.label(part == class_id, np.ones((3, 3, 3)))
            largest = np.bincount(components[components > 0]).argmax()
            part[(components > 0) & (components != largest)] = 0
    return label


def find_cases(args: argparse.Namespace, contents: Sequence[dict]) -> tuple[layouts.DataSource, Cases]:
    """Find the cases that `args` name. Defaults are those of the training, unless --data names another set.

    Raises: ValueError if one of the checkpoints (contents) was trained with a case that is to be scored.
    """
    trained = contents[0]["arguments"] if contents else {}
    trained = trained if not args.data or Path(args.data).name == Path(trained.get("data", "")).name else {}
    args.fold = trained.get("fold") if args.fold is None else args.fold
    root = args.root if args.data or args.root else trained["root"]
    group = args.group or trained.get("group")
    source = layouts.find_data(args.data or trained["data"], root, args.fold, group)
    splits = source.splits | {"all": source.cases}
    if args.split not in splits:
        raise ValueError(f"--split: found {args.split}, expected {', '.join(splits)} as in {source.root}")
    cases = splits[args.split]
    for path, content in zip(args.ckpt or (), contents):
        if seen := [case.name for case in cases if case.name in content["cases"]["train"]]:
            found = f"found {len(seen)} of {len(cases)} cases that it was trained with, such as {seen[0]}"
            if content["plan"]["data"] == source.name and args.split not in ("train", "all"):
                raise ValueError(f"{path}: {found}; expected the fold of its training, or --split all")
            print(f"remark: {path}: {found}")
    return source, cases


def predict_files(cases: Cases, paths: list[Path], task, description, predict, workers=1, plan=None) -> None:
    """Check all files (ValueError: some are wrong), then predict the cases that are not done yet.

    Args:
        cases, paths: the cases, and the file to write for each, all in one folder.
        task, workers: `Task` of the images, and the number of threads that check them.
        description: case -> text for the header of its file. A file with this text is done.
        predict: case -> label map (D, H, W) and the geometry of its image.
        plan: of the model; a remark names images unlike its training images. Without it no label is read.
    """
    read = {os.path.realpath(file) for c in cases for file in (*c.images, c.label, c.box_source) if file}
    if lost := [path for path in paths if os.path.realpath(path) in read]:
        raise files.refusal(lost[0], "a file that is read", "another --output: it would be replaced")
    checked = cases if plan else [dataclasses.replace(case, label=None) for case in cases]
    data.survey(checked, task, workers, plan=plan)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    todo = [pair for pair in zip(cases, paths) if nifti.read_description(pair[1]) != description(pair[0])]
    for case, path in tqdm(todo, "predicting"):
        nifti.write_label_map(path, *predict(case), description(case))
    print(f"{paths[0].parent}: wrote {len(todo)} label maps; {len(paths) - len(todo)} were done before")


def report(cases: Cases, paths: list[Path], source, args, made_with: dict, suffix="") -> dict | None:
    """Check and score the label maps (paths) of labelled cases; print a table; write metrics.json and .csv.

    Args:
        source: `DataSource` of the cases; None if they have no labels.
        args: with split, fold, tolerance, convention, workers and output (None: beside the label maps).
        made_with: how the label maps were made, stored with the results. suffix: of the files' names.
    Returns: `metrics.summarize`, the settings of the score and `made_with`; None if no case has a label.
    """
    labelled = {case: path for case, path in zip(cases, paths) if case.label is not None}
    if not labelled:
        return None
    output = Path(args.output or paths[0].parent)
    output.mkdir(parents=True, exist_ok=True)
    truths = [dataclasses.replace(case, images=(), box_source=None) for case in labelled]
    data.survey(truths, source.task, args.workers, list(labelled.values()))
    num_classes, scores = len(source.task.labels), {}
    for case, path in tqdm(labelled.items(), "scoring"):
        truth, geometry = nifti.read_label(case.label, num_classes)
        maps = nifti.read_label(str(path), num_classes, geometry)[0], truth
        how = args.tolerance, args.convention, args.workers
        scores[case.name] = metrics.score_maps(*maps, geometry.spacing, num_classes, *how)
    results = metrics.summarize(scores, source.task.labels, source.task.scored)
    results |= {"convention": args.convention, "tolerance_mm": args.tolerance, **made_with}
    results["data"] = source.name if source.name in PRESETS else source.root
    results |= {"root": source.root, "split": args.split, "fold": args.fold}
    metrics.print_table(results)
    metrics.write_metrics(output, results, suffix)
    return results


def describe_box_source(where: str) -> str:
    """Return ", boxes of FOLDER" for the header of a file, which has room for 79 bytes; "" without boxes."""
    text = layouts.box_source_suffix(where).replace("-boxes-", ", boxes of ", 1)
    return text.encode()[:45].decode(errors="ignore")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and refuse options that do not go together."""
    parser = files.make_parser(
        __doc__, "data root fold group split sam-checkpoint prompts device workers amp"
    )
    add = parser.add_argument
    ckpt = "checkpoint of train.py, whose data, root and fold are the defaults; several are averaged"
    add("--ckpt", nargs="+", metavar="FILE", help=ckpt)
    add("--predictions", metavar="DIR", help="label maps of another program to score, instead of --ckpt")
    add("--input", metavar="DIR|FILE", help="images without labels to predict, instead of a split")
    add("--output", metavar="DIR", help="folder to write (default: predictions-<split> by the checkpoint)")
    add("--submission", action="store_true", help="name the files as the challenge does, and zip them")
    add("--overlap", type=files.share, default=0.5, help="overlap of windows (default: %(default)s)")
    add("--batch", type=files.count, default=1, dest="batch_size", help="windows per call (default: 1)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="average mirrored predictions")
    largest = "keep only the largest component of these classes, or of all if none is named"
    add("--largest-component", nargs="*", metavar="CLASS", dest="largest", help=largest)
    add("--tolerance", type=files.number(float), default=1.0, help="tolerance of NSD (default: 1.0 mm)")
    how = "how other papers score absent classes (default: %(default)s)"
    add("--metric-convention", choices=metrics.ABSENT, default="masksam", dest="convention", help=how)
    args = parser.parse_args(argv)
    given, predicts = args.prompts != "auto", args.input or args.submission
    problems = {
        "expected either --ckpt FILE or --predictions DIR": (args.ckpt is None) == (args.predictions is None),
        "--predictions needs --data, the data set that they belong to": args.predictions and not args.data,
        "--input and --submission belong to --ckpt": args.predictions and predicts,
        "--largest-component belongs to --ckpt": args.predictions and args.largest is not None,
        "--predictions and --submission take no --prompts": given and (args.predictions or args.submission),
        "--input takes no --data and no --submission": args.input and (args.data or args.submission),
        "--input needs --output, the folder for the predictions": args.input and not args.output,
    }
    if found := [problem for problem, applies in problems.items() if applies]:
        parser.error(found[0])
    args.device, args.workers = args.device or files.default_device(), args.workers or files.default_workers()
    return args


class Prediction(NamedTuple):
    """label (D, H, W) uint8, its geometry, and the semantic map (K, D, H, W) float32 if it was asked for."""

    label: np.ndarray
    geometry: nifti.Geometry
    scores: np.ndarray | None


class Predictor:
    """Trained models, ready to predict images: `Predictor("best.pt")("image.nii.gz").label`.

    Args:
        paths: checkpoints of train.py. Several are averaged. sam_checkpoint: SAM's file, if SAM is frozen.
        device, amp: cpu or cuda, and a key of `files.AMP_TYPES` (default: what the hardware has).
        mirror: average mirrored predictions. largest: class names, as for `class_ids`.
        windows: options of `sliding_window_inference`.
    Raises: ValueError or OSError if a file cannot be read, or if the models have other classes or channels.
    """

    def __init__(
        self, *paths, sam_checkpoint=None, device=None, amp=None, mirror=True, largest=None, **windows
    ):
        models, self.contents = zip(*(load_checkpoint(path, sam_checkpoint) for path in paths))
        self.plans = [data.Plan.from_dict(content["plan"]) for content in self.contents]
        self.task, self.device = self.plans[0].task, device or files.default_device()
        check_tasks({path: plan.task for path, plan in zip(paths, self.plans)})
        self.settings = {"amp": amp or files.default_amp(self.device), "overlap": 0.5} | windows
        shared = set(self.task.flip_axes).intersection(*(plan.task.flip_axes for plan in self.plans))
        self.settings["mirror_axes"] = sorted(shared) if mirror else []
        self.settings["largest"] = class_ids(largest, self.task.labels)
        self.models = [model.to(self.device) for model in models]
        for model in self.models:
            store_frozen(model.sam, files.AMP_TYPES[self.settings["amp"]])

    def __call__(self, image, spacing=None, with_scores=False, desc=None) -> Prediction:
        """Predict an image. ValueError: it is not like the images of the training, or a score is NaN.

        Args:
            image: a file; a list of files, one per channel; a `Case`; or an array (D, H, W) or (C, D, H, W)
                with the axes that `nifti.read_image` gives it. Those of nibabel are others.
            spacing: of an array, (D, H, W) in mm.
            with_scores: also return the semantic map. desc: title of a progress bar, or None.
        """
        if isinstance(image, np.ndarray):
            if image.ndim not in (3, 4) or spacing is None or len(spacing) != 3:
                found = f"found an array of {image.shape} and the spacing {spacing}"
                raise ValueError(f"image: {found}, expected three axes, or four, and three lengths")
            channels, turn = image.reshape(-1, *image.shape[-3:]), np.array([[0, 1], [1, 1], [2, 1]])
            place = nifti.Geometry(np.diag([*spacing[::-1], 1.0]), channels.shape[1:], tuple(spacing), turn)
            made = (data.prepare_image(channels.astype(np.float32), place, plan) for plan in self.plans)
            prepared = [data.Prepared(array, None, place) for array in made]
        else:
            if not isinstance(image, layouts.Case):
                paths = [image] if isinstance(image, (str, Path)) else image
                image = layouts.Case("image", tuple(map(str, paths)), None)
            image = dataclasses.replace(image, label=None)
            prepared = [data.prepare_case(image, plan) for plan in self.plans]
        how = {"device": self.device, "desc": desc} | self.settings
        if not with_scores:
            return Prediction(predict_case(self.models, prepared, **how), prepared[0].geometry, None)
        largest = how.pop("largest")
        slabs = predict_scores(self.models, prepared, **how)
        scores = torch.cat([scores.cpu() for scores in slabs], dim=1).numpy()
        label = keep_largest_component(scores.argmax(0).astype(np.uint8), largest)
        return Prediction(label, prepared[0].geometry, scores)


def predict(args: argparse.Namespace) -> dict | None:
    """Predict cases with the models of `--ckpt`, and return their `report`."""
    names = "sam_checkpoint device amp mirror largest overlap batch_size".split()
    predictor = Predictor(*args.ckpt, **{name: getattr(args, name) for name in names})
    task, source, contents = predictor.task, None, predictor.contents
    if args.input:
        cases = layouts.find_images(args.input, len(task.channels))
    else:
        source, cases = find_cases(args, contents)
        check_tasks({args.ckpt[0]: task, source.root: source.task})
    for path, model in zip(args.ckpt, predictor.models):
        expected = "gt or a folder" if model.config.given_boxes else "auto"
        if (expected == "auto") != (args.prompts == "auto"):
            raise ValueError(f"--prompts: found {args.prompts}, expected {expected}, as {path} was trained")
    cases = layouts.with_box_source(cases, args.prompts)
    sums = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.ckpt]
    settings = {key: value for key, value in predictor.settings.items() if key != "batch_size"}

    def description(case: layouts.Case) -> str:
        key = data.file_key([sums, settings], (*case.images, case.box_source))
        return f"MaskSAM{describe_box_source(args.prompts)} {key}"

    def predict_one(case: layouts.Case) -> tuple[np.ndarray, nifti.Geometry]:
        try:
            return predictor(case, desc=case.name)[:2]
        except ValueError as error:
            raise ValueError(f"{', '.join(args.ckpt)}, case {case.name}: {error}") from error

    output = Path(args.output) if args.output else default_folder(args, contents, source)
    names = [case.aliases[0] if args.submission and case.aliases else case.name for case in cases]
    paths = [output / f"{name}.nii.gz" for name in names]
    from support import pictures  # takes seconds to import

    predict_files(cases, paths, task, description, predict_one, args.workers, predictor.plans[0])
    pictures.write_label_names(output, task.labels)
    if args.submission:
        zip_files(output / "submission.zip", paths)
    epochs = [content["epoch"] for content in contents]
    made_with = {"checkpoint": args.ckpt, "epoch": epochs, "prompts": args.prompts} | settings
    return report(cases, paths, source, args, made_with, layouts.box_source_suffix(args.prompts))


def zip_files(archive_file: Path, paths: Sequence[Path]) -> None:
    """Write files into a zip archive, whole or not at all."""

    def write(file) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for path in paths:
                archive.write(path, path.name)

    files.write_whole(archive_file, write)
    print(f"{archive_file}: {len(paths)} files")


def default_folder(args: argparse.Namespace, contents: Sequence[dict], source: layouts.DataSource) -> Path:
    """Return a folder beside the first checkpoint, whose name says all that is not as in the training."""
    name = f"predictions{layouts.box_source_suffix(args.prompts)}"
    name += f"-{source.name}" if source.name != contents[0]["plan"]["data"] else ""
    name += f"-fold{args.fold}" if args.fold not in (None, contents[0]["arguments"].get("fold")) else ""
    if len(args.ckpt) > 1:
        paths = "\n".join(map(os.path.abspath, args.ckpt))
        name += f"-{len(args.ckpt)}models-{hashlib.sha256(paths.encode()).hexdigest()[:8]}"
    return Path(args.ckpt[0]).parent / f"{name}-{args.split}"


def check_tasks(tasks: dict[str, Task]) -> None:
    """Raise ValueError unless the tasks, by file or folder, have the same classes and number of channels."""
    (first, expected), *others = ((path, (task.labels, len(task.channels))) for path, task in tasks.items())
    for path, found in others:
        if found != expected:
            raise ValueError(f"{path}: found task {found}, expected {expected} as in {first}")


def class_ids(names: Sequence[str] | None, labels: Sequence[str]) -> list[int]:
    """Return the ids of class names: all but background for an empty list, none for None."""
    if wrong := [name for name in names or () if name not in labels[1:]]:
        raise ValueError(f"--largest-component: found {' '.join(wrong)}, expected {' or '.join(labels[1:])}")
    return [] if names is None else [labels.index(name) for name in names or labels[1:]]


def score_predictions(args: argparse.Namespace) -> dict:
    """Score the label maps of another program, and return their `report`."""
    source, cases = find_cases(args, [])
    paths = layouts.find_predictions(cases, args.predictions)
    # The headers of our own files say whose boxes were given, as `describe_box_source` puts it.
    headers = "\n".join(map(nifti.read_description, paths))
    given = re.search(r", (?P<prompt_kind>boxes|points) of (?P<prompts>\S+)", headers)
    made_with = {"predictions": args.predictions} | (given.groupdict() if given else {})
    results = report(cases, paths, source, args, made_with, f"-{given[1]}-{given[2]}" if given else "")
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
