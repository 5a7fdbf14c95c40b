"""One record per data set: labels, modality, sizes and schedule (paper 3)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """One `--data` name: what its labels are and the run that the paper made on it (the authors' published constants).

    labels: names by id, 0 is background. modality: "MR" or "CT". patch_size: (D, H, W) voxels. encoder_size: pixels.
    flip_axes: of (D, H, W), where a flipped patch keeps its labels. scored: ids in the order of the paper's table, all
    if empty. home, tree: where to get the files, and what they should look like.
    """

    labels: tuple[str, ...]
    modality: str
    patch_size: tuple[int, int, int]
    encoder_size: tuple[int, int]
    num_queries: int
    sam: str = "vit_b"
    epochs: int = 1000
    iterations: int = 250
    batch_size: int = 2
    lr: float = 1e-3
    weight_decay: float = 3e-5
    adam_eps: float = 1e-8
    clip: float = 12.0
    mask_weight: float = 1.5
    flip_axes: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    home: str = ""
    tree: str = ""


CARDIAC = ("background", "RV", "Myo", "LV")
ACDC_TREE = """ROOT/[database/]training/patient001/Info.cfg
                                   patient001_frame01.nii.gz
                                   patient001_frame01_gt.nii.gz
                                   ..."""
# fmt: off
PRESETS = {
    # Ours: sizes and schedule for some minutes on two cores.
    "phantom": Preset(
        CARDIAC, "MR", (4, 80, 80), (240, 240), 8, sam="tiny", epochs=8, iterations=250, batch_size=1,
        flip_axes=(1, 2), home="phantom.py writes it", tree=ACDC_TREE,
    ),
    "acdc": Preset(
        CARDIAC, "MR", (4, 256, 256), (1024, 1024), 8, epochs=500, flip_axes=(1, 2),
        home="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html", tree=ACDC_TREE,
    ),
    "synapse": Preset(
        ("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
         "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal", "left adrenal"),
        "CT", (26, 256, 256), (256, 256), 24, scored=(8, 4, 3, 2, 6, 11, 1, 7),
        home="https://www.synapse.org/#!Synapse:syn3193805 (RawData.zip)",
        tree="ROOT/[Abdomen/RawData/]Training/{img/img0001.nii.gz,label/label0001.nii.gz}, Testing/img",
    ),
    "amos": Preset(
        ("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach",
         "aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder",
         "prostate/uterus"),
        "CT", (9, 512, 512), (512, 512), 24, adam_eps=1e-4, mask_weight=1.2,
        home="https://zenodo.org/records/7155725 (amos22.zip)",
        tree="ROOT/[amos22/]{imagesTr,labelsTr,imagesVa,labelsVa,imagesTs}/amos_0001.nii.gz",
    ),
}
# fmt: on

# Encoder pixels a voxel of the backbones for a few cores: for patches up to 64 voxels a side, up to 96, and larger.
LIGHT_SCALES = {"tiny": (4, 3, 2), "mobile_sam": (4, 3, 3), "lite_medsam": (2, 1, 1)}


def recipe(preset: Preset, sam: str) -> Preset:
    """What a backbone changes in a preset. Ours: with `tiny`, sizes and schedule for an hour on two cores.

    A token sees 4 x 4 voxels of a small volume, about 5 x 5 of a middling one and 8 x 8 of a large one; SAM's masks
    have one, 3/4 and 1/2 of the patch's resolution. On ACDC, where a small patch often misses the heart, the wider view
    won: 160 x 160 voxels gave a validation Dice of 0.51 after 1,500 steps, 96 x 96 of 0.41 after 4,000. On the phantom
    tokens of 8 x 8 lost the thin wall (0.69 beside 0.90 after 1,000 steps).

    The pre-trained light ones see the same patches at their own scales, and start far ahead: fewer, longer steps. On
    ACDC a step takes 7 s of one core with `lite_medsam` and 4 s with `mobile_sam`, in 3.5 and 2.5 GiB.
    """
    if sam not in LIGHT_SCALES or sam == preset.sam:
        return preset
    depth, *patch = preset.patch_size
    size = [max(patch) <= 64, max(patch) <= 96, True].index(True)
    scale = LIGHT_SCALES[sam][size]
    height, width = (side if size == 0 else min(-(-side // 16) * 16, 160) for side in patch)
    sizes = {"patch_size": (min(depth, 8), height, width), "encoder_size": (scale * height, scale * width)}
    epochs = min(preset.epochs, 60 if size == 0 else 36 if sam == "tiny" else 20)
    return dataclasses.replace(preset, sam=sam, epochs=epochs, iterations=250, batch_size=1, **sizes)
