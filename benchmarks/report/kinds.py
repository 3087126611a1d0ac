"""The tables of each kind of result, as data: see ``TABLES`` and ``BLOCKS`` at the end.

A function above a table gives its rows, or what one of its columns says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from benchmarks.report.result import COMPUTE, END_TO_END, Result, Row, panels, work_name
from benchmarks.report.tables import (
    Columns,
    TableForm,
    count,
    digits,
    every_key,
    interval,
    of,
    points,
    ratio_interval,
    scaled,
    share,
    times,
)
from efficientface_deploy.workbench.tables import Table

TOP_LAYERS = 12

_MODEL: Columns = {"Model": of("model"), "Backend": of("backend"), "Precision": of("precision")}
_WHERE: Columns = {**_MODEL, ">Threads": of("threads")}

# ---- latency, peers

CASES = TableForm(
    "Latency, milliseconds a call",
    lambda result: list(chain(*panels(result["cases"]).values())),
    {
        **_WHERE,
        **times("p50", "p90"),
        ">p95": of("p95_ms", digits),
        **times("p99", "min"),
        ">images/s": of("images_per_second", digits),
        ">Speed-up (95 %)": of("speedup", interval),
        ">x roofline": of("floor", lambda floor: digits(floor["distance"])),
        ">mJ an image": of("joules_per_image", lambda joules: digits(1e3 * joules)),
        ">Ours is faster (95 %)": of("ours_faster", interval),
        ">Difference": of("max_difference", lambda value: f"{value:.1e}"),
        ">CPUs": of("cpus", scaled(1, 2)),
        "Note": of("note"),
    },
    notes={
        "compute": "a preprocessed uint8 batch in, logits or probabilities out",
        "end to end": "one JPEG in memory in, a label out",
        ">Speed-up (95 %)": "ratio of medians to {baseline}, same work and threads",
        ">x roofline": "p50 by the time of the network's multiply-adds at the measured peak of "
        "the format and threads",
        ">Ours is faster (95 %)": "median of the row by ours, the faster of ours where there are "
        "two",
        ">Difference": "of the logits from PyTorch's, by the largest logit; empty where they are "
        "not finite; a row that differs too much is not ranked",
        ">CPUs": "CPU time by time, which shows whether the threads are as many as they should be",
    },
    group=work_name,
)

COLD = TableForm(
    "Cold start, milliseconds",
    lambda result: result.get("cold") or [],
    {
        **_WHERE,
        ">Runs": of("runs"),
        **times("p50", "min", "max", "load", "first_label", "process"),
        ">peak memory, MiB": of("peak_bytes", scaled(2**-20, 0)),
    },
    notes={
        "cold start": "from the start of load() to the first label, in fresh processes; the "
        "import of the backend's library is in it",
    },
)


FILES = TableForm(
    "Files",
    lambda result: result.get("models") or [],
    {
        "Model": of("name"),
        "Network": of("network"),
        "Precision": of("precision"),
        "Input": of("input_size", lambda side: f"{side}x{side}"),
        ">MB": of("bytes", scaled(1e-6, 2)),
        ">M multiply-adds": of("multiply_adds", scaled(1e-6, 1)),
        "SHA-256": of("sha256", lambda digest: str(digest[:12])),
    },
    notes={">M multiply-adds": "of one image, as the graph is laid out: padding included"},
)


def _peaks(result: Result) -> list[Row]:
    peaks = result.get("ceilings") or {"arithmetic": []}
    copies = {row["threads"]: row["bytes_per_second"] for row in peaks.get("bandwidth", [])}
    rows = [{**row, "copy": copies.get(row["threads"])} for row in peaks["arithmetic"]]
    for name, rate in (peaks.get("gpu") or {}).items():
        own = {"threads": "GPU", "format": name, "by": "torch"}
        rows.append({**own, "multiply_adds_per_second": rate})
    return rows


PEAKS = TableForm(
    "The machine's peak, measured in the same run",
    _peaks,
    {
        ">Threads": of("threads"),
        "Format": of("format"),
        ">G multiply-adds/s": of("multiply_adds_per_second", scaled(1e-9, 1)),
        "By": of("by"),
        "Tried": of("tried", lambda own: ", ".join(f"{n} {r / 1e9:.1f}" for n, r in own.items())),
        ">Copy, GB/s": of("copy", lambda rate: digits(rate / 1e9)),
    },
    notes={
        ">G multiply-adds/s": "matrix products",
        ">Copy, GB/s": "larger than the last-level cache, bytes read and written",
    },
)


def _profile_name(profile: Row) -> str:
    threads = profile.get("threads")
    suffix = "" if threads is None else f", {threads} thr."
    return f"{profile['model']} ({profile['backend']}{suffix})"


def _kinds_of_operator(result: Result) -> list[Row]:
    """A row for each kind, in it the part of each profile under the profile's name."""
    rows: dict[str, Row] = {}
    total: Row = {}
    for profile in result.get("profiles") or []:
        for part in profile.get("kinds") or []:
            row = rows.setdefault(part["kind"], {"Microseconds a pass": part["kind"]})
            row[_profile_name(profile)] = part
            total[_profile_name(profile)] = {"us": profile["total_us"]}
    return [*rows.values(), {"Microseconds a pass": "all", **total}] if rows else []


