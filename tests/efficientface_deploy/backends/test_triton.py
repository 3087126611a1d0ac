"""The client of a Triton server: what it says of all that can go wrong between two machines."""

from __future__ import annotations

import pickle
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from efficientface_deploy import load
from efficientface_deploy.artifact import SPEC_KEY
from efficientface_deploy.backends import resolve_backend
from efficientface_deploy.backends import triton as module
from efficientface_deploy.backends.triton import (
    TIMEOUT_VARIABLE,
    Address,
    RefusedError,
)
from efficientface_deploy.cli import main as predict
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    EfficientFaceError,
    ProbeError,
)
from efficientface_deploy.predictor import BUNDLED_ONNX
from tests.triton_stand_in import StandIn, stand_in
from tests.tritonserver import free_ports

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in(BUNDLED_ONNX) as started:
        yield started


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.01, 0.01, 0.01))


def url_of(server: StandIn) -> str:
    return f"triton://127.0.0.1:{server.port}/test"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("triton://host:9000/model", ("", "host", 9000, "model")),
        ("triton://host/model", ("", "host", 8000, "model")),
        ("triton+https://host/model", ("https", "host", 8000, "model")),
        ("triton+grpc://host/a-b_c.d", ("grpc", "host", 8001, "a-b_c.d")),
        ("triton+grpcs://[::1]:7/model", ("grpcs", "::1", 7, "model")),
    ],
)
def test_address(text, expected):
    assert resolve_backend(Path(text)) == resolve_backend(Path(text), "triton") == ("triton", "")
    address = Address.of(Path(text))
    assert tuple(address) == expected
    assert Address.of(Path(str(address))) == address


@pytest.mark.parametrize(
    "text",
    [
        *("triton://host", "triton://host:8000/", "triton://host:x/model", "triton:///model"),
        *("triton://host:99999/model", "triton+tcp://host:1/model", "triton://host/a/b"),
        *("triton://me@host/model", "triton://host/model?version=3"),
        *("triton://", "triton:", "triton+grpc://"),
    ],
)
def test_a_bad_url_is_one_line(text):
    said = r"^triton(\+\w+)?://.*: expected triton://host:port/model, found another URL"
    with pytest.raises(ConfigError, match=said):
        load(text)


def test_backend_and_url_must_agree():
    with pytest.raises(BackendError, match=r"backend onnx: expected a file that it runs"):
        load("triton://host/model", backend="onnx")
    with pytest.raises(BackendError, match="triton://host:port/model"):
        load(BUNDLED_ONNX, backend="triton")


def test_probe_runs_over_the_network(server):
    with load(url_of(server)) as predictor, load() as local:
        assert predictor.checked.passed and "tritonserver 2.51.0" in predictor.checked.engine
        np.testing.assert_allclose(predictor.infer(IMAGES)[1], local.infer(IMAGES)[1], atol=1e-6)
    server.predictor = load(prior="uniform")  # other logits
    with pytest.raises(ProbeError, match="NVIDIA_TF32_OVERRIDE=0"):
        load(url_of(server))


def test_a_copy_connects_again(server):
    with load(url_of(server)) as predictor:
        copy = pickle.loads(pickle.dumps(predictor))
        np.testing.assert_array_equal(copy.infer(IMAGES)[1], predictor.infer(IMAGES)[1])
        copy.close()


def test_command(server, astronaut, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(astronaut[:220, 130:330]).save(tmp_path / "face.png")
    assert predict([str(tmp_path / "face.png"), "--model", url_of(server)]) == 0
    assert "Happiness" in capsys.readouterr().out


def test_connections_are_kept(server):
    """One for each request under way; the first serves all that come after one another."""
    with load(url_of(server)) as predictor:
        for _ in range(5):
            predictor.infer(IMAGES)
        assert server.connections == 1
        barrier = threading.Barrier(3)
        server.before = lambda path: barrier.wait(5)
        with ThreadPoolExecutor(3) as pool:
            for _ in range(4):
                list(pool.map(lambda _: predictor.infer(IMAGES), range(3)))
        assert server.connections == 3


@pytest.mark.parametrize("scheme", ["triton", "triton+https", "triton+grpc", "triton+grpcs"])
def test_no_server(scheme):
    if "grpc" in scheme:
        pytest.importorskip("tritonclient.grpc")
    url = f"{scheme}://127.0.0.1:{free_ports(1)[0]}/test"
    with pytest.raises(BackendError, match=r"no server that answers \(.*; 4 tries\); start it"):
        load(url)


def test_unknown_model(server):
    with pytest.raises(BackendError, match="found Request for unknown model: 'other' is not found"):
        load(url_of(server).replace("test", "other"))
    assert server.paths == ["/v2", "/v2/models/other"]  # once: it would not help


def test_model_of_others(server):
    del server.config["parameters"]
    with pytest.raises(ArtifactError, match=r"expected a model with a ModelSpec .*, found none"):
        load(url_of(server))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["output"].pop(),
        lambda config: config["output"][0].update(dims=["7"]),
        lambda config: config["input"][0].update(data_type="TYPE_FP32"),
        lambda config: config["input"][0].update(dims=None),
        lambda config: config.update(max_batch_size=0),
        lambda config: config.pop("max_batch_size"),
    ],
)
def test_another_signature_than_its_spec(server, change):
    server.config["output"].pop()  # the features
    change(server.config)
    with pytest.raises(BackendError, match="as its spec says, found another signature"):
        load(url_of(server))


def test_another_models_labels(server):
    with pytest.raises(ArtifactError, match=r"triton://.*: expected labels Neutral, .*rafdb"):
        load(url_of(server), preset="rafdb")


