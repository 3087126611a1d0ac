"""An ONNX file's metadata without the onnx package: as onnx reads it, and safe from any file."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientface_deploy import artifact
from efficientface_deploy.artifact import read_onnx_input, read_onnx_metadata
from efficientface_deploy.errors import ArtifactError


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("name", ["onnx", "onnx-float"])
def test_as_onnx_reads_it(model_files: dict[str, Path], name: str) -> None:
    metadata = read_onnx_metadata(model_files[name])
    assert metadata == metadata_of(model_files[name])
    assert set(metadata) == {"efficientface.spec", "efficientface.provenance"}
    assert read_onnx_input(model_files[name]) == {"onnx": "image", "onnx-float": "input"}[name]


def small_model(**metadata: str) -> onnx.ModelProto:
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["N", 2])
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    node = onnx.helper.make_node("Identity", ["image"], ["same"])
    graph = onnx.helper.make_graph([node], "g", [image], [image], [weight], doc_string="text")
    model = onnx.helper.make_model(graph, producer_name="me", model_version=2**62)
    onnx.helper.set_model_props(model, metadata)
    return model


@given(st.dictionaries(st.text(max_size=300), st.text(max_size=300), max_size=5))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    onnx.save(small_model(**metadata), path)
    assert read_onnx_metadata(path) == metadata == metadata_of(path)
    assert read_onnx_input(path) == "image"


@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    path.write_bytes(content)
    for read in (read_onnx_metadata, read_onnx_input):
        try:
            read(path)
        except ArtifactError as error:
            assert str(error).isprintable()


def test_changed_bytes_and_truncation(tmp_path: Path) -> None:
    content = small_model(a="b", c="d" * 200).SerializeToString()
    path = tmp_path / "a.onnx"
    choose = random.Random(0)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with contextlib.suppress(ArtifactError):
            assert read_onnx_metadata(path).items() <= {"a": "b", "c": "d" * 200}.items()
        changed = bytearray(content)
        changed[end] = choose.randrange(256)
        path.write_bytes(changed)
        with contextlib.suppress(ArtifactError):
            read_onnx_metadata(path)
            read_onnx_input(path)


@pytest.mark.parametrize("content", [b"", b"text in a file", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="expected an ONNX model, found "):
        read_onnx_metadata(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_onnx_metadata(tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="a folder"):
        read_onnx_input(tmp_path)


def test_weights_are_passed_over(tmp_path: Path) -> None:
    """Half a gigabyte of zeros, of which the disk holds none and nobody reads any."""
    path = tmp_path / "large.onnx"
    size = 2**29
    with path.open("wb") as file:
        file.write(bytes([0x08, 9, 0x3A]))  # IR version 9; then the graph, as long as said
        file.write(bytes([0x80, 0x80, 0x80, 0x80, 0x02]))
        file.seek(size, 1)
        file.write(onnx.ModelProto(metadata_props=[{"key": "k", "value": "v"}]).SerializeToString())
    assert read_onnx_metadata(path) == {"k": "v"}


def test_file_of_nothing_but_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_MAX_FIELDS", 1000)
    path = tmp_path / "a.onnx"
    path.write_bytes(bytes([0x08, 1]) * 1001)
    with pytest.raises(ArtifactError, match="more fields"):
        read_onnx_metadata(path)


def test_text_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_MAX_TEXT", 100)
    path = tmp_path / "a.onnx"
    onnx.save(small_model(k="v" * 101), path)
    with pytest.raises(ArtifactError, match="a text of 101 bytes"):
        read_onnx_metadata(path)
