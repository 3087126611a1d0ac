"""TensorRT 10 and 11, and TensorRT for RTX 1.x: one code path over two libraries.

Only calls that all of them have are made; what differs is asked of the library, not of its
version. Everything that can be known to fail is refused before a plan is deserialised, with the
command that builds it anew: an engine belongs to a library version and to a kind of GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import (
    FLOAT_INPUT,
    OUTPUTS,
    UINT8_INPUT,
    read_sidecar,
    sidecar_path,
)
from efficientface_deploy.backends.base import Backend, BackendOptions, DeviceImages, Output
from efficientface_deploy.backends.cuda import open_cuda
from efficientface_deploy.backends.device_array import DeviceArray
from efficientface_deploy.backends.runtime_cache import RuntimeCache, cache_path
from efficientface_deploy.backends.session import Session
from efficientface_deploy.errors import ArtifactError, BackendError, EfficientFaceError
from efficientface_deploy.preprocess import UInt8Array
from efficientface_deploy.spec import ModelSpec

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Library:
    """One of NVIDIA's two libraries.

    Attributes:
        kind: Name of the backend and of ``--engine``.
        module: What to import.
        label: Its name for people.
        install: How to get it.
    """

    kind: str
    module: str
    label: str
    install: str


LIBRARIES = {
    "trt": Library(
        "trt",
        "tensorrt",
        "TensorRT",
        "pip install 'efficientface-deploy[trt]' (on Jetson: that of JetPack 6.1 or later)",
    ),
    "trt-rtx": Library(
        "trt-rtx",
        "tensorrt_rtx",
        "TensorRT for RTX",
        "pip install 'efficientface-deploy[trt-rtx]'",
    ),
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
    try:
        module = importlib.import_module(library.module)
    except ModuleNotFoundError as error:
        raise _no_library(library, f"no module named {error.name}") from None
    except Exception as error:  # noqa: BLE001 - the bindings raise whatever their loader raises
        # The bindings are a wheel of their own and import the shared libraries by dlopen.
        raise _no_library(library, f"bindings that cannot load ({_first_line(error)})") from None
    flags = getattr(module, "NetworkDefinitionCreationFlag", None)
    if flags is None:
        raise _no_library(library, f"a module {library.module} without its API")
    if not hasattr(flags, "STRONGLY_TYPED"):
        raise BackendError(
            f"backend {kind}",
            expected=f"{library.label} 10 or newer",
            found=f"version {version_of(module)}, which cannot build strongly typed networks",
            fix=f"update it: {library.install}",
        )
    return module


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
            return _first_line(causes[0]) if causes else ""

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
    """The command line that builds an engine anew.

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


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """What an engine's sidecar says of its making.

    Attributes:
        library: Module that built it.
        version: That module's version.
        compute_capabilities: GPUs it runs on: ``sm86``, or ``sm80+`` for that and newer.
        parent: Name of the ONNX file.
        max_batch: Largest batch.
    """

    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    parent: str
    max_batch: int

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any], path: Path) -> EngineRecord:
        """Read the record back.

        Args:
            provenance: As :func:`artifact.read_sidecar` returns it.
            path: The engine, for the error.

        Raises:
            ArtifactError: A field is missing or of another type.
        """
        fields = provenance["engine"]
        try:
            record = cls(
                library=fields["library"],
                version=fields["version"],
                compute_capabilities=tuple(fields["compute_capabilities"]),
                parent=Path(fields["parent"]).name,  # a name, whatever was written there
                max_batch=fields["max_batch"],
            )
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"no usable engine record ({_first_line(error)})") from None
        texts = (record.library, record.version, *record.compute_capabilities)
        if not all(isinstance(text, str) for text in texts) or type(record.max_batch) is not int:
            raise _damaged(path, "an engine record with values of another type")
        return record

    def covers(self, compute_capability: str) -> bool:
        """Whether the engine was built for a GPU of this compute capability."""
        for built in self.compute_capabilities:
            if built == compute_capability:
                return True
            if built.endswith("+") and _number(compute_capability) >= _number(built):
                return True
        return False

    def runs_with(self, version: str) -> bool:
        """Whether a library of this version may load it.

        Another major or minor release never does. Whether another patch release does is the
        library's to say, and it says so when it deserialises the plan.
        """
        return _release(self.version) == _release(version)


