"""What lies on disk: safetensors headers, ONNX metadata keys, engine sidecars, atomic writes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.spec import PRESETS, ModelSpec, preset

SPEC_KEY = "efficientface.spec"
PROVENANCE_KEY = "efficientface.provenance"

# Inputs and outputs of every ONNX file of ours; the input's name says which of the two it takes.
UINT8_INPUT = "image"  # uint8 (N, S, S, 3), RGB
FLOAT_INPUT = "input"  # float32 (N, 3, S, S), normalised
OUTPUTS = ("logits", "probabilities")  # float32 (N, C) each

# Published checkpoints; none of them says what its outputs mean.
TORCH_SUFFIXES = (".tar", ".pth", ".pt")

_MAX_HEADER = 100 * 1024 * 1024  # the safetensors format's own limit
_MAX_FILE = 1 << 30  # bytes, ten times our largest; a reader takes several times as much memory


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it there when the block succeeds.

    A reader sees the old file or the whole new one, never half of one; on an error, an interrupt
    included, the temporary file is removed and ``path`` is as it was.
    """
    import tempfile  # here, for what it imports: a program that only predicts never writes

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    import hashlib  # here, since it loads OpenSSL, which an ONNX model has no need of

    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def require_file(path: str | Path, kind: str) -> Path:
    """The path, if a file is there that one of ours could be.

    Raises:
        ArtifactError: Nothing is there, or it is not a file, or larger than 1 GiB.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        if found == "no such file" and path.exists():
            found = "a pipe or device"
        raise ArtifactError(path, expected=kind, found=found, fix="check the path")
    if (size := path.stat().st_size) > _MAX_FILE:
        found = f"a file of {size / _MAX_FILE:.1f} GiB"
        raise ArtifactError(path, expected=f"{kind} below 1 GiB", found=found, fix="copy it again")
    return path


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata in a safetensors file's header, without reading its tensors.

    Raises:
        ArtifactError: The file is not a safetensors file.
    """
    path = require_file(path, "a safetensors file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size) if 2 <= size <= _MAX_HEADER else b""
    try:
        header = json.loads(raw)
        metadata = header.get("__metadata__", {})
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError):
        raise ArtifactError(
            path,
            expected="a safetensors file",
            found="something else or a truncated one",
            fix="copy it again, or train it again with python -m training.student",
        ) from None


def carries_spec(path: str | Path) -> bool:
    """Whether a model file says itself what its outputs mean; published checkpoints do not.

    Raises:
        ArtifactError: A ``*.safetensors`` file is missing or damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return SPEC_KEY in read_safetensors_metadata(path)
    return path.suffix not in TORCH_SUFFIXES


def require_preset(path: str | Path, preset_name: str | None) -> None:
    """Ask for a preset where a model file does not say what its outputs mean.

    Raises:
        ArtifactError: It does not, and no preset is given; or as :func:`carries_spec`.
    """
    if preset_name is None and Path(path).is_file() and not carries_spec(path):
        raise ArtifactError(
            path,
            expected="--preset, since this checkpoint does not say what its outputs mean",
            found="none",
            fix="add --preset " + ", ".join(PRESETS),
        )


def check_preset(path: str | Path, spec: ModelSpec, preset_name: str | None) -> None:
    """Refuse a preset whose labels are not those that a model file says itself.

    Raises:
        ArtifactError: They differ.
        SpecError: There is no such preset.
    """
    if preset_name is not None and preset(preset_name).labels != spec.labels:
        raise ArtifactError(
            path,
            expected=f"labels {', '.join(spec.labels)}, as its spec says",
            found=f"preset {preset_name} with {', '.join(preset(preset_name).labels)}",
            fix="leave the preset out; data with other classes needs a model trained on them",
        )


def spec_from_metadata(metadata: Mapping[str, str], path: str | Path) -> ModelSpec:
    """The ModelSpec in an artifact's metadata.

    Raises:
        ArtifactError: There is none.
        SpecError: There is one, but it is damaged.
    """
    if SPEC_KEY not in metadata:
        raise ArtifactError(
            path,
            expected=f"a model with a ModelSpec in its metadata ({SPEC_KEY})",
            found="none",
            fix="make the model with efficientface-export, which writes it",
        )
    return ModelSpec.from_json(metadata[SPEC_KEY], source=path)


def provenance_from_metadata(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """The provenance in an artifact's metadata; empty when there is none.

    Raises:
        ArtifactError: It is not a JSON object.
    """
    try:
        provenance = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    except (ValueError, RecursionError):
        provenance = None
    if not isinstance(provenance, dict):
        raise ArtifactError(
            path,
            expected="JSON in " + PROVENANCE_KEY,
            found="something else",
            fix="export the model again",
        )
    return provenance


def sidecar_path(engine: str | Path) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    return Path(f"{engine}.json")


def read_sidecar(engine: str | Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec and the provenance that lie beside an engine.

    Raises:
        ArtifactError: The sidecar is missing, damaged, or belongs to another engine.
    """
    engine = require_file(engine, "a TensorRT engine")
    path = sidecar_path(engine)
    if not path.is_file():
        raise ArtifactError(
            path,
            expected=f"the sidecar of {engine.name}",
            found="no such file",
            fix="copy both files; an engine alone does not say its labels or preprocessing",
        )
    try:
        content = json.loads(require_file(path, "a sidecar").read_text(encoding="utf-8"))
        spec_fields, provenance = content["spec"], content["provenance"]
        recorded = provenance["engine"]["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArtifactError(
            path,
            expected="JSON with spec and provenance",
            found="something else",
            fix="export the engine again",
        ) from None
    spec = ModelSpec.from_json(json.dumps(spec_fields), source=path)
    if recorded != file_hash(engine):
        raise ArtifactError(
            engine,
            expected=f"the engine that {path.name} describes (sha256 {str(recorded)[:12]}...)",
            found=f"another file (sha256 {file_hash(engine)[:12]}...)",
            fix="copy both files of one export",
        )
    return spec, provenance


def write_sidecar(engine: str | Path, spec: ModelSpec, provenance: Mapping[str, Any]) -> Path:
    """Write ``model.engine.json`` atomically and return its path."""
    path = sidecar_path(engine)
    content = {"spec": json.loads(spec.to_json()), "provenance": dict(provenance)}
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path
