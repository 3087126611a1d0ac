"""Folders to write to: one command at a time, nothing left half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import ConfigError, system_words
from efficientface_deploy.files import FULL, empty_folders_removed, make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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


@contextlib.contextmanager
def make_and_lock(path: Path, work: str, option: str = "--out") -> Iterator[None]:
    """Make a folder where it is missing and keep other commands of this kind out of it.

    A folder that was made here and is empty at the end goes again.

    Args:
        path: The folder.
        work: What is done in it, as one word, for messages.
        option: What names it, for messages.

    Raises:
        ConfigError: It cannot be made or written, or another process works in it.
        OSError: The disk is full.
    """
    with empty_folders_removed(path):
        make_folder(path, option)
        with lock_folder(path, work):
            yield


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A folder that one command works in; see :func:`open_workspace`.

    Attributes:
        path: The folder.
        scratch: A hidden folder in it. Files are made here, under their own names.
    """

    path: Path
    scratch: Path

    def publish(self, obsolete: Callable[[str], str] | None = None) -> None:
        """Move all files of ``scratch`` to their places, together; an interrupt waits for it.

        Where the process is killed meanwhile, no artifact is there without what belongs to it: its
        sidecar, report and reference, whose names are later in the alphabet, are moved before it.

        Args:
            obsolete: Of a file's name, that of the file which goes when this one comes.
        """
        with interrupts_wait():
            for file in sorted(self.scratch.iterdir(), reverse=True):
                os.replace(file, self.path / file.name)
                if obsolete is not None:
                    (self.path / obsolete(file.name)).unlink(missing_ok=True)


@contextlib.contextmanager
def open_workspace(path: Path, work: str, option: str = "--out") -> Iterator[Workspace]:
    """Claim a folder, with a hidden one in it to make files in.

    Whatever ends the block, what was not published is gone afterwards. What a command that was
    killed has left is cleared away first.

    Args:
        path: The folder.
        work: What is done in it, as one word: of its messages and of the hidden folder's name.
        option: What names it, for messages.

    Raises:
        ConfigError: It cannot be made or written, another process works in it, or the disk is
            full.
    """
    scratch = path / f".efficientface-{work}"
    try:
        with make_and_lock(path, work, option):
            spare = os.open(os.devnull, os.O_RDONLY)  # a descriptor for the end, if none is left
            try:
                _remove(scratch)
                scratch.mkdir()
                yield Workspace(path, scratch)
            finally:
                os.close(spare)
                with interrupts_wait():
                    _remove(scratch)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            error.filename or path,
            "space for what is written",
            system_words(error),
            f"free some on that disk, or choose another {option}",
        ) from None


def _remove(folder: Path) -> None:
    """Remove a folder as far as that goes, with one descriptor, where shutil.rmtree needs more."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(place, name))
        with contextlib.suppress(OSError):
            os.rmdir(place)
