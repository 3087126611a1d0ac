"""What the runtime costs beside the library that it wraps: start, calls, pictures, memory.

``python benchmarks/runtime.py``. Everything is compared with the least that a program could do with
numpy, Pillow and ONNX Runtime alone, and the two take turns in one run, in random order:

* *start*: a new process, to the label of a photograph of 224 pixels by the bundled model;
* *calls*: ``predictor(array)`` beside ``session.run``, the array being of the model's size, so that
  both are given the same pixels; what resizing any other array costs is a row of its own;
* *pictures*: from the bytes of a JPEG file to a label, with its parts;
* *batches*: 32 faces in one call beside 32 calls;
* *memory*: a process that predicts 100,000 times;
* *settings*: how ONNX Runtime is best set up, each setting in processes of its own.

Processes find the code's bytecode compiled, as an installed package's is, and every file in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnxruntime

from benchmarks import ROOT
from benchmarks.graph_layouts import VARIANTS, GraphsConfig, write_graphs
from benchmarks.measure.inputs import make_jpegs
from benchmarks.probe import PEAK_RSS, memory_kb
from benchmarks.report.__main__ import headline, write_result
from benchmarks.report.result import default_folder, new_result
from benchmarks.report.tables import console, require_libraries
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.files import write_text
from efficientface_deploy.predictor import BUNDLED_ONNX, Predictor, load
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import UInt8Array, load_image, resize
from efficientface_deploy.workbench.environment import usable_cpus
from efficientface_deploy.workbench.timing import Call, Samples, measure, speedup
from efficientface_export.graph.io import write_onnx

START_GOAL = 1.15  # times the bare script's
PEAK_GOAL_MB = 110.0
OVERHEAD_GOAL = 1.08  # times session.run's
GROWTH_GOAL_KB = 1.0  # a thousand predictions

HEAVY = ("torch", "torchvision", "cv2", "onnx", "matplotlib", "scipy")
BATCH = 32

_SKIPPED = 0.2  # of the memory's samples: the library still fills its pools
_SAMPLES = 200
_PICTURES = 16
_SETTING_CALLS = 120
_PAUSE_S = 0.01  # between calls, as a camera has them; spinning threads have stopped by then

_OURS = """
import efficientface_deploy as ef
print(ef.load()({photo!r}).label, flush=True)
"""
_BARE = """
import numpy
import onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
photo = Image.open({photo!r}).convert("RGB").resize(({side}, {side}), Image.Resampling.BILINEAR)
outputs = session.run(["probabilities"], {{"image": numpy.asarray(photo)[None]}})
print(outputs[0].argmax(), flush=True)
"""
_AFTER = """
import sys
print(" ".join(sys.modules), flush=True)
sys.stdin.read()
"""

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Options of ``python benchmarks/runtime.py``."""

    starts: int = option(40, metavar="N", minimum=3, help="new processes of each kind")
    seconds: float = option(4.0, metavar="S", minimum=0, help="timed calls for each row")
    rounds: int = option(20, metavar="N", minimum=3, help="turns of each row")
    predictions: int = option(
        100_000, metavar="N", minimum=10, help="predictions of the process whose memory is watched"
    )
    input_size: int = option(
        224, minimum=32, help="side of the network with random weights, beside the bundled one"
    )
    settings: int = option(
        5,
        metavar="N",
        minimum=0,
        help="processes for each setting of ONNX Runtime; 0 leaves it out",
    )
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to set up ONNX Runtime; the defaults are the library's.

    Attributes:
        threads: Of one inference; None leaves the choice to the library.
        arena: Whether the CPU's memory is kept in an arena.
        level: Of graph optimisation: ``none``, ``basic``, ``extended`` or ``all``.
        spinning: Whether threads wait for work by spinning.
    """

    threads: int | None = None
    arena: bool = True
    level: str = "all"
    spinning: bool = True

    @property
    def name(self) -> str:
        """What differs from the library's defaults."""
        parts = [] if self.threads is None else [f"{self.threads} threads"]
        parts += [] if self.arena else ["no arena"]
        parts += [] if self.level == "all" else [f"optimisation {self.level}"]
        parts += [] if self.spinning else ["no spinning"]
        return ", ".join(parts) or "the library's defaults"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/runtime.py``."""
    config = parse_config(
        RuntimeConfig, argv, prog="benchmarks/runtime.py", description=__doc__ or ""
    )
    require_libraries()
    result = run(config)
    folder = config.out or default_folder(result)
    write_result(result, folder / "runtime.json")
    table = as_markdown(result)
    write_text(folder / "runtime.md", table)
    output = console()
    output.print(table, markup=False, soft_wrap=True)
    output.print(f"wrote runtime.json and runtime.md to {folder}", markup=False)
    return 0


def run(config: RuntimeConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    result = new_result("runtime", config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = folder / "photo.jpg"
        photo.write_bytes(make_jpegs(config.seed)[0])
        announce("cold starts")
        result["start"] = measure_starts(config, photo, folder)
        result |= measure_calls(config, photo, write_random_model(config, folder))
        announce(f"memory over {config.predictions} predictions")
        result["memory"] = measure_memory(config, photo, folder)
        if config.settings:
            announce("settings")
            result["settings"] = measure_settings(config, folder)
    return {**result, "goals": judge(result)}


def announce(what: str) -> None:
    """Say on a terminal what is being measured."""
    if sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr)


# ---- start


def bundled_side() -> int:
    """Side of the bundled model's input."""
    with load(BUNDLED_ONNX) as predictor:
        return predictor.spec.input_size


