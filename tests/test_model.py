"""Claims about the whole network: it starts as SAM, nothing mixes that must not, all of it trains."""

import ast
import contextlib
import copy
import inspect
import itertools
import re
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import model as M
from matcher import Segments, SetCriterion, pairwise_terms
from model import VARIANTS, MaskSAM, MaskSAMConfig, count_parameters, semantic_map, trained_state
from networks import task, tiny, wake, wake_sam
from support import attention
from support.presets import PRESETS
from support.processes import needs_checkpointing
from support.sam import BACKBONES, modeling, store_frozen
from support.tiny_vit import TransformerBlock

REPEATED = {
    M.ViTEncoder.__call__: modeling.ImageEncoderViT.forward,
    M.EncoderBlockAdapters.forward: modeling.image_encoder.Block.forward,
    M.TinyViTBlockAdapters.forward: TransformerBlock.forward,
    M.MaskSAM.decode: modeling.MaskDecoder.predict_masks,
    M.two_way_transformer: modeling.TwoWayTransformer.forward,
    M.DecoderBlockAdapters.forward: modeling.transformer.TwoWayAttentionBlock.forward,
}
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def awake(**changes) -> MaskSAM:
    net = tiny(**changes).double()
    wake_sam(net.sam)
    return net


def changed(after: Tensor, before: Tensor, dims: int) -> Tensor:
    """Which entries of the first `dims` axes differ: rounding is below 1e-11, an effect above 1e-9."""
    difference = (after - before).detach().flatten(dims).abs().amax(-1)
    assert ((difference < 1e-11) | (difference > 1e-9)).all(), "neither rounding nor an effect"
    return difference > 1e-9


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
    rest, unmarked = iter(code_lines(REPEATED[ours])), code_lines(ours)
    assert len(unmarked) >= 2
    for line in unmarked:
        assert line in rest, f"{line} differs from SAM's or stands elsewhere, and does not end in '# +'"


SIZES = [("tiny", (64, 96), False), ("tiny", (16, 16), True), ("tiny", (176, 80), False)]
SIZES += [("lite_medsam", (20, 24), False), ("lite_medsam", (20, 24), True)]  # no grid fills its windows


@pytest.mark.parametrize("sam, encoder_size, volumetric", SIZES)
def test_fresh_encoder_equals_sams_with_outputs_of_its_blocks_as_taps(sam, encoder_size, volumetric):
    net, expected = awake(sam=sam, encoder_size=encoder_size, volumetric=volumetric), []
    encoder = net.sam.image_encoder
    for block in encoder.blocks if sam == "tiny" else [stage.blocks[-1] for stage in encoder.layers]:
        block.register_forward_hook(lambda *call: expected.append(call[2].permute(0, 3, 1, 2)))
    image = torch.randn(2, 3, *encoder_size, dtype=torch.float64)
    with torch.no_grad():
        neck, taps = net.encode(image)
        expected.clear()
        close([encoder(image), *expected], [neck, *taps])


def decoder_inputs(net: MaskSAM) -> dict[str, Tensor]:
    """The arguments of `decode` for two volumes."""
    slices, n, grid = 2 * net.config.patch_size[0], net.config.num_queries, net.config.grid
    dim, dtype = net.sam.mask_decoder.transformer_dim, net.class_tokens.dtype
    shapes = {"image_embeddings": (slices, dim, *grid), "image_pe": (1, dim, *grid)}
    shapes |= {"sparse_prompt_embeddings": (slices * n, 2, dim)}
    shapes |= {"dense_prompt_embeddings": (slices * n, dim, *grid), "class_tokens": (slices, n, dim)}
    return {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}


