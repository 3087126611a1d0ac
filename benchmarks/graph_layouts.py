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
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import onnxruntime

from benchmarks.measure.inputs import call_of
from benchmarks.measure.networks import open_session, random_network
from benchmarks.report.__main__ import headline, write_result
from benchmarks.report.result import default_folder, new_result
from benchmarks.report.tables import console, require_libraries
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.files import write_text
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.preprocess import UInt8Array
from efficientface_deploy.workbench.timing import Samples, measure, speedup
from efficientface_export.graph.channel_layout import PROFILES, Profile
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.io import multiply_adds, write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.graph.trace import trace
from efficientface_export.tensorrt.builder import available, build_engine
from efficientface_export.tensorrt.options import EngineOptions

STRAIGHT = "straight"
MAX_DIFFERENCE = 1e-4  # of the logits, relative to the largest; another layout of the same sums

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


@dataclasses.dataclass(frozen=True)
class Variant:
    """A layout, and what was expected of it before it was measured.

    Attributes:
        profile: None is the straight export.
        expected: Against the row that it changes.
    """

    profile: Profile | None
    expected: str


_CPU, _GPU = PROFILES["cpu"], PROFILES["gpu"]
VARIANTS: dict[str, Variant] = {
    STRAIGHT: Variant(None, "the baseline: shuffles as Reshape and Transpose"),
    "cpu": Variant(_CPU, "least time on a CPU"),
    "cpu, grouped patches": Variant(
        dataclasses.replace(_CPU, split_multiplier=False),
        "slower: 29 to 116 channels in groups fit no blocked layout",
    ),
    "cpu, one convolution for each source": Variant(
        dataclasses.replace(_CPU, slices=True),
        "slower: each slice changes the layout twice",
    ),
    "cpu, blocks of 4": Variant(
        dataclasses.replace(_CPU, align=4), "less arithmetic, but half-filled blocks"
    ),
    "cpu, blocks of 16": Variant(
        dataclasses.replace(_CPU, align=16), "more arithmetic; for wider vectors than AVX2's"
    ),
    "cpu, merged branches": Variant(
        dataclasses.replace(_CPU, merge_branches=True),
        "slower: fewer nodes, but identities are arithmetic",
    ),
    "gpu": Variant(_GPU, "fewest kernels within 1.3 times the multiply-adds"),
    "gpu, stage 4 read whole too": Variant(
        dataclasses.replace(_GPU, first_read_whole=("stage2", "stage3", "stage4")),
        "a slice kernel less",
    ),
    "gpu, nothing read whole": Variant(
        dataclasses.replace(_GPU, first_read_whole=()), "two slice kernels more"
    ),
    "gpu, branches apart": Variant(
        dataclasses.replace(_GPU, merge_branches=False),
        "three kernels more in each stage, less arithmetic",
    ),
    "gpu, patches apart": Variant(
        dataclasses.replace(_GPU, merge_patches=False), "six convolutions more"
    ),
    "gpu, blocks of 8": Variant(
        dataclasses.replace(_GPU, align=8), "as many kernels, more arithmetic"
    ),
    "gpu, a convolution for each read": Variant(
        dataclasses.replace(_GPU, slices=False), "no slices, but many convolutions"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/graph_layouts.py``."""
    config = parse_config(
        GraphsConfig, argv, prog="benchmarks/graph_layouts.py", description=__doc__ or ""
    )
    require_libraries()
    result = run(config, VARIANTS)
    folder = config.out or default_folder(result)
    write_result(result, folder / "graphs.json")
    table = as_markdown(result)
    write_text(folder / "graphs.md", table)
    output = console()
    output.print(table, markup=False)
    output.print(f"wrote graphs.json and graphs.md to {folder}", markup=False)
    return 0


def run(config: GraphsConfig, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        RuntimeError: A layout computes something else than the straight export.
    """
    graphs = write_graphs(config, variants)
    pictures = np.random.default_rng(config.seed).integers(
        0, 256, (_PICTURES, 1, config.input_size, config.input_size, 3), dtype=np.uint8
    )
    sessions = {name: open_session(graph, config.threads) for name, graph in graphs.items()}
    require_equal(sessions, pictures)
    samples = measure(
        {name: call_of(session, pictures) for name, session in sessions.items()},
        seconds=config.seconds,
        rounds=config.rounds,
        seed=config.seed,
    )
    rows = []
    for name, graph in graphs.items():
        kernels = count_kernels(graph, config) if config.kernels else None
        rows.append({"name": name, "expected": variants[name].expected, "kernels": kernels})
        rows[-1] |= describe(name, graph, graphs[STRAIGHT], samples)
    return {**new_result("graphs", config), "baseline": STRAIGHT, "graphs": rows}


def write_graphs(
    config: GraphsConfig, variants: Mapping[str, Variant]
) -> dict[str, onnx.ModelProto]:
    """The graph of each variant, of one network with random weights."""
    spec = _spec(config)
    network = random_network(spec, config.seed)
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    return {
        name: trace(network, spec)
        if variant.profile is None
        else deploy_graph(weights, spec, variant.profile)
        for name, variant in variants.items()
    }


def require_equal(
    sessions: Mapping[str, onnxruntime.InferenceSession], pictures: UInt8Array
) -> None:
    """Make sure that what is compared computes the same."""

    def logits(session: onnxruntime.InferenceSession) -> np.ndarray[Any, Any]:
        return np.concatenate([session.run(OUTPUTS, {UINT8_INPUT: p})[0] for p in pictures])

    expected = logits(sessions[STRAIGHT])
    for name, session in sessions.items():
        difference = np.abs(logits(session) - expected).max() / np.abs(expected).max()
        if not difference < MAX_DIFFERENCE:
            raise RuntimeError(f"{name} differs from {STRAIGHT} by {difference:.2g}")


def count_kernels(graph: onnx.ModelProto, config: GraphsConfig) -> int | None:
    """Kernels of the FP16 engine for SM89; None where TensorRT for RTX is not installed."""
    if available("trt-rtx"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fp16.onnx")
        write_onnx(to_fp16(graph), path, _spec(config), {"precision": "fp16", "target": "gpu"})
        options = EngineOptions(compute_capabilities=("sm89",))
        return build_engine(path, "trt-rtx", options).kernels


def describe(
    name: str, graph: onnx.ModelProto, straight: onnx.ModelProto, samples: Mapping[str, Samples]
) -> dict[str, Any]:
    """What was measured of one graph."""
    own = samples[name]
    ratio = speedup(own, samples[STRAIGHT])  # time by the baseline's: below 1 is faster
    arithmetic = multiply_adds(graph)
    return {
        "nodes": len(graph.graph.node),
        "multiply_adds": arithmetic,
        "multiply_adds_ratio": arithmetic / multiply_adds(straight),
        "calls": own.count,
        "p50_ms": own.p50_ms,
        "min_ms": own.min_ms,
        "time_ratio": dataclasses.asdict(ratio),
        "min_ratio": own.min_ms / samples[STRAIGHT].min_ms,
        "busy": own.busy,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    config = result["config"]
    side = config["input_size"]
    lines = [
        headline(result),
        "",
        f"{side}x{side}, batch 1, {config['threads']} thread, FP32 on ONNX Runtime's CPU provider; "
        "kernels of the FP16 engine for SM89 by TensorRT for RTX.",
        "",
        "| graph | expected | p50, ms | time by straight's (95 %) | by minimum "
        "| multiply-adds, M | by straight's | nodes | kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["graphs"]:
        ratio = row["time_ratio"]
        cells = [
            row["name"],
            row["expected"],
            f"{row['p50_ms']:.2f}",
            f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
            f"{row['min_ratio']:.3f}",
            f"{row['multiply_adds'] / 1e6:.1f}",
            f"{row['multiply_adds_ratio']:.3f}",
            str(row["nodes"]),
            "-" if row["kernels"] is None else str(row["kernels"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["busy"] for row in result["graphs"]):
        lines += ["", "The machine was busy with something else: read the times with care."]
    return "\n".join(lines) + "\n"


def _spec(config: GraphsConfig) -> ModelSpec:
    return preset("rafdb").replace(input_size=config.input_size)


if __name__ == "__main__":
    run_command(main)
