"""Two results of the same kind compared: ratios, and what became worse beyond the noise.

Two runs are two samples: a ratio of medians gets an interval by drawing whole rounds of each run
anew, and counts only where the interval ends beyond a tolerance, since two runs on one machine
differ by more than the rounds of one do. Accuracies are compared image by image where both runs
kept their predictions for the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predictions import paired_difference, read_beside
from benchmarks.report.result import COMPUTE, TIMED, Case, Result, digits, read_result, rows_of
from benchmarks.report.tables import Table
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.metrics import share_interval

TOLERANCE = 0.05

_RESAMPLES = 2000
_MACHINE = ("board", "cpu", "usable_cpus")

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two results say together.

    Attributes:
        table: A row for each contender that both have.
        regressions: What became worse beyond the noise, a line each.
        warnings: What a reader must know before trusting the ratios.
        judged: Whether regressions were looked for: not between different machines.
    """

    table: Table
    regressions: list[str]
    warnings: list[str]
    judged: bool


@dataclasses.dataclass(frozen=True)
class Ratio:
    """New by old, with a 95 % interval; above 1 is slower."""

    value: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        """``slower``, ``faster`` or nothing."""
        if self.low > 1 + tolerance:
            return "slower"
        return "faster" if self.high < 1 / (1 + tolerance) else ""


def compare(
    old_path: Path, new_path: Path, tolerance: float = TOLERANCE, *, strict: bool = False
) -> Comparison:
    """Compare two results.

    Args:
        old_path: The older one.
        new_path: The newer one.
        tolerance: Share by which two runs may differ without being told apart.
        strict: Whether a judgement is demanded: then different machines are an error.

    Raises:
        ArtifactError: One of them cannot be read.
        ConfigError: Different kinds, nothing in common, or ``strict`` and different machines.
    """
    old, new = read_result(old_path), read_result(new_path)
    kind = new["kind"]
    if old["kind"] != kind or kind not in (*TIMED, "accuracy"):
        raise ConfigError(
            "--compare",
            f"two results of one kind ({', '.join((*TIMED, 'accuracy'))})",
            f"{old['kind']} and {kind}",
            "give results of the same command",
        )
    warnings = _file_warnings(old, new)
    if kind == "accuracy":
        return _compare_accuracy(old, new, old_path, new_path, warnings)
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


def ratio_of_medians(old: Case, new: Case, seed: int = 0) -> Ratio:
    """Median of the new row by the old one's, with a bootstrap interval over the rounds of each.

    A result without its rounds' medians has no interval: it is as wide as the ratio of extremes.
    """
    value = new["p50_ms"] / max(old["p50_ms"], 1e-9)
    rounds = [np.asarray(row.get("round_medians_ms") or [], dtype=float) for row in (old, new)]
    if min(map(len, rounds)) < 2:
        low = new["min_ms"] / max(old["p99_ms"], 1e-9)
        return Ratio(value, low, new["p99_ms"] / max(old["min_ms"], 1e-9))
    generator = np.random.default_rng(seed)
    before, after = (
        np.median(own[generator.integers(len(own), size=(_RESAMPLES, len(own)))], axis=1)
        for own in rounds
    )  # (resamples,) each
    low, high = np.percentile(after / before, (2.5, 97.5))
    return Ratio(value, float(low), float(high))


def _compare_times(
    old: Result, new: Result, tolerance: float, warnings: list[str], *, judged: bool
) -> Comparison:
    pairs = _pairs(old, new, ("model", "backend", "threads", "stage", "batch"))
    rows, regressions = [], []
    for before, after in pairs:
        ratio = ratio_of_medians(before, after)
        verdict = ratio.verdict(tolerance) if judged else ""
        work = after["stage"] if after["stage"] != COMPUTE else f"{COMPUTE}, batch {after['batch']}"
        rows.append(
            [
                *(after["model"], after["backend"], _threads(after), work),
                *(digits(before["p50_ms"]), digits(after["p50_ms"])),
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                f"{after['min_ms'] / max(before['min_ms'], 1e-9):.3f}",
                verdict,
            ]
        )
        if verdict == "slower":
            threads = f", {after['threads']} threads" if after.get("threads") is not None else ""
            regressions.append(
                f"{after['model']} on {after['backend']}{threads}, {work}: {ratio.value:.2f} times "
                f"({ratio.low:.2f} to {ratio.high:.2f})"
            )
    busy = [
        name
        for name, one in (("old", old), ("new", new))
        if any(r.get("busy") for r in rows_of(one))
    ]
    if busy:
        warnings.append(f"the machine was busy in the {' and the '.join(busy)} run")
    columns = ["Model", "Backend", ">Threads", "Work", ">old p50", ">new p50"]
    columns += [">new / old (95 %)", ">by minimum", "Verdict"]
    notes = [
        f"below 1 is faster; a verdict needs an interval beyond a difference of {tolerance:.0%}",
        f"old: {old.get('date')}, new: {new.get('date')}",
    ]
    table = Table("New by old, milliseconds a call", columns, [("", rows)], notes)
    return Comparison(table, regressions, warnings, judged)


