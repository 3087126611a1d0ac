"""CUDA as the TensorRT backends need it: a stream, its graphs, pinned memory with a device twin.

Two bindings can serve: cuda-python, which NVIDIA's own samples use, and pycuda, for machines that
already have it. Nothing here is imported before an engine is opened.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from efficientface_deploy.errors import BackendError
from efficientface_deploy.vision.preprocess import UInt8Array

_log = logging.getLogger(__name__)

_OUT_OF_MEMORY = 2
_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100

_NO_GPU_FIX = (
    "run it on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both), or use the "
    ".onnx file"
)
_MEMORY_FIX = "free GPU memory, or build the engine again with a smaller --max-batch"
_OTHER_FIX = "look at nvidia-smi, and restart the process: a CUDA error outlives the call"


class Cuda(abc.ABC):
    """The few CUDA calls that running an engine takes; addresses and handles are plain integers.

    Every call but :meth:`compute_capability` belongs inside ``with cuda.active():``.

    Attributes:
        name: The binding's.
        device: Index of the GPU.
        captures: Whether it can record what is queued on a stream as a graph.
    """

    name: str
    device: int
    captures = False

    @abc.abstractmethod
    def compute_capability(self) -> str:
        """The GPU's architecture, e.g. ``sm86``.

        Raises:
            BackendError: There is no GPU, no driver, or one too old for this binding.
        """

    @abc.abstractmethod
    def active(self) -> contextlib.AbstractContextManager[None]:
        """Make the GPU current in the calling thread, and restore what was current before.

        CUDA keeps the current device per thread, and an application may call from any.
        """

    @abc.abstractmethod
    def create_stream(self) -> int:
        """Handle of a new stream that does not wait for the default one."""

    @abc.abstractmethod
    def synchronize(self, stream: int) -> None:
        """Wait until everything queued on ``stream``, ours or another library's, is done."""

    @abc.abstractmethod
    def synchronize_device(self) -> None:
        """Wait until everything queued on the GPU is done."""

    @abc.abstractmethod
    def owns(self, address: int) -> bool:
        """Whether an address is memory of this GPU; True where the binding cannot tell."""

    @abc.abstractmethod
    def allocate_device(self, nbytes: int) -> int:
        """Address of new device memory."""

    @abc.abstractmethod
    def allocate_host(self, nbytes: int) -> UInt8Array:
        """New page-locked host memory, uint8 (nbytes,): only such memory is copied async."""

    @abc.abstractmethod
    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:
        """Queue the copy of ``host``, uint8 (n,), to address ``device``."""

    @abc.abstractmethod
    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:
        """Queue the copy of ``len(host)`` bytes at address ``device`` to ``host``, uint8 (n,)."""

    def begin_capture(self, stream: int) -> None:
        """Record what is queued on ``stream`` instead of running it; only where ``captures``."""
        raise NotImplementedError

    def end_capture(self, stream: int) -> int:
        """Handle of the executable graph of what was recorded; ``stream`` runs again in any case.

        Raises:
            BackendError: Something was called meanwhile that cannot be recorded.
        """
        raise NotImplementedError

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""
        raise NotImplementedError

    @abc.abstractmethod
    def _free(self, kind: str, handle: int) -> None:
        """Free a ``stream``, ``graph``, ``device`` or ``host`` allocation by handle or address."""

    def free(self, kind: str, handle: int) -> None:
        """Free a ``stream``, ``graph``, ``device`` or ``host`` allocation.

        A failure is logged, not raised: nobody can mend it, and it is usually the echo of an
        earlier error that must not be hidden.
        """
        try:
            self._free(kind, handle)
        except BackendError as error:
            _log.warning("freeing a CUDA %s: %s", kind, error)


