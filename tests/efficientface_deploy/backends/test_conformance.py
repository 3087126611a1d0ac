"""What every backend has to do alike: the same answers, and the same errors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from PIL import Image
from tensorrt_stand_in import Library, make_plan, read_record

from efficientface_deploy import Predictor, load
from efficientface_deploy.artifact import sidecar_path, write_sidecar
from efficientface_deploy.backends import (
    BackendOptions,
    create_backend,
    resolve_backend,
)
from efficientface_deploy.backends.tensorrt import cuda
from efficientface_deploy.errors import BackendError, EfficientFaceError, ImageError
from efficientface_deploy.files import file_hash
from efficientface_deploy.spec import PRESETS
from efficientface_deploy.vision.preprocess import normalise
from efficientface_export.graph.io import write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.tensorrt.builder import available
from efficientface_export.tensorrt.options import SUFFIXES, EngineOptions
from efficientface_export.triton import read_artifact, write_repository
from efficientface_export.verification.parity import THRESHOLDS
from tests.engines import write_engine
from tests.triton_stand_in import stand_in as triton_stand_in
from tests.tritonserver import serve

FREQUENCIES = (0.25, 0.3, 0.15, 0.12, 0.1, 0.05, 0.03)  # of model_files
SPEC = PRESETS["rafdb"].replace(input_size=64, class_frequencies=FREQUENCIES)
SPEC = SPEC.replace(sure_above=0.8, sure_precision=0.9)
SAME = 1e-4  # of a probability, between two runs of one backend in FP32
PROFILE = 16  # largest batch of the engines: smaller than the largest here

# Backends that run on every machine: a skip of theirs is a failure.
EVERYWHERE = ("onnx", "onnx-float", "onnx-fp16", "torch")
STAND_INS = ("trt 10.3 (stand-in)", "trt 11.4 (stand-in)", "trt-rtx 1.7 (stand-in)")
ON_A_SERVER = ("triton (tritonserver)", "triton+grpc (tritonserver)")
ON_A_GPU = ("onnx:cuda", "onnx:tensorrt", "onnx:tensorrt-rtx", "torch:cuda", "trt", "trt-rtx")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A backend, and the file that it runs.

    Attributes:
        name: In the table.
        path: The file.
        request: What ``load`` is asked for.
        opened: What the predictor says that it is.
        tolerance: Of a probability, against PyTorch in float32.
    """

    name: str
    path: Path
    request: str
    opened: str
    tolerance: float = 1e-4

    @property
    def same(self) -> float:
        """Of a probability, between two runs: onnxruntime 1.29 sums FP16 by the batch's size."""
        return SAME if self.tolerance < 0.01 else self.tolerance / 5

    def load(self, **options: Any) -> Predictor:
        return load(self.path, backend=self.request, **options)


@pytest.fixture(
    scope="module",
    params=[*EVERYWHERE, *STAND_INS, "triton (stand-in)", "onnx:openvino"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ON_A_SERVER]
    + [pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_GPU],
)
def subject(request, require_backend, model_files, tmp_path_factory) -> Iterator[Subject]:
    name = request.param
    folder = tmp_path_factory.mktemp("subject")
    if name in EVERYWHERE:
        require_backend(name.partition("-")[0])
        yield on_the_cpu(name, model_files, folder)
    elif name in STAND_INS:
        with pytest.MonkeyPatch.context() as patch:
            yield stand_in(name, model_files["onnx"], folder, patch)
    elif name.startswith("triton"):
        with on_a_server(name, model_files["onnx"], folder) as url:
            yield Subject(name, Path(url), "auto", "triton")
    else:
        found = elsewhere(name, model_files, folder)
        try:
            found.load().close()
        except BackendError as error:
            pytest.skip(str(error))
        with pytest.MonkeyPatch.context() as patch:
            if name == "torch:cuda":
                # PyTorch's convolutions on a GPU are in TF32 unless they are told otherwise.
                patch.setattr("torch.backends.cudnn.allow_tf32", False)
            yield found


def on_the_cpu(name: str, model_files: dict[str, Path], folder: Path) -> Subject:
    opened = name.partition("-")[0] + ":cpu"
    if name in model_files:
        return Subject(name, model_files[name], "auto", opened)
    path = folder / "fp16.onnx"
    made = {"epoch": 3, "precision": "fp16", "target": "cpu"}
    write_onnx(to_fp16(onnx.load(model_files["onnx"])), path, SPEC.replace(name="test"), made)
    # Twice what is allowed on faces: this network is random, and has never seen a picture.
    tolerance = 2 * THRESHOLDS["fp16"].max_difference
    return Subject(name, path, "auto", opened, tolerance)


