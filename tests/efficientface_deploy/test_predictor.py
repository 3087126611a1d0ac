from __future__ import annotations

import copy
import io
import math
import os
import pickle
import re
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import efficientface_deploy as ef
from efficientface_deploy import predictor as module
from efficientface_deploy.backends import Backend, BackendOptions, create_backend
from efficientface_deploy.backends.base import Output
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    EfficientFaceError,
    ImageError,
)
from efficientface_deploy.vision.faces import SMALL

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


@pytest.mark.parametrize(
    ("above", "unsure"), [(None, None), (0, False), (0.97, False), (0.99, True), (1, True)]
)
def test_unsure(predictor, above, unsure):
    """Up to the threshold, and nobody knows where the file does not say."""
    if above is not None:
        predictor._backend.spec = SPEC.replace(sure_above=above, sure_precision=0.9)
    prediction = predictor(flat(215))
    assert 0.97 < prediction.confidence < 0.99
    assert prediction.unsure is unsure
    certain = ef.Prediction.of(np.array([0, 1], np.float32), ("a", "b"), 1.0)
    assert certain == ef.Prediction("b", 1.0, {"a": 0.0, "b": 1.0}, unsure=True)


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


@pytest.mark.parametrize("nothing", [None, 5, object(), 1.5])
def test_what_holds_no_images_is_no_batch(predictor, nothing):
    for use in (predictor.predict_batch, predictor.predict_stream):
        with pytest.raises(ImageError, match=f"several images, found {type(nothing).__name__}"):
            use(nothing)


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


def test_features_of_a_file_without_them(predictor):
    assert predictor.feature_size is None
    with pytest.raises(BackendError) as caught:
        predictor.features([flat(0)])
    assert str(caught.value) == (
        "fake.x: expected a model with the output features, found one without; export it again: "
        "efficientface-export --features --weights CHECKPOINT"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1, np.nan], "finite outputs, found NaN or infinity"),
        ([1, np.inf], "finite outputs, found NaN or infinity"),
        ([1, 2, 3], r"outputs of shape \(N, 2\), found \(1, 3\)"),
        ([[1, 2]], r"outputs of shape \(N, 2\), found \(1, 1, 2\)"),
    ],
)
def test_features_that_cannot_be(predictor, row, said):
    predictor._backend.feature_size = 2
    predictor._backend._features = lambda images: np.array([row] * len(images), np.float32)
    with pytest.raises(BackendError, match=f"expected {said}"):
        predictor.features([flat(0)])


# ---- faces in pictures


