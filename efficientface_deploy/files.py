"""Files of every kind: written whole or not at all, hashed, required; folders to write to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import ArtifactError, ConfigError, system_words

# What the system says when a file cannot be written for want of space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a system, not its user, puts into a folder: thumbnails, settings, bins, copies of attributes.
_LEFT_BEHIND = {
    *(".ds_store", ".localized", "icon\r", "__macosx", ".fseventsd", ".spotlight-v100"),  # macOS
    *(".temporaryitems", ".documentrevisions-v100", ".apdisk"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", ".directory", ".thumbnails", "@eadir", ".ipynb_checkpoints"),
}

_MAX_JSON = 1 << 24  # bytes, a hundred times our largest; what is parsed takes 30 times as much
_MAX_LINE = 1 << 20  # characters

_MAX_FILE = 1 << 30  # bytes, ten times our largest; a reader takes several times as much memory


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it there when the block succeeds.

    A reader sees the old file or the whole new one, never half of one, after a power cut too; on
    an error, an interrupt included, the temporary file is removed and ``path`` is as it was.
    """
    import tempfile  # here, for what it imports: a program that only predicts never writes

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        set_mode(temporary, 0o666)  # mkstemp makes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or the name might reach the disk before the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *names: str) -> None:
    """Remove what :func:`atomic_path` had begun in a folder when its process was killed.

    Args:
        folder: One that no other process writes to.
        names: Of the files, as patterns.
    """
    for name in names:
        for left in folder.glob(f".{name}.*"):
            left.unlink(missing_ok=True)


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder a mode, less the umask, where its file system has modes.

    Network shares, buckets and some FUSE drives have none, and refuse.
    """
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):
        path.chmod(mode & ~umask)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; a name in it that is no UTF-8 is escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, **options: Any) -> Any:
    """What a JSON file in UTF-8 says, with or without a byte-order mark.

    Args:
        path: The file.
        options: As of ``json.loads``.

    Raises:
        ValueError: It is no JSON, nested too deeply, or larger than 16 MiB.
        OSError: The system refuses; it names the file.
    """
    with path.open("rb") as file, failures_named(path):
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise ValueError(f"more than {_MAX_JSON >> 20} MiB of JSON")
    try:
        return json.loads(content.decode("utf-8-sig"), **options)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


@contextlib.contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Name a file in the system's errors of the block: of a read that fails it names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def read_lines(file: IO[str]) -> Iterator[str]:
    """The lines of a text file, with their ends; a file of one endless line fills no memory.

    Raises:
        UnicodeError: It is no text, or has a line of more than a million characters.
        OSError: The system refuses; it names the file.
    """
    with failures_named(Path(getattr(file, "name", ""))):
        while line := file.readline(_MAX_LINE):
            if len(line) == _MAX_LINE:
                raise UnicodeError("a line of more than a million characters")
            yield line


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    import hashlib  # here, since it loads OpenSSL, which an ONNX model has no need of

    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def require_file(path: str | Path, kind: str) -> Path:
    """The path, if a file is there that one of ours could be.

    Raises:
        ArtifactError: Nothing is there, or it is not a file, may not be read, or is larger than
            1 GiB.
    """
    path = Path(path)
    if (reason := why_not_a_file(path)) is not None:
        raise ArtifactError(path, kind, reason, "check the path")
    if (size := path.stat().st_size) > _MAX_FILE:
        found = f"a file of {size / _MAX_FILE:.1f} GiB"
        raise ArtifactError(path, f"{kind} below 1 GiB", found, "copy it again")
    return path


def make_folder(path: Path, option: str = "--out") -> None:
    """Make a folder where it is missing, and see that files can be made in it.

    Args:
        path: The folder.
        option: What names it, for messages.

    Raises:
        ConfigError: The system refuses.
        OSError: The disk is full.
    """
    import tempfile  # here, as above

    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(
            path,
            "a folder that can be written",
            "a file" if path.is_file() else system_words(error),
            f"choose another {option}",
        ) from None


def check_writable(path: Path | None, option: str = "--out") -> None:
    """Refuse a folder now that could not be written after the work; nothing is left of the trial.

    Args:
        path: The folder, which may be missing; None for none.
        option: What names it, for messages.

    Raises:
        ConfigError: It cannot be made or written.
    """
    if path is not None:
        with empty_folders_removed(path):
            make_folder(path, option)


def check_new_folder(folder: Path, option: str, overwrite: bool | None = None) -> None:
    """Refuse a folder that holds what is not to be replaced, or that cannot be written.

    Args:
        folder: The folder, which may be missing.
        option: What names it, for messages.
        overwrite: Whether it may hold something, by ``--overwrite``; None where there is no such
            option.

    Raises:
        ConfigError: It is such a folder.
    """
    expected, fix = "a new or an empty folder", "give another one"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(option, expected, f"{folder}, a file", fix)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        fix += "" if overwrite is None else ", or add --overwrite"
        raise ConfigError(option, expected, f"{folder}, not empty", fix)
    check_writable(folder, option)


@contextlib.contextmanager
def empty_folders_removed(path: Path) -> Iterator[None]:
    """Remove, of a path's folders, those that the block makes and leaves empty."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        with interrupts_wait(), contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def why_not_a_file(path: Path) -> str | None:
    """What is at a path instead of a file that can be read; None where such a file is."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "a folder"
        if not stat.S_ISREG(mode):  # a pipe may never end, a device neither
            return "a pipe or device"
        with path.open("rb"):
            return None
    except FileNotFoundError:
        return "no such file"
    except OSError as error:  # no permission, a name that is too long, ...
        return system_words(error)
    except ValueError as error:  # a NUL byte in the path
        return str(error)


def is_left_behind(name: str) -> bool:
    """Whether a file or folder of this name is the system's own, such as ``._a.jpg``."""
    return name.startswith(("._", ".Trash")) or name.lower() in _LEFT_BEHIND


def find_files(folder: Path, suffixes: tuple[str, ...] = ("",)) -> tuple[list[Path], list[Path]]:
    """All files below a folder whose names end so, in capitals too, and what cannot be searched.

    Without what the system leaves behind. A link to a folder is followed where that folder has not
    been searched already and does not hold the whole search: circles of links come to an end.

    Returns:
        The files and, apart, the folders that may not be read, both sorted.
    """
    files: list[Path] = []
    refused: list[Path] = []
    searched = set(map(str, Path(os.path.realpath(folder)).parents))  # not to go up by a link

    def note(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            refused.append(Path(error.filename))

    def is_new(path: str) -> bool:
        before = len(searched)
        searched.add(os.path.realpath(path))
        return len(searched) > before

    waiting = [str(folder)]
    while waiting:
        links: list[str] = []
        top = waiting.pop(0)
        for place, below, names in os.walk(top, onerror=note) if is_new(top) else ():
            paths = {name: os.path.join(place, name) for name in below if not is_left_behind(name)}
            links += filter(os.path.islink, paths.values())
            below[:] = [n for n, path in paths.items() if not os.path.islink(path) and is_new(path)]
            files += [Path(place, name) for name in names if _is_wanted(name, suffixes)]
        waiting += sorted(links)  # last, since the folders' own names are the better ones
    return sorted(files), sorted(refused)


def _is_wanted(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes) and not is_left_behind(name)
