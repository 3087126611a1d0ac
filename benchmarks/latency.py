"""Latency and throughput of every model on every backend of this machine.

Run ``python benchmarks/latency.py`` from a clone. Two kinds of work are timed: *compute*, a
preprocessed batch through the backend (for a GPU: to the device, through the network, back), and
*end to end*, one JPEG in memory to a label. All candidates take turns in rounds of random order;
see :mod:`efficientface_deploy.workbench.timing`. Beside them the start of a fresh process
(:mod:`benchmarks.measure.processes`) and the machine's peak, from which every row's distance is
given (:mod:`benchmarks.measure.roofline`). docs/benchmarks.md has the method,
docs/result-files.md the form of the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.latency", "cpu,bench")

from benchmarks.measure.gpu_counters import energy_per_call, open_energy_meter
from benchmarks.measure.inputs import input_bytes, make_batches, make_jpegs
from benchmarks.measure.models import (
    CANNOT_RUN,
    Candidate,
    Skipped,
    choose_backends,
    choose_reference,
    default_models,
    find_models,
    one_line,
    open_candidates,
    positive_integers,
    require_candidates,
)
from benchmarks.measure.processes import measure_cold_starts
from benchmarks.measure.profiling import PROFILED, inspect_engine, profile_onnx
from benchmarks.measure.roofline import (
    count_multiply_adds,
    fewest_multiply_adds,
    measure_peaks,
    roofline_of,
)
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import COMPUTE, END_TO_END, Result, Row, new_result
from efficientface_deploy.command import option
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.timing import Call, Samples, in_turn, measure, speedup

FEWEST_CALLS_FOR_P99 = 100

_PROFILED_RUNS = 100


@dataclasses.dataclass(frozen=True)
class LatencyConfig:
    """Options of ``python benchmarks/latency.py``."""

    models: tuple[Path, ...] = option(
        (),
        positional=True,
        metavar="MODEL",
        help="model files or folders (default: the bundled model, and what lies in artifacts/ or "
        "else its FP16 and INT8)",
        first=True,
    )
    backends: str = option(
        "", metavar="NAME,...", help="e.g. onnx:cpu,torch (default: all that this machine has)"
    )
    batch: str = option("1,8,32", metavar="N,...", help="batch sizes", first=True)
    threads: str | None = option(
        None, metavar="N,...", help="CPU threads of one inference (default: 1 and all cores)"
    )
    baseline: str | None = option(
        None, metavar="MODEL", help="what speed-ups refer to (default: PyTorch's model, else FP32)"
    )
    seconds: float = option(3.0, metavar="S", minimum=0.001, help="timed calls for each row")
    rounds: int = option(10, metavar="N", minimum=3, help="turns of each row")
    cold: int = option(
        5, metavar="N", minimum=0, help="fresh processes for each model and backend; 0: none"
    )
    floor: bool = option(True, help="measure the machine's peak, and each row's distance from it")
    profile: bool = option(False, help="show where the time goes, by kind of operator and by layer")
    seed: int = option(0, minimum=0, help="seed of inputs and order")
    out: Path | None = out_option()


@dataclasses.dataclass(frozen=True)
class Work:
    """What one row times.

    Attributes:
        candidate: Model, backend and threads.
        stage: ``compute`` or ``end to end``.
        batch: Images in one call.
        call: Does the work once, on another input each time.
    """

    candidate: Candidate
    stage: str
    batch: int
    call: Call

    @property
    def name(self) -> str:
        """Unique within a run."""
        candidate = self.candidate
        threads = "" if candidate.threads is None else f" with {candidate.threads} threads"
        return f"{candidate.model} on {candidate.backend}{threads}, {self.stage} {self.batch}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/latency.py``."""
    example = "artifacts --batch 1 --threads 1,2"
    return run_benchmark("latency", LatencyConfig, run, argv, __doc__, example)


def run(config: LatencyConfig) -> Result:
    """Measure, and give the result as a JSON object.

    Raises:
        EfficientFaceError: An option cannot be used, or no model runs here.
    """
    batches = positive_integers(config.batch, "--batch")
    threads = positive_integers(config.threads or f"1,{usable_cpus()}", "--threads")
    backends = choose_backends(config.backends)
    result = new_result("latency", config)
    with contextlib.ExitStack() as stack:
        unmade, notes = list[Skipped](), list[str]()
        if config.models:
            paths = find_models(config.models)
        else:
            paths, unmade, notes = stack.enter_context(default_models())
        opening = open_candidates(paths, backends, threads, without_graphs=True)
        candidates, skipped = stack.enter_context(opening)
        skipped += unmade
        require_candidates(candidates, skipped)
        baseline = choose_baseline(candidates, config.baseline)
        works, failed = try_works(plan_works(candidates, batches, config.seed))
        skipped += failed
        require_candidates(works, skipped)
        peaks = None
        if config.floor:
            print("measuring the machine's peak", file=sys.stderr)
            peaks = measure_peaks(threads, gpu=any(entry.on_gpu for entry in candidates))
        jpegs = make_jpegs(config.seed)
        cold, failed = measure_cold_starts(candidates, jpegs[0], runs=config.cold, seed=config.seed)
        skipped += failed
        seconds = len(works) * config.seconds
        print(f"measuring {len(works)} rows, {seconds:.0f} s or more", file=sys.stderr)
        by_name = {work.name: work for work in works}
        samples = measure(
            {name: work.call for name, work in by_name.items()},
            seconds=config.seconds,
            rounds=config.rounds,
            seed=config.seed,
            before_turn=lambda name: by_name[name].candidate.prepare(),
        )
        counts = count_multiply_adds(candidates)
        fewest = fewest_multiply_adds(candidates, counts)
        meter = open_energy_meter() if any(entry.on_gpu for entry in candidates) else None
        rows = []
        for work in works:
            row = describe(work, works, samples, baseline)
            own = (work.candidate, work.batch, row["p50_ms"], fewest)
            row["floor"] = None if peaks is None else roofline_of(*own, peaks)
            if meter is not None and work.candidate.on_gpu and work.stage == COMPUTE:
                row["joules_per_image"] = energy_per_call(meter, work.call) / work.batch
            rows.append(row)
        profiles, failed = profile(candidates, config.seed) if config.profile else ([], [])
        skipped += failed
        models = {candidate.model: candidate.describe() for candidate in candidates}
    return {
        **result,
        "inputs": {
            COMPUTE: f"uint8 noise, at least four batches in turn, {input_bytes()} bytes or more",
            END_TO_END: f"{len(jpegs)} JPEG files in memory in turn, "
            f"{sum(map(len, jpegs)) // len(jpegs)} bytes on average",
        },
        "baseline": baseline,
        "models": [{**model, "multiply_adds": counts[name]} for name, model in models.items()],
        "cases": rows,
        "cold": cold,
        "ceilings": peaks,
        "profiles": profiles,
        "absent": [dataclasses.asdict(entry) for entry in skipped],
        "warnings": [*warnings(samples), *notes],
    }


