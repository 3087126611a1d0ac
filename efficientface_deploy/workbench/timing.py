"""How long calls take, measured so that candidates can be compared: numpy and stdlib alone.

All candidates take turns in rounds of random order, so that a machine which gets slower or busier
meanwhile does so for all alike. What is kept is every single duration, by round: percentiles
describe a candidate, and the rounds say how far a comparison can be trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Call = Callable[[], None]
Clock = Callable[[], int]
Input = TypeVar("Input")

MAX_CALLS_PER_ROUND = 10_000
SETTLE_CALLS = 2

NOISY_INTERVAL = 0.1  # of the median
NOISY_OTHERS = 0.2  # CPUs

_FIGURES = ("min", "p50", "p90", "p95", "p99")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """How long each call of one candidate took.

    Attributes:
        durations_ns: int64 (R, K), nanoseconds: K calls in each of R rounds, in order of time.
        cpus: CPU time of the process by time, over all turns; a library that starts more threads
            than it was told to is so found out. None where it was not measured.
        other_cpus: CPU time of everything else on the machine by time, what its host took from a
            virtual machine included. None where the system does not say.
    """

    durations_ns: npt.NDArray[np.int64]
    cpus: float | None = None
    other_cpus: float | None = None

    @property
    def count(self) -> int:
        """Number of calls, R x K."""
        return self.durations_ns.size

    def percentile_ms(self, percent: float) -> float:
        """Milliseconds within which this share of the calls ended, linearly interpolated."""
        return float(np.percentile(self.durations_ns, percent)) / 1e6

    @property
    def p50_ms(self) -> float:
        """Median, milliseconds."""
        return self.percentile_ms(50)

    @property
    def p90_ms(self) -> float:
        """90th percentile, milliseconds."""
        return self.percentile_ms(90)

    @property
    def p95_ms(self) -> float:
        """95th percentile, milliseconds."""
        return self.percentile_ms(95)

    @property
    def p99_ms(self) -> float:
        """99th percentile, milliseconds; near the maximum where there are under 100 calls."""
        return self.percentile_ms(99)

    @property
    def min_ms(self) -> float:
        """Shortest call, milliseconds."""
        return self.percentile_ms(0)

    @property
    def calls_per_second(self) -> float:
        """Calls by the time that they took together: throughput of one caller, slow calls too."""
        return self.count / (float(self.durations_ns.sum()) / 1e9)

    @property
    def round_medians_ms(self) -> npt.NDArray[np.float64]:
        """Median of each round, float64 (R,), milliseconds."""
        return np.asarray(np.median(self.durations_ns, axis=1) / 1e6)

    @functools.cached_property
    def p50_interval_ms(self) -> tuple[float, float]:
        """95 % percentile bootstrap interval of the median over whole rounds, milliseconds."""
        draws = _draw_rounds(len(self.durations_ns))
        medians = [np.median(self.durations_ns[rows]) for rows in draws]
        low, high = np.percentile(medians, (2.5, 97.5)) / 1e6
        return float(low), float(high)

    @property
    def spread(self) -> float:
        """p90 / p50; near 1 on a quiet machine."""
        return self.p90_ms / self.p50_ms

    @property
    def drift(self) -> float:
        """Slowest round's median by the fastest's; near 1 on a quiet machine."""
        medians = self.round_medians_ms
        return float(medians.max() / medians.min())

    @property
    def noisy(self) -> bool:
        """Whether something else used the machine, or the rounds leave the median uncertain.

        Single slow calls or rounds, which ten rounds on an idle machine often have, do not count:
        the median is the same without them.
        """
        low, high = self.p50_interval_ms
        uncertain = high - low > NOISY_INTERVAL * self.p50_ms
        return uncertain or (self.other_cpus or 0.0) > NOISY_OTHERS

    def figures(self) -> dict[str, Any]:
        """What a row of a result says of its calls."""
        return {
            "calls": self.count,
            **{f"{name}_ms": getattr(self, f"{name}_ms") for name in _FIGURES},
            "round_medians_ms": self.round_medians_ms.tolist(),
            "spread": self.spread,
            "drift": self.drift,
            "p50_interval_ms": list(self.p50_interval_ms),
            "other_cpus": self.other_cpus,
            "busy": self.noisy,
        }


def in_turn(function: Callable[[Input], object], inputs: Sequence[Input]) -> Call:
    """A call with the next of several inputs, as a camera would give them."""
    endless = itertools.cycle(inputs)

    def call() -> None:
        function(next(endless))

    return call


def machine_cpu_ns() -> int | None:
    """CPU time that this machine has spent, nanoseconds: all but idle; None where not known."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):  # not Linux
        return None
    idle, io_wait = fields[3:5]
    return (sum(fields) - idle - io_wait) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def measure(
    candidates: Mapping[str, Call],
    *,
    seconds: float = 3.0,
    rounds: int = 10,
    warm_up: float = 0.2,
    seed: int = 0,
    before_turn: Callable[[str], object] | None = None,
    until: Callable[[], bool] | None = None,
    clock: Clock = time.perf_counter_ns,
    cpu_clock: Clock = time.process_time_ns,
    machine_clock: Callable[[], int | None] = machine_cpu_ns,
) -> dict[str, Samples]:
    """Time calls in interleaved rounds.

    After a warm-up each candidate makes the same number of calls in every round, as many as fit
    its share of ``seconds``, but at least one. A turn starts with untimed calls: they bring back
    what the one before pushed out of the caches, and give its threads, which spin for a while, the
    time to fall asleep. Python's garbage collector is off while the clock runs, as in ``timeit``.

    Args:
        candidates: Name -> what to time; several inputs in turn are the callable's own affair.
        seconds: Time for each candidate, all rounds together, without warm-up.
        rounds: How often everybody takes a turn; their order is drawn anew each time.
        warm_up: Seconds of untimed calls for each candidate at the start.
        seed: Of the order.
        before_turn: Called with the name before a candidate's warm-up and each of its turns,
            untimed: the place for what is global to a process, and for showing progress.
        until: Asked after each round whether that was the last one; ``rounds`` are the most.
        clock: Nanoseconds from any point on.
        cpu_clock: CPU nanoseconds of the process.
        machine_clock: CPU nanoseconds of the machine, this process among them, or None.

    Returns:
        Name -> samples, in the order of ``candidates``.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"expected candidates and rounds, found {len(candidates)} and {rounds}")
    announce = before_turn or (lambda name: None)
    durations: dict[str, npt.NDArray[np.int64]] = {}
    for name, call in candidates.items():
        announce(name)
        call_ns = _warm_up(call, warm_up, clock)
        calls = _calls_per_round(seconds * 1e9 / rounds, call_ns)
        durations[name] = np.zeros((rounds, calls), dtype=np.int64)

    def clocks() -> tuple[int, int, int]:
        return clock(), cpu_clock(), machine_clock() or 0

    spent = {name: np.zeros(3, dtype=np.int64) for name in candidates}
    for turn, (row, name) in enumerate(interleave(candidates, rounds, seed), start=1):
        announce(name)
        before = clocks()
        _take_turn(candidates[name], durations[name][row], clock)
        spent[name] += np.subtract(clocks(), before)
        if turn % len(candidates) == 0 and until is not None and until():
            break
    knows_machine = machine_clock() is not None
    samples = {}
    for name, values in durations.items():
        elapsed, own, machine = spent[name].tolist()
        others = max(machine - own, 0) / max(elapsed, 1) if knows_machine else None
        samples[name] = Samples(values[: row + 1], own / max(elapsed, 1), others)
    return samples


def interleave(names: Iterable[str], rounds: int, seed: int) -> Iterator[tuple[int, str]]:
    """Every name once in each round, the order drawn anew: (round, name)."""
    order, names = np.random.default_rng(seed), list(names)
    for row in range(rounds):
        for index in order.permutation(len(names)):
            yield row, names[index]


def speedup(
    baseline: Samples, other: Samples, *, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """How many times faster ``other`` is, with a 95 % percentile bootstrap interval.

    Whole rounds are drawn, the same ones for both: calls of one round resemble each other, and the
    two candidates' calls were neighbours in time.

    Args:
        baseline: Samples (R, K1).
        other: Samples (R, K2) of the same :func:`measure` call.
        resamples: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        ``value``, the baseline's median by the other's, above 1 where that is faster; the
        interval's ends, ``low`` and ``high``.
    """
    slow, fast = baseline.durations_ns, other.durations_ns
    rounds = len(slow)
    if rounds != len(fast):
        raise ValueError(f"expected the same rounds, found {rounds} and {len(fast)}")
    draws = _draw_rounds(rounds, resamples, seed)
    ratios = [np.median(slow[rows]) / np.median(fast[rows]) for rows in draws]
    low, high = np.percentile(ratios, (2.5, 97.5))
    value = np.median(slow) / np.median(fast)
    return {"value": float(value), "low": float(low), "high": float(high)}


def _draw_rounds(rounds: int, resamples: int = 1000, seed: int = 0) -> npt.NDArray[np.int64]:
    """Indices of rounds for a bootstrap, (resamples, rounds)."""
    return np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))


def _warm_up(call: Call, seconds: float, clock: Clock) -> float:
    """Call until the time is up, twice at least; gives the last call's nanoseconds."""
    end = clock() + int(seconds * 1e9)
    call()
    while True:
        start = clock()
        call()
        now = clock()
        if now >= end:
            return now - start


def _calls_per_round(budget_ns: float, call_ns: float) -> int:
    fitting = int(budget_ns / max(call_ns, 1))
    return min(max(fitting, 1), MAX_CALLS_PER_ROUND)


def _take_turn(call: Call, durations_ns: npt.NDArray[np.int64], clock: Clock) -> None:
    """Fill one row of durations, int64 (K,)."""
    for _ in range(SETTLE_CALLS):
        call()
    with _no_garbage_collection():
        for index in range(len(durations_ns)):
            start = clock()
            call()
            durations_ns[index] = clock() - start


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
