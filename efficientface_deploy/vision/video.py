"""Video files, streams and cameras, by PyAV (FFmpeg), imported only here and when it is needed.

A file that does not reach its end is damaged, which is said after the frames that could be read. A
stream that does not is connected again. Times are those of the container, not counted frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficientface_deploy.backends.base import import_package
from efficientface_deploy.errors import ConfigError, ImageError, words_of
from efficientface_deploy.files import atomic_path, why_not_a_file
from efficientface_deploy.vision.preprocess import (
    MAX_PIXELS,
    MOST_PIXELS,
    ImageSource,
    UInt8Array,
)

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm"),
    *(".3gp", ".flv", ".m2ts", ".mpeg", ".mpg", ".mts", ".ogv", ".wmv"),
)

# Demuxers that may touch a local file: not playlists, which make FFmpeg open other files.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,nut,dv,mxf"
_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "udp", "rtp", "srt", "tcp")

# Formats whose length is written in them; of the others it is a guess from the size.
_MEASURED = ("mov", "avi", "matroska", "flv", "asf", "rtsp", "hls")

_FROM_ZERO = ("matroska", "asf")  # whose length may count from 0 where their frames begin later

_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # that begin a file

_DEFAULT_RATE = 25.0  # frames per second, where a source does not say
_SLACK = (
    1.0  # seconds that a length may be wrong by, where it is of the whole and not of the frames
)
_JUMP = 10.0  # seconds by which a live stream's clock may run ahead of ours and be believed
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0  # seconds between two tries to connect again
_MAX_FAILURES = 1000  # reads that fail one after the other, after which a file is given up

_ENCODERS = ("libx264", "mpeg4")  # the second where FFmpeg was built without the first
_TICK = Fraction(1, 60000)  # of written files: whole for 24, 25, 29.97, 30, 50 and 60 a second

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoFrame:
    """A frame and its time.

    Attributes:
        image: From :func:`efficientface_deploy.open_video` uint8 (H, W, 3), RGB, upright.
        seconds: Its time from the start of its source.
    """

    image: ImageSource
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Source:
    """What FFmpeg is asked to open.

    Attributes:
        name: For messages.
        address: FFmpeg's name for it.
        format: Its demuxer; None to find out.
        options: FFmpeg's, for demuxer and protocol.
        drops_out: Whether it is a stream or a camera, which is connected again when it fails.
        fix: What may help where it cannot be opened.
    """

    name: str
    address: str
    format: str | None
    options: dict[str, str]
    drops_out: bool
    fix: str


class Video:
    """A video file's, stream's or camera's frames, by :func:`efficientface_deploy.open_video`.

    Iterating gives the images of :meth:`timed` without their times: uint8 (H, W, 3) RGB each. Both
    give the frames that are left, none of them twice; no array is ever filled again.

    Attributes:
        rate: Frames per second on average, as the source says; 25 where it does not.
        live: Whether it has no known end: a camera, or a stream of one.
        dropouts: How often a stream or a camera stopped before its end.
        damaged: At how many places something could not be read or decoded.
    """

    def __init__(self, source: _Source, timeout: float, reconnect: float) -> None:
        self.dropouts = 0
        self.damaged = 0
        self._source = source
        self._timeout = timeout
        self._reconnect = reconnect
        self._lock = threading.Lock()  # a stream may be reading in its thread while this is closed
        self._closing = threading.Event()
        self._opened = _Opened(source, timeout)
        self.rate = self._opened.rate
        self.live = source.drops_out and not self._opened.ends
        self._frames = self._read_stream() if source.drops_out else self._read_file()

    def __iter__(self) -> Iterator[UInt8Array]:
        """The images of :meth:`timed`."""
        for frame in self.timed():
            yield frame.image  # type: ignore[misc]

    def timed(self) -> Iterator[VideoFrame]:
        """The frames that are left, with their times.

        The times are the container's; those of a live stream begin at 0, and a drop-out takes as
        long as it took.

        Raises:
            ImageError: After the last frame that could be read: the file is damaged or cut off, or
                the stream dropped out and did not come back.
        """
        while True:
            with self._lock:
                frame = None if self._closing.is_set() else next(self._frames, None)
            if frame is None:
                return
            yield frame

    def close(self) -> None:
        """Free the source; there are no more frames then. It waits for a read that is under way."""
        self._closing.set()
        with self._lock:
            self._frames.close()  # it holds the source, and is held by this
            self._opened.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_file(self) -> Generator[VideoFrame, None, None]:
        """Every frame that can be read, then an error where others could not."""
        count = 0
        for frame in self._opened.frames(go_on=True):
            self.damaged = self._opened.damaged
            count += 1
            yield frame
        self.damaged = self._opened.damaged
        self._check_end(count)

    def _check_end(self, count: int) -> None:
        """Say what could not be read of a file or a recording that gave so many frames."""
        opened, name, fix = self._opened, self._source.name, "copy or record it again"
        faults, expected = [], "a whole video"
        if self.damaged:
            faults, expected = (
                [f"damage at {self.damaged} place{'s'[: self.damaged > 1]}"],
                "a video without damage",
            )
        if opened.is_short():
            expected = "a whole video"
            faults.append(f"no more after {opened.reached:.2f} of {opened.length:.2f} s")
        if opened.count > count:
            expected = f"all {opened.count} frames"
        if faults:
            found = ", ".join([f"{count} frames that can be read", *faults])
            raise ImageError(name, expected, found, fix)
        if not count:
            raise ImageError(name, "at least one frame", "none that FFmpeg can decode", fix)

    def _read_stream(self) -> Generator[VideoFrame, None, None]:
        """Frames over all drop-outs, until the end, or until nothing has come for too long."""
        clock, last, name = _LiveClock(), -math.inf, self._source.name
        seen, waits = time.monotonic(), _growing_waits()  # seen: when a frame last came
        count = 0
        while True:
            came, damaged = False, self.damaged
            try:
                for frame in self._opened.frames():
                    self.damaged = damaged + self._opened.damaged
                    moment = clock.time_of(frame.seconds) if self.live else frame.seconds
                    if moment <= last and not self.live:
                        continue  # of a recording that was connected again, what was given
                    if not came and self.dropouts:
                        _log.warning("%s: back after %.1f s", name, time.monotonic() - seen)
                    last, came, count = moment, True, count + 1
                    yield VideoFrame(frame.image, moment)
                    seen = time.monotonic()
                reason = "" if self._opened.is_at_its_end() else "it stopped before its end"
            except ImageError as error:
                reason = error.found
            self.damaged = damaged + self._opened.damaged
            if not reason or (came and not self.live and self._is_cut_off(last)):
                if not self.live:
                    self._check_end(count)
                return
            if not count:  # it never was on; or a server without ranges has its index at the end
                fix = self._source.fix if self.live else "download it, and give the file"
                raise ImageError(name, "at least one frame", f"none: {reason}", fix)
            self._opened.close()
            if came:
                self.dropouts += 1
                _log.warning("%s: drop-out %d, %s", name, self.dropouts, reason)
                clock.restart()
                waits = _growing_waits()
            if not self._connect_again(waits, seen, reason):
                return
            if not self.live:
                self._opened.seek(last)

    def _is_cut_off(self, last: float) -> bool:
        """Whether a recording ends after its frame at ``last`` also when it is opened anew."""
        if self._reconnect == 0 or not self._opened.is_short():
            return False
        try:
            with contextlib.closing(_Opened(self._source, self._timeout)) as again:
                again.seek(last)
                return all(frame.seconds <= last for frame in again.frames())
        except ImageError:
            return False

    def _connect_again(self, waits: Iterator[float], seen: float, reason: str) -> bool:
        """Open the source anew, at growing intervals; False when it is closed meanwhile.

        Raises:
            ImageError: It has given nothing for too long since ``seen``, by ``time.monotonic``.
        """
        while True:
            left = seen + self._reconnect - time.monotonic()
            if left <= 0:
                quiet = f"none for {time.monotonic() - seen:.1f} s: {reason}"
                expected, fix = "a stream that goes on", self._source.fix
                raise ImageError(self._source.name, expected, quiet, fix)
            if self._closing.wait(min(next(waits), left)):
                return False
            try:
                self._opened = _Opened(self._source, self._timeout)
            except ImageError as error:
                reason = error.found
            else:
                return True


def _growing_waits() -> Iterator[float]:
    wait = _FIRST_WAIT
    while True:
        yield wait
        wait = min(2 * wait, _LONGEST_WAIT)


class _LiveClock:
    """Times of a live stream, from 0, over drop-outs and whatever its sender's clock does."""

    def __init__(self) -> None:
        self._first = self._seen = 0.0  # when the first and the last frame came
        self._last = -1.0  # the last frame's time
        self._offset: float | None = None  # from the sender's clock to ours

    def restart(self) -> None:
        """Another connection: the sender's clock may begin anew, and ours has gone on."""
        self._offset = None

    def time_of(self, moment: float) -> float:
        """Ours for a frame that has just come, from its time by the sender's clock, seconds."""
        now = time.monotonic()
        if self._last < 0:
            self._first, self._seen, self._last, self._offset = now, now, 0.0, -moment
        believed = now - self._seen + _JUMP
        if self._offset is None or not 0 <= moment + self._offset - self._last <= believed:
            self._offset = max(now - self._first, self._last) - moment
        self._seen, self._last = now, moment + self._offset
        return self._last


