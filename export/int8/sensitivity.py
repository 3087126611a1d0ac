"""Which layers INT8 hurts most: measured, and left in higher precision.

The measure is the mean Kullback-Leibler divergence of the probabilities from those of the FP32
graph. It needs no labels, it sees images come near another label before they change it, and it
adds up: on FER+ the divergences of tensors rounded one at a time sum to that of all rounded at
once, within a tenth. Accuracy and agreement on some hundred images move by a few images and rank
nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from efficientface_deploy.artifact import OUTPUTS
from efficientface_deploy.workbench.metrics import mean_kl
from efficientface_export.int8.qdq import (
    QuantisationScheme,
    quantisable_layers,
    quantise,
    quantised_groups,
)
from efficientface_export.int8.ranges import run_tensors

SEARCH_IMAGES = 256
# The order needs fewer images than the figure that ends the search.
_RANKING_IMAGES = 64
# Nats. On FER+ validation 99.4 % of the labels then stayed the same: docs/int8.md.
KL_TARGET = 2e-4
# How much larger the file may become, as a part of what it is with all layers in INT8.
GROWTH = 0.1


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search left out of INT8.

    Attributes:
        left_out: Names of layers, those that hurt most first.
        images: Number of images that it was measured on.
        kl_before: Mean divergence from FP32 with all layers in INT8, nats.
        kl_after: The same without those left out.
    """

    left_out: tuple[str, ...]
    images: int
    kl_before: float
    kl_after: float

    def record(self) -> dict[str, Any]:
        """For the provenance."""
        return {**dataclasses.asdict(self), "kl_target": KL_TARGET}

    def describe(self) -> str:
        """A line for the terminal and the report."""
        line = (
            f"search on {self.images} images: {len(self.left_out)} layers left in higher "
            f"precision, mean KL {self.kl_before:.1e} -> {self.kl_after:.1e}"
        )
        if self.kl_after <= KL_TARGET:
            return line
        return line + f", not {KL_TARGET:g}: more would make the file over {GROWTH:.0%} larger"


def find_sensitive_layers(
    graph: onnx.ModelProto,
    amax: Mapping[str, float],
    scheme: QuantisationScheme,
    images: npt.NDArray[Any],
    exclude: Collection[str],
    weight_bytes: int,
) -> Search:
    """Leave out of INT8 as few layers as bring the divergence below :data:`KL_TARGET`.

    What is rounded with one scale and the layers that read it go together, the most harmful first;
    what would make the file too large is passed over.

    Args:
        graph: FP32.
        amax: Ranges of its activations, as :func:`quantise` takes them.
        scheme: How the processor wants INT8.
        images: As the graph takes them; not those that the ranges come from.
        exclude: Layers that are left out in any case.
        weight_bytes: What a weight of a layer that is left out takes in the file: 4 or 2.
    """
    reference = _probabilities(graph, images)

    def divergence(excluded: Collection[str], count: int = len(images)) -> float:
        found = _probabilities(quantise(graph, amax, scheme, excluded), images[:count])
        return mean_kl(reference[:count], found)

    first = divergence(exclude)
    excluded: list[str] = []
    kl = first
    if kl > KL_TARGET:
        groups = quantised_groups(graph, scheme, exclude)
        layers = {layer.name for layer in quantisable_layers(graph)}
        alone = [layers.difference(group.layers) for group in groups]
        harm = [divergence(others.union(exclude), _RANKING_IMAGES) for others in alone]
        growth = _growth(graph, weight_bytes)
        allowed = GROWTH * quantise(graph, amax, scheme, exclude).ByteSize()
        for index in np.argsort(harm)[::-1]:
            if kl <= KL_TARGET:
                break
            more = set(groups[index].layers).difference(exclude, excluded)
            added = sum(growth[layer] for layer in more)
            if added <= allowed:
                allowed -= added
                excluded += sorted(more)
                kl = divergence([*exclude, *excluded])
    return Search(tuple(excluded), len(images), first, kl)


def _probabilities(graph: onnx.ModelProto, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    name = OUTPUTS[1]
    return np.concatenate([batch[name] for batch in run_tensors(graph, [name], images)])


def _growth(graph: onnx.ModelProto, weight_bytes: int) -> dict[str, int]:
    """Bytes that each layer adds to the file when its weights are not INT8."""
    sizes = {weight.name: int(np.prod(weight.dims)) for weight in graph.graph.initializer}
    return {
        layer.name: (weight_bytes - 1) * sizes[layer.input[1]]
        for layer in quantisable_layers(graph)
    }
