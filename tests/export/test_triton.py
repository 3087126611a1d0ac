"""Model repositories for Triton: their text, what is refused, and a real tritonserver."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import Predictor, load
from efficientface_deploy.artifact import PROBE_KEY, SPEC_KEY, write_sidecar
from efficientface_deploy.errors import BackendError, ConfigError, EfficientFaceError
from efficientface_deploy.files import file_hash
from efficientface_deploy.predictor import BUNDLED_ONNX, BUNDLED_WEIGHTS
from efficientface_deploy.spec import PRESETS, ModelSpec
from efficientface_export.cli import main
from efficientface_export.triton import (
    ENSEMBLE,
    MODELS,
    NETWORK,
    PREPROCESS,
    read_artifact,
    text_format,
    write_repository,
)
from tests.tritonserver import Server, processes_of, serve


def parse(folder: Path) -> Any:
    """A configuration by Triton's own schema."""
    package = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient and grpcio")
    from google.protobuf import text_format as protobuf

    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return protobuf.Parse(text, package.model_config_pb2.ModelConfig())


def make_engine(folder: Path, name: str = "model.engine", max_batch: int = 16) -> Path:
    """What passes for an engine where none is loaded."""
    path = folder / name
    path.write_bytes(b"engine")
    made = {"sha256": file_hash(path), "version": "10.3.0", "max_batch": max_batch}
    write_sidecar(path, PRESETS["rafdb"], {"target": "gpu", "precision": "fp16", "engine": made})
    return path


def test_the_larger_bundled_model(tmp_path):
    assert main(["--triton", str(tmp_path / "repository"), "--weights", "accurate"]) == 0
    network = parse(tmp_path / "repository" / NETWORK)
    assert [list(tensor.dims) for tensor in network.input] == [[160, 160, 3]]


def test_bundled_model(tmp_path, capsys):
    out = tmp_path / "repository"
    assert main(["--triton", str(out)]) == 0
    assert f"triton://localhost:8000/{NETWORK}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(MODELS)
    network, preprocess, ensemble = (parse(out / name) for name in MODELS)
    assert [config.name for config in (network, preprocess, ensemble)] == list(MODELS)
    assert (network.backend, network.max_batch_size) == ("onnxruntime", 32)
    assert [list(tensor.dims) for tensor in network.input] == [[112, 112, 3]]
    sizes = {tensor.name: list(tensor.dims) for tensor in network.output}
    assert sizes == {"logits": [8], "probabilities": [8], "features": [1024]}
    assert list(network.dynamic_batching.preferred_batch_size) == [4, 8, 16, 32]
    assert network.dynamic_batching.max_queue_delay_microseconds == 1000
    assert [group.kind for group in network.instance_group] == [2]  # KIND_CPU
    assert [sample.batch_size for sample in network.model_warmup] == [1, 32]
    assert network.version_policy.latest.num_versions == 1
    text = network.parameters[SPEC_KEY].string_value
    spec = ModelSpec.from_json(text)
    with load(check=False) as predictor:
        assert spec == predictor.spec
    assert json.loads(network.parameters[PROBE_KEY].string_value)["schema"] == 1
    labels = (out / NETWORK / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert tuple(labels) == spec.labels
    assert (out / NETWORK / "1" / "model.onnx").read_bytes() == BUNDLED_ONNX.read_bytes()
    steps = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in steps] == [PREPROCESS, NETWORK]
    assert dict(steps[1].output_map) == {name: name for name in sizes}


def test_engine_by_tensorrt(tmp_path, capsys):
    path = make_engine(tmp_path)
    assert main(["--triton", str(tmp_path / "out"), "--weights", str(path)]) == 0
    assert "TensorRT 10.3.0" in capsys.readouterr().out
    config = parse(tmp_path / "out" / NETWORK)
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.max_batch_size == 16  # of the profile
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert (tmp_path / "out" / NETWORK / "1" / "model.plan").read_bytes() == b"engine"


def test_rtx_engine_by_our_runtime(tmp_path):
    """Triton has no backend for them."""
    path = make_engine(tmp_path, "model.rtx.engine")
    write_repository(tmp_path / "out", read_artifact(path))
    config = parse(tmp_path / "out" / NETWORK)
    assert config.backend == "python"
    assert config.parameters["efficientface.file"].string_value == "model.rtx.engine"
    folder = tmp_path / "out" / NETWORK / "1"
    assert sorted(file.name for file in folder.iterdir()) == [
        "model.py",
        "model.rtx.engine",
        "model.rtx.engine.json",
    ]


