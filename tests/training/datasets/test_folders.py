from __future__ import annotations

import json
import os
import sys
import unicodedata

import pytest

from efficientface_deploy.spec import PRESETS, preset

CLASSES = ("bored", "delighted", "very tired")


@pytest.fixture
def native(picture):
    """Three splits of three classes, two images each, in whatever format."""
    files = {}
    for split in ("train", "validation", "test"):
        for index, name in enumerate(CLASSES):
            seed = 10 * index + len(split)
            files[f"{split}/{name}/a.jpg"] = picture(seed)
            files[f"{split}/{name}/b.PNG"] = picture(seed + 1, "PNG")
    return files


def test_labels_are_the_folders_sorted_by_name(native, lay_out, prepared, capsys):
    dataset = prepared("folders", lay_out(native))
    assert dataset.labels == CLASSES and dataset.preset == "rafdb"
    for split in ("train", "validation", "test"):
        found = {
            (dataset.labels[sample.label], sample.path.name): sample.path.read_bytes()
            for sample in dataset.split(split)
        }
        assert found == {
            (name, file): native[f"{split}/{name}/{file}"]  # byte for byte
            for name in CLASSES
            for file in ("a.jpg", "b.PNG")
        }
        assert all(sample.votes is None for sample in dataset.split(split))
    output = capsys.readouterr()
    assert "train: 6 (bored 2, delighted 2, very tired 2)" in output.out
    assert "published" not in output.out and output.err == ""


def test_classes_give_the_order(native, as_folder, prepared, tmp_path):
    order = ("very tired", "bored", "delighted")
    dataset = prepared("folders", as_folder(tmp_path / "mine", native), "--classes", *order)
    assert dataset.labels == order and dataset.name == "mine"
    (sample, _) = [sample for sample in dataset.split("test") if sample.label == 1]
    assert sample.path.read_bytes() == native["test/bored/a.jpg"]


def test_preset_gives_the_normalisation(native, as_folder, prepared, tmp_path):
    source = as_folder(tmp_path / "mine", native)
    dataset = prepared("folders", source, "--preset", "caers")
    assert dataset.spec.mean == preset("caers").mean and dataset.spec.labels == CLASSES
    assert dataset.spec.face_crop == "as-is"
    for name in PRESETS:
        dataset = prepared("folders", source, "--preset", name, "--overwrite")
        assert dataset.preset == name
        assert dataset.spec.face_crop == "as-is"  # not RAF-DB's template, for pictures of our own


def test_train_alone_is_enough(native, as_folder, prepared, tmp_path):
    files = {name: data for name, data in native.items() if name.startswith("train")}
    dataset = prepared("folders", as_folder(tmp_path / "mine", files))
    assert len(dataset.split("train")) == 6 and not dataset.samples["test"]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_of_validation(name, native, lay_out, prepared, refusal):
    files = {file.replace("validation/", f"{name}/"): data for file, data in native.items()}
    source = lay_out(files)
    assert len(prepared("folders", source).split("validation")) == 6


def test_two_folders_of_one_split(native, as_folder, refusal, tmp_path, picture):
    source = as_folder(tmp_path / "mine", native | {"val/bored/a.jpg": picture(1)})
    assert "one folder for validation, found val, validation; move one" in refusal(
        "folders", source
    )


def test_files_in_no_class_are_named(native, lay_out, prepared, capsys, picture):
    native |= {"labels.csv": b"x", "train/stray.jpg": picture(1), "test/Thumbs.db": b"x"}
    native |= {"train/.DS_Store": b"x", ".git/config": b"x", "train/bored/._a.jpg": b"x"}
    prepared("folders", lay_out(native))
    assert capsys.readouterr().err == "left out 2 file(s), in no class: labels.csv, stray.jpg\n"


def test_every_format_is_taken(native, as_folder, prepared, tmp_path, picture, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    native["train/bored/c.heic"] = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    native["train/bored/clip.mp4"] = b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99)
    for name, kind in {"d.tif": "TIFF", "e.gif": "GIF", "f": "JPEG", "g.jfif": "JPEG"}.items():
        native[f"train/bored/{name}"] = picture(ord(name[0]), kind)
    dataset = prepared("folders", as_folder(tmp_path / "mine", native))
    found = [sample.path.name for sample in dataset.split("train") if sample.label == 0]
    assert found == ["a.jpg", "b.PNG", "d.tif", "e.gif", "f", "g.jfif"]
    assert capsys.readouterr().err.splitlines() == [
        "left out c.heic (train, bored): HEIC; pip install pillow-heif, or convert it to JPEG",
        "left out clip.mp4 (train, bored): a video; name it as one, e.g. .mp4, or open it by "
        "open_video()",
        "left out 2 images in all",
    ]


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
def test_accents_are_the_same_however_a_system_stores_them(
    typed, native, lay_out, prepared, tmp_path
):
    """macOS stores an accent apart from its letter; one folder of this set was made there."""
    composed, apart = (unicodedata.normalize(form, "müde") for form in ("NFC", "NFD"))
    files = {name.replace("very tired", composed): data for name, data in native.items()}
    files = {name.replace(f"test/{composed}", f"test/{apart}"): d for name, d in files.items()}
    classes = [unicodedata.normalize(typed, name) for name in ("müde", "bored", "delighted")]
    dataset = prepared("folders", lay_out(files), "--classes", *classes)
    assert dataset.labels == (composed, "bored", "delighted")
    assert [sample.label for sample in dataset.split("test")].count(0) == 2


