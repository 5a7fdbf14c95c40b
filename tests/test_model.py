"""Claims about the whole network: it starts as SAM, nothing mixes that must not, all of it trains."""

import ast
import contextlib
import copy
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as M
from matcher import Segments, SetCriterion, pairwise_terms
from model import VARIANTS, MaskSAM, MaskSAMConfig, build_model, count_parameters, semantic_map
from networks import labels_to_segments, task, tiny, wake, wake_sam
from support.sam import BACKBONES, modeling
from support.tiny_vit import TransformerBlock


@pytest.fixture(scope="module")
def vit_b() -> MaskSAM:
    """ViT-B with random weights, for tests that need the real sizes. Each leaves the weights as they were."""
    net = tiny(sam="vit_b")
    wake_sam(net.sam)
    return net


def awake(**changes) -> MaskSAM:
    net = tiny(**changes).double()
    wake_sam(net.sam)
    return net


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def changed(after: Tensor, before: Tensor, dims: int) -> Tensor:
    """Which entries of the first `dims` axes differ: rounding is below 1e-11, an effect above 1e-9."""
    difference = (after - before).detach().flatten(dims).abs().amax(-1)
    assert ((difference < 1e-11) | (difference > 1e-9)).all(), "neither rounding nor an effect"
    return difference > 1e-9


# ---- It starts as SAM

REPEATED = {
    M.ViTEncoder.__call__: modeling.ImageEncoderViT.forward,
    M.EncoderBlockAdapters.forward: modeling.image_encoder.Block.forward,
    M.TinyViTBlockAdapters.forward: TransformerBlock.forward,
    M.MaskSAM.decode: modeling.MaskDecoder.predict_masks,
    M.two_way_transformer: modeling.TwoWayTransformer.forward,
    M.DecoderBlockAdapters.forward: modeling.transformer.TwoWayAttentionBlock.forward,
}


def code_lines(function) -> list[str]:
    """The lines of a function's body, without docstring, comments, spaces and names of the held modules."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    definition = ast.parse("\n".join(lines)).body[0]
    first = definition.body[0]
    start = first.end_lineno if ast.get_docstring(definition) else first.lineno - 1
    unmarked = (line for line in lines[start:] if not line.rstrip().endswith("# +"))
    bare = (re.sub(r"\b(self|encoder|decoder|transformer|block)\.|\s|#.*", "", line) for line in unmarked)
    return [line for line in bare if line]


@pytest.mark.parametrize("ours", REPEATED, ids=lambda function: function.__qualname__)
def test_unmarked_lines_of_a_repeated_forward_stand_in_sams_source_in_that_order(ours):
    rest = iter(code_lines(REPEATED[ours]))
    unmarked = code_lines(ours)
    assert len(unmarked) >= 2
    for line in unmarked:
        assert line in rest, f"{line} differs from SAM's or stands elsewhere, and does not end in '# +'"


LAST_BLOCKS = {"tiny": (0, 1, 2, 3), "vit_b": (2, 5, 8, 11)}


@pytest.mark.parametrize(
    "sam, encoder_size",
    [("tiny", (64, 96)), ("tiny", (256, 256)), ("tiny", (16, 16)), ("tiny", (176, 80)), ("vit_b", (64, 64))]
    + [("mobile_sam", (80, 96)), ("lite_medsam", (20, 24))],
)
def test_fresh_encoder_equals_sams_with_outputs_of_its_blocks_as_taps(sam, encoder_size, vit_b):
    # Most of these grids pad windows of 7, 8 or 14 tokens; 256 pixels are 2 x 2 windows of `tiny`.
    net = copy.deepcopy(vit_b).double() if sam == "vit_b" else awake(sam=sam, encoder_size=encoder_size)
    encoder, expected = net.sam.image_encoder, []
    if sam in LAST_BLOCKS:
        last = [encoder.blocks[index] for index in LAST_BLOCKS[sam]]
    else:
        last = [stage.blocks[-1] for stage in encoder.layers]
    for block in last:
        block.register_forward_hook(lambda *call: expected.append(call[2].permute(0, 3, 1, 2)))
    image = torch.randn(2, 3, *encoder_size, dtype=torch.float64)
    with torch.no_grad():
        neck, taps = net.encode(image)
        expected.clear()
        assert relative_error(neck, encoder(image)) < 1e-6
    for tap, output in zip(taps, expected, strict=True):
        assert tap.shape == output.shape and relative_error(tap, output) < 1e-6


def decoder_inputs(net: MaskSAM, batch: int = 2) -> dict[str, Tensor]:
    slices, n, (h, w) = batch * net.config.patch_size[0], net.config.num_queries, net.config.grid
    dim, dtype = net.sam.mask_decoder.transformer_dim, net.class_tokens.dtype
    shapes = {"image_embeddings": (slices, dim, h, w), "image_pe": (1, dim, h, w)}
    shapes["sparse_prompt_embeddings"] = (slices * n, 2, dim)
    shapes["dense_prompt_embeddings"] = (slices * n, dim, h, w)
    shapes["class_tokens"] = (slices, n, dim)
    torch.manual_seed(3)
    return {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}


def decoder_error(net: MaskSAM) -> float:
    """`decode` without class tokens against SAM's decoder, which takes one image at a time."""
    inputs, n = decoder_inputs(net) | {"class_tokens": None}, net.config.num_queries
    image, image_pe, sparse, dense = list(inputs.values())[:4]
    with torch.no_grad():
        class_logits, found = net.decode(**inputs)
        of_slice = zip(image.split(1), sparse.split(n), dense.split(n))
        masks = [net.sam.mask_decoder.predict_masks(x, image_pe, *prompts)[0] for x, *prompts in of_slice]
    assert class_logits is None
    return relative_error(found, torch.stack(masks)[:, :, 0])


