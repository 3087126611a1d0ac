from __future__ import annotations

import gc

import numpy as np
import pytest

from efficientface_deploy.workbench.timing import (
    MAX_CALLS_PER_ROUND,
    SETTLE_CALLS,
    Samples,
    measure,
    speedup,
)

MS = 1_000_000


class FakeMachine:
    """Time passes only in calls, and each call is written down."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def clock(self) -> int:
        return self.now

    def candidate(self, name: str, *milliseconds: float) -> object:
        """A call that takes the given times in turn."""
        count = 0

        def call() -> None:
            nonlocal count
            self.now += int(milliseconds[count % len(milliseconds)] * MS)
            self.log.append(name)
            count += 1

        return call


def turns(log: list[str]) -> list[str]:
    """Neighbouring entries of one name, counted once."""
    return [name for index, name in enumerate(log) if index == 0 or log[index - 1] != name]


def test_durations_are_those_of_the_clock_by_round() -> None:
    machine = FakeMachine()
    samples = measure(
        {"fast": machine.candidate("fast", 10), "slow": machine.candidate("slow", 50)},
        seconds=0.4,
        rounds=4,
        warm_up=0,
        clock=machine.clock,
    )
    assert list(samples) == ["fast", "slow"]
    # 100 ms a round: ten calls of 10 ms, two of 50 ms.
    np.testing.assert_array_equal(samples["fast"].durations_ns, np.full((4, 10), 10 * MS))
    np.testing.assert_array_equal(samples["slow"].durations_ns, np.full((4, 2), 50 * MS))


def test_cpus_are_those_of_the_turns_alone() -> None:
    machine = FakeMachine()
    cpu = 0.0

    def greedy() -> None:
        nonlocal cpu
        machine.now += 10 * MS
        cpu += 18 * MS

    def pause(name: str) -> None:  # what still spins then is nobody's
        nonlocal cpu
        machine.now += 50 * MS
        cpu += 100 * MS

    samples = measure(
        {"greedy": greedy, "modest": machine.candidate("modest", 10)},
        seconds=0.1,
        rounds=3,
        warm_up=0,
        before_turn=pause,
        clock=machine.clock,
        cpu_clock=lambda: int(cpu),
    )
    assert samples["greedy"].cpus == pytest.approx(1.8) and samples["modest"].cpus == 0
    assert samples["greedy"].figures()["calls"] == samples["greedy"].count


def test_everybody_takes_one_turn_a_round_in_changing_order() -> None:
    machine = FakeMachine()
    names = ["a", "b", "c", "d"]
    announced: list[str] = []
    measure(
        {name: machine.candidate(name, 10) for name in names},
        seconds=0.05,
        rounds=5,
        warm_up=0,
        seed=3,
        before_turn=announced.append,
        clock=machine.clock,
    )
    warm_up, rounds = announced[:4], [announced[at : at + 4] for at in range(4, 24, 4)]
    assert warm_up == names
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert turns(machine.log) == turns(announced)


def test_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[str]:
        machine = FakeMachine()
        candidates = {name: machine.candidate(name, 10) for name in "abcdef"}
        measure(candidates, seconds=0.1, rounds=3, warm_up=0, seed=seed, clock=machine.clock)
        return machine.log

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_slow_call_is_timed_once_a_round_after_untimed_ones() -> None:
    machine = FakeMachine()
    call = machine.candidate("x", 5000)
    samples = measure({"x": call}, seconds=1, rounds=2, warm_up=0, clock=machine.clock)
    assert samples["x"].durations_ns.shape == (2, 1)
    assert len(machine.log) == 2 + 2 * (SETTLE_CALLS + 1)


def test_warm_up_lasts_as_long_as_asked() -> None:
    machine = FakeMachine()
    call = machine.candidate("x", 10)
    measure({"x": call}, seconds=0.01, rounds=1, warm_up=0.5, clock=machine.clock)
    assert len(machine.log) == 50 + SETTLE_CALLS + 1


def test_a_call_without_duration_does_not_run_for_ever() -> None:
    machine = FakeMachine()
    samples = measure(
        {"x": machine.candidate("x", 0)}, seconds=1, rounds=1, warm_up=0, clock=machine.clock
    )
    assert samples["x"].count == MAX_CALLS_PER_ROUND


def test_garbage_collection_is_off_only_while_timing() -> None:
    seen: list[bool] = []

    def call() -> None:
        seen.append(gc.isenabled())
        if len(seen) == 2 + SETTLE_CALLS + 1:
            raise RuntimeError("a candidate failed")

    with pytest.raises(RuntimeError, match="a candidate failed"):
        measure({"x": call}, seconds=1e-9, rounds=2, warm_up=0)
    assert seen[-1] is False
    assert all(seen[:-1])
    assert gc.isenabled()


def test_the_real_clock_gives_positive_durations() -> None:
    samples = measure({"x": lambda: None}, seconds=0.001, rounds=2, warm_up=0)
    assert (samples["x"].durations_ns >= 0).all()


def test_percentiles_throughput_and_minimum() -> None:
    samples = Samples((np.arange(1, 101) * MS).reshape(4, 25))
    assert samples.count == 100
    assert samples.p50_ms == pytest.approx(50.5)
    assert samples.p90_ms == pytest.approx(90.1)
    assert samples.p95_ms == pytest.approx(95.05)
    assert samples.p99_ms == pytest.approx(99.01)
    assert samples.min_ms == 1.0
    assert samples.calls_per_second == pytest.approx(100 / 5.05)
    np.testing.assert_allclose(samples.round_medians_ms, [13, 38, 63, 88])
    assert samples.spread == pytest.approx(90.1 / 50.5)
    assert samples.drift == pytest.approx(88 / 13)


@pytest.mark.parametrize(
    ("durations", "noisy"),
    [
        ([[10, 10, 10, 10], [10, 10, 11, 10]], False),
        ([[10, 10, 10, 30], [10, 10, 10, 30]], True),  # wide within every round
        ([[10, 10, 10, 10], [14, 14, 14, 14]], True),  # from round to round
    ],
)
def test_a_busy_machine_is_noticed(durations: list[list[int]], noisy: bool) -> None:
    assert Samples(np.array(durations, dtype=np.int64)).noisy is noisy


def test_speedup_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    slow = Samples((200 + rng.normal(0, 5, size=(10, 50))).astype(np.int64))
    fast = Samples((100 + rng.normal(0, 5, size=(10, 80))).astype(np.int64))
    result = speedup(slow, fast)
    assert result["low"] < 2.0 < result["high"]
    assert result["low"] <= result["value"] <= result["high"]
    assert result["high"] - result["low"] < 0.1
    assert speedup(slow, fast) == result


def test_drift_that_hits_both_alike_does_not_widen_the_interval() -> None:
    drift = np.linspace(1, 3, 10)[:, None]
    slow = Samples((2000 * drift * np.ones((10, 20))).astype(np.int64))
    fast = Samples((1000 * drift * np.ones((10, 20))).astype(np.int64))
    result = speedup(slow, fast)
    assert (result["low"], result["value"], result["high"]) == pytest.approx((2, 2, 2), abs=0.01)


def test_speedup_of_itself_is_one() -> None:
    samples = Samples(np.random.default_rng(0).integers(90, 110, size=(5, 9)))
    assert speedup(samples, samples)["value"] == 1.0


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="candidates"):
        measure({})
    with pytest.raises(ValueError, match="same rounds"):
        speedup(Samples(np.ones((2, 1), np.int64)), Samples(np.ones((3, 1), np.int64)))
