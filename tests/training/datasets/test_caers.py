from __future__ import annotations

import pytest

from efficientface_deploy.spec import preset
from training.datasets import caers as caers_source
from training.datasets.caers import CAERS_COUNTS

# CAER-S's folders and what they are in our words, typed a second time.
FOLDERS = {
    "Anger": "Anger",
    "Disgust": "Disgust",
    "Fear": "Fear",
    "Happy": "Happiness",
    "Neutral": "Neutral",
    "Sad": "Sadness",
    "Surprise": "Surprise",
}


@pytest.fixture
def native(picture):
    """Two training images and a test image of each class; names begin anew in each folder."""
    files = {}
    for seed, folder in enumerate(FOLDERS):
        files[f"train/{folder}/0001.png"] = picture(seed, "PNG")
        files[f"train/{folder}/0002.png"] = picture(100 + seed, "PNG")
        files[f"test/{folder}/0001.png"] = picture(200 + seed, "PNG")
    return files


def test_labels_by_name(native, lay_out, prepared, capsys):
    native["train/Anger/.DS_Store"] = b"what macOS leaves"
    native["readme.txt"] = b"beside the folders"
    dataset = prepared("caers", lay_out(native))
    assert dataset.labels == preset("caers").labels and dataset.preset == "caers"
    for split, number in (("train", 2), ("test", 1)):
        found = {}
        for sample in dataset.split(split):
            data = sample.path.read_bytes()  # the whole picture, byte for byte
            (source,) = [name for name, content in native.items() if content == data]
            found.setdefault(dataset.labels[sample.label], []).append(source)
        assert found == {
            label: [f"{split}/{folder}/{i + 1:04d}.png" for i in range(number)]
            for folder, label in FOLDERS.items()
        }
    output = capsys.readouterr()
    assert output.err == ""
    assert "train: 14 (Neutral 2, Happiness 2, " in output.out
    assert "train: 14 images, published: 48,995\n" in output.out
    assert "test: 7 images, published: 20,987\n" in output.out


def test_published_counts(native, as_folder, prepared, monkeypatch, tmp_path, capsys):
    assert sum(CAERS_COUNTS.values()) == 69_982
    monkeypatch.setattr(caers_source, "CAERS_COUNTS", {"train": 14, "test": 7})
    prepared("caers", as_folder(tmp_path / "CAER-S", native))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  train: 14 images, as published",
        "  test: 7 images, as published",
    ]


def test_damaged_image_is_left_out(native, lay_out, prepared, capsys):
    native["train/Sad/0002.png"] = native["train/Sad/0002.png"][:100]
    dataset = prepared("caers", lay_out(native))
    assert len(dataset.split("train")) == 13
    error = capsys.readouterr().err
    assert error.startswith("left out 0002.png (train, Sadness): a damaged one (")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train/Fear/", "train/Scared/", "train: expected class folders Neutral, Happy, Sad"),
        ("train/Fear/", "train/Scared/", "found no Fear; also Scared; "),
        ("test/", "validation/", "test: expected class folders Neutral, Happy"),
        ("test/", "validation/", "found no such folder; "),
        ("train/", "training/", "expected folders train and test of CAER-S, found test, training"),
        ("test/Sad/", "test/", "test: expected class folders"),
        ("test/Sad/0001", "test/Sad/deep/0001", "Sad: expected images alone, found folder deep"),
        ("test/Sad/0001.png", "test/Sad/._hidden", "Sad: expected images, found an empty folder"),
    ],
)
def test_folders_that_are_not_caers(old, new, said, native, as_folder, refusal, tmp_path):
    files = {name.replace(old, new): data for name, data in native.items()}
    assert said in refusal("caers", as_folder(tmp_path / "CAER-S", files))


def test_class_without_a_sound_image(native, as_folder, refusal, tmp_path):
    native["test/Sad/0001.png"] = b"damaged"
    error = refusal("caers", as_folder(tmp_path / "CAER-S", native))
    assert "expected images of each class in test, found none of Sadness; " in error


def test_second_call_does_nothing(native, as_folder, prepared, tmp_path, capsys):
    source = as_folder(tmp_path / "CAER-S", native)
    prepared("caers", source)
    prepared("caers", source)
    assert "nothing to do" in capsys.readouterr().out
