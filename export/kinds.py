"""What a file seems to be, for the error that says why it is the wrong one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from efficientface_deploy.artifact import TORCH_SUFFIXES

CHECKPOINT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
ONNX_SUFFIX = ".onnx"
ENGINE_SUFFIX = ".engine"

_LOOKED_AT = 4096  # bytes that tell text from anything else


def describe_file(path: Path) -> str:
    """``a picture``, ``an empty file``, ``a TensorRT engine``; content goes before the name."""
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "no such file"
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    if not start:
        return "an empty file"
    if _is_picture(path):
        return "a picture"
    if path.name.endswith(ENGINE_SUFFIX + ".json"):
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