def _time_of(part: Row) -> str:
    text = f"{part['us']:,.0f}"
    if part.get("multiply_adds"):
        rate = part["multiply_adds"] / part["us"] / 1e3  # us -> ns
        text += f" ({part['multiply_adds'] / 1e6:.1f} M, {rate:.1f})"
    return text


PROFILE = TableForm(
    "Profile by kind of operator",
    _kinds_of_operator,
    every_key(_time_of),
    notes={
        "times": "medians by ONNX Runtime's profiler, batch 1; in brackets multiply-adds, M, and "
        "how many a nanosecond; its time stamps make the sum longer than a pass without it",
    },
)


def _slowest_layers(result: Result) -> list[Row]:
    return [
        {**layer, "share": layer["us"] / profile["total_us"], "profile": _profile_name(profile)}
        for profile in result.get("profiles") or []
        for layer in (profile.get("layers") or [])[:TOP_LAYERS]
    ]


LAYERS = TableForm(
    f"Profile: the {TOP_LAYERS} layers that take longest",
    _slowest_layers,
    {
        "Layer": of("name"),
        "Operator": of("operator"),
        "Kind": of("kind"),
        ">us": of("us", digits),
        ">%": of("share", scaled(100, 1)),
        ">M multiply-adds": of("multiply_adds", lambda n: f"{n / 1e6:.2f}" if n else ""),
    },
    group=lambda row: str(row["profile"]),
)


