from __future__ import annotations

import copy
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import download, open_detector
from efficientface_deploy.cli import PredictConfig
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.files import file_hash
from efficientface_deploy.predictor import BUNDLED_ONNX
from efficientface_deploy.vision.search import suppress
from efficientface_deploy.vision.yunet import FILE_VARIABLE, WEIGHTS, YuNet, decode_yunet

ROOT = Path(__file__).resolve().parents[3]

# ---- beside OpenCV


def crowd(astronaut: np.ndarray, seed: int) -> np.ndarray:
    """A picture with many faces of many sizes, on noise; no side of it fits the network's cells."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (487, 651, 3), dtype=np.uint8)
    head = Image.fromarray(astronaut[20:240, 120:330])
    for _ in range(12):
        side = int(rng.integers(20, 140))
        left, top = int(rng.integers(0, 651 - side)), int(rng.integers(0, 487 - side))
        picture[top : top + side, left : left + side] = head.resize((side, side))
    return picture


def pictures(astronaut: np.ndarray) -> list[np.ndarray]:
    small = np.asarray(Image.fromarray(astronaut).resize((160, 160)))
    turned = np.ascontiguousarray(np.rot90(astronaut))
    crowds = [crowd(astronaut, seed) for seed in range(3)]
    return [astronaut, small, turned, astronaut[:, :300].copy(), *crowds]


@pytest.mark.parametrize("min_score", [0.5, 0.9])
def test_equal_to_opencv(yunet_file, astronaut, min_score):
    cv2 = pytest.importorskip("cv2")
    theirs = cv2.FaceDetectorYN.create(str(yunet_file), "", (32, 32), min_score, 0.3)
    ours = YuNet(yunet_file, threads=1)
    compared = 0
    for picture in pictures(astronaut):
        theirs.setInputSize(picture.shape[1::-1])
        _, rows = theirs.detect(np.ascontiguousarray(picture[..., ::-1]))
        rows = np.empty((0, 15)) if rows is None else rows[np.argsort(-rows[:, 14])]
        found = ours.search(picture, min_score)
        best = suppress(found.boxes, found.scores)
        assert len(best) == len(rows)
        boxes, points = found.boxes[best], found.points[best]
        np.testing.assert_allclose(boxes[:, :2], rows[:, :2], atol=0.5)
        np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], rows[:, 2:4], atol=0.5)
        np.testing.assert_allclose(points.reshape(-1, 10), rows[:, 4:14], atol=0.5)
        np.testing.assert_allclose(found.scores[best], rows[:, 14], atol=1e-3)
        compared += len(rows)
    assert compared >= (10 if min_score == 0.5 else 5)


# ---- decoding


def test_decode_by_hand():
    """A picture of 64x32: 8x4, 4x2 and 2x1 cells."""
    maps = {}
    for stride, cells in ((8, 32), (16, 8), (32, 2)):
        sizes = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
        maps |= {f"{kind}_{stride}": np.zeros((cells, n), np.float32) for kind, n in sizes.items()}
    maps["cls_16"][6], maps["obj_16"][6] = 1.0, 0.36  # row 1, column 2
    maps["bbox_16"][6] = 0.5, 0.25, np.log(3), np.log(2)
    maps["kps_16"][6] = [0, 0, 1, 0, 0.5, -1, 0, 0, 0, 0.5]
    maps["cls_8"][0], maps["obj_8"][0] = 0.5, 0.4  # 0.447, below the threshold
    maps["cls_32"][1], maps["obj_32"][1] = 1.5, 0.81  # clipped to 1: 0.9
    boxes, scores, points = decode_yunet(maps, 64, 0.5)
    np.testing.assert_allclose(scores, [0.6, 0.9], atol=1e-6)
    np.testing.assert_allclose(boxes[0], [16, 4, 64, 36], atol=1e-5)
    np.testing.assert_allclose(points[0], [(32, 16), (48, 16), (40, 0), (32, 16), (32, 24)])
    np.testing.assert_allclose(boxes[1], [16, -16, 48, 16])


def test_decode_nothing():
    maps = {
        f"{kind}_{stride}": np.zeros((4, n), np.float32)
        for stride in (8, 16, 32)
        for kind, n in {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}.items()
    }
    boxes, scores, points = decode_yunet(maps, 64, 0.5)
    assert (boxes.shape, scores.shape, points.shape) == ((0, 4), (0,), (0, 5, 2))


# ---- the model file


def test_what_is_fetched_is_the_file_of_the_model_zoo(yunet_file):
    assert file_hash(yunet_file) == WEIGHTS.sha256
    assert yunet_file.stat().st_size == WEIGHTS.size
    assert WEIGHTS.url.startswith("https://") and WEIGHTS.url.endswith(WEIGHTS.name)


def test_its_size_is_the_same_everywhere():
    """In the help, which asks, and in the docstring and the pages, which cannot."""
    help_text = next(f for f in fields(PredictConfig) if f.name == "faces").metadata["help"]
    pages = ["CHANGELOG.md", "docs/faces-and-video.md", "examples/photos.py", "examples/video.py"]
    texts = [
        help_text,
        open_detector.__doc__,
        *((ROOT / page).read_text("utf-8") for page in pages),
    ]
    for text in texts:
        said = re.findall(r"fetch.*?(\d+) KB|(\d+) KB.*?fetch", text)
        assert {size for pair in said for size in pair if size} == {str(WEIGHTS.kilobytes)}


def test_in_the_cache(yunet_file, astronaut, tmp_path, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path))
    shutil.copy(yunet_file, tmp_path)
    monkeypatch.setattr(download, "_download", None)  # nothing is fetched
    (face,) = open_detector(threads=1).detect(astronaut)
    assert face == open_detector(f"yunet={yunet_file}", threads=1).detect(astronaut)[0]


def test_a_copy_is_of_the_same_file_in_another_folder(yunet_file, astronaut, tmp_path, monkeypatch):
    (tmp_path / "yunet.onnx").symlink_to(yunet_file)
    monkeypatch.chdir(tmp_path)
    detector = open_detector("yunet=yunet.onnx", threads=1)
    monkeypatch.chdir("/")
    assert copy.copy(detector).detect(astronaut) == detector.detect(astronaut)


def test_named_by_the_environment(yunet_file, astronaut, monkeypatch, tmp_path):
    monkeypatch.setenv(FILE_VARIABLE, str(yunet_file))
    assert len(open_detector("yunet", threads=1).detect(astronaut)) == 1
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "missing.onnx"))
    with pytest.raises(ArtifactError, match="no such file"):
        open_detector()


def test_fetched_when_it_is_opened(yunet_file, monkeypatch, tmp_path):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path))
    asked = []
    monkeypatch.setattr(
        download, "_download", lambda wanted: (asked.append(wanted), yunet_file.read_bytes())[1]
    )
    YuNet(threads=1), YuNet(threads=1)
    assert asked == [WEIGHTS]


def test_without_a_network(monkeypatch, tmp_path):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path))

    def fail(wanted: object) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(download, "_download", fail)
    place = tmp_path / WEIGHTS.name
    said = rf"no route to host; put the file at {place} \(sha256 8f2383e4.*--detect yunet=FILE"
    with pytest.raises(BackendError, match=said):
        YuNet()


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"no model", "something else"), (None, "outputs .*logits, probabilities")],
)
def test_file_that_is_no_yunet(tmp_path, content, found):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(BUNDLED_ONNX.read_bytes() if content is None else content)
    with pytest.raises(ArtifactError, match=found):
        YuNet(path)


def test_damaged_weights(yunet_file, tmp_path):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(yunet_file.read_bytes()[:-500])
    with pytest.raises(ArtifactError, match=r"yunet\.onnx"):
        YuNet(path)


def test_newer_file_of_the_model_zoo(shared, astronaut, yunet_file):
    newer = shared / "reference/face_detection_yunet_2026may.onnx"
    if not newer.is_file():
        pytest.skip(f"needs {newer}")
    (one,), (other,) = (YuNet(path, threads=1).detect(astronaut) for path in (yunet_file, newer))
    np.testing.assert_allclose(one.box, other.box, atol=10)
