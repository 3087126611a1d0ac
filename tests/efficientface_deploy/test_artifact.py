"""What a model file says of itself; ONNX metadata as the package onnx reads it, without it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from efficientface_deploy import artifact
from efficientface_deploy.artifact import (
    PROVENANCE_KEY,
    SPEC_KEY,
    check_preset,
    describe_file,
    external_files,
    free_sizes,
    provenance_from_metadata,
    read_onnx_input,
    read_onnx_metadata,
    read_safetensors_metadata,
    read_sidecar,
    sidecar_path,
    spec_from_metadata,
    write_sidecar,
)
from efficientface_deploy.errors import ArtifactError, SpecError
from efficientface_deploy.files import file_hash
from efficientface_deploy.spec import PRESETS

SPEC = PRESETS["rafdb"]


def safetensors_file(header: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header


# ---- the kind of a file


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
def test_kind_of_a_file(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert describe_file(tmp_path / name) == found


def test_kind_of_no_file(tmp_path: Path) -> None:
    assert describe_file(tmp_path) == "a folder"
    assert describe_file(tmp_path / "a.onnx") == "no such file"


def test_kind_of_our_own_files(model_files: dict[str, Path]) -> None:
    assert describe_file(model_files["onnx"]) == "an ONNX file"
    assert describe_file(model_files["torch"]) == "a checkpoint"


# ---- metadata


def test_safetensors_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_file(json.dumps({"__metadata__": {"a": "b"}}).encode()))
    assert read_safetensors_metadata(path) == {"a": "b"}
    path.write_bytes(safetensors_file(b"{}"))
    assert read_safetensors_metadata(path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"a text file, not a model\n",
        safetensors_file(b"{}", 2**63),
        safetensors_file(b"{}", 1),
        safetensors_file(b'{"__metadata__": {"a": "b"'),
        safetensors_file(b'{"__metadata__": "text"}'),
        safetensors_file(b'{"__metadata__": ["a"]}'),
        safetensors_file(b'{"__metadata__": null}'),
        safetensors_file(b"[]"),
        safetensors_file(b"\xff\xfe{}"),
        safetensors_file(b"[" * 100_000),
    ],
)
def test_file_that_is_no_safetensors(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="a safetensors file, found something else"):
        read_safetensors_metadata(path)


def test_spec_in_metadata():
    assert spec_from_metadata({SPEC_KEY: SPEC.to_json()}, "a.onnx") == SPEC
    with pytest.raises(ArtifactError, match=r"a\.onnx.*efficientface\.spec.*efficientface-export"):
        spec_from_metadata({"other": "x"}, "a.onnx")
    with pytest.raises(SpecError, match=r"^a\.onnx: "):
        spec_from_metadata({SPEC_KEY: "{"}, "a.onnx")


def test_preset_that_contradicts_a_spec():
    check_preset("model.onnx", SPEC, None)
    check_preset("model.onnx", SPEC, "affectnet7")  # the same labels
    with pytest.raises(ArtifactError, match=r"model\.onnx: .*found preset ferplus .*leave the p"):
        check_preset("model.onnx", SPEC, "ferplus")
    with pytest.raises(SpecError, match="nonsense"):
        check_preset("model.onnx", SPEC, "nonsense")


def test_provenance_in_metadata():
    assert provenance_from_metadata({}, "a.onnx") == {}
    assert provenance_from_metadata({PROVENANCE_KEY: '{"a": [1]}'}, "a.onnx") == {"a": [1]}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
def test_bad_provenance(text):
    with pytest.raises(ArtifactError, match=r"a\.onnx.*efficientface\.provenance"):
        provenance_from_metadata({PROVENANCE_KEY: text}, "a.onnx")


# ---- sidecars


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    write_sidecar(path, SPEC, {"engine": {"sha256": file_hash(path)}, "gpu": "none"})
    return path


def test_sidecar_round_trip(engine):
    assert sidecar_path(engine).name == "model.engine.json"
    spec, provenance, _ = read_sidecar(engine)
    assert (spec, provenance["gpu"]) == (SPEC, "none")


def test_missing_engine_or_sidecar(engine):
    sidecar_path(engine).unlink()
    with pytest.raises(ArtifactError, match=r"model\.engine\.json.*no such file; copy both"):
        read_sidecar(engine)
    engine.unlink()
    with pytest.raises(ArtifactError, match=r"model\.engine: .*no such file"):
        read_sidecar(engine)


def test_sidecar_of_another_engine(engine):
    recorded, other = file_hash(engine)[:12], hashlib.sha256(b"other plan").hexdigest()[:12]
    engine.write_bytes(b"other plan")
    with pytest.raises(ArtifactError, match=f"{recorded}.*{other}.*both files of one export"):
        read_sidecar(engine)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"3", b"\xff", b"[" * 100_000, b'{"spec": {}}']
    + [b'{"spec": {}, "provenance": ' + inner + b"}" for inner in (b"{}", b"[]", b'"engine"', b"3")]
    + [b'{"spec": {}, "provenance": {"engine": "sha256"}}'],
)
def test_damaged_sidecar(engine, content):
    sidecar_path(engine).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.engine\.json: expected JSON with spec and"):
        read_sidecar(engine)


@pytest.mark.parametrize("size", [17 << 20, 3 << 30])
def test_sidecar_too_long_to_be_one(engine, size):
    with sidecar_path(engine).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ArtifactError, match=r"model\.engine\.json: expected JSON with spec and"):
        read_sidecar(engine)


def test_safetensors_header_too_long_to_be_ours(tmp_path):
    text = json.dumps({"__metadata__": {SPEC_KEY: SPEC.to_json()}}).encode().ljust(17 << 20)
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ArtifactError, match="expected a safetensors file, found something else"):
        read_safetensors_metadata(tmp_path / "a.safetensors")


@pytest.mark.parametrize("spec", [None, [], "text", {}, {"schema": 1}])
def test_sidecar_with_a_bad_spec(engine, spec):
    content = json.loads(sidecar_path(engine).read_text())
    sidecar_path(engine).write_text(json.dumps({**content, "spec": spec}))
    with pytest.raises(SpecError, match=r"model\.engine\.json"):
        read_sidecar(engine)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["spec", "provenance", "engine", "sha256", "__metadata__", SPEC_KEY]),
            inner,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=50)
@given(JSON)
def test_any_json_as_sidecar(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.engine"
    path.write_bytes(b"plan")
    sidecar_path(path).write_text(json.dumps(content))
    with pytest.raises((ArtifactError, SpecError)) as caught:
        read_sidecar(path)
    assert str(caught.value).isprintable()


@given(JSON)
def test_any_json_as_a_safetensors_header(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(safetensors_file(json.dumps(content).encode()))
    try:
        metadata = read_safetensors_metadata(path)
    except ArtifactError:
        return
    assert all(type(text) is str for pair in metadata.items() for text in pair)
    with pytest.raises((ArtifactError, SpecError)):
        spec_from_metadata(metadata, path)


@given(st.dictionaries(st.sampled_from([PROVENANCE_KEY, "other"]), st.text(max_size=30)))
def test_any_text_as_provenance(metadata):
    try:
        assert isinstance(provenance_from_metadata(metadata, "a.onnx"), dict)
    except ArtifactError as error:
        assert str(error).isprintable()


@given(st.binary(max_size=64))
def test_any_bytes_as_safetensors(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        read_safetensors_metadata(path)


# ---- ONNX


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("name", ["onnx", "onnx-float"])
def test_onnx_metadata_as_onnx_reads_it(model_files: dict[str, Path], name: str) -> None:
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
def test_any_text_in_onnx_metadata(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    onnx.save(small_model(**metadata), path)
    assert read_onnx_metadata(path) == metadata == metadata_of(path)
    assert read_onnx_input(path) == "image"


@given(st.binary(max_size=200))
def test_any_bytes_as_onnx(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    path.write_bytes(content)
    for read in (read_onnx_metadata, read_onnx_input):
        try:
            read(path)
        except ArtifactError as error:
            assert str(error).isprintable()


def test_changed_bytes_and_truncation_of_onnx(tmp_path: Path) -> None:
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
def test_other_files_as_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="expected an ONNX model, found "):
        read_onnx_metadata(path)


def test_missing_onnx_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_onnx_metadata(tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="a folder"):
        read_onnx_input(tmp_path)


def test_weights_of_onnx_are_passed_over(tmp_path: Path) -> None:
    """Half a gigabyte of zeros, of which the disk holds none and nobody reads any."""
    path = tmp_path / "large.onnx"
    size = 2**29
    with path.open("wb") as file:
        file.write(bytes([0x08, 9, 0x3A]))  # IR version 9; then the graph, as long as said
        file.write(bytes([0x80, 0x80, 0x80, 0x80, 0x02]))
        file.seek(size, 1)
        file.write(onnx.ModelProto(metadata_props=[{"key": "k", "value": "v"}]).SerializeToString())
    assert read_onnx_metadata(path) == {"k": "v"}


def test_onnx_file_of_nothing_but_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_MAX_FIELDS", 1000)
    path = tmp_path / "a.onnx"
    path.write_bytes(bytes([0x08, 1]) * 1001)
    with pytest.raises(ArtifactError, match="more fields"):
        read_onnx_metadata(path)


def test_onnx_text_that_is_too_long_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_MAX_TEXT", 100)
    path = tmp_path / "a.onnx"
    onnx.save(small_model(k="v" * 101), path)
    with pytest.raises(ArtifactError, match="a text of 101 bytes"):
        read_onnx_metadata(path)


# ---- other files that an ONNX file names; hostile ones are in backends/test_onnx_bad_files.py


@pytest.mark.parametrize("name", ["onnx", "onnx-float"])
def test_our_files_name_no_others(model_files: dict[str, Path], name: str) -> None:
    assert external_files(model_files[name]) == []


def external_model(*entries: tuple[str, str]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    for key, value in entries:
        model.graph.initializer.add().external_data.add(key=key, value=value)
    return model


def test_files_beside_it_that_an_onnx_file_names(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(external_model(("location", "b"), ("location", "a"), ("location", "b")), path)
    for name in "ab":
        (tmp_path / name).write_bytes(b"weights")
    assert external_files(path) == [tmp_path / "a", tmp_path / "b"]


def test_the_word_location_elsewhere_is_no_file(tmp_path: Path) -> None:
    model = onnx.ModelProto(doc_string="location, EPContext")
    model.graph.node.add(op_type="Add", name="location", doc_string="EPContext")
    onnx.save(model, tmp_path / "a.onnx")
    assert external_files(tmp_path / "a.onnx") == []


def test_fields_of_all_parts_share_one_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_MAX_FIELDS", 1000)
    model = onnx.ModelProto()
    for _ in range(30):
        model.graph.node.add(op_type="Add", name="location").input.extend(["x"] * 40)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="more fields than a model has"):
        external_files(tmp_path / "a.onnx")


@given(content=st.binary(max_size=200))
@settings(max_examples=200)
def test_any_bytes_after_a_model(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "a.onnx"
    path.write_bytes(external_model(("location", "../a")).SerializeToString() + content)
    with pytest.raises(ArtifactError):
        external_files(path)


# ---- pictures of any size


def test_sizes_are_freed(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = helper.make_tensor("w", kind, [2, 3, 1, 1], [1.0] * 6)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    shapes = {"x": [10, 3, 32, 48], "w": [2, 3, 1, 1], "y": [10, 2, 32, 48], "z": [10, 2, 32, 48]}
    x, w, y, z = (helper.make_tensor_value_info(name, kind, of) for name, of in shapes.items())
    graph = helper.make_graph(nodes, "g", [x, w], [z], [weight], value_info=[y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model.metadata_props.add(key="kept", value="x" * 300)
    freed = onnx.load_from_string(free_sizes(model.SerializeToString(), "x"))

    def sides(value):
        shape = value.type.tensor_type.shape
        return [side.dim_value or None for side in shape.dim]

    assert [sides(value) for value in freed.graph.input] == [[None, 3, None, None], [2, 3, 1, 1]]
    assert not freed.graph.output[0].type.tensor_type.HasField("shape")
    assert freed.graph.output[0].type.tensor_type.elem_type == kind
    assert not freed.graph.value_info
    freed.graph.ClearField("input")
    for field in ("output", "value_info", "input"):
        model.graph.ClearField(field)
        freed.graph.ClearField(field)
    assert freed == model  # nothing else


@pytest.mark.parametrize("data", [b"\xff" * 9, b"\x0f\x01", b"\x3a\x05ab"])
def test_sizes_of_what_is_no_model(data):
    with pytest.raises(ValueError, match=r"something else|truncated"):
        free_sizes(data, "x")
