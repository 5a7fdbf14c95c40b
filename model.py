"""MaskSAM: a frozen SAM with a stem, adapters, a prompt generator and class tokens (paper 2.1, fig. 2 and 3).

    volume (B, C, D, H, W)
      │  ModalityStem              2.5 i                any modalities -> 3 channels of the encoder's size
      │  SAM's image encoder       2.5 ii-iii, fig. 3a  + depth embedding, + two DConvAdapters per block
      │  PromptGenerator           2.3, fig. 3b         -> auxiliary masks, boxes and class tokens
      │  SAM's prompt encoder                           unchanged
      │  SAM's mask decoder        2.6, fig. 3c         + class token, + depth embedding, + adapters
      └> class_logits (S, N, K+1), mask_logits (S, N, 4h, 4w), aux_mask_logits (S, N, H, W), aux_boxes

`segment-anything` builds SAM. Where the paper inserts something, a forward pass of SAM is repeated here, and
every new line ends in "# +" (left out: windows, which support/attention.py cuts, IoU, masks 1 to 3). With
fresh adapters encoder and decoder equal SAM's, image by image. Only the class token, one more token, changes
the masks (2.7 % of MobileSAM's pixels). With `fine_masks`, which are (S, N, H, W), the slices are a tap too.

    model, sam = build_model(MaskSAMConfig(sam="tiny", encoder_size=(256, 256)))
    outputs = model(torch.randn(2, 1, 4, 256, 256))
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapters
from prompt_generator import GivenBoxes, PromptGenerator, resize
from support.attention import attention
from support.checkpoints import BOUNDS, read_checkpoint
from support.sam import BACKBONES, file_sha256, find_sam_file, load_sam, resample_position_embedding
from support.tiny_vit import ConvBlock, TinyViT


class ModalityStem(nn.Module):
    """An inverted bottleneck of convolutions, from any number of modalities to SAM's three channels (2.5 i).

    Ours: it works at patch size, before the resampling. A residual runs around it, and its last layer starts
    at zero, so a fresh stem shows SAM the mean of the channels as a grey picture, in SAM's pixel statistics.

    pixel_mean and pixel_std, (3, 1, 1) in grey levels 0..255, are those with which SAM normalises a picture.
    grey is the mean and the deviation of its pictures, None if pixel_mean and pixel_std tell them.
    """

    def __init__(self, num_channels, encoder_size, pixel_mean, pixel_std, grey=None):
        super().__init__()
        hidden_dim = 8 * (num_channels + 3)  # Ours: eight times the input and output channels
        first = nn.Conv2d(num_channels, hidden_dim, kernel_size=1)
        middle = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        last = nn.Conv2d(hidden_dim, 3, kernel_size=1)
        self.bottleneck = nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.encoder_size = encoder_size
        mean, deviation = grey or (pixel_mean.mean(), pixel_std.mean())
        self.register_buffer("gain", (deviation / pixel_std).flatten(-2), persistent=False)
        self.register_buffer("offset", ((mean - pixel_mean) / pixel_std).flatten(-2), persistent=False)

    def forward(self, slices: Tensor) -> Tensor:
        """(S, C, H, W) with mean 0 and deviation 1 -> (S, 3, *encoder_size), in the units that SAM reads."""
        grey = slices.mean(dim=1, keepdim=True)  # (S, 1, H, W)
        grey = grey * self.gain[..., None] + self.offset[..., None]  # (S, 3, H, W)
        return resize(grey + self.bottleneck(slices), self.encoder_size)


class MaskSAM(nn.Module):
    """The whole network of fig. 2. It starts with random weights; `build_model` loads the pre-trained SAM.

    A pre-trained SAM is frozen. Ours: one that has no such weights trains whole, but for parts never read.
    """

    def __init__(self, config: MaskSAMConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        form, image_adapter, token_adapter, depth_embedding = VARIANTS[config.variant]
        backbone = BACKBONES[config.sam]
        self.sam, self.sam_is_frozen = backbone.build().train(), backbone.file is not None
        kind = TinyViTEncoder if isinstance(self.sam.image_encoder, TinyViT) else ViTEncoder
        self.encoder = encoder = kind(self.sam.image_encoder, config.grid)  # no module: SAM owns the weights
        prompts, decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        prompts.input_image_size, prompts.image_embedding_size = config.encoder_size, config.grid
        prompts.mask_input_size = (4 * config.grid[0], 4 * config.grid[1])
        for module in [self.sam] if self.sam_is_frozen else parts_never_read(self.sam, form):
            module.requires_grad_(False)
        (depth, *patch), dim = config.patch_size, decoder.transformer_dim
        pixels = self.sam.pixel_mean, self.sam.pixel_std, backbone.grey
        self.stem = ModalityStem(config.num_channels, config.encoder_size, *pixels)
        blocks = [encoder.block_adapters(image_adapter, width, depth) for width in encoder.block_dims]
        convs = encoder.num_convs if config.volumetric else 0
        blocks = [image_adapter(encoder.width, depth) for _ in range(convs)] + blocks
        kinds, layers = (image_adapter, token_adapter), decoder.transformer.layers
        layers = [DecoderBlockAdapters(*kinds, dim, depth) for _ in layers]
        self.encoder_adapters, self.decoder_adapters = nn.ModuleList(blocks), nn.ModuleList(layers)
        # Ours: one embedding per slice, the same for all its tokens, zero at first (2.5 ii, 2.6).
        shapes = [(depth, 1, 1, encoder.width), (depth, 1, 1, dim)] if depth_embedding else [None, None]
        embeddings = [shape and nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.encoder_depth_embed, self.decoder_depth_embed = embeddings
        tap_dims, scales, fine = encoder.tap_dims, encoder.scales, config.fine_masks
        if fine:  # Ours: the slices themselves are one more tap, the lowest, of the patch's size.
            tap_dims, scales = [config.num_channels, *tap_dims], scales and (*scales, math.inf)
        sizes = config.grid, tuple(patch), config.num_queries
        how = form, config.mask_prompt, scales, depth if config.volumetric else None, fine
        self.prompt_generator = PromptGenerator(dim, tap_dims, *sizes, *how)
        # Ours: every query has a global class token (the release shares one), of deviation 0.02 at first.
        self.class_tokens = nn.Parameter(torch.randn(config.num_queries, dim) * 0.02)
        self.classifier = nn.Linear(dim, config.num_classes + 1)
        box_scale = torch.tensor(config.encoder_size[::-1] * 2).float()
        self.register_buffer("box_scale", box_scale, persistent=False)

    def forward(self, volume: Tensor) -> dict[str, Tensor]:
        """Segment (B, C, D, H, W), normalised; with given boxes (B, C+1, D, H, W), their label map last.

        Returns: class_logits (S, N, K+1), "no object" last; mask_logits (S, N, 4h, 4w), or (S, N, H, W) if
        they are fine; if the variant has them, aux_mask_logits (S, N, H, W) and aux_boxes (S, N, 4); with
        given boxes, asked (S, K).
        """
        config, given = self.config, None
        expected = (config.num_channels + config.given_boxes, *config.patch_size)
        if tuple(volume.shape[1:]) != expected:
            raise ValueError(f"input is {tuple(volume.shape)}, expected (B, C, D, H, W) = {('B', *expected)}")
        slices = volume.transpose(1, 2).flatten(0, 1)  # (S, C, H, W)
        if config.given_boxes:
            given = GivenBoxes.from_label_map(slices[:, -1], config.num_classes, config.num_queries)
            slices = slices[:, :-1]
        neck, taps = self.encode(self.stem(slices))
        taps = [slices, *taps] if config.fine_masks else taps
        aux = self.prompt_generator(neck, taps, self.gradient_checkpointing)
        sparse, dense, image_pe = self.encode_prompts(aux, given)
        class_tokens = self.class_tokens + aux.pop("class_tokens")  # (S, N, width): global + auxiliary (2.6)
        tokens = class_tokens, aux.pop("detail", None)
        class_logits, mask_logits = self.decode(neck, image_pe, sparse, dense, *tokens)
        if given is not None:
            class_logits, aux["asked"] = given.restrict(class_logits), given.asked
        return {"class_logits": class_logits, "mask_logits": mask_logits, **aux}

    def encode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode (S, 3, *encoder_size): the neck (S, width, h, w) and four taps, shallow first (fig. 3a)."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return self.encoder(image, self.encoder_depth_embed, self.encoder_adapters, recompute)

    def encode_prompts(self, aux: dict[str, Tensor], given: GivenBoxes | None = None) -> tuple[Tensor, ...]:
        """Encode the boxes and masks of the prompt generator, or given boxes, by SAM's own prompt encoder."""
        encoder = self.sam.prompt_encoder
        # Outside autocast: in half precision the random Fourier code of a position is off by about a pixel.
        with torch.autocast(self.class_tokens.device.type, enabled=False):
            boxes, masks = self.prompt_generator.prompts(aux, encoder.mask_input_size, given)
            boxes = boxes * self.box_scale  # (S, N, 4) in pixels: columns, rows, columns, rows
            masks = None if masks is None else masks.flatten(0, 1)[:, None]  # (S*N, 1, 4h, 4w)
            sparse, dense = encoder(points=None, boxes=boxes.flatten(0, 1), masks=masks)
            # The corners of the boxes (S*N, 2, width), the masks (S*N, width, h, w), position codes (1, ...).
            return sparse, dense, encoder.get_dense_pe()

    def decode(
        self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, class_tokens,
        detail=None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Repeat SAM's `MaskDecoder.predict_masks` for S images with N prompts each (2.6, fig. 3c).

        Neck (S, width, h, w), outputs of `encode_prompts`, class_tokens (S, N, width), or None for SAM's own
        decoder, detail (S, width / 8, H, W) of the prompt generator or None -> class_logits (S, N, K+1) or
        None, mask_logits (S, N, 4h, 4w), or (S, N, H, W) with detail.
        """
        decoder, n = self.sam.mask_decoder, self.config.num_queries  # +
        # (S*N, T, width): SAM's IoU token, four mask tokens, two box corners, and the class token.
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight], dim=0)
        output_tokens = output_tokens.unsqueeze(0).expand(sparse_prompt_embeddings.size(0), -1, -1)
        tokens = torch.cat((output_tokens, sparse_prompt_embeddings), dim=1)
        if class_tokens is not None:  # +
            tokens = torch.cat((tokens, class_tokens.flatten(0, 1)[:, None]), dim=1)  # +
        # (S*N, width, h, w): the image of a slice, once per query, plus the mask prompt of the query.
        src = image_embeddings[:, None] + dense_prompt_embeddings.unflatten(0, (-1, n))  # +
        src = src.flatten(0, 1)  # +
        b, c, h, w = src.shape
        layers = decoder.transformer, self.decoder_adapters, self.decoder_depth_embed  # +
        hs, src = two_way_transformer(*layers, src, image_pe, tokens, n)  # +
        mask_tokens_out = hs[:, 1 : (1 + decoder.num_mask_tokens), :]
        # Upscale the image and multiply it with the weights that SAM makes of a mask token.
        src = src.transpose(1, 2).view(b, c, h, w)
        upscaled_embedding = decoder.output_upscaling(src)
        # Ours: mask token 0, which SAM takes too when it is asked for one mask per prompt.
        hyper_in = decoder.output_hypernetworks_mlps[0](mask_tokens_out[:, 0, :])[:, None]  # +
        b, c, h, w = upscaled_embedding.shape
        masks = (hyper_in @ upscaled_embedding.view(b, c, h * w)).view(b, -1, h, w)
        masks = masks.flatten(0, 1).unflatten(0, (-1, n))  # +
        if detail is not None:  # Ours: the same weights read the detail, at the size of the patch.  # +
            fine = torch.einsum("snc,schw->snhw", hyper_in[:, 0].unflatten(0, (-1, n)), detail)  # +
            masks = resize(masks, fine.shape[-2:]) + fine  # +
        class_logits = None if class_tokens is None else self.classifier(hs[:, -1]).unflatten(0, (-1, n))  # +
        return class_logits, masks  # +

    @torch.no_grad()
    def predict(self, volume: Tensor) -> Tensor:
        """Return the semantic maps of patches (B, C, D, H, W): (B, K, D, H, W) float32 in [0, N]."""
        outputs = self(volume)
        logits = resize(outputs["mask_logits"].float(), self.config.patch_size[1:])
        with torch.autocast(volume.device.type, enabled=False):  # in bf16, classes would tie
            maps = semantic_map(outputs["class_logits"].float(), logits)  # (S, K, H, W)
        return maps.unflatten(0, (-1, self.config.patch_size[0])).transpose(1, 2)


def semantic_map(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Sum class * mask probability over queries, as MaskFormer: (S, N, K+1), (S, N, H, W) -> (S, K, H, W)."""
    return torch.einsum("snk,snhw->skhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())


def parts_never_read(sam: nn.Module, form: str) -> list[nn.Module]:
    """Return the parts of SAM without a gradient: IoU, masks 1 to 3, points, one of the two dense prompts."""
    decoder, prompts = sam.mask_decoder, sam.prompt_encoder
    dense = prompts.mask_downscaling if form == "b" else prompts.no_mask_embed
    lists = *decoder.output_hypernetworks_mlps[1:], *prompts.point_embeddings[:2]
    return [decoder.iou_prediction_head, prompts.not_a_point_embed, dense, *lists]


class EncoderBlockAdapters(nn.Module):
    """The two adapters that fig. 4c inserts into one block of SAM's ViT, of width `dim` (2.5 iii)."""

    def __init__(self, adapter: type[adapters.VanillaAdapter], dim: int, depth: int):
        super().__init__()
        self.behind_attention = adapter(dim, depth, skip=True)
        self.beside_mlp = adapter(dim, depth, skip=False)

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """Repeat SAM's `Block.forward` with two adapters. (S, h, w, width) -> the same shape."""
        shortcut = x
        x = block.norm1(x)
        x = attention(block.attn, x, block.window_size)  # +
        x = self.behind_attention(x)  # +
        x = shortcut + x
        # Release: the adapter counts half. The MLP is last: checkpointing does not repeat its second layer.
        normed = block.norm2(x)  # +
        x = x + 0.5 * self.beside_mlp(normed)  # +
        x = x + block.mlp(normed)  # +
        return x


class TinyViTBlockAdapters(EncoderBlockAdapters):
    """The two adapters in a transformer block of TinyViT, which holds its norms in attention and MLP."""

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """Repeat `TransformerBlock.forward` with two adapters. (S, h, w, width) -> the same shape."""
        attended = block.attn(x)
        attended = self.behind_attention(attended)  # +
        x = block.local_conv(x + attended)
        normed = block.mlp.norm(x)  # +
        x = x + 0.5 * self.beside_mlp(normed)  # +
        return x + block.mlp[1:](normed)  # +


class ViTEncoder:
    """SAM's ViT for any token grid. A tap follows each quarter of its blocks: 2, 5, 8, 11 in ViT-B (2.5)."""

    block_adapters, scales, num_convs = EncoderBlockAdapters, None, 0  # all taps are as large as the grid

    def __init__(self, encoder: nn.Module, grid: tuple[int, int]):  # Ours: resampled position embedding
        encoder.pos_embed = nn.Parameter(resample_position_embedding(encoder.pos_embed.detach(), grid))
        blocks, self.encoder, self.width = list(encoder.blocks), encoder, encoder.pos_embed.shape[-1]
        self.tap_dims, self.block_dims = [self.width] * 4, [self.width] * len(blocks)
        ends = [len(blocks) * quarter // 4 for quarter in range(5)]
        self.stages = [(blocks[start:end], None) for start, end in zip(ends, ends[1:])]

    def __call__(self, x, depth_embed, insertions, recompute: bool) -> tuple[Tensor, list[Tensor]]:
        """Repeat SAM's `ImageEncoderViT.forward` on (S, 3, *encoder_size), with adapters, taps (fig. 3a)."""
        more = isinstance(insertions[0], adapters.VanillaAdapter)  # +
        encoder, insertions, taps = self.encoder, iter(insertions), []  # +
        x = encoder.patch_embed(x)
        if getattr(encoder, "pos_embed", None) is not None:  # +
            x = x + encoder.pos_embed
        # (S, h, w, width): every token of slice d gets embedding d (2.5 ii).
        if depth_embed is not None:  # +
            x = (x.unflatten(0, (-1, len(depth_embed))) + depth_embed).flatten(0, 1)  # +
        # Each block with its two adapters (2.5 iii); a tap (S, width, h, w) behind each stage. With
        # `recompute`, backward computes every block again instead of keeping its activations.
        for blocks, downsample in self.stages:  # +
            for blk in blocks:  # +
                conv = isinstance(blk, ConvBlock)  # +
                call = (blk, x) if conv else (next(insertions), x, blk)  # +
                x = checkpoint(*call, use_reentrant=False) if recompute else call[0](*call[1:])  # +
                x = next(insertions)(x) if conv and more else x  # +
            taps.append(x.permute(0, 3, 1, 2))  # +
            x = x if downsample is None else downsample(x)  # +
        x = encoder.neck(x.permute(0, 3, 1, 2))
        return x, taps  # +


class TinyViTEncoder(ViTEncoder):
    """TinyViT. Ours: its transformer blocks have adapters, its convolution blocks have one each if the model
    is `volumetric`, and the taps are its stages, a pyramid."""

    block_adapters, scales = TinyViTBlockAdapters, (1, 1, 1, 2, 4)

    def __init__(self, encoder: TinyViT, grid: tuple[int, int]):
        self.encoder, self.width, self.tap_dims = encoder, encoder.widths[0], list(encoder.widths)
        self.num_convs = encoder.depths[0]
        self.block_dims = [dim for dim, n in zip(encoder.widths[1:], encoder.depths[1:]) for _ in range(n)]
        self.stages = [(stage.blocks, stage.downsample) for stage in encoder.layers]


def two_way_transformer(transformer, insertions, depth_embed, image_embedding, image_pe, point_embedding, n):
    """Repeat SAM's `TwoWayTransformer.forward` with depth embedding, (D, 1, 1, width) or None, adapters."""
    bs, c, h, w = image_embedding.shape
    image_embedding = image_embedding.flatten(2).permute(0, 2, 1)  # (S*N, h*w, width)
    image_pe = image_pe.flatten(2).permute(0, 2, 1)
    # (1 or D, 1, h*w, width): a slice has its own position codes, the same for all its queries.
    image_pe = image_pe[None] if depth_embed is None else image_pe[None] + depth_embed  # +
    queries = point_embedding  # (S*N, T, width)
    keys = image_embedding
    for layer, insertion in zip(transformer.layers, insertions):  # +
        queries, keys = insertion(layer, queries, keys, point_embedding, image_pe, (h, w), n)  # +
    # The tokens attend to the image for a last time.
    q = queries + point_embedding
    k = add_position(keys, image_pe, n)  # +
    attn_out = transformer.final_attn_token_to_image(q=q, k=k, v=keys)
    queries = queries + attn_out
    queries = transformer.norm_final_attn(queries)
    return queries, keys


def add_position(keys: Tensor, key_pe: Tensor, n: int) -> Tensor:
    """Add position codes (1 or D, 1, h*w, width) to image tokens (B*D*n, h*w, width); no copy per query."""
    return (keys.unflatten(0, (-1, len(key_pe), n if len(key_pe) > 1 else 1)) + key_pe).flatten(0, 2)


class DecoderBlockAdapters(nn.Module):
    """The four adapters that fig. 3c inserts into one block of SAM's two-way transformer (2.6)."""

    def __init__(self, image_adapter, token_adapter, dim: int, depth: int):
        super().__init__()
        self.behind_self_attention = token_adapter(dim, depth, skip=True)
        self.behind_token_to_image = token_adapter(dim, depth, skip=True)
        self.beside_mlp = token_adapter(dim, depth, skip=False)
        self.behind_image_to_token = image_adapter(dim, depth, skip=True)

    def forward(self, block, queries, keys, query_pe, key_pe, grid, n) -> tuple[Tensor, Tensor]:
        """Repeat SAM's `TwoWayAttentionBlock.forward` with four adapters; grid is (h, w) of the keys."""
        # Tokens attend to tokens of their own query: (S*N, T, width).
        if block.skip_first_layer_pe:
            queries = block.self_attn(q=queries, k=queries, v=queries)
            queries = self.behind_self_attention(queries, n)  # +
        else:
            q = queries + query_pe
            attn_out = block.self_attn(q=q, k=q, v=queries)
            attn_out = self.behind_self_attention(attn_out, n)  # +
            queries = queries + attn_out
        queries = block.norm1(queries)
        # Tokens attend to the image: keys (S*N, h*w, width), key_pe (1 or D, 1, h*w, width).
        q = queries + query_pe
        k = add_position(keys, key_pe, n)  # +
        attn_out = block.cross_attn_token_to_image(q=q, k=k, v=keys)
        attn_out = self.behind_token_to_image(attn_out, n)  # +
        queries = queries + attn_out
        queries = block.norm2(queries)
        # Release: the adapter beside the MLP counts half.
        mlp_in = queries  # +
        mlp_out = block.mlp(queries)
        queries = queries + mlp_out
        queries = queries + 0.5 * self.beside_mlp(mlp_in, n)  # +
        queries = block.norm3(queries)
        # The image attends to tokens. SAM makes k again here, of the same keys.
        q = queries + query_pe
        attn_out = block.cross_attn_image_to_token(q=k, k=q, v=queries)
        attn_out = self.behind_image_to_token(attn_out.unflatten(1, grid), n).flatten(1, 2)  # +
        keys = keys + attn_out
        keys = block.norm4(keys)
        return queries, keys


# Table 4: form of the prompts (fig. 5), adapter for image tokens, adapter for prompt tokens, depth embedding.
VARIANTS = {
    "b1": ("a", adapters.VanillaAdapter, adapters.VanillaAdapter, False),
    "b2": ("b", adapters.VanillaAdapter, adapters.VanillaAdapter, False),
    "b3": ("c", adapters.VanillaAdapter, adapters.VanillaAdapter, False),
    "b4": ("d", adapters.VanillaAdapter, adapters.VanillaAdapter, False),
    "b5": ("d", adapters.VanillaAdapter, adapters.VanillaAdapter, True),
    "b6": ("d", adapters.DepthMLPAfterUpAdapter, adapters.DepthMLPAfterUpAdapter, True),
    "b7": ("d", adapters.DepthMLPBeforeDownAdapter, adapters.DepthMLPBeforeDownAdapter, True),
    "b8": ("d", adapters.DepthMLPAdapter, adapters.DepthMLPAdapter, True),
    "b9": ("d", adapters.DepthConvAdapter, adapters.DepthMLPAdapter, True),
}


@dataclasses.dataclass(frozen=True)
class MaskSAMConfig:
    """The settings that travel with the weights; the defaults are those of the ACDC preset."""

    sam: str = "vit_b"  # key of BACKBONES
    variant: str = "b9"  # key of VARIANTS
    num_channels: int = 1  # C
    num_classes: int = 4  # K, with background
    num_queries: int = 8  # N
    patch_size: tuple[int, int, int] = (4, 256, 256)  # (D, H, W) in voxels
    encoder_size: tuple[int, int] = (1024, 1024)  # (rows, columns), multiples of the backbone's stride
    mask_prompt: str = "logits"  # or "binary": the mask prompt that SAM gets
    given_boxes: bool = False  # the boxes of the classes are given, in training and in use
    fine_masks: bool = False  # masks of the patch's size, with one more level of the prompt generator
    volumetric: bool = False  # 3-D convolutions in the prompt generator and behind TinyViT's convolutions

    def __post_init__(self):
        for name, known in (("sam", BACKBONES), ("variant", VARIANTS), ("mask_prompt", ("logits", "binary"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name, length, multiple in (("patch_size", 3, 1), ("encoder_size", 2, BACKBONES[self.sam].stride)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)  # a list from a file or the command line becomes a tuple
            if len(value) != length or not all(0 < n <= BOUNDS[name] and n % multiple == 0 for n in value):
                expected = f"{length} positive multiples of {multiple} up to {BOUNDS[name]}"
                raise ValueError(f"{name} is {value}, expected {expected}")
        for name, low in {"num_channels": 1, "num_classes": 2, "num_queries": self.num_classes}.items():
            if not low <= getattr(self, name) <= BOUNDS[name]:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {BOUNDS[name]}")

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid of the encoder, (h, w)."""
        return tuple(side // BACKBONES[self.sam].stride for side in self.encoder_size)


def build_model(config: MaskSAMConfig, sam_checkpoint: str | Path | None = None) -> tuple[MaskSAM, dict]:
    """Build MaskSAM around the pre-trained SAM, whose file is given or comes from torch's cache.

    Returns: the model; SAM's name and the sha256 of its file (None without one), which a checkpoint records.
    """
    path, model = find_sam_file(config.sam, sam_checkpoint), MaskSAM(config)
    if path is not None:
        load_sam(model.sam, config.sam, path, config.grid)
    return model, {"name": config.sam, "sha256": None if path is None else file_sha256(path)}


def trained_state(model: MaskSAM) -> dict[str, Tensor]:
    """Return the state dict without a frozen SAM: the tensors that a checkpoint must hold."""
    state = model.state_dict()
    return {key: state[key] for key in state if not (model.sam_is_frozen and key.startswith("sam."))}


def load_trained_state(model: MaskSAM, state: dict[str, Tensor], path: str | Path) -> None:
    """Load the result of `trained_state`, strictly. Raise ValueError with a tensor of `path` that differs."""
    own = trained_state(model)
    wrong = sorted(state.keys() ^ own.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {len(wrong)} tensors differ, such as {wrong[0]}")
    model.load_state_dict(state, strict=False)


def checkpoint_content(model: MaskSAM, sam: dict, plan: dict) -> dict:
    """Return the parts of a checkpoint from which `load_checkpoint` rebuilds the model."""
    config = dataclasses.asdict(model.config)
    return {"config": config, "sam": sam, "plan": plan, "state": trained_state(model)}


def load_checkpoint(path: str | Path, sam_checkpoint: str | Path | None = None) -> tuple[MaskSAM, dict]:
    """Rebuild a trained model from a checkpoint of train.py and SAM's own file.

    Returns: the model in evaluation mode on the CPU; the rest. Raises: ValueError if the two do not fit.
    """
    content = read_checkpoint(path)
    try:
        config = MaskSAMConfig(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration that this code cannot build: {error}") from error
    model, sam = build_model(config, sam_checkpoint)
    if sam["sha256"] != content["sam"]["sha256"]:
        trained_with = f"{path} was trained with SAM {sam['name']} of sha256 {content['sam']['sha256']}"
        raise ValueError(f"{trained_with}, found {sam['sha256']}: pass the right file with --sam-checkpoint")
    load_trained_state(model, content.pop("state"), path)
    return model.eval(), content


def count_parameters(model: MaskSAM) -> dict[str, list[int]]:
    """Count parameters as table 5: component -> [trainable, frozen]. SAM has a component per module."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        component = ".".join(name.split(".")[: 2 if name.startswith("sam.") else 1])
        counts.setdefault(component, [0, 0])[not parameter.requires_grad] += parameter.numel()
    return counts
