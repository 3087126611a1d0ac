"""What the runtime costs beside the library that it wraps: start, calls, pictures, memory.

``python benchmarks/runtime.py``. Everything is compared with the least that a program could do with
numpy, Pillow and ONNX Runtime alone, and the two take turns in one run, in random order:

* *start*: a new process, to the label of a photograph of 224 pixels by the bundled model;
* *calls*: ``predictor(array)`` beside ``session.run``, the array being of the model's size, so that
  both are given the same pixels; what resizing any other array costs is a row of its own;
* *pictures*: from the bytes of a JPEG file to a label, with its parts;
* *batches*: 32 faces in one call beside 32 calls;
* *memory*: a process that predicts 100,000 times.

Processes find the code's bytecode compiled, as an installed package's is, and every file in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure.inputs import in_turn, make_batches, make_jpegs
from benchmarks.measure.networks import DEPLOY, Network, random_network
from benchmarks.measure.processes import Run, predict_often, run_fresh, run_job
from benchmarks.measure.sessions import open_session
from benchmarks.report.publish import run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.command import option, run_command
from efficientface_deploy.predictor import BUNDLED_ONNX, Predictor, load
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import UInt8Array, load_image, resize
from efficientface_deploy.workbench.environment import usable_cpus
from efficientface_deploy.workbench.timing import Call, Samples, interleave, measure, speedup

HEAVY = ("torch", "torchvision", "cv2", "onnx", "matplotlib", "scipy")
BATCH = 32

_SETTLING = 0.2  # of the memory's samples: the library still fills its pools
_SAMPLES = 200
_PICTURES = 16

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
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = option(
        None, metavar="DIR", help="folder of the result (default: a new one in benchmarks/results)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/runtime.py``."""
    return run_benchmark("runtime", RuntimeConfig, run, argv, __doc__)


