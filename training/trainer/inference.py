"""A network in memory, as the function that ``workbench.evaluation`` calls."""

from __future__ import annotations

import torch
from torch import nn

from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.workbench.evaluation import Infer


def infer_with(model: nn.Module, spec: ModelSpec, device: torch.device) -> Infer:
    """A function from images uint8 (N, S, S, 3), RGB, to logits float32 (N, C).

    Args:
        model: A network on ``device``, set to evaluation mode.
        spec: Its spec.
        device: Where it computes.
    """
    model.eval()
    dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def infer(images: UInt8Array) -> Float32Array:
        batch = torch.from_numpy(normalise(images, spec))  # (N, 3, S, S)
        batch = batch.to(device, dtype, memory_format=torch.channels_last)
        logits: Float32Array = model(batch).float().cpu().numpy()  # (N, C)
        return logits

    return infer
