"""Segment with a plain member of the SAM family and given boxes (paper 3, "bbox" rows of tables 1-3).

The boxes come from the true labels (gt) or from label maps of another program (DIR), and each mask gets the
class of its box. So the results are not automatic; names, headers and tables say so. A slice without an
object has no box and stays empty. It is scored like all others. SAM's multi-mask output is off.

    python -m tools.baselines sam --prompts gt --data acdc --root DIR
    python -m tools.baselines medsam --sam-checkpoint FILE --prompts DIR --data amos --root DIR

    volume (C, D, H, W)   ── grey_levels ──> 0..255 ── encoder_input ── image encoder, once per slice ──┐
    box source (D, H, W)  ── box_prompts ──> one box per class and slice ── prompt encoder ── mask decoder
                          on a pixel of several masks the one of the smallest box counts ──> label map
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import dataclasses
from collections.abc import Sequence
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
    square: bool = False  # each slice fills the square, whatever its shape; else zeros pad its shorter side
    interpolation: str = "bilinear"  # of the resampling to the encoder's size


MEDSAM_HOME = "medsam_vit_b.pth of https://zenodo.org/records/10689643 (see github.com/bowang-lab/MedSAM)"
# Sources: segment_anything/predictor.py and utils/transforms.py for SAM; github.com/bowang-lab/MedSAM for the
# others: MedSAM_Inference.py, and CVPR24_LiteMedSAM_infer.py on the branch LiteMedSAM.
BASELINES = {
    "sam": Baseline("vit_b", 1024),
    "medsam": Baseline("vit_b", 1024, MEDSAM_HOME, stretch=True, square=True, interpolation="bicubic"),
    "mobile_sam": Baseline("mobile_sam", 1024),
    "lite_medsam": Baseline("lite_medsam", 256, stretch=True),
}
CT_WINDOW = (-160.0, 240.0)  # level 40, width 400 in HU: MedSAM's pre_CT_MR.py
MR_PERCENTILES = (0.5, 99.5)  # of the voxels above 0: the same file


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
    """Turn a volume (D, H, W) into 8-bit pictures, by a window of HU for "CT", else by its percentiles.

    SAM defines nothing for volumes; MedSAM's comparison (comparisons/SAM/infer_SAM_3D_npz.py) gives it these.
    """
    low, high = CT_WINDOW
    if modality != "CT":
        above = volume[volume > 0]
        low, high = np.percentile(above if above.size else volume, MR_PERCENTILES)
    clipped = volume.clip(low, high)
    low, high = clipped.min(), clipped.max()
    return ((clipped - low) * (255 / max(high - low, 1e-8))).astype(np.uint8)


def encoder_input(picture: Tensor, baseline: Baseline) -> Tensor:
    """Resample a slice (H, W) of grey levels 0..255 to the encoder's size; return (1, 3, h, w), 0..255."""
    sides, grey = (1, 1) if baseline.square else picture.shape, picture[None, None].float()
    size = [int(n * (baseline.side / max(sides)) + 0.5) for n in sides]
    grey = F.interpolate(grey, size, mode=baseline.interpolation, antialias=True).round().clamp(0, 255)
    if baseline.stretch:
        low, high = grey.aminmax()
        grey = (grey - low) * (255 / (high - low).clamp(min=1e-8))
    return grey.expand(-1, 3, -1, -1)  # `Sam.preprocess` will scale and pad it


