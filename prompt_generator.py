"""The prompt generator turns encoder features into masks, boxes and class tokens (paper 2.3, fig. 3b).

    neck   ── conv ───────────────────────────────┐  token grid (h, w)
    tap 4  ── 1x1 ──────────── concat, conv ──────┤
    tap 3  ── 1x1 ──────────── concat, conv ──────┤  Each level convolves and upsamples the map above it,
    tap 2  ── 1x1, upsample ── concat, conv ──────┤  concatenates the next lower tap, and convolves again.
    tap 1  ── 1x1, upsample ── concat, conv ──────┤  patch (H, W)
                                  │               │
                     conv to N auxiliary masks    all levels pooled to (2, 2) -> MLP -> N boxes
                                                  all levels pooled to (1, 1) -> MLP -> N class tokens

With fine masks the slices themselves are the lowest tap, and their level also makes "detail" for the mask
decoder. SAM's prompt encoder gets one box and one mask per query, in one of the four forms of fig. 5.
`GivenBoxes` are the boxes of a label map; they replace generated ones ("MaskSAM (Ours) bbox" in table 2):

    boxes, masks = generator.prompts(generator(neck, taps), mask_size=(4 * h, 4 * w))
"""

import math
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matcher import masks_to_boxes


class GivenBoxes(NamedTuple):
    """Boxes that replace generated ones: query i gets the box of class i + 1 (tables 2 and 3, prompts "GT").

    Ours: the label comes with the box, as in those tables. With a box, query i may only be class i + 1 or
    "no object"; without a box, background or "no object". A class without a box never appears in its slice.
    """

    boxes: Tensor  # (S, N, 4) x0, y0, x1, y1 in [0, 1], zeros where no box is given
    allowed: Tensor  # (S, N, K+1) bool, the classes that each query may have
    asked: Tensor  # (S, K) bool, the segments that the loss asks for: background and classes with a box

    @classmethod
    def from_label_map(cls, labels: Tensor, num_classes: int, num_queries: int) -> "GivenBoxes":
        """Read the box of each class in each slice from class ids (S, H, W): the truth or another's map."""
        ids = torch.arange(num_classes + 1, device=labels.device)  # background first, "no object" last
        boxes = masks_to_boxes(labels[:, None] == ids[1:-1, None, None])  # (S, K-1, 4)
        has_box, spare = boxes.any(-1), num_queries - num_classes + 1  # (S, K-1), queries without a class
        own_class = F.pad(has_box * ids[1:-1], (0, spare))[..., None]  # (S, N, 1), background without a box
        allowed = (ids == own_class) | (ids == num_classes)  # (S, N, K+1)
        return cls(F.pad(boxes, (0, 0, 0, spare)), allowed, asked=F.pad(has_box, (1, 0), value=True))

    def restrict(self, class_logits: Tensor) -> Tensor:
        """Rule out the classes that a query may not have. (S, N, K+1) logits -> same."""
        impossible = -1e4  # Ours: finite, so that costs stay finite, and within the range of float16
        return class_logits.masked_fill(~self.allowed, impossible)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample (S, C, h, w) bilinearly to `size`; return it unchanged if it has this size already."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class VolumeConv(nn.Conv3d):
    """A 3 x 3 x 3 convolution of volumes of `depth` slices whose slices stand in the axis of the batch."""

    def __init__(self, in_dim: int, out_dim: int, depth: int):
        super().__init__(in_dim, out_dim, kernel_size=3, padding=1, bias=False)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """(B*D, in_dim, h, w) -> (B*D, out_dim, h, w)."""
        volumes = x.unflatten(0, (-1, self.depth)).transpose(1, 2)  # (B, in_dim, D, h, w)
        return super().forward(volumes).transpose(1, 2).flatten(0, 1)


def convolution(in_dim: int, out_dim: int, depth: int | None) -> nn.Sequential:
    """Build a 3 x 3 convolution, or 3 x 3 x 3 over `depth` slices, GroupNorm of 8 groups, GELU. Ours: all."""
    conv = nn.Conv2d(in_dim, out_dim, kernel_size=3, padding=1, bias=False)
    conv = conv if depth is None else VolumeConv(in_dim, out_dim, depth)
    return nn.Sequential(conv, nn.GroupNorm(8, out_dim), nn.GELU())