def test_target_and_batch(tmp_path):
    arguments = ["--target", "gpu", "--max-batch", "6"]
    assert main(["--triton", str(tmp_path / "out"), *arguments]) == 0
    config = parse(tmp_path / "out" / NETWORK)
    assert (config.instance_group[0].kind, config.max_batch_size) == (1, 6)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 6]
    assert config.parameters["cudnn_conv_algo_search"].string_value == "1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "ENGINE", "--max-batch", "32"], "--max-batch: expected 16, which is"),
        (["--weights", "ENGINE", "--target", "cpu"], "--target cpu: expected gpu with an engine"),
        (["--weights", str(BUNDLED_WEIGHTS)], "expected an exported file, found a checkpoint"),
        (["--weights", "FLOAT"], "found one that takes floats; export it again without"),
        (["--weights", "no.onnx"], "no.onnx: expected an exported file, found no such file"),
        (["--precision", "int8"], "--precision: expected none with --triton"),
        (["--engine", "onnx"], "--engine: expected none with --triton"),
    ],
)
def test_refused(tmp_path, model_files, arguments, words):
    names = {"ENGINE": str(make_engine(tmp_path)), "FLOAT": str(model_files["onnx-float"])}
    out = tmp_path / "out"
    with pytest.raises(EfficientFaceError) as caught:
        main(["--triton", str(out), *(names.get(word, word) for word in arguments)])
    assert words in str(caught.value) and str(caught.value).isprintable()
    assert not out.exists()


def test_a_repository_that_exists(tmp_path):
    others = tmp_path / "other" / "config.pbtxt"
    others.parent.mkdir()
    others.write_text("theirs")
    write_repository(tmp_path, read_artifact(BUNDLED_ONNX))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="no model of these names yet, found efficientface, "):
        write_repository(tmp_path, read_artifact(BUNDLED_ONNX))
    engine = make_engine(tmp_path.parent)
    write_repository(tmp_path, read_artifact(engine), overwrite=True)
    assert parse(tmp_path / NETWORK).backend == "tensorrt"
    assert not (tmp_path / NETWORK / "1" / "model.onnx").exists()
    write_repository(tmp_path, read_artifact(BUNDLED_ONNX), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before and others.read_text() == "theirs"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(ConfigError, match=r"expected space .* choose another --triton"):
        write_repository(tmp_path / "out", read_artifact(BUNDLED_ONNX))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="found a file; choose another --triton"):
        write_repository(tmp_path / "out", read_artifact(BUNDLED_ONNX))


def test_text_format_escapes():
    package = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient and grpcio")
    from google.protobuf import text_format as protobuf

    name = 'a "quoted" \\ name\n, Glück, 幸福, \x01'
    text = text_format({"name": name, "max_batch_size": 3})
    assert text.isascii()
    assert protobuf.Parse(text, package.model_config_pb2.ModelConfig()).name == name


# ---- a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """With the repository of the bundled model, which our runtime runs in the Python backend."""
    folder = tmp_path_factory.mktemp("tritonserver")
    artifact = dataclasses.replace(read_artifact(BUNDLED_ONNX), backend="python")
    write_repository(folder / "repository", artifact, max_batch=16)
    with serve(folder / "repository", folder) as started:
        yield started
        assert len(processes_of(started.process)) >= 4  # it and three stubs
    assert processes_of(started.process) == []


@pytest.fixture(scope="module")
def local() -> Iterator[Predictor]:
    with load() as predictor:
        yield predictor


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request, server) -> Iterator[tuple[Any, Any]]:
    """Triton's official client, and its module."""
    module = pytest.importorskip(f"tritonclient.{request.param}")
    opened = module.InferenceServerClient(f"127.0.0.1:{getattr(server, request.param)}")
    yield opened, module
    opened.close()


@pytest.fixture(scope="module")
def pictures(astronaut) -> list[bytes]:
    """JPEG files of several sizes."""
    files = []
    for side in (120, 200, 350):
        buffer = io.BytesIO()
        face = Image.fromarray(astronaut[:220, 130:330]).resize((side, side + 20))
        face.save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def ask(client: tuple[Any, Any], model: str, name: str, values: np.ndarray, **options: Any) -> Any:
    opened, module = client
    kind = "UINT8" if values.dtype == np.uint8 else "BYTES"
    tensor = module.InferInput(name, values.shape, kind)
    tensor.set_data_from_numpy(values)
    wanted = [module.InferRequestedOutput("probabilities", **options)]
    return opened.infer(model, [tensor], outputs=wanted).as_numpy("probabilities")


@pytest.mark.slow
def test_server_and_official_client(client, local, pictures):
    opened, _ = client
    assert opened.is_server_live() and opened.is_server_ready()
    assert all(opened.is_model_ready(name) for name in MODELS)
    images = np.stack([local.preprocess(picture) for picture in pictures])
    expected = local.infer(images)[1]
    for batch in (images[:1], images, np.concatenate([images] * 5)):
        found = ask(client, NETWORK, "image", batch)
        np.testing.assert_allclose(found[: len(expected)], expected[: len(found)], atol=1e-5)
        assert found.shape == (len(batch), 8)
    files = np.array(pictures, dtype=object)[:, None]
    np.testing.assert_allclose(ask(client, ENSEMBLE, "picture", files), expected, atol=1e-5)
    named = ask(client, ENSEMBLE, "picture", files, class_count=1)
    for (text,), prediction in zip(named, local.predict_batch(pictures), strict=True):
        confidence, index, label = text.decode().split(":")
        assert label == prediction.label == local.spec.labels[int(index)]
        assert float(confidence) == pytest.approx(prediction.confidence, abs=1e-5)


