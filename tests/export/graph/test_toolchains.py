"""Other people's toolchains read the deploy graph and compute the same."""

from __future__ import annotations

import subprocess

import numpy as np
import onnx
import pytest
import torch

from efficientface_deploy.vision.preprocess import normalise
from efficientface_export.graph.channel_layout import PROFILES
from efficientface_export.graph.efficientface import deploy_graph


@pytest.fixture(scope="module")
def pixels(small_spec):
    side = small_spec.input_size
    return np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(network, small_spec, pixels):
    with torch.no_grad():
        return network(torch.from_numpy(normalise(pixels, small_spec))).numpy()


@pytest.fixture
def write(network, small_spec, tmp_path):
    """Writes the deploy graph for a target."""

    def write(target, *, float_input):
        weights = {name: value.numpy() for name, value in network.state_dict().items()}
        path = tmp_path / "model.onnx"
        graph = deploy_graph(weights, small_spec, PROFILES[target], float_input=float_input)
        onnx.save(graph, path)
        return path

    return write


@pytest.mark.parametrize("float_input", [False, True])
@pytest.mark.parametrize("target", PROFILES)
def test_openvino(target, float_input, write, small_spec, pixels, expected):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    path = write(target, float_input=float_input)
    # By default OpenVINO rounds to BF16 on CPUs that have it.
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", config)
    found = model([normalise(pixels, small_spec) if float_input else pixels])[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_ncnn(write, small_spec, pixels, expected, tmp_path):
    """The CPU's graph; pnnx misreads the Gather that aligns channels in the GPU's."""
    ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed")
    pnnx = pytest.importorskip("pnnx", reason="pnnx is not installed")
    path = write("cpu", float_input=True)
    side = small_spec.input_size
    command = [pnnx.EXEC_PATH, path.name, f"inputshape=[1,3,{side},{side}]f32", "fp16=0"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    net = ncnn.Net()
    net.opt.num_threads = 1
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    assert net.load_param(str(tmp_path / "model.ncnn.param")) == 0
    assert net.load_model(str(tmp_path / "model.ncnn.bin")) == 0
    for image, logits in zip(normalise(pixels, small_spec), expected, strict=True):
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image).clone())  # a Mat of an array does not keep it alive
        status, found = extractor.extract("out0")
        assert status == 0
        assert np.abs(np.array(found) - logits).max() <= 1e-4 * np.abs(logits).max()
