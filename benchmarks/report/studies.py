"""The studies: peers, runtime, graph layouts and training steps; their tables, their one command.

Each function for tables takes a result of its kind, one made by an older version too, and gives its
tables, the most important first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report.result import Result, default_folder, headline, write_result
from benchmarks.report.tables import absent_table, console, require_libraries
from efficientface_deploy.command import parse_config
from efficientface_deploy.files import write_text
from efficientface_deploy.workbench.tables import Table

NOISY = "the machine was busy with something else: read the times with care"

_MET = {True: "yes", False: "**no**", None: "-"}


def peers_tables(result: Result) -> list[Table]:
    """Goals, a group of rows for each batch and number of threads, and each toolchain's options."""
    goals = [
        [
            *(row["goal"], f"{row['wanted']:g}", _ratio(row["reached"], 2)),
            *(_MET[row["met"]], row["against"]),
        ]
        for row in result["goals"]
    ]
    works: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["cases"]:
        plural = "s" if row["threads"] > 1 else ""
        work = f"batch {row['batch']}, {row['threads']} thread{plural}"
        works.setdefault(work, []).append(row)
    calls = []
    for work, rows in works.items():
        calls += [[work], *(_peer(row) for row in sorted(rows, key=_by_network_and_time))]
    side = result["config"]["input_size"]
    notes = (
        f"{side}x{side}, random weights; a call is the same work for all: from uint8 pictures in "
        "memory to logits, normalisation included",
        "ours is faster: median of the row by ours, the faster of ours where there are two",
        "difference: of the logits from PyTorch's, by the largest logit; a row that differs too "
        "much is not ranked",
        "CPUs: CPU time by time, which shows whether the threads are as many as they should be",
        " · ".join(f"{name} {version}" for name, version in result["packages"].items()),
    )
    columns = ["Network", "With", ">p50, ms", ">p90", ">min", ">images/s"]
    columns += [">Ours is faster (95 %)", ">Difference", ">CPUs", "Note"]
    settings = [[name, setting] for name, setting in result["settings"].items()]
    return [
        Table(["Goal", ">Wanted", ">Reached", "Met", "Against"], goals, "Goals"),
        Table(columns, calls, "The same work by every toolchain", notes),
        Table(["With", "Setting"], settings, "Settings"),
    ]


def _peer(row: Mapping[str, Any]) -> list[str]:
    difference = row["max_difference"]
    return [
        *(row["model"], f"**{row['backend']}**" if row["is_ours"] else row["backend"]),
        *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "min_ms")),
        *(f"{row['images_per_second']:.0f}", _ratio(row["ours_faster"], 2)),
        "not finite" if difference is None else f"{difference:.1e}",
        *(f"{row['cpus']:.2f}", row["note"]),
    ]


def _by_network_and_time(row: Mapping[str, Any]) -> tuple[bool, float]:
    return row["group"] != "same network", row["p50_ms"]


def runtime_tables(result: Result) -> list[Table]:
    """Goals, start, calls, pictures, batches, memory and ONNX Runtime's settings."""
    start = {name: row for name, row in result["start"].items() if name != "ratio"}
    memory = result["memory"]
    calls = result["calls"]
    timed = [row[part] for row in calls for part in ("session", "predictor")]
    tables = [
        Table(
            ["Goal", ">Found", ">At most", "Met"],
            [
                [row["name"], f"{row['found']:.4g}", f"{row['at_most']:g}", _MET[row["met"]]]
                for row in result["goals"]
            ],
            "Goals",
            _noise([*timed, *result["pictures"].values()]),
        ),
        Table(
            ["Start", ">p50, ms", ">min", ">peak, MB", ">modules", "large libraries"],
            [
                [
                    *(name, f"{row['p50_ms']:.0f}", f"{row['min_ms']:.0f}"),
                    *(f"{row['peak_mb']:.1f}", str(row["modules"])),
                    ", ".join(row["heavy"]) or "none",
                ]
                for name, row in start.items()
            ],
            "From starting Python to a label",
            [f"the runtime by the bare script: {_ratio(result['start']['ratio'])}"],
        ),
        Table(
            [
                *("Array", ">threads", ">session.run, ms", ">predictor, ms", ">ratio (95 %)"),
                *(">preprocess, us", ">preprocess, a quarter larger, us"),
            ],
            [
                [
                    *(f"{row['input_size']}x{row['input_size']}", str(row["threads"])),
                    *(f"{row[part]['p50_ms']:.3f}" for part in ("session", "predictor")),
                    _ratio(row["ratio"]),
                    f"{1000 * row['preprocess']['p50_ms']:.1f}",
                    f"{1000 * row['preprocess_larger']['p50_ms']:.1f}",
                ]
                for row in calls
            ],
            "One call, an array of the model's size",
        ),
        Table(
            ["JPEG, 224 pixels, bundled model, 1 thread", ">p50, ms", ">p90, ms"],
            [
                [name, f"{row['p50_ms']:.3f}", f"{row['p90_ms']:.3f}"]
                for name, row in result["pictures"].items()
            ],
            "The bytes of a file to a label",
        ),
        Table(
            [">Threads", ">images/s, batch 32", ">one by one", ">gain (95 %)"],
            [
                [
                    str(row["threads"]),
                    *(f"{row[part]['images_per_second']:.0f}" for part in ("batch", "singles")),
                    _ratio(row["gain"]),
                ]
                for row in result["batches"]
            ],
            "32 faces at once and one by one",
        ),
        Table(
            [">Predictions", ">kB a thousand", ">MiB after the first fifth", ">MiB at the end"],
            [
                [
                    *(str(memory["predictions"][-1]), f"{memory['kb_per_thousand']:+.3f}"),
                    *(f"{memory[key] / 1024:.1f}" for key in ("settled_kb", "end_kb")),
                ]
            ],
            "Memory of a process that does nothing but predict",
        ),
    ]
    return [*tables, *([_settings(result["settings"])] if "settings" in result else [])]


