"""Bipartite matching between queries and true segments, and the set loss that it selects (paper 2.7).

    outputs of the network ─┐
                            ├─ pairwise_terms ──> one cost per (slice, query, class) and term
    segments of the truth ──┘         │
                                      ├─ HungarianMatcher: sum of weight * term, lowest total per slice
                                      └─ SetCriterion: the same terms, read at the assignment

Cost and loss are the same numbers: what the assignment minimises is what is then paid. A slice has at most one segment
per class, so the class id is the segment's index and every slice of a batch is compared in the same matrix products.

Letters: S slices, N queries, K classes with background, H W pixels. "No object" is index K of the class logits.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

# One table for cost and loss (the authors' published constants; AMOS uses 1.2 for the two final mask terms).
TERM_WEIGHTS = {
    "class": 0.2,
    "mask_bce": 1.5,
    "mask_dice": 1.5,
    "aux_mask_bce": 0.5,
    "aux_mask_dice": 0.5,
    "box_l1": 0.5,
    "box_giou": 0.2,
}
NO_OBJECT_WEIGHT = 0.1


class Segments(NamedTuple):
    """The truth of S slices, one place per class (paper 2.2, "dataset mapping").

    masks: (S, K, H, W) bool. boxes: (S, K, 4) x0, y0, x1, y1 in [0, 1], far edge exclusive, zeros where absent.
    present: (S, K) bool, whether the slice has a segment of that class.
    """

    masks: Tensor
    boxes: Tensor
    present: Tensor


# ---------------------------------------------------------------------------------------------------------------- boxes


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Bounding boxes of binary masks, as fractions of the image.

    The far edge is exclusive: one pixel has an area of one pixel, and a full mask has the box (0, 0, 1, 1).

    Args:
        masks: (..., H, W) bool.
    Returns:
        (..., 4) float32 x0, y0, x1, y1 in [0, 1]; zeros where a mask is empty.
    """
    edges = []
    for axis in (-2, -1):  # reducing rows leaves the columns' extent, x; reducing columns leaves y
        occupied = masks.any(axis).to(torch.uint8)
        length = occupied.shape[-1]
        first = occupied.argmax(-1)
        last = length - occupied.flip(-1).argmax(-1)
        edges.append((first / length, last / length))
    (x0, x1), (y0, y1) = edges
    empty = ~masks.flatten(-2).any(-1, keepdim=True)
    return torch.stack([x0, y0, x1, y1], dim=-1).float().masked_fill(empty, 0.0)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019), element by element with broadcasting.

    Args:
        boxes, others: (..., 4) with x0 <= x1 and y0 <= y1.
    Returns:
        (...) in [-1, 1]; two boxes without area at the same place give 0, not NaN.
    """
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    hull_low, hull_high = torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    area, other_area = (boxes[..., 2:] - boxes[..., :2]).prod(-1), (others[..., 2:] - others[..., :2]).prod(-1)
    union = area + other_area - intersection
    hull = (hull_high - hull_low).prod(-1)
    tiny = torch.finfo(boxes.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


# -------------------------------------------------------------------------------------------------- pairwise terms, 2.7


def pairwise_mask_terms(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and soft Dice loss of every query's mask against every class's mask.

    Both are matrix products over pixels: BCE = mean softplus(x) - mean x t, and Dice as MaskFormer has it, with a
    smoothing of 1 in both parts of the fraction.

    Args:
        logits: (S, N, H', W'); resampled to (H, W) where it differs.
        masks: (S, K, H, W) bool.
    Returns:
        bce, dice: (S, N, K) each, bce in nats per pixel, dice in [0, 1].
    """
    if logits.shape[-2:] != masks.shape[-2:]:
        logits = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
    logits, truth = logits.flatten(2), masks.flatten(2).to(logits.dtype)
    bce = F.softplus(logits).mean(-1)[..., None] - logits @ truth.mT / logits.shape[-1]
    probability = logits.sigmoid()
    overlap = probability @ truth.mT
    sizes = probability.sum(-1)[..., None] + truth.sum(-1)[:, None]
    return bce, 1 - (2 * overlap + 1) / (sizes + 1)


