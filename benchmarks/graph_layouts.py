"""Every layout of the graph that was tried: its time on a CPU, its kernels on a GPU, its sums.

``python benchmarks/graph_layouts.py``. The straight export is torch's own, optimised by torch and
by ONNX Runtime (``ORT_ENABLE_ALL``); all others are written by
:mod:`efficientface_export.graph.efficientface`. All take uint8 pictures and give logits and
probabilities. On the CPU they take turns in rounds of random order, see
:mod:`efficientface_deploy.workbench.timing`; kernels are counted in the FP16 engine that TensorRT
for RTX builds, which needs no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx

from benchmarks.measure.inputs import in_turn, make_batches
from benchmarks.measure.networks import (
    MAX_DIFFERENCE,
    STRAIGHT,
    Network,
    random_network,
    relative_difference,
)
from benchmarks.measure.sessions import open_session
from benchmarks.report.publish import run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.command import option, run_command
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench.timing import Samples, measure, speedup
from efficientface_export.graph.channel_layout import PROFILES, Profile
from efficientface_export.graph.io import multiply_adds, write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.tensorrt.builder import available, build_engine
from efficientface_export.tensorrt.options import EngineOptions

_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class GraphsConfig:
    """Options of ``python benchmarks/graph_layouts.py``."""

    input_size: int = option(224, minimum=32, help="side of the input, pixels")
    threads: int = option(1, minimum=1, help="CPU threads of one inference")
    seconds: float = option(6.0, metavar="S", minimum=0, help="timed calls for each graph")
    rounds: int = option(30, metavar="N", minimum=3, help="turns of each graph")
    kernels: bool = option(True, help="build engines and count their kernels")
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


class Variant(NamedTuple):
    """A layout, and what was expected against the row that it changes, before the measurement.

    ``profile`` None is the straight export.
    """

    profile: Profile | None
    expected: str


def _variant(target: str, expected: str, **changes: Any) -> Variant:
    return Variant(dataclasses.replace(PROFILES[target], **changes), expected)


VARIANTS = {
    STRAIGHT: Variant(None, "the baseline: shuffles as Reshape and Transpose"),
    "cpu": _variant("cpu", "least time on a CPU"),
    "cpu, grouped patches": _variant(
        "cpu",
        "slower: 29 to 116 channels in groups fit no blocked layout",
        split_multiplier=False,
    ),
    "cpu, one convolution for each source": _variant(
        "cpu", "slower: each slice changes the layout twice", slices=True
    ),
    "cpu, blocks of 4": _variant("cpu", "less arithmetic, but half-filled blocks", align=4),
    "cpu, blocks of 16": _variant(
        "cpu", "more arithmetic; for wider vectors than AVX2's", align=16
    ),
    "cpu, merged branches": _variant(
        "cpu", "slower: fewer nodes, but identities are arithmetic", merge_branches=True
    ),
    "gpu": _variant("gpu", "fewest kernels within 1.3 times the multiply-adds"),
    "gpu, stage 4 read whole too": _variant(
        "gpu", "a slice kernel less", first_read_whole=("stage2", "stage3", "stage4")
    ),
    "gpu, nothing read whole": _variant("gpu", "two slice kernels more", first_read_whole=()),
    "gpu, branches apart": _variant(
        "gpu", "three kernels more in each stage, less arithmetic", merge_branches=False
    ),
    "gpu, patches apart": _variant("gpu", "six convolutions more", merge_patches=False),
    "gpu, blocks of 8": _variant("gpu", "as many kernels, more arithmetic", align=8),
    "gpu, a convolution for each read": _variant(
        "gpu", "no slices, but many convolutions", slices=False
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/graph_layouts.py``."""
    return run_benchmark("graph_layouts", GraphsConfig, run, argv, __doc__)


def run(config: GraphsConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        RuntimeError: A layout computes something else than the straight export.
    """
    pictures = make_batches(config.input_size, 1, config.seed, _PICTURES)
    with tempfile.TemporaryDirectory() as folder:
        graphs = write_graphs(make_network(config, Path(folder)), VARIANTS)
        sessions = {
            name: open_session(graph.SerializeToString(), config.threads)
            for name, graph in graphs.items()
        }
        kernels = {
            name: count_kernels(graph, config, Path(folder)) if config.kernels else None
            for name, graph in graphs.items()
        }

    def infer(name: str, batch: UInt8Array) -> Float32Array:
        logits: Float32Array = sessions[name].run(OUTPUTS, {UINT8_INPUT: batch})[0]
        return logits

    expected = np.concatenate([infer(STRAIGHT, batch) for batch in pictures])
    for name in sessions:
        found = np.concatenate([infer(name, batch) for batch in pictures])
        difference = relative_difference(found, expected)
        if not difference < MAX_DIFFERENCE:
            raise RuntimeError(f"{name} differs from {STRAIGHT} by {difference:.2g}")
    samples = measure(
        {name: in_turn(functools.partial(infer, name), pictures) for name in sessions},
        seconds=config.seconds,
        rounds=config.rounds,
        seed=config.seed,
    )
    rows = [
        {
            "name": name,
            "expected": VARIANTS[name].expected,
            "kernels": kernels[name],
            **describe(graph, graphs[STRAIGHT], samples[name], samples[STRAIGHT]),
        }
        for name, graph in graphs.items()
    ]
    return {**new_result("graphs", config), "baseline": STRAIGHT, "graphs": rows}


def make_network(config: GraphsConfig, folder: Path) -> Network:
    """EfficientFace with random weights."""
    spec = preset("rafdb").replace(input_size=config.input_size)
    return Network("EfficientFace", random_network(spec, config.seed), spec, folder)


def write_graphs(network: Network, variants: Mapping[str, Variant]) -> dict[str, onnx.ModelProto]:
    """The graph of each variant."""
    return {
        name: onnx.load(network.onnx(STRAIGHT))
        if variant.profile is None
        else network.lay_out(variant.profile)
        for name, variant in variants.items()
    }


def count_kernels(graph: onnx.ModelProto, config: GraphsConfig, folder: Path) -> int | None:
    """Kernels of the FP16 engine for SM89; None where TensorRT for RTX is not installed."""
    if available("trt-rtx"):
        return None
    path, spec = folder / "fp16.onnx", preset("rafdb").replace(input_size=config.input_size)
    write_onnx(to_fp16(graph), path, spec, {"precision": "fp16", "target": "gpu"})
    return build_engine(path, "trt-rtx", EngineOptions(compute_capabilities=("sm89",))).kernels


def describe(
    graph: onnx.ModelProto, straight: onnx.ModelProto, own: Samples, base: Samples
) -> dict[str, Any]:
    """What was measured of one graph."""
    arithmetic = multiply_adds(graph)
    return {
        "nodes": len(graph.graph.node),
        "multiply_adds": arithmetic,
        "multiply_adds_ratio": arithmetic / multiply_adds(straight),
        **own.figures(),
        # Time by the baseline's: below 1 is faster.
        "time_ratio": speedup(own, base),
        "min_ratio": own.min_ms / base.min_ms,
    }


if __name__ == "__main__":
    run_command(main)
