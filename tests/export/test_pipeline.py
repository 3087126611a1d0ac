"""Whole exports as their user runs them: what is made, said, refused, and the exit code."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tensorrt_stand_in import Library

from efficientface_deploy import load, tuned
from efficientface_deploy.artifact import read_sidecar, sidecar_path
from efficientface_deploy.backends.tensorrt import library as tensorrt_library
from efficientface_deploy.errors import ArtifactError, ExportError
from efficientface_deploy.files import file_hash
from efficientface_deploy.vision.yunet import FILE_VARIABLE as YUNET_VARIABLE
from efficientface_deploy.web.files import FILE_VARIABLE, RUNTIME_FILES
from efficientface_deploy.workbench.dataset import image_list_hash, read_dataset
from efficientface_deploy.workbench.timing import Samples
from efficientface_deploy.workbench.workspace import open_workspace
from efficientface_export import pipeline, plan, tune
from efficientface_export import source as source_module
from efficientface_export.cli import main
from efficientface_export.graph import trace as trace_module
from efficientface_export.graph.io import read_onnx, write_onnx
from efficientface_export.int8.qdq import SCHEMES, QuantisationScheme
from efficientface_export.int8.sensitivity import Search
from efficientface_export.tensorrt import builder as engines
from efficientface_export.verification import parity
from tests.export.outputs import FP16, FP32, INT8, Run, convolutions, names, one_line, report


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without TensorRT, whatever this one has; TensorRT for RTX stays."""
    available = engines.available
    missing = "tensorrt is not installed"
    monkeypatch.setattr(
        engines, "available", lambda kind: missing if kind == "trt" else available(kind)
    )


class TestOneExport:
    """``--engine onnx --precision all --calib faces`` from a checkpoint."""

    def test_files(self, exported: Path) -> None:
        made = {FP32, FP16, INT8, "verify.npz", "report.md", "report.json"}
        assert names(exported) - {"stdout.txt"} == made
        sizes = [(exported / name).stat().st_size for name in (FP32, FP16, INT8)]
        assert sizes[0] > 1.9 * sizes[1] > 1.6 * 1.9 * sizes[2]

    def test_output(self, exported: Path, student: Path) -> None:
        lines = (exported / "stdout.txt").read_text().splitlines()
        assert lines[0] == f"weights: {student} (test, 64x64)"
        assert lines[1] == "calibration: 105 images of faces (train)"
        files = [line for line in lines if line.startswith("[")]
        for line, name in zip(files, (FP32, FP16, INT8), strict=True):
            # Random features: INT8 gives other labels to some of the 16, which decide nothing.
            mark, status = ("??", "not decided") if name == INT8 else ("ok", "verified")
            assert line.startswith(f"[{mark}] {name}: ")
            assert line.endswith(f"{status} on 16 synthetic faces by onnx:cpu")
        assert sum(line.startswith("  [ok] parity: ") for line in lines) == 3
        assert lines[-2:] == [
            f"report: {exported / 'report.md'}",
            f"next: efficientface-predict PICTURE --model {exported / INT8}",
        ]

    def test_report(self, exported: Path) -> None:
        rows = report(exported)
        assert set(rows) == {FP32, FP16, INT8}
        for name, row in rows.items():
            assert row["bytes"] == (exported / name).stat().st_size
            status = "not decided" if name == INT8 else "verified"
            assert row["verification"]["status"] == status
            assert f"| {name} |" in (exported / "report.md").read_text()

    def test_provenance(self, exported: Path, student: Path, faces: Path) -> None:
        sha = file_hash(student)
        records = {name: read_onnx(exported / name)[2] for name in (FP32, FP16, INT8)}
        for name, record in records.items():
            assert record["precision"] == name.split("-")[1]
            assert record["target"] == "cpu"
            assert record["input"] == "uint8 NHWC RGB"
            assert record["weights"] == {"file": "student.safetensors", "sha256": sha}
            assert record["parent"] == {"file": "student.safetensors", "sha256": sha}
            assert record["verification"] == report(exported)[name]["verification"]
            assert record["arithmetic"] == report(exported)[name]["arithmetic"]
            assert {"torch", "onnx", "onnxruntime", "python"} <= set(record["versions"])
            assert str(student.parent) not in json.dumps(record)
        assert "calibration" not in records[FP16]
        assert records[FP16]["largest_fp32_value"]["magnitude"] >= 255
        train = read_dataset(faces).split("train")
        assert records[INT8]["calibration"] == {
            "dataset": "faces",
            "split": "train",
            "count": 105,
            "seed": 0,
            "method": "percentile",
            "images_sha256": image_list_hash(train, faces),
        }
        assert records[INT8]["excluded"] == []

    def test_they_run(self, exported: Path, images: np.ndarray) -> None:
        answers = []
        for name in (FP32, FP16, INT8):
            with load(exported / name, threads=1) as predictor:
                answers.append([prediction.label for prediction in predictor.predict_batch(images)])
        assert answers[0] == answers[1]
        assert np.mean(np.array(answers[0]) == np.array(answers[2])) > 0.8