def measure_starts(config: RuntimeConfig, photo: Path, folder: Path) -> dict[str, Any]:
    """From starting Python to a label, by the runtime and by a bare script."""
    names = {"photo": str(photo), "model": str(BUNDLED_ONNX), "side": bundled_side()}
    scripts = {"runtime": _OURS.format(**names), "bare": _BARE.format(**names)}
    for script in scripts.values():
        start_once(script, folder)  # compiles the bytecode, and brings the files into memory
    durations = {name: np.zeros((config.starts, 1), dtype=np.int64) for name in scripts}
    peaks: dict[str, list[int]] = {name: [] for name in scripts}
    modules: dict[str, set[str]] = {name: set() for name in scripts}
    for row, name in interleaved(scripts, config.starts, config.seed):
        durations[name][row, 0], peak, imported = start_once(scripts[name], folder)
        peaks[name].append(peak)
        modules[name] |= imported
    samples = {name: Samples(values) for name, values in durations.items()}
    rows = {
        name: {
            **describe(samples[name]),
            "peak_mb": max(peaks[name]) * 1024 / 1e6,
            "modules": len(modules[name]),
            "heavy": sorted(modules[name] & set(HEAVY)),
        }
        for name in scripts
    }
    return {**rows, "ratio": ratio(samples["runtime"], samples["bare"])}


def start_once(script: str, folder: Path) -> tuple[int, int, set[str]]:
    """Run a script: nanoseconds to its first line, peak memory there in kB, imported modules."""
    began = time.perf_counter_ns()
    with subprocess.Popen(
        [sys.executable, "-c", script + _AFTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(folder),
    ) as process:
        assert process.stdout is not None
        label = process.stdout.readline()
        took = time.perf_counter_ns() - began
        modules = process.stdout.readline().split()
        if not label.strip() or not modules:
            raise RuntimeError(f"a started process gave no label:\n{script}")
        return took, memory_kb(PEAK_RSS, process.pid), set(modules)


def environment(folder: Path) -> dict[str, str]:
    """The variables of a started process: it finds this code, and its bytecode compiled."""
    changed = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **changed}


