"""Sources in folders and zips; the data sets' own tests try every layout."""

from __future__ import annotations

import zipfile

import pytest

from efficientface_deploy.errors import DatasetError
from training.datasets.archive import (
    children,
    describe_content,
    first_with,
    open_place,
    open_source,
    open_text,
    read,
)

FILES = {"set/train/0/b.jpg": b"b", "set/train/0/a.jpg": b"a", "set/.DS_Store": b"x"}


@pytest.fixture(params=["folder", "zip"])
def source(request, as_folder, as_zip, tmp_path):
    """The same files on disk and packed."""
    if request.param == "folder":
        return as_folder(tmp_path / "source", FILES)
    return as_zip(tmp_path / "source.zip", FILES)


def test_both_are_read_in_the_same_way(source):
    with open_source(source, ["train"], expected="train", fix="unpack it") as top:
        assert top.name == "set"
        images = children(top / "train" / "0")
        assert [image.name for image in images] == ["a.jpg", "b.jpg"]
        assert [read(image) for image in images] == [b"a", b"b"]
        assert read(top / "train" / "0" / "c.jpg") == b""  # missing
        assert describe_content(top) == "train"
        assert first_with([top / "test", top / "train/0"], ["b.jpg"]).name == "0"
        assert first_with([top], ["b.jpg"]) is None


def test_source_without_a_marker(source):
    with (
        pytest.raises(DatasetError, match="expected a test set, found set; unpack it"),
        open_source(source, ["test"], expected="a test set", fix="unpack it"),
    ):
        pass


def test_text_that_is_no_text(as_folder, tmp_path):
    folder = as_folder(tmp_path / "text", {"good": b"\xef\xbb\xbfone\n", "bad": b"\xff\xfe\n"})
    with open_text(folder / "good") as file:
        assert file.read() == "one\n"
    with (
        pytest.raises(DatasetError, match="expected text in UTF-8"),
        open_text(folder / "bad") as f,
    ):
        f.read()


def test_archive_with_a_password(as_zip, tmp_path):
    archive = as_zip(tmp_path / "set.zip", {"train/a.jpg": b"x"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # the flag of encryption in the member's header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    archive.write_bytes(data)
    with zipfile.ZipFile(archive) as found:
        assert found.infolist()[0].flag_bits & 1
    with pytest.raises(DatasetError, match="found a password; unpack it"), open_place(archive):
        pass
