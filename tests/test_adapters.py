"""Claims about the bottleneck adapters (paper 2.4, fig. 4, table 4)."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
from adapters import DepthConvAdapter, DepthMLPAdapter, VanillaAdapter
from networks import wake

B6, B7 = adapters.DepthMLPAfterUpAdapter, adapters.DepthMLPBeforeDownAdapter
B, D, N, H, W, C = 2, 4, 3, 4, 5, 16
all_kinds = pytest.mark.parametrize("kind", [VanillaAdapter, DepthMLPAdapter, DepthConvAdapter, B6, B7])
close = torch.testing.assert_close


def rows(depth: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B * depth * N, H, W, C, dtype=torch.float64, generator=generator)


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return wake(module.double(), std=0.5)


@all_kinds
def test_a_fresh_adapter_returns_its_input_and_zeros_without_its_skip(kind):
    adapter, without = kind(C, D).double(), kind(C, D, skip=False).double()
    assert adapter.down.out_features == C // 4
    assert torch.equal(adapter(rows(), N), rows()) and not without(rows(), N).any()
    awake, awake_without = randomised(adapter), randomised(without)
    close(awake(rows(), N), rows() + awake_without(rows(), N))


@all_kinds
def test_an_impulse_reaches_exactly_the_voxels_that_the_paper_says(kind):
    adapter, b, n, y, x = randomised(kind(C, D)), 1, 1, 1, 2
    before = adapter(rows(), N)
    for d in range(D):
        moved = rows()
        moved.unflatten(0, (B, D, N))[b, d, n, y, x] += 1
        change = (adapter(moved, N) - before).abs().amax(-1).unflatten(0, (B, D, N))
        reached = torch.zeros(B, D, N, H, W, dtype=torch.bool)
        if kind is DepthConvAdapter:  # 3 x 3 x 3 around it, in its own volume and its own query
            reached[b, max(d - 1, 0) : d + 2, n, y - 1 : y + 2, x - 1 : x + 2] = True
        else:  # its place: in its own slice, or in every slice of its volume
            reached[b, d if kind is VanillaAdapter else slice(None), n, y, x] = True
        assert torch.equal(change > 1e-9, reached) and change[~reached].max() < 1e-13  # float64 rounding


@all_kinds
def test_tokens_need_no_grid_but_whole_volumes_of_one_slice_or_more(kind):
    adapter, x = randomised(kind(C, D)), rows()
    if kind is not DepthConvAdapter:
        close(adapter(x[:, 0], N), adapter(x, N)[:, 0])
    if kind is not VanillaAdapter:
        with pytest.raises(RuntimeError):
            adapter(x[: (D + 1) * N], N)
    assert randomised(kind(C, 1))(rows(depth=1), N).isfinite().all()


def test_depth_conv_equals_a_loop_over_voxels_with_layer_norm_and_gelu():
    layer, volumes = randomised(adapters.DepthConv(C, D)), rows().unflatten(0, (B, D, N))
    padded = F.pad(volumes.movedim(2, 1), (0, 0, 1, 1, 1, 1, 1, 1))  # (B, N, D + 2, H + 2, W + 2, C)
    total = layer.conv.bias.expand(B, N, D, H, W, C)
    for i, j, k in itertools.product(range(3), repeat=3):
        total = total + padded[:, :, i : i + D, j : j + H, k : k + W] * layer.conv.weight[:, 0, i, j, k]
    expected = volumes.movedim(2, 1) + F.gelu(F.layer_norm(total, (C,), layer.norm.weight, layer.norm.bias))
    close(layer(rows(), N), expected.movedim(1, 2).flatten(0, 2))


def test_table_4_places_a_linear_bottleneck_of_4_d_in_the_middle_behind_or_in_front():
    x, layer = rows(), randomised(adapters.DepthMLP(D))
    columns = x.unflatten(0, (B, D, N)).movedim(1, -1)  # (B, N, H, W, C, D)
    mixed = columns + layer.contract(F.gelu(layer.expand(columns)))
    close(layer(x, N), mixed.movedim(-1, 1).flatten(0, 2))
    assert layer.expand.weight.shape == (4 * D, D)
    middle, behind, front = (randomised(kind(C, D, skip=False)) for kind in (DepthMLPAdapter, B6, B7))
    close(middle(x, N), middle.up(middle.middle(F.gelu(middle.down(x)), N)))
    close(behind(x, N), behind.behind(behind.up(F.gelu(behind.down(x))), N))
    close(front(x, N), front.up(F.gelu(front.down(front.front(x, N)))))


@all_kinds
def test_bfloat16_autocast_stays_near_float32_and_every_weight_gets_a_gradient(kind):
    adapter = randomised(kind(C, D)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapter(rows().float(), N)
        out.float().square().mean().backward()
    expected = adapter(rows().float(), N)
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()  # 8 bits, large weights
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in adapter.parameters())
