"""What exported files answer, and whether that is right: told for files that are and are not."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import efficientface_deploy as ef
from benchmarks import ROOT
from efficientface_deploy.artifact import PROBE_KEY
from efficientface_deploy.probe import Probe


@pytest.fixture
def found(
    make_onnx: Callable[..., Path], colours: np.ndarray, tmp_path: Path
) -> dict[str, dict[str, Any]]:
    """The rows of a file that is right, one that another engine would compute, and two refused."""
    folder = make_onnx("files/right.onnx").parent
    images = np.broadcast_to(colours[:, None, None], (7, 32, 32, 3)).astype(np.uint8)
    with ef.load(folder / "right.onnx") as predictor:
        logits, probabilities = predictor.infer(images)
    make_onnx("files/moved.onnx", colours=np.roll(colours, 1, axis=0))
    (folder / "damaged.onnx").write_bytes(b"none")
    model = onnx.load(folder / "right.onnx")
    entry = model.metadata_props.add()
    probe = Probe(np.ascontiguousarray(images[:2]), -logits[:2], 0.01)
    entry.key, entry.value = PROBE_KEY, json.dumps(probe.record())
    onnx.save(model, folder / "probed.onnx")
    same = {path.name: probabilities for path in folder.iterdir()}
    np.savez(tmp_path / "reference.npz", images=images, probabilities=probabilities, **same)
    command = [sys.executable, "-m", "benchmarks.measure.exported_files"]
    done = subprocess.run(
        [*command, folder, tmp_path / "reference.npz"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["packages"]["numpy"] == importlib.metadata.version("numpy")
    return {row["file"]: row for row in result["files"]}


def test_answers_are_compared_with_pytorch_and_with_the_same_file(found: dict[str, Any]) -> None:
    assert found["right.onnx"]["agreement"] == 1
    assert found["right.onnx"]["same_file_difference"] < 1e-6
    assert found["right.onnx"]["refused"] is None
    assert found["moved.onnx"]["agreement"] == 0
    assert found["moved.onnx"]["same_file_difference"] > 0.5


def test_what_a_probe_refuses_is_run_without_it(found: dict[str, Any]) -> None:
    assert "the logits that probed.onnx says it gives" in found["probed.onnx"]["refused"]
    assert found["probed.onnx"]["agreement"] == 1


def test_a_file_that_does_not_load_has_a_reason_and_no_figures(found: dict[str, Any]) -> None:
    assert "damaged.onnx" in found["damaged.onnx"]["refused"]
    assert "agreement" not in found["damaged.onnx"]
