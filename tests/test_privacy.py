"""What leaves the machine, and what is written down of a face: nothing that was not asked for."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from efficientface_deploy.download import CACHE_VARIABLE
from efficientface_deploy.vision.yunet import WEIGHTS
from efficientface_deploy.web.files import RUNTIME

ROOT = Path(__file__).resolve().parent.parent
CODE = [path for name in ("efficientface_deploy", "export") for path in (ROOT / name).rglob("*.py")]
PHOTO = ROOT / "efficientface_deploy" / "web" / "static" / "sample.jpg"

# ---- no connection, no look-up of a name

# Python's own sockets, by an audit hook; those of libraries in C, by what the kernel counts in a
# network of the process's own, which leads nowhere.
HOOK = """
import sys

def watch(event, arguments):
    named = event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
    if named or event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        print("ATTEMPT", event, file=sys.stderr)

sys.addaudithook(watch)
"""
COUNT = '"$@"; code=$?; cat /proc/net/snmp /proc/net/snmp6 > "$COUNTERS"; exit $code'
ALONE = ("unshare", "--map-root-user", "--net", "sh", "-c", COUNT, "sh")
SENT = ("Ip.OutRequests", "Ip.OutNoRoutes", "Ip6OutRequests", "Ip6OutNoRoutes")


def can_be_alone() -> bool:
    words = ("unshare", "--map-root-user", "--net", "true")
    return (
        bool(shutil.which("unshare")) and not subprocess.run(words, capture_output=True).returncode
    )


def read_counters(path: Path) -> dict[str, int]:
    """What the kernel counted, e.g. ``{"Ip.OutNoRoutes": 0, "Ip6OutRequests": 0}``."""
    lines = [line.split() for line in path.read_text().splitlines()]
    found = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    for names, values in itertools.pairwise(lines):
        if names[0] == values[0] and not names[1].lstrip("-").isdigit():
            pairs = zip(names[1:], values[1:], strict=True)
            found |= {f"{names[0][:-1]}.{name}": int(value) for name, value in pairs}
    return found


@pytest.fixture
def attempts(tmp_path: Path):
    """Run Python code with an empty cache: its process, and how often it tried the network."""

    def run(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], int]:
        counters = tmp_path / "counters"
        own = {CACHE_VARIABLE: str(tmp_path / "cache"), "COUNTERS": str(counters)}
        environment = {name: value for name, value in os.environ.items() if "YUNET" not in name}
        alone = ALONE if can_be_alone() else ()
        done = subprocess.run(
            [*alone, sys.executable, "-c", HOOK + code, *arguments],
            cwd=tmp_path,
            env={**environment, **own, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))},
            capture_output=True,
            text=True,
        )
        count = done.stderr.count("ATTEMPT")
        if alone:
            found = read_counters(counters)
            count += sum(found[name] for name in SENT if name in found)
        return done, count

    return run


LIBRARY = """
import efficientface_deploy as ef
with ef.load() as predictor:
    print(predictor(sys.argv[1]).label, predictor.features([sys.argv[1]]).shape)
