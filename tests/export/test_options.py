"""The options, as they are typed."""

from __future__ import annotations

import pytest

from tests.export.outputs import Run


@pytest.mark.parametrize(
    "arguments",
    [
        ("--engine", "tensorrt"),
        ("--precision", "bf16"),
        ("--max-batch", "0"),
        ("--calib-images", "0"),
        ("--input-size", "16"),
        ("--surprise",),
    ],
)
def test_bad_values(exit_code: Run, arguments: tuple[str, ...]) -> None:
    code, _, error = exit_code(*arguments)
    assert code == 2
    assert error.count("\n") == 1 and "error: " in error


@pytest.mark.parametrize(
    "arguments",
    [("--engine", "onnx"), ("--precision", "fp16"), ("--calib", "x"), ("--overwrite",)],
)
def test_verify_takes_no_option_that_it_would_ignore(
    exit_code: Run, arguments: tuple[str, ...]
) -> None:
    code, out, error = exit_code("--verify", "model.onnx", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {arguments[0]}: expected none with --verify")
