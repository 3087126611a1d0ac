"""One table: as Markdown and on a terminal."""

from __future__ import annotations

import io

import pytest

from efficientface_deploy.workbench.tables import Table, escaped

TABLE = Table(
    ["file", ">MB"],
    [["CPU"], ["`a|b.onnx`", 1.5], ["c", 20]],
    title="Sizes",
    notes=["A file each."],
)


def test_markdown():
    assert TABLE.to_markdown() == (
        "**Sizes**\n\n"
        "| file | MB |\n"
        "|---|--:|\n"
        "| **CPU** |  |\n"
        "| `a\\|b.onnx` | 1.5 |\n"
        "| c | 20 |\n"
        "\n"
        "- A file each.\n"
    )


def test_without_title_and_notes():
    assert Table(["a"], [["x"], ["y"]]).to_markdown() == "| a |\n|---|\n| x |\n| y |\n"


def test_on_a_terminal():
    console = pytest.importorskip("rich.console").Console
    output = io.StringIO()
    console(file=output, width=60).print(TABLE)
    text = output.getvalue()
    assert "Sizes" in text and "A file each." in text
    # Numbers are set to the right, text to the left; markup in a cell is text.
    assert "`a|b.onnx` │ 1.5" in text and "c          │  20" in text


def test_escaped_text_is_text_in_a_cell():
    name = "runs|a_b*[x](y)<z>`\\"
    assert Table([""], [[escaped(name)]]).to_markdown().splitlines()[-1] == (
        "| runs\\|a\\_b\\*\\[x\\](y)\\<z\\>\\`\\\\ |"
    )
