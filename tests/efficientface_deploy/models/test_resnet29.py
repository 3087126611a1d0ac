"""What it computes is compared with dlib's network in tests/training/test_face_weights.py."""

from __future__ import annotations

import pytest
import torch

from efficientface_deploy.errors import SpecError
from efficientface_deploy.models import build_model, load_checkpoint, save_checkpoint
from efficientface_deploy.models.resnet29 import Block, ResNet29
from efficientface_deploy.spec import preset

SPEC = preset("ferplus").replace(architecture="resnet29", input_size=112)


def test_has_dlibs_layers():
    convolutions = [m for m in ResNet29(128).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 29
    weights = sum(m.weight.numel() for m in convolutions) + 256 * 128
    # Stem, then 3x3 convolutions: first to more channels, then among these; then the embedding.
    steps = 32 * 64 + 64 * 128 + 128 * 256
    among = 6 * 32**2 + 7 * 64**2 + 5 * 128**2 + 7 * 256**2
    assert weights == 7 * 7 * 3 * 32 + 9 * (steps + among) + 256 * 128


@pytest.mark.parametrize("side", [5, 6])
def test_a_step_halves_and_its_shortcut_has_new_channels_of_zeros(side):
    block = Block(2, 3, steps=True).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # so that the shortcut alone is left
    x = torch.rand(1, 2, side, side)
    out = block(x)
    assert out.shape == (1, 3, side // 2, side // 2)
    assert torch.allclose(out[0, 1, 0, 0], x[0, 1, :2, :2].mean())
    assert out[0, 2].abs().max() == 0


def test_checkpoint_is_told_apart(tmp_path):
    model = build_model("resnet29", 8).eval()
    save_checkpoint(tmp_path / "ldg.safetensors", model, SPEC)
    again, spec = load_checkpoint(tmp_path / "ldg.safetensors")
    assert spec == SPEC
    image = torch.rand(2, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(again(image), model(image))


def test_pictures_that_are_too_small():
    with pytest.raises(SpecError, match="multiple of 16 between 112 and 1024, found 96"):
        SPEC.replace(input_size=96)
