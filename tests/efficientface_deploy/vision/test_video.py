from __future__ import annotations

import contextlib
import dataclasses
import gc
import http.server
import importlib
import io
import itertools
import math
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import BackendError, ConfigError, ImageError
from efficientface_deploy.vision import video as video_module
from efficientface_deploy.vision.video import (
    is_stream,
    open_video,
    without_password,
    write_video,
)

TIMES = (0.0, 0.1, 0.5, 2.0, 2.04)  # of a rate that varies

pytestmark = pytest.mark.timeout(60)


def picture(at: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Redder and bluer from one to the next."""
    return Image.new("RGB", size, (50 * at, 0, 20 * at))


def shade(frame: np.ndarray) -> int:
    """Which :func:`picture` it is."""
    return round(frame[..., 0].mean() / 50)


@pytest.fixture
def clip(tmp_path) -> Path:
    """Five frames, 12.5 a second, 64 wide and 48 high."""
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with write_video(path, 12.5) as write:
        for at in range(5):
            write(picture(at))
    return path


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory) -> Path:
    """Forty frames of noise, 10 a second, in 4 s: enough bytes to damage."""
    pytest.importorskip("av")
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    random = np.random.default_rng(0)
    with write_video(path, 10) as write:
        for _ in range(40):
            write(Image.fromarray(random.integers(0, 255, (48, 64, 3), np.uint8)))
    return path


def remux(path: Path, other: Path, **options: str) -> Path:
    """The same frames in another container."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as source, av.open(str(other), "w", options=options) as container:
        if other.suffix == ".avi":  # which wants H.264 in another form
            stream = container.add_stream("mpeg4", rate=10, width=64, height=48)
            frames = [frame.reformat(format="yuv420p") for frame in source.decode(video=0)]
            container.mux([packet for frame in [*frames, None] for packet in stream.encode(frame)])
            return other
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return other


def read(source: str | Path, **keywords: object) -> tuple[list[float], str]:
    """The times of all frames that can be read, and what is said then."""
    times: list[float] = []
    try:
        with open_video(source, **keywords) as video:
            times.extend(frame.seconds for frame in video.timed())
    except ImageError as error:
        return times, str(error)
    return times, ""


# ---- frames


def test_frames_are_rgb_in_order(clip):
    with open_video(clip) as video:
        assert video.rate == pytest.approx(12.5)
        assert (video.live, video.dropouts, video.damaged) == (False, 0, 0)
        frames = list(video)
    assert {(frame.shape, frame.dtype) for frame in frames} == {((48, 64, 3), np.dtype(np.uint8))}
    colours = np.array([frame.mean(axis=(0, 1)) for frame in frames])
    np.testing.assert_allclose(colours, [(50 * at, 0, 20 * at) for at in range(5)], atol=6)
    assert all(frame.flags.c_contiguous for frame in frames)


def test_no_frame_is_filled_again(clip):
    with open_video(clip) as video:
        frames = list(video)
    assert [shade(frame) for frame in frames] == list(range(5))
    assert not any(itertools.starmap(np.shares_memory, itertools.combinations(frames, 2)))


def test_string_and_path(clip):
    with open_video(str(clip)) as video:
        assert len(list(video)) == 5


def test_what_is_left_is_given_once(clip):
    with open_video(clip) as video:
        first = next(iter(video))
        rest = [frame.image for frame in video.timed()]
    assert [shade(frame) for frame in (first, *rest)] == list(range(5))


def test_closed_video_gives_nothing(clip):
    with open_video(clip) as video:
        next(iter(video))
    assert list(video) == []
    video.close()


def test_closing_ends_the_decoder(clip):
    """Its threads and frames, of a video that is left in the middle too, not at the next gc."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs /proc to count the decoder's threads")
    gc.collect()
    before = len(list(tasks.iterdir()))
    gc.disable()
    try:
        with open_video(clip) as video:
            next(iter(video))
            during = len(list(tasks.iterdir()))
        after = len(list(tasks.iterdir()))
    finally:
        gc.enable()
    if during == before:
        pytest.skip("needs a second CPU, for which FFmpeg decodes in threads")
    assert after == before


def test_closing_waits_for_a_frame_that_is_being_read(clip, monkeypatch):
    """FFmpeg's container is not to be freed under a thread that reads from it."""
    reading, may_go_on = threading.Event(), threading.Event()
    convert = video_module._Opened._picture

    def picture_of(opened, frame):
        reading.set()
        assert may_go_on.wait(10)
        return convert(opened, frame)

    monkeypatch.setattr(video_module._Opened, "_picture", picture_of)
    video = open_video(clip)
    with ThreadPoolExecutor() as pool:
        frame = pool.submit(next, iter(video))
        assert reading.wait(10)
        closing = pool.submit(video.close)
        time.sleep(0.05)
        assert not closing.done()
        may_go_on.set()
        assert frame.result(10).shape == (48, 64, 3)
        closing.result(10)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_phones_video_stands_upright(tmp_path, turns):
    """A track's matrix says how often the picture is to be turned, clockwise."""
    pytest.importorskip("av")
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32] = 255  # top left
    with write_video(tmp_path / "phone.mp4", 10) as write:
        write(Image.fromarray(np.rot90(upright, turns)))
    content = bytearray((tmp_path / "phone.mp4").read_bytes())
    cos, sin = round(math.cos(turns * math.pi / 2)), round(math.sin(turns * math.pi / 2))
    numbers = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    begin = content.index(b"tkhd") + 4 + 40
    content[begin : begin + 36] = struct.pack(">9i", *numbers)
    (tmp_path / "phone.mp4").write_bytes(content)
    with open_video(tmp_path / "phone.mp4") as video:
        (frame,) = video
    assert frame.shape == (48, 64, 3)
    np.testing.assert_allclose(frame[4:20, 4:28], 255, atol=8)
    np.testing.assert_allclose(frame[28:, 36:], 0, atol=8)


