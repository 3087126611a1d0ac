"""The page in Chromium: the same answers as Python's, nothing sent, and what goes wrong said.

Skipped, with a reason, where Chromium, playwright or npm's archive of onnxruntime-web is missing.
"""

from __future__ import annotations

import base64
import csv
import http.server
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import efficientface_deploy as ef
from efficientface_deploy.vision.faces import Face, cut_face, cut_square
from efficientface_deploy.vision.steady import SteadyLabels
from efficientface_deploy.vision.tracks import Tracker

pytestmark = pytest.mark.slow  # a minute and more, on quiet cores

FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")

# Helpers in the page: bytes from base64, a picture of them, and a predictor for all of a test.
LOAD = """async () => {
    const { load } = await import("/efficientface.js");
    globalThis.bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    globalThis.predictor = await load();
    return predictor.checked.difference;
}"""
LABEL_FILE = """async (text) =>
    (await predictor.predictFaces(new Blob([bytes(text)]))).map((face) => ({
        box: face.box, label: face.prediction.label, small: face.small,
        probabilities: Object.values(face.prediction.probabilities),
    }))"""


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def status(page: Any) -> str:
    return page.text_content("#status")


def wait_for(page: Any, selector: str, pattern: str) -> str:
    """The text of an element once it is so; the page's policy forbids playwright's own way."""
    for _ in range(600):
        text = page.text_content(selector) or ""
        if re.search(pattern, text):
            return text
        page.wait_for_timeout(100)
    raise AssertionError(f"{selector} is {page.text_content(selector)!r}, not {pattern!r}")


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    """Twenty photographs: a face each, four faces each, and turned heads."""
    path = shared / "data/photos.zip"
    if not path.is_file():
        pytest.skip(f"needs photographs of faces: {path}")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:48]
        faces = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    several = []
    for first in range(8, 40, 4):
        sheet = Image.new("RGB", (640, 560))
        for place, face in enumerate(faces[first : first + 4]):
            side = 320 - 40 * place
            sheet.paste(face.resize((side, side)), (320 * (place % 2), 280 * (place // 2)))
        several.append(sheet)
    turned = [
        face.rotate(angle) for face, angle in zip(faces[40:44], (90, 180, 60, -70), strict=True)
    ]
    return [*faces[:8], *several, *turned]


@pytest.fixture(scope="module")
def ferplus(shared: Path) -> np.ndarray:
    """Faces of FER+'s validation split, uint8 (200, 48, 48, 3)."""
    with zipfile.ZipFile(shared / "data/ferplus.zip") as archive:
        names = [name for name in archive.namelist() if "Valid/" in name and name.endswith(".png")]
        chosen = names[:: len(names) // 200][:200]
        faces = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
    return np.stack([np.asarray(face) for face in faces])


def test_a_picture_is_labelled(open_page):
    """The whole way: load, find, label, draw, and what a screen reader is told."""
    page = open_page()
    assert "checked: it computes here what it must" in page.text_content("#engine")
    page.click("#sample")
    wait_for(page, "#status", "^One face.$")
    assert page.text_content("#faces strong") == "Happiness"
    assert page.get_attribute("#picture", "aria-label") == "sample.jpg, Happiness"
    drawn = page.evaluate(
        """() => {
            const { width, height } = overlay;
            const pixels = overlay.getContext("2d").getImageData(0, 0, width, height).data;
            return pixels.filter((value, at) => at % 4 === 3 && value > 0).length;
        }"""
    )
    assert drawn > 1000
    assert page.is_hidden("#error")


@pytest.mark.slow
def test_a_pages_first_load_decides_how_many_threads_there_are(open_page):
    """ONNX Runtime starts once: what a later load asks for is not what there is."""
    threads = open_page(ready=False, path="errors.js").evaluate(
        """async () => {
            const { load } = await import("/efficientface.js");
            const [first, second] = [await load({ threads: 1 }), await load({ threads: 2 })];
            return [first.threads, second.threads];
        }"""
    )
    assert threads == [1, 1]


@pytest.mark.slow
class TestSameAnswers:
    def test_faces_of_the_models_size(self, open_page, ferplus):
        page = open_page()
        assert page.evaluate(LOAD) < 1e-4
        with ef.load() as predictor:
            inputs = np.stack([predictor.preprocess(face) for face in ferplus])
            expected = predictor.infer(inputs)[1]
        found = page.evaluate(
            "async (text) => Array.from((await predictor.infer(bytes(text))).probabilities)",
            text_of(inputs.tobytes()),
        )
        difference = np.abs(np.reshape(found, expected.shape) - expected).max()
        print(f"largest difference in probability of 200 faces: {difference:.2g}")
        assert difference < 1e-4

    def test_faces_that_are_resized(self, open_page, ferplus):
        """The resize is Pillow's bit for bit, so these are no further off."""
        page = open_page()
        page.evaluate(LOAD)
        with ef.load() as predictor:
            expected = [list(p.probabilities.values()) for p in predictor.predict_batch(ferplus)]
        found = page.evaluate(
            """async (text) => {
                const all = bytes(text), size = 48 * 48 * 3, faces = [];
                for (let at = 0; at < all.length; at += size) {
                    faces.push({ data: all.subarray(at, at + size), width: 48, height: 48 });
                }
                const answers = await predictor.predictBatch(faces);
                return answers.map((one) => Object.values(one.probabilities));
            }""",
            text_of(ferplus.tobytes()),
        )
        assert np.abs(np.subtract(found, expected)).max() < 1e-4

    def test_photographs(self, open_page, photos, yunet_detector):
        page = open_page()
        page.evaluate(LOAD)
        worst, faces = 0.0, 0
        with ef.load() as predictor:
            for photo in photos:
                content = encoded(photo, "JPEG")  # which two decoders decode
                expected = predictor.predict_faces(content, yunet_detector)
                found = page.evaluate(LABEL_FILE, text_of(content))
                assert len(found) == len(expected)
                for one, other in zip(found, expected, strict=True):
                    assert one["label"] == other.prediction.label
                    assert one["small"] == other.small
                    np.testing.assert_allclose(one["box"], other.face.box, atol=0.5)
                    values = list(other.prediction.probabilities.values())
                    worst = max(worst, np.abs(np.subtract(one["probabilities"], values)).max())
                    faces += 1
        print(f"largest difference in probability of {faces} faces: {worst:.2g}")
        assert faces >= 40 and worst < 1e-2

    def test_geometry_is_pillows_bit_for_bit(self, open_page):
        page = open_page(ready=False)
        random = np.random.default_rng(7)
        cases: list[dict[str, Any]] = []
        wanted = []

        def case(pixels: np.ndarray, expected: Any, **arguments: Any) -> None:
            height, width = pixels.shape[:2]
            size = {"width": width, "height": height, "data": text_of(pixels.tobytes())}
            cases.append({**arguments, **size})
            wanted.append(np.asarray(expected))

        for _ in range(12):
            width, height, to_width, to_height = map(int, random.integers(3, 200, 4))
            if height > to_height:  # squares, of which every release of Pillow does the rows first
                height, to_height = width, to_width
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image, size = Image.fromarray(pixels), (to_width, to_height)
            for name in ("bilinear", "bicubic"):
                resized = image.resize(size, Image.Resampling[name.upper()])
                case(pixels, resized, do="resize", size=size, filter=name)
            shrunk = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.0)
            case(pixels, shrunk, do="shrink", size=size)
        for _ in range(12):
            pixels = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            points = random.uniform(5, 60, (5, 2)).tolist()
            face = Face((10.0, 10.0, 50.0, 60.0), 0.9, tuple(map(tuple, points)))
            for crop in ("box", "aligned"):
                spec = ef.PRESETS["rafdb"].replace(face_crop=crop)
                expected = cut_face(Image.fromarray(pixels), face, spec)
                case(pixels, expected, do="cut", crop=crop, box=face.box, points=points)
            left, top, side = map(int, random.integers((-60, -60, 1), (100, 100, 130)))
            expected = cut_square(Image.fromarray(pixels), left, top, side)
            case(pixels, expected, do="square", place=(left, top, side))
        found = page.evaluate(
            """async (cases) => {
                const { resize, shrink, cutSquare, toPicture } = await import("/pixels.js");
                const { cutFace } = await import("/faces.js");
                const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                const made = [];
                for (const one of cases) {
                    const picture = await toPicture({ ...one, data: bytes(one.data) });
                    const { data, width, height } = {
                        resize: () => resize(picture, ...one.size, one.filter),
                        shrink: () => shrink(picture, ...one.size),
                        cut: () => cutFace(picture, one, one.crop),
                        square: () => cutSquare(picture, ...one.place),
                    }[one.do]();
                    const text = Array.from(data, (value) => String.fromCharCode(value));
                    made.push([height, width, btoa(text.join(""))]);
                }
                return made;
            }""",
            cases,
        )
        for one, (height, width, values), expected in zip(cases, found, wanted, strict=True):
            pixels = np.frombuffer(base64.b64decode(values), np.uint8).reshape(height, width, 4)
            np.testing.assert_array_equal(pixels[..., :3], expected, str({**one, "data": ""}))

    def test_tracks_and_steady_labels(self, open_page):
        """Two faces that cross and a third that comes and goes, with labels that flicker."""
        random = np.random.default_rng(3)
        frames = []
        for index in range(80):
            seconds = index / 20 + float(random.uniform(0, 0.01))
            boxes = [
                [3 * index, 40, 3 * index + 60, 110],
                [240 - 3 * index, 60, 296 - 3 * index, 126],
            ]
            if index % 30 < 15:
                boxes.append([150, 200, 190, 250])
            values = random.dirichlet(np.full(8, 0.4), len(boxes))
            frames.append({"seconds": seconds, "boxes": boxes, "values": values.tolist()})
        tracker, steady, expected = Tracker(), SteadyLabels(), []
        for frame in frames:
            faces = [Face(tuple(map(float, box))) for box in frame["boxes"]]
            tracks = tracker.update(faces, frame["seconds"])
            answers = [
                steady.update(track, frame["seconds"], np.array(values, np.float32))
                for track, values in zip(tracks, frame["values"], strict=True)
            ]
            expected.append([(t, label, p) for t, (p, label) in zip(tracks, answers, strict=True)])
        found = open_page(ready=False).evaluate(
            """async (frames) => {
                const { Tracker } = await import("/tracks.js");
                const { SteadyLabels } = await import("/steady.js");
                const [tracker, steady] = [new Tracker(), new SteadyLabels()];
                return frames.map(({ seconds, boxes, values }) => {
                    const tracks = tracker.update(boxes.map((box) => ({ box })), seconds);
                    return tracks.map((track, at) => {
                        const answer = steady.update(track, seconds, values[at]);
                        return [track, answer.label, answer.probabilities];
                    });
                });
            }""",
            frames,
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert [one[:2] for one in ours] == [[track, label] for track, label, _ in theirs]
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one[2], other[2], atol=1e-4)
        assert max(one[0] for frame in found for one in frame) >= 3


ATTEMPTS = (
    "await fetch(there)",
    'await fetch(there, { method: "POST", body: "a picture", mode: "no-cors" })',
    "navigator.sendBeacon(there, 'a picture')",
    "new WebSocket(there.replace('http', 'ws'))",
    "new Image().src = there",
    "document.body.append(Object.assign(document.createElement('iframe'), { src: there }))",
    "document.body.append(Object.assign(document.createElement('script'), { text: '1' }))",
    "await import(there + 'more.js')",
    "setTimeout('1')",
)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server, which lets every page ask it, and what it was asked."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            for name in ("Access-Control-Allow-Origin", "Access-Control-Allow-Headers"):
                self.send_header(name, "*")
            self.send_header("Cross-Origin-Resource-Policy", "cross-origin")
            self.send_header("Content-Type", "text/javascript")
            self.end_headers()

        do_POST = do_OPTIONS = do_GET  # noqa: N815 - the library's names

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", requests
        server.shutdown()


@pytest.mark.slow
class TestNothingLeaves:
    def test_requests(self, open_page, photos, tmp_path):
        """Whatever is done on the page, it asks its own server for its own files, and no more."""
        requests: list[Any] = []
        page = open_page(
            *FAKE_CAMERA,
            permissions=("camera",),
            prepare=lambda page: page.context.on("request", lambda one: requests.append(one)),
        )
        origin = page.url
        page.click("#sample")
        wait_for(page, "#status", "^One face")
        files = [
            {"name": f"{at}.png", "mimeType": "image/png", "buffer": encoded(photo)}
            for at, photo in enumerate(photos[:3])
        ]
        page.set_input_files("#picture-files", files)
        wait_for(page, "#status", "face")
        page.click("#camera")
        wait_for(page, "#rate", r"\d")
        with page.expect_download() as download:
            page.click("#save")
        assert Path(download.value.path()).read_text().startswith("source,seconds,face,")
        page.click("#camera")
        sent = [one for one in requests if not one.url.startswith(("blob:", "data:"))]
        print(json.dumps(sorted({(one.method, one.url.removeprefix(origin)) for one in sent})))
        assert len(sent) > 10
        assert all(one.url.startswith(origin) for one in sent)
        assert all(one.method == "GET" and one.post_data is None for one in sent)
        assert len([one for one in sent if one.url.endswith((".wasm", ".onnx"))]) == 3

    def test_policy_forbids(self, open_page, elsewhere):
        """Another server would gladly take what is sent; the browser does not send it."""
        address, requests = elsewhere
        page = open_page(ready=False)
        for attempt in ATTEMPTS:
            violations = page.evaluate(
                f"""async (there) => {{
                    let violations = 0;
                    document.addEventListener("securitypolicyviolation", () => violations++);
                    try {{ {attempt}; }} catch {{}}
                    await new Promise((resolve) => setTimeout(resolve, 300));
                    return violations;
                }}""",
                address,
            )
            assert violations >= 1, attempt
            assert requests == [], attempt


def camera_file(path: Path, photos: list[Image.Image]) -> Path:
    """What Chromium's fake camera shows: a face that moves, as a film of JPEG pictures."""
    frames = []
    for index in range(30):
        frame = Image.new("RGB", (640, 480), (90, 110, 120))
        frame.paste(photos[0], (100 + 5 * index, 60))
        frames.append(encoded(frame, "JPEG"))
    path.write_bytes(b"".join(frames))
    return path


def write_webm(path: Path, photos: list[Image.Image], seconds: int = 3) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 480, 300, "yuv420p"
        face = photos[1].resize((240, 240))
        for index in range(10 * seconds):
            frame = Image.new("RGB", (480, 300), (90, 110, 120))
            frame.paste(face, (4 * index % 200, 30))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
class TestVideo:
    def test_camera(self, open_page, photos, tmp_path):
        film = camera_file(tmp_path / "face.mjpeg", photos)
        arguments = (*FAKE_CAMERA, f"--use-file-for-fake-video-capture={film}")
        page = open_page(*arguments, permissions=("camera",))
        page.click("#camera")
        wait_for(page, "#status", "^The camera is on")
        wait_for(page, "#faces .muted", "^face 1")
        wait_for(page, "#rate", r"\d")
        assert page.text_content("#camera") == "Stop camera"
        page.click("#camera")
        wait_for(page, "#status", "^The camera is off")
        assert page.evaluate("() => player.srcObject === null")
        assert page.get_attribute("#stage", "data-shows") == "nothing"

    def test_video_file_and_csv(self, open_page, photos, tmp_path):
        page = open_page()
        page.set_input_files("#video-file", str(write_webm(tmp_path / "face.webm", photos)))
        wait_for(page, "#faces .muted", "^face 1")
        for _ in range(100):
            if page.evaluate("() => player.ended"):
                break
            page.wait_for_timeout(100)
        with page.expect_download() as download:
            page.click("#save")
        text = Path(download.value.path()).read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
        assert {row["source"] for row in rows} == {"face.webm"}
        assert {row["face"] for row in rows} == {"1"}  # one number for the face that moves
        seconds = [float(row["seconds"]) for row in rows]
        assert seconds == sorted(seconds) and len(set(seconds)) > 3
        for row in rows:
            labels = list(row)[11:]
            assert sum(float(row[label]) for label in labels) == pytest.approx(1, abs=0.002)
        moved = float(rows[-1]["left"]) - float(rows[0]["left"])
        assert moved == pytest.approx(40 * (seconds[-1] - seconds[0]), abs=12)

    def test_background(self, open_page, photos, tmp_path):
        page = open_page()
        film = write_webm(tmp_path / "face.webm", photos, seconds=12)
        page.set_input_files("#video-file", str(film))
        wait_for(page, "#faces .muted", "^face 1")
        see = """(hidden) => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
        page.evaluate(see, True)
        assert status(page) == "Paused while this page is in the background."
        assert page.evaluate("() => player.paused")
        page.evaluate(see, False)
        wait_for(page, "#status", "^Playing face.webm")
        page.wait_for_timeout(100)
        assert not page.evaluate("() => player.paused")


@pytest.mark.slow
class TestErrors:
    """What goes wrong is said in a sentence on the page, and the page goes on."""

    def test_camera_refused(self, open_page):
        page = open_page("--use-fake-device-for-media-stream", "--deny-permission-prompts")
        page.click("#camera")
        assert "permission was refused" in wait_for(page, "#error", "camera")
        assert status(page) == "No camera."

    def test_no_camera(self, open_page):
        page = open_page(permissions=("camera",))
        page.click("#camera")
        assert "No camera was found. Connect one" in wait_for(page, "#error", "camera")

    @pytest.mark.parametrize(
        ("name", "content", "found"),
        [
            ("notes.png", b"not a picture", "this browser cannot decode"),
            ("empty.jpg", b"", "an empty file"),
        ],
    )
    def test_a_picture_that_is_none(self, open_page, photos, name, content, found):
        page = open_page()
        right = {"name": "face.png", "mimeType": "image/png", "buffer": encoded(photos[0])}
        wrong = {"name": name, "mimeType": "image/png", "buffer": content}
        page.set_input_files("#picture-files", [wrong, right])
        wait_for(page, "#status", "^One face")
        told = wait_for(page, "#error", name)
        assert re.search(f"{name}: this should be a picture, but is .*{found}", told)
        page.set_input_files("#picture-files", [right])
        wait_for(page, "#status", "^One face")
        assert page.is_hidden("#error")

    def test_a_video_that_is_none(self, open_page):
        page = open_page()
        wrong = {"name": "film.mp4", "mimeType": "video/mp4", "buffer": b"no film"}
        page.set_input_files("#video-file", wrong)
        assert "film.mp4: this should be a video" in wait_for(page, "#error", "film")

    @pytest.mark.parametrize(
        ("file", "content", "found"),
        [
            ("model.onnx", None, "HTTP 404"),
            ("model.onnx", b"<html>not here</html>", "something else"),
            ("ort/ort.wasm.min.mjs", None, "see that the folder ort/ lies beside"),
            ("ort/ort-wasm-simd-threaded.wasm", b"\0asm", "ONNX Runtime Web"),
        ],
    )
    def test_a_model_that_cannot_be_loaded(self, open_page, file, content, found):
        def prepare(page: Any) -> None:
            answer = {"status": 404} if content is None else {"status": 200, "body": content}
            page.route(f"**/{file}", lambda route: route.fulfill(**answer))

        page = open_page(prepare=prepare, ready=False)
        assert found in wait_for(page, "#error", r"\w")
        assert status(page) == "There is no model: nothing can be labelled."
        page.click("#sample")
        assert "The model is not loaded" in wait_for(page, "#error", "not loaded")

    def test_a_model_that_computes_something_else(self, open_page, site):
        """One byte of the probe's logits is another: it is refused by what it computes."""
        place = site["model.onnx"].find(b'"logits": [[') + len(b'"logits": [[')
        digit = place + (site["model.onnx"][place : place + 1] == b"-")
        other = bytearray(site["model.onnx"])
        other[digit : digit + 1] = b"9" if other[digit : digit + 1] != b"9" else b"1"

        def prepare(page: Any) -> None:
            page.route("**/model.onnx", lambda route: route.fulfill(status=200, body=bytes(other)))

        page = open_page(prepare=prepare, ready=False)
        assert "the logits that it says it gives" in wait_for(page, "#error", "logits")

    def test_webgpu_where_there_is_none(self, open_page):
        page = open_page()
        if page.is_enabled("input[value=webgpu]"):
            page.click("input[value=webgpu]")  # and it goes back
            assert "WebGPU" in wait_for(page, "#error", "webgpu")
        assert page.is_checked("input[value=wasm]")
        page.click("#sample")
        wait_for(page, "#status", "^One face")