def _settings(settings: Sequence[Mapping[str, Any]]) -> Table:
    """ONNX Runtime set up in other ways; processor time tells what spinning burns."""
    columns = ["ONNX Runtime, bundled model", ">open and first call, ms", ">call, ms"]
    columns += [">by the defaults (95 %)", ">CPU of a call, ms", ">call after 10 ms, ms"]
    rows = [
        [
            *(row["name"], f"{row['start_ms']:.0f}", f"{row['p50_ms']:.3f}", _ratio(row["ratio"])),
            *(f"{row['cpu_ms']:.2f}", f"{row['paced_p50_ms']:.3f}", f"{row['paced_cpu_ms']:.2f}"),
            *(f"{row[key]:.1f}" for key in ("rss_mb", "batch_peak_mb")),
        ]
        for row in settings
    ]
    columns += [">its CPU, ms", ">MB", ">peak, batch 32"]
    return Table(columns, rows, "Settings of ONNX Runtime")


def graphs_tables(result: Result) -> list[Table]:
    """One row per layout of the graph."""
    config = result["config"]
    rows = [
        [
            *(row["name"], row["expected"], f"{row['p50_ms']:.2f}", _ratio(row["time_ratio"])),
            *(f"{row['min_ratio']:.3f}", f"{row['multiply_adds'] / 1e6:.1f}"),
            *(f"{row['multiply_adds_ratio']:.3f}", str(row["nodes"])),
            "-" if row["kernels"] is None else str(row["kernels"]),
        ]
        for row in result["graphs"]
    ]
    columns = ["Graph", "Expected", ">p50, ms", ">by straight's (95 %)", ">by minimum"]
    columns += [">M multiply-adds", ">by straight's", ">nodes", ">kernels"]
    notes = [
        f"{config['input_size']}x{config['input_size']}, batch 1, {config['threads']} thread, FP32 "
        "on ONNX Runtime's CPU provider; kernels of the FP16 engine for SM89 by TensorRT for RTX",
        *_noise(result["graphs"]),
    ]
    return [Table(columns, rows, "Layouts of the graph", notes)]


def training_tables(result: Result) -> list[Table]:
    """One row per way to compute a training step."""
    rows = [
        [row["name"], f"{row['images_per_second']:.0f}", _ratio(row["cost"])]
        for row in result["cases"]
    ]
    title = f"A training step, batch {result['config']['batch_size']}"
    notes = [f"cost: time of a step by that of {result['baseline']!r}", *_noise(result["cases"])]
    return [Table(["Step", ">images/s", ">cost (95 %)"], rows, title, notes)]


STUDIES: dict[str, Callable[[Result], list[Table]]] = {
    "peers": peers_tables,
    "runtime": runtime_tables,
    "graphs": graphs_tables,
    "training": training_tables,
}


def run_study(
    kind: str,
    config_class: type[Any],
    run: Callable[[Any], Result],
    argv: Sequence[str] | None,
    description: str | None,
    command: str = "",
) -> int:
    """The command of a study: read the options, measure, write JSON and Markdown, show the tables.

    Args:
        kind: Of the result, which names its files.
        config_class: The options.
        run: Measures.
        argv: Arguments; None reads ``sys.argv``.
        description: For ``--help``.
        command: Its file's name, where the kind does not have it.
    """
    prog = f"benchmarks/{command or kind}.py"
    config = parse_config(config_class, argv, prog=prog, description=description or "")
    require_libraries()
    result = run(config)
    folder = config.out or default_folder(result)
    write_result(result, folder / f"{kind}.json")
    tables: list[Any] = STUDIES[kind](result)
    if result.get("absent"):
        tables.append(absent_table(result["absent"]))
    notes = [f"warning: {warning}" for warning in result.get("warnings", ())]
    parts = [headline(result), *(table.to_markdown().rstrip() for table in tables), *notes]
    write_text(folder / f"{kind}.md", "\n\n".join(parts) + "\n")
    output = console()
    for part in (headline(result), *tables, *notes):
        output.print(part, markup=False) if isinstance(part, str) else output.print(part)
    output.print(f"wrote {kind}.json and {kind}.md to {folder}", markup=False)
    return 0


def _noise(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [NOISY] if any(row["busy"] for row in rows) else []


def _ratio(ratio: Mapping[str, float] | None, decimals: int = 3) -> str:
    """``1.103 (1.020 to 1.250)``."""
    if ratio is None:
        return "-"
    value, *ends = (
        f"{ratio[key]:.{decimals}f}" for key in ("value", "low", "high") if key in ratio
    )
    return f"{value} ({ends[0]} to {ends[1]})" if ends else value
