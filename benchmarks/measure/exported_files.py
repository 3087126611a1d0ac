"""What exported files answer here, against what they must: ``python -m ... FOLDER REFERENCE``.

Run in an environment of its own by :mod:`benchmarks.versions`: it needs a runtime and no more.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

import efficientface_deploy as ef
from efficientface_deploy.errors import EfficientFaceError, ProbeError
from efficientface_deploy.vision.preprocess import Float32Array

PACKAGES = ("onnxruntime", "numpy", "pillow", "onnx")


def describe() -> dict[str, Any]:
    """What is installed here, by version, and the architecture."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    where = {"python": platform.python_version(), "architecture": platform.machine()}
    return {**where, "packages": packages}


def compare_files(folder: Path, reference: Path) -> list[dict[str, Any]]:
    """A row for each ONNX file of a folder: whether it loads, and how it answers.

    Args:
        folder: Of the files.
        reference: An ``.npz`` with ``images`` (N, S, S, 3), PyTorch's ``probabilities`` (N, C), and
            under each file's name its own where it was computed rightly.
    """
    with np.load(reference) as arrays:
        right = dict(arrays)
    rows = []
    for path in sorted(folder.glob("*.onnx")):
        row: dict[str, Any] = {"file": path.name, "refused": None, "probe": None}
        try:
            with ef.load(path) as predictor:
                row["probe"] = predictor.checked and predictor.checked.difference
                found = predictor.infer(right["images"])[1]
        except EfficientFaceError as error:
            row["refused"] = str(error)
            if not isinstance(error, ProbeError):
                rows.append(row)
                continue
            with ef.load(path, check=False) as predictor:
                found = predictor.infer(right["images"])[1]
        rows.append(row | differences(found, right["probabilities"], right[path.name]))
    return rows


def differences(found: Float32Array, torch: Float32Array, same_file: Float32Array) -> Any:
    """How far probabilities (N, C) are from PyTorch's, and from those of the same file."""
    return {
        "agreement": float((found.argmax(axis=1) == torch.argmax(axis=1)).mean()),
        "max_difference": float(abs(found - torch).max()),
        "same_file_difference": float(abs(found - same_file).max()),
    }


if __name__ == "__main__":
    print(json.dumps({**describe(), "files": compare_files(*map(Path, sys.argv[1:3]))}))