class Stream:
    """A non-default stream.

    Args:
        cuda: An open binding.

    Attributes:
        handle: What ``execute_async_v3`` takes.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.create_stream()

    def synchronize(self) -> None:
        """Wait until everything queued here is done.

        Raises:
            BackendError: Something that was queued failed.
        """
        self._cuda.synchronize(self.handle)

    def close(self) -> None:
        """Destroy the stream; a second call does nothing."""
        if self.handle:
            self._cuda.free("stream", self.handle)
            self.handle = 0


class Graph:
    """Work that was recorded once, and is queued by a single call.

    Args:
        cuda: An open binding that captures.
        stream: Where ``work`` queues; nothing of it runs now.
        work: Queues the work. It may neither wait for the GPU nor allocate.

    Raises:
        BackendError: The work cannot be recorded.
    """

    def __init__(self, cuda: Cuda, stream: Stream, work: Callable[[], None]) -> None:
        self._cuda = cuda
        self._stream = stream
        cuda.begin_capture(stream.handle)
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # it is the first error that counts
                cuda.free("graph", cuda.end_capture(stream.handle))
            raise
        self._handle = cuda.end_capture(stream.handle)

    def launch(self) -> None:
        """Queue the work on its stream."""
        self._cuda.launch(self._handle, self._stream.handle)

    def close(self) -> None:
        """Destroy the graph; a second call does nothing."""
        if self._handle:
            self._cuda.free("graph", self._handle)
            self._handle = 0


class Buffer:
    """Pinned host memory and device memory of the same size.

    Args:
        cuda: An open binding.
        nbytes: Size of each, at least one byte.

    Attributes:
        host: uint8 (nbytes,), page-locked.
        address: Address of the device memory.

    Raises:
        BackendError: Not enough memory.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda = cuda
        self.address = cuda.allocate_device(nbytes)
        try:
            self.host = cuda.allocate_host(nbytes)  # (nbytes,)
        except BackendError:
            cuda.free("device", self.address)
            raise

    def to_device(self, nbytes: int, stream: Stream) -> None:
        """Queue the copy of the first ``nbytes`` to the device."""
        self._cuda.copy_to_device(self.address, self.host[:nbytes], stream.handle)

    def to_host(self, nbytes: int, stream: Stream) -> None:
        """Queue the copy of the first ``nbytes`` back to the host."""
        self._cuda.copy_to_host(self.host[:nbytes], self.address, stream.handle)

    def close(self) -> None:
        """Free both; a second call does nothing. ``host`` and views of it die with it."""
        if self.address:
            self._cuda.free("device", self.address)
            self._cuda.free("host", _address(self.host))
            self.address = 0
            self.host = np.empty(0, dtype=np.uint8)


