"""TensorRT 10 and 11, and TensorRT for RTX 1.x: one code path over two libraries.

Only calls that all of them have are made; where they differ, the library is asked for its
attributes and not for its version. Everything that can be known to fail is refused before a plan
is deserialised, with the command that builds it again: an engine belongs to a library version and
to a kind of GPU.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import read_sidecar, sidecar_path
from efficientface_deploy.backends.base import (
    Backend,
    BackendOptions,
    DeviceArray,
    DeviceImages,
    Output,
)
from efficientface_deploy.backends.tensorrt.cuda import open_cuda
from efficientface_deploy.backends.tensorrt.engine import Engine
from efficientface_deploy.backends.tensorrt.library import (
    LIBRARIES,
    check_gpu,
    compute_capabilities,
    first_line,
    load_library,
    rebuild_command,
    sm_number,
    version_of,
)
from efficientface_deploy.backends.tensorrt.session import Session
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.probe import Probe
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """What an engine's sidecar says of its making.

    Attributes:
        library: Module that built it.
        version: That module's version.
        compute_capabilities: GPUs it runs on: ``sm86``, or ``sm121+`` for that and newer.
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
                fields["library"],
                fields["version"],
                tuple(fields["compute_capabilities"]),
                Path(fields["parent"]).name,  # a name, whatever was written there
                fields["max_batch"],
            )
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"no usable engine record ({first_line(error)})") from None
        texts = (record.library, record.version, *record.compute_capabilities)
        if not all(isinstance(text, str) for text in texts) or type(record.max_batch) is not int:
            raise _damaged(path, "an engine record with values of another type")
        return record

    def covers(self, compute_capability: str) -> bool:
        """Whether the engine was built for a GPU of this compute capability."""
        return any(
            built == compute_capability
            or (built.endswith("+") and sm_number(compute_capability) >= sm_number(built))
            for built in self.compute_capabilities
        )

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
        spec, provenance, probe = read_sidecar(self.path)
        self.probe = Probe.from_record(probe, sidecar_path(self.path), spec.num_classes)
        record = EngineRecord.from_provenance(provenance, self.path)
        self._precision = str(provenance.get("precision", ""))
        self._check_kind(record)
        module = load_library(self.kind)
        self._check_version(record, version_of(module))
        cuda = open_cuda()
        gpu = cuda.compute_capability()
        check_gpu(module, self.kind, gpu)
        wrong_gpu = self._wrong_gpu(record, gpu, module)
        if not record.covers(gpu):
            raise wrong_gpu
        binding = {
            "engine": provenance["engine"]["sha256"],
            "library": f"{module.__name__} {version_of(module)}",
            "gpu": gpu,
        }
        with cuda.active():
            engine = Engine(module, self.path, self._rebuild(record), wrong_gpu, binding)
            try:
                self._session = Session(engine, spec, cuda, graphs=self.options.cuda_graphs)
            except BaseException:
                engine.close()
                raise
        self.spec, self.provenance = spec, provenance
        self.max_batch = self._session.max_batch
        self.feature_size = engine.feature_size
        self.name = self.kind
        self.library = f"{module.__name__} {version_of(module)} on {gpu}"
        self.instead = self._rebuild(record, gpu)

    def _check_kind(self, record: EngineRecord) -> None:
        wanted = LIBRARIES[self.kind]
        if record.library != wanted.module:
            found = f"one built by {record.library} {record.version}"
            fix = "keep the ending that the exporter gave it (.engine or .rtx.engine)"
            raise ArtifactError(self.path, f"an engine of {wanted.label}", found, fix)

    def _check_version(self, record: EngineRecord, here: str) -> None:
        if not record.runs_with(here):
            label = LIBRARIES[self.kind].label
            expected = f"an engine built with {label} {_release(here)}, which is here"
            found = f"one built with {record.version}"
            raise ArtifactError(self.path, expected, found, self._rebuild(record))

    def _wrong_gpu(self, record: EngineRecord, here: str, module: Any) -> ArtifactError:
        expected = f"an engine built for {here}, the GPU that is here"
        found = "one built for " + ", ".join(record.compute_capabilities)
        # What is newer than all that the library names is served by its default alone.
        targets = [here] if here in compute_capabilities(module) else []
        return ArtifactError(self.path, expected, found, self._rebuild(record, targets))

    def _rebuild(self, record: EngineRecord, targets: Sequence[str] | None = None) -> str:
        """The instruction that builds this engine again, for the GPUs that it was built for.

        TensorRT always builds for the GPU it finds; its RTX sibling is told, or builds for its
        default, whose record ends with a "+".

        Args:
            record: The engine's.
            targets: Other GPUs to build for; empty for the library's default.
        """
        targets = record.compute_capabilities if targets is None else targets
        if self.kind == "trt" or any(target.endswith("+") for target in targets):
            targets = ()
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

    def _features(self, images: UInt8Array) -> Float32Array:
        with self._turn:
            return self._opened().features(images)

    def _opened(self) -> Session:
        if self._session is None:  # closed by another thread since infer() looked
            fix = "wait for other threads before close()"
            raise BackendError(self.path.name, "an open backend", "a closed one", fix)
        return self._session

    def _close(self) -> None:
        with self._turn:
            session, self._session = self._session, None
            if session is not None:
                session.close()


class TensorRTRTXBackend(TensorRTBackend):
    """Runs ``*.rtx.engine`` files with TensorRT for RTX 1.x."""

    kind = "trt-rtx"


def _damaged(path: Path, found: str) -> ArtifactError:
    expected = "the library, version and GPUs that the engine was built with and for"
    return ArtifactError(sidecar_path(path), expected, found, "export the engine again")


def _release(version: str) -> str:
    """Major and minor of a version: ``10.3.0.26`` -> ``10.3``."""
    return ".".join(version.split(".")[:2])
