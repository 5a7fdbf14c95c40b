"""Small networks in which every part has something to do, and tasks for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matcher import Segments, masks_to_boxes
from model import MaskSAM, MaskSAMConfig


def tiny(**changes) -> MaskSAM:
    """`tiny` on 4 x 4 tokens. A TinyViT (`sam="lite_medsam"`) has 5 x 6, which never fill its windows."""
    torch.manual_seed(0)
    sizes = {"mobile_sam": (80, 96), "lite_medsam": (20, 24)}
    defaults = {"sam": "tiny", "num_classes": 3, "num_queries": 3, "patch_size": (2, 32, 32)}
    defaults["encoder_size"] = sizes.get(changes.get("sam"), (64, 64))
    return MaskSAM(MaskSAMConfig(**defaults | changes))


def wake_sam(sam: nn.Module) -> nn.Module:
    wake_encoder(sam.image_encoder)
    return sam


@torch.no_grad()
def wake_encoder(encoder: nn.Module) -> None:
    """Randomise weights that start at zero or one, so that leaving them out changes the result."""
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            parameter.normal_(std=0.5)
        elif "norm" in name or "bn" in name or name.endswith(("bias", "attention_biases")):
            parameter.add_(
                0.3 * torch.randn_like(parameter)
            )  # pad tokens are zeros behind the norm, not before
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 0.5)


@torch.no_grad()
def wake(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Randomise all weights of what starts silent."""
    for parameter in module.parameters():
        parameter.normal_(std=std)
    return module


def labels_to_segments(labels: Tensor, num_classes: int) -> Segments:
    masks = labels[:, None] == torch.arange(num_classes)[:, None, None]
    return Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def task(net: MaskSAM, batch: int = 1, seed: int = 0) -> tuple[Tensor, Segments]:
    """A patch of noise, with blocks of every class as truth."""
    generator, classes = torch.Generator().manual_seed(seed), net.config.num_classes
    depth, height, width = net.config.patch_size
    volume = torch.randn(batch, net.config.num_channels, depth, height, width, generator=generator)
    coarse = torch.randint(0, classes, (batch * depth, 1, 4, 4), generator=generator)
    coarse.flatten(1)[:, :classes] = torch.arange(classes)
    labels = F.interpolate(coarse.float(), size=(height, width), mode="nearest")[:, 0].long()
    return volume, labels_to_segments(labels, classes)
