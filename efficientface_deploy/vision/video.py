"""Video files and cameras, by OpenCV, which is imported only here and when it is needed."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficientface_deploy.backends.base import import_package
from efficientface_deploy.errors import BackendError, ImageError
from efficientface_deploy.files import atomic_path, why_not_a_file
from efficientface_deploy.vision.preprocess import UInt8Array

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")

_DEFAULT_RATE = 25.0  # frames per second, where a camera does not say


class Video:
    """The frames of a video file or a camera, uint8 (H, W, 3) RGB each, made by ``open_video``.

    Attributes:
        rate: Frames per second, as the file or the camera says; 25 where it does not.
    """

    def __init__(self, capture: Any, rate: float) -> None:
        self.rate = rate
        self._capture = capture
        self._lock = threading.Lock()  # a stream may be reading in its thread while this is closed

    def __iter__(self) -> Iterator[UInt8Array]:
        """The frames that are left; they end with the file, or when the camera is unplugged."""
        while True:
            with self._lock:
                there, frame = self._capture.read()
            if not there:
                return
            yield np.ascontiguousarray(frame[..., ::-1])  # OpenCV's order is BGR

    def close(self) -> None:
        """Free the file or the camera; there are no more frames then."""
        with self._lock:
            self._capture.release()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_video(source: str | Path | int) -> Video:
    """Open a video file, or a camera by its number.

    Raises:
        ImageError: It is neither, or OpenCV cannot read it.
        BackendError: OpenCV is not installed.
    """
    if not isinstance(source, (str, os.PathLike, int)):
        fix = "give e.g. 0, the first camera"
        raise ImageError("video", "a path or a camera's number", repr(source)[:40], fix)
    cv2 = import_opencv()
    if isinstance(source, int):
        subject, expected = f"camera {source}", "a camera that OpenCV can open"
        fix = "check its number, and who else uses it"
    else:
        subject, expected = str(source), "a video that OpenCV can read"
        fix = "convert it to MP4 (H.264)"
        if (reason := why_not_a_file(Path(source))) is not None:
            raise ImageError(source, "a video file", reason, "check the path")
    capture = cv2.VideoCapture(source if isinstance(source, int) else opencv_name(source))
    if not capture.isOpened():
        capture.release()
        raise ImageError(subject, expected, "one that it cannot", fix)
    rate = capture.get(cv2.CAP_PROP_FPS)
    return Video(capture, rate if math.isfinite(rate) and rate > 0 else _DEFAULT_RATE)


@contextlib.contextmanager
def write_video(path: str | Path, rate: float) -> Iterator[Callable[[Image.Image], None]]:
    """Write a video that appears under its name when the block ends without an error.

    Args:
        path: An ``.mp4`` file, written as MPEG-4.
        rate: Frames per second.

    Yields:
        What adds a picture, RGB, each of the same size.

    Raises:
        BackendError: This OpenCV cannot write such a video, or is not installed.
    """
    cv2 = import_opencv()
    writer: Any = None
    with atomic_path(path) as temporary:

        def write(image: Image.Image) -> None:
            nonlocal writer
            if writer is None:
                code = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(opencv_name(temporary), code, rate, image.size)
            if not writer.isOpened():
                expected, found = "an OpenCV that writes MPEG-4 in .mp4", "one that does not"
                fix = "install opencv-python-headless, which has FFmpeg with it"
                raise BackendError(temporary.name, expected, found, fix)
            writer.write(np.ascontiguousarray(np.asarray(image)[..., ::-1]))

        try:
            yield write
        finally:
            if writer is not None:
                writer.release()


def opencv_name(path: str | Path) -> str | bytes:
    """A file's name as OpenCV takes it: a text that is no UTF-8 ends the process (5.0)."""
    name = str(path)
    return name if name.isprintable() else os.fsencode(name)


def import_opencv() -> Any:
    """The module ``cv2``.

    Raises:
        BackendError: It is not installed, or cannot be loaded.
    """
    return import_package("cv2", "OpenCV", "the module cv2", "video")
