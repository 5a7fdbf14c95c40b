"""Bipartite matching between queries and true segments, and the set loss that it selects (paper 2.7).

    predictions p, m^final, m^aux, b^aux ──┐
                                           ├──> pairwise_terms: a number per term, slice, query and class
    truth c^gt, m^gt, b^gt ────────────────┘                     │
                                                ┌────────────────┴───────────────┐
                                       HungarianMatcher                     SetCriterion
                                  sigma, the cheapest assignment ──> the same terms, read at sigma

The loss of a matched pair is exactly its cost. The loss adds one term for unmatched queries ("no object"),
which the matching does not see. A slice has at most one segment per class, so the class id is the index of a
segment, and one matrix product compares all queries of a slice with all its segments. Usage:

    loss, terms = SetCriterion()(model(volume), label_map_to_segments(labels, num_classes))
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

# Release: one weight per term, for cost and loss alike. AMOS has 1.2 for the two terms of the final mask.
TERM_WEIGHTS = {
    "class": 0.2,  # -log p
    "mask_bce": 1.5,  # L_mask^final
    "mask_dice": 1.5,
    "aux_mask_bce": 0.5,  # L_mask^aux
    "aux_mask_dice": 0.5,
    "box_l1": 0.5,  # L_box
    "box_giou": 0.2,
}
NO_OBJECT_WEIGHT = 0.1  # Release: DETR's number, which was made for 100 queries


class Segments(NamedTuple):
    """The truth z^gt of S slices, with one place per class (paper 2.2, "dataset mapping")."""

    masks: Tensor  # (S, K, H, W) bool
    boxes: Tensor  # (S, K, 4) x0, y0, x1, y1 in [0, 1], far edge exclusive, zeros where a class is absent
    present: Tensor  # (S, K) bool, whether the slice has a segment of the class


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Return the bounding boxes of binary masks, as fractions of the image.

    Ours: the far edge is exclusive. One pixel has the area of a pixel, a full mask has the box (0, 0, 1, 1).
    (..., H, W) bool -> (..., 4) float32 x0, y0, x1, y1 in [0, 1]; zeros where a mask is empty.
    """
    edges = []
    for axis in (-2, -1):  # `any` over rows gives the occupied columns (x), over columns the rows (y)
        occupied = masks.any(axis).to(torch.uint8)  # (..., W), then (..., H)
        length = occupied.shape[-1]
        first = occupied.argmax(-1)
        last = length - occupied.flip(-1).argmax(-1)
        edges.append((first / length, last / length))
    (x0, x1), (y0, y1) = edges
    empty = ~masks.flatten(-2).any(-1, keepdim=True)
    return torch.stack([x0, y0, x1, y1], dim=-1).float().masked_fill(empty, 0.0)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalised intersection over union (Rezatofighi et al. 2019) of boxes, with broadcasting.

    (..., 4) twice, x0, y0, x1, y1 with x0 <= x1 and y0 <= y1 -> (...) in [-1, 1]. Two boxes at one
    place without area give 0, not NaN.
    """

    def area(sides: Tensor) -> Tensor:  # (..., 2) -> (...); the backward pass of `prod` would wait for a GPU
        return sides[..., 0] * sides[..., 1]

    (low, high), (other_low, other_high) = boxes.split(2, dim=-1), others.split(2, dim=-1)
    inner = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    outer = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    intersection = area(inner.clamp(min=0))
    union = area(high - low) + area(other_high - other_low) - intersection
    hull = area(outer)
    tiny = torch.finfo(boxes.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def pairwise_mask_terms(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every query's mask with every class's mask, by binary cross-entropy and by soft Dice loss.

    Ours: all pixels count; the release samples points. For logit x, truth t: BCE = mean(softplus(x) - x t).
    Release: Dice is MaskFormer's, with 1 added to both parts of the fraction.

    Args:
        logits: (S, N, H', W'), resampled to (H, W) if the sizes differ.
        masks: (S, K, H, W) bool.
    Returns:
        bce (S, N, K) in nats per pixel, dice (S, N, K) in [0, 1].
    """
    if logits.shape[-2:] != masks.shape[-2:]:
        logits = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
    logits, truth = logits.flatten(2), masks.flatten(2).to(logits.dtype)  # (S, N, H*W), (S, K, H*W)
    bce = F.softplus(logits).mean(-1)[..., None] - logits @ truth.mT / logits.shape[-1]  # (S, N, K)
    probability = logits.sigmoid()
    overlap = probability @ truth.mT  # (S, N, K)
    sizes = probability.sum(-1)[..., None] + truth.sum(-1)[:, None]  # (S, N, K)
    return bce, 1 - (2 * overlap + 1) / (sizes + 1)


