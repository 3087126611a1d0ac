"""The campaign's command, and a short form of its parts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import campaign
import pytest
from row import Row

from benchmarks.report.kinds import tables_of

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
