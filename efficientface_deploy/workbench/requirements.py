"""One line for a package that is not installed, instead of a traceback."""

from __future__ import annotations

import importlib.util

from efficientface_deploy.errors import BackendError

# Module: what it is for, and the extra that brings it.
_PURPOSES = {
    "onnx": ("to read and write ONNX files", "engine"),
    "onnxconverter_common": ("to convert a graph to FP16", "engine"),
    "onnxruntime": ("to measure ranges for FP16 and INT8", "cpu"),
    "onnxscript": ("to trace a checkpoint to ONNX", "export"),
}


def is_installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require_package(module: str) -> None:
    """Make sure that an optional package is installed.

    Raises:
        BackendError: It is not; the error names the extra to install.
    """
    if is_installed(module):
        return
    purpose, extra = _PURPOSES[module]
    raise BackendError(
        "efficientface-export",
        f"{module.replace('_', '-')}, {purpose}",
        "it is not installed",
        f"pip install 'efficientface-deploy[{extra}]'",
    )
