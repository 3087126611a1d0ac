"""Parquet in and out: columns found, ranges read, files whole or not there."""

from __future__ import annotations

import os

import pytest

from efficientface_deploy.errors import DatasetError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from efficientface_deploy.batch import parquet  # noqa: E402 - pyarrow may be missing


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"path": ["a"]}, ("path", False, 1)),
        ({"path": pa.array(["a", "b"], pa.large_string())}, ("path", False, 2)),
        ({"path": ["a"], "bytes": [b"\xff"]}, ("bytes", True, 1)),
        ({"image": [{"bytes": b"\xff", "path": "a"}]}, ("image.bytes", True, 1)),
    ],
)
def test_the_column_of_pictures(columns, found, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert parquet.find_column(tmp_path / "a.parquet", ("image", "bytes", "path")) == found


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"name": ["a"]}, "expected a column path, found name; name it by --column"),
        ({"path": [1]}, "expected paths or bytes in the column path, found int64"),
    ],
)
def test_a_column_of_something_else_is_refused(columns, words, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=words):
        parquet.find_column(tmp_path / "a.parquet", ("path",))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, None), (95, 305), (100, 200), (999, 1000)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_range_is_read_from_its_row_groups(start, stop, nested, tmp_path):
    values = [f"{number}".encode() for number in range(1000)]
    column = {"image": [{"bytes": value} for value in values]} if nested else {"image": values}
    pq.write_table(pa.table(column), tmp_path / "a.parquet", row_group_size=100)
    name = "image.bytes" if nested else "image"
    assert (
        list(parquet.read_column(tmp_path / "a.parquet", name, start, stop)) == values[start:stop]
    )


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "folder"])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    path = tmp_path / "a.parquet"
    if damage == "cut":
        pq.write_table(pa.table({"path": ["a" * 100]}), path)
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "text":
        path.write_text("path\na.jpg\n")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(Exception, match="expected a Parquet file, found ") as caught:
        parquet.find_column(path, ("path",))
    assert "\n" not in str(caught.value)


def test_rows_come_back_with_their_marks(tmp_path):
    path = tmp_path / "part.parquet"
    schema = parquet.face_schema(["Happy"])
    parquet.write_rows(path, [{"picture": 3, "p_Happy": 0.5, "model": "ab"}], schema, {"job": "{}"})
    (row,) = pq.read_table(path).to_pylist()
    assert (row["picture"], row["p_Happy"], row["model"], row["error"]) == (3, 0.5, "ab", None)
    assert parquet.read_marks(path) == {"job": "{}"}
    path.write_bytes(path.read_bytes()[:-9])
    assert parquet.read_marks(path) == {}


def test_nothing_is_left_of_rows_that_could_not_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        parquet.write_rows(tmp_path / "part.parquet", [], parquet.face_schema(["Happy"]), {})
    assert not list(tmp_path.iterdir())


def test_text_that_is_no_utf8_is_one_line(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"path": texts}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="expected a Parquet file, found 'utf-8' codec"):
        list(parquet.read_column(tmp_path / "a.parquet", "path"))


def test_name_of_a_column_that_is_no_utf8_is_one_line(tmp_path):
    pq.write_table(pa.table({"pathe": ["a"]}), tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"pathe", b"path\xff"))
    with pytest.raises(DatasetError, match="expected a Parquet file, found 'utf-8' codec"):
        parquet.find_column(tmp_path / "a.parquet", ["path"])
