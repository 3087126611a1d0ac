"""The output folder: one export at a time, and everything in it whole."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import ExportError, system_words
from efficientface_deploy.workbench.workspace import (
    FULL,
    empty_folders_removed,
    lock_folder,
    make_folder,
)

SCRATCH = ".efficientface-export"


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """A folder that one export works in; see :func:`open_folder`.

    Attributes:
        path: The folder.
        scratch: A hidden folder in it. Files are made here, under their own names.
    """

    path: Path
    scratch: Path

    def publish(self) -> None:
        """Move all files of ``scratch`` to their places, together; an interrupt waits for it.

        A file's failed predecessor goes.
        """
        with interrupts_wait():
            for file in sorted(self.scratch.iterdir()):
                os.replace(file, self.path / file.name)
                (self.path / failed_name(file.name)).unlink(missing_ok=True)


def failed_name(name: str) -> str:
    """``efficientface-int8-gpu.rtx.engine`` -> ``efficientface-int8-gpu.failed.rtx.engine``."""
    return name.replace(".", ".failed.", 1)


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[OutputFolder]:
    """Make a folder where it is missing, and keep other exports out of it.

    Whatever ends the block, what was not published is gone afterwards, and so is the folder if it
    was made here and is empty. What an export that was killed has left is cleared away first.

    Args:
        path: The folder.

    Raises:
        ConfigError: It cannot be made or written, or another export works in it.
        ExportError: The disk is full.
    """
    scratch = path / SCRATCH
    with empty_folders_removed(path):
        try:
            make_folder(path)
            with lock_folder(path, "export"):
                try:
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir()
                    yield OutputFolder(path, scratch)
                finally:
                    with interrupts_wait():
                        shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ExportError(
                error.filename or path,
                "space for what is written",
                system_words(error),
                "free some on that disk, or choose another --out",
            ) from None
