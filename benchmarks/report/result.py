"""Results as JSON files: written, and read back. docs/result-files.md describes their form.

A reader takes what it knows and ignores other keys; what an older result lacks is not shown.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import ROOT, shown_path
from efficientface_deploy.errors import ArtifactError, printable
from efficientface_deploy.files import read_json, require_file, write_text
from efficientface_deploy.workbench.environment import (
    describe_commit,
    describe_machine,
    describe_software,
)

SCHEMA_VERSION = 2  # 1 had no p95, cold start, roofline and profile
RESULTS = ROOT / "benchmarks" / "results"
# The kinds of other commands' reports, which have a schema of their own, by a part they have.
_OTHERS = {"artifacts": "export", "runs": "trainings"}

COMPUTE = "compute"
END_TO_END = "end to end"

# Kinds whose cases are timed calls, with percentiles and the median of each round.
TIMED = ("latency", "peers")

Result = dict[str, Any]
Row = dict[str, Any]


def new_result(kind: str, config: object) -> Result:
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


def default_folder(result: Result) -> Path:
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


def write_result(result: Result, path: Path) -> None:
    """Write a result as JSON, atomically; paths become text."""
    write_text(path, json.dumps(result, indent=1, default=str, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Read a result of this schema or an older one, or what another command of ours reports.

    That is report.json of efficientface-export, or comparison.json of training.compare.

    Its parts are not checked here: :func:`damage_named` is for those who use them.

    Returns:
        The JSON object; ``absent``, ``warnings`` and ``goals`` are there, if only as empty lists.

    Raises:
        ArtifactError: The file is missing, truncated, something else, or of a newer schema.
    """
    require_file(path, "a benchmark's result")
    try:
        result = read_json(path, parse_constant=_refuse_constant)
    except ValueError:
        raise _unreadable(path, "no JSON, or a truncated file") from None
    if isinstance(result, dict) and "kind" not in result and (others := _OTHERS.keys() & result):
        result |= {"kind": _OTHERS[others.pop()], "schema": SCHEMA_VERSION}
    elif (
        not isinstance(result, dict)
        or type(result.get("schema")) is not int
        or not isinstance(result.get("kind"), str)
        or not isinstance(result.get("machine"), dict)
    ):
        raise _unreadable(path, "something without schema, kind and machine")
    if result["schema"] > SCHEMA_VERSION:
        raise ArtifactError(
            path,
            f"a result of schema {SCHEMA_VERSION} or older",
            f"schema {result['schema']}, which a newer version wrote",
            "show it with that version, or measure again with this one",
        )
    return {"absent": [], "warnings": [], "goals": [], **result}


@contextlib.contextmanager
def damage_named(*paths: Path) -> Iterator[None]:
    """Turn what a damaged result does to the code that shows or compares it into one line.

    Raises:
        ArtifactError: Names the results.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"a part that cannot be used ({type(error).__name__}: {error})"
        raise _unreadable(", ".join(map(str, paths)), reason) from error


def headline(result: Result) -> str:
    """Machine, versions, commit and date on one line."""
    machine, software, git = (result.get(key) or {} for key in ("machine", "software", "git"))
    packages = software.get("packages") or {}
    shown = [name for name in ("onnxruntime", "onnxruntime-gpu", "torch") if name in packages]
    shown += [name for name in packages if name.startswith("tensorrt")]
    versions = {name: packages[name] for name in shown} | (result.get("packages") or {})
    parts = [gpu["name"] for gpu in machine.get("gpus") or []]
    if machine:
        cpu = machine.get("board") or machine.get("cpu") or "unknown CPU"
        parts.append(f"{cpu}, {machine.get('usable_cpus')} CPUs")
    if software:
        parts += [software.get("os") or "unknown system", f"Python {software.get('python')}"]
    parts += [f"{name} {version}" for name, version in versions.items()]
    if git:
        commit = (git.get("commit") or "no commit")[:9]
        parts.append(commit + ("+changes" if git.get("dirty") else ""))
    return printable(" · ".join([*parts, *([result["date"]] if result.get("date") else [])]))


def panels(cases: Sequence[Row]) -> dict[str, list[Row]]:
    """Timed cases by the work that they do: compute, by batch size, then end to end."""
    found: dict[str, list[Row]] = {}
    for case in sorted(cases, key=lambda case: (case["stage"] != COMPUTE, case["batch"])):
        found.setdefault(work_name(case), []).append(case)
    return found


def work_name(case: Row) -> str:
    """``compute, batch 8`` or ``end to end``."""
    stage: str = case["stage"]
    return f"{stage}, batch {case['batch']}" if stage == COMPUTE else stage


def _without_folders(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_folders(entry) for entry in value]
    return shown_path(value) if isinstance(value, Path) else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON does not have")


def _unreadable(subject: object, found: str) -> ArtifactError:
    expected = f"a result of benchmarks/ (schema {SCHEMA_VERSION} or older)"
    fix = "copy it again, or measure again with this version"
    return ArtifactError(subject, expected, found, fix)
