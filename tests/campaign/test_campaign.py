"""The campaign's command, and a short form of its parts."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import campaign
import faults
import numpy as np
import pytest
import soak
import trial
from row import Row
from trial import Group, command, run_group

from benchmarks.report.kinds import tables_of
from efficientface_deploy.errors import BackendError, ImageError

GOOD = Row("inputs", "pictures", tried=1200, right=200, refused=1000, slowest_s=0.25, within_s=20)
BAD = Row("faults", "SIGKILL", tried=2, right=1, failures=("step 7: half a file",))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in {"inputs": GOOD, "faults": BAD}.items():
        part = SimpleNamespace(run=lambda scale, seed, folder, row=row: [row])
        monkeypatch.setitem(sys.modules, name, part)


def test_rows_become_tables(parts: None) -> None:
    result: dict[str, Any] = campaign.run(campaign.CampaignConfig(part=("inputs", "faults")))
    result |= {"goals": [], "absent": []}
    counts, failures = tables_of(result)
    assert counts.rows[0] == ["inputs", "pictures", "1,200", "200", "1,000", "0", "0.250 (20)"]
    assert counts.rows[1] == ["faults", "SIGKILL", "2", "1", "0", "1", ""]
    assert failures.rows == [["SIGKILL", "step 7: half a file"]]


@pytest.mark.parametrize(("row", "code"), [(GOOD, 0), (BAD, 1)])
def test_a_failure_is_the_exit_code(row: Row, code: int, monkeypatch, tmp_path) -> None:
    part = SimpleNamespace(run=lambda *_: [row])
    monkeypatch.setitem(sys.modules, "inputs", part)
    words = ["campaign.py", "--part", "inputs", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert campaign.main() == code
    assert (tmp_path / "out" / "campaign.json").is_file()


def test_a_package_that_is_missing_is_one_line(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "inputs", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BackendError, match=r"expected the package pyarrow.*; run make campaign"):
        campaign.run(campaign.CampaignConfig(part=("inputs",)))


# ---- cases in a process of their own


def tries(attempt: Any, tmp_path: Path, **bounds: float) -> Row:
    """Two cases: one that does something, and a good one behind it."""

    def case(rng: object, seeds: Path, here: Path) -> None:
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            attempt(here)

    return run_group(Group("x", 2, case, **bounds), 1, 0, tmp_path, tmp_path)


def says(text: str, code: int) -> Any:
    def main(words: object) -> int:
        print(text, file=sys.stderr)
        return code

    return lambda here: command(main, [])


class Canary:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


FAULTS = {
    "a wrong error": (lambda here: {}["key"], "KeyError at test_campaign.py:"),
    "a wrong message": (lambda here: refuse("two\n" + "lines " * 500), "not one clear line"),
    "a crash": (lambda here: os.abort(), "ended its process (SIGABRT)"),
    "an exit": (lambda here: os._exit(0), "ended its process"),
    "a hang": (lambda here: time.sleep(60), "hung for 1.2 s"),
    "much time": (lambda here: work(0.3), "took 0."),
    "much memory": (lambda here: bytes(b"x" * (3 << 29)), "MB"),
    "a pickle": (lambda here: pickle.loads(pickle.dumps(Canary())), "did what it must not: pickle"),
    "a program": (lambda here: os.system("true"), "did what it must not: os.system"),
    "a file elsewhere": (
        lambda here: (here.parents[1] / "x").touch(),
        "did what it must not",
    ),
    "a file in secret": (lambda here: (here.parent / "secret" / "x").write_text(""), "did what it"),
    "a traceback": (says("Traceback (most recent call last):", 2), "AssertionError"),
    "control characters": (says("error: \x1b[31m", 2), "AssertionError"),
    "a silent end": (says("nothing", 2), "AssertionError"),
    "an odd exit": (says("error: x", 3), "exit 3"),
}


def refuse(text: str) -> None:
    error = ImageError("a", "b", "c", "d")
    error.args = (text,)
    raise error


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_next_case_is_tried(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, said = FAULTS[fault]
    if fault == "much time":
        monkeypatch.setattr(trial, "_HANGS", 300)  # the machine may be busy
    bounds = {"within_s": 0.2} if fault in ("a hang", "much time") else {}
    row = tries(attempt, tmp_path, **bounds)
    assert (row.tried, row.right, row.refused) == (2, 1, 0)
    (failure,) = row.failures
    assert said in failure and failure.endswith("(python tests/campaign/inputs.py 'x' 0 0)")


@pytest.mark.parametrize(
    ("attempt", "refused"),
    [
        (lambda here: None, 0),
        (lambda here: (here / "own").write_text("x"), 0),
        (lambda here: refuse("one clear line"), 1),
        (says("a note", 0), 0),
        (says("error: one clear line", 2), 1),
    ],
)
def test_what_is_right_or_refused(attempt: Any, refused: int, tmp_path: Path) -> None:
    row = tries(attempt, tmp_path)
    assert (row.right, row.refused, row.failures) == (2 - refused, refused, ())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("part", "scale"), [("inputs", 0.02), ("faults", 0.001), ("soak", 0.001)])
def test_a_short_form_finds_nothing(part: str, scale: float, tmp_path: Path) -> None:
    """In a new process, whose memory is its own and whose modules are found as a user's are."""
    words = [sys.executable, campaign.__file__, "--part", part, "--scale", str(scale)]
    done = subprocess.run([*words, "--out", tmp_path / "out"], capture_output=True, text=True)
    rows = json.loads((tmp_path / "out" / "campaign.json").read_text())["rows"]
    assert rows and [line for row in rows for line in row["failures"]] == []
    assert done.returncode == 0, done.stderr


