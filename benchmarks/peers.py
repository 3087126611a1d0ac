"""This toolkit beside what one would pick instead: the same network, the same pictures, one run.

``python benchmarks/peers.py``. EfficientFace with random weights runs through this toolkit and
through PyTorch, ONNX Runtime, OpenVINO, ncnn and MNN, and so do two networks that one might take in
its place. A call is the same work for all: from uint8 pictures (N, S, S, 3) in memory to logits,
normalisation included. All take turns in rounds of random order, one kind of work after the other;
see :mod:`efficientface_deploy.workbench.timing`. How each is opened is in
:mod:`benchmarks.measure.toolchains`.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.peers", "cpu,export,bench")

import numpy as np
import torch
import torchvision

from benchmarks.measure.inputs import make_batches
from benchmarks.measure.models import Skipped, choose, one_line
from benchmarks.measure.networks import (
    MAX_DIFFERENCE,
    STRAIGHT,
    Network,
    efficientface,
    relative_difference,
)
from benchmarks.measure.roofline import measure_arithmetic, peak_rate
from benchmarks.measure.sessions import Infer
from benchmarks.measure.toolchains import (
    EAGER,
    ONNXRUNTIME,
    OURS,
    TOOLCHAINS,
    Toolchain,
    UnavailableError,
    Work,
    native_output_to_stderr,
)
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import COMPUTE, new_result
from efficientface_deploy.command import option
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.workbench.environment import package_versions
from efficientface_deploy.workbench.timing import Samples, in_turn, measure, speedup

MAX_EXTRA_CPUS = 0.1  # of a turn, beside its threads: Python, and what others leave running

SAME = "same network"
OTHER = "other network"
EFFICIENTFACE = "EfficientFace"
OTHER_NETWORKS = {
    "EfficientNet-B0": torchvision.models.efficientnet_b0,
    "MobileNetV2": torchvision.models.mobilenet_v2,
}
RANDOM_WEIGHTS = "random weights: speed alone can be compared"

_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "ncnn", "pnnx", "MNN")
_PICTURES = 8  # inputs in turn for single pictures; batches are fewer, and larger than a cache
_NOT_MEASURED = {"reached": None, "met": None, "against": "not measured"}
_PAUSE = 0.05  # seconds before a turn, for threads that spin after the turn before

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PeersConfig:
    """Options of ``python benchmarks/peers.py``."""

    libraries: str = option(
        "pytorch,onnxruntime,openvino,ncnn,mnn",
        metavar="NAME,...",
        help="what to compare with",
        first=True,
    )
    networks: bool = option(True, help="compare with other networks too")
    input_size: int = option(224, minimum=32, help="side of the input, pixels")
    batch: int = option(32, minimum=2, help="pictures of a batch", first=True)
    seconds: float = option(2.5, metavar="S", minimum=0.001, help="timed calls for each row")
    rounds: int = option(
        12, metavar="N", minimum=3, help="turns of each row; half of it for batches"
    )
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = out_option()


@dataclasses.dataclass(frozen=True)
class Case:
    """A network on a toolchain, open for one kind of work.

    Attributes:
        network: What it computes.
        toolchain: What computes it.
        infer: From pictures to logits.
        difference: Largest difference of a logit from PyTorch's, relative to the largest logit;
            infinite where it is not a number.
    """

    network: Network
    toolchain: Toolchain
    infer: Infer
    difference: float

    @property
    def name(self) -> str:
        """Unique within one kind of work."""
        return f"{self.network.name} on {self.toolchain.name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/peers.py``."""
    return run_benchmark("peers", PeersConfig, run, argv, __doc__, "--libraries pytorch,openvino")


