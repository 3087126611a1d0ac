"""Everything that needs a GPU, in one go of ten minutes: ``make gpu-check``.

Installs, exports, builds engines with whichever TensorRT is there, verifies them, runs ``pytest -m
gpu`` and measures. Each step has a time limit, and one that fails or cannot run does not end the
others: it is listed with its reason. Needs the standard library alone.

Exit codes: 0 all steps done; 1 a step failed; 2 the options cannot be used; 3 none failed, but some
could not run here (without a GPU this is the best that can come of it); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ROOT
from benchmarks.report.result import default_folder, new_result

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
ALL_DONE, SOME_FAILED, BAD_OPTIONS, SOME_SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130

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
class GpuCheckConfig:
    """Options of ``benchmarks/gpu_check.py``."""

    wheels: Path | None = None
    data: Path | None = None
    weights: Path | None = None
    python: Path | None = None
    minutes: float = 10.0
    out: Path | None = None


_HELP = {
    "wheels": "folder of wheels to install from, instead of the package index",
    "data": "prepared data set to calibrate and verify with (default: synthetic faces)",
    "weights": "checkpoint to export (default: the bundled model)",
    "python": "a Python with everything installed already; nothing is installed then",
    "minutes": "time for all steps together (default: 10)",
    "out": "folder of the result, new or empty (default: a new one in build/)",
}


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


@dataclasses.dataclass(frozen=True)
class Step:
    """Something to do.

    Attributes:
        name: In the summary.
        seconds: Time limit.
        do: Returns a remark; raises :class:`StepError` or :class:`SkipError`.
    """

    name: str
    seconds: float
    do: Callable[[Check], str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: str
    status: str
    seconds: float
    remark: str


class Check:
    """What the steps share: options, the GPU, the Python that they run, the time that is left."""

    def __init__(self, config: GpuCheckConfig, out: Path) -> None:
        self.config = config
        self.out = out
        self.artifacts = out / "artifacts"
        self.python = config.python or Path(sys.executable)
        self.gpu: Gpu | None = None
        self.no_gpu = "the driver was not asked"
        self.data = config.data
        self.software: dict[str, Any] | None = None
        self.outcomes: list[Outcome] = []
        self._end = time.monotonic() + 60 * config.minutes
        self._step_end = self._end
        self._log = out / "logs" / "none.log"

    def take(self, step: Step) -> Outcome:
        """Do a step within its limit, and remember what became of it."""
        started = time.monotonic()
        self._step_end = min(self._end, started + step.seconds)
        name = "".join(char if char.isalnum() else "-" for char in step.name)
        self._log = self.out / "logs" / f"{len(self.outcomes):02d}-{name}.log"
        try:
            if self._end - started < _LEAST_SECONDS:
                raise SkipError(f"the {self.config.minutes:g} minutes are over")
            status, remark = DONE, step.do(self)
        except SkipError as error:
            status, remark = SKIPPED, str(error)
        except (StepError, OSError) as error:
            status, remark = FAILED, str(error)
        except KeyboardInterrupt:
            seconds = round(time.monotonic() - started, 1)
            self.outcomes.append(Outcome(step.name, FAILED, seconds, "interrupted"))
            raise
        seconds = round(time.monotonic() - started, 1)
        outcome = Outcome(step.name, status, seconds, remark[:_MAX_REASON])
        self.outcomes.append(outcome)
        return outcome

    def run(self, *command: str | Path, python: bool = True) -> str:
        """Run a command, by default of the steps' Python, and give what it printed.

        Raises:
            StepError: It failed, or the step's time is over; names the line that says why.
        """
        words = [str(word) for word in ((self.python, *command) if python else command)]
        limit = max(0.0, self._step_end - time.monotonic())
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            begin = log.tell()
            code = _run_within(limit, words, log.fileno(), self._environment())
        with self._log.open("rb") as log:
            log.seek(begin)
            printed = log.read().decode(errors="replace")
        if code is None:
            raise StepError(f"stopped: not done within {limit:.0f} s; {_reason(printed)}")
        if code:
            raise StepError(f"exit code {code}: {_reason(printed)}")
        return printed

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

    def need_modules(self, *names: str) -> None:
        """Skip where a module cannot be imported."""
        for name in names:
            try:
                self.run("-c", f"import {name}")
            except StepError as error:
                raise SkipError(f"needs {name}: {error}") from None

    def _environment(self) -> dict[str, str]:
        """The clone's own code, whether or not it could be installed."""
        packages = self.out / "packages"
        link = packages / "efficientface_export"
        if not link.is_symlink():
            packages.mkdir(parents=True, exist_ok=True)
            link.symlink_to(ROOT / "export", target_is_directory=True)
        path = os.pathsep.join([str(ROOT), str(packages)])
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}


