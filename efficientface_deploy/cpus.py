"""The CPUs: which they are, and how many this process may use, fewer inside a container."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/proc/self/cgroup")  # where this process stands in each hierarchy
_MOUNT = Path("/sys/fs/cgroup")
_PERIOD = 100_000  # the kernel's own, microseconds


def usable_cpus() -> int:
    """CPUs that this process may use: those of its affinity, as far as its cgroups' quotas go.

    A quota is rounded down: one thread more, and all of them stand still for a part of each period.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(cpus, int(min(_quotas(_CGROUP, _MOUNT), default=cpus))))


def default_threads() -> int | None:
    """Threads for a library that would count the machine's; None where it may use all of them."""
    usable = usable_cpus()
    return usable if usable < (os.cpu_count() or 1) else None


def cpu_model() -> str | None:
    """The CPU's name as its maker gives it; None where the system does not say."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(_CPUINFO) or "", re.MULTILINE)
    return match[1].strip() if match else platform.processor() or None


def has_bf16() -> bool:
    """Whether this x86 CPU multiplies in BF16; False where the system does not say."""
    return re.search(r"\b(avx512|amx)_bf16\b", _read(_CPUINFO) or "") is not None


def _quotas(cgroup: Path, mount: Path) -> Iterator[float]:
    """What each cgroup above the process allows, in CPUs.

    The process's path is the host's where the container has no namespace of its own; then only the
    root of the mount is there, which is the container's.
    """
    for line in (_read(cgroup) or "").splitlines():
        hierarchy, controllers, place = line.split(":", 2)
        if hierarchy == "0":
            root, limit = mount, _limit_v2
        elif "cpu" in controllers.split(","):
            roots = [mount / controllers, mount / "cpu"]
            root, limit = next((one for one in roots if one.is_dir()), mount), _limit_v1
        else:
            continue
        inner = PurePosixPath(place).relative_to("/")
        for group in (inner, *inner.parents):
            with contextlib.suppress(ValueError, ZeroDivisionError):
                yield from limit(root / group)


def _limit_v2(folder: Path) -> Iterator[float]:
    """``cpu.max``: a quota and its period, or ``max``."""
    quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
    if quota != "max":
        yield int(quota) / int(period or _PERIOD)


def _limit_v1(folder: Path) -> Iterator[float]:
    quota = int(_read(folder / "cpu.cfs_quota_us") or -1)
    if quota > 0:
        yield quota / int(_read(folder / "cpu.cfs_period_us") or _PERIOD)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
