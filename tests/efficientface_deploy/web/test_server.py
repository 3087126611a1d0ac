"""The server: what it gives, with which headers, and the command in a process of its own."""

from __future__ import annotations

import http.client
import logging
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.web import server as server_module
from efficientface_deploy.web.files import FILE_VARIABLE
from efficientface_deploy.web.server import CONTENT_SECURITY_POLICY, HEADERS, main, open_server

SITE = {"index.html": b"<p>page</p>", "ort/a.wasm": b"\0asm", "model.onnx": b"model"}


def host_of(address: str) -> str:
    return address.removeprefix("http://").rstrip("/")


@pytest.mark.parametrize(
    ("path", "kind", "content"),
    [
        ("", "text/html; charset=utf-8", SITE["index.html"]),
        ("index.html?a=b", "text/html; charset=utf-8", SITE["index.html"]),
        ("ort/a.wasm", "application/wasm", SITE["ort/a.wasm"]),
        ("model.onnx", "application/octet-stream", SITE["model.onnx"]),
    ],
)
def test_files(serve, path, kind, content):
    with urllib.request.urlopen(serve(SITE) + path) as response:
        assert response.read() == content
        assert response.headers["Content-Type"] == kind
        assert {name: response.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    "path", ["missing", "ort", "../setup.py", "%2e%2e/setup.py", "/etc/passwd"]
)
def test_what_is_not_there(serve, path):
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(serve(SITE) + path)
    assert raised.value.code == 404


def test_a_file_that_the_browser_has_is_not_sent_again(serve):
    address = serve(SITE)
    tag = urllib.request.urlopen(address).headers["ETag"]
    again = urllib.request.Request(address, headers={"If-None-Match": tag})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(again)
    assert raised.value.code == 304


def test_head(serve):
    connection = http.client.HTTPConnection(host_of(serve(SITE)))
    connection.request("HEAD", "/model.onnx")
    response = connection.getresponse()
    assert (response.status, response.headers["Content-Length"], response.read()) == (200, "5", b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_other_methods_are_not_allowed(serve, method):
    connection = http.client.HTTPConnection(host_of(serve(SITE)))
    connection.request(method, "/", body=b"a picture")
    response = connection.getresponse()
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")
    assert response.read() == b"method not allowed\n"
    assert {name: response.headers[name] for name in HEADERS} == HEADERS
    connection.request("GET", "/model.onnx")  # by a new connection: the body was not read
    assert connection.getresponse().read() == SITE["model.onnx"]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET http://[ HTTP/1.1", b"404"),
        (b"GET /" + 70_000 * b"x" + b" HTTP/1.1", b"414"),
        (b"GET / HTTP/x", b"400"),
        (b"HEAD /nothing HTTP/1.1", b"404"),
    ],
)
def test_what_is_no_request_is_refused_in_few_words(serve, request_line, status, capfd):
    host, port = host_of(serve(SITE)).split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request_line + b"\r\nConnection: close\r\n\r\n")
        said = b"".join(iter(lambda: connection.recv(4096), b""))
    assert status in said.splitlines()[0] or said == b"bad request\n"  # to HTTP/0.9 no headers
    assert b"<" not in said and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("LocalHost", 200), ("evil.example:80", 421), ("[::", 421), ("", 421)],
)
def test_a_page_of_another_name_gets_nothing(host, status, serve):
    """Whose name leads to this machine: to a browser it would be the same site."""
    connection = http.client.HTTPConnection(host_of(serve(SITE)), timeout=10)
    connection.request("GET", "/index.html", headers={"Host": host})
    answer = connection.getresponse()
    assert answer.status == status
    assert (answer.read() == SITE["index.html"]) == (status == 200)


def test_a_browser_that_leaves_is_no_error(serve, capfd):
    host, port = host_of(serve({"large.wasm": bytes(30_000_000)})).split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /large.wasm HTTP/1.1\r\n\r\n")
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for thread in threading.enumerate():
        if "process_request" in thread.name:
            thread.join(10)
    assert capfd.readouterr() == ("", "")


def test_a_defect_of_the_server_is_told(serve, capfd, monkeypatch):
    monkeypatch.setattr(server_module, "_path_of", lambda target: 1 / 0)
    with pytest.raises(http.client.RemoteDisconnected):
        urllib.request.urlopen(serve(SITE))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_page_has_the_policy_of_the_header(yunet_file):
    """Another host need not send our headers: then the page's own holds."""
    page = (server_module.Path(server_module.__file__).parent / "static/index.html").read_text()
    assert f'content="{CONTENT_SECURITY_POLICY}"' in page
    assert "unsafe-inline" not in CONTENT_SECURITY_POLICY
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", page)


def test_a_port_that_is_taken():
    with open_server(SITE) as server:
        port = server.server_port
        with pytest.raises(ConfigError, match=f"^--port {port}: .* in use; give another --port"):
            open_server(SITE, port)


def test_bad_options(tmp_path):
    for arguments in (["--port", "70000"], ["--model", str(tmp_path / "no.onnx")]):
        with pytest.raises(Exception, match="expected") as raised:
            main(arguments)
        assert raised.value.exit_code == 2


def test_what_is_fetched_is_said(monkeypatch, capsys):
    def fetch(*_: object) -> None:
        logging.getLogger("efficientface_deploy.download").warning("fetching 33 MB")
        raise KeyboardInterrupt

    monkeypatch.setattr("efficientface_deploy.web.server.page_files", fetch)
    with pytest.raises(KeyboardInterrupt):
        main(["--no-browser"])
    assert capsys.readouterr().err == "fetching 33 MB\n"


def test_command(runtime_archive, yunet_file):
    command = [sys.executable, "-m", "efficientface_deploy.web.server", "--no-browser"]
    command += ["--port", "0", "--runtime", str(runtime_archive), "--detector", str(yunet_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address = line.split(" ")[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert b"<title>EfficientFace" in urllib.request.urlopen(address).read()
        assert urllib.request.urlopen(address + "ort/ort.wasm.min.mjs").status == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")  # Ctrl-C is how it is meant to end


def test_command_where_a_file_is_missing(tmp_path, yunet_file, monkeypatch):
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "none.tgz"))
    command = [sys.executable, "-m", "efficientface_deploy.web.server", "--no-browser"]
    result = subprocess.run(
        [*command, "--detector", str(yunet_file)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: .*none\.tgz: expected npm's archive of onnxruntime-web, found no such file; .*\n",
        result.stderr,
    )
