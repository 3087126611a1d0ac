from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from efficientface_deploy.workbench.timing import (
    MAX_CALLS_PER_ROUND,
    SETTLE_CALLS,
    Samples,
    in_turn,
    machine_cpu_ns,
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


def measure_both(machine: FakeMachine, **options: Any) -> dict[str, Samples]:
    """Four rounds of a call of 10 ms and one of 50."""
    both = {"fast": machine.candidate("fast", 10), "slow": machine.candidate("slow", 50)}
    return measure(both, seconds=0.4, rounds=4, warm_up=0, clock=machine.clock, **options)


def test_durations_are_those_of_the_clock_by_round() -> None:
    samples = measure_both(FakeMachine())
    assert list(samples) == ["fast", "slow"]
    # 100 ms a round: ten calls of 10 ms, two of 50 ms.
    np.testing.assert_array_equal(samples["fast"].durations_ns, np.full((4, 10), 10 * MS))
    np.testing.assert_array_equal(samples["slow"].durations_ns, np.full((4, 2), 50 * MS))


def test_an_end_before_the_last_round() -> None:
    machine = FakeMachine()
    samples = measure_both(
        machine,
        until=lambda: machine.now > 800 * MS,  # a round takes 320 ms, the warm-up 120
    )
    assert [len(own.durations_ns) for own in samples.values()] == [3, 3]
    assert all((own.durations_ns > 0).all() for own in samples.values())


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
    ("round_ms", "other_cpus", "noisy"),
    [
        ([10] * 10, None, False),
        ([10] * 9 + [30], None, False),  # one slow round changes no median
        ([10, 10, 11, 10, 10, 10, 10, 9, 10, 10], 0.1, False),
        ([10, 14, 10, 14, 10, 14, 10, 14, 10, 14], None, True),
        (np.arange(10, 20), 0.0, True),  # slower and slower
        ([10] * 10, 0.5, True),  # slowed alike, by what else runs
    ],
)
def test_a_noisy_machine_is_noticed(round_ms, other_cpus, noisy) -> None:
    durations = np.repeat(np.array(round_ms)[:, None] * MS, 20, axis=1)
    samples = Samples(durations, other_cpus=other_cpus)
    assert samples.noisy is noisy
    low, high = samples.p50_interval_ms
    assert low <= samples.p50_ms <= high


def test_slow_calls_within_a_round_change_no_median() -> None:
    durations = np.full((10, 20), 10 * MS)
    durations[:, ::5] = 40 * MS
    samples = Samples(durations)
    assert samples.spread == 4 and not samples.noisy


def test_what_others_use_is_the_machines_time_without_ours() -> None:
    fake, used = FakeMachine(), {"own": 0, "machine": 0}

    def call() -> None:
        fake.now += 10 * MS
        used["own"] += 15 * MS
        used["machine"] += 19 * MS

    def measured(machine_clock) -> Samples:
        options = {"clock": fake.clock, "cpu_clock": lambda: used["own"]}
        quick = {"seconds": 0.1, "rounds": 3, "warm_up": 0}
        return measure({"x": call}, **quick, **options, machine_clock=machine_clock)["x"]

    samples = measured(lambda: used["machine"])
    assert samples.other_cpus == pytest.approx(0.4) and samples.noisy
    assert samples.figures()["other_cpus"] == samples.other_cpus
    unknown = measured(lambda: None)
    assert unknown.other_cpus is None and not unknown.noisy


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/stat")
def test_the_machines_clock_counts_what_another_process_uses() -> None:
    before = machine_cpu_ns()
    program = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    after = machine_cpu_ns()
    assert before is not None and after is not None
    assert after - before > 0.28e9


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


def test_a_call_takes_the_next_input() -> None:
    seen: list[int] = []
    call = in_turn(seen.append, [1, 2, 3])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]
