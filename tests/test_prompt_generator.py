"""Claims about auxiliary masks, boxes and class tokens, and the prompts made of them (paper 2.3, fig. 3b, 5)."""

import pytest
import torch
from torch import Tensor

from prompt_generator import PROMPT_FORMS, PromptGenerator, boxes_of_classes, level_sizes, resize

S, N, DIM, WIDTH = 3, 4, 32, 24
GRID, PATCH = (4, 6), (30, 44)


def generator(form: str = "d", mask_prompt: str = "logits", grid=GRID, patch=PATCH) -> PromptGenerator:
    torch.manual_seed(0)
    return PromptGenerator(DIM, [WIDTH] * 4, grid, patch, N, form, mask_prompt)


def features(grid=GRID, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    neck, *taps = (scale * torch.randn(S, dim, *grid, generator=random) for dim in (DIM, *[WIDTH] * 4))
    return neck, taps


# ------------------------------------------------------------------------------------------------------ the predictions


@pytest.mark.parametrize(
    "grid, patch, expected",
    [
        ((64, 64), (256, 256), [(64, 64)] * 3 + [(128, 128), (256, 256)]),  # ACDC at 1024
        ((16, 16), (256, 256), [(16, 16), (32, 32), (64, 64), (128, 128), (256, 256)]),  # Synapse at 256
        ((32, 32), (512, 512), [(32, 32), (64, 64), (128, 128), (256, 256), (512, 512)]),  # AMOS at 512
        ((12, 10), (48, 40), [(12, 10)] * 3 + [(24, 20), (48, 40)]),
        ((16, 16), (16, 16), [(16, 16)] * 5),
        ((64, 64), (40, 48), [(64, 64)] * 5),  # a patch smaller than the grid: the mask head's output is resampled
        ((4, 6), (30, 44), [(4, 6), (8, 12), (16, 24), (30, 44)]),  # no multiple of anything
        ((4, 4), (512, 512), [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]),  # more doublings than levels
    ],
)
def test_levels_double_last_and_end_at_the_patch(grid, patch, expected):
    assert level_sizes(grid, patch, 5)[-len(expected) :] == expected
    assert level_sizes(grid, patch, 5)[0] == grid


@pytest.mark.parametrize("grid, patch", [((4, 6), (30, 44)), ((6, 5), (24, 20)), ((8, 8), (5, 9)), ((1, 1), (16, 16))])
def test_predictions_have_the_patch_size_whatever_the_grid(grid, patch):
    out = generator(grid=grid, patch=patch)(*features(grid))
    assert out["aux_mask_logits"].shape == (S, N, *patch)
    assert out["aux_boxes"].shape == (S, N, 4) and out["class_tokens"].shape == (S, N, DIM)


@pytest.mark.parametrize(
    "form, made",
    [("a", {"aux_mask_logits"}), ("b", {"aux_boxes"})] + [(f, {"aux_mask_logits", "aux_boxes"}) for f in "cd"],
)
def test_each_form_makes_what_it_needs_and_no_more(form, made):
    module = generator(form)
    assert module(*features()).keys() - {"class_tokens"} == made
    assert hasattr(module, "mask_head") == ("aux_mask_logits" in made)
    assert hasattr(module, "box_head") == ("aux_boxes" in made)
    assert set(PROMPT_FORMS) == set("abcd")


def test_slices_do_not_mix():
    module = generator().double()
    neck, taps = features()
    neck, taps = neck.double(), [tap.double() for tap in taps]
    before = module(neck, taps)
    moved = neck.clone()
    moved[1] += 1
    after = module(moved, taps)
    for key, value in after.items():
        changed = (value - before[key]).flatten(1).abs().amax(-1)
        assert (changed > 1e-6).tolist() == [False, True, False], key


@pytest.mark.parametrize("source", range(5))
def test_every_tap_and_the_neck_reach_every_prediction(source):
    module = generator()
    neck, taps = features()
    inputs = [neck, *taps]
    before = module(inputs[0], inputs[1:])
    inputs[source] = inputs[source] + torch.randn_like(inputs[source])
    after = module(inputs[0], inputs[1:])
    for key, value in after.items():
        assert (value - before[key]).flatten(1).abs().amax(-1).min() > 1e-4, key


def test_deepest_tap_joins_first():
    # Only the widths tell the taps apart: the level next to the neck must take the last tap.
    torch.manual_seed(0)
    module = PromptGenerator(DIM, [8, 16, 24, 40], GRID, PATCH, N)
    assert [level.tap.in_channels for level in module.levels] == [40, 24, 16, 8]
    neck, _ = features()
    module(neck, [torch.randn(S, dim, *GRID) for dim in (8, 16, 24, 40)])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0, 1e4, -1e4])
def test_boxes_are_ordered_and_inside_for_extreme_inputs(scale, bias):
    module = generator()
    with torch.no_grad():
        module.box_head[-1].bias += bias * torch.randn(4 * N)
        module.box_head[-1].weight *= 1 + scale
    boxes = module(*features(scale=scale))["aux_boxes"]
    assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= 1).all()
    assert (boxes[..., :2] <= boxes[..., 2:]).all()


def test_fresh_boxes_lie_around_the_centre():
    module = generator()
    with torch.no_grad():
        module.box_head[-1].weight.zero_()
    expected = torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(S, N, 4)
    torch.testing.assert_close(module(*features())["aux_boxes"], expected)