def test_wide_pixels_are_made_square(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        frame = av.VideoFrame.from_ndarray(np.zeros((36, 48, 3), np.uint8), "rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with open_video(path) as video:
        assert [frame.shape for frame in video] == [(36, 64, 3)]


def test_frames_larger_than_any_picture(clip, monkeypatch):
    monkeypatch.setattr(video_module, "MAX_PIXELS", 64 * 48)
    assert len(read(clip)[0]) == 5
    monkeypatch.setattr(video_module, "MAX_PIXELS", 64 * 48 - 1)
    times, said = read(clip)
    assert times == [] and "expected frames of at most 89 million pixels, found 64x48" in said


def test_pixels_so_wide_that_frames_fill_the_memory(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 200, 4000, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(255, 2)
        frame = av.VideoFrame(200, 4000, "yuv420p")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    times, said = read(path)
    assert times == [] and "found 25500x4000; shrink it first" in said


# ---- times


def test_times_are_the_containers(tmp_path):
    pytest.importorskip("av")
    with write_video(tmp_path / "phone.mp4", 25) as write:
        for at, seconds in enumerate(TIMES):
            write(picture(at), seconds)
    with open_video(tmp_path / "phone.mp4") as video:
        assert 2.04 < video._opened.length < 2.1
        frames = list(video.timed())
    assert [frame.seconds for frame in frames] == pytest.approx(TIMES, abs=1e-4)
    assert [shade(frame.image) for frame in frames] == list(range(5))


def test_webm_of_a_browser_says_a_thousand_frames_a_second(tmp_path):
    """MediaRecorder's files have milliseconds, no rate and no length."""
    av = pytest.importorskip("av")
    path = tmp_path / "browser.webm"
    with path.open("wb") as file:
        sink = types.SimpleNamespace(write=file.write)  # cannot be rewound for the length
        with av.open(sink, "w", "webm") as container:
            stream = container.add_stream("libvpx", rate=1000)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for at, seconds in enumerate(TIMES):
                frame = av.VideoFrame.from_ndarray(np.asarray(picture(at)), "rgb24")
                frame.pts, frame.time_base = round(1000 * seconds), video_module._TICK * 60
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert read(path) == (pytest.approx(TIMES, abs=1e-3), "")


def test_case_of_a_variable_rate(shared):
    pytest.importorskip("av")
    times, said = read(shared / "cases/vfr.mp4")
    assert times == pytest.approx([*np.arange(11) / 10, *range(2, 11)]) and said == ""


# ---- damage


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("corrupt_middle.mp4", 17, "expected all 20 frames, found 17 .*damage at 4 places"),
        ("cut.avi", 14, "expected all 20 frames, found 14 .*no more after 1.40 of 2.00 s"),
    ],
)
def test_case_of_damage(shared, name, count, said):
    pytest.importorskip("av")
    times, error = read(shared / "cases" / name)
    assert len(times) == count and np.all(np.diff(times) > 0)
    assert re.search(said, error) and error.startswith(str(shared)) and "\n" not in error


def test_whole_file_has_no_damage(long_clip):
    times, error = read(long_clip)
    assert times == pytest.approx(np.arange(40) / 10) and error == ""


def test_damage_that_costs_no_frame_is_no_missing_frame(clip):
    with open_video(clip) as video:
        list(video)
        video.damaged = 1
        with pytest.raises(ImageError) as error:
            video._check_end(5)
    assert error.value.expected == "a video without damage"
    assert error.value.found == "5 frames that can be read, damage at 1 place"


def test_damage_in_the_middle_loses_little(long_clip, tmp_path):
    content = bytearray(long_clip.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = bytes(9000)
    (tmp_path / "damaged.mp4").write_bytes(content)
    times, error = read(tmp_path / "damaged.mp4")
    assert times[0] == 0 and times[-1] == pytest.approx(3.9)  # what is behind it is read too
    assert "expected all 40 frames, found" in error and "damage at" in error


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.avi", "a.mkv", "a.flv", "a.ts"])
@pytest.mark.parametrize("start", ["0", "100"])
@pytest.mark.parametrize("whole", [True, False])
def test_file_that_is_cut_off(long_clip, tmp_path, name, whole, start):
    """Its index may stand at the front, as in an MP4 for the web.

    A part of a longer recording begins late; Matroska's length may count from 0 all the same.
    """
    options = {"movflags": "faststart"} if name in ("a.mp4", "a.mov") else {}
    options["output_ts_offset"] = start
    content = remux(long_clip, tmp_path / name, **options).read_bytes()
    (tmp_path / name).write_bytes(content if whole else content[: len(content) // 2])
    times, error = read(tmp_path / name)
    assert len(times) == 40 if whole else 0 < len(times) < 40
    assert times[0] == 0  # not the 1.4 or 0.2 seconds at which a broadcast's clock begins
    if name != "a.ts":  # made to be cut anywhere, it does not say its length
        assert (error == "") == whole
        assert whole or "no more after" in error


def test_video_that_was_trimmed_without_being_written_anew(long_clip, tmp_path):
    """Its edit list says that half of its frames are not shown: they are not missing."""
    content = bytearray(long_clip.read_bytes())
    place = content.index(b"elst") + 12
    (length,) = struct.unpack_from(">I", content, place)
    struct.pack_into(">I", content, place, length // 2)
    (tmp_path / "trimmed.mp4").write_bytes(content)
    times, error = read(tmp_path / "trimmed.mp4")
    assert error == "" and times == pytest.approx(np.arange(20) / 10, abs=0.11)


# ---- sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.mp4", "no such file"),
        (".", "a folder"),
        (-1, "a camera's number, from 0, found -1"),
        (True, "a path, an address or a camera's number, found True"),
        (None, r"^video: expected a path, .*, found None; "),
        (97, "camera 97.*who else uses it"),
        ("/dev/null", "camera /dev/null.*who else uses it"),
        ("gopher://host/a.mp4", "no such file"),
        ("http://127.0.0.1:9/a.mp4", "refused; check the address"),
        ("HTTP://127.0.0.1:9/a.mp4", "refused; check the address"),
    ],
)
def test_source_that_is_not_there(source, message):
    pytest.importorskip("av")
    with pytest.raises(ImageError, match=message):
        open_video(source)


@pytest.mark.parametrize(
    "content",
    [b"no video", b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", b"ffconcat version 1.0\nfile clip.mp4\n"],
)
def test_file_that_is_no_video(clip, content):
    """Nor is a list of other files, which FFmpeg would open."""
    path = clip.with_name("text.mp4")
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"text\.mp4.*convert it to MP4"):
        open_video(path)


def test_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ImageError, match=r"empty\.mp4: expected a video .*, found an empty file; "):
        open_video(tmp_path / "empty.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_file_that_lost_its_index_at_the_end(long_clip, tmp_path, name):
    content = remux(long_clip, tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    said = r"expected a whole video, found an MP4 or MOV .* cut off or damaged; copy or record"
    with pytest.raises(ImageError, match=said):
        open_video(tmp_path / name)


def test_sound_without_a_video(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(ImageError, match="no video in it"):
        open_video(tmp_path / "sound.mp4")


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "a%03d.mp4", "café 中.mp4"])
def test_any_name_of_a_file(clip, name, monkeypatch):
    clip.rename(clip.with_name(name))
    monkeypatch.chdir(clip.parent)
    assert len(read(name)[0]) == 5
    with write_video(f"copy {name}") as write:
        write(picture(0))
    assert len(read(f"copy {name}")[0]) == 1


@pytest.mark.parametrize("keywords", [{"timeout": 0}, {"timeout": math.inf}, {"reconnect": -1}])
def test_seconds_that_are_none(clip, keywords):
    with pytest.raises(ConfigError, match=f"^{next(iter(keywords))}: expected seconds"):
        open_video(clip, **keywords)


def test_pyav_that_is_missing_or_broken_names_the_extra(monkeypatch, tmp_path):
    load_module = importlib.import_module

    def import_module(name: str) -> object:
        if name == "av":
            raise ImportError("libavcodec.so: cannot open shared object file")
        return load_module(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(BackendError, match=r"PyAV.*libavcodec.*pip install .*\[video\]"):
        open_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("rtsp://host/live", True),
        ("HTTPS://host/a.mp4", True),
        ("/dev/null", True),
        ("a.mp4", False),
        ("file:///a.mp4", False),
        ("a\0b", False),
    ],
)
def test_streams_by_their_names(name, stream):
    assert is_stream(name) == stream


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://me:se/cr:et@host/a", "rtsp://me:se/cr:et@host/a"),  # no address: a slash ends it
        ("rtsp://me:secret@host:554/a", "rtsp://me:***@host:554/a"),
        ("rtsp://me@host/a", "rtsp://me@host/a"),
        ("http://host/a:b@c", "http://host/a:b@c"),
    ],
)
def test_a_password_is_not_shown(address, shown):
    assert without_password(address) == shown


