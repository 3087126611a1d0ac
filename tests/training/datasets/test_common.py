from __future__ import annotations

from collections import Counter

import pytest

from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import preset
from training.datasets.common import check_every_class, describe, list_images


def test_description_is_the_presets_but_for_what_is_said():
    found = describe("caers", "somewhere", "ours", name="mine", prepared_with={"seed": 1})
    spec = preset("caers")
    assert found["labels"] == list(spec.labels) and found["face_crop"] == spec.face_crop
    assert (found["name"], found["preset"], found["prepared_with"]) == (
        "mine",
        "caers",
        {"seed": 1},
    )
    assert (found["source"], found["licence"]) == ("somewhere", "ours")


def test_every_class_of_the_splits_that_are_there():
    counts = Counter({("train", 0): 1, ("train", 1): 2, ("test", 0): 1})
    check_every_class(counts, ["a"], "data")
    with pytest.raises(
        DatasetError, match="data: expected images of each class in test, found non"
    ):
        check_every_class(counts, ["a", "b"], "data")


def test_images_are_listed_by_the_order_of_the_classes_and_read_later(as_folder, tmp_path):
    root = as_folder(tmp_path / "set", {"train/b/2.jpg": b"2", "train/a/1.jpg": b"1"})
    first, second = list_images(root, {"train": "train"}, ["b", "a"])
    assert (first.name, first.split, first.label) == ("2.jpg", "train", 0)
    (root / "train/a/1.jpg").write_bytes(b"changed")
    assert (first.read(), second.read()) == (b"2", b"changed")


@pytest.mark.parametrize(
    ("classes", "found"),
    [(["a"], "also b"), (["a", "b", "c"], "no c"), (["a", "c"], "no c; also b")],
)
def test_other_class_folders(classes, found, as_folder, tmp_path):
    root = as_folder(tmp_path / "set", {"train/a/1.jpg": b"1", "train/b/1.jpg": b"1"})
    with pytest.raises(DatasetError, match=f"found {found}; mend the folders"):
        list_images(root, {"train": "train"}, classes)
