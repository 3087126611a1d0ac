"""load(), Predictor and Prediction: what an application embeds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficientface_deploy.artifact import CHECKPOINT_SUFFIXES
from efficientface_deploy.backends import create_backend, missing_reason, resolve_backend
from efficientface_deploy.backends.base import Backend, BackendOptions, DeviceArray
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    ImageError,
    ProbeError,
)
from efficientface_deploy.prior import UNIFORM, Prior, adjust, log_ratios
from efficientface_deploy.probe import TOLERANCES, Check
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.tuned import read_tuned
from efficientface_deploy.vision.faces import Face, FaceDetector
from efficientface_deploy.vision.preprocess import (
    Float32Array,
    ImageSource,
    UInt8Array,
    load_image,
    to_model_input,
)
from efficientface_deploy.vision.search import find_faces
from efficientface_deploy.vision.steady import TIME_CONSTANT, SteadyLabels
from efficientface_deploy.vision.stream import check_policy, overlap
from efficientface_deploy.vision.tracks import Tracker
from efficientface_deploy.vision.video import Video, VideoFrame

WEIGHTS = Path(__file__).parent / "weights"
BUNDLED_ONNX = WEIGHTS / "efficientface-ferplus.onnx"
BUNDLED_WEIGHTS = WEIGHTS / "efficientface-ferplus.safetensors"
ACCURATE = "accurate"
ACCURATE_ONNX = WEIGHTS / "efficientface-ferplus-160.onnx"
ACCURATE_WEIGHTS = WEIGHTS / "efficientface-ferplus-160.safetensors"

CHECK_VARIABLE = "EFFICIENTFACE_CHECK"
"""Environment variable: ``0`` loads models without the check by their probe."""

_log = logging.getLogger(__name__)

MAX_THREADS = 256  # more would wait for each other; a library given thousands hangs


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says about one face.

    Attributes:
        label: The most probable class.
        confidence: Its probability, 0 to 1.
        probabilities: Every class with its probability, in the order of the model's labels.
        unsure: Whether the confidence is too low for the precision that the spec promises of sure
            labels, ``sure_precision``; None where the model's file promises none, or where
            another prior took the place of the training's.
    """

    label: str
    confidence: float
    probabilities: dict[str, float]
    unsure: bool | None = None

    @classmethod
    def of(
        cls,
        probabilities: Float32Array,
        labels: Sequence[str],
        sure_above: float | None = None,
        best: int | None = None,
    ) -> Prediction:
        """What probabilities (C,) say.

        Args:
            probabilities: Of each class.
            labels: The classes' names.
            sure_above: As in :class:`ModelSpec`.
            best: Index of the label; None for the most probable one's.
        """
        best = int(probabilities.argmax()) if best is None else best
        confidence = float(probabilities[best])
        unsure = None if sure_above is None else confidence <= sure_above
        named = dict(zip(labels, probabilities.tolist(), strict=True))
        return cls(labels[best], confidence, named, unsure)


@dataclasses.dataclass(frozen=True)
class FacePrediction:
    """A face in a picture, and what a network says about it.

    Attributes:
        face: Where it is.
        prediction: Its label, which is no better than a guess where the face is small; in a
            stream the steady one, unless that is turned off.
        track: In a stream its number, from 1, which stays with it; None in a picture.
        raw: Where the label is steady, what the network says about this frame alone.
    """

    face: Face
    prediction: Prediction
    track: int | None = None
    raw: Prediction | None = None

    @property
    def small(self) -> bool:
        """Whether the face has too few pixels to be judged."""
        return self.face.small