def plan_works(candidates: Sequence[Candidate], batches: Sequence[int], seed: int) -> list[Work]:
    """Every candidate at every batch size, and end to end."""
    sides = {candidate.predictor.spec.input_size for candidate in candidates}
    arrays = {key: make_batches(*key, seed) for key in itertools.product(sides, batches)}
    jpegs = make_jpegs(seed)
    works = []
    for candidate in candidates:
        predictor = candidate.predictor
        for batch in batches:
            call = in_turn(predictor.infer, arrays[predictor.spec.input_size, batch])
            works.append(Work(candidate, COMPUTE, batch, call))
        works.append(Work(candidate, END_TO_END, 1, in_turn(predictor, jpegs)))
    return works


def try_works(works: Sequence[Work]) -> tuple[list[Work], list[Skipped]]:
    """Do each once, so that one which cannot run does not spoil the rest."""
    working, failed = [], []
    for work in works:
        work.candidate.prepare()
        try:
            work.call()
        except CANNOT_RUN as error:
            reason = f"{work.stage}, batch {work.batch}: {one_line(error)}"
            failed.append(Skipped(work.candidate.backend, work.candidate.model, reason))
        else:
            working.append(work)
    return working, failed


def choose_baseline(candidates: Sequence[Candidate], wanted: str | None) -> str:
    """The model that speed-ups refer to: what is asked for, else PyTorch's, else FP32's.

    Raises:
        ConfigError: None of the models has this name.
    """
    models = list(dict.fromkeys(candidate.model for candidate in candidates))
    if wanted is None:
        return choose_reference(candidates).model
    if wanted not in models:
        expected, fix = "one of " + ", ".join(models), "choose among the models that run here"
        raise ConfigError("--baseline", expected, repr(wanted), fix)
    return wanted


def describe(
    work: Work, works: Sequence[Work], samples: Mapping[str, Samples], baseline: str
) -> Row:
    """One row of the result; its speed-up is over the baseline doing the same work."""
    candidate, own = work.candidate, samples[work.name]
    same_work = [
        other
        for other in works
        if other.candidate.model == baseline
        and (other.stage, other.batch) == (work.stage, work.batch)
    ]
    same_threads = [other for other in same_work if other.candidate.threads == candidate.threads]
    # A GPU has no threads to compare: it meets the baseline at its best, which is opened last.
    reference = next(iter(same_threads or same_work[::-1]), None)
    gain = speedup(samples[reference.name], own) if reference else None
    return {
        "model": candidate.model,
        "backend": candidate.backend,
        "precision": candidate.precision,
        "threads": candidate.threads,
        "stage": work.stage,
        "batch": work.batch,
        **own.figures(),
        "images_per_second": own.calls_per_second * work.batch,
        "speedup": gain,
    }


def profile(candidates: Sequence[Candidate], seed: int) -> tuple[list[Row], list[Skipped]]:
    """Where the time goes in a pass of one picture, for each model on its first thread count."""
    profiles, failed = [], []
    for entry in {(entry.model, entry.backend): entry for entry in reversed(candidates)}.values():
        try:
            if entry.backend in PROFILED:
                images = make_batches(entry.predictor.spec.input_size, 1, seed)
                profiles.append(profile_onnx(entry, images, _PROFILED_RUNS))
            elif entry.backend.startswith("trt"):
                profiles.append(inspect_engine(entry))
            else:
                reason = f"profile: for {', '.join(PROFILED)} and engines"
                failed.append(Skipped(entry.backend, entry.model, reason))
        except CANNOT_RUN as error:
            failed.append(Skipped(entry.backend, entry.model, f"profile: {one_line(error)}"))
    return profiles[::-1], failed


def warnings(samples: Mapping[str, Samples]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    noisy = [entry for entry in samples.values() if entry.noisy]
    if noisy:
        others = max(own.other_cpus or 0.0 for own in noisy)
        found.append(
            f"{len(noisy)} of {len(samples)} rows are noisy (rounds up to "
            f"{max(own.drift for own in noisy):.1f} x apart, other processes on up to "
            f"{others:.1f} CPUs); measure again when the machine is idle"
        )
    few = [entry for entry in samples.values() if entry.count < FEWEST_CALLS_FOR_P99]
    if few:
        found.append(
            f"{len(few)} of {len(samples)} rows have fewer than {FEWEST_CALLS_FOR_P99} calls: "
            "their p99 is near the maximum; give more --seconds"
        )
    return found
