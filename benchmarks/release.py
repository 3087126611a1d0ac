"""A release: built twice with the same bytes, and installed by each extra alone.

``python benchmarks/release.py`` (``make release``): wheel and source distribution of the last
commit, in ``dist``; checks of both; then for each row of :data:`INSTALLS`, on the oldest and the
newest Python, an environment with the wheel and these extras alone, in which the lines of the
README and the docs are run. A bill of materials (CycloneDX) is written for each on the newest.
Needs the extra ``[release]``, git and bash.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.release", "cpu,bench,video,release")

from benchmarks import ROOT
from benchmarks.measure.environments import find_python
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import Result, Row, new_result
from efficientface_deploy.command import option
from efficientface_deploy.errors import BackendError, ConfigError, install_command, system_words
from efficientface_deploy.files import file_hash, write_text

WORK = ROOT / "build" / "release"
FIRST = "first"  # folder of the first build, in it
EXAMPLE = "--only cpu cpu,video --out build/release/result"
PYTHONS = ("3.10", "3.13")
NONE = "none"  # what no extras are called
LINE_SECONDS = 900
PACKAGES = ("efficientface_deploy", "efficientface_export")
CHECKS = (
    ("twine", "check", "--strict"),
    # W004: PyInstaller's hook has a name that is no module's.
    ("check-wheel-contents", "--ignore", "W004", "--toplevel", ",".join(PACKAGES)),
)
BUNDLED = "efficientface_deploy/weights/efficientface-ferplus"


class Install(NamedTuple):
    """What is installed beside the wheel, and the lines that are run with it.

    Attributes:
        extras: In brackets, as one types them.
        lines: For bash, in a folder with :func:`write_inputs`' files.
        in_clone: Whether they need a clone there too: training and benchmarks.
    """

    extras: str
    lines: tuple[str, ...]
    in_clone: bool = False


INSTALLS = (
    Install("", ("efficientface-predict --help", "efficientface-export --help")),
    Install(
        "cpu",
        (
            *("python quick_start.py", "efficientface-predict face.jpg"),
            "efficientface-predict photo.jpg --faces",
            "efficientface-predict photos/ --faces --draw annotated/",
            "efficientface-predict photo.jpg --faces --json > faces.jsonl",
            "timeout --preserve-status --signal=INT 20 efficientface-web --no-browser",
        ),
    ),
    Install("cpu,video", ("efficientface-predict clip.mp4 --faces --draw annotated/",)),
    Install("cpu,batch", ("efficientface-annotate photos/ --out annotations --faces",)),
    Install(
        "cpu,batch,ray",
        ("efficientface-annotate photos/ --out annotations --ray local --workers 2 --threads 1",),
    ),
    Install(
        "cpu,engine",
        (
            "efficientface-export --engine onnx --web site",
            "efficientface-export --triton repository",
        ),
    ),
    Install("cpu,detect", ("efficientface-predict photo.jpg --detect centerface",)),
    Install("cpu,triton", ("python -c 'import tritonclient.grpc'",)),
    Install("torch", (f"efficientface-predict face.jpg --model {BUNDLED}.safetensors",), True),
    Install(
        "export,cpu",
        (
            "efficientface-export --engine onnx",
            "efficientface-predict --model artifacts/efficientface-fp32-cpu.onnx face.jpg",
        ),
    ),
    Install(
        "export,cpu,trt-rtx",
        ("efficientface-export --engine trt-rtx --compute-capability sm86,sm89",),
    ),
    Install(
        "train",
        (
            "python -m training.prepare synthetic --train 70 --test 14 --size 64 --out data/faces",
            "python -m training.student --data data/faces --targets onehot --input-size 64 "
            "--epochs 1 --batch-size 16 --out runs/student",
            "python -m training.evaluate --weights runs/student/student.safetensors "
            "--data data/faces --split test --out runs/evaluation",
        ),
        True,
    ),
    Install(
        "cpu,bench",
        (
            "python benchmarks/latency.py --batch 1 --threads 1 --seconds 0.2 --rounds 3 --cold 0 "
            "--no-floor --out latency",
            "python -m benchmarks.report --docs",
        ),
        True,
    ),
    Install("fuzz", ("python tests/fuzz/fuzz.py image --seconds 2",), True),
)
NOT_HERE = {
    "gpu": "needs an NVIDIA GPU: `make gpu-check`",
    "trt": "needs an NVIDIA GPU: `make gpu-check`",
    "pycuda": "needs an NVIDIA GPU, and CUDA's toolkit to compile",
    "peers": "other toolchains for `benchmarks/peers.py`; all but MNN are in [dev]",
    "dev": "`.ci/run` installs it and runs everything, on Python 3.11",
    "docs": "`.ci/run` builds the site with it, on Python 3.11",
    "release": "this command's own",
}


@dataclasses.dataclass(frozen=True)
class ReleaseConfig:
    """Options of ``python benchmarks/release.py``."""

    dist: Path = option(ROOT / "dist", metavar="DIR", help="folder of what is built", first=True)
    only: tuple[str, ...] = option(
        (), metavar="EXTRAS", help="install these alone, e.g. cpu,video (default: all)", first=True
    )
    build_only: bool = option(False, help="build and check; install nothing")
    python: tuple[str, ...] = option(PYTHONS, metavar="VERSION", help="which Pythons")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/release.py``: 1 where a line failed."""

    def failed(result: Result) -> bool:
        return any(line["error"] for row in result["rows"] for line in row["lines"])

    return run_benchmark("release", ReleaseConfig, run, argv, __doc__, EXAMPLE, failed=failed)


