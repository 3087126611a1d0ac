"""The tables of a result: which columns each has, and of which rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.report.columns import (
    Columns,
    Heading,
    interval,
    of,
    points,
    scaled,
    share,
    tabulate,
)
from benchmarks.report.result import (
    COMPUTE,
    END_TO_END,
    Result,
    Row,
    digits,
    panels,
    roofline_distance,
    rows_of,
)
from benchmarks.report.studies import STUDIES
from efficientface_deploy.workbench.tables import Table

TOP_LAYERS = 12
_PRECISIONS = ("fp32", "fp16", "int8")

# What a kind without tables of its own has beside its figures.
_HEAD = {"schema", "kind", "date", "machine", "software", "git", "config"}
_HEAD |= {"absent", "warnings", "goals"}


def tables_of(result: Result) -> list[Table]:
    """Every table that a result has, the most important first; none of them is empty."""
    makers = {"latency": latency_tables, "accuracy": accuracy_tables, "export": export_tables}
    make = (makers | STUDIES).get(result["kind"], generic_tables)
    found = [goals_table(result), *make(result), absent_table(result)]
    return [table for table in found if any(len(row) == len(table.columns) for row in table.rows)]


_MILLIONS = scaled(1e-6, 1)
_MODEL: Columns = {
    "Model": of("model"),
    "Backend": of("backend"),
    "Precision": lambda row: row.get("precision") or "?",
}
_WHERE: Columns = {**_MODEL, ">Threads": of("threads")}

# ---- latency


def latency_tables(result: Result) -> list[Table]:
    """Percentiles, cold starts, files, the machine's peak, profiles."""
    return [
        latency_table(result),
        cold_table(result),
        models_table(result),
        peak_table(result),
        profile_table(result),
        layers_table(result),
        engine_table(result),
    ]


def latency_table(result: Result) -> Table:
    """One row per case: percentiles, throughput, speed-up over the baseline, roofline."""
    cases = result["cases"]
    notes = [
        f"{COMPUTE}: a preprocessed uint8 batch in, probabilities out",
        f"{END_TO_END}: one JPEG in memory in, a label out",
    ]
    if result.get("baseline"):
        notes.append(f"speed-up: ratio of medians to {result['baseline']}, same work and threads")
    if any(case.get("floor") for case in cases):
        notes.append(
            "x roofline: p50 by the time of the network's multiply-adds at the measured peak of "
            "the format and threads"
        )
    columns = {
        **_WHERE,
        **{f">{name}": of(f"{name}_ms", digits) for name in ("p50", "p90", "p95", "p99", "min")},
        ">images/s": of("images_per_second", digits),
        ">Speed-up (95 %)": of("speedup", interval),
        ">x roofline": lambda case: digits(roofline_distance(case)),
        ">mJ an image": of("joules_per_image", lambda joules: digits(1e3 * joules)),
    }
    rows = [row for title, own in panels(cases) for row in (Heading(title), *own)]
    return tabulate("Latency, milliseconds a call", columns, rows, notes)


def cold_table(result: Result) -> Table:
    """One row per model and backend: the first label of a fresh process."""
    rows = result.get("cold") or []
    names = {"p50": "p50", "min": "min", "max": "max", "load()": "load"}
    names |= {"first label": "first_label", "whole process": "process"}
    columns = {
        **_WHERE,
        **{f">{name}": of(f"{key}_ms", digits) for name, key in names.items()},
        ">peak memory, MiB": of("peak_bytes", scaled(2**-20, 0)),
    }
    runs = max((row["runs"] for row in rows), default=0)
    note = (
        f"from the start of load() to the first label, in fresh processes (up to {runs} each); the "
        "import of the backend's library is in it"
    )
    return tabulate("Cold start, milliseconds", columns, rows, [note])


def models_table(result: Result) -> Table:
    """The files that were measured."""
    columns = {
        "Model": of("name"),
        "Network": of("network"),
        "Precision": lambda row: row.get("precision") or "?",
        "Input": of("input_size", lambda side: f"{side}x{side}"),
        ">MB": of("bytes", scaled(1e-6, 2)),
        ">M multiply-adds": of("multiply_adds", _MILLIONS),
        "SHA-256": of("sha256", lambda digest: str(digest[:12])),
    }
    notes = ["multiply-adds of one image, as the graph is laid out: padding included"]
    return tabulate("Files", columns, result.get("models") or [], notes)