@pytest.mark.slow
def test_bad_requests_and_the_server_lives_on(client, local, pictures):
    from tritonclient.utils import InferenceServerException

    side = local.spec.input_size
    good = np.array([[pictures[0]]], dtype=object)
    bad = [
        (NETWORK, "image", np.zeros((1, 64, 64, 3), np.uint8), "unexpected shape"),
        (NETWORK, "image", np.zeros((17, side, side, 3), np.uint8), "batch-size must be <= 16"),
        (NETWORK, "nothing", np.zeros((1, side, side, 3), np.uint8), "nothing"),
        (ENSEMBLE, "picture", np.array([[b"junk"]], object), "another kind of file"),
        (ENSEMBLE, "picture", np.array([[b""]], object), "expected an image"),
        (ENSEMBLE, "picture", np.array([[b"/etc/passwd"]], object), "another kind of file"),
        (ENSEMBLE, "picture", np.array([[pictures[0]], [pictures[1][:300]]], object), "image"),
        ("nobody", "image", np.zeros((1, side, side, 3), np.uint8), "unknown model"),
    ]
    expected = local(pictures[0]).confidence
    for model, name, values, words in bad:
        with pytest.raises(InferenceServerException) as caught:
            ask(client, model, name, values)
        assert words in str(caught.value)
        assert ask(client, ENSEMBLE, "picture", good).max() == pytest.approx(expected, abs=1e-5)


def settled_statistics(server: Server) -> dict[str, Any]:
    """Triton counts a request after its answer has left: wait until nothing changes any more."""
    found = statistics(server)
    while True:
        time.sleep(0.5)
        if (newer := statistics(server)) == found:
            return found
        found = newer


def statistics(server: Server) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.http}/v2/models/{NETWORK}/stats"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)["model_stats"][0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_load(server, local, protocol, capsys):
    """Sixteen threads of one predictor: no answer is lost or wrong, and batches are formed."""
    scheme = "triton" if protocol == "http" else "triton+grpc"
    images = np.random.default_rng(0).integers(0, 256, (64, 112, 112, 3), np.uint8)
    expected = local.infer(images)[1]
    before, taken, lock = settled_statistics(server), [], threading.Lock()
    with load(f"{scheme}://127.0.0.1:{getattr(server, protocol)}/{NETWORK}") as remote:

        def one(index: int) -> float:
            start = time.perf_counter()
            probabilities = remote.infer(images[index % 64 : index % 64 + 1])[1]
            with lock:
                taken.append(time.perf_counter() - start)
            return float(np.abs(probabilities[0] - expected[index % 64]).max())

        start = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            differences = list(pool.map(one, range(400), timeout=120))
        seconds = time.perf_counter() - start
    after = settled_statistics(server)
    images_run = after["inference_count"] - before["inference_count"]
    executions = after["execution_count"] - before["execution_count"]
    assert len(differences) == 400 and max(differences) < 1e-4
    assert images_run == 402  # the probe's two pictures, too
    assert executions < 0.6 * images_run  # batches, by Triton's own count
    middle, late = np.percentile(taken, [50, 99]) * 1000
    with capsys.disabled():
        print(
            f"\n{protocol}: 400 of 400 answers, {400 / seconds:.0f}/s, p50 {middle:.0f} ms, p99 "
            f"{late:.0f} ms, {images_run / executions:.1f} images an execution"
        )


@pytest.mark.slow
def test_metrics(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for name in ("nv_inference_request_success", "nv_inference_queue_duration_us"):
        assert f'{name}{{model="{NETWORK}"' in text


@pytest.mark.slow
def test_a_server_that_dies_in_mid_request(tmp_path):
    """One line for the client; and no stub outlives the test, though it outlives the server."""
    artifact = dataclasses.replace(read_artifact(BUNDLED_ONNX), backend="python")
    write_repository(tmp_path / "repository", artifact)
    with serve(tmp_path / "repository", tmp_path) as other:
        remote = load(f"triton://127.0.0.1:{other.http}/{NETWORK}")
        images = np.zeros((1, 112, 112, 3), np.uint8)
        remote.infer(images)
        threading.Timer(0.3, other.process.kill).start()
        with pytest.raises(BackendError, match=r"no server that answers .*; 4 tries"):
            while True:
                remote.infer(images)
        remote.close()
    assert processes_of(other.process) == []


def test_the_command_without_torch_or_onnx(tmp_path):
    """On the machine that serves."""
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None)\n"
        "from efficientface_export.cli import main; main(['--triton', sys.argv[1]])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, timeout=60)
    assert (tmp_path / "out" / NETWORK / "config.pbtxt").is_file()
