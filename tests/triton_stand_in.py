"""What tritonserver 2.51 says over HTTP for one model, in a thread: enough for our client.

Its answers, status codes and error texts are those that the real one was seen to give; the same
conformance tests run against the real one, too (marked ``slow``).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from efficientface_deploy import Predictor, load
from efficientface_deploy.artifact import FEATURES, OUTPUTS
from efficientface_export.triton import read_artifact

HEAD_LENGTH = "Inference-Header-Content-Length"


class StandIn:
    """A server's model, and what a test may make it do.

    Attributes:
        predictor: What computes.
        config: The model's configuration.
        versions: Of the model.
        before: Called with each request's path before it is answered; an exception closes the
            connection without an answer.
        change: Called with each answer's body; what it gives is sent.
        paths: Of all requests.
        connections: How many clients have opened.
        port: Where it listens.
    """

    def __init__(self, path: Path, predictor: Predictor, max_batch: int) -> None:
        self.predictor = predictor
        spec, side = predictor.spec, predictor.spec.input_size
        sizes = dict.fromkeys(OUTPUTS, spec.num_classes)
        if predictor.feature_size is not None:
            sizes[FEATURES] = predictor.feature_size
        self.config: dict[str, Any] = {
            "max_batch_size": max_batch,
            "input": [{"name": "image", "data_type": "TYPE_UINT8", "dims": [side, side, 3]}],
            "output": [
                {"name": name, "data_type": "TYPE_FP32", "dims": [size]}
                for name, size in sizes.items()
            ],
            "parameters": {
                key: {"string_value": text} for key, text in read_artifact(path).metadata.items()
            },
        }
        self.versions = ["1"]
        self.before: Callable[[str], object] = lambda path: None
        self.change: Callable[[bytes], bytes] = lambda body: body
        self.paths: list[str] = []
        self.connections = 0
        self.port = 0

    def answer(self, path: str, head_length: str | None, body: bytes) -> tuple[int, dict, bytes]:
        """Status, headers and body."""
        if path == "/v2":
            return self.json(200, {"name": "triton", "version": "2.51.0"})
        model, *rest = path.removeprefix("/v2/models/").split("/")
        if model != "test":
            return self.json(404, {"error": f"Request for unknown model: '{model}' is not found"})
        if rest == ["config"]:
            return self.json(200, self.config)
        if not rest:
            return self.json(200, {"name": model, "versions": self.versions})
        if rest[0] != "versions" or rest[1] not in self.versions or rest[2:] != ["infer"]:
            words = f"Request for unknown model: '{model}' version {rest[1]} is not found"
            return self.json(404, {"error": words})
        return self.infer(body, int(head_length or 0))

    def infer(self, body: bytes, head_length: int) -> tuple[int, dict, bytes]:
        request = json.loads(body[:head_length])
        (tensor,) = request["inputs"]
        assert tensor["parameters"]["binary_data_size"] == len(body) - head_length
        if tensor["shape"][0] > self.config["max_batch_size"]:
            return self.json(400, {"error": "inference request batch-size must be <= 16"})
        images = np.frombuffer(body[head_length:], np.uint8).reshape(tensor["shape"])
        values = dict(zip(OUTPUTS, self.predictor.infer(images), strict=True))
        names = [output["name"] for output in request["outputs"]]
        if FEATURES in names:
            values[FEATURES] = self.predictor.features(images)
        described = [
            {
                "name": name,
                "datatype": "FP32",
                "shape": values[name].shape,
                "parameters": {"binary_data_size": values[name].nbytes},
            }
            for name in names
        ]
        head = json.dumps({"model_name": "test", "outputs": described}).encode()
        content = head + b"".join(values[name].tobytes() for name in names)
        return 200, {HEAD_LENGTH: str(len(head))}, content

    def json(self, status: int, content: object) -> tuple[int, dict, bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


@contextlib.contextmanager
def stand_in(path: Path, max_batch: int = 16) -> Iterator[StandIn]:
    """Serve an ONNX file as ``triton://127.0.0.1:PORT/test``."""
    with load(path, check=False) as predictor:
        model = StandIn(path, predictor, max_batch)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                model.connections += 1
                super().setup()

            def do_GET(self) -> None:
                model.paths.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    model.before(self.path)
                except ConnectionError:
                    self.close_connection = True
                    return
                status, headers, content = model.answer(
                    self.path, self.headers.get(HEAD_LENGTH), body
                )
                content = model.change(content)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815 - its name

            def log_message(self, *arguments: object) -> None:
                """Print nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        model.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield model
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
