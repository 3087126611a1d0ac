"""The products that one might take instead, end to end, on the same pictures.

``python benchmarks/products.py ENVIRONMENTS --data data/ferplus`` from a clone. ``ENVIRONMENTS`` is
a folder that you have made: in it a folder for each product, with the environment that the
product's documentation asks for; docs/benchmarks.md has the commands. Nothing is installed and no
weights are fetched here; a product that is not there or fails is listed with the reason. Each runs
in its own process with its own settings, and is given the whole picture as the face:

* *accuracy*: labels of every picture of the split, the products' words taken by name. A picture of
  a class that a product lacks counts as wrong; a second figure takes the classes that all know;
* *speed*: from a JPEG file of 224x224 to its label, one by one, the products in turns;
* *first label*: from starting a process to the label of its first picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.products", "cpu,bench")

import numpy as np

from benchmarks.measure.inputs import make_jpegs
from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.errors import BackendError, DatasetError
from efficientface_deploy.workbench import metrics
from efficientface_deploy.workbench.dataset import image_list_hash, read_dataset
from efficientface_deploy.workbench.evaluation import labels_of
from efficientface_deploy.workbench.metrics import IndexArray
from efficientface_deploy.workbench.timing import Samples, interleave

# The classes, each with the products' words for it.
CLASSES = {
    "Neutral": ("neutral",),
    "Happiness": ("happiness", "happy"),
    "Surprise": ("surprise", "surprised"),
    "Sadness": ("sadness", "sad"),
    "Anger": ("anger", "angry"),
    "Disgust": ("disgust", "disgusted"),
    "Fear": ("fear", "fearful"),
    "Contempt": ("contempt",),
}

_ADAPTER = Path(__file__).parent / "measure" / "product.py"
_TIMEOUT = 300  # seconds for one answer
_PART = 500  # pictures of one request
_REPEATS = 4  # of the JPEG files in a turn

Answer = dict[str, Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Product:
    """What there is to know of a product before it runs.

    Attributes:
        name: Of its folder, and in tables.
        trained_on: By its documentation.
        offline: Whether it runs without a network.
        needs: What must lie in its folder, since it would be downloaded.
    """

    name: str
    trained_on: str
    offline: str = "yes"
    needs: str = ""


_FETCHED = "after a download"
_FER = "FER-2013: photographs of this kind with labels of its own"
_ZOO = "facial_expression_recognition_mobilefacenet_2022july.onnx"
PRODUCTS = (
    Product("efficientface-deploy", "FER+ train: photographs of this kind with votes of this kind"),
    Product("fer", _FER),
    Product("face-api", "public sets and pictures of the web, without names"),
    Product("emotiefflib", "AffectNet", _FETCHED, ".emotiefflib/enet_b0_8_best_vgaf.onnx"),
    Product("deepface", _FER, _FETCHED, ".deepface/weights/facial_expression_model_weights.onnx"),
    Product("opencv-zoo", "not said", "yes", _ZOO),
)
OURS, NODE = "efficientface-deploy", "face-api"


@dataclasses.dataclass(frozen=True)
class ProductsConfig:
    """Options of ``python benchmarks/products.py``."""

    environments: Path = option(
        positional=True, metavar="ENVIRONMENTS", help="folder of the products' folders", first=True
    )
    data: Path = option(metavar="DIR", help="a prepared data set of these classes", first=True)
    node: str = option("node", metavar="PATH", help="the Node that runs face-api")
    pictures: int = option(0, metavar="N", minimum=0, help="of the split, evenly; 0 for all")
    starts: int = option(7, metavar="N", minimum=1, help="new processes of each product")
    rounds: int = option(20, metavar="N", minimum=3, help="turns of each product")
    seed: int = option(0, minimum=0, help="of the order, and of the JPEG files")
    out: Path | None = out_option()


class ProductError(Exception):
    """A product that did not do what it was asked; why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/products.py``."""
    example = "environments --data data/ferplus"
    return run_benchmark("products", ProductsConfig, run, argv, __doc__, example)


def run(config: ProductsConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object.

    Raises:
        DatasetError: The data set has other classes.
        BackendError: No product runs.
    """
    dataset = read_dataset(config.data)
    if {*dataset.labels} != {*CLASSES}:
        found, fix = ", ".join(dataset.labels), "give FER+ or AffectNet-8"
        raise DatasetError(config.data, "the classes " + ", ".join(CLASSES), found, fix)
    split = dataset.evaluation_split()
    samples = dataset.split(split)
    samples = samples[:: math.ceil(len(samples) / (config.pictures or len(samples)))]
    paths = [str(sample.path.resolve()) for sample in samples]
    result = new_result("products", config)
    trials = {one.name: Trial(one, config.environments / one.name) for one in PRODUCTS}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        jpegs = write_jpegs(Path(folder), config.seed)
        in_turns(trials, 1, config.seed, lambda trial: trial.prepare(config.node))
        print("starting processes", file=sys.stderr)
        # One more than is counted: the first brings the product's files into memory.
        in_turns(trials, config.starts + 1, config.seed, lambda trial: trial.start(jpegs[0]))
        print(f"labelling {len(paths)} pictures", file=sys.stderr)
        in_turns(trials, 1, config.seed, lambda trial: trial.label(paths, stack))
        print("measuring speed", file=sys.stderr)
        in_turns(trials, config.rounds, config.seed, lambda trial: trial.time(jpegs * _REPEATS))
    measured = [trial for trial in trials.values() if not trial.error]
    absent = {name: trial.error for name, trial in trials.items() if trial.error}
    if not measured:
        found = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        fix = "make the environments as docs/benchmarks.md says"
        raise BackendError(config.environments, "a product that runs", found[:600], fix)
    described = {"name": dataset.name, "split": split, "images": len(samples)}
    return {
        **result,
        "data": described | {"images_sha256": image_list_hash(samples, dataset.root)},
        "cases": describe(measured, dataset.labels, labels_of(samples)),
        "absent": [{"backend": "", "model": name, "reason": own} for name, own in absent.items()],
    }


