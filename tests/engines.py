"""Engines for tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficientface_deploy.backends.tensorrt.cuda import open_cuda
from efficientface_deploy.backends.tensorrt.library import check_gpu, load_library
from efficientface_deploy.errors import BackendError
from efficientface_export.graph.io import read_onnx
from efficientface_export.tensorrt.builder import available, build_engine
from efficientface_export.tensorrt.options import EngineKind


def write_engine(
    onnx_path: Path, out_path: Path, kind: EngineKind, *options: Any, **keywords: Any
) -> Path:
    """Build an engine of an ONNX file, and write it with its sidecar; gives ``out_path``."""
    graph, spec, provenance = read_onnx(onnx_path)[:3]
    folder = out_path.parent
    engine = build_engine(onnx_path, kind, *options, graph=graph, folder=folder, **keywords)
    engine.write(out_path, spec, provenance)
    return out_path


def unusable(kind: EngineKind) -> str | None:
    """Why engines cannot be built here and run on the GPU that is here; None when they can."""
    if reason := available(kind):
        return reason
    try:
        check_gpu(load_library(kind), kind, open_cuda().compute_capability())
    except BackendError as error:
        return str(error)
    return None
