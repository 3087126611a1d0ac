"""Folders to write to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import check_writable, make_folder
from efficientface_deploy.workbench import workspace as lock_module
from efficientface_deploy.workbench.workspace import (
    Workspace,
    lock_folder,
    open_workspace,
)

pytest.importorskip("fcntl", reason="the lock is POSIX's")

SCRATCH = ".efficientface-export"


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
        "import os, sys, tempfile\nfrom pathlib import Path\n"
        f"from {claim.__module__} import {claim.__name__}\n"
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

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        claim(tmp_path)


# ---- a workspace


def put(folder: Workspace, **files: str) -> None:
    """``a_onnx="x"`` is a file a.onnx in the scratch folder."""
    for name, content in files.items():
        (folder.scratch / name.replace("_", ".")).write_text(content)


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_published_together(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with open_workspace(out, "export") as folder:
        assert folder.path == out
        put(folder, a_onnx="1", report_md="2")
        assert [file.name for file in out.iterdir()] == [SCRATCH]
        folder.publish()
        assert content(folder.scratch) == {}
        put(folder, b_onnx="3")
    assert content(out) == {"a.onnx": "1", "report.md": "2"}


def test_failed_predecessor_goes(tmp_path: Path) -> None:
    for name in ("a.failed.rtx.engine", "a.failed.rtx.engine.json", "b.failed.onnx"):
        (tmp_path / name).write_text("old")
    with open_workspace(tmp_path, "export") as folder:
        put(folder, a_rtx_engine="new", a_rtx_engine_json="new")
        folder.publish(lambda name: name.replace(".", ".failed.", 1))
    assert set(content(tmp_path)) == {"a.rtx.engine", "a.rtx.engine.json", "b.failed.onnx"}


def test_failure_leaves_the_earlier_success(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("good")
    with open_workspace(tmp_path, "export") as folder:
        put(folder, a_failed_onnx="bad")
        folder.publish()
    assert content(tmp_path) == {"a.onnx": "good", "a.failed.onnx": "bad"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), open_workspace(tmp_path / "a" / "b", "export") as folder:
        put(folder, a_onnx="1")
        raise error
    assert content(tmp_path) == {}


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open_workspace(tmp_path / "a" / "b", "export"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert content(tmp_path / "a") == {}


def test_interrupt_waits_until_all_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine and its sidecar, say, of which the first is replaced already."""
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), open_workspace(tmp_path, "export") as folder:
        put(folder, a_engine="1", a_engine_json="2")
        folder.publish()
    assert content(tmp_path) == {"a.engine": "1", "a.engine.json": "2"}


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_killed_while_publishing_no_artifact_lacks_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    files = {"efficientface-fp16-gpu.engine", "efficientface-fp16-gpu.engine.json"}
    files |= {"report.json", "report.md", "verify.npz"}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in files:
        (scratch / name).touch()
    replace, moved = os.replace, iter(range(moves))

    def killed(source: Path, target: Path) -> None:
        next(moved)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(StopIteration):
        Workspace(tmp_path, scratch).publish()
    there = {path.name for path in tmp_path.iterdir()}
    assert len(there) == 1 + moves and not there & {"efficientface-fp16-gpu.engine"}


def test_second_export_is_refused(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out", "export") as first:
        put(first, a_onnx="1")
        with (
            pytest.raises(ConfigError, match="expected no other export at work in this folder"),
            open_workspace(tmp_path / "out", "export"),
        ):
            pytest.fail("two at once")
        first.publish()
    assert content(tmp_path / "out") == {"a.onnx": "1"}
    with open_workspace(tmp_path / "out", "export"):
        pass


def test_killed_export_neither_blocks_nor_leaves_anything(tmp_path: Path) -> None:
    """SIGKILL cannot be handled: the system frees the lock, the next export clears up."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from efficientface_deploy.workbench.workspace import open_workspace\n"
        "with open_workspace(Path(sys.argv[1]), 'export') as folder:\n"
        "    (folder.scratch / 'a.onnx').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [SCRATCH]
    with open_workspace(tmp_path, "export") as folder:
        assert content(folder.scratch) == {}
    assert content(tmp_path) == {}


def test_without_a_descriptor_nothing_is_left(tmp_path):
    """There may be none where they are what ended the work, and who fails keeps his."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with (
            pytest.raises(OSError, match="Too many open files"),
            open_workspace(tmp_path / "out", "export") as work,
        ):
            (work.scratch / "a").mkdir()
            (work.scratch / "a" / "a.onnx").write_text("half")
            os.close(free := os.dup(1))
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            raise OSError(errno.EMFILE, "Too many open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(tmp_path: Path, number: int) -> None:
    (tmp_path / "earlier.onnx").write_text("precious")
    message = f"{tmp_path}: expected space for what is written, found .*; free some on that disk"
    with pytest.raises(ConfigError, match=message), open_workspace(tmp_path, "export") as folder:
        put(folder, a_onnx="half")
        raise OSError(number, os.strerror(number))
    assert content(tmp_path) == {"earlier.onnx": "precious"}


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), open_workspace(tmp_path, "export"):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere else")


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match="a folder that can be written, found not a directory"),
        open_workspace(tmp_path / "file" / "out", "export"),
    ):
        pytest.fail("no folder")


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser, who may run these tests, writes everywhere."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ConfigError, match="found read-only file system; choose another --out"),
        open_workspace(tmp_path, "export"),
    ):
        pytest.fail("no folder")
