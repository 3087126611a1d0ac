from __future__ import annotations

import pytest

from efficientface_deploy import open_detector
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.vision.yunet import FILE_VARIABLE


def test_yunet_without_arguments(yunet_file, monkeypatch):
    monkeypatch.setenv(FILE_VARIABLE, str(yunet_file))
    assert open_detector().name == open_detector("yunet").name == "yunet"


def test_file_and_options(yunet_file):
    opened = open_detector(
        f"yunet={yunet_file}", 1, min_score=0.7, min_face=40, max_side=512, backend="onnx:cpu"
    )
    assert (opened.min_score, opened.min_face, opened.max_side) == (0.7, 40, 512)


def test_centerface(centerface):
    assert open_detector("centerface", threads=1).name == centerface.name


@pytest.mark.parametrize("name", ["", "yunet=", "centerface=x", "haar", None, 3])
def test_unknown_detector(name):
    with pytest.raises(ConfigError, match="yunet, yunet=FILE or centerface"):
        open_detector(name)
