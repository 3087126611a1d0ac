"""Two results of the same kind compared: ratios, and what became worse beyond the noise.

Two runs are two samples: a ratio of medians gets an interval by drawing whole rounds of each run
anew, and counts only where the interval ends beyond a tolerance, since two runs on one machine
differ by more than the rounds of one do. Accuracies are compared image by image where both runs
kept their predictions of the same images: ``predictions.npz`` beside the result, with the hash of
the image list, the images' paths within the data set, their labels, and for each model its class
and, as float16, its probabilities.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report.columns import interval, of, points, scaled, tabulate
from benchmarks.report.result import TIMED, Result, Row, digits, read_result, rows_of, work_name
from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.files import atomic_path
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.metrics import (
    Interval,
    paired_accuracy_difference,
    share_interval,
)
from efficientface_deploy.workbench.tables import Table

TOLERANCE = 0.05
PREDICTIONS = "predictions.npz"

_RESAMPLES = 2000
_MACHINE = ("board", "cpu", "usable_cpus")
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
# Before the names of models, apart from the file's own arrays.
_CLASSES = "classes: "
_PROBABILITIES = "probabilities: "


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two results say together.

    Attributes:
        table: A row for each model, backend and kind of work that both have.
        regressions: What became worse beyond the noise, a line each.
        warnings: What a reader must know before trusting the ratios.
        judged: Whether regressions were looked for: not between different machines.
    """

    table: Table
    regressions: list[str]
    warnings: list[str]
    judged: bool


def compare(
    old_path: Path, new_path: Path, tolerance: float = TOLERANCE, *, strict: bool = False
) -> Comparison:
    """Compare two results.

    Args:
        old_path: The older one.
        new_path: The newer one.
        tolerance: Share by which two runs may differ without being told apart.
        strict: Whether a verdict is demanded: then different machines are an error.

    Raises:
        ArtifactError: One of them cannot be read.
        ConfigError: Different kinds, nothing in common, or ``strict`` and different machines.
    """
    old, new = read_result(old_path), read_result(new_path)
    kind, kinds = new["kind"], (*TIMED, "accuracy")
    if old["kind"] != kind or kind not in kinds:
        expected = f"two results of one kind ({', '.join(kinds)})"
        found = f"{old['kind']} and {kind}"
        raise ConfigError("--compare", expected, found, "give results of the same command")
    warnings = _file_warnings(old, new)
    if kind == "accuracy":
        kept = _read_beside(old_path, old), _read_beside(new_path, new)
        return _compare_accuracy(old, new, kept, warnings)
    other_machine = _machine_differences(old, new)
    if strict and other_machine:
        raise ConfigError(
            "--fail-on-regression",
            "two results of one machine",
            f"different ones ({other_machine})",
            "compare without it, or measure both on one machine",
        )
    if other_machine:
        warnings.insert(0, f"different machines ({other_machine}): nothing is called a regression")
    return _compare_times(old, new, tolerance, warnings, judged=not other_machine)


# ---- times


def ratio_of_medians(
    old: Mapping[str, Any], new: Mapping[str, Any], seed: int = 0
) -> dict[str, float]:
    """Median of the new row by the old one's; above 1 is slower.

    Returns:
        ``value``, and ``low`` and ``high`` of its 95 % interval, a bootstrap over the rounds of
        each. Without the rounds' medians it is as wide as the ratio of extremes.
    """
    value = new["p50_ms"] / max(old["p50_ms"], 1e-9)
    rounds = [np.asarray(row.get("round_medians_ms") or [], dtype=float) for row in (old, new)]
    if min(map(len, rounds)) < 2:
        low = new["min_ms"] / max(old["p99_ms"], 1e-9)
        return {"value": value, "low": low, "high": new["p99_ms"] / max(old["min_ms"], 1e-9)}
    generator = np.random.default_rng(seed)
    before, after = (
        np.median(own[generator.integers(len(own), size=(_RESAMPLES, len(own)))], axis=1)
        for own in rounds
    )  # (resamples,) each
    low, high = np.percentile(after / before, (2.5, 97.5))
    return {"value": value, "low": float(low), "high": float(high)}


def verdict_on(ratio: Mapping[str, float], tolerance: float) -> str:
    """``slower``, ``faster`` or nothing."""
    if ratio["low"] > 1 + tolerance:
        return "slower"
    return "faster" if ratio["high"] < 1 / (1 + tolerance) else ""