class CudaPython(Cuda):
    """CUDA's runtime API through NVIDIA's cuda-python (``cuda-bindings``).

    The device is the one that is current when the binding is opened: the first GPU, unless the
    application or ``CUDA_VISIBLE_DEVICES`` chose another.

    Raises:
        ImportError: cuda-python is not installed.
        BackendError: There is no usable GPU.
    """

    name = "cuda-python"
    captures = True

    def __init__(self) -> None:
        try:
            self._cudart = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            self._cudart = importlib.import_module("cuda.cudart")  # cuda-python before 12.6
        self.device = self._call("cudaGetDevice")

    def compute_capability(self) -> str:  # noqa: D102 - as in the base class
        attribute = self._cudart.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", which, self.device)
            for which in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"sm{major}{minor}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:  # noqa: D102 - as in the base class
        previous = self._call("cudaGetDevice")
        if previous == self.device:
            yield
            return
        self._call("cudaSetDevice", self.device)
        try:
            yield
        finally:
            self._call("cudaSetDevice", previous)

    def create_stream(self) -> int:  # noqa: D102 - as in the base class
        flags = self._cudart.cudaStreamNonBlocking
        return int(self._call("cudaStreamCreateWithFlags", flags))

    def synchronize(self, stream: int) -> None:  # noqa: D102 - as in the base class
        self._call("cudaStreamSynchronize", stream)

    def synchronize_device(self) -> None:  # noqa: D102 - as in the base class
        self._call("cudaDeviceSynchronize")

    def owns(self, address: int) -> bool:  # noqa: D102 - as in the base class
        attributes = self._call("cudaPointerGetAttributes", address)
        kinds = self._cudart.cudaMemoryType
        if attributes.type == kinds.cudaMemoryTypeManaged:
            return True
        return bool(
            attributes.type == kinds.cudaMemoryTypeDevice and attributes.device == self.device
        )

    def begin_capture(self, stream: int) -> None:  # noqa: D102 - as in the base class
        # Of this thread only: another may allocate meanwhile, as PyTorch does, without spoiling it.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:  # noqa: D102 - as in the base class
        recorded = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", recorded, 0))
        finally:
            self._call("cudaGraphDestroy", recorded)

    def launch(self, graph: int, stream: int) -> None:  # noqa: D102 - as in the base class
        self._call("cudaGraphLaunch", graph, stream)

    def allocate_device(self, nbytes: int) -> int:  # noqa: D102 - as in the base class
        return int(self._call("cudaMalloc", nbytes))

    def allocate_host(self, nbytes: int) -> UInt8Array:  # noqa: D102 - as in the base class
        address = int(self._call("cudaMallocHost", nbytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))  # (nbytes,)

    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:  # noqa: D102
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, _address(host), host.nbytes, kind, stream)

    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:  # noqa: D102
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", _address(host), device, host.nbytes, kind, stream)

    def _free(self, kind: str, handle: int) -> None:
        names = {
            "stream": "cudaStreamDestroy",
            "graph": "cudaGraphExecDestroy",
            "device": "cudaFree",
            "host": "cudaFreeHost",
        }
        self._call(names[kind], handle)

    def _call(self, name: str, *arguments: object) -> Any:
        """Call a function of the runtime API, check its status, return its one value or None."""
        try:
            status, *values = getattr(self._cudart, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - a missing symbol or library shows up here
            raise _failure(name, f"{type(error).__name__} ({error})", _OTHER_FIX) from None
        if int(status) != 0:
            raise self._status_error(name, status)
        return values[0] if values else None

    def _status_error(self, name: str, status: Any) -> BackendError:
        _, text = self._cudart.cudaGetErrorString(status)
        words = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        code = int(status)
        found = f"{getattr(status, 'name', 'cudaError')} {code} ({words})"
        if code == _OUT_OF_MEMORY:
            return _failure(name, found, _MEMORY_FIX)
        if code == _INSUFFICIENT_DRIVER:
            return _failure(name, found, self._driver_fix())
        return _failure(name, found, _NO_GPU_FIX if code == _NO_DEVICE else _OTHER_FIX)

    def _driver_fix(self) -> str:
        """Tell a missing driver from one that is older than the installed cuda-python.

        Pip takes the newest cuda-python, which a machine of the CUDA generation before refuses
        with the same error that a machine without any driver gives.
        """
        _, version = self._cudart.cudaDriverGetVersion()  # 12040 for 12.4, 0 without a driver
        if not version:
            return _NO_GPU_FIX
        major, minor = version // 1000, version % 1000 // 10
        return (
            f"the driver serves CUDA {major}.{minor}: update it, or "
            f"pip install 'cuda-python<{major + 1}'"
        )


class PyCuda(Cuda):
    """CUDA's driver API through pycuda, on the first GPU and its primary context.

    The primary context is the one that TensorRT and every user of the runtime API share. pycuda
    (to 2026.1) can neither capture a stream nor ask whose memory an address is.

    Raises:
        ImportError: pycuda is not installed, or does not find the driver's library.
        BackendError: There is no usable GPU.
    """

    name = "pycuda"
    device = 0

    def __init__(self) -> None:
        self._driver = importlib.import_module("pycuda.driver")
        # pycuda frees with its objects, so that each is kept until its integer comes back.
        self._held: dict[int, Any] = {}
        with self._checked("cuInit"):
            self._driver.init()
            self._gpu = self._driver.Device(self.device)
            self._context = self._gpu.retain_primary_context()

    def compute_capability(self) -> str:  # noqa: D102 - as in the base class
        with self._checked("compute_capability"):
            major, minor = self._gpu.compute_capability()
        return f"sm{major}{minor}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:  # noqa: D102 - as in the base class
        with self._checked("cuCtxPushCurrent"):
            self._context.push()
        try:
            yield
        finally:
            with self._checked("cuCtxPopCurrent"):
                self._driver.Context.pop()

    def create_stream(self) -> int:  # noqa: D102 - as in the base class
        with self._checked("cuStreamCreate"):
            stream = self._driver.Stream()
        return self._hold(int(stream.handle), stream)

    def synchronize(self, stream: int) -> None:  # noqa: D102 - as in the base class
        if stream not in self._held:  # another library's, of which pycuda makes no object
            return self.synchronize_device()
        with self._checked("cuStreamSynchronize"):
            self._held[stream].synchronize()

    def synchronize_device(self) -> None:  # noqa: D102 - as in the base class
        with self._checked("cuCtxSynchronize"):
            self._driver.Context.synchronize()

    def owns(self, address: int) -> bool:  # noqa: D102 - as in the base class
        return True

    def allocate_device(self, nbytes: int) -> int:  # noqa: D102 - as in the base class
        with self._checked("cuMemAlloc"):
            memory = self._driver.mem_alloc(nbytes)
        return self._hold(int(memory), memory)

    def allocate_host(self, nbytes: int) -> UInt8Array:  # noqa: D102 - as in the base class
        with self._checked("cuMemHostAlloc"):
            host: UInt8Array = self._driver.pagelocked_empty(nbytes, np.uint8)
        self._hold(_address(host), host.base)
        return host

    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:  # noqa: D102
        with self._checked("cuMemcpyHtoDAsync"):
            self._driver.memcpy_htod_async(device, host, self._held[stream])

    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:  # noqa: D102
        with self._checked("cuMemcpyDtoHAsync"):
            self._driver.memcpy_dtoh_async(host, device, self._held[stream])

    def _free(self, kind: str, handle: int) -> None:
        held = self._held.pop(handle)
        if kind == "stream":
            return  # destroyed with its object, which nobody else holds
        with self._checked("cuMemFree"):
            held.free()

    def _hold(self, handle: int, thing: Any) -> int:
        self._held[handle] = thing
        return handle

    @contextlib.contextmanager
    def _checked(self, name: str) -> Iterator[None]:
        """Turn pycuda's errors, one class per status, into ours."""
        try:
            yield
        except self._driver.MemoryError as error:
            raise _failure(name, str(error), _MEMORY_FIX) from None
        except self._driver.Error as error:
            fix = _NO_GPU_FIX if name == "cuInit" else _OTHER_FIX
            raise _failure(name, str(error), fix) from None


def open_cuda() -> Cuda:
    """The binding that is installed, cuda-python before pycuda.

    Raises:
        BackendError: Neither is installed, or there is no usable GPU.
    """
    reasons = []
    for binding in (CudaPython, PyCuda):
        try:
            return binding()
        except ModuleNotFoundError:
            reasons.append(f"{binding.name} is not installed")
        except ImportError as error:
            reasons.append(f"{binding.name} could not be loaded ({error})")
    raise BackendError(
        "CUDA",
        "cuda-python or pycuda",
        " and ".join(reasons),
        "pip install cuda-python, of the major version that nvidia-smi shows",
    )


def _address(host: UInt8Array) -> int:
    return int(host.ctypes.data)


def _failure(call: str, found: str, fix: str) -> BackendError:
    line = " ".join(found.split())[:200]
    return BackendError("CUDA", f"{call} to succeed", line, fix)
