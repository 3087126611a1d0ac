"""A result shown, and written beside what it is shown as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report.publish import check_out, console, publish, require_libraries, show
from benchmarks.report.result import read_result
from efficientface_deploy.errors import BackendError, ConfigError
from efficientface_deploy.workbench import requirements


def printed(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    show(result, console())
    return capsys.readouterr().out


def test_latency_is_printed(latency: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(latency, capsys)
    for part in (
        "AMD EPYC, 2 CPUs",
        "onnxruntime 1.32.0",
        "012345678+changes",
        "compute, batch 32",
        "b[1].engine",
        "2.00 (1.90 to 2.10)",
        "1234",
        "pip install 'efficientface-deploy[trt]'",
        "no provider",
        "warning: the machine was noisy: [3 of 4]",
    ):
        assert part in text


@pytest.mark.parametrize("width", [80, 100, 130])
def test_a_narrow_terminal_gets_fewer_columns_and_is_told_so(
    width: int,
    full_latency: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(full_latency, capsys)
    assert max(map(len, text.splitlines())) <= width
    latencies = text[text.index("Latency, milliseconds") : text.index("Cold start")]
    assert "a.onnx" in latencies and "2.00 (1.90 to 2.10)" in latencies  # on one line, not folded
    (header,) = (line for line in latencies.splitlines() if "Model" in line)
    assert "p50" in header and "Speed-up (95 %)" in header and "p95" not in header
    assert "too narrow here for p95" in latencies


def test_a_wide_terminal_gets_every_column(
    full_latency: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(full_latency, capsys)
    assert "p95" in text and "too narrow" not in text


def test_accuracy_is_printed(accuracy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(accuracy, capsys)
    for part in ("FER+, validation split, 3191 images", "87.65", "1.5e-07", "0.002", "5.00"):
        assert part in text


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries()
    monkeypatch.setattr(requirements, "is_installed", lambda name: name != "matplotlib")
    wanted = r"benchmarks: expected matplotlib.*pip install .*\[bench\]"
    with pytest.raises(BackendError, match=wanted):
        require_libraries()


def test_a_new_result_is_written_in_every_form(
    latency: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = publish(latency, tmp_path / "new")
    assert path == tmp_path / "new" / "latency.json" and read_result(path) == latency
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| 2.00 (1.90 to 2.10) |" in page
    assert page.count("> Warning: ") == len(latency["warnings"])
    with Image.open(path.with_suffix(".png")) as image:
        assert image.format == "PNG"
    text = capsys.readouterr().out
    assert "compute, batch 1" in text
    assert f"wrote latency.json and latency.md and latency.png to {path.parent}" in text


def test_accuracy_has_no_plot(accuracy: dict[str, Any], tmp_path: Path) -> None:
    publish(accuracy, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.json", "accuracy.md"}


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/proc/x", "/proc/x: expected a folder that can be written, "),
        ("old", r".*graphs\.json: expected no result yet, found that of an earlier run; "),
    ],
)
def test_folder_that_cannot_take_a_result_is_refused_before_the_work(out, said, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "graphs.json").touch()
    with pytest.raises(ConfigError, match=f"^{said}"):
        check_out(tmp_path / out, "graphs")
    check_out(tmp_path / "old", "latency")
    check_out(tmp_path / "new", "graphs")
    assert not (tmp_path / "new").exists()