@dataclasses.dataclass(frozen=True, eq=False)
class FrameResult:
    """What :meth:`Predictor.predict_stream` says about one frame.

    Attributes:
        index: The frame's place in its source, from 0; dropped frames count.
        seconds: Its time in its source, as a video's container or a :class:`VideoFrame` says; of
            another source, when it came, from 0.
        time: When it came, seconds by ``time.monotonic``.
        latency: Seconds from there to its labels, waiting included.
        image: The frame, PIL, RGB.
        faces: Its faces, the one first that has been followed for longest; empty where none was
            found. Without a detector the whole frame is one face.
    """

    index: int
    seconds: float
    time: float
    latency: float
    image: Image.Image
    faces: tuple[FacePrediction, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Picture:
    """A picture ready for the network: its faces, and of each uint8 (S, S, 3); its time."""

    image: Image.Image
    faces: Sequence[Face]
    inputs: list[UInt8Array]
    seconds: float | None = None


class Predictor:
    """A model ready to label faces; made by :func:`load`.

    Threads may share it: every method may be called from several at once, and :meth:`close` waits
    for the calls under way. Pickled or copied, it is its file's name and :func:`load`'s arguments:
    the copy loads the file again.

    It does not survive a fork, since the libraries' threads do not: in the child its use is an
    error. (Nor does ONNX Runtime 1.32 let such a child end by ``sys.exit``: it hangs.
    ``multiprocessing`` ends its children by ``os._exit``, which works.)

    Args:
        backend: An open backend.
        check: Whether to check what it computes by the file's probe.
        prior: As for :func:`load`.

    Raises:
        ConfigError: The prior does not suit the model.
        ProbeError: It computes something else.
    """

    def __init__(
        self, backend: Backend, *, check: bool = False, prior: Prior | None = None
    ) -> None:
        self._backend = backend
        self._prior = dict(prior) if isinstance(prior, Mapping) else prior
        self._log_ratios = None if prior is None else log_ratios(prior, backend.spec, backend.path)
        self._check = check
        self._checked = check_backend(backend) if check else None
        self._process = os.getpid()
        # For a copy, which may be made in another folder. Not what a link leads to: that may be
        # called otherwise, as in a cache by hashes, and the suffix says what a file is.
        self._file = backend.path if backend.remote else backend.path.absolute()

    @property
    def spec(self) -> ModelSpec:
        """The model's labels, input size and normalisation."""
        return self._backend.spec

    @property
    def backend(self) -> str:
        """What runs the model, e.g. ``onnx:cpu``."""
        return self._backend.name

    @property
    def path(self) -> Path:
        """The model file."""
        return self._backend.path

    @property
    def provenance(self) -> dict[str, Any]:
        """How the artifact was made, with precision, parent's hash, verification, versions."""
        return self._backend.provenance

    @property
    def feature_size(self) -> int | None:
        """Length of a face's :meth:`features`; None where the file does not give them."""
        return self._backend.feature_size

    @property
    def checked(self) -> Check | None:
        """What the file's probe showed at load; None where it has none, or was not asked."""
        return self._checked

    @property
    def has_probe(self) -> bool:
        """Whether the file carries a probe."""
        return self._backend.probe is not None

    def __call__(self, image: ImageSource) -> Prediction:
        """Label one face.

        Args:
            image: Path, bytes of an image file, PIL image, or uint8 RGB array (H, W, 3).

        Raises:
            ImageError: The image cannot be used.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Iterable[ImageSource]) -> list[Prediction]:
        """Label several faces in one pass; an empty list gives an empty list.

        Args:
            images: As for a single call, in any mixture.

        Raises:
            ImageError: One of the images cannot be used, or what was given is a single image.
        """
        _check_several(images)
        return self._label([self.preprocess(image) for image in images])

    def features(self, images: Iterable[ImageSource]) -> Float32Array:
        """What the network's last layer is given for faces: a description of each by numbers.

        Their distances, or a small classifier on them, serve other tasks than the network's own
        labels. ``*.safetensors`` always gives them; an exported file does if it was exported with
        ``--features``, as the bundled one.

        Args:
            images: As for :meth:`predict_batch`.

        Returns:
            float32 (N, 1024), 0 or more each; 512 or 2,048 numbers for an LDG.

        Raises:
            ImageError: One of the images cannot be used, or what was given is a single image.
            BackendError: The file does not give them; the error says how to export it again.
        """
        _check_several(images)
        inputs = [self.preprocess(image) for image in images]
        self._check_process()
        side = self.spec.input_size
        return self._backend.features(
            np.stack(inputs) if inputs else np.empty((0, side, side, 3), np.uint8)
        )

    def predict_faces(
        self, image: ImageSource, detector: FaceDetector | None = None
    ) -> list[FacePrediction]:
        """Find the faces of a picture and label each.

        Args:
            image: As for a single call.
            detector: From :func:`open_detector`, or your own; without one the whole picture is a
                face.

        Returns:
            The faces, the most confident first, each cut as the model's training faces were (see
            :mod:`efficientface_deploy.vision.faces`); empty where there is none.

        Raises:
            ConfigError: The detector is none.
            ImageError: The image cannot be used, or the detector gives what the model cannot use.
        """
        _check_detector(detector)
        return self._label_faces(self._find_faces(image, detector))

    def predict_stream(
        self,
        frames: Iterable[ImageSource | VideoFrame],
        *,
        detector: FaceDetector | None = None,
        policy: str = "every",
        queue_size: int = 4,
        smooth: float | None = TIME_CONSTANT,
    ) -> Generator[FrameResult, None, None]:
        """Label frames while the next ones are read, searched and resized in the background.

        Each face has a number that stays with it, and a label that does not flicker.

        Args:
            frames: A video or camera from :func:`open_video`, or any source of images, or of
                images with their times, which may refill one array; it is read in a thread.
            detector: Finds the faces of a frame; without one the whole frame is a face. It runs
                in a thread.
            policy: ``every`` labels each frame, and lets the source wait; ``newest`` drops what
                a camera gave while the frame before was worked on.
            queue_size: Frames that may wait at each of two places, under ``every``.
            smooth: Seconds over which a face's probabilities are averaged, whatever the frame
                rate; 0 or None gives each frame's own.

        Returns:
            The results, in the order of the frames. Its threads end when it does, with the last
            frame, with its ``close()``, with a ``break``, or with an exception. A source that
            blocks for more than five seconds is left behind, in a daemon thread.

        Raises:
            ConfigError: There is no such policy, the queue holds nothing, or ``smooth`` is no time.
            ImageError: At its turn, a frame that cannot be used, or the damage of a video; it ends
                the stream.
        """
        _check_several(frames)
        _check_detector(detector)
        check_policy(policy, queue_size)
        if smooth and not 0 <= smooth < math.inf:
            raise ConfigError("smooth", "seconds, or 0 for none", f"{smooth}", "leave it out")
        steady = SteadyLabels(smooth) if smooth else None
        return self._stream(frames, detector, policy, queue_size, steady)

    def preprocess(self, image: ImageSource) -> UInt8Array:
        """The model's input for an image: uint8 (S, S, 3), RGB."""
        return to_model_input(image, self.spec)

    def infer(self, images: UInt8Array | DeviceArray) -> tuple[Float32Array, Float32Array]:
        """Run preprocessed images.

        Args:
            images: uint8 (N, S, S, 3), RGB. With ``trt`` and ``trt-rtx`` it may be an array on the
                GPU, of PyTorch, CuPy and others, which is read where it is.

        Returns:
            Logits and probabilities, float32 (N, C), under the prior that was asked for.
        """
        self._check_process()
        output = self._backend.infer(images)
        if self._log_ratios is not None:
            return adjust(output.logits, self._log_ratios)
        return output.logits, output.probabilities

    def close(self) -> None:
        """Free the model; using the predictor afterwards is an error."""
        if not self._is_forked():  # a call under way in the parent never ends in the child
            self._backend.close()

    def _check_process(self) -> None:
        if self._is_forked():  # ONNX Runtime would wait for threads that only the parent has
            found = "one that was loaded before a fork"
            fix = "call load() in the child, or start processes by spawn"
            raise BackendError(self.path.name, "a model that this process loaded", found, fix)

    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def _label(self, inputs: list[UInt8Array]) -> list[Prediction]:
        """What the network says about inputs, uint8 (S, S, 3) each."""
        if not inputs:
            return []
        # One input needs no copy to be a batch.
        images = np.stack(inputs) if len(inputs) > 1 else inputs[0][None]
        _, probabilities = self.infer(images)  # (N, C)
        labels, sure_above = self.spec.labels, self._sure_above
        return [Prediction.of(row, labels, sure_above) for row in probabilities]

    @property
    def _sure_above(self) -> float | None:
        """The spec's, which was found with the training's prior: None with another."""
        return self.spec.sure_above if self._prior is None else None

    def _find_faces(
        self, source: ImageSource | VideoFrame, detector: FaceDetector | None
    ) -> _Picture:
        """Everything that comes before the network."""
        if isinstance(source, VideoFrame):
            picture = self._find_faces(source.image, detector)
            return dataclasses.replace(picture, seconds=source.seconds)
        image = load_image(source)
        faces, inputs = find_faces(image, detector, self.spec)
        return _Picture(image, faces, list(inputs))

    def _label_faces(self, picture: _Picture) -> list[FacePrediction]:
        predictions = self._label(picture.inputs)
        return list(map(FacePrediction, picture.faces, predictions))

    def _stream(
        self,
        frames: Iterable[ImageSource | VideoFrame],
        detector: FaceDetector | None,
        policy: str,
        queue_size: int,
        steady: SteadyLabels | None,
    ) -> Generator[FrameResult, None, None]:
        tracker = Tracker()
        prepare = functools.partial(self._find_faces, detector=detector)
        # Copied in the thread that reads, before the source is asked for its next frame.
        kept = frames.timed() if isinstance(frames, Video) else map(_copy, frames)
        start = None
        with contextlib.closing(overlap(kept, prepare, policy, queue_size)) as pictures:
            for arrival in pictures:
                picture = arrival.item
                start = arrival.time if start is None else start
                seconds = arrival.time - start if picture.seconds is None else picture.seconds
                faces = self._follow(self._label_faces(picture), seconds, tracker, steady)
                latency = time.monotonic() - arrival.time
                yield FrameResult(
                    arrival.index, seconds, arrival.time, latency, picture.image, faces
                )

    def _follow(
        self,
        faces: Sequence[FacePrediction],
        seconds: float,
        tracker: Tracker,
        steady: SteadyLabels | None,
    ) -> tuple[FacePrediction, ...]:
        """The faces of a frame with their numbers and steady labels, in the numbers' order."""
        tracks = tracker.update([one.face for one in faces], seconds)
        followed = []
        for track, found in sorted(zip(tracks, faces, strict=True), key=lambda pair: pair[0]):
            raw, prediction = None, found.prediction
            if steady and not found.small:  # a guess would spoil what larger frames showed
                raw = prediction
                values = np.array(list(raw.probabilities.values()), np.float32)
                smooth, best = steady.update(track, seconds, values)
                prediction = Prediction.of(smooth, self.spec.labels, self._sure_above, best)
            followed.append(FacePrediction(found.face, prediction, track, raw))
        return tuple(followed)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        options = dataclasses.asdict(self._backend.options)
        del options["device"]  # part of the backend's name
        options["check"] = self._check
        options["prior"] = self._prior
        return functools.partial(load, self._file, backend=self.backend, **options), ()

    def __repr__(self) -> str:
        spec = self.spec
        state = ", preliminary" if spec.preliminary else ""
        if self._prior is not None:
            state += f", {UNIFORM if self._prior == UNIFORM else 'own'} prior"
        return (
            f"Predictor({self.path.name!r}, backend={self.backend!r}, {spec.name}{state}, "
            f"{spec.num_classes} classes, {spec.input_size}x{spec.input_size})"
        )


