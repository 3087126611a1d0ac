"""Everything that needs a GPU, in one go of ten minutes: make gpu-check.

Installs, exports, builds engines with whichever TensorRT is there, verifies them, runs ``pytest -m
gpu`` and measures. Each step has a time limit, and one that fails or cannot run does not end the
others: it is listed with its reason. Needs the standard library alone, and of ours only what reads
a command line: before the first steps nothing is installed.

Exit codes: 0 all steps done; 1 a step failed; 2 the options cannot be used; 3 none failed, but some
could not run here or ran out of time (without a GPU this is the best that can come of it); 130
interrupted.
"""

from __future__ import annotations

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
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from efficientface_deploy.launch import launch

    launch("benchmarks.gpu_check", "bench")

from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import check_new_folder

DONE, FAILED, SKIPPED, OUT_OF_TIME = "done", "failed", "skipped", "out of time"
ALL_DONE, SOME_FAILED, SOME_SKIPPED, INTERRUPTED = 0, 1, 3, 130

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "fp16", "int8")
ENGINES = {  # what the export makes: its name in the summary, its files' suffix
    "onnx": ("ONNX file", "onnx"),
    "trt": ("TensorRT engine", "engine"),
    "trt-rtx": ("TensorRT for RTX engine", "rtx.engine"),
}
PATHS = {"wheels": "folder", "data": "folder", "weights": "file", "python": "file"}  # must be there
PACKED = "gpu-check.tar.gz"
WITHOUT_GPU = "sm89"  # what TensorRT for RTX builds for where there is no card to ask

_JETSON = Path("/etc/nv_tegra_release")
_BUILD = ROOT / "build"  # ignored by git
_TEST_PACKAGES = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")
_BACKENDS = "torch:cuda,onnx:cuda,trt,trt-rtx"
_EXPORT = "efficientface_export.cli"
_SAY_VERSION = "import sys; print('Python', sys.version.split()[0], 'in', sys.prefix)"
_ANSWER = "answer:"
_LEAST_SECONDS = 2.0  # of a step that is still begun
_MAX_REASON = 300
_NOT_PACKED = ("faces", "packages", "pytest-cache")
_PACKED_SUFFIXES = (".json", ".md", ".log", ".png", ".csv")


