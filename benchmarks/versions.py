"""The runtime's tests and the exported files on every version that we promise.

``python benchmarks/versions.py DIR`` (``make test-versions``), slow: for each row of
:data:`ROWS` a virtual environment without PyTorch under ``build/versions``, in it the runtime's
tests, and every ONNX file of the folder against PyTorch and against itself on this environment.
``--python`` tries interpreters that have everything instead (``make test-aarch64``).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.versions", "cpu,export,bench")

import numpy as np

import efficientface_deploy as ef
from benchmarks import ROOT
from benchmarks.measure.environments import find_python
from benchmarks.report.publish import run_benchmark
from benchmarks.report.result import Result, Row, new_result
from efficientface_deploy.command import option
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.files import write_text
from efficientface_export.verification.reference import load_test_set

WORK = ROOT / "build" / "versions"
IMAGES = 200
EXAMPLE = "artifacts --data datasets/ferplus"
COMPARE = "benchmarks.measure.exported_files"
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "filelock")
TESTS = "tests/efficientface_deploy"
BACKENDS = f"{TESTS}/backends"
# What runs ONNX Runtime, for environments in which nothing else is new.
ONNX_TESTS = tuple(
    f"{TESTS}/{name}.py"
    for name in (
        *("backends/test_conformance", "backends/test_onnx", "backends/test_onnx_bad_files"),
        *("test_bundled", "test_old_files", "test_predictor"),
    )
)
# They need PyTorch; test_launch starts the commands of training and export, too.
NEED_TORCH = (f"{TESTS}/models", f"{BACKENDS}/test_torch.py", f"{TESTS}/test_launch.py")
# What the environment with PyTorch makes for the others, see tests/conftest.py.
MADE = WORK / "made"
MAKE = (
    f"{BACKENDS}/test_conformance.py::test_reference_is_worth_comparing_with",
    f"{TESTS}/test_bundled.py::test_smile_is_happiness",
)


class Environment(NamedTuple):
    """A Python, what is installed in it beside the tests' packages, why it is tried, its tests."""

    python: str
    packages: tuple[str, ...]
    why: str
    tests: tuple[str, ...] = (TESTS,)


def _newest(*others: str) -> tuple[str, ...]:
    """The newest of each package that others do not name."""
    named = {re.split("[=<>]", other)[0] for other in others}
    return (*others, *(n for n in ("onnxruntime", "numpy", "pillow", "onnx") if n not in named))


def _onnxruntime(python: str, version: str, why: str) -> Environment:
    return Environment(python, _newest(f"onnxruntime=={version}"), why, ONNX_TESTS)


LOWEST = ("onnxruntime==1.18.0", "numpy==1.24.0", "pillow==10.1.0", "onnx==1.16.0")
ROWS = (
    Environment("3.10", LOWEST, "the lower bounds of setup.py"),
    Environment(
        "3.10", _newest("onnxruntime==1.18.0", "numpy>=2"), "NumPy 2 is too new for 1.18", ()
    ),
    _onnxruntime("3.10", "1.19.2", "the first that takes NumPy 2"),
    Environment("3.10", _newest(), "the newest on Python 3.10, and so on JetPack 6"),
    _onnxruntime("3.12", "1.24.1", "the first that guards external data"),
    _onnxruntime("3.12", "1.29.0", "the last that truncates FP16 to INT8"),
    _onnxruntime("3.12", "1.30.0", "the first that rounds it"),
    Environment("3.12", _newest(), "the newest on Python 3.12"),
    Environment("3.13", _newest(), "the newest on Python 3.13"),
)