def _compare_accuracy(
    old: Result, new: Result, old_path: Path, new_path: Path, warnings: list[str]
) -> Comparison:
    kept_before, kept_after = read_beside(old_path, old), read_beside(new_path, new)
    if old["data"].get("images_sha256") != new["data"].get("images_sha256"):
        warnings.append("other images: the accuracies are of different data")
    elif kept_before is None or kept_after is None:
        warnings.append("predictions of both runs are not here: the difference is not paired")
    rows, regressions = [], []
    for before, after in _pairs(old, new, ("model", "backend")):
        key = f"{after['model']} on {after['backend']}"
        paired = None
        if kept_before is not None and kept_after is not None:
            paired = paired_difference(kept_before, kept_after, key)
        if paired is None:
            value, (low, high), changed = _unpaired(before, after, old, new)
        else:
            value, (low, high), changed = paired.value, paired.interval, str(paired.changed)
        verdict = "worse" if high < 0 else "better" if low > 0 else ""
        rows.append(
            [
                *(after["model"], after["backend"]),
                *(f"{100 * before['accuracy']:.2f}", f"{100 * after['accuracy']:.2f}"),
                f"{100 * value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
                changed,
                verdict,
            ]
        )
        if verdict == "worse":
            regressions.append(f"{key}: {100 * value:+.2f} points of accuracy")
    columns = ["Model", "Backend", ">old %", ">new %", ">new minus old, points (95 %)"]
    columns += [">labels changed", "Verdict"]
    table = Table("New minus old accuracy", columns, [("", rows)])
    return Comparison(table, regressions, warnings, judged=True)


def _unpaired(
    before: Case, after: Case, old: Result, new: Result
) -> tuple[float, tuple[float, float], str]:
    """Difference of two shares with Newcombe's interval (1998), as of two sets of images."""
    shares = []
    for row, result in ((before, old), (after, new)):
        images = int(result["data"]["images"])
        share = row["accuracy"]
        shares.append((share, *share_interval(round(share * images), images)))
    (p0, low0, high0), (p1, low1, high1) = shares
    value = p1 - p0
    low = value - ((p1 - low1) ** 2 + (high0 - p0) ** 2) ** 0.5
    high = value + ((high1 - p1) ** 2 + (p0 - low0) ** 2) ** 0.5
    return value, (low, high), ""


def _pairs(old: Result, new: Result, keys: tuple[str, ...]) -> list[tuple[Case, Case]]:
    """Rows of both that do the same, in the order of the new one.

    Raises:
        ConfigError: There is none.
    """

    def key(row: Mapping[str, Any]) -> Key:
        return tuple(row.get(name) for name in keys)

    before = {key(row): row for row in rows_of(old)}
    pairs = [(before[key(row)], row) for row in rows_of(new) if key(row) in before]
    if not pairs:
        raise ConfigError(
            "--compare",
            f"a row of the same {', '.join(keys)} in both results",
            "none",
            "measure the same models again",
        )
    return pairs


def _machine_differences(old: Result, new: Result) -> str:
    """In what the two machines differ; nothing where they seem to be the same."""
    differing = []
    machines = [result.get("machine") or {} for result in (old, new)]
    for name in _MACHINE:
        before, after = (machine.get(name) for machine in machines)
        if before != after:
            differing.append(f"{name} {before} and {after}")
    gpus = [[gpu.get("name") for gpu in machine.get("gpus") or []] for machine in machines]
    if gpus[0] != gpus[1]:
        differing.append(f"GPUs {gpus[0]} and {gpus[1]}")
    return "; ".join(differing)


def _file_warnings(old: Result, new: Result) -> list[str]:
    """Libraries and model files that are not the same in both."""
    found = []
    packages = [(result.get("software") or {}).get("packages") or {} for result in (old, new)]
    for name in ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt"):
        before, after = (own.get(name) for own in packages)
        if before != after:
            found.append(f"{name} {before or 'none'} before, {after or 'none'} now")
    before_files, after_files = (_hashes(result) for result in (old, new))
    for name, digest in after_files.items():
        if before_files.get(name, digest) != digest:
            found.append(f"{name} is another file now")
    return found


def _hashes(result: Result) -> dict[str, Any]:
    if result["kind"] == "accuracy":
        return {row["model"]: row.get("sha256") for row in rows_of(result)}
    return {model["name"]: model.get("sha256") for model in result.get("models") or []}


def _threads(case: Case) -> str:
    return "" if case.get("threads") is None else str(case.get("threads"))
