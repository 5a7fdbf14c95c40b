"""The prompt generator: encoder features -> auxiliary masks, boxes and class tokens (paper 2.3, fig. 3b).

    neck      ── conv ─────────────────────────────────┐ token grid
    tap 11    ── 1x1 ──────────── concat, conv ────────┤
    tap 8     ── 1x1 ──────────── concat, conv ────────┤      each level: the deeper one convolved and upsampled,
    tap 5     ── 1x1, upsample ── concat, conv ────────┤      concatenated with the next lower tap, convolved
    tap 2     ── 1x1, upsample ── concat, conv ────────┤ patch size
                                     │                 │
                     conv to N: auxiliary masks        every level pooled to (2, 2) -> MLP -> N boxes
                                                       every level pooled to (1, 1) -> MLP -> N class tokens

SAM's prompt encoder then gets one box and one mask per query, in one of the four forms of fig. 5.

Letters: S slices, N queries, H W pixels of a patch, h w token grid, C channels of a tap.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matcher import masks_to_boxes

# Fig. 5: the masks' own boxes; learned boxes alone; both; masks with the mean of their boxes and the learned ones.
PROMPT_FORMS = {"a": "mask", "b": "box", "c": "mask and box", "d": "mask and mean box"}


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling of (S, C, h, w) to `size`; nothing where that is the size already."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Level(nn.Module):
    """One step down the pyramid: convolve and upsample what is above, concatenate the tap, convolve.

    Ours: both 1 x 1 convolutions come before the upsampling, where there are fewest pixels; the release, which
    convolves at full width and size, spends 37 % of its arithmetic in the generator. 3-D convolutions gained
    nothing (hippocampus, `tiny`, 1,000 steps, one seed: validation Dice 0.753, not 0.756).

    Args:
        above_dim, tap_dim: input channels. dim: channels of the level. size: (rows, columns) of its feature map.
    """

    def __init__(self, above_dim: int, tap_dim: int, dim: int, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.above = nn.Conv2d(above_dim, dim, kernel_size=1)
        self.tap = nn.Conv2d(tap_dim, dim, kernel_size=1)
        self.merge = convolution(2 * dim, dim)

    def forward(self, above: Tensor, tap: Tensor) -> Tensor:
        """(S, above_dim, any, any), (S, tap_dim, h, w) -> (S, dim, *size)."""
        return self.merge(torch.cat([resize(self.above(above), self.size), resize(self.tap(tap), self.size)], dim=1))


def convolution(in_dim: int, out_dim: int) -> nn.Sequential:
    """3 x 3 convolution, GroupNorm, GELU."""
    return nn.Sequential(nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=False), nn.GroupNorm(8, out_dim), nn.GELU())


def level_sizes(grid: tuple[int, int], patch: tuple[int, int], levels: int, scales=None) -> list[tuple[int, int]]:
    """Feature map sizes from the neck to the lowest tap: the token grid, doubled in the last levels up to the patch.

    All taps of a ViT have the size of the token grid, so the doublings are left to the last, thinnest levels. Taps that
    are a pyramid bring their own scales over the token grid.
    """
    if scales is None:
        doublings = math.ceil(math.log2(max(patch[0] / grid[0], patch[1] / grid[1], 1)))
        scales = [2 ** max(0, min(doublings, levels - 1) - (levels - 1 - level)) for level in range(levels)]
    return [tuple(min(side * scale, end) if scale > 1 else side for side, end in zip(grid, patch)) for scale in scales]


class PromptGenerator(nn.Module):
    """Makes N prompts per slice from the image encoder's features (paper 2.3).

    Args:
        neck_dim: channels of the encoder's output. tap_dims: channels of the taps, first block first.
        grid: (h, w) of tokens. patch_size: (H, W) of the auxiliary masks. num_queries: N.
        form: key of `PROMPT_FORMS`. mask_prompt: what SAM gets as mask prompt, "logits" or "binary".
        scales: of the levels over the token grid, neck first, where the taps are a pyramid; see `level_sizes`.
    """

    def __init__(
        self,
        neck_dim: int,
        tap_dims: list[int],
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        num_queries: int,
        form: str = "d",
        mask_prompt: str = "logits",
        scales: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.patch_size, self.num_queries = patch_size, num_queries
        self.form, self.mask_prompt = form, mask_prompt
        # Ours: full width on the token grid, where a convolution is cheap; half and a quarter below.
        dims = [neck_dim] * (len(tap_dims) - 1) + [neck_dim // 2, neck_dim // 4]
        sizes = level_sizes(grid, patch_size, len(dims), scales)
        self.neck = convolution(neck_dim, neck_dim)
        self.levels = nn.ModuleList(map(Level, dims, reversed(tap_dims), dims[1:], sizes[1:]))
        self.class_head = self._head(sum(dims), neck_dim, num_queries * neck_dim)
        if form != "b":
            self.mask_head = nn.Conv2d(dims[-1], num_queries, kernel_size=1)
        if form != "a":
            self.box_head = self._head(4 * sum(dims), neck_dim, num_queries * 4)
            with torch.no_grad():  # Ours: boxes start around the centre, from a quarter to three quarters of the image
                self.box_head[-1].bias.copy_(torch.tensor([1 / 4, 1 / 4, 2 / 3, 2 / 3]).logit().repeat(num_queries))

    @staticmethod
    def _head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))

    def forward(self, neck: Tensor, taps: list[Tensor]) -> dict[str, Tensor]:
        """Generate the auxiliary predictions.

        Args:
            neck: (S, neck_dim, h, w). taps: (S, tap_dim, any, any) each, first block first.
        Returns:
            class_tokens (S, N, neck_dim) and, as the form has them, aux_mask_logits (S, N, H, W) and
            aux_boxes (S, N, 4), x0, y0, x1, y1 in [0, 1] with x0 <= x1 and y0 <= y1.
        """
        features = [self.neck(neck)]
        for level, tap in zip(self.levels, reversed(taps)):
            features.append(level(features[-1], tap))

        def pooled(side: int) -> Tensor:
            return torch.cat([F.adaptive_avg_pool2d(feature, side).flatten(1) for feature in features], dim=1)

        out = {"class_tokens": self.class_head(pooled(1)).unflatten(1, (self.num_queries, -1))}
        if self.form != "b":
            out["aux_mask_logits"] = resize(self.mask_head(features[-1]), self.patch_size)
        if self.form != "a":
            corner, fraction = self.box_head(pooled(2)).float().unflatten(1, (-1, 4)).sigmoid().split(2, dim=-1)
            out["aux_boxes"] = torch.cat([corner, corner + (1 - corner) * fraction], dim=-1)
        return out

    def prompts(
        self, aux: dict[str, Tensor], mask_size: tuple[int, int], given: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Turn the auxiliary predictions into SAM's prompts (fig. 5 a-d).

        Ours: the mask prompt is the mask's logits, which SAM's own mask input is too, so that the final loss reaches
        the mask head; `mask_prompt="binary"` is the paper's wording. Validation Dice does not tell them apart: on the
        hippocampus, one seed each, binary ones gave 0.748 and logits 0.756 with `tiny`, 0.718 and 0.701 with MobileSAM;
        seeds differ by 0.04. Ours: where a mask is empty its box is left out: the learned box alone (d), the whole
        slice (a).

        Args:
            aux: of `forward`. mask_size: (rows, columns) of SAM's mask input, four times the token grid.
            given: (S, N, 4) boxes to take instead, of the queries where they are not all zeros.
        Returns:
            boxes (S, N, 4) in [0, 1]; masks (S, N, *mask_size), or None in form b.
        """
        boxes, masks = self._generated_prompts(aux, mask_size)
        if given is not None:
            boxes = torch.where(given.any(-1, keepdim=True), given, boxes)
        return boxes, masks

    def _generated_prompts(self, aux, mask_size) -> tuple[Tensor, Tensor | None]:
        if self.form == "b":
            return aux["aux_boxes"], None
        logits = aux["aux_mask_logits"].float()
        masks = resize(logits, mask_size)
        if self.mask_prompt == "binary":
            masks = (masks > 0).to(logits.dtype)
        if self.form == "c":
            return aux["aux_boxes"], masks
        mask_boxes = masks_to_boxes(logits > 0)
        empty = (mask_boxes == 0).all(-1, keepdim=True)
        if self.form == "a":
            return torch.where(empty, mask_boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), mask_boxes), masks
        return torch.where(empty, aux["aux_boxes"], (mask_boxes + aux["aux_boxes"]) / 2), masks


def boxes_of_classes(labels: Tensor, num_classes: int, num_queries: int) -> tuple[Tensor, Tensor]:
    """Given boxes instead of generated ones: query i gets the box of class i + 1 (the "bbox" rows of tables 2 and 3).

    Ours: the label comes with the box, as the tables have it: a query with a box has the class of its box or is no
    object, the others are background or no object. So a class without a box in a slice is not drawn there.

    Args:
        labels: (S, H, W) int, the segments whose boxes are given, of the truth or of another program. num_classes: K.
        num_queries: N, at least K.
    Returns:
        boxes (S, N, 4), zeros where none is given; allowed (S, N, K + 1) bool, what each query may be.
    """
    class_ids = torch.arange(1, num_classes, device=labels.device)
    boxes = F.pad(masks_to_boxes(labels[:, None] == class_ids[:, None, None]), (0, 0, 0, num_queries - len(class_ids)))
    query = torch.arange(num_queries, device=labels.device)[:, None]
    own_class = torch.where(boxes.any(-1, keepdim=True), query + 1, 0)  # (S, N, 1), background without a box
    ids = torch.arange(num_classes + 1, device=labels.device)
    return boxes, (ids == own_class) | (ids == num_classes)