def run(config: ReleaseConfig) -> Result:
    """Build, check, and install by each row.

    Raises:
        ConfigError: ``--only`` names what is in no row.
        BackendError: A tool is missing or finds fault, or two builds differ.
    """
    known = [row.extras or NONE for row in INSTALLS]
    if unknown := set(config.only) - set(known):
        possible = f"one of {', '.join(known)}"
        raise ConfigError("--only", possible, ", ".join(sorted(unknown)), "choose of them")
    chosen = [row for row in INSTALLS if not config.only or (row.extras or NONE) in config.only]
    result = new_result("release", config)
    dist = config.dist.resolve()
    result["files"] = build(dist)
    wheel = next(dist.glob("efficientface_deploy-*.whl"))
    for check in CHECKS:
        names = (
            [wheel] if check[0] != "twine" else [wheel, *dist.glob("efficientface_deploy-*.tar.gz")]
        )
        print(run_tool(*check, *names).strip(), file=sys.stderr)
    result["rows"] = []
    for row in () if config.build_only else chosen:
        for python in config.python:
            bill = dist / "sbom" / f"{(row.extras or NONE).replace(',', '-')}.cdx.json"
            result["rows"].append(
                try_install(row, python, wheel, bill if python == config.python[-1] else None)
            )
    left = dict.fromkeys(known, "left out of this run")
    tried = {row["extras"] or NONE for row in result["rows"]}
    result["not_here"] = {name: why for name, why in left.items() if name not in tried} | NOT_HERE
    return result


# ---- build


def build(dist: Path) -> list[Row]:
    """Build the last commit twice, in two folders, and keep what is the same.

    Returns:
        ``name``, ``bytes`` and ``sha256`` of wheel and source distribution.

    Raises:
        BackendError: git or the build failed, or the two differ.
    """
    # Read once: somebody may commit between the two builds.
    commit, time = run_tool("git", "log", "-1", "--format=%H %ct").split()
    shutil.rmtree(WORK, ignore_errors=True)
    builds: list[dict[str, str]] = []
    for name in (FIRST, "again-in-another-folder"):
        tree, out = WORK / name, WORK / f"{name}-dist"
        copy_commit(commit, tree)
        own = {"SOURCE_DATE_EPOCH": time, "PYTHONHASHSEED": "0" if builds else "1"}
        words = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out)
        run_tool(*words, cwd=tree, environment=own)
        for path in out.glob("*.tar.gz"):
            normalise(path, int(time))
        builds.append({path.name: file_hash(path) for path in sorted(out.iterdir())})
    if builds[0] != builds[1]:
        raise BackendError("build", "the same bytes twice", f"{builds}", "compare the archives")
    dist.mkdir(parents=True, exist_ok=True)
    for old in (*dist.glob("efficientface_deploy-*"), *dist.glob("sbom/*.cdx.json")):
        old.unlink()
    shutil.copytree(out, dist, dirs_exist_ok=True)
    return [
        {"name": name, "bytes": (dist / name).stat().st_size, "sha256": digest}
        for name, digest in builds[0].items()
    ]


def copy_commit(commit: str, folder: Path) -> None:
    """The files of a commit, as git keeps them."""
    archive = folder.with_suffix(".tar")
    folder.mkdir(parents=True)
    run_tool("git", "-c", "tar.umask=022", "archive", "--output", archive, commit)
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    archive.unlink()


def normalise(path: Path, time: int) -> None:
    """Write a ``.tar.gz`` again without what the moment and the builder left in it.

    setuptools stamps the files that it makes with the present and all with the user's name.
    """
    with tarfile.open(path) as old:
        members = [(member, old.extractfile(member)) for member in old.getmembers()]
        contents = {member.name: file.read() if file else b"" for member, file in members}
    plain = path.with_suffix("")
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as new:
        for old_member, _ in sorted(members, key=lambda pair: pair[0].name):
            member = tarfile.TarInfo(old_member.name)
            member.type, member.mtime = old_member.type, time
            member.mode = 0o755 if old_member.isdir() or old_member.mode & 0o100 else 0o644
            member.size = len(contents[member.name])
            new.addfile(member, io.BytesIO(contents[member.name]))
    path.write_bytes(gzip.compress(plain.read_bytes(), mtime=time))
    plain.unlink()