@pytest.mark.parametrize("count", [1, 3])
def test_a_lost_connection_is_tried_again(server, count):
    left = []

    def before(path: str) -> None:
        if left:
            raise ConnectionResetError(left.pop())

    server.before = before
    with load(url_of(server)) as predictor, load() as local:
        left.extend(["gone"] * count)
        np.testing.assert_allclose(predictor.infer(IMAGES)[1], local.infer(IMAGES)[1], atol=1e-6)
        assert not left
        left.extend(["gone"] * 9)
        with pytest.raises(BackendError, match=r"3 images by version 1.*no server .*; 4 tries"):
            predictor.infer(IMAGES)
        assert len(left) == 5


def test_another_model_under_the_name_after_a_restart(server):
    with load(url_of(server)) as predictor:
        lost = ["gone"]

        def before(path: str) -> None:
            if lost:
                raise ConnectionResetError(lost.pop())

        server.before = before
        spec = server.predictor.spec.replace(labels=tuple(reversed(server.predictor.spec.labels)))
        server.config["parameters"][SPEC_KEY] = {"string_value": spec.to_json()}
        with pytest.raises(BackendError, match="expected the model that was loaded, found another"):
            predictor.infer(IMAGES)


def test_a_version_that_was_replaced(server):
    server.versions = ["2", "10"]
    with load(url_of(server)) as predictor:
        assert server.paths[-1].endswith("/versions/10/infer")
        server.versions = ["11"]
        with pytest.raises(BackendError, match="version 10 is not found; load the model again"):
            predictor.infer(IMAGES)


def test_no_answer_in_time(server, monkeypatch):
    ended = threading.Event()
    with load(url_of(server)) as predictor:
        predictor._backend._timeout = 0.2
        server.before = lambda path: ended.wait(5)
        with pytest.raises(
            BackendError, match=r"found none within 0\.2 seconds; give it longer by"
        ):
            predictor.infer(IMAGES)
        ended.set()
    for text in ("0", "-1", "soon", "nan", "1e9"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, text)
        with pytest.raises(ConfigError, match=f"{TIMEOUT_VARIABLE}: expected seconds"):
            load(url_of(server))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: b"",
        lambda body: b"<html>",
        lambda body: b"[1]",
        lambda body: body[:-5],
        lambda body: body.replace(b'"outputs"', b'"other"'),
        lambda body: body.replace(b"[3, 8]", b"[4, 8]"),
        lambda body: body.replace(b"[3, 8]", b"[8, 3]"),
        lambda body: body.replace(b"probabilities", b"probabilitie5"),
    ],
)
def test_an_answer_that_is_not_tritons(server, change):
    with load(url_of(server)) as predictor:
        server.change = change
        with pytest.raises(BackendError) as caught:
            predictor.infer(IMAGES)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>", b"[1]", b'{"versions": 3, "config": []}', b'{"parameters": [1]}'),
        b'{"parameters": {"efficientface.spec": 1}}',
        b'{"parameters": {"efficientface.spec": {"string_value": "{}"}}}',
    ],
)
def test_unwell_answers_at_load_are_one_line(server, body):
    server.change = lambda _: body
    with pytest.raises(EfficientFaceError) as caught:
        load(url_of(server))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("StatusCode.UNAVAILABLE", ConnectionError),
        ("StatusCode.DEADLINE_EXCEEDED", TimeoutError),
        ("StatusCode.NOT_FOUND", RefusedError),
        ("StatusCode.INVALID_ARGUMENT", RefusedError),
        (None, RefusedError),
    ],
)
def test_what_grpc_says(monkeypatch, status, expected):
    package = pytest.importorskip("tritonclient.grpc")
    client = module._GrpcClient(Address("grpc", "127.0.0.1", 1, "test"))

    def fail(*arguments: object, **options: object) -> None:
        raise package.InferenceServerException("words", status)

    monkeypatch.setattr(client._client, "infer", fail)
    with pytest.raises(expected, match="words" if expected is not TimeoutError else None):
        client.infer("test", "1", IMAGES, ("logits",), 1)
    client.close()


def test_an_empty_tensor_by_grpc(monkeypatch):
    """As a Python backend of NumPy 1 gives it beside NumPy 2."""
    pytest.importorskip("tritonclient.grpc")
    client = module._GrpcClient(Address("grpc", "127.0.0.1", 1, "test"))

    class Result:
        def as_numpy(self, name: str) -> np.ndarray:
            return np.empty(0, np.float32).reshape(2, 8)

    monkeypatch.setattr(client._client, "infer", lambda *arguments, **options: Result())
    with pytest.raises(RefusedError, match="not Triton's"):
        client.infer("test", "1", IMAGES, ("logits",), 1)
    client.close()


def test_grpc_needs_its_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tritonclient")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(BackendError, match=r"pip install '.*\[triton\]'"):
        load("triton+grpc://127.0.0.1:1/test")


def test_tls(tmp_path, monkeypatch):
    """By an authority that SSL_CERT_FILE names, and refused without it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    make = ThreadingHTTPServer.server_bind

    def bind(server: ThreadingHTTPServer) -> None:
        make(server)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )

    monkeypatch.setattr(ThreadingHTTPServer, "server_bind", bind)
    with stand_in(BUNDLED_ONNX) as server:
        url = f"triton+https://127.0.0.1:{server.port}/test"
        with pytest.raises(BackendError, match=r"a TLS error .*SSL_CERT_FILE"):
            load(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with load(url) as predictor, load() as local:
            np.testing.assert_allclose(
                predictor.infer(IMAGES)[1], local.infer(IMAGES)[1], atol=1e-6
            )
