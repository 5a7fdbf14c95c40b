"""SAM's attention, exactly, in the form that is fast on this device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.sam import get_rel_pos, window_partition, window_unpartition

FUSED = ("cuda",)  # devices whose fused attention is worth its wider product
# Bytes of scores that other devices make at a time. glibc keeps what is freed below 32 MiB for the next tensor; larger
# ones are fresh pages each time, which take as long as the product that fills them.
MOST_SCORES = 30 * 2**20


def attention(layer: nn.Module, x: Tensor, window: int = 0) -> Tensor:
    """SAM's `Attention.forward` for image tokens, exactly.

    SAM adds to the score of query (y, x) and key (y', x') the terms q . Rh[y, y'] and q . Rw[x, x']; see the two
    functions below. Ours: windows are cut behind the linear layer `qkv` and put together before `proj`. SAM fills the
    last windows with zeros before the layer, of which it makes its bias; here the bias is what they are filled with.

    Args:
        layer: SAM's `Attention`. x: (S, h, w, C). window: side of the windows in tokens; 0 is one for the whole image.
    Returns:
        (S, h, w, C).
    """
    qkv, size = layer.qkv(x), x.shape[1:3]
    if window:
        bias = layer.qkv.bias.to(qkv).expand(len(x), *(side + -side % window for side in size), -1)
        padded, padded_size = bias.clone(), bias.shape[1:3]
        padded[:, : size[0], : size[1]] = qkv
        qkv, _ = window_partition(padded, window)
    h, w = qkv.shape[1:3]
    query, key, value = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    # Each is (R, heads, h, w, c), of R = S images or more windows.
    by_row = torch.einsum("rnhwc,hkc->rnhwk", query, get_rel_pos(h, h, layer.rel_pos_h).to(qkv))
    by_column = torch.einsum("rnhwc,wkc->rnhwk", query, get_rel_pos(w, w, layer.rel_pos_w).to(qkv))
    attend = attend_fused if x.device.type in FUSED else attend_by_rows
    out = attend(query * layer.scale, key, value, by_row.to(query), by_column.to(query))
    out = out.movedim(1, 3).flatten(3)
    return layer.proj(window_unpartition(out, window, padded_size, size) if window else out)


def attend_by_rows(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention with positions, some rows of queries at a time, so that few of the h*w x h*w scores are held.

    On a CPU it takes a third of the fused kernel's time for 64 x 64 tokens in bf16, half in float32.

    Args:
        query (scaled), key, value: (R, heads, h, w, c). by_row: (R, heads, h, w, h), by_column: (R, heads, h, w, w),
            what positions add to the scores.
    Returns:
        (R, heads, h, w, c).
    """
    heads, h, w = query.shape[1:4]
    of_an_image = heads * (h * w) ** 2 * query.element_size()
    images = max(1, MOST_SCORES // of_an_image)
    if images < len(query):
        groups = zip(*(tensor.split(images) for tensor in (query, key, value, by_row, by_column)))
        return torch.cat([attend_by_rows(*group) for group in groups])
    rows = max(1, MOST_SCORES * h // of_an_image)
    key, value, out = key.flatten(2, 3).contiguous().mT, value.flatten(2, 3).contiguous(), []  # once for all rows

    def attend(part: Tensor, part_by_row: Tensor, part_by_column: Tensor) -> Tensor:
        # The first sum is a tensor of its own: backward copies the gradient of one that is in place, on a view.
        scores = (part.flatten(2, 3) @ key).unflatten(-1, (h, w)) + part_by_row.flatten(2, 3)[..., :, None]
        scores += part_by_column.flatten(2, 3)[..., None, :]
        return (scores.flatten(-2).softmax(-1).to(value) @ value).unflatten(2, (-1, w))

    again = rows < h and torch.is_grad_enabled()  # backward computes them once more, instead of holding all of them
    for parts in zip(query.split(rows, 2), by_row.split(rows, 2), by_column.split(rows, 2)):
        out.append(checkpoint(attend, *parts, use_reentrant=False) if again else attend(*parts))
    return torch.cat(out, dim=2)


def attend_fused(query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """The same through torch's fused attention, where scores are never held.

    Ours: the positions are folded into the product, exactly: [q, q Rh, q Rw] . [k, onehot(y'), onehot(x')].
    """
    h, w = query.shape[2:4]
    row, column = torch.eye(h).repeat_interleave(w, 0).to(key), torch.eye(w).repeat(h, 1).to(key)
    place = torch.cat([row, column], dim=-1).unflatten(0, (h, w)).expand(*key.shape[:2], -1, -1, -1)
    query, key = torch.cat([query, by_row, by_column], dim=-1), torch.cat([key, place], dim=-1)
    # The kernels want one width for query, key and value: the value is padded and cut again.
    wide = (tensor.flatten(2, 3) for tensor in (query, key, F.pad(value, (0, h + w))))
    out = F.scaled_dot_product_attention(*wide, scale=1.0)
    return out[..., : value.shape[-1]].unflatten(2, (h, w))
