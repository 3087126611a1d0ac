"""A labelling service: one model, a few threads. POST a picture, get JSON.

python examples/service.py, then: curl --data-binary @face.jpg localhost:8000
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import efficientface_deploy as ef
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError, system_words

LARGEST = 20_000_000  # bytes of a picture


class Service(ThreadingHTTPServer):
    """Serves each connection in one of four threads, which share a predictor."""

    def __init__(self, port: int, predictor: ef.Predictor) -> None:
        try:
            super().__init__(("127.0.0.1", port), Labels)
        except OSError as error:
            found = f"{port}: {system_words(error)}"
            raise ConfigError("PORT", "one that is free", found, "give another") from None
        self.predictor = predictor
        self.pool = ThreadPoolExecutor(max_workers=4)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Leave a connection to the next thread that is free."""
        self.pool.submit(self.process_request_thread, request, client_address)


class Labels(BaseHTTPRequestHandler):
    """Answers a picture with its label."""

    server: Service
    timeout = 10  # seconds that a slow client may keep a thread

    def do_POST(self) -> None:
        """200 with the prediction, or 400 with what is wrong with the picture."""
        try:
            length = max(0, min(int(self.headers.get("Content-Length", 0)), LARGEST))
            prediction = self.server.predictor(self.rfile.read(length))
            status, answer = 200, dataclasses.asdict(prediction)
        except (ef.EfficientFaceError, ValueError) as error:
            status, answer = 400, {"error": str(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be typed."""

    port: int = option(8000, positional=True, minimum=0, maximum=65535, help="0 for any free one")


def main() -> None:
    """Serve until Ctrl-C."""
    options = parse_config(
        Options, None, prog="python examples/service.py", description=__doc__ or "", example="8000"
    )
    with ef.load() as predictor, Service(options.port, predictor) as service:
        print(f"http://127.0.0.1:{service.server_port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            service.serve_forever()


if __name__ == "__main__":
    run_command(main)  # an error is one line, and exit code 2
