"""TensorRT's libraries: which are here, of what version, their logger, and the export's command."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.errors import BackendError, install_command

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Library:
    """One of NVIDIA's two libraries.

    Attributes:
        module: What to import.
        label: Its name for people.
        extra: What of ours brings it.
        elsewhere: What else brings it.
    """

    module: str
    label: str
    extra: str
    elsewhere: str = ""

    @property
    def install(self) -> str:
        """How to get it."""
        return install_command(self.extra) + self.elsewhere


LIBRARIES = {  # by the name of the backend and of --engine
    "trt": Library("tensorrt", "TensorRT", "trt", " (on Jetson: that of JetPack 6.1 or later)"),
    "trt-rtx": Library("tensorrt_rtx", "TensorRT for RTX", "trt-rtx"),
}


def load_library(kind: str) -> Any:
    """Import TensorRT or TensorRT for RTX, and refuse what is too old.

    Args:
        kind: ``trt`` or ``trt-rtx``.

    Returns:
        The module.

    Raises:
        BackendError: Not installed, its shared libraries are missing, or it is TensorRT 8.
    """
    library = LIBRARIES[kind]
    subject, wanted = f"backend {kind}", f"{library.label} ({library.module})"
    try:
        module = importlib.import_module(library.module)
    except ModuleNotFoundError as error:
        found = f"no module named {error.name}"
        raise BackendError(subject, wanted, found, library.install) from None
    except Exception as error:  # noqa: BLE001 - the bindings raise whatever their loader raises
        # The bindings are a wheel of their own and import the shared libraries by dlopen.
        found = f"bindings that cannot load ({first_line(error)})"
        raise BackendError(subject, wanted, found, library.install) from None
    flags = getattr(module, "NetworkDefinitionCreationFlag", None)
    if flags is None:
        found = f"a module {library.module} without its API"
        raise BackendError(subject, wanted, found, library.install)
    if not hasattr(flags, "STRONGLY_TYPED"):
        found = f"version {version_of(module)}, which cannot build strongly typed networks"
        fix = f"update it: {library.install}"
        raise BackendError(subject, f"{library.label} 10 or newer", found, fix)
    return module


# Compute capabilities that TensorRT serves and TensorRT for RTX passes over, and whose they are.
_TENSORRT_ALONE = {
    "sm87": "Jetson Orin",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm103": "B300",
    "sm110": "Jetson Thor",
}


def check_gpu(module: Any, kind: str, gpu: str) -> None:
    """Refuse a GPU that the library serves with no engine, however built.

    TensorRT builds for whatever GPU it finds. TensorRT for RTX names those that it builds for; its
    default engines also run on what is newer than all of these.

    Args:
        module: What :func:`load_library` returned.
        kind: ``trt`` or ``trt-rtx``.
        gpu: Its compute capability, e.g. ``sm86``.

    Raises:
        BackendError: The GPU is none of them.
    """
    served = compute_capabilities(module)
    if not served or gpu in served or sm_number(gpu) > sm_number(served[-1]):
        return
    expected = f"a GPU that {LIBRARIES[kind].label} serves ({', '.join(served)})"
    found = f"{gpu} ({_TENSORRT_ALONE[gpu]})" if gpu in _TENSORRT_ALONE else gpu
    fix = (
        f"use TensorRT there: {LIBRARIES['trt'].install}, and efficientface-export --engine trt; "
        "or load the .onnx file"
    )
    raise BackendError(f"backend {kind}", expected, found, fix)


def compute_capabilities(module: Any) -> list[str]:
    """The GPUs that TensorRT for RTX names, oldest first; none for TensorRT."""
    kinds = getattr(module, "ComputeCapability", None)
    names = (name.lower() for name in (kinds.__members__ if kinds else ()))
    return sorted((name for name in names if name.startswith("sm")), key=sm_number)


def sm_number(gpu: str) -> int:
    """``sm86`` and ``sm121+`` as numbers to compare; anything else is above every GPU."""
    digits = gpu.removeprefix("sm").removesuffix("+")
    return int(digits) if digits.isdecimal() else 1_000_000


def version_of(module: Any) -> str:
    """The library's version as it states it, e.g. ``10.3.0``."""
    return str(getattr(module, "__version__", "unknown"))


def make_logger(module: Any) -> Any:
    """An ``ILogger`` that keeps what the library says instead of printing it.

    Args:
        module: What :func:`load_library` returned.

    Returns:
        A logger with ``records``, a list of (level, message) with a level of :mod:`logging`, and
        ``first_error()``, the first line that says what went wrong, or an empty string.
    """
    base: Any = module.ILogger
    severities = {base.INTERNAL_ERROR: logging.ERROR, base.ERROR: logging.ERROR}
    severities |= {base.WARNING: logging.WARNING, base.INFO: logging.INFO}

    class Collector(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.records: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            level = severities.get(severity, logging.DEBUG)
            self.records.append((level, message))
            _log.debug("%s", message)  # an error is raised by its caller, in one line

        def first_error(self) -> str:
            errors = [message for level, message in self.records if level == logging.ERROR]
            causes = [message for message in errors if not is_echo(message)] or errors
            return first_line(causes[0]) if causes else ""

    return Collector()


def is_echo(message: str) -> bool:
    """Whether a line of the log only says that there is no GPU, after an error of another cause.

    TensorRT for RTX adds it to every error on a machine without one.
    """
    return "catchCudaError" in message


def rebuild_command(
    kind: str,
    weights: Path,
    max_batch: int,
    *,
    precision: str,
    compute_capabilities: Sequence[str] = (),
    out: Path | None = None,
) -> str:
    """The command line that builds an engine again.

    Args:
        kind: ``trt`` or ``trt-rtx``.
        weights: The ONNX file that it was built from.
        max_batch: Largest batch.
        precision: The engine's.
        compute_capabilities: Targets, for ``trt-rtx``; empty for its default.
        out: Folder of an engine that the new one is to replace.
    """
    words = ["efficientface-export", "--weights", str(weights), "--engine", kind]
    words += ["--max-batch", str(max_batch)]
    if precision == "fp32":
        # An engine of an FP32 file is FP16 unless it is said; other files say it themselves.
        words += ["--precision", precision]
    if compute_capabilities:
        words += ["--compute-capability", ",".join(compute_capabilities)]
    if out is not None:
        words += ["--out", str(out), "--overwrite"]
    return shlex.join(words)


def first_line(message: object) -> str:
    """What a library says first, or the class of an error that says nothing."""
    lines = str(message).strip().splitlines()
    return lines[0][:240] if lines else type(message).__name__
