from __future__ import annotations

from pathlib import Path

import pytest

from efficientface_deploy import backends
from efficientface_deploy.backends import (
    REGISTRY,
    BackendOptions,
    Entry,
    create_backend,
    missing_reason,
    resolve_backend,
)
from efficientface_deploy.errors import ArtifactError, BackendError


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("model.onnx", "onnx"),
        ("model.engine", "trt"),
        ("model.rtx.engine", "trt-rtx"),
        ("model.safetensors", "torch"),
        ("model.pth.tar", "torch"),
        ("pretrained.tar", "torch"),
        ("model.pth", "torch"),
        ("model.pt", "torch"),
    ],
)
def test_suffix_chooses_the_backend(name, backend):
    assert resolve_backend(Path("some.onnx/folder") / name) == (backend, "")
    assert resolve_backend(Path(name), backend) == (backend, "")


@pytest.mark.parametrize(
    ("requested", "device"),
    [
        ("onnx", ""),
        ("onnx:cpu", "cpu"),
        ("onnx:cuda", "cuda"),
        ("onnx:tensorrt", "tensorrt"),
        ("onnx:tensorrt-rtx", "tensorrt-rtx"),
        ("onnx:openvino", "openvino"),
    ],
)
def test_device_of_onnx(requested, device):
    assert resolve_backend(Path("a.onnx"), requested) == ("onnx", device)


@pytest.mark.parametrize("name", ["model", "model.jpg", "model.trt", "onnx", "model.onnx.json", ""])
def test_unknown_file(name):
    with pytest.raises(ArtifactError, match=r"\.onnx, .*\.engine.*efficientface-export"):
        resolve_backend(Path(name))


@pytest.mark.parametrize(
    "requested", ["tflite", "", "ONNX", "onnx:gpu", "torch:mps", "trt:cuda", ":cpu", "auto:cpu"]
)
def test_unknown_backend_or_device(requested):
    with pytest.raises(BackendError, match="choose one of these"):
        resolve_backend(Path("model.onnx"), requested)


@pytest.mark.parametrize(
    ("name", "requested"),
    [("a.onnx", "torch"), ("a.engine", "trt-rtx"), ("a.rtx.engine", "trt"), ("a.jpg", "onnx")],
)
def test_backend_that_does_not_run_this_file(name, requested):
    with pytest.raises(BackendError, match=f"backend {requested}: .*{name}"):
        resolve_backend(Path(name), requested)


def test_missing_package_names_what_to_install(monkeypatch):
    entry = Entry("onnx", "OnnxBackend", (".x",), "no_such", "cpu")
    monkeypatch.setitem(REGISTRY, "none", entry)
    assert missing_reason("none") == "no_such is not installed"
    with pytest.raises(BackendError, match=r"pip install '.*\[cpu\]'"):
        create_backend("none", Path("a.x"), BackendOptions())


def test_package_that_cannot_be_imported_is_no_traceback(monkeypatch):
    monkeypatch.setitem(REGISTRY, "none", Entry("no_module", "X", (".x",), "json", "cpu"))
    with pytest.raises(BackendError, match=r"No module named .*no_module.*pip install"):
        create_backend("none", Path("a.x"), BackendOptions())


def test_library_that_fails_to_import_at_open_is_no_traceback(monkeypatch):
    backend = create_backend("onnx", Path("a.onnx"), BackendOptions())

    def broken():
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(backend, "_open", broken)
    with pytest.raises(BackendError, match="libcudart"):
        backend.open()


def test_creating_a_backend_touches_nothing():
    backend = create_backend("onnx", Path("/missing.onnx"), BackendOptions())
    assert isinstance(backend, backends.Backend)
    with pytest.raises(ArtifactError, match="no such file"):
        backend.open()


def test_every_suffix_belongs_to_one_backend():
    """The first match of a suffix wins, so a longer one has to come before the one it contains."""
    for name, entry in REGISTRY.items():
        for suffix in entry.suffixes:
            assert resolve_backend(Path("model" + suffix))[0] == name