@dataclasses.dataclass(frozen=True)
class GpuCheckConfig:
    """Options of ``benchmarks/gpu_check.sh``."""

    wheels: Path | None = option(
        None,
        metavar="DIR",
        help="folder of wheels to install from, instead of the package index",
        first=True,
    )
    data: Path | None = option(
        None,
        metavar="DIR",
        help="prepared data set to calibrate and verify with (default: synthetic)",
        first=True,
    )
    python: Path | None = option(
        None, help="a Python that has everything; nothing is installed then", first=True
    )
    weights: Path | None = option(
        None, metavar="FILE", help="checkpoint to export (default: the bundled model)"
    )
    out: Path | None = option(
        None,
        metavar="DIR",
        help="folder of the result, new or empty (default: a new one in build/)",
    )
    minutes: float = option(10.0, metavar="N", minimum=0.001, help="time for all steps together")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU, as the driver describes it."""

    name: str
    capability: str  # e.g. sm89
    cuda: str  # the newest CUDA that the driver serves, e.g. 12.4


class StepError(Exception):
    """A command that failed, or was not done in time; says why.

    Args:
        reason: Says it.
        status: ``failed`` or ``out of time``.
    """

    def __init__(self, reason: str, status: str = FAILED) -> None:
        super().__init__(reason)
        self.status = status


class Check:
    """What the steps share: options, the Python that they run, the time that is left, the result.

    Args:
        options: From :func:`parse_options`.
        out: Folder of the result.
    """

    def __init__(self, options: GpuCheckConfig, out: Path) -> None:
        self.options = options
        self.out = out
        self.python: Path = options.python or Path(sys.executable)
        self.gpu: Gpu | None = None
        self.no_gpu = "the driver was not asked"
        self.steps: list[dict[str, Any]] = []
        now = datetime.datetime.now(datetime.timezone.utc)
        self.result: dict[str, Any] = {
            "schema": 2,
            "kind": "gpu-check",
            "date": now.isoformat(timespec="seconds"),
            "config": {name: value for name, value in vars(options).items() if name != "out"},
            **{"machine": {}, "software": {}, "git": {}, "gpu": None, "steps": self.steps},
        }
        self._end = time.monotonic() + 60 * options.minutes

    def step(
        self,
        name: str,
        seconds: float,
        *command: str | Path,
        skip: str = "",
        remark: str = "",
        line: str = "[",
    ) -> bool:
        """Run a command of the steps' Python within a time limit; write down what became of it.

        Args:
            name: In the summary.
            seconds: Time limit.
            command: Its arguments.
            skip: Why it cannot run here.
            remark: What to say of it when it is done, in place of its last line.
            line: How the line begins that says what it has done; else its last one.

        Returns:
            Whether it is done.
        """
        print(f"{name} ...", end=" ", flush=True)
        started = time.monotonic()
        if self._end - started < _LEAST_SECONDS:
            skip = f"the {self.options.minutes:g} minutes are over"
        status, said = (SKIPPED, skip) if skip else (FAILED, "interrupted")
        try:
            if not skip:
                printed = self.run(*command, seconds=seconds)
                status, said = DONE, remark or _last_line(printed, line).strip("= ") or "done"
        except StepError as error:
            status, said = error.status, str(error)
        finally:
            self.note(name, status, said, time.monotonic() - started)
        return status == DONE

    def note(self, name: str, status: str, remark: str, seconds: float = 0.0) -> None:
        """Write down a step, and all that is known: the next one may take the machine with it."""
        row: dict[str, Any] = {"step": name, "status": status, "seconds": round(seconds, 1)}
        row["remark"] = remark.replace(str(ROOT), ".")[:_MAX_REASON]
        self.steps.append(row)
        print(f"{status} ({row['seconds']:g} s): {row['remark']}", flush=True)
        text = json.dumps(self.result, indent=1, default=str) + "\n"
        for file, content in (("gpu-check.json", text), ("gpu-check.md", as_markdown(self))):
            temporary = self.out / f".{file}"
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(self.out / file)

    def run(self, *command: str | Path, seconds: float = 60) -> str:
        """Run a command of the steps' Python, and give what it printed.

        Raises:
            StepError: It failed, or its time is over; names the line that says why.
        """
        words = [str(word) for word in (self.python, *command)]
        limit = max(0.0, min(seconds, self._end - time.monotonic()))
        path = self.out / "logs" / f"{len(self.steps):02d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            begin = log.tell()
            try:
                code = _run_within(limit, words, log.fileno(), self._environment())
            except OSError as error:
                raise StepError(str(error)) from None
            log.seek(begin)
            printed = log.read().decode(errors="replace")
        if code != 0:
            what = f"exit code {code}:" if code else f"stopped: not done within {limit:.0f} s;"
            said = f"{what} {_last_line(printed, 'error') or 'it printed nothing'}"
            raise StepError(said, FAILED if code else OUT_OF_TIME)
        return printed

    def lacks(self, module: str) -> str:
        """Why a module cannot be imported by the steps; empty where it can."""
        try:
            self.run("-c", f"import {module}")
            return ""
        except StepError as error:
            return f"needs {module}: {error}"

    def tell(self, expression: str, before: str = "") -> str:
        """What an expression is in the steps' environment, as text; libraries may print too.

        Raises:
            StepError: It cannot be told.
        """
        printed = self.run("-c", f"{before}\nprint(); print('{_ANSWER}', {expression})")
        answers = [line for line in printed.splitlines() if line.startswith(_ANSWER)]
        return answers[-1].removeprefix(_ANSWER).strip()

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


# ---- the steps, in the order in which they need each other


def check_everything(check: Check) -> None:
    """All steps."""
    options = check.options
    no_gpu = look_for_gpu(check)
    if options.python is None:
        make_environment(check)
        install_everything(check, no_gpu)
    else:
        check.step("environment", 60, "-c", _SAY_VERSION)
    record_versions(check)
    data, artifacts, weights = prepare_data(check), check.out / "artifacts", choose_weights(check)
    for engine, (title, _) in ENGINES.items():
        more, reason = engine_options(check, engine, no_gpu)
        for precision in PRECISIONS:
            given = ["-m", _EXPORT, "--engine", engine, "--precision", precision, *more]
            given += ["--weights", str(weights), "--out", str(artifacts)]
            given += ["--val", str(options.data)] if options.data else []
            skip = reason
            if (engine, precision, weights.suffix) == ("onnx", "fp32", ".onnx"):
                skip = "the file to export from is that; another wants a checkpoint"
            if precision == "int8":
                given += ["--calib", str(data)]
                skip = reason or ("" if data else "needs images to calibrate with")
            check.step(f"{title}, {precision}", 150, *given, skip=skip)
    for engine, (_, suffix) in ENGINES.items():
        for precision in PRECISIONS:
            path = artifacts / f"efficientface-{precision}-gpu.{suffix}"
            skip = "" if engine == "onnx" else no_gpu
            skip = skip if path.exists() else "was not made"
            check.step(f"verify {path.name}", 40, "-m", _EXPORT, "--verify", path, skip=skip)
    # The tests that a machine without a GPU skips. A test file that needs what is not here must not
    # keep the others from running.
    tests = ("-m", "pytest", "-m", "gpu", "--continue-on-collection-errors")
    cache = ("-o", f"cache_dir={check.out / 'pytest-cache'}")
    folders = ("tests/efficientface_deploy", "tests/export")
    reason = no_gpu or check.lacks("pytest")
    check.step("pytest -m gpu", 120, *tests, *cache, *folders, skip=reason)
    reason = reason or check.lacks("training.student")
    check.step("pytest -m gpu, training", 120, *tests, *cache, "tests/training", skip=reason)
    train_on_gpu(check, data, no_gpu or check.lacks("training.student"))
    reason = no_gpu or check.lacks("benchmarks.latency")
    reason = reason or ("" if artifacts.is_dir() else "nothing was exported")
    models = (weights, artifacts, "--backends", _BACKENDS, "--out")
    latency = ("benchmarks/latency.py", *models, check.out / "latency", "--batch", "1,8,32")
    check.step("latency", 240, *latency, "--seconds", "1", "--cold", "1", skip=reason)
    if options.data:  # synthetic faces have no expressions to get right
        accuracy = ("benchmarks/accuracy.py", *models, check.out / "accuracy")
        check.step("accuracy", 100, *accuracy, "--data", options.data, skip=reason)


def train_on_gpu(check: Check, data: Path | None, reason: str) -> None:
    """An LDG, and a student that queries it in every step; each says how many images a second."""
    reason = reason or ("" if data else "needs images to train on")
    common: list[str | Path] = ["--data", str(data), "--select", "last", "--epochs", "4"]
    common += ["--device", "cuda", "--data-on-device", "yes", "--amp", "bf16", "--no-tensorboard"]
    teacher, student = ("-m", "training.teacher", *common), ("-m", "training.student", *common)
    ldg = check.out / "ldg"
    given: tuple[str | Path, ...] = (*teacher, "--arch", "resnet18", "--out", ldg)
    made = check.step("train an LDG", 90, *given, skip=reason, line="epoch")
    reason = reason or ("" if made else "there is no LDG")
    given = (*student, "--teacher", ldg / "teacher.safetensors", "--views", "0")
    given = (*given, "--out", check.out / "student")
    check.step("train a student beside it", 90, *given, skip=reason, line="epoch")


def look_for_gpu(check: Check) -> str:
    """Ask the driver itself: a device with TensorRT need not have PyTorch or nvidia-smi.

    Returns:
        Why a step that needs a GPU is skipped; empty where there is one.
    """
    print("GPU ...", end=" ")
    found = ask_driver()
    if isinstance(found, Gpu):
        check.gpu, check.result["gpu"] = found, dataclasses.asdict(found)
        check.note("GPU", DONE, f"{found.name}, {found.capability}, driver for CUDA {found.cuda}")
        return ""
    check.no_gpu = found
    check.note("GPU", SKIPPED, found)
    return f"needs a GPU: {found}"


def make_environment(check: Check) -> None:
    """A virtual environment that sees what the system has, such as a Jetson's TensorRT."""
    folder = _BUILD / "gpu-venv"
    python = folder / "bin" / "python"
    if python.exists():
        check.python = python
        check.step("environment", 60, "-c", _SAY_VERSION)
    elif check.step("environment", 60, "-m", "venv", "--system-site-packages", folder):
        check.python = python


