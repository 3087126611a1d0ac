"""Folders to write to: refused early, used by one job at a time, not left behind empty."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import ConfigError, system_words

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What the system says when a file cannot be written for want of space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_held: set[int] = set()


def _close_inherited() -> None:
    """A forked worker that outlives its parent must not hold the parent's lock."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextlib.contextmanager
def lock_folder(path: Path, work: str) -> Iterator[None]:
    """Hold a folder's lock, which the system frees even when the process is killed.

    The folder itself is locked, so that no file is needed. Where the system or the file system
    has no such locks (Windows, some network shares), there is none.

    Args:
        path: The folder.
        work: What is done in it, as one word, for messages.

    Raises:
        ConfigError: Another process holds it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                path,
                f"no other {work} at work in this folder",
                "one",
                "wait for its end, or choose another --out",
            ) from None
        except OSError as error:
            reason = system_words(error)
            print(f"note: {path} cannot be locked ({reason}); run one {work} at a time")
        yield
    finally:
        if handle in _held:  # not in a child, which has closed it
            _held.remove(handle)
            os.close(handle)


def make_folder(path: Path, option: str = "--out") -> None:
    """Make a folder where it is missing, and see that files can be made in it.

    Args:
        path: The folder.
        option: What names it, for messages.

    Raises:
        ConfigError: The system refuses.
        OSError: The disk is full.
    """
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
