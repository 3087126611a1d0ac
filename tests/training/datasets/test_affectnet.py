from __future__ import annotations

import csv
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.spec import preset
from training.datasets import affectnet as affectnet_source
from training.datasets import common
from training.datasets.affectnet import AFFECTNET_TRAIN_COUNTS, COLUMNS

# The official numbers, typed a second time.
OFFICIAL = {
    0: "Neutral",
    1: "Happiness",
    2: "Sadness",
    3: "Surprise",
    4: "Fear",
    5: "Disgust",
    6: "Anger",
    7: "Contempt",
}
NO_EXPRESSION = (8, 9, 10)  # None, Uncertain, Non-Face
WHOLE, LISTS, IMAGES = (0, 0, 40, 30), "Manually_Annotated_file_lists", "Manually_Annotated_Images"


def expected(names: dict[str, int], classes: int) -> dict[str, str]:
    return {name: OFFICIAL[number] for name, number in names.items() if number < classes}


def csv_text(rows: list[list[object]], header: bool) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([[*COLUMNS], *rows] if header else rows)
    return text.getvalue().encode()


def row(path: str, expression: object, box: object = WHOLE) -> list[object]:
    return [path, *box, "1.5;2.5;3.5", expression, "0.1", "-0.2"]


@pytest.fixture
def first_release(picture):
    """Lists and pictures: one training and one validation image of each of the eleven numbers."""
    train = [row(f"{number}/a{number}.jpg", number) for number in range(11)]
    validation = [row(f"{number}/v{number}.jpg", number) for number in range(11)]
    for line in (*train[8:], *validation[8:]):
        line[1:5] = ["NULL"] * 4
    files = {f"{IMAGES}/{line[0]}": picture(i) for i, line in enumerate(train + validation)}
    files[f"{LISTS}/training.csv"] = csv_text(train, header=True)
    files[f"{LISTS}/validation.csv"] = csv_text(validation, header=False)  # as AffectNet has it
    return files


def npy(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(value), **options)
    return buffer.getvalue()


@pytest.fixture
def newer_release(picture):
    """A folder for each set, with a file for each annotation: digits, as AffectNet has it."""
    files = {}
    for number in range(11):
        for folder, name in (("train_set", f"{number}"), ("val_set", f"{100 + number}")):
            files[f"{folder}/images/{name}.jpg"] = picture(int(name))
            files[f"{folder}/annotations/{name}_exp.npy"] = npy(str(number))
            files[f"{folder}/annotations/{name}_aro.npy"] = npy("0.25")
            files[f"{folder}/annotations/{name}_lnd.npy"] = npy([1.5, 2.5])
    return files


# ---- The first release


@pytest.mark.parametrize("classes", ["7", "8"])
def test_first_release(classes, first_release, lay_out, prepared, labelled, capsys):
    dataset = prepared("affectnet", lay_out(first_release), "--classes", classes)
    assert dataset.labels == preset(f"affectnet{classes}").labels
    assert (dataset.name, dataset.preset) == (f"AffectNet-{classes}", f"affectnet{classes}")
    train = {f"{number}_a{number}.jpg": number for number in OFFICIAL}
    assert labelled(dataset, "train") == expected(train, int(classes))
    test = {f"{number}_v{number}.jpg": number for number in OFFICIAL}
    assert labelled(dataset, "test") == expected(test, int(classes))
    assert dataset.evaluation_split() == "test" and not dataset.samples["validation"]
    output = capsys.readouterr()
    assert output.err == ""
    total = {"7": "283,901", "8": "287,651"}[classes]
    assert (
        f"train: {classes} images, published: {total} (Neutral 1, published: 74,874; " in output.out
    )
    total = {"7": "3,500", "8": "4,000"}[classes]
    assert f"test: {classes} images, published: {total} (" in output.out


