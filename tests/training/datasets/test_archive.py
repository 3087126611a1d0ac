"""Sources in folders and zips; the data sets' own tests try every layout."""

from __future__ import annotations

import contextlib
import os
import unicodedata
import zipfile
from pathlib import Path

import pytest

from efficientface_deploy.errors import DatasetError, ImageError
from training.datasets import archive as archive_module
from training.datasets.archive import (
    children,
    describe_content,
    first_with,
    folders,
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


@pytest.mark.timeout(30)
def test_what_never_ends_or_is_too_large_is_not_read(as_zip, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r"pipe.jpg: expected an image, found a pipe or device"):
        read(tmp_path / "pipe.jpg")
    with (tmp_path / "big.jpg").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ImageError, match=r"big.jpg: expected at most 715 MB, found 3221 MB"):
        read(tmp_path / "big.jpg")
    monkeypatch.setattr(archive_module, "MAX_BYTES", 10)
    with open_place(as_zip(tmp_path / "set.zip", {"big.jpg": b"x" * 11, "a.jpg": b"a"})) as top:
        assert read(top / "a.jpg") == b"a" and read(top / "b.jpg") == b""
        with pytest.raises(ImageError, match=r"big.jpg: expected at most"):
            read(top / "big.jpg")


def test_source_without_a_marker(source):
    with (
        pytest.raises(DatasetError, match="expected a test set, found set; unpack it"),
        open_source(source, ["test"], expected="a test set", fix="unpack it"),
    ):
        pass


@pytest.mark.parametrize("bad", [b"\xff\xfe\n", bytes(2_000_000)], ids=["no UTF-8", "one line"])
def test_text_that_is_no_text(bad, as_folder, tmp_path):
    folder = as_folder(tmp_path / "text", {"good": b"\xef\xbb\xbfone\n", "bad": bad})
    with open_text(folder / "good") as file:
        assert list(file) == ["one\n"]
    with (
        pytest.raises(DatasetError, match="expected text in UTF-8"),
        open_text(folder / "bad") as f,
    ):
        list(f)


NAMES = ["train/müde/a.jpg", "train/müde/b.jpg", "test/müde/c.jpg"]


def write_zip(path, names, encoding, flag=0):
    """A zip as other programs write it: each name in an encoding, with or without UTF-8's flag."""

    class Member(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802 - zipfile's
            return self.meant.encode(encoding), flag

    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            member = Member(name)
            member.meant = name
            archive.writestr(member, name.encode())
    return path


@pytest.mark.parametrize(
    ("form", "encoding", "flag"),
    [
        ("NFC", "utf-8", 0x800),
        ("NFC", "utf-8", 0),  # many programs forget the flag
        ("NFD", "utf-8", 0x800),  # macOS
        ("NFD", "utf-8", 0),
    ],
)
def test_names_in_a_zip_are_those_that_people_type(form, encoding, flag, tmp_path):
    names = [unicodedata.normalize(form, name) for name in NAMES]
    archive = write_zip(tmp_path / "set.zip", names, encoding, flag)
    with open_source(archive, ["train"], expected="train", fix="unpack it") as top:
        found = [place for split in folders(top) for place in children(split / "müde")]
        assert [place.name for place in found] == ["c.jpg", "a.jpg", "b.jpg"]
        assert [read(place) for place in found] == [names[at].encode() for at in (2, 0, 1)]


@pytest.mark.parametrize("encoding", ["cp850", "cp1252", "latin-1"])
def test_folder_named_in_another_code_page_is_refused(encoding, tmp_path):
    archive = write_zip(tmp_path / "set.zip", NAMES, encoding)
    with (
        pytest.raises(DatasetError, match=r"set.zip: expected names of folders in UTF-8, found tr"),
        open_place(archive),
    ):
        pass


def test_file_named_in_another_code_page_is_read(tmp_path):
    archive = write_zip(tmp_path / "set.zip", ["train/0/grün.jpg"], "cp1252")
    with open_place(archive) as top:
        (image,) = children(top / "train/0")
        assert read(image) == "train/0/grün.jpg".encode()


def test_backslashes_of_old_windows_programs(tmp_path):
    archive = write_zip(tmp_path / "set.zip", ["train\\0\\a.jpg", "train\\0\\b.jpg"], "ascii")
    with open_source(archive, ["train"], expected="train", fix="unpack it") as top:
        assert [read(image) for image in children(top / "train/0")] == [
            b"train\\0\\a.jpg",
            b"train\\0\\b.jpg",
        ]


def test_names_that_would_become_one_stay_two(tmp_path):
    names = [unicodedata.normalize(form, "train/0/ü.jpg") for form in ("NFC", "NFD")]
    archive = write_zip(tmp_path / "set.zip", names, "utf-8", 0x800)
    with open_place(archive) as top:
        assert sorted(map(read, children(top / "train/0"))) == sorted(map(str.encode, names))


def test_closed_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(DatasetError, match="expected a folder, found permission denied; check its"):
        children(tmp_path)


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


def test_a_list_of_files_that_is_no_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("é.jpg", b"x")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace("é".encode(), b"\xff\xfe"))
    with (
        pytest.raises(DatasetError, match="expected a folder or a zip archive"),
        open_place(tmp_path / "a.zip"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a system without devices")
def test_a_device_without_end_is_no_archive(tmp_path):
    (tmp_path / "a.zip").symlink_to("/dev/zero")
    with (
        pytest.raises(DatasetError, match="found a pipe or device"),
        open_place(tmp_path / "a.zip"),
    ):
        pass


def forge(path, at, value):
    """An archive of one text, with another number at a place of its list of files."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"x" * 100)
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02") + at
    content[start : start + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value"),
    [(42, b"\xf0\xff\xff\x0f"), (42, b"\x80\0\0\0"), (16, b"\1\2\3\4"), (24, b"\xff\xff\xff\x1f")],
    ids=["begins behind the end", "begins at the end", "checksum", "size"],
)
def test_a_list_of_files_that_lies(at, value, tmp_path):
    forge(tmp_path / "a.zip", at, value)
    with open_place(tmp_path / "a.zip") as place:
        assert read(place / "a.txt") in (b"", b"x" * 100)
        with contextlib.suppress(DatasetError), open_text(place / "a.txt") as lines:
            assert list(lines) == ["x" * 100]


def test_an_archive_whose_begin_is_cut_off(tmp_path):
    forge(tmp_path / "a.zip", 0, b"PK")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content[60:])
    with open_place(tmp_path / "a.zip") as place:
        assert read(place / "a.txt") == b""
        with (
            pytest.raises(DatasetError, match="expected text in UTF-8, found something else"),
            open_text(place / "a.txt") as lines,
        ):
            list(lines)