def plan_steps(config: GpuCheckConfig) -> list[Step]:
    """All steps, in the order in which they need each other."""
    installs = [
        Step(
            "install the toolkit",
            240,
            _partial(install, f"{ROOT}[torch,export,bench]", *_TEST_PACKAGES),
        ),
        Step("install ONNX Runtime", 120, install_onnxruntime),
        Step("install TensorRT", 180, install_tensorrt),
        Step("install TensorRT for RTX", 120, _partial(install, f"{ROOT}[trt-rtx]")),
    ]
    onnx = [
        Step(f"ONNX file, {precision}", 150, _partial(export_onnx, precision))
        for precision in PRECISIONS
    ]
    engines = [
        Step(f"{LIBRARIES[kind]} engine, {precision}", 120, _partial(build_engine, kind, precision))
        for kind in LIBRARIES
        for precision in PRECISIONS
    ]
    files = [f"efficientface-{precision}-gpu.onnx" for precision in PRECISIONS]
    files += [
        f"efficientface-{precision}-gpu.{suffix}"
        for suffix in SUFFIXES.values()
        for precision in PRECISIONS
    ]
    return [
        Step("GPU", 20, look_for_gpu),
        Step("environment", 60, make_environment),
        *(installs if config.python is None else ()),
        Step("versions", 30, record_versions),
        Step("data", 60, prepare_data),
        *onnx,
        *engines,
        *(Step(f"verify {file}", 40, _partial(verify, file)) for file in files),
        Step("pytest -m gpu", 120, run_tests),
        Step("latency", 240, measure_latency),
        # Synthetic faces have no expressions to get right.
        *([Step("accuracy", 100, measure_accuracy)] if config.data else ()),
    ]


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
    if check.config.python is not None:
        version = check.tell("platform.python_version()", "import platform")
        return f"{check.config.python}, Python {version}"
    folder = _BUILD / "gpu-venv"
    python = folder / "bin" / "python"
    if not python.exists():
        check.run("-m", "venv", "--system-site-packages", folder)
    check.python = python
    return str(folder)


def install(check: Check, *requirements: str) -> str:
    """Install what pip is to find, in the wheel folder or the index."""
    command: list[str | Path] = ["-m", "pip", "install", "--disable-pip-version-check"]
    if check.config.wheels is not None:
        command += ["--no-index", "--find-links", check.config.wheels]
    with contextlib.suppress(StepError):
        check.run("-c", "import setuptools, wheel")
        command.append("--no-build-isolation")  # which would fetch setuptools again
    check.run(*command, *requirements)
    return ", ".join(requirements).replace(str(ROOT), ".")


def install_onnxruntime(check: Check) -> str:
    """For the GPU where there is one, else for the CPU: they are one module in two packages."""
    return install(check, f"{ROOT}[{'gpu' if check.gpu else 'cpu'}]")


