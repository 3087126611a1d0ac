"""Each example as its reader would run it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import load
from efficientface_deploy.vision.video import write_video

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("photos", (), "python examples/photos.py: expected FOLDER, found no arguments; type e.g."),
        ("photos", ("/nowhere",), "/nowhere: expected a folder of JPEG or PNG files"),
        ("video", ("/nowhere.mp4",), "/nowhere.mp4: expected a video file"),
        ("video", ("a", "b"), "b: expected no more arguments for python examples/video.py"),
        ("service", ("--prot", "1"), "--prot: expected an option of python examples/service.py"),
        ("service", ("http",), "PORT: expected a whole number, found 'http'"),
        ("service", ("99999",), "PORT: expected at most 65535, found 99999"),
    ],
)
def test_wrong_use_is_one_line(name, arguments, said, yunet_named):
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "examples/service.py", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: PORT: expected one that is free, found {port}: ")
    assert done.stderr.count("\n") == 1


def test_photos(yunet_named, astronaut, tmp_path):
    small = np.asarray(Image.fromarray(astronaut).resize((300, 300)))
    Image.fromarray(astronaut).save(tmp_path / "one.jpg")
    Image.fromarray(np.hstack([small, small])).save(tmp_path / "two.jpg")
    Image.new("RGB", (80, 60)).save(tmp_path / "nobody.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    done = run("photos", tmp_path, code=2)
    assert re.search(r"^ +3 Happiness$", done.stdout, re.MULTILINE)
    assert re.search(r"left out: .*broken\.jpg", done.stderr)
    assert done.stdout.splitlines()[-1] == f"happiest picture: {tmp_path / 'two.jpg'}"


def test_photos_without_a_face(yunet_named, tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "nobody.jpg")
    assert run("photos", tmp_path).stdout == "no face found\n"


def test_portrait(tmp_path):
    path = tmp_path / "new/portrait.jpg"
    assert run("portrait", path).stdout == f"saved {path}\n"
    with Image.open(path) as photograph:
        assert (photograph.format, photograph.size) == ("JPEG", (512, 512))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--help",), 0, ""),
        (("--face",), 2, "error: --face: expected an option of python examples/portrait.py, found"),
        ((".",), 2, "error: .: expected a file's name, found a folder"),
        (("/dev/null/a.jpg",), 2, "error: /dev/null: expected a folder that can be written"),
    ],
)
def test_portrait_writes_no_file_that_was_not_asked_for(arguments, code, said, tmp_path):
    command = [sys.executable, str(ROOT / "examples/portrait.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if said else 0)
    assert done.stderr.startswith(said)
    assert not list(tmp_path.iterdir())


def test_video(yunet_named, astronaut, tmp_path):
    pytest.importorskip("av")
    face = Image.fromarray(astronaut).resize((256, 256))
    with write_video(tmp_path / "clip.mp4", 10) as write:
        for frame in (face, face, Image.new("RGB", face.size), face):
            write(frame)
    lines = run("video", tmp_path / "clip.mp4").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0.00", "0.10", "0.20", "0.30"]
    said = ["1 Happiness", "1 Happiness", "nobody", "1 Happiness"]
    assert [line.split("ms  ")[-1] for line in lines] == said


@pytest.fixture
def service() -> Iterator[str]:
    """Address of the service, which runs on a port that the system chose."""
    command = [sys.executable, "examples/service.py", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.send_signal(2)  # SIGINT
        assert process.wait(timeout=30) == 0


def post(address: str, body: bytes) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(address, data=body, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_service(service, photo, tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(photo).save(path)
    with load() as predictor:
        expected = predictor(path)
    bodies = [path.read_bytes(), b"no picture", b""] * 6
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda body: post(service, body), bodies))
    assert [status for status, _ in answers] == [200, 400, 400] * 6
    for at in range(0, 18, 3):
        assert answers[at][1]["label"] == expected.label
        assert answers[at][1]["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert "another kind of file" in answers[at + 1][1]["error"]
        assert "an empty file" in answers[at + 2][1]["error"]
