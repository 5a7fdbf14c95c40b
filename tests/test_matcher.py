"""Claims about boxes, pairwise terms, the assignment and the set loss (paper 2.7)."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import matcher
from data import label_map_to_segments
from matcher import TERM_WEIGHTS, HungarianMatcher, Segments, SetCriterion, masks_to_boxes, pairwise_terms

close = torch.testing.assert_close
Outputs = dict[str, Tensor]


def random_task(queries: int, classes: int, seed: int = 0) -> tuple[Outputs, Segments]:
    """Four slices on 6 x 6 pixels: all classes are there, some, one, none. Final masks have 3 x 4 pixels."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"class_logits": (classes + 1,), "mask_logits": (3, 4), "aux_mask_logits": (6, 6)}
    out = {key: 3 * torch.randn(4, queries, *size, generator=random) for key, size in shapes.items()}
    corner, extent = torch.rand(2, 4, queries, 2, generator=random)
    labels = torch.randint(0, classes, (4, 6, 6), generator=random)
    labels[0].view(-1)[:classes] = torch.arange(classes)
    labels[1][labels[1] == classes - 1] = 0
    labels[2], labels[3] = classes - 1, -1
    boxes = torch.cat([corner, corner + (1 - corner) * extent], dim=-1)
    return out | {"aux_boxes": boxes}, label_map_to_segments(labels, classes)


def pick(outputs: Outputs, segments: Segments, slices) -> tuple[Outputs, Segments]:
    return {key: value[slices] for key, value in outputs.items()}, Segments(*(x[slices] for x in segments))


def match(outputs: Outputs, segments: Segments) -> Tensor:
    return HungarianMatcher(TERM_WEIGHTS)(pairwise_terms(outputs, segments), segments.present)


def loss_of(outputs: Outputs, segments: Segments, **changes) -> Tensor:
    return SetCriterion(**changes)(outputs, segments)[0]


