from __future__ import annotations

import importlib
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import BackendError, ImageError
from efficientface_deploy.vision.video import Video, open_video, write_video


@pytest.fixture
def clip(tmp_path) -> Path:
    """Five frames, 12.5 a second, each redder and bluer than the one before, 64 wide, 48 high."""
    pytest.importorskip("cv2")
    path = tmp_path / "clip.mp4"
    with write_video(path, 12.5) as write:
        for at in range(5):
            write(Image.new("RGB", (64, 48), (50 * at, 0, 20 * at)))
    return path


def test_frames_are_rgb_in_order(clip):
    with open_video(clip) as video:
        assert video.rate == pytest.approx(12.5)
        frames = list(video)
    assert {(frame.shape, frame.dtype) for frame in frames} == {((48, 64, 3), np.dtype(np.uint8))}
    colours = np.array([frame.mean(axis=(0, 1)) for frame in frames])
    np.testing.assert_allclose(colours, [(50 * at, 0, 20 * at) for at in range(5)], atol=6)
    assert all(frame.flags.c_contiguous for frame in frames)


def test_string_and_path(clip):
    with open_video(str(clip)) as video:
        assert len(list(video)) == 5


def test_closed_video_gives_nothing(clip):
    with open_video(clip) as video:
        next(iter(video))
    assert list(video) == []


def test_closing_waits_for_a_frame_that_is_being_read():
    """OpenCV's capture is not to be freed under a thread that reads from it."""
    reading, released = threading.Event(), threading.Event()

    class Capture:
        def read(self):
            reading.set()
            assert not released.wait(0.2)
            return True, np.zeros((2, 2, 3), np.uint8)

        def release(self):
            released.set()

    video = Video(Capture(), 25)
    with ThreadPoolExecutor() as pool:
        frame = pool.submit(next, iter(video))
        assert reading.wait(10)
        video.close()
        assert frame.result(10).shape == (2, 2, 3)
    assert released.is_set()


def test_video_that_fails_leaves_nothing(tmp_path):
    pytest.importorskip("cv2")
    with pytest.raises(ZeroDivisionError), write_video(tmp_path / "a/clip.mp4", 10) as write:
        write(Image.new("RGB", (64, 48)))
        raise ZeroDivisionError
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.mp4", "no such file"), (".", "a folder"), (97, "camera 97.*who else uses it")],
)
def test_source_that_is_not_there(source, message):
    pytest.importorskip("cv2")
    with pytest.raises(ImageError, match=message):
        open_video(source)


def test_file_that_is_no_video(tmp_path):
    pytest.importorskip("cv2")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match=r"text\.mp4.*convert it to MP4"):
        open_video(tmp_path / "text.mp4")


@pytest.mark.parametrize("rate", [0.0, float("nan"), -1.0])
def test_camera_that_does_not_say_its_rate(monkeypatch, rate):
    class Capture:
        def __init__(self, source):
            assert source == 0

        def isOpened(self):  # noqa: N802 - OpenCV's name
            return True

        def get(self, key):
            return rate

    opencv = types.SimpleNamespace(VideoCapture=Capture, CAP_PROP_FPS=5)
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    assert open_video(0).rate == 25


def test_opencv_that_is_missing_or_broken_names_the_extra(monkeypatch):
    load_module = importlib.import_module

    def import_module(name: str) -> object:
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return load_module(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(BackendError, match=r"OpenCV.*libGL.*efficientface-deploy\[video\]"):
        open_video("clip.mp4")


def test_source_of_another_type():
    with pytest.raises(ImageError, match=r"^video: expected a path or .*, found None; "):
        open_video(None)