class TestNothingIsDoneTwice:
    """By counting: what is parsed, and what becomes of a sidecar, in one call."""

    @pytest.fixture
    def counts(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        found: Counter[str] = Counter()

        def count(module: Any, name: str) -> None:
            call = getattr(module, name)

            def counted(path: Any, *rest: Any, **keywords: Any) -> Any:
                found[f"{name} {Path(path).name}"] += 1
                return call(path, *rest, **keywords)

            monkeypatch.setattr(module, name, counted)

        count(onnx, "load")
        count(engines, "write_sidecar")
        return found

    def test_from_a_checkpoint(
        self, student: Path, faces: Path, tmp_path: Path, exit_code: Run, counts: Counter[str]
    ) -> None:
        command = ["--engine", "onnx", "--precision", "all", "--weights", student]
        command += ["--calib", faces, "--val", faces, "--no-int8-search", "--out", tmp_path]
        assert exit_code(*command)[0] == 0
        assert counts == {}
        assert exit_code(*command)[0] == 0  # all there, and each read once
        assert counts == {f"load {name}": 1 for name in (FP32, FP16, INT8)}

    def test_engines_of_an_onnx_file(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, counts: Counter[str]
    ) -> None:
        """The sidecar is written for the runtime, which verifies the engine, and then finished."""
        pytest.importorskip("tensorrt_rtx")
        command = ["--engine", "trt-rtx", "--compute-capability", "sm89", "--out", tmp_path]
        assert exit_code(*command, "--weights", artifacts / FP16)[0] == 0
        engine = "efficientface-fp16-cpu.rtx.engine"
        assert counts == {f"load {FP16}": 1, f"write_sidecar {engine}": 2}


class TestWeights:
    def test_newest_student_is_taken_and_named(
        self, student: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "a").mkdir(parents=True)
        shutil.copy(student, tmp_path / "runs" / "a" / "student.safetensors")
        code, output, _ = exit_code("--engine", "onnx")
        assert code == 0
        assert "weights: runs/a/student.safetensors (test, 64x64)" in output
        assert (tmp_path / "artifacts" / FP32).is_file()

    def test_bundled_model_is_the_last_resort(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(source_module, "BUNDLED_WEIGHTS", artifacts / FP32)
        code, output, _ = exit_code("--engine", "onnx", "--precision", "fp16", "--out", "new")
        assert code == 0
        assert f"weights: {artifacts / FP32}" in output
        assert read_onnx(tmp_path / "new" / FP16)[2]["parent"]["sha256"] == file_hash(
            artifacts / FP32
        )

    def test_published_checkpoint_needs_a_preset(
        self, shared: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        weights = shared / "reference" / "efficientface_reference.pth.tar"
        code, _, error = exit_code("--engine", "onnx", "--weights", weights, "--out", tmp_path)
        assert code == 2
        assert "expected --preset" in one_line(error)
        assert names(tmp_path) == set()

    def test_foreign_checkpoint(self, tmp_path: Path, exit_code: Run) -> None:
        import torch

        path = tmp_path / "other.pth.tar"
        torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict()}, path)
        code, _, error = exit_code("--engine", "onnx", "--weights", path, "--preset", "rafdb")
        assert code == 2
        assert "weights of EfficientFace, ResNet-18, -29 or -50, found another" in one_line(error)

    def test_input_size(self, student: Path, tmp_path: Path, exit_code: Run) -> None:
        command = ("--engine", "onnx", "--weights", student, "--input-size", 96)
        assert exit_code(*command, "--out", tmp_path)[0] == 0
        graph, spec, _ = read_onnx(tmp_path / FP32)[:3]
        sides = [
            dimension.dim_value for dimension in graph.graph.input[0].type.tensor_type.shape.dim
        ]
        assert spec.input_size == 96 and sides[1:3] == [96, 96]


class TestOptions:
    def test_int8_without_calibration(self, artifacts: Path, exit_code: Run) -> None:
        command = ("--engine", "onnx", "--weights", artifacts / FP32, "--precision", "int8")
        code, _, error = exit_code(*command)
        assert code == 2
        assert "--calib: expected a folder of training images for INT8" in one_line(error)

    def test_earlier_export(self, artifacts: Path, exit_code: Run) -> None:
        """What would be made is used as it is; what is something else is left alone."""
        before = file_hash(artifacts / FP16)
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "fp16"]
        code, output, _ = exit_code(*command, "--out", artifacts)
        assert code == 0
        assert f"{artifacts / FP16}: is there already, of the same weights, options" in output
        assert f"[ok] {FP16}: " in output
        assert file_hash(artifacts / FP16) == before
        assert set(report(artifacts)) == {FP32, FP16, INT8}

        graph, spec, record = read_onnx(artifacts / FP16)[:3]
        write_onnx(graph, artifacts / FP16, spec, {**record, "versions": {"onnx": "1.0"}})
        before = file_hash(artifacts / FP16)
        code, _, error = exit_code(*command, "--out", artifacts)
        assert code == 2
        assert "an earlier export of other versions; add --overwrite" in one_line(error)
        assert file_hash(artifacts / FP16) == before
        code, _, _ = exit_code(*command, "--out", artifacts, "--overwrite")
        assert code == 0
        assert file_hash(artifacts / FP16) != before
        assert set(report(artifacts)) == {FP32, FP16, INT8}

    def test_file_that_was_changed_since_is_not_passed_on(
        self, artifacts: Path, exit_code: Run
    ) -> None:
        """Its record says that it is the one that would be made; its outputs say otherwise."""
        graph, spec, record = read_onnx(artifacts / FP16)[:3]
        (bias,) = [w for w in graph.graph.initializer if w.name.endswith("fc.bias")]
        values = onnx.numpy_helper.to_array(bias) + np.arange(7, dtype=np.float16)
        bias.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), bias.name))
        write_onnx(graph, artifacts / FP16, spec, record)
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "fp16"]
        code, output, _ = exit_code(*command, "--out", artifacts)
        assert code == 1
        assert f"[FAILED] {FP16}: " in output and "  [FAILED] parity: " in output

    def test_unknown_compute_capability(
        self, artifacts: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        """Refused before the ONNX file is made."""
        pytest.importorskip("tensorrt_rtx")
        command = ["--engine", "trt-rtx", "--weights", artifacts / FP32, "--out", tmp_path / "out"]
        code, _, error = exit_code(*command, "--compute-capability", "sm86,sm87")
        assert code == 2
        assert "a GPU that TensorRT for RTX serves" in one_line(error) and "found sm87" in error
        assert not (tmp_path / "out").exists()

    def test_exports_share_a_folder(self, artifacts: Path, exit_code: Run) -> None:
        """An engine of the ONNX file that is there; earlier rows and references stay right."""
        pytest.importorskip("tensorrt_rtx")
        reference = (artifacts / "verify.npz").read_bytes()
        command = ["--weights", artifacts / FP32, "--out", artifacts]
        onnx_file, engine = "efficientface-fp16-gpu.onnx", "efficientface-fp16-gpu.rtx.engine"
        made = exit_code(*command, "--engine", "onnx", "--target", "gpu", "--precision", "fp16")
        assert made[0] == 0
        command += ["--engine", "trt-rtx", "--compute-capability", "sm89"]
        code, output, _ = exit_code(*command)
        assert code == 0
        assert f"{artifacts / onnx_file}: is there already" in output
        assert set(report(artifacts)) == {FP32, FP16, INT8, onnx_file, engine}
        assert (artifacts / "verify.npz").read_bytes() == reference
        assert exit_code("--verify", artifacts / INT8)[0] == 0
        before = file_hash(artifacts / engine)
        code, _, error = exit_code(*command)
        assert code == 2
        assert f"{engine}: expected no such file yet, found an earlier export" in one_line(error)
        assert file_hash(artifacts / engine) == before

    def test_reference_of_a_data_set_is_kept(
        self, artifacts: Path, faces: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        """Real images with PyTorch's logits are not replaced by the 16 synthetic faces."""
        out = tmp_path / "out"
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--out", out]
        assert exit_code(*command, "--precision", "fp16", "--val", faces)[0] == 0
        before = (out / "verify.npz").read_bytes()
        assert exit_code(*command, "--precision", "fp16", "--target", "gpu")[0] == 0
        assert (out / "verify.npz").read_bytes() == before
        code, output, _ = exit_code("--verify", out / "efficientface-fp16-gpu.onnx")
        assert code == 0
        assert "verified on synthetic faces, test, 14 images by onnx:cpu" in output

    def test_ldg_is_named(self, small_spec: Any, tmp_path: Path, exit_code: Run) -> None:
        from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint

        path = tmp_path / "teacher.safetensors"
        spec = small_spec.replace(architecture="resnet18")
        save_checkpoint(path, LabelDistributionGenerator(7, "resnet18"), spec)
        code, output, _ = exit_code("--engine", "onnx", "--weights", path, "--precision", "int8")
        assert code == 2  # no --calib
        assert "note: its artifacts are called efficientface, and are a resnet18" in output

    def test_two_at_once(self, artifacts: Path, exit_code: Run) -> None:
        before = {path.name: path.read_bytes() for path in artifacts.iterdir()}
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "fp16"]
        with open_workspace(artifacts, "export"):
            code, _, error = exit_code(*command, "--out", artifacts, "--overwrite")
        assert code == 2
        assert "expected no other export at work in this folder" in one_line(error)
        assert {path.name: path.read_bytes() for path in artifacts.iterdir()} == before

    @pytest.mark.parametrize("kind", ["missing", "empty", "damaged", "file"])
    def test_calibration_folder(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, kind: str
    ) -> None:
        calib = tmp_path / "calib"
        if kind == "file":
            calib.write_text("x")
        elif kind != "missing":
            calib.mkdir()
        if kind == "damaged":
            (calib / "a.jpg").write_bytes(b"\xff\xd8 no picture")
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "int8"]
        code, _, error = exit_code(*command, "--calib", calib, "--out", tmp_path / "out")
        assert code == 2
        assert str(calib) in one_line(error)
        assert names(tmp_path) - {"artifacts", "calib"} == set()

    def test_out_is_a_file(self, artifacts: Path, tmp_path: Path, exit_code: Run) -> None:
        (tmp_path / "file").write_text("x")
        command = ("--engine", "onnx", "--weights", artifacts / FP32, "--precision", "fp16")
        code, _, error = exit_code(*command, "--out", tmp_path / "file")
        assert code == 2
        assert "expected a folder, found a file" in one_line(error)

    def test_float_input(
        self,
        student: Path,
        float_graph: onnx.ModelProto,
        tmp_path: Path,
        exit_code: Run,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(trace_module, "trace", lambda *_, float_input: float_graph)
        command = ("--engine", "onnx", "--weights", student, "--precision", "fp16")
        code, output, _ = exit_code(*command, "--float-input", "--out", tmp_path)
        assert code == 0
        assert "[ok]" in output
        graph, _, record = read_onnx(tmp_path / FP16)[:3]
        assert record["input"] == "float32 NCHW normalised"
        assert [value.name for value in graph.graph.input] == ["input"]

        # An ONNX file keeps the input that it has.
        _, spec, _ = read_onnx(tmp_path / FP16)[:3]
        source = tmp_path / "float.onnx"
        write_onnx(float_graph, source, spec, {**record, "precision": "fp32"})
        command = ("--engine", "onnx", "--weights", source, "--precision", "fp16")
        assert exit_code(*command, "--out", tmp_path / "again")[0] == 0
        assert read_onnx(tmp_path / "again" / FP16)[2]["input"] == "float32 NCHW normalised"

    def test_excluded_layers_are_recorded(
        self, artifacts: Path, faces: Path, exit_code: Run
    ) -> None:
        layer, *others = convolutions(artifacts)
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "int8"]
        command += ["--calib", faces, "--calib-images", 20, "--out", artifacts, "--overwrite"]
        command += ["--no-int8-search"]
        code, output, _ = exit_code(*command, "--exclude", layer, "--calib-method", "minmax")
        assert code == 0
        assert f"1 fp32 + {len(others)} int8 convolutions" in output
        assert "only 20 calibration images" in output
        record = read_onnx(artifacts / INT8)[2]
        assert record["excluded"] == [layer]
        assert record["calibration"]["method"] == "minmax"
        assert exit_code("--verify", artifacts / INT8)[0] == 0

    def test_layers_that_the_search_leaves_out_are_recorded(
        self, artifacts: Path, faces: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With images that calibration does not see, and beside what is excluded by hand."""
        first, second, third, *others = convolutions(artifacts)
        asked = []

        def find(
            graph: Any,
            limits: Any,
            rounding: QuantisationScheme,
            images: np.ndarray,
            exclude: set[str],
            weight_bytes: int,
        ) -> Search:
            asked.append((rounding, len(images), exclude, weight_bytes))
            return Search((second, third), len(images), 1e-3, 2e-4)

        monkeypatch.setattr(pipeline, "find_sensitive_layers", find)
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "int8"]
        command += ["--calib", faces, "--calib-images", 20, "--exclude", first]
        code, output, _ = exit_code(*command, "--out", artifacts, "--overwrite")
        assert code == 0
        assert asked == [(SCHEMES["cpu"], 35, {first}, 4)]
        assert f"3 fp32 + {len(others)} int8 convolutions" in output
        assert "2 layers left in higher precision, mean KL 1.0e-03 -> 2.0e-04" in output
        record = read_onnx(artifacts / INT8)[2]
        assert record["excluded"] == sorted([first, second, third])
        assert record["search"]["left_out"] == [second, third]
        assert record["calibration"]["apart"]["count"] == 35
        assert exit_code("--verify", artifacts / INT8)[0] == 0

    def test_features(self, student: Path, tmp_path: Path, exit_code: Run) -> None:
        """They are compared with PyTorch's now, and by ``--verify`` and the next export later."""
        command = ["--engine", "onnx", "--weights", student, "--out", tmp_path]
        code, output, _ = exit_code(*command, "--features")
        assert code == 0 and "  [ok] features: " in output
        found = report(tmp_path)[FP32]["verification"]["features"]
        assert 0 < found < 1e-5
        assert read_onnx(tmp_path / FP32).provenance["features"] is True
        assert "  [ok] features: " in exit_code("--verify", tmp_path / FP32)[1]
        with load(tmp_path / FP32) as ours, load(student) as theirs:
            pictures = [np.full((64, 64, 3), value, np.uint8) for value in (0, 99)]
            expected = theirs.features(pictures)
            np.testing.assert_allclose(ours.features(pictures), expected, atol=1e-4)
        # One without them is another file, and a file with them hands them on.
        code, _, error = exit_code(*command)
        assert code == 2 and "an earlier export of other features" in one_line(error)
        again = ["--engine", "onnx", "--weights", tmp_path / FP32, "--precision", "fp16"]
        code, output, _ = exit_code(*again, "--out", tmp_path / "fp16")
        assert code == 0 and "  [ok] features: " in output

    def test_accuracy(self, artifacts: Path, faces: Path, tmp_path: Path, exit_code: Run) -> None:
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "fp16"]
        code, output, _ = exit_code(*command, "--val", faces, "--out", tmp_path / "out")
        assert code == 0
        assert "verified on synthetic faces, test, 14 images by onnx:cpu" in output
        row = report(tmp_path / "out")[FP16]["verification"]
        assert f"  [ok] accuracy: {row['accuracy']:.4f}" in output

    def test_labels_of_another_model(
        self, artifacts: Path, ferplus: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        command = ["--engine", "onnx", "--weights", artifacts / FP32, "--precision", "fp16"]
        command += ["--val", ferplus, "--preset", "ferplus", "--out", tmp_path / "out"]
        code, _, error = exit_code(*command)
        assert code == 2
        assert "preset ferplus with Neutral" in one_line(error)
        assert not (tmp_path / "out").exists()


class TestFailedVerification:
    @pytest.fixture(autouse=True)
    def strict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nothing = parity.Threshold(0, 1, 0, 0)
        monkeypatch.setattr(parity, "THRESHOLDS", dict.fromkeys(parity.THRESHOLDS, nothing))

    def test_it_is_kept_under_another_name(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        command = ("--weights", artifacts / FP32, "--engine", "onnx", "--precision", "fp16")
        code, output, error = exit_code(*command, "--out", out)
        assert code == 1
        failed = "efficientface-fp16-cpu.failed.onnx"
        assert names(out) == {failed, "verify.npz", "report.md", "report.json"}
        assert f"[FAILED] {failed}: " in output and "  [FAILED] parity: " in output
        assert f"{failed}: expected outputs like the reference" in one_line(error)
        assert report(out)[failed]["verification"]["status"] == "FAILED"
        assert read_onnx(out / failed)[2]["verification"]["status"] == "FAILED"

        monkeypatch.undo()  # mended: the failed one goes
        assert exit_code(*command, "--out", out)[0] == 0
        assert names(out) == {FP16, "verify.npz", "report.md", "report.json"}

    def test_no_engine_is_built_of_it(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "available", lambda kind: None)
        monkeypatch.setattr(engines, "build_engine", lambda *_: pytest.fail("an engine was built"))
        out = tmp_path / "out"
        code, _, _ = exit_code("--weights", artifacts / FP32, "--engine", "trt", "--out", out)
        assert code == 1
        assert {path.suffix for path in out.iterdir()} == {".onnx", ".npz", ".md", ".json"}

    def test_the_others_are_still_made(
        self, artifacts: Path, faces: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        command = ["--weights", artifacts / FP32, "--engine", "onnx", "--precision", "all"]
        command += ["--calib", faces, "--calib-images", 8, "--no-int8-search"]
        code, _, error = exit_code(*command, "--out", tmp_path / "out")
        assert code == 1
        for precision in ("fp16", "int8"):
            assert f"efficientface-{precision}-cpu.failed.onnx" in names(tmp_path / "out")
            assert f"efficientface-{precision}-cpu.failed.onnx" in error


class TestInterrupted:
    @pytest.mark.parametrize(
        "where",
        [
            "resolve",
            "load_data",
            "make_onnx",
            "tensor_ranges",
            "to_fp16",
            "require_precision",
            "write_onnx",
            "verify_artifact",
            "write_reference",
            "Report",
        ],
    )
    def test_nothing_is_left(
        self,
        artifacts: Path,
        tmp_path: Path,
        exit_code: Run,
        monkeypatch: pytest.MonkeyPatch,
        where: str,
    ) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, where, interrupt)
        command = ("--weights", artifacts / FP32, "--engine", "onnx", "--precision", "fp16")
        code, _, error = exit_code(*command, "--out", tmp_path / "out")
        assert code == 130
        assert "interrupted" in one_line(error)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_while_an_engine_is_built(
        self,
        artifacts: Path,
        tmp_path: Path,
        exit_code: Run,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
    ) -> None:
        """The library tells its log to Python, and swallows what is raised there."""
        pytest.importorskip("tensorrt_rtx")

        def debug(_: str, message: str) -> None:
            if message.lstrip().startswith("Engine Layer Information") or "Layers:" in message:
                told.append(message)
                signal.raise_signal(number)

        told: list[str] = []
        monkeypatch.setattr(tensorrt_library, "_log", types.SimpleNamespace(debug=debug))
        out = tmp_path / "out"
        command = ("--weights", artifacts / FP32, "--engine", "trt-rtx", "--out", out)
        code, _, error = exit_code(*command)
        assert told
        assert code == 130
        assert "interrupted" in one_line(error)
        reports = {"verify.npz", "report.md", "report.json"}
        assert names(out) == {"efficientface-fp16-gpu.onnx", *reports}

    def test_earlier_files_stay(
        self, artifacts: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second write of the file is cut short: it is the old one still."""
        before = {path.name: path.read_bytes() for path in artifacts.iterdir()}
        calls = []

        def interrupt_the_second(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            write_onnx(*arguments)

        monkeypatch.setattr(pipeline, "write_onnx", interrupt_the_second)
        command = ("--weights", artifacts / FP32, "--engine", "onnx", "--precision", "fp16")
        code, _, _ = exit_code(*command, "--out", artifacts, "--overwrite")
        assert code == 130
        assert {path.name: path.read_bytes() for path in artifacts.iterdir()} == before


@pytest.mark.parametrize("library", ["11.4"], indirect=True)
class TestTensorRT:
    """On a device with TensorRT, by its recorded API; the engine computes in ONNX Runtime."""

    def test_engine_is_verified(
        self, library: Library, artifacts: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        out = tmp_path / "out"
        code, output, _ = exit_code("--engine", "trt", "--weights", artifacts / FP16, "--out", out)
        assert code == 0
        engine = out / "efficientface-fp16-cpu.engine"
        assert f"[ok] {engine.name}: " in output
        assert read_sidecar(engine)[1]["verification"]["status"] == "verified"
        assert "tensorrt-sm86.timings" in names(out), "for the next build, not for the bin"
        assert not list(out.glob("*.log"))

    def test_engine_gives_features(
        self, library: Library, student: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        command = ("--engine", "trt", "--weights", student, "--features", "--out", tmp_path)
        code, output, _ = exit_code(*command)
        assert code == 0 and output.count("  [ok] features: ") == 2  # of the ONNX file, too
        engine = tmp_path / "efficientface-fp16-gpu.engine"
        with load(engine) as ours, load(tmp_path / "efficientface-fp16-gpu.onnx") as theirs:
            pictures = [np.full((64, 64, 3), value, np.uint8) for value in (0, 99)]
            features = ours.features(pictures)
            expected = theirs.features(pictures)
        assert features.shape == (2, 1024)
        np.testing.assert_allclose(features, expected, atol=0.02 * expected.max())

    def test_failed_build_leaves_its_log(
        self, library: Library, artifacts: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        library.failing["Builder.build_serialized_network"] = ["out of luck"]
        out = tmp_path / "out"
        code, _, error = exit_code("--engine", "trt", "--weights", artifacts / FP16, "--out", out)
        assert code == 2
        (log,) = out.glob("*.log")
        assert "found out of luck; " in error and one_line(error).endswith(f"log is {log}\n")
        assert log.read_text() == "ERROR: out of luck\n"
        assert log.name == "efficientface-fp16-cpu.engine.log"
        left = names(out) - {log.name}
        assert not [name for name in left if name.startswith(".") or ".engine" in name]


@pytest.mark.usefixtures("no_gpu")
class TestEngines:
    def test_tensorrt_is_missing(self, artifacts: Path, tmp_path: Path, exit_code: Run) -> None:
        out = tmp_path / "out"
        command = ("--engine", "trt", "--weights", artifacts / FP32, "--max-batch", 8)
        code, output, error = exit_code(*command, "--out", out)
        assert code == 2
        made = out / "efficientface-fp16-gpu.onnx"
        assert "[ok] efficientface-fp16-gpu.onnx" in output
        assert read_onnx(made)[2]["verification"]["status"] == "verified"
        assert "--engine trt cannot be made here: tensorrt is not installed" in output
        pipeline = [line.strip() for line in output.splitlines() if "efficientface-export" in line]
        assert pipeline == [
            f"efficientface-export --weights {made.name} --engine trt --max-batch 8 --out .",
            f"efficientface-export --weights {made} --engine trt-rtx --max-batch 8 --out {out}",
        ]
        assert f"found the ONNX file only: {made}" in one_line(error)

    def test_printed_commands_keep_the_precision(
        self, artifacts: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        """An FP32 file would become an FP16 engine."""
        command = ("--engine", "trt", "--weights", artifacts / FP32, "--precision", "fp32")
        code, output, error = exit_code(*command, "--out", tmp_path / "out")
        assert code == 2
        pipeline = [line for line in output.splitlines() if "  efficientface-export" in line]
        assert len(pipeline) == 2
        assert all(" --precision fp32 " in line for line in pipeline)
        # The file was there already: the commands name it where it lies.
        assert str(artifacts / FP32) in pipeline[1] and str(artifacts / FP32) in error
        assert set(report(tmp_path / "out")) == {"../artifacts/" + FP32}

    def test_printed_command_works(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("tensorrt_rtx")
        command = ("--engine", "trt", "--weights", artifacts / FP32, "--out", tmp_path / "out")
        _, output, _ = exit_code(*command)
        (line,) = [line for line in output.splitlines() if "--engine trt-rtx" in line]
        monkeypatch.chdir(tmp_path)
        code, output, error = exit_code(*line.split()[1:], "--out", "out")
        assert (code, error) == (0, "")
        assert (tmp_path / "out" / "efficientface-fp16-gpu.rtx.engine").is_file()

    def test_rtx(self, artifacts: Path, tmp_path: Path, exit_code: Run) -> None:
        pytest.importorskip("tensorrt_rtx")
        out = tmp_path / "out"
        command = ["--engine", "trt-rtx", "--weights", artifacts / FP32, "--out", out]
        command += ["--compute-capability", "sm89", "--max-batch", 4]
        code, output, _ = exit_code(*command)
        assert code == 0
        engine = out / "efficientface-fp16-gpu.rtx.engine"
        assert names(out) == {
            "efficientface-fp16-gpu.onnx",
            engine.name,
            sidecar_path(engine).name,
            "verify.npz",
            "report.md",
            "report.json",
        }
        assert f"[--] {engine.name}: " in output
        assert "built, not verified here" in output
        assert re.search(r"for sm89, \d+ kernels, \d+\.\d MB moved, built in ", output)

        spec, record, _ = read_sidecar(engine)
        assert spec.name == "test"
        assert record["precision"] == "fp16"
        assert record["engine"]["max_batch"] == 4
        assert record["engine"]["parent_sha256"] == file_hash(out / "efficientface-fp16-gpu.onnx")
        assert record["parent"]["sha256"] == file_hash(artifacts / FP32)
        # Its own verification, not that of the ONNX file.
        assert record["verification"]["status"] == "built, not verified here"
        assert report(out)[engine.name]["verification"] == record["verification"]

        code, _, error = exit_code("--verify", engine)
        assert code == 2
        assert "expected a backend that can run it" in one_line(error)

        code, _, error = exit_code(*command, "--overwrite", "--require-verified")
        assert code == 2
        assert f"{engine.name}: expected verification" in one_line(error)

    @pytest.mark.parametrize("layout", [pytest.param("deploy", marks=pytest.mark.slow), "plain"])
    def test_int8_says_what_fp16_costs(
        self,
        layout: str,
        student: Path,
        artifacts: Path,
        faces: Path,
        tmp_path: Path,
        exit_code: Run,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An engine with more kernels is made when it is asked for, and never recommended."""
        pytest.importorskip("tensorrt_rtx")
        # As on a GPU: the engine runs.
        monkeypatch.setattr(
            pipeline,
            "verify_artifact",
            lambda *_: parity.Verification("trt-rtx", 16, "faces", 0.1),
        )
        weights = student if layout == "deploy" else artifacts / FP32
        command = ["--engine", "trt-rtx", "--compute-capability", "sm89", "--precision", "int8"]
        command += ["--calib", faces, "--calib-images", 8, "--no-int8-search"]
        code, output, error = exit_code(*command, "--weights", weights, "--out", tmp_path / "out")
        assert (code, error) == (0, "")
        name = "efficientface-int8-gpu"
        row = report(tmp_path / "out")[f"{name}.rtx.engine"]
        said = " ".join(row["notes"])
        assert row["recommended"] == (layout == "deploy")
        (following,) = [line for line in output.splitlines() if line.startswith("next: ")]
        if layout == "deploy":
            assert re.search(
                r"sm89, 79 kernels, (\d+\.\d) MB .* in FP16: 79 kernels, \d+\.\d MB", said
            )
            assert following.endswith(f"{name}.rtx.engine")
        else:
            more = (
                r"INT8 has 10\d kernels, .*, FP16 \d+ kernels, .* MB moved: not recommended, take"
            )
            assert re.search(more, said)
            assert following.endswith(f"{name}.onnx")

    def test_from_an_fp16_file(self, artifacts: Path, tmp_path: Path, exit_code: Run) -> None:
        """On a device: no FP32 file, no conversion; the reference is the stored one."""
        pytest.importorskip("tensorrt_rtx")
        out = tmp_path / "out"
        command = ("--engine", "trt-rtx", "--weights", artifacts / FP16, "--out", out)
        code, output, _ = exit_code(*command)
        assert code == 0
        assert "efficientface-fp16-cpu.rtx.engine" in names(out)
        assert not [name for name in names(out) if name.endswith(".onnx")]
        assert f"[ok] ../artifacts/{FP16}: " in output
        stored = report(out)[f"../artifacts/{FP16}"]["verification"]
        assert stored["max_difference"] == pytest.approx(
            report(artifacts)[FP16]["verification"]["max_difference"], rel=0.2
        )
        assert (
            read_sidecar(out / "efficientface-fp16-cpu.rtx.engine")[1]["engine"]["parent"] == FP16
        )

    def test_engine_that_computes_something_else(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it would be on a GPU: kept under another name, with its sidecar; exit 1."""
        pytest.importorskip("tensorrt_rtx")
        right = pipeline.verify_artifact

        def verdict(path: Path, *rest: Any) -> parity.Verification:
            if path.suffix == ".onnx":
                return right(path, *rest)
            return parity.Verification("trt-rtx", 16, "faces", 0.9, problems=("difference 0.9",))

        monkeypatch.setattr(pipeline, "verify_artifact", verdict)
        out = tmp_path / "out"
        command = ("--engine", "trt-rtx", "--weights", artifacts / FP16, "--out", out)
        code, _, error = exit_code(*command)
        assert code == 1
        failed = "efficientface-fp16-cpu.failed.rtx.engine"
        assert names(out) == {failed, failed + ".json", "verify.npz", "report.md", "report.json"}
        assert read_sidecar(out / failed)[1]["verification"]["status"] == "FAILED"
        assert failed in one_line(error)

    def test_building_fails(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was made before stays, is reported, and can be verified."""
        from efficientface_deploy.errors import ExportError

        def fail(*_: Any, **__: Any) -> None:
            raise ExportError("x", "a", "b", "c")

        monkeypatch.setattr(engines, "available", lambda kind: None)
        monkeypatch.setattr(engines, "build_engine", fail)
        out = tmp_path / "out"
        code, _, _ = exit_code("--engine", "trt", "--weights", artifacts / FP32, "--out", out)
        assert code == 2
        onnx_file = "efficientface-fp16-gpu.onnx"
        assert names(out) == {onnx_file, "verify.npz", "report.md", "report.json"}
        assert exit_code("--verify", out / onnx_file)[0] == 0

    def test_auto(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "available", lambda kind: "nothing here")
        command = ("--weights", artifacts / FP32, "--precision", "fp16")
        code, output, _ = exit_code(*command, "--out", tmp_path / "out")
        assert code == 0
        assert "engine: onnx, the best that this machine can make" in output
        assert FP16 in names(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.4, 1.0])
def test_killed_at_any_moment(
    artifacts: Path, tmp_path: Path, delay: float, number: signal.Signals
) -> None:
    """A real process: once it has said what it exports, it is stopped after a while."""
    before = {path.name: path.read_bytes() for path in artifacts.iterdir()}
    command = ["--weights", artifacts / FP32, "--engine", "onnx", "--precision", "fp16"]
    command += ["--out", artifacts, "--overwrite"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "efficientface_export.cli", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("weights: ")
        time.sleep(delay)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    after = {path.name: path.read_bytes() for path in artifacts.iterdir()}
    if process.returncode in (0, -number):  # it was faster; the signal met its last breath
        assert set(after) == set(before)
    else:
        changed = [name for name in before.keys() | after if before.get(name) != after.get(name)]
        together = {FP16, "report.json", "report.md", "verify.npz"}  # it came when all was done
        assert process.returncode == 130 and (not changed or FP16 in changed)
        assert set(changed) <= together
        assert "interrupted" in one_line(error)


@pytest.mark.slow
def test_real_weights(prototype: Path, ferplus: Path, tmp_path: Path, exit_code: Run) -> None:
    """Published weights in the published layout: accuracy holds in every precision."""
    command = ["--engine", "onnx", "--weights", prototype, "--preset", "ferplus"]
    command += ["--precision", "all", "--calib", ferplus, "--val", ferplus, "--out", tmp_path]
    code, _, _ = exit_code(*command)
    assert code == 0
    rows = {name: row["verification"] for name, row in report(tmp_path).items()}
    assert {row["images"] for row in rows.values()} == {300}
    assert rows[FP32]["accuracy"] > 0.8
    assert rows[FP16]["agreement"] >= 0.995
    assert rows[INT8]["agreement"] >= 0.98
    assert abs(rows[INT8]["accuracy"] - rows[FP32]["accuracy"]) < 0.015


class TestDeployGraph:
    """``--graph deploy``: verified like every other artifact, against the PyTorch module."""

    @pytest.mark.parametrize("target", ["cpu", "gpu"])
    def test_precisions(self, target: str, student: Path, faces: Path, tmp_path: Path) -> None:
        for precision in ("fp32", "fp16", "int8"):
            command = ["--engine", "onnx", "--graph", "deploy", "--precision", precision]
            command += ["--target", target, "--weights", str(student), "--out", str(tmp_path)]
            if precision == "int8":
                command += ["--calib", str(faces), "--no-int8-search"]
            assert main(command) == 0
            name = f"efficientface-{precision}-{target}.onnx"
            found = report(tmp_path)[name]["verification"]
            assert found["status"] in ("verified", "not decided") and found["problems"] == []
            assert found["status"] == "verified" or precision == "int8"
            assert "of their spread" in found["probe"]
            graph, _, record = read_onnx(tmp_path / name)[:3]
            assert record["graph"] == "deploy"
            if precision == "int8" and target == "gpu":
                assert record["arithmetic"] == "44 fp16 + 14 int8 convolutions, 1 fp16 linear"
                assert len(record["excluded"]) == 45
            assert not [node for node in graph.graph.node if node.op_type == "Reshape"]

    def test_wide(self, student: Path, tmp_path: Path) -> None:
        command = ["--engine", "onnx", "--graph", "wide", "--weights", str(student)]
        assert main([*command, "--out", str(tmp_path)]) == 0
        name = "efficientface-fp32-cpu.onnx"
        assert report(tmp_path)[name]["verification"]["status"] == "verified"
        graph, _, record = read_onnx(tmp_path / name)[:3]
        assert record["graph"] == "wide"
        assert len([node for node in graph.graph.node if node.op_type == "Transpose"]) == 3

    def test_graph_of_an_onnx_source_is_kept_in_the_record(
        self, student: Path, tmp_path: Path
    ) -> None:
        command = ["--engine", "onnx", "--graph", "deploy", "--target", "gpu"]
        assert main([*command, "--weights", str(student), "--out", str(tmp_path)]) == 0
        source = tmp_path / "efficientface-fp32-gpu.onnx"
        command = ["--engine", "onnx", "--precision", "fp16", "--target", "gpu"]
        assert main([*command, "--weights", str(source), "--out", str(tmp_path)]) == 0
        assert read_onnx(tmp_path / "efficientface-fp16-gpu.onnx")[2]["graph"] == "deploy"


@pytest.fixture
def web_archive(tmp_path: Path, monkeypatch: Any, yunet_named: None) -> None:
    """Something of the name of onnxruntime-web's archive, and a real YuNet."""
    archive = tmp_path / "runtime.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for member in RUNTIME_FILES:
            tar.addfile(tarfile.TarInfo(f"package/dist/{member}"))
    monkeypatch.setenv(FILE_VARIABLE, str(archive))


@pytest.mark.parametrize("name", [FP32, INT8])
def test_web(artifacts: Path, tmp_path: Path, web_archive: None, capsys: Any, name: str) -> None:
    command = ["--engine", "onnx", "--weights", artifacts / name, "--out", tmp_path / "out"]
    assert main([*map(str, command), "--web", str(tmp_path / "web")]) == 0
    assert f"page: {tmp_path / 'web/index.html'}, to be" in capsys.readouterr().out
    assert (tmp_path / "web/model.onnx").read_bytes() == (artifacts / name).read_bytes()
    assert {"index.html", "yunet.onnx", "ort"} < names(tmp_path / "web")


def test_web_without_out_leaves_the_page_alone(
    artifacts: Path, tmp_path: Path, monkeypatch: Any, web_archive: None, capsys: Any
) -> None:
    weights = artifacts.resolve() / FP32
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    assert main(["--engine", "onnx", "--weights", str(weights), "--web", "web"]) == 0
    assert names(tmp_path) - before == {"web"}
    assert Path("web/model.onnx").read_bytes() == weights.read_bytes()
    out = capsys.readouterr().out
    assert "report: " not in out and "next: efficientface-predict PICTURE --model web/model" in out
    again = ["--engine", "onnx", "--weights", str(weights), "--web", "web2"]
    assert main([*again, "--out", "artifacts"]) == 0  # who names the default wants it
    assert Path("artifacts/report.md").is_file()


def test_web_whose_files_cannot_be_had(artifacts: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is made then: neither the page nor an artifact."""
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "none.tgz"))
    monkeypatch.setenv(YUNET_VARIABLE, str(tmp_path / "none.onnx"))
    command = ["--engine", "onnx", "--weights", artifacts / FP32, "--out", tmp_path / "out"]
    with pytest.raises(ArtifactError, match="expected a YuNet model file, found no such file"):
        main([*map(str, command), "--web", str(tmp_path / "web")])
    assert not (tmp_path / "web").exists() and not (tmp_path / "out").exists()


class TestTune:
    """``--tune`` from an ONNX file, which has one graph: four candidates on two threads."""

    COMMAND = ("--engine", "onnx", "--tune", "latency", "--tune-seconds", "1")

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One of two CPUs and no other provider, called ``Test CPU``."""
        runners = [tune.Runner("onnx:cpu", 1), tune.Runner("onnx:cpu", 2)]
        find = tune.find_runners
        monkeypatch.setattr(
            plan,
            "find_runners",
            lambda *given: (list(runners), []) if given[1] == "onnx" else find(*given),
        )
        monkeypatch.setattr(tuned, "cpu_model", lambda: "Test CPU")
        monkeypatch.setattr(tuned, "usable_cpus", lambda: 2)

    def test_it_is_delivered_and_followed(
        self,
        artifacts: Path,
        tmp_path: Path,
        exit_code: Run,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        out = tmp_path / "out"
        code, output, _ = exit_code(*self.COMMAND, "--weights", artifacts / FP32, "--out", out)
        assert code == 0
        assert "tune: measuring 4 in turns, 1 s" in output
        (file,) = names(out) - {"verify.npz", "report.md", "report.json"}
        row = report(out)[file]
        assert row["verification"]["status"] == "verified"
        assert row["sha256"] == file_hash(out / file)
        found = row["tuning"]
        assert (found["objective"], found["machine"]) == ("latency", "Test CPU")
        assert [one["threads"] for one in found["candidates"]].count(2) == 2
        assert all(one["p50_ms"] > 0 for one in found["candidates"])
        (chosen,) = (one for one in found["candidates"] if one["verdict"] == "chosen")
        assert file == f"efficientface-{chosen['precision']}-cpu.onnx"
        record = read_onnx(out / file).provenance["tuned"]
        assert record == {
            **{"backend": "onnx:cpu", "threads": chosen["threads"], "objective": "latency"},
            **{"machine": "Test CPU", "batch": 1, "reason": found["reason"]},
        }
        assert f"## {file}, tuned for latency" in (out / "report.md").read_text()

        with load(out / file) as predictor:
            assert predictor._backend.options.threads == chosen["threads"]
        monkeypatch.setattr(tuned, "cpu_model", lambda: "Other CPU")
        with caplog.at_level("INFO"), load(out / file) as predictor:
            assert predictor._backend.options.threads is None
        assert "tuned for another machine (Test CPU), and this is Other CPU" in caplog.text

        # A plain export would be another file, and neither takes the other's place unasked.
        for command in (self.COMMAND, ("--engine", "onnx", "--precision", chosen["precision"])):
            arguments = [*command, "--weights", artifacts / FP32, "--out", out]
            if chosen["precision"] == "fp32" and command is not self.COMMAND:
                continue  # nothing to make of an FP32 file
            code, _, error = exit_code(*arguments)
            assert code == 2 and "add --overwrite" in one_line(error)

    def test_interrupted(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(candidates: Any, *given: Any) -> bool:
            for milliseconds, one in enumerate(candidates, start=1):
                one.samples = Samples(np.full((3, 4), milliseconds * 10**6))
            return True

        monkeypatch.setattr(pipeline, "measure_candidates", interrupt)
        command = [*self.COMMAND, "--weights", artifacts / FP32, "--out", tmp_path / "out"]
        code, output, _ = exit_code(*command)
        assert code == 130
        assert "interrupted before its time: this is the best so far" in output
        assert report(tmp_path / "out")[FP32]["tuning"]["notes"][-1].startswith("interrupted")
        with load(tmp_path / "out" / FP32) as predictor:
            assert predictor._backend.options.threads == 1

    def test_what_cannot_be_made_is_named_and_the_rest_is_tried(
        self, artifacts: Path, tmp_path: Path, exit_code: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(ranges: Any, path: Path) -> Any:
            raise ExportError(path, "values that FP16 holds", "1e6", "use fp32")

        monkeypatch.setattr(pipeline, "require_fp16_range", refuse)
        command = [*self.COMMAND, "--weights", artifacts / FP32, "--out", tmp_path / "out"]
        assert exit_code(*command)[0] == 0
        (row,) = report(tmp_path / "out").values()
        assert {one["precision"] for one in row["tuning"]["candidates"]} == {"fp32"}
        assert "fp16, plain graph: " in row["tuning"]["notes"][-1]

    @pytest.mark.slow  # all graphs of a checkpoint and INT8 take half a minute to make
    def test_from_a_checkpoint(
        self, student: Path, faces: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        command = ["--engine", "onnx", "--tune", "throughput", "--tune-seconds", "4"]
        command += ["--weights", student, "--calib", faces, "--val", faces, "--no-int8-search"]
        assert exit_code(*command, "--out", tmp_path)[0] == 0
        (row,) = report(tmp_path).values()
        found = {(one["graph"], one["precision"]) for one in row["tuning"]["candidates"]}
        assert len(found) == 8 and len(row["tuning"]["candidates"]) == 16
        int8 = [one for one in row["tuning"]["candidates"] if one["precision"] == "int8"]
        assert all("agreement" in one["verdict"] for one in int8)  # 14 images decide nothing

    @pytest.mark.slow  # six engines
    def test_engines_by_their_logs(
        self, artifacts: Path, faces: Path, tmp_path: Path, exit_code: Run
    ) -> None:
        pytest.importorskip("tensorrt_rtx")
        command = ["--engine", "trt-rtx", "--tune", "latency", "--precision", "all"]
        command += ["--weights", artifacts / FP32, "--calib", faces, "--no-int8-search"]
        code, output, _ = exit_code(*command, "--out", tmp_path)
        assert code == 0
        assert "(an estimate)" in output
        engine = next(name for name in names(tmp_path) if name.endswith(".rtx.engine"))
        found = report(tmp_path)[engine]["tuning"]
        assert all(one["kernels"] > 0 for one in found["candidates"])
        assert read_sidecar(tmp_path / engine).provenance["tuned"]["backend"] == "trt-rtx"
