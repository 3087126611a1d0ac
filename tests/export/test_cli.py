"""``efficientface-export`` in processes of its own, and where packages are missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from efficientface_deploy.artifact import write_sidecar
from efficientface_deploy.files import file_hash
from efficientface_export.graph.io import read_onnx
from tests.export.outputs import FP16, FP32, INT8, convolutions, one_line


class TestPackagesMissing:
    """In processes of their own, where the packages cannot be imported."""

    def test_no_torch(self, artifacts: Path, faces: Path, tmp_path: Path, run_without: Any) -> None:
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "int8"]
        command += ["--calib", faces, "--calib-images", 8, "--target", "gpu", "--no-int8-search"]
        result = run_without(("torch", "torchvision"), *command, "--out", tmp_path / "out")
        assert (result.returncode, result.stderr) == (0, "")
        assert f"{len(convolutions(artifacts)) - 14} fp16 + 14 int8 convolutions" in result.stdout

    def test_verify_an_onnx_file_by_onnxruntime_alone(
        self, artifacts: Path, run_without: Any
    ) -> None:
        result = run_without(("torch", "onnx"), "--verify", artifacts / INT8)
        assert (result.returncode, result.stderr) == (0, "")
        assert "[??] efficientface-int8-cpu.onnx: " in result.stdout  # by too few images
        assert "[ok] probe: " in result.stdout
        assert "[--] precision: not counted, for want of the onnx package" in result.stdout
        assert "[ok] parity: " in result.stdout

    def test_verify_an_engine_without_onnx(
        self, artifacts: Path, tmp_path: Path, run_without: Any
    ) -> None:
        """As on a device with TensorRT alone; that nothing here runs it is all there is to say."""
        engine = artifacts / "model.engine"
        engine.write_bytes(b"\xff\0\xff")
        _, spec, record = read_onnx(artifacts / FP16)[:3]
        write_sidecar(engine, spec, {**record, "engine": {"sha256": file_hash(engine)}})
        missing = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")
        result = run_without(missing, "--verify", engine)
        assert result.returncode == 2
        assert f"[ok] precision: {len(convolutions(artifacts))} fp16 convolutions" in result.stdout
        assert "model.engine: expected a backend that can run it" in one_line(result.stderr)

    def test_neither_torch_nor_onnxruntime(
        self, artifacts: Path, tmp_path: Path, run_without: Any
    ) -> None:
        pytest.importorskip("tensorrt_rtx")
        missing = ("torch", "torchvision", "onnxruntime")
        command = ["--engine", "trt-rtx", "--weights", artifacts / FP16, "--out", tmp_path / "out"]
        result = run_without(missing, *command)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("built, not verified here") == 2
        assert (tmp_path / "out" / "efficientface-fp16-cpu.rtx.engine").is_file()

    @pytest.mark.parametrize(
        ("missing", "arguments", "extra"),
        [
            (("onnx",), ("--precision", "fp16"), "[engine]"),
            (("onnxruntime",), ("--precision", "fp16"), "[cpu]"),
        ],
    )
    def test_one_line_names_the_extra(
        self,
        artifacts: Path,
        tmp_path: Path,
        run_without: Any,
        missing: tuple[str, ...],
        arguments: tuple[str, ...],
        extra: str,
    ) -> None:
        command = ("--engine", "onnx", "--weights", artifacts / FP32, *arguments)
        result = run_without(missing, *command, "--out", tmp_path / "out")
        assert result.returncode == 2
        assert re.search(f"; pip install '.*{re.escape(extra)}'", one_line(result.stderr))
        assert missing[0].replace("_", "-") in result.stderr

    def test_checkpoint_without_torch(self, student: Path, run_without: Any) -> None:
        result = run_without(("torch",), "--engine", "onnx", "--weights", student)
        assert result.returncode == 2
        assert "[export,cpu]" in one_line(result.stderr)

    def test_help_needs_nothing(self, run_without: Any) -> None:
        result = run_without(("torch", "onnx", "onnxruntime", "tensorrt_rtx"), "--help")
        assert result.returncode == 0
        assert "--engine {onnx,trt,trt-rtx,auto}" in result.stdout


def test_console_script(artifacts: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "efficientface_export.cli", "--verify", artifacts / FP32],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
