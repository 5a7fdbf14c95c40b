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
from pathlib import Path

import torch
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
from support.attention import attention
from support.checkpoints import read_checkpoint
from support.sam import BACKBONES, file_sha256, find_sam_file, resample_position_embedding
from support.tiny_vit import DEPTHS, WIDTHS, ConvBlock, TinyViT

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


# ---- weights


def load_sam(model: MaskSAM, path: str | Path) -> None:
    """Load SAM's own weights, strictly; its position embedding is resampled to the encoder's size.

    Args:
        path: a state dict as `segment-anything` publishes it.
    Raises:
        ValueError: not a state dict of this backbone.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not model.light:
            state["image_encoder.pos_embed"] = resample_position_embedding(
                state["image_encoder.pos_embed"], model.config.grid
            )
        model.sam.load_state_dict(state, strict=True)
    except Exception as error:  # whatever a wrong file does to unpickling, look-up or shapes, the answer is one
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} does not hold SAM {model.config.sam}: {' '.join(reason[:3])[:300]} ... expected the file "
            f"{BACKBONES[model.config.sam].file}, or its like; choose another backbone with --sam"
        ) from error


def build_model(config: MaskSAMConfig, sam_checkpoint: str | Path | None = None) -> tuple[MaskSAM, dict]:
    """Build MaskSAM around pre-trained SAM.

    Returns:
        The model, and SAM's name and its file's sha256 (None for `tiny`), which a checkpoint records.
    """
    path = find_sam_file(config.sam, sam_checkpoint)
    model = MaskSAM(config)
    if path is not None:
        load_sam(model, path)
    return model, {"name": config.sam, "sha256": None if path is None else file_sha256(path)}


def trained_state(model: MaskSAM) -> dict[str, Tensor]:
    """The state dict without a frozen SAM: what training made, and all that a checkpoint must hold."""
    return {key: value for key, value in model.state_dict().items() if not (model.sam_is_frozen and key[:4] == "sam.")}


def checkpoint_content(model: MaskSAM, sam: dict, plan: dict) -> dict:
    """What a checkpoint holds of a model: configuration, SAM by name and sha256, plan of the data, what trains."""
    return {"config": dataclasses.asdict(model.config), "sam": sam, "plan": plan, "state": trained_state(model)}


def load_checkpoint(path: str | Path, sam_checkpoint: str | Path | None = None) -> tuple[MaskSAM, dict]:
    """Rebuild a trained model from its checkpoint and SAM's own file.

    Args:
        path: of `save_checkpoint`. sam_checkpoint: SAM's file where it is not in the cache.
    Returns:
        The model in evaluation mode on the CPU, and everything else that was saved.
    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint of this code, or made on another SAM file.
    """
    content = read_checkpoint(path)
    try:
        config = MaskSAMConfig(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration that this code cannot build: {error}") from error
    model, sam = build_model(config, sam_checkpoint)
    if sam["sha256"] != content["sam"]["sha256"]:
        raise ValueError(
            f"{path} was trained on SAM {content['sam']['name']} with sha256 {content['sam']['sha256']}, "
            f"found {sam['sha256']}: pass the right file with --sam-checkpoint"
        )
    load_trained_state(model, content.pop("state"), path)
    return model.eval(), content


def load_trained_state(model: MaskSAM, state: dict[str, Tensor], path: str | Path) -> None:
    """Load what `trained_state` gave, strictly. Raises ValueError with the keys or shapes that differ."""
    own = trained_state(model)
    wrong = sorted(state.keys() ^ own.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {len(wrong)} tensors differ, such as {wrong[0]}")
    model.load_state_dict(state, strict=False)
