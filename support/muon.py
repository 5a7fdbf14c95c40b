"""Muon, an optimizer that learns faster than AdamW from random weights (for the schedules of paper 3).

gradient of a matrix ── mean over steps ──> M = U S V^T ── orthogonalise ──> step along about U V^T

A matrix then learns as fast in directions of small gradients as in those of large ones.
Source: K. Jordan et al., kellerjordan.github.io/posts/muon, 2024. The length of a step is that of J. Liu et
al., Muon is Scalable for LLM Training, 2025: AdamW's learning rate and weight decay then serve for both.
"""

import torch
from torch import Tensor

MOMENTUM = 0.95  # Jordan et al.; so are the coefficients and the number of iterations below
STEP = 0.2  # Liu et al.: the root mean square of a step, as AdamW's, in learning rates
SMALLEST = 8  # Ours: a weight with a smaller side is left to AdamW


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix (m, n) with its singular values brought near 1: between 0.7 and 1.2, or still near 0.

    Ours: in float32. `torch.optim.Muon` computes in bfloat16, which takes CPUs without it six times as long.
    """
    x = matrix / (matrix.norm() + 1e-7)
    x = x.mT if (high := len(x) > len(x.mT)) else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if high else x


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for the weights of linear layers and convolutions.

    Its arguments are those of AdamW, with the names of the parameters. Such a weight is the matrix of its
    first axis and all others. Biases, tokens, embeddings and positions stay with AdamW.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step. The gradients of matrices are None afterwards, so that AdamW leaves them out."""
        (group,) = self.param_groups
        for name, weight in zip(group["param_names"], group["params"]):
            small = weight.ndim < 2 or min(weight.flatten(1).shape) < SMALLEST
            if small or weight.grad is None or not name.endswith("weight"):
                continue
            if not (state := self.state[weight]):  # AdamW wants a "step" in every state that it loads.
                state |= {"step": torch.zeros(()), "mean": torch.zeros_like(weight)}
            state["mean"].lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonalise(weight.grad.lerp(state["mean"], MOMENTUM).flatten(1))
            length = group["lr"] * STEP * max(update.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(length * update.view_as(weight))
            weight.grad = None
        super().step(closure)
