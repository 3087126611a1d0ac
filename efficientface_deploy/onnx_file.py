"""What an ONNX file says of itself, read without loading it: its metadata, its input.

An ONNX file is one protobuf message, ``ModelProto`` of onnx.proto: fields of a number and a kind,
one after the other. Those that are not asked for are passed over unread, weights among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from efficientface_deploy.artifact import require_file
from efficientface_deploy.errors import ArtifactError

# Numbers of the fields, from onnx.proto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_INPUT, _VALUE_NAME = 11, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of fields

_MAX_FIELDS = 1_000_000  # of one message; a file of nothing but fields takes seconds, not hours
_MAX_TEXT = 64 * 1024 * 1024  # bytes of one name or value


def read_onnx_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of an ONNX file.

    Raises:
        ArtifactError: The file is not there, is not an ONNX file, or is truncated.
    """
    path = require_file(path, "an ONNX model")
    metadata: dict[str, str] = {}
    has_graph = False
    try:
        with path.open("rb") as file:
            for number, end in _fields(file, path.stat().st_size):
                has_graph = has_graph or number == _MODEL_GRAPH
                if number == _MODEL_METADATA:
                    entry = _texts(file, end)
                    metadata[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
    except ValueError as error:
        raise _not_onnx(path, _reason(error)) from None
    if not has_graph:
        raise _not_onnx(path, "no graph in it")
    return metadata


def read_onnx_input(path: str | Path) -> str:
    """The name of an ONNX file's first input, or an empty string.

    Raises:
        ArtifactError: As :func:`read_onnx_metadata`.
    """
    path = require_file(path, "an ONNX model")
    try:
        with path.open("rb") as file:
            for number, end in _fields(file, path.stat().st_size):
                if number == _MODEL_GRAPH:
                    for part, part_end in _fields(file, end):
                        if part == _GRAPH_INPUT:
                            return _texts(file, part_end, {_VALUE_NAME}).get(_VALUE_NAME, "")
    except ValueError as error:
        raise _not_onnx(path, _reason(error)) from None
    return ""


def _reason(error: ValueError) -> str:
    return "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """Number and end of each field of bytes in a message; the file stands where its bytes begin.

    Raises:
        ValueError: This is no protobuf message, or the file ends within.
    """
    for _ in range(_MAX_FIELDS):
        if file.tell() == end:
            return
        number, kind = divmod(_varint(file), 8)
        if kind == _VARINT:
            _varint(file)
            continue
        sizes = {_FIXED32: 4, _FIXED64: 8}
        size = _varint(file) if kind == _BYTES else sizes.get(kind)
        if size is None or number == 0:
            raise ValueError("something else")
        field_end = file.tell() + size
        if field_end > end:
            raise ValueError("a truncated or damaged one")
        if kind == _BYTES:
            yield number, field_end
        file.seek(field_end)
    raise ValueError("more fields than a model has")


def _texts(file: BinaryIO, end: int, wanted: set[int] | None = None) -> dict[int, str]:
    """A message's fields as text, by number."""
    texts = {}
    for number, field_end in _fields(file, end):
        if wanted is None or number in wanted:
            size = field_end - file.tell()
            if size > _MAX_TEXT:
                raise ValueError(f"a text of {size} bytes")
            texts[number] = file.read(size).decode()  # UnicodeDecodeError is a ValueError
    return texts


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


def _not_onnx(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        path,
        expected="an ONNX model",
        found=found,
        fix="copy it again, or export it again with efficientface-export",
    )
