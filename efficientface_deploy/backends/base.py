"""The one lifecycle of every backend: open, infer, close."""

from __future__ import annotations

import abc
import atexit
import contextlib
import dataclasses
import importlib
import io
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from efficientface_deploy.artifact import FEATURES, check_preset
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    EfficientFaceError,
    ImageError,
    install_command,
    words_of,
)
from efficientface_deploy.probe import Probe
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """How a backend should run.

    Attributes:
        device: Part of the backend's name after the colon (``cpu``, ``cuda``, ...), or empty for
            the backend's default.
        threads: CPU threads for one inference; None leaves the choice to the library.
        preset: What a published checkpoint was trained on; where the file carries its own spec,
            the labels of the two must agree.
        cuda_graphs: Whether an engine may run through CUDA graphs, which spare launches; without
            a meaning for other files. To turn them off is for comparison.
    """

    device: str = ""
    threads: int | None = None
    preset: str | None = None
    cuda_graphs: bool = True


@dataclasses.dataclass(frozen=True)
class Output:
    """What a network says about a batch.

    Attributes:
        logits: float32 (N, C).
        probabilities: float32 (N, C), rows sum to one.
    """

    logits: Float32Array
    probabilities: Float32Array


@dataclasses.dataclass(frozen=True)
class DeviceImages:
    """A contiguous array in the GPU's memory.

    Attributes:
        address: Of its first element.
        shape: Batch first.
        dtype: NumPy's, or a name that NumPy does not know.
        owner: What keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | str
    owner: object

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, items: slice) -> DeviceImages:
        start, stop, _ = items.indices(len(self))
        item_bytes = math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        return dataclasses.replace(
            self, address=self.address + start * item_bytes, shape=(stop - start, *self.shape[1:])
        )


class _Calls:
    """The calls into libraries that are under way, which must end before Python does.

    A daemon thread that comes back from such a call when the interpreter is gone is ended by
    Python where C++ does not allow it, and the process is aborted.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in the child of a fork: it has none of the threads that hold the lock."""
        self._changed = threading.Condition()
        self._count = 0
        self._over = False

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A call; one of a daemon thread that begins when the program has ended waits for ever."""
        with self._changed:
            if self._over and threading.current_thread().daemon:
                self._changed.wait_for(lambda: False)
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Let those under way come to their end."""
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: self._count <= 0, _LONGEST_END)


_LONGEST_END = 10.0  # seconds that the program's end may wait for a call
_calls = _Calls()
atexit.register(_calls.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_calls.forget)


def library_call() -> contextlib.AbstractContextManager[None]:
    """Around what runs in a library, so that the end of the program waits for it."""
    return _calls.one()


class Backend(abc.ABC):
    """A loaded model on one device.

    A subclass implements ``_open``, ``_infer`` and ``_close``; this class owns the order of calls,
    every check of the input, and the splitting of batches that are larger than the model takes.
    No library is imported and no device touched before :meth:`open`.

    Args:
        path: The model file.
        options: Device and threads.

    Attributes:
        name: What ran, e.g. ``onnx:cpu``; known once open.
        spec: The model's ModelSpec; known once open.
        provenance: How the artifact was made; known once open.
        max_batch: Largest batch of one call into the library; None when there is no limit.
        library: What ran it, with its release: ``onnxruntime 1.32.0``; known once open.
        probe: What the file must give, for the check at load; None where it does not say.
        feature_size: Length of a picture's features; None where the file does not give them.
        rounding: Precision that it rounds to beside the file's own, ``bf16``; empty for none.
        remote: Whether the path is a URL, not a file's.
    """

    name: str = ""
    max_batch: int | None = None
    library: str = ""
    probe: Probe | None = None
    feature_size: int | None = None
    rounding: str = ""
    remote: bool = False

    # What to do where the library computes a file wrongly; a subclass knows better.
    instead: str = "choose another backend"

    def __init__(self, path: Path, options: BackendOptions) -> None:
        self.path = path
        self.options = options
        self.spec: ModelSpec
        self.provenance: dict[str, Any] = {}
        self._is_open = False
        self._running = 0  # calls of infer under way; close waits for them
        # Guards the three above; a subclass whose library is not thread-safe locks in _infer.
        self._lifecycle = threading.Condition()

    @abc.abstractmethod
    def _open(self) -> None:
        """Import the library, load the file, set spec, provenance, name and max_batch."""

    @abc.abstractmethod
    def _infer(self, images: UInt8Array) -> Output:
        """Run one checked, contiguous, non-empty batch of at most ``max_batch`` images."""

    def _features(self, images: UInt8Array) -> Float32Array:
        """As :meth:`_infer`, what comes before the last layer; for who sets ``feature_size``."""
        raise NotImplementedError

    @abc.abstractmethod
    def _close(self) -> None:
        """Free what ``_open`` took."""

    def open(self) -> None:
        """Load the model; a second call does nothing.

        Raises:
            EfficientFaceError: The file or the machine does not allow it, or the preset of the
                options contradicts the file.
        """
        with self._lifecycle:
            if not self._is_open:
                try:
                    self._open()
                except ImportError as error:
                    install = "install it again, or choose another backend"
                    raise broken_package(type(self).__name__, error, install) from None
                except OSError as error:  # the file is gone, or its disk fails
                    expected, fix = "a model file that can be read", "check the file and its disk"
                    raise ArtifactError(self.path, expected, words_of(error), fix) from None
                try:
                    check_preset(self.path, self.spec, self.options.preset)
                except EfficientFaceError:
                    self._close()
                    raise
                self._is_open = True

    def close(self) -> None:
        """Free the model once the calls under way are done; a second call does nothing."""
        with self._lifecycle:
            if self._is_open:
                self._is_open = False
                self._lifecycle.wait_for(lambda: self._running == 0)
                self._close()

    def infer(self, images: npt.NDArray[Any] | DeviceArray) -> Output:
        """Run a batch.

        Args:
            images: uint8 (N, S, S, 3), RGB, as :func:`preprocess.to_model_input` makes them; N may
                be zero or larger than ``max_batch``. ``trt`` and ``trt-rtx`` also take an array on
                their GPU that exports itself by DLPack or ``__cuda_array_interface__``: it is
                read where it is, so it has to be C-contiguous.

        Returns:
            Logits and probabilities, float32 (N, C).

        Raises:
            ImageError: Another type or shape.
            BackendError: The backend is closed, or the network's output is not finite.
        """
        with self._in_use():
            if not isinstance(images, np.ndarray) and is_device_array(images):
                return self._infer_all(self._take(images))
            return self._infer_all(images)

    def features(self, images: UInt8Array) -> Float32Array:
        """What the network's last layer is given for a batch.

        Args:
            images: As for :meth:`infer`, in host memory.

        Returns:
            float32 (N, feature_size).

        Raises:
            ImageError: Another type or shape.
            BackendError: The backend is closed, the file does not give them, or they are not
                finite.
        """
        with self._in_use():
            if self.feature_size is None:
                fix = "export it again: efficientface-export --features --weights CHECKPOINT"
                expected = f"a model with the output {FEATURES}"
                raise BackendError(self.path.name, expected, "one without", fix)
            self._check_input(images)
            parts = self._in_parts(images, self._features)
            none = np.empty((0, self.feature_size), np.float32)
            if wrong := [part.shape for part in parts if part.shape[1:] != none.shape[1:]]:
                raise self._wrong_shapes(f"(N, {self.feature_size})", str(wrong[0]))
            features: Float32Array = np.concatenate([none, *parts])
            self._check_finite(features)
            return features

    def _take(self, images: DeviceArray) -> DeviceImages:
        """Take an array on a GPU where it is; a backend that can do so overrides this."""
        expected = f"an array in host memory, which is what {self.name} takes"
        fix = "copy it to the host (.cpu().numpy(), cupy.asnumpy), or use an engine with trt"
        raise ImageError("batch", expected, f"{type(images).__name__} on a CUDA device", fix)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep :meth:`close` of another thread waiting while the model runs."""
        with self._lifecycle:
            if not self._is_open:
                fix = "load the model again"
                raise BackendError(self.path.name, "an open backend", "a closed one", fix)
            self._running += 1
        try:
            with library_call():
                yield
        finally:
            with self._lifecycle:
                self._running -= 1
                self._lifecycle.notify_all()

    def _infer_all(self, images: Any) -> Output:
        self._check_input(images)
        if len(images) == 0:
            empty = np.zeros((0, self.spec.num_classes), dtype=np.float32)
            return Output(empty, empty.copy())
        parts = self._in_parts(images, self._infer)
        output = parts[0]
        if len(parts) > 1:
            logits = np.concatenate([part.logits for part in parts])
            output = Output(logits, np.concatenate([part.probabilities for part in parts]))
        self._check_output(output, len(images))
        return output

    def _in_parts(self, images: Any, run: Callable[[Any], T]) -> list[T]:
        """What a function of contiguous batches that the model takes gives for each of them."""
        if isinstance(images, np.ndarray):
            images = np.ascontiguousarray(images)
        step = self.max_batch or len(images) or 1
        return [run(images[at : at + step]) for at in range(0, len(images), step)]

    def _check_input(self, images: Any) -> None:
        side = self.spec.input_size
        valid = (
            isinstance(images, (np.ndarray, DeviceImages))
            and images.dtype == np.uint8
            and images.ndim == 4
            and images.shape[1:] == (side, side, 3)
        )
        if not valid:
            dtype = getattr(images, "dtype", type(images).__name__)
            found = f"{dtype} of shape {getattr(images, 'shape', 'unknown')}"
            fix = "make it with Predictor.preprocess, or call the predictor with the image"
            raise ImageError("batch", f"uint8 array of shape (N, {side}, {side}, 3)", found, fix)

    def _check_output(self, output: Output, batch: int) -> None:
        shape = (batch, self.spec.num_classes)
        shapes = {output.logits.shape, output.probabilities.shape}
        if shapes != {shape}:
            raise self._wrong_shapes(str(shape), " and ".join(map(str, sorted(shapes))))
        self._check_finite(output.logits, output.probabilities)

    def _wrong_shapes(self, expected: str, found: str) -> BackendError:
        fix = "export the model again with efficientface-export"
        return BackendError(self.path.name, f"outputs of shape {expected}", found, fix)

    def _check_finite(self, *outputs: Float32Array) -> None:
        if not all(np.isfinite(values).all() for values in outputs):
            fix = "export the model again in a higher precision (--precision fp32)"
            raise BackendError(self.path.name, "finite outputs", "NaN or infinity", fix)

    def __enter__(self) -> Backend:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def import_package(module: str, subject: str, expected: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: Its name.
        subject: What needs it.
        expected: What it is for people.
        extra: What brings it.

    Raises:
        BackendError: It is not installed, or cannot be loaded; the error names the extra.
    """
    try:
        return import_library(module)
    except ImportError as error:
        raise BackendError(subject, expected, words_of(error), install_command(extra)) from None


def import_library(module: str) -> Any:
    """Import a package, whose errors may be empty.

    A module that was compiled for NumPy 1 fails without a word beside NumPy 2, which prints thirty
    lines instead.

    Raises:
        BackendError: It is of NumPy's other kind.
        ImportError: It cannot be imported for another reason.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            imported = importlib.import_module(module)
    except ImportError:
        if _OLD_BUILD not in printed.getvalue():
            raise
        found, fix = "one for NumPy 1", f"pip install 'numpy<2', or a newer {module}"
        raise BackendError(module, f"a build for NumPy {np.__version__}", found, fix) from None
    if printed.getvalue() and sys.stderr:
        print(printed.getvalue(), end="", file=sys.stderr)
    return imported


_OLD_BUILD = "compiled using NumPy 1"  # in NumPy's own words


def broken_package(subject: str, error: Exception, install: str) -> BackendError:
    """What to say of a library that is there and cannot be imported."""
    return BackendError(subject, "a library that can be imported", words_of(error), install)


# DLDeviceType of dlpack.h: a CUDA device's memory, and managed memory.
DLPACK_CUDA, DLPACK_MANAGED = 2, 13


class SupportsDLPack(Protocol):
    """An array that exports itself by DLPack."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...


class SupportsCudaArray(Protocol):
    """An array that exports itself by the CUDA Array Interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


DeviceArray = SupportsDLPack | SupportsCudaArray


def is_device_array(images: object) -> bool:
    """Whether an object offers itself as memory of a CUDA device."""
    try:
        if hasattr(images, "__dlpack_device__"):
            kind, _ = images.__dlpack_device__()
            return int(kind) in (DLPACK_CUDA, DLPACK_MANAGED)
        return hasattr(images, "__cuda_array_interface__")
    except Exception:  # noqa: BLE001 - the producer's code raises whatever it likes
        return False
