"""Fixtures of the backends' tests: an engine of the stand-in that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from mean_engine import write_plan
from tensorrt_stand_in import Library

from efficientface_deploy.spec import ModelSpec


@pytest.fixture
def engine(tmp_path: Path, spec: ModelSpec, library: Library) -> Path:
    """An engine's two files, of the library that is there."""
    path = tmp_path / "model.engine"
    write_plan(path, spec, library)
    (tmp_path / "model.onnx").write_bytes(b"the parent")
    return path


@pytest.fixture
def rtx_engine(tmp_path: Path, spec: ModelSpec, rtx_library: Library) -> Path:
    """The same of TensorRT for RTX."""
    path = tmp_path / "model.rtx.engine"
    write_plan(path, spec, rtx_library)
    return path
