"""Fixtures of the suite: markers, shared reference data, small spec and images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from efficientface_deploy.spec import ModelSpec, preset

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason()
    for item in items:
        if item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_reason() -> str | None:
    try:
        import torch
    except ImportError:
        return "needs PyTorch to look for a GPU"
    return None if torch.cuda.is_available() else "needs an NVIDIA GPU; this machine has none"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the published network's reference values and FER+, not in the repository."""
    folder = Path(os.environ.get("EFFICIENTFACE_SHARED", ROOT.parent / "shared"))
    if not (folder / "reference").is_dir():
        pytest.skip("needs reference data: set EFFICIENTFACE_SHARED to the folder that holds it")
    return folder


@pytest.fixture
def spec() -> ModelSpec:
    """A small colour spec with seven labels."""
    return preset("rafdb").replace(input_size=64, name="test")


@pytest.fixture
def photo() -> np.ndarray:
    """A real photograph's face region: Eileen Collins, NASA, public domain; uint8 RGB."""
    data = pytest.importorskip("skimage.data")
    return np.ascontiguousarray(data.astronaut()[20:200, 130:310])
