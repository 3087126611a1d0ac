"""A package that is missing is one line that names the extra."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from efficientface_deploy.errors import BackendError, install_command
from efficientface_deploy.workbench import requirements
from efficientface_deploy.workbench.requirements import missing_reason, require_package

SETUP = (Path(__file__).resolve().parents[3] / "setup.py").read_text(encoding="utf-8")


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize("module", requirements._EXTRAS)
def test_error_names_the_package_and_an_extra_that_there_is(module: str) -> None:
    with pytest.raises(BackendError) as caught:
        require_package(module, "benchmarks")
    message = str(caught.value)
    assert message.startswith(f"benchmarks: expected {module.replace('_', '-')}, to ")
    (extra,) = re.findall(r"\[(.+)\]", message)
    assert f'"{extra}": ' in SETUP


@pytest.mark.usefixtures("nothing")
def test_several_in_one_reason() -> None:
    install = install_command("peers,engine")
    reason = missing_reason("MNN", "pnnx", "onnx")
    assert reason == f"no MNN and no pnnx and no onnx here; {install}"


def test_what_is_installed_is_not_missing() -> None:
    require_package("onnx")
    assert missing_reason("onnx", "onnxruntime") is None
