"""CUDA graphs: what is captured, when, how many, and what happens where it cannot be.

The stand-ins hold to the rules: nothing waits or allocates while a stream is captured, a new shape
runs once before it can be captured, and a graph whose context has taken another shape is useless.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from mean_engine import expected_logits, images, write_plan
from tensorrt_stand_in import VERSIONS, Library

from efficientface_deploy import load
from efficientface_deploy.backends import BackendOptions
from efficientface_deploy.backends.base import Backend
from efficientface_deploy.backends.tensorrt import session
from efficientface_deploy.backends.tensorrt.backend import TensorRTBackend, TensorRTRTXBackend
from efficientface_deploy.errors import BackendError
from efficientface_deploy.spec import ModelSpec

every_release = pytest.mark.parametrize("library", VERSIONS, indirect=True)


def make(path: Path, *, graphs: bool = True) -> TensorRTBackend:
    return TensorRTBackend(path, BackendOptions(cuda_graphs=graphs))


def check(backend: Backend, count: int, seed: int = 0) -> None:
    batch = images(count, seed)
    logits = backend.infer(batch).logits
    np.testing.assert_allclose(logits, expected_logits(batch), rtol=1e-6)


@every_release
def test_graph_from_the_third_time_on(engine: Path, library: Library, fake_cuda: FakeCuda) -> None:
    with make(engine) as backend:
        for seed, launches in enumerate([0, 0, 1, 2, 3]):
            check(backend, 3, seed)
            assert len(fake_cuda.launches) == launches
        assert len(set(fake_cuda.launches)) == 1


@every_release
def test_features_between_graphs(
    tmp_path: Path, spec: ModelSpec, library: Library, fake_cuda: FakeCuda
) -> None:
    """They are copied for who asks, and the graphs that are there go on to be right."""
    path = tmp_path / "model.engine"
    write_plan(path, spec, library, outputs=("logits", "probabilities", "features"))
    with make(path) as backend:
        assert backend.feature_size == 7
        for seed in range(4):
            check(backend, 3, seed)
            batch = images(3, seed + 9)
            features = backend.features(batch)
            np.testing.assert_allclose(features, expected_logits(batch), rtol=1e-6)
        assert len(fake_cuda.launches) == 2, "as without them"
        batch = images(9, 1)  # beyond the largest batch
        np.testing.assert_allclose(backend.features(batch), expected_logits(batch), rtol=1e-6)
    assert not fake_cuda.allocations


def test_engine_without_features(engine: Path, library: Library) -> None:
    with make(engine) as backend, pytest.raises(BackendError, match="efficientface-export --fe"):
        backend.features(images(1))


def test_one_graph_for_each_batch_size(engine: Path, library: Library, fake_cuda: FakeCuda) -> None:
    """In any order: each graph has a context of its own, whose shape never changes."""
    with make(engine) as backend:
        for seed in range(6):
            for count in (1, 4, 2):
                check(backend, count, seed)
        assert len(fake_cuda.graphs) == 3
        assert len(fake_cuda.launches) == 12
        check(backend, 3)
        check(backend, 1)
    assert not fake_cuda.graphs
    assert not fake_cuda.allocations


def test_switched_off(engine: Path, library: Library, fake_cuda: FakeCuda) -> None:
    with load(engine, cuda_graphs=False) as predictor:
        for _ in range(4):
            predictor.infer(images(2))
    assert not fake_cuda.launches
    assert library.batches == [2, 2, 2, 2]


def test_binding_that_cannot_capture(
    engine: Path, library: Library, fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cuda.captures = False
    with caplog.at_level(logging.DEBUG), make(engine) as backend:
        for seed in range(4):
            check(backend, 2, seed)
    assert not fake_cuda.launches
    assert "fake cannot capture CUDA graphs" in caplog.text


def test_number_of_graphs_is_bounded(
    tmp_path: Path, spec: ModelSpec, library: Library, fake_cuda: FakeCuda
) -> None:
    """Those that were run last stay."""
    path = tmp_path / "model.engine"
    write_plan(path, spec, library, max_batch=12)
    with make(path) as backend:
        for count in range(1, 13):
            check(backend, count)
            check(backend, count)
            assert len(fake_cuda.graphs) <= session.MAX_CAPTURES
        before = len(fake_cuda.launches)
        check(backend, 12)
        check(backend, 12 - session.MAX_CAPTURES + 1)
        assert len(fake_cuda.launches) == before + 2
        check(backend, 12 - session.MAX_CAPTURES)
        assert len(fake_cuda.launches) == before + 2, "the oldest has made room"


def test_what_is_used_again_outlives_what_is_not(
    tmp_path: Path, spec: ModelSpec, library: Library, fake_cuda: FakeCuda
) -> None:
    path = tmp_path / "model.engine"
    write_plan(path, spec, library, max_batch=12)
    with make(path) as backend:
        for count in range(1, 13):
            for _ in range(2):
                check(backend, count)
                check(backend, 1)
        check(backend, 1)
        assert fake_cuda.launches[-1] == fake_cuda.launches[0], "the graph of batches of one"


def test_batch_that_cannot_be_captured_runs_without(
    engine: Path,
    library: Library,
    fake_cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once and for all for that batch size; the stream runs again."""
    attempts = []

    def spoiled(stream: int) -> None:
        attempts.append(stream)
        FakeCuda.begin_capture(fake_cuda, stream)
        if len(attempts) == 1:
            fake_cuda.spoil("cudaMalloc")

    monkeypatch.setattr(fake_cuda, "begin_capture", spoiled)
    with caplog.at_level(logging.INFO), make(engine) as backend:
        for seed in range(5):
            check(backend, 2, seed)
        assert len(attempts) == 1
        assert not fake_cuda.launches
        assert "batches of 2 run without a CUDA graph" in caplog.text
        for seed in range(3):
            check(backend, 3, seed)
        assert len(fake_cuda.launches) == 1, "another batch size is another matter"
    assert not fake_cuda.allocations


