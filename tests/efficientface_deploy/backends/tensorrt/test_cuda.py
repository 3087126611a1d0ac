"""CUDA bindings: what they call, what they free, and what they say when there is no GPU."""

from __future__ import annotations

import ctypes
import enum
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from efficientface_deploy.backends.tensorrt import cuda
from efficientface_deploy.backends.tensorrt.cuda import Buffer, Cuda, CudaPython, PyCuda, open_cuda
from efficientface_deploy.errors import BackendError


class Status(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815 - CUDA's own names
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorIllegalAddress = 700  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class FakeCudart(types.ModuleType):
    """CUDA's runtime API over host memory, in the conventions of cuda.bindings.runtime.

    A stream's copies happen when it is synchronised, so that reading too early shows.
    """

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaDeviceAttr = types.SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = types.SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="h2d", cudaMemcpyDeviceToHost="d2h"
    )
    cudaStreamCaptureMode = types.SimpleNamespace(  # noqa: N815
        cudaStreamCaptureModeThreadLocal="thread"
    )
    cudaMemoryType = types.SimpleNamespace(  # noqa: N815
        cudaMemoryTypeUnregistered=0, cudaMemoryTypeDevice=2, cudaMemoryTypeManaged=3
    )

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], object]]] = {}
        self.devices: list[int] = [0]
        self.driver = 12040
        self.bindings = 13050
        self.captured: dict[int, list[Callable[[], object]]] = {}
        self.spoiled = False
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.attributes: dict[int, tuple[int, int]] = {}  # memory type and device of an address
        self.fail: dict[str, Status] = {}

    def __getattribute__(self, name: str) -> Any:
        failing = super().__getattribute__("__dict__").get("fail", {})
        if name in failing:
            return lambda *_: (failing[name], None)
        return super().__getattribute__(name)

    def _allocate(self, nbytes: int) -> int:
        block = ctypes.create_string_buffer(nbytes)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cudaGetDevice(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, self.devices[-1]

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        self.devices.append(device)
        return (Status.cudaSuccess,)

    def cudaDeviceGetAttribute(self, which: str, device: int) -> Any:  # noqa: N802
        return Status.cudaSuccess, {"major": 8, "minor": 6 + device}[which]

    def cudaDriverGetVersion(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, self.bindings

    def cudaGetErrorString(self, status: Status) -> Any:  # noqa: N802
        return Status.cudaSuccess, status.name.removeprefix("cudaError").encode()

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        handle = 1000 + len(self.streams)
        self.streams[handle] = []
        return Status.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        del self.streams[stream]
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> Any:  # noqa: N802
        for stream in self.streams:
            self.cudaStreamSynchronize(stream)
        return (Status.cudaSuccess,)

    def cudaPointerGetAttributes(self, address: int) -> Any:  # noqa: N802
        kind, device = self.attributes.get(address, (0, -1))
        return Status.cudaSuccess, types.SimpleNamespace(type=kind, device=device)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> Any:  # noqa: N802
        assert mode == "thread"
        self.captured[stream], self.streams[stream] = self.streams[stream], []
        assert not self.captured[stream], "captured with work under way"
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        del self.captured[stream]
        work, self.streams[stream] = self.streams[stream], []
        if self.spoiled:
            self.spoiled = False
            return Status.cudaErrorStreamCaptureInvalidated, None
        self.graphs[7] = work
        return Status.cudaSuccess, 7

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:  # noqa: N802
        assert flags == 0
        self.graphs[8] = self.graphs[graph]
        return Status.cudaSuccess, 8

    def cudaGraphDestroy(self, graph: int) -> Any:  # noqa: N802
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy  # noqa: N815

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:  # noqa: N802
        self.streams[stream] += self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        if stream in self.captured:
            self.spoiled = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        for copy in self.streams[stream]:
            copy()
        self.streams[stream].clear()
        return (Status.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> Any:  # noqa: N802
        return Status.cudaSuccess, self._allocate(nbytes)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        del self.memory[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: str, stream: int
    ) -> Any:
        assert kind in ("h2d", "d2h")
        self.streams[stream].append(lambda: ctypes.memmove(target, source, nbytes))
        return (Status.cudaSuccess,)


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


def make_buffer(cuda: Cuda, nbytes: int) -> Buffer:
    return Buffer(cuda, (nbytes,), np.uint8)


class FakePyCuda(types.ModuleType):
    """pycuda.driver over host memory; every call needs the context to be current."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        outer = self
        self.current: list[str] = []
        self.freed: list[str] = []
        self.waits = 0
        self.init_error: str | None = None

        class Error(Exception):
            pass

        class MemoryError(Error):
            pass

        class Context:
            def push(self) -> None:
                outer.current.append("primary")

            @staticmethod
            def synchronize() -> None:
                assert outer.current
                outer.waits += 1

            @staticmethod
            def pop() -> None:
                outer.current.pop()

        class Device:
            def __init__(self, index: int) -> None:
                assert index == 0

            def retain_primary_context(self) -> Context:
                return Context()

            def compute_capability(self) -> tuple[int, int]:
                return 8, 7

        class Stream:
            handle = 77

            def __init__(self) -> None:
                assert outer.current
                self.queue: list[Callable[[], object]] = []

            def synchronize(self) -> None:
                for copy in self.queue:
                    copy()
                self.queue.clear()

        class Memory(np.ndarray):  # type: ignore[type-arg]
            def __int__(self) -> int:
                return int(self.ctypes.data)

            def free(self) -> None:
                outer.freed.append("memory")

        self.Error, self.MemoryError, self.Context = Error, MemoryError, Context
        self.Device, self.Stream, self.Memory = Device, Stream, Memory

    def init(self) -> None:
        if self.init_error:
            raise self.Error(self.init_error)

    def mem_alloc(self, nbytes: int) -> Any:
        assert self.current
        return np.zeros(nbytes, np.uint8).view(self.Memory)

    def pagelocked_empty(self, nbytes: int, dtype: Any) -> Any:
        assert self.current
        return np.asarray(_HostAllocation(nbytes, self.freed)).astype(dtype, copy=False)

    def memcpy_htod_async(self, device: int, host: Any, stream: Any) -> None:
        source, size = host.ctypes.data, host.nbytes
        stream.queue.append(lambda: ctypes.memmove(device, source, size))

    def memcpy_dtoh_async(self, host: Any, device: int, stream: Any) -> None:
        target, size = host.ctypes.data, host.nbytes
        stream.queue.append(lambda: ctypes.memmove(target, device, size))


class _HostAllocation:
    """As in pycuda, the ``base`` of the array that lies in it."""

    def __init__(self, nbytes: int, freed: list[str]) -> None:
        self._block = np.zeros(nbytes, np.uint8)
        self._freed = freed
        self.__array_interface__ = self._block.__array_interface__

    def free(self) -> None:
        self._freed.append("host")


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePyCuda:
    fake = FakePyCuda()
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake)
    return fake


def test_round_trip_through_cuda_python(cudart: FakeCudart) -> None:
    binding = open_cuda()
    assert binding.name == "cuda-bindings"
    with binding.active():
        stream = binding.create_stream()
        source, target = make_buffer(binding, 8), make_buffer(binding, 8)
        source.host[:] = np.arange(8)
        source.to_device(6, stream)
        # What a kernel would do: device to device, in the same stream.
        cudart.cudaMemcpyAsync(target.address, source.address, 8, "d2h", stream)
        target.to_host(5, stream)
        assert target.host.tolist() == [0] * 8, "nothing is there before the stream is done"
        binding.synchronize(stream)
        assert target.host.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_graph_does_its_work_at_every_launch(cudart: FakeCudart) -> None:
    binding = open_cuda()
    stream = binding.create_stream()
    source, target = make_buffer(binding, 4), make_buffer(binding, 4)

    def work() -> None:
        source.to_device(4, stream)
        cudart.cudaMemcpyAsync(target.address, source.address, 4, "d2h", stream)
        target.to_host(4, stream)

    source.host[:] = 1
    graph = binding.capture(stream, work)
    binding.synchronize(stream)
    assert target.host.tolist() == [0] * 4, "what is recorded does not run"
    for value in (2, 3):
        source.host[:] = value
        binding.launch(graph, stream)
        assert target.host.tolist() != [value] * 4
        binding.synchronize(stream)
        assert target.host.tolist() == [value] * 4
    assert list(cudart.graphs) == [8], "the recorded graph goes when there is an executable one"
    binding.free("graph", graph)
    assert not cudart.graphs


@pytest.mark.parametrize("how", ["waits", "raises", "EndCapture", "Instantiate"])
def test_work_that_cannot_be_recorded_leaves_the_stream_usable(
    cudart: FakeCudart, how: str
) -> None:
    binding = open_cuda()
    stream = binding.create_stream()

    def work() -> None:
        if how == "waits":
            binding.synchronize(stream)
        if how == "raises":
            raise ZeroDivisionError

    names = {"EndCapture": "cudaStreamEndCapture", "Instantiate": "cudaGraphInstantiate"}
    if how in names:
        cudart.fail[names[how]] = Status.cudaErrorStreamCaptureInvalidated
    expected = ZeroDivisionError if how == "raises" else BackendError
    with pytest.raises(expected) as caught:
        binding.capture(stream, work)
    if how == "waits":
        assert "cudaStreamSynchronize" in str(caught.value), "the first error, not its echo"
    if how != "EndCapture":
        assert not cudart.captured
    assert not cudart.graphs


@pytest.mark.parametrize(
    ("attributes", "owned"), [((2, 0), True), ((2, 1), False), ((3, 1), True), ((0, -1), False)]
)
def test_whose_memory_an_address_is(
    cudart: FakeCudart, attributes: tuple[int, int], owned: bool
) -> None:
    cudart.attributes[4096] = attributes
    assert open_cuda().owns(4096) is owned


def test_everything_is_freed_once(cudart: FakeCudart) -> None:
    binding = open_cuda()
    stream, buffer = binding.create_stream(), make_buffer(binding, 100)
    assert len(cudart.memory) == 2
    assert buffer.address in cudart.memory
    assert buffer.host.nbytes == 100
    for _ in range(2):
        buffer.close()
    binding.free("stream", stream)
    assert not cudart.memory
    assert not cudart.streams


def test_device_of_the_opening_thread_is_used_and_restored(cudart: FakeCudart) -> None:
    cudart.devices = [1]
    binding = open_cuda()
    assert binding.compute_capability() == "sm87"
    cudart.devices = [0]  # what another thread would see
    with binding.active():
        assert cudart.devices[-1] == 1
    assert cudart.devices[-1] == 0


def test_failed_host_allocation_frees_the_device_memory(cudart: FakeCudart) -> None:
    binding = open_cuda()
    cudart.fail["cudaMallocHost"] = Status.cudaErrorMemoryAllocation
    with pytest.raises(BackendError, match=r"cudaMallocHost.*MemoryAllocation 2.*--max-batch"):
        make_buffer(binding, 100)
    assert not cudart.memory


@pytest.mark.parametrize(
    "call", ["cudaMalloc", "cudaStreamCreateWithFlags", "cudaMemcpyAsync", "cudaStreamSynchronize"]
)
def test_every_status_is_checked(cudart: FakeCudart, call: str) -> None:
    binding = open_cuda()
    cudart.fail[call] = Status.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match=f"{call}.*IllegalAddress 700.*nvidia-smi"):
        stream, buffer = binding.create_stream(), make_buffer(binding, 4)
        buffer.to_device(4, stream)
        binding.synchronize(stream)


def test_a_failure_to_free_is_logged_and_hides_nothing(
    cudart: FakeCudart, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = make_buffer(open_cuda(), 4)
    cudart.fail["cudaFree"] = Status.cudaErrorIllegalAddress
    buffer.close()
    assert "cudaErrorIllegalAddress" in caplog.text
    assert len(cudart.memory) == 1, "the host memory is freed all the same"


@pytest.mark.parametrize(
    ("driver", "bindings", "said"),
    [
        # JetPack 6 with what pip takes there (issue 209 of NVlabs/FoundationStereo).
        (12060, 12090, "want 12.9: update it, or pip uninstall cuda-bindings, and pip install 'c"),
        (12060, 13050, "and pip install 'cuda-python<12.7'"),
        (12080, 13000, "want 13.0: update it, or pip install 'cuda-bindings<12.9'"),
        (13000, 13050, "the driver serves CUDA 13.0, and these bindings want 13.5: update it, or "),
        (12060, 12060, "the driver serves CUDA 12.6, which should do: look at nvidia-smi"),
        (13000, 12090, "which should do: look at nvidia-smi"),
        (0, 13050, "on a machine with an NVIDIA GPU"),
    ],
)
def test_old_driver_is_told_from_no_driver(
    cudart: FakeCudart, driver: int, bindings: int, said: str
) -> None:
    cudart.fail["cudaGetDevice"] = Status.cudaErrorInsufficientDriver
    cudart.driver, cudart.bindings = driver, bindings
    with pytest.raises(BackendError) as caught:
        open_cuda()
    assert said in str(caught.value)


def test_missing_driver_of_older_bindings(cudart: FakeCudart) -> None:
    """cuda-python 12.6 raises instead of returning a status."""

    def explode() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    cudart.cudaGetDevice = explode  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"libcuda\.so\.1.*on a machine with an NVIDIA GPU"):
        open_cuda()


def test_missing_symbol_is_one_line(cudart: FakeCudart) -> None:
    def explode() -> None:
        raise RuntimeError('Function "cudaGetDevice" not found')

    cudart.cudaGetDevice = explode  # type: ignore[method-assign,assignment]
    with pytest.raises(BackendError, match="RuntimeError") as caught:
        open_cuda()
    assert "\n" not in str(caught.value)


def test_older_cuda_python_is_found_under_its_older_name(
    cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", cudart)
    assert open_cuda().compute_capability() == "sm86"


def test_round_trip_through_pycuda(pycuda: FakePyCuda) -> None:
    binding = open_cuda()
    assert isinstance(binding, PyCuda)
    assert binding.compute_capability() == "sm87"
    with binding.active():
        stream, buffer = binding.create_stream(), make_buffer(binding, 4)
        buffer.host[:] = [1, 2, 3, 4]
        buffer.to_device(4, stream)
        binding.synchronize(stream)
        buffer.host[:] = 0
        buffer.to_host(3, stream)
        binding.synchronize(stream)
        assert buffer.host.tolist() == [1, 2, 3, 0]
        buffer.close()
        binding.free("stream", stream)
    assert sorted(pycuda.freed) == ["host", "memory"]
    assert not pycuda.current, "the context that was pushed is popped"


def test_pycuda_waits_for_all_where_the_stream_is_not_its_own(pycuda: FakePyCuda) -> None:
    """It makes no object of another library's handle; nor does it capture."""
    binding = open_cuda()
    with binding.active():
        binding.synchronize(binding.create_stream())
        assert pycuda.waits == 0
        binding.synchronize(1)
        binding.synchronize_device()
        assert pycuda.waits == 2
        assert binding.owns(4096)
    assert not binding.captures


def test_pycuda_without_a_gpu(pycuda: FakePyCuda) -> None:
    pycuda.init_error = "cuInit failed: no CUDA-capable device is detected"
    with pytest.raises(BackendError, match=r"no CUDA-capable device.*\.onnx"):
        open_cuda()


def test_neither_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings.runtime", "cuda.cudart", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="cuda-bindings is not installed and pycuda is not"):
        open_cuda()


def test_pycuda_that_does_not_find_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cuda.importlib.import_module

    def without_library(name: str) -> Any:
        if name.startswith("cuda."):
            raise ModuleNotFoundError(name)
        if name == "pycuda.driver":
            raise ImportError("libcuda.so.1: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(cuda.importlib, "import_module", without_library)
    with pytest.raises(BackendError, match=r"pycuda could not be loaded \(libcuda\.so\.1"):
        open_cuda()


def test_real_cuda_python_without_a_driver() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if int(runtime.cudaGetDevice()[0]) == 0:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"cudaError\w+ \d+ \(.+\); run it on") as caught:
        open_cuda()
    assert "\n" not in str(caught.value)


def test_real_cuda_python_takes_integers_for_streams_and_addresses() -> None:
    """A handle of the wrong type would raise instead of returning a status."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if int(runtime.cudaGetDevice()[0]) == 0:
        pytest.skip("this machine has a GPU, which wild addresses would crash")
    binding = object.__new__(CudaPython)
    binding._cudart, binding.device = runtime, 0
    host = np.zeros(4, np.uint8)
    for call in (
        lambda: binding.create_stream(),
        lambda: binding.synchronize(1),
        lambda: binding.synchronize_device(),
        lambda: binding.owns(1),
        lambda: binding.begin_capture(1),
        lambda: binding.end_capture(1),
        lambda: binding.launch(1, 1),
        lambda: binding._call("cudaGraphInstantiate", 1, 0),
        lambda: binding._call("cudaGraphDestroy", 1),
        lambda: binding.allocate_device(4),
        lambda: binding.allocate_host(4),
        lambda: binding.copy_to_device(1, host, 1),
        lambda: binding.copy_to_host(host, 1, 1),
        lambda: binding._free("stream", 1),
        lambda: binding._free("graph", 1),
        lambda: binding._free("device", 1),
        lambda: binding._free("host", 1),
    ):
        with pytest.raises(BackendError, match=r"found cudaError\w+ \d+"):
            call()


def test_nothing_is_imported_early(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python(
        "import sys, efficientface_deploy.backends.tensorrt.backend\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('cuda', 'pycuda', 'tensorrt', 'tensorrt_rtx', 'torch', 'onnxruntime')])"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.gpu
def test_round_trip_on_a_gpu() -> None:
    binding = open_cuda()
    with binding.active():
        stream, buffer = binding.create_stream(), make_buffer(binding, 1 << 20)
        expected = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
        buffer.host[:] = expected
        buffer.to_device(1 << 20, stream)
        binding.synchronize(stream)
        buffer.host[:] = 0
        buffer.to_host(1 << 20, stream)
        binding.synchronize(stream)
        np.testing.assert_array_equal(buffer.host, expected)
        assert binding.owns(buffer.address)
        buffer.close()
        binding.free("stream", stream)


@pytest.mark.gpu
def test_graph_on_a_gpu() -> None:
    binding = open_cuda()
    if not binding.captures:
        pytest.skip(f"{binding.name} does not capture")
    with binding.active():
        stream, buffer = binding.create_stream(), make_buffer(binding, 1 << 20)

        def work() -> None:
            buffer.to_device(1 << 19, stream)
            buffer.to_host(1 << 20, stream)

        graph = binding.capture(stream, work)
        for value in (3, 4):
            buffer.host[:] = value
            binding.launch(graph, stream)
            binding.synchronize(stream)
            assert set(buffer.host[: 1 << 19].tolist()) == {value}
        with pytest.raises(BackendError, match="cudaStreamSynchronize"):
            binding.capture(stream, lambda: binding.synchronize(stream))
        binding.synchronize(stream)
        binding.free("graph", graph)
        buffer.close()
        binding.free("stream", stream)
