"""Cold starts: what is timed, in which process, and what happens when it fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import processes as module
from benchmarks.measure.inputs import make_jpegs
from benchmarks.measure.models import Contender, open_contenders
from benchmarks.measure.processes import (
    ColdStartError,
    Start,
    describe,
    measure_cold_starts,
    start_once,
)

MS = 1_000_000
JPEG = make_jpegs(0)[0]


def test_a_fresh_process_loads_and_labels(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    image = tmp_path / "face.jpg"
    image.write_bytes(JPEG)
    with open_contenders([make_onnx("a.onnx")], ("onnx:cpu",), (1,)) as (opened, _):
        start = start_once(opened[0], image)
    assert start.load_ns > MS  # the import of onnxruntime alone takes longer
    assert 0 < start.label_ns < start.process_ns
    assert start.load_ns + start.label_ns < start.process_ns
    # Python with numpy, Pillow and ONNX Runtime; not this process, which has PyTorch in it.
    assert start.peak_bytes is not None and 20 * 2**20 < start.peak_bytes < 250 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="what a child inherits is Linux's affair")
def test_the_parents_memory_is_not_counted() -> None:
    held = np.ones(1 << 25)  # 256 MiB, all of it touched
    child = [sys.executable, "-c", "print('{}')"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", module._LAUNCHER, *child],
        capture_output=True,
        text=True,
        check=True,
    )
    assert held[-1] == 1
    assert module.json.loads(done.stdout)["peak_bytes"] < 100 * 2**20


def test_a_process_that_fails_is_absent_and_the_rest_goes_on(
    make_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = make_onnx("good.onnx", precision="fp32"), make_onnx("bad.onnx")
    started: list[str] = []
    real = module.start_once

    def start(contender: Contender, image: Path) -> Start:
        started.append(contender.model)
        if contender.model == "bad.onnx":
            raise ColdStartError("BackendError: no memory")
        return real(contender, image) if len(started) < 3 else Start(MS, MS, 3 * MS, None)

    monkeypatch.setattr(module, "start_once", start)
    with open_contenders([good, bad], ("onnx:cpu",), (1, 2)) as (opened, _):
        rows, failed = measure_cold_starts(opened, JPEG, runs=3, seed=0)
    assert sorted(started) == ["bad.onnx", *["good.onnx"] * 3]  # on one thread count, in rounds
    assert [(row["model"], row["threads"], row["runs"]) for row in rows] == [("good.onnx", 1, 3)]
    assert [entry.reason for entry in failed] == ["cold start: BackendError: no memory"]


def test_the_last_line_of_a_failure_is_kept(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    path = make_onnx("a.onnx")
    with open_contenders([path], ("onnx:cpu",), (1,)) as (opened, _):
        path.write_bytes(b"nonsense")  # as if the file had changed meanwhile
        image = tmp_path / "face.jpg"
        image.write_bytes(JPEG)
        with pytest.raises(ColdStartError, match="ArtifactError"):
            start_once(opened[0], image)


def test_no_runs_measure_nothing(make_onnx: Callable[..., Path]) -> None:
    with open_contenders([make_onnx("a.onnx")], ("onnx:cpu",), (1,)) as (opened, _):
        assert measure_cold_starts(opened, JPEG, runs=0, seed=0) == ([], [])


def test_a_row_has_the_median_and_the_largest_peak(make_onnx: Callable[..., Path]) -> None:
    starts = [Start(80 * MS, n * MS, 200 * MS, n) for n in (10, 30, 20)]
    with open_contenders([make_onnx("a.onnx", precision="fp16")], ("onnx:cpu",), (2,)) as (
        opened,
        _,
    ):
        row = describe(opened[0], starts)
    assert (row["p50_ms"], row["min_ms"], row["max_ms"]) == (100, 90, 110)
    assert (row["load_ms"], row["first_label_ms"], row["process_ms"]) == (80, 20, 200)
    assert (row["peak_bytes"], row["threads"], row["precision"]) == (30, 2, "fp16")
