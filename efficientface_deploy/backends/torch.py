"""PyTorch: the checkpoint itself, as the reference that every other backend is compared with."""

from __future__ import annotations

from typing import Any, cast

import torch

from efficientface_deploy.artifact import (
    WEIGHTS_SUFFIX,
    provenance_from_metadata,
    read_safetensors_metadata,
)
from efficientface_deploy.backends.base import Backend, Output
from efficientface_deploy.errors import BackendError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise


class TorchBackend(Backend):
    """Runs ``*.safetensors`` and published ``*.pth.tar`` files in eager mode, float32.

    ``threads`` sets PyTorch's thread count, which is one for the whole process. On a GPU TF32 is
    turned off, for the whole process too: it rounds the products of an FP32 network to ten bits.
    """

    def _open(self) -> None:
        device = self.options.device or "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            fix = "choose torch:cpu, or install PyTorch for CUDA and its driver"
            raise BackendError("backend torch:cuda", "a CUDA device", "none", fix)
        if device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False  # on by default, unlike the other
        model, self.spec = load_checkpoint(self.path, self.options.preset)
        if self.path.suffix == WEIGHTS_SUFFIX:
            metadata = read_safetensors_metadata(self.path)
            self.provenance = provenance_from_metadata(metadata, self.path)
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        self._device = torch.device(device)
        self._model = cast(Any, model.to(self._device))  # an EfficientFace or an LDG
        self.feature_size = self._model.feature_size
        self.name, self.library = f"torch:{device}", f"torch {torch.__version__}"

    def _infer(self, images: UInt8Array) -> Output:
        with torch.inference_mode():
            logits = self._model(self._batch(images))  # (N, C)
            probabilities = logits.softmax(dim=1)
        return Output(logits.cpu().numpy(), probabilities.cpu().numpy())

    def _features(self, images: UInt8Array) -> Float32Array:
        with torch.inference_mode():
            features: Float32Array = self._model.features(self._batch(images)).cpu().numpy()
        return features

    def _batch(self, images: UInt8Array) -> torch.Tensor:
        return torch.from_numpy(normalise(images, self.spec)).to(self._device)  # (N, 3, S, S)

    def _close(self) -> None:
        del self._model