class Level(nn.Module):
    """One step down the pyramid: convolve and upsample the map above, concatenate the tap, convolve.

    Ours: both 1 x 1 convolutions come before the upsampling, where there are fewest pixels, and all are 2-D
    unless the model is `volumetric`. The release convolves in 3-D, at full width and size.

    Args:
        above_dim, tap_dim, dim: channels of the map above, of the tap and of this level.
        size: (rows, columns) of this level's map. depth: D for a convolution in 3-D, or None.
    """

    def __init__(self, above_dim: int, tap_dim: int, dim: int, size: tuple[int, int], depth: int | None):
        super().__init__()
        self.size = size
        self.above = nn.Conv2d(above_dim, dim, kernel_size=1)
        self.tap = nn.Conv2d(tap_dim, dim, kernel_size=1)
        self.merge = convolution(2 * dim, dim, depth)

    def forward(self, above: Tensor, tap: Tensor) -> Tensor:
        """(S, above_dim, any, any) and (S, tap_dim, any, any) -> (S, dim, *size)."""
        above, tap = self.above(above), self.tap(tap)
        both = torch.cat([resize(above, self.size), resize(tap, self.size)], dim=1)
        return self.merge(both).to(above.dtype)  # On a GPU autocast has made float32 of it.


def level_sizes(grid: tuple[int, int], patch: tuple[int, int], levels: int, scales=None) -> list[tuple]:
    """Return (rows, columns) of each level's map, from the neck to the lowest tap.

    Ours: all taps of a ViT have the size of the token grid. The last levels, which have the fewest channels,
    each double the size until it is the patch's. Taps that are a pyramid bring their own scales.

    Args:
        grid, patch, levels: (h, w) of the tokens; (H, W), the largest size; the number of levels.
        scales: the size of each level over the token grid, or None for a ViT.
    """
    if scales is None:
        doublings = math.ceil(math.log2(max(patch[0] / grid[0], patch[1] / grid[1], 1)))
        scales = [2 ** max(0, min(doublings, levels - 1) - (levels - 1 - level)) for level in range(levels)]
    return [tuple(min(n * scale, end) if scale > 1 else n for n, end in zip(grid, patch)) for scale in scales]


