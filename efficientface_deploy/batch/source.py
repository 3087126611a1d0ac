"""What is to be annotated: a folder, a manifest or a Parquet file, in an order that stays."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientface_deploy.batch.parquet import find_column, read_column, write_paths
from efficientface_deploy.errors import DatasetError, printable, words_of
from efficientface_deploy.files import read_lines, require_file
from efficientface_deploy.vision.folder import find_images
from efficientface_deploy.vision.preprocess import ImageSource

COLUMNS = ("image", "bytes", "path", "file")  # of pictures, where --column names none

_GROUP = 1000  # paths that lie together in the list
_FOOTER = 1 << 16  # bytes; where a Parquet file says what it holds and where


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures in a fixed order, which any process can read a part of.

    Attributes:
        file: A Parquet file.
        column: Its column.
        bytes: Whether that holds the pictures themselves rather than paths.
        count: How many there are.
        digest: SHA-256 of all paths; of pictures in a Parquet file, of its size and its end, where
            it says what it holds.
    """

    file: Path
    column: str
    bytes: bool
    count: int
    digest: str

    def read(self, start: int, stop: int) -> Iterator[tuple[int, str, ImageSource]]:
        """Index, name and what :func:`load_image` takes, for a range of the pictures."""
        values = read_column(self.file, self.column, start, stop)
        for index, value in enumerate(values, start):
            if self.bytes:
                yield index, printable(f"{self.file}#{index}"), value or b""
            else:
                path = os.fsdecode(value)
                yield index, printable(path), path


def find_pictures(source: Path, column: str | None, list_file: Path) -> Pictures:
    """Find the pictures of a source.

    Args:
        source: A folder, whose pictures are taken in the order of their names; a manifest,
            ``*.csv``, or a Parquet file, both in the order of their rows.
        column: Name of the column of pictures; None for the first of :data:`COLUMNS`.
        list_file: Where the paths are written, so that nothing holds them in memory.

    Raises:
        DatasetError: It is something else, has no such column, or is empty.
        ImageError: A folder holds no pictures.
    """
    names = COLUMNS if column is None else (column,)
    digest = hashlib.sha256()
    paths: Iterator[bytes]
    if source.is_dir():
        paths = map(os.fsencode, find_images([str(source)]))
    elif source.suffix.lower() == ".csv":
        paths = _manifest_paths(source, names)
    elif source.suffix.lower() in (".parquet", ".pq"):
        own, holds_bytes, count = find_column(source, names)
        if holds_bytes:
            _check_count(source, count)
            return Pictures(source, own, True, count, _file_digest(source))
        paths = (_beside(source, value) for value in read_column(source, own))
    else:
        require_file(source, "a folder, a manifest or a Parquet file")
        expected = "a folder, a manifest (.csv) or a Parquet file (.parquet)"
        raise DatasetError(source, expected, "another kind of file", "give one of these")

    def hashed() -> Iterator[bytes]:
        for path in paths:
            digest.update(path + b"\0")
            yield path

    count = write_paths(list_file, hashed(), _GROUP)
    _check_count(source, count)
    return Pictures(list_file, "path", False, count, digest.hexdigest())


def _manifest_paths(manifest: Path, names: tuple[str, ...]) -> Iterator[bytes]:
    if not manifest.is_file():
        require_file(manifest, "a manifest")
    fix = "write it as UTF-8 with a line of column names"
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(read_lines(file))
            columns = reader.fieldnames or []
            name = next((name for name in names if name in columns), None)
            if name is None:
                found = ", ".join(columns)[:200] or "none"
                column_fix = "name it by --column"
                expected = f"a column {' or '.join(names)}"
                raise DatasetError(manifest, expected, found, column_fix)
            for row in reader:
                yield _beside(manifest, row[name])
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(manifest, "a manifest", words_of(error), fix) from None


def _beside(source: Path, value: Any) -> bytes:
    """A path of a manifest, which is relative to the manifest's folder; of none, that is empty."""
    return os.fsencode(source.parent / value) if value and "\0" not in value else b""


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _FOOTER))
        return hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()


def _check_count(source: Path, count: int) -> None:
    if not count:
        raise DatasetError(source, "pictures", "none", "give another source")