def _summary_rows(result: Result) -> list[Row]:
    """One row per candidate: its first picture, and figures of its other work and its start."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["model"], row["backend"], row.get("threads")

    cold = {key(row): row["p50_ms"] for row in result.get("cold") or []}
    works = {(key(row), row["stage"], row["batch"]): row for row in result["cases"]}
    largest = max(row["batch"] for row in result["cases"])
    rows = []
    for (own, stage, batch), row in works.items():
        if (stage, batch) == (COMPUTE, 1):
            many = works.get((own, COMPUTE, largest), {}).get("images_per_second")
            label = works.get((own, END_TO_END, 1), {}).get("p50_ms")
            rows.append({**row, "rate": many, "label_ms": label, "start_ms": cold.get(own)})
    return sorted(rows, key=lambda row: row.get("threads") or 0)


def _time_with_speedup(row: Row) -> str:
    gain, text = row.get("speedup"), digits(row["p50_ms"])
    return text if gain is None or gain["value"] == 1 else f"{text} ({gain['value']:.1f}x)"


LATENCY_SUMMARY = TableForm(
    "",
    _summary_rows,
    {
        **_WHERE,
        ">Batch 1, p50": _time_with_speedup,
        **times("p90", "p99"),
        ">images/s, largest batch": of("rate", digits),
        ">JPEG to label, p50": of("label_ms", digits),
        ">x roofline": of("floor", lambda floor: digits(floor["distance"])),
        ">Cold start": of("start_ms", digits),
    },
)

PEER_SETTINGS = TableForm(
    "Settings",
    lambda result: [{"name": name, "text": text} for name, text in result["settings"].items()],
    {"With": of("name"), "Setting": of("text")},
)


def _ranked(result: Result) -> list[Row]:
    """One row per network and toolchain that is ranked, in it its time by ours for each work."""
    rows: dict[tuple[str, str], Row] = {}
    for case in result["cases"]:
        if case.get("ranked") and not case.get("is_ours"):
            head = {"network": case["model"], "with": case["backend"]}
            row = rows.setdefault((case["model"], case["backend"]), head)
            work = f"{count(case['batch'], 'picture')}, {count(case['threads'], 'thread')}"
            row[work] = case["ours_faster"]
    return list(rows.values())


PEERS_SUMMARY = TableForm("", _ranked, every_key(interval))

# ---- accuracy and export

ACCURACY = TableForm(
    "{data[name]}, {data[split]} split, {data[images]} images",
    lambda result: result["rows"],
    {
        **_MODEL,
        ">Accuracy %": share("accuracy"),
        ">Macro-F1 %": share("macro_f1"),
        ">ECE %": share("ece"),
        ">Agreement %": share("agreement"),
        ">Accuracy minus reference's, points": of("difference", points),
        ">Mean KL": of("mean_kl", lambda value: f"{value:.2g}"),
        ">Max |dp|": of("max_probability_difference", lambda value: f"{value:.2g}"),
        ">MiB": of("bytes", scaled(2**-20, 2)),
    },
    notes={
        "agreement, KL and difference": "against {reference}",
        "in brackets": "95 % intervals over images; of a difference, paired by image",
    },
)


def _recalls(result: Result) -> list[Row]:
    labels = result["data"].get("labels") or []
    return [
        {"Model": row["model"], "Backend": row["backend"]}
        | dict(zip(labels, row["recall"], strict=True))
        for row in result["rows"]
        if row.get("recall")
    ]


RECALLS = TableForm(
    "Recall of each class, %", _recalls, every_key(lambda recall: f"{100 * recall:.1f}")
)


def _exported_files(result: Result) -> list[Row]:
    """A row for each file with what its verification found; engines come last."""

    def order(row: Row) -> tuple[bool, int]:
        return not row["file"].endswith(".onnx"), ("fp32", "fp16", "int8").index(row["precision"])

    rows = []
    for entry in sorted(result["artifacts"], key=order):
        row = {**entry, **(entry.get("verification") or {})}
        if row.get("accuracy_difference") is not None:
            ends = row["accuracy_interval"]
            row["difference"] = {"value": row["accuracy_difference"], "interval": ends}
        kernels = re.search(r"\b(\d+) kernels\b", " ".join(row.get("notes") or []))
        rows.append({**row, "kernels": kernels and kernels[1]})
    return rows


EXPORT = TableForm(
    "Export of {weights}",
    _exported_files,
    {
        "File": of("file", lambda name: f"`{name}`"),
        ">MB": of("bytes", scaled(1e-6, 2)),
        "Arithmetic": of("arithmetic"),
        ">Kernels": of("kernels"),
        ">Same label %": share("agreement"),
        ">Accuracy minus PyTorch's, points": of("difference", points),
        ">Mean KL": of("kl", lambda value: f"{value:.1e}"),
        "Status": of("status"),
    },
)


def _tuned(result: Result) -> list[Row]:
    """The candidates of ``efficientface-export --tune``, each of which was timed here."""
    tuned = [one["tuning"] for one in result["artifacts"] if one.get("tuning")]
    rows = [row for tuning in tuned for row in tuning["candidates"] if row["times_interval"]]
    ends = ("low", "high")
    return [
        {
            **row,
            "ratio": {"value": row["times"], **dict(zip(ends, row["times_interval"], strict=True))},
        }
        for row in rows
    ]


TUNED = TableForm(
    "Candidates of --tune",
    _tuned,
    {
        "Precision": of("precision"),
        "Graph": of("graph"),
        "Backend": of("backend"),
        ">Threads": of("threads"),
        ">ms": of("p50_ms", digits),
        ">by the chosen one's": of("ratio", interval),
        ">Same label %": share("agreement"),
        ">Accuracy %": share("accuracy"),
        "Verdict": of("verdict"),
    },
)

# ---- the models, joined from three results


def _models(found: Result) -> list[Row]:
    """The models' rows, one model after another."""
    joined = zip(found["accuracy"], found["export"], found["latency"], strict=True)
    return list(chain.from_iterable(_model(*results) for results in joined))


