"""This toolkit beside what one would pick instead: the same network, the same pictures, one run.

``python benchmarks/peers.py``. EfficientFace with random weights runs through this toolkit and
through PyTorch, ONNX Runtime, OpenVINO, ncnn and MNN, and so do two networks that one might take in
its place. A call is the same work for all: from uint8 pictures (N, S, S, 3) in memory to logits,
normalisation included. All take turns in rounds of random order, one kind of work after the other;
see :mod:`efficientface_deploy.workbench.timing`. How each is opened is in
:mod:`benchmarks.measure.toolchains`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torchvision
from onnx import TensorProto, helper

from benchmarks.measure.models import Absent, comma_list, one_line
from benchmarks.measure.networks import STRAIGHT, Network, open_session, random_network
from benchmarks.measure.toolchains import (
    EAGER,
    ONNXRUNTIME,
    OURS,
    TOOLCHAINS,
    Infer,
    Toolchain,
    UnavailableError,
    Work,
    native_output_to_stderr,
)
from benchmarks.report.__main__ import COMPUTE, headline, write_result
from benchmarks.report.result import default_folder, new_result
from benchmarks.report.tables import console, require_libraries
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import write_text
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.workbench.environment import usable_cpus
from efficientface_deploy.workbench.timing import Call, Samples, measure, speedup

MAX_DIFFERENCE = 1e-4  # of the logits, relative to the largest: FP32 sums in another order
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
_PRODUCT = 1024  # side of the matrices whose product shows what the CPU can do
_PAUSE = 0.05  # seconds before a turn, for threads that spin after the turn before


@dataclasses.dataclass(frozen=True)
class PeersConfig:
    """Options of ``python benchmarks/peers.py``."""

    libraries: str = option(
        "pytorch,onnxruntime,openvino,ncnn,mnn", metavar="NAME,...", help="what to compare with"
    )
    networks: bool = option(True, help="compare with other networks too")
    input_size: int = option(224, minimum=32, help="side of the input, pixels")
    batch: int = option(32, minimum=2, help="pictures of a batch")
    seconds: float = option(2.5, metavar="S", minimum=0, help="timed calls for each row")
    rounds: int = option(
        12, metavar="N", minimum=3, help="turns of each row; half of it for batches"
    )
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network on a toolchain, in one kind of work.

    Attributes:
        network: What it computes.
        toolchain: What computes it.
        group: ``same network`` or ``other network``.
    """

    network: Network
    toolchain: Toolchain
    group: str

    @property
    def name(self) -> str:
        """Unique within one kind of work."""
        return f"{self.network.name} on {self.toolchain.name}"


@dataclasses.dataclass(frozen=True)
class Opened:
    """An entry that runs.

    Attributes:
        entry: What it is.
        infer: From pictures to logits.
        difference: Largest difference of a logit from PyTorch's, relative to the largest logit;
            infinite where it is not a number.
    """

    entry: Entry
    infer: Infer
    difference: float

    @property
    def equal(self) -> bool:
        """Whether it computes what PyTorch computes."""
        return self.difference < MAX_DIFFERENCE


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/peers.py``."""
    config = parse_config(PeersConfig, argv, prog="benchmarks/peers.py", description=__doc__ or "")
    require_libraries()
    result = run(config)
    folder = config.out or default_folder(result)
    write_result(result, folder / "peers.json")
    table = as_markdown(result)
    write_text(folder / "peers.md", table)
    output = console()
    output.print(table, markup=False, soft_wrap=True)
    output.print(f"wrote peers.json and peers.md to {folder}", markup=False)
    return 0


def run(config: PeersConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        ConfigError: An option names no library.
    """
    toolchains = choose_toolchains(config.libraries)
    result = new_result("peers", config)
    absent: dict[Absent, None] = {}  # a set that keeps its order
    cases: list[dict[str, Any]] = []
    peak = None
    with tempfile.TemporaryDirectory() as folder:
        networks = make_networks(config, Path(folder))
        for work in plan_works(config.batch):
            entries = plan_entries(networks, toolchains, work)
            rows, missing, product_ms = measure_work(work, entries, config)
            cases += rows
            absent |= dict.fromkeys(missing)
            peak = peak or _PRODUCT**3 / (product_ms / 1e3)
        arithmetic = networks[0].multiply_adds()
    return {
        **result,
        "packages": _versions(),
        "baseline": OURS[0].name,
        "multiply_adds": arithmetic,
        "peak_multiply_adds_per_second": peak,
        "cases": cases,
        "settings": describe_settings(toolchains),
        "goals": goals(cases, arithmetic, peak),
        "absent": [dataclasses.asdict(entry) for entry in absent],
        "warnings": warnings(cases),
    }


