"""Running an engine: pinned buffers, one stream, and a CUDA graph for each batch size in use.

A network of this size is bound by launches: some eighty kernels of a few microseconds each. A
CUDA graph queues them all by one call. The copies from and to pinned memory are in the graph too:
their addresses never change, and three calls from Python fewer are worth as much as a few kernels.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from efficientface_deploy.artifact import FLOAT_INPUT, OUTPUTS
from efficientface_deploy.backends.base import DeviceArray, DeviceImages, Output
from efficientface_deploy.backends.tensorrt.cuda import Buffer, Cuda, Graph, Stream
from efficientface_deploy.backends.tensorrt.device_array import read_device_array
from efficientface_deploy.errors import BackendError, ImageError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import UInt8Array, normalise

if TYPE_CHECKING:
    from efficientface_deploy.backends.tensorrt.engine import Engine

_log = logging.getLogger(__name__)

# What a program runs over and over: a few batch sizes, from a few places. Each has a context of
# its own, so that an unbounded number would fill the GPU of a program whose batches differ always.
_MAX_RECORDINGS = 8
_MAX_CANDIDATES = 32

_ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address

_Key = tuple[int, int]  # batch size, and where its images lie


class _Tensor:
    """An input or output at its largest: pinned host memory under a typed view, device twin.

    Args:
        cuda: An open binding.
        name: The tensor's name in the engine.
        shape: Largest shape, batch first.
        dtype: Element type.

    Attributes:
        values: Host memory, (max_batch, ...).
        address: Device memory.
    """

    def __init__(self, cuda: Cuda, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.name = name
        self._shape = shape
        self._item_bytes = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        self._buffer = Buffer(cuda, shape[0] * self._item_bytes)
        self.values: npt.NDArray[Any] = self._buffer.host.view(dtype).reshape(shape)
        self.address = self._buffer.address

    def shape(self, count: int) -> tuple[int, ...]:
        """Shape of a batch of ``count``."""
        return (count, *self._shape[1:])

    def to_device(self, count: int, stream: Stream) -> None:
        """Queue the copy of the first ``count`` items to the device."""
        self._buffer.to_device(count * self._item_bytes, stream)

    def to_host(self, count: int, stream: Stream) -> None:
        """Queue the copy of the first ``count`` items to the host."""
        self._buffer.to_host(count * self._item_bytes, stream)

    def close(self) -> None:
        """Free the memory; views of it die with it."""
        self.values = np.empty(0)
        self._buffer.close()


class Session:
    """An engine with its contexts, its stream and its buffers.

    A batch size that comes for the second time gets a context of its own and a CUDA graph, which
    the third time runs; what comes once is not worth recording. One context holds one graph, as
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
        name = engine.input_name()
        _, _, largest = (tuple(shape) for shape in engine.plan.get_tensor_profile_shape(name, 0))
        self.max_batch = int(largest[0])
        self._takes_floats = name == FLOAT_INPUT
        self._records = graphs and _can_record(engine, cuda)
        self._recordings: collections.OrderedDict[_Key, _Recording] = collections.OrderedDict()
        self._candidates: collections.OrderedDict[_Key, None] = collections.OrderedDict()
        self._unrecordable: set[int] = set()  # batch sizes
        outputs = (self.max_batch, spec.num_classes)
        with contextlib.ExitStack() as stack:
            self._stream = stack.enter_context(contextlib.closing(Stream(cuda)))
            self._memory = cuda.allocate_device(engine.memory_bytes)
            stack.callback(cuda.free, "device", self._memory)
            dtype = np.float32 if self._takes_floats else np.uint8
            self._input, self._logits, self._probabilities = (
                stack.enter_context(contextlib.closing(_Tensor(cuda, tensor, shape, kind)))
                for tensor, shape, kind in (
                    (name, largest, dtype),
                    (OUTPUTS[0], outputs, np.float32),
                    (OUTPUTS[1], outputs, np.float32),
                )
            )
            self._context: Any = self._new_context(graphs=False)
            self._resources = stack.pop_all()
        engine.keep_kernels()

    def take(self, images: DeviceArray) -> DeviceImages:
        """Take an array on the GPU where it is; the stream waits until its content is there.

        Raises:
            ImageError: It cannot be used as it is, or the engine takes normalised floats.
        """
        if self._takes_floats:
            raise ImageError(
                "batch",
                "images in host memory, since this engine takes normalised floats",
                "an array on a CUDA device",
                "copy it to the host, or export the engine without --float-input",
            )
        with self._cuda.active():
            return read_device_array(images, self._cuda, self._stream.handle)

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
            key = (len(images), self._place(images))
            recording = self._recordings.get(key)
            if recording is not None:
                self._recordings.move_to_end(key)
                recording.run()
            else:
                self._set(self._context, key)
                self._enqueue(self._context, key)
            self._stream.synchronize()
            # The pinned memory is overwritten by the next call: hand out copies.
            count = len(images)
            output = Output(
                self._logits.values[:count].copy(), self._probabilities.values[:count].copy()
            )
            if recording is None and self._records:
                self._consider(key)
        return output

    def _place(self, images: UInt8Array | DeviceImages) -> int:
        """Address of the images on the device, where the caller's or our own copy will lie."""
        if not isinstance(images, DeviceImages):
            self._input.values[: len(images)] = (
                normalise(images, self._spec) if self._takes_floats else images
            )
            return self._input.address
        if images.address % _ALIGNMENT:
            raise ImageError(
                "batch",
                f"an array whose memory begins at a multiple of {_ALIGNMENT} bytes",
                f"one that begins {images.address % _ALIGNMENT} bytes after",
                "give a copy of it, on the GPU",
            )
        return images.address

    def _new_context(self, *, graphs: bool) -> Any:
        """A context that writes to our buffers."""
        context = self._engine.new_context(self._memory, graphs=graphs)
        for tensor in (self._logits, self._probabilities):
            self._set_address(context, tensor.name, tensor.address)
        return context

    def _set(self, context: Any, key: _Key) -> None:
        """Tell a context its batch size, and where the images lie."""
        count, address = key
        self._set_address(context, self._input.name, address)
        if not context.set_input_shape(self._input.name, self._input.shape(count)):
            raise self._engine.failure(f"take a batch of {count}")

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._engine.failure(f"take the address of {name}")

    def _enqueue(self, context: Any, key: _Key) -> None:
        """Queue all of an inference: copy to the device, run, copy back."""
        count, address = key
        if address == self._input.address:
            self._input.to_device(count, self._stream)
        if not context.execute_async_v3(self._stream.handle):
            raise self._engine.failure("run the engine")
        self._logits.to_host(count, self._stream)
        self._probabilities.to_host(count, self._stream)

    def _consider(self, key: _Key) -> None:
        """Record what has just run, if it ran before; the stream is idle."""
        count, _ = key
        if count in self._unrecordable:
            return
        if key not in self._candidates:
            self._candidates[key] = None
            if len(self._candidates) > _MAX_CANDIDATES:
                self._candidates.popitem(last=False)
            return
        del self._candidates[key]
        try:
            self._recordings[key] = self._record(key)
        except BackendError as error:
            self._unrecordable.add(count)
            self._engine.logger.records.clear()  # what it says there is no later failure's cause
            _log.info("batches of %d run without a CUDA graph: %s", count, error)
        if len(self._recordings) > _MAX_RECORDINGS:
            _, oldest = self._recordings.popitem(last=False)
            oldest.close()

    def _record(self, key: _Key) -> _Recording:
        context = self._new_context(graphs=True)
        self._set(context, key)
        run = functools.partial(self._enqueue, context, key)
        # What a new shape sets in motion cannot be recorded: TensorRT has to run it once before.
        run()
        self._stream.synchronize()
        if self._engine.captures_itself:
            return _Recording(context, run, None)
        graph = Graph(self._cuda, self._stream, run)
        return _Recording(context, graph.launch, graph)

    def _forget_recordings(self) -> None:
        while self._recordings:
            self._recordings.popitem()[1].close()

    def close(self) -> None:
        """Free everything: contexts before the memory they point to, the engine last."""
        with self._cuda.active():
            self._engine.keep_kernels()
            self._forget_recordings()
            del self._context
            self._resources.close()
            del self._engine


class _Recording:
    """A batch size, from one place, that is run over and over.

    Args:
        context: Its execution context.
        run: Queues it.
        graph: Its CUDA graph; None where the context has its own.
    """

    def __init__(self, context: Any, run: Any, graph: Graph | None) -> None:
        self._context = context
        self.run = run
        self._graph = graph

    def close(self) -> None:
        """Free the graph before the context that it refers to."""
        if self._graph is not None:
            self._graph.close()
        del self.run, self._context


def _can_record(engine: Engine, cuda: Cuda) -> bool:
    if engine.captures_itself or cuda.captures:
        return True
    _log.debug("%s cannot capture CUDA graphs: engines run without", cuda.name)
    return False
