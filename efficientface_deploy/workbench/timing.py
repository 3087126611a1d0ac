"""How long calls take, measured so that contenders can be compared: numpy and stdlib alone.

All contenders take turns in rounds of random order, so that a machine which gets slower or busier
meanwhile does so for all alike. What is kept is every single duration, by round: percentiles
describe a contender, and the rounds say how far a comparison can be trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

Call = Callable[[], None]
Clock = Callable[[], int]

MAX_CALLS_PER_ROUND = 10_000
SETTLE_CALLS = 2

BUSY_SPREAD = 1.25
BUSY_DRIFT = 1.25


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """How long each call of one contender took.

    Attributes:
        durations_ns: int64 (R, K), nanoseconds: K calls in each of R rounds, in order of time.
    """

    durations_ns: npt.NDArray[np.int64]

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
    def busy(self) -> bool:
        """Whether the calls vary so much that something else must have used the machine."""
        return self.spread > BUSY_SPREAD or self.drift > BUSY_DRIFT


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How many times faster one contender is than another.

    Attributes:
        value: Median of the baseline by the contender's median; above 1 is faster.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    value: float
    low: float
    high: float


def measure(
    contenders: Mapping[str, Call],
    *,
    seconds: float = 3.0,
    rounds: int = 10,
    warm_up: float = 0.2,
    seed: int = 0,
    before_turn: Callable[[str], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Samples]:
    """Time calls in interleaved rounds.

    After a warm-up each contender makes the same number of calls in every round, as many as fit
    its share of ``seconds``, but at least one. A turn starts with untimed calls: they bring back
    what the one before pushed out of the caches, and give its threads, which spin for a while, the
    time to fall asleep. Python's garbage collector is off while the clock runs, as in ``timeit``.

    Args:
        contenders: Name -> what to time; several inputs in turn are the callable's own affair.
        seconds: Time for each contender, all rounds together, without warm-up.
        rounds: How often everybody takes a turn; their order is drawn anew each time.
        warm_up: Seconds of untimed calls for each contender at the start.
        seed: Of the order.
        before_turn: Called with the name before a contender's warm-up and each of its turns,
            untimed: the place for what is global to a process, and for showing progress.
        clock: Nanoseconds from any point on.

    Returns:
        Name -> samples, in the order of ``contenders``.
    """
    if not contenders or rounds < 1:
        raise ValueError(f"expected contenders and rounds, found {len(contenders)} and {rounds}")
    announce = before_turn or _nothing
    durations: dict[str, npt.NDArray[np.int64]] = {}
    for name, call in contenders.items():
        announce(name)
        call_ns = _warm_up(call, warm_up, clock)
        calls = _calls_per_round(seconds * 1e9 / rounds, call_ns)
        durations[name] = np.zeros((rounds, calls), dtype=np.int64)

    names = list(contenders)
    order = np.random.default_rng(seed)
    for row in range(rounds):
        for index in order.permutation(len(names)):
            name = names[index]
            announce(name)
            _take_turn(contenders[name], durations[name][row], clock)
    return {name: Samples(values) for name, values in durations.items()}


def speedup(baseline: Samples, other: Samples, *, resamples: int = 1000, seed: int = 0) -> Speedup:
    """Ratio of medians with a 95 % percentile bootstrap interval.

    Whole rounds are drawn, the same ones for both: calls of one round resemble each other, and the
    two contenders' calls were neighbours in time.

    Args:
        baseline: Samples (R, K1).
        other: Samples (R, K2) of the same :func:`measure` call.
        resamples: Number of bootstrap draws.
        seed: Of the draws.
    """
    slow, fast = baseline.durations_ns, other.durations_ns
    rounds = len(slow)
    if rounds != len(fast):
        raise ValueError(f"expected the same rounds, found {rounds} and {len(fast)}")
    draws = np.random.default_rng(seed).integers(rounds, size=(resamples, rounds))
    ratios = [np.median(slow[rows]) / np.median(fast[rows]) for rows in draws]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Speedup(float(np.median(slow) / np.median(fast)), float(low), float(high))


def _nothing(name: str) -> None:
    pass


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
