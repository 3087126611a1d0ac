"""Two results of the same kind compared: ratios, and what became worse beyond the noise.

Two runs are two samples: a ratio of medians gets an interval by drawing whole rounds of each run
anew, and counts only where the interval ends beyond a tolerance, since two runs on one machine
differ by more than the rounds of one do. Accuracies are compared image by image where both runs
kept their predictions of the same images, in ``predictions.npz`` beside the result.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report.result import TIMED, Result, Row, damage_named, read_result, work_name
from benchmarks.report.tables import digits, of, points, ratio_interval, scaled, tabulate
from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.files import atomic_path
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.metrics import IndexArray, paired_accuracy_difference
from efficientface_deploy.workbench.tables import Table

TOLERANCE = 0.05
PREDICTIONS = "predictions.npz"

_RESAMPLES = 2000
_MACHINE = ("board", "cpu", "usable_cpus")
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
# Before the names of models in the predictions' file.
_CLASSES = "classes: "
_PROBABILITIES = "probabilities: "

Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two results say together.

    Attributes:
        table: A row for each model, backend and kind of work that both have.
        regressions: What became worse beyond the noise, a line each.
        warnings: What a reader must know before trusting the ratios.
        judged: Whether regressions were looked for.
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
        strict: Whether a verdict is demanded: then it is an error that there can be none, as
            between different machines.

    Raises:
        ArtifactError: One of them cannot be read, or is damaged.
        ConfigError: Different kinds, nothing in common, or ``strict`` and no verdict.
    """
    new = read_result(new_path)
    kind = new["kind"]
    old = read_older(old_path, kind)
    with damage_named(old_path, new_path):
        if kind == "accuracy":
            pair = (old_path, old), (new_path, new)
            comparison = _compare_accuracy(old, new, [_predictions_beside(*one) for one in pair])
        else:
            comparison = _compare_times(old, new, tolerance)
        comparison.warnings.extend(_differences_of_software_and_files(old, new))
    if strict and not comparison.judged:
        raise ConfigError(
            "--fail-on-regression",
            f"two results of one machine, or {PREDICTIONS} of the same images beside both",
            comparison.warnings[0],
            "compare without it, or measure both alike",
        )
    return comparison


def read_older(path: Path, kind: str) -> Result:
    """Read what a result of this kind is to be compared with.

    Raises:
        ArtifactError: It cannot be read.
        ConfigError: It is of another kind, or results of this kind are not compared.
    """
    old, kinds = read_result(path), (*TIMED, "accuracy")
    if old["kind"] != kind or kind not in kinds:
        expected = f"two results of one kind ({', '.join(kinds)})"
        found = f"{old['kind']} and {kind}"
        raise ConfigError("--compare", expected, found, "give results of the same command")
    return old


# ---- times


def ratio_of_medians(old: Row, new: Row, seed: int = 0) -> dict[str, float]:
    """Median of the new row by the old one's; above 1 is slower.

    Returns:
        ``value``, and ``low`` and ``high`` of its 95 % interval, a bootstrap over the rounds of
        each.
    """
    generator = np.random.default_rng(seed)
    before, after = (
        np.median(own[generator.integers(len(own), size=(_RESAMPLES, len(own)))], axis=1)
        for own in (np.asarray(row["round_medians_ms"], dtype=float) for row in (old, new))
    )  # (resamples,) each
    low, high = np.percentile(after / before, (2.5, 97.5))
    return {"value": new["p50_ms"] / old["p50_ms"], "low": float(low), "high": float(high)}


def verdict_on(ratio: Mapping[str, float], tolerance: float) -> str:
    """``slower``, ``faster`` or nothing."""
    if ratio["low"] > 1 + tolerance:
        return "slower"
    return "faster" if ratio["high"] < 1 / (1 + tolerance) else ""


def _compare_times(old: Result, new: Result, tolerance: float) -> Comparison:
    other_machine = _machine_differences(old, new)
    warnings = []
    if other_machine:
        warnings.append(f"different machines ({other_machine}): nothing is called a regression")
    for name, one in (("old", old), ("new", new)):
        if any(row.get("busy") for row in one["cases"]):
            warnings.append(f"the machine was noisy in the {name} run")
    rows, regressions = [], []
    keys = ("model", "backend", "threads", "stage", "batch")
    for before, after in _pairs(old["cases"], new["cases"], keys):
        ratio = ratio_of_medians(before, after)
        verdict = "" if other_machine else verdict_on(ratio, tolerance)
        by_minimum = after["min_ms"] / before["min_ms"]
        row = {**after, "work": work_name(after), "old": before["p50_ms"], "ratio": ratio}
        rows.append({**row, "by_minimum": by_minimum, "verdict": verdict})
        if verdict == "slower":
            threads = f", {after['threads']} threads" if after.get("threads") is not None else ""
            regressions.append(
                f"{after['model']} on {after['backend']}{threads}, {row['work']}: "
                f"{ratio['value']:.2f} times ({ratio['low']:.2f} to {ratio['high']:.2f})"
            )
    columns = {
        "Model": of("model"),
        "Backend": of("backend"),
        ">Threads": of("threads"),
        "Work": of("work"),
        ">old p50": of("old", digits),
        ">new p50": of("p50_ms", digits),
        ">new / old (95 %)": of("ratio", ratio_interval),
        ">by minimum": of("by_minimum", scaled(1, 3)),
        "Verdict": of("verdict"),
    }
    notes = [
        f"below 1 is faster; a verdict needs an interval beyond a difference of {tolerance:.0%}",
        f"old: {old.get('date')}, new: {new.get('date')}",
    ]
    table = tabulate("New by old, milliseconds a call", columns, rows, notes)
    return Comparison(table, regressions, warnings, judged=not other_machine)


