"""TinyViT, the light image encoder of MobileSAM and LiteMedSAM, in the place of SAM's ViT (for paper 2.1).

    image -> patch_embed -> stage 0 -> merge -> stage 1 -> merge -> stage 2 -> merge -> stage 3 -> neck
             scale          1/4                 1/8                 1/16                1/16
             width          64                  128                 160                 320        256
             blocks         2 of convolutions   2, windows of 7     6, windows of 14    2, windows of 7

Source: K. Wu et al., TinyViT, ECCV 2022, as changed by C. Zhang et al., Faster Segment Anything (MobileSAM),
2023: the last merge keeps the resolution, and SAM's neck follows. LiteMedSAM (github.com/bowang-lab/MedSAM)
makes a token of every pixel, not of 4 x 4 pixels, so its scales are 1, 1/2, 1/4, 1/4. `tiny_pyramid`, ours,
trains from random weights and makes one of 2 x 2 pixels: its scales are 1/2, 1/4, 1/8, 1/8.

Attribute names are those of the published files, which load strictly. Features are (S, h, w, C): with the
channels innermost in memory, a token is a vector for the linear layers, and the convolutions are faster.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Widths, depths, heads and windows of the four stages. Stage 0 has neither heads nor windows.
PUBLISHED = (64, 128, 160, 320), (2, 2, 6, 2), (None, 4, 5, 10), (None, 7, 14, 7)
SMALL = (24, 48, 64, 96), (1, 1, 2, 1), (None, 2, 4, 4), (None, 7, 7, 7)  # Ours, for `tiny_pyramid`


class ConvNorm(nn.Module):
    """A convolution and a batch norm, on (S, h, w, C).

    Ours: the norm uses its stored statistics in training too, as the backbone is frozen. It is then a factor
    and an offset of the convolution: one operation, with no activation kept in between. A backbone that
    trains from random weights has no such statistics: its norm is a LayerNorm over the channels.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, in_dim) -> (S, h / stride, w / stride, out_dim)."""
        conv, norm = self.c, self.bn
        weight, bias, trains = conv.weight, None, isinstance(norm, nn.LayerNorm)
        if not trains:
            factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight, bias = weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor
        if conv.kernel_size == conv.stride == (1, 1):  # a CPU is faster with a linear layer
            x = F.linear(x, weight.flatten(1), bias)
        else:
            x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, conv.stride, conv.padding, groups=conv.groups)
            x = x.permute(0, 2, 3, 1)
        return norm(x) if trains else x


class PatchEmbed(nn.Module):
    """Two convolutions from pixels to tokens of width `dim`, one per patch x patch pixels (4, 2 or 1)."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        kernel, (one, two) = 1 if patch == 1 else 3, {4: (2, 2), 2: (2, 1), 1: (1, 1)}[patch]  # two strides
        first, second = ConvNorm(3, dim // 2, kernel, one), ConvNorm(dim // 2, dim, kernel, two)
        self.seq = nn.Sequential(first, nn.GELU(), second)

    def forward(self, image: Tensor) -> Tensor:
        """(S, 3, H, W) -> (S, H / patch, W / patch, dim)."""
        return self.seq(image.permute(0, 2, 3, 1).contiguous())


class Merge(nn.Module):
    """Convolutions between two stages: they change the width and, with stride 2, halve the resolution."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, stride: int = 1):
        super().__init__()
        self.conv1 = ConvNorm(in_dim, hidden_dim)
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, kernel_size=3, stride=stride, groups=hidden_dim)
        self.conv3 = ConvNorm(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, in_dim) -> (S, h / stride, w / stride, out_dim)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class ConvBlock(Merge):
    """The block of stage 0: the same convolutions as an inverted bottleneck, with a skip and GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, C) -> the same shape."""
        return F.gelu(x + super().forward(x))


class WindowAttention(nn.Module):
    """Attention in windows of window x window tokens; each head has a learnt bias per distance |dy|, |dx|."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (T, 2) for T tokens
        rows, columns = (places[:, None] - places).abs().unbind(-1)  # (T, T) each
        self.register_buffer("distance", rows * window + columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, C) -> same. Zeros before the norm fill the last windows and take part in attention."""
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -w % self.window, 0, -h % self.window))
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(0, 2)  # (R, T, C) for R = S * rows * columns windows of T tokens
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1))
        query, key, value = qkv.permute(3, 0, 2, 1, 4)  # (R, heads, T, C / heads) each
        scores = query * query.shape[-1] ** -0.5 @ key.mT + self.attention_biases[:, self.distance].to(query)
        x = self.proj((scores.softmax(-1).to(value) @ value).transpose(1, 2).flatten(2))
        x = x.unflatten(0, (-1, rows, columns)).unflatten(3, (self.window, self.window)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, :h, :w]


class TransformerBlock(nn.Module):
    """Window attention, a depth-wise 3 x 3 convolution across windows (without a skip), and an MLP."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.attn = WindowAttention(dim, heads, window)
        self.local_conv = ConvNorm(dim, dim, kernel_size=3, groups=dim)
        norm, fc1, fc2 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(norm=norm, fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, C) -> the same shape."""
        attended = self.attn(x)
        x = self.local_conv(x + attended)
        return x + self.mlp(x)


class ChannelNorm(nn.LayerNorm):
    """SAM's `LayerNorm2d`: LayerNorm over the channels of (S, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """(S, C, h, w) -> the same shape, in the precision of the weights."""
        return super().forward(x.movedim(1, -1).to(self.weight)).movedim(-1, 1)


class TinyViT(nn.Module):
    """The image encoder. It has no absolute positions and takes every size that 4 * patch divides.

    Args:
        img_size: side of the pictures of its training in pixels; SAM's `preprocess` pads to it.
        patch: pixels of a token's side in stage 0: 4, 2 or 1.
        num_classes: of a classifier that is never read; MobileSAM's file has one.
        out_dim, shape: channels of the neck; `PUBLISHED` or `SMALL`.
        trains: whether the weights are trained, not loaded; see `ConvNorm`.
    """

    def __init__(self, img_size=1024, patch=4, num_classes=0, out_dim=256, shape=PUBLISHED, trains=False):
        super().__init__()
        widths, depths, heads, windows = shape
        self.img_size, self.stride, self.widths, self.depths = img_size, 4 * patch, widths, depths
        self.patch_embed = PatchEmbed(widths[0], patch)
        self.layers = nn.ModuleList()
        for i, (dim, next_dim, depth) in enumerate(zip(widths, [*widths[1:], None], depths)):
            kind = TransformerBlock if i else ConvBlock
            sizes = (dim, heads[i], windows[i]) if i else (dim, 4 * dim, dim)
            stage = nn.Module()
            stage.blocks = nn.ModuleList(kind(*sizes) for _ in range(depth))
            stage.downsample = Merge(dim, next_dim, next_dim, 1 if i == 2 else 2) if next_dim else None
            self.layers.append(stage)
        if num_classes:
            self.norm_head, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], num_classes)
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], out_dim, kernel_size=1, bias=False),
            ChannelNorm(out_dim, eps=1e-6),
            nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
            ChannelNorm(out_dim, eps=1e-6),
        )
        for layer in self.modules():
            if trains and isinstance(layer, ConvNorm):
                layer.bn = nn.LayerNorm(layer.c.out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """(S, 3, H, W), sides multiples of `stride` -> (S, out_dim, H / stride, W / stride)."""
        x = self.patch_embed(image)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.neck(x.permute(0, 3, 1, 2))
