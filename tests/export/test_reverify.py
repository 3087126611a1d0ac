"""``--verify``: an artifact compared again with what lies beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from efficientface_export.graph.io import read_onnx, write_onnx
from tests.export.outputs import FP16, FP32, INT8, Run, convolutions, names, one_line


class TestVerifyAgain:
    @pytest.mark.parametrize("name", [FP32, FP16, INT8])
    def test_good(self, artifacts: Path, exit_code: Run, name: str) -> None:
        before = names(artifacts)
        code, output, _ = exit_code("--verify", artifacts / name)
        assert code == 0
        lines = output.splitlines()
        # Random features: INT8 gives other labels to some of the 16, which decide nothing.
        mark, status = ("??", "not decided") if name == INT8 else ("ok", "verified")
        assert lines[0].startswith(f"[{mark}] {name}: ")
        assert lines[0].endswith(f"{status} on 16 synthetic faces by onnx:cpu")
        assert [line.split(":")[0].strip() for line in lines[1:]] == [
            "[ok] precision",
            *(["[ok] FP16 range"] if name == FP16 else []),
            "[ok] probe",
            "[ok] parity",
            "[??] agreement",
            "[--] accuracy",
        ]
        assert names(artifacts) == before

    def test_accuracy(self, artifacts: Path, faces: Path, exit_code: Run) -> None:
        code, output, _ = exit_code("--verify", artifacts / INT8, "--val", faces)
        assert code == 0
        assert "  [ok] synthetic faces, test, 14 images: accuracy " in output

    def test_other_outputs(self, artifacts: Path, exit_code: Run) -> None:
        path = artifacts / FP32
        graph, spec, record = read_onnx(path)[:3]
        (bias,) = [w for w in graph.graph.initializer if w.name.endswith("fc.bias")]
        values = onnx.numpy_helper.to_array(bias).copy()
        values[3] += 0.1
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        write_onnx(graph, path, spec, record)
        code, output, error = exit_code("--verify", path)
        assert code == 1
        assert output.startswith(f"[FAILED] {FP32}: ")
        assert "expected outputs like the reference" in one_line(error)

    def test_other_precision_than_it_says(self, artifacts: Path, exit_code: Run) -> None:
        graph, spec, record = read_onnx(artifacts / FP32)[:3]
        write_onnx(graph, artifacts / INT8, spec, {**record, "precision": "int8"})
        code, _, error = exit_code("--verify", artifacts / INT8)
        assert code == 2
        assert f"in int8, found {len(convolutions(artifacts))} fp32 convolutions" in one_line(error)

    def test_without_its_reference(self, artifacts: Path, exit_code: Run) -> None:
        (artifacts / "verify.npz").unlink()
        code, _, error = exit_code("--verify", artifacts / FP32)
        assert code == 2
        assert "copy the verify.npz that was exported with it" in one_line(error)

    @pytest.mark.parametrize("name", ["x.onnx", "x.engine", "x.rtx.engine", "x", "."])
    def test_no_artifact(self, tmp_path: Path, exit_code: Run, name: str) -> None:
        code, _, error = exit_code("--verify", tmp_path / name)
        assert code == 2
        assert "expected an ONNX file or an engine of ours, found" in one_line(error)
        assert "; check the path" in error

    @pytest.mark.parametrize(
        ("name", "content", "found", "fix"),
        [
            ("a.safetensors", b"\xff\0\xff", "a checkpoint", "export it first"),
            ("a.pth.tar", b"\xff\0\xff", "a checkpoint", "export it first"),
            ("a.rtx.engine.json", b"{}", "the sidecar of an engine", "give a.rtx.engine"),
            ("a.onnx", b"", "an empty file", "copy it again, or export it again"),
            ("a.engine", b"hello", "a text file", "copy it again, or export it again"),
            ("a.txt", b"hello", "a text file", "give an exported file"),
        ],
    )
    def test_wrong_kind_of_file(
        self, tmp_path: Path, exit_code: Run, name: str, content: bytes, found: str, fix: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        code, _, error = exit_code("--verify", tmp_path / name)
        assert code == 2
        assert f"an engine of ours, found {found}; {fix}" in one_line(error)
