"""Results as JSON files: written, read back, checked; what their rows are called.

docs/benchmarks.md describes the form. A reader takes what it knows and ignores other keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import require_file, write_text
from efficientface_deploy.workbench.environment import (
    describe_commit,
    describe_machine,
    describe_software,
)

Result = dict[str, Any]
Case = dict[str, Any]

COMPUTE = "compute"
END_TO_END = "end to end"

TIMED = ("latency", "peers")  # kinds whose rows are calls that were timed
# Where the rows of a kind are; another kind may have its own form.
_ROWS = {"latency": "cases", "accuracy": "rows", "peers": "cases", "graphs": "graphs"}
_ROWS |= {"training": "cases", "export": "artifacts"}

_TIMES = ("min_ms", "p50_ms", "p90_ms", "p99_ms", "images_per_second")
_SCORES = ("accuracy", "macro_f1", "ece", "agreement", "mean_kl")
_TEXTS: dict[str, tuple[str, ...]] = {
    "latency": ("model", "backend", "stage"),
    "peers": ("model", "backend", "stage"),
}
_TEXTS |= {"accuracy": ("model", "backend"), "graphs": ("name",), "export": ("file",)}
_NUMBERS = {"latency": (*_TIMES, "batch"), "peers": (*_TIMES, "batch"), "accuracy": _SCORES}
_NUMBERS |= {"graphs": ("p50_ms", "multiply_adds"), "export": ("bytes",)}


def write_result(result: Result, path: Path) -> None:
    """Write a result as JSON, atomically; paths become text."""
    text = json.dumps(result, indent=1, default=str, allow_nan=False)
    write_text(path, text + "\n")


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
    for row in rows_of(result, path):
        _check_row(row, result["kind"], path)
    return result


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
        names = ", ".join(map(str, paths))
        reason = f"a part of another form ({type(error).__name__}: {error})"
        raise _unreadable(Path(names), reason) from error


def rows_of(result: Result, path: Path | None = None) -> list[Case]:
    """The rows of a result; none of a kind that has a form of its own.

    Raises:
        ArtifactError: There are none where there must be.
    """
    kind = result["kind"]
    if kind not in _ROWS:
        return []
    rows = result.get(_ROWS[kind])
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return rows
    raise _unreadable(path or Path("result"), f"kind {kind!r} without {_ROWS[kind]}")


def headline(result: Result) -> str:
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
    return [
        (f"{stage}, batch {batch}" if stage == COMPUTE else stage, group)
        for (stage, batch), group in ordered
    ]


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Model names without the beginning that all of them share, for labels in plots."""
    names = list(dict.fromkeys(models))
    prefix = names[0].partition("-")[0] + "-" if names else ""
    if len(names) > 1 and all(name.startswith(prefix) for name in names):
        return {name: name.removeprefix(prefix) for name in names}
    return {name: name for name in names}


def contender_label(case: Case, names: dict[str, str]) -> str:
    """A case's name on two lines: the model; backend and threads."""
    threads = "" if case.get("threads") is None else f", {_count(case['threads'], 'thread')}"
    return f"{names[case['model']]}\n{case['backend']}{threads}"


def floor_distance(case: Case) -> float | None:
    """A row's median by its floor; None where no floor was measured."""
    floor = case.get("floor")
    return float(floor["distance"]) if floor else None


def digits(value: float | None) -> str:
    """Three digits, and no exponent: 0.0123, 1.20, 1234; nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:#.3g}".removesuffix(".") if value < 999.5 else f"{value:.0f}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _check_schema(result: Result, path: Path) -> None:
    schema = result.get("schema")
    kind = result.get("kind")
    if type(schema) is not int or schema < 1 or not isinstance(kind, str):
        raise _unreadable(path, "an object without schema and kind")
    if kind not in _ROWS and not isinstance(result.get("machine"), dict):
        raise _unreadable(path, f"kind {kind!r} without a machine")
    if schema > SCHEMA_VERSION:
        raise ArtifactError(
            path,
            f"a result of schema {SCHEMA_VERSION} or older",
            f"schema {schema}, which a newer version wrote",
            "show it with that version, or measure again with this one",
        )


def _check_row(row: Case, kind: str, path: Path) -> None:
    """Refuse a row that could not be shown; what an older one lacks is not asked for."""
    for key in _TEXTS.get(kind, ()):
        if not isinstance(row.get(key), str):
            raise _unreadable(path, f"a row whose {key} is {row.get(key)!r}")
    for key in _NUMBERS.get(kind, ()):
        value: Any = row.get(key)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise _unreadable(path, f"a row whose {key} is {value!r}")


def _unreadable(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        path,
        f"a result of benchmarks/ (schema {SCHEMA_VERSION} or older)",
        found,
        "copy it again, or measure again with this version",
    )


SCHEMA_VERSION = 2  # of a result; 1 had no p95, cold start, floor and profile


def new_result(kind: str, config: Any) -> dict[str, Any]:
    """The head of a result: how, where, when and with what it was measured.

    Args:
        kind: ``latency`` or ``accuracy``.
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


def shown_path(path: Path) -> str:
    """A path as a result may tell it: within the repository, or the file's name alone."""
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else path.name


def host_kind(machine: dict[str, Any]) -> str:
    """A short name of this kind of machine for file names, e.g. ``amd-epyc-2-cores``."""
    names = [gpu["name"] for gpu in machine["gpus"][:1]] or [
        machine["board"] or machine["cpu"] or machine["architecture"],
        f"{machine['usable_cpus']} cores",
    ]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")


def default_folder(result: dict[str, Any]) -> Path:
    """Where a result goes that was given no ``--out``: a folder of its own, by kind and date."""
    moment = datetime.fromisoformat(result["date"]).strftime("%Y%m%d-%H%M%S")
    name = f"{result['kind']}-{moment}-{host_kind(result['machine'])}"
    return ROOT / "benchmarks" / "results" / name


def _without_folders(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_folders(entry) for entry in value]
    return shown_path(value) if isinstance(value, Path) else value
