"""The bottleneck adapters that MaskSAM inserts into SAM's transformer blocks (paper 2.4, fig. 4; table 4).

    x ── FC C -> C/4 ── GELU ── middle ── FC C/4 -> C ── (+ x) ──>

    VanillaAdapter      middle: nothing                                                         (B1 to B5)
    DepthMLPAdapter     middle: FC D -> 4D, GELU, FC 4D -> D over the slices, with a skip       (fig. 4a; B8, B9)
    DepthConvAdapter    middle: 3 x 3 x 3 depth-wise convolution over (D, h, w), with a skip    (fig. 4b; B9)
    table 4 also has the depth MLP behind the last FC (B6) and in front of the first (B7).

Every input is (R, ..., C) with rows R = (b*D + d)*n + i: n is 1 for image tokens of the encoder and the number of
queries in the decoder. Slices of one volume meet only inside `DepthMLP` and `DepthConv`.

Letters: B volumes, D slices, n rows per slice, C channels, h w token grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthMLP(nn.Module):
    """Inverted bottleneck over the depth axis, with a skip: the middle of the paper's DMLPAdapter (fig. 4a).

    Args:
        depth: D, the number of slices of a patch; the layer serves no other depth.
    """

    def __init__(self, depth: int):
        super().__init__()
        self.expand = nn.Linear(depth, 4 * depth)
        self.contract = nn.Linear(4 * depth, depth)
        # Ours: silent at first, so that B6, where this comes behind the zero-initialised FC, starts as SAM too.
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, x: Tensor, rows_per_slice: int = 1) -> Tensor:
        """Mix the slices of each volume, for every row, token and channel alike.

        Args:
            x: (B*D*n, ..., C). rows_per_slice: n.
        Returns:
            The same shape.
        """
        slices = x.unflatten(0, (-1, self.expand.in_features, rows_per_slice)).flatten(2)  # (B, D, everything else)
        # The FCs act on axis 1: weight @ slices is nn.Linear without moving the axis there and back.
        hidden = F.gelu(self.expand.weight @ slices + self.expand.bias[:, None])
        return x + (self.contract.weight @ hidden + self.contract.bias[:, None]).reshape(x.shape)


class DepthConv(nn.Module):
    """3 x 3 x 3 depth-wise convolution over (D, h, w), channel LayerNorm, GELU, with a skip (fig. 4b).

    Args:
        dim: channels. depth: D, to unfold the rows; the weights serve any depth.
    """

    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.depth = depth
        self.conv = nn.Conv3d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rows_per_slice: int = 1) -> Tensor:
        """Convolve each volume's token grid, for each of the n rows of a slice apart.

        Args:
            x: (B*D*n, h, w, C). rows_per_slice: n.
        Returns:
            The same shape.
        """
        volumes = x.unflatten(0, (-1, self.depth, rows_per_slice)).transpose(1, 2).flatten(0, 1)  # (B*n, D, h, w, C)
        # Channels stay innermost in memory: on a CPU this layout is many times faster than the default one. So is
        # float32: in bf16 the backward pass of a depth-wise convolution takes five times as long there.
        with torch.autocast("cpu", enabled=False):
            mixed = self.conv(volumes.movedim(-1, 1).to(self.conv.weight)).movedim(1, -1)
        mixed = F.gelu(self.norm(mixed)).unflatten(0, (-1, rows_per_slice)).transpose(1, 2).flatten(0, 2)
        return x + mixed


class VanillaAdapter(nn.Module):
    """Bottleneck adapter of Houlsby et al. 2019 ("vAdapter"): FC C -> C/4, GELU, FC C/4 -> C.

    Ours: the last FC is zero-initialised. A fresh adapter with a skip is the identity, one without adds nothing.

    Args:
        dim: C. depth: D of a patch. skip: add the input, for an adapter behind attention; without, for one parallel
            to an MLP.
    """

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__()
        self.skip = skip
        self.down = nn.Linear(dim, dim // 4)
        self.up = nn.Linear(dim // 4, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """The path beside the skip connection; the variants override it. (B*D*n, ..., C) -> the same shape."""
        return self.up(F.gelu(self.down(x)))

    def forward(self, x: Tensor, rows_per_slice: int = 1) -> Tensor:
        """Adapt the tokens.

        Args:
            x: (B*D*n, ..., C); (B*D*n, h, w, C) for `DepthConvAdapter`. rows_per_slice: n.
        Returns:
            The same shape.
        """
        adapted = self.bottleneck(x, rows_per_slice)
        return x + adapted if self.skip else adapted


class DepthMLPAdapter(VanillaAdapter):
    """DMLPAdapter (fig. 4a): the depth MLP in the middle of the bottleneck, for prompt tokens."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.middle = DepthMLP(depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """FC, GELU, depth MLP, FC."""
        return self.up(self.middle(F.gelu(self.down(x)), rows_per_slice))


class DepthConvAdapter(VanillaAdapter):
    """DConvAdapter (fig. 4b): the 3-D depth-wise convolution in the middle of the bottleneck, for image tokens."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.middle = DepthConv(dim // 4, depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """FC, GELU, depth-wise convolution, FC."""
        return self.up(self.middle(F.gelu(self.down(x)), rows_per_slice))


class DepthMLPAfterUpAdapter(VanillaAdapter):
    """Table 4's B6: the depth MLP behind the FC that goes up."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.behind = DepthMLP(depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """FC, GELU, FC, depth MLP."""
        return self.behind(self.up(F.gelu(self.down(x))), rows_per_slice)


class DepthMLPBeforeDownAdapter(VanillaAdapter):
    """Table 4's B7: the depth MLP in front of the FC that goes down."""

    def __init__(self, dim: int, depth: int, skip: bool = True):
        super().__init__(dim, depth, skip)
        self.front = DepthMLP(depth)

    def bottleneck(self, x: Tensor, rows_per_slice: int) -> Tensor:
        """Depth MLP, FC, GELU, FC."""
        return self.up(F.gelu(self.down(self.front(x, rows_per_slice))))
