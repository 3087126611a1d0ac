"""Interpreters are found by trying them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.measure.environments import find_python
from efficientface_deploy.errors import BackendError

HERE = f"3.{sys.version_info.minor}"


def test_interpreters_are_found_by_trying_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / f"versions/{HERE}.0/bin/python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    good = tmp_path / f"versions/{HERE}.1/bin/python"
    good.parent.mkdir(parents=True)
    good.symlink_to(sys.executable)
    assert find_python(HERE) == good
    with pytest.raises(BackendError, match=r"Python 3\.99: expected one on the path or under"):
        find_python("3.99")