class Halves:
    """A detector that finds a face in the left and one in the right half, or none at all."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores
        self.seen: list[np.ndarray] = []

    def detect(self, image: np.ndarray) -> list[ef.Face]:
        self.seen.append(image)
        half, height = image.shape[1] / 2, image.shape[0]
        boxes = [(0, 0, half, height), (half, 0, 2 * half, height)]
        return [ef.Face(box, score) for box, score in zip(boxes, self.scores, strict=False)]


@pytest.fixture
def by_box(predictor: ef.Predictor) -> ef.Predictor:
    predictor._backend.spec = SPEC.replace(face_crop="box")
    return predictor


def halves(left: int, right: int) -> np.ndarray:
    return np.concatenate([flat(left)[:10], flat(right)[:10]], axis=1)  # (10, 20, 3)


def test_faces_of_a_picture(by_box):
    picture = halves(255, 0)
    left, right = by_box.predict_faces(picture, Halves(0.9, 0.8))
    assert (left.prediction.label, right.prediction.label) == ("bright", "dark")
    assert left.prediction == by_box(flat(255))  # each face alone, whole
    assert (left.face.box, left.face.score) == ((0, 0, 10, 10), 0.9)
    assert right.face.box == (10, 0, 20, 10)


def test_no_face_is_no_error(by_box):
    assert by_box.predict_faces(halves(0, 0), Halves()) == []


def test_more_faces_than_the_largest_batch(by_box):
    class Many(Halves):
        def detect(self, image):
            return [ef.Face((0, 0, 10, 10), 0.5)] * 9

    faces = by_box.predict_faces(halves(255, 0), Many())
    assert [found.prediction.label for found in faces] == ["bright"] * 9


def test_without_a_detector_the_picture_is_the_face(by_box):
    (found,) = by_box.predict_faces(flat(128))
    assert found.prediction == by_box(flat(128))
    assert found.face == ef.Face((0, 0, 10, 20))


def test_detector_sees_upright_rgb(by_box):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 0)).save(buffer, "PNG", exif=exif)
    detector = Halves()
    by_box.predict_faces(buffer.getvalue(), detector)
    (seen,) = detector.seen
    assert seen.shape == (8, 6, 3) and seen[0, 0].tolist() == [200, 10, 0]


def test_aligned_model_wants_a_detector_with_landmarks(predictor):
    with pytest.raises(ImageError, match="five landmarks"):
        predictor.predict_faces(halves(0, 0), Halves(0.9))


# ---- streams


@pytest.mark.timeout(60)
def test_stream_labels_frames_in_order(predictor):
    values = [0, 255, 128] * 6
    begin = time.monotonic()
    results = list(predictor.predict_stream(map(flat, values), smooth=None))
    end = time.monotonic()
    assert [r.faces[0].prediction.label for r in results] == ["dark", "bright", "middle"] * 6
    assert [r.index for r in results] == list(range(18))
    assert [np.asarray(r.image)[0, 0, 0] for r in results] == values
    assert all(begin <= r.time <= r.time + r.latency <= end and r.latency > 0 for r in results)


def refilled_array():
    array = flat(0)
    for value in (0, 255, 128, 0, 255):
        array[:] = value
        yield array


def refilled_frame():
    return (ef.VideoFrame(array, at / 2) for at, array in enumerate(refilled_array()))


def refilled_picture():
    picture = Image.fromarray(flat(0))
    for array in refilled_array():
        picture.paste(Image.fromarray(array))
        yield picture


def closed_picture():
    for array in refilled_array():
        with Image.fromarray(array) as picture:
            yield picture


def refilled_bytes():
    buffer = bytearray()
    for picture in refilled_picture():
        file = io.BytesIO()
        picture.save(file, "PNG")
        buffer[:] = file.getvalue()
        yield buffer


@pytest.mark.timeout(60)
@pytest.mark.parametrize("policy", ["every", "newest"])
@pytest.mark.parametrize(
    "source", [refilled_array, refilled_frame, refilled_picture, closed_picture, refilled_bytes]
)
def test_frames_are_kept_when_their_source_makes_the_next(predictor, source, policy):
    values = (0, 255, 128, 0, 255)
    results = list(predictor.predict_stream(source(), policy=policy, smooth=0))
    assert results[-1].index == 4 and (len(results) == 5 or policy == "newest")
    for result in results:
        value = values[result.index]
        assert np.asarray(result.image)[0, 0, 0] == value
        label = {0: "dark", 128: "middle", 255: "bright"}[value]
        assert result.faces[0].prediction.label == label


@pytest.mark.timeout(60)
def test_seconds_are_the_sources_or_ours(predictor):
    timed = [ef.VideoFrame(flat(0), seconds) for seconds in (7.0, 7.1, 9.0)]
    assert [r.seconds for r in predictor.predict_stream(timed)] == [7.0, 7.1, 9.0]
    results = list(predictor.predict_stream([flat(0)] * 3))
    assert [r.seconds for r in results] == [r.time - results[0].time for r in results]


@pytest.mark.timeout(60)
def test_stream_finds_faces(by_box):
    results = list(by_box.predict_stream([halves(255, 0)] * 3, detector=Halves(0.9, 0.8)))
    labels = [[found.prediction.label for found in result.faces] for result in results]
    assert labels == [["bright", "dark"]] * 3
    (nobody,) = by_box.predict_stream([halves(255, 0)], detector=Halves())
    assert nobody.faces == ()


class Swapped:
    """Finds both halves, now the one first and now the other."""

    def __init__(self) -> None:
        self.count = 0

    def detect(self, image):
        self.count += 1
        height, half = image.shape[0], image.shape[1] / 2
        faces = [ef.Face((0, 0, half, height), 0.9), ef.Face((half, 0, 2 * half, height), 0.8)]
        return faces[:: (-1) ** self.count]


@pytest.mark.timeout(60)
def test_faces_of_a_stream_keep_their_numbers_and_their_places(by_box):
    frames = [ef.VideoFrame(halves(255, 0), at / 25) for at in range(20)]
    results = list(by_box.predict_stream(frames, detector=Swapped()))
    places = {found.track: found.face.box[0] for found in results[0].faces}
    assert len(places) == 2
    for result in results:
        assert [found.track for found in result.faces] == [1, 2]
        assert {found.track: found.face.box[0] for found in result.faces} == places
    assert by_box.predict_faces(halves(255, 0), Swapped())[0].track is None


@pytest.mark.timeout(60)
def test_labels_of_a_stream_are_steady_and_the_raw_ones_stay(predictor):
    values = [*[0] * 10, 255, *[0] * 10, *[255] * 20]  # one frame flickers, then all change
    faces = [np.full((40, 40, 3), value, np.uint8) for value in values]  # large enough to judge
    frames = [ef.VideoFrame(face, at / 25) for at, face in enumerate(faces)]
    found = [result.faces[0] for result in predictor.predict_stream(frames)]
    raw = ["dark" if value == 0 else "bright" for value in values]
    labels = [one.prediction.label for one in found]
    assert [one.raw.label for one in found] == raw
    change = labels.index("bright")
    assert labels == ["dark"] * change + ["bright"] * (len(labels) - change)
    assert 21 <= change <= 21 + 0.3 * 25
    for one in found:
        assert one.prediction.confidence == one.prediction.probabilities[one.prediction.label]
        assert sum(one.prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    for smooth in (0, None):
        plain = [one.faces[0] for one in predictor.predict_stream(frames, smooth=smooth)]
        assert [one.prediction.label for one in plain] == raw
        assert {one.raw for one in plain} == {None}


@pytest.mark.timeout(60)
def test_small_faces_of_a_stream_are_marked_and_spoil_no_label(by_box):
    """A face goes away until it cannot be judged, and comes back."""
    sides = [64] * 10 + [SMALL - 1] * 10 + [64] * 2

    values = [0 if side > SMALL else 255 for side in sides]
    pictures = [np.full((64, 64, 3), value, np.uint8) for value in values]
    frames = [ef.VideoFrame(picture, at / 25) for at, picture in enumerate(pictures)]
    results = by_box.predict_stream(frames, detector=ByOrder(sides))
    found = [result.faces[0] for result in results]
    assert [one.small for one in found] == [side < SMALL for side in sides]
    assert {one.prediction.label for one in found if not one.small} == {"dark"}
    assert {one.raw for one in found if one.small} == {None}


class ByOrder:
    """One square face in the corner of every frame, of the sides given."""

    def __init__(self, sides):
        self.sides = iter(sides)

    def detect(self, image):
        side = next(self.sides)
        return [ef.Face((0.0, 0.0, side, side))]


@pytest.mark.parametrize("detector", ["yunet", True])
def test_what_is_no_detector_is_refused(predictor, detector):
    """A detector's name, above all, as the command takes it."""
    wanted = r"detector: expected a detector, or None, found .*; open one by open_detector\(\)"
    with pytest.raises(ConfigError, match=wanted):
        predictor.predict_faces(flat(0), detector)
    with pytest.raises(ConfigError, match=wanted):
        predictor.predict_stream([flat(0)], detector=detector)