# ---- install


def try_install(row: Install, version: str, wheel: Path, bill: Path | None) -> Row:
    """Install a row's extras in a new environment, run its lines there, and remove it.

    Args:
        row: What to install and run.
        version: Of Python.
        wheel: Ours.
        bill: Where the bill of materials goes; None for none.

    Returns:
        ``extras``, ``python``, ``packages`` (how many), ``bytes``, and ``lines``: each with the
        reason if it failed. An installation that fails is a line, too.
    """
    shown = f"[{row.extras}]" if row.extras else "nothing"
    print(f"Python {version}, with {shown}", file=sys.stderr)
    environment, folder = WORK / "environment", WORK / "lines"
    for path in (environment, folder):
        shutil.rmtree(path, ignore_errors=True)
    if row.in_clone:
        shutil.copytree(WORK / FIRST, folder)  # what the wheel was built of
    write_inputs(folder)
    wanted = f"{wheel}[{row.extras}]" if row.extras else str(wheel)
    install = f"pip install '.[{row.extras}]'" if row.extras else "pip install ."
    found: Row = {"extras": row.extras, "python": version, "lines": []}
    python = environment / "bin" / "python"
    try:
        run_tool("uv", "venv", "--quiet", "--python", find_python(version), environment)
        limits = constraints()
        run_tool("uv", "pip", "install", "-q", "--python", python, *limits, wanted)
    except BackendError as error:
        return found | {"lines": [{"line": install, "error": error.found}]}
    installed = run_tool("uv", "pip", "list", "--format", "freeze", "--python", python)
    found |= {"python": run_tool(python, "--version").split()[1]}
    found |= {"packages": len(installed.split()), "bytes": _size(environment)}
    found["lines"] += [{"line": line, "error": run_line(line, folder)} for line in row.lines]
    if bill:
        text = run_tool("cyclonedx-py", "environment", "--output-reproducible", python)
        bill.parent.mkdir(exist_ok=True)
        # Where our wheel lay on this machine is of no use to others.
        write_text(bill, text.replace(wheel.resolve().as_uri(), wheel.name))
    shutil.rmtree(environment)
    return found


def constraints() -> list[str]:
    """What pip is told not to exceed on this machine, for uv, which does not read pip's files."""
    told = run_tool(sys.executable, "-m", "pip", "config", "list")
    files = re.findall(r"^\S*constraint='(.+)'$", told, re.MULTILINE)
    return [word for file in files for word in ("--constraint", file)]


def write_inputs(folder: Path) -> None:
    """The pictures, the video and the program that the lines name."""
    import av

    (folder / "photos").mkdir(parents=True, exist_ok=True)
    photo = ROOT / "efficientface_deploy" / "web" / "static" / "sample.jpg"
    for name in ("photo.jpg", "face.jpg", "photos/one.jpg", "photos/two.jpg"):
        shutil.copyfile(photo, folder / name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (folder / "quick_start.py").write_text(program, encoding="utf-8")
    with av.open(str(photo)) as picture, av.open(str(folder / "clip.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=10, width=256, height=256, pix_fmt="yuv420p")
        frame = next(picture.decode(video=0)).reformat(256, 256, "yuv420p")
        for number in range(10):
            frame.pts = number
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def run_line(line: str, folder: Path) -> str:
    """Run a line in bash; why it failed, or nothing.

    The environment comes first on the path, and of the clone nothing is importable.
    """
    path = os.pathsep.join((str(WORK / "environment" / "bin"), os.environ["PATH"]))
    own = {"PATH": path, "BROWSER": "true", "VIRTUAL_ENV": str(WORK / "environment")}
    words = ("bash", "-c", f"set -eo pipefail; {line}")
    try:
        run_tool(*words, cwd=folder, environment=own, seconds=LINE_SECONDS)
    except BackendError as error:
        print(f"  {line}: {error.found}", file=sys.stderr)
        return error.found
    return ""


# ---- tools


def run_tool(
    *words: str | Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] = {},
    seconds: float | None = None,
) -> str:
    """Run a program; what it printed.

    Raises:
        BackendError: It is not there, failed or took too long; ``found`` is its last line.
    """
    name = Path(words[0]).name
    usual = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            list(map(str, words)),
            cwd=cwd,
            env={**usual, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            umask=0o022,
        )
    except subprocess.TimeoutExpired:
        raise BackendError(name, "an end", f"none in {seconds} s", "run it alone") from None
    except OSError as error:
        fix = f"{install_command('release')}, and git and bash"
        raise BackendError(name, "a program", system_words(error), fix) from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "nothing printed").splitlines()
        found = f"exit code {done.returncode}: {lines[-1]}"
        raise BackendError(" ".join(map(str, words[:4])), "success", found, "run it alone")
    return done.stdout


def _size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