class TensorRTBackend(Backend):
    """Runs ``*.engine`` files with TensorRT 10 or 11.

    The engine runs on the GPU that is current when the backend is opened. ``infer`` may be called
    from several threads, which take turns: an execution context serves one at a time. It takes
    arrays on that GPU where they are (see :mod:`device_array`). ``threads`` has no meaning here.
    """

    kind = "trt"

    def __init__(self, path: Path, options: BackendOptions) -> None:
        super().__init__(path, options)
        self._turn = threading.Lock()
        self._session: Session | None = None
        self._precision = ""

    def _open(self) -> None:
        spec, provenance = read_sidecar(self.path)
        record = EngineRecord.from_provenance(provenance, self.path)
        self._precision = str(provenance.get("precision", ""))
        self._check_kind(record)
        module = load_library(self.kind)
        self._check_version(record, version_of(module))
        cuda = open_cuda()
        gpu = cuda.compute_capability()
        self._check_device(record, gpu)
        binding = {
            "engine": provenance["engine"]["sha256"],
            "library": f"{module.__name__} {version_of(module)}",
            "gpu": gpu,
        }
        with cuda.active():
            engine = Engine(module, self.path, self._rebuild(record), binding)
            self._session = Session(engine, spec, cuda, graphs=self.options.cuda_graphs)
        self.spec, self.provenance = spec, provenance
        self.max_batch = self._session.max_batch
        self.name = self.kind

    def _check_kind(self, record: EngineRecord) -> None:
        wanted = LIBRARIES[self.kind]
        if record.library != wanted.module:
            raise ArtifactError(
                self.path,
                expected=f"an engine of {wanted.label}",
                found=f"one built by {record.library} {record.version}",
                fix="keep the ending that the exporter gave it (.engine or .rtx.engine)",
            )

    def _check_version(self, record: EngineRecord, here: str) -> None:
        if not record.runs_with(here):
            label = LIBRARIES[self.kind].label
            raise ArtifactError(
                self.path,
                expected=f"an engine built with {label} {_release(here)}, which is here",
                found=f"one built with {record.version}",
                fix=self._rebuild(record),
            )

    def _check_device(self, record: EngineRecord, here: str) -> None:
        if not record.covers(here):
            raise ArtifactError(
                self.path,
                expected=f"an engine built for {here}, the GPU that is here",
                found="one built for " + ", ".join(record.compute_capabilities),
                fix=self._rebuild(record, here),
            )

    def _rebuild(self, record: EngineRecord, here: str | None = None) -> str:
        """The instruction that builds this engine anew, for GPU ``here`` if one is given.

        TensorRT always builds for the GPU it finds; its RTX sibling is told, or builds for all
        that are supported by default.
        """
        targets = [here] if here else [*record.compute_capabilities]
        if self.kind == "trt" or any(target.endswith("+") for target in targets):
            targets = []
        weights = self.path.parent / record.parent
        command = rebuild_command(
            self.kind,
            weights,
            record.max_batch,
            precision=self._precision,
            compute_capabilities=targets,
            out=self.path.parent,
        )
        copy = "" if weights.is_file() else f"copy {record.parent} beside it and "
        return f"{copy}rebuild it here: {command}"

    def _take(self, images: DeviceArray) -> DeviceImages:
        with self._turn:
            return self._opened().take(images)

    def _infer(self, images: UInt8Array | DeviceImages) -> Output:
        with self._turn:
            return self._opened().run(images)

    def _opened(self) -> Session:
        if self._session is None:  # closed by another thread since infer() looked
            raise BackendError(
                self.path.name,
                expected="an open backend",
                found="a closed one",
                fix="wait for other threads before close()",
            )
        return self._session

    def _close(self) -> None:
        with self._turn:
            session, self._session = self._session, None
            if session is not None:
                session.close()


class TensorRTRTXBackend(TensorRTBackend):
    """Runs ``*.rtx.engine`` files with TensorRT for RTX 1.x."""

    kind = "trt-rtx"


