"""Fresh processes: what is timed, in which process, and what happens when it fails."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import processes as module
from benchmarks.measure.inputs import make_jpegs
from benchmarks.measure.models import Candidate, open_candidates
from benchmarks.measure.processes import (
    ProcessError,
    Run,
    describe_cold,
    measure_cold_starts,
    memory_kb,
    predict_often,
    run_fresh,
    run_job,
    start_cold,
)
from benchmarks.runtime import growth

MS = 1_000_000
JPEG = make_jpegs(0)[0]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "face.jpg"
    path.write_bytes(JPEG)
    return path


# ---- any process


def test_a_process_says_what_it_took() -> None:
    code = "import time; time.sleep(0.1); print('label', flush=True); time.sleep(0.1)"
    run = run_fresh(code)
    assert run.answer == "label"
    assert 100 * MS < run.answer_ns < run.process_ns - 100 * MS
    assert "numpy" not in run.modules and "json" not in run.modules and "time" in run.modules


@pytest.mark.skipif(sys.platform != "linux", reason="what a child inherits is Linux's affair")
def test_the_parents_memory_is_not_counted() -> None:
    """What ``wait4`` reports would be at least the memory of this process."""
    held = np.ones(400 << 20, dtype=np.uint8)
    run = run_fresh("print('label')")
    assert run.peak_kb is not None and run.peak_kb < 100 << 10 < held.nbytes >> 10


def test_memory_of_this_process() -> None:
    now, peak = memory_kb("VmRSS"), memory_kb("VmHWM")
    assert now is not None and peak is not None and 1000 < now <= peak


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no label')", "no label"),
        ("import os; os._exit(0)", "ended without a word"),
        ("print(argument['no such key'])", "KeyError: 'no such key'"),
        ("pass", "ended without a word"),
    ],
)
def test_a_process_that_fails_is_no_measurement(code: str, reason: str) -> None:
    with pytest.raises(ProcessError, match=reason):
        run_fresh(code, {"key": 1})


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.5)
    with pytest.raises(ProcessError, match=r"not done after 0\.5 s"):
        run_fresh("import time; time.sleep(60)")


def test_bytecode_is_compiled_outside_of_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    run_fresh("import efficientface_deploy.spec; print('label')", bytecode=tmp_path)
    assert list(tmp_path.rglob("spec.*.pyc"))


# ---- cold starts


def test_a_fresh_process_loads_and_labels(make_onnx: Callable[..., Path], photo: Path) -> None:
    model = make_onnx("a.onnx")
    model.rename(model.with_name("0abc"))  # as in a cache of files by their hashes
    model.symlink_to("0abc")
    with open_candidates([model], ("onnx:cpu",), (1,)) as (opened, _):
        run = start_cold(opened[0], photo)
    load_ns, label_ns = json.loads(run.answer)
    assert load_ns > MS  # the import of onnxruntime alone takes longer
    assert label_ns > 0 and load_ns + label_ns < run.process_ns
    # Python with numpy, Pillow and ONNX Runtime; not this process, which has PyTorch in it.
    assert run.peak_kb is not None and 20 << 10 < run.peak_kb < 250 << 10


def test_a_process_that_fails_is_skipped_and_the_rest_goes_on(
    make_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = make_onnx("good.onnx", precision="fp32"), make_onnx("bad.onnx")
    started: list[str] = []

    def start(candidate: Candidate, image: Path) -> Run:
        started.append(candidate.model)
        assert image.read_bytes() == JPEG
        if candidate.model == "bad.onnx":
            raise ProcessError("BackendError: no memory")
        return Run(json.dumps([MS, MS]), 2 * MS, 3 * MS, None, frozenset())

    monkeypatch.setattr(module, "start_cold", start)
    with open_candidates([good, bad], ("onnx:cpu",), (1, 2)) as (opened, _):
        rows, failed = measure_cold_starts(opened, JPEG, runs=3, seed=0)
    assert sorted(started) == ["bad.onnx", *["good.onnx"] * 3]  # on one thread count, in rounds
    assert [(row["model"], row["threads"], row["runs"]) for row in rows] == [("good.onnx", 1, 3)]
    assert [entry.reason for entry in failed] == ["cold start: BackendError: no memory"]


def test_the_last_line_of_a_failure_is_kept(make_onnx: Callable[..., Path], photo: Path) -> None:
    path = make_onnx("a.onnx")
    with open_candidates([path], ("onnx:cpu",), (1,)) as (opened, _):
        path.write_bytes(b"nonsense")  # as if the file had changed meanwhile
        with pytest.raises(ProcessError, match="ArtifactError"):
            start_cold(opened[0], photo)


def test_no_runs_measure_nothing(make_onnx: Callable[..., Path]) -> None:
    with open_candidates([make_onnx("a.onnx")], ("onnx:cpu",), (1,)) as (opened, _):
        assert measure_cold_starts(opened, JPEG, runs=0, seed=0) == ([], [])


def test_a_row_has_the_median_and_the_largest_peak(make_onnx: Callable[..., Path]) -> None:
    path = make_onnx("a.onnx", precision="fp16")
    runs = [
        Run(json.dumps([80 * MS, n * MS]), 150 * MS, 200 * MS, n, frozenset()) for n in (10, 30, 20)
    ]
    with open_candidates([path], ("onnx:cpu",), (2,)) as (opened, _):
        row = describe_cold(opened[0], runs)
    assert (row["p50_ms"], row["min_ms"], row["max_ms"]) == (100, 90, 110)
    assert (row["load_ms"], row["first_label_ms"], row["process_ms"]) == (80, 20, 200)
    assert (row["peak_bytes"], row["threads"], row["precision"]) == (30 << 10, 2, "fp16")


# ---- jobs

LEAK = """
from benchmarks.measure.processes import predict_often
from efficientface_deploy import Predictor
kept, call = [], Predictor.__call__
def leaking(self, image):
    kept.append(bytearray(b"x" * 100_000))
    return call(self, image)
Predictor.__call__ = leaking
print(json.dumps(predict_often(argument)))
"""


def test_memory_that_is_kept_is_seen(photo: Path) -> None:
    """100 kB at each prediction."""
    job = {"predictions": 300, "samples": 60, "photo": str(photo), "threads": 1}
    found = json.loads(run_fresh(LEAK, job).answer)
    slope = growth(found["predictions"], found["rss_kb"])["kb_per_thousand"]
    assert slope == pytest.approx(100_000, rel=0.2)


def test_a_job_has_no_more_in_memory_than_an_application(photo: Path) -> None:
    code = "from benchmarks.measure.processes import predict_often\nprint(predict_often(argument))"
    run = run_fresh(code, {"predictions": 2, "samples": 2, "photo": str(photo), "threads": 1})
    assert not run.modules & {"torch", "onnx", "benchmarks.measure.models"}


def test_a_job_fails_in_its_own_process(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="KeyError"):
        run_job(predict_often, {}, bytecode=tmp_path)


def test_an_interrupt_ends_the_process_and_leaves_no_alarm() -> None:
    """A thread that waits for the time limit would keep the interpreter alive as long."""
    main = threading.main_thread().ident
    assert main is not None
    interrupt = threading.Timer(1.0, signal.pthread_kill, (main, signal.SIGINT))
    before = set(threading.enumerate())
    began = time.monotonic()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run_fresh("import time; time.sleep(60)")
    interrupt.join()
    assert time.monotonic() - began < 30
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before
