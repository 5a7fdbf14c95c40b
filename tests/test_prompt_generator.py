"""Claims about auxiliary masks, boxes and class tokens, and the prompts made of them (2.3, fig. 3b, 5)."""

import pytest
import torch
from torch import Tensor, nn

from prompt_generator import GivenBoxes, PromptGenerator, level_sizes, resize

S, N, DIM, TAPS = 4, 4, 32, [8, 16, 24, 40]  # different widths, so that no tap can take the place of another
GRID, PATCH, MASK = (4, 6), (30, 44), (16, 24)
close = torch.testing.assert_close


def generator(form="d", mask_prompt="logits", grid=GRID, patch=PATCH, depth=None) -> PromptGenerator:
    torch.manual_seed(0)
    return PromptGenerator(DIM, TAPS, grid, patch, N, form, mask_prompt, depth=depth)


def features(grid=GRID, scale: float = 1.0) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [scale * torch.randn(S, dim, *grid, generator=random) for dim in (DIM, *TAPS)]


def run(module: PromptGenerator, inputs: list[Tensor] | None = None) -> dict[str, Tensor]:
    neck, *taps = inputs or features()
    return module(neck, taps)


def test_levels_double_last_and_end_at_the_patch():
    for grid, patch, scales, expected in (
        (64, 256, None, [64, 64, 64, 128, 256]),  # ACDC at 1024
        (32, 512, None, [32, 64, 128, 256, 512]),  # AMOS at 512
        (64, 40, None, [64] * 5),  # a patch below the grid: the mask head's output is resampled
        (6, 44, None, [6, 6, 12, 24, 44]),  # no multiple
        (4, 512, None, [4, 8, 16, 32, 64]),  # more doublings than levels
        (16, 48, (1, 1, 1, 2, 4), [16, 16, 16, 32, 48]),  # taps that are a pyramid
    ):
        assert level_sizes((grid, grid), (patch, patch), 5, scales) == [(side, side) for side in expected]
    assert level_sizes((7, 5), (52, 36), 6, (1, 1, 1, 2, 4, float("inf")))[4:] == [(28, 20), (52, 36)]
    assert level_sizes((4, 6), (30, 44), 5) == [(4, 6), (4, 6), (8, 12), (16, 24), (30, 44)]


@pytest.mark.parametrize("form", "abcd")
def test_each_form_makes_what_it_needs_and_the_final_loss_reaches_its_heads(form):
    module, made = generator(form), {"mask_head": "aux_mask_logits", "box_head": "aux_boxes"}
    heads = {"a": {"mask_head"}, "b": {"box_head"}}.get(form, {"mask_head", "box_head"})
    out = run(module)
    assert {head for head in made if hasattr(module, head)} == heads
    assert out.keys() == {"class_tokens"} | {made[head] for head in heads}
    boxes, masks = module.prompts(out, MASK)
    # Any function of the prompts with a gradient everywhere stands for SAM's decoder and the final loss.
    (boxes.square().sum() + (0 if masks is None else masks.square().sum())).backward()
    assert all(p.grad.any() for head in heads for p in getattr(module, head).parameters())


@pytest.mark.parametrize("grid, patch", [(GRID, PATCH), ((8, 8), (5, 9)), ((1, 1), (16, 16))])
def test_predictions_have_the_patch_size_whatever_the_grid(grid, patch):
    out = run(generator(grid=grid, patch=patch), features(grid))
    sizes = {"aux_mask_logits": patch, "aux_boxes": (4,), "class_tokens": (DIM,)}
    assert {key: tuple(x.shape) for key, x in out.items()} == {key: (S, N, *sizes[key]) for key in sizes}


@pytest.mark.parametrize("depth, reached", [(None, [1]), (2, [0, 1])])
@pytest.mark.parametrize("source", range(6))
def test_the_neck_and_each_tap_reach_all_predictions_of_their_slice_or_volume_alone(source, depth, reached):
    how = [1, *TAPS], GRID, PATCH, N, "d", "logits", None, depth  # The slices are the lowest tap.
    module, (neck, *taps) = PromptGenerator(DIM, *how, fine=True).double(), features()
    assert not (silent := module.detail_head.weight).any() and nn.init.normal_(silent).any()
    inputs = [x.double() for x in (neck, torch.randn(S, 1, *PATCH), *taps)]
    before = run(module, inputs)
    inputs[source][1] += torch.randn_like(inputs[source][1])
    for key, value in run(module, inputs).items():
        change = (value - before[key]).abs().flatten(2).amax(-1)  # (S, N)
        others = [s for s in range(S) if s not in reached]
        assert change[reached].min() > 1e-5 and change[others].max() < 1e-12, key


