from __future__ import annotations

import pytest

from efficientface_deploy.workbench.progress import duration, track


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
