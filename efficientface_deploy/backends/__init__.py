"""The registry of backends: one row says all that the rest of the package knows of one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path

from efficientface_deploy.backends.base import Backend, BackendOptions, Output, broken_package
from efficientface_deploy.errors import ArtifactError, BackendError

__all__ = [
    "REGISTRY",
    "Backend",
    "BackendOptions",
    "Entry",
    "Output",
    "create_backend",
    "missing_reason",
    "resolve_backend",
]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A backend as the registry knows it, before anything of it is imported.

    Attributes:
        module: Module of the class, relative to this package.
        class_name: The class.
        suffixes: Endings of the files it runs, longest first where one contains another.
        requires: Alternatives of top-level packages, one of which must be installed.
        extra: What to install, as ``pip install 'efficientface-deploy[extra]'``.
        devices: Values allowed after the colon; the first is the default.
    """

    module: str
    class_name: str
    suffixes: tuple[str, ...]
    requires: tuple[str, ...]
    extra: str
    devices: tuple[str, ...] = ()


REGISTRY: dict[str, Entry] = {
    "onnx": Entry(
        "onnx",
        "OnnxBackend",
        (".onnx",),
        ("onnxruntime",),
        "cpu",
        ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino"),
    ),
    "trt-rtx": Entry(
        "tensorrt.backend", "TensorRTRTXBackend", (".rtx.engine",), ("tensorrt_rtx",), "trt-rtx"
    ),
    "trt": Entry("tensorrt.backend", "TensorRTBackend", (".engine",), ("tensorrt",), "trt"),
    "torch": Entry(
        "torch",
        "TorchBackend",
        (".safetensors", ".pth.tar", ".tar", ".pth", ".pt"),
        ("torch",),
        "torch",
        ("cpu", "cuda"),
    ),
}


def resolve_backend(path: Path, requested: str = "auto") -> tuple[str, str]:
    """Choose the backend for a file.

    Args:
        path: The model file.
        requested: ``auto``, a name of the registry, or ``name:device``.

    Returns:
        Name and device; the device is empty when the request named none.

    Raises:
        BackendError: Unknown backend or device, or one that cannot run this kind of file.
        ArtifactError: No backend runs this kind of file.
    """
    by_suffix = next(
        (name for name, entry in REGISTRY.items() if path.name.endswith(entry.suffixes)), None
    )
    if requested == "auto":
        if by_suffix is None:
            raise ArtifactError(
                path,
                "a model file (" + ", ".join(_all_suffixes()) + ")",
                "a folder" if path.is_dir() else f"suffix {path.suffix or 'none'}",
                "give a file of one of these kinds; efficientface-export makes them",
            )
        return by_suffix, ""
    name, _, device = requested.partition(":")
    if name not in REGISTRY:
        raise BackendError(
            "backend", "auto, " + ", ".join(REGISTRY), repr(requested), "choose one of these"
        )
    entry = REGISTRY[name]
    if device and device not in entry.devices:
        choices = ", ".join(f"{name}:{known}" for known in entry.devices) or f"{name} alone"
        raise BackendError("backend", choices, repr(requested), "choose one of these")
    if by_suffix != name:
        raise BackendError(
            f"backend {name}",
            "a file that it runs (" + ", ".join(entry.suffixes) + ")",
            path.name,
            "leave the backend out, or give another file",
        )
    return name, device


def missing_reason(name: str) -> str | None:
    """Why a backend cannot be used here for want of a package; None when it is installed."""
    entry = REGISTRY[name]
    if any(importlib.util.find_spec(package) for package in entry.requires):
        return None
    return f"{' or '.join(entry.requires)} is not installed"


def create_backend(name: str, path: Path, options: BackendOptions) -> Backend:
    """Make the backend of a file, not yet open.

    Raises:
        BackendError: Its package is not installed, or does not work here.
    """
    entry = REGISTRY[name]
    install = f"pip install 'efficientface-deploy[{entry.extra}]'"
    if reason := missing_reason(name):
        raise BackendError(f"backend {name}", " or ".join(entry.requires), reason, install)
    try:
        module = importlib.import_module(f"{__name__}.{entry.module}")
    except ImportError as error:
        raise broken_package(f"backend {name}", error, install) from None
    backend_class: type[Backend] = getattr(module, entry.class_name)
    return backend_class(path, options)


def _all_suffixes() -> list[str]:
    return [suffix for entry in REGISTRY.values() for suffix in entry.suffixes]
