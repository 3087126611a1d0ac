"""Weights of dlib's network, as face-api's package has them; here random ones in its format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad, relu

from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.models import build_model, load_backbone
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.dataset import read_dataset
from training import face_weights
from training.face_weights import MANIFEST, WEIGHTS, face_network, read_tensors, take_statistics

SPEC = preset("ferplus")
BLOCKS = {  # channels before and after
    "conv32_1": (32, 32),
    "conv32_2": (32, 32),
    "conv32_3": (32, 32),
    "conv64_down": (32, 64),
    "conv64_1": (64, 64),
    "conv64_2": (64, 64),
    "conv64_3": (64, 64),
    "conv128_down": (64, 128),
    "conv128_1": (128, 128),
    "conv128_2": (128, 128),
    "conv256_down": (128, 256),
    "conv256_1": (256, 256),
    "conv256_2": (256, 256),
    "conv256_down_out": (256, 256),
}


def shapes() -> dict[str, tuple[int, ...]]:
    def layer(name: str, side: int, before: int, after: int) -> dict[str, tuple[int, ...]]:
        filters = {f"{name}/conv/filters": (side, side, before, after)}
        rest = ("conv/bias", "scale/weights", "scale/biases")
        return filters | {f"{name}/{each}": (after,) for each in rest}

    found = layer("conv32_down", 7, 3, 32)
    for name, (before, after) in BLOCKS.items():
        found |= layer(f"{name}/conv1", 3, before, after) | layer(f"{name}/conv2", 3, after, after)
    return found | {"fc": (256, 128)}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as of the package: every second tensor in bytes, the others in float32."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("model")
    entries, raw = [], b""
    for number, (name, shape) in enumerate(shapes().items()):
        values = random.uniform(0, 255, shape)
        around, spread = (1.0, 0.5) if name.endswith("scale/weights") else (0.0, 0.2)
        if name.endswith("filters"):  # so that layers neither explode nor die out
            spread = 2 / np.sqrt(np.prod(shape[:3]))
        scaled = {"dtype": "uint8", "scale": 2 * spread / 255, "min": around - spread}
        entry = {"name": name, "shape": list(shape), "dtype": "float32"}
        if number % 2:
            raw += values.astype(np.uint8).tobytes()
            entry["quantization"] = scaled
        else:
            raw += (values * scaled["scale"] + scaled["min"]).astype("<f4").tobytes()
        entries.append(entry)
    (folder / WEIGHTS).write_bytes(raw)
    (folder / MANIFEST).write_text(json.dumps([{"paths": [WEIGHTS], "weights": entries}]))
    return folder


def embedding_of_dlib(tensors: dict[str, torch.Tensor], rgb: torch.Tensor) -> torch.Tensor:
    """The network as face-api computes it, in float64, of RGB (N, 3, S, S) in 0 to 255."""
    w = {name: value.double() for name, value in tensors.items()}

    def layer(name, x, stride, padding):
        x = conv2d(x, w[f"{name}/conv/filters"].permute(3, 2, 0, 1), None, stride, padding)
        x = x + w[f"{name}/conv/bias"].view(1, -1, 1, 1)
        scale, shift = (
            w[f"{name}/scale/{each}"].view(1, -1, 1, 1) for each in ("weights", "biases")
        )
        return x * scale + shift

    x = (rgb.double() - torch.tensor([122.782, 117.001, 104.298]).double().view(1, 3, 1, 1)) / 255
    x = max_pool2d(relu(layer("conv32_down", x, 2, 0)), 3, 2)
    for name, (before, after) in BLOCKS.items():
        steps = "down" in name
        out = layer(f"{name}/conv2", relu(layer(f"{name}/conv1", x, 1 + steps, 1 - steps)), 1, 1)
        if steps:
            x = avg_pool2d(x, 2)
            x = torch.cat([x, x.new_zeros(len(x), after - before, *x.shape[2:])], 1)
            out = pad(out, (0, x.shape[3] - out.shape[3], 0, x.shape[2] - out.shape[2]))
        x = relu(out + x)
    return x.mean((2, 3)) @ w["fc"]


@pytest.mark.parametrize("size", [112, 150])
def test_computes_what_dlibs_network_does(size, published):
    spec = SPEC.replace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    tensors = read_tensors(published)
    model = face_network(tensors, spec).double()
    rgb = torch.rand(2, 3, size, size, generator=torch.manual_seed(0)).double() * 255
    mean, std = (torch.tensor(x).double().view(1, 3, 1, 1) for x in (spec.mean, spec.std))
    images = (rgb / 255 - mean) / std
    expected = embedding_of_dlib(tensors, rgb)
    with torch.inference_mode():
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-6 * expected.abs().max())
    take_statistics(model, images)
    with torch.inference_mode():
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-6 * expected.abs().max())
        # So a first step in training, whose statistics are the batch's, sees the same network.
        trained = model.train()(images)
    assert torch.allclose(trained, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_filters_have_the_size_of_fresh_ones(published):
    model = face_network(read_tensors(published), SPEC)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            wanted = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(wanted, rel=1e-4)


def test_an_ldg_begins_with_them(published, face_set, tmp_path, capsys, caplog):
    out = tmp_path / "new" / "faces.safetensors"
    words = ["--source", published, "--data", face_set, "--out", out]
    assert face_weights.main(list(map(str, words))) == 0
    assert f"--arch resnet29 --init {out}" in capsys.readouterr().out
    spec = read_dataset(face_set).spec.replace(architecture="resnet29")
    model = build_model("resnet29", spec.num_classes)
    head = model.backbone.fc.weight.clone()
    with caplog.at_level("INFO"):
        load_backbone(model, spec, out)
    assert "took the backbone; the head starts anew" in caplog.text
    assert torch.equal(model.backbone.fc.weight, head)
    first = face_network(read_tensors(published), spec).conv1.weight
    assert torch.equal(model.backbone.conv1.weight, first)
    assert model.backbone.layer5[0].bn2.running_var.min() > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m[0]["weights"].pop(), "5,"),
        (lambda m: m[0]["weights"].append(dict(m[0]["weights"][0], name="x")), "another one"),
        (lambda m: m[0]["weights"][0].update(name="y"), "expected a tensor of dlib's network"),
        (lambda m: m[0]["weights"][0].update(shape=[3, 7, 7, 32]), "finite numbers (32, 3, 7, 7)"),
        (lambda m: m[0]["weights"][0].update(shape=[-1]), "another one"),
        (lambda m: m[0]["weights"][0].update(shape="x"), "another one"),
        (lambda m: m[0]["weights"][0].update(shape=[2**99]), "another one"),
        (lambda m: m[0]["weights"].insert(0, "x"), "another one"),
        (lambda m: m[0]["weights"][1].update(quantization={"scale": 1}), "another one"),
        (lambda m: m[0]["weights"][1]["quantization"].update(min=float("nan")), "NaN or infinity"),
        (lambda m: m.clear(), "another one"),
        (lambda m: m.append(1), "another one"),
        (lambda m: m.__setitem__(0, []), "another one"),
    ],
)
def test_other_manifests(change, text, published, tmp_path):
    manifest = json.loads((published / MANIFEST).read_text())
    change(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / WEIGHTS).write_bytes((published / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError) as caught:
        face_network(read_tensors(tmp_path), SPEC)
    assert text in str(caught.value) and "npm pack @vladmandic/face-api" in str(caught.value)


def test_other_files(published, face_set, tmp_path):
    with pytest.raises(CheckpointError, match="dlib's weights, found no such file; take model/ of"):
        read_tensors(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((published / WEIGHTS).read_bytes()[:-1])
    (tmp_path / MANIFEST).write_bytes((published / MANIFEST).read_bytes())
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path)
    words = ["--source", published, "--data", face_set, "--out", tmp_path / "faces.pt"]
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        face_weights.main(list(map(str, words)))
