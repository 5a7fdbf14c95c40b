"""Small networks in which every part has something to do, and tasks for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import label_map_to_segments
from matcher import Segments
from model import MaskSAM, MaskSAMConfig, build_model, checkpoint_content
from support.checkpoints import write_checkpoint
from volumes import planned


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


@torch.no_grad()
def checkpoint(path, source, patch=(4, 32, 32), queries=4, seed=0, plan=None, fine=False, **more) -> None:
    """Write an untrained model with queries of different classes whose masks differ from place to place."""
    torch.manual_seed(seed)
    plan = plan or planned(source)
    sizes = {"patch_size": patch, "encoder_size": (32, 32), "num_queries": queries, "num_channels": 1}
    sizes |= {"num_classes": len(plan.task.labels), "fine_masks": fine}
    model, sam = build_model(MaskSAMConfig("tiny", **sizes))
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.class_tokens, std=5)
    model.sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight *= 100
    arguments = {"data": source.name, "root": source.root} | more
    content = checkpoint_content(model, sam, plan.as_dict()) | {"epoch": 7, "arguments": arguments}
    content["cases"] = {"train": [case.name for case in source.splits["train"]], "val": []}
    write_checkpoint(path, content)


def task(net: MaskSAM, batch: int = 1, seed: int = 0) -> tuple[Tensor, Segments]:
    """A patch of noise, with blocks of every class as truth."""
    generator, classes = torch.Generator().manual_seed(seed), net.config.num_classes
    (depth, *size), channels = net.config.patch_size, net.config.num_channels
    volume = torch.randn(batch, channels, depth, *size, generator=generator)
    coarse = torch.randint(0, classes, (batch * depth, 1, 4, 4), generator=generator)
    coarse.flatten(1)[:, :classes] = torch.arange(classes)
    return volume, label_map_to_segments(F.interpolate(coarse.float(), size=size)[:, 0], classes)