def _model(accuracy: Result, export: Result, latency: Result) -> list[Row]:
    """PyTorch and the files that users are advised to take: FP16 is no faster on a CPU."""
    times = {
        row["model"]: row
        for row in latency["cases"]
        if (row["stage"], row["batch"], row["threads"]) == (COMPUTE, 1, 1)
        and row["backend"].endswith(":cpu")
    }
    reference = next(row for row in accuracy["rows"] if row["agreement"] == 1)
    rows: list[Row] = [{**reference, "file": reference["model"]}]
    for advised in ("fp32-cpu.onnx", "int8-cpu.onnx", "fp16-gpu.onnx", "int8-gpu.onnx"):
        for entry in export["artifacts"]:
            if entry["file"].endswith(advised):
                rows.append({**entry, **entry["verification"]})
    side = reference["input_size"]
    return [{**times.get(row["file"], {}), **row, "input_size": side} for row in rows]


MODELS = TableForm(
    "",
    _models,
    {
        "Model": of("file", lambda name: f"`{name}`"),
        "Input": of("input_size", lambda side: f"{side}x{side}"),
        ">Accuracy %": of("accuracy", scaled(100, 2)),
        ">Same label as PyTorch %": of("agreement", scaled(100, 2)),
        ">MB": of("bytes", scaled(1e-6, 2)),
        ">ms": lambda row: _time_with_speedup(row) if "p50_ms" in row else "needs a GPU",
    },
)

# ---- graph layouts, training steps

GRAPHS = TableForm(
    "Layouts of the graph",
    lambda result: result["graphs"],
    {
        "Graph": of("name"),
        "Expected": of("expected"),
        ">p50, ms": of("p50_ms", scaled(1, 2)),
        ">by straight's (95 %)": of("time_ratio", ratio_interval),
        ">by minimum": of("min_ratio", scaled(1, 3)),
        ">M multiply-adds": of("multiply_adds", scaled(1e-6, 1)),
        ">by straight's": of("multiply_adds_ratio", scaled(1, 3)),
        ">nodes": of("nodes"),
        ">kernels": of("kernels"),
    },
    notes={
        ">p50, ms": "{config[input_size]}x{config[input_size]}, batch 1, {config[threads]} thread, "
        "FP32 on ONNX Runtime's CPU provider",
        ">kernels": "of the FP16 engine for SM89 by TensorRT for RTX",
    },
)

TRAINING = TableForm(
    "A training step, batch {config[batch_size]}",
    lambda result: result["cases"],
    {
        "Step": of("name"),
        ">images/s": of("images_per_second", scaled(1, 0)),
        ">cost (95 %)": of("cost", ratio_interval),
    },
    notes={">cost (95 %)": "time of a step by that of {baseline!r}"},
)

LIMITS = TableForm(
    "What a training step could take at least",
    lambda result: [row for row in result["cases"] if row.get("limits")],
    {
        "Step": of("name"),
        ">M multiply-adds an image": of("multiply_adds", scaled(1e-6, 0)),
        ">MB an image": of("bytes", scaled(1e-6, 0)),
        ">arithmetic, ms": lambda row: digits(row["limits"]["arithmetic_ms"]),
        ">memory, ms": lambda row: digits(row["limits"]["memory_ms"]),
        ">measured, ms": of("p50_ms", digits),
        ">reached, %": lambda row: f"{100 * row['limits']['reached']:.0f}",
    },
    notes={
        ">arithmetic, ms": "of a step's multiply-adds at the rate of a large matrix product",
        ">memory, ms": "of all bytes that its operators read and write, one after another and "
        "nothing staying in a cache, at the rate of a large copy",
        ">reached, %": "the larger of the two by what was measured",
    },
)

TRAININGS = TableForm(
    "Trainings, {dataset}, {split}",
    lambda result: result["runs"],
    {
        "Run": of("run"),
        ">Accuracy %": share("accuracy"),
        ">minus the first's, points": lambda row: points(
            {"value": row["difference"], "interval": row["difference_interval"]}
        ),
        ">Macro-F1 %": share("macro_f1"),
        ">ECE %": share("expected_calibration_error"),
        ">KL from the votes": of("mean_kl_from_votes", scaled(1, 3)),
        ">Epochs": of("epochs_done"),
        ">Minutes": of("training_seconds", scaled(1 / 60, 0)),
    },
)

