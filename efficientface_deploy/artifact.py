"""What a model file says of itself: its kind, its ModelSpec, its provenance.

A safetensors file and an ONNX file carry both as metadata, which is read here without loading the
model; a TensorRT engine has a sidecar. Published checkpoints say nothing.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import (
    failures_named,
    file_hash,
    read_json,
    require_file,
    why_not_a_file,
    write_text,
)
from efficientface_deploy.spec import PRESETS, ModelSpec, preset

WEIGHTS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth.tar", ".tar", ".pth", ".pt")  # published checkpoints
CHECKPOINT_SUFFIXES = (WEIGHTS_SUFFIX, *TORCH_SUFFIXES)
ONNX_SUFFIX = ".onnx"
ENGINE_SUFFIX = ".engine"
RTX_ENGINE_SUFFIX = ".rtx.engine"
_SIDECAR_SUFFIX = ".json"  # after the engine's own

# Keys of the metadata.
SPEC_KEY = "efficientface.spec"
PROVENANCE_KEY = "efficientface.provenance"
PROBE_KEY = "efficientface.probe"

# Inputs and outputs of every ONNX file of ours; the input's name says which of the two it takes.
UINT8_INPUT = "image"  # uint8 (N, S, S, 3), RGB
FLOAT_INPUT = "input"  # float32 (N, 3, S, S), normalised
OUTPUTS = ("logits", "probabilities")  # float32 (N, C) each
FEATURES = "features"  # a third output, of files exported with --features: float32 (N, F)


# ---- the kind of a file

_LOOKED_AT = 4096  # bytes that tell text from anything else


def describe_file(path: Path) -> str:
    """``a picture``, ``an empty file``, ``a TensorRT engine``; content goes before the name."""
    if (reason := why_not_a_file(path)) is not None:
        return reason
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    if not start:
        return "an empty file"
    if _is_picture(path):
        return "a picture"
    if path.name.endswith(ENGINE_SUFFIX + _SIDECAR_SUFFIX):
        return "the sidecar of an engine"
    if _is_text(start):
        return "a text file"
    if path.name.endswith(CHECKPOINT_SUFFIXES):
        return "a checkpoint"
    if path.name.endswith(ONNX_SUFFIX):
        return "an ONNX file"
    if path.name.endswith(ENGINE_SUFFIX):
        return "a TensorRT engine"
    return f"a file with suffix {path.suffix or 'none'}"


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return False


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        split = len(start) == _LOOKED_AT and error.start > len(start) - 4  # by the cut
        if not split:
            return False
        text = start[: error.start].decode("utf-8")
    return all(char.isprintable() or char in "\t\n\r\f" for char in text)


# ---- safetensors

_MAX_HEADER = 1 << 24  # bytes, a hundred times our largest; the format's own limit is 100 MB


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata in a safetensors file's header, without reading its tensors.

    Raises:
        ArtifactError: The file is not a safetensors file.
    """
    path = require_file(path, "a safetensors file")
    with path.open("rb") as file, failures_named(path):
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size) if 2 <= size <= _MAX_HEADER else b""
    try:
        header = json.loads(raw)
        metadata = header.get("__metadata__", {})
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError):
        found = "something else or a truncated one"
        fix = "copy it again, or train it again with python -m training.student"
        raise ArtifactError(path, "a safetensors file", found, fix) from None


# ---- ONNX: protobuf messages, of which only what is asked for is read

# Numbers of the fields, from onnx.proto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_INPUT, _VALUE_NAME = 11, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_NODE_OPERATOR = 4

