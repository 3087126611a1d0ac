"""The tables of peers, runtime, graph layouts and training steps.

Each function takes a result of its kind, one made by an older version too, and gives its tables,
the most important first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.report.columns import Columns, Heading, interval, of, scaled, tabulate
from benchmarks.report.result import Result, Row, rows_of
from efficientface_deploy.workbench.tables import Table

NOISY = "the machine was busy with something else: read the times with care"


def peers_tables(result: Result) -> list[Table]:
    """A group of rows for each batch and number of threads, and each toolchain's options."""
    works: dict[str, list[Row]] = {}
    for row in rows_of(result):
        plural = "s" if row["threads"] > 1 else ""
        work = f"batch {row['batch']}, {row['threads']} thread{plural}"
        works.setdefault(work, []).append(row)
    rows: list[Row | Heading] = []
    for work, own in works.items():
        own = sorted(own, key=lambda row: (row["group"] != "same network", row["p50_ms"]))
        rows += [Heading(work), *own]
    columns: Columns = {
        "Network": of("model"),
        "With": lambda row: f"**{row['backend']}**" if row["is_ours"] else row["backend"],
        ">p50, ms": of("p50_ms", scaled(1, 2)),
        ">p90": of("p90_ms", scaled(1, 2)),
        ">min": of("min_ms", scaled(1, 2)),
        ">images/s": of("images_per_second", scaled(1, 0)),
        ">Ours is faster (95 %)": of("ours_faster", interval),
        ">Difference": lambda row: "not finite" if row["max_difference"] is None else
        f"{row['max_difference']:.1e}",
        ">CPUs": of("cpus", scaled(1, 2)),
        "Note": of("note"),
    }  # fmt: skip
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
    return [
        tabulate("The same work by every toolchain", columns, rows, notes),
        Table(["With", "Setting"], list(result["settings"].items()), "Settings"),
    ]


def runtime_tables(result: Result) -> list[Table]:
    """Start, calls, pictures, batches, memory and ONNX Runtime's settings."""

    def p50(part: str, factor: float = 1, places: int = 3) -> Callable[[Row], str]:
        return of(part, lambda timed: f"{factor * timed['p50_ms']:.{places}f}")

    def rate(part: str) -> Callable[[Row], str]:
        return of(part, lambda timed: f"{timed['images_per_second']:.0f}")

    start: Columns = {
        "Start": of("name"),
        ">p50, ms": of("p50_ms", scaled(1, 0)),
        ">min": of("min_ms", scaled(1, 0)),
        ">peak, MB": of("peak_mb", scaled(1, 1)),
        ">modules": of("modules"),
        "large libraries": of("heavy", lambda names: ", ".join(names) or "none"),
    }
    calls: Columns = {
        "Array": of("input_size", lambda side: f"{side}x{side}"),
        ">threads": of("threads"),
        ">session.run, ms": p50("session"),
        ">predictor, ms": p50("predictor"),
        ">ratio (95 %)": of("ratio", _ratio),
        ">preprocess, us": p50("preprocess", 1000, 1),
        ">preprocess, a quarter larger, us": p50("preprocess_larger", 1000, 1),
    }
    pictures: Columns = {
        "JPEG, 224 pixels, bundled model, 1 thread": of("name"),
        ">p50, ms": of("p50_ms", scaled(1, 3)),
        ">p90, ms": of("p90_ms", scaled(1, 3)),
    }
    batches: Columns = {
        ">Threads": of("threads"),
        ">images/s, batch 32": rate("batch"),
        ">one by one": rate("singles"),
        ">gain (95 %)": of("gain", _ratio),
    }
    memory: Columns = {
        ">Predictions": of("predictions", lambda counts: str(counts[-1])),
        ">kB a thousand": of("kb_per_thousand", lambda value: f"{value:+.3f}"),
        ">MiB after the first fifth": of("settled_kb", scaled(1 / 1024, 1)),
        ">MiB at the end": of("end_kb", scaled(1 / 1024, 1)),
    }
    settings: Columns = {
        "ONNX Runtime, bundled model": of("name"),
        ">open and first call, ms": of("start_ms", scaled(1, 0)),
        ">call, ms": of("p50_ms", scaled(1, 3)),
        ">by the defaults (95 %)": of("ratio", _ratio),
        ">CPU of a call, ms": of("cpu_ms", scaled(1, 2)),
        ">call after 10 ms, ms": of("paced_p50_ms", scaled(1, 3)),
        ">its CPU, ms": of("paced_cpu_ms", scaled(1, 2)),
        ">MB": of("rss_mb", scaled(1, 1)),
        ">peak, batch 32": of("batch_peak_mb", scaled(1, 1)),
    }
    starts = {name: row for name, row in result["start"].items() if name != "ratio"}
    notes = [f"the runtime by the bare script: {_ratio(result['start']['ratio'])}"]
    timed = [row[part] for row in result["calls"] for part in ("session", "predictor")]
    noise = _noise([*timed, *result["pictures"].values()])
    return [
        tabulate("From starting Python to a label", start, _named(starts), [*notes, *noise]),
        tabulate("One call, an array of the model's size", calls, result["calls"]),
        tabulate("The bytes of a file to a label", pictures, _named(result["pictures"])),
        tabulate("32 faces at once and one by one", batches, result["batches"]),
        tabulate("Memory of a process that only predicts", memory, [result["memory"]]),
        tabulate("Settings of ONNX Runtime", settings, result.get("settings") or []),
    ]


def graphs_tables(result: Result) -> list[Table]:
    """One row per layout of the graph."""
    columns: Columns = {
        "Graph": of("name"),
        "Expected": of("expected"),
        ">p50, ms": of("p50_ms", scaled(1, 2)),
        ">by straight's (95 %)": of("time_ratio", _ratio),
        ">by minimum": of("min_ratio", scaled(1, 3)),
        ">M multiply-adds": of("multiply_adds", scaled(1e-6, 1)),
        ">by straight's": of("multiply_adds_ratio", scaled(1, 3)),
        ">nodes": of("nodes"),
        ">kernels": of("kernels"),
    }
    config, rows = result["config"], rows_of(result)
    notes = [
        f"{config['input_size']}x{config['input_size']}, batch 1, {config['threads']} thread, FP32 "
        "on ONNX Runtime's CPU provider; kernels of the FP16 engine for SM89 by TensorRT for RTX",
        *_noise(rows),
    ]
    return [tabulate("Layouts of the graph", columns, rows, notes)]


def training_tables(result: Result) -> list[Table]:
    """One row per way to compute a training step."""
    columns: Columns = {
        "Step": of("name"),
        ">images/s": of("images_per_second", scaled(1, 0)),
        ">cost (95 %)": of("cost", _ratio),
    }
    rows = rows_of(result)
    notes = [f"cost: time of a step by that of {result['baseline']!r}", *_noise(rows)]
    title = f"A training step, batch {result['config']['batch_size']}"
    return [tabulate(title, columns, rows, notes)]


STUDIES: dict[str, Callable[[Result], list[Table]]] = {
    "peers": peers_tables,
    "runtime": runtime_tables,
    "graphs": graphs_tables,
    "training": training_tables,
}


def _named(rows: Mapping[str, Row]) -> list[Row]:
    return [{"name": name, **row} for name, row in rows.items()]


def _noise(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [NOISY] if any(row["busy"] for row in rows) else []


def _ratio(ratio: Mapping[str, float]) -> str:
    return interval(ratio, 3)