class PromptGenerator(nn.Module):
    """Make N prompts per slice from the image encoder's features (paper 2.3, fig. 3b).

    Args:
        neck_dim, tap_dims: channels of the encoder's output, and of each tap, first block first.
        grid, patch_size, num_queries: (h, w) of the tokens, (H, W) of the auxiliary masks, N.
        form: the letter of fig. 5, "a" to "d"; see `prompts`.
        mask_prompt: whether SAM gets the masks as "logits" or "binary".
        scales: as in `level_sizes`. depth: as in `Level`.
        fine: whether the slices are the first tap, and the last level also makes "detail" for final masks.
    """

    def __init__(
        self, neck_dim, tap_dims, grid, patch_size, num_queries, form, mask_prompt, scales=None, depth=None,
        fine=False,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.num_queries = patch_size, num_queries
        self.form, self.mask_prompt = form, mask_prompt
        # Ours: full width on the token grid, where a convolution is cheap, then half of it and a quarter.
        dims = [neck_dim] * (len(tap_dims) - 1) + [neck_dim // 2, neck_dim // 4]
        sizes = level_sizes(grid, patch_size, len(dims), scales)
        self.neck = convolution(neck_dim, neck_dim, depth)
        self.levels = nn.ModuleList(map(Level, dims, reversed(tap_dims), dims[1:], sizes[1:], repeat(depth)))
        if fine:  # Ours: a second convolution of the slices; detail is silent at first, as the adapters are.
            self.levels[-1].merge.extend(convolution(dims[-1], dims[-1], depth))
            self.detail_head = nn.Conv2d(dims[-1], neck_dim // 8, kernel_size=1, bias=False)
            nn.init.zeros_(self.detail_head.weight)
        self.class_head = self._mlp(sum(dims), neck_dim, num_queries * neck_dim)
        if form != "b":
            self.mask_head = nn.Conv2d(dims[-1], num_queries, kernel_size=1)
        if form != "a":
            # Ours: the MLP reads all four pooled cells together; in the release each cell gives one number.
            self.box_head = self._mlp(4 * sum(dims), neck_dim, num_queries * 4)
            start = torch.tensor([1 / 4, 1 / 4, 2 / 3, 2 / 3]).logit()  # Ours: around (1/4, 1/4, 3/4, 3/4)
            self.box_head[-1].bias.data.copy_(start.repeat(num_queries))

    @staticmethod
    def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))

    def forward(self, neck: Tensor, taps: list[Tensor], recompute: bool = False) -> dict[str, Tensor]:
        """Generate the auxiliary predictions.

        Args:
            neck: (S, neck_dim, h, w), the encoder's output.
            taps: (S, tap_dim, any, any) each, first block first.
            recompute: whether backward computes the last level, which is the largest, again.
        Returns:
            class_tokens (S, N, neck_dim); aux_mask_logits (S, N, H, W), the paper's m^aux, but not in form b;
            aux_boxes (S, N, 4) x0 <= x1, y0 <= y1 in [0, 1], the paper's b^aux, but not in form a;
            detail (S, neck_dim / 8, H, W) if the generator is fine.
        """
        features = [self.neck(neck)]  # (S, neck_dim, h, w)
        for level, tap in zip(self.levels, reversed(taps)):
            again = recompute and level is self.levels[-1] and torch.is_grad_enabled()
            call = partial(checkpoint, level, use_reentrant=False) if again else level
            features.append(call(features[-1], tap))  # (S, dim, *size), at last of the patch's size

        def pooled(side: int) -> Tensor:  # (S, side * side * sum(dims)), the averages of all levels
            return torch.cat([F.adaptive_avg_pool2d(feature, side).flatten(1) for feature in features], dim=1)

        out = {"class_tokens": self.class_head(pooled(1)).unflatten(1, (self.num_queries, -1))}
        if hasattr(self, "detail_head"):
            out["detail"] = resize(self.detail_head(features[-1]), self.patch_size)
        if self.form != "b":
            out["aux_mask_logits"] = resize(self.mask_head(features[-1]), self.patch_size)
        if self.form != "a":
            fractions = self.box_head(pooled(2)).float().unflatten(1, (-1, 4)).sigmoid()  # (S, N, 4)
            corner, extent = fractions.split(2, dim=-1)
            # Release: an extent is a fraction of the way from the corner to 1, so that x0 <= x1 and y0 <= y1.
            out["aux_boxes"] = torch.cat([corner, corner + (1 - corner) * extent], dim=-1)
        return out

    def prompts(
        self, aux: dict[str, Tensor], mask_size: tuple[int, int], given: GivenBoxes | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Turn the auxiliary predictions into SAM's prompts (fig. 5).

        Ours: the mask prompt is the mask's logits, like SAM's own mask input, and the final loss reaches the
        mask head. The paper says binary masks; docs/results.md compares the two.

        Args:
            aux: the output of `forward`.
            mask_size: (rows, columns) of SAM's mask input, four times the token grid.
            given: boxes that replace the generated ones.
        Returns:
            boxes (S, N, 4) in [0, 1]; masks (S, N, *mask_size), or None in form b.
        """
        boxes, masks = self._boxes(aux), None
        if self.form != "b":
            masks = resize(aux["aux_mask_logits"].float(), mask_size)
            masks = (masks > 0).to(masks.dtype) if self.mask_prompt == "binary" else masks
        if given is not None:
            boxes = torch.where(given.boxes.any(-1, keepdim=True), given.boxes, boxes)
        return boxes, masks

    def _boxes(self, aux: dict[str, Tensor]) -> Tensor:
        if self.form in "bc":  # fig. 5b, 5c: the learned boxes
            return aux["aux_boxes"]
        boxes = masks_to_boxes(aux["aux_mask_logits"] > 0)  # (S, N, 4), zeros where a mask is empty
        empty = (boxes == 0).all(-1, keepdim=True)
        if self.form == "a":  # fig. 5a: the masks' boxes. Ours: the whole slice where a mask is empty
            return torch.cat([boxes[..., :2], boxes[..., 2:].masked_fill(empty, 1.0)], dim=-1)
        # fig. 5d: the mean of both boxes. Ours: the learned box alone where a mask is empty
        return torch.where(empty, aux["aux_boxes"], (boxes + aux["aux_boxes"]) / 2)
