"""ONNX Runtime's sessions; the profiler is tried on a real one in test_profiling.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure.sessions import open_infer, open_session, profiled


def test_a_file_and_its_bytes_are_the_same_model(make_onnx: Callable[..., Path]) -> None:
    path = make_onnx("a.onnx")
    images = np.full((2, 32, 32, 3), 200, np.uint8)
    found = [open_infer(path)(images), open_infer(path.read_bytes(), 1)(images)]
    assert found[0].shape == (2, 7)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_threads_are_given_to_the_library(make_onnx: Callable[..., Path]) -> None:
    options = open_session(make_onnx("a.onnx"), 1).get_session_options()
    assert options.intra_op_num_threads == 1


def test_sessions_are_profiled_until_the_end(
    make_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    with profiled(tmp_path):
        session = open_session(make_onnx("a.onnx"))
    assert Path(session.end_profiling()).parent == tmp_path
    assert not open_session(make_onnx("a.onnx")).get_session_options().enable_profiling
