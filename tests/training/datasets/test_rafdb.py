from __future__ import annotations

import zipfile

import pytest

from efficientface_deploy.spec import preset
from training import prepare
from training.datasets import rafdb as rafdb_source
from training.datasets.rafdb import RAFDB_COUNTS

# The official numbers, typed a second time: mixing them up is the best-known way to 10 %.
OFFICIAL = {
    1: "Surprise",
    2: "Fear",
    3: "Disgust",
    4: "Happiness",
    5: "Sadness",
    6: "Anger",
    7: "Neutral",
}
LIST = "EmoLabel/list_patition_label.txt"


@pytest.fixture
def native(picture):
    """RAF-DB in its official layout: two training images and a test image of each class."""
    lines, files = [], {}
    for index in range(1, 15):
        lines.append(f"train_{index:05d}.jpg {(index - 1) % 7 + 1}")
        files[f"Image/aligned/train_{index:05d}_aligned.jpg"] = picture(index)
    for index in range(1, 8):
        lines.append(f"test_{index:04d}.jpg {8 - index}")
        files[f"Image/aligned/test_{index:04d}_aligned.jpg"] = picture(100 + index)
    return {LIST: "\n".join(lines).encode() + b"\n", **files}


def test_labels_by_name(native, lay_out, prepared, labelled, capsys):
    dataset = prepared("rafdb", lay_out(native))
    assert dataset.labels == preset("rafdb").labels and dataset.preset == "rafdb"
    assert labelled(dataset, "train") == {
        f"train_{index:05d}_aligned.jpg": OFFICIAL[(index - 1) % 7 + 1] for index in range(1, 15)
    }
    assert labelled(dataset, "test") == {
        f"test_{index:04d}_aligned.jpg": OFFICIAL[8 - index] for index in range(1, 8)
    }
    assert not dataset.samples["validation"]
    output = capsys.readouterr()
    assert output.err == ""
    assert "train: 14 (Neutral 2, Happiness 2, Sadness 2, " in output.out
    assert "train: 14 images, published: 12,271 (Surprise 2, published: 1,290; " in output.out
    assert "test: 7 images, published: 3,068 (" in output.out


def test_images_are_kept_byte_for_byte(native, as_folder, prepared, tmp_path):
    dataset = prepared("rafdb", as_folder(tmp_path / "basic", native))
    for sample in (*dataset.split("train"), *dataset.split("test")):
        assert sample.path.read_bytes() == native[f"Image/aligned/{sample.path.name}"]


@pytest.mark.parametrize("inside", ["", "aligned/", "Image/aligned/"])
def test_images_still_zipped(inside, native, as_folder, as_zip, prepared, tmp_path):
    source = as_folder(tmp_path / "basic", {LIST: native.pop(LIST)})
    members = {inside + name.rpartition("/")[2]: data for name, data in native.items()}
    as_zip(source / "Image/aligned.zip", members)
    dataset = prepared("rafdb", source)
    assert len(dataset.split("train")) == 14 and len(dataset.split("test")) == 7
    sample = dataset.split("test")[0]
    assert sample.path.read_bytes() == native[f"Image/aligned/{sample.path.name}"]


def test_images_in_a_folder_too_deep(native, as_folder, prepared, tmp_path):
    files = {name.replace("aligned/", "aligned/aligned/"): data for name, data in native.items()}
    assert len(prepared("rafdb", as_folder(tmp_path / "basic", files)).split("train")) == 14


def test_published_counts(native, as_folder, prepared, monkeypatch, tmp_path, capsys):
    assert {split: sum(counts) for split, counts in RAFDB_COUNTS.items()} == {
        "train": 12_271,
        "test": 3_068,
    }
    monkeypatch.setattr(rafdb_source, "RAFDB_COUNTS", {"train": (2,) * 7, "test": (1,) * 7})
    prepared("rafdb", as_folder(tmp_path / "basic", native))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "  train: 14 images, as published",
        "  test: 7 images, as published",
    ]


def test_damaged_and_missing_images_are_left_out(native, lay_out, prepared, capsys):
    damaged, missing = "train_00001_aligned.jpg", "train_00002_aligned.jpg"
    native[f"Image/aligned/{damaged}"] = native[f"Image/aligned/{damaged}"][:300]
    del native[f"Image/aligned/{missing}"]
    dataset = prepared("rafdb", lay_out(native))
    assert not {damaged, missing} & {sample.path.name for sample in dataset.split("train")}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"left out {damaged} (train, Surprise): a damaged one (")
    assert lines[1] == f"left out {missing} (train, Fear): a missing or empty file"
    assert lines[2] == "left out 2 images in all"