@pytest.mark.parametrize(
    "changes",
    [{"variant": variant} for variant in VARIANTS]
    + [{"encoder_size": (48, 80)}, {"patch_size": (1, 32, 32)}, {"num_queries": 1}, {"sam": "lite_medsam"}]
    + [{"sam": "lite_medsam", "variant": "b6"}],
    ids=str,
)
def test_every_variant_starts_as_sams_encoder_and_decoder_image_by_image(changes):
    net = awake(**changes)
    image = torch.randn(2 * net.config.patch_size[0], 3, *net.config.encoder_size, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(net.encode(image)[0], net.sam.image_encoder(image)) < 1e-6
    assert decoder_error(net) < 1e-6


def test_class_token_alone_changes_the_sign_of_a_few_mask_pixels():
    net = awake()
    inputs = decoder_inputs(net)
    inputs["class_tokens"] = net.class_tokens.expand(4, -1, -1)
    with torch.no_grad():
        _, masks = net.decode(**inputs)
        _, sams = net.decode(**inputs | {"class_tokens": None})
    share = ((masks > 0) != (sams > 0)).double().mean()
    assert decoder_error(net) < 1e-6 and 0 < share < 0.15


def test_prompts_reach_sam_as_encoder_pixels_in_float32_under_autocast():
    # SAM's own prompt encoder gets a box in pixels and a mask at 4x the token grid.
    net = tiny(variant="b3", encoder_size=(64, 96), patch_size=(2, 10, 20))
    boxes = torch.tensor([0.25, 0.5, 0.75, 1.0]).expand(2, 3, 4)
    aux = {"aux_boxes": boxes, "aux_mask_logits": torch.randn(2, 3, 10, 20)}
    found = net.encode_prompts(aux)
    masks = F.interpolate(aux["aux_mask_logits"], size=(16, 24), mode="bilinear").flatten(0, 1)[:, None]
    pixels = torch.tensor([[24.0, 32.0, 72.0, 64.0]]).expand(6, 4)  # x of 96 columns, y of 64 rows
    expected = net.sam.prompt_encoder(points=None, boxes=pixels, masks=masks)
    torch.testing.assert_close(found[:2], expected)
    assert found[1].shape == (6, 64, 4, 6) and found[2].shape == (1, 64, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(net.encode_prompts(aux), found))


@pytest.mark.parametrize("sam", ["tiny", "mobile_sam"])
def test_fresh_stem_shows_sam_a_grey_picture_in_its_pixel_statistics(sam):
    # A z-scored slice, as grey levels around SAM's mean with SAM's deviation, through SAM's normalisation.
    net = tiny(sam=sam, encoder_size=(80, 96), patch_size=(1, 80, 96), num_channels=2)
    x = torch.randn(1, 2, 80, 96)
    grey = x.mean(1, keepdim=True) * (58.395 + 57.12 + 57.375) / 3 + (123.675 + 116.28 + 103.53) / 3
    expected = (grey - net.sam.pixel_mean) / net.sam.pixel_std
    torch.testing.assert_close(net.stem(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value, grey", [(-1.0, 0.0), (0.0, 60 / 255), (3.25, 1.0)])
def test_fresh_stem_shows_lite_medsam_the_unit_range(value, grey):
    # ACDC's clipped slices reach from -0.98, which is air, to 3.3.
    net = tiny(sam="lite_medsam", patch_size=(1, 20, 24))
    picture = net.stem(torch.full((1, 1, 20, 24), value))
    torch.testing.assert_close(picture, torch.full((1, 3, 20, 24), grey))


def test_stem_learns_beside_the_grey_picture_and_resamples_to_the_encoder():
    net = tiny(encoder_size=(64, 96), patch_size=(1, 20, 30), num_channels=3)
    x = torch.randn(1, 3, 20, 30)
    before, after = net.stem(x), wake(net.stem)(x)
    assert before.shape == (1, 3, 64, 96) and (after - before).abs().amax((0, 2, 3)).min() > 0.01


DECODER_PLACES = ["behind_self_attention", "behind_token_to_image", "beside_mlp", "behind_image_to_token"]


def test_variants_are_the_rows_of_table_4():
    vanilla, after_up, before_down = "VanillaAdapter", "DepthMLPAfterUpAdapter", "DepthMLPBeforeDownAdapter"
    rows = {f"b{i}": (form, vanilla, vanilla, i == 5) for i, form in enumerate("abcdd", start=1)}
    rows |= {"b6": ("d", after_up, after_up, True), "b7": ("d", before_down, before_down, True)}
    depth_mlp = "DepthMLPAdapter"
    rows |= {"b8": ("d", depth_mlp, depth_mlp, True), "b9": ("d", "DepthConvAdapter", depth_mlp, True)}
    assert VARIANTS.keys() == rows.keys()
    for variant, expected in rows.items():
        net, kinds = tiny(variant=variant), {"image": set(), "tokens": set()}
        for block in [*net.encoder_adapters, *net.decoder_adapters]:
            for place, adapter in block.named_children():
                tokens = place in DECODER_PLACES[:3] and block in list(net.decoder_adapters)
                kinds["tokens" if tokens else "image"].add(type(adapter).__name__)
        embeddings = {net.encoder_depth_embed is not None, net.decoder_depth_embed is not None}
        assert (net.prompt_generator.form, *kinds["image"], *kinds["tokens"], *embeddings) == expected


# ---- Nothing mixes that must not


BLOCKS = [("tiny", 128, 4, 8), ("light", 128, 4, 7), ("light", 160, 5, 14), ("light", 320, 10, 7)]


@pytest.mark.parametrize("kind, dim, heads, window", BLOCKS)
@pytest.mark.parametrize("place", ["behind_attention", "beside_mlp"])
def test_adapter_links_the_same_place_of_neighbouring_slices(kind, dim, heads, window, place):
    # The release folds windows as if they were slices, so an impulse leaves its place. Here attention fills
    # its window; the convolution of the adapter, and that of TinyViT's block, add a token each around it.
    torch.manual_seed(0)
    tinys = kind == "tiny"
    block = (
        BACKBONES["tiny"].build().image_encoder.blocks[0] if tinys else TransformerBlock(dim, heads, window)
    )
    adapters = (M.EncoderBlockAdapters if tinys else M.TinyViTBlockAdapters)(
        VARIANTS["b9"][1], dim, depth=5
    ).double()
    block, halo, y, x = block.double(), 1 if tinys else 2, window + 2, window + 3
    reach = [slice(window - halo, 2 * window + halo)] * 2
    if place == "beside_mlp":
        nn.init.zeros_(
            block.attn.proj.weight
        )  # no attention: the impulse reaches the adapter at its own token
        reach = [slice(y - halo, y + halo + 1), slice(x - halo, x + halo + 1)]
    wake(getattr(adapters, place))
    tokens = torch.randn(10, 2 * window + 1, 3 * window - 2, dim, dtype=torch.float64)
    for d in (0, 2):
        moved = tokens.clone()
        moved[5 + d, y, x] += torch.randn(dim, dtype=torch.float64)  # uneven, or the norm takes it away
        with torch.no_grad():
            found = changed(adapters(moved, block), adapters(tokens, block), 3).unflatten(0, (2, 5))
        expected = torch.zeros_like(found)
        expected[1, max(d - 1, 0) : d + 2, reach[0], reach[1]] = True
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sam, index", [("tiny", 1), ("lite_medsam", 0)])
def test_adapter_beside_the_mlp_counts_half(sam, index):
    net = awake(sam=sam)
    block, adapters = net.encoder.stages[1][0][0], net.encoder_adapters[index]
    nn.init.ones_(adapters.beside_mlp.up.bias)  # the adapter gives 1 everywhere
    x = torch.randn(2, 8, 8, 128, dtype=torch.float64)
    torch.testing.assert_close(adapters(x, block), block(x) + 0.5)


@pytest.mark.parametrize("variant", ["b1", "b6", "b7", "b8", "b9"])
@pytest.mark.parametrize("place", DECODER_PLACES)
def test_queries_and_volumes_never_mix_in_the_decoder(variant, place):
    # Rows are (b*D + d)*N + n. An impulse in the prompt of a query reaches that query alone: in its own slice
    # by SAM, in all slices of its volume through a depth MLP, in the neighbours through the convolution.
    net = tiny(variant=variant, patch_size=(4, 32, 32)).double()
    wake(
        getattr(net.decoder_adapters[-1], place)
    )  # of the last block, where tokens have met the image already
    inputs, (b, d, n) = decoder_inputs(net), (1, 1, 2)
    adapter = VARIANTS[variant][1 if place == "behind_image_to_token" else 2].__name__
    slices = {"VanillaAdapter": slice(d, d + 1), "DepthConvAdapter": slice(d - 1, d + 2)}.get(
        adapter, slice(None)
    )
    reach = torch.zeros(2, 4, 3, dtype=torch.bool)
    reach[b, slices, n] = True
    with torch.no_grad():
        before = net.decode(**inputs)
        for source in ("sparse_prompt_embeddings", "dense_prompt_embeddings", "class_tokens"):
            moved = inputs | {source: inputs[source].clone()}
            target = moved[source] if source == "class_tokens" else moved[source].unflatten(0, (8, 3))
            target[b * 4 + d, n] += torch.randn(target.shape[2:], dtype=torch.float64)
            for logits, old in zip(net.decode(**moved), before):
                assert torch.equal(changed(logits, old, 2).view(2, 4, 3), reach), source


@pytest.mark.parametrize("sam, part", [("tiny", "encoder"), ("lite_medsam", "encoder"), ("tiny", "decoder")])
def test_depth_embedding_belongs_to_the_slice_of_its_index_in_every_volume(sam, part):
    net = awake(sam=sam, patch_size=(4, 32, 32))
    inputs, image = decoder_inputs(net), torch.randn(8, 3, *net.config.encoder_size, dtype=torch.float64)
    with torch.no_grad():
        run = (lambda: net.encode(image)[0]) if part == "encoder" else (lambda: net.decode(**inputs)[1])
        before, embedding = run(), getattr(net, f"{part}_depth_embed")
        embedding[2] = torch.randn(embedding.shape[-1], dtype=torch.float64)
        found = changed(run(), before, 1).view(2, 4)
    assert found.tolist() == [[False, False, True, False]] * 2


def test_class_token_is_the_global_token_of_its_query_plus_the_auxiliary_one():
    net = tiny()
    volume, _ = task(net, batch=2)
    with torch.no_grad():
        before = net(volume)["class_logits"]
        net.class_tokens[1] += 1
        moved = (net(volume)["class_logits"] - before).abs().amax((0, 2))
    assert moved[1] > 1e-3 and moved[[0, 2]].max() == 0


@pytest.mark.parametrize("changes", [{"encoder_size": (64, 96)}, {"sam": "lite_medsam"}], ids=str)
def test_volumes_of_a_batch_never_mix_in_the_whole_model(changes):
    net = tiny(patch_size=(3, 24, 40), **changes)
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
        torch.testing.assert_close(alone[key], before[key][:3], rtol=1e-3, atol=1e-3, msg=key)


# ---- Sizes, configuration, given boxes


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_size": (64, 96)},
        {"encoder_size": (16, 16)},
        {"patch_size": (3, 37, 53)},
        {"patch_size": (1, 7, 5)},
    ]
    + [{"num_channels": 4, "num_classes": 14, "num_queries": 24}, {"sam": "lite_medsam"}],
    ids=str,
)
def test_any_size_channels_and_classes(changes):
    net = tiny(**changes)
    config, (depth, *patch) = net.config, net.config.patch_size
    volume, segments = task(net, batch=2)
    outputs, rows, (h, w) = net(volume), (2 * depth, config.num_queries), config.grid
    assert {key: tuple(value.shape) for key, value in outputs.items()} == {
        "class_logits": (*rows, config.num_classes + 1),
        "mask_logits": (*rows, 4 * h, 4 * w),
        "aux_mask_logits": (*rows, *patch),
        "aux_boxes": (*rows, 4),
    }
    assert SetCriterion()(outputs, segments)[0].isfinite()
    assert net.predict(volume).shape == (2, config.num_classes, depth, *patch)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sam": "vit_x"}, "sam is 'vit_x', expected one of tiny, vit_b, vit_l, vit_h"),
        ({"variant": "b10"}, "variant is 'b10'"),
        ({"mask_prompt": "soft"}, "mask_prompt is 'soft', expected one of logits, binary"),
        ({"encoder_size": (100, 64)}, r"encoder_size is \(100, 64\), expected 2 positive multiples of 16"),
        ({"sam": "lite_medsam", "encoder_size": (64, 66)}, "positive multiples of 4"),
        ({"patch_size": (32, 32)}, r"patch_size is \(32, 32\), expected 3"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"given_boxes": True, "num_queries": 3}, "found 3 queries, expected 4 or more"),
    ],
)
def test_configuration_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskSAMConfig(**changes)


