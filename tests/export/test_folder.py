"""The output folder: one export at a time, and nothing half-written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from efficientface_deploy.errors import ConfigError, ExportError
from efficientface_export.folder import SCRATCH, OutputFolder, failed_name, open_folder

pytest.importorskip("fcntl", reason="the folder's lock is POSIX's")


def make(folder: OutputFolder, **files: str) -> None:
    """``a_onnx="x"`` is a file a.onnx in the scratch folder."""
    for name, content in files.items():
        (folder.scratch / name.replace("_", ".")).write_text(content)


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_published_together(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with open_folder(out) as folder:
        assert folder.path == out
        make(folder, a_onnx="1", report_md="2")
        assert [file.name for file in out.iterdir()] == [SCRATCH]
        folder.publish()
        assert content(folder.scratch) == {}
        make(folder, b_onnx="3")
    assert content(out) == {"a.onnx": "1", "report.md": "2"}


def test_failed_predecessor_goes(tmp_path: Path) -> None:
    for name in ("a.failed.rtx.engine", "a.failed.rtx.engine.json", "b.failed.onnx"):
        (tmp_path / name).write_text("old")
    with open_folder(tmp_path) as folder:
        make(folder, a_rtx_engine="new", a_rtx_engine_json="new")
        folder.publish()
    assert set(content(tmp_path)) == {"a.rtx.engine", "a.rtx.engine.json", "b.failed.onnx"}


def test_failure_leaves_the_earlier_success(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("good")
    with open_folder(tmp_path) as folder:
        make(folder, a_failed_onnx="bad")
        folder.publish()
    assert content(tmp_path) == {"a.onnx": "good", "a.failed.onnx": "bad"}


def test_failed_name() -> None:
    assert failed_name("efficientface-int8-gpu.rtx.engine") == (
        "efficientface-int8-gpu.failed.rtx.engine"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), open_folder(tmp_path / "a" / "b") as folder:
        make(folder, a_onnx="1")
        raise error
    assert content(tmp_path) == {}


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open_folder(tmp_path / "a" / "b"):
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
    with pytest.raises(KeyboardInterrupt), open_folder(tmp_path) as folder:
        make(folder, a_engine="1", a_engine_json="2")
        folder.publish()
    assert content(tmp_path) == {"a.engine": "1", "a.engine.json": "2"}


def test_second_export_is_refused(tmp_path: Path) -> None:
    with open_folder(tmp_path / "out") as first:
        make(first, a_onnx="1")
        with (
            pytest.raises(ConfigError, match="expected no other export at work in this folder"),
            open_folder(tmp_path / "out"),
        ):
            pytest.fail("two at once")
        first.publish()
    assert content(tmp_path / "out") == {"a.onnx": "1"}
    with open_folder(tmp_path / "out"):
        pass


def test_killed_export_neither_blocks_nor_leaves_anything(tmp_path: Path) -> None:
    """SIGKILL cannot be handled: the system frees the lock, the next export clears up."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from efficientface_export.folder import open_folder\n"
        "with open_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder.scratch / 'a.onnx').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [SCRATCH]
    with open_folder(tmp_path) as folder:
        assert content(folder.scratch) == {}
    assert content(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(tmp_path: Path, number: int) -> None:
    (tmp_path / "earlier.onnx").write_text("precious")
    message = f"{tmp_path}: expected space for what is written, found .*; free some on that disk"
    with pytest.raises(ExportError, match=message), open_folder(tmp_path) as folder:
        make(folder, a_onnx="half")
        raise OSError(number, os.strerror(number))
    assert content(tmp_path) == {"earlier.onnx": "precious"}


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), open_folder(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere else")


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match="a folder that can be written, found not a directory"),
        open_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("no folder")


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser, who may run these tests, writes everywhere."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ConfigError, match="found read-only file system; choose another --out"),
        open_folder(tmp_path),
    ):
        pytest.fail("no folder")
