from __future__ import annotations

import io
import sys

import pytest

from efficientface_export.tensorrt.builder import build_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(RuntimeError), build_progress("model.engine") as progress:
        assert progress is not None
        progress("Timing tactics", 0.25)
        progress("Building engine", 1.0)
        raise RuntimeError
    assert terminal.getvalue() == (
        "\r\x1b[Kmodel.engine: 25%, timing tactics\r\x1b[Kmodel.engine: 100%, building engine"
        "\r\x1b[K"
    )


def test_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with build_progress("model.engine") as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


def test_terminal_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with build_progress("model.engine") as progress:
        assert progress is not None
        terminal.close()
        progress("Timing tactics", 0.25)