def interleaved(items: Mapping[str, Item], rounds: int, seed: int) -> Iterator[tuple[int, str]]:
    """Every name once in each round, the order drawn anew: (round, name)."""
    order = np.random.default_rng(seed)
    names = list(items)
    for row in range(rounds):
        for index in order.permutation(len(names)):
            yield row, names[index]


# ---- calls, pictures, batches


def write_random_model(config: RuntimeConfig, folder: Path) -> Path:
    """The exporter's ONNX file of a network with random weights."""
    options = GraphsConfig(input_size=config.input_size, seed=config.seed)
    graph = write_graphs(options, {"cpu": VARIANTS["cpu"]})["cpu"]
    path = folder / "random.onnx"
    spec = preset("rafdb").replace(input_size=config.input_size, name="random weights")
    write_onnx(graph, path, spec, {"precision": "fp32", "target": "cpu"})
    return path


def measure_calls(config: RuntimeConfig, photo: Path, random_model: Path) -> dict[str, Any]:
    """Everything that is timed within this process, in one interleaved measurement."""
    threads = sorted({1, usable_cpus()})
    with contextlib.ExitStack() as stack:
        cases = [
            (stack.enter_context(load(path, threads=count)), count)
            for path in (random_model, BUNDLED_ONNX)
            for count in threads
        ]
        calls: dict[str, Call] = {}
        for predictor, count in cases:
            calls |= call_rows(predictor, count, config.seed)
        bundled = [
            (predictor, count) for predictor, count in cases if predictor.path != random_model
        ]
        for predictor, count in bundled:
            calls |= batch_rows(predictor, count, config.seed)
        calls |= picture_rows(bundled[0][0], photo.read_bytes())
        announce(f"{len(calls)} rows, {len(calls) * config.seconds:.0f} s or more")
        samples = measure(calls, seconds=config.seconds, rounds=config.rounds, seed=config.seed)
        sizes = [(predictor.spec.input_size, count) for predictor, count in cases]
    return {
        "calls": [describe_calls(samples, *size) for size in sizes],
        "batches": [describe_batches(samples, count) for _, count in bundled],
        "pictures": {
            part: describe(samples[f"picture, {part}"])
            for part in ("decode", "resize", "infer", "whole")
        },
    }