def choose_toolchains(libraries: str) -> list[Toolchain]:
    """Ours, and those of the libraries that are asked for.

    Raises:
        ConfigError: There is no such library.
    """
    known = dict.fromkeys(entry.library for entry in TOOLCHAINS if entry not in OURS)
    wanted = comma_list(libraries)
    for name in wanted:
        if name not in known:
            raise ConfigError(
                "--libraries",
                ", ".join(known),
                repr(name),
                "choose among these, with commas between",
            )
    return [entry for entry in TOOLCHAINS if entry in OURS or entry.library in wanted]


def describe_settings(toolchains: Sequence[Toolchain]) -> dict[str, str]:
    """What each is told; those that are given our graph are told the same as those that are not."""
    told = {one.name: one.setting for one in toolchains if one.graph == STRAIGHT or one in OURS}
    told["our graph"] = "the same, given efficientface-export's file instead of torch's export"
    return told


def make_networks(config: PeersConfig, folder: Path) -> list[Network]:
    """EfficientFace first, then those that one might take in its place; all with random weights."""
    spec = preset("rafdb").replace(input_size=config.input_size)
    networks = [Network(EFFICIENTFACE, random_network(spec, config.seed), spec, folder / "0")]
    if config.networks:
        for number, (name, build) in enumerate(OTHER_NETWORKS.items(), start=1):
            torch.manual_seed(config.seed)
            module = build(num_classes=spec.num_classes).eval()
            networks.append(Network(name, module, spec, folder / str(number)))
    return networks


def plan_works(batch: int) -> list[Work]:
    """One picture on one thread, on two, and a batch on two; less threads where there are not two.

    Threads in rising order: what two threads leave in a library's pool is no load on one.
    """
    several = min(2, usable_cpus())
    works = [Work(1, 1), Work(several, 1), Work(several, batch)]
    return list(dict.fromkeys(works))


def plan_entries(
    networks: Sequence[Network], toolchains: Sequence[Toolchain], work: Work
) -> list[Entry]:
    """All toolchains for our network; for the others the two that show what a network costs."""
    ours, *others = networks
    entries = [Entry(ours, toolchain, SAME) for toolchain in toolchains if toolchain.takes(work)]
    entries += [
        Entry(network, toolchain, OTHER) for network in others for toolchain in (ONNXRUNTIME, EAGER)
    ]
    return entries


def measure_work(
    work: Work, entries: Sequence[Entry], config: PeersConfig
) -> tuple[list[dict[str, Any]], list[Absent], float]:
    """Open everything, check what it computes, and let all take turns.

    Returns:
        Rows, what could not be measured, and the milliseconds of the fastest matrix product.
    """
    torch.set_num_threads(work.threads)
    pictures = make_pictures(work.batch, config)
    watch = CpuWatch()
    with contextlib.ExitStack() as stack:
        opened, absent = open_all(entries, work, pictures, stack)
        calls = {one.entry.name: call_of(one.infer, pictures) for one in opened}
        products = product_calls(work.threads)
        print(f"{work.name}: measuring {len(calls)} rows", file=sys.stderr)
        samples = measure(
            {**calls, **products},
            seconds=config.seconds,
            rounds=config.rounds if work.batch == 1 else math.ceil(config.rounds / 2),
            seed=config.seed,
            before_turn=watch.begin,
        )
        watch.end()
        product_ms = min(samples[name].p50_ms for name in products)
        rows = [describe(one, opened, work, samples, watch) for one in opened]
    gc.collect()  # sessions and their threads, before the next ones are opened
    return rows, absent, product_ms


