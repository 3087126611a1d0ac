"""Everything that needs a GPU, in one go of ten minutes: ``make gpu-check``.

Installs, exports, builds engines with whichever TensorRT is there, verifies them, runs ``pytest -m
gpu`` and measures. Each step has a time limit, and one that fails or cannot run does not end the
others: it is listed with its reason. Needs the standard library alone, and imports nothing of ours:
before the first steps nothing is installed.

Exit codes: 0 all steps done; 1 a step failed; 2 the options cannot be used; 3 none failed, but some
could not run here (without a GPU this is the best that can come of it); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
ALL_DONE, SOME_FAILED, BAD_OPTIONS, SOME_SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "fp16", "int8")
SUFFIXES = {"trt": "engine", "trt-rtx": "rtx.engine"}
LIBRARIES = {"trt": "TensorRT", "trt-rtx": "TensorRT for RTX"}
WITHOUT_GPU = "sm89"  # what TensorRT for RTX builds for where there is no card to ask

_BUILD = ROOT / "build"  # ignored by git
_TEST_PACKAGES = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")
_BACKENDS = "torch:cuda,onnx:cuda,trt,trt-rtx"
_ANSWER = "answer:"
_LEAST_SECONDS = 2.0  # of a step that is still begun
_MAX_REASON = 300


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU, as the driver describes it."""

    name: str
    capability: str  # e.g. sm89
    cuda: str  # the newest CUDA that the driver serves, e.g. 12.4


class StepError(Exception):
    """A step that did not do what it is for."""


class SkipError(Exception):
    """A step that cannot run here."""


