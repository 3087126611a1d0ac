from __future__ import annotations

import os
from pathlib import Path

import pytest

from efficientface_deploy import cpus


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 32 CPUs whose cgroups are the given files."""

    def make(place: str, files: dict[str, str], affinity: int = 32) -> None:
        (tmp_path / "cgroup").write_text(place)
        for name, content in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(cpus, "_CGROUP", tmp_path / "cgroup")
        monkeypatch.setattr(cpus, "_MOUNT", tmp_path / "mount")
        monkeypatch.setattr(os, "cpu_count", lambda: 32)
        found = set(range(affinity))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: found, raising=False)

    return make


V1 = "4:cpu,cpuacct:/docker/ab\n1:memory:/docker/ab\n"


@pytest.mark.parametrize(
    ("place", "files", "usable"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 32),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),  # a third thread would be held up
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {}, 32),
        # The tightest of the groups above the process counts.
        ("0::/a/b\n", {"a/b/cpu.max": "max", "a/cpu.max": "300000 100000", "cpu.max": "max"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "800000 100000"}, 2),
        # The host's path in a container without a namespace of its own.
        ("0::/docker/ab\n", {"cpu.max": "400000 100000"}, 4),
        (V1, {"cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "200000\n"}, 2),
        (
            V1,
            {
                "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "50000",
            },
            3,
        ),
        (V1, {"cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "-1"}, 32),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        (f"{V1}0::/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "500000"}, 5),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 32),
        ("0::/\n", {"cpu.max": "100000 0\n"}, 32),
        ("", {}, 32),
    ],
)
def test_quota(machine, place, files, usable):
    machine(place, files)
    assert cpus.usable_cpus() == usable
    assert cpus.default_threads() == (usable if usable < 32 else None)


def test_affinity(machine):
    machine("0::/\n", {"cpu.max": "800000 100000"}, affinity=3)
    assert cpus.usable_cpus() == cpus.default_threads() == 3


def test_system_without_cgroups_and_affinity(machine, monkeypatch):
    machine("", {})
    monkeypatch.setattr(cpus, "_CGROUP", Path("missing"))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpus.usable_cpus() == 32
    assert cpus.default_threads() is None


def test_the_machine_that_runs_this():
    assert 1 <= cpus.usable_cpus() <= os.cpu_count()


@pytest.mark.parametrize(
    ("text", "model", "bf16"),
    [
        ("model name\t: AMD EPYC 9B14\nflags\t\t: fpu avx512_bf16 avx2\n", "AMD EPYC 9B14", True),
        ("flags\t: amx_bf16\nmodel name : Intel(R) Xeon(R)\n", "Intel(R) Xeon(R)", True),
        ("model name\t: Old\nflags\t\t: avx512f avx512_vnni\n", "Old", False),
        ("", None, False),
    ],
)
def test_which_cpu(text, model, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr(cpus, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpus.platform, "processor", lambda: "")
    (tmp_path / "cpuinfo").write_text(text)
    assert (cpus.cpu_model(), cpus.has_bf16()) == (model, bf16)