def open_all(
    entries: Sequence[Entry],
    work: Work,
    pictures: Sequence[UInt8Array],
    stack: contextlib.ExitStack,
) -> tuple[list[Opened], list[Absent]]:
    """Open each entry and run it once; one that fails does not end the others."""
    opened, absent = [], []
    expected: dict[str, Float32Array] = {}
    for entry in entries:
        network, toolchain = entry.network, entry.toolchain
        if network.name not in expected:
            expected[network.name] = reference_logits(network, pictures[0])
        try:
            toolchain.require_packages()
            with native_output_to_stderr():
                infer = toolchain.open(network, work, stack)
                found = infer(pictures[0])
        except UnavailableError as error:
            absent.append(Absent(toolchain.name, network.name, str(error)))
        except Exception as error:  # noqa: BLE001 - each library has errors of its own
            reason = one_line(error)[:300]
            absent.append(Absent(toolchain.name, network.name, f"{work.name}: {reason}"))
        else:
            difference = relative_difference(found, expected[network.name])
            opened.append(Opened(entry, infer, difference))
    return opened, absent


def reference_logits(network: Network, pictures: UInt8Array) -> Float32Array:
    """What PyTorch computes for uint8 (N, S, S, 3): logits (N, C)."""
    with torch.no_grad():
        logits: torch.Tensor = network.module(torch.from_numpy(normalise(pictures, network.spec)))
    return np.asarray(logits.numpy())


def relative_difference(found: Float32Array, expected: Float32Array) -> float:
    """Largest difference by the largest expected value; infinite for another shape or NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def make_pictures(batch: int, config: PeersConfig) -> list[UInt8Array]:
    """Inputs in turn, uint8 (N, S, S, 3) each; what they show does not change the arithmetic."""
    count = max(2, _PICTURES // batch)
    shape = (count, batch, config.input_size, config.input_size, 3)
    return list(np.random.default_rng(config.seed).integers(0, 256, shape, dtype=np.uint8))


def call_of(infer: Infer, pictures: Sequence[UInt8Array]) -> Call:
    """A call that runs the next of several inputs."""
    inputs = itertools.cycle(pictures)

    def call() -> None:
        infer(next(inputs))

    return call


def product_calls(threads: int) -> dict[str, Call]:
    """The product of two square matrices by the libraries whose threads can be set: the CPU's peak.

    numpy's BLAS takes its number of threads from the environment alone, when it is loaded.
    """
    side = _PRODUCT
    left, right = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    shape = [side, side]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "abc"]
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", values[:2], values[2:])
    opset = [helper.make_opsetid("", 13)]
    session = open_session(helper.make_model(graph, opset_imports=opset, ir_version=8), threads)

    def by_torch() -> None:
        torch.mm(a, b)

    def by_onnxruntime() -> None:
        session.run(None, {"a": left, "b": right})

    return {"matrix product by PyTorch": by_torch, "by ONNX Runtime": by_onnxruntime}


class CpuWatch:
    """How many CPUs the process keeps busy while each contender has its turns.

    A library that starts more threads than it was told to is so found out.
    """

    def __init__(self, pause: float = _PAUSE) -> None:
        self._pause = pause
        self._seconds: dict[str, tuple[float, float]] = {}  # name: CPU time, time
        self._running: tuple[str, float, float] | None = None

    def begin(self, name: str) -> None:
        """The turn of ``name`` begins, and the one before has ended."""
        self.end()
        time.sleep(self._pause)
        self._running = (name, time.process_time(), time.perf_counter())

    def end(self) -> None:
        """The turn has ended."""
        if self._running is None:
            return
        name, cpu, wall = self._running
        before = self._seconds.get(name, (0.0, 0.0))
        spent = time.process_time() - cpu, time.perf_counter() - wall
        self._seconds[name] = before[0] + spent[0], before[1] + spent[1]
        self._running = None

    def cpus(self, name: str) -> float:
        """CPU time by time, over all turns."""
        cpu, wall = self._seconds[name]
        return cpu / wall


def describe(
    one: Opened,
    opened: Sequence[Opened],
    work: Work,
    samples: Mapping[str, Samples],
    watch: CpuWatch,
) -> dict[str, Any]:
    """One row of the result, in the form of ``latency.json``'s cases, and what is special here."""
    entry = one.entry
    own = samples[entry.name]
    ours = [samples[other.entry.name] for other in opened if other.entry.toolchain in OURS]
    best = min(ours, key=lambda other: other.p50_ms) if ours else None
    cpus = watch.cpus(entry.name)
    threads_kept = cpus <= work.threads + MAX_EXTRA_CPUS
    return {
        "model": entry.network.name,
        "backend": entry.toolchain.name,
        "precision": entry.toolchain.precision,
        "threads": work.threads,
        "stage": COMPUTE,
        "batch": work.batch,
        "calls": own.count,
        "min_ms": own.min_ms,
        "p50_ms": own.p50_ms,
        "p90_ms": own.p90_ms,
        "p99_ms": own.p99_ms,
        "images_per_second": own.calls_per_second * work.batch,
        "round_medians_ms": own.round_medians_ms.tolist(),
        "spread": own.spread,
        "drift": own.drift,
        "busy": own.busy,
        "speedup": dataclasses.asdict(speedup(best, own)) if best else None,
        "ours_faster": dataclasses.asdict(speedup(own, best)) if best else None,
        "group": entry.group,
        "graph": entry.toolchain.graph,
        "is_ours": entry.toolchain in OURS,
        "max_difference": one.difference if math.isfinite(one.difference) else None,
        "cpus": cpus,
        "ranked": one.equal and threads_kept,
        "note": note_of(one, threads_kept),
    }