@dataclasses.dataclass(frozen=True)
class VersionsConfig:
    """Options of ``python benchmarks/versions.py``."""

    models: Path = option(
        Path("artifacts"),
        positional=True,
        metavar="DIR",
        help="exported ONNX files of the bundled weights",
    )
    data: Path | None = option(
        None, metavar="DIR", help="prepared data set to compare on (default: 16 synthetic faces)"
    )
    python: tuple[Path, ...] = option(
        (), metavar="FILE", help="try these interpreters instead, which have everything"
    )
    tests: tuple[Path, ...] = option(
        (), metavar="PATH", help="tests for --python (default: the runtime's)"
    )
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/versions.py``: 1 where a test or a row failed."""
    results: list[Result] = []

    def run_and_keep(config: VersionsConfig) -> Result:
        results.append(run(config))
        return results[0]

    run_benchmark("versions", VersionsConfig, run_and_keep, argv, __doc__, EXAMPLE)
    failed = any(row.get("failed") for row in results[0]["rows"])
    return int(failed or bool(results[0]["absent"]))


def run(config: VersionsConfig) -> Result:
    """Try every row.

    Raises:
        ArtifactError: The folder has no ONNX files.
        EfficientFaceError: They or the data set cannot be used here.
    """
    result = new_result("versions", config)
    reference = WORK / "reference.npz"
    images = write_reference(config, reference)
    result |= {"images": images, "rows": [], "absent": []}
    make_test_files()
    tests = tuple(map(str, config.tests)) or (TESTS,)
    given = [Environment(str(path.absolute()), (), path.name, tests) for path in config.python]
    for row in given or ROWS:
        name = " ".join((row.python, *row.packages))
        print(f"Python {name} ({row.why})", file=sys.stderr)
        try:
            python = Path(row.python) if given else make_environment(row)
            printed = output_of(python, "-m", COMPARE, config.models.resolve(), reference)
            result["rows"].append({"why": row.why, **json.loads(printed.splitlines()[-1])})
            if row.tests:
                result["rows"][-1] |= run_tests(python, row.tests)
        except BackendError as error:
            result["absent"].append(
                {"backend": f"Python {name}", "model": "", "reason": str(error)}
            )
    return result


def write_reference(config: VersionsConfig, path: Path) -> str:
    """Write what :mod:`benchmarks.measure.exported_files` compares with; gives what it is of."""
    files = sorted(config.models.glob("*.onnx"))
    if not files:
        fix = "make them with efficientface-export --precision all"
        raise ArtifactError(config.models, "exported ONNX files", "none", fix)
    with ef.load(backend="torch") as predictor:
        test_set = load_test_set(config.data, predictor.spec)
        count = min(IMAGES, len(test_set.images))
        kept = np.linspace(0, len(test_set.images) - 1, count).round().astype(int)
        images = test_set.images[kept]
        arrays = {"images": images, "probabilities": predictor.infer(images)[1]}
    for file in files:
        with ef.load(file) as predictor:
            arrays[file.name] = predictor.infer(images)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return f"{count} of {test_set.source}" if count < len(test_set.images) else test_set.source


def make_test_files() -> None:
    """Make with PyTorch what the tests need of it."""
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir(parents=True)
    output_of(Path(sys.executable), "-m", "pytest", "-q", *MAKE)


def make_environment(row: Environment) -> Path:
    """The Python of a row's virtual environment, which is made anew unless it is there.

    Raises:
        BackendError: There is no such Python, or the packages cannot be installed.
    """
    wanted = (*row.packages, *TEST_PACKAGES)
    folder = WORK / "-".join((row.python, *row.packages))
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").split() != list(wanted):
        shutil.rmtree(folder, ignore_errors=True)
        output_of(find_python(row.python), "-m", "venv", folder)
        output_of(python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted)
        write_text(stamp, "\n".join(wanted))
    return python


def run_tests(python: Path, tests: Sequence[str]) -> Row:
    """Run the runtime's tests but those of PyTorch: how many passed, and the names of the rest."""
    report = WORK / "report.xml"
    report.unlink(missing_ok=True)
    left_out = [f"--ignore={path}" for path in NEED_TORCH]
    options = ["-q", "-m", "not gpu", "--timeout=1800", f"--junitxml={report}", *left_out]
    done = run_in(python, "-m", "pytest", *options, *tests)
    if not report.is_file():
        raise BackendError(
            "tests", "a report of pytest", done.stderr.strip()[-300:], "run it alone"
        )
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "errors", "failures", "skipped")}
    failed = counts["errors"] + counts["failures"]
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "failures": names,
    }


def run_in(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an interpreter in the clone, with the clone's own code and the tests' files."""
    link = WORK / "packages" / "efficientface_export"
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / "export", target_is_directory=True)
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, link.parent))),
        "EFFICIENTFACE_MADE": str(MADE),
        "EFFICIENTFACE_SHARED": os.devnull,  # its tests need PyTorch
    }
    words = [str(word) for word in (python, *arguments)]
    return subprocess.run(
        words, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False
    )


def output_of(python: Path, *arguments: str | Path) -> str:
    """As :func:`run_in`; what it printed.

    Raises:
        BackendError: It failed; names its last line.
    """
    done = run_in(python, *arguments)
    if done.returncode:
        words = " ".join(map(str, arguments[1:3]))
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BackendError(f"{python}", f"{words} to succeed", last, "run it alone")
    return done.stdout