def test_image_listed_twice_is_taken_once(native, as_folder, prepared, tmp_path, capsys):
    native[LIST] += b"train_00001.jpg 1\n"
    assert len(prepared("rafdb", as_folder(tmp_path / "basic", native)).split("train")) == 14
    assert (
        "train_00001_aligned.jpg (train, Surprise): a second image of this name"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "line",
    [
        "train_00015.jpg 0",
        "train_00015.jpg 8",
        "train_00015.jpg -1",
        "train_00015.jpg x",
        "train_00015.jpg 1.0",
        "train_00015.jpg",
        "train_00015.jpg 1 2",
        "valid_00015.jpg 1",
        "../train_00015.jpg 1",
        "train_00015.png 1",
        "train_\N{ARABIC-INDIC DIGIT ONE}.jpg 1",
    ],
)
def test_lines_that_are_not_rafdb(line, native, as_folder, refusal, tmp_path):
    native[LIST] = f"{native[LIST].decode()}\n{line}\n".encode()
    error = refusal("rafdb", as_folder(tmp_path / "basic", native))
    assert "list_patition_label.txt line 23: expected a line like train_00001.jpg 5" in error
    assert f"found {line}; " in error


@pytest.mark.parametrize("text", [b"", b"\n\n", b"train_00001.jpg \xff\xfe\n"])
def test_files_that_are_no_list(text, native, as_folder, refusal, tmp_path):
    native[LIST] = text
    assert "list_patition_label.txt: expected " in refusal(
        "rafdb", as_folder(tmp_path / "basic", native)
    )


def test_list_with_windows_line_ends_and_a_byte_order_mark(native, as_folder, prepared, tmp_path):
    native[LIST] = b"\xef\xbb\xbf" + native[LIST].replace(b"\n", b"\r\n")
    assert len(prepared("rafdb", as_folder(tmp_path / "basic", native)).split("train")) == 14


def test_class_without_an_image(native, as_folder, refusal, tmp_path):
    kept = [line for line in native[LIST].decode().splitlines() if "test_0003" not in line]
    native[LIST] = "\n".join(kept).encode()
    error = refusal("rafdb", as_folder(tmp_path / "basic", native))
    # Of the list, that is: before any image is read.
    said = "list_patition_label.txt: expected images of each class in test, found none of Sadness; "
    assert said in error


def test_class_without_a_sound_image(native, as_folder, refusal, tmp_path):
    native["Image/aligned/test_0007_aligned.jpg"] = b"no image"
    error = refusal("rafdb", as_folder(tmp_path / "basic", native))
    assert "in test, found none of Surprise" in error


def test_without_aligned_images(native, as_folder, as_zip, refusal, tmp_path):
    files = {name.replace("aligned/", "original/"): data for name, data in native.items()}
    error = refusal("rafdb", as_folder(tmp_path / "original", files))
    assert "Image/aligned/train_00001_aligned.jpg" in error
    assert "copy or unpack Image/aligned.zip there" in error

    source = as_folder(tmp_path / "other", {LIST: native[LIST]})
    as_zip(source / "Image/aligned.zip", {"readme.txt": b"x"})
    assert "aligned.zip: expected " in (error := refusal("rafdb", source))
    assert "found readme.txt; take aligned.zip from RAF-DB" in error

    outer = as_zip(tmp_path / "basic.zip", {LIST: native[LIST], "Image/aligned.zip": b"PK"})
    error = refusal("rafdb", outer)
    assert "found Image/aligned.zip inside the zip; unpack the outer zip" in error


def test_archive_with_a_password(native, as_folder, as_zip, refusal, tmp_path):
    source = as_folder(tmp_path / "basic", {LIST: native[LIST]})
    archive = as_zip(source / "Image/aligned.zip", {"aligned/train_00001_aligned.jpg": b"x"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # the flag of encryption in the member's header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    archive.write_bytes(data)
    with zipfile.ZipFile(archive) as found:
        assert found.infolist()[0].flag_bits & 1
    error = refusal("rafdb", source)
    assert "found a password; unpack it and give the folder" in error


def test_sources_that_are_not_rafdb(as_folder, refusal, native, tmp_path):
    (tmp_path / "text").write_text("no archive")
    other = as_folder(tmp_path / "other", {"train/0/a.jpg": b"x"})
    for source, found in (
        (tmp_path / "none", "no such file"),
        (tmp_path / "text", "something else"),
        (other, "train"),
    ):
        error = refusal("rafdb", source)
        assert str(source) in error and f"found {found}; " in error
    two = as_folder(
        tmp_path / "two", {f"{x}/{name}": native[name] for x in "ab" for name in native}
    )
    assert "expected one data set, found 2: a, b; give one of them" in refusal("rafdb", two)


def test_second_call_does_nothing(native, as_folder, prepared, tmp_path, capsys):
    source = as_folder(tmp_path / "basic", native)
    prepared("rafdb", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    again = prepared("rafdb", source)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert len(again.split("train")) == 14


def test_another_data_set_is_replaced_on_request_alone(
    native, as_folder, prepared, refusal, content, tmp_path
):
    assert (
        prepare.main(["synthetic", "--train", "7", "--test", "7", "--out", f"{tmp_path}/out"]) == 0
    )
    before = content(tmp_path / "out")
    source = as_folder(tmp_path / "basic", native)
    assert "another data set; choose another --out or add --overwrite" in refusal("rafdb", source)
    native[LIST] = b"damaged"
    as_folder(source, native)
    refusal("rafdb", source, "--overwrite")
    assert content(tmp_path / "out") == before  # a failure replaces nothing
