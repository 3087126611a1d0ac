"""What a process of its own measures of itself, for ``benchmarks/runtime.py``.

``python benchmarks/probe.py JOB JSON`` prints one line of JSON. Nothing is imported but what an
application of that kind would import, so that the memory is that of the application.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
RSS, PEAK_RSS = "VmRSS", "VmHWM"


def memory_kb(field: str, process: int | str = "self") -> int:
    """Resident memory of a process, kB, as Linux counts it: :data:`RSS` or :data:`PEAK_RSS`.

    Not ``ru_maxrss``: a child inherits the peak of the process that started it.
    """
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def predict_often(job: dict[str, Any]) -> dict[str, Any]:
    """Label pictures again and again, from a file's bytes and from an array in turn.

    Args:
        job: ``predictions``, ``samples``, ``photo`` (a path) and ``threads``.

    Returns:
        How many predictions were made at each sample, and the memory there, kB.
    """
    import efficientface_deploy as ef
    from efficientface_deploy.vision.preprocess import ImageSource

    with ef.load(threads=job["threads"]) as predictor:
        photo = Path(job["photo"]).read_bytes()
        sources: list[ImageSource] = [photo, predictor.preprocess(photo)]
        step = max(job["predictions"] // job["samples"], 1)
        counts, memory = [], []
        for number in range(1, job["predictions"] + 1):
            predictor(sources[number % 2])
            if number % step == 0:
                counts.append(number)
                memory.append(memory_kb(RSS))
    return {"predictions": counts, "rss_kb": memory}


def run_with_setting(job: dict[str, Any]) -> dict[str, Any]:
    """What one way to set up ONNX Runtime costs: start, calls, processor time, memory.

    Args:
        job: ``model`` (a path), ``side`` of its input, ``calls``, ``pause_s`` and the setting:
            ``threads`` (null leaves it to the library), ``arena``, ``level``, ``spinning``.

    Returns:
        Milliseconds to open and run once, of each call one after the other and of each call after a
        pause; processor milliseconds of a call, of both kinds; memory after these, and the peak
        after a batch of 32 as well, kB.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, LEVELS[job["level"]]
    )
    options.enable_cpu_mem_arena = job["arena"]
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if job["spinning"] else "0"
    )
    if job["threads"] is not None:
        options.intra_op_num_threads = job["threads"]
    side = job["side"]
    images = np.random.default_rng(0).integers(0, 256, (32, side, side, 3), dtype=np.uint8)

    began = time.perf_counter()
    session = onnxruntime.InferenceSession(
        job["model"], sess_options=options, providers=["CPUExecutionProvider"]
    )

    def call() -> None:
        session.run(None, {"image": images[:1]})

    call()
    start_ms = 1e3 * (time.perf_counter() - began)
    calls = _time_calls(call, job["calls"], 0)
    paced = _time_calls(call, max(job["calls"] // 4, 1), job["pause_s"])
    single_kb = memory_kb(RSS)
    session.run(None, {"image": images})
    return {
        "start_ms": start_ms,
        "calls_ms": calls[0],
        "paced_ms": paced[0],
        "cpu_ms": calls[1],
        "paced_cpu_ms": paced[1],
        "rss_kb": single_kb,
        "batch_peak_kb": memory_kb(PEAK_RSS),
    }


def _time_calls(call: Callable[[], None], count: int, pause_s: float) -> tuple[list[float], float]:
    """Milliseconds of each call; processor milliseconds of a call with what its threads burn."""
    durations = []
    spent = time.process_time()
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        began = time.perf_counter()
        call()
        durations.append(1e3 * (time.perf_counter() - began))
    return durations, 1e3 * (time.process_time() - spent) / count


JOBS = {"memory": predict_often, "setting": run_with_setting}

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    print(json.dumps(JOBS[sys.argv[1]](json.loads(sys.argv[2]))))