def run(config: RuntimeConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    result = new_result("runtime", config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = folder / "photo.jpg"
        photo.write_bytes(make_jpegs(config.seed)[0])
        announce("cold starts")
        result["start"] = measure_starts(config, photo, folder)
        result |= measure_calls(config, photo, folder)
        announce(f"memory over {config.predictions} predictions")
        result["memory"] = measure_memory(config, photo, folder)
    return {**result, "goals": goals(result)}


def announce(what: str) -> None:
    """Say on a terminal what is being measured."""
    if sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr)


# ---- start


def measure_starts(config: RuntimeConfig, photo: Path, folder: Path) -> dict[str, Any]:
    """From starting Python to a label, by the runtime and by a bare script."""
    with load(BUNDLED_ONNX) as predictor:
        side = predictor.spec.input_size
    names = {"photo": str(photo), "model": str(BUNDLED_ONNX), "side": side}
    scripts = {"runtime": _OURS.format(**names), "bare": _BARE.format(**names)}
    bytecode = folder / "bytecode"
    for script in scripts.values():
        run_fresh(script, bytecode=bytecode)  # compiles, and brings the files into memory
    runs: dict[str, list[Run]] = {name: [] for name in scripts}
    for _, name in interleave(scripts, config.starts, config.seed):
        runs[name].append(run_fresh(scripts[name], bytecode=bytecode))
    samples = {
        name: Samples(np.array([[run.answer_ns] for run in own])) for name, own in runs.items()
    }
    rows = {name: describe_start(samples[name], own) for name, own in runs.items()}
    return {**rows, "ratio": speedup(samples["runtime"], samples["bare"])}


def describe_start(samples: Samples, runs: Sequence[Run]) -> dict[str, Any]:
    """Time, memory and imports of a start."""
    modules = set().union(*(run.modules for run in runs))
    return {
        **samples.figures(),
        "peak_mb": max(run.peak_kb or 0 for run in runs) * 1024 / 1e6,
        "modules": len(modules),
        "heavy": sorted(modules & set(HEAVY)),
    }


# ---- calls, batches, pictures


def measure_calls(config: RuntimeConfig, photo: Path, folder: Path) -> dict[str, Any]:
    """Everything that is timed within this process, in one interleaved measurement."""
    spec = preset("rafdb").replace(input_size=config.input_size, name="random weights")
    network = Network(spec.name, random_network(spec, config.seed), spec, folder)
    calls, batches = {}, {}  # by side and threads; by threads
    with contextlib.ExitStack() as stack:
        for path in (network.onnx(DEPLOY), BUNDLED_ONNX):
            for threads in sorted({1, usable_cpus()}):
                predictor = stack.enter_context(load(path, threads=threads))
                side = predictor.spec.input_size
                calls[side, threads] = call_parts(predictor, threads, config.seed)
                if path == BUNDLED_ONNX:
                    batches[threads] = batch_parts(predictor, config.seed)
        single = stack.enter_context(load(BUNDLED_ONNX, threads=1))
        pictures = picture_parts(single, photo.read_bytes())
        groups = {
            **{f"calls {key}": parts for key, parts in calls.items()},
            **{f"batches {key}": parts for key, parts in batches.items()},
            "pictures": pictures,
        }
        found = measure_groups(groups, config)
    return {
        "calls": [describe_calls(*key, found[f"calls {key}"]) for key in calls],
        "batches": [describe_batches(key, found[f"batches {key}"]) for key in batches],
        "pictures": figures(found["pictures"]),
    }


def measure_groups(
    groups: Mapping[str, Mapping[str, Call]], config: RuntimeConfig
) -> dict[str, dict[str, Samples]]:
    """The samples of each part of each group; all parts take turns."""
    parts = {(group, part): call for group in groups for part, call in groups[group].items()}
    announce(f"{len(parts)} rows, {len(parts) * config.seconds:.0f} s or more")
    samples = measure(
        {", ".join(key): call for key, call in parts.items()},
        seconds=config.seconds,
        rounds=config.rounds,
        seed=config.seed,
    )
    return {
        group: {part: samples[f"{group}, {part}"] for part in own} for group, own in groups.items()
    }


def describe_calls(side: int, threads: int, found: Mapping[str, Samples]) -> dict[str, Any]:
    """A row for the predictor beside a session."""
    ratio = speedup(found["predictor"], found["session"])
    return {"input_size": side, "threads": threads, **figures(found), "ratio": ratio}


def describe_batches(threads: int, found: Mapping[str, Samples]) -> dict[str, Any]:
    """A row for a batch beside single faces."""
    rates = {
        part: {**row, "images_per_second": 1000 * BATCH / row["p50_ms"]}
        for part, row in figures(found).items()
    }
    return {"threads": threads, "gain": speedup(found["singles"], found["batch"]), **rates}


def figures(samples: Mapping[str, Samples]) -> dict[str, dict[str, Any]]:
    """What a result says of each part."""
    return {name: own.figures() for name, own in samples.items()}


def call_parts(predictor: Predictor, threads: int, seed: int) -> dict[str, Call]:
    """The predictor beside a session of the same file, threads and pixels."""
    side = predictor.spec.input_size
    batches = make_batches(side, 1, seed, _PICTURES)
    pictures = [batch[0] for batch in batches]
    larger = [batch[0] for batch in make_batches(side + side // 4, 1, seed, _PICTURES)]
    session = open_session(predictor.path, threads)

    def run_session(batch: UInt8Array) -> None:
        session.run(OUTPUTS, {UINT8_INPUT: batch})

    return {
        "session": in_turn(run_session, batches),
        "predictor": in_turn(predictor, pictures),
        "preprocess": in_turn(predictor.preprocess, pictures),
        "preprocess_larger": in_turn(predictor.preprocess, larger),
    }


def batch_parts(predictor: Predictor, seed: int) -> dict[str, Call]:
    """32 faces at once, and one after the other."""
    faces = list(make_batches(predictor.spec.input_size, BATCH, seed, 1)[0])

    def singles() -> None:
        for face in faces:
            predictor(face)

    return {"batch": in_turn(predictor.predict_batch, [faces]), "singles": singles}


def picture_parts(predictor: Predictor, jpeg: bytes) -> dict[str, Call]:
    """The parts of a prediction from the bytes of a file, and the whole."""
    return {
        "decode": in_turn(load_image, [jpeg]),
        "resize": in_turn(lambda image: resize(image, predictor.spec), [load_image(jpeg)]),
        "infer": in_turn(predictor.infer, [predictor.preprocess(jpeg)[None]]),
        "whole": in_turn(predictor, [jpeg]),
    }


# ---- memory


def measure_memory(config: RuntimeConfig, photo: Path, folder: Path) -> dict[str, Any]:
    """Memory of a process that does nothing but predict."""
    job = {"predictions": config.predictions, "samples": _SAMPLES, "threads": 1}
    found = run_job(predict_often, {**job, "photo": str(photo)}, bytecode=folder / "bytecode")
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
    first = int(len(rss_kb) * _SETTLING)
    counts, memory = np.asarray(predictions[first:], float), np.asarray(rss_kb[first:], float)
    slope = np.polyfit(counts / 1000, memory, 1)[0]
    return {
        "kb_per_thousand": float(slope),
        "settled_kb": float(memory[0]),
        "end_kb": float(memory[-1]),
        "used_samples": len(memory),
    }


# ---- goals


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was found."""
    start, memory = result["start"], result["memory"]
    found = [
        ("start by the bare script's", start["ratio"]["value"], 1.15),
        ("peak memory of a start, MB", start["runtime"]["peak_mb"], 110.0),
        ("large libraries imported", len(start["runtime"]["heavy"]), 0),
    ]
    for row in result["calls"]:
        kind = f"{row['input_size']}x{row['input_size']}, {row['threads']} threads"
        found.append((f"call by session.run, {kind}", row["ratio"]["value"], 1.08))
    found.append(("memory, kB a thousand predictions", memory["kb_per_thousand"], 1.0))
    return [
        {"name": name, "found": value, "at_most": limit, "met": value <= limit}
        for name, value, limit in found
    ]


if __name__ == "__main__":
    run_command(main)
