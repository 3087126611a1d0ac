"""``report.json`` and ``report.md``: one row for every artifact in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import write_text

from .verify import Verification, number

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One artifact.

    Attributes:
        file: Its path, relative to the report.
        bytes: Its size.
        precision: ``fp32``, ``fp16`` or ``int8``.
        arithmetic: How many convolutions and linear layers run in which precision.
        verification: How it compares with the reference.
        notes: Warnings, and what an engine was built with and for.
    """

    file: str
    bytes: int
    precision: str
    arithmetic: str
    verification: Verification
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        path: Path,
        folder: Path,
        precision: str,
        arithmetic: str,
        verification: Verification,
        notes: Sequence[str] = (),
    ) -> Row:
        """The row of the artifact at ``path`` in the report in ``folder``."""
        name = Path(os.path.relpath(path, folder)).as_posix()
        return cls(name, path.stat().st_size, precision, arithmetic, verification, tuple(notes))

    def describe(self) -> str:
        """A line for the terminal, and one for each note."""
        result = self.verification
        mark = "--" if result.not_run else "FAILED" if result.problems else "ok"
        parts = [f"{self.bytes / 1e6:.2f} MB", self.arithmetic, result.describe()]
        line = f"[{mark}] {self.file}: " + "; ".join(part for part in parts if part)
        return "\n".join([line, *(f"     {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """For ``report.json``."""
        return {**dataclasses.asdict(self), "verification": self.verification.as_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        """Read back what :meth:`as_dict` made.

        Raises:
            TypeError: It is something else.
            KeyError: The same.
        """
        verification = Verification.from_dict(fields["verification"])
        notes = tuple(map(str, fields["notes"]))
        row = cls(**{**fields, "verification": verification, "notes": notes})
        if not isinstance(row.file, str) or not isinstance(row.bytes, int):
            raise TypeError("file and bytes of a row")
        return row


def write_report(folder: Path, rows: Sequence[Row], header: Mapping[str, Any]) -> None:
    """Write both reports.

    Rows of earlier exports of the same weights stay while their files are there.

    Args:
        folder: Where the artifacts are.
        rows: Of this export.
        header: What was exported, and with which versions.
    """
    merged = {row.file: row for row in _earlier_rows(folder, header["weights_sha256"])}
    merged |= {row.file: row for row in rows}
    present = [row for name, row in sorted(merged.items()) if (folder / name).is_file()]
    content = {
        "schema": SCHEMA_VERSION,
        **header,
        "artifacts": [row.as_dict() for row in present],
    }
    write_text(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")
    write_text(folder / MARKDOWN_FILE, _markdown(header, present))


def _earlier_rows(folder: Path, weights_sha256: str) -> list[Row]:
    """Rows of the report that is there; none when it is of other weights, damaged or foreign."""
    try:
        content = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        if (content["schema"], content["weights_sha256"]) != (SCHEMA_VERSION, weights_sha256):
            return []
        return [Row.from_dict(fields) for fields in content["artifacts"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _markdown(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    lines = [
        f"# Export of {header['weights']}",
        "",
        f"{header['model']}, {header['created']}. Differences are to the reference network "
        "(PyTorch, FP32) on the same images, with 95 % intervals over images.",
        "",
        "| file | MB | arithmetic | images | largest difference | agreement | mean KL "
        "| accuracy | accuracy minus reference | macro-F1 | status |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(row) for row in rows]
    notes = [f"- {row.file}: {note}" for row in rows for note in row.notes]
    sources = sorted({row.verification.source for row in rows})
    lines += ["", *(f"Images: {source}." for source in sources if source)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _markdown_row(row: Row) -> str:
    result = row.verification
    status = result.status + (f" ({result.reason})" if result.reason else "")
    cells = [
        row.file,
        f"{row.bytes / 1e6:.2f}",
        row.arithmetic,
        str(result.images or ""),
        number(result.max_difference, ".2g"),
        result.agreement_text,
        number(result.kl, ".2g"),
        number(result.accuracy, ".4f"),
        result.difference_text,
        number(result.macro_f1, ".4f"),
        status,
    ]
    return "| " + " | ".join(cells) + " |"
