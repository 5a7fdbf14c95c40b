"""Muon: what it makes of a matrix, and which parameters it leaves to AdamW."""

import copy

import pytest
import torch
from torch import nn

from support.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), False)
    values = torch.logspace(0, -1.5, min(shape))
    made = u.T @ orthogonalise((1e3 * u * values @ v)[None])[0] @ v.T  # of any length
    assert made.diag().min() > 0.6 and made.diag().max() < 1.3
    torch.testing.assert_close(made, made.diag().diag(), atol=1e-4, rtol=0)


def test_matrices_move_by_a_fifth_of_the_rate_and_all_else_as_by_adamw():
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.LayerNorm(16), nn.Linear(16, 12), nn.Linear(12, 3))
    net.register_parameter("tokens", nn.Parameter(torch.randn(9, 12)))
    start, other = copy.deepcopy(net), copy.deepcopy(net)
    options = {"lr": 0.01, "weight_decay": 0.1, "fused": True}
    optimizer = Muon(net.named_parameters(), **options)
    adamw = torch.optim.AdamW(other.parameters(), **options)
    for one, two in zip(net.parameters(), other.parameters()):
        one.grad, two.grad = (gradient := torch.randn_like(one)), gradient.clone()
    optimizer.step(), adamw.step()
    for (name, value), two, old in zip(net.named_parameters(), other.parameters(), start.parameters()):
        assert torch.equal(value, two) == (name not in ("0.weight", "2.weight")), name
        step = (value - (1 - 0.01 * 0.1) * old).square().mean().sqrt() / 0.01
        assert 0.6 * 0.2 < step < 1.3 * 0.2 if name in ("0.weight", "2.weight") else step > 0.9