class _Opened:
    """One container, open.

    Args:
        source: What to open.
        timeout: Seconds that opening it, and then each read, may take.

    Attributes:
        rate: Frames per second.
        count: Frames in all, where the container says so; else 0.
        length: Where its frames end, seconds from its start; None where it does not say.
        ends: Whether it has an end: a length or, as a file over HTTP, a size.
        reached: How far its packets went.
        damaged: At how many places something could not be read or decoded.

    Raises:
        ImageError: It cannot be opened, or holds no video.
    """

    def __init__(self, source: _Source, timeout: float) -> None:
        self._av = import_pyav()
        self._source = source
        self._timeout = timeout
        expected = "a video that FFmpeg can read"
        self._began = time.monotonic()  # to open it, or to read
        try:
            # Not ``options``, which PyAV gives to each stream too: the process ended by a
            # segmentation fault where a stream is found later, as in FLV (PyAV 14 to 17).
            self._container = self._av.open(
                source.address,
                format=source.format,
                container_options=source.options,
                timeout=timeout,
            )
        except (self._av.FFmpegError, ValueError) as error:
            if isinstance(error, self._av.error.InvalidDataError) and _is_mp4(source):
                found = "an MP4 or MOV that is cut off or damaged"
                fix = "copy or record it again"
                raise ImageError(source.name, "a whole video", found, fix) from None
            raise ImageError(source.name, expected, self._words(error), source.fix) from None
        stream = self._container.streams.best("video")  # not the cover, which is one too
        if stream is None or stream.codec_context is None:
            self.close()
            found = "no video in it" if stream is None else "one of an unknown codec"
            raise ImageError(source.name, expected, found, source.fix)
        self._stream = stream
        self._check_size(stream.width, stream.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # if frames are larger
        self._converter = self._av.video.reformatter.VideoReformatter()
        self._start = (self._container.start_time or 0) / 1e6
        self.rate = _number(self._stream.average_rate) or _DEFAULT_RATE
        self._last = -1 / self.rate  # the last frame's time
        self.count: int = self._stream.frames
        self.reached = 0.0
        self.damaged = 0
        self._own_length = self._stream.duration is not None and self._is_format("mov", "avi")
        self.length = self._find_length()
        self.ends = self.length is not None or (self._container.size or 0) > 0

    def frames(self, *, go_on: bool = False) -> Iterator[VideoFrame]:
        """The frames that are left.

        Args:
            go_on: Whether to count what cannot be read, and to go on behind it.

        Raises:
            ImageError: It cannot be read any further, without ``go_on``.
        """
        failures = 0
        while failures < _MAX_FAILURES:
            self._began = time.monotonic()
            try:
                for packet in self._container.demux():
                    failures = 0
                    self._note_progress(packet)
                    yield from self._decode(packet)
                    self._began = time.monotonic()
                return
            except self._av.FFmpegError as error:
                if not go_on:
                    yield from self._decode(None)  # what waits for frames that follow it
                    name, fix = self._source.name, self._source.fix
                    raise ImageError(name, "more frames", self._words(error), fix) from None
                self.damaged += failures == 0
                failures += 1

    def is_short(self) -> bool:
        """Whether there should have been more."""
        slack = 2 / self.rate if self._own_length else _SLACK
        return self.length is not None and self.reached < self.length - slack

    def is_at_its_end(self) -> bool:
        """Whether what ended was to end there."""
        return self.ends and not self.is_short()

    def seek(self, seconds: float) -> None:
        """Go on near a time, before it where that can be; where it cannot, at the start."""
        if seconds > 0:
            with contextlib.suppress(self._av.FFmpegError):
                self._container.seek(int((seconds + self._start) * 1e6))

    def close(self) -> None:
        """Free it; the decoder's threads and frames go with what refers to it."""
        self._container.close()
        self._stream = self._converter = None

    def _is_format(self, *names: str) -> bool:
        return not set(names).isdisjoint(self._container.format.name.split(","))

    def _find_length(self) -> float | None:
        if self._own_length:
            stream, ticks = self._stream, self._stream.duration
            if self._is_format("avi"):  # whose duration FFmpeg corrects to what is there
                ticks = max(ticks, stream.frames)
            end = (stream.start_time or 0) + ticks
            return _seconds(end, stream.time_base) - self._start
        duration = (self._container.duration or 0) / 1e6
        if not duration or not self._is_format(*_MEASURED):
            return None
        # What begins late, as a part of a longer recording: some writers count from 0, others not.
        from_zero = self._is_format(*_FROM_ZERO) and 0 < self._start < duration
        return duration - self._start if from_zero else duration

    def _note_progress(self, packet: Any) -> None:
        moment = packet.dts if packet.pts is None else packet.pts
        of_video = packet.stream.index == self._stream.index
        if moment is not None and (of_video or not self._own_length):
            end = _seconds(moment + (packet.duration or 0), packet.time_base)
            self.reached = max(self.reached, end - self._start)

    def _decode(self, packet: Any | None) -> Iterator[VideoFrame]:
        """The frames that a packet completes, or, without one, those that are not complete."""
        if packet is not None and packet.stream.index != self._stream.index:
            return
        frames: list[Any] = []
        sound = packet is None or not packet.is_corrupt
        if not sound and self._source.drops_out and self.ends:
            return  # half a frame of a recording whose connection broke: it comes again
        try:
            frames = self._stream.codec_context.decode(packet)
        except self._av.FFmpegError:
            sound = False
        self.damaged += not (sound and not any(frame.is_corrupt for frame in frames))
        for frame in frames:
            moment = frame.dts if frame.pts is None else frame.pts
            if self._is_format("mpjpeg"):  # a web camera's, without times: FFmpeg's are a guess
                self._last = time.monotonic()
            elif moment is None:
                self._last += 1 / self.rate
            else:
                self._last = _seconds(moment, self._stream.time_base) - self._start
            yield VideoFrame(self._picture(frame), self._last)

    def _picture(self, frame: Any) -> UInt8Array:
        """A frame as it is to be seen: upright, and with square pixels."""
        width = round(frame.width * (_number(self._stream.sample_aspect_ratio) or 1.0))
        self._check_size(width, frame.height)
        rgb = self._converter.reformat(frame, width=width, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))

    def _check_size(self, width: int, height: int) -> None:
        """Refuse frames that would fill the memory: a small file can claim to have them."""
        if width * height > MAX_PIXELS:
            found, fix = f"{width}x{height}", "shrink it first"
            raise ImageError(self._source.name, f"frames of at most {MOST_PIXELS}", found, fix)

    def _words(self, error: Exception) -> str:
        # Some demuxers take a read that was ended by the time-out for a damaged one.
        late = time.monotonic() - self._began >= self._timeout
        if late or isinstance(error, self._av.error.ExitError):
            return f"no answer for {self._timeout:g} s"
        return words_of(getattr(error, "strerror", None) or error)


