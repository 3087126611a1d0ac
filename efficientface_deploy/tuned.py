"""What ``efficientface-export --tune`` found fastest, and where: there ``load()`` follows it."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import (
    ONNX_SUFFIX,
    provenance_from_metadata,
    read_onnx_metadata,
)
from efficientface_deploy.cpus import cpu_model, usable_cpus
from efficientface_deploy.errors import ArtifactError

TUNED_KEY = "tuned"  # of the provenance

_GPUS = Path("/proc/driver/nvidia/gpus")  # of NVIDIA's driver: read without starting CUDA

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A choice for one kind of machine.

    Attributes:
        objective: ``latency`` of one picture, or ``throughput`` of batches.
        backend: What ran fastest, e.g. ``onnx:cpu``.
        threads: CPU threads of one inference; None where they have no meaning.
        machine: Name of the CPU or the graphics card that it was measured on.
    """

    objective: str
    backend: str
    threads: int | None
    machine: str

    @classmethod
    def from_record(cls, record: object, path: Path) -> Tuned | None:
        """Read it from a provenance; None where there is none.

        Raises:
            ArtifactError: It is damaged.
        """
        if record is None:
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        values = [record.get(name) for name in names] if isinstance(record, Mapping) else []
        texts, threads = [*values[:2], *values[3:]], values[2] if values else 0
        counts = threads is None or (type(threads) is int and threads > 0)
        texts_given = all(isinstance(text, str) for text in texts)
        if not counts or not texts_given or "auto" in texts:  # auto would ask this file again
            expected = "a tuned choice of backend, threads and machine"
            raise ArtifactError(path, expected, "a damaged one", "export the model again")
        found: dict[str, Any] = dict(zip(names, values, strict=True))
        return cls(**found)


def machine_of(backend: str) -> str | None:
    """Name of the CPU that a backend runs on, or of the first graphics card; None if not known."""
    if backend.startswith(("onnx:cpu", "onnx:openvino")):
        return cpu_model()
    for path in sorted(_GPUS.glob("*/information")):
        if match := re.search(r"^Model:\s*(.+)$", path.read_text("utf-8"), re.MULTILINE):
            return match[1].strip()
    return None


def read_tuned(path: Path) -> Tuned | None:
    """The choice in an ONNX file, where it was made for this CPU or card; else the log says so.

    Its threads are at most the CPUs that this process may use. An engine has one backend, and
    nothing to follow.

    Raises:
        ArtifactError: The file is damaged or not there.
    """
    if not path.name.endswith(ONNX_SUFFIX):
        return None
    provenance = provenance_from_metadata(read_onnx_metadata(path), path)
    tuned = Tuned.from_record(provenance.get(TUNED_KEY), path)
    if tuned is None:
        return None
    if (here := machine_of(tuned.backend)) != tuned.machine:
        text = "%s: tuned for another machine (%s), and this is %s: the defaults apply"
        _log.info(text, path, tuned.machine, here or "one without a name")
        return None
    threads = None if tuned.threads is None else min(tuned.threads, usable_cpus())
    return dataclasses.replace(tuned, threads=threads)