@pytest.mark.parametrize(
    "moves",
    [
        {f"{LISTS}/": ""},
        {f"{IMAGES}/": f"Manually_Annotated/{IMAGES}/"},
        {f"{IMAGES}/": "Manually_Annotated/", f"{LISTS}/": ""},
        {f"{IMAGES}/": "", f"{LISTS}/": ""},
    ],
)
def test_where_people_have_the_pictures(moves, first_release, as_folder, prepared, tmp_path):
    files = {}
    for name, data in first_release.items():
        for old, new in moves.items():
            name = name.replace(old, new)
        files[name] = data
    dataset = prepared("affectnet", as_folder(tmp_path / "source", files))
    assert len(dataset.split("train")) == len(dataset.split("test")) == 7


def test_faces_are_cut_by_their_box(first_release, picture, as_folder, prepared, tmp_path):
    lines = [row(f"{number}/a{number}.jpg", number) for number in range(7)]
    lines[0][1:5] = (10, 0, 20, 20)  # x, y, width, height
    lines[1][1:5] = (-5, 10, 25, 100)  # beyond the picture
    lines[2][1:5] = ("10.0", "10.0", "10.0", "10.0")
    first_release[f"{LISTS}/training.csv"] = csv_text(lines, header=True)
    name = f"{IMAGES}/2/a2.jpg"
    first_release[name] = picture(2, "PNG")  # whatever its name says
    dataset = prepared("affectnet", as_folder(tmp_path / "source", first_release))
    images = {sample.label: sample.path for sample in dataset.split("train")}

    for number, (left, top, right, bottom) in ((0, (10, 0, 30, 20)), (1, (0, 10, 20, 30))):
        whole = np.asarray(
            Image.open(io.BytesIO(first_release[f"{IMAGES}/{number}/a{number}.jpg"]))
        )
        assert images[number].name == f"{number}_a{number}.jpg"
        with Image.open(images[number]) as cut:
            assert cut.format == "JPEG"
            difference = np.asarray(cut).astype(int) - whole[top:bottom, left:right]
        assert np.abs(difference).mean() < 3  # saved again

    assert images[2].name == "2_a2.png"
    with Image.open(images[2]) as cut, Image.open(io.BytesIO(first_release[name])) as whole:
        assert cut.format == "PNG"
        np.testing.assert_array_equal(np.asarray(cut), np.asarray(whole)[10:20, 10:20])

    assert images[3].read_bytes() == first_release[f"{IMAGES}/3/a3.jpg"]  # nothing to cut


@pytest.mark.parametrize(
    "box", [("NULL",) * 4, (0, 0, -1, -1), (50, 0, 10, 10), (0, 0, 0, 0), ("inf", 0, 1, 1)]
)
def test_box_that_shows_nothing(box, first_release, as_folder, prepared, capsys, tmp_path):
    lines = [row(f"{number}/a{number}.jpg", number) for number in range(7)]
    lines.append(row("8/a8.jpg", 0, box))
    first_release[f"{LISTS}/training.csv"] = csv_text(lines, header=True)
    dataset = prepared("affectnet", as_folder(tmp_path / "source", first_release))
    assert len(dataset.split("train")) == 7
    error = capsys.readouterr().err
    assert error.startswith("left out 8_a8.jpg (train, Neutral): box (") and "in 40x30" in error


def test_damaged_and_missing_pictures(first_release, as_folder, prepared, capsys, tmp_path):
    lines = [row(f"{number}/a{number}.jpg", number) for number in range(7)]
    lines += [row("8/a8.jpg", 0), row("9/a9.jpg", 1)]
    first_release[f"{LISTS}/training.csv"] = csv_text(lines, header=True)
    first_release[f"{IMAGES}/8/a8.jpg"] = first_release[f"{IMAGES}/8/a8.jpg"][:200]
    del first_release[f"{IMAGES}/9/a9.jpg"]
    dataset = prepared("affectnet", as_folder(tmp_path / "source", first_release))
    assert len(dataset.split("train")) == 7
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("left out 8_a8.jpg (train, Neutral): a damaged one (")
    assert lines[1:] == [
        "left out 9_a9.jpg (train, Happiness): a missing or empty file",
        "left out 2 images in all",
    ]


