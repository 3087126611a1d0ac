"""Use for hours, by several threads, closed at any moment: each row in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from row import Row

import efficientface_deploy as ef
from benchmarks.measure.processes import memory_kb
from efficientface_deploy.vision.yunet import FILE_VARIABLE

_HANG = 60.0  # seconds beyond its own time after which a row is given up
_THREADS = 8
_RATE = 15  # frames per second of the stream
_CLIP = 75  # frames of the video
_WITHIN_GROWTH = 5.0  # MB that memory must not surely grow by once it has settled
_WITHIN_MB = 600.0


def run(scale: float, seed: int, folder: Path) -> list[Row]:
    """Threads that agree, a stream of an hour, and ``close()`` at 400 moments, times ``scale``."""
    clip = _write_clip(folder / "clip.mp4")
    tasks = [
        (functools.partial(threads_agree, max(2, round(100 * scale)), seed), 7200 * scale),
        (functools.partial(stream_stays_flat, max(10.0, 3600 * scale), clip), 3600 * scale),
        (
            functools.partial(close_at_any_moment, max(8, round(400 * scale)), seed, clip),
            7200 * scale,
        ),
    ]
    with ThreadPoolExecutor(len(tasks)) as pool:  # each only waits for its process
        return list(pool.map(lambda task: _in_own_process(task[0], task[1] + _HANG), tasks))


def _in_own_process(task: functools.partial[Row], seconds: float) -> Row:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        return pool.submit(task).result(seconds)
    except Exception as error:  # noqa: BLE001 - a crash, a time-out, a wrong answer: all count
        for process in list(pool._processes.values()):
            process.kill()
        what = f"{task.func.__name__}{task.args}: {type(error).__name__} {error}"
        return Row("soak", task.func.__name__.replace("_", " "), 1, 0, 0, (what,))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---- threads


def threads_agree(rounds: int, seed: int) -> Row:
    """Every call of eight threads on one predictor and one detector gives what one thread got."""
    pictures = [_picture(seconds) for seconds in range(5)]
    failures: list[str] = []
    with ef.load() as predictor, contextlib.ExitStack():
        detector = _open_detector()
        cases: list[Callable[[], object]] = [lambda: predictor.predict_batch(pictures)]
        cases += [lambda: predictor.features(pictures).tolist()]
        for picture in pictures:
            cases.append(functools.partial(predictor, picture))
            cases.append(functools.partial(predictor.predict_faces, picture, detector))
            cases.append(functools.partial(detector.detect, picture))
        expected = [repr(case()) for case in cases]

        def work(number: int) -> None:
            chance = random.Random(f"{seed} {number}")
            for case in chance.choices(range(len(cases)), k=rounds * len(cases)):
                try:
                    found = repr(cases[case]())
                except Exception as error:  # noqa: BLE001 - counted as any other wrong answer
                    found = repr(error)
                if found != expected[case]:
                    failures.append(f"case {case}, thread {number}: {found[:200]}")

        # Without a limit of its own: 10,000 calls take as long as the machine needs.
        _run_threads([functools.partial(work, number) for number in range(_THREADS)], None)
    tried = _THREADS * rounds * len(cases)
    what = f"calls of {_THREADS} threads on one predictor and one detector"
    return Row("soak", what, tried, tried - len(failures), 0, tuple(failures))


# ---- hours


def stream_stays_flat(seconds: float, clip: Path) -> Row:
    """Label a video again and again, as fast as a camera is; memory stays as it is.

    No thread and no descriptor is left by any of the streams, and none is answered otherwise than
    the first.
    """
    # Written already, so that the samples of an hour take no memory that is counted.
    samples = np.full((round(seconds * _RATE) + 2 * _CLIP, 2), -1.0)
    failures: list[str] = []
    first: tuple[object, object] | None = None
    frames = streams = 0
    started = time.monotonic()
    with ef.load() as predictor:
        detector = _open_detector()
        while time.monotonic() - started < seconds:
            with (
                ef.open_video(clip) as video,
                contextlib.closing(predictor.predict_stream(video, detector=detector)) as stream,
            ):
                said = []
                for number, result in enumerate(stream):
                    said.append(repr(result.faces))
                    samples[frames] = time.monotonic() - started, _resident_mb()
                    frames += 1
                    time.sleep(1 / _RATE)
                    if streams % 4 == 3 and number == _CLIP // 2:
                        break  # a stream that is left in the middle
            streams += 1
            first = first or (said[:30], _left())
            if not _becomes(first, lambda said=said: (said[:30], _left())):
                failures.append(
                    f"after {frames} frames {_left()} or other labels, at first {first[1]}"
                )
    # What is allocated once, in the first minute of a long stream, is not growth.
    settled = samples[max(frames // 10, min(60 * _RATE, frames // 2)) : frames]
    growth, margin = growth_per_hour(*settled.T)
    if (growth - margin) * settled[-1, 0] / 3600 > _WITHIN_GROWTH:
        failures.append(f"memory grows by {growth:.2f} +- {margin:.2f} MB an hour")
    what = (
        f"stream of {settled[-1, 0] / 60:.1f} min, memory {growth:+.2f} MB an hour "
        f"[{growth - margin:+.2f}, {growth + margin:+.2f}]"
    )
    peak = float(samples[:frames, 1].max())
    failed = tuple(failures[:10])
    return Row("soak", what, frames, frames, 0, failed, peak_mb=peak, within_mb=_WITHIN_MB)


def growth_per_hour(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Slope of a line through values (N,) per hour, and half its 95 % interval.

    Neighbouring samples are alike: means of up to 40 blocks are taken for independent ones.
    """
    blocks = [part for part in np.array_split(np.arange(len(values)), 40) if len(part)]
    x = np.array([seconds[block].mean() / 3600 for block in blocks])
    y = np.array([values[block].mean() for block in blocks])
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    error = np.sqrt(rest @ rest / (len(x) - 2) / (x @ x))
    return slope, float(2.02 * error)  # Student's t for 38 degrees of freedom