def note_of(one: Opened, threads_kept: bool) -> str:
    """What a reader of the row must know."""
    notes = []
    if one.entry.group == OTHER:
        notes.append(RANDOM_WEIGHTS)
    if not one.equal:
        notes.append("not ranked: it computes something else than PyTorch in FP32")
    if not threads_kept:
        notes.append("not ranked: it used more threads than it was given")
    return "; ".join(notes)


Row = dict[str, Any]


def goals(cases: Sequence[Row], arithmetic: int, peak: float | None) -> list[dict[str, Any]]:
    """What we want to be true, and what was measured."""

    def against(
        goal: str, wanted: float, work: tuple[int, int], chosen: Callable[[Row], bool]
    ) -> Row:
        threads, batch = work
        rivals = [
            row
            for row in cases
            if (row["threads"], row["batch"]) == (threads, batch)
            and row["ranked"]
            and not row["is_ours"]
            and row["ours_faster"] is not None
            and chosen(row)
        ]
        if not rivals:
            return _goal(goal, wanted, None, None, "not measured")
        hardest = min(rivals, key=lambda row: row["ours_faster"]["value"])
        ratio = hardest["ours_faster"]
        rival = f"{hardest['model']} on {hardest['backend']}"
        return _goal(goal, wanted, ratio, ratio["value"] >= wanted, rival)

    single = (1, 1)
    several = max((row["threads"] for row in cases), default=1)
    batch = max((row["batch"] for row in cases), default=1)
    return [
        against(
            "faster than the best peer on the same network",
            1.2,
            single,
            lambda row: row["group"] == SAME,
        ),
        against(
            "the same, peers that were given torch's export",
            1.2,
            single,
            lambda row: row["group"] == SAME and row["graph"] == STRAIGHT,
        ),
        against(
            "faster than PyTorch eager",
            3.5,
            single,
            lambda row: row["group"] == SAME and row["backend"] == EAGER.name,
        ),
        against(
            "faster than EfficientNet-B0 on ONNX Runtime",
            2.5,
            single,
            lambda row: row["model"] == "EfficientNet-B0" and row["backend"] == ONNXRUNTIME.name,
        ),
        against(
            f"more images per second than every peer, batch {batch} on {several} threads",
            1.0,
            (several, batch),
            lambda row: True,
        ),
        _floor_goal(cases, arithmetic, peak),
    ]