def write_jpegs(folder: Path, seed: int) -> list[str]:
    """Files of photographs' size and work; their paths."""
    paths = []
    for number, data in enumerate(make_jpegs(seed)):
        (folder / f"{number:02}.jpg").write_bytes(data)
        paths.append(str(folder / f"{number:02}.jpg"))
    return paths


# ---- a product under test


class Trial:
    """A product, and what it has answered.

    Attributes:
        product: Which.
        folder: Its environment.
        error: Why it is left out; empty while it does what it is asked.
        first_seconds: From starting a process to its first label, of each process.
        answer: The last one.
        labels: Its words for the data set's pictures.
        turns: Its answers when it was timed.
    """

    def __init__(self, product: Product, folder: Path) -> None:
        self.product, self.folder = product, folder.resolve()
        self.error = ""
        self.first_seconds: list[float] = []
        self.answer: Answer = {}
        self.labels: list[str] = []
        self.turns: list[Answer] = []

    def prepare(self, node: str) -> None:
        """Find what starts it."""
        name, needs = self.product.name, self.product.needs
        if not self.folder.is_dir():
            raise ProductError(f"no folder {name} among the environments")
        if needs and not list(self.folder.glob(needs)):
            raise ProductError(f"no {needs} in its folder")
        python = next(iter(self.folder.glob("bin/python")), self.folder / "Scripts/python.exe")
        command = [str(python), "-I", str(_ADAPTER), name]
        if name == NODE:
            command = [node, str(_ADAPTER.with_suffix(".cjs"))]
        if shutil.which(command[0]) is None:
            raise ProductError(f"no {command[0]} to run it")
        self._command = [*command, str(self.folder)]

    def start(self, picture: str) -> None:
        """A process for one picture."""
        begin = time.perf_counter()
        with Process(self._command, self.folder) as process:
            process.ask([picture])
            self.first_seconds.append(time.perf_counter() - begin)

    def label(self, pictures: Sequence[str], stack: contextlib.ExitStack) -> None:
        """Have every picture labelled by a process that stays open."""
        self._process = stack.enter_context(Process(self._command, self.folder))
        for at in range(0, len(pictures), _PART):
            self.answer = self._process.ask(pictures[at : at + _PART])
            self.labels += self.answer["labels"]

    def time(self, pictures: Sequence[str]) -> None:
        """A turn of that process."""
        self.turns.append(self._process.ask(pictures))


