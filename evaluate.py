"""Evaluate a checkpoint on whole cases, or predict unlabelled ones (paper 3, tables 1-3).

    python evaluate.py --ckpt runs/acdc-vit_b/best.pt                  validation cases: NIfTI, Dice, metrics.json, .csv
    python evaluate.py --ckpt FILE --split test                        another split of the training data
    python evaluate.py --ckpt FILE --data acdc --root DIR              the same data somewhere else
    python evaluate.py --ckpt FILE --input DIR --output DIR            unlabelled files; no label is ever opened

    case ── prepare_case ──> (C, D, H, W) ── sliding windows ──> semantic map (K, D, H, W) ── to_native ──> label map

The model is rebuilt from the checkpoint alone, and SAM's own file where SAM is frozen. Predictions go to
predictions-<split> beside the checkpoint unless `--output` says otherwise.

Letters: C channels, D H W a whole volume, d h w a patch, K classes with background. Dice is a fraction.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from model import MaskSAM, load_checkpoint

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}

# ------------------------------------------------------------------------------------------------------- sliding window


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spread, the first and the last flush with the ends."""
    steps = -(-(length - window) // max(1, int(window * (1 - overlap))))  # rounded up
    return [round(i * (length - window) / max(steps, 1)) for i in range(steps + 1)]


def gaussian_weights(size: Sequence[int]) -> Tensor:
    """Weights of a window's voxels: a Gaussian of sigma 1/8 of the window, at most 1 (nnU-Net's).

    Ours: at least 1e-3, so that the far corners of a volume, which only one window sees, keep their digits.
    """
    weights = torch.ones(())
    for n in size:
        distance = torch.arange(n) - (n - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (distance / (n / 8)) ** 2)
    return (weights / weights.max()).clamp(min=1e-3)


@torch.no_grad()
def sliding_window_inference(
    predict: Callable[[Tensor], Tensor], volume: Tensor, patch_size: Sequence[int], num_classes: int,
    overlap: float = 0.5, batch_size: int = 1, device: str | torch.device = "cpu",
) -> Tensor:  # fmt: skip
    """Average the semantic maps of overlapping windows with Gaussian weights.

    Args:
        predict: (B, C, d, h, w) on `device` -> (B, K, d, h, w). volume: (C, D, H, W) of any size; where it is smaller
            than a window it is padded with each channel's minimum. patch_size: (d, h, w). num_classes: K.
        overlap: share of a window that the next one covers again, in [0, 1). batch_size: windows in one call.
    Returns:
        (K, D, H, W) float32 on the CPU.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected a share from 0 up to but not including 1")
    shape = volume.shape[1:]
    spare = [max(p - n, 0) for p, n in zip(patch_size, shape)]
    before = [s // 2 for s in spare]
    if any(spare):
        sides = [side for s, b in zip(reversed(spare), reversed(before)) for side in (b, s - b)]
        floor = volume.amin((1, 2, 3), keepdim=True)
        volume = F.pad(volume - floor, sides) + floor
    weights = gaussian_weights(patch_size)
    total = torch.zeros(num_classes, *volume.shape[1:])
    weight_sum = torch.zeros(volume.shape[1:])
    starts = [window_starts(n, p, overlap) for n, p in zip(volume.shape[1:], patch_size)]
    windows = [tuple(slice(s, s + p) for s, p in zip(low, patch_size)) for low in itertools.product(*starts)]
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        maps = predict(torch.stack([volume[:, *window] for window in batch]).to(device)).float().cpu()
        for window, semantic in zip(batch, maps):
            total[:, *window] += semantic * weights
            weight_sum[window] += weights
    inside = tuple(slice(b, b + n) for b, n in zip(before, shape))
    return (total / weight_sum)[:, *inside]


# ----------------------------------------------------------------------------------------------------------- prediction


def default_amp(device: str | torch.device) -> str:
    """The autocast type that serves a device: bf16 where it multiplies it in hardware, else fp16 on a GPU, or off."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "off"


def predict_case(
    model: MaskSAM, prepared: data.Prepared, device: str | torch.device = "cpu", amp: str = "off",
    overlap: float = 0.5, batch_size: int = 1, mirror_axes: Sequence[int] = (),
) -> np.ndarray:  # fmt: skip
    """The label map (D, H, W) uint8 of a prepared case on the grid of its own file.

    Args:
        model: in evaluation mode, on `device`. prepared: of `prepare_case` or `load_cached`. amp: key of `AMP_TYPES`.
        overlap, batch_size: of `sliding_window_inference`. mirror_axes: of (D, H, W); the semantic maps of all
            combinations of flips along them are averaged. Those of a plan keep the labels right.
    """
    axes = [axis - 3 for axis in mirror_axes]
    flips = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]

    def predict(volumes: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, AMP_TYPES[amp], enabled=amp != "off"):
            return sum(model.predict(volumes.flip(flip)).flip(flip) for flip in flips) / len(flips)

    volume = torch.from_numpy(np.array(prepared.image))
    size, num_classes = model.config.patch_size, model.config.num_classes
    semantic = sliding_window_inference(predict, volume, size, num_classes, overlap, batch_size, device)
    return data.to_native(semantic, prepared.geometry)


