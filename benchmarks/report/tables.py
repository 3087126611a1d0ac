"""The tables of a result, described once; shown on a terminal, as Markdown and as HTML.

rich is imported where it draws, so that the others need no package.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.report.result import (
    COMPUTE,
    END_TO_END,
    TIMED,
    Case,
    Result,
    digits,
    floor_distance,
    panels,
    rows_of,
)

if TYPE_CHECKING:
    from rich.table import Table as RichTable
import importlib.util
from typing import TYPE_CHECKING

from benchmarks.report.result import headline
from efficientface_deploy.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Row = Sequence[str]

GOALS = "Goals"  # title
TOP_LAYERS = 12
KNOWN = (*TIMED, "accuracy", "graphs", "export")  # kinds with tables of their own

# What a kind without tables of its own has beside its figures.
_HEAD = {"schema", "kind", "date", "machine", "software", "git", "config"}
_HEAD |= {"absent", "warnings", "goals"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Above it.
        columns: Names; one that starts with ``>`` holds numbers, which are set to the right.
        groups: Heading and rows of each part; an empty heading is not shown.
        notes: Below it, a sentence each.
    """

    title: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Row]]]
    notes: Sequence[str] = ()

    def __rich__(self) -> RichTable:
        """The table as rich prints it."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        drawn = RichTable(title=escape(self.title), caption=escape("\n".join(self.notes)) or None)
        for name in self.columns:
            drawn.add_column(
                _name(name), justify="right" if _is_number(name) else "left", overflow="fold"
            )
        for heading, rows in self.groups:
            if heading:
                drawn.add_section()
                drawn.add_row(f"[bold]{escape(heading)}[/bold]")
            for row in rows:
                drawn.add_row(*map(escape, row))
        return drawn

    def to_markdown(self) -> str:
        """The table in Markdown; its headings become cells of their own row."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append(_markdown_row(map(_name, self.columns)))
        lines.append(
            "|" + "|".join("--:" if _is_number(name) else "---" for name in self.columns) + "|"
        )
        for heading, rows in self.groups:
            if heading:
                lines.append(_markdown_row([f"**{heading}**", *[""] * (len(self.columns) - 1)]))
            lines += [_markdown_row(row) for row in rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """The table in HTML, in a box that scrolls where it is wider than the page."""
        kinds = ["number" if _is_number(name) else "text" for name in self.columns]
        head = "".join(
            f'<th class="{kind}" scope="col">{html.escape(_name(name))}</th>'
            for name, kind in zip(self.columns, kinds, strict=True)
        )
        body = []
        for heading, rows in self.groups:
            body.append("<tbody>")
            if heading:
                span = len(self.columns)
                heading = html.escape(heading)
                body.append(
                    f'<tr><th class="group" colspan="{span}"><span>{heading}</span></th></tr>'
                )
            for row in rows:
                cells = "".join(
                    f'<td class="{kind}">{html.escape(cell)}</td>'
                    for cell, kind in zip(row, kinds, strict=False)
                )
                body.append(f"<tr>{cells}</tr>")
            body.append("</tbody>")
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        title = html.escape(self.title)
        return (
            f'<figure class="table"><figcaption>{title}</figcaption>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
            f"<thead><tr>{head}</tr></thead>{''.join(body)}</table></div>"
            + (f'<ul class="notes">{notes}</ul>' if notes else "")
            + "</figure>"
        )


def tables_of(result: Result) -> list[Table]:
    """Every table that a result has, the most important first; none of them is empty."""
    kind = result["kind"]
    if kind in TIMED:
        makers: Sequence[Callable[[Result], Table]] = (
            goals_table,
            latency_table,
            gpu_table,
            cold_table,
            models_table,
            ceilings_table,
            kinds_table,
            layers_table,
            engine_table,
        )
    elif kind == "accuracy":
        makers = (accuracy_table, per_class_table)
    elif kind == "graphs":
        makers = (graphs_table,)
    elif kind == "export":
        makers = (export_table,)
    else:
        makers = (goals_table,)
    tables = [make(result) for make in makers]
    if kind not in KNOWN:
        tables += generic_tables(result)
    if result["absent"]:
        tables.append(absent_table(result["absent"]))
    full = [table for table in tables if any(rows for _, rows in table.groups)]
    return [_without_empty_columns(table) for table in full]


def _without_empty_columns(table: Table) -> Table:
    """The table without what no row has: an older result measured less."""
    rows = [row for _, own in table.groups for row in own]
    kept = [index for index in range(len(table.columns)) if any(row[index] for row in rows)]
    groups = [(heading, [[row[i] for i in kept] for row in own]) for heading, own in table.groups]
    return dataclasses.replace(table, columns=[table.columns[i] for i in kept], groups=groups)


def latency_table(result: Result) -> Table:
    """One row per case: percentiles, throughput, speed-up over the baseline, floor."""
    cases = rows_of(result)
    notes = [
        f"{COMPUTE}: a preprocessed uint8 batch in, probabilities out",
        f"{END_TO_END}: one JPEG in memory in, a label out",
    ]
    if result.get("baseline"):
        notes.append(f"speed-up: ratio of medians to {result['baseline']}, same work and threads")
    if any(case.get("floor") for case in cases):
        notes.append(
            "x floor: p50 by the time of the network's multiply-adds at the measured peak of the "
            "format and threads"
        )
    extra = [name for name in ("group", "note") if any(case.get(name) for case in cases)]
    columns = ["Model", "Backend", "Precision", ">Threads", ">p50", ">p90", ">p95", ">p99", ">min"]
    columns += [">images/s", ">Speed-up (95 %)", ">x floor", *(name.capitalize() for name in extra)]
    groups = [
        (
            title,
            [[*_latency_cells(case), *(str(case.get(key) or "") for key in extra)] for case in own],
        )
        for title, own in panels(cases)
    ]
    return Table("Latency, milliseconds a call", columns, groups, notes)


def gpu_table(result: Result) -> Table:
    """What the rows of a GPU have beside: stages by CUDA events, and energy."""
    names = ("host_to_device_ms", "compute_ms", "device_to_host_ms")
    rows = []
    for case in rows_of(result):
        stages = case.get("stages") or {}
        joules = case.get("joules_per_image")
        if stages or joules is not None:
            row = [case["model"], case["backend"], case.get("precision"), str(case["batch"])]
            row += [digits(stages.get(name)) for name in names]
            rows.append([*row, digits(None if joules is None else 1e3 * joules)])
    columns = ["Model", "Backend", "Precision", ">Batch", ">to device, ms", ">compute, ms"]
    columns += [">to host, ms", ">mJ an image"]
    return Table("GPU: stages by CUDA events, energy by NVML", columns, [("", rows)])


def cold_table(result: Result) -> Table:
    """One row per model and backend: the first label of a fresh process."""
    rows = [
        [
            *(row["model"], row["backend"], row.get("precision") or "?", _text(row.get("threads"))),
            *(digits(row[key]) for key in ("p50_ms", "min_ms", "max_ms", "load_ms")),
            *(digits(row[key]) for key in ("first_label_ms", "process_ms")),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in result.get("cold") or []
    ]
    columns = ["Model", "Backend", "Precision", ">Threads", ">p50", ">min", ">max", ">load()"]
    columns += [">first label", ">whole process", ">peak memory, MiB"]
    runs = max((row["runs"] for row in result.get("cold") or []), default=0)
    notes = (
        f"from the start of load() to the first label, in fresh processes (up to {runs} each); the "
        "import of the backend's library is in it",
    )
    return Table("Cold start, milliseconds", columns, [("", rows)], notes)


def models_table(result: Result) -> Table:
    """The files that were measured."""
    rows = []
    for model in result.get("models") or []:
        count = model.get("multiply_adds")
        side = model.get("input_size")
        rows.append(
            [
                *(model["name"], model.get("network") or "", model.get("precision") or "?"),
                f"{side}x{side}" if side else "",
                f"{model['bytes'] / 1e6:.2f}" if "bytes" in model else "",
                "" if count is None else f"{count / 1e6:.1f}",
                (model.get("sha256") or "")[:12],
            ]
        )
    columns = ["Model", "Network", "Precision", "Input", ">MB", ">M multiply-adds", "SHA-256"]
    notes = ("multiply-adds of one image, as the graph is laid out: padding included",)
    return Table("Files", columns, [("", rows)], notes)


def ceilings_table(result: Result) -> Table:
    """What the machine reached in the same run."""
    ceilings = result.get("ceilings") or {"arithmetic": [], "bandwidth": []}
    bandwidth = {row["threads"]: row["bytes_per_second"] for row in ceilings["bandwidth"]}
    rows = [
        [
            *(str(row["threads"]), row["format"]),
            f"{row['multiply_adds_per_second'] / 1e9:.1f}",
            row["by"],
            ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in row["tried"].items()),
            digits(bandwidth.get(row["threads"], 0) / 1e9),
        ]
        for row in ceilings["arithmetic"]
    ]
    rows += [
        ["GPU", name, f"{rate / 1e9:.0f}", "torch", "", ""]
        for name, rate in (ceilings.get("gpu") or {}).items()
    ]
    columns = [">Threads", "Format", ">G multiply-adds/s", "By", "Tried", ">Copy, GB/s"]
    notes = ("matrix products; a copy larger than the last-level cache, bytes read and written",)
    return Table("The machine's peak, measured in the same run", columns, [("", rows)], notes)


def kinds_table(result: Result) -> Table:
    """Where the time goes, by what the operators do; a column for each model."""
    profiles = [entry for entry in result.get("profiles") or [] if "kinds" in entry]
    found = [{row["kind"]: row for row in profile["kinds"]} for profile in profiles]
    kinds = list(dict.fromkeys(row["kind"] for profile in profiles for row in profile["kinds"]))
    kinds.sort(key=_kind_order(result))
    rows = [[kind, *(_kind_cell(own.get(kind)) for own in found)] for kind in kinds]
    if profiles:
        rows.append(["all", *(f"{profile['total_us']:,.0f}" for profile in profiles)])
    columns = ["Microseconds a pass", *(f">{_profile_name(profile)}" for profile in profiles)]
    notes = (
        "medians by ONNX Runtime's profiler, batch 1; in brackets multiply-adds, M, and how many a "
        "nanosecond; its time stamps make the sum longer than a pass without it",
    )
    return Table("Profile by kind of operator", columns, [("", rows)], notes)


def layers_table(result: Result) -> Table:
    """The layers that take longest, for each model."""
    groups = []
    for profile in result.get("profiles") or []:
        layers = profile.get("layers") or []
        rows = [
            [
                *(layer["name"], layer["operator"], layer["kind"], digits(layer["us"])),
                f"{100 * layer['us'] / profile['total_us']:.1f}",
                f"{layer['multiply_adds'] / 1e6:.2f}" if layer["multiply_adds"] else "",
            ]
            for layer in layers[:TOP_LAYERS]
        ]
        groups.append((_profile_name(profile), rows))
    columns = ["Layer", "Operator", "Kind", ">us", ">%", ">M multiply-adds"]
    return Table(f"Profile: the {TOP_LAYERS} layers that take longest", columns, groups)


def engine_table(result: Result) -> Table:
    """The layers of each engine, counted by kind."""
    groups = []
    for profile in result.get("profiles") or []:
        kinds = [layer["kind"] for layer in profile.get("engine_layers") or []]
        rows = [[kind, str(kinds.count(kind))] for kind in dict.fromkeys(kinds)]
        groups.append((_profile_name(profile), rows))
    return Table("Engines' layers, by TensorRT's inspector", ["Kind", ">Layers"], groups)


def accuracy_table(result: Result) -> Table:
    """One row per model and backend: how good, and how near to the reference."""
    data = result["data"]
    title = f"{data['name']}, {data['split']} split, {data['images']} images"
    rows = []
    for row in rows_of(result):
        difference = row.get("difference")
        rows.append(
            [
                *(row["model"], row["backend"], row.get("precision") or "?"),
                _percent(row["accuracy"], row.get("accuracy_interval")),
                _percent(row["macro_f1"], row.get("macro_f1_interval")),
                _percent(row["ece"], None),
                _percent(row["agreement"], row.get("agreement_interval")),
                "" if difference is None else _points(difference),
                f"{row['mean_kl']:.2g}",
                f"{row['max_probability_difference']:.2g}",
                f"{row['bytes'] / 2**20:.2f}",
            ]
        )
    columns = ["Model", "Backend", "Precision", ">Accuracy %", ">Macro-F1 %", ">ECE %"]
    columns += [
        ">Agreement %",
        ">Accuracy minus reference's, points",
        ">Mean KL",
        ">Max |dp|",
        ">MiB",
    ]
    notes = [f"agreement, KL and difference: against {result['reference']}"]
    if any("difference" in row for row in rows_of(result)):
        notes.append("in brackets 95 % intervals over images; of a difference, paired by image")
    return Table(title, columns, [("", rows)], notes)


def per_class_table(result: Result) -> Table:
    """Recall of each class, a column for each model; precision and F1 are in the JSON."""
    rows = [row for row in rows_of(result) if row.get("recall")]
    labels = result["data"].get("labels") or []
    counts = result["data"].get("images_per_class") or [None] * len(labels)
    body = []
    for index, (label, count) in enumerate(zip(labels, counts, strict=False)):
        cells = [_class_cell(row, index) for row in rows]
        body.append([label, _text(count), *cells])
    names = [f">{row['model']}" for row in rows]
    notes = ("in brackets F1",) if any("f1" in row for row in rows) else ()
    columns = ["Class", ">Images", *names]
    return Table("Recall of each class, %", columns, [("", body if rows else [])], notes)


def goals_table(result: Result) -> Table:
    """Goals and what was reached, whatever keys they have."""
    return _free_table(GOALS, result.get("goals") or [])


def graphs_table(result: Result) -> Table:
    """One row per layout of the graph; benchmarks/graph_layouts.py has the explanations."""
    rows = []
    for row in rows_of(result):
        ratio = row.get("time_ratio")
        rows.append(
            [
                row["name"],
                digits(row["p50_ms"]),
                ""
                if ratio is None
                else f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
                f"{row['multiply_adds'] / 1e6:.1f}",
                _text(row.get("nodes")),
                _text(row.get("kernels")),
            ]
        )
    columns = ["Graph", ">p50, ms", ">by the baseline's (95 %)", ">M multiply-adds", ">nodes"]
    return Table("Layouts of the graph", [*columns, ">kernels"], [("", rows)])


def export_table(result: Result) -> Table:
    """One row per exported file, from the report of efficientface-export."""
    rows = []
    for entry in rows_of(result):
        check = entry.get("verification") or {}
        ran = check.get("agreement") is not None
        rows.append(
            [
                entry["file"],
                f"{entry['bytes'] / 1e6:.2f}",
                str(entry.get("arithmetic") or ""),
                _percent(check["agreement"], check.get("agreement_interval")) if ran else "",
                _points(
                    {"value": check["accuracy_difference"], "interval": check["accuracy_interval"]}
                )
                if ran and check.get("accuracy_difference") is not None
                else "",
                f"{check['kl']:.1e}" if ran and check.get("kl") is not None else "",
                str(check.get("status") or ""),
            ]
        )
    columns = ["File", ">MB", "Arithmetic", ">Same label %", ">Accuracy minus PyTorch's, points"]
    title = f"Export of {result.get('weights') or 'a model'}"
    return Table(title, [*columns, ">Mean KL", "Status"], [("", rows)])


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


def absent_table(absent: Sequence[Mapping[str, str]]) -> Table:
    """What was not measured, and why; one row per backend and reason."""
    models: dict[tuple[str, str], list[str]] = {}
    for entry in absent:
        key = str(entry.get("backend", "")), str(entry.get("reason", ""))
        models.setdefault(key, []).append(str(entry.get("model", "")))
    rows = [
        [backend, ", ".join(filter(None, names)), reason]
        for (backend, reason), names in models.items()
    ]
    return Table("Not measured here", ["Backend", "Model", "Why"], [("", rows)])


def _free_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Any list of objects: a column for each key whose values are single ones."""
    usable = [row for row in rows if isinstance(row, dict)]
    keys = [
        key
        for key in dict.fromkeys(key for row in usable for key in row)
        if not any(_is_nested(row.get(key)) for row in usable)
    ]
    numbers = [
        all(type(row.get(key)) in (int, float, type(None)) for row in usable) for key in keys
    ]
    columns = [
        (">" if number else "") + key.replace("_", " ")
        for key, number in zip(keys, numbers, strict=True)
    ]
    return Table(title, columns, [("", [[_text(row.get(key)) for key in keys] for row in usable])])


def _latency_cells(case: Case) -> list[str]:
    times = [digits(case.get(f"{key}_ms")) for key in ("p50", "p90", "p95", "p99", "min")]
    return [
        *(case["model"], case["backend"], case.get("precision") or "?", _text(case.get("threads"))),
        *times,
        digits(case["images_per_second"]),
        speedup_text(case.get("speedup")),
        digits(floor_distance(case)),
    ]


def speedup_text(speedup: Mapping[str, float] | None) -> str:
    """``2.00 (1.90 to 2.10)``."""
    if speedup is None:
        return ""
    return f"{speedup['value']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})"


def _kind_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    cell = f"{row['us']:,.0f}"
    if row["multiply_adds"]:
        rate = row["multiply_adds"] / row["us"] / 1e3  # us -> ns
        cell += f" ({row['multiply_adds'] / 1e6:.1f} M, {rate:.1f})"
    return cell


def _kind_order(result: Result) -> Callable[[str], int]:
    """The order of the first profile that has a kind; a kind of a later one comes where it does."""
    orders = [
        [row["kind"] for row in profile["kinds"]]
        for profile in result.get("profiles") or []
        if "kinds" in profile
    ]
    longest = max(orders, key=len, default=[])
    return lambda kind: longest.index(kind) if kind in longest else len(longest) - 1


def _profile_name(profile: Mapping[str, Any]) -> str:
    threads = profile.get("threads")
    suffix = "" if threads is None else f", {threads} thr."
    return f"{profile['model']} ({profile['backend']}{suffix})"


def _class_cell(row: Mapping[str, Any], index: int) -> str:
    recall = row["recall"][index]
    f1 = (row.get("f1") or {index: None})[index]
    cell = "-" if recall is None else f"{100 * recall:.1f}"
    return cell if f1 is None else f"{cell} ({100 * f1:.1f})"


def _percent(value: float, interval: Sequence[float] | None) -> str:
    text = f"{100 * value:.2f}"
    if interval is None:
        return text
    return f"{text} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"


def _points(difference: Mapping[str, Any]) -> str:
    """A difference of shares in percentage points, with its interval."""
    low, high = difference["interval"]
    return f"{100 * difference['value']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and "value" not in value)


def _text(value: Any) -> str:
    """A single value; an object is a figure with its interval."""
    if value is None:
        return ""
    if isinstance(value, dict):
        ends = f" ({_text(value['low'])} to {_text(value['high'])})" if "low" in value else ""
        return _text(value["value"]) + ends
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(column: str) -> bool:
    return column.startswith(">")


def _name(column: str) -> str:
    return column.removeprefix(">")


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_PLAIN_WIDTH = 180  # of a file or pipe, which has none of its own


def require_libraries() -> None:
    """Ask for what draws before the measurement rather than after it.

    Raises:
        ConfigError: rich or matplotlib is not installed.
    """
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "benchmarks",
            "rich and matplotlib",
            f"no {' and no '.join(missing)}",
            "pip install 'efficientface-deploy[bench]'",
        )


def console() -> Console:
    """Standard output; wide enough for the tables when it is no terminal."""
    from rich.console import Console

    output = Console(highlight=False)
    return output if output.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def show(result: Result, output: Console) -> None:
    """Print a result: machine, tables, what is absent, warnings."""
    output.print(headline(result), markup=False)
    for table in tables_of(result):
        output.print(table)
    for warning in result["warnings"]:
        output.print(f"warning: {warning}", style="yellow", markup=False)
