"""Folders to write to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench import workspace as lock_module
from efficientface_deploy.workbench.workspace import check_writable, lock_folder, make_folder

pytest.importorskip("fcntl", reason="the lock is POSIX's")


def test_second_job_is_refused(tmp_path: Path) -> None:
    message = f"{tmp_path}: expected no other training at work in this folder, found one"
    with lock_folder(tmp_path, "training"):
        for _ in range(2):
            with pytest.raises(ConfigError, match=message), lock_folder(tmp_path, "training"):
                pytest.fail("two at once")
    with lock_folder(tmp_path, "training"):
        pass


def test_another_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from efficientface_deploy.workbench.workspace import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), 'training'): pass\n"
    )
    with lock_folder(tmp_path, "training"):
        refused = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True)
    assert b"expected no other training" in refused.stderr
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_forked_worker_that_outlives_a_killed_job_holds_nothing(tmp_path: Path) -> None:
    """As a loading worker does for some seconds."""
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from efficientface_deploy.workbench.workspace import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), 'training'):\n"
        "    worker = os.fork()\n"
        "    if worker == 0:\n"
        "        time.sleep(60)\n"
        "    print(worker, flush=True)\n"
        "    time.sleep(0.3)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert job.stdout is not None
    worker = int(job.stdout.readline())
    try:
        assert job.wait() == -signal.SIGKILL
        os.kill(worker, 0)  # it is there
        with lock_folder(tmp_path, "training"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        job.stdout.close()


@pytest.mark.parametrize("reason", ["no fcntl", "no locks"])
def test_without_locks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    """Another system, or a network share: it is said where it can be known."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if reason == "no fcntl":
        monkeypatch.setattr(lock_module, "fcntl", None)
    else:
        monkeypatch.setattr(lock_module.fcntl, "flock", fail)
    with lock_folder(tmp_path, "training"):
        pass
    assert ("cannot be locked (no locks available)" in capsys.readouterr().out) == (
        reason == "no locks"
    )


# ---- Folders that cannot be written --------------------------------------------------------------


@pytest.fixture(params=[make_folder, check_writable])
def claim(request: pytest.FixtureRequest):
    return request.param


def test_folder_is_made_or_only_tried(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(None)
    assert not (tmp_path / "a").exists()
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_what_is_no_folder_is_refused(claim, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    expected = "file: expected a folder that can be written, found a file; choose another --store$"
    with pytest.raises(ConfigError, match=expected):
        claim(tmp_path / "file", "--store")
    with pytest.raises(ConfigError, match=r"found not a directory; choose another --out$"):
        claim(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "precious"


def test_folder_of_the_system_is_refused(claim) -> None:
    with pytest.raises(ConfigError, match=r"^/proc/runs: expected a folder that can be written"):
        claim(Path("/proc/runs"))


@pytest.mark.parametrize("child", ["", "run"])
def test_folder_without_permission_is_refused(claim, child: str, tmp_path: Path) -> None:
    """As a user who is not root."""
    code = (
        f"import os, sys\nfrom pathlib import Path\n"
        f"from efficientface_deploy.workbench.workspace import {claim.__name__}\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        f"{claim.__name__}(Path(sys.argv[1]))\n"
    )
    closed = Path("/usr" if os.getuid() == 0 else tmp_path)
    if os.getuid() != 0:
        tmp_path.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", code, str(closed / child)], capture_output=True, text=True
    )
    assert "a folder that can be written, found permission denied" in done.stderr


def test_full_disk_is_not_a_matter_of_the_folder(claim, tmp_path: Path, monkeypatch) -> None:
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock_module.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        claim(tmp_path)