def test_volume_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 32, 32\).*\('B', 1, 2, 32, 32\)"):
        tiny()(torch.zeros(1, 1, 3, 32, 32))


def boxes_task(net: MaskSAM) -> tuple[Tensor, Segments]:
    """`task` with the truth behind the channels; the second slice lacks class 2."""
    volume, segments = task(net)
    labels = segments.masks.to(torch.uint8).argmax(1)
    labels[1][labels[1] == 2] = 0
    volume = torch.cat([volume, labels[None, None].to(volume)], dim=1)
    return volume, labels_to_segments(labels, net.config.num_classes)


@pytest.mark.parametrize("variant", ["b1", "b2", "b9"])
def test_with_given_boxes_every_class_goes_to_its_query_and_all_trains(variant):
    net = tiny(variant=variant, given_boxes=True)
    volume, segments = boxes_task(net)
    outputs, criterion = net(volume), SetCriterion()
    probability = outputs["class_logits"].softmax(-1)
    assert not segments.present[1, 2] and (probability[1, :, 2] == 0).all()  # without a box it is not drawn
    assert probability[0, 1, 2] > 0 and (probability[0, [0, 2], 2] == 0).all()
    assert outputs["asked"].tolist() == [[True, True, True], [True, True, False]]
    loss, _ = criterion(outputs, segments)
    loss.backward()
    assert loss < 100  # a class that no query may have would cost thousands
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assigned = criterion.matcher(pairwise_terms(outputs, segments), segments.present)
    assert assigned[:, 0, 1].all() and assigned[0, 1, 2] and not assigned[1, :, 2].any()