def _check_detector(detector: object) -> None:
    """Refuse what finds no faces, such as a detector's name."""
    if detector is not None and not hasattr(detector, "detect"):
        expected, fix = "a detector, or None", "open one by open_detector()"
        raise ConfigError("detector", expected, repr(detector)[:40], fix)


def _check_several(images: object) -> None:
    """Refuse a single image, whose rows, bytes or characters would pass for images."""
    single = isinstance(images, (str, os.PathLike, bytes, bytearray, Image.Image))
    single = single or hasattr(images, "read")  # an open file
    if isinstance(images, np.ndarray):
        single = images.ndim < 3 or (images.ndim == 3 and images.shape[-1] in (1, 3, 4))
    if single or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        kind = type(images).__name__
        found = f"a single one ({kind})" if single else kind
        fix = (
            "call the predictor itself, put the image into a list, or open a video by open_video()"
        )
        raise ImageError("batch", "several images", found, fix)


def _copy(frame: Any) -> Any:
    """A frame that stays as it is while its source makes the next one of the same memory."""
    if isinstance(frame, VideoFrame):
        return VideoFrame(_copy(frame.image), frame.seconds)
    if isinstance(frame, Image.Image):
        image = load_image(frame)
        return image.copy() if image is frame else image
    if isinstance(frame, np.ndarray):
        return frame.copy()
    return bytes(frame) if isinstance(frame, bytearray) else frame