def install_everything(check: Check, no_gpu: str) -> None:
    """The toolkit and the libraries that it runs on, from the wheel folder or the index."""
    pip: list[str | Path] = ["-m", "pip", "install", "--disable-pip-version-check"]
    if check.options.wheels is not None:
        pip += ["--no-index", "--find-links", check.options.wheels]
    if not check.lacks("setuptools, wheel"):
        pip.append("--no-build-isolation")  # which would fetch setuptools again
    toolkit = (f"{ROOT}[torch,export,bench]", *_TEST_PACKAGES)
    check.step("install the toolkit", 240, *pip, *toolkit)
    # For the GPU where there is one, else for the CPU: they are one module in two packages.
    check.step("install ONNX Runtime", 120, *pip, f"{ROOT}[{'gpu' if check.gpu else 'cpu'}]")
    # TensorRT for the driver's CUDA; a system that has one, such as a Jetson, keeps its own.
    major = int(check.gpu.cuda.partition(".")[0]) if check.gpu else 0
    tensorrt = [f"cuda-bindings>=12.8,<{major + 1}"]  # a driver refuses those of a newer CUDA
    rtx = ""
    if check.gpu and _JETSON.is_file():
        # A Jetson's driver refuses those of a newer minor release too; before 12.8 the package
        # has another name.
        tensorrt = [f"cuda-python<{major}.{int(check.gpu.cuda.partition('.')[2]) + 1}"]
        rtx = "TensorRT for RTX serves no Jetson"
    if not no_gpu and check.lacks("tensorrt"):
        tensorrt.insert(0, f"tensorrt-cu{major}>=10.3")
    check.step("install TensorRT", 180, *pip, *tensorrt, skip=no_gpu)
    check.step("install TensorRT for RTX", 120, *pip, f"{ROOT}[trt-rtx]", skip=rtx)


