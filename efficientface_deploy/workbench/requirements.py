"""Packages that may be missing: one line that names the extra, instead of a traceback."""

from __future__ import annotations

import importlib.util

from efficientface_deploy.errors import BackendError, install_command

# Module: what it is for, and the extra that brings it.
_EXTRAS = {
    "onnx": ("to read and write ONNX files", "engine"),
    "onnxruntime": ("to measure ranges for FP16 and INT8", "cpu"),
    "onnxscript": ("to trace a checkpoint to ONNX", "export"),
    "playwright": ("to drive Chromium", "dev"),
    "rich": ("to draw tables", "bench"),
    "matplotlib": ("to draw plots", "bench"),
    "pyarrow": ("to read and write Parquet files", "batch"),
    "ray": ("to work on a cluster", "ray"),
    "MNN": ("to compare with", "peers"),
    "ncnn": ("to compare with", "peers"),
    "openvino": ("to compare with", "peers"),
    "pnnx": ("to compare with", "peers"),
    "torch": ("to train, and to export a checkpoint", "torch"),
    "torchvision": ("to train, and to compare with", "torch"),
}


def is_installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def missing_reason(*modules: str) -> str | None:
    """``no MNN and no pnnx here; pip install ...``; None where all are installed."""
    missing = [module for module in modules if not is_installed(module)]
    if not missing:
        return None
    extras = ",".join(dict.fromkeys(_EXTRAS[module][1] for module in missing))
    return f"no {' and no '.join(missing)} here; {install_command(extras)}"


def require_package(module: str, subject: str = "efficientface-export") -> None:
    """Make sure that an optional package is installed.

    Args:
        module: One of the table above.
        subject: Who asks for it.

    Raises:
        BackendError: It is not installed; the error names the extra to install.
    """
    if not is_installed(module):
        purpose, extra = _EXTRAS[module]
        expected = f"{module.replace('_', '-')}, {purpose}"
        raise BackendError(subject, expected, "it is not installed", install_command(extra))