@pytest.mark.parametrize(
    ("platform", "source", "address", "demuxer"),
    [
        ("linux", 2, "/dev/video2", "v4l2"),
        ("darwin", 0, "0", "avfoundation"),
        ("win32", "video=Integrated Camera", "video=Integrated Camera", "dshow"),
    ],
)
def test_cameras_of_each_system(monkeypatch, platform, source, address, demuxer):
    monkeypatch.setattr(sys, "platform", platform)
    found = video_module._find_source(source, {"video_size": "640x480"})
    assert (found.address, found.format, found.drops_out) == (address, demuxer, True)
    assert found.options["video_size"] == "640x480"


def test_numbers_of_windows_cameras(monkeypatch):
    kinds = {"@mic": ["audio"], "@first": ["video"], "@second": ["video", "audio"]}
    devices = [types.SimpleNamespace(name=name, media_types=kind) for name, kind in kinds.items()]
    listing = types.SimpleNamespace(enumerate_input_devices={"dshow": devices}.__getitem__)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(video_module, "import_pyav", lambda: listing)
    assert video_module._find_source(1, {}).address == "video=@second"
    with pytest.raises(ImageError, match=r"camera 2: .*, found 2 cameras; .*video=Integrated"):
        video_module._find_source(2, {})
    monkeypatch.setattr(video_module, "import_pyav", types.SimpleNamespace)  # PyAV 16
    with pytest.raises(ImageError, match="found 0 cameras"):
        video_module._find_source(0, {})


