"""The browser's benchmark: its parts without a browser, and the whole with Chromium."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import web as bench
from efficientface_deploy.download import cache_folder
from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.web.files import FILE_VARIABLE, RUNTIME
from efficientface_deploy.workbench.dataset import Dataset, Sample

LABELS = ("Neutral", "Happiness", "Surprise", "Sadness", "Anger", "Disgust", "Fear", "Contempt")


@pytest.fixture
def dataset(tmp_path: Path, photo: np.ndarray) -> Dataset:
    """A happy face, twice, with one wrong label; as a prepared set."""
    data = tmp_path / "data"
    for number, label in enumerate((1, 0)):
        folder = data / "validation" / str(label)
        folder.mkdir(parents=True)
        face = Image.fromarray(photo[:, :: -1 if number else 1]).resize((48, 48))
        face.save(folder / f"{number}.png")
    lines = ["path,split,label"]
    lines += [f"validation/{label}/{n}.png,validation,{label}" for n, label in enumerate((1, 0))]
    (data / "manifest.csv").write_text("\n".join(lines) + "\n")
    described = {"schema": 1, "name": "FER+", "labels": LABELS, "preset": "ferplus"}
    (data / "dataset.json").write_text(json.dumps({**described, "face_crop": "box"}))
    samples = tuple(
        Sample(data / f"validation/{label}/{n}.png", label, None) for n, label in enumerate((1, 0))
    )
    return Dataset(data, "FER+", LABELS, "ferplus", {"validation": samples}, "box")


def test_faces_are_read(dataset: Dataset) -> None:
    faces, labels = bench.read_faces(dataset, None)
    assert faces.shape == (2, 48, 48, 4) and (faces[..., 3] == 255).all()
    assert labels == ["Happiness", "Neutral"]
    assert len(bench.read_faces(dataset, 1)[1]) == 1


def test_faces_of_several_sizes(dataset: Dataset) -> None:
    (first, *_) = dataset.samples["validation"]
    Image.new("RGB", (40, 48)).save(first.path)
    with pytest.raises(DatasetError, match="expected squares of one size"):
        bench.read_faces(dataset, None)


def test_candidates(dataset: Dataset, tmp_path: Path) -> None:
    config = bench.WebConfig(data=dataset.root)
    faces = np.zeros((1, 48, 48, 4), np.uint8)
    found, absent = bench.list_candidates(config, {}, faces, dataset)
    assert [(one.precision, one.threads, one.file) for one in found] == [
        *(("fp32, deploy graph", 1, "model.onnx"), ("fp32, deploy graph", 2, "model.onnx"))
    ]
    assert [row["model"] for row in absent] == ["face-api"]
    with pytest.raises(ConfigError, match=r"--face-api: expected a folder with face-api\.esm\.js"):
        bench.list_candidates(dataclasses.replace(config, face_api=tmp_path), {}, faces, dataset)


def test_a_model_of_other_labels(dataset: Dataset, model_files: dict[str, Path]) -> None:
    config = bench.WebConfig(data=dataset.root, models=(model_files["onnx"],))
    with pytest.raises(DatasetError, match="Contempt"):
        bench.list_candidates(config, {}, np.zeros((1, 48, 48, 4), np.uint8), dataset)


def test_face_api_alone_gets_no_threads_that_were_not_asked_for(tmp_path: Path) -> None:
    """TensorFlow.js takes threads wherever a page can have them."""
    one = bench.Candidate("face-api", "fp32", 1, {}, "")
    assert not one.headers and dataclasses.replace(one, threads=2).headers
    assert dataclasses.replace(one, model="ours").headers


def test_sizes() -> None:
    site = {"index.html": b"a" * 1000, "ort/a.wasm": b"bb", "ort/a.asyncify.wasm": b"ccc"}
    sizes = bench.sizes({**site, "model.onnx": b"dddd", "yunet.onnx": b"eeeee"})
    assert [row["bytes"] for row in sizes.values()] == [1000, 4, 5, 2, 3]
    assert sizes["page"]["gzip_bytes"] < 100


def test_goals() -> None:
    kind = "fp32, deploy graph"
    ours = {"model": "ours", "precision": kind, "threads": 1, "p50_ms": 5.0, "accuracy": 0.85}
    theirs = {**ours, "model": "face-api", "precision": "fp32", "p50_ms": 10.0, "accuracy": 0.69}
    result: dict[str, Any] = {"cases": [ours, theirs], "first_result": {"p50_ms": 2500.0}}
    assert [goal["met"] for goal in bench.goals(result)] == [False, True, True]
    theirs["p50_ms"] = 8.0
    assert [goal["met"] for goal in bench.goals(result)] == [False, False, True]


@pytest.mark.slow
def test_one_command_measures_everything(
    dataset: Dataset, tmp_path: Path, yunet_named: None, capsys: Any
) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs playwright: [dev]")
    if shutil.which("chromium") is None and shutil.which("google-chrome") is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    if not Path(os.environ.get(FILE_VARIABLE) or cache_folder() / RUNTIME.name).is_file():
        pytest.skip(f"needs {RUNTIME.name}: efficientface-web fetches it")
    options = ["--rounds", "3", "--calls", "3", "--starts", "1", "--out", str(tmp_path / "out")]
    assert bench.main([str(dataset.root), *options]) == 0
    result = json.loads((tmp_path / "out/web.json").read_text())
    assert [row["threads"] for row in result["cases"]] == [1, 2]
    for row in result["cases"]:
        assert row["accuracy"] == 0.5 and row["p50_ms"] > 0.1 and row["calls"] == 9
    assert 0 < result["first_result"]["ready_ms"] < result["first_result"]["p50_ms"]
    assert result["downloads"]["model"]["bytes"] > 5_000_000
    assert "In the browser, FER+" in capsys.readouterr().out
