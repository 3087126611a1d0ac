from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import efficientface_deploy as ef
from efficientface_deploy import predictor as module
from efficientface_deploy.backends import Backend, BackendOptions, create_backend
from efficientface_deploy.backends.base import Output
from efficientface_deploy.errors import ArtifactError, BackendError, ImageError

LABELS = ("dark", "middle", "bright")
SPEC = ef.PRESETS["rafdb"].replace(labels=LABELS, input_size=32, name="brightness")


class Brightness(Backend):
    """Says how bright a picture is, surely where it is black, grey or white."""

    max_batch = 4

    def _open(self) -> None:
        self.spec = SPEC
        self.name = "fake:cpu"
        self.provenance = {"precision": "fp32"}

    def _infer(self, images: np.ndarray) -> Output:
        mean = images.mean(axis=(1, 2, 3), dtype=np.float64)[:, None] / 255
        logits = -20 * np.abs(mean - np.array([0, 0.5, 1])).astype(np.float32)
        powers = np.exp(logits)
        return Output(logits, powers / powers.sum(axis=1, keepdims=True))

    def _close(self) -> None:
        pass


@pytest.fixture
def predictor() -> ef.Predictor:
    backend = Brightness(Path("folder/fake.x"), BackendOptions())
    backend.open()
    return ef.Predictor(backend)


def flat(value: int) -> np.ndarray:
    return np.full((20, 10, 3), value, dtype=np.uint8)


def test_prediction(predictor):
    prediction = predictor(flat(250))
    assert prediction.label == "bright"
    assert prediction.confidence == prediction.probabilities["bright"] > 0.9
    assert list(prediction.probabilities) == list(LABELS)
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
    assert all(type(value) is float for value in prediction.probabilities.values())
    with pytest.raises(AttributeError):
        prediction.label = "dark"


def test_batch_keeps_its_order_beyond_the_largest_batch(predictor):
    values = [0, 255, 128] * 5
    predictions = predictor.predict_batch(flat(value) for value in values)
    assert [p.label for p in predictions] == ["dark", "bright", "middle"] * 5


def test_batch_of_mixed_sources(predictor, tmp_path):
    Image.fromarray(flat(0)).save(tmp_path / "dark.png")
    sources = [tmp_path / "dark.png", Image.fromarray(flat(255)), flat(128)]
    sources += [(tmp_path / "dark.png").read_bytes(), str(tmp_path / "dark.png")]
    labels = [prediction.label for prediction in predictor.predict_batch(sources)]
    assert labels == ["dark", "bright", "middle", "dark", "dark"]


def test_stacked_arrays_are_a_batch(predictor):
    colour = np.stack([flat(0), flat(255)])
    assert [p.label for p in predictor.predict_batch(colour)] == ["dark", "bright"]
    assert [p.label for p in predictor.predict_batch(colour[..., 0])] == ["dark", "bright"]


@pytest.mark.parametrize(
    "single",
    [
        "face.jpg",
        Path("face.jpg"),
        b"\xff\xd8\xff",
        bytearray(b"abc"),
        Image.new("RGB", (9, 9)),
        np.zeros((20, 10, 3), np.uint8),
        np.zeros((20, 10, 4), np.uint8),
        np.zeros((20, 10), np.uint8),
    ],
)
def test_single_image_is_no_batch(predictor, single):
    with pytest.raises(ImageError, match=r"several images, found a single one.*into a list"):
        predictor.predict_batch(single)


def test_one_bad_image_fails_the_batch_by_name(predictor, tmp_path):
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        predictor.predict_batch([flat(0), tmp_path / "missing.jpg"])


def test_preprocess_and_infer_are_the_two_halves_of_a_call(predictor):
    inputs = predictor.preprocess(flat(200))
    assert (inputs.shape, inputs.dtype) == ((32, 32, 3), np.uint8)
    logits, probabilities = predictor.infer(inputs[None])
    assert logits.shape == probabilities.shape == (1, 3)
    assert predictor(flat(200)).confidence == pytest.approx(float(probabilities.max()))


