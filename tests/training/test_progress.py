from __future__ import annotations

import pytest

from training import progress
from training.progress import TrainingProgress, duration, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test winds."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_log_gets_a_plain_line_now_and_then(clock, capsys):
    with TrainingProgress(epoch=1, epochs=4, steps=100, batch_size=8) as shown:
        for step in range(1, 101):
            clock.now += 1
            shown.update(step, loss=2 / step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # after 30, 60 and 90 seconds
    assert lines[0] == "epoch 2/4, step 30/100: loss 0.0667, 8 images/s, 4 min left"
    assert lines[2].endswith("step 90/100: loss 0.0222, 8 images/s, 4 min left")  # 210 s


def test_terminal_gets_one_live_line(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with TrainingProgress(epoch=0, epochs=1, steps=50, batch_size=8) as shown:
        clock.now += 2
        shown.update(10, loss=1.5)
        shown._bar.refresh()
    out = capsys.readouterr().out
    assert "epoch 1/1, step 10/50: loss 1.5000, 40 images/s, 8 s left" in out


def test_track_gives_everything_and_is_silent_in_a_log(capsys):
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (89, "89 s"),
        (91, "2 min"),
        (5399, "90 min"),
        (5401, "1.5 h"),
        (36000, "10.0 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