def peak_table(result: Result) -> Table:
    """What the machine reached in the same run."""
    peaks = result.get("ceilings") or {"arithmetic": [], "bandwidth": []}
    copies = {row["threads"]: row["bytes_per_second"] for row in peaks["bandwidth"]}
    rows = [{**row, "copy": copies.get(row["threads"])} for row in peaks["arithmetic"]]
    rows += [
        {"threads": "GPU", "format": name, "multiply_adds_per_second": rate, "by": "torch"}
        for name, rate in (peaks.get("gpu") or {}).items()
    ]
    columns = {
        ">Threads": of("threads"),
        "Format": of("format"),
        ">G multiply-adds/s": of("multiply_adds_per_second", scaled(1e-9, 1)),
        "By": of("by"),
        "Tried": of("tried", lambda own: ", ".join(f"{n} {r / 1e9:.1f}" for n, r in own.items())),
        ">Copy, GB/s": of("copy", lambda rate: digits(rate / 1e9)),
    }
    notes = ["matrix products; a copy larger than the last-level cache, bytes read and written"]
    return tabulate("The machine's peak, measured in the same run", columns, rows, notes)


def profile_table(result: Result) -> Table:
    """Where the time goes, by what the operators do; a column for each model."""
    profiles = [entry for entry in result.get("profiles") or [] if "kinds" in entry]
    found = [{row["kind"]: row for row in profile["kinds"]} for profile in profiles]
    # In the order of the profile with most kinds.
    kinds = dict.fromkeys(kind for own in sorted(found, key=len, reverse=True) for kind in own)
    body = [[kind, *(_profile_cell(own.get(kind)) for own in found)] for kind in kinds]
    if profiles:
        body.append(["all", *(f"{profile['total_us']:,.0f}" for profile in profiles)])
    columns = ["Microseconds a pass", *(f">{_profile_name(profile)}" for profile in profiles)]
    note = (
        "medians by ONNX Runtime's profiler, batch 1; in brackets multiply-adds, M, and how many a "
        "nanosecond; its time stamps make the sum longer than a pass without it"
    )
    return Table(columns, body, "Profile by kind of operator", [note])


def _profile_cell(row: Row | None) -> str:
    if row is None:
        return ""
    cell = f"{row['us']:,.0f}"
    if row["multiply_adds"]:
        rate = row["multiply_adds"] / row["us"] / 1e3  # us -> ns
        cell += f" ({row['multiply_adds'] / 1e6:.1f} M, {rate:.1f})"
    return cell


def _profile_name(profile: Row) -> str:
    threads = profile.get("threads")
    suffix = "" if threads is None else f", {threads} thr."
    return f"{profile['model']} ({profile['backend']}{suffix})"


def layers_table(result: Result) -> Table:
    """The layers that take longest, for each model."""
    rows: list[Row | Heading] = []
    for profile in result.get("profiles") or []:
        layers = (profile.get("layers") or [])[:TOP_LAYERS]
        own = [{**layer, "share": layer["us"] / profile["total_us"]} for layer in layers]
        rows += [Heading(_profile_name(profile)), *own] if own else []
    columns = {
        "Layer": of("name"),
        "Operator": of("operator"),
        "Kind": of("kind"),
        ">us": of("us", digits),
        ">%": of("share", scaled(100, 1)),
        ">M multiply-adds": of("multiply_adds", lambda n: f"{n / 1e6:.2f}" if n else ""),
    }
    return tabulate(f"Profile: the {TOP_LAYERS} layers that take longest", columns, rows)


def engine_table(result: Result) -> Table:
    """The layers of each engine, counted by kind."""
    rows: list[Row | Heading] = []
    for profile in result.get("profiles") or []:
        kinds = [layer["kind"] for layer in profile.get("engine_layers") or []]
        own = [{"kind": kind, "layers": kinds.count(kind)} for kind in dict.fromkeys(kinds)]
        rows += [Heading(_profile_name(profile)), *own] if own else []
    columns = {"Kind": of("kind"), ">Layers": of("layers")}
    return tabulate("Engines' layers, by TensorRT's inspector", columns, rows)


# ---- accuracy, export


def accuracy_tables(result: Result) -> list[Table]:
    """How good each model is, and how near to the reference; its recall of each class."""
    return [accuracy_table(result), per_class_table(result)]


def accuracy_table(result: Result) -> Table:
    """One row per model and backend."""
    rows, data = result["rows"], result["data"]
    columns = {
        **_MODEL,
        ">Accuracy %": share("accuracy"),
        ">Macro-F1 %": share("macro_f1"),
        ">ECE %": share("ece"),
        ">Agreement %": share("agreement"),
        ">Accuracy minus reference's, points": of("difference", points),
        ">Mean KL": of("mean_kl", lambda value: f"{value:.2g}"),
        ">Max |dp|": of("max_probability_difference", lambda value: f"{value:.2g}"),
        ">MiB": of("bytes", scaled(2**-20, 2)),
    }
    notes = [f"agreement, KL and difference: against {result['reference']}"]
    if any("difference" in row for row in rows):
        notes.append("in brackets 95 % intervals over images; of a difference, paired by image")
    title = f"{data['name']}, {data['split']} split, {data['images']} images"
    return tabulate(title, columns, rows, notes)