def call_rows(predictor: Predictor, threads: int, seed: int) -> dict[str, Call]:
    """The predictor beside a session of the same file, threads and pixels."""
    side = predictor.spec.input_size
    pictures = make_pictures(side, side, seed)
    larger = make_pictures(side + side // 4, side + side // 4, seed)
    session = open_session(predictor.path, threads)

    def run_session(batch: UInt8Array) -> None:
        session.run(OUTPUTS, {UINT8_INPUT: batch})

    kind = f"{side}, {threads} threads"
    return {
        f"{kind}, session": in_turn(run_session, [picture[None] for picture in pictures]),
        f"{kind}, predictor": in_turn(predictor, pictures),
        f"{kind}, preprocess": in_turn(predictor.preprocess, pictures),
        f"{kind}, preprocess larger": in_turn(predictor.preprocess, larger),
    }


def batch_rows(predictor: Predictor, threads: int, seed: int) -> dict[str, Call]:
    """32 faces at once, and one after the other."""
    side = predictor.spec.input_size
    pictures = make_pictures(side, side, seed)
    faces = list(itertools.islice(itertools.cycle(pictures), BATCH))

    def batch() -> None:
        predictor.predict_batch(faces)

    def singles() -> None:
        for face in faces:
            predictor(face)

    return {f"{threads} threads, batch": batch, f"{threads} threads, singles": singles}


def picture_rows(predictor: Predictor, jpeg: bytes) -> dict[str, Call]:
    """The parts of a prediction from the bytes of a file, and the whole."""
    image = load_image(jpeg)
    batch = predictor.preprocess(jpeg)[None]
    return {
        "picture, decode": in_turn(load_image, [jpeg]),
        "picture, resize": in_turn(lambda picture: resize(picture, predictor.spec), [image]),
        "picture, infer": in_turn(predictor.infer, [batch]),
        "picture, whole": in_turn(predictor, [jpeg]),
    }


def in_turn(function: Callable[[Any], object], inputs: Sequence[Any]) -> Call:
    """A call with the next of several inputs."""
    endless = itertools.cycle(inputs)

    def call() -> None:
        function(next(endless))

    return call


def make_pictures(height: int, width: int, seed: int) -> list[UInt8Array]:
    """Noise, uint8 (H, W, 3) each; what the pixels show changes no network's arithmetic."""
    shape = (_PICTURES, height, width, 3)
    return list(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime with its defaults but for the threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def describe(samples: Samples) -> dict[str, Any]:
    """One row of figures."""
    return {
        "count": samples.count,
        "p50_ms": samples.p50_ms,
        "p90_ms": samples.p90_ms,
        "min_ms": samples.min_ms,
        "busy": samples.busy,
    }


def ratio(own: Samples, base: Samples) -> dict[str, float]:
    """Ratio of medians with its 95 % interval; above 1 ``own`` takes longer."""
    return dataclasses.asdict(speedup(own, base))


def describe_calls(samples: Mapping[str, Samples], side: int, threads: int) -> dict[str, Any]:
    """A predictor's calls beside a session's."""
    kind = f"{side}, {threads} threads"
    own, base = samples[f"{kind}, predictor"], samples[f"{kind}, session"]
    return {
        "input_size": side,
        "threads": threads,
        "session": describe(base),
        "predictor": describe(own),
        "ratio": ratio(own, base),
        "preprocess": describe(samples[f"{kind}, preprocess"]),
        "preprocess_larger": describe(samples[f"{kind}, preprocess larger"]),
    }


def describe_batches(samples: Mapping[str, Samples], threads: int) -> dict[str, Any]:
    """Images a second, in batches and one by one."""
    batch, singles = samples[f"{threads} threads, batch"], samples[f"{threads} threads, singles"]
    return {
        "threads": threads,
        "batch": {**describe(batch), "images_per_second": 1000 * BATCH / batch.p50_ms},
        "singles": {**describe(singles), "images_per_second": 1000 * BATCH / singles.p50_ms},
        "gain": ratio(singles, batch),
    }


# ---- memory


def measure_memory(config: RuntimeConfig, photo: Path, folder: Path) -> dict[str, Any]:
    """Memory of a process that does nothing but predict."""
    job = {
        "predictions": config.predictions,
        "samples": _SAMPLES,
        "photo": str(photo),
        "threads": 1,
    }
    found = probe("memory", job, folder)
    return {**found, **growth(found["predictions"], found["rss_kb"])}


def growth(predictions: Sequence[int], rss_kb: Sequence[int]) -> dict[str, float]:
    """How the memory grows once the process has settled.

    Args:
        predictions: Made until each sample.
        rss_kb: Memory there, kB.

    Returns:
        The slope of the least-squares line in kB for a thousand predictions, the first fifth of the
        samples left out; the memory at the beginning and the end of the others; how many they are.
    """
    first = int(len(rss_kb) * _SKIPPED)
    counts, memory = np.asarray(predictions[first:], float), np.asarray(rss_kb[first:], float)
    slope = np.polyfit(counts / 1000, memory, 1)[0]
    return {
        "kb_per_thousand": float(slope),
        "settled_kb": float(memory[0]),
        "end_kb": float(memory[-1]),
        "used_samples": len(memory),
    }


def probe(job: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job of ``benchmarks/probe.py`` in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "probe.py"), job, json.dumps(options)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- settings


def plan_settings() -> list[Setting]:
    """The library's defaults, each change of them alone, and the changes that go together."""
    cores = usable_cpus()
    alone = [Setting(), Setting(threads=1), Setting(threads=cores), Setting(arena=False)]
    alone += [Setting(level=level) for level in ("none", "basic", "extended")]
    together = [
        Setting(spinning=False),
        Setting(threads=1, arena=False),
        Setting(threads=cores, spinning=False),
        Setting(threads=1, level="extended"),
        Setting(threads=1, level="basic"),
    ]
    return list({setting.name: setting for setting in alone + together}.values())


def measure_settings(config: RuntimeConfig, folder: Path) -> list[dict[str, Any]]:
    """Each setting in processes of its own, which take turns."""
    settings = {setting.name: setting for setting in plan_settings()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    job = {
        "model": str(BUNDLED_ONNX),
        "side": bundled_side(),
        "calls": _SETTING_CALLS,
        "pause_s": _PAUSE_S,
    }
    for _, name in interleaved(settings, config.settings, config.seed):
        options = {**job, **dataclasses.asdict(settings[name])}
        found[name].append(probe("setting", options, folder))
    default = next(iter(found.values()))
    return [describe_setting(settings[name], rows, default) for name, rows in found.items()]


def describe_setting(
    setting: Setting, rows: Sequence[dict[str, Any]], default: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """One setting: medians over its processes, and its time by that of the defaults."""

    def median(key: str) -> float:
        return float(np.median([row[key] for row in rows]))

    def calls(of: Sequence[dict[str, Any]]) -> Samples:
        return Samples((1e6 * np.array([row["calls_ms"] for row in of])).astype(np.int64))

    return {
        "name": setting.name,
        **dataclasses.asdict(setting),
        "start_ms": median("start_ms"),
        "p50_ms": median("calls_ms"),
        "ratio": ratio(calls(rows), calls(default)),
        "paced_p50_ms": median("paced_ms"),
        "cpu_ms": median("cpu_ms"),
        "paced_cpu_ms": median("paced_cpu_ms"),
        "rss_mb": median("rss_kb") * 1024 / 1e6,
        "batch_peak_mb": median("batch_peak_kb") * 1024 / 1e6,
    }


# ---- the result


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was found."""
    start = result["start"]
    goals = [
        ("start by the bare script's", start["ratio"]["value"], START_GOAL),
        ("peak memory of a start, MB", start["runtime"]["peak_mb"], PEAK_GOAL_MB),
        ("large libraries imported", len(start["runtime"]["heavy"]), 0),
    ]
    goals += [
        (
            f"call by session.run, {row['input_size']}x{row['input_size']}, "
            f"{row['threads']} threads",
            row["ratio"]["value"],
            OVERHEAD_GOAL,
        )
        for row in result["calls"]
    ]
    memory = result["memory"]["kb_per_thousand"]
    goals.append(("memory, kB a thousand predictions", memory, GROWTH_GOAL_KB))
    return [
        {"name": name, "found": found, "at_most": limit, "met": found <= limit}
        for name, found, limit in goals
    ]


def as_markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    parts = [
        headline(result),
        goals_table(result["goals"]),
        start_table(result["start"]),
        calls_table(result["calls"]),
        pictures_table(result["pictures"]),
        batches_table(result["batches"]),
        memory_line(result["memory"]),
    ]
    if "settings" in result:
        parts.append(settings_table(result["settings"]))
    if is_busy(result):
        parts.append("The machine was busy with something else: read the times with care.")
    return "\n\n".join(parts) + "\n"


def is_busy(result: Mapping[str, Any]) -> bool:
    """Whether the calls varied too much to be trusted."""
    rows = [row[part] for row in result["calls"] for part in ("session", "predictor")]
    return any(row["busy"] for row in [*rows, *result["pictures"].values()])


def goals_table(goals: Sequence[Mapping[str, Any]]) -> str:
    """What was aimed at."""
    rows = [
        [
            row["name"],
            f"{row['found']:.4g}",
            f"{row['at_most']:g}",
            "yes" if row["met"] else "**no**",
        ]
        for row in goals
    ]
    return markdown(["goal", "found", "at most", "met"], rows)


def start_table(start: Mapping[str, Any]) -> str:
    """From starting Python to a label."""
    rows = [
        [
            name,
            f"{row['p50_ms']:.0f}",
            f"{row['min_ms']:.0f}",
            f"{row['peak_mb']:.1f}",
            str(row["modules"]),
            ", ".join(row["heavy"]) or "none",
        ]
        for name, row in start.items()
        if name != "ratio"
    ]
    head = ["start to label", "p50, ms", "minimum, ms", "peak, MB", "modules", "large libraries"]
    return markdown(head, rows) + f"\n\nThe runtime by the bare script: {interval(start['ratio'])}."


def calls_table(calls: Sequence[Mapping[str, Any]]) -> str:
    """One call, an array of the model's size."""
    rows = [
        [
            f"{row['input_size']}x{row['input_size']}",
            str(row["threads"]),
            f"{row['session']['p50_ms']:.3f}",
            f"{row['predictor']['p50_ms']:.3f}",
            interval(row["ratio"]),
            f"{1000 * row['preprocess']['p50_ms']:.1f}",
            f"{1000 * row['preprocess_larger']['p50_ms']:.1f}",
        ]
        for row in calls
    ]
    head = ["array", "threads", "session.run, ms", "predictor, ms", "ratio (95 %)"]
    head += ["preprocess, us", "preprocess, a quarter larger, us"]
    return markdown(head, rows)


def pictures_table(pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """The bytes of a file to a label."""
    rows = [
        [name, f"{row['p50_ms']:.3f}", f"{row['p90_ms']:.3f}"] for name, row in pictures.items()
    ]
    return markdown(["JPEG, 224 pixels, bundled model, 1 thread", "p50, ms", "p90, ms"], rows)


def batches_table(batches: Sequence[Mapping[str, Any]]) -> str:
    """32 faces at once and one by one."""
    rows = [
        [
            str(row["threads"]),
            f"{row['batch']['images_per_second']:.0f}",
            f"{row['singles']['images_per_second']:.0f}",
            interval(row["gain"]),
        ]
        for row in batches
    ]
    return markdown(["threads", f"images/s, batch {BATCH}", "one by one", "gain (95 %)"], rows)


def memory_line(memory: Mapping[str, Any]) -> str:
    """How the memory grew."""
    verdict = "no growth" if memory["kb_per_thousand"] <= GROWTH_GOAL_KB else "it grows"
    return (
        f"Memory over {memory['predictions'][-1]} predictions: "
        f"{memory['kb_per_thousand']:+.3f} kB a thousand, "
        f"{memory['settled_kb'] / 1024:.1f} MiB after the first fifth and "
        f"{memory['end_kb'] / 1024:.1f} MiB at the end: {verdict}."
    )


def settings_table(settings: Sequence[Mapping[str, Any]]) -> str:
    """ONNX Runtime set up in other ways; processor time tells what spinning burns."""
    rows = [
        [
            row["name"],
            f"{row['start_ms']:.0f}",
            f"{row['p50_ms']:.3f}",
            interval(row["ratio"]),
            f"{row['cpu_ms']:.2f}",
            f"{row['paced_p50_ms']:.3f}",
            f"{row['paced_cpu_ms']:.2f}",
            f"{row['rss_mb']:.1f}",
            f"{row['batch_peak_mb']:.1f}",
        ]
        for row in settings
    ]
    head = ["ONNX Runtime, bundled model", "open and first call, ms", "call, ms", "by the defaults"]
    head += [
        "CPU of a call, ms",
        "call after 10 ms, ms",
        "its CPU, ms",
        "MB",
        f"peak, batch {BATCH}",
    ]
    return markdown(head, rows)


def interval(values: Mapping[str, float]) -> str:
    """``1.03 (1.02 to 1.05)``."""
    return f"{values['value']:.3f} ({values['low']:.3f} to {values['high']:.3f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    run_command(main)
