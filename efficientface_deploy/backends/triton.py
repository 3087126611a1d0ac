"""A model on an NVIDIA Triton server: the same predictor over the network.

``triton://host:8000/model`` speaks HTTP, with the standard library alone: Triton's own HTTP client
may not be shared between threads, and a predictor may. ``triton+grpc://host:8001/model`` speaks
gRPC by Triton's client. ``triton+https`` and ``triton+grpcs`` are the same under TLS; whom they
trust is the system's choice, or that of ``SSL_CERT_FILE``.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import math
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np

from efficientface_deploy.artifact import (
    FEATURES,
    OUTPUTS,
    PROBE_KEY,
    UINT8_INPUT,
    check_preset,
    provenance_from_metadata,
    spec_from_metadata,
)
from efficientface_deploy.backends.base import Backend, Output, import_package
from efficientface_deploy.errors import BackendError, ConfigError, words_of
from efficientface_deploy.probe import Probe
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array

T = TypeVar("T")

TIMEOUT_VARIABLE = "EFFICIENTFACE_TRITON_TIMEOUT"
"""Environment variable: seconds that an answer may take, tries together; 30 by itself."""

_PAUSES = (0.1, 0.4, 1.0)  # seconds before each further try, of a server that cannot be reached
_PORTS = {"": 8000, "https": 8000, "grpc": 8001, "grpcs": 8001}


class Address(NamedTuple):
    """Where a model is served.

    Attributes:
        protocol: Empty for HTTP, ``https``, ``grpc`` or ``grpcs``.
        host: Name or address.
        port: Of the server.
        model: The model's name there.
    """

    protocol: str
    host: str
    port: int
    model: str

    def __str__(self) -> str:
        """The URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "+".join(filter(None, ("triton", self.protocol)))
        return f"{scheme}://{host}:{self.port}/{self.model}"

    @classmethod
    def of(cls, path: Path) -> Address:
        """Read a URL, of which a path has dropped a slash.

        Raises:
            ConfigError: It is none.
        """
        text = re.sub(":/*", "://", path.as_posix(), count=1)
        try:
            parts = urlsplit(text)
            protocol = parts.scheme.partition("+")[2]
            port = _PORTS[protocol] if parts.port is None else parts.port
            model = parts.path.strip("/")
            valid = bool(parts.hostname and model and protocol in _PORTS) and "/" not in model
            valid = valid and not (parts.query or parts.fragment or parts.username)
            if valid:
                return cls(protocol, str(parts.hostname), port, model)
        except (ValueError, KeyError):
            pass
        schemes = ", ".join("triton+" + name for name in _PORTS if name)
        raise ConfigError(
            text, "triton://host:port/model", "another URL", f"write it so, or with {schemes}"
        )


class Description(NamedTuple):
    """Metadata and configuration, as Triton's JSON.

    Attributes:
        server: Metadata of the server.
        model: Metadata of the model.
        config: Its configuration.
    """

    server: dict[str, Any]
    model: dict[str, Any]
    config: dict[str, Any]


class RefusedError(Exception):
    """The server's answer is an error, in its words, or none of Triton's."""


class Client(Protocol):
    """One protocol.

    Its calls raise RefusedError, TimeoutError, or, where another try may help, another OSError or
    an HTTPException.
    """

    def describe(self, model: str, timeout: float) -> Description:
        """What the server says of itself and of a model."""

    def infer(
        self, model: str, version: str, images: UInt8Array, outputs: Sequence[str], timeout: float
    ) -> list[Float32Array]:
        """Run images; the outputs as they came."""

    def close(self) -> None:
        """Close the connections."""