def box_prompts(labels: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Make one box for every class in a slice, the papers' "1 bbox".

    SAM adds half a pixel to box corners, which it takes for centres of pixels. So its box runs from the
    first to the last pixel of the object, while the far edge of `masks_to_boxes` is exclusive.

    Args:
        labels: (H, W) class ids of the box source. size: (h, w) of the encoder's picture.
    Returns: class ids (n,), ascending; boxes (n, 4), x0, y0, x1, y1 in pixels of the encoder's picture.
    """
    class_ids, limit = torch.unique(labels[labels > 0]), torch.tensor([size[1], size[0]] * 2)
    near, far = (masks_to_boxes(labels == class_ids[:, None, None]) * limit).split(2, dim=-1)
    return class_ids, torch.cat([near, (far - 1).maximum(near)], dim=-1)


@torch.no_grad()
def segment_slice(sam: nn.Module, image: Tensor, boxes: Tensor, shape: Sequence[int], amp: str) -> Tensor:
    """Do what `Sam.forward` does for one slice of a shape (H, W) and n boxes, but keep the logits (n, H, W).

    The prompt encoder stays in float32, because its position code is off by a pixel in half precision.
    """
    device = sam.pixel_mean.device
    with files.autocast(device, amp):
        features = sam.image_encoder(sam.preprocess(image.to(device)))  # (1, width, h', w')
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes.to(device), masks=None)
    positions = sam.prompt_encoder.get_dense_pe()
    with files.autocast(device, amp):  # (n, 1, h, w)
        logits, _ = sam.mask_decoder(features, positions, sparse, dense, multimask_output=False)
    return sam.postprocess_masks(logits.float(), image.shape[-2:], tuple(shape))[:, 0].cpu()


def predict_case(
    sam: nn.Module, baseline: Baseline, pictures: np.ndarray, box_labels: np.ndarray, amp="off"
) -> np.ndarray:
    """Make the label map (D, H, W) of a case from grey levels 0..255 and labels for boxes, both (D, H, W).

    Ours: where masks overlap, the mask of the smaller box lies on top. In MedSAM's scripts the later class
    replaces the earlier one, which depends on the order of the classes. The largest logit would be wrong: in
    the box of a ring these models find the inside of the ring, and are sure of it (docs/results.md).
    """
    label = np.zeros(box_labels.shape, np.uint8)
    for d in np.flatnonzero(box_labels.any((1, 2))):
        image = encoder_input(torch.from_numpy(pictures[d].copy()), baseline)
        class_ids, boxes = box_prompts(torch.from_numpy(box_labels[d].copy()), image.shape[-2:])
        masks = segment_slice(sam, image, boxes, label.shape[1:], amp) > sam.mask_threshold  # (n, H, W)
        small_first = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1).argsort(stable=True)
        class_ids, masks = class_ids[small_first], masks[small_first]
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
    sam, num_classes = sam.to(args.device), len(source.task.labels)
    made_with, suffix = {"baseline": args.name, "sam_sha256": sha256}, layouts.box_source_suffix(args.prompts)

    def description(case: layouts.Case) -> str:
        settings = [made_with, source.task.modality, str(files.AMP_TYPES[args.amp])]
        key = data.file_key(settings, (*case.images, case.box_source))
        return f"{args.name}{evaluate.describe_box_source(args.prompts)} {key}"

    def predict(case: layouts.Case) -> tuple[np.ndarray, nifti.Geometry]:
        images, (geometry, *_) = zip(*map(nifti.read_image, case.images))
        levels = list(map(grey_levels, np.concatenate(images), source.task.modality))
        pictures = np.mean(levels, axis=0, dtype=np.float32)  # Ours: all channels become one picture
        box_labels, _ = nifti.read_label(case.box_source, num_classes, geometry)
        return predict_case(sam, BASELINES[args.name], pictures, box_labels, args.amp), geometry

    folder = Path("runs") / source.name / f"predictions-{args.name}{suffix}-{args.split}"
    paths = [Path(args.output or folder) / f"{case.name}.nii.gz" for case in cases]
    unlabelled = [dataclasses.replace(case, label=None) for case in cases]  # no truth is read before scoring
    evaluate.predict_files(unlabelled, paths, source.task, description, predict, args.workers)
    facts = made_with | {"prompts": args.prompts, "amp": args.amp}
    return evaluate.report(cases, paths, source, args, facts, suffix)


def main(argv: list[str] | None = None) -> dict | None:
    """Predict and score. Return the results."""
    args = parse_arguments(argv)
    with files.one_sentence("baselines.py", args.debug):
        return run(args)


if __name__ == "__main__":
    main()