def test_pictures_of_one_name_in_two_folders(first_release, as_folder, prepared, tmp_path):
    lines = [row(f"{number}/same.jpg", number % 7) for number in range(10)]
    first_release[f"{LISTS}/training.csv"] = csv_text(lines, header=True)
    files = {f"{IMAGES}/{line[0]}": first_release[f"{IMAGES}/1/a1.jpg"] for line in lines}
    dataset = prepared("affectnet", as_folder(tmp_path / "source", first_release | files))
    assert len(dataset.split("train")) == 10


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (row("1/x.jpg", 11), "expression 11, which is not from 0 to 10"),
        (row("1/x.jpg", -1), "expression -1"),
        (row("1/x.jpg", "x"), "invalid literal"),
        (row("1/x.jpg", 0)[:8], "8 columns"),
        (["1/x.jpg"], "1 columns"),
        ([*COLUMNS[:-1], "valence2"], "invalid literal"),
        (row("../x.jpg", 0), "path '../x.jpg'"),
        (row("/etc/x.jpg", 0), "path '/etc/x.jpg'"),
        (row("", 0), "path ''"),
        (row("1/NUL.jpg", 0), "path "),  # NUL is put in below: the writer of 3.10 has none
    ],
)
def test_rows_that_are_not_affectnet(line, found, first_release, as_folder, refusal, tmp_path):
    text = csv_text([line], header=False).replace(b"NUL", b"\0")
    first_release[f"{LISTS}/training.csv"] += text
    error = refusal("affectnet", as_folder(tmp_path / "source", first_release))
    if b"\0" in text and sys.version_info < (3, 11):  # whose csv reads no such line
        assert "found line contains NUL" in error
        return
    assert "training.csv line 13: expected columns subDirectory_filePath, face_x, " in error
    assert f"found {found}" in error


def test_list_that_is_no_text(first_release, as_folder, refusal, tmp_path):
    first_release[f"{LISTS}/training.csv"] += b"1/\xff\xfe.jpg,0,0,1,1,,0,0,0\n"
    error = refusal("affectnet", as_folder(tmp_path / "source", first_release))
    assert "training.csv: expected text in UTF-8" in error


def test_incomplete_sources(first_release, newer_release, as_folder, refusal, tmp_path):
    lists = {name: data for name, data in first_release.items() if name.startswith(LISTS)}
    error = refusal("affectnet", as_folder(tmp_path / "lists", lists))
    assert "expected the listed pictures, such as 0/a0.jpg, found none; unpack" in error

    del first_release[f"{LISTS}/validation.csv"]
    error = refusal("affectnet", as_folder(tmp_path / "train", first_release))
    assert "expected images for test, found none; copy validation.csv" in error

    few = {name: data for name, data in newer_release.items() if "/4_exp" not in name}
    error = refusal("affectnet", as_folder(tmp_path / "few", few))
    assert f"{tmp_path}/few: expected images of each class in train, found none of Fear; " in error

    error = refusal("affectnet", as_folder(tmp_path / "other", {"train/0/a.jpg": b"x"}))
    assert "expected training.csv with Manually_Annotated_Images, or train_set" in error


# ---- The newer release


@pytest.mark.parametrize("classes", ["7", "8"])
def test_newer_release(classes, newer_release, lay_out, prepared, labelled, capsys):
    dataset = prepared("affectnet", lay_out(newer_release), "--classes", classes)
    assert dataset.labels == preset(f"affectnet{classes}").labels
    train = {f"{number}.jpg": number for number in OFFICIAL}
    assert labelled(dataset, "train") == expected(train, int(classes))
    test = {f"{100 + number}.jpg": number for number in OFFICIAL}
    assert labelled(dataset, "test") == expected(test, int(classes))
    for sample in dataset.split("train"):
        assert sample.path.read_bytes() == newer_release[f"train_set/images/{sample.path.name}"]
    assert capsys.readouterr().err == ""