def install_tensorrt(check: Check) -> str:
    """TensorRT for the driver's CUDA; a system that has one, such as a Jetson, keeps its own."""
    major = int(check.need_gpu().cuda.partition(".")[0])
    bindings = f"cuda-python>=12.4,<{major + 1}"  # a driver refuses those of a newer CUDA
    try:
        check.run("-c", "import tensorrt")
    except StepError:
        return install(check, f"tensorrt-cu{major}>=10.3", bindings)
    return install(check, bindings)


def record_versions(check: Check) -> str:
    """What the steps run with."""
    before = "import json; from efficientface_deploy.workbench.environment import describe_software"
    check.software = json.loads(check.tell("json.dumps(describe_software())", before))
    packages: dict[str, str] = check.software["packages"]
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def prepare_data(check: Check) -> str:
    """The data set that was given, or synthetic faces: enough to choose ranges by."""
    if check.data is not None:
        return str(check.data)
    faces = check.out / "faces"
    check.run(
        "-m", "training.prepare", "synthetic", "--train", "840", "--test", "70", "--out", faces
    )
    check.data = faces
    return "synthetic faces: speed is real, INT8's accuracy is not"


def export_onnx(check: Check, precision: str) -> str:
    """The file that the engines of this precision are built from."""
    return _export(check, "onnx", precision, "--target", "gpu")


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
    return _export(check, kind, precision, *options)


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
    """The tests that a machine without a GPU skips."""
    check.need_gpu()
    check.need_modules("pytest")
    # A test file that needs what is not here must not keep the others from running.
    options = ("-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider")
    printed = check.run("-m", "pytest", *options)
    return printed.strip().splitlines()[-1].strip("= ")


def measure_latency(check: Check) -> str:
    """PyTorch, ONNX Runtime on CUDA, and every engine."""
    check.need_gpu()
    folder = check.out / "latency"
    options = ("--batch", "1,8,32", "--seconds", "1", "--cold", "1", "--out", folder)
    check.run("benchmarks/latency.py", *_models(check), "--backends", _BACKENDS, *options)
    return str(folder / "latency.json")


def measure_accuracy(check: Check) -> str:
    """How good each file is on the labelled data set that was given."""
    check.need_gpu()
    folder = check.out / "accuracy"
    options = ("--data", str(check.config.data), "--out", folder)
    check.run("benchmarks/accuracy.py", *_models(check), "--backends", _BACKENDS, *options)
    return str(folder / "accuracy.json")


def ask_driver() -> Gpu | str:
    """The first GPU, or why there is none to use; by CUDA's driver interface."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``benchmarks/gpu_check.py``."""
    config = parse_options(argv)
    result = new_result("gpu-check", config)
    out = config.out or _BUILD / default_folder(result).name
    if problem := find_problem(config, out):
        print(f"error: {problem}", file=sys.stderr)
        return BAD_OPTIONS
    out.mkdir(parents=True, exist_ok=True)
    check = Check(config, out)
    try:
        with _terminated_as_interrupted():
            for step in plan_steps(config):
                print(f"{step.name} ...", end=" ", flush=True)
                outcome = check.take(step)
                print(f"{outcome.status} ({outcome.seconds:g} s): {outcome.remark}", flush=True)
                write_summary(check, result)
    except KeyboardInterrupt:
        write_summary(check, result)
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"\nwrote gpu-check.json and gpu-check.md to {out}")
    return exit_code(check.outcomes)


def parse_options(argv: Sequence[str] | None) -> GpuCheckConfig:
    """The command line; without the package's own reader, which needs numpy."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(GpuCheckConfig):
        kind = float if field.name == "minutes" else _absolute
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, help=_HELP[field.name]
        )
    return GpuCheckConfig(**vars(parser.parse_args(argv)))


def _absolute(text: str) -> Path:
    """Steps run in the clone's folder. Links stay: a venv's Python is one."""
    return Path(text).absolute()


def find_problem(config: GpuCheckConfig, out: Path) -> str | None:
    """What is wrong with the options, in one line."""
    for name in ("wheels", "data"):
        path = getattr(config, name)
        if path is not None and not path.is_dir():
            return f"--{name}: expected a folder, found none at {path}; give one that is there"
    for name in ("weights", "python"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            return f"--{name}: expected a file, found none at {path}; give one that is there"
    if not 0 < config.minutes < math.inf:
        return f"--minutes: expected a time above 0, found {config.minutes}; give e.g. 10"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"--out: expected a new or empty folder, found {out} in use; give another"
    return None


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 when a step failed, 3 when one could not run, else 0."""
    statuses = {outcome.status for outcome in outcomes}
    if FAILED in statuses:
        return SOME_FAILED
    return SOME_SKIPPED if SKIPPED in statuses else ALL_DONE