def _compare_times(
    old: Result, new: Result, tolerance: float, warnings: list[str], *, judged: bool
) -> Comparison:
    rows, regressions = [], []
    for before, after in _pairs(old, new, ("model", "backend", "threads", "stage", "batch")):
        ratio = ratio_of_medians(before, after)
        verdict = verdict_on(ratio, tolerance) if judged else ""
        by_minimum = after["min_ms"] / max(before["min_ms"], 1e-9)
        row = {**after, "work": work_name(after), "old": before["p50_ms"], "ratio": ratio}
        rows.append({**row, "by_minimum": by_minimum, "verdict": verdict})
        if verdict == "slower":
            threads = f", {after['threads']} threads" if after.get("threads") is not None else ""
            regressions.append(
                f"{after['model']} on {after['backend']}{threads}, {row['work']}: "
                f"{ratio['value']:.2f} times ({ratio['low']:.2f} to {ratio['high']:.2f})"
            )
    noisy = [
        name
        for name, one in (("old", old), ("new", new))
        if any(row.get("busy") for row in rows_of(one))
    ]
    if noisy:
        warnings.append(f"the machine was noisy in the {' and the '.join(noisy)} run")
    columns = {
        "Model": of("model"),
        "Backend": of("backend"),
        ">Threads": of("threads"),
        "Work": of("work"),
        ">old p50": of("old", digits),
        ">new p50": of("p50_ms", digits),
        ">new / old (95 %)": of("ratio", lambda ratio: interval(ratio, 3)),
        ">by minimum": of("by_minimum", scaled(1, 3)),
        "Verdict": of("verdict"),
    }
    notes = [
        f"below 1 is faster; a verdict needs an interval beyond a difference of {tolerance:.0%}",
        f"old: {old.get('date')}, new: {new.get('date')}",
    ]
    table = tabulate("New by old, milliseconds a call", columns, rows, notes)
    return Comparison(table, regressions, warnings, judged)


# ---- accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What models said of the same images.

    Attributes:
        images_sha256: Hash of the image list, as the result has it.
        images: N paths within the data set.
        labels: Integers (N,).
        classes: Model and backend -> most probable class, uint8 (N,).
        probabilities: Model and backend -> float16 (N, C).
    """

    images_sha256: str
    images: Sequence[str]
    labels: npt.NDArray[np.integer[Any]]
    classes: Mapping[str, npt.NDArray[np.uint8]]
    probabilities: Mapping[str, npt.NDArray[np.float16]]

    @classmethod
    def of(
        cls,
        images_sha256: str,
        images: Sequence[str],
        labels: npt.NDArray[np.integer[Any]],
        probabilities: Mapping[str, Float32Array],
    ) -> Predictions:
        """What is kept of a run; ``probabilities`` are float32 (N, C) by model and backend."""
        # Rounded probabilities can be equal where the real ones are not: the class is kept too.
        classes = {name: own.argmax(axis=1).astype(np.uint8) for name, own in probabilities.items()}
        rounded = {name: own.astype(np.float16) for name, own in probabilities.items()}
        return cls(images_sha256, images, labels, classes, rounded)

    def write(self, path: Path) -> None:
        """Write them as ``predictions.npz``, atomically."""
        arrays: dict[str, Any] = {_CLASSES + name: own for name, own in self.classes.items()}
        arrays |= {_PROBABILITIES + name: own for name, own in self.probabilities.items()}
        arrays |= {"images_sha256": np.array(self.images_sha256), "images": np.array(self.images)}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, labels=self.labels.astype(np.int64), **arrays)


def read_predictions(path: Path) -> Predictions:
    """Read what :meth:`Predictions.write` wrote.

    Raises:
        ArtifactError: The file is missing, truncated or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        classes, probabilities = (
            {name.removeprefix(lead): own for name, own in arrays.items() if name.startswith(lead)}
            for lead in (_CLASSES, _PROBABILITIES)
        )
        images, labels = arrays["images"].tolist(), arrays["labels"]
        lengths = {len(own) for own in (images, *classes.values(), *probabilities.values())}
        if labels.ndim != 1 or lengths != {len(labels)}:
            raise ValueError("arrays of different length")
        return Predictions(str(arrays["images_sha256"]), images, labels, classes, probabilities)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        expected = "predictions of benchmarks/accuracy.py"
        found = f"something else or a truncated file ({error})"
        raise ArtifactError(path, expected, found, "copy it again, or measure again") from None


def _read_beside(result_path: Path, result: Result) -> Predictions | None:
    """The predictions that lie beside a result; None where none do, or those of other images.

    Raises:
        ArtifactError: They cannot be read.
    """
    path = result_path.parent / PREDICTIONS
    if not path.is_file():
        return None
    found = read_predictions(path)
    return found if found.images_sha256 == result["data"].get("images_sha256") else None


