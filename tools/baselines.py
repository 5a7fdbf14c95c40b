"""Members of the SAM family with given boxes, slice by slice and class by class (paper 3, "bbox" rows of tables 1-3).

    volume (C, D, H, W) ── grey_levels ──> 0..255 ── encoder_input ── image encoder, once a slice ─────┐
    prompts (D, H, W)   ── box_prompts ──> a box for every class in a slice ── prompt encoder ── mask decoder
                                  masks (n, H, W): on a pixel of several that of the smallest box counts ──┘

The boxes are those of the truth or of another program's label map, and the mask of a box gets its class: results with
such prompts are not automatic, and everything that is written says so. A slice without an object has no prompt and
stays empty; it is scored like all others. Multi-mask output is off.

Letters: C channels, D slices, H W pixels of a slice, h w those of the encoder's picture, n classes in a slice.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from matcher import masks_to_boxes
from model import MaskSAMConfig, build_model
from support import nifti
from support.layouts import Case
from support.sam import BACKBONES

# -------------------------------------------------------------------------------------------------------- the baselines


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One `--baseline` name.

    sam: key of `BACKBONES`. side: pixels of the encoder's square picture. home: where to get the file if it is not the
    backbone's own. stretch: every slice from its minimum to its maximum becomes [0, 1]; else SAM's mean and deviation.
    square: the slice fills the square whatever its shape; else its longest side does, and zeros the rest.
    interpolation: of the slice to that size.
    """

    sam: str
    side: int
    home: str = ""
    stretch: bool = False
    square: bool = False
    interpolation: str = "bilinear"


# What happens to a picture is in segment_anything/predictor.py and utils/transforms.py for SAM, and for the others in
# github.com/bowang-lab/MedSAM: MedSAM_Inference.py, and on the branch LiteMedSAM CVPR24_LiteMedSAM_infer.py.
BASELINES = {
    "sam": Baseline("vit_b", 1024),
    "medsam": Baseline(
        "vit_b", 1024, "medsam_vit_b.pth from the Google Drive that github.com/bowang-lab/MedSAM links to, or from "
        "https://zenodo.org/records/10689643", stretch=True, square=True, interpolation="bicubic",
    ),
    "mobile_sam": Baseline("mobile_sam", 1024),
    "lite_medsam": Baseline("lite_medsam", 256, stretch=True),
}  # fmt: skip


def load_baseline(name: str, path: str | Path | None = None) -> tuple[nn.Module, str | None]:
    """SAM with a baseline's weights, in evaluation mode on the CPU, and the sha256 of their file.

    Args:
        name: key of `BASELINES`. path: the user's own file, or None for the published one, where a script can get it.
    Raises:
        FileNotFoundError: there is no file. ValueError: a file of something else.
    """
    baseline = BASELINES[name]
    if baseline.home and path is None:
        raise FileNotFoundError(f"--baseline {name} needs --sam-checkpoint FILE: {baseline.home}")
    model, facts = build_model(MaskSAMConfig(baseline.sam, encoder_size=(baseline.side, baseline.side)), path)
    sam = model.sam.eval()
    if baseline.home and facts["sha256"] == BACKBONES[baseline.sam].sha256:
        raise ValueError(f"{path} holds SAM's own weights, expected those of {name}: {baseline.home}")
    if baseline.stretch:
        sam.pixel_mean.fill_(0)
        sam.pixel_std.fill_(255)
    return sam, facts["sha256"]


# --------------------------------------------------------------------------------------------------- pictures and boxes

CT_WINDOW = (-160.0, 240.0)  # level 40, width 400: MedSAM's pre_CT_MR.py
MR_PERCENTILES = (0.5, 99.5)  # of the voxels above 0: the same file


def grey_levels(volume: np.ndarray, modality: str) -> np.ndarray:
    """The 8-bit pictures of a volume (D, H, W): a window of CT, else percentiles of the whole volume.

    SAM says nothing of volumes; MedSAM's comparison (comparisons/SAM/infer_SAM_3D_npz.py) gives it the same pictures.

    Args:
        modality: "CT" or anything else.
    Returns:
        (D, H, W) uint8.
    """
    if modality == "CT":
        low, high = CT_WINDOW
    else:
        above = volume[volume > 0]
        low, high = np.percentile(above if above.size else volume, MR_PERCENTILES)
    clipped = volume.clip(low, high)
    low, high = clipped.min(), clipped.max()
    return ((clipped - low) * (255 / max(high - low, 1e-8))).astype(np.uint8)


def encoder_input(picture: Tensor, baseline: Baseline) -> Tensor:
    """A slice at the encoder's size, before `Sam.preprocess` scales and pads it.

    Args:
        picture: (H, W), grey levels 0..255.
    Returns:
        (1, 3, h, w) float32, 0..255; h and w at most `baseline.side`.
    """
    scale = baseline.side / max(picture.shape)
    size = (baseline.side,) * 2 if baseline.square else tuple(int(n * scale + 0.5) for n in picture.shape)
    grey = picture[None, None].float()
    grey = F.interpolate(grey, size=size, mode=baseline.interpolation, align_corners=False, antialias=True)
    grey = grey.round().clamp(0, 255)
    if baseline.stretch:
        low, high = grey.aminmax()
        grey = (grey - low) * (255 / (high - low).clamp(min=1e-8))
    return grey.expand(-1, 3, -1, -1)