def per_class_table(result: Result) -> Table:
    """Recall of each class, a column for each model; precision and F1 are in the JSON."""
    rows = [row for row in result["rows"] if row.get("recall")]
    labels = result["data"].get("labels") or []
    counts = result["data"].get("images_per_class")
    body = [
        [label, *([counts[index]] if counts else []), *(_class_cell(row, index) for row in rows)]
        for index, label in enumerate(labels)
    ]
    notes = ["in brackets F1"] if any("f1" in row for row in rows) else []
    columns = ["Class", *([">Images"] if counts else []), *(f">{row['model']}" for row in rows)]
    return Table(columns, body if rows else [], "Recall of each class, %", notes)


def _class_cell(row: Row, index: int) -> str:
    recall = row["recall"][index]
    f1 = row["f1"][index] if row.get("f1") else None
    cell = "-" if recall is None else f"{100 * recall:.1f}"
    return cell if f1 is None else f"{cell} ({100 * f1:.1f})"


def export_tables(result: Result) -> list[Table]:
    """One row per exported file, from the report of efficientface-export; engines come last."""

    def order(entry: Row) -> tuple[bool, int]:
        precision = entry.get("precision")
        rank = _PRECISIONS.index(precision) if precision in _PRECISIONS else len(_PRECISIONS)
        return not entry["file"].endswith(".onnx"), rank

    def kernels(entry: Row) -> str:
        found = re.search(r"\b(\d+) kernels\b", " ".join(map(str, entry.get("notes") or [])))
        return found[1] if found else ""

    def difference(entry: Row) -> str:
        value, ends = entry.get("accuracy_difference"), entry.get("accuracy_interval")
        return "" if value is None else points({"value": value, "interval": ends})

    rows = [{**row, **(row.get("verification") or {})} for row in rows_of(result)]
    columns: Columns = {
        "File": of("file", lambda name: f"`{name}`"),
        ">MB": of("bytes", scaled(1e-6, 2)),
        "Arithmetic": of("arithmetic"),
        ">Kernels": kernels,
        ">Same label %": share("agreement"),
        ">Accuracy minus PyTorch's, points": difference,
        ">Mean KL": of("kl", lambda value: f"{value:.1e}"),
        "Status": of("status"),
    }
    title = f"Export of {result.get('weights') or 'a model'}"
    return [tabulate(title, columns, sorted(rows, key=order))]


# ---- any kind


def goals_table(result: Result) -> Table:
    """Goals and what was reached, whatever keys they have."""
    return _free_table("Goals", result.get("goals") or [])


def generic_tables(result: Result) -> list[Table]:
    """A kind that has no tables of its own: each list of objects, and each object of objects."""
    tables = []
    for key, value in result.items():
        if key in _HEAD:
            continue
        if isinstance(value, dict):
            parts = {name: part for name, part in value.items() if isinstance(part, dict)}
            alone = {name: part for name, part in value.items() if name not in parts}
            value = [{"part": name, **part} for name, part in parts.items()]
            value += [{"part": "all", **alone}] if alone else []
        if isinstance(value, list):
            tables.append(_free_table(key.replace("_", " "), value))
    return tables


def _free_table(title: str, rows: Sequence[Any]) -> Table:
    """Any list of objects: a column for each key whose values are single ones."""
    usable = [row for row in rows if isinstance(row, dict)]
    columns = {}
    for key in dict.fromkeys(key for row in usable for key in row):
        values = [row.get(key) for row in usable]
        if not any(map(_is_nested, values)):
            number = all(type(value) in (int, float, type(None)) for value in values)
            columns[(">" if number else "") + key.replace("_", " ")] = of(key)
    return tabulate(title, columns, usable)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and "value" not in value)


def absent_table(result: Result) -> Table:
    """What was not measured, and why; one row per backend and reason."""
    models: dict[tuple[str, str], list[str]] = {}
    for entry in result["absent"]:
        key = str(entry.get("backend", "")), str(entry.get("reason", ""))
        models.setdefault(key, []).append(str(entry.get("model", "")))
    rows = [
        {"backend": backend, "models": ", ".join(filter(None, names)), "reason": reason}
        for (backend, reason), names in models.items()
    ]
    columns = {"Backend": of("backend"), "Model": of("models"), "Why": of("reason")}
    return tabulate("Not measured here", columns, rows)
