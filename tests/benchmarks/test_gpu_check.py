"""The orchestration of ``make gpu-check``; what its steps run is tested where it lives."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks import gpu_check as bench
from benchmarks.gpu_check import DONE, FAILED, OUT_OF_TIME, SKIPPED, Check, Gpu, parse_options
from efficientface_deploy.errors import ConfigError

CARD = Gpu("NVIDIA Test", "sm86", "12.4")
NO_GPU = "this machine has no NVIDIA driver (libcuda.so.1)"

# Stands for the Python of the steps: writes down what it was told, makes the files that the
# exporter would make, fails where the test wants it, and answers questions as the real one.
FAKE_PYTHON = """#!{python}
import json, os, pathlib, subprocess, sys, time

arguments = sys.argv[1:]
state = pathlib.Path({state!r})
with (state / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
line = " ".join(arguments)
rules = json.loads((state / "rules").read_text())
for part, (code, printed) in rules.items():
    if part in line:
        print(printed)
        sys.exit(code)
if arguments[0] == "-c" and "it.describe_" in line:
    sys.exit(subprocess.run([sys.executable, *arguments]).returncode)
if "'Python'" in line:
    print("Python 3.12.1 in /venv")
elif "answer:" in line:
    print("a library says hello\\nanswer: \\nand goodbye")
elif "--engine" in line:
    options = dict(zip(arguments[2::2], arguments[3::2]))
    out = pathlib.Path(options["--out"])
    out.mkdir(exist_ok=True)
    suffix = dict(onnx="onnx", trt="engine")
    suffix["trt-rtx"] = "rtx.engine"
    name = f"efficientface-{{options['--precision']}}-gpu.{{suffix[options['--engine']]}}"
    (out / name).touch()
    print(f"[ok] {{name}}: made\\n  [ok] precision")
elif "--verify" in line:
    print("[ok] verified by the fake")
elif "training." in line and "--amp" in line:
    print("epoch 3/4: loss 1\\nepoch 4/4: loss 0.5, 9000 images/s, 1 s\\nstudent: it")
elif "pytest" in line:
    print("=== 3 passed, 1 skipped in 2.00s ===")
"""


@pytest.fixture
def fake(tmp_path):
    """A folder with ``python``, ``calls`` and ``rules``: part of a command -> (code, output)."""
    state = tmp_path / "fake"
    state.mkdir()
    python = state / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, state=str(state)))
    python.chmod(0o755)
    (state / "rules").write_text("{}")
    return state


@pytest.fixture
def machine(monkeypatch):
    """Say which GPU the driver finds; a text says why there is none."""

    def have(gpu):
        monkeypatch.setattr(bench, "ask_driver", lambda: gpu)

    have(NO_GPU)
    return have


def check_all(fake, tmp_path, *options):
    code = bench.main(["--python", str(fake / "python"), "--out", str(tmp_path / "out"), *options])
    result = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    return code, result, {step["step"]: step for step in result["steps"]}


def calls_of(fake):
    return [json.loads(line) for line in (fake / "calls").read_text().splitlines()]


def test_without_a_gpu_what_can_be_done_is_done(fake, tmp_path, machine, capsys):
    code, result, steps = check_all(fake, tmp_path)
    assert code == bench.SOME_SKIPPED
    assert result["gpu"] is None and result["kind"] == "gpu-check"
    done = {name for name, step in steps.items() if step["status"] == DONE}
    assert done == {
        *("environment", "versions", "data"),
        *(f"ONNX file, {precision}" for precision in bench.PRECISIONS),
        *(f"TensorRT for RTX engine, {precision}" for precision in bench.PRECISIONS),
        *(f"verify efficientface-{precision}-gpu.onnx" for precision in bench.PRECISIONS),
    }
    skipped = {name: step["remark"] for name, step in steps.items() if step["status"] == SKIPPED}
    assert len(done) + len(skipped) == len(steps)
    assert skipped["GPU"] == NO_GPU
    tests = ("pytest -m gpu", "pytest -m gpu, training")
    for name in ("TensorRT engine, fp16", *tests, "train an LDG", "latency"):
        assert skipped[name] == f"needs a GPU: {NO_GPU}"
    assert skipped["verify efficientface-fp16-gpu.engine"] == "was not made"
    assert skipped["verify efficientface-fp16-gpu.rtx.engine"] == f"needs a GPU: {NO_GPU}"
    rtx = next(call for call in calls_of(fake) if "trt-rtx" in call)
    assert rtx[rtx.index("--compute-capability") + 1] == bench.WITHOUT_GPU
    summary = (tmp_path / "out" / "gpu-check.md").read_text()
    assert f"no GPU: {NO_GPU}" in summary and "| latency | skipped | 0 | needs a GPU" in summary
    assert "latency ... skipped" in capsys.readouterr().out


def test_with_a_gpu_everything_is_done(fake, tmp_path, machine):
    machine(CARD)
    data = tmp_path / "data"
    data.mkdir()
    code, result, steps = check_all(fake, tmp_path, "--data", str(data))
    assert code == bench.ALL_DONE and {step["status"] for step in steps.values()} == {DONE}
    assert result["gpu"] == {"name": "NVIDIA Test", "capability": "sm86", "cuda": "12.4"}
    assert "numpy" in result["software"]["packages"]
    assert result["machine"]["usable_cpus"] and "commit" in result["git"]
    assert steps["environment"]["remark"] == "Python 3.12.1 in /venv"
    assert steps["pytest -m gpu"]["remark"] == "3 passed, 1 skipped in 2.00s"
    for name in ("train an LDG", "train a student beside it"):
        assert steps[name]["remark"] == "epoch 4/4: loss 0.5, 9000 images/s, 1 s"
    assert steps["TensorRT engine, int8"]["remark"] == "[ok] efficientface-int8-gpu.engine: made"
    calls = calls_of(fake)
    for call in calls:
        if "--engine" in call:  # calibration is for INT8; everything is verified on the data
            assert ("--calib" in call) == ("int8" in call)
            assert call[call.index("--val") + 1] == str(data)
        if "trt-rtx" in call:
            assert call[call.index("--compute-capability") + 1] == "sm86"
    latency = next(call for call in calls if call[0] == "benchmarks/latency.py")
    assert str(tmp_path / "out" / "artifacts") in latency
    assert latency[1].endswith(".safetensors")
    assert any(call[0] == "benchmarks/accuracy.py" for call in calls)


def test_results_are_one_file_to_take_along(fake, tmp_path, machine):
    """A machine lent for minutes gives back few files, none of them in a deep folder."""
    machine(CARD)
    out = tmp_path / "out"
    check_all(fake, tmp_path)
    for name in ("faces/train/0/a.json", "artifacts/model.onnx", "latency/latency.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    bench.pack(out)
    with tarfile.open(out / bench.PACKED) as packed:
        names = set(packed.getnames())
    assert {"gpu-check.json", "gpu-check.md", "latency/latency.json", "logs/01.log"} <= names
    assert not {"faces/train/0/a.json", "artifacts/model.onnx"} & names


def test_a_step_that_fails_does_not_end_the_others(fake, tmp_path, machine):
    machine(CARD)
    rules = {
        "--engine trt --precision fp16": (1, "error: efficientface-fp16: outputs differ\nbye"),
        "check_targets('trt-rtx'": (1, "efficientface_deploy.errors.ConfigError: no sm86"),
        "training.prepare": (1, "Traceback\nModuleNotFoundError: No module named 'PIL'"),
        "-c import torch, onnxscript": (1, "ModuleNotFoundError: No module named 'onnxscript'"),
        "benchmarks/latency.py": (-9, ""),
    }
    (fake / "rules").write_text(json.dumps(rules))
    code, _, steps = check_all(fake, tmp_path)
    assert code == bench.SOME_FAILED

    def outcome(name):
        return steps[name]["status"], steps[name]["remark"]

    assert outcome("data") == (FAILED, "exit code 1: ModuleNotFoundError: No module named 'PIL'")
    assert outcome("ONNX file, fp32")[0] == SKIPPED  # the bundled ONNX file is that
    assert outcome("ONNX file, fp16")[0] == DONE
    assert outcome("ONNX file, int8") == (SKIPPED, "needs images to calibrate with")
    failure = "exit code 1: error: efficientface-fp16: outputs differ"
    assert outcome("TensorRT engine, fp16") == (FAILED, failure)
    assert outcome("verify efficientface-fp16-gpu.engine") == (SKIPPED, "was not made")
    assert outcome("TensorRT engine, fp32")[0] == DONE
    assert outcome("TensorRT for RTX engine, fp32")[0] == SKIPPED
    assert "ConfigError: no sm86" in outcome("TensorRT for RTX engine, fp32")[1]
    assert outcome("latency")[0] == FAILED
    exports = [call for call in calls_of(fake) if "--engine" in call]
    assert all(call[call.index("--weights") + 1].endswith(".onnx") for call in exports)


def check_in(folder, *options):
    folder.mkdir(exist_ok=True)
    return Check(parse_options(options), folder)


HANGING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("compiling with", child.pid, flush=True)
child.wait()
"""


def test_a_step_that_hangs_is_stopped_with_all_its_processes(tmp_path):
    check = check_in(tmp_path)
    check.step("slow", 4, "-c", HANGING)
    assert check.steps[0]["status"] == OUT_OF_TIME
    reason, _, child = check.steps[0]["remark"].rpartition(" ")
    assert reason == "stopped: not done within 4 s; compiling with"
    for _ in range(100):  # a kill takes effect in its own time
        if not is_running(child):
            return
        time.sleep(0.1)
    pytest.fail("its process runs on")


def is_running(process):
    try:
        status = Path("/proc", process, "stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # ended, but nobody asked yet


def test_no_step_begins_when_the_time_is_over(tmp_path):
    check = check_in(tmp_path, "--minutes", "0.01")
    assert not check.step("late", 60, "-c", f"open({str(tmp_path / 'begun')!r}, 'w')")
    assert check.steps[0]["status"] == SKIPPED and not (tmp_path / "begun").exists()
    assert check.steps[0]["remark"] == "the 0.01 minutes are over"


def test_nothing_need_be_installed():
    """Not even numpy, which our packages import."""
    command = [sys.executable, "-I", "-S", str(ROOT / "benchmarks" / "gpu_check.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--wheels DIR" in done.stdout, done.stderr


def test_the_python_of_the_steps_may_be_named_as_in_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    name = Path(sys.executable).name
    assert parse_options(["--python", name]).python == Path(sys.executable)
    assert parse_options(["--python", "nowhere"]).python == Path("nowhere").absolute()


def test_what_was_copied_along_is_found_after_the_clone(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "wheels"))
    found = check_in(tmp_path).tell("sys.path", "import sys")
    assert found.index(str(ROOT)) < found.index(str(tmp_path / "wheels"))


def test_the_steps_run_this_clone(tmp_path):
    check = check_in(tmp_path)
    for package, folder in (("benchmarks", "benchmarks"), ("efficientface_export", "export")):
        found = check.tell(f"{package}.__path__[0]", f"import {package}")
        assert Path(found).resolve() == ROOT / folder


def test_installs_from_wheels_alone(fake, tmp_path, machine, monkeypatch):
    """What is installed for a GPU with CUDA 12, where the system has TensorRT and where not."""
    machine(CARD)
    release = tmp_path / "nv_tegra_release"
    monkeypatch.setattr(bench, "_JETSON", release)
    wheels = tmp_path / "wheels"
    for name, rules in (
        ("bare", {"-c import tensorrt": (1, ""), "-c import setuptools": (1, "")}),
        ("jetson", {}),
    ):
        (fake / "rules").write_text(json.dumps(rules))
        check = check_in(tmp_path / name, "--wheels", str(wheels))
        check.python = fake / "python"
        check.gpu = CARD
        if name == "jetson":
            check.gpu = bench.Gpu("Orin", "sm87", "12.6")
            release.touch()
        bench.install_everything(check, "")
        statuses = [step["status"] for step in check.steps]
        assert statuses == [DONE] * 3 + [SKIPPED if name == "jetson" else DONE]
    installs = [call[4:] for call in calls_of(fake) if "install" in call]
    source = ["--no-index", "--find-links", str(wheels)]
    assert all(call[: len(source)] == source for call in installs)
    bare, jetson = installs[:4], installs[4:]
    bindings = "cuda-bindings>=12.8,<13"
    assert bare[1] == [*source, f"{ROOT}[gpu]"]
    assert bare[2] == [*source, "tensorrt-cu12>=10.3", bindings]
    assert jetson[2:] == [[*source, "--no-build-isolation", "cuda-python<12.7"]]
    assert bare[3] == [*source, f"{ROOT}[trt-rtx]"]


def test_asks_the_driver_itself(monkeypatch):
    class Driver:
        """CUDA's driver interface, of one card."""

        start, count = 0, 1

        def cuInit(self, flags):  # noqa: N802
            return self.start

        def cuDeviceGetCount(self, count):  # noqa: N802
            count._obj.value = self.count
            return 0

        def cuDeviceGet(self, device, number):  # noqa: N802
            return 0

        def cuDeviceGetName(self, name, size, device):  # noqa: N802
            name.value = b"NVIDIA Test"

        def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
            value._obj.value = {75: 8, 76: 6}[attribute]

        def cuDriverGetVersion(self, version):  # noqa: N802
            version._obj.value = 12040

    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert bench.ask_driver() == CARD
    driver.count = 0
    assert bench.ask_driver() == "the NVIDIA driver finds no GPU"
    driver.start = 999
    assert bench.ask_driver() == "the NVIDIA driver does not start (cuInit gives 999)"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--wheels", "nowhere"], "--wheels: expected a folder"),
        (["--weights", "."], "--weights: expected a file"),
        (["--minutes", "nan"], "--minutes: expected a finite number, found nan"),
        (["--minutes", "0"], "--minutes: expected at least 0.001, found 0"),
        (["--weigths", "x"], "--weigths: expected an option of benchmarks/gpu_check.sh"),
        (["--out", "."], "--out: expected a new or an empty folder"),
    ],
)
def test_options_that_cannot_be_used(options, problem):
    with pytest.raises(ConfigError, match=f"^{problem}"):
        bench.main(options)


def test_an_interrupt_leaves_the_summary(fake, tmp_path):
    """SIGTERM to the script itself, while a step runs."""
    hanging = tmp_path / "hanging"
    hanging.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(100)\n")
    hanging.chmod(0o755)
    out = tmp_path / "out"
    script = str(ROOT / "benchmarks" / "gpu_check.sh")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [script, "--python", str(hanging), "--out", str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "environment ..." not in (read := os.read(process.stdout.fileno(), 4096).decode()):
            assert read
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == bench.INTERRUPTED
    steps = json.loads((out / "gpu-check.json").read_text())["steps"]
    assert steps[-1]["step"] == "environment" and steps[-1]["remark"] == "interrupted"
