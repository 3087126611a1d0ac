"""A network in memory, as the function that ``workbench.evaluation`` calls; and its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalisation
from efficientface_deploy.workbench.evaluation import Infer
from training.trainer.augmentation import luminance

_BATCH = {"cpu": 64, "cuda": 256}  # images of one call


class NetworkInput:
    """What a network sees of pixels, computed on a device as ``preprocess.normalise`` does.

    Args:
        spec: The network's.
        device: Where the pixels are.

    Attributes:
        fill: The mean colour as :meth:`values` has it, (1, C, 1, 1).
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.grey = spec.colour == "grey"
        self.scale, self.offset = (
            torch.from_numpy(x).to(device).view(1, 3, 1, 1) for x in normalisation(spec)
        )
        mean = -self.offset / self.scale
        self.fill = luminance(mean) if self.grey else mean

    def values(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, 1 or 3) to float32 (N, C, H, W), 0 to 255; C is 1 for a grey spec."""
        values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return luminance(values) if self.grey else values.expand(-1, 3, -1, -1)

    def normalise(self, values: Tensor) -> Tensor:
        """Float32 (N, C, S, S) to what the network takes: (N, 3, S, S), channels last."""
        # A product and a sum, each rounded, as in numpy: a fused one gives other bits.
        normalised = (values * self.scale).add_(self.offset)
        return normalised.contiguous(memory_format=torch.channels_last)


def infer_with(model: nn.Module, spec: ModelSpec, device: torch.device) -> Infer:
    """A function from images uint8 (N, S, S, 3), RGB, to logits float32 (N, C).

    Args:
        model: A network on ``device``, set to evaluation mode.
        spec: Its spec.
        device: Where it computes.
    """

    def infer(images: UInt8Array) -> Float32Array:
        return infer_pixels(model, spec, torch.from_numpy(images).to(device))

    return infer


@torch.inference_mode()
def infer_pixels(model: nn.Module, spec: ModelSpec, pixels: Tensor) -> Float32Array:
    """Logits float32 (N, C) of pixels uint8 (N, S, S, 1 or 3) on the network's device."""
    model.eval()
    network_input, dtype = NetworkInput(spec, pixels.device), next(model.parameters()).dtype
    logits = [
        model(network_input.normalise(network_input.values(part)).to(dtype)).float()
        for part in torch.split(pixels, _BATCH[pixels.device.type])
    ]
    found: Float32Array = torch.cat(logits).cpu().numpy()  # (N, C)
    return found