class Engine:
    """A deserialised plan, and the library's objects that must outlive it.

    Args:
        module: TensorRT or TensorRT for RTX.
        path: The plan.
        rebuild: What to do when it cannot be loaded.
        binding: What kernels that the library compiles for it belong to: engine, release, GPU.

    Attributes:
        memory_bytes: What a context needs for its intermediate results.
        captures_itself: Whether a context can be told to record its own CUDA graphs.

    Raises:
        ArtifactError: The library does not load this plan.
        BackendError: The library cannot start on this machine.
    """

    def __init__(self, module: Any, path: Path, rebuild: str, binding: Mapping[str, str]) -> None:
        self.module = module
        self.path = path
        self.rebuild = rebuild
        self.logger = make_logger(module)
        try:
            self._runtime = module.Runtime(self.logger)
            self.plan: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        except (RuntimeError, TypeError) as error:  # "factory function returned nullptr"
            raise self.failure("start", _first_line(error)) from None
        if self.plan is None:
            raise self._not_loaded()
        if not hasattr(self.plan, "device_memory_size_v2"):  # it came with TensorRT 10.1
            raise self.failure("be 10.3 or newer", f"version {version_of(module)}")
        self.memory_bytes = max(int(self.plan.device_memory_size_v2), 1)
        self._config: Any = None
        self._cache: RuntimeCache | None = None
        if hasattr(self.plan, "create_runtime_config"):
            self._config = self.plan.create_runtime_config()
            if self._config is None:
                raise self.failure("create a runtime configuration")
            self._config.set_execution_context_allocation_strategy(self._user_managed)
            if hasattr(self._config, "create_runtime_cache"):
                self._cache = RuntimeCache(self._config, cache_path(path), binding)
        self.captures_itself = hasattr(self._config, "cuda_graph_strategy")

    @property
    def _user_managed(self) -> Any:
        return self.module.ExecutionContextAllocationStrategy.USER_MANAGED

    def _not_loaded(self) -> EfficientFaceError:
        reason = self.logger.first_error() or "no reason given"
        if "cudaError" in reason or "Cuda Runtime" in reason:
            return self.failure("load an engine", reason)
        return ArtifactError(
            self.path,
            expected=f"a plan that {self.module.__name__} {version_of(self.module)} can load here",
            found=f"one that it refuses ({reason})",
            fix=self.rebuild,
        )

    def failure(self, action: str, reason: str = "") -> BackendError:
        """The error for a call that failed on this machine."""
        return BackendError(
            self.path.name,
            expected=f"{self.module.__name__} to {action}",
            found=reason or self.logger.first_error() or "a failure without a reason",
            fix="check the GPU and its driver with nvidia-smi, or load the .onnx file instead",
        )

    def new_context(self, memory: int, *, graphs: bool) -> Any:
        """An execution context.

        Args:
            memory: Address of ``memory_bytes`` on the device, which contexts that never run at
                the same time may share.
            graphs: Whether it records CUDA graphs itself, where it can.

        Raises:
            BackendError: It cannot be made, usually for want of GPU memory.
        """
        if self.captures_itself:
            strategies = self.module.CudaGraphStrategy
            self._config.cuda_graph_strategy = (
                strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
            )
        how = self._user_managed if self._config is None else self._config
        context = self.plan.create_execution_context(how)
        if context is None:
            raise self.failure("create an execution context")
        context.set_device_memory(memory, self.memory_bytes)
        return context

    def keep_kernels(self) -> None:
        """Keep what the library compiled until now, if it is one that compiles."""
        if self._cache is not None:
            self._cache.keep()

    def input_name(self) -> str:
        """``image`` or, for an engine of a ``--float-input`` graph, ``input``."""
        names = [self.plan.get_tensor_name(i) for i in range(self.plan.num_io_tensors)]
        return FLOAT_INPUT if FLOAT_INPUT in names else UINT8_INPUT

    def check_signature(self, spec: ModelSpec) -> None:
        """Refuse a plan whose tensors are not those that its sidecar promises.

        Raises:
            ArtifactError: Other names, types or shapes.
        """
        side, classes = spec.input_size, spec.num_classes
        types = self.module.DataType
        inputs = {
            UINT8_INPUT: (types.UINT8, (side, side, 3)),
            FLOAT_INPUT: (types.FLOAT, (3, side, side)),
        }
        name = self.input_name()
        expected = {name: inputs[name]} | {output: (types.FLOAT, (classes,)) for output in OUTPUTS}
        names = [self.plan.get_tensor_name(i) for i in range(self.plan.num_io_tensors)]
        found = {
            tensor: (
                self.plan.get_tensor_dtype(tensor),
                tuple(self.plan.get_tensor_shape(tensor))[1:],
            )
            for tensor in names
        }
        if found != expected:
            described = (f"{tensor} {kind} {shape}" for tensor, (kind, shape) in found.items())
            raise ArtifactError(
                self.path,
                expected=f"{side}x{side} image to {classes} logits and probabilities, as "
                f"{sidecar_path(self.path).name} says",
                found="; ".join(described)[:200],
                fix=self.rebuild,
            )


def _no_library(library: Library, found: str) -> BackendError:
    return BackendError(
        f"backend {library.kind}",
        expected=f"{library.label} ({library.module})",
        found=found,
        fix=library.install,
    )


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        sidecar_path(path),
        expected="the library, version and GPUs that the engine was built with and for",
        found=found,
        fix="export the engine again",
    )


def _release(version: str) -> str:
    """Major and minor of a version: ``10.3.0.26`` -> ``10.3``."""
    return ".".join(version.split(".")[:2])


def _number(compute_capability: str) -> int:
    """``sm86`` and ``sm80+`` as numbers to compare; anything else is above every GPU."""
    digits = compute_capability.removeprefix("sm").removesuffix("+")
    return int(digits) if digits.isdecimal() else 1_000_000


def _first_line(message: object) -> str:
    lines = str(message).strip().splitlines()
    return lines[0][:240] if lines else type(message).__name__
