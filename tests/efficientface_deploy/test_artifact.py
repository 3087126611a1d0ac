from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientface_deploy.artifact import (
    PROVENANCE_KEY,
    SPEC_KEY,
    check_preset,
    provenance_from_metadata,
    read_safetensors_metadata,
    read_sidecar,
    sidecar_path,
    spec_from_metadata,
    write_sidecar,
)
from efficientface_deploy.errors import ArtifactError, SpecError
from efficientface_deploy.files import atomic_path, file_hash, require_file, write_text
from efficientface_deploy.spec import PRESETS

SPEC = PRESETS["rafdb"]


def safetensors_file(header: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header


# ---- atomic writes


def test_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "model.onnx"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, ".onnx")
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_failure_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "model.onnx"
    if old:
        path.write_bytes(old)
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == (["model.onnx"] if old else [])
    if old:
        assert path.read_bytes() == old


def test_writer_that_moved_its_file_away_is_an_error_and_keeps_the_old(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(path) as temporary:
        temporary.unlink()
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.json", "{}")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


def test_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_text(path, "new \u00e4")
        assert reader.read() == b"old"
    assert path.read_text(encoding="utf-8") == "new \u00e4"


def test_file_hash(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(range(256)) * 10_000)
    assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_require_file(tmp_path):
    with pytest.raises(ArtifactError, match="an ONNX model, found no such file"):
        require_file(tmp_path / "x.onnx", "an ONNX model")
    with pytest.raises(ArtifactError, match="found a folder"):
        require_file(tmp_path, "an ONNX model")


def test_require_file_refuses_what_is_not_worth_reading(tmp_path):
    path = tmp_path / "x.onnx"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ArtifactError, match=r"an ONNX model below 1 GiB, found a file of 1\.0 GiB"):
        require_file(path, "an ONNX model")
    path.unlink()
    os.mkfifo(path)
    for pipe in (path, "/dev/zero"):
        with pytest.raises(ArtifactError, match="found a pipe or device"):
            require_file(pipe, "an ONNX model")


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
    spec, provenance = read_sidecar(engine)
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


def test_sidecar_too_long_to_be_one(engine):
    with sidecar_path(engine).open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(ArtifactError, match=r"model\.engine\.json: expected a sidecar below 1 GiB"):
        read_sidecar(engine)


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
