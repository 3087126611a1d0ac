"""PyInstaller's hook: what is imported by name is taken along."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import efficientface_deploy
from efficientface_deploy import backends
from efficientface_deploy.pyinstaller import get_hook_dirs

ROOT = Path(efficientface_deploy.__file__).resolve().parent.parent


def run_hook() -> dict[str, list[object]]:
    (folder,) = get_hook_dirs()
    return runpy.run_path(str(Path(folder) / "hook-efficientface_deploy.py"))


def test_backends_and_their_libraries_are_named():
    hidden = run_hook()["hiddenimports"]
    assert {"efficientface_deploy.backends.onnx", "onnxruntime"} <= set(hidden)
    assert all(importlib.util.find_spec(name) for name in hidden)
    assert not any("torch" in name for name in hidden)


def test_library_that_is_not_installed_is_not_named(monkeypatch):
    monkeypatch.setattr(backends, "missing_reason", lambda name: "it is not installed")
    assert run_hook()["hiddenimports"] == []


def test_bundled_model_is_taken_along():
    datas = run_hook()["datas"]
    names = ["efficientface-ferplus-160.onnx", "efficientface-ferplus.onnx"]
    assert [Path(path).name for path, _ in datas] == names
    for path, target in datas:
        assert ROOT / target / Path(path).name == Path(path)


PROGRAM = """
import sys
import efficientface_deploy as ef
with ef.load() as predictor:
    print(predictor.backend, predictor(sys.argv[1]).label)
"""


@pytest.mark.slow
def test_frozen_program(tmp_path):
    if importlib.util.find_spec("PyInstaller") is None:
        pytest.skip("needs PyInstaller: pip install pyinstaller")
    (tmp_path / "app.py").write_text(PROGRAM)
    Image.new("RGB", (80, 80), (200, 150, 120)).save(tmp_path / "face.png")
    # The hook is named, since this tree need not be installed.
    options = ["--log-level", "ERROR", "--paths", str(ROOT)]
    options += ["--additional-hooks-dir", *get_hook_dirs()]
    command = [sys.executable, "-m", "PyInstaller", *options, "app.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=280)
    shutil.move(tmp_path / "dist" / "app", tmp_path / "moved")
    program = tmp_path / "moved" / ("app.exe" if sys.platform == "win32" else "app")
    done = subprocess.run(
        [program, "face.png"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("onnx:cpu ")
