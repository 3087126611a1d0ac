from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from efficientface_deploy.errors import ImageError
from efficientface_deploy.vision.folder import describe_files, find_images, is_picture, read_folder
from efficientface_deploy.vision.preprocess import load_image

LEFT_BEHIND = ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r", "__MACOSX/b.jpg")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    """Make files below a folder: name to content."""

    def make(files: dict[str, bytes]) -> Path:
        for name, data in files.items():
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "photos"

    return make


def names(paths) -> list[str]:
    return [Path(path).name for path in paths]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.jpg", "JPEG"), ("a.JPE", "JPEG"), ("a.jfif", "JPEG"), ("a.png", "PNG")),
        *(("a.tif", "TIFF"), ("a.TIFF", "TIFF"), ("a.gif", "GIF"), ("a.webp", "WEBP")),
        *(("a.bmp", "BMP"), ("a", "JPEG"), ("a.jpg_large", "JPEG"), ("photo.2024", "WEBP")),
        *(("a.dat", "BMP"), ("no suffix", "TIFF"), (".hidden.jpg", "JPEG")),
    ],
)
def test_folder_takes_what_a_file_alone_would_be_taken_as(write, name, kind):
    folder = write({name: encoded(kind)})
    assert load_image(folder / name).size == (8, 8)
    assert names(find_images([str(folder)])) == [name]


def test_only_what_the_system_leaves_behind_is_passed_over_in_silence(write, capsys):
    folder = write(dict.fromkeys(LEFT_BEHIND, b"x") | {"b.jpg": encoded("JPEG")})
    assert names(find_images([str(folder)])) == ["b.jpg"]
    assert capsys.readouterr().err == ""


def test_what_is_no_picture_is_named_and_counted(write, capsys):
    files = dict.fromkeys((f"{n}.txt" for n in range(7)), b"text") | {"b.jpg": encoded("JPEG")}
    folder = write(files | {"BMW.csv": b"BMW,1\n", "empty": b"", "c\nd.txt": b"x"})
    assert names(find_images([str(folder)])) == ["b.jpg"]
    err = capsys.readouterr().err
    assert err == (
        f"note: left out of {folder}: 10 file(s), no known kind of picture: "
        "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 5 more\n"
    )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)),
        ("IMG_1", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99)),
        ("a.jpg", b""),
        ("a.png", b"no picture"),
        ("a.jxl", b"\xff\x0a" + bytes(99)),
        ("b", b"8BPS" + bytes(99)),
    ],
)
def test_picture_that_cannot_be_read_is_given_to_be_refused(write, name, data):
    folder = write({name: data, "b.jpg": encoded("JPEG")})
    assert name in names(find_images([str(folder)]))
    with pytest.raises(ImageError, match=name):
        load_image(folder / name)


def test_videos_are_taken_where_they_are_wanted(write, capsys):
    clip = b"\0\0\0\x18ftypisom\0\0\0\0mp42isom" + bytes(99)
    folder = write({"b.jpg": encoded("JPEG"), "clip.MP4": clip})
    assert names(find_images([str(folder)], (".mp4",))) == ["b.jpg", "clip.MP4"]
    assert capsys.readouterr().err == ""
    assert names(find_images([str(folder)])) == ["b.jpg"]
    assert "clip.MP4" in capsys.readouterr().err


@pytest.mark.timeout(30)
def test_pipes_are_not_opened(write, capsys):
    folder = write({"b.jpg": encoded("JPEG")})
    os.mkfifo(folder / "pipe")
    assert names(find_images([str(folder)])) == ["b.jpg"]
    assert "1 file(s), no known kind of picture: pipe" in capsys.readouterr().err


def test_file_and_folder_that_may_not_be_read_are_given(write, monkeypatch):
    folder = write({"a/1.jpg": b"x", "closed/1.jpg": b"x", "secret": b"x"})
    scandir, path_open = os.scandir, Path.open

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def refuse_file(path, *mode):
        if path.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, *mode)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(Path, "open", refuse_file)
    assert names(find_images([str(folder)])) == ["1.jpg", "secret", "closed"]
    assert read_folder(folder).closed == [folder / "closed"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({".DS_Store": b"x"}, "none in this folder"),
        (
            {"a.txt": b"x", "b.txt": b"x"},
            r"2 file\(s\), no known kind of picture: a.txt, b.txt; give another",
        ),
    ],
)
def test_folder_without_pictures(write, files, found, capsys):
    folder = write(files)
    with pytest.raises(ImageError, match=f"expected pictures, found {found}"):
        list(find_images([str(folder)]))
    assert capsys.readouterr().err == ""


def test_what_is_no_folder_is_passed_on(tmp_path):
    given = ["-", "camera", str(tmp_path / "missing.jpg")]
    assert list(find_images(given)) == given


def test_is_picture(tmp_path):
    assert is_picture(tmp_path / "missing.jpg")
    assert is_picture(tmp_path / "missing")  # what cannot be looked at is not passed over
    assert not is_picture(tmp_path)


def test_describe_files():
    assert describe_files(["a"]) == "1 file(s), no known kind of picture: a"
    assert describe_files(list("abcdef"), "in no class") == (
        "6 file(s), in no class: a, b, c, d, e and 1 more"
    )