# -------------------------------------------------------------------------------------------------------------- metrics


def dice_per_class(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Dice of the classes 1 ... K-1 of two label maps of one shape.

    Returns:
        (K-1,) float64: NaN for a class that is in neither map, 0 for one that is in one of them only.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, the truth {truth.shape}: expected one shape")
    # Counts of every (truth, prediction) pair: the confusion matrix, in one pass over the voxels.
    pairs = truth.astype(np.int64) * num_classes + prediction
    confusion = np.bincount(pairs.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)
    sizes = (confusion.sum(0) + confusion.sum(1)).astype(np.float64)
    return 2 * confusion.diagonal()[1:] / np.where(sizes > 0, sizes, np.nan)[1:]


def score_case(model: MaskSAM, case: data.Case, prepared: data.Prepared, **options) -> np.ndarray:
    """Predict a case and compare with its own label file: `dice_per_class` on the native grid.

    Args:
        options: of `predict_case`.
    """
    num_classes = model.config.num_classes
    truth, _ = data.read_label(case, num_classes)
    return dice_per_class(predict_case(model, prepared, **options), truth, num_classes)


def summarize(scores: dict[str, np.ndarray], labels: Sequence[str]) -> dict:
    """Results of all cases: the mean over cases of each class, then the mean over classes.

    Args:
        scores: case -> `dice_per_class`. labels: names by id, with background.
    Returns:
        mean_dice, per_class {label: dice}, per_case {case: {label: dice}}; None where a class was never seen.
    """

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    per_case = {
        name: {label: None if np.isnan(value) else float(value) for label, value in zip(labels[1:], values)}
        for name, values in scores.items()
    }
    per_class = {label: mean([values[label] for values in per_case.values()]) for label in labels[1:]}
    return {"mean_dice": mean(list(per_class.values())), "per_class": per_class, "per_case": per_case}


def print_table(results: dict) -> None:
    """Dice by class, with the range over cases."""
    width = max(len(label) for label in [*results["per_class"], "class"])
    print(f"{'class':{width}s}   Dice    worst   best   cases")
    for label, dice in results["per_class"].items():
        values = [scores[label] for scores in results["per_case"].values() if scores[label] is not None]
        if values:
            print(f"{label:{width}s}  {dice:.4f}  {min(values):.4f}  {max(values):.4f}  {len(values):4d}")
        else:
            print(f"{label:{width}s}    in no case")
    mean = results["mean_dice"]
    print(f"{'mean':{width}s}  " + ("unknown: no class in any case" if mean is None else f"{mean:.4f}"))


def write_metrics(folder: Path, results: dict) -> None:
    """metrics.json, all of `results`; metrics.csv, one row a case and the means below. Absent classes are empty."""
    data.write_whole(folder / "metrics.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", *results["per_class"]])
    rows = results["per_case"] | {"mean": results["per_class"]}
    writer.writerows([name, *scores.values()] for name, scores in rows.items())
    data.write_whole(folder / "metrics.csv", lambda file: file.write(table.getvalue().encode()))