def open_video(
    source: str | Path | int,
    *,
    timeout: float = 10.0,
    reconnect: float = 60.0,
    options: Mapping[str, str] | None = None,
) -> Video:
    """Open a video file, a stream or a camera.

    Args:
        source: A path; an address, ``rtsp://``, ``rtmp://``, ``http(s)://``, ``udp://`` or
            ``srt://``; a camera's number, its device (``/dev/video0``) or, on Windows, its name
            (``video=NAME``).
        timeout: Seconds that opening a stream or a camera, and each read of it, may take.
        reconnect: Seconds for which a stream or a camera that stopped before its end is connected
            again, at growing intervals; 0 for never, ``math.inf`` for ever.
        options: For FFmpeg, e.g. ``{"video_size": "1280x720"}`` of a camera, or
            ``{"rtsp_transport": "udp"}``.

    Raises:
        ImageError: It is none of these, or FFmpeg cannot read it.
        ConfigError: ``timeout`` or ``reconnect`` is no such number.
        BackendError: PyAV is not installed.
    """
    for name, value, possible in (
        ("timeout", timeout, 0 < timeout < math.inf),
        ("reconnect", reconnect, reconnect >= 0),
    ):
        if not possible:
            raise ConfigError(name, "seconds, at least 0", f"{value}", "leave it out")
    return Video(_find_source(source, dict(options or {})), timeout, reconnect)


