"""TensorRT's libraries: what is refused before anything is loaded, and the export's command."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from tensorrt_stand_in import Library

from efficientface_deploy.backends.tensorrt import library as library_module
from efficientface_deploy.backends.tensorrt.library import load_library, rebuild_command
from efficientface_deploy.errors import BackendError, install_command


@pytest.mark.parametrize("kind", ["trt", "trt-rtx"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "no module named x"),
        (ImportError("libnvinfer.so.10: cannot open shared object file"), "libnvinfer.so.10"),
        (FileNotFoundError("Could not find: nvinfer.dll. Is it on your PATH?\nmore"), "nvinfer"),
        (OSError(), "OSError"),
    ],
)
def test_library_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception, said: str
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(library_module.importlib, "import_module", fail)
    with pytest.raises(BackendError) as caught:
        load_library(kind)
    message = str(caught.value)
    assert said in message
    assert install_command(kind) in message
    assert "\n" not in message


def test_tensorrt_8_is_refused(library: Library) -> None:
    library.module.__version__ = "8.6.1"
    library.module.NetworkDefinitionCreationFlag = types.SimpleNamespace(EXPLICIT_BATCH=0)
    with pytest.raises(BackendError, match=r"TensorRT 10 or newer.*8\.6\.1"):
        load_library("trt")


def test_folder_named_tensorrt_is_not_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(BackendError, match="without its API"):
        load_library("trt")


@pytest.mark.parametrize(("precision", "said"), [("fp32", True), ("fp16", False), ("int8", False)])
def test_rebuild_command_keeps_the_precision(precision: str, said: bool) -> None:
    command = rebuild_command("trt", Path("model.onnx"), 8, precision=precision)
    assert ("--precision fp32" in command) == said


def test_rebuild_command_is_quoted() -> None:
    command = rebuild_command("trt", Path("my model.onnx"), 8, precision="fp16", out=Path("a b"))
    assert command == (
        "efficientface-export --weights 'my model.onnx' --engine trt --max-batch 8 "
        "--out 'a b' --overwrite"
    )
