"""The models that ship with the package."""

from __future__ import annotations

import numpy as np
import pytest

import efficientface_deploy as ef
from efficientface_deploy.predictor import ACCURATE, bundled_model

SIDES = {None: 112, ACCURATE: 160}


@pytest.fixture(scope="module", params=SIDES)
def name(request) -> str | None:
    return request.param


@pytest.fixture(scope="module")
def bundled(name) -> ef.Predictor:
    with ef.load(name) as predictor:
        yield predictor


def test_files_are_there_and_small(name):
    for backend in ("onnx", "torch"):
        path = bundled_model(backend, accurate=name == ACCURATE)
        assert path.is_file()
        assert path.stat().st_size < 10_000_000


def test_smile_is_happiness(bundled, photo):
    prediction = bundled(photo)
    assert prediction.label == "Happiness"
    assert prediction.confidence > 0.5
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_spec(bundled, name):
    preset = ef.PRESETS["ferplus"]
    assert bundled.spec.labels == preset.labels
    assert (bundled.spec.architecture, bundled.spec.colour) == ("efficientface", "grey")
    assert (bundled.spec.mean, bundled.spec.std) == (preset.mean, preset.std)
    assert bundled.spec.face_crop == preset.face_crop
    frequencies = dict(zip(preset.labels, bundled.spec.class_frequencies, strict=True))
    assert frequencies["Neutral"] > 0.3 and 0 < frequencies["Contempt"] < 0.01
    assert bundled.spec.input_size == SIDES[name]
    assert 0.75 < bundled.spec.sure_above < 0.9 and bundled.spec.sure_precision == 0.95


def test_weights_and_onnx_are_the_same_network(bundled, name, photo):
    pytest.importorskip("torch")
    faces = [photo, photo[:, ::-1], photo[20:, 10:], 255 - photo, photo // 3]
    inputs = np.stack([bundled.preprocess(face) for face in faces])
    with ef.load(name, backend="torch") as weights:
        assert weights.spec == bundled.spec
        expected = weights.infer(inputs)[1]
    np.testing.assert_allclose(bundled.infer(inputs)[1], expected, rtol=0, atol=2e-5)


def test_features(bundled, name, photo):
    """Of the weights, to the rounding; and a face is nearer to its mirror than to another."""
    turned = np.ascontiguousarray(photo[::-1])
    features = bundled.features([photo, photo[:, ::-1], turned])
    assert features.shape == (3, 1024) and features.min() >= 0
    same, other = (np.linalg.norm(features[0] - features[index]) for index in (1, 2))
    assert same < other / 2
    pytest.importorskip("torch")
    with ef.load(name, backend="torch") as weights:
        expected = weights.features([photo, photo[:, ::-1], turned])
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4 * expected.max())


def test_mirrored_smile_is_a_smile(bundled, photo):
    assert bundled(photo[:, ::-1]).label == "Happiness"