def load(
    model: str | Path | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    preset: str | None = None,
    cuda_graphs: bool = True,
    check: bool | None = None,
    prior: Prior | None = None,
) -> Predictor:
    """Load a model, and check that it computes here what its file says.

    Every exported file carries a probe (see :mod:`efficientface_deploy.probe`): two pictures and
    their logits. They run first, which is the library's warm-up too.

    Args:
        model: ``*.onnx``, ``*.engine``, ``*.rtx.engine``, ``*.safetensors`` or a published
            ``*.pth.tar``; or ``triton://host:port/model``, of a Triton server; None loads the
            bundled model, ``accurate`` the larger one, which takes up to twice as long.
        backend: ``auto`` (by the file; on the CPU that it was tuned on, what was fastest), or
            ``onnx``, ``onnx:cuda``, ``trt``, ``trt-rtx``, ``torch``, ...; what is asked for is
            what runs, or it is an error.
        threads: CPU threads for one inference; None leaves the choice to the library, and with
            ``backend="auto"`` to what the file was tuned to.
        preset: What a published checkpoint was trained on, which it does not say itself: labels,
            normalisation and input size. Every other file carries its own; the labels must agree.
        cuda_graphs: Whether an engine may run through CUDA graphs. They are faster; turn them off
            to compare.
        check: Whether to run the probe; None does, unless the environment has
            ``EFFICIENTFACE_CHECK=0``.
        prior: How often each class comes where the model is used, in the place of how often it
            came in its training: ``"uniform"``, or a weight for each label. Rare classes are then
            found more often, and frequent ones missed more often. None leaves it as it was trained.

    Raises:
        ConfigError: The prior does not suit the labels, or the file does not say how often each
            class came in its training.
        ProbeError: The file, or what runs it here, computes something else than it must.
        EfficientFaceError: The file is unusable or contradicts the preset, or the backend is not
            available here.
    """
    if threads is not None and not (type(threads) is int and 1 <= threads <= MAX_THREADS):
        expected = f"a whole number, at least 1 and at most {MAX_THREADS}"
        raise BackendError("threads", expected, repr(threads)[:40], "leave it out for all cores")
    if not isinstance(backend, str):
        raise BackendError(
            "backend", "a name, or auto", repr(backend)[:40], "leave it out for auto"
        )
    if model is not None and not isinstance(model, (str, os.PathLike)):
        expected = f"a path, {ACCURATE}, or None for the bundled model"
        fix = "give the file's path"
        raise ArtifactError("model", expected, repr(model)[:40], fix)
    path = model_file(model, backend)
    opened = _open_backend(path, backend, BackendOptions("", threads, preset, cuda_graphs))
    try:
        if check is None:
            check = os.environ.get(CHECK_VARIABLE) != "0"
        return Predictor(opened, check=check, prior=prior)
    except BaseException:
        opened.close()
        raise


