"""YuNet, decoded here: neither OpenCV nor any other package than ONNX Runtime."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficientface_deploy.artifact import external_files
from efficientface_deploy.download import Download, fetch
from efficientface_deploy.files import require_file
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.vision.search import Found, OnnxDetector

FILE_VARIABLE = "EFFICIENTFACE_YUNET"
"""Environment variable: YuNet's model file, in place of the one that is fetched."""

WEIGHTS = Download(
    name="face_detection_yunet_2023mar.onnx",
    # OpenCV's model zoo keeps its files in Git LFS, which this address serves.
    url="https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models/"
    "face_detection_yunet/face_detection_yunet_2023mar.onnx",
    sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    size=232_589,
)

_STRIDES = (8, 16, 32)  # pixels of the picture for one cell of each map
_KINDS = ("cls", "obj", "bbox", "kps")


class YuNet(OnnxDetector):
    """YuNet; see :class:`OnnxDetector` for its further arguments.

    W. Wu, H. Peng, S. Yu, "YuNet: A Tiny Millisecond-level Face Detector" (2023). The weights are
    theirs (MIT), trained on WIDER FACE, and OpenCV's model zoo publishes them; they are fetched
    from there once, into the user's cache.

    Args:
        model: A file ``face_detection_yunet_*.onnx`` of OpenCV's model zoo; None takes the one that
            the environment variable ``EFFICIENTFACE_YUNET`` names, else the cache's.
    """

    name = "yunet"
    input_name = "input"
    outputs = tuple(f"{kind}_{stride}" for stride, kind in itertools.product(_STRIDES, _KINDS))
    smallest, largest = 14.0, 300.0
    # It takes the points of a head that lies or hangs where an upright one's would be. Of a hundred
    # photographs nine in ten had 0.90 and more upright, and 0.86 and less upside down.
    doubtful = 0.88

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self._file = model or os.environ.get(FILE_VARIABLE) or None
        super().__init__(**options)
        self._options["model"] = self._file and Path(self._file).absolute()  # for a copy elsewhere

    def search(self, picture: UInt8Array, min_score: float) -> Found:
        """Find faces in a picture as it is; see :meth:`OnnxDetector.search`."""
        outputs = self._run(picture[..., ::-1])  # OpenCV's order of colours
        maps = dict(zip(self.outputs, outputs, strict=True))
        columns = -(-picture.shape[1] // 32) * 32
        return decode_yunet(maps, columns, min_score)

    def _read_model(self) -> tuple[Path, bytes]:
        return read_weights(self._file)

    def _fix(self) -> str:
        return "take face_detection_yunet_2023mar.onnx from OpenCV's model zoo"


def read_weights(file: str | Path | None = None) -> tuple[Path, bytes]:
    """YuNet's model file, and what is in it.

    Args:
        file: As for :class:`YuNet`.

    Raises:
        ArtifactError: The file is missing, or names others elsewhere.
        BackendError: It is not in the cache and cannot be fetched.
    """
    file = file or os.environ.get(FILE_VARIABLE) or None
    if file is None:
        return Path(WEIGHTS.name), fetch(WEIGHTS, "face detector yunet", _GIVE)
    path = require_file(file, "a YuNet model file")
    external_files(path)  # refuses what a library would read elsewhere
    return path, path.read_bytes()


_GIVE = f"name another file by --detect yunet=FILE or {FILE_VARIABLE}"


def decode_yunet(maps: Mapping[str, Float32Array], width: int, min_score: float) -> Found:
    """YuNet's maps to faces: those of each cell of three grids, row after row.

    Args:
        maps: ``cls_8``, ``obj_8`` (N, 1), ``bbox_8`` (N, 4), ``kps_8`` (N, 10), and the same for 16
            and 32 pixels a cell. A score is the geometric mean of the first two, a box the middle's
            distance from the cell's corner and the logarithms of its sides, a point its distance,
            all in cells.
        width: Pixels of a row, filled up to whole cells.
        min_score: Smallest score of a face.
    """
    boxes, scores, points = [], [], []
    for stride in _STRIDES:
        kinds, objects, sizes, landmarks = (maps[f"{kind}_{stride}"] for kind in _KINDS)
        products = np.clip(kinds[:, 0], 0, 1) * np.clip(objects[:, 0], 0, 1)  # (N,)
        (found,) = np.nonzero(products >= min_score**2)
        corners = np.column_stack(np.divmod(found, width // stride)[::-1]).astype(np.float64)
        box = sizes[found].astype(np.float64)  # (M, 4)
        middles, half = corners + box[:, :2], np.exp(box[:, 2:]) / 2
        five = corners[:, None] + landmarks[found].reshape(-1, 5, 2)  # (M, 5, 2)
        boxes.append(np.column_stack([middles - half, middles + half]) * stride)
        scores.append(np.sqrt(products[found].astype(np.float64)))
        points.append(five * stride)
    return Found(np.concatenate(boxes), np.concatenate(scores), np.concatenate(points))