def _floor_goal(cases: Sequence[Row], arithmetic: int, peak: float | None) -> dict[str, Any]:
    """Our time by the time that the network's multiply-adds would take at the CPU's peak."""
    name, wanted = "at most this many times the arithmetic floor", 1.5
    own = [row for row in cases if row["is_ours"] and (row["threads"], row["batch"]) == (1, 1)]
    if not own or not peak:
        return _goal(name, wanted, None, None, "not measured")
    floor_ms = 1e3 * arithmetic / peak
    distance = own[0]["p50_ms"] / floor_ms
    against = f"{arithmetic / 1e6:.1f} M multiply-adds at {peak / 1e9:.1f} G/s: {floor_ms:.2f} ms"
    return _goal(name, wanted, {"value": distance}, distance <= wanted, against)


def _goal(
    name: str, wanted: float, reached: dict[str, float] | None, met: bool | None, against: str
) -> dict[str, Any]:
    return {"goal": name, "wanted": wanted, "reached": reached, "met": met, "against": against}


def warnings(cases: Sequence[Row]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    busy = sum(row["busy"] for row in cases)
    if busy:
        found.append(
            f"the machine was busy: {busy} of {len(cases)} rows vary more than on an idle machine; "
            "measure again"
        )
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The result as text: goals, a table for each kind of work, settings, what is missing."""
    config = result["config"]
    side = config["input_size"]
    versions = " · ".join(f"{name} {version}" for name, version in result["packages"].items())
    lines = [
        headline(result),
        "",
        versions,
        "",
        f"{side}x{side}; a call is the same work for all: from uint8 pictures in memory to logits, "
        'normalisation included. Random weights throughout. "Ours is faster": median of the row by '
        'ours, the faster of ours where there are two. "Difference": of the logits from what '
        f"PyTorch computes, by the largest; above {MAX_DIFFERENCE:g} a row is not ranked. "
        '"CPUs": CPU time by time, which shows that the threads are as many as they should be.',
        "",
        *_goal_lines(result["goals"]),
    ]
    works = dict.fromkeys((row["batch"], row["threads"]) for row in result["cases"])
    for batch, threads in works:
        rows = [r for r in result["cases"] if (r["batch"], r["threads"]) == (batch, threads)]
        lines += _work_lines(Work(threads, batch), rows)
    lines += ["## Settings", ""]
    lines += [f"- **{name}**: {setting}" for name, setting in result["settings"].items()]
    if result["absent"]:
        lines += ["", "## Not measured here", ""]
        lines += [
            f"- {one['model']} on {one['backend']}: {one['reason']}" for one in result["absent"]
        ]
    lines += ["", *(f"Warning: {warning}." for warning in result["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def _goal_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| goal | wanted | reached | met | against |", "|---|---|---|---|---|"]
    for entry in entries:
        met = {True: "yes", False: "**no**", None: "-"}[entry["met"]]
        reached = _ratio(entry["reached"])
        lines.append(
            f"| {entry['goal']} | {entry['wanted']:g} | {reached} | {met} | {entry['against']} |"
        )
    return [*lines, ""]


def _work_lines(work: Work, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {work.name[0].upper()}{work.name[1:]}",
        "",
        "| network | with | p50, ms | p90 | min | images/s | ours is faster (95 %) | difference "
        "| CPUs | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["group"] != SAME, row["p50_ms"])):
        difference = row["max_difference"]
        cells = [
            row["model"],
            f"**{row['backend']}**" if row["is_ours"] else row["backend"],
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "min_ms")),
            f"{row['images_per_second']:.0f}",
            _ratio(row["ours_faster"]),
            "not finite" if difference is None else f"{difference:.1e}",
            f"{row['cpus']:.2f}",
            row["note"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ratio(ratio: dict[str, float] | None) -> str:
    """``1.23 (1.20 to 1.25)``."""
    if ratio is None:
        return "-"
    interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['value']:.2f}{interval}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    run_command(main)
