"""What the runtime costs beside the library that it wraps: start, calls, pictures, memory.

``python benchmarks/runtime.py``. Everything is compared with the least that a program could do with
numpy, Pillow and ONNX Runtime alone, and the two take turns in one run, in random order:

* *start*: a new process, to the label of a photograph of 224 pixels by the bundled model; with and
  without the check by the file's probe;
* *calls*: ``predictor(array)`` beside ``session.run``, the array being of the model's size, so that
  both are given the same pixels; what resizing any other array costs is a row of its own;
* *pictures*: from the bytes of a JPEG file to a label, with its parts; and of a photograph;
* *batches*: 32 faces in one call beside 32 calls;
* *memory*: a process that predicts 100,000 times.

Processes find the code's bytecode compiled, as an installed package's is, and every file in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.runtime", "cpu,export,bench")

import numpy as np
from PIL import Image

from benchmarks.measure.inputs import make_batches, make_jpegs
from benchmarks.measure.networks import DEPLOY, efficientface
from benchmarks.measure.processes import Run, predict_often, run_fresh, run_job
from benchmarks.measure.sessions import open_session
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.command import option
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.predictor import BUNDLED_ONNX, CHECK_VARIABLE, load
from efficientface_deploy.vision.preprocess import load_image, resize
from efficientface_deploy.workbench.timing import (
    Call,
    Samples,
    in_turn,
    interleave,
    measure,
    speedup,
)

HEAVY = ("torch", "torchvision", "cv2", "onnx", "matplotlib", "scipy")
BATCH = 32
PHOTOGRAPH = (640, 480)  # pixels

_SETTLING = 0.2  # of the memory's samples: the library still fills its pools
_SAMPLES = 200
_PICTURES = 16
_THREADS = sorted({1, usable_cpus()})

Row = dict[str, Any]

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

    starts: int = option(40, metavar="N", minimum=3, help="new processes of each kind", first=True)
    seconds: float = option(
        4.0, metavar="S", minimum=0.001, help="timed calls for each row", first=True
    )
    rounds: int = option(20, metavar="N", minimum=3, help="turns of each row")
    predictions: int = option(
        100_000, metavar="N", minimum=10, help="predictions of the process whose memory is watched"
    )
    input_size: int = option(
        224, minimum=32, help="side of the network with random weights, beside the bundled one"
    )
    seed: int = option(0, minimum=0, help="of weights, pictures and order")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/runtime.py``."""
    return run_benchmark("runtime", RuntimeConfig, run, argv, __doc__, "--starts 10 --seconds 1")


