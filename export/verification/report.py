"""``report.json`` and ``report.md``: one row for every artifact in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.files import file_hash, read_json, write_text
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.tables import Table
from efficientface_export.verification.parity import (
    THRESHOLDS,
    Verification,
    number,
    with_interval,
)
from efficientface_export.verification.provenance import Provenance

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
SCHEMA_VERSION = 2

# What reading a report can raise when it is missing, damaged or somebody else's.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One artifact.

    Attributes:
        file: Its path, relative to the report.
        bytes: Its size.
        sha256: Of its bytes.
        precision: ``fp32``, ``fp16`` or ``int8``.
        arithmetic: How many convolutions and linear layers run in which precision; empty when
            that could not be counted.
        largest_fp32_value: Largest magnitude of any tensor before FP16; None without FP16.
        created: When it was made.
        versions: What it was made with.
        verification: How it compares with the reference.
        notes: Warnings, and what an engine was built with and for.
        tuning: What ``--tune`` found; None without it.
        recommended: Whether it is to be taken rather than another precision; a note says why not.
        graph: ``plain``, ``deploy`` or ``wide``; empty in reports of before.
    """

    file: str
    bytes: int
    sha256: str
    precision: str
    arithmetic: str
    largest_fp32_value: float | None
    created: str
    versions: dict[str, str]
    verification: Verification
    notes: tuple[str, ...] = ()
    tuning: Mapping[str, Any] | None = None
    recommended: bool = True
    graph: str = ""

    @classmethod
    def of(
        cls,
        path: Path,
        folder: Path,
        provenance: Provenance,
        arithmetic: str,
        verification: Verification,
        notes: Sequence[str] = (),
    ) -> ReportRow:
        """The row of the artifact at ``path`` in the report in ``folder``."""
        return cls(
            file=Path(os.path.relpath(path, folder)).as_posix(),
            bytes=path.stat().st_size,
            sha256=file_hash(path),
            precision=provenance.precision,
            arithmetic=arithmetic,
            largest_fp32_value=provenance.largest_fp32_value,
            created=provenance.created,
            versions=provenance.versions,
            verification=verification,
            notes=tuple(notes),
            graph=provenance.graph,
        )

    def describe(self) -> str:
        """For the terminal: a line for the artifact, one for each check, one for each note."""
        result = self.verification
        status = result.status
        if result.runner:
            status += f" on {result.source} by {result.runner}"
        lines = [f"[{_mark(result)}] {self.file}: {self.bytes / 1e6:.2f} MB, {status}"]
        lines += [f"  [{mark}] {text}" for mark, text in self._checks()]
        return "\n".join([*lines, *(f"       {note}" for note in self.notes)])

    def _checks(self) -> Iterator[tuple[str, str]]:
        """What was checked: a mark, and what was found."""
        result, threshold = self.verification, THRESHOLDS[self.precision]
        if self.arithmetic:
            graph = f"; {self.graph} graph" if self.graph else ""
            yield "ok", f"precision: {self.arithmetic}{graph}"
        else:
            yield "--", "precision: not counted, for want of the onnx package"
        if self.largest_fp32_value is not None:
            yield "ok", f"FP16 range: largest value {self.largest_fp32_value:.4g} of 65504"
        if result.probe:
            yield "ok", f"probe: {result.probe}"
        if result.max_difference is None or result.kl is None or result.agreement is None:
            yield _mark(result), f"outputs: {result.reason}"
            return
        differs = result.max_difference, result.kl
        limits = f"(at most {threshold.max_difference:g} and {threshold.max_kl:g})"
        yield (
            "FAILED" if result.exceeds("difference") or result.exceeds("KL") else "ok",
            f"parity: largest difference {differs[0]:.2g}, KL {differs[1]:.2g} {limits}",
        )
        if result.features is not None:
            text = f"features: {result.features:.2g} of their length off"
            mark = "FAILED" if result.exceeds("features") else "ok"
            yield mark, f"{text} (at most {threshold.max_features:g})"
        text = f"agreement: {result.agreement_text} (at least {threshold.min_agreement:g})"
        if result.exceeds("agreement"):
            yield "FAILED", text
        elif result.undecided:
            question = f"not decided by {result.images} images"
            if result.images < threshold.min_images:
                question += f"; needs at least {threshold.min_images}"
            yield "??", f"{text}, {question}"
        else:
            yield "ok", text
        if result.accuracy is None:
            yield "--", "accuracy: not measured, which --val would do"
        else:
            minus = f", minus the reference's {result.difference_text}"
            text = f"accuracy: {result.accuracy:.4f}{minus if result.difference_text else ''}"
            mark = "FAILED" if result.exceeds("accuracy") else "ok"
            yield mark, f"{text}, macro-F1 {result.macro_f1:.4f}"

    def as_dict(self) -> dict[str, Any]:
        """For ``report.json``."""
        return {**dataclasses.asdict(self), "verification": self.verification.as_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ReportRow:
        """Read back what :meth:`as_dict` made.

        Raises:
            TypeError: It is something else.
            KeyError: The same.
        """
        verification = Verification.from_dict(fields["verification"])
        notes = tuple(map(str, fields["notes"]))
        row = cls(**{**fields, "verification": verification, "notes": notes})
        valid = (
            isinstance(row.file, str)
            and isinstance(row.bytes, int)
            and isinstance(row.recommended, bool)
            and isinstance(row.largest_fp32_value, (int, float, type(None)))
        )
        if not valid:
            raise TypeError("file, bytes and largest value of a row")
        _tuning_lines(row)
        return row


def report_header(weights: Mapping[str, str], spec: ModelSpec) -> dict[str, Any]:
    """What all artifacts of a folder share: the weights, and what their outputs mean.

    Args:
        weights: File name and SHA-256.
        spec: The model's.
    """
    return {
        "weights": weights["file"],
        "weights_sha256": weights["sha256"],
        "model": f"{spec.architecture}, {spec.name}, {spec.num_classes} classes, "
        f"{spec.input_size}x{spec.input_size}" + (", preliminary" if spec.preliminary else ""),
        "spec": json.loads(spec.to_json()),
    }


class Report:
    """The report of a folder.

    Rows of earlier exports of the same model stay while the files that they describe are there,
    unchanged; so does what a file that was used again has shown on more images.

    Args:
        folder: Where the artifacts are.
        header: See :func:`report_header`.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self._header = header
        self._rows = {row.file: row for row in _earlier_rows(folder, header)}

    def add(self, row: ReportRow) -> None:
        """Take the row of an artifact of this export."""
        self._rows.pop(failed_name(row.file), None)
        earlier = self._rows.get(row.file)
        if earlier is None or not _says_more(earlier, row):
            self._rows[row.file] = row

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md``."""
        rows = [row for _, row in sorted(self._rows.items())]
        artifacts = [row.as_dict() for row in rows]
        content = {"schema": SCHEMA_VERSION, **self._header, "artifacts": artifacts}
        write_text(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")
        write_text(folder / MARKDOWN_FILE, _markdown(self._header, rows))


def failed_name(name: str) -> str:
    """``efficientface-int8-gpu.rtx.engine`` -> ``efficientface-int8-gpu.failed.rtx.engine``."""
    return name.replace(".", ".failed.", 1)


def reports_other_model(folder: Path, header: Mapping[str, Any]) -> bool:
    """Whether the report in a folder is of other weights, or of another use of the same."""
    try:
        return _identity(_read_json(folder)) != _identity(header)
    except _DAMAGED:
        return False


def _read_json(folder: Path) -> Any:
    return read_json(folder / JSON_FILE)


def _identity(content: Mapping[str, Any]) -> tuple[Any, Any]:
    return content["weights_sha256"], content["spec"]


def _says_more(earlier: ReportRow, row: ReportRow) -> bool:
    """Whether the same file was verified on more images before, and nothing is wrong with it."""
    return (
        earlier.sha256 == row.sha256
        and not row.verification.problems
        and earlier.verification.images > row.verification.images
    )


def _earlier_rows(folder: Path, header: Mapping[str, Any]) -> list[ReportRow]:
    """Rows of the report that is there; none when it is of another model, damaged or foreign."""
    try:
        content = _read_json(folder)
        if content["schema"] != SCHEMA_VERSION or _identity(content) != _identity(header):
            return []
        rows = [ReportRow.from_dict(fields) for fields in content["artifacts"]]
        return [
            row
            for row in rows
            if (folder / row.file).is_file() and file_hash(folder / row.file) == row.sha256
        ]
    except _DAMAGED:
        return []


def _mark(result: Verification) -> str:
    marks = {"FAILED": "FAILED", "verified": "ok", "not decided": "??"}
    return marks.get(result.status, "--")


def _markdown(header: Mapping[str, Any], rows: Sequence[ReportRow]) -> str:
    introduction = (
        f"{header['model']}. Differences in probability, and all else, are to the reference "
        "network in FP32 (PyTorch; where it is missing, the ONNX file that they were made from) "
        "on the same images, with 95 % intervals over images."
    )
    table = Table(_COLUMNS, [_cells(row) for row in rows]).to_markdown()
    sources = sorted({row.verification.source for row in rows})
    lines = [f"# Export of {header['weights']}", "", introduction, "", table]
    lines += [f"Images: {source}." for source in sources if source]
    notes = [f"- {row.file}: {note}" for row in rows for note in row.notes]
    tuned = [line for row in rows for line in _tuning_lines(row)]
    return "\n".join([*lines, "", *notes, *tuned]) + "\n"


_TUNING_COLUMNS = (
    *("precision", "graph", "backend", ">threads", ">ms", ">times the chosen one's"),
    *(">kernels", ">MB moved", ">agreement", ">accuracy", "verdict"),
)


def _tuning_lines(row: ReportRow) -> list[str]:
    """What ``--tune`` found, in Markdown; empty without it.

    Raises:
        KeyError: It is something else; TypeError and ValueError mean the same.
    """
    if row.tuning is None:
        return []
    found = row.tuning
    cells = [
        [
            *(one["precision"], one["graph"], one["backend"], one["threads"] or ""),
            with_interval(one["p50_ms"], one["p50_interval_ms"], ".3g"),
            with_interval(one["times"], one["times_interval"], ".2f"),
            *(one["kernels"] or "", number(one["bytes_moved"] and one["bytes_moved"] / 1e6, ".1f")),
            *(number(one["agreement"], ".4f"), number(one["accuracy"], ".4f")),
            one["verdict"],
        ]
        for one in found["candidates"]
    ]
    shown = [at for at in range(len(_TUNING_COLUMNS)) if any(cell[at] != "" for cell in cells)]
    columns = [_TUNING_COLUMNS[at] for at in shown]
    table = Table(columns, [[cell[at] for at in shown] for cell in cells], notes=found["notes"])
    title = f"## {row.file}, tuned for {found['objective']}"
    where = f"Images a call: {found['batch']}. Measured on: {found['machine']}. Medians with 95 %"
    text = f"{found['reason']}. {where} intervals."
    return ["", title, "", text, "", table.to_markdown().rstrip()]


_COLUMNS = (
    *("file", "MB", "graph", "arithmetic", "images", "largest difference", "agreement", "mean KL"),
    *("accuracy", "accuracy minus reference", "macro-F1", "status", "made"),
)


def _cells(row: ReportRow) -> list[str]:
    result = row.verification
    return [
        *(row.file, f"{row.bytes / 1e6:.2f}", row.graph, row.arithmetic),
        str(result.images or ""),
        *(number(result.max_difference, ".2g"), result.agreement_text, number(result.kl, ".2g")),
        *(number(result.accuracy, ".4f"), result.difference_text, number(result.macro_f1, ".4f")),
        result.status + (f" ({result.reason})" if result.reason else ""),
        row.created,
    ]
