from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
import tracemalloc
from pathlib import Path

import pytest

from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.files import (
    atomic_path,
    check_new_folder,
    file_hash,
    find_files,
    read_json,
    read_lines,
    remove_temporaries,
    require_file,
    write_text,
)

# ---- atomic writes


def test_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "model.onnx"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, ".onnx")
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_failure_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "model.onnx"
    if old:
        path.write_bytes(old)
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert os.listdir(tmp_path) == (["model.onnx"] if old else [])
    if old:
        assert path.read_bytes() == old


def test_writer_that_moved_its_file_away_is_an_error_and_keeps_the_old(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(path) as temporary:
        temporary.unlink()
    assert path.read_bytes() == b"old"


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """After a power cut a name without content would be half a file."""
    done = []
    sync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(os.fstat(handle).st_size)
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("named"), replace(*paths)))
    write_text(tmp_path / "a.json", "{}")
    assert done == [2, "named"]


def test_what_a_killed_process_had_begun_is_removed(tmp_path):
    class Killed(BaseException):
        pass

    keep = [".gitignore", ".a.json", "a.json", ".b.json.x.json", ".c.part.a"]
    for name in keep:
        (tmp_path / name).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # SIGKILL leaves the file
        for name in ("a.json", "part-00001.parquet"):
            with contextlib.suppress(Killed), atomic_path(tmp_path / name):
                raise Killed
    assert len(os.listdir(tmp_path)) == len(keep) + 2
    remove_temporaries(tmp_path, "a.json", "part-*")
    assert sorted(os.listdir(tmp_path)) == sorted(keep)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.json", "{}")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EROFS])
def test_file_system_without_modes(tmp_path, monkeypatch, code):
    """As CIFS, buckets and FUSE have none."""

    def refuse(self, mode):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "chmod", refuse)
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"


def test_name_that_is_no_text_is_written_escaped(tmp_path):
    write_text(tmp_path / "a.md", "caf\udce9 caf\u00e9")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "caf\\udce9 caf\u00e9"


def test_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_text(path, "new \u00e4")
        assert reader.read() == b"old"
    assert path.read_text(encoding="utf-8") == "new \u00e4"


# ---- hashes, required files


def test_file_hash(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(range(256)) * 10_000)
    assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_require_file(tmp_path):
    with pytest.raises(ArtifactError, match="an ONNX model, found no such file"):
        require_file(tmp_path / "x.onnx", "an ONNX model")
    with pytest.raises(ArtifactError, match="found a folder"):
        require_file(tmp_path, "an ONNX model")


def test_require_file_refuses_what_is_not_worth_reading(tmp_path):
    path = tmp_path / "x.onnx"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ArtifactError, match=r"an ONNX model below 1 GiB, found a file of 1\.0 GiB"):
        require_file(path, "an ONNX model")
    path.unlink()
    os.mkfifo(path)
    for pipe in (path, "/dev/zero"):
        with pytest.raises(ArtifactError, match="found a pipe or device"):
            require_file(pipe, "an ONNX model")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("x" * 300 + ".onnx", "file name too long"),
        ("nul\0byte.onnx", "null (byte|character)"),
        ("file/model.onnx", "not a directory"),
        ("loop.onnx", "too many levels of symbolic links"),
    ],
)
def test_require_file_says_what_the_system_says(tmp_path, name, found):
    (tmp_path / "file").touch()
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    with pytest.raises(ArtifactError, match=f"expected an ONNX model, found .*{found}"):
        require_file(tmp_path / name, "an ONNX model")


@pytest.mark.parametrize("method", ["stat", "open"])
def test_require_file_refuses_what_may_not_be_read(tmp_path, monkeypatch, method):
    path = tmp_path / "x.onnx"
    path.touch()

    def refuse(self, *arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ArtifactError, match="found permission denied"):
        require_file(path, "an ONNX model")


# ---- folders