def _open_backend(path: Path, requested: str, options: BackendOptions) -> Backend:
    """Open the backend that is asked for; of a tuned file for this machine, the one it names."""
    name, device = resolve_backend(path, requested)
    if requested == "auto" and (tuned := read_tuned(path)) is not None:
        threads = options.threads or tuned.threads
        try:
            return _open_backend(path, tuned.backend, dataclasses.replace(options, threads=threads))
        except BackendError as error:
            text = "%s: tuned for %s, which does not run here (%s): the defaults apply"
            _log.info(text, path, tuned.backend, error.found)
    opened = create_backend(name, path, dataclasses.replace(options, device=device))
    opened.open()
    return opened


def check_backend(backend: Backend) -> Check | None:
    """Run the probe of an open backend's file, one picture after the other.

    One at a time is what a camera's program does: so this is the warm-up of that batch.

    Returns:
        What it showed; None where the file has no probe.

    Raises:
        ProbeError: The backend computes something else.
    """
    probe = backend.probe
    if probe is None:
        if not backend.path.name.endswith(CHECKPOINT_SUFFIXES):
            found = "no probe in it: what it computes here is not checked"
            _log.info("%s: %s; export it again to have one", backend.path, found)
        return None
    engine = f"{backend.name}, {backend.library}"
    expected = f"the logits that {backend.path.name} says it gives"
    off = f"load(check=False) or {CHECK_VARIABLE}=0 runs it all the same"
    images = probe.images(backend.spec.input_size)
    try:
        logits = [backend.infer(image[None]).logits for image in images]
    except BackendError as error:  # NaN, above all
        found = f"{error.found} instead of {error.expected}"
        raise ProbeError(engine, expected, found, f"{backend.instead}; {off}") from None
    tolerance = max(probe.tolerance, TOLERANCES.get(backend.rounding, 0.0))
    check = Check(engine, probe.difference(np.concatenate(logits)), tolerance)
    if not check.passed:
        found = f"{check.difference:.2g} of their spread beside them (at most {check.tolerance:g})"
        raise ProbeError(engine, expected, found, f"{backend.instead}; {off}")
    return check