@pytest.mark.parametrize("scale, bias", [(1e6, 0.0), (1e3, 1e4)])
def test_boxes_start_around_the_centre_and_are_a_corner_and_a_fraction_of_the_rest(scale, bias):
    module = generator()
    weight, offset = module.box_head[-1].weight.data, module.box_head[-1].bias.data
    start, kept = torch.tensor([0.25, 0.25, 0.75, 0.75]), weight.clone()
    weight.zero_()
    close(run(module)["aux_boxes"], start.expand(S, N, 4))
    offset.view(N, 4)[2] = torch.tensor([0.1, 0.6, 0.5, 0.25]).logit()
    boxes = run(module)["aux_boxes"]  # query 2 moves as a whole, and alone
    close(boxes[:, 2], torch.tensor([0.1, 0.6, 0.1 + 0.9 * 0.5, 0.6 + 0.4 * 0.25]).expand(S, 4))
    close(boxes[:, [0, 1, 3]], start.expand(S, 3, 4))
    weight.copy_(kept)
    offset += bias * torch.randn(4 * N)
    boxes = run(module, features(scale=scale))["aux_boxes"]  # ordered and inside for extreme inputs
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[..., :2] <= boxes[..., 2:]).all()


LEARNED = [[0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.7]]
RECTANGLE, WHOLE = [0.2, 0.2, 0.8, 0.5], [0.0, 0.0, 1.0, 1.0]
MEAN = [[0.3, 0.4, 0.8, 0.75], LEARNED[1], [0.25, 0.25, 0.8, 0.85]]  # the learned box if a mask is empty
EXPECTED = {"a": [RECTANGLE, WHOLE, WHOLE], "b": LEARNED, "c": LEARNED, "d": MEAN}


@pytest.mark.parametrize("form", "abcd")
def test_prompts_of_each_form_of_figure_5(form):
    """One slice and three queries on 10 x 20 pixels: a rectangle, nothing, everything."""
    logits = torch.full((1, 3, 10, 20), -4.0)
    logits[0, 0, 2:5, 4:16], logits[0, 2] = 4.0, 4.0
    aux = {"aux_mask_logits": logits, "aux_boxes": torch.tensor([LEARNED])}
    boxes, masks = generator(form).prompts(aux, (5, 10))
    binary_boxes, binary = generator(form, "binary").prompts(aux, (5, 10))
    close(boxes, torch.tensor([EXPECTED[form]]))
    assert torch.equal(binary_boxes, boxes)
    if form == "b":
        assert masks is None and binary is None
    else:  # logits, not probabilities, at SAM's size; or their sign
        assert torch.equal(masks, resize(logits, (5, 10))) and torch.equal(binary, (masks > 0).float())
    given = GivenBoxes.from_label_map((logits[:, 0] > 0) * 2, 3, 3)  # one of class 2, for the second query
    replaced, same_masks = generator(form).prompts(aux, (5, 10), given)
    close(replaced, torch.stack([boxes[:, 0], given.boxes[:, 1], boxes[:, 2]], dim=1))
    assert masks is None or torch.equal(same_masks, masks)


def test_prompts_are_float32_under_autocast_and_binary_masks_cut_off_the_mask_head_alone():
    module = generator("d", "binary")  # bfloat16 keeps 8 bits: a corner in 1024 pixels would be off by four
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aux = run(module)
    boxes, masks = module.prompts(aux, MASK)
    assert {x.dtype for x in (aux["aux_boxes"], boxes, masks)} == {torch.float32}
    boxes.sum().backward()
    assert not masks.requires_grad and all(p.grad.any() for p in module.box_head.parameters())


def test_a_given_box_goes_to_the_query_of_its_class_with_its_label_and_its_segment_is_asked_for():
    labels = torch.zeros(2, 8, 10)  # three classes with background, five queries; nothing in the second slice
    labels[0, 2:4, 5:10], labels[0, 6, 0] = 1, 2
    given = GivenBoxes.from_label_map(labels, 3, 5)
    close(given.boxes[0, :2], torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.0, 0.75, 0.1, 0.875]]))
    assert not given.boxes[0, 2:].any() and not given.boxes[1].any()
    rest, first, second = [True, False, False, True], [False, True, False, True], [False, False, True, True]
    assert given.allowed.tolist() == [[first, second, rest, rest, rest], [rest] * 5]
    assert given.asked.tolist() == [[True, True, True], [True, False, False]], "background always is"
    logits = given.restrict(torch.zeros(2, 5, 4, dtype=torch.float16))
    assert torch.equal(logits == 0, given.allowed) and logits.isfinite().all() and logits.min() < -9000
