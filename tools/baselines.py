"""Segment with a plain member of the SAM family and given boxes (paper 3, "bbox" rows of tables 1-3).

The boxes come from the true labels (gt) or from label maps of another program (DIR), and each mask gets the
class of its box. So the results are not automatic; names, headers and tables say so. A slice without an
object has no box and stays empty, but is scored. A point gives the best of three masks, a box one mask. Where
that mask is not stable, SAM 2 takes the best of three, because its official builder turns this rule on.

    python -m tools.baselines sam --prompts gt --data acdc --root DIR
    python -m tools.baselines medsam --sam-checkpoint FILE --prompts DIR --data amos --root DIR
    python -m tools.baselines sam2_large --sam-checkpoint FILE --prompts gt --prompt-kind point --data acdc

    volume (C, D, H, W)   ── grey_levels ──> 0..255 ── resampled ── image encoder, once per slice ──┐
    box source (D, H, W)  ── box_prompts ──> one box per class ── prompt encoder ── mask decoder ──> label map
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

import data
import evaluate
from matcher import masks_to_boxes
from model import MaskSAMConfig, build_model
from support import files, layouts, nifti
from support.sam import BACKBONES, PIXEL_MEAN, PIXEL_STD, file_sha256, modeling


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A member of the SAM family, and how it wants its pictures."""

    sam: str  # key of `BACKBONES` or of `HIERA`
    side: int  # pixels of the encoder's square input
    home: str = ""  # where to get the weights, if they are not the backbone's own
    stretch: bool = False  # each slice is scaled to [0, 1] by its extremes, not by SAM's statistics
    square: str = ""  # how each slice fills the square; without it the slice keeps its shape, padded


MEDSAM_HOME = "medsam_vit_b.pth of https://zenodo.org/records/10689643 (see github.com/bowang-lab/MedSAM)"
SAM2_HOME = "sam2_hiera_*.pt or sam2.1_hiera_*.pt of this size, of github.com/facebookresearch/sam2"
# Arguments of `build_sam2`. Source: configs/sam2/*.yaml there; the sizes of SAM 2.1 are the same.
HIERA = {
    "sam2_tiny": (96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), (7, 7)),
    "sam2_base_plus": (112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), (14, 14)),
    "sam2_large": (144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), (7, 7)),
}
# Sources: segment_anything/predictor.py and utils/transforms.py for SAM; github.com/bowang-lab/MedSAM for the
# others: MedSAM_Inference.py, and CVPR24_LiteMedSAM_infer.py on the branch LiteMedSAM.
BASELINES = {
    "sam": Baseline("vit_b", 1024),
    "medsam": Baseline("vit_b", 1024, MEDSAM_HOME, stretch=True, square="bicubic"),
    "mobile_sam": Baseline("mobile_sam", 1024),
    "lite_medsam": Baseline("lite_medsam", 256, stretch=True),
} | {name: Baseline(name, 1024, SAM2_HOME, square="bilinear") for name in HIERA}


def build_sam2(width: int, heads: int, stages, global_blocks, windows, window_positions) -> modeling.Sam:
    """Put the modules of SAM 2's package that segment single pictures behind the interface of SAM.

    Masks and scores equal those of its `SAM2ImagePredictor`. The arguments are the sizes of its `Hiera`.
    """
    if (spec := importlib.util.find_spec("sam2")) is None:
        raise ValueError("found no package sam2, expected it: pip install --no-deps rf-sam-2")
    # The package's own __init__ would start hydra, and iopath would read a file that we do not have.
    sys.modules.setdefault("sam2", importlib.util.module_from_spec(spec))
    sys.modules.setdefault("iopath.common.file_io", argparse.Namespace(g_pathmgr=None))
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.sam2_base import SAM2Base

    sizes = {"stages": stages, "global_att_blocks": global_blocks, "window_spec": windows}
    hiera = Hiera(width, heads, window_pos_embed_bkg_spatial_size=window_positions, **sizes)
    widths = [width * n for n in (8, 4, 2, 1)]
    neck = FpnNeck(nn.Identity(), 256, widths, fpn_interp_model="nearest", fpn_top_down_levels=[2, 3])
    flags = "use_high_res_features_in_sam iou_prediction_use_sigmoid pred_obj_scores pred_obj_scores_mlp"
    flags = dict.fromkeys(flags.split(), True) | {"image_size": 1024, "num_maskmem": 0}
    flags["sam_mask_decoder_extra_args"] = {"dynamic_multimask_via_stability": True}
    held = SAM2Base(ImageEncoder(hiera, neck, scalp=1), None, None, **flags)
    del held.maskmem_tpos_enc, held.no_mem_pos_enc  # They serve videos.

    def encode(image: Tensor) -> list[Tensor]:
        *fine, coarse = held.forward_image(image)["backbone_fpn"]  # strides 4, 8 and 16
        return [*fine, coarse + held.no_mem_embed.view(1, -1, 1, 1)]  # A picture has no earlier frame.

    def encode_prompts(points, boxes, masks) -> tuple[Tensor, Tensor]:
        if boxes is not None:  # The predictor gives the corners of a box as two points.
            points = boxes.unflatten(1, (2, 2)), boxes.new_tensor([[2, 3]]).expand(len(boxes), -1)
        return held.sam_prompt_encoder(points, None, masks)

    def decode(features, positions, sparse, dense, several: bool) -> tuple[Tensor, Tensor]:
        *fine, coarse = features
        return held.sam_mask_decoder(coarse, positions, sparse, dense, several, len(sparse) > 1, fine)[:2]

    encode.img_size, encode_prompts.get_dense_pe = 1024, held.sam_prompt_encoder.get_dense_pe
    sam = modeling.Sam(encode, encode_prompts, decode, PIXEL_MEAN, PIXEL_STD)
    sam.postprocess_masks = lambda logits, _, shape: F.interpolate(logits, shape, mode="bilinear")
    sam.held = held
    return sam


