from __future__ import annotations

import pytest

from efficientface_deploy.workbench import progress
from efficientface_deploy.workbench.progress import Rate, duration, track


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


def test_a_rate_is_told_now_and_then_with_the_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    rate = Rate("pictures", 9000, done=1000)
    for seconds, done in [(10, 1500), (31, 4100), (40, 5000), (80, 9000)]:
        clock[0] = 100.0 + seconds
        rate.tell(done)
    assert capsys.readouterr().err.splitlines() == [
        "4,100 of 9,000 pictures, 100 a second, 49 s left",
        "9,000 of 9,000 pictures, 100 a second",
    ]