def run(config: PeersConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        ConfigError: An option names no library.
    """
    toolchains = choose_toolchains(config.libraries)
    result = new_result("peers", config)
    print("measuring the machine's peak", file=sys.stderr)
    peak = peak_rate({"arithmetic": measure_arithmetic(1)}, 1, "fp32")
    cases: list[Row] = []
    skipped: dict[Skipped, None] = {}  # a set that keeps its order
    with tempfile.TemporaryDirectory() as folder:
        networks = make_networks(config, Path(folder))
        for work in plan_works(config.batch):
            rows, missing = measure_work(work, plan_cases(networks, toolchains, work), config)
            cases += rows
            skipped |= dict.fromkeys(missing)
        arithmetic = networks[0].multiply_adds()
    noisy = sum(row["busy"] for row in cases)
    warning = f"{noisy} of {len(cases)} rows are noisy: something else ran, or their median varies"
    return {
        **result,
        "packages": package_versions(_PACKAGES),
        "baseline": OURS[0].name,
        "multiply_adds": arithmetic,
        "peak_multiply_adds_per_second": peak,
        "cases": cases,
        "settings": describe_settings(toolchains),
        "goals": goals(cases, arithmetic, peak),
        "absent": [dataclasses.asdict(entry) for entry in skipped],
        "warnings": [f"{warning}; measure again"] if noisy else [],
    }


# ---- what is measured


def choose_toolchains(libraries: str) -> list[Toolchain]:
    """Ours, and those of the libraries that are asked for.

    Raises:
        ConfigError: There is no such library.
    """
    known = dict.fromkeys(entry.library for entry in TOOLCHAINS if entry not in OURS)
    wanted = choose(libraries, list(known), "--libraries")
    return [entry for entry in TOOLCHAINS if entry in OURS or entry.library in wanted]


def describe_settings(toolchains: Sequence[Toolchain]) -> dict[str, str]:
    """What each is told; those that are given our graph are told the same as those that are not."""
    told = {one.name: one.setting for one in toolchains if one.graph == STRAIGHT or one in OURS}
    told["our graph"] = "the same, given efficientface-export's file instead of torch's export"
    return told


def make_networks(config: PeersConfig, folder: Path) -> list[Network]:
    """EfficientFace first, then those that one might take in its place; all with random weights."""
    networks = [efficientface(config.input_size, config.seed, folder / "0")]
    spec = networks[0].spec
    for number, (name, build) in enumerate(OTHER_NETWORKS.items() if config.networks else (), 1):
        torch.manual_seed(config.seed)
        module = build(num_classes=spec.num_classes).eval()
        networks.append(Network(name, module, spec, folder / str(number)))
    return networks


def plan_works(batch: int) -> list[Work]:
    """One picture on one thread, on two, and a batch on two; less threads where there are not two.

    Threads in rising order: what two threads leave in a library's pool is no load on one.
    """
    several = min(2, usable_cpus())
    return list(dict.fromkeys([Work(1, 1), Work(several, 1), Work(several, batch)]))


def plan_cases(
    networks: Sequence[Network], toolchains: Sequence[Toolchain], work: Work
) -> list[tuple[Network, Toolchain]]:
    """All toolchains for our network; for the others the two that show what a network costs."""
    ours, *others = networks
    plan = [(ours, toolchain) for toolchain in toolchains if toolchain.takes(work)]
    return plan + [(other, toolchain) for other in others for toolchain in (ONNXRUNTIME, EAGER)]


# ---- the measurement


def measure_work(
    work: Work, plan: Sequence[tuple[Network, Toolchain]], config: PeersConfig
) -> tuple[list[Row], list[Skipped]]:
    """Open everything, check what it computes, and let all take turns."""
    gc.collect()  # the sessions that were opened before, and their threads
    torch.set_num_threads(work.threads)
    count = max(2, _PICTURES // work.batch)
    pictures = make_batches(config.input_size, work.batch, config.seed, count)
    cases, skipped = open_all(plan, work, pictures[0])
    print(f"{work.name}: measuring {len(cases)} rows", file=sys.stderr)
    samples = measure(
        {case.name: in_turn(case.infer, pictures) for case in cases},
        seconds=config.seconds,
        rounds=config.rounds if work.batch == 1 else math.ceil(config.rounds / 2),
        seed=config.seed,
        before_turn=lambda name: time.sleep(_PAUSE),
    )
    return [describe(case, cases, work, samples) for case in cases], skipped


def open_all(
    plan: Sequence[tuple[Network, Toolchain]], work: Work, pictures: UInt8Array
) -> tuple[list[Case], list[Skipped]]:
    """Open each and run it once; one that fails does not end the others."""
    cases, skipped = [], []
    expected: dict[str, Float32Array] = {}
    for network, toolchain in plan:
        if network.name not in expected:
            expected[network.name] = reference_logits(network, pictures)
        try:
            with native_output_to_stderr():
                infer = toolchain.open(network, work)
                found = infer(pictures)
        except UnavailableError as error:
            skipped.append(Skipped(toolchain.name, network.name, str(error)))
        except Exception as error:  # noqa: BLE001 - each library has errors of its own
            reason = f"{work.name}: {one_line(error)[:300]}"
            skipped.append(Skipped(toolchain.name, network.name, reason))
        else:
            difference = relative_difference(found, expected[network.name])
            cases.append(Case(network, toolchain, infer, difference))
    return cases, skipped


def reference_logits(network: Network, pictures: UInt8Array) -> Float32Array:
    """What PyTorch computes for uint8 (N, S, S, 3): logits (N, C)."""
    with torch.no_grad():
        logits: torch.Tensor = network.module(torch.from_numpy(normalise(pictures, network.spec)))
    return np.asarray(logits.numpy())


# ---- the result


def describe(case: Case, cases: Sequence[Case], work: Work, samples: Mapping[str, Samples]) -> Row:
    """One row of the result, in the form of ``latency.json``'s cases, and what is special here."""
    toolchain, own = case.toolchain, samples[case.name]
    ours = [samples[other.name] for other in cases if other.toolchain in OURS]
    best = min(ours, key=lambda other: other.p50_ms, default=None)
    group = SAME if case.network.name == EFFICIENTFACE else OTHER
    cpus = own.cpus or 0.0
    notes = {
        RANDOM_WEIGHTS: group == OTHER,
        "not ranked: it computes something else than PyTorch in FP32": (
            not case.difference < MAX_DIFFERENCE
        ),
        "not ranked: it used more threads than it was given": cpus > work.threads + MAX_EXTRA_CPUS,
    }
    true = [note for note, holds in notes.items() if holds]
    return {
        "model": case.network.name,
        "backend": toolchain.name,
        "precision": toolchain.precision,
        "threads": work.threads,
        "stage": COMPUTE,
        "batch": work.batch,
        **own.figures(),
        "images_per_second": own.calls_per_second * work.batch,
        "speedup": speedup(best, own) if best else None,
        "ours_faster": speedup(own, best) if best else None,
        "group": group,
        "graph": toolchain.graph,
        "is_ours": toolchain in OURS,
        "max_difference": case.difference if math.isfinite(case.difference) else None,
        "cpus": cpus,
        "ranked": not any(note.startswith("not ranked") for note in true),
        "note": "; ".join(true),
    }


def goals(cases: Sequence[Row], arithmetic: int, peak: float | None) -> list[Row]:
    """What we want to be true, and what was measured.

    Args:
        cases: The rows.
        arithmetic: Multiply-adds of the network for a picture.
        peak: Multiply-adds a second of the CPU's one thread.
    """
    single = [row for row in cases if (row["threads"], row["batch"]) == (1, 1)]
    same = [row for row in single if row["group"] == SAME]
    straight = [row for row in same if row["graph"] == STRAIGHT]
    eager = [row for row in same if row["backend"] == EAGER.name]
    onnxruntime = [row for row in single if row["backend"] == ONNXRUNTIME.name]
    other = [row for row in onnxruntime if row["model"] == "EfficientNet-B0"]
    work = max(((row["threads"], row["batch"]) for row in cases), default=(1, 1))
    most = [row for row in cases if (row["threads"], row["batch"]) == work]
    most_images = "more images per second than every peer"
    found = [
        _against("faster than the best peer on the same network", 1.2, same),
        _against("the same, peers that were given torch's export", 1.2, straight),
        _against("faster than PyTorch eager", 3.5, eager),
        _against("faster than EfficientNet-B0 on ONNX Runtime", 2.5, other),
        _against(f"{most_images}, batch {work[1]} on {work[0]} threads", 1.0, most),
    ]
    goal = {"goal": "at most this many times the arithmetic floor", "wanted": 1.5}
    own = next((row for row in single if row["is_ours"]), None)
    if own is None or not peak:
        return [*found, {**goal, **_NOT_MEASURED}]
    least_ms = 1e3 * arithmetic / peak
    distance = own["p50_ms"] / least_ms
    against = f"{arithmetic / 1e6:.1f} M multiply-adds at {peak / 1e9:.1f} G/s: {least_ms:.2f} ms"
    goal |= {"reached": {"value": distance}, "met": distance <= 1.5, "against": against}
    return [*found, goal]


def _against(name: str, wanted: float, rows: Sequence[Row]) -> Row:
    """A goal: to be this many times faster than the hardest of these rows."""
    rivals = [row for row in rows if row["ranked"] and not row["is_ours"] and row["ours_faster"]]
    hardest = min(rivals, key=lambda row: row["ours_faster"]["value"], default=None)
    goal = {"goal": name, "wanted": wanted}
    if hardest is None:
        return {**goal, **_NOT_MEASURED}
    ratio, rival = hardest["ours_faster"], f"{hardest['model']} on {hardest['backend']}"
    return {**goal, "reached": ratio, "met": ratio["value"] >= wanted, "against": rival}
