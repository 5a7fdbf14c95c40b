"""Small networks in which every part has something to do, and tasks for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matcher import Segments, masks_to_boxes
from model import MaskSAM, MaskSAMConfig


def tiny(**changes) -> MaskSAM:
    """`tiny` on 4 x 4 tokens. A TinyViT (`sam="lite_medsam"`) has 5 x 6, which do not fill its windows."""
    torch.manual_seed(0)
    pyramids = {"mobile_sam": (80, 96), "lite_medsam": (20, 24), "tiny_pyramid": (40, 48)}
    size = pyramids.get(changes.get("sam"), (64, 64))
    sizes = {"num_classes": 3, "num_queries": 3, "patch_size": (2, 32, 32), "encoder_size": size}
    return MaskSAM(MaskSAMConfig(**{"sam": "tiny"} | sizes | changes))


@torch.no_grad()
def wake_sam(module: nn.Module) -> nn.Module:
    """Randomise weights of image encoders that start at zero or one, so that leaving one out is seen."""
    for name, value in getattr(module, "image_encoder", module).state_dict().items():
        if "rel_pos" in name or name.endswith("pos_embed"):
            value.normal_(std=0.5)
        elif name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.2, 0.5)
        elif "norm" in name or name.endswith(("bn.weight", "bias", "biases")):
            value.add_(0.3 * torch.randn_like(value))  # then a padded token is not zero
    return module


@torch.no_grad()
def wake(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Randomise all weights of what starts silent."""
    for parameter in module.parameters():
        parameter.normal_(std=std)
    return module


def labels_to_segments(labels: Tensor, num_classes: int) -> Segments:
    """(S, H, W) ids; -1 belongs to no class."""
    masks = labels[:, None] == torch.arange(num_classes)[:, None, None]
    return Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def task(net: MaskSAM, batch: int = 1, seed: int = 0) -> tuple[Tensor, Segments]:
    """A patch of noise, with blocks of every class as truth."""
    generator, classes = torch.Generator().manual_seed(seed), net.config.num_classes
    (depth, *size), channels = net.config.patch_size, net.config.num_channels
    volume = torch.randn(batch, channels, depth, *size, generator=generator)
    coarse = torch.randint(0, classes, (batch * depth, 1, 4, 4), generator=generator)
    coarse.flatten(1)[:, :classes] = torch.arange(classes)
    return volume, labels_to_segments(F.interpolate(coarse.float(), size=size)[:, 0].long(), classes)
