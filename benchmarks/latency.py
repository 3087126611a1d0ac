"""Latency and throughput of every model on every backend of this machine.

Run ``python benchmarks/latency.py`` from a clone. Two kinds of work are timed: *compute*, a
preprocessed batch through the backend (for a GPU: to the device, through the network, back), and
*end to end*, one JPEG in memory to a label. All contenders take turns in rounds of random order;
see :mod:`efficientface_deploy.workbench.timing`. Beside them the start of a fresh process
(:mod:`benchmarks.measure.processes`) and the machine's peak, from which every row's distance is
given (:mod:`benchmarks.measure.roofline`). docs/benchmarks.md has the method and the form of the
result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks.measure.gpu_counters import measure_gpu, open_energy_meter, peak_by_torch
from benchmarks.measure.inputs import (
    _JPEG_QUALITY,
    _PHOTO_SIDE,
    compute_call,
    end_to_end_call,
    input_bytes,
    make_batches,
    make_jpegs,
)
from benchmarks.measure.models import (
    CANNOT_RUN,
    Absent,
    Contender,
    choose_backends,
    default_models,
    find_models,
    one_line,
    open_contenders,
    positive_integers,
    require_contenders,
)
from benchmarks.measure.processes import measure_cold_starts
from benchmarks.measure.profiling import PROFILED, inspect_engine, profile_onnx
from benchmarks.measure.roofline import (
    count_multiply_adds,
    fewest_multiply_adds,
    floor_of,
    measure_ceilings,
)
from benchmarks.report.__main__ import COMPUTE, END_TO_END, plot_latency, write_result
from benchmarks.report.result import default_folder, new_result
from benchmarks.report.tables import console, require_libraries, show
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.environment import usable_cpus
from efficientface_deploy.workbench.timing import Call, Samples, measure, speedup

FEWEST_CALLS_FOR_P99 = 100

_STAGED_CALLS = 100
_PROFILED_RUNS = 100


@dataclasses.dataclass(frozen=True)
class LatencyConfig:
    """Options of ``python benchmarks/latency.py``."""

    models: tuple[Path, ...] = option(
        (),
        positional=True,
        metavar="MODEL",
        help="model files or folders (default: the bundled model in all precisions, and those "
        "under artifacts/)",
    )
    backends: str | None = option(
        None, metavar="NAME,...", help="e.g. onnx:cpu,torch (default: all that this machine has)"
    )
    batch: str = option("1,8,32", metavar="N,...", help="batch sizes")
    threads: str | None = option(
        None, metavar="N,...", help="CPU threads of one inference (default: 1 and all cores)"
    )
    baseline: str | None = option(
        None, metavar="MODEL", help="what speed-ups refer to (default: the first PyTorch model)"
    )
    seconds: float = option(3.0, metavar="S", minimum=0, help="timed calls for each row")
    rounds: int = option(10, metavar="N", minimum=3, help="turns of each row")
    cold: int = option(
        5, metavar="N", minimum=0, help="fresh processes for each model and backend; 0: none"
    )
    floor: bool = option(True, help="measure the machine's peak, and each row's distance from it")
    profile: bool = option(False, help="show where the time goes, by kind of operator and by layer")
    seed: int = option(0, minimum=0, help="seed of inputs and order")
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: a contender and a kind of work.

    Attributes:
        contender: Model, backend and threads.
        stage: ``compute`` or ``end to end``.
        batch: Images in one call.
        call: Does the work once, on another input each time.
    """

    contender: Contender
    stage: str
    batch: int
    call: Call

    @property
    def name(self) -> str:
        """Unique within a run."""
        contender = self.contender
        threads = "" if contender.threads is None else f" with {contender.threads} threads"
        return f"{contender.model} on {contender.backend}{threads}, {self.stage} {self.batch}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/latency.py``."""
    config = parse_config(
        LatencyConfig,
        argv,
        prog="benchmarks/latency.py",
        description="Time every model on every backend of this machine.",
    )
    require_libraries()
    result = run(config)
    folder = config.out or default_folder(result)
    write_result(result, folder / "latency.json")
    plot_latency(result, folder / "latency.png")
    output = console()
    show(result, output)
    output.print(f"wrote latency.json and latency.png to {folder}", markup=False)
    return 0


