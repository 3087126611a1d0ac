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

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.graph_layouts", "cpu,export,bench")

import numpy as np
import onnx

from benchmarks.measure.inputs import make_batches
from benchmarks.measure.networks import (
    MAX_DIFFERENCE,
    STRAIGHT,
    Network,
    efficientface,
    relative_difference,
)
from benchmarks.measure.sessions import Infer, open_infer
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import UInt8Array
from efficientface_deploy.workbench.timing import in_turn, measure, speedup
from efficientface_export.graph.channel_layout import PROFILES, Profile
from efficientface_export.graph.io import multiply_adds, write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.tensorrt.builder import available, build_engine
from efficientface_export.tensorrt.options import EngineOptions

_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class GraphsConfig:
    """Options of ``python benchmarks/graph_layouts.py``."""

    input_size: int = option(224, minimum=32, help="side of the input, pixels", first=True)
    threads: int = option(1, minimum=1, help="CPU threads of one inference", first=True)
    seconds: float = option(6.0, metavar="S", minimum=0.001, help="timed calls for each graph")
    rounds: int = option(30, metavar="N", minimum=3, help="turns of each graph")
    kernels: bool = option(True, help="build engines and count their kernels")
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = out_option()


class Variant(NamedTuple):
    """A layout, and what was expected against the row that it changes, before the measurement.

    ``profile`` None is the straight export.
    """

    profile: Profile | None
    expected: str


def _variant(target: str, expected: str, **changes: Any) -> Variant:
    return Variant(dataclasses.replace(PROFILES[target], **changes), expected)


_cpu, _wide, _gpu = (functools.partial(_variant, name) for name in ("cpu", "wide", "gpu"))

VARIANTS = {
    STRAIGHT: Variant(None, "the baseline: shuffles as Reshape and Transpose"),
    "cpu": _cpu("least time on a CPU"),
    "cpu, grouped patches": _cpu(
        "slower: 29 to 116 channels in groups fit no blocked layout", split_multiplier=False
    ),
    "cpu, one convolution for each source": _cpu(
        "slower: each slice changes the layout twice", slices=True
    ),
    "cpu, blocks of 4": _cpu("less arithmetic, but half-filled blocks", align=4),
    "cpu, blocks of 16": _cpu("more arithmetic; for wider vectors than AVX2's", align=16),
    "cpu, merged branches": _cpu(
        "slower: fewer nodes, but identities are arithmetic", merge_branches=True
    ),
    "cpu, quadrants transposed": _cpu(
        "faster: fewer nodes around the patch extractors", merge_patches=True
    ),
    "wide": _wide("least time with AVX-512: few changes of layout, few nodes"),
    "wide, patches apart": _wide(
        "slower: 16 small convolutions in place of 4", merge_patches=False
    ),
    "wide, blocks of 8": _wide("less arithmetic, but narrower than AVX-512's vectors", align=8),
    "gpu": _gpu("fewest kernels within 1.3 times the multiply-adds"),
    "gpu, branches apart": _gpu(
        "three kernels more in each stage, less arithmetic", merge_branches=False
    ),
    "gpu, patches apart": _gpu("six convolutions more", merge_patches=False),
    "gpu, blocks of 8": _gpu("as many kernels, more arithmetic", align=8),
    "gpu, a convolution for each read": _gpu("no slices, but many convolutions", slices=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/graph_layouts.py``."""
    example = "--input-size 224 --threads 1"
    return run_benchmark("graph_layouts", GraphsConfig, run, argv, __doc__, example, "graphs")


def run(config: GraphsConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        RuntimeError: A layout computes something else than the straight export.
    """
    pictures = make_batches(config.input_size, 1, config.seed, _PICTURES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = efficientface(config.input_size, config.seed, folder)
        graphs = write_graphs(network, VARIANTS)
        calls = {
            name: open_infer(graph.SerializeToString(), config.threads)
            for name, graph in graphs.items()
        }
        check_outputs(calls, pictures)
        counts: dict[str, int | None] = dict.fromkeys(graphs)
        if config.kernels and not available("trt-rtx"):
            counts |= {
                name: count_kernels(graph, network.spec, folder) for name, graph in graphs.items()
            }
    samples = measure(
        {name: in_turn(call, pictures) for name, call in calls.items()},
        seconds=config.seconds,
        rounds=config.rounds,
        seed=config.seed,
    )
    straight, base = multiply_adds(graphs[STRAIGHT]), samples[STRAIGHT]
    rows = [
        {
            "name": name,
            "expected": VARIANTS[name].expected,
            "kernels": counts[name],
            "nodes": len(graph.graph.node),
            "multiply_adds": multiply_adds(graph),
            "multiply_adds_ratio": multiply_adds(graph) / straight,
            **samples[name].figures(),
            # Time by the baseline's: below 1 is faster.
            "time_ratio": speedup(samples[name], base),
            "min_ratio": samples[name].min_ms / base.min_ms,
        }
        for name, graph in graphs.items()
    ]
    return {**new_result("graphs", config), "baseline": STRAIGHT, "graphs": rows}


def write_graphs(network: Network, variants: Mapping[str, Variant]) -> dict[str, onnx.ModelProto]:
    """The graph of each variant."""
    return {
        name: network.lay_out(profile) if profile else onnx.load(network.onnx(STRAIGHT))
        for name, (profile, _) in variants.items()
    }


def check_outputs(calls: Mapping[str, Infer], pictures: Sequence[UInt8Array]) -> None:
    """Refuse a layout that computes something else than the straight export."""
    expected = np.concatenate([calls[STRAIGHT](batch) for batch in pictures])
    for name, call in calls.items():
        found = np.concatenate([call(batch) for batch in pictures])
        difference = relative_difference(found, expected)
        if not difference < MAX_DIFFERENCE:
            raise RuntimeError(f"{name} differs from {STRAIGHT} by {difference:.2g}")


def count_kernels(graph: onnx.ModelProto, spec: ModelSpec, folder: Path) -> int | None:
    """Kernels of the FP16 engine that TensorRT for RTX builds for SM89."""
    path = folder / "fp16.onnx"
    write_onnx(to_fp16(graph), path, spec, {"precision": "fp16", "target": "gpu"})
    return build_engine(path, "trt-rtx", EngineOptions(compute_capabilities=("sm89",))).kernels