def test_a_querys_box_can_move_as_a_whole():
    # The release normalises the boxes of a query over the batch's features: there no bias can move them all.
    module = generator()
    before = module(*features())["aux_boxes"]
    with torch.no_grad():
        module.box_head[-1].bias.view(N, 4)[2, 0] += 2.0  # x0, with the same share of what is left for the width
    after = module(*features())["aux_boxes"]
    assert (after - before)[:, 2, [0, 2]].min() > 0.02, "both x of query 2 move right, in every slice"
    torch.testing.assert_close(after[:, 2, [1, 3]], before[:, 2, [1, 3]])
    others = [0, 1, 3]
    torch.testing.assert_close(after[:, others], before[:, others])


def test_box_is_read_as_corner_and_share_of_the_rest():
    module = generator()
    x0, y0, width, height = 0.1, 0.6, 0.5, 0.25
    with torch.no_grad():
        module.box_head[-1].weight.zero_()
        module.box_head[-1].bias.copy_(torch.tensor([x0, y0, width, height]).logit().repeat(N))
    expected = torch.tensor([x0, y0, x0 + (1 - x0) * width, y0 + (1 - y0) * height]).expand(S, N, 4)
    torch.testing.assert_close(module(*features())["aux_boxes"], expected)


def test_boxes_are_float32_under_autocast():
    # bfloat16 keeps 8 bits: the corner of a box of 1024 pixels would be off by four.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generator()(*features())
    assert out["aux_boxes"].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- the prompts


def hand_made() -> dict[str, Tensor]:
    """One slice, three queries on 10 x 20 pixels: a rectangle, nothing, everything; learned boxes of known corners."""
    logits = torch.full((1, 3, 10, 20), -4.0)
    logits[0, 0, 2:5, 4:16] = 4.0
    logits[0, 2] = 4.0
    learned = torch.tensor([[[0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.7]]])
    return {"aux_mask_logits": logits, "aux_boxes": learned}


RECTANGLE, WHOLE = [0.2, 0.2, 0.8, 0.5], [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "form, expected",
    [
        ("a", [RECTANGLE, WHOLE, WHOLE]),  # an empty mask: the whole slice
        ("b", [[0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.7]]),
        ("c", [[0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.7]]),
        ("d", [[0.3, 0.4, 0.8, 0.75], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.8, 0.85]]),  # empty: the learned box alone
    ],
)
@pytest.mark.parametrize("mask_prompt", ["logits", "binary"])
def test_box_prompt_of_each_form(form, expected, mask_prompt):
    boxes, masks = generator(form, mask_prompt).prompts(hand_made(), (10, 20))
    torch.testing.assert_close(boxes[0], torch.tensor(expected))
    assert (masks is None) == (form == "b")


@pytest.mark.parametrize("form", "acd")
def test_mask_prompt_is_the_masks_logits_or_their_sign_at_sams_size(form):
    aux = hand_made()
    _, logits = generator(form).prompts(aux, (5, 10))
    torch.testing.assert_close(logits, resize(aux["aux_mask_logits"], (5, 10)))
    assert logits.min() < -3, "logits, not probabilities"
    _, binary = generator(form, "binary").prompts(aux, (5, 10))
    assert torch.equal(binary, (logits > 0).float()) and set(binary.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "form, heads", [("a", {"mask"}), ("b", {"box"}), ("c", {"mask", "box"}), ("d", {"mask", "box"})]
)
def test_final_loss_reaches_the_heads_through_the_prompts(form, heads):
    module = generator(form)
    boxes, masks = module.prompts(module(*features()), (16, 24))
    # Any function of the prompts with a gradient everywhere stands for SAM's decoder and the final loss.
    (boxes.square().sum() + (0 if masks is None else masks.square().sum())).backward()
    for head in heads:
        gradient = getattr(module, f"{head}_head").parameters()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in gradient), head


def test_binary_mask_prompt_cuts_the_mask_head_off_but_not_the_box_head():
    module = generator("d", "binary")
    boxes, masks = module.prompts(module(*features()), (16, 24))
    assert not masks.requires_grad
    boxes.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.box_head.parameters())


def test_prompts_are_float32_with_boxes_of_every_slice_and_query():
    module = generator()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aux = module(*features())
    boxes, masks = module.prompts(aux, (16, 24))
    assert boxes.dtype == masks.dtype == torch.float32
    assert boxes.shape == (S, N, 4) and masks.shape == (S, N, 16, 24)


# --------------------------------------------------------------------------------------------------------- given boxes


def test_the_box_of_a_class_goes_to_its_own_query_with_its_label():
    """Classes 1 and 2 in the first slice, none in the second; three classes with background, four queries."""
    labels = torch.zeros(2, 8, 10, dtype=torch.long)
    labels[0, 2:4, 5:10], labels[0, 6, 0] = 1, 2
    boxes, allowed = boxes_of_classes(labels, 3, 4)
    assert torch.allclose(boxes[0, 0], torch.tensor([0.5, 0.25, 1.0, 0.5]))
    assert torch.allclose(boxes[0, 1], torch.tensor([0.0, 0.75, 0.1, 0.875]))
    assert not boxes[0, 2:].any() and not boxes[1].any()
    background, first, second = [True, False, False, True], [False, True, False, True], [False, False, True, True]
    assert allowed[0].tolist() == [first, second, background, background]
    assert allowed[1].tolist() == [background] * 4


@pytest.mark.parametrize("form", PROMPT_FORMS)
def test_a_given_box_replaces_the_generated_one_and_no_other(form):
    module = generator(form)
    aux = module(*features())
    given = torch.zeros(S, N, 4)
    given[1, 2] = torch.tensor([0.1, 0.2, 0.7, 0.9])
    boxes, masks = module.prompts(aux, (16, 24), given)
    own_boxes, own_masks = module.prompts(aux, (16, 24))
    changed = (boxes != own_boxes).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]] and torch.equal(boxes[1, 2], given[1, 2])
    assert (masks is None and form == "b") or torch.equal(masks, own_masks)
