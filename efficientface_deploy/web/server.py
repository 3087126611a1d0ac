"""efficientface-web: the model in the browser, on this machine alone.

Serves a page on 127.0.0.1 that finds and labels faces in pictures, videos and from the camera. It
runs in the browser: no picture is sent anywhere, to this server neither.
"""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import web

    web()

import contextlib
import dataclasses
import hashlib
import http.server
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from efficientface_deploy.command import log_told, option, parse_config
from efficientface_deploy.download import Download
from efficientface_deploy.errors import ConfigError, system_words
from efficientface_deploy.web.files import MODEL_FILE, page_files, read_model

HOST = "127.0.0.1"

# What the page may do: load its own files and run them. It may send nothing anywhere else.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    "connect-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'"
)

HEADERS = {
    "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'",
    # With these two a browser lets WebAssembly have threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

_TYPES = {
    **{".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8"},
    **dict.fromkeys((".js", ".mjs"), "text/javascript; charset=utf-8"),
    **{".ts": "text/plain; charset=utf-8", ".wasm": "application/wasm", ".svg": "image/svg+xml"},
}
_ANY_TYPE, _PLAIN = "application/octet-stream", "text/plain; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class WebConfig:
    """Options of ``efficientface-web``."""

    model: Path | None = option(
        None, help="*.onnx of ours, or accurate; default: the bundled model", first=True
    )
    port: int = option(8021, minimum=0, maximum=65535, help="of 127.0.0.1; 0 for any", first=True)
    browser: bool = option(True, help="open the page in the browser")
    detector: Path | None = option(None, help="YuNet's model file; default: fetched once (233 KB)")
    runtime: Path | None = option(
        None, help="npm's archive of onnxruntime-web; default: fetched once (33 MB)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``efficientface-web``; it serves until Ctrl-C."""
    config = parse_config(
        WebConfig,
        argv,
        prog="efficientface-web",
        description=__doc__ or "",
        example="--model artifacts/efficientface-int8-cpu.onnx",
    )
    with log_told(Download.__module__):
        site = {MODEL_FILE: read_model(config.model), **page_files(config.detector, config.runtime)}
    with open_server(site, config.port) as server:
        address = f"http://{HOST}:{server.server_port}/"
        print(f"{address} (Ctrl-C ends it; nothing leaves this machine)", flush=True)
        if config.browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):  # the way in which it is meant to end
            server.serve_forever()
    return 0


def open_server(
    site: Mapping[str, bytes], port: int = 0, headers: Mapping[str, str] = HEADERS
) -> http.server.ThreadingHTTPServer:
    """A server of files on 127.0.0.1, which does not serve yet.

    Args:
        site: Paths without the first slash, and what is there; ``index.html`` is the page.
        port: Where it listens; 0 takes any that is free.
        headers: Sent with every answer.

    Raises:
        ConfigError: The port cannot be had.
    """
    files = {f"/{name}": (_type(name), content, _tag(content)) for name, content in site.items()}
    if "/index.html" in files:
        files["/"] = files["/index.html"]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            if _host_of(self.headers.get("Host", HOST)) not in (HOST, "localhost"):
                # A page of a name that leads here, which its browser takes for the same site.
                self.send_error(421)
                return
            file = files.get(_path_of(self.path))
            if file is None:
                self._send(404, _PLAIN, b"not found\n", {}, with_body=with_body)
                return
            kind, content, tag = file
            unchanged = self.headers.get("If-None-Match") == tag
            status, content = (304, b"") if unchanged else (200, content)
            self._send(status, kind, content, {"ETag": tag}, with_body=with_body)

        def send_error(
            self, code: int, message: str | None = None, explain: str | None = None
        ) -> None:
            """Refuse a request in our words and with our headers, and end its connection.

            Python calls this for all that has no ``do_`` method, and for what is no request.
            """
            status, allowed = code, {"Connection": "close"}
            if code == HTTPStatus.NOT_IMPLEMENTED:  # which is for methods that nobody knows
                status, allowed = 405, {"Allow": "GET, HEAD", **allowed}
            self.close_connection = True
            said = f"{HTTPStatus(status).phrase.lower()}\n".encode()
            self._send(status, _PLAIN, said, allowed, with_body=self.command != "HEAD")

        def _send(
            self,
            status: int,
            kind: str,
            content: bytes,
            own_headers: Mapping[str, str],
            *,
            with_body: bool,
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, **own_headers}.items():
                self.send_header(name, value)
            if status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Say nothing of each request."""

    try:
        return _Server((HOST, port), Handler)
    except OSError as error:
        expected, fix = "a port of 127.0.0.1 that is free", "give another --port, 0 for any"
        raise ConfigError(f"--port {port}", expected, system_words(error), fix) from None


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that leaves before it has a file, as at a reload."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _host_of(address: str) -> str | None:
    """The name of ``HOST:PORT``; None where that is none."""
    try:
        return urlsplit(f"//{address}").hostname
    except ValueError:
        return None


def _path_of(target: str) -> str:
    """The path that a request is for; empty where that is no URL."""
    try:
        return urlsplit(target).path
    except ValueError:
        return ""


def _type(name: str) -> str:
    return _TYPES.get(Path(name).suffix, _ANY_TYPE)


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'