# Where other files may be named: of each kind of message, the fields that lead there.
_PARTS: dict[str, dict[int, str]] = {
    "model": {_MODEL_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 10: "tensor", 22: "sparse", 23: "sparse"},
        **{6: "graph", 11: "graph"},
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_LOCATION, _COMPILED = "location", "EPContext"  # what names another file: a key, and an operator
_EXTERNAL_KEYS = (_LOCATION, "offset", "length", "checksum")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of fields

_MAX_FIELDS = 1_000_000  # read in one go; a file of nothing but fields takes seconds, not hours
_MAX_DEPTH = 100  # of messages in messages, as protobuf has it
_MAX_TAG = (1 << 32) - 1  # protobuf drops higher bits, and would see another field than we do
_MAX_TEXT = 64 * 1024 * 1024  # bytes of one name or value


def read_onnx_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of an ONNX file.

    Raises:
        ArtifactError: The file is not there, is not an ONNX file, or is truncated.
    """
    metadata: dict[str, str] = {}
    has_graph = False
    with _open_onnx(path) as (file, size):
        for number, end in _fields(file, size):
            has_graph = has_graph or number == _MODEL_GRAPH
            if number == _MODEL_METADATA:
                entry = _texts(file, end, {_ENTRY_KEY, _ENTRY_VALUE})
                metadata[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
        if not has_graph:
            raise ValueError("no graph in it")
    return metadata


def read_onnx_input(path: str | Path) -> str:
    """The name of an ONNX file's first input, or an empty string.

    Raises:
        ArtifactError: As :func:`read_onnx_metadata`.
    """
    return next(iter(_graph_names(path, _GRAPH_INPUT)), "")


def read_onnx_outputs(path: str | Path) -> list[str]:
    """The names of an ONNX file's outputs.

    Raises:
        ArtifactError: As :func:`read_onnx_metadata`.
    """
    return _graph_names(path, _GRAPH_OUTPUT)


def _graph_names(path: str | Path, wanted: int) -> list[str]:
    """The names of a graph's inputs or outputs."""
    names = []
    with _open_onnx(path) as (file, size):
        for number, end in _fields(file, size):
            if number == _MODEL_GRAPH:
                for part, part_end in _fields(file, end):
                    if part == wanted:
                        names.append(_texts(file, part_end, {_VALUE_NAME}).get(_VALUE_NAME, ""))
    return names


def external_files(path: str | Path) -> list[Path]:
    """The files beside an ONNX file that hold weights of it; ours have none.

    Every library that opens an ONNX file also opens those that it names, and old releases
    anywhere on the disk. So this comes first, and refuses every name but a plain file's beside it.

    Raises:
        ArtifactError: It names a file elsewhere, a link, or a part that was compiled by others; or
            as :func:`read_onnx_metadata`.
    """
    with _open_onnx(path) as (file, size):
        data = file.read()
        # Without these words in it, it names no file: protobuf keeps a text in one piece.
        if not any(word.encode() in data for word in (_LOCATION, _COMPILED)):
            return []
        names = _external_names(io.BytesIO(data), size)
    return [_require_beside(Path(path), name) for name in sorted(names)]


def _external_names(file: BinaryIO, size: int) -> set[str]:
    """What an ONNX file calls the files that hold weights of it.

    Raises:
        ValueError: This is no ONNX model, or names files in a way that nobody needs.
    """
    names = set()
    budget = iter(range(_MAX_FIELDS))

    def walk(kind: str, end: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("more parts in parts than a model has")
        texts: dict[int, str] = {}
        for number, part_end in _fields(file, end, budget):
            if number in _PARTS[kind]:
                walk(_PARTS[kind][number], part_end, depth + 1)
            elif kind == "entry" or (kind, number) == ("node", _NODE_OPERATOR):
                texts[number] = _text(file, part_end)
        if texts.get(_NODE_OPERATOR) == _COMPILED:
            raise ValueError(f"a part that is compiled already ({_COMPILED})")
        if kind != "entry":
            return
        key = texts.get(_ENTRY_KEY, "")
        if key not in _EXTERNAL_KEYS:
            raise ValueError(f"weights in other files by an unknown key, {key[:40]!r}")
        if key == _LOCATION:
            names.add(texts.get(_ENTRY_VALUE, ""))

    walk("model", size, 0)
    return names


def _require_beside(model: Path, name: str) -> Path:
    """The path of a file that an ONNX file names, if it lies beside it and is no link."""
    expected = "weights inside the file, or in a file of their own beside it"
    fix = "do not use this file, unless you trust it: then save it again in one file"
    path = model.parent / name
    found = ""
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
        found = f"weights at {name[:100]!r}"
    elif (reason := why_not_a_file(path)) is not None:
        found = f"weights in {name[:100]}, {reason}"
    elif path.is_symlink() or path.stat().st_nlink > 1:
        found = f"weights in {name[:100]}, a link"
    if found:
        raise ArtifactError(model, expected, found, fix)
    return path


@contextlib.contextmanager
def _open_onnx(path: str | Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size; a ValueError of the block says what the file is instead."""
    path = require_file(path, "an ONNX model")
    try:
        with path.open("rb") as file, failures_named(path):
            yield file, path.stat().st_size
    except ValueError as error:
        odd_text = isinstance(error, UnicodeDecodeError)
        found = "text that is not UTF-8" if odd_text else str(error)
        fix = "copy it again, or export it again with efficientface-export"
        raise ArtifactError(path, "an ONNX model", found, fix) from None


def _fields(
    file: BinaryIO, end: int, budget: Iterator[int] | None = None
) -> Iterator[tuple[int, int]]:
    """Number and end of each field of bytes in a message; the file stands where its bytes begin.

    Args:
        file: Stands where the message begins.
        end: Where it ends.
        budget: How many fields may be read, where several messages share a limit.

    Raises:
        ValueError: This is no protobuf message, or the file ends within.
    """
    for _ in range(_MAX_FIELDS) if budget is None else budget:
        if file.tell() == end:
            return
        tag = _varint(file)
        number, kind = divmod(tag, 8)
        if number == 0 or tag > _MAX_TAG:
            raise ValueError("something else")
        if kind == _VARINT:
            _varint(file)
            continue
        sizes = {_FIXED32: 4, _FIXED64: 8}
        size = _varint(file) if kind == _BYTES else sizes.get(kind)
        if size is None:
            raise ValueError("something else")
        field_end = file.tell() + size
        if field_end > end:
            raise ValueError("a truncated or damaged one")
        if kind == _BYTES:
            yield number, field_end
        file.seek(field_end)
    raise ValueError("more fields than a model has")


def _texts(file: BinaryIO, end: int, wanted: set[int]) -> dict[int, str]:
    """Those of a message's fields that are wanted, as text, by number."""
    texts = {}
    for number, field_end in _fields(file, end):
        if number in wanted:
            texts[number] = _text(file, field_end)
    return texts


def _text(file: BinaryIO, end: int) -> str:
    size = end - file.tell()
    if size > _MAX_TEXT:
        raise ValueError(f"a text of {size} bytes")
    return file.read(size).decode()  # UnicodeDecodeError is a ValueError


def _varint(file: BinaryIO) -> int:
    """A number of up to 64 bits, seven to a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("a truncated or damaged one")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("something else")


# ---- ONNX: the same model for pictures of any size

_GRAPH_OUTPUT, _GRAPH_INNER = 12, 13  # what is said of outputs, and of what lies between
_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_SIDE = 2, 1, 2, 1
_CHANNELS = 1  # place of the channels among an input's sides


def free_sizes(model: bytes, input_name: str) -> bytes:
    """The same ONNX model for any number of pictures of any height and width.

    Args:
        model: Content of a file that :func:`external_files` has passed.
        input_name: Of its sides only the channels are kept; what the model says of the shapes of
            other inputs is kept too, and of all other shapes is left out.

    Raises:
        ValueError: This is no ONNX model.
    """
    name = _field(_VALUE_NAME, input_name.encode())

    def in_model(number: int, graph: bytes) -> bytes:
        return _edited(graph, in_graph) if number == _MODEL_GRAPH else graph

    def in_graph(number: int, value: bytes) -> bytes | None:
        if number == _GRAPH_OUTPUT:
            return _edit_shape(value, lambda shape: None)
        if number == _GRAPH_INPUT and name in value:
            return _edit_shape(value, _free_sides)
        return None if number == _GRAPH_INNER else value

    return _edited(model, in_model)


def _edit_shape(value: bytes, edit: Callable[[bytes], bytes | None]) -> bytes:
    """What is said of an input or output, with another shape."""

    def in_value(number: int, kind: bytes) -> bytes:
        return _edited(kind, in_type) if number == _VALUE_TYPE else kind

    def in_type(number: int, tensor: bytes) -> bytes:
        return _edited(tensor, in_tensor) if number == _TYPE_TENSOR else tensor

    def in_tensor(number: int, shape: bytes) -> bytes | None:
        return edit(shape) if number == _TENSOR_SHAPE else shape

    return _edited(value, in_value)


def _free_sides(shape: bytes) -> bytes:
    places = itertools.count()
    return _edited(shape, lambda number, side: side if next(places) == _CHANNELS else b"")


def _edited(message: bytes, edit: Callable[[int, bytes], bytes | None]) -> bytes:
    """A message with other content in its fields of bytes; None leaves a field out."""
    file, parts = io.BytesIO(message), []
    while (start := file.tell()) < len(message):
        number, kind = divmod(_varint(file), 8)
        if kind == _BYTES:
            size = _varint(file)
            content = file.read(size)
            if len(content) < size:
                raise ValueError("a truncated or damaged one")
            edited = edit(number, content)
            parts.append(b"" if edited is None else _field(number, edited))
            continue
        if kind == _VARINT:
            _varint(file)
        elif kind in (_FIXED32, _FIXED64):
            file.seek(4 if kind == _FIXED32 else 8, io.SEEK_CUR)
        else:
            raise ValueError("something else")
        parts.append(message[start : file.tell()])
    return b"".join(parts)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    parts = bytearray()
    for value in (8 * number + _BYTES, len(content)):
        while value > 0x7F:
            parts.append(value & 0x7F | 0x80)
            value >>= 7
        parts.append(value)
    return bytes(parts) + content


# ---- an engine's sidecar


def sidecar_path(engine: str | Path) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    return Path(f"{engine}{_SIDECAR_SUFFIX}")


class Sidecar(NamedTuple):
    """What lies beside an engine.

    Attributes:
        spec: The model's.
        provenance: How it was made.
        probe: What :meth:`probe.Probe.from_record` reads; None where there is none.
    """

    spec: ModelSpec
    provenance: dict[str, Any]
    probe: object = None


def read_sidecar(engine: str | Path) -> Sidecar:
    """The spec, the provenance and the probe that lie beside an engine.

    Raises:
        ArtifactError: The sidecar is missing, damaged, or belongs to another engine.
    """
    engine = require_file(engine, "a TensorRT engine")
    path = sidecar_path(engine)
    if (reason := why_not_a_file(path)) is not None:
        fix = "copy both files; an engine alone does not say its labels or preprocessing"
        raise ArtifactError(path, f"the sidecar of {engine.name}", reason, fix)
    try:
        content = read_json(path)
        spec_fields, provenance = content["spec"], content["provenance"]
        recorded = provenance["engine"]["sha256"]
    except (ValueError, KeyError, TypeError):
        expected, fix = "JSON with spec and provenance", "export the engine again"
        raise ArtifactError(path, expected, "something else", fix) from None
    spec = ModelSpec.from_json(json.dumps(spec_fields), source=path)
    if recorded != (actual := file_hash(engine)):
        expected = f"the engine that {path.name} describes (sha256 {str(recorded)[:12]}...)"
        found = f"another file (sha256 {actual[:12]}...)"
        raise ArtifactError(engine, expected, found, "copy both files of one export")
    return Sidecar(spec, provenance, content.get("probe"))


def write_sidecar(
    engine: str | Path,
    spec: ModelSpec,
    provenance: Mapping[str, Any],
    probe: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model.engine.json`` atomically and return its path."""
    path = sidecar_path(engine)
    content = {"spec": json.loads(spec.to_json()), "provenance": dict(provenance)}
    if probe is not None:
        content["probe"] = dict(probe)
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path


# ---- spec and provenance


def spec_from_metadata(metadata: Mapping[str, str], path: str | Path) -> ModelSpec:
    """The ModelSpec in an artifact's metadata.

    Raises:
        ArtifactError: There is none.
        SpecError: There is one, but it is damaged.
    """
    if SPEC_KEY not in metadata:
        expected = f"a model with a ModelSpec in its metadata ({SPEC_KEY})"
        fix = "make the model with efficientface-export, which writes it"
        raise ArtifactError(path, expected, "none", fix)
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
        expected, fix = f"JSON in {PROVENANCE_KEY}", "export the model again"
        raise ArtifactError(path, expected, "something else", fix)
    return provenance


def carries_spec(path: str | Path) -> bool:
    """Whether a model file says itself what its outputs mean; published checkpoints do not.

    Raises:
        ArtifactError: A ``*.safetensors`` file is missing or damaged.
    """
    path = Path(path)
    if path.suffix == WEIGHTS_SUFFIX:
        return SPEC_KEY in read_safetensors_metadata(path)
    return path.suffix not in TORCH_SUFFIXES


def require_preset(path: str | Path, preset_name: str | None) -> None:
    """Ask for a preset where a model file does not say what its outputs mean.

    Raises:
        ArtifactError: It does not, and no preset is given; or as :func:`carries_spec`.
    """
    if preset_name is None and os.path.isfile(path) and not carries_spec(path):
        expected = "--preset, since this checkpoint does not say what its outputs mean"
        raise ArtifactError(path, expected, "none", "add --preset " + ", ".join(PRESETS))


def check_preset(path: str | Path, spec: ModelSpec, preset_name: str | None) -> None:
    """Refuse a preset whose labels are not those that a model file says itself.

    Raises:
        ArtifactError: They differ.
        SpecError: There is no such preset.
    """
    if preset_name is not None and (labels := preset(preset_name).labels) != spec.labels:
        expected = f"labels {', '.join(spec.labels)}, as its spec says"
        found = f"preset {preset_name} with {', '.join(labels)}"
        fix = "leave the preset out; data with other classes needs a model trained on them"
        raise ArtifactError(path, expected, found, fix)
