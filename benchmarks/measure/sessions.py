"""ONNX Runtime's sessions: the one place that sets them up, and the one that imports the library.

It is imported when a session is made. So a process of its own can measure what it costs, and
nothing else here asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array

if TYPE_CHECKING:
    import onnxruntime

Infer = Callable[[UInt8Array], Float32Array]  # pictures (N, S, S, 3) -> logits (N, C)


def open_session(model: Path | bytes, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU with all the library's optimisations.

    Args:
        model: A file, or what is in it.
        threads: Of one inference; None leaves the choice to the library.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors alone
    if threads is not None:
        options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def open_infer(model: Path | bytes, threads: int | None = None) -> Infer:
    """A function from pictures to logits, by a session of a file of ours."""
    session = open_session(model, threads)
    return lambda pictures: np.asarray(session.run(OUTPUTS[:1], {UINT8_INPUT: pictures})[0])


@contextlib.contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Let whoever makes a session make it with the profiler on; its trace goes to the folder.

    So it is the runtime's own choice of optimisations that is profiled, not a copy of it here.
    """
    import onnxruntime

    original = onnxruntime.SessionOptions

    def options() -> Any:
        made = original()
        made.enable_profiling = True
        made.profile_file_prefix = str(folder / "trace")
        return made

    onnxruntime.SessionOptions = options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = original