def test_numbers_are_mapped_by_name(
    newer_release, as_folder, prepared, labelled, monkeypatch, tmp_path
):
    spec = preset("affectnet8")
    turned = spec.replace(labels=spec.labels[::-1])
    monkeypatch.setattr(common, "preset", lambda name: turned)
    dataset = prepared("affectnet", as_folder(tmp_path / "source", newer_release), "--classes", "8")
    assert dataset.labels[0] == "Contempt"
    train = {f"{number}.jpg": number for number in OFFICIAL}
    assert labelled(dataset, "train") == expected(train, 8)


@pytest.mark.parametrize("value", [np.int64(3), np.float32(3), "3", b"3", ["3"]])
def test_numbers_as_releases_and_copies_write_them(
    value, newer_release, as_folder, prepared, labelled, tmp_path
):
    newer_release["train_set/annotations/8_exp.npy"] = npy(value)
    dataset = prepared("affectnet", as_folder(tmp_path / "source", newer_release))
    assert labelled(dataset, "train")["8.jpg"] == "Surprise"


def test_damaged_image_of_the_newer_release(newer_release, lay_out, prepared, labelled, capsys):
    for name in ("8", "9"):
        newer_release[f"train_set/annotations/{name}_exp.npy"] = npy("1")
    newer_release["train_set/images/8.jpg"] = b""
    del newer_release["train_set/images/9.jpg"]
    dataset = prepared("affectnet", lay_out(newer_release))
    assert len(labelled(dataset, "train")) == 7
    assert capsys.readouterr().err.splitlines() == [
        "left out 8.jpg (train, Happiness): a missing or empty file",
        "left out 9.jpg (train, Happiness): a missing or empty file",
        "left out 2 images in all",
    ]


UNPICKLED = Path(tempfile.gettempdir(), f"unpickled-by-prepare-{os.getpid()}")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return UNPICKLED.touch, ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"PK\x03\x04 no archive either",
        npy("11"),
        npy(-1),
        npy("x"),
        npy(np.nan),
        npy([1, 2]),
        npy("3")[:-2],
        npy([Payload()], allow_pickle=True),
    ],
    ids=range(10),
)
def test_annotations_that_are_no_number(data, newer_release, as_folder, refusal, tmp_path):
    newer_release["val_set/annotations/103_exp.npy"] = data
    error = refusal("affectnet", as_folder(tmp_path / "source", newer_release))
    assert "val_set/annotations/103_exp.npy: expected one number from 0 to 10, found " in error
    assert not UNPICKLED.exists()


# ---- Both


def test_published_counts_add_up(first_release, as_folder, prepared, monkeypatch, tmp_path, capsys):
    assert sum(AFFECTNET_TRAIN_COUNTS[:7]) == 283_901
    assert sum(AFFECTNET_TRAIN_COUNTS) == 287_651
    monkeypatch.setattr(affectnet_source, "AFFECTNET_TRAIN_COUNTS", (1,) * 8)
    monkeypatch.setattr(affectnet_source, "AFFECTNET_TEST_COUNT", 1)
    prepared("affectnet", as_folder(tmp_path / "source", first_release))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  train: 7 images, as published",
        "  test: 7 images, as published",
    ]


def test_classes_are_part_of_the_preparation(newer_release, as_folder, prepared, refusal, tmp_path):
    source = as_folder(tmp_path / "source", newer_release)
    prepared("affectnet", source)
    assert len(prepared("affectnet", source).labels) == 7  # nothing to do
    assert "another data set" in refusal("affectnet", source, "--classes", "8")
    assert len(prepared("affectnet", source, "--classes", "8", "--overwrite").labels) == 8