def test_find_files(tmp_path):
    names = ["b.PNG", "a/c.png", "a/d.txt", "a/e/f.jpg", ".h/g.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to("a")
    for name in ("._b.png", "__MACOSX/b.png", "a/.ipynb_checkpoints/c.png", ".Trash-1000/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dead.png").symlink_to("nowhere")
    expected = sorted([".h/g.png", "a/c.png", "a/e/f.jpg", "b.PNG", "dead.png"])
    found, refused = find_files(tmp_path, (".png", ".jpg"))
    assert [file.relative_to(tmp_path).as_posix() for file in found] == expected
    assert refused == []


def test_links_to_folders_are_followed_once_and_never_upwards(tmp_path):
    for name in ("top/a/1.png", "top/z/2.png", "elsewhere/deep/3.png", "other.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    top = tmp_path / "top"
    (top / "a/circle").symlink_to(top / "a")
    (top / "up").symlink_to(tmp_path)
    (top / "b").symlink_to(top / "z")
    (top / "c").symlink_to(tmp_path / "elsewhere")
    (top / "d").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "elsewhere/back").symlink_to(top)
    expected = ["a/1.png", "c/deep/3.png", "z/2.png"]  # each by its own name where it has one
    for folder in (top, tmp_path / "again"):
        if not folder.exists():
            folder.symlink_to(top)
        found, _ = find_files(folder, (".png",))
        assert [file.relative_to(folder).as_posix() for file in found] == expected


def test_all_files(tmp_path):
    for name in ("b.txt", "none", ".hidden", "Thumbs.db"):
        (tmp_path / name).touch()
    assert [file.name for file in find_files(tmp_path)[0]] == [".hidden", "b.txt", "none"]


def test_folder_that_may_not_be_read_is_apart(tmp_path, monkeypatch):
    for name in ("a", "closed", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, refused = find_files(tmp_path, (".png",))
    assert [file.parent.name for file in found] == ["a", "b"]
    assert refused == [tmp_path / "closed"]
    assert find_files(tmp_path / "closed", (".png",)) == ([], [tmp_path / "closed"])


def test_folder_that_must_be_new(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    for folder, found in (("full", "not empty"), ("full/thesis.txt", "a file")):
        said = rf"^--x: expected a new or an empty folder, found .*{found}; give another one$"
        with pytest.raises(ConfigError, match=said):
            check_new_folder(tmp_path / folder, "--x")
    with pytest.raises(ConfigError, match=r"not empty; give another one, or add --overwrite$"):
        check_new_folder(tmp_path / "full", "--x", overwrite=False)
    check_new_folder(tmp_path / "full", "--x", overwrite=True)
    with pytest.raises(ConfigError, match=r"^--x: .* a file"):
        check_new_folder(tmp_path / "full/thesis.txt", "--x", overwrite=True)
    check_new_folder(tmp_path / "empty", "--x")
    check_new_folder(tmp_path / "new/er", "--x")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"^/proc/x: expected a folder that can be written"):
        check_new_folder(Path("/proc/x"), "--x")


# ---- texts of others


def test_json_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    for mark in ("", "\ufeff"):
        path.write_text(mark + '{"é": 1}', encoding="utf-8")
        assert read_json(path) == {"é": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "Expecting"),
        (b"\xff\xfe{\0}\0", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1," * (9 << 20), "more than 16 MiB"),
    ],
    ids=["half", "UTF-16", "deep", "large"],
)
def test_json_that_cannot_be_used_is_one_kind_of_error(content, said, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "a.json")


def test_a_file_of_zeros_without_end_fills_no_memory(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than"):
        read_json(tmp_path / "a")
    with (tmp_path / "a").open(encoding="utf-8") as text, pytest.raises(UnicodeError, match="line"):
        next(read_lines(text))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


def test_lines_keep_their_ends(tmp_path):
    (tmp_path / "a").write_bytes(b"one\r\ntwo")
    with (tmp_path / "a").open(encoding="utf-8", newline="") as text:
        assert list(read_lines(text)) == ["one\r\n", "two"]


@pytest.mark.skipif(sys.platform != "linux", reason="a file that cannot be read, by name")
def test_a_read_that_fails_names_its_file():
    path = Path("/proc/self/mem")  # whose first page nobody has
    with pytest.raises(OSError, match="/proc/self/mem"):
        read_json(path)
    with path.open(encoding="utf-8") as text, pytest.raises(OSError, match="/proc/self/mem"):
        next(read_lines(text))
