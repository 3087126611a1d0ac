"""Which images calibrate: a seeded choice, recorded, and warned about where it is doubtful."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import to_model_input
from efficientface_export.int8.calibration import choose_calibration, read_images
from training import prepare


def write_images(folder: Path, count: int, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(start, start + count):
        pixels = np.full((40, 40, 3), index % 256, dtype=np.uint8)
        paths.append(folder / f"{index:04d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The published layout: 150 images to train, 20 to test, no dataset.json."""
    root = tmp_path / "RAF-DB"
    write_images(root / "train" / "0", 75)
    write_images(root / "train" / "3", 75, 75)
    write_images(root / "test" / "1", 20, 200)
    return root


def test_choice_is_seeded(published: Path, small_spec: ModelSpec) -> None:
    first = choose_calibration(published, 100, seed=1)
    again = choose_calibration(published, 100, seed=1)
    other = choose_calibration(published, 100, seed=2)
    assert first.chosen == again.chosen
    assert first.record == again.record
    assert other.record["images_sha256"] != first.record["images_sha256"]
    images = read_images(first.chosen, small_spec)
    assert (images.shape, images.dtype) == ((100, 64, 64, 3), np.uint8)
    assert read_images((), small_spec).shape == (0, 64, 64, 3)


def test_record(published: Path, small_spec: ModelSpec) -> None:
    calibration = choose_calibration(published, 120, seed=7)
    digest = calibration.record.pop("images_sha256")
    assert len(digest) == 64
    assert calibration.record == {"dataset": "RAF-DB", "split": "train", "count": 120, "seed": 7}
    assert calibration.warnings == ()
    values = read_images(calibration.chosen, small_spec)[:, 0, 0, 0]
    assert values.max() < 150  # of the train split alone
    assert len(set(values)) == 120  # each once
    assert (values < 75).any() and (values >= 75).any()  # of all classes


def test_images_held_out(published: Path, small_spec: ModelSpec) -> None:
    """Others than those that the ranges come from, recorded as well."""
    together = choose_calibration(published, 150)
    alone = choose_calibration(published, 90)
    found = choose_calibration(published, 90, held_out=40)
    assert found.chosen == alone.chosen
    assert together.held_out == alone.held_out == ()
    paths = [{sample.path for sample in part} for part in (found.chosen, found.held_out)]
    assert [len(part) for part in paths] == [90, 40]
    assert not paths[0] & paths[1]
    assert found.record["images_sha256"] == alone.record["images_sha256"]
    assert found.record["apart"]["count"] == 40
    assert len(found.record["apart"]["images_sha256"]) == 64
    assert "apart" not in alone.record


def test_at_most_a_third_is_held_out(published: Path, small_spec: ModelSpec) -> None:
    found = choose_calibration(published, 500, held_out=256)
    assert (len(found.chosen), len(found.held_out)) == (100, 50)


def test_too_few_to_hold_any_out(tmp_path: Path, small_spec: ModelSpec) -> None:
    write_images(tmp_path / "two", 2)
    with pytest.raises(DatasetError, match=r"found 2 in all; .*--no-int8-search"):
        choose_calibration(tmp_path / "two", 10, held_out=5)
    assert len(choose_calibration(tmp_path / "two", 10).chosen) == 2


def test_hash_follows_the_content(published: Path, small_spec: ModelSpec) -> None:
    before = choose_calibration(published, 150).record["images_sha256"]
    changed = published / "train" / "0" / "0003.png"
    Image.fromarray(np.full((40, 40, 3), 77, dtype=np.uint8)).save(changed)
    after = choose_calibration(published, 150).record["images_sha256"]
    assert before != after


def test_runtime_preprocessing(faces: Path, small_spec: ModelSpec) -> None:
    calibration = choose_calibration(faces, 1000)
    paths = sorted((faces / "train").rglob("*.jpg"))
    images = read_images(calibration.chosen, small_spec)
    assert len(paths) == len(images) == 105
    expected = {to_model_input(path, small_spec).tobytes() for path in paths}
    assert {image.tobytes() for image in images} == expected


def test_prepared_data_set(faces: Path, small_spec: ModelSpec) -> None:
    calibration = choose_calibration(faces, 10)
    assert calibration.record["split"] == "train"
    assert calibration.warnings == (f"only 10 calibration images in {faces}; give 100 or more",)


def test_prepared_data_set_without_train(
    faces: Path, small_spec: ModelSpec, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(faces, tmp_path / "faces"))
    (root / "manifest.csv").unlink()
    shutil.rmtree(root / "train")
    with pytest.raises(DatasetError, match="expected a train split, found test"):
        choose_calibration(root, 10)


@pytest.mark.parametrize("part", ["test", "test/1"])
def test_test_split_is_warned_about(published: Path, small_spec: ModelSpec, part: str) -> None:
    calibration = choose_calibration(published / part, 500)
    assert calibration.record["split"] == "test"
    few, held_out = calibration.warnings
    assert "only 20 calibration images" in few
    assert "on a test split" in held_out


