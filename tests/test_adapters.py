"""Claims about the bottleneck adapters (paper 2.4, fig. 4; table 4): silent at first, and what reaches what."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import (
    DepthConv,
    DepthConvAdapter,
    DepthMLP,
    DepthMLPAdapter,
    DepthMLPAfterUpAdapter,
    DepthMLPBeforeDownAdapter,
    VanillaAdapter,
)

KINDS = [VanillaAdapter, DepthMLPAdapter, DepthConvAdapter, DepthMLPAfterUpAdapter, DepthMLPBeforeDownAdapter]
B, D, N, H, W, C = 2, 4, 3, 4, 5, 16


def rows(seed: int = 0, depth: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B * depth * N, H, W, C, dtype=torch.float64, generator=generator)


def randomised(module: nn.Module) -> nn.Module:
    """In float64 and without a silent layer."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapter_is_the_identity_with_skip_and_nothing_without(kind):
    x = rows()
    assert torch.equal(kind(C, D, skip=True).double()(x, N), x)
    assert torch.equal(kind(C, D, skip=False).double()(x, N), torch.zeros_like(x))


@pytest.mark.parametrize("kind", KINDS)
def test_skip_adds_the_input_once(kind):
    with_skip, without = randomised(kind(C, D, skip=True)), randomised(kind(C, D, skip=False))
    torch.testing.assert_close(with_skip(rows(), N), rows() + without(rows(), N))


@pytest.mark.parametrize("kind", KINDS)
def test_bottleneck_is_a_quarter_wide(kind):
    adapter = kind(C, D)
    assert adapter.down.weight.shape == (C // 4, C) and adapter.up.weight.shape == (C, C // 4)


@pytest.mark.parametrize("kind", KINDS)
def test_impulse_reaches_exactly_what_the_paper_says(kind):
    adapter = randomised(kind(C, D))
    x = rows()
    before = adapter(x, N).unflatten(0, (B, D, N))
    b, n, y, column = 1, 1, 1, 2
    for d in range(D):
        moved = x.clone()
        moved.unflatten(0, (B, D, N))[b, d, n, y, column] += 1
        after = adapter(moved, N).unflatten(0, (B, D, N))
        reached = torch.zeros(B, D, N, H, W, dtype=torch.bool)
        if kind is VanillaAdapter:  # nothing but itself
            reached[b, d, n, y, column] = True
        elif kind is DepthConvAdapter:  # 3 x 3 x 3 around it, in its volume and its query
            reached[b, max(d - 1, 0) : d + 2, n, y - 1 : y + 2, column - 1 : column + 2] = True
        else:  # its place in every slice
            reached[b, :, n, y, column] = True
        assert torch.equal((after - before).abs().amax(-1) > 1e-9, reached)
        # float64, the same kernels on the same shapes: what is not reached moves by rounding at most
        assert (after - before)[~reached].abs().max() < 1e-13


def test_depth_conv_equals_a_loop_over_voxels():
    channels = C // 4
    layer = randomised(DepthConv(channels, D))
    x = rows()[..., :channels]
    volumes = x.unflatten(0, (B, D, N))
    expected = torch.zeros_like(volumes)
    weight, bias = layer.conv.weight.detach()[:, 0], layer.conv.bias.detach()
    for z, y, column in itertools.product(range(D), range(H), range(W)):
        total = bias.expand(B, N, channels).clone()
        for i, j, k in itertools.product(range(3), repeat=3):
            at = z + i - 1, y + j - 1, column + k - 1
            if 0 <= at[0] < D and 0 <= at[1] < H and 0 <= at[2] < W:
                total += volumes[:, at[0], :, at[1], at[2]] * weight[:, i, j, k]
        normed = F.layer_norm(total, (channels,), layer.norm.weight, layer.norm.bias)
        expected[:, z, :, y, column] = volumes[:, z, :, y, column] + F.gelu(normed)
    torch.testing.assert_close(layer(x, N), expected.flatten(0, 2))


def test_depth_mlp_equals_a_linear_layer_on_each_column_of_slices():
    layer = randomised(DepthMLP(D))
    x = rows()
    assert layer.expand.weight.shape == (4 * D, D)
    columns = x.unflatten(0, (B, D, N)).movedim(1, -1)  # (B, N, H, W, C, D)
    mixed = columns + layer.contract(F.gelu(layer.expand(columns)))
    torch.testing.assert_close(layer(x, N), mixed.movedim(-1, 1).flatten(0, 2))


def test_table_4_places_the_depth_mlp_in_the_middle_behind_or_in_front():
    x = rows()
    middle, behind, front = (
        randomised(kind(C, D, skip=False))
        for kind in (DepthMLPAdapter, DepthMLPAfterUpAdapter, DepthMLPBeforeDownAdapter)
    )
    torch.testing.assert_close(middle(x, N), middle.up(middle.middle(F.gelu(middle.down(x)), N)))
    torch.testing.assert_close(behind(x, N), behind.behind(behind.up(F.gelu(behind.down(x))), N))
    torch.testing.assert_close(front(x, N), front.up(F.gelu(front.down(front.front(x, N)))))


def test_convolution_sees_no_slice_of_the_next_volume_and_pads_with_zeros():
    layer = randomised(DepthConv(C, D))
    x = rows()
    alone = torch.cat([layer(volume, N) for volume in x.chunk(B)])
    torch.testing.assert_close(layer(x, N), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_per_slice_fold_equals_one_call_per_query(kind):
    adapter = randomised(kind(C, D))
    x = rows()
    apart = [adapter(x.unflatten(0, (B * D, N))[:, n]) for n in range(N)]
    torch.testing.assert_close(adapter(x, N), torch.stack(apart, dim=1).flatten(0, 1))


@pytest.mark.parametrize("kind", [DepthMLPAdapter, DepthMLPAfterUpAdapter, DepthMLPBeforeDownAdapter])
def test_token_adapters_take_tokens_without_a_grid(kind):
    adapter = randomised(kind(C, D))
    tokens = rows()[:, 0]  # (B*D*N, T, C)
    torch.testing.assert_close(adapter(tokens, N), adapter(tokens[:, None], N)[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_slice_is_a_depth(kind):
    x = rows(depth=1)
    assert randomised(kind(C, 1))(x, N).isfinite().all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_rows_that_are_no_whole_volumes_are_refused(kind):
    with pytest.raises(RuntimeError):
        kind(C, D).double()(rows()[: (D + 1) * N], N)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_stays_near_float32_and_trains(kind):
    adapter = randomised(kind(C, D)).float()
    x = rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapter(x, N)
        out.float().square().mean().backward()
    # bfloat16 keeps 8 bits, and the weights here are large: a few per cent of the largest value.
    expected = adapter(x, N)
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in adapter.parameters())