CHANGES = [{"variant": "b1"}, {"variant": "b6"}, {"variant": "b7"}, {"patch_size": (1, 32, 32)}]
CHANGES += [{"num_classes": 2, "num_queries": 2}, {"sam": "lite_medsam"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_variant_starts_as_sams_decoder_image_by_image(changes):
    net = awake(**changes)
    inputs, n = decoder_inputs(net) | {"class_tokens": None}, net.config.num_queries
    neck, image_pe, sparse, dense, _ = inputs.values()
    with torch.no_grad():
        found = net.decode(**inputs)[1]
        of_slice = zip(neck.split(1), sparse.split(n), dense.split(n))  # SAM takes one image at a time
        masks = [net.sam.mask_decoder.predict_masks(x, image_pe, *prompts)[0] for x, *prompts in of_slice]
        with_token = net.decode(**inputs | {"class_tokens": net.class_tokens.expand(len(neck), -1, -1)})[1]
    close(found, torch.stack(masks)[:, :, 0])
    assert 0 < ((with_token > 0) != (found > 0)).double().mean() < 0.15  # which alone changes a few signs


def test_prompts_reach_sam_as_encoder_pixels_in_float32_under_autocast():
    # SAM's own prompt encoder gets a box in pixels and a mask at 4x the token grid.
    net = tiny(variant="b3", encoder_size=(64, 96), patch_size=(2, 10, 20))
    boxes, logits = torch.tensor([0.25, 0.5, 0.75, 1.0]).expand(2, 3, 4), torch.randn(2, 3, 10, 20)
    found = net.encode_prompts(aux := {"aux_boxes": boxes, "aux_mask_logits": logits})
    masks = F.interpolate(logits, size=(16, 24), mode="bilinear").flatten(0, 1)[:, None]
    pixels = torch.tensor([[24.0, 32.0, 72.0, 64.0]]).expand(6, 4)  # x of 96 columns, y of 64 rows
    close(found[:2], net.sam.prompt_encoder(points=None, boxes=pixels, masks=masks))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(net.encode_prompts(aux), found))


@pytest.mark.parametrize("sam", ["tiny", "mobile_sam", "lite_medsam"])
def test_fresh_stem_shows_sam_a_grey_picture_in_its_pixel_statistics(sam):
    # A z-scored slice, as grey levels around SAM's mean with SAM's deviation, through SAM's normalisation.
    net, x = tiny(sam=sam, patch_size=(1, 20, 24), num_channels=3), torch.randn(1, 3, 20, 24)
    mean, deviation = (123.675 + 116.28 + 103.53) / 3, (58.395 + 57.12 + 57.375) / 3
    if sam == "lite_medsam":  # its pictures lie in [0, 1]: ACDC's darkest voxel, -1, is 0 and 3.25 is 1
        mean = deviation = 60.0
    grey = F.interpolate(x.mean(1, keepdim=True), size=net.config.encoder_size, mode="bilinear")
    fresh, learnt = net.stem(x), wake(net.stem)(x)
    close(fresh, (grey * deviation + mean - net.sam.pixel_mean) / net.sam.pixel_std, rtol=1e-4, atol=1e-5)
    assert (learnt - fresh).abs().amax((0, 2, 3)).min() > 0.01, "a trained stem adds something of its own"


def test_variants_are_the_rows_of_table_4():
    forms, image, tokens, depth = zip(*(VARIANTS[f"b{i}"] for i in range(1, 10)))
    assert "".join(forms) == "abcdddddd" and list(depth) == [False] * 4 + [True] * 5
    rows = ["Vanilla"] * 5 + ["DepthMLPAfterUp", "DepthMLPBeforeDown", "DepthMLP"]
    assert [kind.__name__ for kind in image] == [f"{name}Adapter" for name in [*rows, "DepthConv"]]
    assert tokens[:8] == image[:8] and tokens[8] is tokens[7]


# ---- Nothing mixes that must not


@pytest.mark.parametrize("kind, window, dim", [("windows", 8, 128), ("global", 0, 128), ("light", 7, 64)])
@pytest.mark.parametrize("place", ["behind_attention", "beside_mlp"])
def test_adapter_links_the_same_place_of_neighbouring_slices(kind, window, dim, place):
    # The release folds windows as if they were slices, so an impulse leaves its place. Here attention fills
    # its window; the convolution of the adapter, and that of TinyViT's block, add a token each around it.
    adapters, block, halo = M.TinyViTBlockAdapters, TransformerBlock(64, 4, 7), 2
    if kind != "light":
        adapters, block = M.EncoderBlockAdapters, BACKBONES["tiny"].build().image_encoder.blocks[window == 0]
        halo = 1
    adapters, block = adapters(VARIANTS["b9"][1], dim, depth=3).double(), block.double()
    reach = [slice(window - halo, 2 * window + halo) if window else slice(None)] * 2
    if place == "beside_mlp":  # no attention: the impulse reaches the adapter at its own token
        nn.init.zeros_(block.attn.proj.weight)
        reach = [slice(10 - halo, 11 + halo), slice(11 - halo, 12 + halo)]
    wake(getattr(adapters, place))
    tokens = torch.randn(6, 17, 22, dim, dtype=torch.float64)
    for d in (0, 1):
        moved = tokens.clone()
        moved[3 + d, 10, 11] += torch.randn(dim, dtype=torch.float64)  # uneven, or the norm takes it away
        with torch.no_grad():
            found = changed(adapters(moved, block), adapters(tokens, block), 3).unflatten(0, (2, 3))
        expected = torch.zeros_like(found)
        expected[1, max(d - 1, 0) : d + 2, reach[0], reach[1]] = True
        assert torch.equal(found, expected)


def test_adapter_behind_a_convolution_block_links_neighbouring_slices_of_a_volume():
    net = awake(sam="lite_medsam", volumetric=True, patch_size=(4, 32, 32))
    wake(net.encoder_adapters[0])
    image = torch.randn(8, 3, *net.config.encoder_size, dtype=torch.float64)
    with torch.no_grad():
        before = net.encode(image)[1][0]  # the tap behind the convolution blocks
        image[5] += torch.randn_like(image[5])
        found = changed(net.encode(image)[1][0], before, 1).view(2, 4)
    assert found.tolist() == [[False] * 4, [True, True, True, False]]


@pytest.mark.parametrize("sam, index", [("tiny", 1), ("lite_medsam", 0)])
def test_adapter_beside_the_mlp_counts_half(sam, index):
    net, x = awake(sam=sam), torch.randn(2, 8, 8, 128, dtype=torch.float64)
    block, adapters = net.encoder.stages[1][0][0], net.encoder_adapters[index]
    nn.init.ones_(adapters.beside_mlp.up.bias)  # the adapter gives 1 everywhere
    close(adapters(x, block), block(x) + 0.5)


PLACES = ["behind_self_attention", "behind_token_to_image", "beside_mlp", "behind_image_to_token"]


@pytest.mark.parametrize("variant", ["b1", "b7", "b9"])
@pytest.mark.parametrize("place", PLACES)
def test_queries_and_volumes_never_mix_in_the_decoder(variant, place):
    # Rows are (b*D + d)*N + n. An impulse in the prompt of a query reaches that query alone: in its own slice
    # by SAM, in all slices of its volume through a depth MLP, in the neighbours through the convolution.
    net = tiny(variant=variant, patch_size=(4, 32, 32)).double()
    wake(getattr(net.decoder_adapters[-1], place))  # of the last block, where tokens have met the image
    inputs, (b, d, n) = decoder_inputs(net), (1, 1, 2)
    inputs["detail"] = torch.randn(8, 8, 32, 32, dtype=torch.float64)
    adapter = VARIANTS[variant][1 if place == "behind_image_to_token" else 2].__name__
    slices = {"VanillaAdapter": slice(d, d + 1), "DepthConvAdapter": slice(d - 1, d + 2)}
    reach = torch.zeros(2, 4, 3, dtype=torch.bool)
    reach[b, slices.get(adapter, slice(None)), n] = True
    with torch.no_grad():
        before = net.decode(**inputs)
        for source in ("sparse_prompt_embeddings", "dense_prompt_embeddings", "class_tokens"):
            moved = inputs | {source: inputs[source].clone()}
            target = moved[source] if source == "class_tokens" else moved[source].unflatten(0, (8, 3))
            target[b * 4 + d, n] += torch.randn(target.shape[2:], dtype=torch.float64)
            for logits, old in zip(net.decode(**moved), before):
                assert torch.equal(changed(logits, old, 2).view(2, 4, 3), reach), source


def test_silent_detail_leaves_sams_masks_and_each_pixel_of_it_reaches_its_own_place_in_every_query():
    inputs = decoder_inputs(net := tiny(patch_size=(4, 32, 40)).double())
    detail = torch.randn(8, 8, 32, 40, dtype=torch.float64)
    with torch.no_grad():
        masks, silent, own = (net.decode(**inputs, detail=each)[1] for each in (detail, 0 * detail, None))
        close(silent, F.interpolate(own, (32, 40), mode="bilinear"))
        detail[5, :, 3, 7] += torch.randn(8, dtype=torch.float64)
        found = (net.decode(**inputs, detail=detail)[1] != masks).nonzero()
    assert found.tolist() == [[5, n, 3, 7] for n in range(3)]


@pytest.mark.parametrize("sam, part", [("tiny", "encoder"), ("lite_medsam", "encoder"), ("tiny", "decoder")])
def test_depth_embedding_belongs_to_the_slice_of_its_index_in_every_volume(sam, part):
    net = awake(sam=sam, patch_size=(4, 32, 32))
    inputs, image = decoder_inputs(net), torch.randn(8, 3, *net.config.encoder_size, dtype=torch.float64)
    run = (lambda: net.encode(image)[0]) if part == "encoder" else (lambda: net.decode(**inputs)[1])
    with torch.no_grad():
        before, embedding = run(), getattr(net, f"{part}_depth_embed")
        embedding[2] = torch.randn(embedding.shape[-1], dtype=torch.float64)
        assert changed(run(), before, 1).view(2, 4).tolist() == [[False, False, True, False]] * 2


def test_class_token_is_the_global_token_of_its_query_plus_the_auxiliary_one():
    net = tiny()
    volume, _ = task(net, batch=2)
    with torch.no_grad():
        before = net(volume)["class_logits"]
        net.class_tokens[1] += 1
        moved = (net(volume)["class_logits"] - before).abs().amax((0, 2))
    assert moved[1] > 1e-3 and moved[[0, 2]].max() == 0


# ---- Sizes, configuration, given boxes

ODD = [{"encoder_size": (16, 48), "patch_size": (3, 37, 53)}, {"patch_size": (1, 7, 5)}]
ODD += [{"num_channels": 4, "num_classes": 14, "num_queries": 24}, {"sam": "lite_medsam"}]
ODD += [{"sam": "lite_medsam", "volumetric": True}, {"sam": "tiny_pyramid", "fine_masks": True}]


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_any_size_channels_and_classes_volumes_never_mix_and_predict_is_the_semantic_map(changes):
    net = tiny(**changes)
    for adapters in (net.encoder_adapters, net.decoder_adapters, net.stem):
        wake(adapters, std=0.05)
    config, (depth, *patch), (h, w) = net.config, net.config.patch_size, net.config.grid
    volume, segments = task(net, batch=2)
    outputs, found = net(volume), net.predict(volume)
    sizes = {"class_logits": [config.num_classes + 1], "aux_mask_logits": patch, "aux_boxes": [4]}
    sizes["mask_logits"] = patch if config.fine_masks else [4 * h, 4 * w]
    assert SetCriterion()(outputs, segments)[0].isfinite() and outputs.keys() == sizes.keys()
    masks = F.interpolate(outputs["mask_logits"], size=patch, mode="bilinear")
    maps = semantic_map(outputs["class_logits"], masks)
    close(found, torch.stack([maps[:depth], maps[depth:]]).transpose(1, 2))
    volume[1] += torch.randn_like(volume[1])
    for key, after in net(volume).items():
        assert list(after.shape) == [2 * depth, config.num_queries, *sizes[key]]
        moved = (after != outputs[key]).flatten(1).any(-1).tolist()
        assert moved == [False] * depth + [True] * depth, key


def test_semantic_map_equals_a_loop_over_queries():
    class_logits, mask_logits = torch.randn(2, 3, 5), torch.randn(2, 3, 4, 6)
    odds, expected = class_logits.exp(), torch.zeros(2, 4, 4, 6)
    for s, n, k in itertools.product(range(2), range(3), range(4)):  # the fifth class is "no object"
        expected[s, k] += odds[s, n, k] / odds[s, n].sum() / (1 + (-mask_logits[s, n]).exp())
    close(semantic_map(class_logits, mask_logits), expected)


def test_configuration_that_cannot_be_built_and_a_volume_of_another_shape_are_refused():
    for changes, message in (
        ({"sam": "vit_x"}, "sam is 'vit_x', expected one of tiny, vit_b, vit_l, vit_h"),
        ({"encoder_size": (100, 64)}, r"encoder_size is \(100, 64\), expected 2 positive multiples of 16"),
        ({"num_queries": 3}, "num_queries is 3, expected 4 to 1024"),
        ({"num_channels": 65}, "num_channels is 65, expected 1 to 64"),  # a checkpoint cannot hold more
        ({"patch_size": (4, 1040, 16)}, "expected 3 positive multiples of 1 up to 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskSAMConfig(**changes)
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 32, 32\).*\('B', 1, 2, 32, 32\)"):
        tiny()(torch.zeros(1, 1, 3, 32, 32))


def boxes_task(net: MaskSAM) -> tuple[Tensor, Segments]:
    """`task` with the truth behind the channels; the second slice lacks class 2."""
    volume, segments = task(net)
    labels = segments.masks.to(torch.uint8).argmax(1)
    labels[1][labels[1] == 2] = 0
    return torch.cat([volume, labels[None, None].to(volume)], dim=1), data.label_map_to_segments(labels, 3)


@pytest.mark.parametrize("variant", ["b1", "b2", "b9"])
def test_with_given_boxes_every_class_goes_to_its_query_and_all_trains(variant):
    net, criterion = tiny(variant=variant, given_boxes=True, fine_masks=variant == "b9"), SetCriterion()
    volume, segments = boxes_task(net)
    outputs = net(volume)
    probability = outputs["class_logits"].softmax(-1)
    assert not segments.present[1, 2] and (probability[1, :, 2] == 0).all()  # without a box it is not drawn
    assert probability[0, 1, 2] > 0 and (probability[0, [0, 2], 2] == 0).all()
    loss, _ = criterion(outputs, segments)
    loss.backward()
    assert loss < 100  # a class that no query may have would cost thousands
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assigned = criterion.matcher(pairwise_terms(outputs, segments), segments.present)
    assert assigned[:, 0, 1].all() and assigned[0, 1, 2] and not assigned[1, :, 2].any()
    volume[0, -1, 0] *= volume[0, -1, 0] != 2
    volume[0, -1, 0, :4, :4] = 2  # another box for class 2 in the first slice
    difference = (net(volume)["mask_logits"] - outputs["mask_logits"]).abs().flatten(2).amax(-1)
    assert difference[0, 1] > 0 and difference.count_nonzero() == 1, "a box moves its query and slice alone"


# ---- All of it trains, and nothing of a pre-trained SAM

TRAINED = [("small", variant) for variant in ("b1", "b2", "b6", "b9")] + [("lite_medsam", "b9")]
SMALL = ("fine_masks", "volumetric")  # of the recipe for small patches
TRAINED += [("tiny", "b1"), ("tiny", "b2"), ("tiny", "b9"), ("tiny_pyramid", "b9")]


@pytest.mark.parametrize("sam, variant", TRAINED)
def test_all_but_a_frozen_sam_gets_gradients_and_learns(sam, variant, small):
    net = awake(sam=sam, variant=variant, **dict.fromkeys(SMALL, sam == "tiny_pyramid")).float().train()
    frozen = copy.deepcopy(net.sam.state_dict())  # with the statistics of TinyViT's norms
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer, start = torch.optim.AdamW(trainable.values(), lr=1e-3), copy.deepcopy(trainable)
    # A silent layer passes no gradient on until it has moved once. Two such in a row (the zero FC of an
    # adapter behind the zero FC of its depth MLP) take two steps.
    for step in range(3):
        volume, segments = task(net, seed=step)
        optimizer.zero_grad()
        SetCriterion()(net(volume), segments)[0].backward()
        assert not [name for name, p in trainable.items() if p.grad is None], "DDP would wait for these"
        silent = [name for name, p in trainable.items() if not p.grad.any()]
        assert all("adapters" in name or "stem" in name for name in silent), silent
        optimizer.step()
    assert not silent and all((p != start[name]).any() for name, p in trainable.items())
    if not sam.startswith("tiny"):
        assert trainable.keys() == {n for n, _ in net.named_parameters() if not n.startswith("sam.")}
        assert all(torch.equal(value, frozen[key]) for key, value in net.sam.state_dict().items())
    else:
        names = ["pos_embed", "blocks.0.attn.rel_pos_h", "patch_embed.seq.0.c.weight", "neck.2.weight"]
        found = [f"sam.image_encoder.{name}" in trainable for name in names]
        assert found == ([True, True, False, True] if sam == "tiny" else [False, False, True, True])


def test_all_of_sam_is_frozen_and_the_acdc_preset_tunes_about_14_million():
    with torch.device("meta"):  # shapes without memory
        counts = count_parameters(net := MaskSAM(MaskSAMConfig()))
    tuned, kept = (sum(count) for count in zip(*counts.values()))
    assert [len(blocks) for blocks, _ in net.encoder.stages] == [3] * 4  # taps behind blocks 2, 5, 8, 11
    assert kept / 1e6 == pytest.approx(93.7, abs=0.06) and 13e6 < tuned < 15e6
    assert kept == sum(p.numel() for p in net.sam.parameters()) and counts["classifier"] == [256 * 5 + 5, 0]


PLACES_OF_TENSORS = [("tiny", True, ()), ("tiny", False, ("meta",)), ("vit_b", False, ("meta",))]
PLACES_OF_TENSORS += [(sam, False, ()) for sam in ("mobile_sam", "lite_medsam")]  # ViT-L, ViT-H: as ViT-B


@pytest.mark.parametrize("sam, given_boxes, fused", PLACES_OF_TENSORS)
def test_a_step_makes_no_tensor_on_another_device(sam, given_boxes, fused, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(attention, "FUSED_DEVICES", fused)  # both forms of SAM's attention
    with torch.device("meta"):
        net = tiny(sam=sam, given_boxes=given_boxes).to("meta")  # SAM makes its pixel statistics on the CPU
    volume, segments = (boxes_task if given_boxes else task)(tiny())
    net.gradient_checkpointing = True
    outputs = net(volume.to("meta"))
    terms = pairwise_terms(outputs, Segments(*(tensor.to("meta") for tensor in segments)))
    sum(term.sum() for term in terms.values()).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(tensor.is_meta for tensor in [*outputs.values(), *gradients])


def test_a_prediction_stays_where_the_network_is():
    def predict(windows: Tensor) -> Tensor:
        return torch.zeros(len(windows), 3, *windows.shape[2:], device="meta")

    slabs = evaluate.sliding_window_inference(predict, torch.zeros(1, 9, 20, 20), (4, 16, 16), 0.5, 2)
    parts = [*data.resample_scores(slabs, 9, (13, 30, 30))]
    assert sum(part.shape[1] for part in parts) == 13 and all(part.is_meta for part in parts)


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sam", ["small", "lite_medsam", "tiny"])
def test_frozen_weights_in_autocasts_type_give_the_same_bits_with_fewer_casts(sam, small):
    net, casts, results = awake(sam=sam).float(), [], []
    wake(net.encoder_adapters, std=0.05)
    (volume, segments), before = task(net), copy.deepcopy(trained_state(net))
    for dtype in (None, torch.bfloat16):
        store_frozen(net.sam, dtype)
        with torch.autocast("cpu", torch.bfloat16), Casts() as mode:
            outputs = net(volume)
        weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(SetCriterion()(outputs, segments)[0], weights)
        results.append([*outputs.values(), *gradients])
        casts.append(mode.count)
    close(*results, rtol=0, atol=0)
    close(trained_state(net), before, rtol=0, atol=0)  # that of a checkpoint, with its types
    assert casts[0] - casts[1] > 100 if net.sam_is_frozen else casts[0] == casts[1]


@pytest.mark.parametrize("name, expected", [("acdc", [1, 1, 0]), ("synapse", [1, 0, 0]), ("amos", [1, 0, 0])])
def test_checkpointing_follows_the_memory_of_the_device(name, expected):
    config = MaskSAMConfig(patch_size=PRESETS[name].patch_size, encoder_size=PRESETS[name].encoder_size)
    net = SimpleNamespace(config=config, encoder=SimpleNamespace(block_dims=[768] * 12))
    assert [needs_checkpointing(net, 2, "bf16", gib * 2**30) for gib in (24, 40, 79)] == expected


@pytest.mark.parametrize("sam", ["tiny", "lite_medsam"])
def test_gradient_checkpointing_computes_blocks_twice_but_the_last_mlp_layer_and_changes_no_gradient(sam):
    gradients = []
    for checkpointing in (False, True):
        net, calls = tiny(sam=sam), []
        wake(net.encoder_adapters, std=0.05)
        net.gradient_checkpointing = checkpointing
        for name, layer in net.encoder.stages[1][0][0].mlp.named_children():
            layer.register_forward_hook(lambda *call, name=name, calls=calls: calls.append(name[-1]))
        for level in net.prompt_generator.levels[-2:]:
            level.register_forward_pre_hook(lambda level, _, calls=calls: calls.append(level.size))
        volume, segments = task(net, batch=2)
        SetCriterion()(net(volume), segments)[0].backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        assert (calls.count("1"), calls.count("2")) == (1 + checkpointing, 1)
        levels = [calls.count(level.size) for level in net.prompt_generator.levels[-2:]]
        assert levels == [1, 1 + checkpointing]  # the last level alone
        net.predict(volume)  # nothing is computed again
        assert calls.count("1") == 2 + checkpointing
    close(*gradients, rtol=1e-5, atol=1e-8)  # the same kernels run twice on the same numbers
