"""TinyViT, the image encoder of MobileSAM and of LiteMedSAM, the light members of the SAM family (for paper 2.1).

    image ── patch_embed ── stage 0 ── merge ── stage 1 ── merge ── stage 2 ── merge ── stage 3 ── neck ──> as SAM's ViT
             scale          1/4               1/8               1/16              1/16
             width          64                128               160               320           256
             blocks         2 convolutional   2, windows of 7   6, windows of 14  2, windows of 7

From K. Wu et al., TinyViT, ECCV 2022, as changed by C. Zhang et al., Faster Segment Anything (MobileSAM), 2023: the
last merge keeps the resolution, and SAM's neck follows. LiteMedSAM (github.com/bowang-lab/MedSAM, branch LiteMedSAM)
embeds every pixel instead of 4 x 4 pixels: its 256 pixels a side give the 64 x 64 tokens of MobileSAM's 1024, and its
scales are 1, 1/2, 1/4, 1/4.

Attribute names are those of the published files, which load strictly. Features are (S, h, w, C): with channels
innermost in memory a token is a vector for the linear layers, and the convolutions run faster.

Letters: S images, h w token grid, C channels, R windows, T = window * window tokens.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (None, 4, 5, 10), (None, 7, 14, 7)


class ConvNorm(nn.Module):
    """Convolution and batch norm, on (S, h, w, C).

    Ours: the norm always takes its stored statistics, in training too (the backbone is frozen), so it is a factor and
    an offset of the convolution: one operation, and no activation kept between the two.

    Args:
        in_dim, out_dim: channels. kernel_size: odd, padded to keep the size. stride: of the convolution.
        groups: `out_dim` for a depth-wise convolution.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, in_dim) -> (S, h / stride, w / stride, out_dim)."""
        conv, norm = self.c, self.bn
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = conv.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, conv.stride, conv.padding, groups=conv.groups)
        return x.permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Two convolutions from pixels to the first tokens.

    Args:
        dim: width of the tokens. patch: 4, a token per 4 x 4 pixels, or 1, a token per pixel.
    """

    def __init__(self, dim: int, patch: int):
        super().__init__()
        kernel_size, stride = {4: (3, 2), 1: (1, 1)}[patch]
        self.seq = nn.Sequential(
            ConvNorm(3, dim // 2, kernel_size, stride), nn.GELU(), ConvNorm(dim // 2, dim, kernel_size, stride)
        )

    def forward(self, image: Tensor) -> Tensor:
        """(S, 3, H, W) -> (S, H / patch, W / patch, dim)."""
        return self.seq(image.permute(0, 2, 3, 1).contiguous())


class ConvBlock(nn.Module):
    """Inverted bottleneck of convolutions with a skip, the block of stage 0 (MobileNet's, with GELU)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, 4 * dim)
        self.conv2 = ConvNorm(4 * dim, 4 * dim, kernel_size=3, groups=4 * dim)
        self.conv3 = ConvNorm(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, dim) -> the same shape."""
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Merge(nn.Module):
    """The way from a stage to the next: other channels, and half the resolution where the stride is 2."""

    def __init__(self, in_dim: int, out_dim: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(in_dim, out_dim)
        self.conv2 = ConvNorm(out_dim, out_dim, kernel_size=3, stride=stride, groups=out_dim)
        self.conv3 = ConvNorm(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, in_dim) -> (S, h / stride, w / stride, out_dim)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside square windows, with a learnt bias per head and distance |dy|, |dx|.

    Args:
        dim: C. heads: number of heads. window: side of a window in tokens.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        distance = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("distance", distance, persistent=False)  # (T, T), index into the biases

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, C) -> the same shape. Whole windows are made by zeros before the norm, which are attended to."""
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -w % self.window, 0, -h % self.window))
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
        x = self.attend(x.flatten(3, 4).flatten(0, 2))  # (S, rows, columns, T, C) -> (R, T, C)
        x = x.unflatten(0, (-1, rows, columns)).unflatten(3, (self.window, self.window)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, :h, :w]

    def attend(self, x: Tensor) -> Tensor:
        """(R, T, C) -> the same shape, each window on its own."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1))
        query, key, value = qkv.permute(3, 0, 2, 1, 4)  # (R, heads, T, C / heads) each
        scores = query * query.shape[-1] ** -0.5 @ key.mT + self.attention_biases[:, self.distance].to(query)
        return self.proj((scores.softmax(-1).to(value) @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Window attention, depth-wise 3 x 3 convolution (across windows, without a skip), MLP.

    Args:
        dim: C. heads, window: of the attention.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.attn = WindowAttention(dim, heads, window)
        self.local_conv = ConvNorm(dim, dim, kernel_size=3, groups=dim)
        layers = {"norm": nn.LayerNorm(dim), "fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU()}
        self.mlp = nn.Sequential(OrderedDict(layers | {"fc2": nn.Linear(4 * dim, dim)}))

    def forward(self, x: Tensor) -> Tensor:
        """(S, h, w, C) -> the same shape."""
        x = self.local_conv(x + self.attn(x))
        return x + self.mlp(x)


class Stage(nn.Module):
    """Blocks of one width; `downsample` leads to the next stage and is missing in the last."""

    def __init__(self, blocks: list[nn.Module], merge: Merge | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = merge


class ChannelNorm(nn.LayerNorm):
    """SAM's `LayerNorm2d`: LayerNorm over the channels of (S, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """(S, C, h, w) -> the same shape, in the precision of the weights."""
        return super().forward(x.movedim(1, -1).to(self.weight)).movedim(-1, 1)


class TinyViT(nn.Module):
    """The image encoder, in SAM's place. It has no absolute positions and serves every size that 4 * patch divides.

    Args:
        img_size: side in pixels that it was trained at; SAM's `preprocess` pads to it. patch: see `PatchEmbed`.
        out_chans: channels of the neck. num_classes: of a classifier that is never read but lies in MobileSAM's file.
    """

    def __init__(self, img_size: int = 1024, patch: int = 4, out_chans: int = 256, num_classes: int = 0):
        super().__init__()
        self.img_size, self.stride = img_size, 4 * patch
        self.patch_embed = PatchEmbed(WIDTHS[0], patch)
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(WIDTHS, DEPTHS)):
            blocks = [TransformerBlock(dim, HEADS[i], WINDOWS[i]) if i else ConvBlock(dim) for _ in range(depth)]
            self.layers.append(Stage(blocks, Merge(dim, WIDTHS[i + 1], 1 if i == 2 else 2) if i < 3 else None))
        if num_classes:
            self.norm_head, self.head = nn.LayerNorm(WIDTHS[-1]), nn.Linear(WIDTHS[-1], num_classes)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], out_chans, kernel_size=1, bias=False),
            ChannelNorm(out_chans, eps=1e-6),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            ChannelNorm(out_chans, eps=1e-6),
        )

    def forward(self, image: Tensor) -> Tensor:
        """(S, 3, H, W), sides multiples of `stride` -> (S, out_chans, H / stride, W / stride)."""
        x = self.patch_embed(image)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.neck(x.permute(0, 3, 1, 2))
