"""Claims about the whole network: it starts as SAM, nothing mixes that must not, all trains, files are checked."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import labels_to_segments, task, tiny, wake, wake_sam
from torch import Tensor, nn

import model as model_module
from matcher import Segments, SetCriterion, pairwise_terms
from model import (
    BACKBONES,
    VARIANTS,
    EncoderBlockAdapters,
    MaskSAM,
    MaskSAMConfig,
    count_parameters,
    resample_position_embedding,
    semantic_map,
)
from support.checkpoints import build_model, trained_state

ROOT = Path(model_module.__file__).parent


@pytest.fixture(scope="module")
def vit_b() -> MaskSAM:
    """ViT-B with random weights, for the tests that need the real sizes; each leaves the weights as they were."""
    net = tiny(sam="vit_b")
    wake_sam(net.sam)
    return net


# ----------------------------------------------------------------------------------------------------- it starts as SAM


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("encoder_size", [(64, 64), (64, 96), (256, 256), (16, 16), (176, 80)])
def test_encoder_equals_sam_at_init(encoder_size):
    # Windows are 8 x 8 tokens: (64, 96) and (176, 80) pad them, 256 is exact.
    net = tiny(encoder_size=encoder_size).double()
    wake_sam(net.sam)
    image = torch.randn(2, 3, *encoder_size, dtype=torch.float64)
    with torch.no_grad():
        neck, taps = net.encode(image)
        expected = net.sam.image_encoder(image)
    assert relative_error(neck, expected) < 1e-6
    assert [tap.shape[1:] for tap in taps] == [(128, *net.config.grid)] * 4


@pytest.mark.parametrize("name, last_blocks", [("tiny", [0, 1, 2, 3]), ("vit_b", [2, 5, 8, 11])])
def test_taps_are_what_sams_own_blocks_give_at_every_quarter(name, last_blocks, vit_b):
    net = tiny() if name == "tiny" else vit_b
    given = []
    handles = [
        net.sam.image_encoder.blocks[i].register_forward_hook(lambda *call: given.append(call[2])) for i in last_blocks
    ]
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, taps = net.encode(image)
        net.sam.image_encoder(image)
    for handle in handles:
        handle.remove()
    assert len(given) == len(taps) == 4
    for tap, block_output in zip(taps, given):
        assert relative_error(tap, block_output.permute(0, 3, 1, 2)) < 1e-4  # float32, another attention kernel


def test_variants_are_the_rows_of_table_4():
    rows = {
        "b1": ("a", "VanillaAdapter", "VanillaAdapter", False),  # MaskPG
        "b2": ("b", "VanillaAdapter", "VanillaAdapter", False),  # BBoxPG
        "b3": ("c", "VanillaAdapter", "VanillaAdapter", False),  # MaskBBoxPG
        "b4": ("d", "VanillaAdapter", "VanillaAdapter", False),  # MaskAvgBBoxPG
        "b5": ("d", "VanillaAdapter", "VanillaAdapter", True),  # + DPosEmbed
        "b6": ("d", "DepthMLPAfterUpAdapter", "DepthMLPAfterUpAdapter", True),
        "b7": ("d", "DepthMLPBeforeDownAdapter", "DepthMLPBeforeDownAdapter", True),
        "b8": ("d", "DepthMLPAdapter", "DepthMLPAdapter", True),
        "b9": ("d", "DepthConvAdapter", "DepthMLPAdapter", True),
    }
    assert VARIANTS.keys() == rows.keys()
    for variant, (form, image_adapter, token_adapter, depth_embedding) in rows.items():
        net = tiny(variant=variant)
        assert net.prompt_generator.form == form
        image, tokens = set(), set()
        for adapters in net.encoder_adapters:
            image |= {type(adapters.behind_attention).__name__, type(adapters.beside_mlp).__name__}
        for adapters in net.decoder_adapters:
            image.add(type(adapters.behind_image_to_token).__name__)
            tokens |= {type(getattr(adapters, place)).__name__ for place in DECODER_PLACES[:3]}
        assert (image, tokens) == ({image_adapter}, {token_adapter})
        assert (net.encoder_depth_embed is not None, net.decoder_depth_embed is not None) == (depth_embedding,) * 2


def test_encoder_equals_sam_at_init_for_vit_b(vit_b):
    # The way to float64 and back is exact. 14 x 14 windows around 4 x 4 tokens: most of a window is padding.
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    vit_b.double()
    try:
        with torch.no_grad():
            neck, _ = vit_b.encode(image)
            expected = vit_b.sam.image_encoder(image)
    finally:
        vit_b.float()
    assert relative_error(neck, expected) < 1e-6


ROW = 12 * 20 * (16 * 20) * 8  # bytes of the scores of one row of 16 x 20 tokens, 12 heads, in float64


@pytest.mark.parametrize("way, scores", [("fused", 0), ("rows", 1), ("rows", 3 * ROW), ("rows", 2 * 16 * ROW)])
def test_attention_of_vit_b_equals_sams_in_windows_and_globally(vit_b, way, scores, monkeypatch):
    # 16 x 20 tokens: two windows a side, the far ones padded; the global block's table of positions is resampled.
    monkeypatch.setattr(model_module, "FUSED", ("cpu",) if way == "fused" else ())
    monkeypatch.setattr(model_module, "MOST_SCORES", scores)
    blocks = vit_b.sam.image_encoder.blocks
    assert blocks[1].window_size == 14 and blocks[2].window_size == 0
    for index in (1, 2):
        block = copy.deepcopy(blocks[index]).double()
        adapters = copy.deepcopy(vit_b.encoder_adapters[index]).double()
        x = torch.randn(2, 16, 20, 768, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(adapters(x, block), block(x)) < 1e-6


@pytest.mark.parametrize("shape", [(2, 12, 16, 20, 8), (9, 12, 7, 7, 8)])
@pytest.mark.parametrize("limit", [1, 3 * ROW, 2 * 16 * ROW])
def test_attention_by_rows_holds_few_scores_and_has_the_gradients_of_the_fused_one(shape, limit, monkeypatch):
    # An image or a window at a time, some of its rows, or all: 9 windows have a third of the scores of an image.
    monkeypatch.setattr(model_module, "MOST_SCORES", limit)
    images, heads, h, w, c = shape
    made = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda scores, dim: made.append(scores.nbytes) or softmax(scores, dim))
    widths = (c, c, c, h, w)
    inputs = [torch.randn(*shape[:4], width, dtype=torch.float64, requires_grad=True) for width in widths]
    upstream = torch.randn(shape, dtype=torch.float64)
    found = torch.autograd.grad(model_module.attend_by_rows(*inputs), inputs, upstream)
    scores, row = images * heads * (h * w) ** 2 * 8, heads * w * (h * w) * 8
    assert max(made) <= max(limit, row)  # one row is the least
    # All of them twice where a row's worth is computed again in backward, once where an image's fits.
    assert sum(made) == scores * (2 if row * h > limit else 1)
    for ours, theirs in zip(found, torch.autograd.grad(model_module.attend_fused(*inputs), inputs, upstream)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_starts_as_sam(variant):
    net = tiny(variant=variant).double()
    wake_sam(net.sam)
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(net.encode(image)[0], net.sam.image_encoder(image)) < 1e-6
        assert decoder_error(net) < 1e-6


def decoder_error(net: MaskSAM, slices: int = 4) -> float:
    """`decode` without class tokens against SAM's decoder, one image at a time, as SAM's own forward needs it."""
    n, dim, (h, w) = net.config.num_queries, net.sam.mask_decoder.transformer_dim, net.config.grid
    dtype = net.class_tokens.dtype
    neck = torch.randn(slices, dim, h, w, dtype=dtype)
    sparse, dense = torch.randn(slices * n, 2, dim, dtype=dtype), torch.randn(slices * n, dim, h, w, dtype=dtype)
    image_pe = torch.randn(1, dim, h, w, dtype=dtype)
    with torch.no_grad():
        class_logits, masks = net.decode(neck, image_pe, sparse, dense, class_tokens=None)
        expected = [
            net.sam.mask_decoder.predict_masks(
                neck[s : s + 1], image_pe, sparse[s * n : (s + 1) * n], dense[s * n : (s + 1) * n]
            )
            for s in range(slices)
        ]
    assert class_logits is None
    return relative_error(masks, torch.stack([masks[:, 0] for masks, _ in expected]))


@pytest.mark.parametrize("changes", [{}, {"encoder_size": (48, 80)}, {"patch_size": (1, 32, 32)}, {"num_queries": 1}])
def test_decoder_equals_sam_image_by_image(changes):
    assert decoder_error(tiny(**changes).double()) < 1e-6


def test_decoder_equals_sam_image_by_image_for_vit_b(vit_b):
    # float32 here: sums of 256 products, two layers deep.
    assert decoder_error(vit_b) < 1e-4


def test_prompts_reach_sam_as_encoder_pixels():
    # SAM's own prompt encoder, asked for a box in pixels and a mask at 4x the token grid.
    net = tiny(variant="b3", encoder_size=(64, 96), patch_size=(2, 10, 20))
    aux = {
        "aux_boxes": torch.tensor([0.25, 0.5, 0.75, 1.0]).expand(2, 3, 4),
        "aux_mask_logits": torch.randn(2, 3, 10, 20),
    }
    sparse, dense, image_pe = net.encode_prompts(aux)
    masks = F.interpolate(aux["aux_mask_logits"], size=(16, 24), mode="bilinear").flatten(0, 1)[:, None]
    pixels = torch.tensor([[24.0, 32.0, 72.0, 64.0]]).expand(6, 4)  # x of 96 columns, y of 64 rows
    expected_sparse, expected_dense = net.sam.prompt_encoder(points=None, boxes=pixels, masks=masks)
    torch.testing.assert_close(sparse, expected_sparse)
    torch.testing.assert_close(dense, expected_dense)
    assert image_pe.shape == (1, 64, 4, 6) and dense.shape == (6, 64, 4, 6)


def test_prompts_are_encoded_in_float32_under_autocast():
    net = tiny()
    aux = {"aux_boxes": torch.rand(2, 3, 4), "aux_mask_logits": torch.randn(2, 3, 32, 32)}
    expected = net.encode_prompts(aux)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net.encode_prompts(aux)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_stem_shows_sam_a_grey_picture_in_its_own_pixel_statistics():
    # A z-scored slice as grey levels around SAM's mean level, with SAM's mean deviation, through SAM's preprocess.
    net = tiny(encoder_size=(256, 256), patch_size=(1, 256, 256), num_channels=2)
    x = torch.randn(1, 2, 256, 256)
    grey = x.mean(1, keepdim=True) * (58.395 + 57.12 + 57.375) / 3 + (123.675 + 116.28 + 103.53) / 3
    torch.testing.assert_close(net.stem(x), net.sam.preprocess(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_stem_learns_beside_the_grey_picture_and_resamples_to_the_encoder():
    net = tiny(encoder_size=(64, 96), patch_size=(1, 20, 30), num_channels=3)
    x = torch.randn(1, 3, 20, 30)
    before = net.stem(x)
    wake(net.stem)
    after = net.stem(x)
    assert before.shape == (1, 3, 64, 96) and (after - before).abs().amax((0, 2, 3)).min() > 0.01
    resampled_first = MaskSAM(dataclasses.replace(net.config, patch_size=(1, 64, 96))).stem(
        F.interpolate(x, size=(64, 96), mode="bilinear")
    )
    torch.testing.assert_close(before, resampled_first, rtol=1e-4, atol=1e-4)  # linear at first: the order is no matter


# ----------------------------------------------------------------------------------------------- the position embedding


def test_position_embedding_is_resampled_not_cropped():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    embedding = torch.stack([rows, columns], dim=-1)[None]
    for grid in ((16, 16), (32, 16), (12, 10), (64, 64), (80, 70)):
        small = resample_position_embedding(embedding, grid)
        assert small.shape == (1, *grid, 2)
        # A ramp stays a ramp over the whole range: the cell centres of the new grid (the edges bend a little).
        for axis, side in enumerate(grid):
            centres = ((torch.arange(side) + 0.5) / side * 64 - 0.5) / 63
            found = small[0, :, :, axis].mean(1 - axis)
            torch.testing.assert_close(found, centres, rtol=0, atol=0.02)
    assert torch.equal(resample_position_embedding(embedding, (64, 64)), embedding)


def test_loading_sam_resamples_its_position_embedding(small):
    net, _ = build_model(MaskSAMConfig(sam="small", encoder_size=(64, 96)), small)
    stored = torch.load(small)["image_encoder.pos_embed"]
    assert stored.shape[1:3] == (16, 16)
    assert torch.equal(net.sam.image_encoder.pos_embed, resample_position_embedding(stored, (4, 6)))
    assert not net.sam.image_encoder.pos_embed.requires_grad
    others = {key: value for key, value in torch.load(small).items() if key != "image_encoder.pos_embed"}
    assert all(torch.equal(net.sam.state_dict()[key], value) for key, value in others.items())


# ---------------------------------------------------------------------------------------------------- what reaches what


def changed(after: Tensor, before: Tensor, dims: int) -> Tensor:
    """Which entries of the first `dims` axes differ. float64: rounding stays below 1e-11, a real effect above 1e-8."""
    difference = (after - before).detach().flatten(dims).abs().amax(-1)
    assert ((difference < 1e-11) | (difference > 1e-8)).all(), "neither rounding nor an effect"
    return difference > 1e-8


@pytest.mark.parametrize("index, kind", [(0, "windowed"), (1, "global"), (2, "windowed")])
@pytest.mark.parametrize("place", ["behind_attention", "beside_mlp"])
def test_changing_a_slice_changes_its_neighbours_and_no_other(index, kind, place):
    # One adapter of one block awake: one 3 x 3 x 3 convolution, so exactly d-1, d, d+1 of the same volume.
    net = tiny(patch_size=(5, 32, 32), encoder_size=(80, 144)).double()
    wake_sam(net.sam)
    assert (net.sam.image_encoder.blocks[index].window_size > 0) == (kind == "windowed")
    image = torch.randn(10, 3, 80, 144, dtype=torch.float64)
    with torch.no_grad():
        silent, _ = net.encode(image)
        wake(getattr(net.encoder_adapters[index], place))
        before, _ = net.encode(image)
        for d in (0, 2, 4):
            moved = image.clone()
            moved[5 + d, :, 30:40, 70:80] += 1  # volume 1
            after, _ = net.encode(moved)
            expected = torch.zeros(2, 5, dtype=torch.bool)
            expected[1, max(d - 1, 0) : d + 2] = True
            assert torch.equal(changed(after, before, 1).view(2, 5), expected)
    assert changed(before, silent, 1).all()


@pytest.mark.parametrize("d", [0, 2, 4])
def test_windowed_block_links_the_same_place_of_neighbouring_slices(d):
    # 10 x 18 tokens in windows of 8 x 8, padded to 16 x 24: six windows a slice. The release folded windows as if they
    # were slices, so that an impulse left its place. The adapter behind attention: an impulse fills its own window and
    # its slice's attention reaches no other; the convolution adds one token around, one slice up and down.
    torch.manual_seed(0)
    block = BACKBONES["tiny"].build().image_encoder.blocks[0].double()
    net = nn.ModuleDict({"adapters": EncoderBlockAdapters(VARIANTS["b9"][1], 128, depth=5).double()})
    wake(net["adapters"].behind_attention)
    x = torch.randn(10, 10, 18, 128, dtype=torch.float64)
    moved = x.clone()
    y, column = 3, 12
    moved[5 + d, y, column] += torch.randn(128, dtype=torch.float64)  # uneven, or the norm takes it away
    with torch.no_grad():
        found = changed(net["adapters"](moved, block), net["adapters"](x, block), 3).view(2, 5, 10, 18)
    expected = torch.zeros(2, 5, 10, 18, dtype=torch.bool)
    expected[1, max(d - 1, 0) : d + 2, 0:9, 7:17] = True  # window rows 0-7, columns 8-15, and one token around
    assert torch.equal(found, expected)


def test_adapter_beside_the_mlp_sees_the_same_place_alone():
    # Attention silenced: the impulse reaches the adapter at its own token, and leaves as 3 x 3 x 3 tokens.
    torch.manual_seed(0)
    block = BACKBONES["tiny"].build().image_encoder.blocks[0].double()
    nn.init.zeros_(block.attn.proj.weight)
    adapters = EncoderBlockAdapters(VARIANTS["b9"][1], 128, depth=5).double()
    wake(adapters.beside_mlp)
    x = torch.randn(10, 10, 18, 128, dtype=torch.float64)
    moved = x.clone()
    moved[5 + 2, 8, 7] += torch.randn(128, dtype=torch.float64)
    with torch.no_grad():
        found = changed(adapters(moved, block), adapters(x, block), 3).view(2, 5, 10, 18)
    expected = torch.zeros(2, 5, 10, 18, dtype=torch.bool)
    expected[1, 1:4, 7:10, 6:9] = True
    assert torch.equal(found, expected)


def test_adapter_beside_the_mlp_counts_half():
    block = BACKBONES["tiny"].build().image_encoder.blocks[0].double()
    adapters = EncoderBlockAdapters(VARIANTS["b1"][1], 128, depth=1).double()
    nn.init.ones_(adapters.beside_mlp.up.bias)  # the adapter gives 1 everywhere
    x = torch.randn(1, 8, 8, 128, dtype=torch.float64)
    torch.testing.assert_close(adapters(x, block), block(x) + 0.5)


def decoder_inputs(net: MaskSAM, batch: int) -> dict[str, Tensor]:
    slices, n, dim, (h, w) = batch * net.config.patch_size[0], net.config.num_queries, 64, net.config.grid
    torch.manual_seed(3)
    shapes = {"neck": (slices, dim, h, w), "image_pe": (1, dim, h, w), "sparse": (slices * n, 2, dim)}
    shapes |= {"dense": (slices * n, dim, h, w), "class_tokens": (slices, n, dim)}
    return {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}


DECODER_PLACES = ["behind_self_attention", "behind_token_to_image", "beside_mlp", "behind_image_to_token"]


@pytest.mark.parametrize("variant", ["b1", "b6", "b7", "b8", "b9"])
@pytest.mark.parametrize("place", DECODER_PLACES)
def test_queries_and_volumes_never_mix_in_the_decoder(variant, place):
    # Rows are (b*D + d)*N + n. An impulse in the prompt of one query reaches that query alone: in its own slice by
    # SAM, in all slices of its volume through a depth MLP, in the neighbours through the convolution.
    net = tiny(variant=variant, patch_size=(4, 32, 32)).double()
    wake(getattr(net.decoder_adapters[-1], place))  # of the last block, where tokens have met the image already
    inputs = decoder_inputs(net, batch=2)
    b, d, n = 1, 1, 2
    reach = torch.zeros(2, 4, 3, dtype=torch.bool)
    image_adapter, token_adapter = VARIANTS[variant][1:3]
    adapter = image_adapter if place == "behind_image_to_token" else token_adapter
    if adapter.__name__ == "VanillaAdapter":
        reach[b, d, n] = True
    elif adapter.__name__ == "DepthConvAdapter":
        reach[b, d - 1 : d + 2, n] = True
    else:
        reach[b, :, n] = True
    with torch.no_grad():
        before = net.decode(**inputs)
        for source in ("sparse", "dense", "class_tokens"):
            moved = inputs | {source: inputs[source].clone()}
            target = moved[source] if source == "class_tokens" else moved[source].unflatten(0, (8, 3))
            target[b * 4 + d, n] += torch.randn(target.shape[2:], dtype=torch.float64)
            for logits, old in zip(net.decode(**moved), before):
                assert torch.equal(changed(logits, old, 2).view(2, 4, 3), reach), source


def test_image_of_a_slice_reaches_all_its_queries_and_no_other_slice_of_a_fresh_model():
    net = tiny(patch_size=(4, 32, 32)).double()
    inputs = decoder_inputs(net, batch=2)
    with torch.no_grad():
        before = net.decode(**inputs)
        moved = inputs | {"neck": inputs["neck"].clone()}
        moved["neck"][6] += torch.randn_like(moved["neck"][6])
        reach = torch.zeros(8, 3, dtype=torch.bool)
        reach[6] = True
        for logits, old in zip(net.decode(**moved), before):
            assert torch.equal(changed(logits, old, 2), reach)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_depth_embedding_belongs_to_the_slice_of_its_index_in_every_volume(part):
    net = tiny(patch_size=(4, 32, 32)).double()
    inputs, image = decoder_inputs(net, batch=2), torch.randn(8, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        run = (lambda: net.encode(image)[0]) if part == "encoder" else (lambda: net.decode(**inputs)[1])
        before = run()
        embedding = net.encoder_depth_embed if part == "encoder" else net.decoder_depth_embed
        embedding[2] = torch.randn(embedding.shape[-1], dtype=torch.float64)
        found = changed(run(), before, 1).view(2, 4)
    assert found.tolist() == [[False, False, True, False]] * 2


def test_class_token_is_the_global_token_of_its_query_plus_the_auxiliary_one():
    net = tiny()
    volume, _ = task(net, batch=2)
    with torch.no_grad():
        before = net(volume)
        net.class_tokens[1] += 1
        after = net(volume)
    moved = (after["class_logits"] - before["class_logits"]).abs().amax((0, 2))
    assert moved[1] > 1e-3 and moved[[0, 2]].max() == 0


def test_volumes_of_a_batch_never_mix_in_the_whole_model():
    net = tiny(patch_size=(3, 24, 40), encoder_size=(64, 96))
    wake_sam(net.sam)
    for adapters in (net.encoder_adapters, net.decoder_adapters, net.stem):
        wake(adapters, std=0.05)
    volume, _ = task(net, batch=2)
    moved = volume.clone()
    moved[1] += torch.randn_like(moved[1])
    with torch.no_grad():
        before, after, alone = net(volume), net(moved), net(volume[:1])
    for key in before:
        assert torch.equal(after[key][:3], before[key][:3]), key
        assert (after[key][3:] - before[key][3:]).abs().flatten(1).amax(-1).min() > 0, key
        # Batches of other sizes take other kernels: float32 rounding through the whole network.
        torch.testing.assert_close(alone[key], before[key][:3], rtol=1e-3, atol=1e-4, msg=key)


# ----------------------------------------------------------------------------------------------------------- the shapes


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_size": (64, 96)},
        {"encoder_size": (16, 16)},
        {"patch_size": (3, 37, 53)},
        {"patch_size": (1, 32, 32)},
        {"num_channels": 4, "num_classes": 14, "num_queries": 24},
        {"patch_size": (2, 7, 5)},
    ],
)
def test_any_size_channels_and_classes(changes):
    net = tiny(**changes)
    config = net.config
    volume, segments = task(net, batch=2)
    outputs = net(volume)
    slices, (depth, *patch) = 2 * config.patch_size[0], config.patch_size
    sizes = {key: tuple(value.shape) for key, value in outputs.items()}
    assert sizes == {
        "class_logits": (slices, config.num_queries, config.num_classes + 1),
        "mask_logits": (slices, config.num_queries, 4 * config.grid[0], 4 * config.grid[1]),
        "aux_mask_logits": (slices, config.num_queries, *patch),
        "aux_boxes": (slices, config.num_queries, 4),
    }
    if config.num_queries >= int(segments.present.sum(-1).max()):
        assert SetCriterion()(outputs, segments)[0].isfinite()
    assert net.predict(volume).shape == (2, config.num_classes, depth, *patch)


def test_volume_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 32, 32\).*\(B, 1, 2, 32, 32\)"):
        tiny()(torch.zeros(1, 1, 3, 32, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sam": "vit_x"}, "sam is 'vit_x', expected one of tiny, vit_b, vit_l, vit_h"),
        ({"variant": "b10"}, "variant is 'b10'"),
        ({"mask_prompt": "soft"}, "mask_prompt is 'soft', expected one of logits, binary"),
        ({"encoder_size": (100, 64)}, r"encoder_size is \(100, 64\), expected 2 positive multiples of 16"),
        ({"patch_size": (0, 32, 32)}, r"patch_size is \(0, 32, 32\)"),
        ({"patch_size": (32, 32)}, r"patch_size is \(32, 32\), expected 3"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"prompts": "gt"}, "prompts is 'gt', expected one of auto, boxes"),
        ({"prompts": "boxes", "num_queries": 3}, "3 queries, expected 4 or more: a box for every class"),
    ],
)
def test_configuration_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskSAMConfig(**changes)


# --------------------------------------------------------------------------------------------------------- given boxes


def prompted_task(net: MaskSAM) -> tuple[Tensor, Segments]:
    """`task` with the truth behind the channels; the second slice lacks class 2."""
    volume, segments = task(net)
    labels = segments.masks.to(torch.uint8).argmax(1)
    labels[1][labels[1] == 2] = 0
    return torch.cat([volume, labels[None, None].to(volume)], dim=1), labels_to_segments(labels, net.config.num_classes)


def test_what_has_no_box_is_not_drawn_and_what_has_one_is_drawn_by_its_query():
    net = tiny(prompts="boxes")
    volume, segments = prompted_task(net)
    outputs = net(volume)
    probability = outputs["class_logits"].softmax(-1)
    assert not segments.present[1, 2] and (probability[1, :, 2] == 0).all()
    assert (probability[0, 1, 2] > 0) and (probability[0, [0, 2], 2] == 0).all()
    assert not net.predict(volume)[0, 2, 1].any() and net.predict(volume)[0, 2, 0].all()


def test_a_given_box_moves_the_masks_of_its_own_query_and_slice_alone():
    net = tiny(prompts="boxes", patch_size=(3, 32, 32))
    volume = torch.cat([task(net)[0], torch.zeros(1, 1, 3, 32, 32)], dim=1)
    volume[0, -1, 1, 4:9, 4:9] = 2
    moved = volume.clone()
    moved[0, -1, 1, 9:20, 4:9] = 2
    with torch.no_grad():
        difference = (net(moved)["mask_logits"] - net(volume)["mask_logits"]).abs().flatten(2).amax(-1)
    assert (difference > 0).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_given_boxes_all_trains_and_every_class_goes_to_its_query(variant):
    net = tiny(variant=variant, prompts="boxes")
    volume, segments = prompted_task(net)
    outputs, criterion = net(volume), SetCriterion()
    loss, _ = criterion(outputs, segments)
    loss.backward()
    assert loss < 100  # what no query may be would cost thousands
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assigned = criterion.matcher(pairwise_terms(outputs, segments), segments.present)
    assert assigned[:, 0, 1].all() and assigned[0, 1, 2] and not assigned[1, :, 2].any()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_gets_a_gradient_and_learns(variant, small):
    net, _ = build_model(MaskSAMConfig("small", variant, 1, 3, 3, (2, 32, 32), (64, 64)), small)
    frozen = copy.deepcopy(net.sam.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    # A silent layer passes no gradient on until it has moved once: two such in a row (the zero FC of an adapter behind
    # the zero FC of its depth MLP) take two steps.
    for step in range(3):
        volume, segments = task(net, seed=step)
        optimizer.zero_grad()
        SetCriterion()(net(volume), segments)[0].backward()
        without = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, f"step {step}: no gradient for {without}"
        silent = [name for name, p in net.named_parameters() if p.requires_grad and not p.grad.any()]
        if step < 2:
            assert all("adapters" in name or "stem" in name for name in silent), silent
        optimizer.step()
    assert not silent, f"still zero at the third step: {silent}"
    assert all((p != start[name]).any() == p.requires_grad for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.sam.parameters())
    assert all(torch.equal(value, frozen[key]) for key, value in net.sam.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_trains_whole_and_ddp_finds_no_unused_parameter(variant):
    net = tiny(variant=variant)
    volume, segments = task(net)
    SetCriterion()(net(volume), segments)[0].backward()
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    trained = {name for name, p in net.sam.named_parameters() if p.requires_grad}
    for name in ("image_encoder.pos_embed", "image_encoder.blocks.0.attn.rel_pos_h", "mask_decoder.mask_tokens.weight"):
        assert name in trained
    assert not any(name.startswith("mask_decoder.iou_prediction_head") for name in trained)


def test_sam_vit_b_stays_bit_for_bit_while_the_rest_trains(vit_b):
    sam = {key: value.clone() for key, value in vit_b.sam.state_dict().items()}
    own = {key: value.clone() for key, value in trained_state(vit_b).items()}
    assert not any(parameter.requires_grad for parameter in vit_b.sam.parameters())
    optimizer = torch.optim.AdamW([p for p in vit_b.parameters() if p.requires_grad], lr=1e-3)
    volume, segments = task(vit_b)
    SetCriterion()(vit_b(volume), segments)[0].backward()
    without = [name for name, p in vit_b.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    optimizer.step()
    assert all(torch.equal(value, sam[key]) for key, value in vit_b.sam.state_dict().items())
    assert any((value != own[key]).any() for key, value in trained_state(vit_b).items())
    vit_b.zero_grad()
    vit_b.load_state_dict(own, strict=False)


@pytest.mark.parametrize("name, frozen", [("vit_b", 93.7), ("vit_l", 312.3), ("vit_h", 641.1)])
def test_all_of_sam_is_frozen_and_the_acdc_preset_tunes_about_14_million(name, frozen):
    # On the meta device: shapes without memory.
    with torch.device("meta"):
        counts = count_parameters(MaskSAM(MaskSAMConfig(sam=name)))
    tuned, kept = (sum(count) for count in zip(*counts.values()))
    assert kept / 1e6 == pytest.approx(frozen, abs=0.06)
    assert all(trainable == 0 for component, (trainable, _) in counts.items() if component.startswith("sam."))
    if name == "vit_b":
        assert 13e6 < tuned < 15e6


def test_parameter_table_counts_each_parameter_once():
    net = tiny()
    counts = count_parameters(net)
    assert sum(map(sum, counts.values())) == sum(p.numel() for p in net.parameters())
    assert counts["classifier"] == (64 * 4 + 4, 0)


def test_final_loss_alone_reaches_the_mask_and_box_heads():
    # In the release nothing of it does.
    net = tiny()
    volume, segments = task(net)
    outputs = net(volume)
    final = {key: outputs[key] for key in ("class_logits", "mask_logits")}
    SetCriterion()(final, segments)[0].backward()
    for head in ("mask_head", "box_head"):
        assert all(p.grad.abs().sum() > 0 for p in getattr(net.prompt_generator, head).parameters()), head


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        net = tiny(patch_size=(3, 32, 32))
        wake_sam(net.sam)
        wake(net.encoder_adapters, std=0.05)
        net.gradient_checkpointing = checkpointing
        volume, segments = task(net, batch=2)
        SetCriterion()(net(volume), segments)[0].backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The same kernels run twice on the same numbers.
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_gradient_checkpointing_recomputes_the_encoder(monkeypatch):
    net = tiny()
    net.gradient_checkpointing = True
    calls = []
    forward = EncoderBlockAdapters.forward
    monkeypatch.setattr(EncoderBlockAdapters, "forward", lambda *args: calls.append(1) or forward(*args))
    volume, segments = task(net)
    SetCriterion()(net(volume), segments)[0].backward()
    assert len(calls) == 2 * 4
    net.predict(volume)  # nothing to recompute for
    assert len(calls) == 3 * 4


def test_gradient_checkpointing_leaves_out_the_last_layer_of_each_mlp():
    # Backward needs its weight alone, and torch stops computing again at the last tensor that it needs.
    net = tiny()
    net.gradient_checkpointing = True
    calls = []
    for block in net.sam.image_encoder.blocks:
        for layer in (block.mlp.lin1, block.mlp.lin2):
            layer.register_forward_hook(lambda *call: calls.append(call[0]))
    volume, segments = task(net)
    SetCriterion()(net(volume), segments)[0].backward()
    for block in net.sam.image_encoder.blocks:
        assert (calls.count(block.mlp.lin1), calls.count(block.mlp.lin2)) == (2, 1)


def test_bfloat16_autocast_stays_near_float32():
    net = tiny()
    volume, segments = task(net, batch=2)
    with torch.no_grad():
        expected = net(volume)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(volume)
    for key, value in expected.items():
        # 8 bits of mantissa through ten layers: a few per cent of the range.
        assert (found[key].float() - value).abs().max() < 0.06 * value.abs().max(), key
    assert SetCriterion()(found, segments)[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ inference


def test_semantic_map_equals_a_loop_over_queries():
    class_logits, mask_logits = torch.randn(2, 3, 5), torch.randn(2, 3, 4, 6)
    expected = torch.zeros(2, 4, 4, 6)
    for s in range(2):
        for n in range(3):
            odds = class_logits[s, n].exp()
            for k in range(4):  # the fifth is "no object"
                expected[s, k] += odds[k] / odds.sum() / (1 + (-mask_logits[s, n]).exp())
    torch.testing.assert_close(semantic_map(class_logits, mask_logits), expected)


def test_predict_is_the_semantic_map_slice_by_slice_on_the_patch():
    net = tiny(patch_size=(3, 24, 40), encoder_size=(64, 96))
    volume, _ = task(net, batch=2)
    outputs = net(volume)
    masks = F.interpolate(outputs["mask_logits"], size=(24, 40), mode="bilinear")
    maps = semantic_map(outputs["class_logits"], masks)
    found = net.predict(volume)
    assert not found.requires_grad and found.dtype == torch.float32
    for b in range(2):
        for d in range(3):
            torch.testing.assert_close(found[b, :, d], maps[b * 3 + d])


# ----------------------------------------------------------------------------------------------------------- the import

IMPORT_CHECK = """
import sys
import model
assert "torchvision" not in sys.modules, "model imports torchvision"
assert "segment_anything" not in sys.modules, "the stand-in for the package stays behind"
from segment_anything.modeling import Sam
assert Sam is model.modeling.Sam

# With a torchvision the whole package still imports; this one is made of nothing.
from unittest.mock import MagicMock
for name in ("", ".ops", ".ops.boxes", ".transforms", ".transforms.functional"):
    sys.modules["torchvision" + name] = MagicMock()
import segment_anything.modeling
from segment_anything import SamPredictor, modeling
assert modeling.Sam is Sam
assert segment_anything.sam_model_registry["vit_b"] is model.build_sam.build_sam_vit_b
"""


def test_torchvision_is_not_imported_and_the_package_still_imports_later():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT_CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_compile_finds_one_graph_that_gives_the_same_outputs_and_gradients():
    net = tiny()
    volume = torch.randn(1, *([net.config.num_channels, *net.config.patch_size]))
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def run() -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        outputs = list(net(volume).values())
        return outputs, torch.autograd.grad(sum(output.float().sum() for output in outputs), weights, allow_unused=True)

    expected = run()
    net.compile(backend="eager", fullgraph=True)  # what is traced, without the minutes of code generation
    for ours, theirs in zip(run(), expected):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs) if a is not None)