class Check:
    """What the steps share: options, the GPU, the Python that they run, the time that is left.

    Args:
        options: From :func:`parse_options`.
        out: Folder of the result.
    """

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options = options
        self.out = out
        self.artifacts = out / "artifacts"
        self.python: Path = options.python or Path(sys.executable)
        self.data: Path | None = options.data
        self.gpu: Gpu | None = None
        self.no_gpu = "the driver was not asked"
        now = datetime.datetime.now(datetime.timezone.utc)
        self.result: dict[str, Any] = {
            "schema": 2,
            "kind": "gpu-check",
            "date": now.isoformat(timespec="seconds"),
            "config": {name: value for name, value in vars(options).items() if name != "out"},
            **{"machine": {}, "software": {}, "git": {}, "gpu": None, "steps": []},
        }
        self._end = time.monotonic() + 60 * options.minutes
        self._step_end = self._end
        self._log = out / "logs" / "none.log"

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What became of each step so far."""
        steps: list[dict[str, Any]] = self.result["steps"]
        return steps

    def step(self, name: str, seconds: float, do: Callable[..., str], *arguments: Any) -> None:
        """Do a step within its limit, and write down what became of it.

        Args:
            name: In the summary.
            seconds: Time limit.
            do: Called with this check and the arguments; returns a remark, and raises
                :class:`StepError` or :class:`SkipError`.
            arguments: What else it needs.
        """
        print(f"{name} ...", end=" ", flush=True)
        started = time.monotonic()
        self._step_end = min(self._end, started + seconds)
        slug = "".join(char if char.isalnum() else "-" for char in name)
        self._log = self.out / "logs" / f"{len(self.steps):02d}-{slug}.log"
        status, remark = FAILED, "interrupted"
        try:
            if self._end - started < _LEAST_SECONDS:
                raise SkipError(f"the {self.options.minutes:g} minutes are over")
            status, remark = DONE, do(self, *arguments)
        except SkipError as error:
            status, remark = SKIPPED, str(error)
        except (StepError, OSError) as error:
            remark = str(error)
        finally:  # after every step: the next one may take the machine with it
            taken = round(time.monotonic() - started, 1)
            row = {"step": name, "status": status, "seconds": taken, "remark": remark[:_MAX_REASON]}
            self.steps.append(row)
            self.write_summary()
        print(f"{status} ({taken:g} s): {row['remark']}", flush=True)

    def run(self, *command: str | Path) -> str:
        """Run a command of the steps' Python, and give what it printed.

        Raises:
            StepError: It failed, or the step's time is over; names the line that says why.
        """
        words = [str(word) for word in (self.python, *command)]
        limit = max(0.0, self._step_end - time.monotonic())
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a+b") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            begin = log.tell()
            code = _run_within(limit, words, log.fileno(), self._environment())
            log.seek(begin)
            printed = log.read().decode(errors="replace")
        if code is None:
            raise StepError(f"stopped: not done within {limit:.0f} s; {_reason(printed)}")
        if code:
            raise StepError(f"exit code {code}: {_reason(printed)}")
        return printed

    def runs(self, code: str) -> bool:
        """Whether Python code runs in the steps' environment."""
        with contextlib.suppress(StepError):
            self.run("-c", code)
            return True
        return False

    def tell(self, expression: str, before: str = "") -> str:
        """What an expression is in the steps' environment, as text; libraries may print too."""
        printed = self.run("-c", f"{before}\nprint(); print('{_ANSWER}', {expression})")
        answers = [line for line in printed.splitlines() if line.startswith(_ANSWER)]
        return answers[-1].removeprefix(_ANSWER).strip()

    def need_gpu(self) -> Gpu:
        """The GPU, or the reason to skip."""
        if self.gpu is None:
            raise SkipError(f"needs a GPU: {self.no_gpu}")
        return self.gpu

    def weights(self) -> Path:
        """What was asked for, else the bundled model: as an ONNX file where there is no torch."""
        suffix = "safetensors" if self.options.weights or self.runs("import torch") else "onnx"
        bundled = (ROOT / "efficientface_deploy" / "weights").glob(f"*.{suffix}")
        return self.options.weights or next(bundled)

    def write_summary(self) -> None:
        """Write what is known so far."""
        self.result["gpu"] = dataclasses.asdict(self.gpu) if self.gpu else None
        for name, text in (
            ("gpu-check.json", json.dumps(self.result, indent=1, default=str) + "\n"),
            ("gpu-check.md", as_markdown(self)),
        ):
            temporary = self.out / f".{name}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.out / name)

    def _environment(self) -> dict[str, str]:
        """The clone's own code, whether or not it could be installed; then what was there."""
        packages = self.out / "packages"
        link = packages / "efficientface_export"
        if not link.is_symlink():
            packages.mkdir(parents=True, exist_ok=True)
            link.symlink_to(ROOT / "export", target_is_directory=True)
        path = [str(ROOT), str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        fixed = {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
        return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(path)}


def check_everything(check: Check) -> None:
    """All steps, in the order in which they need each other."""
    check.step("GPU", 20, look_for_gpu)
    check.step("environment", 60, make_environment)
    if check.options.python is None:
        install_everything(check)
    check.step("versions", 30, record_versions)
    check.step("data", 60, prepare_data)
    for precision in PRECISIONS:
        check.step(f"ONNX file, {precision}", 150, export, "onnx", precision, "--target", "gpu")
    for kind, library in LIBRARIES.items():
        for precision in PRECISIONS:
            check.step(f"{library} engine, {precision}", 120, build_engine, kind, precision)
    for suffix in ("onnx", *SUFFIXES.values()):
        for precision in PRECISIONS:
            file = f"efficientface-{precision}-gpu.{suffix}"
            check.step(f"verify {file}", 40, verify, file)
    check.step("pytest -m gpu", 120, run_tests)
    latency = ("--batch", "1,8,32", "--seconds", "1", "--cold", "1")
    check.step("latency", 240, benchmark, "latency", *latency)
    if check.options.data:  # synthetic faces have no expressions to get right
        check.step("accuracy", 100, benchmark, "accuracy", "--data", check.options.data)


# ---- the steps


def look_for_gpu(check: Check) -> str:
    """Ask the driver itself: a device with TensorRT need not have PyTorch or nvidia-smi."""
    found = ask_driver()
    if isinstance(found, str):
        check.no_gpu = found
        raise SkipError(found)
    check.gpu = found
    return f"{found.name}, {found.capability}, driver for CUDA {found.cuda}"


def make_environment(check: Check) -> str:
    """A virtual environment that sees what the system has, such as a Jetson's TensorRT."""
    if check.options.python is not None:
        version = check.tell("platform.python_version()", "import platform")
        return f"{check.options.python}, Python {version}"
    folder = _BUILD / "gpu-venv"
    python = folder / "bin" / "python"
    if not python.exists():
        check.run("-m", "venv", "--system-site-packages", folder)
    check.python = python
    return str(folder)


def install_everything(check: Check) -> None:
    """The steps that install the toolkit and the libraries that it runs on."""
    toolkit = (f"{ROOT}[torch,export,bench]", *_TEST_PACKAGES)
    check.step("install the toolkit", 240, install, *toolkit)
    # For the GPU where there is one, else for the CPU: they are one module in two packages.
    onnxruntime = f"{ROOT}[{'gpu' if check.gpu else 'cpu'}]"
    check.step("install ONNX Runtime", 120, install, onnxruntime)
    check.step("install TensorRT", 180, install_tensorrt)
    check.step("install TensorRT for RTX", 120, install, f"{ROOT}[trt-rtx]")


def install(check: Check, *requirements: str) -> str:
    """Install what pip is to find, in the wheel folder or the index."""
    command: list[str | Path] = ["-m", "pip", "install", "--disable-pip-version-check"]
    if check.options.wheels is not None:
        command += ["--no-index", "--find-links", check.options.wheels]
    if check.runs("import setuptools, wheel"):
        command.append("--no-build-isolation")  # which would fetch setuptools again
    check.run(*command, *requirements)
    return ", ".join(requirements).replace(str(ROOT), ".")


def install_tensorrt(check: Check) -> str:
    """TensorRT for the driver's CUDA; a system that has one, such as a Jetson, keeps its own."""
    major = int(check.need_gpu().cuda.partition(".")[0])
    bindings = f"cuda-python>=12.4,<{major + 1}"  # a driver refuses those of a newer CUDA
    own = check.runs("import tensorrt")
    return install(check, *(() if own else (f"tensorrt-cu{major}>=10.3",)), bindings)


def record_versions(check: Check) -> str:
    """What the steps run on and with."""
    for key in ("machine", "software", "commit"):
        before = "import json; from efficientface_deploy.workbench import environment as it"
        found = json.loads(check.tell(f"json.dumps(it.describe_{key}())", before))
        check.result["git" if key == "commit" else key] = found
    return _versions(check)


def prepare_data(check: Check) -> str:
    """The data set that was given, or synthetic faces: enough to choose ranges by."""
    if check.data is not None:
        return str(check.data)
    faces, sizes = check.out / "faces", ("--train", "840", "--test", "70")
    check.run("-m", "training.prepare", "synthetic", *sizes, "--out", faces)
    check.data = faces
    return "synthetic faces: speed is real, INT8's accuracy is not"


def export(check: Check, engine: str, precision: str, *options: str) -> str:
    """Make a file, and verify it on the data that was given."""
    command: list[str | Path] = ["-m", "efficientface_export.cli", "--engine", engine]
    command += ["--precision", precision, *options]
    if precision == "int8":
        if check.data is None:
            raise SkipError("needs images to calibrate with")
        command += ["--calib", check.data]
    if check.options.data is not None:
        command += ["--val", check.options.data]
    printed = check.run(*command, "--weights", check.weights(), "--out", check.artifacts)
    rows = [line for line in printed.splitlines() if line.startswith("[")]
    return rows[-1] if rows else "made"


def build_engine(check: Check, kind: str, precision: str) -> str:
    """An engine for the card at hand, by the library of this kind."""
    before = "from efficientface_export.tensorrt.builder import available, check_targets"
    answer = f"available('{kind}') or ''"
    options: list[str] = []
    if kind == "trt":
        check.need_gpu()
    else:
        target = check.gpu.capability if check.gpu else WITHOUT_GPU
        answer = f"available('{kind}') or check_targets('{kind}', ['{target}']) or ''"
        options = ["--compute-capability", target]
    try:
        reason = check.tell(answer, before)
    except StepError as error:  # the library does not build for this card
        reason = str(error)
    if reason:
        raise SkipError(reason)
    return export(check, kind, precision, *options)


def verify(check: Check, file: str) -> str:
    """Compare a file's outputs with PyTorch's, which lie beside it."""
    path = check.artifacts / file
    if not path.exists():
        raise SkipError("was not made")
    if path.suffix == ".engine":
        check.need_gpu()
    printed = check.run("-m", "efficientface_export.cli", "--verify", path)
    return next((line for line in printed.splitlines() if line.startswith("[")), "verified")


def run_tests(check: Check) -> str:
    """The tests that a machine without a GPU skips: they are the runtime's and the export's."""
    check.need_gpu()
    if not check.runs("import pytest"):
        raise SkipError("needs pytest")
    # A test file that needs what is not here must not keep the others from running.
    options = ("-m", "gpu", "--continue-on-collection-errors")
    cache = f"cache_dir={check.out / 'pytest-cache'}"
    folders = ("tests/efficientface_deploy", "tests/export")
    printed = check.run("-m", "pytest", *options, "-o", cache, *folders)
    return printed.strip().splitlines()[-1].strip("= ")


def benchmark(check: Check, name: str, *options: str | Path) -> str:
    """One of our benchmarks, of the checkpoint and all that was made of it."""
    check.need_gpu()
    if not check.artifacts.is_dir():
        raise SkipError("nothing was exported")
    models = (check.weights(), check.artifacts)
    where = ("--backends", _BACKENDS, "--out", check.out / name)
    check.run(f"benchmarks/{name}.py", *models, *options, *where)
    return str(check.out / name / f"{name}.json")


def ask_driver() -> Gpu | str:
    """The first GPU, or why there is none to use; by CUDA's driver interface."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    count, device, version, major, minor = (ctypes.c_int() for _ in range(5))
    name = ctypes.create_string_buffer(256)
    if code := cuda.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit gives {code})"
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU"
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    cuda.cuDriverGetVersion(ctypes.byref(version))  # 1000 * major + 10 * minor
    served = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", served)


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``benchmarks/gpu_check.py``."""
    options = parse_options(argv)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = options.out or _BUILD / f"gpu-check-{moment}"
    if problem := find_problem(options, out):
        print(f"error: {problem}", file=sys.stderr)
        return BAD_OPTIONS
    out.mkdir(parents=True, exist_ok=True)
    check = Check(options, out)
    # SIGTERM is like Ctrl-C: the running step ends, and the summary is written.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_everything(check)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\nwrote gpu-check.json and gpu-check.md to {out}")
    statuses = {row["status"] for row in check.steps}
    if FAILED in statuses:
        return SOME_FAILED
    return SOME_SKIPPED if SKIPPED in statuses else ALL_DONE


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; without the package's own reader, which needs numpy."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def path(text: str) -> Path:
        """Steps run in the clone's folder. Links stay: a venv's Python is one."""
        return Path(text).absolute()

    for name, kind, default, text in (
        ("wheels", path, None, "folder of wheels to install from, instead of the package index"),
        ("data", path, None, "prepared data set to calibrate and verify with (default: synthetic)"),
        ("weights", path, None, "checkpoint to export (default: the bundled model)"),
        ("python", _executable, None, "a Python that has everything; nothing is installed then"),
        ("minutes", float, 10.0, "time for all steps together (default: 10)"),
        ("out", path, None, "folder of the result, new or empty (default: a new one in build/)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser.parse_args(argv)


def _executable(text: str) -> Path:
    """A path, or a name to be found as a shell would."""
    return Path(shutil.which(text) or text).absolute()


def find_problem(options: argparse.Namespace, out: Path) -> str | None:
    """What is wrong with the options, in one line."""
    for name, kind, there in (
        ("wheels", "folder", Path.is_dir),
        ("data", "folder", Path.is_dir),
        ("weights", "file", Path.is_file),
        ("python", "file", Path.is_file),
    ):
        path = getattr(options, name)
        if path is not None and not there(path):
            return f"--{name}: expected a {kind}, found none at {path}; give one that is there"
    if not 0 < options.minutes < float("inf"):
        return f"--minutes: expected a time above 0, found {options.minutes}; give e.g. 10"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"--out: expected a new or empty folder, found {out} in use; give another"
    return None


def as_markdown(check: Check) -> str:
    """The summary as text."""
    gpu, result = check.gpu, check.result
    card = f"{gpu.name}, {gpu.capability}, CUDA {gpu.cuda}" if gpu else f"no GPU: {check.no_gpu}"
    statuses = [row["status"] for row in check.steps]
    counts = ", ".join(f"{statuses.count(name)} {name}" for name in (DONE, FAILED, SKIPPED))
    lines = [
        f"{card} · {result['date']} · commit {result['git'].get('commit')}",
        _versions(check),
        f"Steps: {counts}. Logs are in `logs/`, files and their report in `artifacts/`.",
        "| step | | seconds | |\n|---|---|---|---|",
    ]
    for row in check.steps:
        remark = row["remark"].replace("|", "\\|")
        status = f"**{FAILED}**" if row["status"] == FAILED else row["status"]
        lines[-1] += f"\n| {row['step']} | {status} | {row['seconds']:g} | {remark} |"
    return "\n\n".join(lines) + "\n"


def _versions(check: Check) -> str:
    packages: dict[str, str] = check.result["software"].get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _run_within(
    limit: float, command: Sequence[str], log: int, environment: dict[str, str]
) -> int | None:
    """Exit code of a command, None when its time was over; no process of it is left behind."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _reason(printed: str) -> str:
    """The line that says why: the last that begins with "error", else the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it printed nothing"])[-1]


if __name__ == "__main__":
    sys.exit(main())