FINE_TUNING = TableForm(
    "Pictures of one's own, {config[input_size]}x{config[input_size]}",
    lambda result: result["cases"],
    {
        ">Pictures": of("images"),
        "Training": of("way"),
        ">Accuracy %": share("accuracy"),
        ">Macro-F1 %": share("macro_f1"),
    },
    notes={">Accuracy %": "in brackets 95 % intervals over images, not over seeds"},
)


def _rare_columns(rows: Sequence[Row]) -> Columns:
    whole = {"accuracy": ">Accuracy %", "macro_f1": ">Macro-F1 %"}
    shares = [key for key in rows[0] if f"{key}_interval" in rows[0]]
    names = {key: whole.get(key, f">{key}: found %") for key in shares}
    return {">Strength": of("strength"), **{name: share(key) for key, name in names.items()}}


RARE_CLASSES = TableForm(
    "Rare classes, {config[input_size]}x{config[input_size]}, {config[folds]} folds of "
    "{data[name]} {data[split]}",
    lambda result: result["rows"],
    _rare_columns,
    notes={
        "strength": "how far the training's frequencies are taken out; 1 is the uniform prior",
        "in brackets": "95 % intervals over images, not over seeds",
    },
)

WEB = TableForm(
    "In the browser, {data[name]}, {data[images]} images",
    lambda result: result["cases"],
    {
        "Model": of("model"),
        "Precision": of("precision"),
        ">Threads": of("threads"),
        **times("p50", "p90"),
        ">x face-api": of("speedup", interval),
        ">Accuracy %": of("accuracy", scaled(100, 2)),
    },
    notes={
        "model": "from a face of 48x48 pixels on a canvas to its label",
        ">x face-api": "face-api's median on as many threads by this one's",
    },
)

_PRODUCT: Columns = {
    "Product": of("product"),
    "Version": of("version"),
    ">Accuracy %": share("accuracy"),
    ">minus ours, points": of("difference", points),
    ">Macro-F1 %": share("macro_f1"),
    ">Classes all know %": share("common_accuracy"),
    ">JPEGs/s": of("images_per_second", digits),
    ">CPU ms": of("cpu_ms", digits),
    ">First label, s": of("first_label_seconds", digits),
    ">Installed, MB": of("install_bytes", scaled(1e-6, 0)),
    "Lacks": of("lacks"),
    "Offline": of("offline"),
    "Trained on": of("trained_on"),
}
PRODUCTS = TableForm(
    "Products, {data[name]}, {data[split]} split, {data[images]} images",
    lambda result: result["cases"],
    _PRODUCT,
    notes={
        ">Accuracy %": "pictures of a class that a product lacks count as wrong; in brackets 95 % "
        "intervals over images",
        ">JPEGs/s": "files of 224x224, one by one, with the product's own settings",
        ">CPU ms": "of one such file, all threads together",
        ">First label, s": "from starting a process, its files in memory; the median",
        ">Installed, MB": "the product's environment, without the interpreter or Node",
    },
)

_SHORT = ("Product", ">Accuracy %", ">CPU ms", ">First label, s", ">Installed, MB")
ALTERNATIVES = TableForm(
    "", lambda result: result["cases"], {name: _PRODUCT[name] for name in _SHORT}
)

ANNOTATE = TableForm(
    "Annotating a set, JPEGs of {config[side]}x{config[side]}, without a search for faces",
    lambda result: result["cases"],
    {
        ">Pictures": of("pictures", lambda number: f"{number:,}"),
        "Way": of("way"),
        ">Seconds": of("seconds", digits),
        ">Pictures/s": of("pictures_per_second", digits),
        ">CPU ms a picture": of("cpu_ms", digits),
        ">Peak memory, MB": of("peak_bytes", scaled(1e-6, 0)),
    },
    notes={
        "Way": "two jobs are two processes that know nothing of each other, half the set each",
        ">Seconds": "with the model's load and the start of the workers",
        ">Peak memory, MB": "of all processes together, each at its own peak",
    },
)