# --------------------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None stands for what the checkpoint says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint that train.py wrote")
    add("--sam-checkpoint", help="SAM's own weights, if not in the cache")
    add("--data", help="preset or folder (default: what it was trained on)")
    add("--root", help="where a preset's files lie (default: as in training)")
    add("--split", default="val", help="cases to score: val, test, ... or all (default: %(default)s)")
    add("--input", help="folder of unlabelled NIfTI files to predict, instead of a split")
    add("--output", help="folder for the predictions (default: predictions-<split> beside the checkpoint)")
    add("--overlap", type=float, default=0.5, help="of neighbouring windows (default: %(default)s)")
    add("--batch", type=int, default=1, dest="batch_size", help="windows in one call (default: %(default)s)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="average flips that keep labels right")
    add("--amp", choices=AMP_TYPES, help="autocast type (default: bf16 where the device has it, else fp16 or off)")
    add("--device", help="default: cuda if there is one")
    args = parser.parse_args(argv)
    if args.input and not args.output:
        parser.error("--input needs --output, the folder for the predictions")
    if args.input and Path(args.input).resolve() == Path(args.output).resolve():
        parser.error(f"--input and --output are both {args.input}: predictions would replace the images")
    if args.batch_size < 1:
        parser.error(f"--batch is {args.batch_size}, expected 1 or more")
    return args


def find_cases(args: argparse.Namespace, plan: data.Plan, trained_with: dict) -> tuple[data.Case, ...]:
    """The cases to predict: of `--input`, or of a split of the data that the model fits.

    Args:
        plan: of the checkpoint. trained_with: train.py's arguments, from the checkpoint.
    """
    if args.input:
        return data.find_images(args.input, len(plan.channels))
    root = args.root if args.data or args.root else trained_with["root"]
    source = data.find_data(args.data or trained_with["data"], root, trained_with["seed"])
    if (source.labels, len(source.channels)) != (plan.labels, len(plan.channels)):
        raise ValueError(
            f"{args.ckpt}: the model knows {plan.labels} from {len(plan.channels)} channels, "
            f"{source.root} has {source.labels} from {len(source.channels)}"
        )
    splits = source.splits | {"all": tuple(case for split in source.splits.values() for case in split)}
    if args.split not in splits:
        raise ValueError(f"--split {args.split}: {source.root} has {', '.join(splits)}")
    return splits[args.split]


def main(argv: list[str] | None = None) -> dict | None:
    """Predict, write, and where there are labels, score. Returns the results."""
    args = parse_arguments(argv)
    try:
        return evaluate(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error


def evaluate(args: argparse.Namespace) -> dict | None:
    """What `main` does with the arguments; all files are checked before anything is written."""
    model, content = load_checkpoint(args.ckpt, args.sam_checkpoint)
    plan = data.Plan.from_dict(content["plan"])
    cases = find_cases(args, plan, content["arguments"])
    problems = []
    for case in tqdm(cases, "checking", leave=False):
        problems += data.check_case(case, len(plan.labels))
    if problems:
        raise ValueError(f"{len(problems)} problems, nothing was predicted:\n" + "\n".join(problems))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    amp = args.amp or default_amp(device)
    mirror_axes = plan.flip_axes if args.mirror else ()
    model.to(device)
    output = Path(args.output or Path(args.ckpt).parent / f"predictions-{args.split}")
    output.mkdir(parents=True, exist_ok=True)
    scores = {}
    for case in tqdm(cases, "predicting"):
        prepared = data.prepare_case(dataclasses.replace(case, label=None), plan)
        prediction = predict_case(model, prepared, device, amp, args.overlap, args.batch_size, mirror_axes)
        data.write_label_map(output / f"{case.name}.nii.gz", prediction, prepared.geometry)
        if case.label is not None:
            truth, _ = data.read_label(case, len(plan.labels))
            scores[case.name] = dice_per_class(prediction, truth, len(plan.labels))
    print(f"wrote {len(cases)} label maps to {output}")
    if not scores:
        return None
    results = summarize(scores, plan.labels)
    results |= {"checkpoint": args.ckpt, "epoch": content["epoch"], "data": plan.data, "split": args.split, "amp": amp}
    results |= {"overlap": args.overlap, "mirror_axes": list(mirror_axes)}
    print_table(results)
    write_metrics(output, results)
    return results


if __name__ == "__main__":
    main()
