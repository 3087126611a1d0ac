"""The server: what it gives, with which headers, and the command in a process of its own."""

from __future__ import annotations

import http.client
import logging
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.web import server as server_module
from efficientface_deploy.web.files import FILE_VARIABLE
from efficientface_deploy.web.server import CONTENT_SECURITY_POLICY, HEADERS, main, open_server

SITE = {"index.html": b"<p>page</p>", "ort/a.wasm": b"\0asm", "model.onnx": b"model"}


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


def test_head_and_post(serve):
    connection = http.client.HTTPConnection(serve(SITE).removeprefix("http://").rstrip("/"))
    connection.request("HEAD", "/model.onnx")
    response = connection.getresponse()
    assert (response.status, response.headers["Content-Length"], response.read()) == (200, "5", b"")
    connection.request("POST", "/", body=b"a picture")
    assert connection.getresponse().status == 501


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
