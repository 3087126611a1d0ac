"""The release: every extra has its place, archives without the moment in them, lines that fail."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks import release as bench
from benchmarks.release import INSTALLS, NOT_HERE, Install, normalise, run_line, run_tool
from efficientface_deploy.errors import BackendError, ConfigError

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench, "WORK", tmp_path / "work")
    return tmp_path / "work"


def test_every_extra_is_installed_or_says_why_not() -> None:
    extras = re.search(r"extras_require=\{(.*?)\n    \},", SETUP, re.DOTALL)
    assert extras
    wanted = set(re.findall(r'^        "([\w-]+)": ', extras[1], re.MULTILINE))
    installed = {name for row in INSTALLS for name in row.extras.split(",") if name}
    assert installed | set(NOT_HERE) == wanted
    assert not installed & set(NOT_HERE)


def test_the_first_python_is_the_oldest_that_is_allowed() -> None:
    assert f'python_requires=">={bench.PYTHONS[0]}"' in SETUP


def write_archive(path: Path, time: int, owner: str, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.uname, member.uid = time, owner, time % 1000
            member.mode, member.size = (0o775 if name.endswith(".sh") else 0o664), len(name)
            archive.addfile(member, io.BytesIO(name.encode()))


def test_archives_of_other_moments_and_people_become_the_same(tmp_path: Path) -> None:
    one, two = tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"
    write_archive(one, 1_700_000_000, "me", ["a/b.py", "a/c.sh"])
    write_archive(two, 1_800_000_001, "you", ["a/c.sh", "a/b.py"])
    assert one.read_bytes() != two.read_bytes()
    for path in (one, two):
        normalise(path, 1_600_000_000)
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as archive:
        assert [member.name for member in archive] == ["a/b.py", "a/c.sh"]
        modes = [(member.mode, member.mtime, member.uname) for member in archive]
        assert modes == [(0o644, 1_600_000_000, ""), (0o755, 1_600_000_000, "")]
        file = archive.extractfile("a/b.py")
        assert file is not None and file.read() == b"a/b.py"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("true", ""),
        ("echo right; echo wrong >&2; exit 3", "exit code 3: wrong"),
        ("false | true", "exit code 1: nothing printed"),
        ("test -f here", ""),
        ('test -z "$PYTHONPATH"', ""),
    ],
)
def test_a_line_that_fails_says_why(
    line: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "here").touch()
    assert run_line(line, tmp_path) == error


def test_a_line_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LINE_SECONDS", 0.2)
    assert run_line("exec sleep 30", tmp_path) == "none in 0.2 s"


def test_a_tool_that_is_missing_names_the_extra() -> None:
    with pytest.raises(BackendError, match=r"pip install .*\[release\]"):
        run_tool("no-such-tool-of-ours")


def test_an_unknown_set_of_extras_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"--only: expected one of none, cpu, .*found cpu,vide;"):
        bench.run(bench.ReleaseConfig(only=("cpu,vide",)))


def test_what_is_left_out_is_in_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "efficientface_deploy-0.1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(bench, "build", lambda dist: [])
    monkeypatch.setattr(bench, "run_tool", lambda *words: "")
    tried: list[tuple[str, str, bool]] = []

    def try_install(row: Install, python: str, wheel: Path, bill: Path | None) -> dict[str, object]:
        tried.append((row.extras, python, bill is not None))
        return {"extras": row.extras, "python": python, "lines": []}

    monkeypatch.setattr(bench, "try_install", try_install)
    result = bench.run(bench.ReleaseConfig(dist=tmp_path, only=("none", "cpu")))
    assert tried == [
        ("", "3.10", False),
        ("", "3.13", True),
        ("cpu", "3.10", False),
        ("cpu", "3.13", True),
    ]
    assert result["not_here"]["train"] == "left out of this run" and "gpu" in result["not_here"]
    assert not {"none", "cpu"} & set(result["not_here"])


def test_the_inputs_are_what_the_lines_name(tmp_path: Path) -> None:
    pytest.importorskip("av")
    folder = tmp_path / "inputs"
    bench.write_inputs(folder)
    assert (folder / "clip.mp4").stat().st_size > 1000
    program = (folder / "quick_start.py").read_text(encoding="utf-8")
    compile(program, "quick_start.py", "exec")
    lines = [line for row in INSTALLS if not row.in_clone for line in row.lines]
    words = {word for line in lines for word in line.split() if word.startswith(("p", "f", "c"))}
    named = {word.rstrip("/") for word in words if word.endswith((".jpg", ".mp4", "photos/"))}
    assert named and all((folder / name).exists() for name in named)
    assert 'predictor("face.jpg")' in program and (folder / "face.jpg").exists()


def test_what_cannot_be_installed_is_a_line_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_tool(*words: str | Path, **_: object) -> str:
        if "install" in words:
            raise BackendError("uv", "success", "exit code 1: no such version", "")
        return ""

    monkeypatch.setattr(bench, "run_tool", run_tool)
    monkeypatch.setattr(bench, "write_inputs", lambda folder: None)
    monkeypatch.setattr(bench, "find_python", lambda version: Path(sys.executable))
    row = bench.try_install(Install("cpu", ("true",)), "3.10", tmp_path / "a.whl", None)
    assert row["lines"] == [
        {"line": "pip install '.[cpu]'", "error": "exit code 1: no such version"}
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_builds_of_the_last_commit_are_the_same(tmp_path: Path) -> None:
    """In other folders, at other moments: build() itself compares; the tree is not touched."""
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True)
    (tmp_path / "dist" / "sbom").mkdir(parents=True)
    for name in ("mine.txt", "efficientface_deploy-0.0.9.tar.gz", "sbom/cpu.cdx.json"):
        (tmp_path / "dist" / name).touch()
    files = bench.build(tmp_path / "dist")
    left = {path.name for path in (tmp_path / "dist").rglob("*") if path.is_file()}
    assert left == {"mine.txt", *(file["name"] for file in files)}
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True)
    assert before.stdout == after.stdout
    assert [Path(file["name"]).suffix for file in files] == [".whl", ".gz"]
    wheel = zipfile.ZipFile(tmp_path / "dist" / files[0]["name"])
    assert len({info.date_time for info in wheel.infolist()}) == 1
