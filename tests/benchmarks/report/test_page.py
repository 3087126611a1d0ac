"""The page and the Markdown: whole, of one file, and with what was not measured said."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.page import CAVEATS, as_html, as_markdown
from benchmarks.report.plots import match_accuracy, plots_of, tradeoff_plots
from benchmarks.report.result import read_result

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


class Checker(HTMLParser):
    """Notes what a page refers to, its ids, and tags that are not closed in order."""

    void = ("meta", "br", "hr", "img", "link", "input", "path", "use", "rect", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert all(reference.startswith("#") for reference in checker.references)
    assert {reference[1:] for reference in checker.references} <= set(checker.ids)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page and "<script" not in page
    return checker


def test_the_page_is_whole_and_needs_nothing_else(
    full_latency: dict[str, Any], accuracy: dict[str, Any]
) -> None:
    page = as_html([full_latency, accuracy])
    text = " ".join(checked(page).text)
    for part in ("AMD EPYC", "Cold start", "Where the time goes", "Throughput", "87.65"):
        assert part in text
    assert all(caveat in text for caveat in CAVEATS)
    assert "pool<1>" in text and "pool<1>" not in page  # escaped
    assert "the machine was busy: [3 of 4]" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_every_committed_result_becomes_a_page(path: Any) -> None:
    result = read_result(path)
    checked(as_html([result]))
    assert "may not be concluded" in as_markdown([result])


def test_the_page_of_all_results_has_no_id_twice() -> None:
    checked(as_html([read_result(path) for path in [*RESULTS, *RESULTS]]))


def test_colours_are_the_style_sheets(full_latency: dict[str, Any]) -> None:
    page = as_html([full_latency])
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    defined = set(re.findall(r"--([a-z0-9-]+):", page))
    assert used <= defined
    drawn = [plot.svg for _, plots in plots_of([full_latency]) for plot in plots]
    assert drawn and all("var(--ink)" in svg and "#0" not in svg for svg in drawn)


def test_axes_say_what_they_are(full_latency: dict[str, Any], make_case: Any) -> None:
    full_latency["cases"] += [make_case("a.onnx", "compute", batch, threads=2) for batch in (1, 32)]
    drawn = {plot.title: plot.svg for _, plots in plots_of([full_latency]) for plot in plots}
    # matplotlib draws letters as shapes, and what they say as a comment.
    for title, text in (
        ("Latency: compute, batch 1", "ms a call"),
        ("Throughput by batch, 1 thread", "images in a call"),
        ("Throughput by threads, batch 1", "threads of an inference"),
        ("Where the time goes", "ms a pass, under the profiler"),
    ):
        assert f"<!-- {text} -->" in drawn[title]
    assert "<!-- a.onnx (onnx:cpu) -->" in drawn["Throughput by batch, 1 thread"]


def test_goals_stand_before_the_plots(full_latency: dict[str, Any]) -> None:
    page = as_html([full_latency])
    assert 0 < page.index("x floor at most") < page.index("<svg")
    assert page.count("x floor at most") == 1


def test_scaling_is_drawn_where_there_is_any(full_latency: dict[str, Any], make_case: Any) -> None:
    titles = [plot.title for _, plots in plots_of([full_latency]) for plot in plots]
    assert "Throughput by batch, 1 thread" in titles
    assert not any(title.startswith("Throughput by threads") for title in titles)
    full_latency["cases"].append(make_case("a.onnx", "compute", 1, threads=2))
    titles = [plot.title for _, plots in plots_of([full_latency]) for plot in plots]
    assert "Throughput by threads, batch 1" in titles


def test_accuracy_meets_latency_by_the_files_hash(
    latency: dict[str, Any], accuracy: dict[str, Any]
) -> None:
    row = accuracy["rows"][0]
    accuracy["rows"].append(
        {**row, "model": "elsewhere.onnx", "sha256": "cd" * 32, "accuracy": 0.5}
    )
    latency["models"] = [
        {"name": "a.onnx", "sha256": "ab" * 32},  # another file of the same name
        {"name": "b[1].engine", "sha256": "cd" * 32},
    ]
    found = match_accuracy(latency, accuracy)
    assert {name: score["accuracy"] for name, score in found.items()} == {"b[1].engine": 0.5}
    row["sha256"] = "ab" * 32
    found = match_accuracy(latency, accuracy)
    assert found["a.onnx"]["accuracy"] == 0.8765
    # One of them on a GPU: no two to compare on the same threads.
    assert tradeoff_plots(latency, accuracy) == []
    latency["cases"][3]["threads"] = 1
    (plot,) = tradeoff_plots(latency, accuracy)
    assert plot.title == "Accuracy by latency, batch 1, 1 thread"
    text = " ".join(checked(as_html([latency, accuracy])).text)
    assert "Accuracy by latency" in text


def test_results_without_names_in_common_draw_no_comparison(
    latency: dict[str, Any], accuracy: dict[str, Any]
) -> None:
    accuracy["rows"][0]["model"] = "other.onnx"
    assert "Accuracy by latency" not in as_html([latency, accuracy])
