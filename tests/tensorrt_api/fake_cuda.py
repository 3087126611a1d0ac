"""A GPU of host memory, for the tests of what runs engines."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

import numpy as np

from efficientface_deploy.backends.tensorrt.cuda import Cuda
from efficientface_deploy.errors import BackendError
from efficientface_deploy.vision.preprocess import UInt8Array

_ALIGNMENT = 256  # of what cudaMalloc gives

Work = Callable[[], object]


class FakeCuda(Cuda):
    """A GPU of host memory: a stream's work waits until it is synchronised.

    While a stream is captured, its work is recorded instead, and what CUDA forbids meanwhile is an
    error that spoils the capture: to wait for the GPU, to allocate, to free.

    Attributes:
        allocations: Memory by address, on the host and on the device.
        streams: What waits on each stream.
        graphs: What each graph consists of.
        launches: The graph of every launch.
        foreign: Addresses of memory that belongs to another GPU.
        waits: What was waited for: a stream's handle, or ``device``.
    """

    name = "fake"
    device = 0

    def __init__(self) -> None:
        self.captures = True
        self.capability = "sm86"
        self.allocations: dict[int, memoryview] = {}
        self.streams: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.launches: list[int] = []
        self.foreign: set[int] = set()
        self.waits: list[int | str] = []
        self.depth = threading.local()
        self.allocations_left = 1000
        self._handles = iter(range(500, 100_000))
        self._recorded: dict[int, list[Work]] = {}  # streams that are captured now
        self._spoiled = False

    def compute_capability(self) -> str:
        return self.capability

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.depth.value = getattr(self.depth, "value", 0) + 1
        try:
            yield
        finally:
            self.depth.value -= 1

    def require_active(self) -> None:
        assert getattr(self.depth, "value", 0) > 0, "called outside `with cuda.active()`"

    def is_captured(self, stream: int) -> bool:
        return stream in self._recorded

    def spoil(self, call: str) -> BackendError:
        """What a call that cannot be recorded does while a stream is captured."""
        self._spoiled = True
        found = "cudaErrorStreamCaptureUnsupported 900"
        return BackendError("CUDA", f"{call} to succeed", found, "do not")

    def _forbid_while_capturing(self, call: str) -> None:
        self.require_active()
        if self._recorded:
            raise self.spoil(call)

    def allocate(self, nbytes: int) -> int:
        """As ``cudaMalloc``; a test may do it for a library that shares the GPU."""
        block = (ctypes.c_uint8 * (nbytes + _ALIGNMENT))()
        skip = -ctypes.addressof(block) % _ALIGNMENT
        self.allocations[ctypes.addressof(block) + skip] = memoryview(block).cast("B")[
            skip : skip + nbytes
        ]
        return ctypes.addressof(block) + skip

    def _allocate(self, nbytes: int) -> int:
        self._forbid_while_capturing("cudaMalloc")
        if self.allocations_left == 0:
            raise BackendError("CUDA", "memory", "none left", "free some")
        self.allocations_left -= 1
        return self.allocate(nbytes)

    def memory(self, address: int, nbytes: int) -> memoryview:
        """``nbytes`` at an address, which must be allocated now."""
        for start, block in self.allocations.items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError("an illegal address: freed, or never allocated")

    def create_stream(self) -> int:
        self._forbid_while_capturing("cudaStreamCreate")
        handle = next(self._handles)
        self.streams[handle] = []
        return handle

    def synchronize(self, stream: int) -> None:
        self._forbid_while_capturing("cudaStreamSynchronize")
        self.waits.append(stream)
        for work in self.streams.get(stream, []):
            work()
        self.streams.get(stream, []).clear()

    def synchronize_device(self) -> None:
        self._forbid_while_capturing("cudaDeviceSynchronize")
        self.waits.append("device")

    def owns(self, address: int) -> bool:
        self.require_active()
        inside = any(s <= address < s + len(b) for s, b in self.allocations.items())
        return inside and address not in self.foreign

    def queue(self, stream: int, work: Work) -> None:
        """Give a stream work, which runs in its turn or is recorded."""
        self.require_active()
        self._recorded.get(stream, self.streams[stream]).append(work)

    def begin_capture(self, stream: int) -> None:
        self._forbid_while_capturing("cudaStreamBeginCapture")
        self._recorded[stream] = []

    def end_capture(self, stream: int) -> int:
        self.require_active()
        work = self._recorded.pop(stream)
        spoiled, self._spoiled = self._spoiled, False
        if spoiled:
            found = "cudaErrorStreamCaptureInvalidated 901"
            raise BackendError("CUDA", "cudaStreamEndCapture", found, "do not")
        handle = next(self._handles)
        self.graphs[handle] = work
        return handle

    def launch(self, graph: int, stream: int) -> None:
        self.launches.append(graph)
        for work in self.graphs[graph]:
            self.queue(stream, work)

    def allocate_device(self, nbytes: int) -> int:
        return self._allocate(nbytes)

    def allocate_host(self, nbytes: int) -> UInt8Array:
        return np.frombuffer(self.allocations[self._allocate(nbytes)], np.uint8)

    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:
        self._copy(device, host.ctypes.data, host.nbytes, stream)

    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:
        self._copy(host.ctypes.data, device, host.nbytes, stream)

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        def copy() -> None:
            self.memory(target, nbytes)[:] = self.memory(source, nbytes)

        self.queue(stream, copy)

    def _free(self, kind: str, handle: int) -> None:
        self._forbid_while_capturing("cudaFree")
        tables = {"stream": self.streams, "graph": self.graphs}
        del tables.get(kind, self.allocations)[handle]  # type: ignore[attr-defined]
