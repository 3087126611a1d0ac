"""``report.json`` and ``report.md``: one row for every artifact in a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import write_text

from .verify import Verification

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One artifact.

    Attributes:
        file: Its name.
        bytes: Its size.
        precision: ``fp32``, ``fp16`` or ``int8``.
        arithmetic: How many convolutions and linear layers run in which precision.
        verification: See :class:`Verification`, as a dictionary.
        notes: Warnings, and what an engine was built with and for.
    """

    file: str
    bytes: int
    precision: str
    arithmetic: str
    verification: dict[str, Any]
    notes: tuple[str, ...] = ()


def make_row(
    path: Path,
    precision: str,
    arithmetic: str,
    verification: Verification,
    notes: Sequence[str] = (),
) -> Row:
    """The row of an artifact that lies at ``path``."""
    size = path.stat().st_size
    return Row(path.name, size, precision, arithmetic, verification.as_dict(), tuple(notes))


def write_report(folder: Path, rows: Sequence[Row], header: dict[str, Any]) -> None:
    """Write both reports; rows of earlier exports stay while their files are there.

    Args:
        folder: Where the artifacts are.
        rows: Of this export.
        header: What was exported, and with which versions.
    """
    merged = {row["file"]: row for row in _earlier_rows(folder)}
    merged |= {row.file: dataclasses.asdict(row) for row in rows}
    present = [row for name, row in sorted(merged.items()) if (folder / name).is_file()]
    content = {"schema": SCHEMA_VERSION, **header, "artifacts": present}
    write_text(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")
    write_text(folder / MARKDOWN_FILE, _markdown(header, present))


def _earlier_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = content["artifacts"] if content["schema"] == 1 else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return rows


def _markdown(header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"# Export of {header['weights']}",
        "",
        f"{header['model']}, {header['created']}. Differences are to the reference network "
        "(PyTorch, FP32) on the same images.",
        "",
        "| file | MB | arithmetic | images | largest difference | agreement | mean KL "
        "| accuracy | macro-F1 | status |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(row) for row in rows]
    notes = [f"- {row['file']}: {note}" for row in rows for note in row["notes"]]
    sources = sorted({row["verification"]["source"] for row in rows})
    lines += ["", *(f"Images: {source}." for source in sources if source)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _markdown_row(row: dict[str, Any]) -> str:
    result = row["verification"]

    def number(key: str, form: str) -> str:
        return "" if result[key] is None else format(result[key], form)

    status = result["status"]
    if detail := result["not_run"] or "; ".join(result["problems"]):
        status += f" ({detail})"
    cells = [
        row["file"],
        f"{row['bytes'] / 1e6:.2f}",
        row["arithmetic"],
        str(result["images"] or ""),
        number("max_difference", ".2g"),
        number("agreement", ".4f"),
        number("kl", ".2g"),
        number("accuracy", ".4f"),
        number("macro_f1", ".4f"),
        status,
    ]
    return "| " + " | ".join(cells) + " |"