def stand_in(name: str, parent: Path, folder: Path, patch: pytest.MonkeyPatch) -> Subject:
    """An engine of the same network, on the recorded API of a release and a GPU of host memory."""
    kind, version, _ = name.split(" ")
    fake = FakeCuda()
    record = read_record({"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}[kind] + f"-{version}")
    library = Library(record, fake)
    patch.setattr(cuda, "CudaPython", lambda: fake)
    patch.setitem(sys.modules, record["module"], library.module)
    path = folder / {"trt": "model.engine", "trt-rtx": "model.rtx.engine"}[kind]
    item = (64, 64, 3)
    path.write_bytes(make_plan(onnx.load(parent), [(1, *item), (1, *item), (PROFILE, *item)]))
    made = {
        "sha256": file_hash(path),
        "library": record["module"],
        "version": record["version"],
        "compute_capabilities": [fake.capability],
        "parent": parent.name,
        "max_batch": PROFILE,
    }
    write_sidecar(path, SPEC.replace(name="test"), {"epoch": 3, "engine": made})
    return Subject(name, path, "auto", kind)


@contextlib.contextmanager
def on_a_server(name: str, path: Path, folder: Path) -> Iterator[str]:
    """The URL of a model, by a stand-in or by a real tritonserver whose Python backend runs it."""
    if "stand-in" in name:
        with triton_stand_in(path, PROFILE) as model:
            yield f"triton://127.0.0.1:{model.port}/test"
        return
    scheme = name.partition(" ")[0]
    if "grpc" in scheme:
        pytest.importorskip("tritonclient.grpc")
    artifact = dataclasses.replace(read_artifact(path), backend="python")
    write_repository(folder / "repository", artifact, max_batch=PROFILE)
    with serve(folder / "repository", folder) as server:
        port = server.grpc if "grpc" in scheme else server.http
        yield f"{scheme}://127.0.0.1:{port}/efficientface"


def elsewhere(name: str, model_files: dict[str, Path], folder: Path) -> Subject:
    """A backend that needs a package or a GPU that may not be here."""
    if ":" in name:
        path = folder / model_files[name.partition(":")[0]].name
        path.write_bytes(model_files[name.partition(":")[0]].read_bytes())
        return Subject(name, path, name, name, tolerance=1e-3)
    if reason := available(name):
        pytest.skip(reason)
    path = folder / f"model{SUFFIXES[name]}"
    write_engine(model_files["onnx"], path, name, EngineOptions(max_batch=PROFILE))
    return Subject(name, path, "auto", name, tolerance=1e-3)


@pytest.fixture(scope="module")
def predictor(subject) -> Iterator[Predictor]:
    with subject.load() as opened:
        yield opened


@pytest.fixture(scope="module")
def answers(predictor, images) -> np.ndarray:
    """The backend's own probabilities for all images, (64, 7)."""
    return predictor.infer(images)[1]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 (64, 64, 64, 3): smooth pictures, noise, black, white."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(x).resize((64, 64), 2)) for x in coarse]
    noise = list(rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
    return np.stack([*smooth, *noise, np.zeros_like(noise[0]), np.full_like(noise[0], 255)])


@pytest.fixture(scope="module")
def reference(once, model_files, images) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's logits and probabilities, both (64, 7)."""

    def fill(folder: Path) -> None:
        with load(model_files["torch"]) as torch_predictor:
            np.save(folder / "answers.npy", torch_predictor.infer(images))

    logits, probabilities = np.load(once("conformance-reference", fill) / "answers.npy")
    return logits, probabilities


def test_reference_is_worth_comparing_with(reference):
    probabilities = reference[1]
    assert len(set(probabilities.argmax(axis=1))) >= 5
    assert np.median(probabilities.max(axis=1)) < 0.99  # not saturated


def test_same_probabilities_and_labels(subject, predictor, images, reference):
    logits, probabilities = predictor.infer(images)
    assert logits.dtype == probabilities.dtype == np.float32
    assert logits.shape == probabilities.shape == (64, 7)
    np.testing.assert_allclose(probabilities, reference[1], rtol=0, atol=subject.tolerance)
    second, first = np.sort(reference[1], axis=1)[:, -2:].T
    clear = first - second > subject.tolerance  # of a tie, either is right
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(logits.argmax(axis=1)[clear], reference[0].argmax(axis=1)[clear])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, softmax, atol=2e-3)


def test_grey_spec(images, tmp_path):
    """The graph's luminance is that of ``normalise``."""
    torch = pytest.importorskip("torch")
    from efficientface_export.graph.trace import export_onnx

    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 7, 16, stride=16)
    network = torch.nn.Sequential(
        convolution, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    grey = SPEC.replace(colour="grey")
    with load(export_onnx(network, grey, tmp_path / "grey.onnx")) as predictor:
        logits, _ = predictor.infer(images)
    with torch.inference_mode():
        expected = network(torch.from_numpy(normalise(images, grey))).numpy()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 63, 64])
