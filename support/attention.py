"""SAM's attention over image tokens, exactly, in the form that is fast on each device (paper 2.5, fig. 4c).

    x (S, h, w, width) -- qkv -- windows -- scores + positions, softmax, values -- windows undone -- proj
                                            |
                     on a CPU:   attend_by_rows, a few rows of queries at a time
                     on a GPU:   attend_fused, positions folded into queries and keys

SAM adds to the score of query (y, x) and key (y', x') the terms q . Rh[y - y'] and q . Rw[x - x'] (relative
positions of ViTDet, Li et al. 2022). Both forms compute the same sum in another order.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.sam import window_partition, window_unpartition

FUSED_DEVICES = ("cuda",)
# Ours: bytes of scores that `attend_by_rows` makes at a time. glibc keeps freed blocks below 32 MiB for the
# next tensor. Larger blocks are fresh pages each time, and filling them takes as long as the matrix product.
SCORE_BYTES = 30 * 2**20


def attention(layer: nn.Module, x: Tensor, window: int = 0) -> Tensor:
    """Compute SAM's `Attention.forward`, with its windows.

    Ours: windows are cut after the linear layer `qkv` and put together before `proj`. SAM zero-pads the image
    before `qkv`, so that padded tokens become the bias of `qkv`. We pad with that bias directly and save the
    product. (S, h, w, width) -> same; `window` is its side in tokens, 0 for the whole image.
    """
    qkv, size = layer.qkv(x), x.shape[1:3]  # (S, h, w, 3 * width)
    if window:
        bias = layer.qkv.bias.to(qkv).expand(len(x), *(side + -side % window for side in size), -1)
        padded, padded_size = bias.clone(), bias.shape[1:3]
        padded[:, : size[0], : size[1]] = qkv
        qkv, _ = window_partition(padded, window)  # (R, window, window, 3 * width), R windows
    h, w = qkv.shape[1:3]
    heads = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    query, key, value = heads  # (R, heads, h, w, c) each
    rows, columns = relative_positions(layer.rel_pos_h, h), relative_positions(layer.rel_pos_w, w)
    by_row = torch.einsum("rnhwc,hkc->rnhwk", query, rows.to(qkv))  # q . Rh
    by_column = torch.einsum("rnhwc,wkc->rnhwk", query, columns.to(qkv))  # q . Rw
    attend = attend_fused if x.device.type in FUSED_DEVICES else attend_by_rows
    out = attend(query * layer.scale, key, value, by_row.to(query), by_column.to(query))
    out = out.movedim(1, 3).flatten(3)  # (R, h, w, width)
    return layer.proj(window_unpartition(out, window, padded_size, size) if window else out)


@lru_cache(maxsize=64)
def _offsets(size: int, device: torch.device) -> Tensor:
    """Return the table (size, size) of query index - key index + size - 1, made once per device."""
    place = torch.arange(size, device=device)
    return place[:, None] - place + (size - 1)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Look up the relative positions of every query and key along an axis of `size` tokens: (size, size, c).

    The table (2 * trained size - 1, c) is resampled if it was trained for another size.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    return table[_offsets(size, table.device)]


def attend_by_rows(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend with positions, a few rows of queries at a time, so that few of the (h * w)^2 scores are held.

    Args:
        query, key, value: (R, heads, h, w, c), like the result; the query is scaled.
        by_row, by_column: (R, heads, h, w, h or w), added to the scores of all keys of a row or a column.
    """
    heads, h, w = query.shape[1:4]
    bytes_per_image = heads * (h * w) ** 2 * query.element_size()
    images = max(1, SCORE_BYTES // bytes_per_image)
    if images < len(query):
        groups = zip(*(tensor.split(images) for tensor in (query, key, value, by_row, by_column)))
        return torch.cat([attend_by_rows(*group) for group in groups])
    rows = max(1, SCORE_BYTES * h // bytes_per_image)
    key, value, out = key.flatten(2, 3).contiguous().mT, value.flatten(2, 3).contiguous(), []

    def attend(part: Tensor, part_by_row: Tensor, part_by_column: Tensor) -> Tensor:
        # The first sum is a new tensor. An in-place sum on a view would make backward copy the gradient.
        scores = (part.flatten(2, 3) @ key).unflatten(-1, (h, w)) + part_by_row.flatten(2, 3)[..., :, None]
        scores += part_by_column.flatten(2, 3)[..., None, :]  # (R, heads, rows * w, h, w)
        return (scores.flatten(-2).softmax(-1).to(value) @ value).unflatten(2, (-1, w))

    recompute = rows < h and torch.is_grad_enabled()  # backward makes the scores again: few are held
    for parts in zip(*(tensor.split(rows, 2) for tensor in (query, by_row, by_column))):
        out.append(checkpoint(attend, *parts, use_reentrant=False) if recompute else attend(*parts))
    return torch.cat(out, dim=2)


@lru_cache(maxsize=64)
def _key_places(h: int, w: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (h, w, width): the one-hot codes of each token's row and column, then zeros up to `width`."""
    row = torch.eye(h, dtype=dtype, device=device)[:, None].expand(h, w, h)
    column = torch.eye(w, dtype=dtype, device=device)[None].expand(h, w, w)
    return F.pad(torch.cat([row, column], dim=-1), (0, width - h - w))


def attend_fused(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attend as `attend_by_rows` does, through torch's fused attention, which never holds the scores.

    Ours: the positions are folded into the product: [q, q Rh, q Rw] . [k, one-hot(y'), one-hot(x')] is the
    score with its positions. Zeros pad the folded width to a multiple of 8, which all kernels want.
    """
    h, w, c = query.shape[2:]
    spare = h + w + -(c + h + w) % 8
    places = _key_places(h, w, spare, key.dtype, key.device).expand(*key.shape[:2], -1, -1, -1)
    query = torch.cat([query, by_row, F.pad(by_column, (0, spare - h - w))], dim=-1).flatten(2, 3)
    key = torch.cat([key, places], dim=-1).flatten(2, 3)
    return fused_attention(query, key, value.flatten(2, 3)).unflatten(2, (h, w))


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Call `scaled_dot_product_attention` for a value (..., c) that may be narrower than query and key.

    Ours: flash attention wants one width for all, so zeros pad the value. cuDNN's kernel on an H100 does not.
    """
    narrow = query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability() >= (9, 0)
    wide = value if narrow else F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return F.scaled_dot_product_attention(query, key, wide, scale=1.0)[..., : value.shape[-1]]