def record_versions(check: Check) -> None:
    """What the steps run on and with."""
    print("versions ...", end=" ")
    before = "import json; from efficientface_deploy.workbench import environment as it"
    described = "machine=it.describe_machine(), software=it.describe_software()"
    try:
        answer = check.tell(f"json.dumps(dict({described}, git=it.describe_commit()))", before)
        check.result |= json.loads(answer)
        check.note("versions", DONE, _versions(check))
    except StepError as error:
        check.note("versions", error.status, str(error))


def prepare_data(check: Check) -> Path | None:
    """The data set that was given, or synthetic faces: enough to choose ranges by."""
    data: Path | None = check.options.data
    if data is not None:
        print("data ...", end=" ")
        check.note("data", DONE, str(data))
        return data
    faces, sizes = check.out / "faces", ("--train", "840", "--test", "70")
    prepare = ("-m", "training.prepare", "synthetic", *sizes, "--out", faces)
    remark = "synthetic faces: speed is real, INT8's accuracy is not"
    return faces if check.step("data", 60, *prepare, remark=remark) else None


def choose_weights(check: Check) -> Path:
    """What was asked for, else the bundled model: its ONNX file where none can be traced."""
    suffix = "onnx" if check.lacks("torch, onnxscript") else "safetensors"
    bundled = (ROOT / "efficientface_deploy" / "weights").glob(f"*.{suffix}")
    return check.options.weights or next(bundled)


