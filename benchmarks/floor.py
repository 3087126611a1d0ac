"""The floor: the time that a network's multiply-adds take at the measured peak.

The floor is arithmetic alone. A network of a few megabytes stays in the caches between two calls,
so that the time to read it from memory is no lower bound; it is recorded beside it (``memory_ms``)
for machines where it matters. What counts is the network's work, not a file's: the fewest
multiply-adds of all files of the same network in the run. Padding and identity weights in a graph
are part of the distance, not of the floor.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ceilings import peak
from benchmarks.contenders import Contender

if TYPE_CHECKING:
    import torch

# What must be equal for two files to hold the same network.
Network = tuple[str, int, int]


def network_of(contender: Contender) -> Network:
    """Name, input size and classes: what tells networks apart in a run."""
    spec = contender.predictor.spec
    return f"{spec.architecture}, {spec.name}", spec.input_size, spec.num_classes


def count_multiply_adds(contenders: Sequence[Contender]) -> dict[str, int | None]:
    """Multiply-adds of one image, by model: as its graph is laid out, zero weights included.

    Returns:
        None for an engine, and for an ONNX file where the package onnx is not installed.
    """
    counts: dict[str, int | None] = {}
    for contender in contenders:
        if contender.model not in counts:
            counts[contender.model] = _count(contender)
    return counts


def fewest_multiply_adds(
    contenders: Sequence[Contender], counts: Mapping[str, int | None]
) -> dict[Network, int]:
    """The fewest multiply-adds of any file of each network."""
    fewest: dict[Network, int] = {}
    for contender in contenders:
        count = counts.get(contender.model)
        if count is not None:
            network = network_of(contender)
            fewest[network] = min(count, fewest.get(network, count))
    return fewest


def floor_of(
    contender: Contender,
    batch: int,
    p50_ms: float,
    fewest: Mapping[Network, int],
    ceilings: Mapping[str, Any],
) -> dict[str, float] | None:
    """How far a row is from the floor.

    Args:
        contender: Model, backend and threads.
        batch: Images in a call.
        p50_ms: The row's median, milliseconds.
        fewest: From :func:`fewest_multiply_adds`.
        ceilings: From :func:`ceilings.measure_ceilings`; may hold the GPU's.

    Returns:
        ``multiply_adds`` of an image, ``ms`` of the whole batch at the peak, ``distance`` (the
        median by it, above 1 unless the peak was measured too low), ``memory_ms`` (weights and
        pictures once from memory); None where the peak or the count is not known.
    """
    multiply_adds = fewest.get(network_of(contender))
    rate = _rate(contender, ceilings)
    if multiply_adds is None or rate is None:
        return None
    milliseconds = 1e3 * multiply_adds * batch / rate
    floor = {
        "multiply_adds": multiply_adds,
        "ms": milliseconds,
        "distance": p50_ms / milliseconds,
    }
    bandwidth = [
        row["bytes_per_second"]
        for row in ceilings["bandwidth"]
        if contender.threads is not None and row["threads"] <= contender.threads
    ]
    if bandwidth:
        side = contender.predictor.spec.input_size
        moved = contender.predictor.path.stat().st_size + batch * side * side * 3
        floor["memory_ms"] = 1e3 * moved / max(bandwidth)
    return floor


def _rate(contender: Contender, ceilings: Mapping[str, Any]) -> float | None:
    if contender.on_gpu:
        rates: Mapping[str, float] = ceilings.get("gpu") or {}
        return rates.get(contender.precision)
    return peak(ceilings, contender.threads, contender.precision)


def _count(contender: Contender) -> int | None:
    path = contender.predictor.path
    if contender.backend.startswith("torch"):
        return _count_torch(contender)
    if path.suffix == ".onnx":
        return count_onnx(path)
    return None


def count_onnx(path: Path) -> int | None:
    """Multiply-adds of an ONNX file; None without the package onnx, or for a foreign graph."""
    if importlib.util.find_spec("onnx") is None:
        return None
    import onnx
    from efficientface_export.graph import multiply_adds

    try:
        return multiply_adds(onnx.load(path))
    except (KeyError, onnx.shape_inference.InferenceError):
        return None  # weights that are computed, or shapes that nobody can know


def _count_torch(contender: Contender) -> int:
    """Multiply-adds of the module's convolutions and linear layers, seen in a pass."""
    import torch

    from efficientface_deploy.models import load_checkpoint

    network, spec = load_checkpoint(contender.predictor.path, contender.preset)
    total = 0

    def add(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        # (out, in / groups, kH, kW) by (1, out, H, W), or (out, in) by (1, out)
        total += weight.numel() * functools.reduce(int.__mul__, output.shape[2:], 1)

    hooks = [
        module.register_forward_hook(add)
        for module in network.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, spec.input_size, spec.input_size))
    for hook in hooks:
        hook.remove()
    return total