@pytest.mark.timeout(60)
def test_stream_ends_with_a_frame_that_cannot_be_used(predictor):
    results = predictor.predict_stream([flat(0), flat(255), b"no picture", flat(0)])
    assert [next(results).index, next(results).index] == [0, 1]
    with pytest.raises(ImageError, match="another kind of file"):
        next(results)
    assert threads() == []


@pytest.mark.timeout(60)
def test_stream_of_a_closed_predictor(predictor):
    results = predictor.predict_stream([flat(0)] * 20)
    next(results)
    predictor.close()
    with pytest.raises(BackendError, match="load the model again"):
        list(results)
    assert threads() == []


@pytest.mark.timeout(60)
def test_stream_ends_with_a_break(predictor):
    for result in predictor.predict_stream([flat(0)] * 50, policy="newest"):
        assert result.faces
        break
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "efficientface" in thread.name]


@pytest.mark.parametrize(
    ("frames", "keywords", "message"),
    [
        ("video.mp4", {}, "a single one"),
        (flat(0), {}, "a single one"),
        ([], {"policy": "oldest"}, "every or newest"),
        ([], {"queue_size": 0}, "at least 1"),
        ([], {"smooth": -1}, "smooth: expected seconds, or 0 for none"),
        ([], {"smooth": math.nan}, "smooth: expected seconds, or 0 for none"),
    ],
)
def test_stream_that_cannot_be_is_refused_at_once(predictor, frames, keywords, message):
    with pytest.raises(ef.EfficientFaceError, match=message):
        predictor.predict_stream(frames, **keywords)


# ---- processes