def engine_options(check: Check, engine: str, no_gpu: str) -> tuple[list[str], str]:
    """How to build engines for the card at hand by this library; or why that cannot be."""
    if engine == "onnx":
        return ["--target", "gpu"], ""
    if engine == "trt" and no_gpu:
        return [], no_gpu
    options, answer = [], f"available('{engine}') or ''"
    if engine == "trt-rtx":
        target = check.gpu.capability if check.gpu else WITHOUT_GPU
        options = ["--compute-capability", target]
        answer = f"available('{engine}') or check_targets('{engine}', ['{target}']) or ''"
    before = "from efficientface_export.tensorrt.builder import available, check_targets"
    try:
        return options, check.tell(answer, before)
    except StepError as error:  # the library does not build for this card
        return options, str(error)


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


def pack(out: Path) -> None:
    """One file to take along from a machine that gives few: results, reports and logs."""
    with tarfile.open(out / PACKED, "w:gz") as packed:
        for path in sorted(out.rglob("*")):
            parts = path.relative_to(out).parts
            if path.is_file() and parts[0] not in _NOT_PACKED and path.suffix in _PACKED_SUFFIXES:
                packed.add(path, Path(*parts))


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``benchmarks/gpu_check.py``."""
    options = parse_options(argv)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = options.out or _BUILD / f"gpu-check-{moment}"
    check_paths(options, out)
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
    pack(out)
    print(f"\nwrote gpu-check.json, gpu-check.md and all of them in {PACKED} to {out}")
    statuses = {row["status"] for row in check.steps}
    if FAILED in statuses:
        return SOME_FAILED
    return SOME_SKIPPED if statuses & {SKIPPED, OUT_OF_TIME} else ALL_DONE


def parse_options(argv: Sequence[str] | None) -> GpuCheckConfig:
    """The command line, with paths that hold from any folder: steps run in the clone's."""
    options = parse_config(
        GpuCheckConfig,
        argv,
        prog="benchmarks/gpu_check.sh",
        description=__doc__ or "",
        example="--data data/ferplus",
    )
    python = options.python and Path(shutil.which(options.python) or options.python)
    given = {name: getattr(options, name) for name in (*PATHS, "out")} | {"python": python}
    # Links stay: a virtual environment's Python is one.
    absolute = {name: path and path.absolute() for name, path in given.items()}
    return dataclasses.replace(options, **absolute)


def check_paths(options: GpuCheckConfig, out: Path) -> None:
    """Refuse paths that cannot be used, before anything is done.

    Raises:
        ConfigError: Says which.
    """
    for name, kind in PATHS.items():
        path: Path | None = getattr(options, name)
        there = Path.is_dir if kind == "folder" else Path.is_file
        if path is not None and not there(path):
            found = f"none at {path}"
            raise ConfigError(f"--{name}", f"a {kind}", found, "give one that is there")
    check_new_folder(out, "--out")


def as_markdown(check: Check) -> str:
    """The summary as text."""
    gpu, result = check.gpu, check.result
    card = f"{gpu.name}, {gpu.capability}, CUDA {gpu.cuda}" if gpu else f"no GPU: {check.no_gpu}"
    statuses = [row["status"] for row in check.steps]
    kinds = (DONE, FAILED, OUT_OF_TIME, SKIPPED)
    counts = ", ".join(f"{statuses.count(kind)} {kind}" for kind in kinds if kind in statuses)
    lines = [
        f"{card} · {result['date']} · commit {result['git'].get('commit')}",
        _versions(check),
        f"Steps: {counts}. Logs are in `logs/`, files and their report in `artifacts/`.",
        "| step | | seconds | |\n|---|---|---|---|",
    ]
    for row in check.steps:
        remark = row["remark"].replace("|", "\\|")
        status = row["status"]
        status = f"**{status}**" if status in (FAILED, OUT_OF_TIME) else status
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


def _last_line(printed: str, start: str) -> str:
    """The last line that begins so, in any case; else the last one; empty where there is none."""
    lines = [line for line in printed.splitlines() if line.strip()]
    marked = [line for line in lines if line.lower().startswith(start)]
    return (marked or lines or [""])[-1].strip()


if __name__ == "__main__":
    sys.exit(main())
