"""The registry of backends: one row says all that the rest of the package knows of one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

from efficientface_deploy.artifact import (
    CHECKPOINT_SUFFIXES,
    ENGINE_SUFFIX,
    ONNX_SUFFIX,
    RTX_ENGINE_SUFFIX,
)
from efficientface_deploy.backends.base import Backend, BackendOptions, import_package
from efficientface_deploy.errors import ArtifactError, BackendError, install_command


@dataclasses.dataclass(frozen=True)
class Entry:
    """A backend as the registry knows it, before anything of it is imported.

    Attributes:
        module: Module of the class, relative to this package.
        class_name: The class.
        suffixes: Endings of the files it runs, longest first where one contains another.
        package: What must be installed; empty where nothing must.
        extra: What of ours to install.
        devices: Values allowed after the colon; the first is the default.
    """

    module: str
    class_name: str
    suffixes: tuple[str, ...]
    package: str
    extra: str
    devices: tuple[str, ...] = ()


_ONNX_DEVICES = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino", "openvino-bf16")

REGISTRY: dict[str, Entry] = {
    "onnx": Entry("onnx", "OnnxBackend", (ONNX_SUFFIX,), "onnxruntime", "cpu", _ONNX_DEVICES),
    "trt-rtx": Entry(
        "tensorrt.backend", "TensorRTRTXBackend", (RTX_ENGINE_SUFFIX,), "tensorrt_rtx", "trt-rtx"
    ),
    "trt": Entry("tensorrt.backend", "TensorRTBackend", (ENGINE_SUFFIX,), "tensorrt", "trt"),
    "torch": Entry("torch", "TorchBackend", CHECKPOINT_SUFFIXES, "torch", "torch", ("cpu", "cuda")),
    # No file but a URL; its gRPC asks for its package itself.
    "triton": Entry("triton", "TritonBackend", (), "", "triton"),
}

_TRITON_URL = re.compile(r"triton(\+[a-z]+)?:([/\\]|$)")  # a path has one of its slashes


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
    kind = next((name for name, row in REGISTRY.items() if path.name.endswith(row.suffixes)), None)
    if _TRITON_URL.match(str(path)):
        kind = "triton"
    if requested == "auto":
        if kind is None:
            suffixes = [suffix for entry in REGISTRY.values() for suffix in entry.suffixes]
            raise ArtifactError(
                path,
                "a model file (" + ", ".join(suffixes) + "), or triton://host:port/model",
                "a folder" if os.path.isdir(path) else f"suffix {path.suffix or 'none'}",
                "give a file of one of these kinds; efficientface-export makes them",
            )
        return kind, ""
    name, _, device = requested.partition(":")
    if name not in REGISTRY:
        names = "auto, " + ", ".join(REGISTRY)
        raise BackendError("backend", names, repr(requested), "choose one of these")
    entry = REGISTRY[name]
    if device and device not in entry.devices:
        choices = ", ".join(f"{name}:{known}" for known in entry.devices) or f"{name} alone"
        raise BackendError("backend", choices, repr(requested), "choose one of these")
    if kind != name:
        kinds = entry.suffixes or ("triton://host:port/model",)
        wanted = "a file that it runs (" + ", ".join(kinds) + ")"
        fix = "leave the backend out, or give another file"
        raise BackendError(f"backend {name}", wanted, path.name, fix)
    return name, device


def missing_reason(name: str) -> str | None:
    """Which package a backend lacks here, as a sentence; None when it is installed."""
    package = REGISTRY[name].package
    there = not package or importlib.util.find_spec(package)
    return None if there else f"{package} is not installed"


def create_backend(name: str, path: Path, options: BackendOptions) -> Backend:
    """Make the backend of a file, not yet open.

    Raises:
        BackendError: Its package is not installed, or does not work here.
    """
    entry = REGISTRY[name]
    subject = f"backend {name}"
    if reason := missing_reason(name):
        raise BackendError(subject, entry.package, reason, install_command(entry.extra))
    wanted = "a library that can be imported"
    module = import_package(f"{__name__}.{entry.module}", subject, wanted, entry.extra)
    backend_class: type[Backend] = getattr(module, entry.class_name)
    return backend_class(path, options)