"""
COMMAND = "import importlib; sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"
COMMANDS = {
    "predict": ("efficientface_deploy.cli", str(PHOTO)),
    "annotate": ("efficientface_deploy.batch.cli", str(PHOTO.parent), "--out", "annotations"),
    "triton": ("efficientface_export.cli", "--triton", "repository"),
}


def test_the_library_tries_no_network(attempts) -> None:
    done, count = attempts(LIBRARY, str(PHOTO))
    assert "(1, 1024)" in done.stdout, done.stderr
    assert not count, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tries_no_network(name: str, attempts) -> None:
    if name == "annotate":
        pytest.importorskip("pyarrow")
    done, count = attempts(COMMAND, *COMMANDS[name])
    assert done.returncode == 0, done.stderr
    assert not count, done.stderr


def test_finding_faces_with_a_detector_that_is_there_tries_no_network(
    attempts, yunet_file: Path
) -> None:
    detector = f"yunet={yunet_file}"
    done, count = attempts(COMMAND, COMMANDS["predict"][0], str(PHOTO), "--detect", detector)
    assert "Happiness" in done.stdout and not count, done.stderr


@pytest.mark.slow
def test_an_export_tries_no_network(attempts) -> None:
    pytest.importorskip("torch")
    words = ("efficientface_export.cli", "--engine", "onnx", "--precision", "fp32", "--out", "made")
    done, count = attempts(COMMAND, *words)
    assert done.returncode == 0, done.stderr
    assert not count, done.stderr


def test_a_detector_that_is_not_there_is_looked_for_and_said(attempts) -> None:
    """And so attempts are seen."""
    done, count = attempts(COMMAND, COMMANDS["predict"][0], str(PHOTO), "--faces")
    assert count and WEIGHTS.url in done.stderr


@pytest.mark.skipif(not can_be_alone(), reason="no network of one's own here: unshare")
def test_what_a_library_in_c_sends_is_counted(attempts) -> None:
    code = (
        "import ctypes\nlib = ctypes.CDLL(None)\nfd = lib.socket(2, 2, 0)\n"
        "address = bytes([2, 0, 0, 53, 192, 0, 2, 1]) + bytes(8)\n"
        "lib.connect(fd, address, 16)\n"
    )
    done, count = attempts(code)
    assert "ATTEMPT" not in done.stderr and count


# ---- what could reach out is in few places

NETWORK = {
    *("asyncio", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "socketserver"),
    *("ssl", "urllib3", "webbrowser", "xmlrpc", "urllib.request", "aiohttp", "websockets"),
}
REACHING = {
    "efficientface_deploy/backends/triton.py": {"http", "ssl"},  # the server that load() names
    "efficientface_deploy/batch/cluster.py": {"socket"},  # the cluster that --ray names
    "efficientface_deploy/download.py": {"urllib.request"},
    "efficientface_deploy/web/server.py": {"http", "webbrowser"},  # listens on 127.0.0.1
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_four_modules_can_reach_the_network() -> None:
    found = {}
    for path in CODE:
        names = imported(path)
        reaching = {n for n in NETWORK if any(f"{name}.".startswith(f"{n}.") for name in names)}
        if reaching:
            found[path.relative_to(ROOT).as_posix()] = reaching
    assert found == REACHING


def test_two_files_can_be_fetched_each_by_its_hash() -> None:
    made = [
        path.relative_to(ROOT).as_posix()
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Download")
    ]
    expected = ["efficientface_deploy/vision/yunet.py", "efficientface_deploy/web/files.py"]
    assert sorted(made) == expected
    assert all(re.fullmatch("[0-9a-f]{64}", wanted.sha256) for wanted in (WEIGHTS, RUNTIME))


# ---- no picture in what is written down

SAMPLE_BYTES = 112 * 112  # of the smallest picture that the model takes, in grey


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command runs, so that all that it writes is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def values(content: object) -> list[object]:
    """All that is neither a list nor an object, at any depth."""
    if isinstance(content, dict):
        return [value for part in content.values() for value in values(part)]
    if isinstance(content, list):
        return [value for part in content for value in values(part)]
    return [content]


def test_json_has_labels_and_places_and_no_pixels(
    folder: Path, yunet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientface_deploy.cli import main

    assert main([str(PHOTO), "--detect", f"yunet={yunet_file}", "--json"]) == 0
    line = capsys.readouterr().out
    assert len(line) < SAMPLE_BYTES / 8
    found = json.loads(line)
    (face,) = found["faces"]
    assert set(found) == {"image", "faces"}
    known = {"label", "confidence", "probabilities", "unsure", "box", "score", "landmarks", "small"}
    assert set(face) == known
    texts = [value for value in values(face) if isinstance(value, str)]
    assert texts == [face["label"]] and len(values(face)) < 30
    assert not list(folder.iterdir())


def test_annotations_have_no_pixels_even_of_pictures_that_came_as_bytes(
    folder: Path, tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from efficientface_deploy.batch.cli import main

    table = pa.table({"image": [PHOTO.read_bytes()] * 3, "path": ["a.jpg", "b.jpg", "c.jpg"]})
    pq.write_table(table, tmp_path / "set.parquet")
    assert main([str(tmp_path / "set.parquet"), "--column", "image", "--out", "made"]) == 0
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} <= {".parquet", ".json", ""}
    rows = pq.read_table(folder / "made")
    assert rows.num_rows == 3
    for field in rows.schema:
        binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        assert not binary and not pa.types.is_nested(field.type), field
    part = PHOTO.read_bytes()[2000:2032]
    assert all(part not in path.read_bytes() for path in written)
    assert sum(path.stat().st_size for path in written) < 2 * SAMPLE_BYTES


def test_a_picture_is_written_where_it_is_asked_for(folder: Path, yunet_file: Path) -> None:
    """Which also shows that the tests above would see one."""
    from efficientface_deploy.cli import main

    assert main([str(PHOTO), "--detect", f"yunet={yunet_file}", "--draw", "drawn"]) == 0
    (drawn,) = (folder / "drawn").iterdir()
    assert Image.open(drawn).size == Image.open(PHOTO).size