def is_stream(name: str) -> bool:
    """Whether a name is an address, or a camera's device, rather than a file."""
    return _scheme_of(name) in _SCHEMES or _is_device(name)


def without_password(name: str) -> str:
    """An address as it may be shown."""
    return re.sub(r"(?<=://)([^/@]*?):[^/]*@", r"\1:***@", name)


def _find_source(source: str | Path | int, options: dict[str, str]) -> _Source:
    if isinstance(source, bool) or not isinstance(source, (str, os.PathLike, int)):
        fix = "give e.g. 0, the first camera"
        expected = "a path, an address or a camera's number"
        raise ImageError("video", expected, repr(source)[:40], fix)
    if isinstance(source, int):
        if source < 0:
            raise ImageError("video", "a camera's number, from 0", f"{source}", "give e.g. 0")
        return _camera(str(source), options)
    name = os.fspath(source)
    scheme = _scheme_of(name)
    if scheme in _SCHEMES:
        if scheme.startswith("rtsp"):  # packets by UDP get lost where a network is busy
            options = {"rtsp_flags": "prefer_tcp", **options}
        fix = "check the address, and whether the stream is on"
        address = scheme + name[len(scheme) :]  # FFmpeg knows no HTTP://
        return _Source(without_password(name), address, None, options, True, fix)
    if _is_device(name) or name.startswith("video="):
        return _camera(name, options)
    if (reason := why_not_a_file(Path(name))) is not None:
        raise ImageError(name, "a video file", reason, "check the path")
    if not Path(name).stat().st_size:
        raise ImageError(name, "a video file", "an empty file", "copy the file again")
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", **options}
    return _Source(name, f"file:{name}", None, options, False, "convert it to MP4 (H.264)")