def run(config: RuntimeConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    result = new_result("runtime", config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = folder / "photo.jpg"
        photo.write_bytes(make_jpegs(config.seed)[0])
        print("measuring cold starts", file=sys.stderr)
        result["start"] = measure_starts(config, photo, folder)
        print("measuring calls", file=sys.stderr)
        result["calls"] = measure_calls(config, folder)
        result["batches"] = measure_batches(config)
        result["pictures"] = measure_pictures(config, photo.read_bytes())
        print(f"measuring memory over {config.predictions} predictions", file=sys.stderr)
        result["memory"] = measure_memory(config, photo, folder)
    return {**result, "goals": goals(result)}


# ---- start


def measure_starts(config: RuntimeConfig, photo: Path, folder: Path) -> dict[str, Any]:
    """From starting Python to a label, by the runtime and by a bare script."""
    with load(BUNDLED_ONNX) as predictor:
        side = predictor.spec.input_size
    names = {"photo": str(photo), "model": str(BUNDLED_ONNX), "side": side}
    ours = _OURS.format(**names)
    scripts = {"runtime": ours, "unchecked": ours, "bare": _BARE.format(**names)}
    variables = {"unchecked": {CHECK_VARIABLE: "0"}}
    bytecode = folder / "bytecode"
    for script in scripts.values():
        run_fresh(script, bytecode=bytecode)  # compiles, and brings the files into memory
    runs: dict[str, list[Run]] = {name: [] for name in scripts}
    for _, name in interleave(scripts, config.starts, config.seed):
        run = run_fresh(scripts[name], bytecode=bytecode, environment=variables.get(name))
        runs[name].append(run)
    samples = {
        name: Samples(np.array([[run.answer_ns] for run in own])) for name, own in runs.items()
    }
    rows = {name: describe_start(samples[name], own) for name, own in runs.items()}
    check = speedup(samples["runtime"], samples["unchecked"])
    return {**rows, "ratio": speedup(samples["runtime"], samples["bare"]), "check": check}


def describe_start(samples: Samples, runs: Sequence[Run]) -> Row:
    """Time, memory and imports of a start."""
    modules = set().union(*(run.modules for run in runs))
    return {
        **samples.figures(),
        "peak_mb": max(run.peak_kb or 0 for run in runs) * 1024 / 1e6,
        "modules": len(modules),
        "heavy": sorted(modules & set(HEAVY)),
    }


# ---- calls, batches, pictures: what is compared takes turns


def time_parts(parts: Mapping[str, Call], config: RuntimeConfig) -> dict[str, Samples]:
    """Samples of calls that take turns."""
    return measure(parts, seconds=config.seconds, rounds=config.rounds, seed=config.seed)


def figures(samples: Mapping[str, Samples]) -> dict[str, Row]:
    """What a result says of each part."""
    return {name: own.figures() for name, own in samples.items()}


def measure_calls(config: RuntimeConfig, folder: Path) -> list[Row]:
    """The predictor beside a session of the same file, threads and pixels."""
    network = efficientface(config.input_size, config.seed, folder)
    rows = []
    for path, threads in itertools.product((network.onnx(DEPLOY), BUNDLED_ONNX), _THREADS):
        session = open_session(path, threads)
        with load(path, threads=threads) as predictor:
            side = predictor.spec.input_size
            batches = make_batches(side, 1, config.seed, _PICTURES)
            larger = make_batches(side + side // 4, 1, config.seed, _PICTURES)
            run_session = functools.partial(session.run, OUTPUTS)
            parts = {
                "session": in_turn(run_session, [{UINT8_INPUT: batch} for batch in batches]),
                "predictor": in_turn(predictor, [batch[0] for batch in batches]),
                "preprocess": in_turn(predictor.preprocess, [batch[0] for batch in batches]),
                "preprocess_larger": in_turn(predictor.preprocess, [batch[0] for batch in larger]),
            }
            found = time_parts(parts, config)
        ratio = speedup(found["predictor"], found["session"])
        rows.append({"input_size": side, "threads": threads, **figures(found), "ratio": ratio})
    return rows


def measure_batches(config: RuntimeConfig) -> list[Row]:
    """32 faces at once, and one after the other."""
    rows = []
    for threads in _THREADS:
        with load(BUNDLED_ONNX, threads=threads) as predictor:
            faces = list(make_batches(predictor.spec.input_size, BATCH, config.seed, 1)[0])
            parts = {
                "batch": in_turn(predictor.predict_batch, [faces]),
                "singles": in_turn(lambda faces: [predictor(face) for face in faces], [faces]),
            }
            found = time_parts(parts, config)
        row = {"threads": threads, "gain": speedup(found["singles"], found["batch"])}
        for part, timed in figures(found).items():
            row[part] = {**timed, "images_per_second": 1000 * BATCH / timed["p50_ms"]}
        rows.append(row)
    return rows


def measure_pictures(config: RuntimeConfig, jpeg: bytes) -> dict[str, Row]:
    """The parts of a prediction from the bytes of a file, and the whole.

    Of a larger photograph the whole, and the decoder alone: what a program could not do without.
    """
    photographs = make_jpegs(config.seed, PHOTOGRAPH)
    with load(BUNDLED_ONNX, threads=1) as predictor:
        parts = {
            "decode": in_turn(load_image, [jpeg]),
            "resize": in_turn(lambda image: resize(image, predictor.spec), [load_image(jpeg)]),
            "infer": in_turn(predictor.infer, [predictor.preprocess(jpeg)[None]]),
            "whole": in_turn(predictor, [jpeg]),
            "photograph_decoder": in_turn(decode, photographs),
            "photograph": in_turn(predictor, photographs),
        }
        return figures(time_parts(parts, config))


def decode(jpeg: bytes) -> None:
    """Decode a JPEG, as Pillow does by itself."""
    Image.open(io.BytesIO(jpeg)).load()


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
    start, memory, pictures = result["start"], result["memory"], result["pictures"]
    least = pictures["photograph_decoder"]["p50_ms"] + pictures["infer"]["p50_ms"]
    found = [
        ("start by the bare script's", start["ratio"]["value"], 1.15),
        ("start by one without the check", start["check"]["value"], 1.05),
        ("peak memory of a start, MB", start["runtime"]["peak_mb"], 110.0),
        ("large libraries imported", len(start["runtime"]["heavy"]), 0),
    ]
    for row in result["calls"]:
        kind = f"{row['input_size']}x{row['input_size']}, {row['threads']} threads"
        found.append((f"call by session.run, {kind}", row["ratio"]["value"], 1.08))
    name = "JPEG of {}x{} to its label by decoder and network".format(*PHOTOGRAPH)
    found.append((name, pictures["photograph"]["p50_ms"] / least, 1.3))
    found.append(("memory, kB a thousand predictions", memory["kb_per_thousand"], 1.0))
    return [
        {"name": name, "found": value, "at_most": limit, "met": value <= limit}
        for name, value, limit in found
    ]
