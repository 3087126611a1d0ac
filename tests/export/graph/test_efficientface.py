from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch

from efficientface_deploy.models import EfficientFace
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import normalise
from efficientface_export.graph.channel_layout import PROFILES, Profile
from efficientface_export.graph.efficientface import deploy_graph

LAYOUTS = {
    "default": Profile(),
    "one convolution for each source": Profile(slices=True),
    "blocks of one": Profile(align=1),
    "blocks of sixteen": Profile(align=16),
    "depthwise multiplier": Profile(split_multiplier=True),
    "depthwise multiplier, blocks of sixteen": Profile(split_multiplier=True, align=16),
    "depthwise multiplier, merged branches": Profile(split_multiplier=True, merge_branches=True),
    "merged patches": Profile(merge_patches=True),
    "merged branches": Profile(merge_branches=True),
    "all merged": Profile(
        align=4,
        merge_branches=True,
        merge_patches=True,
        first_read_whole=("stage2", "stage3", "stage4"),
        slices=True,
    ),
    "carried": Profile(carry=True),
    "carried, blocks of four": Profile(carry=True, align=4, split_multiplier=True),
    "carried, blocks of sixteen": Profile(carry=True, align=16),
    "quadrants transposed": Profile(merge_patches=True, split_multiplier=True),
    **PROFILES,
}


def lively(classes: int = 7) -> EfficientFace:
    """Random weights whose batch norms all do something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = EfficientFace(classes).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2)
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model


def arrays(model: EfficientFace) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def run(graph, **inputs) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits", "probabilities"], inputs)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, 112) for name in LAYOUTS]
    + [(name, side) for name in PROFILES for side in (32, 48, 96, 224)],
)
def test_logits_are_the_modules(name, side):
    model = lively()
    spec = preset("rafdb").replace(input_size=side)
    graph = deploy_graph(arrays(model), spec, LAYOUTS[name], float_input=True)
    for batch in (1, 7):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            expected = model(images).numpy()
        found, probabilities = run(graph, input=images.numpy())
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        softmax = torch.from_numpy(expected).softmax(dim=1).numpy()
        np.testing.assert_allclose(probabilities, softmax, atol=1e-5)
        assert np.ptp(expected, axis=1).min() > 0.1


@pytest.mark.parametrize("changes", [{}, {"mean": (0.4, 0.5, 0.6)}])
@pytest.mark.parametrize("name", ["rafdb", "ferplus"])
def test_uint8_input_is_the_runtimes_preprocessing(name, changes):
    spec = preset(name).replace(input_size=64, **changes)
    model = lively(spec.num_classes)
    graph = deploy_graph(arrays(model), spec, Profile())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(normalise(pixels, spec))).softmax(dim=1).numpy()
    np.testing.assert_allclose(run(graph, image=pixels)[1], expected, atol=1e-5)


@pytest.mark.parametrize(("name", "align"), [("cpu", 1), ("cpu", 4), ("cpu", 8), ("wide", 16)])
def test_local_features_need_no_reordering_on_a_cpu(name, align):
    profile = dataclasses.replace(PROFILES[name], align=align)
    graph = deploy_graph(arrays(lively()), preset("rafdb"), profile)
    assert not [node.name for node in graph.graph.node if node.op_type == "Gather"]


def test_pointwise_convolutions_make_whole_blocks_of_sixteen():
    """A Concat of others would leave ONNX Runtime's blocked layout under AVX-512."""
    graph = deploy_graph(arrays(lively()), preset("rafdb"), PROFILES["wide"])
    assert all(
        shape[0] % 16 == 0
        for shape in (list(array.dims) for array in graph.graph.initializer)
        if len(shape) == 4 and shape[0] > 3 and shape[2:] == [1, 1]
    )


@pytest.mark.parametrize("wrong", [{"slices": True}, {"merge_branches": True}])
def test_carried_stages_are_laid_out_in_one_way(wrong):
    with pytest.raises(ValueError, match="expected carry or other ways"):
        Profile(carry=True, **wrong)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_shuffle_is_left(name):
    graph = deploy_graph(arrays(lively()), preset("rafdb"), LAYOUTS[name])
    operators = Counter(node.op_type for node in graph.graph.node)
    profile = LAYOUTS[name]
    if profile.merge_patches and profile.split_multiplier:  # of the quadrants, there and back
        assert operators["Reshape"] == 4 and operators["Transpose"] == 3
    else:
        assert operators["Reshape"] == 0 and operators["Transpose"] == 1
    assert "BatchNormalization" not in operators
    names = [node.name for node in graph.graph.node]
    assert len(names) == len(set(names))
