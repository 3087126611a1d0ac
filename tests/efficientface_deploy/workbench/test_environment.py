"""Where something was made."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientface_deploy.workbench import environment


def test_commit_of_a_clone_and_of_a_copy(monkeypatch, tmp_path):
    commit = environment.git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    environment.git_commit.cache_clear()
    assert environment.git_commit() is None
    environment.git_commit.cache_clear()


def test_what_cannot_be_read_is_left_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, no nvidia-smi
    monkeypatch.setattr(environment, "_CPU", tmp_path / "cpu0")
    assert environment.describe_commit() == {"commit": None, "dirty": None}
    described = environment.describe_machine()
    assert described["gpus"] == []
    assert described["governor"] is None
    assert described["cores"] is None
    assert described["l2_bytes"] == 1 << 20


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA H100 80GB HBM3, 550.54, 81559 MiB, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W"
    monkeypatch.setattr(environment, "_output_of", lambda *_: line)
    gpus = environment.describe_machine()["gpus"]
    assert [gpu["name"] for gpu in gpus] == ["NVIDIA H100 80GB HBM3"]
    assert gpus[0]["driver_version"] == "550.54"


def test_versions_of_what_is_installed() -> None:
    found = environment.package_versions(("numpy", "no-such-package"))
    assert list(found) == ["numpy"]
    assert {"efficientface_deploy", "python"} <= set(environment.versions())


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "7", 2048), ("4000", "2976", 1024), ("9000", "1000", 2048), ("10", "20", 0)],
)
def test_available_memory_is_what_the_container_leaves(
    limit, used, expected, tmp_path, monkeypatch
):
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemFree: 1 kB\nMemAvailable:      2 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(environment, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    assert environment.available_memory_bytes() == expected


def test_available_memory_elsewhere_is_all_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_MEMORY", tmp_path / "none")
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    assert environment.available_memory_bytes() == environment.memory_bytes()