class Process(contextlib.AbstractContextManager["Process"]):
    """A process of a product; its home is its folder, where it finds weights put there."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - closed in __exit__
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | dict.fromkeys(("HOME", "USERPROFILE"), str(folder)),
            encoding="utf-8",
        )

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):  # the rest of a request that it did not read
            self._process.communicate()
        self._errors.close()

    def ask(self, pictures: Sequence[str]) -> Answer:
        """Have pictures labelled; see measure/product.py.

        Raises:
            ProductError: It ended, hung, or gave another answer.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        alarm = threading.Timer(_TIMEOUT, self._process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            print(json.dumps({"pictures": list(pictures)}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:  # it has ended
            line = ""
        finally:
            alarm.cancel()
        if not line:
            raise ProductError(self._last_words())
        try:
            answer: Answer = json.loads(line)
            words = [*answer["classes"], *answer["labels"]]
            unknown = [word for word in words if class_of(word) is None]
            labels, times = len(answer["labels"]), len(answer["ns"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProductError(f"answered {line.strip()[:80]!r}") from None
        if unknown:
            raise ProductError(f"says {unknown[0]!r}, which is none of {', '.join(CLASSES)}")
        if not labels == times == len(pictures):
            found = f"{labels} labels and {times} times for {len(pictures)} pictures"
            raise ProductError(f"answered {found}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()] or ["no word"]
        errors = [line for line in lines if "Error" in line] or lines  # Node's version is below
        return f"its process ended with {code}: {errors[-1][:200]}"


def in_turns(
    trials: Mapping[str, Trial], rounds: int, seed: int, step: Callable[[Trial], object]
) -> None:
    """A step of every product in each round; one that fails is left out from then on."""
    for _, name in interleave(trials, rounds, seed):
        try:
            if not trials[name].error:
                step(trials[name])
        except ProductError as error:
            trials[name].error = str(error)


def class_of(word: str) -> str | None:
    """The class that a product's word means."""
    return next((name for name, words in CLASSES.items() if word.casefold() in words), None)


# ---- the result


def describe(trials: Sequence[Trial], names: Sequence[str], labels: IndexArray) -> list[Row]:
    """A row for each product.

    Args:
        trials: Those that were measured.
        names: The C classes.
        labels: Integers (N,).
    """

    def indices(words: Sequence[str]) -> IndexArray:
        return np.array([names.index(str(class_of(word))) for word in words])

    answers = {trial.product.name: indices(trial.labels) for trial in trials}
    known = [set(indices(trial.answer["classes"]).tolist()) for trial in trials]
    common = np.isin(labels, list(set.intersection(*known)))  # (N,)
    rows = []
    for trial, own in zip(trials, known, strict=True):
        predictions = answers[trial.product.name]
        shared = score(labels[common], predictions[common], len(names))
        row = {
            "product": trial.product.name,
            "version": trial.answer["version"],
            **score(labels, predictions, len(names)),
            "lacks": ", ".join(name for index, name in enumerate(names) if index not in own),
            "common_images": int(common.sum()),
            "common_accuracy": shared["accuracy"],
            "common_accuracy_interval": shared["accuracy_interval"],
            **speed(trial),
            "install_bytes": folder_bytes(trial.folder),
            "offline": trial.product.offline,
            "trained_on": trial.product.trained_on,
        }
        if OURS in answers and trial.product.name != OURS:
            lost = metrics.paired_accuracy_difference(labels, answers[OURS], predictions)
            row["difference"] = dataclasses.asdict(lost)
        rows.append(row)
    return rows


def score(labels: IndexArray, predictions: IndexArray, classes: int) -> Row:
    """How good predictions (N,) of labels (N,) are; a class that is never said has an F1 of 0."""
    confusion = metrics.confusion_matrix(labels, predictions, classes)
    right = int(np.trace(confusion))
    return {
        "accuracy": right / len(labels),
        "accuracy_interval": list(metrics.share_interval(right, len(labels))),
        "macro_f1": metrics.macro_f1(confusion),
        "macro_f1_interval": list(metrics.bootstrap_intervals(confusion).macro_f1),
        "confusion": confusion.tolist(),
    }


def speed(trial: Trial) -> Row:
    """Of a product's turns and of its fresh processes."""
    samples = Samples(np.array([turn["ns"] for turn in trial.turns], np.int64))
    seconds = trial.first_seconds[1:]
    return {
        **samples.figures(),
        "images_per_second": 1000 / samples.p50_ms,
        "cpu_ms": sum(turn["cpu_ns"] for turn in trial.turns) / samples.count / 1e6,
        "first_label_seconds": statistics.median(seconds),
        "first_label_range": [min(seconds), max(seconds)],
    }


def folder_bytes(folder: Path) -> int:
    """What lies in a folder, pip aside, which every virtual environment has."""
    return sum(
        (Path(root) / name).lstat().st_size
        for root, _, files in os.walk(folder)
        if not any(part == "pip" or part.startswith("pip-") for part in Path(root).parts)
        for name in files
    )


if __name__ == "__main__":
    sys.exit(main())
