"""Where something was made: versions, machine, commit, time."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import efficientface_deploy

ROOT = Path(__file__).resolve().parents[2]


def made_by() -> dict[str, Any]:
    """The code and the libraries that run a training."""
    import torch

    return {
        "git_commit": git_commit(),
        "versions": {
            "efficientface_deploy": efficientface_deploy.__version__,
            "torch": str(torch.__version__),  # a class of its own, which no state may hold
            "python": platform.python_version(),
        },
    }


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone that runs, with a + when files differ from it; None elsewhere."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxconverter-common")


def versions() -> dict[str, str]:
    """Versions of what makes an artifact, as far as it is installed."""
    found = {
        "efficientface_deploy": efficientface_deploy.__version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