def pairwise_terms(outputs: dict[str, Tensor], segments: Segments) -> dict[str, Tensor]:
    """Every term of cost and loss for every (slice, query, class), in float32 and differentiable.

    Args:
        outputs: of `MaskSAM`: class_logits (S, N, K + 1), mask_logits (S, N, H', W') and, as far as the variant makes
            them, aux_mask_logits (S, N, H'', W'') and aux_boxes (S, N, 4).
        segments: the truth of the same S slices.
    Returns:
        (S, N, K) for each name of `TERM_WEIGHTS` that the outputs allow.
    """
    # Ours: -log p as the class cost, as in the loss. DETR takes -p; then cost and loss would be two functions.
    terms = {"class": -outputs["class_logits"].float().log_softmax(-1)[..., :-1]}
    for prefix, key in (("mask", "mask_logits"), ("aux_mask", "aux_mask_logits")):
        if key in outputs:
            terms[f"{prefix}_bce"], terms[f"{prefix}_dice"] = pairwise_mask_terms(outputs[key].float(), segments.masks)
    if "aux_boxes" in outputs:
        boxes, truth = outputs["aux_boxes"].float()[:, :, None], segments.boxes[:, None]
        terms["box_l1"] = (boxes - truth).abs().sum(-1)
        terms["box_giou"] = 1 - generalized_iou(boxes, truth)
    return terms


# -------------------------------------------------------------------------------------------------------- matching, 2.7


class HungarianMatcher:
    """Assigns each true segment of a slice to one query, at the lowest sum of auxiliary and final costs.

    Args:
        weights: term name -> weight, as `TERM_WEIGHTS`.
    """

    def __init__(self, weights: dict[str, float]):
        self.weights = weights

    @torch.no_grad()
    def __call__(self, terms: dict[str, Tensor], present: Tensor) -> Tensor:
        """Solve every slice.

        Args:
            terms: name -> (S, N, K) costs.
            present: (S, K) bool; absent classes take no query.
        Returns:
            (S, N, K) bool, at most one True per row and exactly one per present class.
        Raises:
            ValueError: a slice has more segments than there are queries, or a cost is not finite.
        """
        cost = sum(self.weights[name] * term for name, term in terms.items())
        # The classes' presence travels as one more row, so that a step copies from the device once.
        table = torch.cat([cost, present[:, None].to(cost)], dim=1).cpu()
        cost, on_host = table[:, :-1], table[:, -1].bool()
        num_queries = cost.shape[1]
        if (most := int(on_host.sum(-1).max())) > num_queries:
            raise ValueError(f"a slice has {most} segments but the model has {num_queries} queries: raise --queries")
        if not cost.isfinite().all():
            names = [name for name, term in terms.items() if not term.isfinite().all()]
            raise ValueError(f"matching cost is not finite in: {', '.join(names)}. Lower the rate or use --amp bf16")
        assigned = torch.zeros(cost.shape, dtype=torch.bool)
        for slice_index, classes in enumerate(on_host):
            (ids,) = classes.nonzero(as_tuple=True)
            query, column = linear_sum_assignment(cost[slice_index][:, ids].numpy())
            assigned[slice_index, query, ids[column]] = True
        return assigned.to(present.device)


class SetCriterion(nn.Module):
    """The set loss L_mask-box-cls: class of every query, masks and box of every matched one.

    Args:
        weights: term name -> weight; the matcher reads the same table.
        no_object_weight: of the class term of unmatched queries.
    """

    def __init__(self, weights: dict[str, float] | None = None, no_object_weight: float = NO_OBJECT_WEIGHT):
        super().__init__()
        self.matcher = HungarianMatcher({**TERM_WEIGHTS, **(weights or {})})
        self.no_object_weight = no_object_weight

    def forward(self, outputs: dict[str, Tensor], segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        """Match, then read the same terms at the assignment.

        The sums are divided by the segments' mean number per rank: averaged over ranks, as DDP averages gradients,
        the loss is the sum over all slices divided by the number of all segments.

        Args:
            outputs, segments: as for `pairwise_terms`.
        Returns:
            The weighted loss, a scalar with gradient, and each unweighted term with "no_object", detached.
        """
        terms = pairwise_terms(outputs, segments)
        assigned = self.matcher(terms, segments.present)
        count, ranks = segments.present.sum().float(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            ranks = dist.get_world_size()
        count = count.clamp(min=1.0) / ranks

        losses = {name: torch.where(assigned, term, 0.0).sum() / count for name, term in terms.items()}
        nothing = -outputs["class_logits"].float().log_softmax(-1)[..., -1]
        losses["no_object"] = torch.where(assigned.any(-1), 0.0, nothing).sum() / count
        weights = self.matcher.weights | {"no_object": self.matcher.weights["class"] * self.no_object_weight}
        loss = sum(weights[name] * value for name, value in losses.items())
        return loss, {name: value.detach() for name, value in losses.items()}