def _bounded(key: str, bound: str) -> Callable[[Row], str]:
    """A figure, and after it in brackets what it must stay below."""

    def say(row: Row) -> str:
        limit = row.get(bound)
        return of(key, digits)(row) + ("" if limit is None else f" ({limit:g})")

    return say


CAMPAIGN = TableForm(
    "Campaign, seed {config[seed]}",
    lambda result: result["rows"],
    {
        "Part": of("part"),
        "What": of("what"),
        ">Tried": of("tried", lambda number: f"{number:,}"),
        ">Right": of("right", lambda number: f"{number:,}"),
        ">Refused": of("refused", lambda number: f"{number:,}"),
        ">Failed": of("failures", lambda lines: str(len(lines))),
        ">Slowest, s": _bounded("slowest_s", "within_s"),
        ">Peak memory, MB": _bounded("peak_mb", "within_mb"),
    },
    notes={
        ">Refused": "with one line that names the input, and exit code 2",
        ">Slowest, s": "of one case, for inputs of CPU time; in brackets the bound above which it "
        "counts as failed",
        ">Peak memory, MB": "of the whole process; in brackets the bound likewise",
    },
)


def _failures(result: Result) -> list[Row]:
    return [
        {"What": row["what"], "Failure": line} for row in result["rows"] for line in row["failures"]
    ]


FAILURES = TableForm("Cases that failed", _failures, every_key())

# ---- versions


def _environments(result: Result) -> list[Row]:
    """A row for each environment: its packages, its tests, and its files under their names."""
    return [
        {**row, **row["packages"], **{file["file"]: file for file in row["files"]}}
        for row in result["rows"]
    ]


def _tests(row: Row) -> str:
    if "passed" not in row:
        return "not run"
    return f"{row['passed']} of {row['passed'] + row['failed']}"


def _answers(file: Row) -> str:
    """Agreement with PyTorch and how far the file is from itself elsewhere; or that it is refused.

    A file that its probe refuses was run without it, to see what it would have said.
    """
    refused = "refused" if file["refused"] else ""
    if "agreement" not in file:
        return refused
    figures = f"{100 * file['agreement']:.1f} %, {file['same_file_difference']:.1g}"
    return f"refused ({figures})" if refused else figures


def _versions_columns(rows: Sequence[Row]) -> Columns:
    names = dict.fromkeys(file["file"] for row in rows for file in row["files"])
    short = {name: name.removeprefix("efficientface-").removesuffix(".onnx") for name in names}
    return {
        "What": of("why"),
        "CPU": of("architecture"),
        "Python": of("python"),
        "ONNX Runtime": of("onnxruntime"),
        "NumPy": of("numpy"),
        "Pillow": of("pillow"),
        "onnx": of("onnx"),
        "Tests passed": _tests,
        **{short[name]: of(name, _answers) for name in names},
    }


VERSIONS = TableForm(
    "Versions",
    _environments,
    _versions_columns,
    notes={
        "files": "same label as PyTorch on {images}; and the largest difference of a probability "
        "from the same file's on the newest ONNX Runtime",
        "refused": "by the file's own probe; in brackets what it would have answered",
    },
)


def _failed_tests(result: Result) -> list[Row]:
    return [
        {"What": row["why"], "Test": name}
        for row in result["rows"]
        for name in row.get("failures", ())
    ]


FAILED_TESTS = TableForm("Tests that failed", _failed_tests, every_key())


def _refusals(result: Result) -> list[Row]:
    return [
        {"What": row["why"], "File": file["file"], "Error": file["refused"]}
        for row in result["rows"]
        for file in row["files"]
        if file["refused"]
    ]


REFUSALS = TableForm("Files refused", _refusals, every_key())

# ---- release


def _installs(result: Result) -> list[Row]:
    """A row for each set of extras, with what each Python made of it; then what is not here."""
    rows: dict[str, Row] = {}
    for own in result["rows"]:
        row = rows.setdefault(own["extras"], {"extras": f"`[{own['extras']}]`", "lines": []})
        row["extras"] = row["extras"] if own["extras"] else "none"
        if "packages" in own or not row["lines"]:  # else the line that failed is the installation
            row["lines"] = [line["line"] for line in own["lines"]]
        row[".".join(own["python"].split(".")[:2])] = own
    missing = [{"extras": f"`[{name}]`", "why": why} for name, why in result["not_here"].items()]
    return [*rows.values(), *missing]