def model_file(model: str | os.PathLike[str] | None, backend: str = "auto") -> Path:
    """The file that a name means: a bundled one for None and ``accurate``, else it is the path.

    Raises:
        ArtifactError: It is neither, and looks like ``accurate``; or as of :func:`bundled_model`.
    """
    if model is None:
        return bundled_model(backend)
    name = os.fspath(model)
    if name == ACCURATE:
        return bundled_model(backend, accurate=True)
    if "." not in name and not os.path.lexists(name):
        import difflib  # here, where it is wanted

        if difflib.get_close_matches(name.lower(), [ACCURATE]):
            expected, fix = f"a model file, or {ACCURATE}", f"did you mean {ACCURATE}?"
            raise ArtifactError(name, expected, "no such file", fix)
    return Path(model)


def bundled_model(backend: str = "auto", *, accurate: bool = False) -> Path:
    """The bundled file that suits a backend: ONNX where ONNX Runtime is there, else weights.

    Args:
        backend: As for :func:`load`.
        accurate: The larger network's.

    Raises:
        ArtifactError: The package is in an archive, as a zipapp is, where no library reads files.
    """
    if not WEIGHTS.is_dir():
        fix = "install it by pip, or unpack it; or give another model file"
        raise ArtifactError("bundled model", "the package in a folder", f"{WEIGHTS}", fix)
    wants_torch = backend.partition(":")[0] == "torch"
    if backend == "auto":
        wants_torch = missing_reason("onnx") is not None and missing_reason("torch") is None
    if accurate:
        return ACCURATE_WEIGHTS if wants_torch else ACCURATE_ONNX
    return BUNDLED_WEIGHTS if wants_torch else BUNDLED_ONNX
