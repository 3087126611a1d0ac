"""A deserialised engine, and what TensorRT for RTX compiled for it, kept for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import (
    FEATURES,
    FLOAT_INPUT,
    OUTPUTS,
    UINT8_INPUT,
    sidecar_path,
)
from efficientface_deploy.backends.tensorrt.library import first_line, make_logger, version_of
from efficientface_deploy.errors import ArtifactError, BackendError, EfficientFaceError
from efficientface_deploy.files import atomic_path
from efficientface_deploy.spec import ModelSpec

_log = logging.getLogger(__name__)


class Engine:
    """A deserialised plan, and the library's objects that must outlive it.

    Args:
        module: TensorRT or TensorRT for RTX.
        path: The plan.
        rebuild: What to do when it cannot be loaded.
        wrong_gpu: The error to raise when the library says that it was built for other GPUs.
        binding: What kernels that the library compiles for it belong to: engine, release, GPU.

    Attributes:
        input_name: ``image`` or, for an engine of a ``--float-input`` graph, ``input``.
        feature_size: Length of its features; None where it does not give them.
        memory_bytes: What a context needs for its intermediate results.
        captures_itself: Whether a context can be told to capture its own CUDA graphs.

    Raises:
        ArtifactError: The library does not load this plan.
        BackendError: The library cannot start on this machine.
    """

    def __init__(
        self,
        module: Any,
        path: Path,
        rebuild: str,
        wrong_gpu: ArtifactError,
        binding: Mapping[str, str],
    ) -> None:
        self.path = path
        self._module = module
        self._rebuild = rebuild
        self.logger = make_logger(module)
        try:
            self._runtime: Any = module.Runtime(self.logger)
            content = path.read_bytes()
            self._check_validity(content, wrong_gpu)
            self.plan: Any = self._runtime.deserialize_cuda_engine(content)
        except (RuntimeError, TypeError) as error:  # "factory function returned nullptr"
            raise self.failure("start", self.logger.first_error() or first_line(error)) from None
        if self.plan is None:
            raise self._not_loaded()
        if not hasattr(self.plan, "device_memory_size_v2"):  # it came with TensorRT 10.1
            raise self.failure("be 10.3 or newer", f"version {version_of(module)}")
        self.memory_bytes = max(int(self.plan.device_memory_size_v2), 1)
        self._tensors = [self.plan.get_tensor_name(i) for i in range(self.plan.num_io_tensors)]
        self.input_name = FLOAT_INPUT if FLOAT_INPUT in self._tensors else UINT8_INPUT
        self.feature_size: int | None = None
        if FEATURES in self._tensors:
            self.feature_size = (0, *self.plan.get_tensor_shape(FEATURES))[-1]
        self._config: Any = None
        self._cache: RuntimeCache | None = None
        self._user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self.plan, "create_runtime_config"):
            self._config = self.plan.create_runtime_config()
            if self._config is None:
                raise self.failure("create a runtime configuration")
            self._config.set_execution_context_allocation_strategy(self._user_managed)
            if hasattr(self._config, "create_runtime_cache"):
                self._cache = RuntimeCache(self._config, cache_path(path), binding)
        self.captures_itself = hasattr(self._config, "cuda_graph_strategy")

    def _check_validity(self, content: bytes, wrong_gpu: ArtifactError) -> None:
        """Ask TensorRT for RTX whether it can run this plan here; its header says enough."""
        if not hasattr(self._runtime, "get_engine_validity"):  # TensorRT, and RTX before 1.1
            return
        header = content[: self._runtime.engine_header_size]
        validity, causes = self._runtime.get_engine_validity(header)
        if validity != self._module.EngineValidity.INVALID:
            if validity == self._module.EngineValidity.SUBOPTIMAL:
                _log.info("%s: built for another GPU, and slower here", self.path)
            return
        kinds = self._module.EngineInvalidityDiagnostics
        if causes & int(kinds.UNSUPPORTED_CC):
            raise wrong_gpu
        names = [name for name, bit in kinds.__members__.items() if causes & int(bit)]
        reason = ", ".join(name.lower().replace("_", " ") for name in names)
        if causes & (int(kinds.VERSION_MISMATCH) | int(kinds.MALFORMED_ENGINE)):
            raise self._refused(reason)
        raise self.failure("load an engine", self.logger.first_error() or reason)

    def _not_loaded(self) -> EfficientFaceError:
        reason = self.logger.first_error() or "no reason given"
        if "cudaError" in reason or "Cuda Runtime" in reason:
            return self.failure("load an engine", reason)
        return self._refused(reason)

    def _refused(self, reason: str) -> ArtifactError:
        library = f"{self._module.__name__} {version_of(self._module)}"
        expected, found = f"a plan that {library} can load here", f"one that it refuses ({reason})"
        return ArtifactError(self.path, expected, found, self._rebuild)

    def failure(self, action: str, reason: str = "") -> BackendError:
        """The error for a call that failed on this machine."""
        found = reason or self.logger.first_error() or "a failure without a reason"
        fix = "check the GPU and its driver with nvidia-smi, or load the .onnx file instead"
        return BackendError(self.path.name, f"{self._module.__name__} to {action}", found, fix)

    def new_context(self, memory: int, *, graphs: bool) -> Any:
        """An execution context.

        Args:
            memory: Address of ``memory_bytes`` on the device, which contexts that never run at
                the same time may share.
            graphs: Whether it captures CUDA graphs itself, where it can.

        Raises:
            BackendError: It cannot be made, usually for lack of GPU memory.
        """
        if self.captures_itself:
            strategies = self._module.CudaGraphStrategy
            self._config.cuda_graph_strategy = (
                strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
            )
        # No name of its own for the configuration: an error's traceback would keep it from close().
        context = self.plan.create_execution_context(self._config or self._user_managed)
        if context is None:
            raise self.failure("create an execution context")
        context.set_device_memory(memory, self.memory_bytes)
        return context

    def keep_kernels(self) -> None:
        """Keep what the library compiled until now, if it is one that compiles."""
        if self._cache is not None:
            self._cache.keep()

    def close(self) -> None:
        """Release the library's objects, each before the one that it came from.

        Its contexts are to be released before.
        """
        self._config = None
        self._cache = None
        self.plan = None
        self._runtime = None

    def input_shape(self) -> tuple[int, ...]:
        """The largest, by the optimisation profile: (max_batch, ...)."""
        _, _, largest = self.plan.get_tensor_profile_shape(self.input_name, 0)
        return tuple(largest)

    def check_signature(self, spec: ModelSpec) -> None:
        """Refuse a plan whose tensors are not those that its sidecar promises.

        Raises:
            ArtifactError: Other names, types or shapes.
        """
        side, classes = spec.input_size, spec.num_classes
        types = self._module.DataType
        inputs = {
            UINT8_INPUT: (types.UINT8, (side, side, 3)),
            FLOAT_INPUT: (types.FLOAT, (3, side, side)),
        }
        wanted: dict[str, Any] = {self.input_name: inputs[self.input_name]}
        wanted |= {name: (types.FLOAT, (classes,)) for name in OUTPUTS}
        if self.feature_size is not None:
            wanted[FEATURES] = (types.FLOAT, (max(self.feature_size, 1),))
        found = {
            name: (self.plan.get_tensor_dtype(name), tuple(self.plan.get_tensor_shape(name))[1:])
            for name in self._tensors
        }
        if found != wanted:
            described = (f"{name} {kind} {shape}" for name, (kind, shape) in found.items())
            tensors = f"{side}x{side} image to {classes} logits and probabilities"
            expected = f"{tensors}, as {sidecar_path(self.path).name} says"
            raise ArtifactError(self.path, expected, "; ".join(described)[:200], self._rebuild)


def cache_path(engine: Path) -> Path:
    """``model.rtx.engine`` -> ``model.rtx.engine.cache``."""
    return Path(f"{engine}.cache")


class RuntimeCache:
    """The library's cache of compiled kernels, and its file.

    The file is a convenience: one that cannot be read or written, is damaged, or belongs to
    another engine, release or GPU is passed over with a line in the log. It holds code for the
    GPU, as the engine does, and is trusted as much: keep both where only you can write.

    Args:
        config: The ``IRuntimeConfig`` that contexts are made with.
        path: The file.
        binding: What the kernels belong to: engine, release, GPU.
    """

    def __init__(self, config: Any, path: Path, binding: Mapping[str, str]) -> None:
        self._path = path
        self._binding = dict(binding)
        self._kept = self._read()
        self._cache = config.create_runtime_cache()
        if self._cache is None:
            _log.info("%s: not used, since TensorRT for RTX makes no cache", path)
            return
        if self._kept and not self._cache.deserialize(self._kept):
            _log.info("%s: ignored, since TensorRT for RTX does not take it here", path)
            self._kept = b""
        if not config.set_runtime_cache(self._cache):
            _log.info("%s: not used, since TensorRT for RTX does not take the cache", path)

    def keep(self) -> None:
        """Write the file, if there is anything new to keep."""
        if self._cache is None:
            return
        try:
            serialised = self._cache.serialize()
            content = b"" if serialised is None else bytes(serialised)
            if content and content != self._kept:
                head = json.dumps(self._head(content)).encode()
                with atomic_path(self._path) as temporary:
                    temporary.write_bytes(head + b"\n" + content)
                self._kept = content
        except (OSError, RuntimeError) as error:
            _log.info("%s: not kept (%s)", self._path, error)

    def _read(self) -> bytes:
        """The kernels in the file; empty where there is none that fits."""
        try:
            head, _, content = self._path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return b""
        except OSError as error:
            _log.info("%s: ignored (%s)", self._path, error)
            return b""
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(head) == self._head(content):
                return content
        damage = "damaged or of another engine, release or GPU"
        _log.info("%s: ignored, since it is %s", self._path, damage)
        return b""

    def _head(self, content: bytes) -> dict[str, str]:
        """First line of the file: what the kernels belong to, and their own hash."""
        return {**self._binding, "sha256": hashlib.sha256(content).hexdigest()}