def test_masks_to_boxes_equals_loops_over_pixels_with_an_exclusive_far_edge():
    masks = torch.rand(12, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.08
    masks[0], masks[1], masks[2] = True, False, False
    masks[2, 3, 5] = True  # one pixel has the area of one pixel
    for mask, box in zip(masks, masks_to_boxes(masks)):
        rows, columns = mask.nonzero().T.tolist()
        expected = [0.0] * 4
        if rows:
            expected = [min(columns) / 7, min(rows) / 5, (max(columns) + 1) / 7, (max(rows) + 1) / 5]
        assert box.tolist() == pytest.approx(expected, abs=1e-7)  # float32 fractions


def test_generalized_iou_by_hand_and_its_gradient_is_finite_for_boxes_without_area():
    boxes, others, expected = zip(
        ([0.2, 0.1, 0.7, 0.4], [0.2, 0.1, 0.7, 0.4], 1.0),  # the same
        ([0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], -0.5),  # corner to corner: union 0.5 in a hull of 1
        ([0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0], 0.5),  # inside: the hull is the union
        ([0.0, 0.0, 0.1, 1.0], [0.9, 0.0, 1.0, 1.0], -0.8),  # apart: hull 1, union 0.2
        ([0.0] * 4, [0.0, 0.0, 1.0, 1.0], 0.0),  # no area inside
        ([0.0] * 4, [0.0] * 4, 0.0),  # no area at all: not NaN
        ([0.3] * 4, [0.6] * 4, -1.0),
    )
    boxes = torch.tensor(boxes, requires_grad=True)
    found = matcher.generalized_iou(boxes, torch.tensor(others))
    close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    found.sum().backward()
    assert boxes.grad.isfinite().all()


def reference_terms(outputs: Outputs, segments: Segments) -> Outputs:
    """The terms one pair at a time, in float64, from torch's own losses where there are such."""
    (slices, classes, *size), queries = segments.masks.shape, outputs["class_logits"].shape[1]
    out = {name: torch.zeros(slices, queries, classes, dtype=torch.float64) for name in TERM_WEIGHTS}
    for s, n, k in itertools.product(range(slices), range(queries), range(classes)):
        out["class"][s, n, k] = F.cross_entropy(outputs["class_logits"][s, n].double(), torch.tensor(k))
        truth = segments.masks[s, k].double()
        for name in ("mask", "aux_mask"):
            logits = outputs[f"{name}_logits"][s, n].double()
            logits = F.interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            out[f"{name}_bce"][s, n, k] = F.binary_cross_entropy_with_logits(logits, truth)
            p = logits.sigmoid()
            out[f"{name}_dice"][s, n, k] = 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
        box, true_box = outputs["aux_boxes"][s, n].double(), segments.boxes[s, k].double()
        out["box_l1"][s, n, k] = (box - true_box).abs().sum()
        out["box_giou"][s, n, k] = 1 - matcher.generalized_iou(box, true_box)
    return out


def test_pairwise_terms_equal_one_pair_at_a_time_in_float32_whatever_autocast_left():
    outputs, segments = random_task(4, 3)
    terms, expected = pairwise_terms(outputs, segments), reference_terms(outputs, segments)
    close({name: term.double() for name, term in terms.items()}, expected, rtol=1e-5, atol=1e-5)
    half = pairwise_terms({key: value.bfloat16() for key, value in outputs.items()}, segments)
    assert {term.dtype for term in (*terms.values(), *half.values())} == {torch.float32}
    outputs["mask_logits"] = torch.full((4, 4, 3, 4), 1e4)  # confident logits do not overflow
    assert all(term.isfinite().all() for term in pairwise_terms(outputs, segments).values())
    for part, prefix in (("aux_mask_logits", "aux_mask"), ("aux_boxes", "box")):  # that a variant lacks
        rest = pairwise_terms({key: value for key, value in outputs.items() if key != part}, segments)
        assert rest.keys() == {name for name in TERM_WEIGHTS if not name.startswith(prefix)}


def cheapest(outputs: Outputs, segments: Segments, weights, no_object_weight) -> float:
    """The loss, by trying every way to give the segments of each slice to queries."""
    cost = sum(weights[name] * term for name, term in reference_terms(outputs, segments).items())
    nothing, loss = -outputs["class_logits"].double().log_softmax(-1)[..., -1], 0.0
    for s in range(len(cost)):
        classes = segments.present[s].nonzero()[:, 0].tolist()
        tried = itertools.permutations(range(cost.shape[1]), len(classes))
        matched, best = min((sum(float(cost[s, n, k]) for n, k in zip(p, classes)), p) for p in tried)
        rest = nothing[s].sum() - nothing[s, list(best)].sum()
        loss += matched + weights["class"] * no_object_weight * float(rest)
    return loss / max(int(segments.present.sum()), 1)


WEIGHTS = [(3, 3, {}), (5, 4, {"mask_bce": 1.2, "mask_dice": 1.2}), (4, 3, {"class": 7.0, "box_l1": 0.0})]


@pytest.mark.parametrize("queries, classes, weights", [*WEIGHTS, (2, 1, {})])
def test_assignment_and_loss_are_the_cheapest_of_all_permutations(queries, classes, weights):
    # If cost and loss had two tables, the loss would not be the minimum over permutations of its own terms.
    outputs, segments = random_task(queries, classes, seed=queries)
    assigned = match(outputs, segments)
    assert torch.equal(assigned.sum(1), segments.present.long()), "a segment has one query, if it is there"
    assert (assigned.sum(-1) <= 1).all(), "no query serves two segments"
    ties = {key: value[:, :1].expand_as(value) for key, value in outputs.items()}
    assert torch.equal(match(ties, segments).sum(1), segments.present.long())
    for share, changes in ((0.0, {"no_object_weight": 0.0}), (matcher.NO_OBJECT_WEIGHT, {})):
        learned = {key: value.clone().requires_grad_() for key, value in outputs.items()}
        loss, terms = SetCriterion(weights, **changes)(learned, segments)
        assert loss.item() == pytest.approx(cheapest(outputs, segments, TERM_WEIGHTS | weights, share), 1e-5)
        total = TERM_WEIGHTS | weights  # the terms are reported without their weights
        total["no_object"] = share * total["class"]
        close(sum(total.pop(name) * term for name, term in terms.items()), loss.detach())
        assert not total and loss.requires_grad and not any(term.requires_grad for term in terms.values())


def test_auxiliary_and_final_predictions_share_one_assignment():
    # Query 0 has the perfect auxiliary mask, query 1 the perfect final one, which weighs three times as much.
    segments = label_map_to_segments(torch.tensor([[[0, 0], [-1, -1]]]), 1)
    good = torch.where(segments.masks, 9.0, -9.0)
    masks = {"aux_mask_logits": torch.cat([good, -good], 1), "mask_logits": torch.cat([-good, good], 1)}
    for weights, paid in (({}, "aux_mask_bce"), ({"aux_mask_bce": 5.0}, "mask_bce")):
        _, terms = SetCriterion(weights)({"class_logits": torch.zeros(1, 2, 2), **masks}, segments)
        for name in ("mask_bce", "aux_mask_bce"):
            assert float(terms[name]) == pytest.approx(9.0 if name == paid else 0.0, abs=1e-3)


@pytest.mark.parametrize("slices", [slice(0, 4), slice(3, 4)], ids=["all", "an empty slice"])
def test_gradients_reach_all_outputs_of_matched_queries_and_only_the_classes_of_others(slices):
    outputs, segments = pick(*random_task(5, 3, seed=13), slices)
    outputs = {key: value.clone().requires_grad_() for key, value in outputs.items()}
    matched = match(outputs, segments).any(-1)
    loss_of(outputs, segments).backward()  # a head without a gradient would make DDP wait for ever
    for key, value in outputs.items():
        assert torch.equal(value.grad.flatten(2).any(-1), matched | (key == "class_logits")), key


def test_a_segment_that_is_not_asked_for_is_as_if_it_were_absent():
    outputs, segments = random_task(4, 3, seed=5)
    asked = torch.tensor([True, False, True]).expand(4, 3)
    expected = SetCriterion()(outputs, segments._replace(present=segments.present & asked))
    close(SetCriterion()(outputs | {"asked": asked}, segments), expected, rtol=0, atol=0)
    assert expected[0] != loss_of(outputs, segments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["class_logits", "aux_mask_logits", "mask_logits", "aux_boxes"])
def test_a_number_that_is_not_finite_reaches_the_loss_or_its_gradient(part, value):
    outputs, segments = random_task(4, 3)
    outputs = {key: tensor.clone() for key, tensor in outputs.items()}
    outputs[part][segments.present.any(-1)] = value
    outputs = {key: tensor.requires_grad_() for key, tensor in outputs.items()}
    loss, terms = SetCriterion()(outputs, segments)
    loss.backward()
    numbers = [loss, *terms.values(), *(tensor.grad for tensor in outputs.values())]
    assert not all(number.isfinite().all() for number in numbers)


def test_too_few_queries_are_an_error_that_names_them():
    with pytest.raises(ValueError, match="3 segments but the model has 2 queries"):
        loss_of(*random_task(2, 3))


def test_a_step_copies_from_the_device_once_and_makes_no_tensor_elsewhere(monkeypatch):
    outputs, segments = random_task(4, 3)  # the meta device refuses every other copy, and every CPU tensor
    outputs = {key: value.to("meta").requires_grad_() for key, value in outputs.items()}
    outputs["asked"] = torch.ones(4, 3, dtype=torch.bool, device="meta")
    copies = []
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self) or torch.ones(self.shape))
    loss_of(outputs, Segments(*(x.to("meta") for x in segments))).backward()
    assert len(copies) == 1 and outputs["mask_logits"].grad.is_meta


@pytest.mark.parametrize("present", ["all", "one", "none"])
def test_the_mean_of_two_ranks_is_the_loss_and_the_gradient_of_one(monkeypatch, present):
    outputs, segments = random_task(4, 3, seed=14)  # tests/test_train.py runs two real processes
    if present != "all":
        segments = segments._replace(present=torch.zeros(4, 3, dtype=torch.bool))
        segments.present[2, 2] = present == "one"
    outputs = {key: value.requires_grad_() for key, value in outputs.items()}
    one = loss_of(outputs, segments)
    gradients = torch.autograd.grad(one, list(outputs.values()))
    total = segments.present.sum()
    monkeypatch.setattr(matcher.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(matcher.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(matcher.dist, "all_reduce", lambda count: count.copy_(total))
    mean = sum(loss_of(*pick(outputs, segments, rows)) for rows in ([0, 1], [2, 3])) / 2
    close([mean, *torch.autograd.grad(mean, list(outputs.values()))], [one, *gradients])