def _compare_accuracy(
    old: Result,
    new: Result,
    kept: tuple[Predictions | None, Predictions | None],
    warnings: list[str],
) -> Comparison:
    if old["data"].get("images_sha256") != new["data"].get("images_sha256"):
        warnings.append("other images: the accuracies are of different data")
    elif None in kept:
        warnings.append("predictions of both runs are not here: the difference is not paired")
    rows, regressions = [], []
    for before, after in _pairs(old, new, ("model", "backend")):
        key = f"{after['model']} on {after['backend']}"
        value, ends, changed = paired_difference(*kept, key) or _unpaired(before, after, old, new)
        verdict = "worse" if ends[1] < 0 else "better" if ends[0] > 0 else ""
        row = {**after, "old": before["accuracy"], "change": {"value": value, "interval": ends}}
        rows.append({**row, "relabelled": changed, "verdict": verdict})
        if verdict == "worse":
            regressions.append(f"{key}: {100 * value:+.2f} points of accuracy")
    columns = {
        "Model": of("model"),
        "Backend": of("backend"),
        ">old %": of("old", scaled(100, 2)),
        ">new %": of("accuracy", scaled(100, 2)),
        ">new minus old, points (95 %)": of("change", points),
        ">labels changed": of("relabelled"),
        "Verdict": of("verdict"),
    }
    table = tabulate("New minus old accuracy", columns, rows)
    return Comparison(table, regressions, warnings, judged=True)


def paired_difference(
    old: Predictions | None, new: Predictions | None, key: str
) -> tuple[float, Interval, int] | None:
    """How much more accurate a model is than in an older run on the same images.

    Args:
        old: The older run's predictions.
        new: The newer run's.
        key: Model and backend.

    Returns:
        Difference, its 95 % interval, and how many images get another label now; None where the
        runs do not both have the model's predictions of the same images.
    """
    if old is None or new is None or old.images_sha256 != new.images_sha256:
        return None
    if key not in old.classes or key not in new.classes:
        return None
    before, after = old.classes[key], new.classes[key]  # (N,) each
    found = paired_accuracy_difference(new.labels, before, after)
    return found.value, found.interval, int((before != after).sum())


def _unpaired(before: Row, after: Row, old: Result, new: Result) -> tuple[float, Interval, None]:
    """Difference of two shares with Newcombe's interval (1998), as of two sets of images."""
    (p0, low0, high0), (p1, low1, high1) = (
        (row["accuracy"], *share_interval(round(row["accuracy"] * images), images))
        for row, images in ((before, old["data"]["images"]), (after, new["data"]["images"]))
    )
    low = p1 - p0 - ((p1 - low1) ** 2 + (high0 - p0) ** 2) ** 0.5
    high = p1 - p0 + ((high1 - p1) ** 2 + (p0 - low0) ** 2) ** 0.5
    return p1 - p0, (low, high), None


# ---- both


def _pairs(old: Result, new: Result, keys: tuple[str, ...]) -> list[tuple[Row, Row]]:
    """Rows of both that do the same, in the order of the new one.

    Raises:
        ConfigError: There is none.
    """
    before = {tuple(row.get(key) for key in keys): row for row in rows_of(old)}
    after = [(tuple(row.get(key) for key in keys), row) for row in rows_of(new)]
    pairs = [(before[key], row) for key, row in after if key in before]
    if not pairs:
        expected = f"a row of the same {', '.join(keys)} in both results"
        raise ConfigError("--compare", expected, "none", "measure the same models again")
    return pairs


def _machine_differences(old: Result, new: Result) -> str:
    """In what the two machines differ; nothing where they seem to be the same."""
    machines = [result.get("machine") or {} for result in (old, new)]
    pairs = [(name, *(machine.get(name) for machine in machines)) for name in _MACHINE]
    gpus = ([gpu.get("name") for gpu in machine.get("gpus") or []] for machine in machines)
    pairs.append(("GPUs", *gpus))
    return "; ".join(f"{name} {one} and {other}" for name, one, other in pairs if one != other)


def _file_warnings(old: Result, new: Result) -> list[str]:
    """Libraries and model files that are not the same in both."""
    found = []
    packages = [(result.get("software") or {}).get("packages") or {} for result in (old, new)]
    for name in _PACKAGES:
        before, after = (own.get(name) for own in packages)
        if before != after:
            found.append(f"{name} {before or 'none'} before, {after or 'none'} now")
    hashes = _hashes(old)
    for name, digest in _hashes(new).items():
        if hashes.get(name, digest) != digest:
            found.append(f"{name} is another file now")
    return found


def _hashes(result: Result) -> dict[str, Any]:
    if result["kind"] == "accuracy":
        return {row["model"]: row.get("sha256") for row in result["rows"]}
    return {model["name"]: model.get("sha256") for model in result.get("models") or []}
