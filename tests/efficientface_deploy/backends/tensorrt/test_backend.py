"""TensorRT backends: checks before loading, buffers while running, one line when it fails.

The GPU is host memory, and the library a stand-in with the recorded API of a release and TensorRT's
conventions (None and False for failure, raw addresses, work that happens when the stream is
synchronised); what the real library says without a GPU is tested with the real library.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from mean_engine import expected_logits, images, softmax, write_plan, write_record
from onnx import TensorProto
from tensorrt_stand_in import MEMORY_BYTES, VERSIONS, Library

from efficientface_deploy.artifact import sidecar_path
from efficientface_deploy.backends import BackendOptions
from efficientface_deploy.backends.tensorrt.backend import (
    EngineRecord,
    TensorRTBackend,
    TensorRTRTXBackend,
)
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalise

every_release = pytest.mark.parametrize("library", VERSIONS, indirect=True)


def make(path: Path) -> TensorRTBackend:
    return TensorRTBackend(path, BackendOptions())


# --- running -------------------------------------------------------------------------------------


@every_release
@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_outputs_are_those_of_each_image(engine: Path, library: Library, count: int) -> None:
    batch = images(count)
    with make(engine) as backend:
        output = backend.infer(batch)
    np.testing.assert_allclose(output.logits, expected_logits(batch), rtol=1e-6)
    np.testing.assert_allclose(output.probabilities, softmax(expected_logits(batch)), rtol=1e-6)
    assert output.logits.dtype == np.float32


def test_batches_are_split_by_the_profile(engine: Path, library: Library) -> None:
    with make(engine) as backend:
        assert backend.max_batch == 4
        backend.infer(images(9))
    # The second batch of four runs once more, for its CUDA graph.
    assert library.batches == [4, 4, 4, 1]


def test_facts_of_the_artifact(engine: Path, library: Library, spec: ModelSpec) -> None:
    with make(engine) as backend:
        assert (backend.name, backend.spec) == ("trt", spec)
        assert backend.provenance["precision"] == "fp16"


def test_outputs_survive_the_next_call(engine: Path, library: Library) -> None:
    first, second = images(2, seed=1), images(2, seed=2) // 2
    with make(engine) as backend:
        kept = backend.infer(first)
        backend.infer(second)
        np.testing.assert_allclose(kept.logits, expected_logits(first), rtol=1e-6)
    np.testing.assert_allclose(kept.logits, expected_logits(first), rtol=1e-6)


@every_release
def test_float_input_is_normalised(engine: Path, library: Library, spec: ModelSpec) -> None:
    write_plan(engine, spec, library, float_input=True)
    batch = images(3)
    with make(engine) as backend:
        output = backend.infer(batch)
    np.testing.assert_allclose(output.logits, expected_logits(normalise(batch, spec)), rtol=1e-5)


def test_threads_take_turns(engine: Path, library: Library) -> None:
    batches = [images(3, seed) for seed in range(16)]
    with make(engine) as backend, ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(backend.infer, batches))
    for batch, output in zip(batches, outputs, strict=True):
        np.testing.assert_allclose(output.logits, expected_logits(batch), rtol=1e-6)


@every_release
def test_close_frees_everything(engine: Path, library: Library, fake_cuda: FakeCuda) -> None:
    backend = make(engine)
    backend.open()
    # Input, logits and probabilities, each on the host and on the device; the contexts' memory.
    sizes = sorted(len(block) for block in fake_cuda.allocations.values())
    assert sizes == sorted([*2 * [4 * 64 * 64 * 3, 4 * 7 * 4, 4 * 7 * 4], MEMORY_BYTES])
    for _ in range(3):
        backend.infer(images(2))
    backend.close()
    backend.close()
    assert not fake_cuda.allocations
    assert not fake_cuda.streams
    assert not fake_cuda.graphs
    with pytest.raises(BackendError, match="closed"):
        backend.infer(images(1))


def test_close_from_another_thread_during_inference(engine: Path, library: Library) -> None:
    backend = make(engine)
    backend.open()
    backend._session.close()  # type: ignore[union-attr]
    backend._session = None  # what _close leaves behind; infer() has already looked
    with pytest.raises(BackendError, match="closed"):
        backend.infer(images(1))


@pytest.mark.parametrize("allowed", range(7))
def test_out_of_memory_while_opening_leaves_nothing(
    engine: Path, library: Library, fake_cuda: FakeCuda, allowed: int
) -> None:
    fake_cuda.allocations_left = allowed
    with pytest.raises(BackendError, match="none left"):
        make(engine).open()
    assert not fake_cuda.allocations
    assert not fake_cuda.streams


@every_release
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("ICudaEngine.create_execution_context", "create an execution context"),
        ("IExecutionContext.set_tensor_address", "take the address of logits"),
    ],
)
def test_what_fails_while_opening_leaves_nothing(
    engine: Path, library: Library, fake_cuda: FakeCuda, call: str, said: str
) -> None:
    library.failing[call] = []
    with pytest.raises(BackendError, match=f"to {said}"):
        make(engine).open()
    assert not fake_cuda.allocations
    assert not fake_cuda.streams


@every_release
@pytest.mark.parametrize(
    ("call", "said"),
    [("set_input_shape", "take a batch of 2"), ("execute_async_v3", "run the engine")],
)
def test_what_fails_while_running(engine: Path, library: Library, call: str, said: str) -> None:
    with make(engine) as backend:
        library.failing[f"IExecutionContext.{call}"] = []
        with pytest.raises(BackendError, match=said):
            backend.infer(images(2))


# --- checks before loading -----------------------------------------------------------------------


def opening_error(path: Path, kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        make(path).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_minor_version_is_refused_with_the_command(engine: Path, library: Library) -> None:
    library.module.__version__ = "10.16.1.11"
    message = opening_error(engine)
    assert "built with TensorRT 10.16, which is here, found one built with 10.3.0" in message
    folder = engine.parent
    assert message.endswith(
        f"rebuild it here: efficientface-export --weights {folder}/model.onnx --engine trt "
        f"--max-batch 4 --out {folder} --overwrite"
    )


def test_another_patch_version_is_left_to_the_library(engine: Path, library: Library) -> None:
    library.module.__version__ = "10.3.1"
    make(engine).open()
    library.failing["Runtime.deserialize_cuda_engine"] = [
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is "
        "not compatible with this version of TensorRT, expecting library version 10.3.1.4 got "
        "10.3.0.26, please rebuild.)"
    ]
    message = opening_error(engine)
    assert "expecting library version 10.3.1.4 got 10.3.0.26, please rebuild" in message
    assert "rebuild it here: efficientface-export" in message


def test_another_gpu_is_refused_with_the_command(
    engine: Path, library: Library, fake_cuda: FakeCuda
) -> None:
    fake_cuda.capability = "sm89"
    message = opening_error(engine)
    assert "built for sm89, the GPU that is here, found one built for sm86" in message
    assert "--engine trt --max-batch 4" in message
    assert "--compute-capability" not in message, "TensorRT builds for the GPU that it finds"


def test_command_says_to_bring_the_onnx_file(engine: Path, library: Library) -> None:
    (engine.parent / "model.onnx").unlink()
    library.module.__version__ = "11.4.0"
    assert "copy model.onnx beside it and rebuild it here: efficientface" in opening_error(engine)


@pytest.fixture
def rtx_file(tmp_path: Path, spec: ModelSpec, rtx_library: Library) -> Path:
    """An engine of TensorRT for RTX, for what it builds for by default."""
    path = tmp_path / "model.rtx.engine"
    write_plan(path, spec, rtx_library)
    write_rtx_record(path, spec)
    return path


RTX_DEFAULT = ["sm80", "sm86", "sm89", "sm120", "sm121+"]


def write_rtx_record(path: Path, spec: ModelSpec, *gpus: str, version: str = "1.7.0.4") -> None:
    facts = {"compute_capabilities": list(gpus) or RTX_DEFAULT, "version": version}
    write_record(path, spec, library="tensorrt_rtx", **facts)


def rtx_error(path: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        TensorRTRTXBackend(path, BackendOptions()).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rtx_is_told_the_gpu_that_is_here(
    rtx_file: Path, spec: ModelSpec, fake_cuda: FakeCuda, rtx_library: Library
) -> None:
    for fake_cuda.capability in ("sm80", "sm89", "sm120", "sm130"):
        with TensorRTRTXBackend(rtx_file, BackendOptions()) as opened:
            assert opened.name == "trt-rtx"
    fake_cuda.capability = "sm75"
    assert "--compute-capability sm75" in rtx_error(rtx_file, ArtifactError)
    write_rtx_record(rtx_file, spec, "sm86", version="1.6.0")
    message = rtx_error(rtx_file, ArtifactError)
    assert "RTX 1.7, which is here, found one built with 1.6.0" in message
    assert "--compute-capability sm86" in message
    fake_cuda.capability = "sm130"  # newer than all that the library names
    write_rtx_record(rtx_file, spec, "sm86")
    assert "--compute-capability" not in rtx_error(rtx_file, ArtifactError)


@pytest.mark.parametrize(
    ("gpu", "said"),
    [("sm87", "Jetson Orin"), ("sm90", "H100"), ("sm110", "Jetson Thor"), ("sm103", "B300")],
)
@pytest.mark.parametrize("record", [("sm80+",), tuple(RTX_DEFAULT), ("sm86",)])
def test_gpu_that_rtx_serves_with_no_engine(
    rtx_file: Path,
    spec: ModelSpec,
    fake_cuda: FakeCuda,
    gpu: str,
    said: str,
    record: tuple[str, ...],
) -> None:
    write_rtx_record(rtx_file, spec, *record)
    fake_cuda.capability = gpu
    message = rtx_error(rtx_file, BackendError)
    assert f"serves (sm75, sm80, sm86, sm89, sm120, sm121), found {gpu} ({said}" in message
    assert "use TensorRT there" in message and "--engine trt;" in message
    assert "rebuild it here" not in message


@pytest.mark.parametrize(
    ("cause", "kind", "said"),
    [
        ("UNSUPPORTED_CC", ArtifactError, "built for sm86, the GPU that is here, found one built"),
        ("VERSION_MISMATCH", ArtifactError, "refuses (version mismatch); copy model.onnx beside"),
        ("MALFORMED_ENGINE", ArtifactError, "refuses (malformed engine); copy model.onnx beside"),
        ("OLD_CUDA_DRIVER", BackendError, "found old cuda driver; check the GPU and its driver"),
        ("INSUFFICIENT_GPU_MEMORY", BackendError, "found insufficient gpu memory"),
    ],
)
def test_library_is_asked_before_it_is_given_the_plan(
    rtx_file: Path,
    spec: ModelSpec,
    rtx_library: Library,
    cause: str,
    kind: type[Exception],
    said: str,
) -> None:
    """Whatever the record says, as those of before do for cards that the library leaves out."""
    write_rtx_record(rtx_file, spec, "sm80+")
    rtx_library.invalid = cause
    rtx_library.failing["Runtime.deserialize_cuda_engine"] = ["it was given the plan"]
    assert said in rtx_error(rtx_file, kind)


def test_release_order(rtx_file: Path, rtx_library: Library) -> None:
    """What came from something goes before it."""
    order = ["IRuntimeConfig", "IRuntimeCache", "ICudaEngine", "Runtime"]
    backend = TensorRTRTXBackend(rtx_file, BackendOptions())
    with backend:
        for _ in range(3):
            backend.infer(images(2))
    assert rtx_library.released == ["IExecutionContext", "IExecutionContext", *order]
    rtx_library.released.clear()
    rtx_library.failing["ICudaEngine.create_execution_context"] = []
    with pytest.raises(BackendError):
        backend.open()
    assert rtx_library.released == order


def test_engine_of_the_other_library(engine: Path, library: Library, spec: ModelSpec) -> None:
    write_record(engine, spec, library="tensorrt_rtx", version="1.7.1")
    assert "one built by tensorrt_rtx 1.7.1" in opening_error(engine)


def test_tampered_plan(engine: Path, library: Library) -> None:
    engine.write_bytes(b"another plan")
    assert "another file" in opening_error(engine)


def test_missing_sidecar(engine: Path, library: Library) -> None:
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
    engine: Path, library: Library, spec: ModelSpec, field: str, value: object
) -> None:
    write_record(engine, spec, **{field: value})
    message = opening_error(engine)
    assert "model.engine.json" in message
    assert "engine record" in message


def test_record_without_a_field(engine: Path, library: Library) -> None:
    content = json.loads(sidecar_path(engine).read_text())
    del content["provenance"]["engine"]["version"]
    sidecar_path(engine).write_text(json.dumps(content))
    assert "'version'" in opening_error(engine)


def test_parent_with_a_path_stays_a_name(engine: Path, library: Library, spec: ModelSpec) -> None:
    write_record(engine, spec, parent="../../etc/x; rm -rf y.onnx", version="10.1.0")
    message = opening_error(engine)
    assert f"--weights '{engine.parent}/x; rm -rf y.onnx'" in message


def test_checks_come_before_the_plan_is_read(
    engine: Path, library: Library, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("the library was given a plan that is known not to fit")

    monkeypatch.setattr(library.module.Runtime, "deserialize_cuda_engine", never)
    library.module.__version__ = "11.0.0"
    opening_error(engine)
    library.module.__version__, fake_cuda.capability = "10.3.0", "sm75"
    opening_error(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"side": 96},
        {"classes": 8},
        {"logits": TensorProto.FLOAT16},
        {"outputs": ("logits", "probabilities", "extra")},
        {"outputs": ("logits", "features")},
        {"outputs": ("logits",)},
    ],
)
def test_plan_with_other_tensors_than_its_spec(
    engine: Path, library: Library, spec: ModelSpec, fake_cuda: FakeCuda, changes: dict[str, Any]
) -> None:
    write_plan(engine, spec, library, **changes)
    assert "64x64 image to 7 logits and probabilities" in opening_error(engine)
    assert not fake_cuda.allocations


def test_deserialiser_that_returns_none(engine: Path, library: Library) -> None:
    says = library.failing["Runtime.deserialize_cuda_engine"] = [
        "Serialization assertion header.magicTag failed.\nsecond line"
    ]
    message = opening_error(engine)
    assert "header.magicTag failed." in message
    assert "second line" not in message
    says[:] = [  # of the same compute capability by the record, as in onnxruntime's issue 15250
        "The engine plan file is generated on an incompatible device, expecting compute 7.5 got "
        "compute 6.1, please rebuild."
    ]
    assert "expecting compute 7.5 got compute 6.1" in opening_error(engine)
    says[:] = ["In ScopedCudaStream (cudaError 35: CUDA driver version is insufficient)"]
    assert "cudaError 35" in opening_error(engine, BackendError)


@pytest.mark.parametrize(
    ("logged", "said"),
    [
        ([], "found pybind11::init(): factory function returned nullptr"),
        (
            ["CUDA initialization failure with error: 35. Please check your CUDA installation"],
            "found CUDA initialization failure with error: 35",
        ),
    ],
)
def test_runtime_that_does_not_start(
    engine: Path, library: Library, logged: list[str], said: str
) -> None:
    library.failing["Runtime.__init__"] = logged
    assert said in opening_error(engine, BackendError)


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
    assert "refuses (malformed engine)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
