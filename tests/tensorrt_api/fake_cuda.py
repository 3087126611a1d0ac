"""A GPU of host memory, for the tests of what runs engines."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from efficientface_deploy.backends.cuda import Cuda
from efficientface_deploy.errors import BackendError
from efficientface_deploy.preprocess import UInt8Array


class FakeCuda(Cuda):
    """A GPU of host memory: a stream's work waits until it is synchronised."""

    name = "fake"

    def __init__(self) -> None:
        self.capability = "sm86"
        self.allocations: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], object]]] = {}
        self.depth = threading.local()
        self.allocations_left = 1000

    def compute_capability(self) -> str:
        return self.capability

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.depth.value = getattr(self.depth, "value", 0) + 1
        yield
        self.depth.value -= 1

    def require_active(self) -> None:
        assert getattr(self.depth, "value", 0) > 0, "called outside `with cuda.active()`"

    def _allocate(self, nbytes: int) -> Any:
        self.require_active()
        if self.allocations_left == 0:
            raise BackendError("CUDA", expected="memory", found="none left", fix="free some")
        self.allocations_left -= 1
        block = (ctypes.c_uint8 * nbytes)()
        self.allocations[ctypes.addressof(block)] = block
        return block

    def create_stream(self) -> int:
        self.require_active()
        self.streams[500] = []
        return 500

    def synchronize(self, stream: int) -> None:
        self.require_active()
        for work in self.streams[stream]:
            work()
        self.streams[stream].clear()

    def allocate_device(self, nbytes: int) -> int:
        return ctypes.addressof(self._allocate(nbytes))

    def allocate_host(self, nbytes: int) -> UInt8Array:
        return np.ctypeslib.as_array(self._allocate(nbytes))

    def copy_to_device(self, device: int, host: UInt8Array, stream: int) -> None:
        self._copy(device, host.ctypes.data, host.nbytes, stream)

    def copy_to_host(self, host: UInt8Array, device: int, stream: int) -> None:
        self._copy(host.ctypes.data, device, host.nbytes, stream)

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.require_active()
        self.streams[stream].append(lambda: ctypes.memmove(target, source, nbytes))

    def _free(self, kind: str, handle: int) -> None:
        self.require_active()
        del (self.streams if kind == "stream" else self.allocations)[handle]
