"""Cold start: what the first label costs in a process that has done nothing yet.

A fresh Python process imports the runtime, loads a model and labels one JPEG. The clock runs from
the start of ``load()`` to the label: the import of the backend's library is in it, Python's own
start, numpy and Pillow are not (``process_ms`` has them). The model file lies in the system's file
cache, as it does from the second start on.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ROOT
from benchmarks.measure.models import NO_GRAPHS, Absent, Contender

_TIMEOUT = 300

# A child's peak memory, as the system counts it, starts at what its parent had in memory when it
# started it. The benchmark is large; this process is not, and it starts the one that is measured.
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter_ns()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
output = child.stdout.read()
if hasattr(os, "wait4"):
    _, status, usage = os.wait4(child.pid, 0)
    code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
else:
    code, peak = child.wait(), None
elapsed = time.perf_counter_ns() - start
if code:
    sys.exit(1)
print(json.dumps({**json.loads(output), "process_ns": elapsed, "peak_bytes": peak}))
"""

_CHILD = """
import json, sys, time
arguments = json.loads(sys.argv[1])
jpeg = open(arguments.pop("jpeg"), "rb").read()
import efficientface_deploy
start = time.perf_counter_ns()
predictor = efficientface_deploy.load(**arguments)
loaded = time.perf_counter_ns()
predictor(jpeg)
labelled = time.perf_counter_ns()
print(json.dumps({"load_ns": loaded - start, "label_ns": labelled - loaded}))
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """One process.

    Attributes:
        load_ns: From the call of ``load()`` to its return.
        label_ns: From there to the first label.
        process_ns: The whole process, from before it was started to its end.
        peak_bytes: Largest resident memory; None where the system does not say.
    """

    load_ns: int
    label_ns: int
    process_ns: int
    peak_bytes: int | None


def measure_cold_starts(
    contenders: Sequence[Contender], jpeg: bytes, *, runs: int, seed: int
) -> tuple[list[dict[str, Any]], list[Absent]]:
    """Start every model on every backend in processes of their own, in rounds of random order.

    Args:
        contenders: Each model and backend is started with the first number of threads that it has
            here.
        jpeg: What is labelled.
        runs: Processes for each; with 0 nothing is measured.
        seed: Of the order.

    Returns:
        A row for each, and those that failed, which have none.
    """
    # Without CUDA graphs is a setting for comparison, which no process starts with.
    usual = [entry for entry in contenders if not entry.model.endswith(NO_GRAPHS)]
    chosen = list({(entry.model, entry.backend): entry for entry in reversed(usual)}.values())
    chosen.reverse()
    starts: dict[Contender, list[Start]] = {entry: [] for entry in chosen}
    failed: list[Absent] = []
    order = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "face.jpg")
        image.write_bytes(jpeg)
        for _ in range(runs):
            for index in order.permutation(len(chosen)):
                entry = chosen[index]
                if entry not in starts:
                    continue
                try:
                    starts[entry].append(start_once(entry, image))
                except ColdStartError as error:
                    reason = f"cold start: {error}"
                    failed.append(Absent(entry.backend, entry.model, reason))
                    del starts[entry]
    return [describe(entry, found) for entry, found in starts.items() if found], failed


class ColdStartError(Exception):
    """The process did not come to its label."""


def start_once(contender: Contender, image: Path) -> Start:
    """Load and label in a fresh process.

    Raises:
        ColdStartError: It failed; the last line that it wrote.
    """
    predictor = contender.predictor
    arguments = {
        "model": str(predictor.path.resolve()),
        "backend": contender.backend,
        "threads": contender.threads,
        "preset": contender.preset,
        "jpeg": str(image),
    }
    child = [sys.executable, "-c", _CHILD, json.dumps(arguments)]
    try:
        done = subprocess.run(
            # -S and -I: without site-packages, so that it stays small.
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, *child],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ColdStartError(f"not done after {_TIMEOUT} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["ended without a word"]
        raise ColdStartError(lines[-1])
    return Start(**json.loads(done.stdout))


def describe(contender: Contender, starts: Sequence[Start]) -> dict[str, Any]:
    """One row of the result."""
    totals = [(entry.load_ns + entry.label_ns) / 1e6 for entry in starts]
    peaks = [entry.peak_bytes for entry in starts if entry.peak_bytes is not None]
    return {
        "model": contender.model,
        "backend": contender.backend,
        "precision": contender.precision,
        "threads": contender.threads,
        "runs": len(starts),
        "p50_ms": statistics.median(totals),
        "min_ms": min(totals),
        "max_ms": max(totals),
        "load_ms": statistics.median(entry.load_ns for entry in starts) / 1e6,
        "first_label_ms": statistics.median(entry.label_ns for entry in starts) / 1e6,
        "process_ms": statistics.median(entry.process_ns for entry in starts) / 1e6,
        "peak_bytes": max(peaks, default=None),
    }
