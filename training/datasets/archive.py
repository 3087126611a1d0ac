"""A data set's original files, in a folder or in a zip archive, read in the same way."""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Union

from efficientface_deploy.errors import DatasetError, ImageError, system_words
from efficientface_deploy.files import is_left_behind, read_lines, why_not_a_file
from efficientface_deploy.vision.preprocess import MAX_BYTES

Place = Union[Path, zipfile.Path]
"""A file or a folder, on disk or inside an archive."""

_UTF8 = 0x800  # the flag of a member whose name is UTF-8
_WRAPPINGS = 2  # folders that people and archives put around a data set
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
# A path that leads nowhere. The archives' own errors have no number, but for EINVAL: a member at a
# place before the archive's begin.
_NO_FILE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error),
    *(NotImplementedError, RuntimeError),  # a way of packing, or a password, of the member alone
)


@contextlib.contextmanager
def open_source(path: Path, markers: Sequence[str], *, expected: str, fix: str) -> Iterator[Place]:
    """Open the folder or zip that ``--source`` names, at the data set's own top.

    Args:
        path: A folder or a zip archive; the data set may lie in a folder or two inside it.
        markers: Relative paths, one of which every such data set has.
        expected: What the markers stand for, for the error.
        fix: How to come by such a data set, for the error.

    Yields:
        The folder that holds a marker.

    Raises:
        DatasetError: ``path`` cannot be read, holds no marker, or holds several data sets.
    """
    with open_place(path) as place:
        tops = _find_tops(place, markers)
        if not tops:
            raise DatasetError(path, expected, describe_content(place), fix)
        if len(tops) > 1:
            found = f"{len(tops)}: " + ", ".join(top.name for top in tops)
            raise DatasetError(path, "one data set", found, "give one of them as --source")
        yield tops[0]


@contextlib.contextmanager
def open_place(path: Path) -> Iterator[Place]:
    """Open a folder or a zip archive.

    Raises:
        DatasetError: It is neither, or an archive that needs a password or another program.
    """
    if is_folder(path):
        yield path
        return
    try:
        if (found := why_not_a_file(path)) is None:
            archive = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        found = (getattr(error, "strerror", None) or "something else").lower()
    if found is not None:
        raise DatasetError(path, "a folder or a zip archive", found, "check --source") from None
    with archive:
        members = archive.infolist()
        _name_members(path, archive)
        encrypted = any(member.flag_bits & 0x1 for member in members)
        if encrypted or any(member.compress_type not in _METHODS for member in members):
            wanted = "a zip archive without a password, packed in a usual way"
            found = "a password" if encrypted else "another way of packing"
            raise DatasetError(path, wanted, found, "unpack it and give the folder")
        yield zipfile.Path(archive)


def _name_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Give an archive's files the names that their makers meant, in NFC.

    Python reads every name without the flag of UTF-8 as DOS's code page 437. Many programs write
    UTF-8 without that flag, old ones of Windows backslashes between folders, and macOS accents as
    characters of their own (NFD), which would be other names than those that people type.

    Raises:
        DatasetError: A folder, which may be a class, has a name in a code page that is not said.
    """
    names = {member: member.filename for member in archive.infolist()}
    foreign = [
        member
        for member, name in names.items()
        if not (member.flag_bits & _UTF8 or name.isascii() or name != member.orig_filename)
    ]
    with contextlib.suppress(UnicodeError):  # in another code page, which nothing names
        names |= {member: member.filename.encode("cp437").decode() for member in foreign}
        foreign = []
    if folders := [
        one.filename for one in foreign if not one.filename.rpartition("/")[0].isascii()
    ]:
        fix = "unpack it with a program that shows them as they should be, and give the folder"
        raise DatasetError(path, "names of folders in UTF-8", folders[0], fix)
    if not any("/" in name for name in names.values()):
        names = {member: name.replace("\\", "/") for member, name in names.items()}
    composed = {member: unicodedata.normalize("NFC", name) for member, name in names.items()}
    if len(set(composed.values())) == len(set(names.values())):  # else two would become one
        names = composed
    archive.NameToInfo.clear()
    for member, name in names.items():
        member.filename = name
        archive.NameToInfo[name] = member


def read(place: Place) -> bytes:
    """Content of a picture's file; empty when it is missing, or damaged in its archive.

    Raises:
        ImageError: It would never end, or is larger than any picture.
        OSError: The system refuses.
    """
    try:
        _check_file(place)
        return place.read_bytes()
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    except _DAMAGED:
        pass
    return b""


def _check_file(place: Place) -> None:
    if isinstance(place, Path):
        status = place.stat()
        size = status.st_size
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ImageError(place.name, "an image", "a pipe or device", "remove it")
    else:
        member = place.root.NameToInfo.get(place.at)
        size = member.file_size if member else 0
    if size > MAX_BYTES:
        found, fix = f"{size // 1_000_000} MB", "shrink it first"
        raise ImageError(place.name, f"at most {MAX_BYTES // 1_000_000} MB", found, fix)


@contextlib.contextmanager
def open_text(place: Place) -> Iterator[Iterator[str]]:
    """The lines of a text file, with or without a byte-order mark; see :func:`read_lines`.

    Raises:
        DatasetError: While it is read: it is damaged, or no UTF-8.
    """
    try:
        with place.open("r", encoding="utf-8-sig", newline="") as file:
            yield read_lines(file)
    except (UnicodeError, OSError, *_DAMAGED) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        found = f"something else ({error})"
        fix = "take it from the data set unchanged"
        raise DatasetError(place, "text in UTF-8", found, fix) from None


def children(folder: Place) -> list[Place]:
    """What a folder holds, by name, without what the system leaves there.

    Raises:
        DatasetError: It may not be read.
    """
    try:
        visible = [child for child in folder.iterdir() if not is_left_behind(child.name)]
    except OSError as error:
        fix = "check its permissions"
        raise DatasetError(folder, "a folder", system_words(error), fix) from None
    return sorted(visible, key=lambda child: child.name)


def folders(folder: Place) -> list[Place]:
    """The folders inside a folder, by name, without hidden ones, which are tools' own."""
    visible = (child for child in children(folder) if not child.name.startswith("."))
    return [child for child in visible if is_folder(child)]


def is_folder(place: Place) -> bool:
    """Whether a folder is there; not, where the system does not let us see it."""
    return os.path.isdir(place) if isinstance(place, Path) else place.is_dir()


def first_with(candidates: Iterable[Place], names: Sequence[str]) -> Place | None:
    """The first folder that holds any of the files, or None."""
    for folder in candidates:
        if is_folder(folder) and any((folder / name).is_file() for name in names):
            return folder
    return None


def describe_content(folder: Place) -> str:
    """What a folder holds instead of what was expected, for an error."""
    names = [child.name for child in children(folder)]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return shown or "an empty folder"


def _find_tops(place: Place, markers: Sequence[str]) -> list[Place]:
    """The outermost folders that hold a marker."""
    level = [place]
    for _ in range(_WRAPPINGS + 1):
        tops: list[Place] = []
        below: list[Place] = []
        for folder in level:
            with contextlib.suppress(PermissionError, DatasetError):  # closed, beside the data set
                if any((folder / marker).exists() for marker in markers):
                    tops.append(folder)
                else:
                    below += folders(folder)
        if tops:
            return tops
        level = below
    return []
