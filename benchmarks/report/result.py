"""Results as JSON files: written, read back, checked; what their rows are called.

docs/benchmarks.md describes the form. A reader takes what it knows and ignores other keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from benchmarks import ROOT, shown_path
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import require_file, write_text
from efficientface_deploy.workbench.environment import (
    describe_commit,
    describe_machine,
    describe_software,
)

SCHEMA_VERSION = 2  # 1 had no p95, cold start, roofline and profile
RESULTS = ROOT / "benchmarks" / "results"

COMPUTE = "compute"
END_TO_END = "end to end"

Row = dict[str, Any]


class Case(TypedDict, total=False):
    """A row of a result whose calls were timed, by ``latency`` or ``peers``.

    Times are in milliseconds a call. ``threads`` is None where the library or a GPU decides;
    ``speedup`` has ``value``, ``low`` and ``high``; ``floor`` is the row's roofline.
    """

    model: str
    backend: str
    precision: str
    threads: int | None
    stage: str
    batch: int
    calls: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    images_per_second: float
    round_medians_ms: list[float]
    spread: float
    drift: float
    busy: bool
    speedup: dict[str, float] | None
    floor: dict[str, float] | None
    joules_per_image: float


class Result(TypedDict, total=False):
    """What a benchmark found. ``absent`` and ``warnings`` are there once it was read."""

    schema: int
    kind: str
    date: str
    machine: dict[str, Any]
    software: dict[str, Any]
    git: dict[str, Any]
    config: dict[str, Any]
    absent: list[dict[str, str]]
    warnings: list[str]
    goals: list[Row]
    # latency, peers
    cases: list[Case]
    baseline: str
    inputs: dict[str, str]
    models: list[Row]
    cold: list[Row]
    ceilings: dict[str, Any] | None
    profiles: list[Row]
    # accuracy
    data: dict[str, Any]
    reference: str
    rows: list[Row]
    # report.json of efficientface-export
    weights: str
    artifacts: list[Row]
    # peers, runtime, graphs
    packages: dict[str, str]
    settings: Any
    start: dict[str, Any]
    calls: list[Row]
    pictures: dict[str, Row]
    batches: list[Row]
    memory: dict[str, Any]
    graphs: list[Row]


class _Kind(NamedTuple):
    """Where the rows of a kind are, and what each must have to be shown."""

    rows: str
    texts: Sequence[str] = ()
    numbers: Sequence[str] = ()


_TIMES = ("min_ms", "p50_ms", "p90_ms", "p99_ms", "images_per_second", "batch")
_SCORES = ("accuracy", "macro_f1", "ece", "agreement", "mean_kl")
_TIMED = _Kind("cases", ("model", "backend", "stage"), _TIMES)
_KINDS = {
    "latency": _TIMED,
    "peers": _TIMED,
    "accuracy": _Kind("rows", ("model", "backend"), _SCORES),
    "graphs": _Kind("graphs", ("name",), ("p50_ms", "multiply_adds")),
    "training": _Kind("cases"),
    "export": _Kind("artifacts", ("file",), ("bytes",)),
}
TIMED = tuple(name for name, kind in _KINDS.items() if kind is _TIMED)


def new_result(kind: str, config: object) -> dict[str, Any]:
    """The head of a result: how, where, when and with what it was measured.

    Args:
        kind: E.g. ``latency``.
        config: The command's config dataclass.

    Returns:
        A JSON object; the measurement adds its own keys.
    """
    options = {name: _without_folders(value) for name, value in vars(config).items()}
    options.pop("out", None)  # where it was written says nothing about what was measured
    return {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "software": describe_software(),
        "git": describe_commit(),
        "config": options,
    }


def default_folder(result: Mapping[str, Any]) -> Path:
    """Where a result goes that was given no ``--out``: a folder of its own, by kind and date."""
    moment = datetime.fromisoformat(result["date"]).strftime("%Y%m%d-%H%M%S")
    return RESULTS / f"{result['kind']}-{moment}-{host_kind(result['machine'])}"


def host_kind(machine: Mapping[str, Any]) -> str:
    """A short name of this kind of machine for file names, e.g. ``amd-epyc-2-cores``."""
    names = [gpu["name"] for gpu in machine["gpus"][:1]] or [
        machine["board"] or machine["cpu"] or machine["architecture"],
        f"{machine['usable_cpus']} cores",
    ]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON, atomically; paths become text."""
    write_text(path, json.dumps(result, indent=1, default=str, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Read what :func:`write_result` wrote, of this schema or an older one, or report.json.

    Raises:
        ArtifactError: The file is missing, truncated, something else, or of a newer schema.
    """
    require_file(path, "a benchmark's result")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise _unreadable(path, "no JSON, or a truncated file") from None
    if not isinstance(result, dict):
        raise _unreadable(path, "JSON without an object")
    if "kind" not in result and "artifacts" in result:
        result["kind"] = "export"  # report.json of efficientface-export, with a schema of its own
    else:
        _check_schema(result, path)
    for key in ("absent", "warnings"):
        if not isinstance(result.setdefault(key, []), list):
            raise _unreadable(path, f"{key} that is no list")
    read = cast(Result, result)
    for row in rows_of(read, path):
        _check_row(row, read["kind"], path)
    return read


@contextlib.contextmanager
def refuse_damaged(*paths: Path) -> Iterator[None]:
    """Turn what a damaged result does to the code that shows it into one line.

    The rows' own figures are checked when a result is read; deeper parts, which anyone may have
    edited, are not checked one by one.

    Raises:
        ArtifactError: Names the results.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"a part of another form ({type(error).__name__}: {error})"
        raise _unreadable(Path(", ".join(map(str, paths))), reason) from error


def rows_of(result: Result, path: Path | None = None) -> list[Row]:
    """The rows of a result; none of a kind that has a form of its own.

    Raises:
        ArtifactError: There are none where there must be.
    """
    kind = result["kind"]
    if kind not in _KINDS:
        return []
    key = _KINDS[kind].rows
    rows = result.get(key)
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return rows
    raise _unreadable(path or Path("result"), f"kind {kind!r} without {key}")


def headline(result: Mapping[str, Any]) -> str:
    """Machine, versions, commit and date on one line."""
    machine, software, git = (result.get(key) or {} for key in ("machine", "software", "git"))
    packages = software.get("packages") or {}
    shown = [name for name in ("onnxruntime", "onnxruntime-gpu", "torch") if name in packages]
    shown += [name for name in packages if name.startswith("tensorrt")]
    parts = [gpu["name"] for gpu in machine.get("gpus") or []]
    if machine:
        cpu = machine.get("board") or machine.get("cpu") or "unknown CPU"
        parts.append(f"{cpu}, {machine.get('usable_cpus')} CPUs")
    if software:
        parts += [software.get("os") or "unknown system", f"Python {software.get('python')}"]
    parts += [f"{name} {packages[name]}" for name in shown]
    if git:
        commit = (git.get("commit") or "no commit")[:9]
        parts.append(commit + ("+changes" if git.get("dirty") else ""))
    return " · ".join([*parts, *([result["date"]] if result.get("date") else [])])


def panels(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    """Cases that do the same work, with the name of that work; compute first, by batch."""
    found: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        found.setdefault((case["stage"], case["batch"]), []).append(case)
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != COMPUTE, item[0][1]))
    return [(work_name(own[0]), own) for _, own in ordered]


def work_name(case: Mapping[str, Any]) -> str:
    """``compute, batch 8`` or ``end to end``."""
    stage: str = case["stage"]
    return f"{stage}, batch {case['batch']}" if stage == COMPUTE else stage


def roofline_distance(case: Mapping[str, Any]) -> float | None:
    """A row's median by its roofline; None where none was measured."""
    floor = case.get("floor")
    return float(floor["distance"]) if floor else None


def digits(value: float | None) -> str:
    """Three digits, and no exponent: 0.0123, 1.20, 1234; nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:#.3g}".removesuffix(".") if value < 999.5 else f"{value:.0f}"


def _without_folders(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_folders(entry) for entry in value]
    return shown_path(value) if isinstance(value, Path) else value


def _check_schema(result: dict[str, Any], path: Path) -> None:
    schema, kind = result.get("schema"), result.get("kind")
    if type(schema) is not int or schema < 1 or not isinstance(kind, str):
        raise _unreadable(path, "an object without schema and kind")
    if kind not in _KINDS and not isinstance(result.get("machine"), dict):
        raise _unreadable(path, f"kind {kind!r} without a machine")
    if schema > SCHEMA_VERSION:
        raise ArtifactError(
            path,
            f"a result of schema {SCHEMA_VERSION} or older",
            f"schema {schema}, which a newer version wrote",
            "show it with that version, or measure again with this one",
        )


def _check_row(row: Row, kind: str, path: Path) -> None:
    """Refuse a row that could not be shown; what an older one lacks is not asked for."""
    for key in _KINDS[kind].texts:
        if not isinstance(row.get(key), str):
            raise _unreadable(path, f"a row whose {key} is {row.get(key)!r}")
    for key in _KINDS[kind].numbers:
        value = row.get(key)
        if type(value) not in (int, float) or not 0 <= cast(float, value) < math.inf:
            raise _unreadable(path, f"a row whose {key} is {value!r}")


def _unreadable(path: Path, found: str) -> ArtifactError:
    expected = f"a result of benchmarks/ (schema {SCHEMA_VERSION} or older)"
    return ArtifactError(path, expected, found, "copy it again, or measure again with this version")
