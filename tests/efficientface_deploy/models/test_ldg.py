from __future__ import annotations

import pytest
import torch
import torchvision

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.models import (
    LabelDistributionGenerator,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from efficientface_deploy.models.efficientface import EfficientFace
from efficientface_deploy.spec import preset


def resnet18(classes: int = 7) -> torch.nn.Module:
    torch.manual_seed(1)
    return torchvision.models.resnet18(num_classes=classes).eval()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_published_ldg_checkpoint(architecture, tmp_path):
    """The published LDG is torchvision's ResNet, saved from DataParallel."""
    reference = getattr(torchvision.models, architecture)(num_classes=7).eval()
    path = tmp_path / "ldg.tar"
    torch.save({"state_dict": torch.nn.DataParallel(reference).state_dict()}, path)
    model, spec = load_checkpoint(path, preset="rafdb")
    assert isinstance(model, LabelDistributionGenerator)
    assert (spec.architecture, spec.labels) == (architecture, preset("rafdb").labels)
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(image), reference(image))


def test_safetensors_have_torchvisions_keys(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    spec = preset("affectnet8").replace(architecture="resnet18")
    model = build_model("resnet18", 8)
    save_checkpoint(tmp_path / "ldg.safetensors", model, spec)
    state = safetensors.load_file(tmp_path / "ldg.safetensors")
    resnet18(8).load_state_dict(state)  # strictly
    again, own_spec = load_checkpoint(tmp_path / "ldg.safetensors")
    assert own_spec == spec
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(image), model.eval()(image))


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnet18", 512), ("resnet29", 256), ("resnet50", 2048)]
)
def test_features_are_what_the_last_layer_is_given(architecture, size):
    model = build_model(architecture, 5).eval()
    with torch.inference_mode():
        image = torch.randn(2, 3, 112, 112)
        features = model.features(image)
        assert features.shape == (2, model.feature_size) == (2, size)
        assert torch.equal(model.backbone.fc(features), model(image))


def test_build_model():
    assert isinstance(build_model("efficientface", 5), EfficientFace)
    assert build_model("resnet18", 5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("architecture", ["resnet34", "vgg16", "", "efficientface"])
def test_other_architectures(architecture):
    with pytest.raises(ConfigError, match="resnet18, resnet29, resnet50"):
        LabelDistributionGenerator(7, architecture)
