"""Files of every kind: written whole or not at all, hashed, required; folders to write to."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import ArtifactError, ConfigError, system_words

# What the system says when a file cannot be written for want of space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_MAX_FILE = 1 << 30  # bytes, ten times our largest; a reader takes several times as much memory


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it there when the block succeeds.

    A reader sees the old file or the whole new one, never half of one; on an error, an interrupt
    included, the temporary file is removed and ``path`` is as it was.
    """
    import tempfile  # here, for what it imports: a program that only predicts never writes

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
        ArtifactError: Nothing is there, or it is not a file, or larger than 1 GiB.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(path, kind, describe_absence(path), "check the path")
    if (size := path.stat().st_size) > _MAX_FILE:
        found = f"a file of {size / _MAX_FILE:.1f} GiB"
        raise ArtifactError(path, f"{kind} below 1 GiB", found, "copy it again")
    return path


def describe_absence(path: Path) -> str:
    """What is at a path where no file is."""
    if path.is_dir():
        return "a folder"
    return "a pipe or device" if path.exists() else "no such file"


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