def test_two_classes_of_one_name(native, as_folder, refusal, tmp_path, picture):
    forms = [unicodedata.normalize(form, "müde") for form in ("NFC", "NFD")]
    native |= {f"train/{name}/a.jpg": picture(1) for name in forms}
    assert "two folders of one name" in refusal("folders", as_folder(tmp_path / "mine", native))


def test_same_picture_in_two_splits_or_classes_is_named_and_counted(
    native, lay_out, prepared, capsys
):
    native["test/bored/z.jpg"] = native["train/bored/a.jpg"]
    native["train/delighted/y.jpg"] = native["train/bored/a.jpg"]
    native["validation/very tired/x.png"] = native["train/delighted/b.PNG"]
    native["train/bored/a again.jpg"] = native["train/bored/a.jpg"]  # no harm
    dataset = prepared("folders", lay_out(native))
    assert len(dataset.split("test")) == 7  # it stays: the published counts have it
    assert capsys.readouterr().err.splitlines() == [
        "the same picture: train/0/a again.jpg and train/1/y.jpg",
        "the same picture: train/1/b.PNG and validation/2/x.png",
        "the same picture: train/0/a again.jpg and test/0/z.jpg",
        "pictures that are in another class too: 2",
        "pictures that are in another split too: 2",
    ]


def test_damaged_image_is_left_out(native, lay_out, prepared, capsys):
    native["train/bored/a.jpg"] = native["train/bored/a.jpg"][:100]
    native["train/bored/notes.txt"] = b"no image"
    assert len(prepared("folders", lay_out(native)).split("train")) == 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("left out a.jpg (train, bored): a damaged one (")
    assert lines[1:] == [
        "left out notes.txt (train, bored): another kind of file; convert it to JPEG or PNG",
        "left out 2 images in all",
    ]


def test_name_that_no_text_can_hold(native, as_folder, prepared, capsys, tmp_path):
    source = as_folder(tmp_path / "mine", native)
    (source / "train/bored" / os.fsdecode(b"\xff.jpg")).write_bytes(native["train/bored/a.jpg"])
    (source / "train/bored/two\nlines.jpg").write_bytes(native["train/bored/a.jpg"])
    assert len(prepared("folders", source).split("train")) == 6
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "left out 'two\\nlines.jpg' (train, bored): a name that cannot be printed",
        "left out '\\udcff.jpg' (train, bored): a name that cannot be printed",
        "left out 2 images in all",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("test/bored/", "test/Bored/", "test: expected class folders bored, delighted, very tired"),
        ("test/bored/", "test/Bored/", "found no bored; also Bored; mend the folders"),
        ("train/", "train_set/", "expected a folder train, with a folder of images for each class"),
        ("validation/", "dev/", "expected no folders but train, validation, test, found dev; ren"),
        ("train/bored/", "train/", "found also bored"),
        ("train/bored/", "train/bored/deep/", "bored: expected images alone, found folder deep"),
        ("train/bored/", "train/bored/._", "bored: expected images, found an empty folder"),
        ("/very tired/", "/very\ttired/", "expected two or more classes with printable names"),
    ],
)
def test_folders_in_another_layout(old, new, said, native, as_folder, refusal, tmp_path):
    files = {name.replace(old, new): data for name, data in native.items()}
    assert said in refusal("folders", as_folder(tmp_path / "mine", files))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (CLASSES[:2], "train: expected class folders bored, delighted, found also very tired; "),
        ((*CLASSES, "sly"), "found no sly; "),
        ((*CLASSES, "bored"), "--classes: expected each class once, found bored delighted very"),
        (
            ("bored",),
            "--classes: expected two or more names, with spaces between them, found bored",
        ),
        ((",".join(CLASSES),), "--classes: expected two or more names, with spaces between"),
    ],
)
def test_classes_that_are_not_the_folders(classes, said, native, as_folder, refusal, tmp_path):
    source = as_folder(tmp_path / "mine", native)
    assert said in refusal("folders", source, "--classes", *classes)


def test_no_class_at_all(as_folder, refusal, tmp_path, picture):
    flat = as_folder(tmp_path / "flat", {"train/a.jpg": picture(1), "train/b.jpg": picture(2)})
    assert "expected two or more classes with printable names, found none" in refusal(
        "folders", flat
    )
    assert "no such file" in refusal("folders", tmp_path / "none")


def test_class_without_a_sound_image(native, as_folder, refusal, tmp_path):
    for name in ("a.jpg", "b.PNG"):
        native[f"test/bored/{name}"] = b""
    error = refusal("folders", as_folder(tmp_path / "mine", native))
    assert "expected images of each class in test, found none of bored; " in error


def test_changed_images_are_noticed(native, as_folder, prepared, refusal, tmp_path, capsys):
    source = as_folder(tmp_path / "mine", native)
    prepared("folders", source)
    prepared("folders", source)
    assert "nothing to do" in capsys.readouterr().out
    (source / "train/bored/a.jpg").rename(source / "train/delighted/c.jpg")
    assert "another data set; choose another --out or add --overwrite" in refusal("folders", source)
    dataset = prepared("folders", source, "--overwrite")
    assert [sample.label for sample in dataset.split("train")].count(1) == 3


def test_description(native, as_folder, prepared, tmp_path):
    prepared("folders", as_folder(tmp_path / "my.faces", native))
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert description["name"] == "my.faces" and description["labels"] == list(CLASSES)
    assert {"preset", "face_crop", "source", "licence"} <= set(description)
