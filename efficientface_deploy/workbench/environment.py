"""Where something was made, and with what: machine, software, git commit, time.

Everything is read where it can be read and left None where it cannot; nothing here identifies a
person or a host.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import efficientface_deploy
from efficientface_deploy.cpus import cpu_model, usable_cpus

ROOT = Path(__file__).resolve().parents[2]

# What takes part in a measurement, and what makes an artifact.
_MEASURED = (
    "efficientface-deploy",
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-ep-openvino",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "torch",
    "triton",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "cuda-python",
    "pycuda",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "onnx",
)
_EXPORTING = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu")
# They decide how many threads a library starts and how long these spin.
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")

_CPU = Path("/sys/devices/system/cpu/cpu0")
_MEMORY = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Clocks and power limit are read, never set.
_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
)
_FALLBACK_L2 = 1 << 20


def describe_machine() -> dict[str, Any]:
    """CPU, memory, clock policy, load and GPUs."""
    return {
        "board": _read(Path("/proc/device-tree/model")),
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": _physical_cores(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "l2_bytes": l2_bytes(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": memory_bytes(),
        "governor": _read(_CPU / "cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
    }


def describe_software() -> dict[str, Any]:
    """Operating system, Python, the versions of what takes part, and thread settings."""
    return {
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": package_versions(_MEASURED),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def describe_commit() -> dict[str, Any]:
    """Commit of the working tree, and whether tracked files differ from it."""
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    status = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone that runs, with a + when files differ from it; None elsewhere."""
    found = describe_commit()
    return f"{found['commit']}{'+' if found['dirty'] else ''}" if found["commit"] else None


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


def versions() -> dict[str, str]:
    """Versions of what makes an artifact, as far as it is installed."""
    return {
        "efficientface_deploy": efficientface_deploy.__version__,
        "python": platform.python_version(),
        **package_versions(_EXPORTING),
    }


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def now() -> str:
    """The time in UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def l2_bytes() -> int:
    """Size of a core's second-level cache, bytes; 1 MiB where the system does not say."""
    return _cache_bytes(2) or _FALLBACK_L2


def last_level_cache_bytes() -> int:
    """Size of the third-level cache, bytes; of the second where there is none or it is not said."""
    return _cache_bytes(3) or l2_bytes()


def memory_bytes() -> int | None:
    """Size of the main memory, bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory_bytes() -> int | None:
    """Main memory that a process can still have, bytes; in a container what its limit leaves."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(_MEMORY) or "", re.MULTILINE)
    limit, used = (_read(_CGROUP / f"memory.{name}") or "" for name in ("max", "current"))
    left = [int(match[1]) << 10] if match else []
    if limit.isdecimal() and used.isdecimal():  # without a limit it says "max"
        left.append(max(0, int(limit) - int(used)))
    return min(left, default=memory_bytes())


def _cache_bytes(level: int) -> int | None:
    match = re.fullmatch(r"(\d+)([KM])", _read(_CPU / f"cache/index{level}/size") or "")
    return int(match[1]) << (10 if match[2] == "K" else 20) if match else None


def _physical_cores() -> int | None:
    pattern = "cpu[0-9]*/topology/thread_siblings_list"
    siblings = {_read(path) for path in _CPU.parent.glob(pattern)}
    return len(siblings) or None


def _gpus() -> list[dict[str, str]]:
    """One entry per NVIDIA GPU; empty without nvidia-smi or without a GPU."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    rows = csv.reader((_output_of("nvidia-smi", query, "--format=csv,noheader") or "").splitlines())
    cells = [[cell.strip() for cell in row] for row in rows]
    return [
        dict(zip(_GPU_FIELDS, row, strict=True)) for row in cells if len(row) == len(_GPU_FIELDS)
    ]


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError, AttributeError):
        return platform.platform()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _output_of(*command: str) -> str | None:
    """What a command prints; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