def box_prompts(prompts: Tensor, size: Sequence[int], margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """One box for every class in a slice, as the papers' "1 bbox" (a box per connected component would tell more).

    SAM adds half a pixel and so takes a pixel for its centre: its box runs from the first to the last pixel of the
    object in the encoder's picture, where ours has an exclusive far edge.

    Args:
        prompts: (H, W), class ids. size: (h, w) of the encoder's picture. margin: pixels of that picture added on all
            sides, as far as the picture goes.
    Returns:
        class ids (n,), ascending, and boxes (n, 4) float32, x0, y0, x1, y1 in pixels of the encoder's picture.
    """
    class_ids = torch.unique(prompts[prompts > 0])
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    edges = masks_to_boxes(prompts == class_ids[:, None, None]) * limit.repeat(2)
    near, far = (edges + margin * torch.tensor([-1, -1, 1, 1])).split(2, dim=-1)
    near, far = near.clamp(min=0), far.minimum(limit)
    return class_ids, torch.cat([near, (far - 1).maximum(near)], dim=-1)


# ----------------------------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def segment_slice(
    sam: nn.Module, image: Tensor, boxes: Tensor, shape: Sequence[int], amp: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """`Sam.forward` for one slice and all its boxes, but with the logits kept.

    Args:
        image: of `encoder_input`. boxes: of `box_prompts`. shape: (H, W). amp: autocast type of encoder and decoder;
            the prompt encoder's position code would be off by a pixel in half precision.
    Returns:
        (n, H, W) float32 mask logits.
    """
    device = sam.pixel_mean.device
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    with autocast:
        features = sam.image_encoder(sam.preprocess(image.to(device)))
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes.to(device), masks=None)
    with autocast:
        logits, _ = sam.mask_decoder(
            image_embeddings=features, image_pe=sam.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense, multimask_output=False,
        )  # fmt: skip
    return sam.postprocess_masks(logits.float(), image.shape[-2:], tuple(shape))[:, 0].cpu()


def predict_case(
    sam: nn.Module, baseline: Baseline, pictures: np.ndarray, prompts: np.ndarray, margin: float = 0.0,
    amp: torch.dtype | None = None, desc: str | None = None,
) -> np.ndarray:  # fmt: skip
    """The label map of a case, one slice in memory at a time.

    Ours: where masks overlap that of the smaller box lies on top. MedSAM's scripts let the later class overwrite the
    earlier, nearly the same for ACDC (the LV lies in the myocardium's box) but by the luck of its numbers. The largest
    logit would not do: in the box of a ring these models find what it encloses, and are as sure of it (MobileSAM on
    ACDC's validation cases, LV: Dice 0.71 instead of 0.91).

    Args:
        pictures: (D, H, W) grey levels 0..255. prompts: (D, H, W) class ids. margin: of `box_prompts`. amp: of
            `segment_slice`. desc: of a progress bar; None shows none.
    Returns:
        (D, H, W) uint8.
    """
    label = np.zeros(prompts.shape, np.uint8)
    for d in tqdm(np.flatnonzero(prompts.any((1, 2))), desc, leave=False, disable=desc is None):
        image = encoder_input(torch.from_numpy(pictures[d].copy()), baseline)
        class_ids, boxes = box_prompts(torch.from_numpy(prompts[d].copy()), image.shape[-2:], margin)
        masks = segment_slice(sam, image, boxes, prompts.shape[1:], amp) > sam.mask_threshold
        small_first = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1).argsort(stable=True)
        class_ids, masks = class_ids[small_first], masks[small_first]
        label[d] = torch.where(masks.any(dim=0), class_ids[masks.to(torch.uint8).argmax(dim=0)], 0).numpy()
    return label


def predict_files(
    name: str, cases: Sequence[Case], files: Sequence[Path], modality: str, num_classes: int, origin: str,
    sam_checkpoint: str | None = None, margin: float = 0.0, device: str = "cpu", amp: torch.dtype | None = None,
    workers: int = 1,
) -> dict:  # fmt: skip
    """Predict all cases that are not done yet; all files are checked before anything is written.

    Args:
        name: key of `BASELINES`. cases: with prompts, the label map for their boxes; their own labels are not opened.
            files: to write, in one folder. modality: of `grey_levels`. origin: of the boxes, for the files' headers.
            sam_checkpoint: of `load_baseline`. margin: of `box_prompts`. amp: of `segment_slice`. workers: threads to
            check with.
    Returns:
        Facts for the results.
    Raises:
        ValueError: listing all that is wrong with the files. And as `load_baseline`.
    """
    cases = [dataclasses.replace(case, label=None) for case in cases]
    sam, sha256 = load_baseline(name, sam_checkpoint)

    if problems := data.check_cases(cases, num_classes, workers):
        raise ValueError(f"{len(problems)} problems, nothing was predicted:\n" + "\n".join(problems))
    facts = {"baseline": name, "box_margin": margin, "sam_sha256": sha256}

    def description(case: Case) -> str:  # of what a label map depends on
        return f"{name}{origin} {data.file_key([facts, modality, str(amp)], (*case.images, case.prompts))}"

    sam.to(device)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    todo = [each for each in zip(cases, files) if nifti.read_description(each[1]) != description(each[0])]
    for case, file in tqdm(todo, "predicting"):
        channels, geometries = zip(*map(nifti.read_image, case.images))
        # Ours: of several channels the mean of their pictures.
        pictures = np.mean([grey_levels(channel, modality) for channel in channels], axis=0, dtype=np.float32)
        boxes_from, _ = nifti.read_label(case.prompts, num_classes)
        label = predict_case(sam, BASELINES[name], pictures, boxes_from, margin, amp, case.name)
        nifti.write_label_map(file, label, geometries[0], description(case))
    print(f"{files[0].parent}: wrote {len(todo)} label maps, {len(files) - len(todo)} were there")
    return facts