def _is_mp4(source: _Source) -> bool:
    """Whether a local file begins as MP4 and MOV do, which FFmpeg reads where they are whole."""
    if source.drops_out:
        return False
    try:
        with open(source.name, "rb") as file:
            return file.read(8)[4:] in _MP4_BOXES
    except OSError:
        return False


def _camera(name: str, options: dict[str, str]) -> _Source:
    """A camera by its number or by the system's name for it."""
    shown, fix = f"camera {name}", "check its number, and who else uses it"
    if sys.platform == "win32":
        if name.isdecimal():
            name = f"video={_windows_camera(int(name))}"
        return _Source(shown, name, "dshow", options, True, fix)
    if sys.platform == "darwin":
        options = {"framerate": "30", **options}  # its own default is one that no camera has
        return _Source(shown, name, "avfoundation", options, True, fix)
    address = f"/dev/video{name}" if name.isdecimal() else name
    return _Source(shown, address, "v4l2", options, True, fix)


def _windows_camera(number: int) -> str:
    """The name of a camera by its place among Windows' cameras."""
    listing = getattr(import_pyav(), "enumerate_input_devices", None)  # since PyAV 17
    devices = listing("dshow") if listing else []
    names = [device.name for device in devices if "video" in device.media_types]
    if number >= len(names):
        found, fix = f"{len(names)} cameras", "give its name, e.g. video=Integrated Camera"
        raise ImageError(f"camera {number}", "a camera that Windows lists", found, fix)
    return str(names[number])


