"""In the browser: milliseconds a face and accuracy, beside face-api's expression network.

``python benchmarks/web.py DATA`` from a clone. ``DATA`` is FER+ as ``training.prepare`` writes it.
Everything runs in the system's Chromium, without a window and without a GPU. The candidates have a
page each, and take turns. What is timed is a face of 48x48 pixels on a canvas to its label, with
what each library does before its network.

face-api and the WebAssembly of its TensorFlow.js are not ours to fetch. ``--face-api`` names a
folder with both npm packages, unpacked: ``npm install @vladmandic/face-api
@tensorflow/tfjs-backend-wasm@4.22.0`` gives them in ``node_modules``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.web", "cpu,bench")

import numpy as np

from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.artifact import (
    provenance_from_metadata,
    read_onnx_metadata,
    spec_from_metadata,
)
from efficientface_deploy.command import option
from efficientface_deploy.errors import BackendError, ConfigError, DatasetError
from efficientface_deploy.predictor import BUNDLED_ONNX
from efficientface_deploy.vision.preprocess import UInt8Array, load_image
from efficientface_deploy.web.files import page_files, read_model
from efficientface_deploy.web.server import HEADERS, open_server
from efficientface_deploy.workbench.dataset import Dataset, read_dataset
from efficientface_deploy.workbench.evaluation import check_labels
from efficientface_deploy.workbench.requirements import require_package
from efficientface_deploy.workbench.timing import Samples, interleave, speedup

# What lets a page have threads; our own policy would forbid face-api's workers.
_ISOLATED = {name: HEADERS[name] for name in HEADERS if name.startswith("Cross-Origin")}
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_TIMED = 64  # faces that take turns
_STEP = 200  # faces that are labelled for accuracy in one call
_FASTER, _POINTS, _FIRST_MS = 1.8, 15.0, 2000.0

# face-api's words for FER+'s classes; it has none for contempt.
_WORDS = {
    **{"neutral": "Neutral", "happy": "Happiness", "surprised": "Surprise", "sad": "Sadness"},
    **{"angry": "Anger", "disgusted": "Disgust", "fearful": "Fear"},
}

# In the page: label() takes a canvas; then what times it and what labels all faces.
_OURS = """async ([model, threads]) => {
    const { load } = await import("/efficientface.js");
    const predictor = await load({ model: `/${model}`, detector: null, threads });
    globalThis.label = async (canvas) => (await predictor.predict(canvas)).label;
    return predictor.threads;
}"""
_THEIRS = """async ([_, threads]) => {
    const api = await import("/face-api/face-api.esm.js");
    api.tf.setWasmPaths("/face-api/");
    if (threads > 1) api.tf.setThreadsCount(threads);
    await api.tf.setBackend("wasm");
    await api.tf.ready();
    if (api.tf.getBackend() !== "wasm") throw new Error("no WebAssembly for TensorFlow.js");
    await api.nets.faceExpressionNet.loadFromUri("/face-api/");
    globalThis.label = async (canvas) => {
        const found = await api.nets.faceExpressionNet.predictExpressions(canvas);
        return found.asSortedArray()[0].expression;
    };
    return threads; // of several it says one, and takes its file for several
}"""
_HELPERS = """async ([timed, side]) => {
    const all = new Uint8Array(await (await fetch("/faces.bin")).arrayBuffer());
    const size = side * side * 4;
    globalThis.canvasOf = (at) => {
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = side;
        const pixels = new Uint8ClampedArray(all.buffer, at * size, size);
        const context = canvas.getContext("2d", { willReadFrequently: true });
        context.putImageData(new ImageData(pixels, side, side), 0, 0);
        return canvas;
    };
    globalThis.shown = Array.from({ length: timed }, (_, at) => canvasOf(at));
}"""
_TIME = """async (calls) => {
    const taken = [];
    for (let call = 0; call < calls; call++) {
        const start = performance.now();
        await label(shown[call % shown.length]);
        taken.push(performance.now() - start);
    }
    return taken;
}"""
_LABEL = """async ([from, to]) => {
    const found = [];
    for (let at = from; at < to; at++) found.push(await label(canvasOf(at)));
    return found;
}"""
_FIRST = """async () => {
    const until = async (holds) => {
        while (!holds()) await new Promise((resolve) => setTimeout(resolve, 5));
    };
    await until(() => document.documentElement.dataset.ready);
    const ready = performance.now();
    document.getElementById("sample").click();
    await until(() => /^One face/.test(document.getElementById("status").textContent));
    return [ready, performance.now()];
}"""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WebConfig:
    """Options of ``python benchmarks/web.py``."""

    data: Path = option(positional=True, metavar="DATA", help="prepared FER+", first=True)
    models: tuple[Path, ...] = option(
        (), metavar="FILE", help="the bundled model's other ONNX files, e.g. in INT8", first=True
    )
    face_api: Path | None = option(
        None, metavar="DIR", help="folder with face-api's npm packages, unpacked", first=True
    )
    threads: tuple[int, ...] = option((1, 2), minimum=1, help="threads of WebAssembly")
    calls: int = option(40, metavar="N", minimum=3, help="timed calls of each turn")
    rounds: int = option(20, metavar="N", minimum=3, help="turns of each candidate")
    images: int | None = option(
        None, metavar="N", minimum=1, help="validation faces for accuracy; default: all"
    )
    starts: int = option(10, metavar="N", minimum=1, help="openings of the page")
    seed: int = option(0, minimum=0, help="of the order")
    out: Path | None = out_option()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of those that take turns.

    Attributes:
        model: ``ours`` or ``face-api``.
        precision: With the graph's kind, which has no name for face-api's.
        threads: As asked for.
        site: The files of its page.
        script: Loads it in the page.
        file: Its model there.
    """

    model: str
    precision: str
    threads: int
    site: Mapping[str, bytes]
    script: str
    file: str = ""

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.model} {self.precision}, {self.threads} threads"

    @property
    def headers(self) -> Mapping[str, str]:
        """Those of its page: TensorFlow.js takes threads wherever it can have them."""
        return _ISOLATED if self.threads > 1 or self.model == "ours" else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/web.py``."""
    return run_benchmark("web", WebConfig, run, argv, __doc__, "data/ferplus --rounds 5")


def run(config: WebConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    require_package("playwright", "benchmarks")
    dataset = read_dataset(config.data)
    faces, labels = read_faces(dataset, config.images)
    page = {"model.onnx": read_model(), **page_files()}
    candidates, absent = list_candidates(config, page, faces, dataset)
    result = {**new_result("web", config), "absent": absent}
    with open_chromium() as browser:
        result["browser"] = browser.version
        print("opening the page", file=sys.stderr)
        result["first_result"] = measure_starts(config, browser, page)
        print("measuring speed and accuracy", file=sys.stderr)
        result["cases"] = measure_candidates(config, browser, candidates, faces, labels)
    return {
        **result,
        "data": {"name": dataset.spec.name, "images": len(labels)},
        "downloads": sizes(page),
        "goals": goals(result),
    }


def read_faces(dataset: Dataset, images: int | None) -> tuple[UInt8Array, list[str]]:
    """Faces of the evaluation split, uint8 (N, S, S, 4), RGBA, and their labels."""
    samples = dataset.split(dataset.evaluation_split())
    if images is not None:
        samples = samples[:: max(1, len(samples) // images)][:images]
    pictures = [load_image(sample.path).convert("RGBA") for sample in samples]
    if len({(*picture.size, picture.width == picture.height) for picture in pictures}) != 1:
        fix = "give FER+, as training.prepare writes it"
        raise DatasetError("DATA", "squares of one size", "pictures of several", fix)
    faces = np.stack([np.asarray(picture) for picture in pictures])
    return faces, [dataset.spec.labels[sample.label] for sample in samples]


def list_candidates(
    config: WebConfig, page: Mapping[str, bytes], faces: UInt8Array, dataset: Dataset
) -> tuple[list[Candidate], list[Row]]:
    """Those that take turns, and those that cannot be had."""
    blank = {"faces.html": b"<!doctype html>", "faces.bin": faces.tobytes()}
    site = {**page, **blank}
    paths = {"model.onnx": BUNDLED_ONNX}
    paths |= {f"model-{number}.onnx": path for number, path in enumerate(config.models)}
    candidates = []
    for name, path in paths.items():
        site[name] = read_model(path)
        metadata = read_onnx_metadata(path)
        check_labels(spec_from_metadata(metadata, path), dataset)
        made = provenance_from_metadata(metadata, path)
        kind = f"{made.get('precision')}, {made.get('graph')} graph"
        candidates += [Candidate("ours", kind, n, site, _OURS, name) for n in config.threads]
    absent: list[Row] = []
    if config.face_api is None:
        reason = "no --face-api DIR was given"
        absent.append({"backend": "wasm", "model": "face-api", "reason": reason})
    else:
        theirs = {**face_api_files(config.face_api), **blank}
        candidates += [Candidate("face-api", "fp32", n, theirs, _THEIRS) for n in config.threads]
    return candidates, absent


def face_api_files(folder: Path) -> dict[str, bytes]:
    """face-api's module and network, and the WebAssembly of its TensorFlow.js, wherever they lie.

    Raises:
        ConfigError: One is not there.
    """
    files = {}
    for pattern in (
        *("face-api.esm.js", "face_expression_model*.json", "face_expression_model*.bin"),
        *("tfjs-backend-wasm-simd.wasm", "tfjs-backend-wasm-threaded-simd.wasm"),
    ):
        found = sorted(folder.rglob(pattern))
        if not found:
            fix = "npm install @vladmandic/face-api @tensorflow/tfjs-backend-wasm there"
            raise ConfigError("--face-api", f"a folder with {pattern}", str(folder), fix)
        files[f"face-api/{found[0].name}"] = found[0].read_bytes()
    return files


# ---- the browser


@contextlib.contextmanager
def open_chromium() -> Iterator[Any]:
    """The system's Chromium.

    Raises:
        BackendError: There is none.
    """
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise BackendError("benchmarks", "Chromium", "none", "apt-get install chromium")
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def served(site: Mapping[str, bytes], headers: Mapping[str, str] = HEADERS) -> Iterator[str]:
    """The address of a page while it is served."""
    with open_server(site, headers=headers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def measure_starts(config: WebConfig, browser: Any, site: Mapping[str, bytes]) -> Row:
    """From opening the page, in a new profile each time, to the label of the sample picture."""
    times = []
    with served(site) as address:
        for _ in range(config.starts):
            context = browser.new_context()
            page = context.new_page()
            page.goto(address)
            times.append(page.evaluate(_FIRST))
            context.close()
    ready, first = np.median(times, axis=0).tolist()
    return {"openings": config.starts, "ready_ms": ready, "p50_ms": first}


def measure_candidates(
    config: WebConfig,
    browser: Any,
    candidates: Sequence[Candidate],
    faces: UInt8Array,
    labels: Sequence[str],
) -> list[Row]:
    """Times of calls that take turns, then what each says of all faces."""
    by_name = {candidate.name: candidate for candidate in candidates}
    durations: dict[str, list[list[float]]] = {name: [] for name in by_name}
    with contextlib.ExitStack() as stack:
        pages = {}
        for name, candidate in by_name.items():
            page = browser.new_context().new_page()
            address = stack.enter_context(served(candidate.site, candidate.headers))
            page.goto(f"{address}faces.html")  # not the page itself, which loads a model too
            threads = page.evaluate(candidate.script, [candidate.file, candidate.threads])
            if threads != candidate.threads:
                expected = f"{candidate.threads} threads, which were asked for"
                raise BackendError(name, expected, str(threads), "ask for fewer --threads")
            page.evaluate(_HELPERS, [min(_TIMED, len(faces)), faces.shape[1]])
            page.evaluate(_TIME, config.calls)  # warm-up: the browser compiles what is used
            pages[name] = page
        for _, name in interleave(by_name, config.rounds, config.seed):
            durations[name].append(pages[name].evaluate(_TIME, config.calls))
        accuracy = {
            (one.model, one.precision): score(pages[name], labels)
            for name, one in by_name.items()
            if one.threads == config.threads[0]
        }
    samples = {
        name: Samples((1e6 * np.array(taken)).astype(np.int64)) for name, taken in durations.items()
    }
    rows = []
    for name, one in by_name.items():
        row = {"model": one.model, "precision": one.precision, "threads": one.threads}
        theirs = samples.get(f"face-api fp32, {one.threads} threads")
        if theirs is not None and one.model != "face-api":
            row["speedup"] = speedup(theirs, samples[name])
        own = accuracy[one.model, one.precision]
        rows.append({**row, **samples[name].figures(), "accuracy": own})
    return rows


def score(page: Any, labels: Sequence[str]) -> float:
    """The share of faces that get their label."""
    found: list[str] = []
    for start in range(0, len(labels), _STEP):
        found += page.evaluate(_LABEL, [start, min(start + _STEP, len(labels))])
    named = [_WORDS.get(word, word) for word in found]
    return sum(map(str.__eq__, named, labels)) / len(labels)


# ---- sizes and goals


def sizes(site: Mapping[str, bytes]) -> dict[str, Row]:
    """What a visitor's browser fetches, bytes, also as a host that compresses sends it."""
    parts = {"page": b"", "model": b"", "face detector": b"", "ONNX Runtime, WASM": b""}
    parts["ONNX Runtime, WebGPU alone"] = b""
    for name, content in site.items():
        if "webgpu" in name or "asyncify" in name:
            parts["ONNX Runtime, WebGPU alone"] += content
        elif name.startswith("ort/"):
            parts["ONNX Runtime, WASM"] += content
        elif name in ("model.onnx", "yunet.onnx"):
            parts["model" if name == "model.onnx" else "face detector"] += content
        else:
            parts["page"] += content
    return {
        name: {"bytes": len(content), "gzip_bytes": len(gzip.compress(content, 6))}
        for name, content in parts.items()
    }


def goals(result: Mapping[str, Any]) -> list[Row]:
    """Each goal with what was found."""
    cases = {(row["model"], row["precision"], row["threads"]): row for row in result["cases"]}
    found = [("first result, milliseconds", result["first_result"]["p50_ms"], _FIRST_MS)]
    ours = cases.get(("ours", "fp32, deploy graph", 1))
    theirs = cases.get(("face-api", "fp32", 1))
    if ours and theirs:
        ratio = ours["p50_ms"] / theirs["p50_ms"]
        lost = 100 * (theirs["accuracy"] - ours["accuracy"])
        found.append(("time of a face by face-api's, one thread", ratio, 1 / _FASTER))
        found.append(("points of accuracy less than face-api's", lost, -_POINTS))
    return [
        {"name": name, "found": value, "at_most": limit, "met": value <= limit}
        for name, value, limit in found
    ]