def test_fork(predictor):
    """The child is told, and nothing that it does reaches the parent's model."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            predictor._backend._running = 1  # as if a thread of the parent had been at work
            predictor.close()
            for use in (lambda: predictor.features([flat(0)]), lambda: predictor(flat(0))):
                try:
                    use()
                except BackendError as error:
                    os.write(tell, str(error).encode())
        finally:
            os._exit(0)  # as multiprocessing ends its children
    os.waitpid(child, 0)
    assert os.read(told, 9999).decode() == 2 * (
        "fake.x: expected a model that this process loaded, found one that was loaded before a "
        "fork; call load() in the child, or start processes by spawn"
    )
    os.close(told)
    os.close(tell)
    assert predictor(flat(255)).label == "bright"


@pytest.mark.parametrize("again", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_pickle_loads_the_file_again(backend, model_files, again, monkeypatch):
    path = model_files[backend]
    monkeypatch.chdir(path.parent)
    prior = {label: 1 + index for index, label in enumerate(ef.PRESETS["rafdb"].labels)}
    with ef.load(path.name, threads=1, preset="rafdb", prior=prior) as predictor:
        expected = predictor(flat(99))
        monkeypatch.chdir("/")  # since then the program has gone elsewhere
        pickled = again(predictor)
    with pickled:  # the first is closed by now
        assert pickled(flat(99)) == expected
        assert (pickled.backend, pickled.spec) == (predictor.backend, predictor.spec)
        assert repr(pickled) == repr(predictor) and ", own prior, " in repr(pickled)
        assert pickled._backend.options.threads == 1
        assert pickled._backend.options.preset == "rafdb"
        assert pickled.path.is_absolute()


def test_pickle_of_a_link_to_a_file_of_another_name(model_files, tmp_path):
    """As in a cache of files by their hashes, which have no suffix."""
    shutil.copy(model_files["onnx"], tmp_path / "0abc")
    (tmp_path / "model.onnx").symlink_to("0abc")
    with ef.load(tmp_path / "model.onnx") as predictor, copy.copy(predictor) as copied:
        assert copied(flat(99)) == predictor(flat(99))


def test_pickle_of_a_file_that_is_gone(model_files, tmp_path):
    path = shutil.copy(model_files["onnx"], tmp_path)
    with ef.load(path) as predictor:
        pickled = pickle.dumps(predictor)
    Path(path).unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        pickle.loads(pickled)


# ---- load


@pytest.mark.parametrize("threads", [0, -1, 257, 10**30, 1.5, "2", True, [1], float("nan")])
def test_threads_that_cannot_be(threads):
    with pytest.raises(BackendError, match="at least 1 and at most 256"):
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


def test_preset_that_agrees_with_the_files_own_spec(backend, model_files, model_spec):
    # The labels are the same; size and normalisation stay those of the file.
    with ef.load(model_files[backend], preset="affectnet7") as predictor:
        assert predictor.spec == model_spec


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
def test_missing_file(tmp_path, name, require_backend):
    require_backend("onnx" if name.endswith(".onnx") else "torch")
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
    larger = expected.with_stem(f"{expected.stem}-160")
    assert module.bundled_model(requested, accurate=True) == larger
    assert module.model_file("accurate", requested) == larger
    assert module.model_file(Path("accurate.onnx"), requested) == Path("accurate.onnx")


@pytest.mark.parametrize("name", ["accurat", "Accurate", Path("acurate")])
def test_name_that_is_nearly_the_larger_model(name):
    with pytest.raises(ArtifactError, match=r"or accurate, found no such file; did you mean accu"):
        ef.load(name)


def test_package_in_an_archive_is_one_line(run_python, tmp_path):
    """As a zipapp is: libraries read a model from a file."""
    package = Path(ef.__file__).parent
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        for path in package.rglob("*.py"):
            archive.write(path, path.relative_to(package.parent))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import efficientface_deploy as ef\n"
        "assert 'app.zip' in ef.__file__\n"
        "try: ef.load()\n"
        "except ef.ArtifactError as error: print(error)\n"
        "print(ef.load(sys.argv[2]).spec.num_classes)"
    )
    result = run_python(code, str(tmp_path / "app.zip"), str(module.BUNDLED_ONNX))
    said = r"bundled model: expected the package in a folder, found .*app\.zip.*; install it by .*"
    assert re.fullmatch(said + "\n8\n", result.stdout) and result.stderr == ""


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ("even", "prior: expected uniform, or a weight for each label, found 'even'; "),
        ({"Anger": 1}, "prior: expected a weight for each label, found none for Neutral, Happi"),
    ],
)
def test_prior_that_cannot_be_leaves_nothing_open(backend, model_files, prior, said, monkeypatch):
    closed = []
    kind = type(create_backend(backend.partition("-")[0], model_files[backend], BackendOptions()))
    close = kind._close
    monkeypatch.setattr(kind, "_close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(EfficientFaceError, match=f"^{said}"):
        ef.load(model_files[backend], prior=prior)
    assert len(closed) == 1


def test_prior_of_a_file_without_frequencies():
    backend = Brightness(Path("folder/fake.x"), BackendOptions())
    backend.open()
    with pytest.raises(EfficientFaceError, match=r"of the training in fake\.x, found none; leave"):
        ef.Predictor(backend, prior="uniform")


def test_public_names():
    assert set(ef.__all__) <= set(dir(ef))
    assert ef.__version__.count(".") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"model": 3},
            "model: expected a path, accurate, or None for the bundled model, found 3; ",
        ),
        ({"backend": None}, "backend: expected a name, or auto, found None; "),
        ({"backend": 3}, "backend: expected a name, or auto, found 3; "),
    ],
)
def test_arguments_of_another_type(options, said):
    with pytest.raises(EfficientFaceError, match=f"^{said}"):
        ef.load(**options)