@every_release
@pytest.mark.parametrize("what", ["context", "capture"])
def test_library_that_cannot_be_captured(
    engine: Path, library: Library, fake_cuda: FakeCuda, what: str
) -> None:
    with make(engine) as backend:
        check(backend, 2)
        if what == "context":
            library.failing["ICudaEngine.create_execution_context"] = ["out of memory"]
        library.capturable = what == "context"
        check(backend, 2)
        library.failing.clear()
        library.capturable = True
        for seed in range(3):
            check(backend, 2, seed)
        assert not fake_cuda.launches
        # What the library said then is not the reason of what fails now.
        library.failing["IExecutionContext.execute_async_v3"] = []
        with pytest.raises(BackendError, match="a failure without a reason"):
            backend.infer(images(2))


def test_failed_launch_is_an_error(
    engine: Path, library: Library, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: int, stream: int) -> None:
        raise BackendError("CUDA", "cudaGraphLaunch to succeed", "700", "restart")

    with make(engine) as backend:
        check(backend, 2)
        check(backend, 2)
        monkeypatch.setattr(fake_cuda, "launch", fail)
        with pytest.raises(BackendError, match="cudaGraphLaunch"):
            backend.infer(images(2))


# --- TensorRT for RTX, which captures its own -----------------------------------------------------


def test_rtx_captures_in_a_context_for_each_batch_size(
    rtx_engine: Path, rtx_library: Library, fake_cuda: FakeCuda
) -> None:
    with TensorRTRTXBackend(rtx_engine, BackendOptions()) as backend:
        for seed in range(5):
            for count in (1, 3):
                check(backend, count, seed)
    assert not fake_cuda.launches, "no capture of ours around its own"
    assert [count for count, _ in rtx_library.recorded] == [1, 3], "each is recorded once"
    assert not fake_cuda.allocations


def test_rtx_switched_off(rtx_engine: Path, rtx_library: Library) -> None:
    with load(rtx_engine, cuda_graphs=False) as predictor:
        for _ in range(4):
            predictor.infer(images(2))
    assert not rtx_library.recorded


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["trt", "trt-rtx"])
def test_graphs_change_nothing_on_a_gpu(
    kind: str, model_files: dict[str, Path], tmp_path: Path
) -> None:
    from efficientface_export.tensorrt.options import SUFFIXES, EngineOptions
    from tests.engines import unusable, write_engine

    if reason := unusable(kind):
        pytest.skip(reason)
    path = tmp_path / f"model{SUFFIXES[kind]}"
    write_engine(model_files["onnx"], path, kind, EngineOptions(max_batch=8))
    with load(path) as recorded, load(path, cuda_graphs=False) as plain:
        for seed in range(4):
            for count in (1, 8, 3, 20):
                batch = images(count, seed)
                np.testing.assert_array_equal(recorded.infer(batch)[0], plain.infer(batch)[0])
