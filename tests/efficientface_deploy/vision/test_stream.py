from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.vision import stream
from efficientface_deploy.vision.stream import check_policy, overlap

ROOT = Path(__file__).resolve().parents[3]
WAIT = 10  # seconds after which a test has failed; nothing here takes long

pytestmark = pytest.mark.timeout(60)


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "efficientface-" in thread.name]


def wait_until(true) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    assert not ours()
    yield
    assert not ours()


def same(item):
    return item


@pytest.mark.parametrize("queue_size", [1, 3, 100])
def test_every_item_in_order_with_its_index_and_time(queue_size):
    begin = time.monotonic()
    got = list(overlap("abcdefghij" * 5, str.upper, "every", queue_size))
    assert "".join(arrival.item for arrival in got) == "ABCDEFGHIJ" * 5
    assert [arrival.index for arrival in got] == list(range(50))
    times = [begin, *(arrival.time for arrival in got), time.monotonic()]
    assert times == sorted(times)


@pytest.mark.parametrize("policy", stream.POLICIES)
def test_nothing_gives_nothing(policy):
    assert list(overlap([], same, policy, 1)) == []


def test_the_next_is_prepared_while_the_caller_works():
    prepared = [threading.Event() for _ in range(3)]
    for arrival in overlap([0, 1, 2], lambda at: (prepared[at].set(), at)[1], "every", 1):
        if arrival.item < 2:  # still at work on this one
            assert prepared[arrival.item + 1].wait(WAIT)


def test_the_next_is_read_while_one_is_prepared():
    read = [threading.Event() for _ in range(3)]

    def source():
        for at in range(3):
            read[at].set()
            yield at

    def prepare(at):
        assert at == 2 or read[at + 1].wait(WAIT)
        return at

    assert [arrival.item for arrival in overlap(source(), prepare, "every", 1)] == [0, 1, 2]


@pytest.mark.parametrize("queue_size", [1, 5])
def test_a_slow_caller_bounds_what_is_read_ahead(queue_size):
    read = []

    def endless():
        while True:
            read.append(None)
            yield len(read)

    results = overlap(endless(), same, "every", queue_size)
    assert next(results).item == 1
    # Two full queues, and one item in the hands of the caller and of each thread.
    bound = 2 * queue_size + 3
    wait_until(lambda: len(read) == bound)
    time.sleep(0.05)
    assert len(read) == bound
    results.close()


def test_newest_drops_what_is_older():
    first_is_worked_on, all_read = threading.Event(), threading.Event()

    def camera():
        yield 0
        assert first_is_worked_on.wait(WAIT)
        yield from range(1, 10)
        all_read.set()

    def prepare(at):
        if at == 0:
            first_is_worked_on.set()
            assert all_read.wait(WAIT)
        return at

    got = [arrival.index for arrival in overlap(camera(), prepare, "newest", 4)]
    assert got in ([0, 9], [9])  # 9 also replaces 0 where the caller has not taken it yet


def test_newest_gives_everything_to_a_caller_who_keeps_up():
    taken = threading.Semaphore(1)

    def source():
        for at in range(20):
            assert taken.acquire(timeout=WAIT)
            yield at

    got = []
    for arrival in overlap(source(), same, "newest", 4):
        got.append(arrival.item)
        taken.release()
    assert got == list(range(20))


@pytest.mark.parametrize("place", ["source", "prepare"])
def test_an_error_comes_after_what_came_before_it(place):
    def source():
        yield from range(5)
        if place == "source":
            raise OSError("unplugged")
        yield 5

    def prepare(at):
        if at == 5:
            raise OSError("unplugged")
        return at

    results = overlap(source(), prepare, "every", 2)
    got = []
    with pytest.raises(OSError, match="unplugged"):
        for arrival in results:
            got.append(arrival.item)
    assert got == list(range(5))


def endless():
    at = 0
    while True:
        yield at
        at += 1


@pytest.mark.parametrize("policy", stream.POLICIES)
def test_break(policy):
    for arrival in overlap(endless(), same, policy, 3):
        if arrival.index > 5:
            break


def test_exception_in_the_loop():
    with pytest.raises(ZeroDivisionError):
        for arrival in overlap(endless(), same, "every", 3):
            assert arrival.item / 0


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_close(taken):
    results = overlap(endless(), same, "every", 3)
    for _ in range(taken):
        next(results)
    results.close()
    assert not ours()
    results.close()
    with pytest.raises(StopIteration):
        next(results)


def test_forgotten_stream_ends_its_threads():
    results = overlap(endless(), same, "every", 3)
    next(results)
    assert len(ours()) == 2
    del results
    gc.collect()


def test_source_that_hangs_does_not_hang_close(monkeypatch, caplog):
    monkeypatch.setattr(stream, "JOIN_SECONDS", 0.05)
    plugged_in = threading.Event()

    def camera():
        yield 0
        assert plugged_in.wait(WAIT)
        yield 1

    results = overlap(camera(), same, "newest", 1)
    assert next(results).item == 0
    results.close()
    assert "efficientface-read is still waiting" in caplog.text
    plugged_in.set()
    wait_until(lambda: not ours())


def test_source_that_cannot_be_iterated():
    with pytest.raises(TypeError):
        next(overlap(7, same, "every", 1))


ENDLESS = """
import sys, threading, time
from efficientface_deploy.vision.stream import overlap

def source():
    while True:
        time.sleep(0.01)
        yield 0

try:
    for _ in overlap(source(), lambda item: item, sys.argv[1], 2):
        print("running", flush=True)
except KeyboardInterrupt:
    print("left:", threading.active_count() - 1, flush=True)
"""


@pytest.mark.parametrize("policy", stream.POLICIES)
def test_ctrl_c(policy):
    command = [sys.executable, "-c", ENDLESS, policy]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert rest.splitlines()[-1] == "left: 0"


@pytest.mark.parametrize(
    ("policy", "queue_size", "message"),
    [
        ("oldest", 1, r"every or newest.*found 'oldest'"),
        ("every", 0, r"queue_size: expected at least 1, found 0"),
    ],
)
def test_unknown_policy(policy, queue_size, message):
    with pytest.raises(ConfigError, match=message):
        check_policy(policy, queue_size)