def _outcome(row: Row) -> str:
    errors = [f"`{line['line']}`: {line['error']}" for line in row["lines"] if line["error"]]
    return "; ".join(errors) or f"yes, {row['packages']} packages, {row['bytes'] / 1e6:.0f} MB"


def _release_columns(rows: Sequence[Row]) -> Columns:
    pythons = dict.fromkeys(key for row in rows for key in row if key[0].isdigit())
    return {
        "Extras": of("extras"),
        "Lines that were run": lambda row: (
            "<br>".join(f"`{line}`" for line in row["lines"])
            if "lines" in row
            else f"not run: {row['why']}"
        ),
        **{f"Python {key}": of(key, _outcome) for key in pythons},
    }


RELEASE = TableForm("Extras", _installs, _release_columns)

# ---- of every kind


def _goals(result: Result) -> list[Row]:
    return [{k.replace("_", " "): v for k, v in goal.items()} for goal in result["goals"]]


GOALS = TableForm("Goals", _goals, every_key())


def _part(key: str) -> TableForm:
    """Every figure of a part of the result, under the names of the JSON's keys."""

    def rows(result: Result) -> list[Row]:
        part = result.get(key) or []
        if not isinstance(part, dict):
            return list(part)
        if all(isinstance(own, dict) for own in part.values()):
            return [{"name": name, **own} for name, own in part.items()]
        return [part]

    return TableForm(key.capitalize(), rows, every_key())


ABSENT = TableForm(
    "Not measured here",
    lambda result: result["absent"],
    {"Backend": of("backend"), "Model": of("model"), "Why": of("reason")},
)

TABLES = {
    "latency": (CASES, COLD, FILES, PEAKS, PROFILE, LAYERS),
    "accuracy": (ACCURACY, RECALLS),
    "export": (EXPORT, TUNED),
    "peers": (CASES, PEER_SETTINGS),
    "runtime": tuple(map(_part, ("start", "calls", "pictures", "batches", "memory"))),
    "faces": tuple(map(_part, ("speed", "photographs", "squares"))),
    "web": (WEB, *map(_part, ("first_result", "downloads"))),
    "graphs": (GRAPHS,),
    "training": (TRAINING, LIMITS),
    "trainings": (TRAININGS,),
    "finetuning": (FINE_TUNING,),
    "rare": (RARE_CLASSES,),
    "products": (PRODUCTS,),
    "annotate": (ANNOTATE,),
    "campaign": (CAMPAIGN, FAILURES),
    "versions": (VERSIONS, FAILED_TESTS, REFUSALS),
    "release": (RELEASE, _part("files")),
}

# What stands in README.md and docs/, by the name in the block's comment: the result's kind, or one
# of ``PARTS`` for one table of it.
BLOCKS = {
    "latency": LATENCY_SUMMARY,
    "accuracy": ACCURACY,
    "export": EXPORT,
    "tuned": TUNED,
    "peers": PEERS_SUMMARY,
    "graphs": GRAPHS,
    "training": TRAINING,
    "limits": LIMITS,
    "trainings": TRAININGS,
    "finetuning": FINE_TUNING,
    "rare": RARE_CLASSES,
    "products": PRODUCTS,
    "alternatives": ALTERNATIVES,
    "annotate": ANNOTATE,
    "campaign": CAMPAIGN,
    "goals": GOALS,
    "profile": PROFILE,
    "models": MODELS,
    "versions": VERSIONS,
    "release": RELEASE,
    "web": WEB,
}

# The blocks that are not named by their result's kind: it may be another, or have several tables.
PARTS = ("goals", "profile", "limits", "alternatives", "tuned")

# The blocks whose table joins several results: one of each of these kinds, or as many of each.
JOINED = {"models": ("accuracy", "export", "latency")}


def tables_of(result: Result) -> list[Table]:
    """Every table that a result has, the most important first; none of them is empty."""
    if result["kind"] not in TABLES:
        raise LookupError(f"kind {result['kind']!r}, which this version does not know")
    forms = (GOALS, *TABLES[result["kind"]], ABSENT)
    return [table for table in (form.fill(result) for form in forms) if table.rows]
