"""One job at a time in a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from efficientface_deploy import lock as lock_module
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.lock import lock_folder

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
        "import sys\nfrom pathlib import Path\nfrom efficientface_deploy.lock import lock_folder\n"
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
        "from efficientface_deploy.lock import lock_folder\n"
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
