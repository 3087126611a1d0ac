"""``--tune``: of all files, backends and threads the fastest here that is right, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import efficientface_deploy as ef
from efficientface_deploy.backends import missing_reason
from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.errors import BackendError, ExportError
from efficientface_deploy.tuned import machine_of
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench.timing import Samples, in_turn, measure, speedup
from efficientface_export.tensorrt.build_log import EngineCost
from efficientface_export.tensorrt.builder import OnProgress
from efficientface_export.verification.parity import (
    THRESHOLDS,
    Verification,
    verify_artifact,
    with_interval,
)
from efficientface_export.verification.provenance import PRECISIONS
from efficientface_export.verification.reference import TestSet

BATCHES = {"latency": 1, "throughput": 32}  # images of one call
FEWEST_SECONDS = 0.2  # of measuring, for each candidate

_ROUNDS, _FEWEST_ROUNDS = 20, 3
_INPUTS = 8  # calls before an input comes again
# Smaller differences are none: rounds within one process do not show how two processes differ.
_NOISE = 0.02

_DEVICES = {
    "cpu": ("cpu", "openvino", "openvino-bf16"),
    "gpu": ("cuda", "tensorrt", "tensorrt-rtx"),
}


class Runner(NamedTuple):
    """What runs a file: ``onnx:cpu``, ``trt``, ...; its CPU threads, None where it has none."""

    backend: str
    threads: int | None


def find_runners(objective: str, engine: str, target: str) -> tuple[list[Runner], list[str]]:
    """What runs files of an engine and a target here, the default first; and why others do not."""
    if engine != "onnx":
        return [Runner(engine, None)], []
    if reason := missing_reason("onnx"):
        return [], [f"onnx: {reason}"]
    from efficientface_deploy.backends.onnx import find_provider

    cpus = usable_cpus()
    counts = {"latency": {1, min(2, cpus), cpus}, "throughput": {min(2, cpus), cpus}}[objective]
    threads = sorted(counts) if target == "cpu" else [None]
    runners, absent = [], []
    for device in _DEVICES[target]:
        try:
            find_provider(device)
        except BackendError as error:
            absent.append(f"onnx:{device}: {error.found}")
        else:
            runners += [Runner(f"onnx:{device}", count) for count in threads]
    return runners, absent


class File(NamedTuple):
    """A file that was made to be tried; of an engine, its ONNX file and what its log says."""

    graph: str
    precision: str
    path: Path
    parent: Path | None = None
    cost: EngineCost | None = None


@dataclasses.dataclass(eq=False)
class Candidate:
    """A file and what runs it.

    Attributes:
        file: The file.
        runner: What runs it.
        verification: Of both together; of an engine's ONNX file where nothing here runs the engine.
        runs: Whether it runs here.
        samples: How long its calls took; None before that, and for what is not timed.
    """

    file: File
    runner: Runner
    verification: Verification = dataclasses.field(default_factory=Verification)
    runs: bool = True
    samples: Samples | None = None

    @property
    def precision(self) -> str:
        """The file's, or ``bf16`` where the backend rounds so."""
        return "bf16" if self.runner.backend.endswith("bf16") else self.file.precision

    def times(self, other: Candidate) -> dict[str, float]:
        """Its time by another's, with an interval; nothing where they were not timed."""
        timed = self.samples is not None and other.samples is not None
        return speedup(self.samples, other.samples) if timed else {}  # type: ignore[arg-type]

    def cost(self, objective: str) -> tuple[float, ...]:
        """What a call takes: milliseconds, else counts, as one picture waits for launches.

        A batch waits for memory; what a builder's log does not say is worst.
        """
        if self.samples is not None:
            return (self.samples.p50_ms,)
        found = self.file.cost
        counts = [found.kernels, found.bytes_moved] if found is not None else [None, None]
        known = [math.inf if count is None else count for count in counts]
        return tuple(known if objective == "latency" else known[::-1])

    def speed(self) -> str:
        """The same for people."""
        if self.samples is None:
            return f"{self.file.cost or 'an unknown number of kernels'} (an estimate)"
        return with_interval(self.samples.p50_ms, self.samples.p50_interval_ms, ".3g") + " ms"

    def __str__(self) -> str:
        threads = self.runner.threads
        count = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
        return f"{self.precision} ({self.file.graph} graph) by {self.runner.backend}{count}"


