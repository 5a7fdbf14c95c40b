"""support/attention.py: both forms are SAM's own attention, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks import wake
from support import attention as A
from support.sam import modeling

ROW = 4 * 20 * (16 * 20) * 8  # bytes of the scores of one row of 16 x 20 tokens, 4 heads, in float64


@pytest.mark.parametrize("window", [7, 0], ids=["windows", "global"])
@pytest.mark.parametrize("form, score_bytes", [("fused", 0), ("rows", 1), ("rows", 3 * ROW)])
def test_attention_equals_sams_with_its_gradients(window, form, score_bytes, monkeypatch):
    # The windows of 7 do not divide 16 x 20 tokens. The global table of positions is resampled.
    monkeypatch.setattr(A, "FUSED_DEVICES", ("cpu",) if form == "fused" else ())
    monkeypatch.setattr(A, "SCORE_BYTES", score_bytes)
    block = modeling.image_encoder.Block(32, 4, use_rel_pos=True, window_size=window, input_size=(7, 7))
    wake(block.double())  # Positions and biases count.
    block.mlp = block.norm2 = torch.nn.Identity()  # leaves norm, windows, attention and its skip connection
    x = torch.randn(2, 16, 20, 32, dtype=torch.float64, requires_grad=True)
    expected = block(x) / 2  # the identity MLP doubles the sum
    found = x + A.attention(block.attn, block.norm1(x), window)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (found, expected)))


@pytest.mark.parametrize("shape", [(2, 4, 16, 20, 8), (9, 4, 7, 7, 8)])
@pytest.mark.parametrize("limit", [1, 3 * ROW, 32 * ROW])
def test_attention_by_rows_holds_few_scores_and_computes_them_twice_only_in_pieces(shape, limit, monkeypatch):
    monkeypatch.setattr(A, "SCORE_BYTES", limit)
    images, heads, h, w, c = shape
    made, softmax = [], Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: made.append(x.nbytes) or softmax(x, dim))
    inputs = [torch.randn(*shape[:4], n, dtype=torch.float64, requires_grad=True) for n in (c, c, c, h, w)]
    A.attend_by_rows(*inputs).sum().backward()
    scores, row = images * heads * (h * w) ** 2 * 8, heads * w * (h * w) * 8
    assert max(made) <= max(limit, row)  # one row is the smallest piece
    assert sum(made) == scores * (2 if row * h > limit else 1)


@pytest.mark.parametrize("h, w, c", [(7, 7, 8), (14, 14, 64), (13, 5, 16)])
def test_fused_widths_are_multiples_of_eight(h, w, c, monkeypatch):
    widths, name = [], "scaled_dot_product_attention"
    attend = getattr(F, name)
    monkeypatch.setattr(F, name, lambda q, *rest, **o: widths.append(q.shape[-1]) or attend(q, *rest, **o))
    A.attend_fused(*(torch.randn(1, 2, h, w, width) for width in (c, c, c, h, w)))
    assert widths == [8 * -(-(c + h + w) // 8)]
