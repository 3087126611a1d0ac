"""The tables of measured figures in README.md and docs/, written from committed results.

A block begins with a comment that names one of ``kinds.BLOCKS`` and its result, or the results
that its table joins:

    <!-- latency: benchmarks/results/latency-.../latency.json -->
    ...
    <!-- end -->

What stands between is replaced. A test compares the files with what their results give.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report.kinds import BLOCKS, JOINED, PARTS
from benchmarks.report.result import damage_named, read_result
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import write_text

_HEAD = re.compile(r"^<!-- ([a-z]+): (\S+(?: \S+)*) -->\n", re.MULTILINE)
_END = "<!-- end -->"


def documents(root: Path = ROOT) -> list[Path]:
    """The files that may have such blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def update_docs(root: Path = ROOT) -> dict[Path, bool]:
    """Write the tables anew, each file atomically.

    Returns:
        Whether each file that has such blocks changed.

    Raises:
        ArtifactError: A block has no end, or its result cannot be read or is of another kind.
    """
    changed = {}
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        written = render(text, path, root)
        if _HEAD.search(text):
            changed[path] = written != text
        if written != text:
            write_text(path, written)
    return changed


def render(text: str, path: Path, root: Path = ROOT) -> str:
    """A file's text with its tables written anew.

    Args:
        text: As it is.
        path: Its name, for errors.
        root: What the results' paths are relative to.

    Raises:
        ArtifactError: As :func:`update_docs`.
    """
    first, *parts = _HEAD.split(text)  # then name, result and the text up to the next block
    for name, result, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        _, end, rest = body.partition(f"{_END}\n")
        if not end:
            expected = f"{_END} after each <!-- kind: result -->"
            raise ArtifactError(path, expected, "a block without its end", "add the line")
        table = _table(name, [root / part for part in result.split()])
        first += f"<!-- {name}: {result} -->\n\n{table}\n{_END}\n{rest}"
    return first


def _table(name: str, paths: Sequence[Path]) -> str:
    results = [read_result(path) for path in paths]
    found = [result["kind"] for result in results]
    kinds = JOINED.get(name) or (found[0] if name in PARTS else name,)
    of_each = len(found) // len(kinds) if name in JOINED else 1
    if sorted(kinds * of_each) != sorted(found):
        expected, others = f"a result of kind {' and of '.join(kinds)}", dict.fromkeys(found)
        fix = "name a result of each kind"
        raise ArtifactError(paths[0], f"{expected}, as the comment says", " and ".join(others), fix)
    joined = {kind: [one for one in results if one["kind"] == kind] for kind in kinds}
    with damage_named(*paths):
        table = BLOCKS[name].fill(joined if name in JOINED else results[0])
    if not table.rows:
        raise ArtifactError(paths[0], f"a result with {name}", "none", "name another result")
    return dataclasses.replace(table, title="", notes=()).to_markdown()