def test_folder_with_a_test_split_alone(tmp_path: Path, small_spec: ModelSpec) -> None:
    write_images(tmp_path / "data" / "test" / "0", 120)
    calibration = choose_calibration(tmp_path / "data", 120)
    assert calibration.record["split"] == "test"


def test_any_folder(tmp_path: Path, small_spec: ModelSpec) -> None:
    """Also one that lies below some folder called test, and with what macOS leaves there."""
    root = tmp_path / "test" / "pictures"
    write_images(root, 100)
    (root / "._0001.png").write_bytes(b"not an image")
    (root / "readme.txt").write_text("not an image either")
    calibration = choose_calibration(root, 500)
    assert calibration.record["split"] == "unknown"
    assert calibration.warnings == ()


def test_every_kind_of_picture_is_taken_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = write_images(tmp_path / "faces", 3)
    with Image.open(first) as image:
        image.save(first.with_suffix(".tif"))
    second.rename(second.with_suffix(""))
    (tmp_path / "faces/labels.csv").write_text("x")
    assert len(choose_calibration(tmp_path / "faces", 10).chosen) == 4
    said = (
        f"note: left out of {tmp_path / 'faces'}: 1 file(s), no known kind of picture: labels.csv"
    )
    assert said in capsys.readouterr().err
    for path in (first, first.with_suffix(".tif"), second.with_suffix(""), third):
        path.unlink()
    with pytest.raises(DatasetError, match=r"found 1 file.* no known kind of picture: labels.csv"):
        choose_calibration(tmp_path / "faces", 10)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_of_validation_are_warned_about(published: Path, name: str) -> None:
    (published / "test").rename(published / name)
    assert choose_calibration(published / name, 500).record["split"] == "validation"
    assert choose_calibration(published / name / "1", 500).record["split"] == "validation"


def test_name_of_the_current_folder(
    published: Path, small_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    assert choose_calibration(Path(), 10).record["dataset"] == "RAF-DB"


@pytest.mark.parametrize("make", [True, False])
def test_no_images(tmp_path: Path, small_spec: ModelSpec, make: bool) -> None:
    root = tmp_path / "nothing"
    if make:
        root.mkdir()
    found = "no images in it" if make else "no such folder"
    with pytest.raises(DatasetError, match=f"nothing: expected a folder of images .*{found}"):
        choose_calibration(root, 10)


def test_unreadable_images_are_named_counted_and_left_out(
    published: Path, small_spec: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    good = choose_calibration(published, 20, held_out=5)
    damaged, missing = good.chosen[3].path, good.held_out[2].path
    damaged.write_bytes(b"\x89PNG broken")
    missing.unlink()
    missing.symlink_to("nowhere")
    found = choose_calibration(published, 20, held_out=5)
    assert (len(found.chosen), len(found.held_out)) == (20, 5)  # others took their places
    assert found.record["count"] == len(read_images(found.chosen, small_spec)) == 20
    assert {damaged, missing}.isdisjoint(sample.path for sample in found.chosen + found.held_out)
    assert set(good.chosen) - set(found.chosen) == {good.chosen[3]}
    assert found.warnings[0] == f"left out 2 images or folders in {published} that cannot be read"
    err = capsys.readouterr().err
    assert f"left out {damaged}: another kind of file\n" in err
    assert f"left out {missing}: no such file or directory\n" in err


def test_fewer_readable_images_than_asked_for(published: Path) -> None:
    for path in (published / "train" / "0").iterdir():
        path.write_bytes(b"")
    found = choose_calibration(published, 150, held_out=50)
    assert (len(found.chosen), len(found.held_out)) == (50, 25)


def test_no_readable_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DatasetError, match=r"images for calibration, found none \(an empty file\)"):
        choose_calibration(tmp_path, 10)


def test_folder_that_may_not_be_read(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scandir = os.scandir
    closed = str(published / "train" / "3")

    def refuse(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = choose_calibration(published, 150)
    assert len(found.chosen) == 75
    assert f"left out {closed}: a folder that may not be read" in capsys.readouterr().err
    assert "left out 1 images or folders" in found.warnings[0]


def test_record_is_json(published: Path, small_spec: ModelSpec) -> None:
    record = choose_calibration(published, 5).record
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("labels", "notes"), [(("a", "b"), 0), (("b", "a"), 0), (("a", "c"), 1)])
def test_classes_of_another_model_are_warned_about(
    tmp_path: Path, labels: tuple[str, ...], notes: int
) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / "mine" / split / "a", 60)
        write_images(tmp_path / "mine" / split / "b", 60, 60)
    prepare.main(["folders", "--source", str(tmp_path / "mine"), "--out", str(tmp_path / "data")])
    found = choose_calibration(tmp_path / "data", 100, labels=labels).warnings
    assert sum("has other classes than the model" in note for note in found) == notes
