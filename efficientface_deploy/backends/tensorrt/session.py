"""Running an engine: pinned buffers, one stream, and a CUDA graph for each batch size in use.

A network of this size is bound by launches: some eighty kernels of a few microseconds each. A
CUDA graph queues them all by one call. The copies from and to pinned memory are in the graph too:
their addresses never change, and three calls from Python fewer are worth as much as a few kernels.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from efficientface_deploy.artifact import FEATURES, FLOAT_INPUT, OUTPUTS
from efficientface_deploy.backends.base import DeviceArray, DeviceImages, Output
from efficientface_deploy.backends.tensorrt.cuda import Buffer, Cuda
from efficientface_deploy.backends.tensorrt.device_array import read_device_array
from efficientface_deploy.backends.tensorrt.engine import Engine
from efficientface_deploy.errors import BackendError, ImageError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise

_log = logging.getLogger(__name__)

# What a program runs over and over: a few batch sizes, from a few places. Each has a context of
# its own, so that an unbounded number would fill the GPU of a program whose batches differ always.
MAX_CAPTURES = 8
MAX_CANDIDATES = 32

_ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address


class _Key(NamedTuple):
    """What a CUDA graph is bound to."""

    batch: int
    address: int  # of its images on the device


class _Capture(NamedTuple):
    """A batch that is run over and over."""

    context: Any  # its execution context
    graph: int | None  # handle of its CUDA graph; None where the context has its own


class Session:
    """An engine with its contexts, its stream and its buffers.

    A batch size that comes for the second time gets a context of its own and a CUDA graph, which
    the third time runs; what comes once is not worth capturing. One context holds one graph, as
    NVIDIA advises: a graph refers to its context's state, which another shape would change. All
    contexts share the memory for intermediate results, since one of them runs at a time.

    Args:
        engine: The deserialised plan.
        spec: Its ModelSpec.
        cuda: An open binding, active.
        graphs: Whether to use CUDA graphs.

    Attributes:
        max_batch: From the engine's optimisation profile.

    Raises:
        ArtifactError: The plan's tensors are not those of its spec.
        BackendError: Not enough memory.
    """

    def __init__(self, engine: Engine, spec: ModelSpec, cuda: Cuda, *, graphs: bool) -> None:
        self._cuda = cuda
        self._engine = engine
        self._spec = spec
        engine.check_signature(spec)
        largest = engine.input_shape()
        self.max_batch = largest[0]
        self._takes_floats = engine.input_name == FLOAT_INPUT
        self._captures: collections.OrderedDict[_Key, _Capture] = collections.OrderedDict()
        self._candidates: collections.OrderedDict[_Key, None] = collections.OrderedDict()
        self._uncapturable: set[int] = set()  # batch sizes
        self._can_capture = graphs and (engine.captures_itself or cuda.captures)
        if graphs and not self._can_capture:
            _log.debug("%s cannot capture CUDA graphs: engines run without", cuda.name)
        with contextlib.ExitStack() as stack:
            self._stream = cuda.create_stream()
            stack.callback(cuda.free, "stream", self._stream)
            self._memory = cuda.allocate_device(engine.memory_bytes)
            stack.callback(cuda.free, "device", self._memory)

            def buffer(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
                return stack.enter_context(contextlib.closing(Buffer(cuda, shape, dtype)))

            self._input = buffer(largest, np.float32 if self._takes_floats else np.uint8)
            outputs = self.max_batch, spec.num_classes
            self._outputs = {name: buffer(outputs, np.float32) for name in OUTPUTS}
            # Written by every inference, and copied to the host for who asks for them.
            self._asked_for: dict[str, Buffer] = {}
            if engine.feature_size is not None:
                size = self.max_batch, engine.feature_size
                self._asked_for = {FEATURES: buffer(size, np.float32)}
            self._context: Any = self._new_context(graphs=False)
            self._resources = stack.pop_all()
        engine.keep_kernels()

    def take(self, images: DeviceArray) -> DeviceImages:
        """Take an array on the GPU where it is; the stream waits until its content is there.

        Raises:
            ImageError: It cannot be used as it is, or the engine takes normalised floats.
        """
        if self._takes_floats:
            expected = "images in host memory, since this engine takes normalised floats"
            fix = "copy it to the host, or export the engine without --float-input"
            raise ImageError("batch", expected, "an array on a CUDA device", fix)
        with self._cuda.active():
            return read_device_array(images, self._cuda, self._stream)

    def run(self, images: UInt8Array | DeviceImages) -> Output:
        """Run one batch; the caller makes threads take turns.

        Args:
            images: uint8 (N, S, S, 3), N at most ``max_batch``.

        Returns:
            Logits and probabilities in memory of their own, float32 (N, C).

        Raises:
            ImageError: An array on the GPU begins where TensorRT cannot read it.
            BackendError: The library or the GPU failed.
        """
        with self._cuda.active():
            key = _Key(len(images), self._place(images))
            capture = self._captures.get(key)
            if capture is None:
                self._set(self._context, key)
                self._enqueue(self._context, key)
            else:
                self._captures.move_to_end(key)
                self._replay(capture, key)
            self._cuda.synchronize(self._stream)
            # The pinned memory is overwritten by the next call: hand out copies.
            found = (buffer.host[: key.batch].copy() for buffer in self._outputs.values())
            output = Output(*found)
            if capture is None and self._can_capture:
                self._capture_if_repeated(key)
        return output

    def features(self, images: UInt8Array) -> Float32Array:
        """As :meth:`run`, what comes before the last layer, float32 (N, F); without a graph."""
        with self._cuda.active():
            key = _Key(len(images), self._place(images))
            self._set(self._context, key)
            self._enqueue(self._context, key)
            buffer = self._asked_for[FEATURES]
            buffer.to_host(key.batch, self._stream)
            self._cuda.synchronize(self._stream)
            features: Float32Array = buffer.host[: key.batch].copy()
        return features

    def _place(self, images: UInt8Array | DeviceImages) -> int:
        """Address of the images on the device, where the caller's or our own copy will lie."""
        if not isinstance(images, DeviceImages):
            ready = normalise(images, self._spec) if self._takes_floats else images
            self._input.host[: len(images)] = ready
            return self._input.address
        if excess := images.address % _ALIGNMENT:
            expected = f"an array whose memory begins at a multiple of {_ALIGNMENT} bytes"
            found = f"one that begins {excess} bytes after"
            raise ImageError("batch", expected, found, "give a copy of it, on the GPU")
        return images.address

    def _new_context(self, *, graphs: bool) -> Any:
        """A context that writes to our buffers."""
        context = self._engine.new_context(self._memory, graphs=graphs)
        for name, buffer in (self._outputs | self._asked_for).items():
            self._set_address(context, name, buffer.address)
        return context

    def _set(self, context: Any, key: _Key) -> None:
        """Tell a context its batch size, and where the images lie."""
        name = self._engine.input_name
        self._set_address(context, name, key.address)
        if not context.set_input_shape(name, (key.batch, *self._input.host.shape[1:])):
            raise self._engine.failure(f"take a batch of {key.batch}")

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._engine.failure(f"take the address of {name}")

    def _enqueue(self, context: Any, key: _Key) -> None:
        """Queue all of an inference: copy to the device, run, copy back."""
        if key.address == self._input.address:
            self._input.to_device(key.batch, self._stream)
        if not context.execute_async_v3(self._stream):
            raise self._engine.failure("run the engine")
        for buffer in self._outputs.values():
            buffer.to_host(key.batch, self._stream)

    def _capture_if_repeated(self, key: _Key) -> None:
        """Capture what has just run, if it ran before; the stream is idle."""
        if key.batch in self._uncapturable:
            return
        if key not in self._candidates:
            self._candidates[key] = None
            if len(self._candidates) > MAX_CANDIDATES:
                self._candidates.popitem(last=False)
            return
        del self._candidates[key]
        try:
            self._captures[key] = self._capture(key)
        except BackendError as error:
            self._uncapturable.add(key.batch)
            self._engine.logger.records.clear()  # what it says there is no later failure's cause
            _log.info("batches of %d run without a CUDA graph: %s", key.batch, error)
        if len(self._captures) > MAX_CAPTURES:
            self._forget(last=False)

    def _capture(self, key: _Key) -> _Capture:
        context = self._new_context(graphs=True)
        self._set(context, key)
        # What a new shape sets in motion cannot be captured: TensorRT has to run it once before.
        self._enqueue(context, key)
        self._cuda.synchronize(self._stream)
        if self._engine.captures_itself:
            return _Capture(context, None)
        graph = self._cuda.capture(self._stream, lambda: self._enqueue(context, key))
        return _Capture(context, graph)

    def _replay(self, capture: _Capture, key: _Key) -> None:
        if capture.graph is None:
            self._enqueue(capture.context, key)
        else:
            self._cuda.launch(capture.graph, self._stream)

    def _forget(self, *, last: bool) -> None:
        """Free the newest or the oldest capture: its graph before the context it refers to."""
        _, capture = self._captures.popitem(last=last)
        if capture.graph is not None:
            self._cuda.free("graph", capture.graph)

    def close(self) -> None:
        """Free everything: contexts before the memory they point to, the engine last."""
        with self._cuda.active():
            self._engine.keep_kernels()
            while self._captures:
                self._forget(last=True)
            del self._context
            self._resources.close()
            self._engine.close()