def _scheme_of(name: str) -> str:
    scheme, mark, _ = name.partition("://")
    return scheme.lower() if mark else ""


def _is_device(name: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


def _number(fraction: Any) -> float:
    """A fraction of PyAV's as a number; 0 where it is unknown."""
    return float(fraction.numerator / fraction.denominator) if fraction else 0.0


def _seconds(ticks: int, unit: Any) -> float:
    """A time in units of PyAV's, in seconds."""
    return ticks * unit.numerator / unit.denominator if unit else 0.0


@contextlib.contextmanager
def write_video(path: str | Path, rate: float = _DEFAULT_RATE) -> Iterator[Callable[..., None]]:
    """Write a video that appears under its name when the block ends without an error.

    Args:
        path: An ``.mp4`` file, written as H.264, or as MPEG-4 where FFmpeg has no encoder for it.
        rate: Frames per second of pictures that come without a time.

    Yields:
        What adds a picture: a PIL image, RGB, and its time in seconds, later than the last. All
        are cut to the first one's size.

    Raises:
        BackendError: PyAV is not installed.
    """
    av = import_pyav()
    with atomic_path(path) as temporary, av.open(f"file:{temporary}", "w", "mp4") as container:
        stream: Any = None
        count, last = 0, -1

        def write(image: Image.Image, seconds: float | None = None) -> None:
            nonlocal stream, count, last
            if stream is None:
                stream = _add_stream(av, container, rate, image.size)
            # Chroma is of half the size: an odd side has a black line added.
            whole = image.crop((0, 0, stream.width, stream.height))
            frame = av.VideoFrame.from_ndarray(np.asarray(whole), "rgb24")
            last = max(last + 1, round((count / rate if seconds is None else seconds) / _TICK))
            count += 1
            frame.pts, frame.time_base = last, _TICK
            container.mux(stream.encode(frame))

        yield write
        if stream is not None:
            container.mux(stream.encode(None))


def _add_stream(av: Any, container: Any, rate: float, size: tuple[int, int]) -> Any:
    """A video stream with whole ticks for its times."""
    codec = next(name for name in _ENCODERS if name in av.codecs_available)
    # Frames that refer to later ones would make the length wrong where the rate varies.
    options = {"preset": "veryfast", "crf": "20", "bf": "0"} if codec == _ENCODERS[0] else {}
    stream = container.add_stream(
        codec, rate=Fraction(rate).limit_denominator(1001), options=options
    )
    stream.width, stream.height = (side + side % 2 for side in size)
    stream.pix_fmt = "yuv420p"
    stream.time_base = stream.codec_context.time_base = _TICK
    return stream


def import_pyav() -> Any:
    """The module ``av``.

    Raises:
        BackendError: It is not installed, or cannot be loaded.
    """
    return import_package("av", "video", "PyAV, the module av", "video")
