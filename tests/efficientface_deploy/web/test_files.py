"""The page's files: what is in the folder, and what an archive, a model or a folder must be."""

from __future__ import annotations

import dataclasses
import io
import re
import tarfile

import pytest

from efficientface_deploy.download import CACHE_VARIABLE
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.predictor import ACCURATE_ONNX, BUNDLED_ONNX
from efficientface_deploy.web import files
from efficientface_deploy.web.files import (
    FILE_VARIABLE,
    RUNTIME_FILES,
    page_files,
    read_model,
    write_site,
)

MEMBERS = {f"package/dist/{name}": name.encode() for name in RUNTIME_FILES}


def archive(members: dict[str, bytes], link: str = "") -> bytes:
    """npm's archive, with one of its files as a link."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == link:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def runtime(tmp_path):
    path = tmp_path / "runtime.tgz"
    path.write_bytes(archive({**MEMBERS, "package/dist/ort.all.js": b"", "../../evil": b"x"}))
    return path


def test_page(yunet_file, runtime):
    page = page_files(yunet_file, runtime)
    assert {"index.html", "app.js", "style.css", "efficientface.js", "efficientface.d.ts"} < set(
        page
    )
    assert {name for name in page if name.startswith("ort/")} == {
        *(f"ort/{name}" for name in RUNTIME_FILES),
        "ort/LICENSE",
    }
    assert page["ort/ort.wasm.min.mjs"] == b"ort.wasm.min.mjs"
    assert b"Copyright (c) Microsoft" in page["ort/LICENSE"]
    assert not any(".." in name or name.endswith("evil") for name in page)


def test_the_page_loads_nothing_that_is_not_there(yunet_file, runtime):
    page = page_files(yunet_file, runtime)
    html = page["index.html"].decode()
    assert set(re.findall(r'(?:src|href)="([^"]+)"', html)) <= set(page)
    for name, content in page.items():
        if name.endswith(".js"):
            imported = re.findall(r'from "\./([^"]+)"', content.decode())
            assert set(imported) <= set(page), name
            assert "http://" not in content.decode() and "https://" not in content.decode(), name


def test_the_detector_takes_pictures_of_any_size(yunet_file, runtime):
    onnx = pytest.importorskip("onnx")
    page = page_files(yunet_file, runtime)
    (input_,) = onnx.load_from_string(page["yunet.onnx"]).graph.input
    assert [side.dim_value for side in input_.type.tensor_type.shape.dim] == [0, 3, 0, 0]


def test_the_archive_that_is_named(yunet_file, runtime, monkeypatch):
    monkeypatch.setenv(FILE_VARIABLE, str(runtime))
    assert page_files(yunet_file)["ort/ort.wasm.min.mjs"] == b"ort.wasm.min.mjs"


def test_no_archive_and_no_network(yunet_file, tmp_path, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    nowhere = dataclasses.replace(files.RUNTIME, url="http://127.0.0.1:9/a.tgz")
    monkeypatch.setattr(files, "RUNTIME", nowhere)
    with pytest.raises(BackendError, match=r"^ONNX Runtime Web: expected .*refused; put the file"):
        page_files(yunet_file)


WASM = "package/dist/ort-wasm-simd-threaded.wasm"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not a gzip file"),
        (archive(MEMBERS)[:150], "end|truncated|EOF"),
        (archive({**MEMBERS, WASM: b""}, link=WASM), "no file of its kind"),
        (archive({"package/dist/ort.wasm.min.mjs": b""}), "no ort-wasm-simd-threaded"),
    ],
    ids=["empty", "a page", "cut", "a link", "another package"],
)
def test_an_archive_that_is_none(yunet_file, tmp_path, content, found):
    path = tmp_path / "runtime.tgz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=found) as raised:
        page_files(yunet_file, path)
    message = str(raised.value)
    assert message.startswith(f"{path}: expected npm's archive of onnxruntime-web, found ")
    assert "\n" not in message


def test_a_detector_that_is_none(tmp_path, runtime):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ArtifactError, match=r"OpenCV's model zoo|ONNX model"):
        page_files(path, runtime)


def test_model():
    assert read_model() == BUNDLED_ONNX.read_bytes()
    assert read_model("accurate") == ACCURATE_ONNX.read_bytes()


def test_models_that_a_browser_does_not_run(model_files, yunet_file):
    with pytest.raises(ArtifactError, match="found one with the input 'input'; export it without"):
        read_model(model_files["onnx-float"])
    with pytest.raises(ArtifactError, match="expected a model with a ModelSpec"):
        read_model(yunet_file)
    with pytest.raises(ArtifactError, match="expected an ONNX model"):
        read_model(model_files["torch"])


def test_folder_is_written(tmp_path):
    site = {"index.html": b"page", "ort/a.wasm": b"\0asm"}
    write_site(site, tmp_path / "site")
    assert (tmp_path / "site/ort/a.wasm").read_bytes() == b"\0asm"
    assert sorted(path.name for path in (tmp_path / "site").rglob("*")) == [
        *("a.wasm", "index.html", "ort")
    ]


def test_versions_agree():
    """What is fetched is what the licence, and package.json's line in docs, speak of."""
    version = re.search(r"onnxruntime-web-(.+)\.tgz", files.RUNTIME.name).group(1)
    assert files.RUNTIME.url.endswith(f"/onnxruntime-web-{version}.tgz")
    assert version in (files._STATIC / "ort-license.txt").read_text()


def test_the_real_archive(site):
    """Its modules are those of the version, and WebAssembly is WebAssembly."""
    version = re.search(r"onnxruntime-web-(.+)\.tgz", files.RUNTIME.name).group(1)
    assert f"ONNX Runtime Web v{version}".encode() in site["ort/ort.wasm.min.mjs"][:200]
    for name, content in site.items():
        if name.endswith(".wasm"):
            assert content[:4] == b"\0asm"
