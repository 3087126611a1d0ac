from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.errors import ConfigError, DatasetError, ImageError
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import to_model_input
from efficientface_deploy.workbench.dataset import Sample
from training.trainer import pictures as module
from training.trainer.pictures import Pictures, common_side

CPU = torch.device("cpu")
SPECS = {
    "rgb": preset("rafdb").replace(input_size=32),
    "grey": preset("ferplus").replace(input_size=32),
}


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Seventy grey pictures."""
    random, found = np.random.default_rng(0), []
    for number in range(70):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
        found.append(Sample(path, number % 7))
    return found


@pytest.fixture
def colourful(samples: list[Sample]) -> list[Sample]:
    """All but the last five are grey."""
    for sample in samples[-5:]:
        pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sample.path)
    return samples


def expected(samples: list[Sample], colour: str) -> np.ndarray:
    return np.stack([to_model_input(sample.path, SPECS[colour]) for sample in samples])


@pytest.mark.parametrize(("colour", "channels"), [("rgb", 3), ("grey", 1)])
def test_all_are_kept_as_the_runtime_resizes_them(colour, channels, samples):
    kept = Pictures(samples, SPECS[colour], "auto").keep(CPU)
    assert kept.shape == (70, 32, 32, channels) and kept.dtype == torch.uint8
    assert np.array_equal(np.broadcast_to(kept, (70, 32, 32, 3)), expected(samples, colour))


def test_colours_among_grey_pictures_are_kept(colourful):
    kept = Pictures(colourful, SPECS["grey"], "yes").keep(CPU)
    assert np.array_equal(kept, expected(colourful, "grey"))
    assert Pictures(colourful, SPECS["grey"], "no").read(0).shape == (32, 32, 1)
    assert Pictures(colourful, SPECS["grey"], "no").read(69).shape == (32, 32, 3)


def test_they_are_read_once(samples, monkeypatch):
    pictures = Pictures(samples, SPECS["rgb"], "auto")
    kept = pictures.keep(CPU)
    monkeypatch.setattr(pictures, "read", lambda *_: pytest.fail("read again"))
    assert pictures.keep(CPU) is kept


@pytest.mark.parametrize(
    ("free", "processes", "auto"),
    [(4 * 215_040, 1, True), (4 * 215_040 - 1, 1, False), (4 * 215_040, 2, False)],
)
def test_as_much_as_fits_is_kept(free, processes, auto, samples, monkeypatch):
    """215,040 bytes are a quarter of what is free, or not."""
    monkeypatch.setattr(module, "available_memory_bytes", lambda: free)
    spec = SPECS["rgb"]
    assert (Pictures(samples, spec, "auto").keep(CPU, processes) is not None) == auto
    assert Pictures(samples, spec, "yes").keep(CPU, processes) is not None
    assert Pictures(samples, spec, "no").keep(CPU, processes) is None


def test_what_must_be_kept_and_does_not_fit_is_refused(samples, monkeypatch):
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 200_000)
    with pytest.raises(
        ConfigError,
        match="--data-on-device yes: expected 215,040 bytes of free memory for 70 pictures on cpu, "
        "found 200,000 bytes; leave it out",
    ):
        Pictures(samples, SPECS["rgb"], "yes").keep(CPU)


@pytest.mark.parametrize("on_device", ["yes", "no"])
@pytest.mark.parametrize("change", ["another", "touched", "gone"])
def test_picture_that_changes_during_a_run_is_named(on_device, change, samples):
    pictures = Pictures(samples, SPECS["rgb"], on_device)
    path = samples[66].path
    if change == "another":
        shutil.copy(samples[3].path, path)
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    wanted = (
        (ImageError, "no such file") if change == "gone" else (DatasetError, "one that has changed")
    )
    with pytest.raises(wanted[0], match=rf"66\.png: expected .*{wanted[1]}"):
        pictures.keep(CPU) if on_device == "yes" else pictures.read(66)


def test_native_pictures_stay_as_they_are(samples):
    kept = Pictures(samples, SPECS["grey"], "yes", native=True).keep(CPU)
    assert kept.shape == (70, 40, 40, 1)
    assert np.array_equal(kept[7, ..., 0], np.array(Image.open(samples[7].path)))


def test_common_side(samples, tmp_path):
    assert common_side(samples) == 40
    Image.new("RGB", (40, 41)).save(tmp_path / "other.png")
    assert common_side([*samples, Sample(tmp_path / "other.png", 0)]) is None
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert common_side([*samples, Sample(tmp_path / "broken.png", 0)]) is None


@pytest.mark.gpu
def test_pictures_lie_on_the_gpu(samples):
    kept = Pictures(samples, SPECS["grey"], "auto").keep(torch.device("cuda"))
    assert kept.is_cuda
    assert np.array_equal(np.broadcast_to(kept.cpu(), (70, 32, 32, 3)), expected(samples, "grey"))
