"""The SAMs that `--sam` can name: their networks, their published files, and the import of segment_anything.

BACKBONES["vit_b"].build()     SAM's network with random weights
find_sam_file("vit_b")         the published file in torch's cache, downloaded at the first call
modeling, window_partition     segment_anything's network alone; the package itself would import torchvision
"""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.tiny_vit import SMALL, TinyViT

# The package's __init__ imports torchvision, which SAM's network does not need. A module made of the
# package's spec, but never run, stands in for the package while its torch-only submodules are imported.
_stand_in = "segment_anything" not in sys.modules
if _stand_in:
    if (_spec := importlib.util.find_spec("segment_anything")) is None:
        raise ImportError("the package segment-anything is missing: pip install -r requirements.txt")
    sys.modules["segment_anything"] = importlib.util.module_from_spec(_spec)
from segment_anything import modeling  # noqa: E402
from segment_anything.build_sam import sam_model_registry  # noqa: E402
from segment_anything.modeling.image_encoder import window_partition, window_unpartition  # noqa: E402, F401

if _stand_in:
    del sys.modules["segment_anything"]

PIXEL_MEAN, PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # SAM's, in grey levels


def _build_tiny() -> nn.Module:
    """Ours: a small SAM of the same classes, which trains from scratch, for tests and for two cores."""
    vit = {"img_size": 256, "embed_dim": 128, "depth": 4, "num_heads": 4, "out_chans": 64, "window_size": 8}
    vit |= {"use_rel_pos": True, "global_attn_indexes": (1, 3), "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    return _build_around(modeling.ImageEncoderViT(**vit), dim=64, heads=4, mlp_dim=256, grid=16)


def _build_around(encoder, mean=PIXEL_MEAN, std=PIXEL_STD, dim=256, heads=8, mlp_dim=2048, grid=64):
    """Put SAM's prompt encoder and mask decoder, by default of their own sizes, behind an image encoder."""
    prompt_encoder = modeling.PromptEncoder(dim, (grid, grid), (encoder.img_size,) * 2, mask_in_chans=16)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=heads, mlp_dim=mlp_dim)
    decoder = modeling.MaskDecoder(transformer_dim=dim, transformer=transformer, iou_head_hidden_dim=dim)
    return modeling.Sam(encoder, prompt_encoder, decoder, mean, std)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One name for `--sam`."""

    build: Callable[[], nn.Module]  # makes the network with random weights
    file: str | None = None  # name of the published file; without one, SAM trains too
    sha256: str | None = None  # of this file
    url: str | None = None  # address of this file; None if no script can fetch it from its home
    stride: int = 16  # side of a token in pixels of the encoder's input
    grey: tuple[float, float] | None = None  # mean, deviation of its pictures; None: as pixel statistics


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
_META_FILES = {
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}
# fmt: off
BACKBONES = {"tiny": Backbone(_build_tiny)} | {
    name: Backbone(sam_model_registry[name], file, sha256, _META + file)
    for name, (file, sha256) in _META_FILES.items()
} | {
    # Ours: as `tiny`, with a small TinyViT. It begins with convolutions and learns from fewer patches.
    "tiny_pyramid": Backbone(lambda: _build_around(
        TinyViT(256, patch=2, out_dim=64, shape=SMALL, trains=True), dim=64, heads=4, mlp_dim=256, grid=32,
    ), stride=8),
    # MobileSAM was distilled from SAM ViT-H. Its file has the classifier of an earlier training.
    "mobile_sam": Backbone(
        lambda: _build_around(TinyViT(1024, patch=4, num_classes=1000)), "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
    ),
    # LiteMedSAM was distilled from MedSAM, on medical pictures of 256 x 256 pixels in [0, 1].
    # Ours: grey levels of ACDC's slices, each scaled to [0, 1] as its training pictures were.
    "lite_medsam": Backbone(
        lambda: _build_around(TinyViT(256, patch=1), [0.0] * 3, [255.0] * 3), "lite_medsam.pth",
        "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76", stride=4, grey=(60.0, 60.0),
    ),
}
# fmt: on


def find_sam_file(name: str, path: str | Path | None = None) -> Path | None:
    """Return the file with SAM's weights: the user's own at `path`, or the published one, in torch's cache.

    Return None for a backbone that has none; then a `path` is a ValueError. FileNotFoundError: no such file.
    """
    backbone = BACKBONES[name]
    if path is not None:
        if backbone.file is None:
            raise ValueError(f"--sam {name} has no pre-trained weights: leave out --sam-checkpoint {path}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file, expected SAM {name} ({backbone.file})")
        return Path(path)
    if backbone.file is None:
        return None
    target = Path(torch.hub.get_dir()) / "checkpoints" / backbone.file
    if target.is_file():
        return target
    if backbone.url is None:
        home = "the Google Drive folder that github.com/bowang-lab/MedSAM names (branch LiteMedSAM)"
        found = f"{target}: no such file, and no script can fetch it"
        raise FileNotFoundError(f"{found}. Get {backbone.file} from {home}: --sam-checkpoint FILE.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:  # torch checks the sha256, and gives the file its name only when it is whole
        torch.hub.download_url_to_file(backbone.url, str(target), hash_prefix=backbone.sha256)
    except (OSError, RuntimeError) as error:
        found = f"SAM {name} could not be downloaded ({error}).\n  from {backbone.url}\n  to   {target}\n"
        expected = "Put the file there by hand, or pass --sam-checkpoint FILE. (--sam tiny needs no weights.)"
        raise FileNotFoundError(found + expected) from error
    return target


def load_sam(sam: nn.Module, name: str, path: str | Path, grid: tuple[int, int]) -> None:
    """Load SAM's file strictly, with resampled position embedding. Raise ValueError for any other file."""
    positions = "image_encoder.pos_embed"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if positions in state:  # TinyViT has none
            state[positions] = resample_position_embedding(state[positions], grid)
        sam.load_state_dict(state, strict=True)
    except Exception as error:  # a wrong file fails in unpickling, in look-up or in shapes
        found = f"{path} does not hold SAM {name}: {' '.join(str(error).strip().splitlines()[:3])[:300]}"
        expected = f"expected the file {BACKBONES[name].file}, or another backbone with --sam"
        raise ValueError(f"{found} ... {expected}") from error


def store_frozen(sam: nn.Module, dtype: torch.dtype | None) -> None:
    """Store a frozen SAM's weights as autocast would cast them in every pass; no change for None."""
    if dtype is None or any(parameter.requires_grad for parameter in sam.parameters()):
        return
    # The prompt encoder works in float32. A TinyViT scales its convolutions `c` before autocast casts them.
    for name, layer in [*sam.image_encoder.named_modules(), *sam.mask_decoder.named_modules()]:
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not name.endswith(".c"):
            layer.to(dtype)


def file_sha256(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resample_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample SAM's learnt positions (1, h, w, width) to another grid. Ours: bicubic, antialiased."""
    if tuple(embedding.shape[1:3]) == tuple(grid):
        return embedding
    channels_first = embedding.float().permute(0, 3, 1, 2)
    return F.interpolate(channels_first, grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1)
