"""CUDA as the TensorRT backends need it: a stream, its graphs, pinned memory with a device twin.

Two bindings can serve: cuda-bindings, which NVIDIA's own samples use, and pycuda, for machines that
already have it. Neither is imported before an engine is opened.
"""

# ruff: noqa: D102 - what the bindings' methods do stands in the base class

from __future__ import annotations

import abc
import contextlib
import ctypes
import importlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientface_deploy.errors import BackendError, words_of
from efficientface_deploy.vision.preprocess import UInt8Array

_log = logging.getLogger(__name__)

_OLDEST_BINDINGS = 12_080  # cuda-bindings; before, all was cuda-python

_OUT_OF_MEMORY, _OLD_DRIVER, _NO_DEVICE = 2, 35, 100  # CUDA's status codes

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
        captures: Whether it can capture what is queued on a stream as a graph.
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
        """Capture what is queued on ``stream`` instead of running it; only where ``captures``."""
        raise NotImplementedError

    def end_capture(self, stream: int) -> int:
        """Handle of the executable graph of what was captured; ``stream`` runs again in any case.

        Raises:
            BackendError: Something was called meanwhile that cannot be captured.
        """
        raise NotImplementedError

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Handle of the executable graph of what ``work`` queues on ``stream``; none of it runs.

        Args:
            stream: Where ``work`` queues.
            work: May neither wait for the GPU nor allocate.

        Raises:
            BackendError: The work cannot be captured.
        """
        self.begin_capture(stream)
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # it is the first error that counts
                self.free("graph", self.end_capture(stream))
            raise
        return self.end_capture(stream)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""
        raise NotImplementedError

    @abc.abstractmethod
    def _free(self, kind: str, handle: int) -> None:
        """Free a ``stream``, ``graph``, ``device`` or ``host`` allocation by handle or address."""

    def free(self, kind: str, handle: int) -> None:
        """Free a ``stream``, ``graph``, ``device`` or ``host`` allocation.

        A failure is logged, not raised: nobody can do anything about it, and it usually follows
        from an earlier error that must not be hidden.
        """
        try:
            self._free(kind, handle)
        except BackendError as error:
            _log.warning("freeing a CUDA %s: %s", kind, error)


class Buffer:
    """Pinned host memory under a typed view, and device memory of the same size.

    Args:
        cuda: An open binding.
        shape: At its largest, batch first.
        dtype: Element type.

    Attributes:
        host: Page-locked, of that shape and type.
        address: Address of the device memory.

    Raises:
        BackendError: Not enough memory.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._cuda = cuda
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._item_bytes = nbytes // shape[0]
        self.address = cuda.allocate_device(nbytes)
        try:
            self._bytes = cuda.allocate_host(nbytes)  # uint8 (nbytes,)
        except BackendError:
            cuda.free("device", self.address)
            raise
        self.host: npt.NDArray[Any] = self._bytes.view(dtype).reshape(shape)

    def to_device(self, count: int, stream: int) -> None:
        """Queue the copy of the first ``count`` items to the device."""
        self._cuda.copy_to_device(self.address, self._bytes[: count * self._item_bytes], stream)

    def to_host(self, count: int, stream: int) -> None:
        """Queue the copy of the first ``count`` items back to the host."""
        self._cuda.copy_to_host(self._bytes[: count * self._item_bytes], self.address, stream)

    def close(self) -> None:
        """Free both; a second call does nothing. ``host`` and views of it die with it."""
        if self.address:
            self._cuda.free("device", self.address)
            self._cuda.free("host", _address(self._bytes))
            self.address = 0
            self.host = self._bytes = np.empty(0, dtype=np.uint8)