def test_the_inputs_are_ten_thousand() -> None:
    import inputs

    assert sum(group.share for group in inputs.GROUPS) == 10_000


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "a note", None),
        (2, "a note\nerror: one line", None),
        (None, "", "hangs"),
        (1, "", "exit 1"),
        (-11, "", "exit -11"),
        (2, "Traceback (most recent call last):\nerror: x", "exit 2"),
        (2, "Exception ignored in: <x>\nerror: x", "exit 2"),
        (2, "error: x\nerror: y", "without one line"),
        (2, "error: x\nmore", "without one line"),
        (2, "nothing", "without one line"),
    ],
)
def test_how_a_command_may_end(code: int | None, said: str, wrong: str | None) -> None:
    complaint = faults.Ended(code, said, 1.0).complaint(0, 2)
    assert complaint is None if wrong is None else wrong in str(complaint)


@pytest.mark.parametrize(
    "name", ["a.json", "a.csv", "a.png", "a.npz", "a.pt", "a.onnx", "a.parquet"]
)
def test_half_a_file_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / ".hidden.json").write_text("{")
    assert faults.damage(tmp_path) is None
    (tmp_path / name).write_bytes(b'{"a": ')
    assert f"{name} is damaged" in str(faults.damage(tmp_path))


@pytest.mark.parametrize(("code", "fails"), [(errno.ENOSPC, "bc"), (errno.EIO, "b")])
def test_the_disk_fails_from_the_change_that_is_asked_for(
    code: int, fails: str, tmp_path: Path, run_python: Any
) -> None:
    program = """
import sys; sys.path.insert(0, "tests/campaign")
from pathlib import Path
import faults
faults.DiskFault(Path(sys.argv[1]), 2, int(sys.argv[2]))()
for name in "abc":
    try:
        Path(sys.argv[1], name).write_text(name)
    except OSError as error:
        assert error.errno == int(sys.argv[2])
        print(name, end="")
"""
    done = run_python(program, str(tmp_path), str(code))
    assert done.stdout == fails, done.stderr


@pytest.mark.parametrize("growth", [0.0, 10.0])
def test_growth_of_memory_is_found_in_noise(growth: float) -> None:
    seconds = np.linspace(0, 3600, 5000)
    noise = np.random.default_rng(0).normal(0, 0.5, 5000)
    found, margin = soak.growth_per_hour(seconds, 100 + growth * seconds / 3600 + noise)
    assert abs(found - growth) < 2 * margin < 0.5
