"""Annotating large sets: pictures a second and memory as the set grows, by processes and threads.

``python benchmarks/annotate.py`` from a clone. The set is a manifest that names a few JPEG files
again and again, so that they come from the system's file cache; each is decoded anew. A way is
measured in a fresh process from the command's first line to its last, the model's load and the
workers' start included. ``two jobs`` are two processes that know nothing of each other and take
half the set each, at the same time: what two workers are held against.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.annotate", "cpu,batch,bench")

from benchmarks.measure.inputs import make_jpegs
from benchmarks.measure.processes import memory_kb, run_job
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import Row, new_result
from efficientface_deploy.command import option
from efficientface_deploy.cpus import usable_cpus

# Way: processes, threads of each, independent jobs.
WAYS = {
    "1 thread": (1, 1, 1),
    "2 threads": (1, 2, 1),
    "2 workers": (2, 1, 1),
    "two jobs": (1, 1, 2),
}

_RATE, _SHARE, _MEGABYTES = 600, 0.95, 300  # the goals
_GROWTH = 1.05  # of the memory, from 10,000 pictures on: what two runs differ by
_TIMEOUT = 3600  # seconds


@dataclasses.dataclass(frozen=True)
class AnnotateBenchConfig:
    """Options of ``python benchmarks/annotate.py``."""

    pictures: tuple[int, ...] = option(
        (1_000, 10_000, 100_000), metavar="N", help="sizes of the set", first=True
    )
    side: int = option(350, minimum=16, metavar="PIXELS", help="of the square JPEGs")
    seed: int = option(0, minimum=0, help="of what they show")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/annotate.py``."""
    return run_benchmark(
        "annotate", AnnotateBenchConfig, run, argv, __doc__, "--pictures 1000 10000"
    )


def run(config: AnnotateBenchConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    result = {**new_result("annotate", config), "usable_cpus": usable_cpus()}
    cases: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        names = write_pictures(Path(folder), config)
        for count in config.pictures:
            for way in WAYS:
                print(f"annotating {count:,} pictures: {way}", file=sys.stderr)
                cases.append(measure_way(Path(folder), names, count, way))
    return {**result, "cases": cases, "goals": goals(cases)}


def write_pictures(folder: Path, config: AnnotateBenchConfig) -> list[str]:
    """Write the JPEG files, and give their names."""
    jpegs = make_jpegs(config.seed, (config.side, config.side))
    names = [f"{number}.jpg" for number in range(len(jpegs))]
    for name, jpeg in zip(names, jpegs, strict=True):
        (folder / name).write_bytes(jpeg)
    return names


def measure_way(folder: Path, names: Sequence[str], count: int, way: str) -> Row:
    """One row: a set annotated once, by one job or by several at the same time."""
    workers, threads, jobs = WAYS[way]
    share = count // jobs
    manifest = folder / f"{share}.csv"
    manifest.write_text("path\n" + "".join(f"{names[n % len(names)]}\n" for n in range(share)))

    def start(_: int) -> Row:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            options = ["--workers", str(workers), "--threads", str(threads)]
            arguments = [str(manifest), "--out", str(Path(out, "out")), *options]
            return run_job(annotate_once, arguments, timeout=_TIMEOUT)

    begin = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(start, range(jobs)))
    elapsed = time.perf_counter() - begin
    # Python's own start is no part of the command, and of two jobs the longer counts.
    seconds = max(run["seconds"] for run in runs)
    return {
        "way": way,
        "pictures": share * jobs,
        "seconds": seconds,
        "pictures_per_second": share * jobs / seconds,
        "cpu_ms": 1e3 * sum(run["cpu_seconds"] for run in runs) / (share * jobs),
        "peak_bytes": 1024 * sum(run["peak_kb"] + workers_kb(run, workers) for run in runs),
        "process_seconds": elapsed,
    }


def workers_kb(run: Row, workers: int) -> int:
    """The memory of a run's worker processes, as if each had as much as the largest of them."""
    return run["children_kb"] * workers if workers > 1 else 0


def annotate_once(arguments: list[str]) -> dict[str, float]:
    """Run the command in this process, and say how long it took and how much memory."""
    from efficientface_deploy.batch.cli import main

    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        main(arguments)
    seconds = time.perf_counter() - start
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    cpu = sum(used.ru_utime + used.ru_stime for used in (own, children))
    peak = memory_kb("VmHWM") or 0
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_kb": peak,
        "children_kb": children.ru_maxrss,
    }


def goals(cases: Sequence[Row]) -> list[dict[str, Any]]:
    """Each goal with what was found, at the largest set unless it names another."""
    largest = max(row["pictures"] for row in cases)
    at = {(row["way"], row["pictures"]): row for row in cases}
    rate = {way: at[way, largest]["pictures_per_second"] for way in WAYS}
    found = [
        ("pictures a second on two CPUs", max(rate["2 threads"], rate["2 workers"]), _RATE),
        ("two workers by two independent jobs", rate["2 workers"] / rate["two jobs"], _SHARE),
    ]
    rows = [
        {"name": name, "found": value, "at_least": limit, "met": value >= limit}
        for name, value, limit in found
    ]
    for name, limit, value in _memory(at, largest):
        rows.append({"name": name, "found": value, "at_most": limit, "met": value <= limit})
    return rows


def _memory(at: dict[tuple[str, int], Row], largest: int) -> list[tuple[str, float, float]]:
    """Of one process: name, most allowed and found."""
    peaks = {n: row["peak_bytes"] / 1e6 for (way, n), row in at.items() if way == "2 threads"}
    some = min(peaks, key=lambda count: abs(count - 10_000))
    return [
        (f"MB for {some:,} pictures", _MEGABYTES, peaks[some]),
        (f"memory for {largest:,} by that", _GROWTH, peaks[largest] / peaks[some]),
    ]
