"""The bottleneck adapters that MaskSAM inserts into SAM's transformer blocks (paper 2.4, fig. 4, table 4).

    x ── down: FC C -> C/4 ── GELU ── middle ── up: FC C/4 -> C ── (+ x) ──>

    VanillaAdapter     there is no middle                                                    (B1 to B5)
    DepthMLPAdapter    middle: FC D -> 4D, GELU, FC 4D -> D over the slices, with a skip     (fig. 4a; B8, B9)
    DepthConvAdapter   middle: 3 x 3 x 3 depth-wise convolution over D, h, w, with a skip    (fig. 4b; B9)
    DepthMLPAfterUpAdapter (B6), DepthMLPBeforeDownAdapter (B7): the depth MLP behind `up`, in front of `down`

Every input has the shape (B*D*n, ..., C). Row (b*D + d)*n + i belongs to volume b, slice d and query i. The
image tokens of the encoder have n = 1, all tokens of the decoder have n = N. Slices of one volume meet only
inside `DepthMLP` and `DepthConv`. Usage: `tokens = DepthConvAdapter(dim=768, depth=4)(tokens)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VanillaAdapter(nn.Module):
    """The bottleneck adapter of Houlsby et al. 2019, table 4's "vAdapter": FC C -> C/4, GELU, FC C/4 -> C.

    Ours: the last FC starts at zero. At first an adapter returns its input; without a skip, zeros.

    Args:
        dim, depth: C, the width of the tokens, and D, the slices of a patch, which only the variants need.
        skip: whether the input is added: True behind attention, False parallel to an MLP.
    """

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__()
        self.skip = skip
        self.down = nn.Linear(dim, dim // 4)  # Release: a quarter of the width
        self.up = nn.Linear(dim // 4, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """Compute the path beside the skip: FC, GELU, FC. Each variant overrides this method."""
        return self.up(F.gelu(self.down(x)))

    def forward(self, x: Tensor, rows_per_slice: int = 1) -> Tensor:
        """Adapt tokens (B*D*n, ..., C) with n rows per slice; the convolution needs (B*D*n, h, w, C)."""
        adapted = self.bottleneck(x, rows_per_slice)
        return x + adapted if self.skip else adapted


class DepthMLP(nn.Module):
    """An inverted bottleneck over the D slices, and no other number, with a skip (fig. 4a, the middle)."""

    def __init__(self, depth: int):
        super().__init__()
        self.expand = nn.Linear(depth, 4 * depth)  # Ours: 4 D, the expansion of a ViT's own MLP
        self.contract = nn.Linear(4 * depth, depth)
        # Ours: this FC starts at zero too, because B6, where it stands behind `up`, must start as SAM.
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, x: Tensor, rows_per_slice: int = 1) -> Tensor:
        """Mix the slices of each volume, alike at every row, token and channel. (B*D*n, ..., C) -> same."""
        slices = x.unflatten(0, (-1, self.expand.in_features, rows_per_slice)).flatten(2)  # (B, D, rest)
        # `weight @ slices` applies the FC to axis 1, so that the depth axis need not be moved to the end.
        hidden = F.gelu(self.expand.weight @ slices + self.expand.bias[:, None])  # (B, 4D, rest)
        mixed = self.contract.weight @ hidden + self.contract.bias[:, None]  # (B, D, rest)
        return x + mixed.reshape(x.shape)


class DepthMLPAdapter(VanillaAdapter):
    """The DMLPAdapter for prompt tokens: the depth MLP is the middle of the bottleneck (fig. 4a)."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.middle = DepthMLP(depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """Compute FC, GELU, depth MLP, FC."""
        return self.up(self.middle(F.gelu(self.down(x)), rows_per_slice))


class DepthMLPAfterUpAdapter(VanillaAdapter):
    """Table 4's B6: the depth MLP stands behind the upsampling FC."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.behind = DepthMLP(depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """Compute FC, GELU, FC, depth MLP."""
        return self.behind(self.up(F.gelu(self.down(x))), rows_per_slice)


class DepthMLPBeforeDownAdapter(VanillaAdapter):
    """Table 4's B7: the depth MLP stands in front of the downsampling FC."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.front = DepthMLP(depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """Compute depth MLP, FC, GELU, FC."""
        return self.up(F.gelu(self.down(self.front(x, rows_per_slice))))


class DepthConv(nn.Module):
    """A 3 x 3 x 3 depth-wise convolution over D, h, w with a skip, the DConvAdapter's middle (fig. 4b)."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.depth = depth
        self.conv = nn.Conv3d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)  # Ours: LayerNorm over the channels and GELU behind the convolution

    def forward(self, x: Tensor, rows_per_slice: int = 1) -> Tensor:
        """Convolve each volume's tokens, separately for each of its n queries. (B*D*n, h, w, C) -> same."""
        volumes = x.unflatten(0, (-1, self.depth, rows_per_slice)).transpose(1, 2)  # (B, n, D, h, w, C)
        volumes = volumes.flatten(0, 1).movedim(-1, 1)  # (B*n, C, D, h, w), channels last in memory
        if x.is_cuda:  # in this layout cuDNN's backward takes 60 ms, in the default one 0.6 ms (H100, ACDC)
            volumes = volumes.contiguous()
        else:  # a CPU is fast in this layout and in float32, but not in bfloat16
            volumes = volumes.to(self.conv.weight)
        with torch.autocast("cpu", enabled=False):
            mixed = self.conv(volumes).movedim(1, -1)  # (B*n, D, h, w, C)
        mixed = F.gelu(self.norm(mixed)).unflatten(0, (-1, rows_per_slice))  # (B, n, D, h, w, C)
        return x + mixed.transpose(1, 2).flatten(0, 2)  # (B*D*n, h, w, C)


class DepthConvAdapter(VanillaAdapter):
    """The DConvAdapter for image tokens: the 3-D convolution is the middle of the bottleneck (fig. 4b)."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.middle = DepthConv(dim // 4, depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """Compute FC, GELU, depth-wise convolution, FC."""
        return self.up(self.middle(F.gelu(self.down(x)), rows_per_slice))
