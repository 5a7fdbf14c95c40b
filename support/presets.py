"""One record per data set: its labels and flips, the sizes of the network, the schedule (paper 3).

    PRESETS["acdc"] ── recipe(preset, "tiny") ──> the preset with the sizes of a light image encoder
    a folder's Task and its cases' shapes ── folder_preset ──> a preset for any other data set

The paper gives the backbone (ViT-B), but no patch, no number of queries, no optimizer and no schedule.
The numbers are those of the authors' published code, except where a line is marked as our own.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# How a channel is normalised (data.py). MR is nnU-Net's z-score; the last three are nnU-Net's own names.
MODALITIES = ("CT", "MR", "noNorm", "rescale_to_0_1", "rgb_to_0_1")


@dataclasses.dataclass(frozen=True)
class Task:
    """The meaning of the files of a data set. It is stated once, and every checkpoint carries it.

    Args:
        labels, channels: names of the classes, where 0 is the background; names of the channels.
        modality: one of `MODALITIES` for each channel.
        flip_axes: axes of (D, H, W) for flips; None: the training labels decide. Ours: the paper has none.
        scored: class ids in the order of the paper's table; all classes if it is empty.
        keep_slices: True if no case is resampled along D.
    """

    labels: tuple[str, ...]
    channels: tuple[str, ...]
    modality: tuple[str, ...]
    flip_axes: tuple[int, ...] | None
    scored: tuple[int, ...] = ()
    keep_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Preset:
    """One name for `--data`: a task, and the sizes and the schedule of its training.

    Release: the defaults are those of all the authors' runs. Ours: vit_b for all (as the paper; the release
    takes vit_h for Synapse and AMOS) and AdamW (the release takes SGD for ACDC and Synapse), but Muon for the
    phantom, whose weights are random.

    Args:
        patch_size, encoder_size: (D, H, W) in voxels; (height, width) to which each slice is resampled.
        num_queries, sam: N, the number of masks per slice; backbone, a key of `support.sam.BACKBONES`.
        epochs, iterations, batch_size: number of epochs, of steps in each, of patches in a batch.
        optimizer, augment: key of `train.OPTIMIZERS`; factor of the probabilities of augmentations.
        fine_masks, volumetric: see `model.MaskSAMConfig`.
        lr, weight_decay, adam_eps, clip: settings of the optimizer, and the largest norm of the gradient.
        mask_weight: weight of the two losses on the final masks.
        home, tree: the place to get the files, and the folders that we expect.
    """

    task: Task
    patch_size: tuple[int, int, int]
    encoder_size: tuple[int, int]
    num_queries: int
    sam: str = "vit_b"
    epochs: int = 1000
    iterations: int = 250
    batch_size: int = 2
    optimizer: str = "adamw"
    augment: float = 1.0
    fine_masks: bool = False
    volumetric: bool = False
    lr: float = 1e-3
    weight_decay: float = 3e-5
    adam_eps: float = 1e-8
    clip: float = 12.0
    mask_weight: float = 1.5
    home: str = ""
    tree: str = ""


# Ours: short-axis slices are turned anyhow, so they may be flipped in plane; organs that have a side may not.
HEART = Task(("background", "RV", "Myo", "LV"), ("MR",), ("MR",), flip_axes=(1, 2), keep_slices=True)
HEART_TREE = "ROOT/[database/]training/patient001/{Info.cfg,patient001_frame01{,_gt}.nii.gz,...}"
# fmt: off
PRESETS = {
    "phantom": Preset(  # Ours: sizes and schedule that take minutes on two cores
        HEART, (2, 80, 80), (80, 80), 8, "tiny_pyramid", 3, 160, optimizer="muon", fine_masks=True, lr=2e-3,
        home="support/phantom.py, which writes it", tree=HEART_TREE),
    "acdc": Preset(  # Release: all numbers
        HEART, (4, 256, 256), (1024, 1024), 8, epochs=500,
        home="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html", tree=HEART_TREE),
    "synapse": Preset(  # Release: all numbers
        Task(("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver",
              "stomach", "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
              "right adrenal", "left adrenal"), ("CT",), ("CT",), (), scored=(8, 4, 3, 2, 6, 11, 1, 7)),
        (26, 256, 256), (256, 256), 24,
        home="https://www.synapse.org/#!Synapse:syn3193805 (RawData.zip)",
        tree="ROOT/[Abdomen/RawData/]Training/{img/img0001.nii.gz,label/label0001.nii.gz}, Testing/img"),
    "amos": Preset(  # Release: all numbers
        Task(("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver",
              "stomach", "aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland",
              "duodenum", "bladder", "prostate/uterus"), ("CT",), ("CT",), ()),
        (9, 512, 512), (512, 512), 24, adam_eps=1e-4, mask_weight=1.2,
        home="https://zenodo.org/records/7155725 (amos22.zip)",
        tree="ROOT/[amos22/]{imagesTr,labelsTr,imagesVa,labelsVa,imagesTs}/amos_0001.nii.gz"),
}
# fmt: on

# Ours: upsampling from patch to encoder input, for patch sides <= 64, <= 96 and larger.
SCALES = {"tiny": (4, 3, 2), "tiny_pyramid": (1, 1, 1), "mobile_sam": (4, 3, 3), "lite_medsam": (2, 1, 1)}


def recipe(preset: Preset, sam: str, device: str = "cpu") -> Preset:
    """Return the preset of a data set for one backbone. A light one gets other sizes and another schedule.

    Ours: patches up to 8 x 160 x 160, batches of one and at most 60 epochs take `tiny` an hour or two on two
    cores, with Muon, since its weights are random. On a GPU ("cuda", "cuda:1") a batch has 4 patches, or 32
    small ones: 10 to 25 minutes of an H100, with AdamW. `tiny_pyramid` has fine masks; for small patches it
    is volumetric and has K + 1 queries: 12 minutes of a core with AVX-512 (on a GPU not measured).
    """
    if sam == preset.sam or (sam not in SCALES and preset.sam == "vit_b"):  # It suits SAM's ViTs.
        return preset
    depth, *patch = preset.patch_size
    size = [max(patch) <= 64, max(patch) <= 96, True].index(True)  # 0 small, 1 middle, 2 large
    height, width = (side if size == 0 else min(-(-side // 16) * 16, 160) for side in patch)  # up to 16s
    encoder_size = tuple(-(-SCALES.get(sam, (4, 4, 4))[size] * side // 8) * 8 for side in (height, width))
    pyramid = sam == "tiny_pyramid" and size == 0
    sizes = {"patch_size": (min(depth, 16 if pyramid else 8), height, width), "encoder_size": encoder_size}
    epochs = 60 if size == 0 else 36 if sam.startswith("tiny") else 20
    batch = (32 if size == 0 else 4) if device.startswith("cuda") else 1
    how = {"optimizer": "muon" if sam.startswith("tiny") and batch == 1 else "adamw", "lr": 1e-3}
    if pyramid and batch == 1:  # on a CPU
        epochs, batch, how = 8, 2, {"optimizer": "muon", "lr": 2e-3, "augment": 0.5}
    how |= {"fine_masks": sam == "tiny_pyramid", "volumetric": pyramid}
    how |= {"num_queries": len(preset.task.labels) + 1} if pyramid else {}
    how |= sizes | {"epochs": epochs, "iterations": 250, "batch_size": batch}
    return dataclasses.replace(preset, sam=sam, **how)


def folder_preset(task: Task, shapes: Sequence[Sequence[int]], sam: str | None = None) -> Preset:
    """Return the preset of a folder of which only the task and the shapes (D, H, W) of its cases are known.

    Ours: the patch is the median case, in multiples of 4 up to 256 x 256, and at most 8 slices deep (16 for
    `tiny_pyramid`). The encoder's input is four times as large, so that SAM's masks have the patch's
    resolution. There are half as many queries again as classes, in eights.
    """
    depth, *plane = np.median(shapes, axis=0)
    height, width = (min(256, 4 * int(np.ceil(side / 4))) for side in plane)
    queries = 8 * int(np.ceil(1.5 * len(task.labels) / 8))
    patch = min(16 if sam == "tiny_pyramid" else 8, round(depth)), height, width
    return Preset(task, patch, (4 * height, 4 * width), queries, epochs=500)
