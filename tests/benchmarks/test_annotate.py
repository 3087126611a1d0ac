from __future__ import annotations

import json

import pytest

from benchmarks import annotate as bench

pytest.importorskip("pyarrow")


@pytest.mark.slow
def test_one_command_measures_every_way(tmp_path, capsys):
    out = tmp_path / "out"
    assert bench.main(["--pictures", "40", "80", "--side", "64", "--out", str(out)]) == 0
    result = json.loads((out / "annotate.json").read_text())
    rows = {(row["way"], row["pictures"]): row for row in result["cases"]}
    assert set(rows) == {(way, count) for way in bench.WAYS for count in (40, 80)}
    assert all(row["pictures_per_second"] > 0 and row["cpu_ms"] > 0 for row in rows.values())
    # Two processes take more memory than one, and none takes less than a model.
    assert rows["two jobs", 80]["peak_bytes"] > 1.5 * rows["1 thread", 80]["peak_bytes"] > 5e7
    assert (out / "annotate.png").read_bytes().startswith(b"\x89PNG")
    assert "2 workers" in capsys.readouterr().out


def test_two_jobs_take_half_the_set_each(tmp_path, monkeypatch):
    said = {"seconds": 2.0, "cpu_seconds": 1.5, "peak_kb": 100, "children_kb": 70}
    given = []

    def run_job(job, arguments, timeout):
        given.append(arguments)
        return said

    monkeypatch.setattr(bench, "run_job", run_job)
    row = bench.measure_way(tmp_path, ["a.jpg", "b.jpg"], 10, "two jobs")
    assert len((tmp_path / "5.csv").read_text().splitlines()) == 6 and len(given) == 2
    assert (row["pictures"], row["pictures_per_second"], row["cpu_ms"]) == (10, 5.0, 300.0)
    assert row["peak_bytes"] == 2 * 100 * 1024
    row = bench.measure_way(tmp_path, ["a.jpg"], 10, "2 workers")
    assert given[-1][-4:] == ["--workers", "2", "--threads", "1"]
    assert row["peak_bytes"] == (100 + 2 * 70) * 1024


@pytest.mark.parametrize(("rate", "memory", "met"), [(700.0, 2e8, True), (500.0, 3.5e8, False)])
def test_goals(rate, memory, met):
    cases = [
        {"way": way, "pictures": count, "pictures_per_second": rate, "peak_bytes": memory}
        for way in bench.WAYS
        for count in (1_000, 10_000, 100_000)
    ]
    first, share, memory_goal, growth = bench.goals(cases)
    assert (first["found"], first["met"]) == (rate, met)
    assert (share["found"], growth["found"]) == (1, 1) and share["met"] and growth["met"]
    assert memory_goal["name"] == "MB for 10,000 pictures" and memory_goal["met"] == met
