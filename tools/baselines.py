"""Segment with a plain member of the SAM family and given boxes (paper 3, "bbox" rows of tables 1-3).

The boxes come from the true labels (gt) or from label maps of another program (DIR), and each mask gets the
class of its box. So the results are not automatic; names, headers and tables say so. A slice without an
object has no box and stays empty, but is scored. SAM's multi-mask output is off.

    python -m tools.baselines sam --prompts gt --data acdc --root DIR
    python -m tools.baselines medsam --sam-checkpoint FILE --prompts DIR --data amos --root DIR

    volume (C, D, H, W)   ── grey_levels ──> 0..255 ── resampled ── image encoder, once per slice ──┐
    box source (D, H, W)  ── box_prompts ──> one box per class ── prompt encoder ── mask decoder ──> label map
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
from matcher import masks_to_boxes
from model import MaskSAMConfig, build_model
from support import files, layouts, nifti
from support.sam import BACKBONES


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A member of the SAM family, and how it wants its pictures."""

    sam: str  # key of `BACKBONES`
    side: int  # pixels of the encoder's square input
    home: str = ""  # where to get the weights, if they are not the backbone's own
    stretch: bool = False  # each slice is scaled to [0, 1] by its extremes, not by SAM's statistics
    square: bool = False  # each slice fills the square (bicubic); else it keeps its shape (bilinear), padded


MEDSAM_HOME = "medsam_vit_b.pth of https://zenodo.org/records/10689643 (see github.com/bowang-lab/MedSAM)"
# Sources: segment_anything/predictor.py and utils/transforms.py for SAM; github.com/bowang-lab/MedSAM for the
# others: MedSAM_Inference.py, and CVPR24_LiteMedSAM_infer.py on the branch LiteMedSAM.
BASELINES = {
    "sam": Baseline("vit_b", 1024),
    "medsam": Baseline("vit_b", 1024, MEDSAM_HOME, stretch=True, square=True),
    "mobile_sam": Baseline("mobile_sam", 1024),
    "lite_medsam": Baseline("lite_medsam", 256, stretch=True),
}


def load_baseline(name: str, path: str | Path | None = None) -> tuple[nn.Module, str | None]:
    """Build a baseline with its weights; return it in evaluation mode, and the sha256 of its file."""
    baseline = BASELINES[name]
    if baseline.home and path is None:
        raise FileNotFoundError(f"{name} needs --sam-checkpoint FILE: {baseline.home}")
    model, record = build_model(MaskSAMConfig(baseline.sam, encoder_size=(baseline.side,) * 2), path)
    if baseline.home and record["sha256"] == BACKBONES[baseline.sam].sha256:
        raise ValueError(f"{path}: found SAM's own weights, expected those of {name}: {baseline.home}")
    if baseline.stretch:
        model.sam.pixel_mean.fill_(0)
        model.sam.pixel_std.fill_(255)
    return model.sam.eval(), record["sha256"]


def grey_levels(volume: np.ndarray, modality: str) -> np.ndarray:
    """Turn a volume (D, H, W) into 8-bit pictures as MedSAM's comparison does (infer_SAM_3D_npz.py)."""
    low, high = -160, 240  # of CT in HU: level 40, width 400; this and the percentiles are of pre_CT_MR.py
    if modality != "CT":
        above = volume[volume > 0]
        low, high = np.percentile(above if above.size else volume, (0.5, 99.5))
    grey = volume.clip(low, high)
    grey = grey - grey.min()
    return (grey * (255 / max(grey.max(), 1e-8))).astype(np.uint8)


