"""Claims about boxes, pairwise terms, the assignment and the set loss (paper 2.7)."""

import itertools
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from matcher import (
    NO_OBJECT_WEIGHT,
    TERM_WEIGHTS,
    HungarianMatcher,
    Segments,
    SetCriterion,
    generalized_iou,
    masks_to_boxes,
    pairwise_mask_terms,
    pairwise_terms,
)

PARTS = ("class_logits", "mask_logits", "aux_mask_logits", "aux_boxes")


def segments_of(labels: Tensor, num_classes: int) -> Segments:
    """(S, H, W) ids; -1 belongs to no class."""
    masks = labels[:, None] == torch.arange(num_classes)[:, None, None]
    return Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def random_outputs(slices: int, queries: int, classes: int, size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    corner, fraction = randn(slices, queries, 4).sigmoid().split(2, dim=-1)
    return {
        "class_logits": randn(slices, queries, classes + 1),
        "mask_logits": randn(slices, queries, *size),
        "aux_mask_logits": randn(slices, queries, *size),
        "aux_boxes": torch.cat([corner, corner + (1 - corner) * fraction], dim=-1),
    }


def perfect_outputs(segments: Segments, queries: int) -> dict[str, Tensor]:
    """Query k says class k with its mask and box, as far as the class is there; the others say "no object"."""
    slices, classes, *size = segments.masks.shape
    logits = torch.full((slices, queries, *size), -30.0)
    logits[:, :classes] = torch.where(segments.masks, 30.0, -30.0)
    boxes = torch.zeros(slices, queries, 4)
    boxes[:, :classes] = segments.boxes
    ids = torch.full((slices, queries), classes)
    ids[:, :classes] = torch.where(segments.present, torch.arange(classes), classes)
    class_logits = 40.0 * F.one_hot(ids, classes + 1).float()
    return {"class_logits": class_logits, "mask_logits": logits, "aux_mask_logits": logits.clone(), "aux_boxes": boxes}


# ---------------------------------------------------------------------------------------------------------------- boxes


def test_masks_to_boxes_equals_loops_over_pixels():
    masks = torch.rand(3, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.08
    assert (~masks.flatten(2).any(-1)).any(), "the draw has an empty mask"
    boxes = masks_to_boxes(masks)
    for s, k in itertools.product(range(3), range(4)):
        rows, columns = masks[s, k].nonzero().T.tolist()
        expected = [0.0] * 4
        if rows:
            expected = [min(columns) / 7, min(rows) / 5, (max(columns) + 1) / 7, (max(rows) + 1) / 5]
        assert boxes[s, k].tolist() == pytest.approx(expected, abs=1e-7)  # float32 fractions


@pytest.mark.parametrize("y, x", [(0, 0), (3, 5), (2, 1)])
def test_box_of_one_pixel_has_the_area_of_one_pixel(y, x):
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[y, x] = True
    box = masks_to_boxes(mask)
    assert box.tolist() == pytest.approx([x / 6, y / 4, (x + 1) / 6, (y + 1) / 4])
    assert float((box[2:] - box[:2]).prod()) == pytest.approx(1 / 24, rel=1e-5)


def test_box_of_a_full_mask_is_the_image_and_of_an_empty_one_zero():
    assert masks_to_boxes(torch.ones(5, 3, dtype=torch.bool)).tolist() == [0, 0, 1, 1]
    assert masks_to_boxes(torch.zeros(5, 3, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_generalized_iou_by_hand():
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    cases = [
        ([0.2, 0.1, 0.7, 0.4], [0.2, 0.1, 0.7, 0.4], 1.0),  # the same
        ([0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], -0.5),  # corner to corner: union 0.5 of a hull of 1
        ([0.0, 0.0, 1.0, 0.5], unit.tolist(), 0.5),  # inside: the hull is the union
        ([0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0], 1 / 3),
        ([0.0, 0.0, 0.1, 1.0], [0.9, 0.0, 1.0, 1.0], -0.8),  # apart: intersection 0, hull 1, union 0.2
        ([0.0] * 4, unit.tolist(), 0.0),  # no area inside
        ([0.0] * 4, [0.0] * 4, 0.0),  # no area at all: not NaN
        ([0.3, 0.3, 0.3, 0.3], [0.6, 0.6, 0.6, 0.6], -1.0),
    ]
    for box, other, expected in cases:
        assert float(generalized_iou(torch.tensor(box), torch.tensor(other))) == pytest.approx(expected, abs=1e-6)


def test_generalized_iou_equals_counting_cells():
    # Boxes with corners on an 8 x 8 raster: areas are numbers of cells, counted one by one.
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 6, (12, 2), generator=generator)
    boxes = torch.cat([low, low + torch.randint(1, 3, (12, 2), generator=generator)], dim=-1)

    def cells(box):
        return set(itertools.product(range(int(box[0]), int(box[2])), range(int(box[1]), int(box[3]))))

    found = generalized_iou(boxes[:, None] / 8, boxes[None] / 8)
    for i, j in itertools.product(range(12), range(12)):
        a, b = cells(boxes[i]), cells(boxes[j])
        both = torch.stack([boxes[i], boxes[j]])
        hull = cells([*both[:, :2].amin(0), *both[:, 2:].amax(0)])
        expected = len(a & b) / len(a | b) - (len(hull) - len(a | b)) / len(hull)
        assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)


def test_generalized_iou_of_collapsed_boxes_has_a_finite_gradient():
    boxes = torch.zeros(3, 4, requires_grad=True)
    truth = torch.tensor([[0.0] * 4, [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]])
    generalized_iou(boxes, truth).sum().backward()
    assert boxes.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------- pairwise terms


def reference_terms(outputs: dict[str, Tensor], segments: Segments) -> dict[str, Tensor]:
    """The terms one pair at a time, in float64, from torch's own losses where there are such."""
    slices, classes, *size = segments.masks.shape
    queries = outputs["class_logits"].shape[1]
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
        out["box_giou"][s, n, k] = 1 - generalized_iou(box, true_box)
    return out


def test_pairwise_terms_equal_one_pair_at_a_time():
    labels = torch.randint(0, 3, (2, 6, 5), generator=torch.Generator().manual_seed(1))
    labels[1] = 0  # classes 1 and 2 absent: their columns exist all the same
    segments = segments_of(labels, 3)
    outputs = random_outputs(2, 4, 3, (6, 5))
    outputs["mask_logits"] = random_outputs(2, 4, 3, (3, 4), seed=5)["mask_logits"]  # another size: resampled
    terms, expected = pairwise_terms(outputs, segments), reference_terms(outputs, segments)
    assert terms.keys() == expected.keys() == TERM_WEIGHTS.keys()
    for name, term in terms.items():
        assert term.dtype == torch.float32
        # float32 against float64: sums of a few tens of terms near 10
        torch.testing.assert_close(term.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_terms_are_float32_whatever_autocast_left():
    outputs = {key: value.bfloat16() for key, value in random_outputs(1, 3, 2, (4, 4)).items()}
    terms = pairwise_terms(outputs, segments_of(torch.zeros(1, 4, 4), 2))
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_terms_of_parts_that_a_variant_does_not_make_are_left_out():
    outputs, segments = random_outputs(1, 3, 2, (4, 4)), segments_of(torch.zeros(1, 4, 4), 2)
    without = {"aux_mask_logits": {"aux_mask_bce", "aux_mask_dice"}, "aux_boxes": {"box_l1", "box_giou"}}
    for part, names in without.items():
        rest = {key: value for key, value in outputs.items() if key != part}
        assert pairwise_terms(rest, segments).keys() == TERM_WEIGHTS.keys() - names
        assert SetCriterion()(rest, segments)[0].isfinite()


def test_confident_logits_do_not_overflow():
    logits = torch.tensor([1e4, -1e4]).expand(1, 1, 1, 2)
    bce, dice = pairwise_mask_terms(logits, torch.tensor([[[[True, False]], [[False, True]]]]))
    assert bce[0, 0].tolist() == pytest.approx([0.0, 1e4])
    assert dice[0, 0].tolist() == pytest.approx([0.0, 1 - 1 / 3])  # wrong everywhere: (0 + 1) / (2 + 1)


# ----------------------------------------------------------------------------------------------------------- assignment


def random_task(queries: int, classes: int, seed: int, size: tuple[int, int] = (6, 6)):
    """Four slices: all classes there, some, one, none."""
    generator = torch.Generator().manual_seed(100 + seed)
    labels = torch.randint(0, classes, (4, *size), generator=generator)
    labels[0].view(-1)[:classes] = torch.arange(classes)
    labels[1][labels[1] == classes - 1] = 0
    labels[2] = classes - 1
    labels[3] = -1
    return random_outputs(4, queries, classes, size, seed), segments_of(labels, classes)


def cheapest(outputs, segments, weights, no_object_weight) -> tuple[float, list[float]]:
    """The loss and every slice's matched cost, by trying every way to give the segments to queries."""
    terms = reference_terms(outputs, segments)
    cost = sum(weights[name] * term for name, term in terms.items())
    nothing = -outputs["class_logits"].double().log_softmax(-1)[..., -1]
    per_slice, loss = [], 0.0
    for s, queries in enumerate([range(cost.shape[1])] * len(cost)):
        classes = segments.present[s].nonzero()[:, 0].tolist()
        tried = {
            p: sum(float(cost[s, n, k]) for n, k in zip(p, classes))
            for p in itertools.permutations(queries, len(classes))
        }
        best = min(tried, key=tried.get)
        per_slice.append(tried[best])
        rest = sum(float(nothing[s, n]) for n in queries if n not in best)
        loss += tried[best] + weights["class"] * no_object_weight * rest
    return loss / max(int(segments.present.sum()), 1), per_slice


@pytest.mark.parametrize("queries, classes, seed", [(3, 3, 0), (4, 3, 1), (5, 3, 2), (5, 4, 3), (2, 1, 4)])
def test_assignment_is_optimal_against_all_permutations(queries, classes, seed):
    outputs, segments = random_task(queries, classes, seed)
    terms = pairwise_terms(outputs, segments)
    assigned = HungarianMatcher(TERM_WEIGHTS)(terms, segments.present)
    assert torch.equal(assigned.sum(1), segments.present.long()), "each segment has one query, an absent class none"
    assert (assigned.sum(-1) <= 1).all(), "no query serves two segments"
    cost = sum(TERM_WEIGHTS[name] * term.double() for name, term in terms.items())
    found = torch.where(assigned, cost, 0.0).sum((1, 2)).tolist()
    assert found == pytest.approx(cheapest(outputs, segments, TERM_WEIGHTS, NO_OBJECT_WEIGHT)[1], rel=1e-5)


@pytest.mark.parametrize("weights", [{}, {"mask_bce": 1.2, "mask_dice": 1.2}, {"class": 7.0, "box_l1": 0.0}])
def test_loss_is_the_cost_at_the_assignment(weights):
    # If cost and loss had two tables, the loss would not be the minimum over permutations of its own terms.
    outputs, segments = random_task(4, 3, seed=6)
    loss, _ = SetCriterion(weights, no_object_weight=0.3)(outputs, segments)
    assert float(loss) == pytest.approx(cheapest(outputs, segments, TERM_WEIGHTS | weights, 0.3)[0], rel=1e-5)


def test_reported_terms_times_their_weights_are_the_loss():
    outputs, segments = random_task(4, 3, seed=7)
    loss, terms = SetCriterion()(outputs, segments)
    weights = TERM_WEIGHTS | {"no_object": TERM_WEIGHTS["class"] * NO_OBJECT_WEIGHT}
    assert terms.keys() == weights.keys() and not any(term.requires_grad for term in terms.values())
    assert sum(weights[name] * float(term) for name, term in terms.items()) == pytest.approx(float(loss), rel=1e-6)


def test_auxiliary_and_final_predictions_share_one_assignment():
    # Query 0 has the perfect auxiliary mask, query 1 the perfect final one; the final mask weighs three times as much.
    segments = segments_of(torch.tensor([[[0, 0], [-1, -1]]]), 1)
    good = torch.where(segments.masks, 9.0, -9.0)
    masks = {"aux_mask_logits": torch.cat([good, -good], 1), "mask_logits": torch.cat([-good, good], 1)}
    outputs = {"class_logits": torch.zeros(1, 2, 2), **masks}
    _, terms = SetCriterion()(outputs, segments)
    assert float(terms["mask_bce"]) < 1e-3 and float(terms["aux_mask_bce"]) == pytest.approx(9, abs=1e-3)
    _, terms = SetCriterion({"aux_mask_bce": 5.0})(outputs, segments)
    assert float(terms["aux_mask_bce"]) < 1e-3 and float(terms["mask_bce"]) == pytest.approx(9, abs=1e-3)


def test_perfect_prediction_costs_nothing():
    # A second sigmoid anywhere would leave a perfect mask at BCE 0.31 to 0.69.
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, 2:5, 3:7], labels[1, 6, 6] = 1, 2  # one pixel of class 2
    segments = segments_of(labels, 3)
    loss, terms = SetCriterion()(perfect_outputs(segments, queries=5), segments)
    for name, term in terms.items():
        assert abs(float(term)) < 1e-5, name  # float32 cancellation: softplus(30) - 30
    assert abs(float(loss)) < 1e-5


def test_inverted_masks_cost_much():
    segments = segments_of(torch.zeros(1, 8, 8, dtype=torch.long), 1)
    outputs = perfect_outputs(segments, queries=1)
    outputs["aux_mask_logits"] = -outputs["aux_mask_logits"]
    _, terms = SetCriterion()(outputs, segments)
    assert float(terms["aux_mask_bce"]) == pytest.approx(30) and float(terms["aux_mask_dice"]) > 0.98


def test_empty_slice_pays_for_classes_alone():
    outputs, _ = random_task(3, 2, seed=8)
    outputs = {key: value[:1].requires_grad_() for key, value in outputs.items()}
    segments = segments_of(torch.full((1, 6, 6), -1), 2)
    loss, terms = SetCriterion()(outputs, segments)
    nothing = -outputs["class_logits"].detach().log_softmax(-1)[..., -1].sum()
    assert float(loss.detach()) == pytest.approx(0.2 * 0.1 * float(nothing), rel=1e-6)
    assert all(float(term) == 0 for name, term in terms.items() if name != "no_object")
    loss.backward()  # every head gets a gradient, a zero one, or DDP waits for it for ever
    assert all(value.grad is not None and value.grad.isfinite().all() for value in outputs.values())
    assert outputs["class_logits"].grad.abs().sum() > 0 and outputs["mask_logits"].grad.abs().sum() == 0


def test_empty_slice_beside_a_full_one_does_not_change_its_assignment():
    outputs, segments = random_task(4, 3, seed=9)
    matcher = HungarianMatcher(TERM_WEIGHTS)
    together = matcher(pairwise_terms(outputs, segments), segments.present)
    alone = [
        matcher(
            pairwise_terms(
                {key: value[s : s + 1] for key, value in outputs.items()}, Segments(*(x[s : s + 1] for x in segments))
            ),
            segments.present[s : s + 1],
        )
        for s in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_more_segments_than_queries_is_an_error_that_says_both_numbers():
    outputs, segments = random_task(2, 3, seed=0)
    with pytest.raises(ValueError, match="3 segments .* 2 queries"):
        SetCriterion()(outputs, segments)


@pytest.mark.parametrize(
    "part, value, names",
    [
        ("class_logits", float("nan"), "class"),
        ("mask_logits", float("nan"), "mask_bce, mask_dice"),
        ("aux_mask_logits", float("inf"), "aux_mask_bce"),
        ("aux_boxes", float("nan"), "box_l1, box_giou"),
    ],
)
def test_cost_that_is_not_finite_is_an_error_that_names_the_term(part, value, names):
    outputs, segments = random_task(4, 3, seed=0)
    outputs[part][1, 2] = value
    with pytest.raises(ValueError, match=rf"not finite in: {names}\W"):
        SetCriterion()(outputs, segments)


def test_permuting_queries_permutes_the_assignment_and_leaves_the_loss():
    outputs, segments = random_task(5, 3, seed=10)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {key: value[:, order] for key, value in outputs.items()}
    matcher = HungarianMatcher(TERM_WEIGHTS)
    assigned, moved = (matcher(pairwise_terms(o, segments), segments.present) for o in (outputs, shuffled))
    assert torch.equal(moved, assigned[:, order])
    # The sum over queries runs in another order: float32 rounding.
    torch.testing.assert_close(SetCriterion()(shuffled, segments)[0], SetCriterion()(outputs, segments)[0])


def test_no_object_weight_scales_the_unmatched_queries_alone():
    outputs, segments = random_task(5, 3, seed=11)
    assigned = HungarianMatcher(TERM_WEIGHTS)(pairwise_terms(outputs, segments), segments.present)
    nothing = -outputs["class_logits"].log_softmax(-1)[..., -1]
    expected = float(nothing[~assigned.any(-1)].sum() / segments.present.sum())
    silent, paper, double = (float(SetCriterion(no_object_weight=w)(outputs, segments)[0]) for w in (0.0, 0.1, 0.2))
    assert paper - silent == pytest.approx(0.2 * 0.1 * expected, rel=1e-4)
    assert double - silent == pytest.approx(2 * (paper - silent), rel=1e-4)


def test_loss_is_normalised_by_the_number_of_segments():
    # The same slices twice: twice the terms, twice the segments.
    outputs, segments = random_task(4, 3, seed=12)
    twice = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in outputs.items()}
    doubled = Segments(*(x.repeat(2, *[1] * (x.dim() - 1)) for x in segments))
    torch.testing.assert_close(SetCriterion()(twice, doubled)[0], SetCriterion()(outputs, segments)[0])


def test_gradient_reaches_every_output_of_matched_queries_and_no_mask_of_others():
    outputs, segments = random_task(5, 3, seed=13)
    outputs = {key: value.requires_grad_() for key, value in outputs.items()}
    assigned = HungarianMatcher(TERM_WEIGHTS)(pairwise_terms(outputs, segments), segments.present).any(-1)
    SetCriterion()(outputs, segments)[0].backward()
    for part in PARTS:
        per_query = outputs[part].grad.flatten(2).abs().sum(-1)
        assert (per_query[assigned] > 0).all(), part
        assert (per_query[~assigned] > 0).all() if part == "class_logits" else (per_query[~assigned] == 0).all(), part


def test_assignment_and_loss_are_deterministic_with_ties():
    segments = segments_of(torch.tensor([[[0, 1], [2, 2]]]), 3)
    outputs = {
        key: value[:, :1].expand(-1, 5, *value.shape[2:]) for key, value in random_outputs(1, 1, 3, (2, 2)).items()
    }
    matcher = HungarianMatcher(TERM_WEIGHTS)
    first, second = (matcher(pairwise_terms(outputs, segments), segments.present) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first.sum(1), torch.ones(1, 3, dtype=torch.long))
    assert torch.equal(SetCriterion()(outputs, segments)[0], SetCriterion()(outputs, segments)[0])


# -------------------------------------------------------------------------------------------------------- two processes


def two_rank_tasks() -> list[tuple[dict[str, Tensor], Segments, list[list[int]]]]:
    """(outputs, segments, slices of each rank): uneven ranks, one segment in all, no segment in all."""
    outputs, segments = random_task(4, 3, seed=14)
    empty = segments.present & False
    single = empty.clone()
    single[2, 2] = True
    ranks = [[0, 1], [2, 3]]  # 5 or 6 segments against 1
    return [
        (outputs, segments, ranks),
        (outputs, segments._replace(present=single), ranks),
        (outputs, segments._replace(present=empty), ranks),
    ]


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for outputs, segments, ranks in two_rank_tasks():
        mine = {key: value[ranks[rank]].requires_grad_() for key, value in outputs.items()}
        loss, _ = SetCriterion()(mine, Segments(*(x[ranks[rank]] for x in segments)))
        loss.backward()
        results.append((loss.detach(), {key: value.grad for key, value in mine.items()}))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo")
def test_two_processes_pay_the_loss_of_one(tmp_path):
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    per_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for task, (outputs, segments, ranks) in enumerate(two_rank_tasks()):
        whole = {key: value.clone().requires_grad_() for key, value in outputs.items()}
        loss, _ = SetCriterion()(whole, segments)
        loss.backward()
        # DDP averages gradients over the two ranks. Float32: the sums run in another order.
        torch.testing.assert_close(sum(result[task][0] for result in per_rank) / 2, loss.detach(), msg=f"task {task}")
        for key, value in whole.items():
            halves = torch.zeros_like(value)
            for rank, result in enumerate(per_rank):
                halves[ranks[rank]] = result[task][1][key] / 2
            torch.testing.assert_close(halves, value.grad, msg=f"task {task}, {key}")