def test_a_given_box_moves_the_masks_of_its_own_query_and_slice_alone():
    net = tiny(given_boxes=True, patch_size=(3, 32, 32))
    volume = torch.cat([task(net)[0], torch.zeros(1, 1, 3, 32, 32)], dim=1)
    volume[0, -1, 1, 4:9, 4:9] = 2
    moved = volume.clone()
    moved[0, -1, 1, 9:20, 4:9] = 2
    with torch.no_grad():
        difference = (net(moved)["mask_logits"] - net(volume)["mask_logits"]).abs().flatten(2).amax(-1)
    assert (difference > 0).nonzero().tolist() == [[1, 1]]


# ---- All of it trains, and nothing of a pre-trained SAM


@pytest.mark.parametrize("sam, variant", [("small", name) for name in VARIANTS] + [("lite_medsam", "b9")])
def test_all_but_a_frozen_sam_gets_gradients_and_learns(sam, variant, small):
    if sam == "small":
        net, _ = build_model(MaskSAMConfig("small", variant, 1, 3, 3, (2, 32, 32), (64, 64)), small)
    else:
        net = awake(sam=sam, variant=variant).float()
    net.train()
    frozen = copy.deepcopy(net.sam.state_dict())  # with the statistics of TinyViT's norms
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    # A silent layer passes no gradient on until it has moved once. Two such in a row (the zero FC of an
    # adapter behind the zero FC of its depth MLP) take two steps.
    for step in range(3):
        volume, segments = task(net, seed=step)
        optimizer.zero_grad()
        SetCriterion()(net(volume), segments)[0].backward()
        trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
        assert not [name for name, p in trainable.items() if p.grad is None]
        silent = [name for name, p in trainable.items() if not p.grad.any()]
        assert all("adapters" in name or "stem" in name for name in silent), silent
        optimizer.step()
    assert not silent, f"still zero at the third step: {silent}"
    assert all((p != start[name]).any() == p.requires_grad for name, p in net.named_parameters())
    assert {name.split(".")[0] for name in start.keys() - trainable.keys()} == {"sam"}
    assert all(torch.equal(value, frozen[key]) for key, value in net.sam.state_dict().items())


