"""A file that tests itself: how a probe is written, what it catches, and how it is turned off."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import logging
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

import efficientface_deploy as ef
from efficientface_deploy.backends.base import Backend, Output
from efficientface_deploy.backends.onnx import OnnxBackend
from efficientface_deploy.cli import main
from efficientface_deploy.predictor import BUNDLED_ONNX, CHECK_VARIABLE
from efficientface_deploy.probe import TOLERANCES, Probe, enlarge

RANDOM = np.random.default_rng(0)
PROBE = Probe(
    RANDOM.integers(0, 256, (2, 5, 5, 3)).astype(np.uint8),
    RANDOM.normal(size=(2, 7)).astype(np.float32),
    0.01,
)
OLD = Path(__file__).resolve().parents[1] / "data" / "made-at-43ba709.zip"


def broken(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Make every ONNX session answer wrongly."""
    infer = OnnxBackend._infer
    monkeypatch.setattr(
        OnnxBackend, "_infer", lambda self, images: change(lambda x: infer(self, x), images)
    )


def shifted(infer, images):
    output = infer(images)
    return dataclasses.replace(output, logits=output.logits + RANDOM.normal(0, 0.5, (8,)))


FAULTS = {
    "other weights": lambda infer, images: Output(
        infer(images).logits[:, ::-1], infer(images).probabilities
    ),
    "swapped channels": lambda infer, images: infer(np.ascontiguousarray(images[..., ::-1])),
    "channels of the layout": lambda infer, images: infer(
        np.ascontiguousarray(images.transpose(0, 2, 1, 3))
    ),
    "overflow": lambda infer, images: Output(
        np.full_like(infer(images).logits, np.inf), infer(images).probabilities
    ),
    "saturation": lambda infer, images: Output(
        np.clip(infer(images).logits, -1, 1), infer(images).probabilities
    ),
    "another order of classes": shifted,
}


class TestRecord:
    def test_round_trip(self):
        found = Probe.from_text(json.dumps(PROBE.record()), "x", 7)
        np.testing.assert_array_equal(found.pixels, PROBE.pixels)
        np.testing.assert_allclose(found.logits, PROBE.logits, atol=1e-6)
        assert found.tolerance == 0.01

    @pytest.mark.parametrize("side", [3, 5, 16, 224, 1024])
    def test_pixels_are_repeated_by_integers_alone(self, side):
        images = PROBE.images(side)
        assert images.shape == (2, side, side, 3) and images.dtype == np.uint8
        for row, column in RANDOM.integers(0, side, (20, 2)):
            expected = PROBE.pixels[:, row * 5 // side, column * 5 // side]
            np.testing.assert_array_equal(images[:, row, column], expected)

    def test_no_probe_and_one_of_later_make(self):
        assert Probe.from_text(None, "x", 7) is None
        assert Probe.from_record({**PROBE.record(), "schema": 2}, "x", 7) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"pixels": "?"},
            {"pixels": base64.b64encode(b"short").decode()},
            {"logits": [[1.0] * 6] * 2},
            {"logits": []},
            {"logits": [[float("nan")] * 7] * 2},
            {"side": 0},
            {"side": "5"},
            {"side": -5},
            {"tolerance": 0},
            {"tolerance": float("inf")},
            {"tolerance": None},
        ],
    )
    def test_damaged(self, change):
        with pytest.raises(ef.EfficientFaceError, match="a damaged one"):
            Probe.from_record({**PROBE.record(), **change}, "x", 7)

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '"probe"', "[" * 100_000])
    def test_damaged_text(self, text):
        with pytest.raises(ef.EfficientFaceError, match="a damaged one"):
            Probe.from_text(text, "x", 7)


class TestDifference:
    def test_is_a_part_of_the_spread(self):
        assert PROBE.difference(PROBE.logits) == 0
        scaled = dataclasses.replace(PROBE, logits=PROBE.logits * 100)
        assert scaled.difference(PROBE.logits * 101) == pytest.approx(
            PROBE.difference(PROBE.logits * 1.01), rel=1e-4
        )

    def test_nan_is_no_small_difference(self):
        logits = PROBE.logits.copy()
        logits[0, 0] = np.nan
        assert not PROBE.difference(logits) <= 1e9


class TestLoad:
    def test_bundled_model_is_checked(self):
        with ef.load(threads=1) as predictor:
            assert predictor.checked.passed and predictor.checked.difference < 1e-5
            assert predictor.checked.tolerance == TOLERANCES["fp32"]
            assert predictor.checked.engine.startswith("onnx:cpu, onnxruntime 1.")

    @pytest.mark.parametrize("fault", FAULTS)
    def test_wrong_engine_is_refused(self, fault, monkeypatch):
        broken(monkeypatch, FAULTS[fault])
        closed = []
        close = Backend.close
        monkeypatch.setattr(Backend, "close", lambda self: (closed.append(1), close(self)))
        with pytest.raises(ef.ProbeError) as caught:
            ef.load()
        text = str(caught.value)
        assert "onnx:cpu, onnxruntime" in text and BUNDLED_ONNX.name in text
        assert "update onnxruntime" in text and "load(check=False)" in text
        assert closed

    def test_check_can_be_turned_off(self, monkeypatch):
        broken(monkeypatch, FAULTS["swapped channels"])
        with ef.load(check=False) as predictor:
            assert predictor.checked is None and predictor.has_probe
        monkeypatch.setenv(CHECK_VARIABLE, "0")
        with ef.load() as predictor:
            assert predictor.checked is None
        with pytest.raises(ef.ProbeError):
            ef.load(check=True)  # what is asked for goes before the environment
        monkeypatch.setenv(CHECK_VARIABLE, "1")
        with pytest.raises(ef.ProbeError):
            ef.load()

    def test_one_picture_at_a_time_which_is_the_warm_up(self, monkeypatch):
        batches = []
        broken(monkeypatch, lambda infer, images: (batches.append(len(images)), infer(images))[1])
        with ef.load():
            assert batches == [1, 1]

    def test_copy_checks_as_the_original_did(self):
        with ef.load(check=False) as predictor, pickle.loads(pickle.dumps(predictor)) as again:
            assert again.checked is None
        with ef.load() as predictor, copy.deepcopy(predictor) as again:
            assert again.checked is not None

    def test_older_file_says_so_in_the_log(self, tmp_path, caplog):
        with zipfile.ZipFile(OLD) as archive:
            path = archive.extract("artifacts/efficientface-fp32-cpu.onnx", tmp_path)
        with caplog.at_level(logging.INFO, "efficientface_deploy"), ef.load(path) as predictor:
            assert predictor.checked is None and not predictor.has_probe
        (message,) = [record.getMessage() for record in caplog.records]
        assert "no probe" in message and path in message

    def test_command_says_it_in_a_line(self, capsys, tmp_path, photo, monkeypatch):
        from PIL import Image

        picture = tmp_path / "face.png"
        Image.fromarray(photo).save(picture)
        assert main([str(picture)]) == 0
        assert "checked: right on onnx:cpu, onnxruntime" in capsys.readouterr().err
        monkeypatch.setenv(CHECK_VARIABLE, "0")
        assert main([str(picture)]) == 0
        assert "not checked: as asked" in capsys.readouterr().err


def test_enlarging_by_a_whole_factor_repeats():
    pixels = PROBE.pixels
    np.testing.assert_array_equal(enlarge(pixels, 10), pixels.repeat(2, axis=1).repeat(2, axis=2))
