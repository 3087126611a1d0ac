"""Fresh processes: how long one takes, how much memory, and what it measures of itself.

A process is started with some code; when that has printed its answer, the process says how much
memory it had and which modules. Nothing is imported here but what an application would import too,
so that the jobs below run in the memory of an application.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks import ROOT
from efficientface_deploy.workbench.timing import interleave

if TYPE_CHECKING:
    from benchmarks.measure.models import Candidate, Skipped

_TIMEOUT = 300  # seconds

Result = TypeVar("Result")


def memory_kb(field: str) -> int | None:
    """Memory of this process, kB: now (``VmRSS``) or its peak (``VmHWM``); None where unknown."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))
    except OSError:
        if field != "VmHWM" or sys.platform != "darwin":
            return None
    import resource  # not on Linux, where a child's peak starts at what its parent had in memory

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


# After the code: what the process says of itself.
_EPILOGUE = f"""
import sys
modules = list(sys.modules)
{inspect.getsource(memory_kb)}
import json
print(json.dumps(dict(peak_kb=memory_kb("VmHWM"), modules=modules)), flush=True)
"""


class ProcessError(Exception):
    """A process that did not come to its end; the last line that it wrote."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A process that ended.

    Attributes:
        answer: The first line that its code printed.
        answer_ns: From before it was started to this line.
        process_ns: From there to its end.
        peak_kb: Largest resident memory; None where the system does not say.
        modules: What it had imported.
    """

    answer: str
    answer_ns: int
    process_ns: int
    peak_kb: int | None
    modules: frozenset[str]


def run_fresh(
    code: str,
    argument: object = None,
    *,
    bytecode: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Run:
    """Run code in a new process of this Python, which finds our packages.

    Args:
        code: Prints one line; where there is an argument, it has this name.
        argument: Becomes JSON on the way.
        bytecode: Folder to keep compiled modules in; None keeps them beside the sources.
        environment: Variables to set.
        timeout: Seconds after which it is ended; None for five minutes.

    Raises:
        ProcessError: It failed, hung, or printed nothing.
    """
    limit = timeout or _TIMEOUT
    given = ""
    if argument is not None:
        given = f"import json; argument = json.loads({json.dumps(argument)!r})\n"
    variables = {**os.environ, **(environment or {})}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    if bytecode is not None:
        variables["PYTHONPYCACHEPREFIX"] = str(bytecode)
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter_ns()
        command = [sys.executable, "-c", given + code + _EPILOGUE]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=variables
        )
        alarm = threading.Timer(limit, process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            with process:
                assert process.stdout is not None
                answer = process.stdout.readline()
                answered = time.perf_counter_ns()
                rest = process.stdout.read()
        except BaseException:  # an interrupt must not leave the process behind
            process.kill()
            raise
        finally:
            alarm.cancel()  # else it would keep the interpreter alive
        ended = time.perf_counter_ns()
        if process.returncode or not rest:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["ended without a word"]
            late = ended - start > limit * 1e9
            raise ProcessError(f"not done after {limit} s" if late else lines[-1])
    said = json.loads(rest.splitlines()[-1])
    modules = frozenset(said["modules"])
    return Run(answer.strip(), answered - start, ended - start, said["peak_kb"], modules)


def run_job(job: Callable[..., Result], *arguments: object, **options: Any) -> Result:
    """Call a function of a module, from JSON to JSON, in a process of its own.

    Args:
        job: What is called.
        arguments: Its arguments.
        options: Of :func:`run_fresh`.

    Raises:
        ProcessError: It failed.
    """
    code = f"from {job.__module__} import {job.__name__}\n"
    code += f"print(json.dumps({job.__name__}(*argument)), flush=True)"
    found: Result = json.loads(run_fresh(code, arguments, **options).answer)
    return found


# ---- cold start: what the first label costs in a process that has done nothing yet

# The clock runs from the start of load() to the label: the import of the backend's library is in
# it, Python's own start, numpy and Pillow are not. The model file lies in the system's file cache,
# as it does from the second start on.
_COLD_START = """
import time
jpeg = open(argument.pop("jpeg"), "rb").read()
import efficientface_deploy
start = time.perf_counter_ns()
predictor = efficientface_deploy.load(**argument)
loaded = time.perf_counter_ns()
predictor(jpeg)
labelled = time.perf_counter_ns()
print(json.dumps([loaded - start, labelled - loaded]), flush=True)
"""


def measure_cold_starts(
    candidates: Sequence[Candidate], jpeg: bytes, *, runs: int, seed: int
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Start every model on every backend in processes of their own, in rounds of random order.

    Args:
        candidates: Each model and backend is started with the first number of threads that it has
            here.
        jpeg: What is labelled.
        runs: Processes for each; with 0 nothing is measured.
        seed: Of the order.

    Returns:
        A row for each, and those that failed, which have none.
    """
    from benchmarks.measure.models import NO_GRAPHS, Skipped  # which a job does not need

    chosen: dict[str, Candidate] = {}
    for entry in candidates:
        # Without CUDA graphs is a setting for comparison, which no process starts with.
        if not entry.model.endswith(NO_GRAPHS):
            chosen.setdefault(f"{entry.model} on {entry.backend}", entry)
    found: dict[str, list[Run]] = {name: [] for name in chosen}
    failed: dict[str, Skipped] = {}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "face.jpg")
        image.write_bytes(jpeg)
        for _, name in interleave(chosen, runs, seed):
            entry = chosen[name]
            try:
                if name not in failed:
                    found[name].append(start_cold(entry, image))
            except ProcessError as error:
                failed[name] = Skipped(entry.backend, entry.model, f"cold start: {error}")
    kept = [name for name, own in found.items() if own and name not in failed]
    return [describe_cold(chosen[name], found[name]) for name in kept], list(failed.values())


def start_cold(candidate: Candidate, image: Path) -> Run:
    """Load and label in a fresh process; the answer is ``[nanoseconds of load(), of the label]``.

    Raises:
        ProcessError: It failed.
    """
    options = {name: getattr(candidate, name) for name in ("backend", "threads", "preset")}
    model = str(candidate.predictor.path.absolute())
    return run_fresh(_COLD_START, {**options, "model": model, "jpeg": str(image)})


def describe_cold(candidate: Candidate, runs: Sequence[Run]) -> dict[str, Any]:
    """One row of the result."""
    load_ns, label_ns = zip(*(json.loads(run.answer) for run in runs), strict=True)
    totals = [(load + label) / 1e6 for load, label in zip(load_ns, label_ns, strict=True)]
    peaks = [1024 * run.peak_kb for run in runs if run.peak_kb is not None]
    return {
        **candidate.key(),
        "runs": len(runs),
        "p50_ms": statistics.median(totals),
        "min_ms": min(totals),
        "max_ms": max(totals),
        "load_ms": statistics.median(load_ns) / 1e6,
        "first_label_ms": statistics.median(label_ns) / 1e6,
        "process_ms": statistics.median(run.process_ns for run in runs) / 1e6,
        "peak_bytes": max(peaks, default=None),
    }


# ---- jobs: what a process of its own measures of itself


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
                memory.append(memory_kb("VmRSS"))
    return {"predictions": counts, "rss_kb": memory}
