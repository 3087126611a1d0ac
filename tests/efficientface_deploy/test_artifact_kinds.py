"""What a file is, by its content where that speaks, else by its name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from efficientface_deploy.artifact import describe_file


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


BINARY = b"\x08\x09\x00\xff" * 3000
SPLIT = b"x" * 4095 + "é".encode()  # the cut falls into a character


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.onnx", b"", "an empty file"),
        ("a.onnx", png(), "a picture"),
        ("face.png", png(), "a picture"),
        ("a.onnx", b"not protobuf at all", "a text file"),
        ("a.pth.tar", SPLIT, "a text file"),
        ("a.txt", "naïve\n".encode(), "a text file"),
        ("a.onnx", BINARY, "an ONNX file"),
        ("a.onnx", b"\xff\0\xff", "an ONNX file"),
        ("a.safetensors", BINARY, "a checkpoint"),
        ("a.pth.tar", BINARY, "a checkpoint"),
        ("a.pt", BINARY, "a checkpoint"),
        ("a.engine", BINARY, "a TensorRT engine"),
        ("a.rtx.engine", BINARY, "a TensorRT engine"),
        ("a.rtx.engine.json", b"{}", "the sidecar of an engine"),
        ("a.npz", BINARY, "a file with suffix .npz"),
        ("a", BINARY, "a file with suffix none"),
    ],
)
def test_file(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert describe_file(tmp_path / name) == found


def test_no_file(tmp_path: Path) -> None:
    assert describe_file(tmp_path) == "a folder"
    assert describe_file(tmp_path / "a.onnx") == "no such file"


def test_our_own_files(model_files: dict[str, Path]) -> None:
    assert describe_file(model_files["onnx"]) == "an ONNX file"
    assert describe_file(model_files["torch"]) == "a checkpoint"
