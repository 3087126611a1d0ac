"""The matrix of versions: its bounds, its interpreters, and how it counts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks import versions as bench
from benchmarks.versions import LOWEST, ONNX_TESTS, ROWS, make_environment, run_tests
from efficientface_deploy.errors import BackendError

HERE = f"3.{sys.version_info.minor}"
NEWEST_ON_3_10 = (1, 23, 2)  # of onnxruntime: JetPack 6 has this Python


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench, "WORK", tmp_path / "work")
    monkeypatch.setattr(bench, "MADE", tmp_path / "work" / "made")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("wanted", LOWEST)
def test_the_lowest_row_is_at_the_bounds_of_the_setup(wanted: str) -> None:
    name, _, version = wanted.partition("==")
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    bounds = set(re.findall(rf'"{name}>=([\d.]+)"', text))
    assert {(*numbers(bound), 0)[:3] for bound in bounds} == {numbers(version)}


def test_no_bound_is_above_what_python_3_10_can_have() -> None:
    assert numbers(LOWEST[0].partition("==")[2]) <= NEWEST_ON_3_10
    for row in ROWS:
        version = row.packages[0].partition("==")[2]
        if row.python == "3.10" and version:
            assert numbers(version) <= NEWEST_ON_3_10


def test_the_tests_of_onnxruntime_are_there() -> None:
    assert all((ROOT / path).exists() for path in (*ONNX_TESTS, *bench.NEED_TORCH))


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_left(): pytest.skip('why')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_broken(broken): pass\n"
    )
    found = run_tests(Path(sys.executable), [str(tests)])
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_wrong", "test_broken"]
    with pytest.raises(BackendError, match="expected a report of pytest"):
        run_tests(Path("/bin/false"), [str(tests)])


def test_an_environment_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def output_of(python: Path, *words: str | Path) -> str:
        ran.append(" ".join(map(str, words[1:3])))
        if words[1] == "venv":
            (Path(words[2]) / "bin").mkdir(parents=True)
        return ""

    monkeypatch.setattr(bench, "output_of", output_of)
    row = bench.Environment(HERE, ("numpy==1.24.0",), "")
    first = make_environment(row)
    assert make_environment(row) == first and len(ran) == 2
    monkeypatch.setattr(bench, "TEST_PACKAGES", ("pytest", "another"))
    make_environment(row)
    assert len(ran) == 4


@pytest.mark.parametrize("python", [sys.executable, "/bin/false"])
def test_one_interpreter_alone(
    make_onnx: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    work: Path,
    python: str,
) -> None:
    """With the bundled file in the place of an export; what fails is a row that is absent."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "bundled.onnx").symlink_to(bench.ef.predictor.BUNDLED_ONNX)
    monkeypatch.setattr(bench, "make_test_files", lambda: None)
    tests = "tests/efficientface_deploy/test_errors.py"
    options = ["--python", python, "--tests", tests]
    code = bench.main([str(folder), *options, "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "versions.json").read_text())
    assert code == (python == "/bin/false")
    if python == "/bin/false":
        assert not result["rows"] and "to succeed" in result["absent"][0]["reason"]
        return
    (row,) = result["rows"]
    assert row["why"] == Path(sys.executable).name and row["passed"] > 5
    assert row["files"][0]["agreement"] == 1
    assert f"| {row['why']} |" in (tmp_path / "out" / "versions.md").read_text()
