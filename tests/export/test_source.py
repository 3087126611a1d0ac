"""What is exported: the default, a checkpoint, or an ONNX file of ours."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from PIL import Image

from efficientface_deploy.artifact import PROVENANCE_KEY, read_onnx_metadata
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    CheckpointError,
    ConfigError,
    EfficientFaceError,
    ExportError,
)
from efficientface_deploy.files import file_hash
from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.predictor import ACCURATE_WEIGHTS
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalise
from efficientface_export import source as source_module
from efficientface_export.graph.io import read_onnx, write_onnx
from efficientface_export.source import default_weights, open_source


def place(source: Path, target: Path, age: float) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    os.utime(target, (1e9 - age, 1e9 - age))
    return target


class TestDefault:
    def test_newest_student(self, student: Path, small_spec: ModelSpec, tmp_path: Path) -> None:
        place(student, tmp_path / "old" / "student.safetensors", age=50)
        newest = place(student, tmp_path / "new" / "deeper" / "student.safetensors", age=10)
        # Newer than that: a teacher, one half-written, one of somebody else's, one that is broken.
        teacher = LabelDistributionGenerator(7, "resnet18")
        ldg = tmp_path / "ldg" / "teacher.safetensors"
        ldg.parent.mkdir()
        save_checkpoint(ldg, teacher, small_spec.replace(architecture="resnet18"))
        place(student, tmp_path / "new" / ".student.safetensors.x7.safetensors", age=0)
        safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"\x10")
        assert default_weights(tmp_path) == newest

    def test_bundled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert default_weights(tmp_path / "none") == source_module.BUNDLED_WEIGHTS
        monkeypatch.setitem(sys.modules, "torch", None)
        assert default_weights(tmp_path / "none") == source_module.BUNDLED_ONNX

    def test_the_larger_bundled_one_by_name(self) -> None:
        source = source_module.open_source(Path("accurate"))
        assert source.path == ACCURATE_WEIGHTS
        assert source.spec.input_size == 160

    def test_runs_of_the_current_folder(
        self, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        place(student, tmp_path / "runs" / "a" / "student.safetensors", age=0)
        opened = open_source(None)
        assert opened.path == Path("runs/a/student.safetensors")


class TestCheckpoint:
    def test_ours(self, student: Path, small_spec: ModelSpec, network: Any, images: Any) -> None:
        opened = open_source(student)
        assert opened.spec == small_spec
        assert opened.sha256 == file_hash(student)
        assert opened.weights == {"file": student.name, "sha256": opened.sha256}
        assert (opened.precision, opened.target, opened.is_onnx) == ("fp32", "", False)
        assert not opened.is_onnx_in("fp32")
        assert opened.infer is not None
        with torch.inference_mode():
            expected = network(torch.from_numpy(normalise(images, small_spec))).numpy()
        np.testing.assert_allclose(opened.infer(images), expected, atol=1e-4)

    def test_input_size(self, student: Path) -> None:
        opened = open_source(student, None, 96)
        assert (opened.spec.input_size, opened.trained_size) == (96, 64)
        assert opened.size_note.startswith("trained at 64x64, made for 96x96, which may ruin")
        assert open_source(student, None, 64).size_note == open_source(student).size_note == ""
        with pytest.raises(ConfigError, match="--input-size: expected a multiple of 16"):
            open_source(student, None, 90)

    def test_published_needs_a_preset(self, prototype: Path) -> None:
        with pytest.raises(
            ArtifactError, match=r"expected --preset.*add --preset rafdb, .*ferplus"
        ):
            open_source(prototype)
        opened = open_source(prototype, "ferplus")
        assert opened.spec.labels[-1] == "Contempt"

    def test_wrong_preset(self, prototype: Path) -> None:
        with pytest.raises(EfficientFaceError, match="a head of 7 classes"):
            open_source(prototype, "rafdb")

    def test_safetensors_without_a_spec(self, student: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(student), bare)
        with pytest.raises(ArtifactError, match="does not say what its outputs mean"):
            open_source(bare)
        assert open_source(bare, "rafdb").spec.name == "RAF-DB"

    @pytest.mark.parametrize("kind", ["torch", "safetensors"])
    def test_another_network_needs_no_preset(self, tmp_path: Path, kind: str) -> None:
        """Asking for one would lead astray: no preset makes it a network of ours."""
        path = tmp_path / {"torch": "model.pth.tar", "safetensors": "model.safetensors"}[kind]
        state = torch.nn.Linear(3, 4).state_dict()
        if kind == "torch":
            torch.save({"state_dict": state}, path)
        else:
            safetensors.torch.save_file(state, path)
        with pytest.raises(CheckpointError, match="found another network"):
            open_source(path)

    def test_truncated_needs_no_preset(self, prototype: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.pth.tar"
        path.write_bytes(prototype.read_bytes()[:100_000])
        with pytest.raises(CheckpointError, match="a damaged or foreign file"):
            open_source(path)

    def test_preset_that_contradicts(self, student: Path) -> None:
        with pytest.raises(ArtifactError, match="as its spec says, found preset ferplus"):
            open_source(student, "ferplus")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04nonsense", b"\x80\x02]q\x00."])
    @pytest.mark.parametrize("name", ["model.safetensors", "model.pth.tar", "model.bin"])
    def test_foreign(self, tmp_path: Path, content: bytes, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(EfficientFaceError, match=name):
            open_source(path, "rafdb")

    def test_missing(self, tmp_path: Path) -> None:
        for name in ("x.safetensors", "x.pth.tar", "x.onnx"):
            with pytest.raises(EfficientFaceError, match=f"{name}: .*no such file"):
                open_source(tmp_path / name)

    def test_without_torch(self, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(BackendError, match=r"torch is not installed; .*\[export,cpu\]"):
            open_source(student)

    def test_without_onnxscript(self, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(BackendError, match=r"onnxscript, .*\[export\]"):
            open_source(student)


def _quantise_by_onnxruntime(source: Path, target: Path, way: str) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"image": np.full((1, 64, 64, 3), 90, np.uint8)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    if way.startswith("dynamic"):
        kinds = ["Gemm", "MatMul"] if "linear" in way else ["Conv", "Gemm", "MatMul"]
        try:
            quantization.quantize_dynamic(source, target, op_types_to_quantize=kinds)
        except onnx.shape_inference.InferenceError as error:
            pytest.skip(f"this release's tool fails on our graph: {error}")  # 1.23 with onnx 1.23
    elif way == "weights":  # alone, in pairs that the library would fold
        graph = onnx.load(source)
        layer = next(node for node in graph.graph.node if node.op_type == "Gemm")
        name = layer.input[1]
        weight = next(one for one in graph.graph.initializer if one.name == name)
        values = np.zeros(tuple(weight.dims), np.int8)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}_int8"))
        scale = onnx.numpy_helper.from_array(np.float32(0.01), "own_scale")
        graph.graph.initializer.append(scale)
        node = onnx.helper.make_node("DequantizeLinear", [weight.name, "own_scale"], [name])
        graph.graph.node.insert(0, node)
        onnx.save(graph, target)
    else:
        formats = quantization.QuantFormat
        kind = formats.QDQ if way == "pairs" else formats.QOperator
        quantization.quantize_static(source, target, Reader(), quant_format=kind)


class TestOnnx:
    def test_fp32(self, exported: Path, student: Path, images: Any, infer: Any) -> None:
        path = exported / "efficientface-fp32-cpu.onnx"
        opened = open_source(path)
        assert (opened.precision, opened.target, opened.is_onnx) == ("fp32", "cpu", True)
        assert opened.is_onnx_in("fp32") and not opened.is_onnx_in("fp16")
        assert opened.weights == {"file": student.name, "sha256": file_hash(student)}
        assert opened.sha256 == file_hash(path)
        assert opened.infer is not None
        np.testing.assert_allclose(opened.infer(images), infer(path, images)[0], atol=1e-4)
        test_set, logits = opened.reference(None, None)
        assert test_set.source == "16 synthetic faces"
        assert logits.shape == (16, 7)
        assert opened.verify().status == "verified"

    def test_lower_precision_takes_the_stored_reference(self, artifacts: Path) -> None:
        """Else it would be compared with itself, and always be right."""
        path = artifacts / "efficientface-int8-cpu.onnx"
        opened = open_source(path)
        _, logits = opened.reference(None, None)
        assert opened.infer is not None
        assert np.abs(logits - opened.infer(opened.reference(None, None)[0].images)).max() > 1e-3
        assert opened.verify().max_difference > 1e-4
        with pytest.raises(
            ConfigError, match=r"--val: .*int8\); .*--verify .*int8-cpu.onnx --val x"
        ):
            opened.reference(Path("x"), None)
        (artifacts / "verify.npz").unlink()
        assert opened.verify().not_run == "no verify.npz beside it"
        assert opened.reference(None, None)[1].shape == (16, 7)

    def test_without_onnxruntime(self, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        opened = open_source(artifacts / "efficientface-fp32-cpu.onnx")
        assert opened.infer is None
        assert len(opened.reference(None, None)[1]) == 16
        with pytest.raises(ConfigError, match="--val"):
            opened.reference(Path("x"), None)
        assert "not installed" in opened.verify().not_run
        (artifacts / "verify.npz").unlink()
        with pytest.raises(ArtifactError, match=r"verify\.npz: .*no such file"):
            opened.reference(None, None)

    @pytest.mark.parametrize("way", ["dynamic", "dynamic linear", "operators", "pairs", "weights"])
    def test_quantised_by_others(self, exported: Path, tmp_path: Path, way: str) -> None:
        """ONNX Runtime's tools keep our metadata, which then say fp32."""
        path = tmp_path / "q.onnx"
        _quantise_by_onnxruntime(exported / "efficientface-fp32-cpu.onnx", path, way)
        assert json.loads(read_onnx_metadata(path)[PROVENANCE_KEY])["precision"] == "fp32"
        with pytest.raises(ExportError, match=r"linear layers in fp32, found .*it is quantised"):
            open_source(path)

    def test_graph_that_contradicts_itself(self, artifacts: Path) -> None:
        path = artifacts / "efficientface-fp32-cpu.onnx"
        graph = onnx.load(path)
        weight = next(one for one in graph.graph.initializer if len(one.dims) == 4)
        weight.dims[:] = [int(np.prod(weight.dims))]
        onnx.save(graph, path)
        with pytest.raises(ExportError, match="an ONNX graph whose shapes agree, found"):
            open_source(path)

    @pytest.mark.parametrize("made", ["fp32", "fp16", "int8"])
    @pytest.mark.parametrize("stated", ["fp32", "fp16", "int8"])
    def test_provenance_that_lies_about_the_precision(
        self, artifacts: Path, made: str, stated: str
    ) -> None:
        path = artifacts / f"efficientface-{made}-cpu.onnx"
        graph, spec, provenance, *_ = read_onnx(path)
        write_onnx(graph, path, spec, {**provenance, "precision": stated})
        if made == stated:
            assert open_source(path).precision == stated
            return
        with pytest.raises(ExportError, match=f"linear layers in {stated}, found .*{made} conv"):
            open_source(path)

    def test_size_that_it_was_trained_at(self, artifacts: Path) -> None:
        path = artifacts / "efficientface-fp32-cpu.onnx"
        assert open_source(path).size_note == ""
        graph, spec, provenance, *_ = read_onnx(path)
        write_onnx(graph, path, spec, {**provenance, "trained_size": 112})
        assert open_source(path).size_note.startswith("trained at 112x112, made for 64x64")

    def test_without_provenance(
        self, graph: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
    ) -> None:
        path = tmp_path / "bare.onnx"
        write_onnx(_copy(graph), path, small_spec, {})
        opened = open_source(path)
        assert (opened.precision, opened.target) == ("fp32", "")
        assert opened.weights == {"file": "bare.onnx", "sha256": file_hash(path)}

    @pytest.mark.parametrize("weights", [None, 3, {}, {"sha256": 3}, ["a"]])
    def test_damaged_provenance(
        self, graph: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path, weights: Any
    ) -> None:
        path = tmp_path / "odd.onnx"
        write_onnx(_copy(graph), path, small_spec, {"weights": weights, "excluded": weights})
        opened = open_source(path)
        assert opened.weights["sha256"] == file_hash(path)

    def test_unknown_precision(
        self, graph: onnx.ModelProto, small_spec: ModelSpec, tmp_path: Path
    ) -> None:
        path = tmp_path / "odd.onnx"
        write_onnx(_copy(graph), path, small_spec, {"precision": "fp8"})
        with pytest.raises(ArtifactError, match="expected precision fp32, fp16, int8, found fp8"):
            open_source(path)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not protobuf at all"])
    def test_foreign(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"model\.onnx: expected .*an ONNX"):
            open_source(path)

    def test_preset_that_contradicts(self, exported: Path) -> None:
        with pytest.raises(ArtifactError, match="as its spec says, found preset ferplus"):
            open_source(exported / "efficientface-fp32-cpu.onnx", "ferplus")

    def test_somebody_elses(self, graph: onnx.ModelProto, tmp_path: Path) -> None:
        other = _copy(graph)
        del other.metadata_props[:]
        onnx.save(other, tmp_path / "other.onnx")
        with pytest.raises(ArtifactError, match="a ModelSpec in its metadata"):
            open_source(tmp_path / "other.onnx")


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()
FROM = "give the ONNX file or the checkpoint that the engine was made from"


@pytest.mark.parametrize(
    ("name", "content", "found", "fix"),
    [
        ("model.onnx", b"", "an empty file", "copy it again, or give another file"),
        ("model.safetensors", b"", "an empty file", "copy it again, or give another file"),
        ("model.pth.tar", PNG, "a picture", "copy it again, or give another file"),
        ("face.png", PNG, "a picture", "give a file that ends in .onnx, .safetensors"),
        ("notes.txt", b"hello", "a text file", "give a file that ends in .onnx, .safetensors"),
        ("model.h5", b"\x89HDF\0", "a file with suffix .h5", "give a file that ends in"),
        ("model.rtx.engine", b"\xff\0\xff", "a TensorRT engine", FROM),
        ("model.engine.json", b"{}", "the sidecar of an engine", FROM),
        ("model.engine", b"", "an empty file", FROM),
        ("folder/x.onnx", b"\xff\0\xff", "a folder", "check the path"),
    ],
)
def test_wrong_kind_of_file(
    tmp_path: Path, name: str, content: bytes, found: str, fix: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name.partition("/")[0]
    message = f"{path.name}: expected a checkpoint or an ONNX file of ours, found {found}; {fix}"
    with pytest.raises(ArtifactError, match=message):
        open_source(path)


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy
