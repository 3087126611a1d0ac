"""TensorRT for RTX's compiled kernels: kept beside the engine, used again, and never in the way."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from mean_engine import expected_logits, images, write_plan, write_record
from tensorrt_stand_in import Library

from efficientface_deploy.backends import BackendOptions
from efficientface_deploy.backends.tensorrt import engine as cache_module
from efficientface_deploy.backends.tensorrt.backend import TensorRTBackend, TensorRTRTXBackend
from efficientface_deploy.backends.tensorrt.engine import cache_path
from efficientface_deploy.errors import BackendError
from efficientface_deploy.spec import ModelSpec


def run(path: Path) -> None:
    batch = images(2)
    with TensorRTRTXBackend(path, BackendOptions()) as backend:
        logits = backend.infer(batch).logits
    np.testing.assert_allclose(logits, expected_logits(batch), rtol=1e-6)


def test_second_start_compiles_nothing(rtx_engine: Path, rtx_library: Library) -> None:
    run(rtx_engine)
    kept = cache_path(rtx_engine)
    assert kept.name == "model.rtx.engine.cache"
    assert rtx_library.compiled == 1
    before = (kept.read_bytes(), kept.stat().st_mtime_ns)
    run(rtx_engine)
    assert rtx_library.compiled == 1
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before, "nothing new, nothing written"
    head, _, kernels = before[0].partition(b"\n")
    fields = json.loads(head)
    assert (fields["library"], fields["gpu"]) == ("tensorrt_rtx 1.7.1.116", "sm86")
    assert kernels.endswith(b"kernels")


def test_kernels_are_kept_as_soon_as_there_are_some(rtx_engine: Path, rtx_library: Library) -> None:
    """A program that is killed has its next start shortened all the same."""
    TensorRTRTXBackend(rtx_engine, BackendOptions()).open()
    assert cache_path(rtx_engine).is_file()


def test_kernels_compiled_while_running_are_kept_at_the_end(
    rtx_engine: Path, rtx_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TensorRTRTXBackend(rtx_engine, BackendOptions()) as backend:
        cache = backend._session._engine._cache._cache  # type: ignore[union-attr]
        cache._["data"] += b" of another shape"
    assert cache_path(rtx_engine).read_bytes().endswith(b"kernels of another shape")


def damage_head(path: Path) -> None:
    path.write_bytes(b'{"engine": 1}' + path.read_bytes())


def damage_kernels(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"X")


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()  # whoever runs the tests may read any file


@pytest.mark.parametrize(
    "change",
    [
        damage_head,
        damage_kernels,
        make_unreadable,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(os.urandom(1000)),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
    ],
)
def test_damaged_cache_is_passed_over(
    rtx_engine: Path,
    rtx_library: Library,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], Any],
) -> None:
    run(rtx_engine)
    change(cache_path(rtx_engine))
    with caplog.at_level(logging.INFO):
        run(rtx_engine)
    assert rtx_library.compiled == 2
    assert "model.rtx.engine.cache: ignored" in caplog.text


@pytest.mark.parametrize("what", ["engine", "release", "gpu"])
def test_cache_of_something_else_is_never_given_to_the_library(
    rtx_engine: Path,
    rtx_library: Library,
    fake_cuda: FakeCuda,
    spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    run(rtx_engine)
    facts: dict[str, Any] = {"library": "tensorrt_rtx", "compute_capabilities": ["sm80+"]}
    if what == "engine":
        write_plan(rtx_engine, spec, rtx_library, max_batch=5)
    elif what == "release":
        rtx_library.module.__version__ = "1.7.2.1"
    else:
        fake_cuda.capability = "sm89"
    write_record(rtx_engine, spec, version=rtx_library.module.__version__, **facts)

    def never(*_: object) -> bool:
        pytest.fail("it was given kernels that are known not to fit")

    monkeypatch.setattr(rtx_library._classes["IRuntimeCache"], "deserialize", never)
    run(rtx_engine)
    assert rtx_library.compiled == 2


def test_cache_that_the_library_refuses(
    rtx_engine: Path, rtx_library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks at more than we do: the driver, the kind of card."""
    run(rtx_engine)
    rtx_library.failing["IRuntimeCache.deserialize"] = []
    with caplog.at_level(logging.INFO):
        run(rtx_engine)
    assert "does not take it here" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.serialize",
    ],
)
def test_library_that_does_without_a_cache(
    rtx_engine: Path, rtx_library: Library, call: str
) -> None:
    rtx_library.failing[call] = []
    run(rtx_engine)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(28, "No space left")])
def test_folder_that_cannot_be_written(
    rtx_engine: Path,
    rtx_library: Library,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: OSError,
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(cache_module, "atomic_path", fail)
    with caplog.at_level(logging.INFO):
        run(rtx_engine)
    assert "model.rtx.engine.cache: not kept" in caplog.text
    assert not cache_path(rtx_engine).exists()


def test_runtime_configuration_that_cannot_be_made(rtx_engine: Path, rtx_library: Library) -> None:
    rtx_library.failing["ICudaEngine.create_runtime_config"] = ["out of memory"]
    with pytest.raises(BackendError, match="create a runtime configuration, found out of memory"):
        TensorRTRTXBackend(rtx_engine, BackendOptions()).open()


@pytest.mark.parametrize("library", ["10.16"], indirect=True)
def test_tensorrt_proper_keeps_no_cache(engine: Path, library: Library) -> None:
    with TensorRTBackend(engine, BackendOptions()) as backend:
        backend.infer(images(1))
    assert not cache_path(engine).exists()


def test_names_are_those_of_the_installed_library() -> None:
    """What the stand-in plays is called as in the real module."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError)
    for name in ("create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy"):
        assert hasattr(rtx.IRuntimeConfig, name)
    assert {"DISABLED", "WHOLE_GRAPH_CAPTURE"} <= set(rtx.CudaGraphStrategy.__members__)
    assert "USER_MANAGED" in rtx.ExecutionContextAllocationStrategy.__members__
    assert hasattr(rtx.ICudaEngine, "device_memory_size_v2")


@pytest.mark.gpu
def test_cache_on_a_gpu(
    model_files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.engines import unusable, write_engine

    if reason := unusable("trt-rtx"):
        pytest.skip(reason)
    path = tmp_path / "model.rtx.engine"
    write_engine(model_files["onnx"], path, "trt-rtx")
    outputs = []
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with TensorRTRTXBackend(path, BackendOptions()) as backend:
                outputs.append(backend.infer(images(3)).logits)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-3)
    assert cache_path(path).stat().st_size > 1000
    assert "cache: " not in caplog.text, "neither ignored nor refused"