def box_prompts(labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the class ids (n,) in a slice (H, W), ascending, and a box for each, the papers' "1 bbox".

    Boxes (n, 4) are x0, y0, x1, y1 in pixels of the encoder's picture of `size` (h, w). SAM adds half a pixel
    to corners, which it takes for centres of pixels. So its box runs from the first to the last pixel of the
    object, while the far edge of `masks_to_boxes` is exclusive.
    """
    class_ids, limit = torch.unique(labels[labels > 0]), torch.tensor([size[1], size[0]] * 2)
    near, far = (masks_to_boxes(labels == class_ids[:, None, None]) * limit).split(2, dim=-1)
    return class_ids, torch.cat([near, (far - 1).maximum(near)], dim=-1)


@torch.no_grad()
def predict_case(sam, baseline: Baseline, pictures: np.ndarray, box_labels: np.ndarray, amp="off"):
    """Make the label map of a case from grey levels 0..255 and labels for boxes, all (D, H, W).

    The steps are those of `Sam.forward`, slice by slice. The prompt encoder stays in float32, because its
    position code is off by a pixel in half precision. Ours: where masks overlap, the one of the smaller box
    lies on top. MedSAM's scripts let the later class replace the earlier one. The largest logit would be
    wrong: in the box of a ring these models find the inside, and are sure of it (docs/results.md).
    """
    device, label = sam.pixel_mean.device, np.zeros(box_labels.shape, np.uint8)
    sides, mode = ((1, 1), "bicubic") if baseline.square else (label.shape[1:], "bilinear")
    size = [int(n * (baseline.side / max(sides)) + 0.5) for n in sides]  # (h, w) of the encoder's picture
    for d in np.flatnonzero(box_labels.any((1, 2))):
        image = torch.from_numpy(pictures[d].copy())[None, None].float()
        image = F.interpolate(image, size, mode=mode, antialias=True).round().clamp(0, 255)
        if baseline.stretch:
            low, high = image.aminmax()
            image = (image - low) * (255 / (high - low).clamp(min=1e-8))
        image = image.expand(-1, 3, -1, -1)  # `Sam.preprocess` scales and pads it
        class_ids, boxes = box_prompts(torch.from_numpy(box_labels[d].copy()), size)
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes.to(device), masks=None)
        positions = sam.prompt_encoder.get_dense_pe()
        with files.autocast(device, amp):
            features = sam.image_encoder(sam.preprocess(image.to(device)))  # (1, width, h', w')
            logits, _ = sam.mask_decoder(features, positions, sparse, dense, multimask_output=False)
        logits = sam.postprocess_masks(logits.float(), size, label.shape[1:])  # (n, 1, H, W)
        small_first = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1).argsort(stable=True)
        class_ids, masks = class_ids[small_first], (logits[:, 0].cpu() > sam.mask_threshold)[small_first]
        label[d] = torch.where(masks.any(dim=0), class_ids[masks.to(torch.uint8).argmax(dim=0)], 0).numpy()
    return label


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. `evaluate.py --predictions` scores the files in other ways."""
    parser = files.make_parser(__doc__, *"root fold group sam-checkpoint device workers".split())
    parser.set_defaults(ckpt=None, tolerance=1.0, convention="masksam")
    add = parser.add_argument
    add("name", choices=BASELINES)
    add("--data", required=True, help=files.COMMON_OPTIONS["data"]["help"])
    add("--prompts", required=True, metavar="gt|DIR", help="boxes of the true labels (gt) or label maps")
    add("--split", default="val", help="split of the data set, or all (default: %(default)s)")
    add("--output", help="folder (default: runs/<data>/predictions-<name>-boxes-<prompts>-<split>)")
    add("--amp", choices=files.AMP_TYPES, help="autocast type (default: the one that the hardware has)")
    args = parser.parse_args(argv)
    args.device, args.workers = args.device or files.default_device(), args.workers or files.default_workers()
    args.amp = args.amp or files.default_amp(args.device)
    if args.prompts == "auto":
        parser.error("--prompts: found auto, expected gt or DIR, because these models make no boxes")
    if args.output and Path(args.output).resolve() == Path(args.prompts).resolve():
        parser.error("--prompts: found the folder of --output, expected another: its files would be replaced")
    return args


def run(args: argparse.Namespace) -> dict | None:
    """Predict all cases that are not done yet, and score them if there are labels."""
    source, cases = evaluate.find_cases(args, [])
    cases = layouts.with_box_source(cases, args.prompts)
    sam, sha256 = load_baseline(args.name, args.sam_checkpoint)
    sam.to(args.device)
    facts = {"baseline": args.name, "sam_sha256": sha256}
    settings = [facts, source.task.modality, str(files.AMP_TYPES[args.amp])]
    made_by = f"{args.name}{evaluate.describe_box_source(args.prompts)}"

    def description(case: layouts.Case) -> str:
        return f"{made_by} {data.file_key(settings, (*case.images, case.box_source))}"

    def predict(case: layouts.Case) -> tuple[np.ndarray, nifti.Geometry]:
        images, (geometry, *_) = zip(*map(nifti.read_image, case.images))
        levels = list(map(grey_levels, np.concatenate(images), source.task.modality))
        pictures = np.mean(levels, axis=0, dtype=np.float32)  # Ours: all channels become one picture
        box_labels, _ = nifti.read_label(case.box_source, len(source.task.labels), geometry)
        return predict_case(sam, BASELINES[args.name], pictures, box_labels, args.amp), geometry

    suffix = layouts.box_source_suffix(args.prompts)
    folder = args.output or Path("runs", source.name, f"predictions-{args.name}{suffix}-{args.split}")
    paths = [Path(folder, f"{case.name}.nii.gz") for case in cases]
    unlabelled = [dataclasses.replace(case, label=None) for case in cases]  # no truth is read before scoring
    evaluate.predict_files(unlabelled, paths, source.task, description, predict, args.workers)
    facts = facts | {"prompts": args.prompts, "amp": args.amp}
    return evaluate.report(cases, paths, source, args, facts, suffix)


def main(argv: list[str] | None = None) -> dict | None:
    """Predict and score. Return the results."""
    args = parse_arguments(argv)
    with files.one_sentence("baselines.py", args.debug):
        return run(args)


if __name__ == "__main__":
    main()