@pytest.mark.parametrize("variant", ["b1", "b2", "b9"])
def test_tiny_trains_whole_and_ddp_finds_no_unused_parameter(variant):
    net = tiny(variant=variant)
    volume, segments = task(net)
    SetCriterion()(net(volume), segments)[0].backward()
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    trained = {name for name, p in net.sam.named_parameters() if p.requires_grad}
    assert {"image_encoder.pos_embed", "image_encoder.blocks.0.attn.rel_pos_h"} <= trained
    assert not any(name.startswith("mask_decoder.iou_prediction_head") for name in trained)


@pytest.mark.parametrize("sam, frozen", [("vit_b", 93.7), ("vit_l", 312.3), ("vit_h", 641.1)])
def test_all_of_sam_is_frozen_and_the_acdc_preset_tunes_about_14_million(sam, frozen):
    with torch.device("meta"):  # shapes without memory
        net = MaskSAM(MaskSAMConfig(sam=sam))
    counts = count_parameters(net)
    tuned, kept = (sum(count) for count in zip(*counts.values()))
    assert tuned + kept == sum(p.numel() for p in net.parameters())
    assert kept / 1e6 == pytest.approx(frozen, abs=0.06)
    assert all(count == 0 for component, (count, _) in counts.items() if component.startswith("sam."))
    assert counts["classifier"] == (256 * 5 + 5, 0) and (sam != "vit_b" or 13e6 < tuned < 15e6)


