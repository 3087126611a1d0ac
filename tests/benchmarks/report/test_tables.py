"""How a table is made, and how its figures are written."""

from __future__ import annotations

import pytest

from benchmarks.report.tables import NOISY, TableForm, digits, every_key, interval, of


def test_columns_that_no_row_fills_go_with_their_notes() -> None:
    notes = {">ms": "of {what}", ">old": "not shown", "anything": "shown"}
    columns = {"Name": of("name"), ">ms": of("ms", digits), ">old": of("old")}
    form = TableForm("Of {what}", lambda result: result["rows"], columns, notes)
    table = form.fill({"what": "calls", "rows": [{"name": "a", "ms": 1.0}, {"name": "b"}]})
    assert (table.title, table.columns) == ("Of calls", ["Name", ">ms"])
    assert table.rows == [["a", "1.00"], ["b", ""]]
    assert table.notes == ["ms: of calls", "anything: shown"]


def test_rows_stand_under_the_heading_of_their_group() -> None:
    rows = [{"of": "a", "n": 1}, {"of": "a", "n": 2}, {"of": "b", "n": 3}]
    form = TableForm("", lambda result: rows, {"n": of("n"), "m": of("n")}, group=lambda r: r["of"])
    assert form.fill({}).rows == [["a"], ["1", "1"], ["2", "2"], ["b"], ["3", "3"]]


def test_every_key_but_lists_becomes_a_column() -> None:
    rows = [
        {"step": "import", "ms": 1.25, "runs": [1, 2], "ratio": {"value": 1, "low": 0, "high": 2}},
        {"step": "load", "ms": None, "large": 123456.0, "calls": {"p50_ms": 3.0}, "met": True},
    ]
    table = TableForm("", lambda result: rows, every_key()).fill({})
    assert table.columns == ["step", ">ms", ">ratio", ">large", ">calls", "met"]
    assert table.rows[0] == ["import", "1.25", "1.00 (0.00 to 2.00)", "", "", ""]
    assert table.rows[1] == ["load", "", "", "123456", "3", "yes"]


@pytest.mark.parametrize("row", [{"busy": True}, {"calls": {"busy": True}}])
def test_a_noisy_run_says_so_beside_its_figures(row: dict[str, object]) -> None:
    form = TableForm("", lambda result: [{"name": "a", **row}], {"name": of("name")})
    assert form.fill({}).notes == [NOISY]


def test_an_interval_may_have_no_ends() -> None:
    assert interval({"value": 1.5}) == "1.50"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (116.4, "116"),
        (999.7, "1000"),
        (1234.5, "1234"),
    ],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_a_negative_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 0"):
        digits(-1.0)


def test_what_a_file_says_cannot_steer_the_terminal() -> None:
    form = TableForm("", lambda result: result["rows"], every_key())
    (row,) = form.fill({"rows": [{"Name": "\x1b[31mred\x1b[0m\nnext\udcff"}]}).rows
    assert row == [" [31mred [0m next\\udcff"]


def test_nor_can_it_in_title_note_heading_or_column() -> None:
    form = TableForm(
        "of {it}",
        lambda result: [{"key\x1b": 1}],
        every_key(),
        group=lambda row: "\x1bgroup",
        notes={"n": "on {it}"},
    )
    table = form.fill({"it": "a\x1b[2Jb"})
    texts = [
        table.title,
        *table.notes,
        *table.columns,
        *(cell for row in table.rows for cell in row),
    ]
    assert len(texts) == 5 and all(text.isprintable() for text in texts)
