from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.models.efficientface import (
    LocalFeatureExtractor,
    Modulator,
    ShuffleUnit,
    SpatialGate,
    channel_shuffle,
)

# What the numbers in the published parameter names mean: rows and columns of a map of 2x2.
QUADRANTS = {1: (0, 0), 2: (1, 0), 3: (0, 1), 4: (1, 1)}


def block(feature: torch.Tensor, quadrant: int) -> torch.Tensor:
    """The part of a map (N, C, H, W) that belongs to a quadrant."""
    row, column = QUADRANTS[quadrant]
    height, width = feature.shape[2] // 2, feature.shape[3] // 2
    return feature[..., row * height :, column * width :][..., :height, :width]


def test_keys_and_shapes_are_the_published_ones(shared):
    published = json.loads((shared / "reference/efficientface_state_dict.json").read_text())
    shapes = {key: list(value.shape) for key, value in EfficientFace(7).state_dict().items()}
    described = {
        key: value["shape"] if isinstance(value, dict) else value
        for key, value in published.items()
    }
    assert shapes == described


@pytest.mark.parametrize(("classes", "count"), [(7, 1_275_293), (8, 1_276_318)])
def test_number_of_parameters(classes, count):
    assert sum(parameter.numel() for parameter in EfficientFace(classes).parameters()) == count


def test_logits_equal_the_published_networks(shared):
    model, _ = load_checkpoint(shared / "reference/efficientface_reference.pth.tar")
    reference = np.load(shared / "reference/efficientface_reference.npz")
    with torch.inference_mode():
        logits = model(torch.from_numpy(reference["input"])).numpy()
    scale = np.abs(reference["logits"]).max()
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("side", [32, 64, 80, 96, 112, 224])
def test_any_multiple_of_16(make_network, side):
    with torch.inference_mode():
        logits = make_network()(torch.randn(2, 3, side, side))
    assert logits.shape == (2, 7) and bool(torch.isfinite(logits).all())


def test_features_are_what_the_last_layer_is_given(make_network):
    model = make_network()
    with torch.inference_mode():
        image = torch.randn(2, 3, 64, 64)
        features = model.features(image)
        assert features.shape == (2, model.feature_size) == (2, 1024)
        assert torch.equal(model.fc(features), model(image))


def test_images_of_a_batch_do_not_see_one_another(make_network):
    model, images = make_network(), torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        single = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 8, 116])
def test_channel_shuffle_interleaves_the_halves(channels):
    x = torch.randn(2, channels, 3, 5)
    source = [(out % 2) * (channels // 2) + out // 2 for out in range(channels)]
    assert torch.equal(channel_shuffle(x), x[:, source])


def test_unit_of_stride_1_passes_half_of_the_channels_by():
    x = torch.randn(1, 8, 6, 6)
    y = ShuffleUnit(8, 8, stride=1).eval()(x)
    assert torch.equal(y[:, 0::2], x[:, :4])
    assert not torch.equal(y[:, 1::2], x[:, 4:])


def test_unit_of_stride_2_halves_the_map():
    assert ShuffleUnit(6, 10, stride=2).eval()(torch.randn(1, 6, 8, 8)).shape == (1, 10, 4, 4)


@pytest.mark.parametrize("quadrant", QUADRANTS)
def test_a_pixel_reaches_its_own_quadrant_alone(quadrant):
    local = LocalFeatureExtractor(5, 20).eval()
    x = torch.randn(1, 5, 16, 24)
    changed = x.clone()
    block(changed, quadrant)[...] += 1
    with torch.inference_mode():
        difference = (local(changed) - local(x)).abs()
    assert difference.shape == (1, 20, 8, 12)
    for other in QUADRANTS:
        assert bool((block(difference, other) > 0).any()) == (other == quadrant)


@pytest.mark.parametrize("quadrant", QUADRANTS)
def test_each_quadrant_has_its_own_weights(quadrant):
    torch.manual_seed(0)
    local = LocalFeatureExtractor(5, 20).eval()
    x = torch.randn(1, 5, 16, 16)
    with torch.inference_mode():
        before = local(x)
        local.get_submodule(f"conv{quadrant}_2").weight.zero_()
        difference = (local(x) - before).abs()
    for other in QUADRANTS:
        assert bool((block(difference, other) > 0).any()) == (other == quadrant)


def test_modulator_scales_by_the_sigmoid_of_the_product():
    modulator = Modulator(12).eval()
    x = torch.randn(2, 12, 8, 8)
    channel = modulator.channel_att.gate_c.gate_c_fc_final
    spatial = modulator.spatial_att.gate_s.gate_s_conv_final
    bias = torch.linspace(-2, 2, 12)
    with torch.inference_mode():
        channel.weight.zero_(), spatial.weight.zero_()
        channel.bias.copy_(bias), spatial.bias.fill_(0.7)
        expected = x * torch.sigmoid(bias * 0.7)[None, :, None, None]
        torch.testing.assert_close(modulator(x), expected)


def test_spatial_gate_sees_two_dilated_neighbourhoods():
    gate = SpatialGate(3).eval()
    x = torch.randn(1, 3, 33, 33, requires_grad=True)
    gate(x)[0, 0, 16, 16].backward()
    rows, columns = x.grad[0].abs().sum(0).nonzero().unbind(1)
    reach = {8, 12, 16, 20, 24}  # two 3x3 of dilation 4
    assert set(rows.tolist()) | set(columns.tolist()) <= reach
    assert {int(rows.min()), int(rows.max())} == {8, 24}