# ---- close()


def close_at_any_moment(trials: int, seed: int, clip: Path) -> Row:
    """``close()`` while others use what is closed: their end, or one line that says so."""
    chance = random.Random(seed)
    right = refused = 0
    failures: list[str] = []
    slowest = 0.0
    kinds = (_close_predictor, _close_under_stream, _close_video, _close_stream)
    detector, _ = _open_detector(), _photo()
    for trial, kind in zip(range(trials), itertools.cycle(kinds), strict=False):
        since, errors = time.monotonic(), []
        with ef.load(check=False) as predictor:
            kind(predictor, detector, clip, chance.uniform(0, 0.15), errors)
        slowest = max(slowest, time.monotonic() - since)
        threads = [thread.name for thread in threading.enumerate()[1:]]
        unclear = [error for error in errors if not _says_closed(error)]
        if unclear or threads:
            failures.append(f"{kind.__name__}, seed {seed}, trial {trial}: {unclear} {threads}")
        elif errors:
            refused += 1
        else:
            right += 1
    what = "close() during calls, streams and videos"
    return Row("soak", what, trials, right, refused, tuple(failures), slowest, 20.0)


def _close_predictor(predictor, detector, clip, wait, errors) -> None:  # type: ignore[no-untyped-def]
    """By two threads, while four call it."""
    pictures, closed = [_picture(0.0), _picture(1.0)], threading.Event()

    def use() -> None:
        while not closed.is_set():
            predictor.predict_batch(pictures)
            predictor.predict_faces(pictures[0], detector)

    def close() -> None:
        time.sleep(wait)
        predictor.close()
        closed.set()

    _run_threads([functools.partial(_noting, use, errors)] * 4 + [close] * 2)


def _close_under_stream(predictor, detector, clip, wait, errors) -> None:  # type: ignore[no-untyped-def]
    def use() -> None:
        with ef.open_video(clip) as video:
            for _ in predictor.predict_stream(video, detector=detector):
                pass

    threads = [
        functools.partial(_noting, use, errors),
        lambda: (time.sleep(wait), predictor.close()),
    ]
    _run_threads(threads)


def _close_video(predictor, detector, clip, wait, errors) -> None:  # type: ignore[no-untyped-def]
    video = ef.open_video(clip)

    def use() -> None:
        for _ in predictor.predict_stream(video, detector=detector):
            pass

    _run_threads(
        [functools.partial(_noting, use, errors), lambda: (time.sleep(wait), video.close())]
    )


def _close_stream(predictor, detector, clip, wait, errors) -> None:  # type: ignore[no-untyped-def]
    def use() -> None:
        until = time.monotonic() + wait
        with contextlib.closing(predictor.predict_stream(_frames(), detector=detector)) as stream:
            while time.monotonic() < until:
                next(stream)

    _noting(use, errors)


def _noting(work: Callable[[], None], errors: list[BaseException]) -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - judged by who asked
        errors.append(error)


def _says_closed(error: BaseException) -> bool:
    return isinstance(error, ef.EfficientFaceError) and "closed" in str(error)


def _run_threads(works: list[Callable[[], object]], within: float | None = _HANG) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within)
        if thread.is_alive():
            raise TimeoutError("a thread hangs")


# ---- what is shown


def _open_detector() -> ef.FaceDetector:
    """YuNet where its weights are at hand, else what a package brings: nothing is fetched."""
    return ef.open_detector("yunet" if FILE_VARIABLE in os.environ else "centerface", threads=1)


@functools.lru_cache
def _photo() -> np.ndarray:
    from skimage.data import astronaut

    return np.asarray(astronaut())  # uint8 (512, 512, 3): Eileen Collins, NASA, public domain


def _picture(seconds: float) -> np.ndarray:
    """The photograph through a camera that sways; uint8 (240, 320, 3)."""
    left, top = (round(40 + 40 * np.sin(seconds * rate)) for rate in (1.0, 1.7))
    return np.ascontiguousarray(_photo()[top : top + 240, 60 + left : 380 + left])


def _frames() -> Iterator[np.ndarray]:
    for number in itertools.count():
        yield _picture(number / _RATE)


def _write_clip(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=_RATE, width=320, height=240)
        for number in range(_CLIP):
            frame = av.VideoFrame.from_ndarray(_picture(number / _RATE), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _resident_mb() -> float:
    held = memory_kb("VmRSS")
    assert held is not None, "needs Linux's /proc"
    return held * 1024 / 1e6


def _left() -> str:
    descriptors, tasks = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    return f"{descriptors} descriptors, {tasks} threads"


def _becomes(expected: object, now: Callable[[], object]) -> bool:
    """Whether it does within a second: the system takes a moment to end a thread."""
    until = time.monotonic() + 1
    while (found := now()) != expected and time.monotonic() < until:
        time.sleep(0.01)
    return found == expected