def test_any_batch(subject, predictor, images, answers, batch):
    """Larger ones than an engine's profile are split inside; the second time, a graph runs."""
    for start in (0, 64 - batch, 0):
        probabilities = predictor.infer(images[start : start + batch])[1]
        np.testing.assert_allclose(probabilities, answers[start : start + batch], atol=subject.same)


def test_batch_beyond_every_profile(subject, predictor, images, answers):
    order = np.arange(133) % 64
    np.testing.assert_allclose(predictor.infer(images[order])[1], answers[order], atol=subject.same)


def test_sizes_in_turn(subject, predictor, images, answers):
    """As a camera gives them: a face more, a face less."""
    for batch in (1, 3, 1, 2, 3, 1, 3, 2, 1, 2):
        probabilities = predictor.infer(images[:batch])[1]
        np.testing.assert_allclose(probabilities, answers[:batch], atol=subject.same)


def test_empty_batch(predictor, images):
    logits, probabilities = predictor.infer(images[:0])
    assert logits.shape == probabilities.shape == (0, 7)
    assert logits.dtype == probabilities.dtype == np.float32
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::-1],
        lambda x: x[::2],
        lambda x: x[:, :, ::-1],
        lambda x: x[..., ::-1],
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: np.asfortranarray(x),
        lambda x: np.broadcast_to(x[:1], x.shape),
    ],
)
def test_strides_do_not_matter(subject, predictor, images, view):
    array = view(images[:6])
    expected = predictor.infer(np.array(array, order="C"))[1]
    np.testing.assert_allclose(predictor.infer(array)[1], expected, atol=subject.same)


def test_input_and_output_belong_to_the_caller(predictor, images):
    given = images[:4].copy()
    given.flags.writeable = False
    first = predictor.infer(given)[1]
    kept = first.copy()
    predictor.infer(images[4:8])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(given, images[:4])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((2, 64, 64, 3), np.int8),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 64, 64, 4), np.uint8),
        np.zeros((2, 96, 96, 3), np.uint8),
        np.zeros((0, 96, 96, 3), np.uint8),
        np.zeros(0, np.uint8),
        [[1, 2]],
        None,
        "face.jpg",
    ],
)
def test_bad_batch_is_the_same_error_everywhere(predictor, array):
    with pytest.raises(ImageError) as caught:
        predictor.infer(array)
    found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "unknown"
    assert str(caught.value).startswith(
        "batch: expected uint8 array of shape (N, 64, 64, 3), found"
    )
    assert found in str(caught.value)


def test_bad_image_is_the_same_error_everywhere(predictor, tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        predictor(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="another kind of file"):
        predictor.predict_batch([np.zeros((8, 8, 3), np.uint8), b"text"])


def test_spec_provenance_and_names(subject, predictor):
    assert predictor.spec == SPEC.replace(name="test")
    assert predictor.provenance["epoch"] == 3
    assert predictor.backend == subject.opened
    assert predictor.path == subject.path
    expected = (
        f"Predictor('{predictor.path.name}', backend='{predictor.backend}', test, 7 classes, 64x64)"
    )
    assert repr(predictor) == expected


@pytest.fixture(scope="module")
def expected_features(once, model_files, images) -> np.ndarray:
    """What PyTorch's last layer is given, (64, 1024)."""

    def fill(folder: Path) -> None:
        import torch

        from efficientface_deploy.models import load_checkpoint

        model, given = load_checkpoint(model_files["torch"])[0], []
        model.fc.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
        with torch.inference_mode():
            model(torch.from_numpy(normalise(images, SPEC)))
        np.save(folder / "features.npy", given[0].numpy())

    return np.load(once("conformance-features", fill) / "features.npy")


def test_features(subject, predictor, images, answers, expected_features):
    """In turns with labels, so that an engine's CUDA graphs run in between."""
    scale = expected_features.std()
    for count in (64, 3, 3, 3, PROFILE, 1, 64):
        features = predictor.features(images[:count])
        assert (features.dtype, features.shape) == (np.float32, (count, 1024))
        off = np.abs(features - expected_features[:count]).max() / scale
        assert off < (1e-4 if subject.tolerance < 0.01 else 0.1)
        probabilities = predictor.infer(images[:count])[1]
        np.testing.assert_allclose(probabilities, answers[:count], atol=subject.same)
    kept = features.copy()
    predictor.features(images[3:9])
    np.testing.assert_array_equal(features, kept)
    assert predictor.features([]).shape == (0, 1024) and predictor.feature_size == 1024
    with pytest.raises(ImageError, match="several images"):
        predictor.features(images[0])


def test_labels_are_unsure_up_to_the_threshold(subject, predictor, images, answers):
    expected = answers.max(axis=1) <= SPEC.sure_above
    clear = np.abs(answers.max(axis=1) - SPEC.sure_above) > subject.same
    assert 0.1 < expected.mean() < 0.9
    found = [prediction.unsure for prediction in predictor.predict_batch(images)]
    np.testing.assert_array_equal(np.array(found)[clear], expected[clear])
    with subject.load(prior="uniform") as other:  # for which the threshold was not found
        assert {prediction.unsure for prediction in other.predict_batch(images[:9])} == {None}


def test_prior(subject, predictor, images, answers):
    """Twice as much weight is twice the odds; that of the training changes nothing."""
    own, fear = np.array(FREQUENCIES), np.array([1, 1, 1, 1, 2, 1, 1])
    for prior, wanted in (
        ("uniform", np.ones(7)),
        (dict(zip(SPEC.labels, 2 * own, strict=True)), own),
        (
            dict(zip(SPEC.labels, own * fear, strict=True)),
            own * fear,
        ),
    ):
        weights = wanted / own
        expected = answers * weights / (answers * weights).sum(axis=1, keepdims=True)
        with subject.load(prior=prior) as other:
            logits, probabilities = other.infer(images)
            prediction = other(images[0])
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=10 * subject.same)
        np.testing.assert_array_equal(logits.argmax(axis=1), probabilities.argmax(axis=1))
        assert prediction.confidence == pytest.approx(expected[0].max(), abs=10 * subject.same)
        assert prediction.label == SPEC.labels[int(probabilities[0].argmax())]
    assert (answers.argmax(axis=1) != (answers / own).argmax(axis=1)).any()


