"""What is fetched, from a server on loopback that behaves in every way that one can."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from efficientface_deploy import download
from efficientface_deploy.download import Download, cache_folder, fetch
from efficientface_deploy.errors import BackendError

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's ``kind`` says, and counts."""

    def do_GET(self) -> None:
        server = self.server
        server.requests += 1
        if server.kind == "missing":
            self.send_error(404)
            return
        sent = {"wrong": CONTENT[::-1], "endless": CONTENT * 20}.get(server.kind, CONTENT)
        self.send_response(200)
        if server.kind != "endless":
            promised = 2 * len(sent) if server.kind == "silent" else len(sent)
            self.send_header("Content-Length", str(promised))
        self.end_headers()
        if server.kind == "cut":
            sent = sent[: len(sent) // 2]
        try:
            self.wfile.write(sent)
            if server.kind == "silent":
                server.released.wait(10)
        except ConnectionError:
            server.refused = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on loopback; the cache is a folder of the test's."""
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.kind, server.requests, server.refused = "right", 0, False
        server.released = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def wanted(server: http.server.HTTPServer | None = None) -> Download:
    port = server.server_port if server else free_port()
    return Download("model.onnx", f"http://127.0.0.1:{port}/model.onnx", SHA256, len(CONTENT))


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def get(one: Download) -> bytes:
    return fetch(one, "detector", "name another file")


def test_fetched_once_and_kept(server, tmp_path):
    assert get(wanted(server)) == get(wanted(server)) == CONTENT
    assert server.requests == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("wrong", "102400 bytes with another sha256"),
        ("cut", "bytes with another sha256|IncompleteRead"),
        ("endless", "102401 bytes with another sha256"),
        ("missing", "HTTP Error 404"),
        ("silent", "timed out"),
    ],
)
def test_what_the_server_gives_is_not_the_file(server, tmp_path, kind, found, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.3)
    server.kind = kind
    with pytest.raises(BackendError, match=found) as raised:
        get(wanted(server))
    message = str(raised.value)
    assert "\n" not in message and message.startswith("detector: expected its file from http")
    assert f"put the file at {tmp_path / 'cache/model.onnx'} (sha256 {SHA256})" in message
    assert message.endswith(", or name another file")
    assert list((tmp_path / "cache").iterdir()) == []  # the folder of the advice, nothing in it


def test_no_network(server, tmp_path):
    with pytest.raises(BackendError, match=r"refused.*put the file at .*model\.onnx \(sha256 "):
        get(wanted())
    (tmp_path / "cache/model.onnx").write_bytes(CONTENT)
    assert get(wanted()) == CONTENT  # put there by hand


def test_no_network_and_what_is_in_the_files_place(server, tmp_path, monkeypatch):
    path = tmp_path / "cache/model.onnx"

    def said() -> str:
        with pytest.raises(BackendError, match=f"put the file at .* .sha256 {SHA256}") as raised:
            get(wanted())
        return str(raised.value)

    assert str(path) not in said().partition(";")[0]  # none
    path.write_bytes(b"<html>")
    other = hashlib.sha256(b"<html>").hexdigest()
    assert f"refused, and {path} has another sha256, {other}; put" in said()
    assert path.read_bytes() == b"<html>"
    path.unlink()
    path.mkdir()
    assert f", and {path} cannot be read: is a directory; put" in said()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "file"))
    assert f"{tmp_path / 'file/model.onnx'} cannot be read: not a directory; put" in said()


def test_size_for_people(server, caplog):
    one = Download("model.onnx", wanted(server).url, SHA256, 102_501)
    get(one)
    assert one.kilobytes == 103
    assert "(103 KB)" in caplog.text


def test_server_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "_LONGEST", -1.0)
    with pytest.raises(BackendError, match=r"no more than \d+ bytes in"):
        get(wanted(server))


def test_damaged_file_in_the_cache_is_replaced(server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/model.onnx").write_bytes(CONTENT[:-1])
    assert get(wanted(server)) == CONTENT
    assert (tmp_path / "cache/model.onnx").read_bytes() == CONTENT


def test_cache_that_cannot_be_written(server, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")  # root may write into read-only folders
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "file"))
    assert get(wanted(server)) == get(wanted(server)) == CONTENT
    assert server.requests == 2
    assert "cannot be kept, and is fetched again next time" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_cache_that_is_read_only(server, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert get(wanted(server)) == CONTENT
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_at_once(server, tmp_path):
    code = """
import hashlib, sys
from efficientface_deploy.download import Download, fetch
url, sha256, size = sys.argv[1:]
content = fetch(Download("model.onnx", url, sha256, int(size)), "detector", "")
print(hashlib.sha256(content).hexdigest())
"""
    one = wanted(server)
    command = [sys.executable, "-c", code, one.url, one.sha256, str(one.size)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == [SHA256] * 4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {}, ".cache/efficientface"),
        ("linux", {"XDG_CACHE_HOME": "HOME/xdg"}, "xdg/efficientface"),
        ("darwin", {}, "Library/Caches/efficientface"),
        ("win32", {}, "AppData/Local/efficientface"),
        ("win32", {"LOCALAPPDATA": "HOME/local"}, "local/efficientface"),
        ("linux", {"EFFICIENTFACE_CACHE": "HOME/mine"}, "mine"),
    ],
)
def test_place_of_the_cache(monkeypatch, tmp_path, system, variables, place):
    for name in ("EFFICIENTFACE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("HOME", str(tmp_path)))
    assert cache_folder() == tmp_path / place


def test_nothing_is_fetched_by_imports_or_by_loading_a_model(run_python: Callable[..., object]):
    code = """
import socket, sys
def refuse(*arguments): raise AssertionError("a connection")
socket.socket.connect = socket.create_connection = refuse
import efficientface_deploy as ef
import efficientface_deploy.vision.yunet
with ef.load(threads=1) as predictor:
    print("urllib.request" in sys.modules)
"""
    result = run_python(code)
    assert result.stdout == "False\n", result.stderr
