"""What a folder holds: the one answer for labelling, calibrating and training.

Every picture that would be taken by itself is taken, by its suffix or by how its file begins; what
is no picture is named and counted; only what the system leaves behind is passed over in silence.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from efficientface_deploy.errors import ImageError, printable
from efficientface_deploy.files import find_files
from efficientface_deploy.vision.preprocess import picture_kind

STANDARD_INPUT = "-"

# Of pictures, also of such as cannot be read, for they are then refused by name.
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib"),
    *(".tif", ".tiff", ".gif", ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".psd"),
)
_NAMED = 5  # of the files that are no pictures


@dataclasses.dataclass(frozen=True)
class Content:
    """What lies below a folder, each list sorted.

    Attributes:
        pictures: Files that are pictures, or should be.
        closed: Folders that may not be read.
        others: Files that are no pictures.
    """

    pictures: list[Path]
    closed: list[Path]
    others: list[Path]


def read_folder(folder: Path, also: tuple[str, ...] = ()) -> Content:
    """Find the pictures below a folder; see :func:`find_files`.

    Args:
        folder: Where to search.
        also: Further suffixes that are wanted, such as a video's.
    """
    files, closed = find_files(folder)
    pictures: list[Path] = []
    others: list[Path] = []
    for path in files:
        wanted = is_picture(path) or path.name.lower().endswith(also)
        (pictures if wanted else others).append(path)
    return Content(pictures, closed, others)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its suffix or its first bytes, or cannot be looked at."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe may never end
            return False
        with path.open("rb") as file:
            return picture_kind(file.read(64)) is not None
    except OSError:
        return True


def find_images(names: Sequence[str], also: tuple[str, ...] = ()) -> Iterator[str]:
    """The files that names stand for; a folder stands for every picture below it, sorted.

    A folder that may not be read is given itself, for :func:`load_image` to refuse. What is no
    picture is said on standard error.

    Args:
        names: Files and folders.
        also: Further suffixes of files that are wanted of a folder, such as a video's.

    Raises:
        ImageError: A folder holds no pictures.
    """
    for name in names:
        if name == STANDARD_INPUT or not os.path.isdir(name):
            yield name
            continue
        content = read_folder(Path(name), also)
        others = [path.name for path in content.others]
        found = describe_files(others) if others else "none in this folder"
        if not content.pictures and not content.closed:
            raise ImageError(name, "pictures", found, "give another folder")
        if others:
            print(printable(f"note: left out of {name}: {found}"), file=sys.stderr)
        yield from map(str, (*content.pictures, *content.closed))


def describe_files(names: Sequence[str], what: str = "no known kind of picture") -> str:
    """``3 file(s), no known kind of picture: a.txt, b.csv, c``, for a message."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{len(names):,} file(s), {what}: {', '.join(names[:_NAMED])}{more}"