def test_eight_threads_answer_as_one(subject, predictor, images, answers):
    starts = [(index * 7) % 48 for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda at: predictor.infer(images[at : at + 5])[1], starts))
    for at, probabilities in zip(starts, results, strict=True):
        np.testing.assert_allclose(probabilities, answers[at : at + 5], atol=subject.same)


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """PyTorch's threads are those of the process."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads(subject, images, answers, threads):
    with threads_restored(), subject.load(threads=threads) as predictor:
        probabilities = predictor.infer(images[:8])[1]
    np.testing.assert_allclose(probabilities, answers[:8], atol=subject.same)


def test_use_after_close(subject, images):
    with subject.load() as predictor:
        predictor.infer(images[:1])
    predictor.close()  # a second time does nothing
    for use in (
        lambda: predictor.infer(images[:1]),
        lambda: predictor.infer(images[:0]),
        lambda: predictor(images[0]),
        lambda: predictor.predict_batch(list(images[:2])),
        lambda: predictor.features(images[:2]),
    ):
        with pytest.raises(BackendError, match="an open backend, found a closed one"):
            use()
    assert "64x64" in repr(predictor)


@pytest.mark.parametrize("attempt", range(3))
def test_close_waits_for_what_is_running(subject, images, attempt):
    predictor = subject.load()
    started = threading.Semaphore(0)

    def work() -> Exception:
        try:
            while True:
                predictor.infer(images[:2])
                started.release()
        except Exception as error:  # noqa: BLE001 - any is judged below
            return error

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        for _ in range(4):
            started.acquire()
        predictor.close()
        errors = [future.result() for future in futures]
    assert [type(error) for error in errors] == [BackendError] * 4


def test_opening_twice_and_again_after_close(subject, images, answers):
    name, device = resolve_backend(subject.path, subject.request)
    opened = create_backend(name, subject.path, BackendOptions(device))
    for _ in range(2):
        with opened:
            opened.open()
            probabilities = opened.infer(images[:3]).probabilities
        np.testing.assert_allclose(probabilities, answers[:3], atol=subject.same)


@pytest.mark.parametrize("content", [None, b"", b"text", "truncated", "folder"])
def test_unusable_file_is_one_line(subject, tmp_path, content):
    if subject.opened == "triton":
        pytest.skip("a URL is no file; test_triton.py has what a server may say")
    source = subject.path
    path = tmp_path / source.name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        data = source.read_bytes()
        path.write_bytes(data[: len(data) // 2] if content == "truncated" else content)
    if sidecar_path(source).is_file():
        sidecar_path(path).write_bytes(sidecar_path(source).read_bytes())
    with pytest.raises(EfficientFaceError) as caught:
        load(path, backend=subject.request)
    assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()


def test_pictures_of_all_kinds_give_one_answer(predictor, photo, tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(photo).save(path)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    sources = [photo, path, str(path), buffer.getvalue(), Image.fromarray(photo), Image.open(path)]
    first, *others = predictor.predict_batch(sources)
    assert all(other.label == first.label for other in others)
    assert predictor(photo).confidence == pytest.approx(first.confidence, abs=1e-5)