class TritonBackend(Backend):
    """Runs a model that a Triton server has of us, see ``efficientface-export --triton``.

    What the model must be given, and its labels, come with its configuration. The version is the
    one that was the newest at load: one that replaces it may have other labels. Inference may be
    repeated without harm, so what fails for want of a connection is tried again, up to three
    times; what the server refuses, or does not answer in time, is not. ``device``, ``threads`` and
    ``cuda_graphs`` are the server's own business.
    """

    remote = True
    instead = (
        "on a GPU start the server with NVIDIA_TF32_OVERRIDE=0, or serve it in another precision"
    )

    def _open(self) -> None:
        self._address = Address.of(self.path)
        self._timeout = _timeout()
        client_class = _GrpcClient if self._address.protocol.startswith("grpc") else _HttpClient
        self._client: Client = client_class(self._address)
        try:
            expected = "a Triton server that has this model ready"
            fix = "check the model's name, and see the server's log"
            model = self._address.model
            ask = functools.partial(self._client.describe, model)
            self._read(self._ask(ask, expected, fix))
        except BaseException:
            self._client.close()
            raise

    def _read(self, described: Description) -> None:
        url = str(self._address)
        self._parameters = _parameters(described)
        self.spec = spec_from_metadata(self._parameters, url)
        self.provenance = provenance_from_metadata(self._parameters, url)
        check_preset(url, self.spec, self.options.preset)
        text = self._parameters.get(PROBE_KEY)
        self.probe = Probe.from_text(text, url, self.spec.num_classes)
        side, classes = self.spec.input_size, self.spec.num_classes
        try:
            inputs, outputs = (_tensors(described.config[name]) for name in ("input", "output"))
            self._version = max(described.model["versions"], key=int)
            self.max_batch = int(described.config["max_batch_size"])
            self.feature_size = outputs.pop(FEATURES)[1][0] if FEATURES in outputs else None
            valid = self.max_batch > 0
            valid &= inputs == {UINT8_INPUT: ("TYPE_UINT8", [side, side, 3])}
            valid &= outputs == {name: ("TYPE_FP32", [classes]) for name in OUTPUTS}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            valid = False
        if not valid:
            expected = f"uint8 images of {side} pixels to {classes} logits and probabilities"
            fix = "write the repository again by efficientface-export --triton"
            raise BackendError(url, f"{expected}, as its spec says", "another signature", fix)
        self.name = "triton"
        self.library = f"tritonserver {described.server.get('version')} at {url}"

    def _infer(self, images: UInt8Array) -> Output:
        return Output(*self._run(OUTPUTS, images))

    def _features(self, images: UInt8Array) -> Float32Array:
        (features,) = self._run((FEATURES,), images)
        return features

    def _run(self, outputs: tuple[str, ...], images: UInt8Array) -> list[Float32Array]:
        model, version = self._address.model, self._version
        return self._ask(
            lambda timeout: self._client.infer(model, version, images, outputs, timeout),
            f"an answer for {len(images)} images by version {version}",
            "load the model again if another has taken its place; see the server's log",
            again=self._check_same,
        )

    def _check_same(self, timeout: float) -> None:
        """Refuse a server that came back with another model under the name."""
        if _parameters(self._client.describe(self._address.model, timeout)) != self._parameters:
            expected, fix = "the model that was loaded", "load it again"
            raise BackendError(str(self._address), expected, "another one of this name", fix)

    def _ask(
        self,
        ask: Callable[[float], T],
        expected: str,
        fix: str,
        again: Callable[[float], None] = lambda timeout: None,
    ) -> T:
        """Ask the server within the time-out, and again while it cannot be reached.

        Args:
            ask: Given the seconds that are left.
            expected: For the error.
            fix: For the error, where the server refuses.
            again: What to do first at each further try.

        Raises:
            BackendError: It did not work.
        """
        end = time.monotonic() + self._timeout
        for tried, pause in enumerate((*_PAUSES, math.inf), start=1):
            try:
                if tried > 1:
                    again(end - time.monotonic())
                return ask(end - time.monotonic())
            except RefusedError as error:
                raise self._failed(expected, words_of(error, 300), fix) from None
            except ssl.SSLError as error:
                trust = "check the protocol, or name the server's authority by SSL_CERT_FILE"
                raise self._failed(expected, f"a TLS error ({words_of(error)})", trust) from None
            except TimeoutError:
                longer = f"give it longer by {TIMEOUT_VARIABLE}, or see what the server does"
                raise self._failed(
                    expected, f"none within {self._timeout:g} seconds", longer
                ) from None
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() + pause >= end:
                    found = f"no server that answers ({words_of(error)}; {tried} tries)"
                    start = "start it, or check host, port and protocol"
                    raise self._failed(expected, found, start) from None
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _failed(self, expected: str, found: str, fix: str) -> BackendError:
        return BackendError(str(self._address), expected, found, fix)

    def _close(self) -> None:
        self._client.close()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "30")
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 3600:
            return seconds
    raise ConfigError(
        TIMEOUT_VARIABLE, "seconds, up to 3600", repr(text), "set it, or leave it out"
    )


def _parameters(described: Description) -> dict[str, str]:
    values = described.config.get("parameters")
    entries = values.items() if isinstance(values, dict) else ()
    return {key: str(x.get("string_value", "")) for key, x in entries if isinstance(x, dict)}


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, list[int]]]:
    return {x["name"]: (x["data_type"], [int(size) for size in x["dims"]]) for x in tensors}


