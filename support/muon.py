"""Muon, an optimizer that learns faster than AdamW from random weights (for the schedules of paper 3).

gradient of a matrix ── mean over steps ──> M = U S V^T ── orthogonalise ──> step along about U V^T

A matrix then learns as fast in directions of small gradients as in those of large ones.
Source: K. Jordan et al., kellerjordan.github.io/posts/muon, 2024. The length of a step is that of J. Liu et
al., Muon is Scalable for LLM Training, 2025: AdamW's learning rate and weight decay then serve for both.
"""

import collections

import torch
from torch import Tensor

MOMENTUM = 0.95  # Jordan et al.; so are the coefficients and the number of iterations below
STEP = 0.2  # Liu et al.: the root mean square of a step, as AdamW's, in learning rates
SMALLEST = 8  # Ours: a weight with a smaller side is left to AdamW


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each of k matrices (k, m, n) near 1: between 0.7 and 1.2, or still near 0.

    Ours: in float32 (`torch.optim.Muon`: in bfloat16, one by one, six times slower on CPUs without it),
    and the iterations X <- P X act on X X^T and on the product of all P, which are small.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if (high := x.shape[1] > x.shape[2]) else x
    gram, product = x @ x.mT, (eye := torch.eye(x.shape[1], dtype=x.dtype, device=x.device))
    for _ in range(5):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        gram, product = factor @ gram @ factor, factor @ product
    x = product @ x
    return x.mT if high else x


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for the weights of linear layers and convolutions.

    Its arguments are those of AdamW, with the names of the parameters. Such a weight is the matrix of its
    first axis and all others. Biases, tokens, embeddings and positions stay with AdamW.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Take one step. The gradients of matrices are None afterwards, so that AdamW leaves them out."""
        (group,), by_shape = self.param_groups, collections.defaultdict(list)
        for name, weight in zip(group["param_names"], group["params"]):
            shape = weight.flatten(1).shape if weight.ndim > 1 else (0,)
            if weight.grad is not None and name.endswith("weight") and min(shape) >= SMALLEST:
                by_shape[shape].append(weight)
        for shape, weights in by_shape.items():
            updates = orthogonalise(torch.stack([self.mean(weight) for weight in weights]))
            length = group["lr"] * STEP * max(shape) ** 0.5
            for weight, update in zip(weights, updates):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(length * update.view_as(weight))
                weight.grad = None
        super().step()

    def mean(self, weight: Tensor) -> Tensor:
        """Add the gradient to the mean over steps; return the matrix (m, n) that Nesterov's step takes."""
        if "mean" not in (state := self.state[weight]):  # AdamW wants a "step" in every state that it loads.
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(weight)}
        state["mean"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["mean"], MOMENTUM).flatten(1)
