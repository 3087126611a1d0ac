"""Parquet files: the only module that knows pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from efficientface_deploy.errors import DatasetError, words_of
from efficientface_deploy.files import atomic_path, require_file

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:  # the command says so when it has shown its --help
    pa = pq = None

_READ_AT_ONCE = 64  # rows, of which each may be a picture of some megabytes
_BUFFER = 1 << 20  # bytes; by itself pyarrow reads a row group's column as a whole

# What says of the file what it is: see write_rows.
_MARK = b"efficientface."


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged file does to pyarrow into one line; names and texts may be no UTF-8."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(path, "a Parquet file", words_of(error), "write it again") from None


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        require_file(path, "a Parquet file")  # says what is there instead
    with _damage_named(path):
        return pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)


def find_column(path: Path, names: Sequence[str]) -> tuple[str, bool, int]:
    """The column of pictures: its name, whether it holds bytes rather than paths, its rows.

    A column of structures with a field ``bytes``, as the package ``datasets`` writes pictures, is
    given as ``image.bytes``.

    Args:
        path: The file.
        names: Columns that may be it, the first first.

    Raises:
        DatasetError: There is no such column, or it holds neither text nor bytes.
    """
    with _open(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    with _damage_named(path):
        found_names = schema.names
    name = next((name for name in names if name in found_names), None)
    if name is None:
        found, fix = ", ".join(found_names) or "none", "name it by --column"
        raise DatasetError(path, f"a column {' or '.join(names)}", found, fix)
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes", True, rows
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return name, True, rows
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return name, False, rows
    fix = "name another by --column"
    raise DatasetError(path, f"paths or bytes in the column {name}", str(kind), fix)


def read_column(path: Path, column: str, start: int = 0, stop: int | None = None) -> Iterator[Any]:
    """Values of a column, from one row to before another; only the row groups that hold them.

    Raises:
        DatasetError: The file is damaged.
    """
    with _open(path) as file:
        at, skip = 0, 0
        groups: list[int] = []
        for number in range(file.num_row_groups):
            end = at + file.metadata.row_group(number).num_rows
            if start < end and (stop is None or at < stop):
                skip = start - at if not groups else skip
                groups.append(number)
            at = end
        values = _values(file, column, groups)
        wanted = islice(values, skip, None if stop is None else skip + stop - start)
        with _damage_named(path):
            yield from wanted


def _values(file: pq.ParquetFile, column: str, groups: list[int]) -> Iterator[Any]:
    for batch in file.iter_batches(_READ_AT_ONCE, row_groups=groups, columns=[column]):
        for value in batch.column(0):
            found = value.as_py()
            yield found.get("bytes") if isinstance(found, dict) else found


def write_paths(path: Path, paths: Iterable[bytes], group: int) -> int:
    """Write paths, as the system has them, in row groups of one size; gives their count."""
    schema, count, paths = pa.schema({"path": pa.binary()}), 0, iter(paths)
    with pq.ParquetWriter(path, schema) as writer:
        while part := list(islice(paths, group)):
            writer.write_table(pa.table({"path": part}, schema), row_group_size=group)
            count += len(part)
    return count


def face_schema(labels: Sequence[str]) -> pa.Schema:
    """The columns of what is written, for a model's labels."""
    whole, number = pa.int32(), pa.float32()
    return pa.schema(
        {
            **{"picture": pa.int64(), "path": pa.string(), "width": whole, "height": whole},
            **{"face": whole, "left": number, "top": number, "right": number, "bottom": number},
            **{"score": number, "small": pa.bool_(), "label": pa.string(), "unsure": pa.bool_()},
            **{f"p_{label}": number for label in labels},
            **{"track": whole, "error": pa.string()},
            "model": pa.dictionary(whole, pa.string()),
        }
    )


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, marks: Mapping[str, str]
) -> None:
    """Write rows, so that the file is there as a whole or not at all.

    Args:
        path: The file; it is made beside, under a name that nothing reads.
        rows: Column -> value; what is missing is null.
        schema: The columns.
        marks: Kept in the file's metadata, see :func:`read_marks`.

    Raises:
        OSError: The disk is full, above all.
    """
    metadata = {_MARK + key.encode(): value.encode() for key, value in marks.items()}
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema.with_metadata(metadata))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_marks(path: Path) -> dict[str, str]:
    """What :func:`write_rows` was given to keep; empty of a file that is damaged or another's."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError):
        return {}
    return {
        key[len(_MARK) :].decode(): value.decode()
        for key, value in metadata.items()
        if key.startswith(_MARK)
    }