@pytest.mark.parametrize("sam", ["tiny", "mobile_sam", "vit_b"])
@pytest.mark.parametrize("given_boxes", [False, True])
def test_a_step_makes_no_tensor_on_another_device(sam, given_boxes, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    with torch.device("meta"):
        net = tiny(sam=sam, given_boxes=given_boxes).to("meta")  # SAM makes its pixel statistics on the CPU
    volume, segments = (boxes_task if given_boxes else task)(tiny())
    outputs = net(volume.to("meta"))
    terms = pairwise_terms(outputs, Segments(*(tensor.to("meta") for tensor in segments)))
    sum(term.sum() for term in terms.values()).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(tensor.is_meta for tensor in [*outputs.values(), *gradients])


def test_final_loss_alone_reaches_the_mask_and_box_heads():
    net = tiny()  # in the release nothing of the final loss does
    volume, segments = task(net)
    outputs = net(volume)
    SetCriterion()({key: outputs[key] for key in ("class_logits", "mask_logits")}, segments)[0].backward()
    for head in ("mask_head", "box_head"):
        assert all(p.grad.abs().sum() > 0 for p in getattr(net.prompt_generator, head).parameters()), head


@pytest.mark.parametrize("sam", ["tiny", "lite_medsam"])
def test_gradient_checkpointing_computes_blocks_twice_but_the_last_mlp_layer_and_changes_no_gradient(sam):
    gradients = []
    for checkpointing in (False, True):
        net, calls = tiny(sam=sam), []
        wake_sam(net.sam)
        wake(net.encoder_adapters, std=0.05)
        net.gradient_checkpointing = checkpointing
        mlp = net.encoder.stages[1][0][0].mlp
        for name, layer in mlp.named_children():
            layer.register_forward_hook(lambda *call, name=name, calls=calls: calls.append(name))
        volume, segments = task(net, batch=2)
        SetCriterion()(net(volume), segments)[0].backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        first, last = ("lin1", "lin2") if sam == "tiny" else ("fc1", "fc2")
        assert (calls.count(first), calls.count(last)) == (1 + checkpointing, 1)
        net.predict(volume)  # nothing is computed again
        assert calls.count(first) == 2 + checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():  # the same kernels run twice on the same numbers
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("sam", ["tiny", "lite_medsam"])
def test_bfloat16_autocast_stays_near_float32(sam):
    net = tiny(sam=sam)
    volume, segments = task(net, batch=2)
    with torch.no_grad():
        expected = net(volume)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(volume)
    for key, value in expected.items():  # 8 bits of mantissa through all layers: a few per cent of the range
        assert (found[key].float() - value).abs().max() < 0.06 * value.abs().max(), key
    assert SetCriterion()(found, segments)[0].dtype == torch.float32


# ---- Inference


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
    outputs, found = net(volume), net.predict(volume)
    masks = F.interpolate(outputs["mask_logits"], size=(24, 40), mode="bilinear")
    maps = semantic_map(outputs["class_logits"], masks)
    assert not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack([maps[:3], maps[3:]]).transpose(1, 2))


def test_torch_compile_finds_one_graph_that_gives_the_same_outputs_and_gradients():
    net = tiny()
    volume, weights = task(net)[0], [parameter for parameter in net.parameters() if parameter.requires_grad]

    def run() -> list[Tensor]:
        outputs = list(net(volume).values())
        total = sum(output.float().sum() for output in outputs)
        return [*outputs, *torch.autograd.grad(total, weights, allow_unused=True)]

    expected = run()
    net.compile(backend="eager", fullgraph=True)  # traces the graph, without the minutes of code generation
    assert all(torch.equal(a, b) for a, b in zip(run(), expected) if a is not None)