# ---- accuracy


def write_predictions(
    path: Path,
    images_sha256: str,
    images: Sequence[str],
    labels: IndexArray,
    probabilities: Mapping[str, Float32Array],
) -> None:
    """Keep what models said of the same images, as ``predictions.npz``, atomically.

    Args:
        path: The file.
        images_sha256: Hash of the image list, as the result has it.
        images: N paths within the data set.
        labels: Integers (N,).
        probabilities: Model and backend -> float32 (N, C); kept as float16, and beside it the most
            probable class, uint8 (N,), since rounded probabilities can be equal.
    """
    arrays: dict[str, Any] = {
        "images_sha256": np.array(images_sha256),
        "images": np.array(images),
        "labels": labels.astype(np.int64),
    }
    for name, own in probabilities.items():
        arrays[_CLASSES + name] = own.argmax(axis=1).astype(np.uint8)
        arrays[_PROBABILITIES + name] = own.astype(np.float16)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_predictions(path: Path) -> Arrays:
    """Read what :func:`write_predictions` wrote, by the names that it gave the arrays.

    Raises:
        ArtifactError: The file is missing, truncated or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: Arrays = {name: stored[name] for name in stored.files}
        digest = arrays.pop("images_sha256")
        if {own.shape[:1] for own in arrays.values()} != {arrays["labels"].shape}:
            raise ValueError("arrays of different length")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        expected = "predictions of benchmarks/accuracy.py"
        found = f"something else or a truncated file ({error})"
        raise ArtifactError(path, expected, found, "copy it again, or measure again") from None
    return {"images_sha256": digest, **arrays}


def _predictions_beside(result_path: Path, result: Result) -> Arrays:
    """The predictions that lie beside a result; none where there is no file of its images.

    Raises:
        ArtifactError: They cannot be read.
    """
    path = result_path.parent / PREDICTIONS
    found = read_predictions(path) if path.is_file() else {}
    return found if found.get("images_sha256") == result["data"].get("images_sha256") else {}


def _compare_accuracy(old: Result, new: Result, kept: Sequence[Arrays]) -> Comparison:
    same_images = old["data"].get("images_sha256") == new["data"].get("images_sha256")
    paired = same_images and all(kept)
    warnings = []
    if not same_images:
        warnings.append("other images: the accuracies are of different data and are not judged")
    elif not paired:
        warnings.append("predictions of both runs are not here: the accuracies are not judged")
    rows, regressions = [], []
    for before, after in _pairs(old["rows"], new["rows"], ("model", "backend")):
        row = {**after, "old": before["accuracy"]}
        rows.append(row)
        name = f"{after['model']} on {after['backend']}"
        if paired and all(_CLASSES + name in own for own in kept):
            was, now = (own[_CLASSES + name] for own in kept)  # (N,) each
            change = paired_accuracy_difference(kept[1]["labels"], was, now)
            row["change"] = dataclasses.asdict(change)
            row["relabelled"] = int((was != now).sum())
            low, high = change.interval
            row["verdict"] = "worse" if high < 0 else "better" if low > 0 else ""
            if row["verdict"] == "worse":
                regressions.append(f"{name}: {100 * change.value:+.2f} points of accuracy")
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
    return Comparison(table, regressions, warnings, judged=paired)


# ---- both


def _pairs(old: Sequence[Row], new: Sequence[Row], keys: tuple[str, ...]) -> list[tuple[Row, Row]]:
    """Rows of both that do the same, in the order of the new one.

    Raises:
        ConfigError: There is none.
    """
    before = {tuple(row.get(key) for key in keys): row for row in old}
    after = [(tuple(row.get(key) for key in keys), row) for row in new]
    pairs = [(before[key], row) for key, row in after if key in before]
    if not pairs:
        expected = f"a row of the same {', '.join(keys)} in both results"
        raise ConfigError("--compare", expected, "none", "measure the same models again")
    return pairs


def _machine_differences(old: Result, new: Result) -> str:
    """In what the two machines differ; nothing where they seem to be the same."""
    before, after = (
        {name: result["machine"].get(name) for name in _MACHINE}
        | {"GPUs": [gpu["name"] for gpu in result["machine"].get("gpus") or []]}
        for result in (old, new)
    )
    different = [name for name in before if before[name] != after[name]]
    return "; ".join(f"{name} {before[name]} and {after[name]}" for name in different)


def _differences_of_software_and_files(old: Result, new: Result) -> list[str]:
    """Packages of other versions, and names of model files that have another hash."""
    before, after = ((one.get("software") or {}).get("packages") or {} for one in (old, new))
    found = [
        f"{name} {before.get(name, 'none')} before, {after.get(name, 'none')} now"
        for name in _PACKAGES
        if before.get(name) != after.get(name)
    ]
    was, now = (
        {model.get("name") or model["model"]: model.get("sha256") for model in models}
        for models in (one.get("models") or one.get("rows") or [] for one in (old, new))
    )
    return found + [f"{n} is another file now" for n, sha in now.items() if was.get(n, sha) != sha]
