"""Small networks with something to do for every part, and tasks for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matcher import Segments, masks_to_boxes
from model import MaskSAM, MaskSAMConfig


def tiny(**changes) -> MaskSAM:
    torch.manual_seed(0)
    defaults = {"num_classes": 3, "num_queries": 3, "patch_size": (2, 32, 32), "encoder_size": (64, 64)}
    return MaskSAM(MaskSAMConfig(**{"sam": "tiny"} | defaults | changes))


@torch.no_grad()
def wake_sam(sam: nn.Module) -> None:
    """Randomise what SAM initialises at zero and pre-training fills, so that leaving it out changes the result."""
    encoder = sam.image_encoder
    encoder.pos_embed.normal_()
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            parameter.normal_(std=0.5)
        elif name.startswith("blocks") and "norm" in name or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))  # pad tokens are zeros behind the norm, not before it


@torch.no_grad()
def wake(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Randomise all weights of what starts silent; returns the module."""
    for parameter in module.parameters():
        parameter.normal_(std=std)
    return module


def labels_to_segments(labels: Tensor, num_classes: int) -> Segments:
    masks = labels[:, None] == torch.arange(num_classes)[:, None, None]
    return Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def task(net: MaskSAM, batch: int = 1, seed: int = 0) -> tuple[Tensor, Segments]:
    """A patch of noise, with blocks of every class as truth."""
    generator = torch.Generator().manual_seed(seed)
    depth, height, width = net.config.patch_size
    volume = torch.randn(batch, net.config.num_channels, depth, height, width, generator=generator)
    coarse = torch.randint(0, net.config.num_classes, (batch * depth, 1, 4, 4), generator=generator)
    coarse.flatten(1)[:, : net.config.num_classes] = torch.arange(net.config.num_classes)
    labels = F.interpolate(coarse.float(), size=(height, width), mode="nearest")[:, 0].long()
    return volume, labels_to_segments(labels, net.config.num_classes)