def write_summary(check: Check, result: dict[str, Any]) -> None:
    """Write what is known so far, after every step: the next one may take the machine with it."""
    summary = {
        **result,
        "software": check.software or result["software"],
        "gpu": dataclasses.asdict(check.gpu) if check.gpu else None,
        "steps": [dataclasses.asdict(outcome) for outcome in check.outcomes],
    }
    for name, text in (
        ("gpu-check.json", json.dumps(summary, indent=1, default=str) + "\n"),
        ("gpu-check.md", as_markdown(check, summary)),
    ):
        temporary = check.out / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(check.out / name)


def as_markdown(check: Check, summary: dict[str, Any]) -> str:
    """The summary as text."""
    gpu = check.gpu
    card = f"{gpu.name}, {gpu.capability}, CUDA {gpu.cuda}" if gpu else f"no GPU: {check.no_gpu}"
    counts = [
        f"{sum(outcome.status == status for outcome in check.outcomes)} {status}"
        for status in (DONE, FAILED, SKIPPED)
    ]
    lines = [
        f"{card} · {summary['date']} · commit {summary['git']['commit']}",
        "",
        ", ".join(f"{name} {it}" for name, it in summary["software"]["packages"].items()),
        "",
        f"Steps: {', '.join(counts)}. Logs are in `logs/`, files and their report in `artifacts/`.",
        "",
        "| step | | seconds | |",
        "|---|---|---|---|",
    ]
    for outcome in check.outcomes:
        remark = outcome.remark.replace("|", "\\|")
        status = f"**{outcome.status}**" if outcome.status == FAILED else outcome.status
        lines.append(f"| {outcome.step} | {status} | {outcome.seconds:g} | {remark} |")
    return "\n".join(lines) + "\n"


def _partial(do: Callable[..., str], *arguments: Any) -> Callable[[Check], str]:
    """A step with more arguments than the check."""

    @functools.wraps(do)
    def run(check: Check) -> str:
        return do(check, *arguments)

    return run


def _export(check: Check, engine: str, precision: str, *options: str) -> str:
    command: list[str | Path] = ["-m", "efficientface_export.cli", "--engine", engine]
    command += ["--precision", precision, *options]
    if precision == "int8":
        if check.data is None:
            raise SkipError("needs images to calibrate with")
        command += ["--calib", check.data]
    if check.config.data is not None:
        command += ["--val", check.config.data]
    printed = check.run(*command, "--weights", _weights(check), "--out", check.artifacts)
    rows = [line for line in printed.splitlines() if line.startswith("[")]
    return rows[-1] if rows else "made"


def _weights(check: Check) -> Path:
    """What was asked for, else the bundled model: as an ONNX file where there is no torch."""
    if check.config.weights is not None:
        return check.config.weights
    try:
        check.run("-c", "import torch")
        suffix = "safetensors"
    except StepError:
        suffix = "onnx"
    return next((ROOT / "efficientface_deploy" / "weights").glob(f"*.{suffix}"))


def _models(check: Check) -> list[Path]:
    """The checkpoint and all that was made of it."""
    made = [check.artifacts] if check.artifacts.is_dir() else []
    if not made:
        raise SkipError("nothing was exported")
    return [_weights(check), *made]


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


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is like Ctrl-C: the running step ends, and the summary is written."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