def pair(files: Sequence[File], runners: Sequence[Runner]) -> list[Candidate]:
    """Each file with all that runs it; BF16 is a way to run FP32."""
    found = [Candidate(file, runner) for file in files for runner in runners]
    return [one for one in found if one.precision != "bf16" or one.file.precision == "fp32"]


def verify_candidates(
    candidates: Sequence[Candidate], test_set: TestSet, logits: Float32Array
) -> None:
    """Compare each file with the reference on each backend; threads change nothing in it."""
    found: dict[tuple[Path, str], tuple[Verification, bool]] = {}
    for one in candidates:
        key = one.file.path, one.runner.backend
        if key not in found:
            given = logits, test_set, one.precision
            result = verify_artifact(one.file.path, *given, one.runner.backend)
            runs = not result.not_run
            if not runs and one.file.parent is not None:
                result = verify_artifact(one.file.parent, *given)
            found[key] = result, runs
        one.verification, one.runs = found[key]


def measure_candidates(
    candidates: Sequence[Candidate],
    objective: str,
    seconds: float,
    images: UInt8Array,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Time candidates in turns, and keep it with them.

    Args:
        candidates: Those that run here.
        objective: Decides how many images a call has.
        seconds: For all of them together.
        images: uint8 (N, S, S, 3); they are used in turn.
        progress: Is told whose turn it is, and how far the measurement is.
        clock: Seconds from any point on.

    Returns:
        Whether Ctrl-C ended it before its time.

    Raises:
        KeyboardInterrupt: Ctrl-C came before there was anything to compare.
    """
    size, done = BATCHES[objective], 0
    chosen = images[np.arange(_INPUTS * size) % len(images)]
    batches = list(chosen.reshape(_INPUTS, size, *images.shape[1:]))
    end = clock() + seconds
    turns = itertools.count()

    def announce(name: str) -> None:
        if progress is not None:
            progress(name, next(turns) / (len(candidates) * (_ROUNDS + 1)))

    def is_over() -> bool:
        nonlocal done
        done += 1
        return bool(signals) or (done >= _FEWEST_ROUNDS and clock() >= end)

    with contextlib.ExitStack() as stack:
        calls = {}
        for one in candidates:
            backend, threads = one.runner
            opened = ef.load(one.file.path, backend=backend, threads=threads, check=False)
            calls[str(one)] = in_turn(stack.enter_context(opened).infer, batches)
        with contextlib.suppress(KeyboardInterrupt), interrupts_wait() as signals:
            found = measure(
                calls,
                seconds=seconds / len(calls),
                rounds=_ROUNDS,
                warm_up=FEWEST_SECONDS / 4,
                before_turn=announce,
                until=is_over,
            )
    if signals and done < _FEWEST_ROUNDS:
        raise KeyboardInterrupt
    for one in candidates:
        one.samples = found[str(one)]
    return bool(signals)


def flaw(candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    """Why one of the candidates is not to be delivered; empty where it may be."""
    result, precision, cost = candidate.verification, candidate.precision, candidate.file.cost
    if result.not_run:
        return f"cannot be verified here: {result.not_run}"
    if result.status in ("FAILED", "not decided"):
        return f"{result.status}: {result.reason}"
    if result.accuracy_interval is not None and result.accuracy_interval[1] < 0:
        return f"accuracy {result.difference_text}"
    if precision == "bf16":
        return "only where asked for by name"
    halves = [one.file.cost for one in candidates if one.precision == "fp16" and one.file.cost]
    if precision == "int8" and cost and halves:
        least = min(halves, key=lambda one: (one.kernels, one.bytes_moved or 0))
        if cost.exceeds(least):
            return f"{cost} where fp16 has {least}"
    # FP32 and FP16 are held by their largest difference; INT8 by its agreement alone.
    needed, alone = THRESHOLDS[precision].min_images, {one.precision for one in candidates}
    if precision == "int8" and alone != {"int8"} and result.images < needed:
        return f"agreement not decided by {result.images} images, needs {needed}: give --val"
    return ""


def _simplicity(candidate: Candidate) -> tuple[int, bool, int, bool]:
    """Smaller is simpler: precision, then our default backend, fewer threads, our own graph."""
    backend, threads = candidate.runner
    precision = PRECISIONS.index(candidate.file.precision)
    return precision, backend != "onnx:cpu", threads or 0, candidate.file.graph != "deploy"


def choose(
    candidates: Sequence[Candidate], objective: str, notes: Sequence[str] = ()
) -> tuple[Candidate, dict[str, Any]]:
    """Choose the simplest of those that are as fast as the fastest within the noise.

    Where nothing here runs them, their builder's counts decide.

    Args:
        candidates: All of them.
        objective: ``latency`` or ``throughput``.
        notes: What else is to be said.

    Returns:
        The one to deliver, and for the report the reason, notes and a row for each candidate.

    Raises:
        ExportError: None may be delivered.
    """
    flaws = {one: flaw(one, candidates) for one in candidates}
    timed = any(one.samples for one in candidates)
    sound = [one for one in candidates if not flaws[one] and (one.samples or not timed)]
    if not sound:
        found = "; ".join(dict.fromkeys(f"{one.precision}: {flaws[one]}" for one in candidates))
        expected = "a candidate that computes what the network does"
        raise ExportError("--tune", expected, found, "leave --tune out to see each file's checks")
    fastest = min(sound, key=lambda one: one.cost(objective))
    alike = [one for one in sound if one.times(fastest).get("low", math.inf) <= 1 + _NOISE]
    best = min(alike or [fastest], key=_simplicity)
    reason = f"{best}: {best.speed()}"
    if best is fastest:
        reason += ", the fastest that is right" if timed else ", the least that is right"
    else:
        times = _times(best.times(fastest))
        reason += f"; {fastest} is no faster beyond the noise ({times}), and this is simpler"
    rows = sorted(candidates, key=lambda one: (not one.samples, one.cost(objective)))
    machine = machine_of(best.runner.backend) or "one without a name"
    return best, {
        **{"objective": objective, "batch": BATCHES[objective], "reason": reason},
        "machine": machine if timed else "none, by the builder's log",
        "candidates": [_row(one, best, flaws[one]) for one in rows],
        "notes": [*_warnings(best, rows), *notes],
    }


def _times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _row(candidate: Candidate, best: Candidate, flaw: str) -> dict[str, Any]:
    """A candidate in the report; ``times`` is its time by the chosen one's."""
    own, result, cost = candidate.samples, candidate.verification, candidate.file.cost
    ratio = candidate.times(best)
    return {
        **{"precision": candidate.precision, "graph": candidate.file.graph},
        **candidate.runner._asdict(),
        "p50_ms": own.p50_ms if own else None,
        "p50_interval_ms": list(own.p50_interval_ms) if own else None,
        "times": ratio.get("value"),
        "times_interval": [ratio["low"], ratio["high"]] if ratio else None,
        "kernels": cost.kernels if cost else None,
        "bytes_moved": cost.bytes_moved if cost else None,
        **{"agreement": result.agreement, "accuracy": result.accuracy},
        "verdict": "chosen" if candidate is best else flaw or "right",
    }


def _warnings(best: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """What a reader must know beside the reason."""
    notes = []
    for one in candidates:
        times = one.times(best)
        if one.precision == "bf16" and times and times["high"] < 1:
            agreement = one.verification.agreement_text
            text = f"{one} takes {_times(times)} of the chosen one's time, agreement {agreement}"
            notes.append(f"{text}: load(FILE, backend={one.runner.backend!r}) asks for it")
    timed = [one.samples for one in candidates if one.samples]
    if noisy := sum(samples.noisy for samples in timed):
        notes.append(f"{noisy} of {len(timed)} are noisy: tune again when the machine is idle")
    if not timed:
        notes.append("nothing here runs these engines: the choice is an estimate by their logs")
    return notes