def run(config: LatencyConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        EfficientFaceError: An option cannot be used, or no model runs here.
    """
    batches = positive_integers(config.batch, "--batch")
    threads = positive_integers(config.threads or f"1,{usable_cpus()}", "--threads")
    backends = choose_backends(config.backends or "")
    result = new_result("latency", config)
    with (
        _models(config) as (paths, unmade, notes),
        open_contenders(paths, backends, threads, without_graphs=True) as (contenders, absent),
    ):
        absent += unmade
        require_contenders(contenders, absent)
        baseline = choose_baseline(contenders, config.baseline)
        cases, failed = try_cases(plan_cases(contenders, batches, config.seed))
        absent += failed
        require_contenders(cases, absent)
        ceilings = _ceilings(threads, contenders) if config.floor else None
        cold, failed = measure_cold_starts(
            contenders, make_jpegs(config.seed)[0], runs=config.cold, seed=config.seed
        )
        absent += failed
        samples = _measure(cases, config)
        counts = count_multiply_adds(contenders)
        rows = [describe_case(case, cases, samples, baseline) for case in cases]
        _add_floors(rows, cases, counts, ceilings)
        _add_gpu_figures(rows, cases)
        profiles, failed = profile(contenders, config.seed) if config.profile else ([], [])
        absent += failed
        models = {contender.model: contender.describe() for contender in contenders}
    return {
        **result,
        "inputs": _describe_inputs(config.seed),
        "baseline": baseline,
        "models": [{**model, "multiply_adds": counts[name]} for name, model in models.items()],
        "cases": rows,
        "cold": cold,
        "ceilings": ceilings,
        "profiles": profiles,
        "absent": [dataclasses.asdict(entry) for entry in absent],
        "warnings": [*warnings(samples), *notes],
    }


@contextlib.contextmanager
def _models(config: LatencyConfig) -> Iterator[tuple[list[Path], list[Absent], list[str]]]:
    """The model files, what is missing of them, and what to say of them."""
    if config.models:
        yield find_models(config.models), [], []
    else:
        with default_models() as found:
            yield found


def _ceilings(threads: Sequence[int], contenders: Sequence[Contender]) -> dict[str, Any]:
    print("measuring the machine's peak", file=sys.stderr)
    ceilings = measure_ceilings(threads)
    if any(contender.on_gpu for contender in contenders):
        ceilings["gpu"] = peak_by_torch()
    return ceilings


def _measure(cases: Sequence[Case], config: LatencyConfig) -> dict[str, Samples]:
    estimate = len(cases) * config.seconds
    print(f"measuring {len(cases)} rows, {estimate:.0f} s or more", file=sys.stderr)
    return measure(
        {case.name: case.call for case in cases},
        seconds=config.seconds,
        rounds=config.rounds,
        seed=config.seed,
        before_turn=_before_turn(cases, config.rounds),
    )


def _add_floors(
    rows: Sequence[dict[str, Any]],
    cases: Sequence[Case],
    counts: Mapping[str, int | None],
    ceilings: Mapping[str, Any] | None,
) -> None:
    """Give each row its distance from the floor; None where that is not known."""
    fewest = fewest_multiply_adds([case.contender for case in cases], counts)
    for row, case in zip(rows, cases, strict=True):
        row["floor"] = None
        if ceilings is not None:
            row["floor"] = floor_of(case.contender, case.batch, row["p50_ms"], fewest, ceilings)


def _add_gpu_figures(rows: Sequence[dict[str, Any]], cases: Sequence[Case]) -> None:
    """Stages and energy of the rows that ran on a GPU."""
    if not any(case.contender.on_gpu for case in cases):
        return
    meter = open_energy_meter()
    for row, case in zip(rows, cases, strict=True):
        if case.stage == COMPUTE:
            images = make_batches(case.contender.predictor.spec.input_size, case.batch, seed=0)
            row |= measure_gpu(case.contender, images, case.call, meter, _STAGED_CALLS)


def profile(
    contenders: Sequence[Contender], seed: int
) -> tuple[list[dict[str, Any]], list[Absent]]:
    """Where the time goes in a pass of one picture, for each model on its first thread count."""
    profiles, failed = [], []
    for entry in {(entry.model, entry.backend): entry for entry in reversed(contenders)}.values():
        try:
            if entry.backend in PROFILED:
                images = make_batches(entry.predictor.spec.input_size, 1, seed)
                profiles.append(profile_onnx(entry, images, _PROFILED_RUNS))
            elif entry.backend.startswith("trt"):
                profiles.append(inspect_engine(entry))
            else:
                reason = f"profile: for {', '.join(PROFILED)} and engines"
                failed.append(Absent(entry.backend, entry.model, reason))
        except CANNOT_RUN as error:
            failed.append(Absent(entry.backend, entry.model, f"profile: {one_line(error)}"))
    return profiles[::-1], failed


def choose_baseline(contenders: Sequence[Contender], wanted: str | None) -> str:
    """The model that speed-ups refer to: the one asked for, else PyTorch's, else the first.

    Raises:
        ConfigError: None of the models has this name.
    """
    models = list(dict.fromkeys(contender.model for contender in contenders))
    if wanted is None:
        torch = [entry.model for entry in contenders if entry.backend.startswith("torch")]
        return (torch or models)[0]
    if wanted not in models:
        raise ConfigError(
            "--baseline",
            "one of " + ", ".join(models),
            repr(wanted),
            "choose among the models that run here",
        )
    return wanted


def plan_cases(contenders: Sequence[Contender], batches: Sequence[int], seed: int) -> list[Case]:
    """Every contender at every batch size, and end to end."""
    sides = {contender.predictor.spec.input_size for contender in contenders}
    arrays = {key: make_batches(*key, seed) for key in itertools.product(sides, batches)}
    jpegs = make_jpegs(seed)
    cases = []
    for contender in contenders:
        side = contender.predictor.spec.input_size
        for batch in batches:
            call = compute_call(contender, arrays[side, batch])
            cases.append(Case(contender, COMPUTE, batch, call))
        cases.append(Case(contender, END_TO_END, 1, end_to_end_call(contender, jpegs)))
    return cases


def try_cases(cases: Sequence[Case]) -> tuple[list[Case], list[Absent]]:
    """Run every case once, so that one which cannot run does not spoil the rest."""
    working, failed = [], []
    for case in cases:
        case.contender.prepare()
        try:
            case.call()
        except CANNOT_RUN as error:
            reason = f"{case.stage}, batch {case.batch}: {one_line(error)}"
            failed.append(Absent(case.contender.backend, case.contender.model, reason))
        else:
            working.append(case)
    return working, failed


def describe_case(
    case: Case, cases: Sequence[Case], samples: dict[str, Samples], baseline: str
) -> dict[str, Any]:
    """One row of the result."""
    own = samples[case.name]
    reference = _baseline_case(case, cases, baseline)
    gain = speedup(samples[reference.name], own) if reference else None
    return {
        "model": case.contender.model,
        "backend": case.contender.backend,
        "precision": case.contender.precision,
        "threads": case.contender.threads,
        "stage": case.stage,
        "batch": case.batch,
        "calls": own.count,
        "min_ms": own.min_ms,
        "p50_ms": own.p50_ms,
        "p90_ms": own.p90_ms,
        "p95_ms": own.p95_ms,
        "p99_ms": own.p99_ms,
        "images_per_second": own.calls_per_second * case.batch,
        "round_medians_ms": own.round_medians_ms.tolist(),
        "spread": own.spread,
        "drift": own.drift,
        "busy": own.busy,
        "speedup": dataclasses.asdict(gain) if gain else None,
    }


def warnings(samples: dict[str, Samples]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    busy = [entry for entry in samples.values() if entry.busy]
    if busy:
        spread = max(entry.spread for entry in busy)
        drift = max(entry.drift for entry in busy)
        found.append(
            f"the machine was busy: {len(busy)} of {len(samples)} rows vary (p90 up to "
            f"{spread:.1f} x p50, rounds up to {drift:.1f} x apart); measure again when it is idle"
        )
    few = [entry for entry in samples.values() if entry.count < FEWEST_CALLS_FOR_P99]
    if few:
        found.append(
            f"{len(few)} of {len(samples)} rows have fewer than {FEWEST_CALLS_FOR_P99} calls: "
            "their p99 is near the maximum; give more --seconds"
        )
    return found


def _baseline_case(case: Case, cases: Sequence[Case], baseline: str) -> Case | None:
    """The baseline doing the same work, with the same number of threads where there is such."""
    same_work = [
        other
        for other in cases
        if other.contender.model == baseline
        and (other.stage, other.batch) == (case.stage, case.batch)
    ]
    same_threads = [
        other for other in same_work if other.contender.threads == case.contender.threads
    ]
    # A GPU has no threads to compare: it meets the baseline at its best, which is opened last.
    return next(iter(same_threads or same_work[::-1]), None)


def _describe_inputs(seed: int) -> dict[str, Any]:
    jpegs = make_jpegs(seed)
    return {
        COMPUTE: f"uint8 noise, at least four batches in turn, {input_bytes()} bytes or more",
        END_TO_END: f"{len(jpegs)} JPEG files in memory in turn, {_PHOTO_SIDE}x{_PHOTO_SIDE}, "
        f"quality {_JPEG_QUALITY}, {sum(map(len, jpegs)) // len(jpegs)} bytes on average",
    }


def _before_turn(cases: Sequence[Case], rounds: int) -> Callable[[str], None]:
    """Prepares a contender, and shows on a terminal how far the measurement is."""
    by_name = {case.name: case for case in cases}
    turns = len(cases) * (rounds + 1)  # warm-up included
    done = itertools.count(1)

    def announce(name: str) -> None:
        by_name[name].contender.prepare()
        # Written between the timings: a progress bar with a thread of its own would disturb them.
        if sys.stderr.isatty():
            number = next(done)
            end = "\n" if number == turns else ""
            print(f"\rturn {number} of {turns}", end=end, file=sys.stderr, flush=True)

    return announce


if __name__ == "__main__":
    run_command(main)