class CudaPython(Cuda):
    """CUDA's runtime API through NVIDIA's cuda-bindings.

    The device is the one that is current when the binding is opened: the first GPU, unless the
    application or ``CUDA_VISIBLE_DEVICES`` chose another.

    Raises:
        ImportError: cuda-bindings is not installed.
        BackendError: There is no usable GPU.
    """

    name = "cuda-bindings"
    captures = True

    def __init__(self) -> None:
        try:
            self._cudart = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            self._cudart = importlib.import_module("cuda.cudart")  # cuda-python before 12.6
        self.device = self._call("cudaGetDevice")

    def compute_capability(self) -> str:
        which = self._cudart.cudaDeviceAttr
        attributes = (
            which.cudaDevAttrComputeCapabilityMajor,
            which.cudaDevAttrComputeCapabilityMinor,
        )
        major, minor = (
            self._call("cudaDeviceGetAttribute", one, self.device) for one in attributes
        )
        return f"sm{major}{minor}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        previous = self._call("cudaGetDevice")
        if previous == self.device:
            yield
            return
        self._call("cudaSetDevice", self.device)
        try:
            yield
        finally:
            self._call("cudaSetDevice", previous)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def synchronize_device(self) -> None:
        self._call("cudaDeviceSynchronize")

    def owns(self, address: int) -> bool:
        attributes = self._call("cudaPointerGetAttributes", address)
        kinds = self._cudart.cudaMemoryType
        of_device = attributes.type == kinds.cudaMemoryTypeDevice
        here = of_device and attributes.device == self.device
        return bool(here or attributes.type == kinds.cudaMemoryTypeManaged)

    def begin_capture(self, stream: int) -> None:
        # Of this thread only: another may allocate meanwhile, as PyTorch does, without spoiling it.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        captured = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", captured, 0))
        finally:
            self._call("cudaGraphDestroy", captured)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def allocate_device(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def allocate_host(self, nbytes: int) -> UInt8Array:
        address = int(self._call("cudaMallocHost", nbytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))  # (nbytes,)

    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, _address(host), host.nbytes, kind, stream)

    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:
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
            # Those before 12.8 say a missing driver so: "Failed to dlopen libcuda.so.1".
            fix = _NO_GPU_FIX if "libcuda" in str(error) else _OTHER_FIX
            raise _failure(name, f"{type(error).__name__} ({error})", fix) from None
        if (code := int(status)) != 0:
            _, text = self._cudart.cudaGetErrorString(status)
            words = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            fixes = {_OUT_OF_MEMORY: _MEMORY_FIX, _NO_DEVICE: _NO_GPU_FIX}
            fix = self._driver_fix() if code == _OLD_DRIVER else fixes.get(code, _OTHER_FIX)
            raise _failure(name, f"{getattr(status, 'name', 'cudaError')} {code} ({words})", fix)
        return values[0] if values else None

    def _driver_fix(self) -> str:
        """Tell a missing driver from one that is older than the installed bindings.

        Pip takes the newest bindings, and an older driver refuses them with the same error that a
        machine without any driver gives. A minor release is enough for that: the CUDA runtime is
        linked into the bindings, and JetPack 6, whose driver serves 12.6, refuses that of 12.9.
        """
        _, driver = self._cudart.cudaDriverGetVersion()  # 12040 for 12.4, 0 without a driver
        if not driver:
            return _NO_GPU_FIX
        _, bindings = self._cudart.cudaRuntimeGetVersion()
        serves = f"the driver serves CUDA {_release(driver)}"
        if bindings // 10 <= driver // 10:
            return f"{serves}, which should do: look at nvidia-smi, and restart the machine"
        below = f"{driver // 1000}.{driver % 1000 // 10 + 1}"
        install = f"pip install 'cuda-bindings<{below}'"
        if driver < _OLDEST_BINDINGS:
            install = f"pip uninstall cuda-bindings, and pip install 'cuda-python<{below}'"
        return f"{serves}, and these bindings want {_release(bindings)}: update it, or {install}"


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
        self._call("cuInit", self._driver.init)
        self._gpu = self._call("cuInit", self._driver.Device, self.device)
        self._context = self._call("cuInit", self._gpu.retain_primary_context)

    def compute_capability(self) -> str:
        major, minor = self._call("compute_capability", self._gpu.compute_capability)
        return f"sm{major}{minor}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context.push)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent", self._driver.Context.pop)

    def create_stream(self) -> int:
        stream = self._call("cuStreamCreate", self._driver.Stream)
        return self._hold(int(stream.handle), stream)

    def synchronize(self, stream: int) -> None:
        if stream in self._held:
            self._call("cuStreamSynchronize", self._held[stream].synchronize)
        else:  # another library's, of which pycuda makes no object
            self.synchronize_device()

    def synchronize_device(self) -> None:
        self._call("cuCtxSynchronize", self._driver.Context.synchronize)

    def owns(self, address: int) -> bool:
        return True

    def allocate_device(self, nbytes: int) -> int:
        memory = self._call("cuMemAlloc", self._driver.mem_alloc, nbytes)
        return self._hold(int(memory), memory)

    def allocate_host(self, nbytes: int) -> UInt8Array:
        allocate = self._driver.pagelocked_empty
        host: UInt8Array = self._call("cuMemHostAlloc", allocate, nbytes, np.uint8)
        self._hold(_address(host), host.base)
        return host

    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:
        copy = self._driver.memcpy_htod_async
        self._call("cuMemcpyHtoDAsync", copy, device, host, self._held[stream])

    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:
        copy = self._driver.memcpy_dtoh_async
        self._call("cuMemcpyDtoHAsync", copy, host, device, self._held[stream])

    def _free(self, kind: str, handle: int) -> None:
        held = self._held.pop(handle)
        if kind != "stream":  # which is destroyed with its object, held by nobody else
            self._call("cuMemFree", held.free)

    def _hold(self, handle: int, thing: Any) -> int:
        self._held[handle] = thing
        return handle

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function``, and turn pycuda's errors, one class per status, into ours."""
        try:
            return function(*arguments)
        except self._driver.MemoryError as error:
            raise _failure(name, error, _MEMORY_FIX) from None
        except self._driver.Error as error:
            fix = _NO_GPU_FIX if name == "cuInit" else _OTHER_FIX
            raise _failure(name, error, fix) from None


def open_cuda() -> Cuda:
    """The binding that is installed, cuda-bindings before pycuda.

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
    fix = (
        "pip install cuda-bindings, no newer than the CUDA version that nvidia-smi shows (on "
        "JetPack 6: pip install 'cuda-python<12.7')"
    )
    raise BackendError("CUDA", "cuda-bindings or pycuda", " and ".join(reasons), fix)


def _release(version: int) -> str:
    """``12040`` -> ``12.4``."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _address(host: UInt8Array) -> int:
    return int(host.ctypes.data)


def _failure(call: str, found: object, fix: str) -> BackendError:
    return BackendError("CUDA", f"{call} to succeed", words_of(found, 200), fix)
