from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy import load
from efficientface_deploy.cli import main
from efficientface_deploy.errors import BackendError, CheckpointError, ImageError
from efficientface_deploy.spec import preset


@pytest.fixture
def face(photo, tmp_path) -> Path:
    """A photograph on disk."""
    path = tmp_path / "faces/face.png"
    path.parent.mkdir()
    Image.fromarray(photo).save(path)
    return path


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_line_has_the_predictors_answer(face, capsys):
    assert main([str(face)]) == 0
    with load() as predictor:
        prediction = predictor(face)
    (line,) = lines_of(capsys)
    assert line.startswith(f"{face}: {prediction.label} {prediction.confidence:.2f} (")


def test_json_has_every_class(face, capsys):
    assert main([str(face), "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["image"], set(record["probabilities"])) == (
        str(face),
        set(preset("ferplus").labels),
    )
    assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert captured.err == ""  # nothing but JSON


def test_folder_stands_for_its_images_in_order(face, capsys):
    for name in ("b.jpg", "a.jpg"):
        Image.open(face).save(face.parent / name)
    (face.parent / "notes.txt").write_text("no image")
    assert main([str(face.parent)]) == 0
    names = [Path(line.partition(": ")[0]).name for line in lines_of(capsys)]
    assert names == ["a.jpg", "b.jpg", "face.png"]


def test_standard_input(face, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(face.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["-"]) == 0
    assert lines_of(capsys)[0].startswith("-: ")


def test_unreadable_image_does_not_stop_the_others(face, capsys):
    bad = face.parent / "a.jpg"
    bad.write_bytes(b"no image")
    assert main([str(face.parent)]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and str(face) in captured.out
    assert str(bad) in captured.err and "1 image(s) could not be read" in captured.err


def test_empty_folder(tmp_path):
    with pytest.raises(ImageError, match="none in this folder"):
        main([str(tmp_path)])


def test_backend_that_is_none(face):
    with pytest.raises(BackendError):
        main([str(face), "--backend", "abacus"])


def test_published_checkpoint_with_its_preset(face, make_network, tmp_path, capsys):
    network = make_network()
    checkpoint = tmp_path / "published.pth.tar"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, checkpoint
    )
    options = [str(face), "--model", str(checkpoint), "--json"]
    assert main([*options, "--preset", "rafdb"]) == 0
    assert tuple(json.loads(lines_of(capsys)[0])["probabilities"]) == preset("rafdb").labels
    assert main(options) == 0  # numbered, since nothing says what they mean
    assert "class 0" in json.loads(lines_of(capsys)[0])["probabilities"]
    with pytest.raises(CheckpointError, match="8 classes for preset affectnet8, found 7"):
        main([*options, "--preset", "affectnet8"])


def test_bundled_model_with_another_preset(face):
    with pytest.raises(Exception, match="leave the preset out"):
        main([str(face), "--preset", "rafdb"])


def test_photo_is_what_the_array_is(face, photo, capsys):
    """A file and the same pixels in memory give one answer."""
    assert main([str(face), "--json"]) == 0
    record = json.loads(lines_of(capsys)[0])
    with load() as predictor:
        expected = predictor(np.array(photo)).probabilities
    assert record["probabilities"] == pytest.approx(expected, abs=1e-6)