def pairwise_terms(outputs: dict[str, Tensor], segments: Segments) -> dict[str, Tensor]:
    """Compute every term of cost and loss for every slice, query and class, in float32 and with gradients.

    Args:
        outputs: of `MaskSAM`: class_logits (S, N, K+1), mask_logits (S, N, H', W') and, if the variant makes
            them, aux_mask_logits (S, N, H'', W'') and aux_boxes (S, N, 4).
        segments: the truth of the same S slices.
    Returns: (S, N, K) for each name of `TERM_WEIGHTS` that the outputs allow.
    """
    # -log p. Ours: the cost is the loss itself; DETR and the release take -p as the cost.
    terms = {"class": -outputs["class_logits"].float().log_softmax(-1)[..., :-1]}
    for prefix, key in (("mask", "mask_logits"), ("aux_mask", "aux_mask_logits")):  # L_mask^final, L_mask^aux
        if key in outputs:
            bce, dice = pairwise_mask_terms(outputs[key].float(), segments.masks)
            terms |= {f"{prefix}_bce": bce, f"{prefix}_dice": dice}
    if "aux_boxes" in outputs:  # L_box. Ours: of the learned box; the release takes the mean box of fig. 5d
        boxes = outputs["aux_boxes"].float()[:, :, None]  # (S, N, 1, 4)
        truth = segments.boxes[:, None]  # (S, 1, K, 4)
        terms["box_l1"] = (boxes - truth).abs().sum(-1)
        terms["box_giou"] = 1 - generalized_iou(boxes, truth)
    return terms


class HungarianMatcher:
    """Assign each true segment of a slice to one query, at the lowest sum of auxiliary and final costs."""

    def __init__(self, weights: dict[str, float]):
        self.weights = weights

    @torch.no_grad()
    def __call__(self, terms: dict[str, Tensor], present: Tensor) -> Tensor:
        """Find the assignment sigma of each slice.

        Args:
            terms: name -> (S, N, K) costs.
            present: (S, K) bool. An absent class gets no query.
        Returns:
            (S, N, K) bool with at most one True per query and exactly one per present class.
        Raises:
            ValueError: a slice has more segments than there are queries.
        """
        cost = sum(self.weights[name] * term for name, term in terms.items())  # (S, N, K)
        # `present` travels as one more row, so that each step copies from the device only once.
        table = torch.cat([cost, present[:, None].to(cost)], dim=1).cpu()  # (S, N + 1, K)
        cost, on_host = table[:, :-1], table[:, -1].bool()
        num_queries = cost.shape[1]
        if (most := int(on_host.sum(-1).max())) > num_queries:
            found = f"a slice has {most} segments but the model has {num_queries} queries"
            raise ValueError(f"{found}: raise --queries")
        # The loss or its gradient is not finite then, and train.py skips the step in all processes.
        cost = cost.nan_to_num(*[torch.finfo(cost.dtype).max] * 3)
        assigned = torch.zeros(cost.shape, dtype=torch.bool)
        for slice_index, classes in enumerate(on_host):
            (ids,) = classes.nonzero(as_tuple=True)
            query, column = linear_sum_assignment(cost[slice_index][:, ids].numpy())
            assigned[slice_index, query, ids[column]] = True
        if present.is_cuda:  # from pinned memory the copy does not wait
            assigned = assigned.pin_memory()
        return assigned.to(present.device, non_blocking=True)


class SetCriterion(nn.Module):
    """The set loss L_mask-box-cls: the class of every query, the masks and the box of every matched query.

    Args:
        weights: changes to `TERM_WEIGHTS`, by term name. Cost and loss share them.
        no_object_weight: weight of the class term of unmatched queries, relative to that of matched ones.
    """

    def __init__(self, weights: dict[str, float] | None = None, no_object_weight: float = NO_OBJECT_WEIGHT):
        super().__init__()
        self.matcher = HungarianMatcher(TERM_WEIGHTS | (weights or {}))
        self.no_object_weight = no_object_weight

    def forward(self, outputs: dict[str, Tensor], segments: Segments) -> tuple[Tensor, dict[str, Tensor]]:
        """Match, then read the same terms at the assignment.

        Args:
            outputs: as for `pairwise_terms`; with given boxes also asked, (S, K) bool: segments that count.
            segments: the truth of the same S slices.
        Returns:
            The weighted loss, a scalar with gradient, and the unweighted terms with "no_object", detached.
        """
        present = segments.present & outputs["asked"] if "asked" in outputs else segments.present
        terms = pairwise_terms(outputs, segments)
        assigned = self.matcher(terms, present)  # (S, N, K) bool, sigma
        # Divide by (all segments / ranks). DDP then averages over the ranks, so that the result is the sum
        # over all slices, divided by all segments.
        # Ours: the class term too is divided by that; the release divides it by the sum of its class weights.
        count, ranks = present.sum().float(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            ranks = dist.get_world_size()
        count = count.clamp(min=1.0) / ranks

        losses = {name: torch.where(assigned, term, 0.0).sum() / count for name, term in terms.items()}
        nothing = -outputs["class_logits"].float().log_softmax(-1)[..., -1]  # (S, N), -log p("no object")
        losses["no_object"] = torch.where(assigned.any(-1), 0.0, nothing).sum() / count
        weights = self.matcher.weights | {"no_object": self.matcher.weights["class"] * self.no_object_weight}
        loss = sum(weights[name] * value for name, value in losses.items())
        return loss, {name: value.detach() for name, value in losses.items()}