def load_baseline(name: str, path: str | Path | None = None) -> tuple[nn.Module, str | None]:
    """Build a baseline with its weights; return it in evaluation mode, and the sha256 of its file."""
    baseline = BASELINES[name]
    if baseline.home and path is None:
        raise FileNotFoundError(f"{name} needs --sam-checkpoint FILE: {baseline.home}")
    if name in HIERA:  # the file holds more, for video
        sam = build_sam2(*HIERA[name])
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model"]
            sam.held.load_state_dict({key: state[key] for key in sam.held.state_dict()})
        except Exception as error:  # a wrong file fails in unpickling, in look-up or in shapes
            raise ValueError(f"{path} does not hold {name} ({str(error)[:300]}): {SAM2_HOME}") from error
        return sam.eval(), file_sha256(path)
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


def point_prompts(labels: Tensor, class_ids: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a point x, y in each class of a slice (H, W), (n, 1, 2), and the label 1 of an object, (n, 1).

    It is the middle of the pixel that lies farthest from the edge of its class and of the slice, in pixels of
    the encoder's picture of `size` (h, w). SAM adds half a pixel.
    """
    inside = [ndimage.distance_transform_edt(F.pad(labels == i, (1, 1, 1, 1)))[1:-1, 1:-1] for i in class_ids]
    pixels = [np.unravel_index(depth.argmax(), depth.shape) for depth in inside]  # row, column
    points = (torch.tensor(pixels) + 0.5) * torch.tensor(size) / torch.tensor(labels.shape) - 0.5
    return points.flip(1)[:, None], torch.ones(len(points), 1)


@torch.no_grad()
def predict_case(sam, baseline: Baseline, pictures: np.ndarray, box_labels, amp="off", kind="box"):
    """Make the label map of a case from grey levels 0..255 and labels for boxes, all (D, H, W).

    The steps are those of `Sam.forward`, slice by slice. The prompt encoder stays in float32, because its
    position code is off by a pixel in half precision. Ours: where masks overlap, the one of the smaller box
    lies on top, or of points the smaller one. MedSAM's scripts let the later class replace the earlier one.
    The largest logit would be wrong: in the box of a ring these models find the inside, and are sure of it
    (docs/results.md). Ours: a point gives the best of three masks, as SAM's predictor advises.
    """
    device, label = sam.pixel_mean.device, np.zeros(box_labels.shape, np.uint8)
    sides, mode = (1, 1) if baseline.square else label.shape[1:], baseline.square or "bilinear"
    size = [int(n * (baseline.side / max(sides)) + 0.5) for n in sides]  # (h, w) of the encoder's picture
    for d in np.flatnonzero(box_labels.any((1, 2))):
        image = torch.from_numpy(pictures[d].copy())[None, None].float()
        image = F.interpolate(image, size, mode=mode, antialias=True)
        image = image if baseline.sam in HIERA else image.round().clamp(0, 255)  # SAM 2 does not round.
        if baseline.stretch:
            low, high = image.aminmax()
            image = (image - low) * (255 / (high - low).clamp(min=1e-8))
        image = image.expand(-1, 3, -1, -1)  # `Sam.preprocess` scales and pads it
        labels = torch.from_numpy(box_labels[d].copy())
        class_ids, boxes = box_prompts(labels, size)
        points = None if kind == "box" else [x.to(device) for x in point_prompts(labels, class_ids, size)]
        boxes = None if points else boxes.to(device)
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        positions = sam.prompt_encoder.get_dense_pe()
        with files.autocast(device, amp):
            features = sam.image_encoder(sam.preprocess(image.to(device)))  # (1, width, h', w')
            logits, scores = sam.mask_decoder(features, positions, sparse, dense, boxes is None)
        logits = sam.postprocess_masks(logits.float(), size, label.shape[1:])  # (n, 1, H, W), or 3 of a point
        masks = (logits[range(len(logits)), scores.argmax(1)] > sam.mask_threshold).cpu()  # (n, H, W)
        areas = masks.sum((1, 2)) if boxes is None else (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1).cpu()
        small_first = areas.argsort(stable=True)
        class_ids, masks = class_ids[small_first], masks[small_first]
        label[d] = torch.where(masks.any(dim=0), class_ids[masks.to(torch.uint8).argmax(dim=0)], 0).numpy()
    return label


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. `evaluate.py --predictions` scores the files in other ways."""
    parser = files.make_parser(__doc__, "root fold group split sam-checkpoint device workers amp")
    parser.set_defaults(ckpt=None, tolerance=1.0, convention="masksam")
    add = parser.add_argument
    add("name", choices=BASELINES)
    add("--data", required=True, help=files.COMMON_OPTIONS["data"]["help"])
    add("--prompts", required=True, metavar="gt|DIR", help="boxes of the true labels (gt) or label maps")
    add("--prompt-kind", choices=("box", "point"), default="box", help="prompt of an object (default: box)")
    add("--output", help="folder (default: runs/<data>/predictions-<name>-boxes-<prompts>-<split>)")
    args = parser.parse_args(argv)
    args.device, args.workers = args.device or files.default_device(), args.workers or files.default_workers()
    args.amp = args.amp or files.default_amp(args.device)
    if args.prompts == "auto":
        parser.error("--prompts: found auto, expected gt or DIR, because these models make no boxes")
    return args


def run(args: argparse.Namespace) -> dict | None:
    """Predict all cases that are not done yet, and score them if there are labels."""
    source, cases = evaluate.find_cases(args, [])
    cases = layouts.with_box_source(cases, args.prompts)
    sam, sha256 = load_baseline(args.name, args.sam_checkpoint)
    sam.to(args.device)
    facts = {"baseline": args.name, "sam_sha256": sha256}
    settings = [facts, source.task.modality, str(files.AMP_TYPES[args.amp])]
    kind = {"box": "boxes", "point": "points"}[args.prompt_kind]
    made_by = args.name + evaluate.describe_box_source(args.prompts).replace("boxes", kind, 1)

    def description(case: layouts.Case) -> str:
        return f"{made_by} {data.file_key(settings, (*case.images, case.box_source))}"

    def predict(case: layouts.Case) -> tuple[np.ndarray, nifti.Geometry]:
        images, (geometry, *_) = zip(*map(nifti.read_image, case.images))
        levels = list(map(grey_levels, np.concatenate(images), source.task.modality))
        pictures = np.mean(levels, axis=0, dtype=np.float32)  # Ours: all channels become one picture
        box_labels, _ = nifti.read_label(case.box_source, len(source.task.labels), geometry)
        how = args.amp, args.prompt_kind
        return predict_case(sam, BASELINES[args.name], pictures, box_labels, *how), geometry

    suffix = layouts.box_source_suffix(args.prompts).replace("boxes", kind, 1)
    folder = args.output or Path("runs", source.name, f"predictions-{args.name}{suffix}-{args.split}")
    paths = [Path(folder, f"{case.name}.nii.gz") for case in cases]
    evaluate.predict_files(cases, paths, source.task, description, predict, args.workers)
    facts = facts | {"prompts": args.prompts, "prompt_kind": kind, "amp": args.amp}
    return evaluate.report(cases, paths, source, args, facts, suffix)


def main(argv: list[str] | None = None) -> dict | None:
    """Predict and score. Return the results."""
    args = parse_arguments(argv)
    with files.one_sentence("baselines.py", args.debug):
        return run(args)


if __name__ == "__main__":
    main()