class _HttpClient:
    """KServe's protocol, version 2, with Triton's binary tensors; connections are kept."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[http.client.HTTPConnection] = []
        self._tls = ssl.create_default_context() if address.protocol == "https" else None

    def describe(self, model: str, timeout: float) -> Description:
        path = _model_path(model)
        return Description(*(self._get(x, timeout) for x in ("/v2", path, f"{path}/config")))

    def _get(self, path: str, timeout: float) -> dict[str, Any]:
        return _json(self._request("GET", path, b"", {}, timeout)[0])

    def infer(
        self, model: str, version: str, images: UInt8Array, outputs: Sequence[str], timeout: float
    ) -> list[Float32Array]:
        pixels = images.tobytes()
        tensor = {
            "name": UINT8_INPUT,
            "shape": images.shape,
            "datatype": "UINT8",
            "parameters": {"binary_data_size": len(pixels)},
        }
        wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        head = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
        headers = {"Content-Type": "application/octet-stream", _HEAD_LENGTH: str(len(head))}
        path = f"{_model_path(model)}/versions/{version}/infer"
        body, answer = self._request("POST", path, head + pixels, headers, timeout)
        try:
            end = int(answer.get(_HEAD_LENGTH) or len(body))
            found = {}
            for output in _json(body[:end])["outputs"]:
                size = int(output["parameters"]["binary_data_size"])
                values = np.frombuffer(body[end : end + size], "<f4")
                found[output["name"]] = values.reshape(output["shape"]).astype(np.float32)
                end += size
            return [found[name] for name in outputs]
        except (ValueError, KeyError, TypeError):
            raise RefusedError("an answer that is not Triton's") from None

    def _request(
        self, method: str, path: str, body: bytes, headers: dict[str, str], timeout: float
    ) -> tuple[bytes, http.client.HTTPMessage]:
        connection = self._connect(max(timeout, 0.001))
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except BaseException as error:
            connection.close()
            self.close()  # the idle ones are of the same server
            if type(error) is http.client.BadStatusLine:
                raise RefusedError("an answer that is not HTTP") from None
            raise
        self._idle.append(connection)
        if response.status in (502, 503, 504):
            raise ConnectionError(f"HTTP {response.status}")
        if response.status != 200:
            raise RefusedError(_error_words(content) or f"HTTP {response.status}")
        return content, response.headers

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        """A connection of its own for each request under way, kept from an earlier one."""
        try:
            connection = self._idle.pop()
        except IndexError:
            where = self._address.host, self._address.port
            if self._tls is None:
                return http.client.HTTPConnection(*where, timeout=timeout)
            return http.client.HTTPSConnection(*where, timeout=timeout, context=self._tls)
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        return connection

    def close(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


_HEAD_LENGTH = "Inference-Header-Content-Length"


def _model_path(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


def _json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
        if isinstance(content, dict):
            return content
    except (ValueError, RecursionError):
        pass
    raise RefusedError("an answer that is not Triton's") from None


def _error_words(body: bytes) -> str:
    with contextlib.suppress(RefusedError):
        return str(_json(body).get("error", ""))
    return ""


class _GrpcClient:
    """gRPC by Triton's own client, which threads may share."""

    def __init__(self, address: Address) -> None:
        package = import_package(
            "tritonclient.grpc", "triton+grpc", "the package tritonclient[grpc]", "triton"
        )
        self._package = package
        tls = address.protocol == "grpcs"
        trusted = os.environ.get("SSL_CERT_FILE") if tls else None
        host = f"[{address.host}]" if ":" in address.host else address.host
        url = f"{host}:{address.port}"
        self._client = package.InferenceServerClient(url, ssl=tls, root_certificates=trusted)

    def describe(self, model: str, timeout: float) -> Description:
        options = {"as_json": True, "client_timeout": max(timeout, 0.001)}
        with self._errors():
            server = self._client.get_server_metadata(**options)
            about = self._client.get_model_metadata(model, **options)
            config = self._client.get_model_config(model, **options)
        return Description(server, about, config["config"])

    def infer(
        self, model: str, version: str, images: UInt8Array, outputs: Sequence[str], timeout: float
    ) -> list[Float32Array]:
        tensor = self._package.InferInput(UINT8_INPUT, images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        wanted = [self._package.InferRequestedOutput(name) for name in outputs]
        with self._errors():
            result = self._client.infer(
                model, [tensor], version, outputs=wanted, client_timeout=max(timeout, 0.001)
            )
        try:
            return [np.array(result.as_numpy(name), np.float32) for name in outputs]
        except (ValueError, TypeError):
            raise RefusedError("an answer that is not Triton's") from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors as :class:`Client` has them."""
        try:
            yield
        except self._package.InferenceServerException as error:
            status, words = str(error.status()), words_of(error.message(), 300)
            if status.endswith("DEADLINE_EXCEEDED"):
                raise TimeoutError from None
            if status.endswith("UNAVAILABLE"):
                raise ConnectionError(words) from None
            raise RefusedError(words) from None

    def close(self) -> None:
        self._client.close()
