"""TensorRT backends: checks before loading, buffers while running, one line when it fails.

The library and the GPU are replaced by doubles that keep their conventions (None and False for
failure, raw addresses, work that happens when the stream is synchronised); what the real library
says without a GPU is tested with the real library.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import enum
import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientface_deploy.artifact import file_hash, sidecar_path, write_sidecar
from efficientface_deploy.backends import BackendOptions
from efficientface_deploy.backends import tensorrt as backend_module
from efficientface_deploy.backends.cuda import Cuda
from efficientface_deploy.backends.tensorrt import (
    EngineRecord,
    TensorRTBackend,
    TensorRTRTXBackend,
    load_library,
    rebuild_command,
)
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.preprocess import UInt8Array, normalise
from efficientface_deploy.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[3]


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

    def _require_active(self) -> None:
        assert getattr(self.depth, "value", 0) > 0, "called outside `with cuda.active()`"

    def _allocate(self, nbytes: int) -> Any:
        self._require_active()
        if self.allocations_left == 0:
            raise BackendError("CUDA", expected="memory", found="none left", fix="free some")
        self.allocations_left -= 1
        block = (ctypes.c_uint8 * nbytes)()
        self.allocations[ctypes.addressof(block)] = block
        return block

    def create_stream(self) -> int:
        self._require_active()
        self.streams[500] = []
        return 500

    def synchronize(self, stream: int) -> None:
        self._require_active()
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
        self._require_active()
        self.streams[stream].append(lambda: ctypes.memmove(target, source, nbytes))

    def _free(self, kind: str, handle: int) -> None:
        self._require_active()
        del (self.streams if kind == "stream" else self.allocations)[handle]


class DataType(enum.Enum):
    FLOAT = 0
    UINT8 = 1
    HALF = 2


class FakeContext:
    """logits[n, c] = mean of image n + c; probabilities their softmax."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.running = threading.Lock()

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.library.cuda.allocations
        self.addresses[name] = address
        return "address" not in self.library.refuse

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == self.library.input_name
        self.shape = shape
        return 1 <= shape[0] <= self.library.max_batch and "shape" not in self.library.refuse

    def execute_async_v3(self, stream: int) -> bool:
        assert self.running.acquire(blocking=False), "two threads in one execution context"
        try:
            time.sleep(0.002)
            self.library.batches.append(self.shape[0])
            self.library.cuda.streams[stream].append(self._compute)
            return "execute" not in self.library.refuse
        finally:
            self.running.release()

    def _compute(self) -> None:
        images = self._view(self.library.input_name, self.shape, self.library.input_dtype)
        logits = expected_logits(images)
        shape = logits.shape
        self._view("logits", shape, np.float32)[:] = logits
        self._view("probabilities", shape, np.float32)[:] = softmax(logits)

    def _view(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        block = self.library.cuda.allocations[self.addresses[name]]
        count = int(np.prod(shape))
        return np.frombuffer(block, dtype, count).reshape(shape)


def expected_logits(images: np.ndarray) -> np.ndarray:
    means = images.astype(np.float32).mean(axis=(1, 2, 3)) / 255  # (N,)
    return (means[:, None] + np.arange(7, dtype=np.float32)).astype(np.float32)  # (N, 7)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


class FakePlan:
    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.num_io_tensors = len(library.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.library.tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.library.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.library.tensors[name][1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        item = self.library.tensors[name][1][1:]
        return [(1, *item), (1, *item), (self.library.max_batch, *item)]

    def create_execution_context(self) -> FakeContext | None:
        return None if "context" in self.library.refuse else FakeContext(self.library)


class FakeLibrary(types.ModuleType):
    """The part of ``tensorrt`` that running an engine takes."""

    def __init__(self, cuda: FakeCuda, version: str = "10.3.0") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.cuda = cuda
        self.max_batch = 4
        self.refuse: set[str] = set()
        self.batches: list[int] = []
        self.says: list[str] = []
        self.DataType = DataType
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.input_name, self.input_dtype = "image", np.uint8
        self.tensors: dict[str, tuple[DataType, tuple[int, ...]]] = {
            "image": (DataType.UINT8, (-1, 64, 64, 3)),
            "logits": (DataType.FLOAT, (-1, 7)),
            "probabilities": (DataType.FLOAT, (-1, 7)),
        }
        outer = self

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

            def log(self, severity: int, message: str) -> None:
                raise NotImplementedError

        class Runtime:
            def __init__(self, logger: Any) -> None:
                if "runtime" in outer.refuse:
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                self._logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> FakePlan | None:
                outer.cuda._require_active()
                for line in outer.says:
                    self._logger.log(ILogger.ERROR, line)
                return None if outer.says else FakePlan(outer)

        self.ILogger, self.Runtime = ILogger, Runtime

    def take_floats(self) -> None:
        self.input_name, self.input_dtype = "input", np.float32
        del self.tensors["image"]
        self.tensors["input"] = (DataType.FLOAT, (-1, 3, 64, 64))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(backend_module, "open_cuda", lambda: fake)
    return fake


@pytest.fixture
def library(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary(fake_cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


@pytest.fixture
def engine(tmp_path: Path, spec: ModelSpec) -> Path:
    """An engine's two files; the plan itself means nothing to the doubles."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    write_record(path, spec)
    (tmp_path / "model.onnx").write_bytes(b"the parent")
    return path


def write_record(path: Path, spec: ModelSpec, **changes: Any) -> None:
    record = {
        "sha256": file_hash(path),
        "library": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": ["sm86"],
        "parent": "model.onnx",
        "max_batch": 4,
    }
    write_sidecar(path, spec, {"precision": "fp16", "engine": record | changes})


def make(path: Path) -> TensorRTBackend:
    return TensorRTBackend(path, BackendOptions())


def images(count: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


# --- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_outputs_are_those_of_each_image(engine: Path, library: FakeLibrary, count: int) -> None:
    batch = images(count)
    with make(engine) as backend:
        output = backend.infer(batch)
    np.testing.assert_allclose(output.logits, expected_logits(batch), rtol=1e-6)
    np.testing.assert_allclose(output.probabilities, softmax(expected_logits(batch)), rtol=1e-6)
    assert output.logits.dtype == np.float32


def test_batches_are_split_by_the_profile(engine: Path, library: FakeLibrary) -> None:
    with make(engine) as backend:
        assert backend.max_batch == 4
        backend.infer(images(9))
    assert library.batches == [4, 4, 1]


def test_facts_of_the_artifact(engine: Path, library: FakeLibrary, spec: ModelSpec) -> None:
    with make(engine) as backend:
        assert (backend.name, backend.spec) == ("trt", spec)
        assert backend.provenance["precision"] == "fp16"


def test_outputs_survive_the_next_call(engine: Path, library: FakeLibrary) -> None:
    first, second = images(2, seed=1), images(2, seed=2) // 2
    with make(engine) as backend:
        kept = backend.infer(first)
        backend.infer(second)
        np.testing.assert_allclose(kept.logits, expected_logits(first), rtol=1e-6)
    np.testing.assert_allclose(kept.logits, expected_logits(first), rtol=1e-6)


def test_float_input_is_normalised(engine: Path, library: FakeLibrary, spec: ModelSpec) -> None:
    library.take_floats()
    batch = images(3)
    with make(engine) as backend:
        output = backend.infer(batch)
    np.testing.assert_allclose(output.logits, expected_logits(normalise(batch, spec)), rtol=1e-5)


def test_threads_take_turns(engine: Path, library: FakeLibrary) -> None:
    batches = [images(3, seed) for seed in range(16)]
    with make(engine) as backend, ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(backend.infer, batches))
    for batch, output in zip(batches, outputs, strict=True):
        np.testing.assert_allclose(output.logits, expected_logits(batch), rtol=1e-6)


def test_close_frees_everything(engine: Path, library: FakeLibrary, fake_cuda: FakeCuda) -> None:
    backend = make(engine)
    backend.open()
    # Input, logits and probabilities, each on the host and on the device.
    sizes = sorted(len(block) for block in fake_cuda.allocations.values())
    assert sizes == sorted(2 * [4 * 64 * 64 * 3, 4 * 7 * 4, 4 * 7 * 4])
    backend.close()
    backend.close()
    assert not fake_cuda.allocations
    assert not fake_cuda.streams
    with pytest.raises(BackendError, match="closed"):
        backend.infer(images(1))


def test_close_from_another_thread_during_inference(engine: Path, library: FakeLibrary) -> None:
    backend = make(engine)
    backend.open()
    backend._session.close()  # type: ignore[union-attr]
    backend._session = None  # what _close leaves behind; infer() has already looked
    with pytest.raises(BackendError, match="closed"):
        backend.infer(images(1))


@pytest.mark.parametrize("allowed", range(6))
def test_out_of_memory_while_opening_leaves_nothing(
    engine: Path, library: FakeLibrary, fake_cuda: FakeCuda, allowed: int
) -> None:
    fake_cuda.allocations_left = allowed
    with pytest.raises(BackendError, match="none left"):
        make(engine).open()
    assert not fake_cuda.allocations
    assert not fake_cuda.streams


@pytest.mark.parametrize("refused", ["context", "address"])
def test_what_fails_while_opening_leaves_nothing(
    engine: Path, library: FakeLibrary, fake_cuda: FakeCuda, refused: str
) -> None:
    library.refuse = {refused}
    with pytest.raises(BackendError, match=f"to .*{refused}"):
        make(engine).open()
    assert not fake_cuda.allocations
    assert not fake_cuda.streams


@pytest.mark.parametrize(("refused", "said"), [("shape", "batch of 2"), ("execute", "run the")])
def test_what_fails_while_running(
    engine: Path, library: FakeLibrary, refused: str, said: str
) -> None:
    with make(engine) as backend:
        library.refuse = {refused}
        with pytest.raises(BackendError, match=said):
            backend.infer(images(2))


# --- checks before loading -----------------------------------------------------------------------


def opening_error(path: Path, kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        make(path).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_minor_version_is_refused_with_the_command(
    engine: Path, library: FakeLibrary
) -> None:
    library.__version__ = "10.16.1.11"
    message = opening_error(engine)
    assert "built with TensorRT 10.16, which is here, found one built with 10.3.0" in message
    folder = engine.parent
    assert message.endswith(
        f"rebuild it here: efficientface-export --weights {folder}/model.onnx --engine trt "
        f"--max-batch 4 --out {folder} --overwrite"
    )


def test_another_patch_version_is_left_to_the_library(engine: Path, library: FakeLibrary) -> None:
    library.__version__ = "10.3.1"
    make(engine).open()
    library.says = ["The engine plan file is not compatible: expecting 10.3.1.4 got 10.3.0.26"]
    message = opening_error(engine)
    assert "expecting 10.3.1.4 got 10.3.0.26" in message
    assert "rebuild it here: efficientface-export" in message


def test_another_gpu_is_refused_with_the_command(
    engine: Path, library: FakeLibrary, fake_cuda: FakeCuda
) -> None:
    fake_cuda.capability = "sm89"
    message = opening_error(engine)
    assert "built for sm89, the GPU that is here, found one built for sm86" in message
    assert "--engine trt --max-batch 4" in message
    assert "--compute-capability" not in message, "TensorRT builds for the GPU that it finds"


def test_command_says_to_bring_the_onnx_file(engine: Path, library: FakeLibrary) -> None:
    (engine.parent / "model.onnx").unlink()
    library.__version__ = "11.4.0"
    assert "copy model.onnx beside it and rebuild it here: efficientface" in opening_error(engine)


def test_rtx_is_told_the_gpu_that_is_here(
    tmp_path: Path, spec: ModelSpec, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeLibrary(fake_cuda, "1.7.1.116")
    library.__name__ = "tensorrt_rtx"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    path = tmp_path / "model.rtx.engine"
    path.write_bytes(b"plan")
    facts = {"library": "tensorrt_rtx", "version": "1.7.0.4", "compute_capabilities": ["sm80+"]}
    write_record(path, spec, **facts)
    backend = TensorRTRTXBackend(path, BackendOptions())
    for capability in ("sm80", "sm89", "sm120"):
        fake_cuda.capability = capability
        with TensorRTRTXBackend(path, BackendOptions()) as opened:
            assert opened.name == "trt-rtx"
    fake_cuda.capability = "sm75"
    with pytest.raises(ArtifactError, match=r"--engine trt-rtx .*--compute-capability sm75"):
        backend.open()
    write_record(path, spec, **{**facts, "version": "1.6.0", "compute_capabilities": ["sm86"]})
    with pytest.raises(ArtifactError, match=r"RTX 1\.7,.* 1\.6\.0; .*--compute-capability sm86"):
        backend.open()


def test_engine_of_the_other_library(engine: Path, library: FakeLibrary, spec: ModelSpec) -> None:
    write_record(engine, spec, library="tensorrt_rtx", version="1.7.1")
    assert "one built by tensorrt_rtx 1.7.1" in opening_error(engine)


def test_tampered_plan(engine: Path, library: FakeLibrary) -> None:
    engine.write_bytes(b"another plan")
    assert "another file" in opening_error(engine)


def test_missing_sidecar(engine: Path, library: FakeLibrary) -> None:
    sidecar_path(engine).unlink()
    assert "the sidecar of model.engine" in opening_error(engine)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", None),
        ("version", 10.3),
        ("compute_capabilities", 86),
        ("compute_capabilities", [86]),
        ("parent", 3),
        ("max_batch", "4"),
    ],
)
def test_damaged_record(
    engine: Path, library: FakeLibrary, spec: ModelSpec, field: str, value: object
) -> None:
    write_record(engine, spec, **{field: value})
    message = opening_error(engine)
    assert "model.engine.json" in message
    assert "engine record" in message


def test_record_without_a_field(engine: Path, library: FakeLibrary) -> None:
    content = json.loads(sidecar_path(engine).read_text())
    del content["provenance"]["engine"]["version"]
    sidecar_path(engine).write_text(json.dumps(content))
    assert "'version'" in opening_error(engine)


def test_parent_with_a_path_stays_a_name(
    engine: Path, library: FakeLibrary, spec: ModelSpec
) -> None:
    write_record(engine, spec, parent="../../etc/x; rm -rf y.onnx", version="10.1.0")
    message = opening_error(engine)
    assert f"--weights '{engine.parent}/x; rm -rf y.onnx'" in message


def test_checks_come_before_the_plan_is_read(
    engine: Path, library: FakeLibrary, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("the library was given a plan that is known not to fit")

    monkeypatch.setattr(library.Runtime, "deserialize_cuda_engine", never)
    library.__version__ = "11.0.0"
    opening_error(engine)
    library.__version__, fake_cuda.capability = "10.3.0", "sm75"
    opening_error(engine)


@pytest.mark.parametrize(
    "tensors",
    [
        {"image": (DataType.UINT8, (-1, 96, 96, 3))},
        {"logits": (DataType.FLOAT, (-1, 8))},
        {"logits": (DataType.HALF, (-1, 7))},
        {"extra": (DataType.FLOAT, (-1, 7))},
    ],
)
def test_plan_with_other_tensors_than_its_spec(
    engine: Path, library: FakeLibrary, fake_cuda: FakeCuda, tensors: dict[str, Any]
) -> None:
    library.tensors |= tensors
    assert "64x64 image to 7 logits and probabilities" in opening_error(engine)
    assert not fake_cuda.allocations


def test_deserialiser_that_returns_none(engine: Path, library: FakeLibrary) -> None:
    library.says = ["Serialization assertion header.magicTag failed.\nsecond line"]
    message = opening_error(engine)
    assert "header.magicTag failed." in message
    assert "second line" not in message
    library.says = ["In ScopedCudaStream (cudaError 35: CUDA driver version is insufficient)"]
    assert "cudaError 35" in opening_error(engine, BackendError)


def test_runtime_that_does_not_start(engine: Path, library: FakeLibrary) -> None:
    library.refuse = {"runtime"}
    assert "returned nullptr" in opening_error(engine, BackendError)


@pytest.mark.parametrize(
    ("built", "here", "covered"),
    [
        (("sm86",), "sm86", True),
        (("sm86", "sm89"), "sm89", True),
        (("sm86",), "sm87", False),
        (("sm80+",), "sm75", False),
        (("sm80+",), "sm121", True),
        (("sm86",), "sm8", False),
        (("nonsense+",), "sm86", False),
        ((), "sm86", False),
    ],
)
def test_covers(built: tuple[str, ...], here: str, covered: bool) -> None:
    assert EngineRecord("tensorrt", "10.3", built, "m.onnx", 1).covers(here) is covered


@pytest.mark.parametrize(("precision", "said"), [("fp32", True), ("fp16", False), ("int8", False)])
def test_rebuild_command_keeps_the_precision(precision: str, said: bool) -> None:
    command = rebuild_command("trt", Path("model.onnx"), 8, precision=precision)
    assert ("--precision fp32" in command) == said


def test_rebuild_command_is_quoted() -> None:
    command = rebuild_command("trt", Path("my model.onnx"), 8, precision="fp16", out=Path("a b"))
    assert command == (
        "efficientface-export --weights 'my model.onnx' --engine trt --max-batch 8 "
        "--out 'a b' --overwrite"
    )


# --- the libraries themselves --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trt", "trt-rtx"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "no module named x"),
        (ImportError("libnvinfer.so.10: cannot open shared object file"), "libnvinfer.so.10"),
        (FileNotFoundError("Could not find: nvinfer.dll. Is it on your PATH?\nmore"), "nvinfer"),
        (OSError(), "OSError"),
    ],
)
def test_library_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception, said: str
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(backend_module.importlib, "import_module", fail)
    with pytest.raises(BackendError) as caught:
        load_library(kind)
    message = str(caught.value)
    assert said in message
    assert f"pip install 'efficientface-deploy[{kind}]'" in message
    assert "\n" not in message


def test_tensorrt_8_is_refused(library: FakeLibrary) -> None:
    library.__version__ = "8.6.1"
    library.NetworkDefinitionCreationFlag = types.SimpleNamespace(EXPLICIT_BATCH=0)
    with pytest.raises(BackendError, match=r"TensorRT 10 or newer.*8\.6\.1"):
        load_library("trt")


def test_folder_named_tensorrt_is_not_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(BackendError, match="without its API"):
        load_library("trt")


# What we call, by class. The design's table: only what 10.x, 11.x and RTX 1.x share.
USED = {
    "Builder": [
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ],
    "IBuilderConfig": [
        "profiling_verbosity",
        "set_memory_pool_limit",
        "clear_flag",
        "add_optimization_profile",
    ],
    "IOptimizationProfile": ["set_shape"],
    "INetworkDefinition": ["get_input", "add_input", "add_identity", "mark_output"],
    "OnnxParser": ["parse_from_file", "num_errors", "get_error"],
    "ParserError": ["desc", "node_operator", "node_name"],
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": [
        "create_execution_context",
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_dtype",
        "get_tensor_shape",
        "get_tensor_profile_shape",
    ],
    "IExecutionContext": ["set_tensor_address", "set_input_shape", "execute_async_v3"],
    "ILogger": ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "log"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "BuilderFlag": ["TF32"],
    "ProfilingVerbosity": ["DETAILED"],
    "MemoryPoolType": ["WORKSPACE"],
    "DataType": ["UINT8", "FLOAT"],
}
USED_OF_RTX = {
    "IBuilderConfig": ["num_compute_capabilities", "set_compute_capability"],
    "ComputeCapability": ["CURRENT", "SM75", "SM86", "SM89"],
}
REMOVED = {
    "num_bindings",
    "get_binding_shape",
    "get_binding_dtype",
    "get_binding_name",
    "binding_is_input",
    "set_binding_shape",
    "execute_async",
    "execute_async_v2",
    "execute_v2",
    "build_engine_with_config",
    "max_workspace_size",
    "max_batch_size",
    "FP16",
    "INT8",
    "EXPLICIT_BATCH",
    "OBEY_PRECISION_CONSTRAINTS",
    "PREFER_PRECISION_CONSTRAINTS",
    "int8_calibrator",
    "set_dynamic_range",
    "set_calibration_profile",
}


def attributes_of_our_modules() -> set[str]:
    files = ("efficientface_deploy/backends/tensorrt.py", "export/engine.py")
    trees = [ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_no_removed_call_is_used() -> None:
    used = attributes_of_our_modules()
    assert not used & REMOVED
    assert not [name for name in used if name.startswith("IInt8")]


def test_list_of_calls_is_that_of_the_code() -> None:
    """Keeps :data:`USED` honest: whatever is listed is called somewhere."""
    listed = {name for names in USED.values() for name in names} - {"log"}
    assert not listed - attributes_of_our_modules()


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_library_has_what_we_call(module: str) -> None:
    library = pytest.importorskip(module, reason=f"needs {module}", exc_type=ImportError)
    wanted = [(owner, name) for owner, names in USED.items() for name in names]
    if module == "tensorrt_rtx":
        wanted += [(owner, name) for owner, names in USED_OF_RTX.items() for name in names]
    assert not [
        f"{owner}.{name}" for owner, name in wanted if not hasattr(getattr(library, owner), name)
    ]


def test_real_rtx_refuses_garbage_in_one_line(
    tmp_path: Path, spec: ModelSpec, fake_cuda: FakeCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real deserialiser returns None and, left alone, prints to the terminal."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError)
    path = tmp_path / "model.rtx.engine"
    path.write_bytes(b"garbage" * 100)
    write_record(path, spec, library="tensorrt_rtx", version=rtx.__version__)
    with pytest.raises((ArtifactError, BackendError)) as caught:
        TensorRTRTXBackend(path, BackendOptions()).open()
    assert "magicTag" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