# ---- streams


class Server:
    """Serves one file over HTTP, as a misbehaving server may.

    Attributes:
        cuts: Bytes after which each answer breaks off, one after the other; then none does.
        down: Whether it answers with 503.
        silent: Whether it says nothing for long in the end.
        parts: What is sent instead, with a pause after each.
        ranges: Whether it can send from any byte on.
        address: Of the file.
    """

    def __init__(self, content: bytes, live: bool) -> None:
        self.content = content
        self.cuts: list[int] = []
        self.down = self.silent = False
        self.ranges = not live
        self.parts: list[bytes] = []
        self.kind = "application/octet-stream"
        self.asked = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0" if live else "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self, live)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/clip"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler, live: bool) -> None:
        self.asked += 1
        if self.down:
            request.send_error(503)
            return
        begin = 0
        if self.ranges and (wanted := request.headers.get("Range", "")):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            request.send_response(206)
            size = len(self.content)
            request.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        else:
            request.send_response(200)
        if not live:
            request.send_header("Content-Length", str(len(self.content) - begin))
        request.send_header("Connection", "close")
        request.send_header("Content-Type", self.kind)
        request.end_headers()
        end = self.cuts.pop(0) if self.cuts else len(self.content)
        with contextlib.suppress(ConnectionError):
            for part in self.parts or [self.content[begin:end]]:
                request.wfile.write(part)
                request.wfile.flush()
                time.sleep(0.2 if self.parts else 0)
            if self.silent:
                time.sleep(3)
        request.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(content: bytes, live: bool = False) -> Server:
        servers.append(Server(content, live))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(video_module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(video_module, "_LONGEST_WAIT", 0.1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_http(long_clip, serve, tmp_path, suffix):
    server = serve(remux(long_clip, tmp_path / f"a{suffix}").read_bytes())
    with open_video(server.address) as video:
        assert not video.live  # MPEG-TS has no length, but the server says its size
        times = [frame.seconds for frame in video.timed()]
        assert video.dropouts == 0
    assert times == pytest.approx(np.arange(40) / 10)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_recording_goes_on_where_the_connection_broke(long_clip, serve, tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    server = serve(remux(long_clip, tmp_path / f"a{suffix}", **options).read_bytes())
    server.cuts = [len(server.content) // 2]
    with open_video(server.address) as video:
        assert not video.live
        frames = list(video.timed())
        assert video.dropouts >= 1
    seconds = np.array([frame.seconds for frame in frames])
    assert seconds[0] == 0 and seconds[-1] == pytest.approx(3.9)
    assert np.all(np.diff(seconds) > 0)  # none twice
    # FFmpeg's reader of Matroska may itself go on behind a block that it has half of.
    assert len(seconds) >= (40 if suffix == ".mp4" else 39)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.flv"])
def test_recording_that_is_cut_off_is_no_drop_out(long_clip, serve, tmp_path, caplog, name, ranges):
    """Its server sends all that it has announced, each time."""
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    content = remux(long_clip, tmp_path / name, **options).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    server = serve((tmp_path / name).read_bytes())
    server.ranges = ranges
    with open_video(server.address) as video:
        seconds: list[float] = []
        with pytest.raises(ImageError, match=r"no more after .* of 4\.00 s; copy or record"):
            seconds.extend(frame.seconds for frame in video.timed())
        assert (video.dropouts, caplog.messages) == (0, [])
    assert seconds == read(tmp_path / name)[0] and server.asked < 8


def test_recording_that_cannot_be_sought_and_has_its_index_at_the_end(long_clip, serve):
    server = serve(long_clip.read_bytes())
    server.ranges = False
    times, error = read(server.address)
    assert times == [] and "expected at least one frame, found none: " in error
    assert error.endswith("download it, and give the file") and server.asked < 4


def test_damage_of_a_recording_is_said_too(long_clip, serve):
    content = bytearray(long_clip.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = bytes(9000)
    times, error = read(serve(bytes(content)).address)
    assert times[0] == 0 and times[-1] == pytest.approx(3.9)
    assert "expected all 40 frames, found" in error and "damage at" in error


@pytest.fixture
def camera(long_clip, serve, tmp_path) -> Server:
    """A stream without an end, which each answer begins anew."""
    return serve(remux(long_clip, tmp_path / "live.ts").read_bytes(), live=True)


def test_live_stream_is_connected_again(camera, caplog):
    with open_video(camera.address, options={"f": "mpegts"}) as video:
        assert video.live
        began = time.monotonic()
        seconds = [frame.seconds for frame, _ in zip(video.timed(), range(90), strict=False)]
        took = time.monotonic() - began
        assert video.dropouts == 2
    assert camera.asked == 3 and seconds[0] == 0
    assert np.all(np.diff(seconds) >= 0)  # its own clock began anew twice
    assert seconds[-1] < took + 3 * 4.1
    assert [record.message.split(": ")[1].split(",")[0] for record in caplog.records] == [
        *("drop-out 1", caplog.records[1].message.split(": ")[1]),
        *("drop-out 2", caplog.records[3].message.split(": ")[1]),
    ]
    assert all("back after" in caplog.records[at].message for at in (1, 3))


def test_web_camera_whose_pictures_have_no_times(serve):
    pytest.importorskip("av")
    parts = []
    for at in range(6):
        file = io.BytesIO()
        picture(at).save(file, "JPEG")
        head = f"--part\r\nContent-Type: image/jpeg\r\nContent-Length: {file.tell()}\r\n\r\n"
        parts.append(head.encode() + file.getvalue() + b"\r\n")
    server = serve(b"", live=True)
    server.parts, server.kind = parts, "multipart/x-mixed-replace; boundary=part"
    with open_video(server.address) as video:
        frames = list(itertools.islice(video.timed(), 6))
    assert [shade(frame.image) for frame in frames] == list(range(6))
    assert 0.5 < frames[-1].seconds - frames[1].seconds < 3  # 0.8 s, where FFmpeg says 0.16


def test_stream_that_does_not_come_back(camera):
    with open_video(camera.address, reconnect=0.3) as video:
        frames = video.timed()
        next(frames)
        camera.down = True
        with pytest.raises(ImageError, match=r"a stream that goes on, found none for 0\.[3-9] s"):
            list(frames)
        assert video.dropouts == 1 and camera.asked > 2


def test_stream_that_comes_back(camera):
    with open_video(camera.address) as video:
        frames = video.timed()
        first = list(itertools.islice(frames, 40))
        camera.down = True
        threading.Timer(0.5, setattr, (camera, "down", False)).start()
        after = next(frames)
    assert len(first) == 40 and video.dropouts == 1 and camera.asked > 3
    assert after.seconds >= 0.5  # of our clock, which went on


def test_stream_that_stands_still(camera):
    camera.silent, camera.cuts = True, [9000]
    with (
        pytest.raises(ImageError, match=r"no answer for 0\.5 s"),
        open_video(camera.address, timeout=0.5, reconnect=0) as video,
    ):
        list(video)


def test_closing_ends_the_tries_to_connect(camera):
    with open_video(camera.address, reconnect=math.inf) as video:
        frames = video.timed()
        next(frames)
        camera.down = True
        threading.Timer(0.3, video._closing.set).start()
        assert len(list(frames)) == 39


def test_clock_of_a_sender_that_jumps(monkeypatch):
    now = 100.0
    monkeypatch.setattr(video_module.time, "monotonic", lambda: now)
    clock, ours = video_module._LiveClock(), []
    # Its clock, and how long ours goes on after each.
    for moment, passes in [(7.0, 1), (8.0, 1), (9e9, 1), (9e9 + 1, 1), (3.0, 1), (4.0, 0)]:
        ours.append(clock.time_of(moment))
        now += passes
    assert ours == [0, 1, 2, 3, 4, 5]
    clock.restart()
    now += 60
    assert [clock.time_of(30.0), clock.time_of(30.5)] == [65, 65.5]


def test_waits_grow(monkeypatch):
    monkeypatch.undo()
    waits = list(itertools.islice(video_module._growing_waits(), 8))
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 8, 8]


RTSP_SERVER = Path(__file__).resolve().parents[2] / "rtsp_server.py"


@contextlib.contextmanager
def rtsp_server(port: int) -> Iterator[subprocess.Popen[str]]:
    """A real one, of GStreamer, which the system's Python can use."""
    command = ["/usr/bin/python3", "-u", str(RTSP_SERVER), str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            if process.stdout.readline() != "ready\n":
                packages = "gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good"
                pytest.skip(f"needs an RTSP server: apt-get install {packages}")
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs Debian's Python")
def test_rtsp_server_that_is_killed_and_started_again(capsys):
    pytest.importorskip("av")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"rtsp://127.0.0.1:{port}/live"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(rtsp_server(port))
        video = stack.enter_context(open_video(address, reconnect=20))
        assert video.live and video.rate == 15
        frames = video.timed()
        before = list(itertools.islice(frames, 30))
        server.kill()
        killed = time.monotonic()
        time.sleep(1)
        server = stack.enter_context(rtsp_server(port))
        between = []  # what had been received is still given
        while video.dropouts == 0:
            between.append(next(frames))
        gap = time.monotonic() - killed
        after = [between.pop(), *itertools.islice(frames, 29)]
        server.kill()
        video._reconnect = 1.0
        with pytest.raises(ImageError, match="a stream that goes on, found none for"):
            list(frames)
        assert (video.dropouts, video.damaged) == (2, 0)
    seconds = np.array([frame.seconds for frame in (*before, *between, *after)])
    steps = np.diff(seconds)
    assert np.all(steps > 0)
    at = len(before) + len(between) - 1
    assert 1 < steps[at] < gap + 3
    assert np.median(np.delete(steps, at)) == pytest.approx(1 / 15, rel=0.1)
    assert {frame.image.shape for frame in after} == {(120, 160, 3)}


def test_device_that_gives_frames(monkeypatch):
    """FFmpeg's virtual device in the place of a camera, which this machine has not."""
    pytest.importorskip("av")
    source = dataclasses.replace(
        video_module._find_source(0, {}), address="testsrc=size=64x48:rate=50:d=1", format="lavfi"
    )
    monkeypatch.setattr(video_module, "_find_source", lambda *_: source)
    with open_video(0, reconnect=0) as video:
        assert video.live and video.rate == 50
        frames = list(itertools.islice(video.timed(), 20))
        with pytest.raises(ImageError, match="camera 0: expected a stream that goes on"):
            list(video.timed())
    assert [frame.seconds for frame in frames] == pytest.approx(np.arange(20) / 50)
    assert frames[0].image.shape == (48, 64, 3) and frames[0].image.std() > 50