def test_attributes(predictor):
    assert predictor.spec is SPEC
    assert (predictor.backend, predictor.path.name) == ("fake:cpu", "fake.x")
    assert predictor.provenance == {"precision": "fp32"}
    assert (
        repr(predictor) == "Predictor('fake.x', backend='fake:cpu', brightness, 3 classes, 32x32)"
    )


def test_repr_says_preliminary(predictor):
    predictor._backend.spec = SPEC.replace(preliminary=True)
    assert "brightness, preliminary, 3 classes" in repr(predictor)


def test_context_manager_closes_on_errors_too(predictor):
    with pytest.raises(ZeroDivisionError), predictor as entered:
        assert entered is predictor
        raise ZeroDivisionError
    with pytest.raises(BackendError, match="load the model again"):
        predictor(flat(0))


# ---- load


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_one(threads):
    with pytest.raises(BackendError, match="at least 1"):
        ef.load("model.onnx", threads=threads)


def test_preset_reaches_a_published_checkpoint(make_network, tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"module.{key}": value for key, value in make_network(8).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "published.pth.tar")
    with ef.load(tmp_path / "published.pth.tar", preset="affectnet8") as predictor:
        assert predictor.spec == ef.PRESETS["affectnet8"]
        assert predictor(flat(128)).label in ef.PRESETS["affectnet8"].labels
    with ef.load(tmp_path / "published.pth.tar") as predictor:
        assert predictor.spec.labels[:2] == ("class 0", "class 1")


def test_preset_that_agrees_with_the_files_own_spec(backend, model_files):
    # The labels are the same; size and normalisation stay those of the file.
    with ef.load(model_files[backend], preset="affectnet7") as predictor:
        assert predictor.spec == ef.PRESETS["rafdb"].replace(input_size=64, name="test")


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("ferplus", r"model\.\w+: expected labels Neutral, .*found preset ferplus with Neutral, "),
        ("nonsense", r"preset: expected one of rafdb.*found 'nonsense'"),
    ],
)
def test_preset_that_contradicts_is_refused_and_nothing_stays_open(
    backend, model_files, preset, message, monkeypatch
):
    closed = []
    kind = backend.partition("-")[0]
    backend_class = type(create_backend(kind, model_files[backend], BackendOptions()))
    close = backend_class._close
    monkeypatch.setattr(backend_class, "_close", lambda self: (closed.append(self), close(self)))
    message = message.replace("model", "(model|float)")
    with pytest.raises(ef.EfficientFaceError, match=message):
        ef.load(model_files[backend], preset=preset)
    assert len(closed) == (kind == "onnx")  # PyTorch's checkpoint is refused before it is opened


@pytest.mark.parametrize("name", ["missing.onnx", "missing.safetensors", "missing.pth.tar"])
def test_missing_file(tmp_path, name):
    with pytest.raises(ef.EfficientFaceError, match=f"{name}.*no such file; check the path"):
        ef.load(tmp_path / name)


@pytest.mark.parametrize("name", ["", "model", "model.h5"])
def test_file_that_nothing_runs(name):
    with pytest.raises(ArtifactError, match="efficientface-export"):
        ef.load(name)


@pytest.mark.parametrize(
    ("requested", "installed", "expected"),
    [
        ("auto", {"onnx", "torch"}, module.BUNDLED_ONNX),
        ("auto", {"onnx"}, module.BUNDLED_ONNX),
        ("auto", {"torch"}, module.BUNDLED_WEIGHTS),
        ("auto", set(), module.BUNDLED_ONNX),
        ("torch", {"onnx", "torch"}, module.BUNDLED_WEIGHTS),
        ("torch:cuda", {"onnx", "torch"}, module.BUNDLED_WEIGHTS),
        ("onnx:cuda", {"onnx", "torch"}, module.BUNDLED_ONNX),
    ],
)
def test_bundled_file_suits_the_backend(monkeypatch, requested, installed, expected):
    reason = {name: None if name in installed else "missing" for name in ("onnx", "torch")}
    monkeypatch.setattr(module, "missing_reason", reason.get)
    assert module.bundled_model(requested) == expected


def test_public_names():
    assert set(ef.__all__) <= set(dir(ef))
    assert ef.__version__.count(".") == 2
