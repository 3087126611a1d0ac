"""Making probes: what they hold, that right engines pass, and that broken kernels do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import efficientface_deploy as ef
from efficientface_deploy.backends.onnx import OnnxBackend
from efficientface_deploy.spec import ModelSpec
from efficientface_export.graph.io import read_onnx, write_onnx
from efficientface_export.graph.precision import to_fp16, to_fp32
from efficientface_export.int8.placement import lay_out_for_gpu
from efficientface_export.verification.parity import verify_artifact
from efficientface_export.verification.probes import (
    TRUNCATION,
    emulate,
    make_probe,
    shift_rounding,
)
from efficientface_export.verification.reference import TestSet

KINDS = [(precision, target) for precision in ("fp32", "fp16", "int8") for target in ("cpu", "gpu")]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    int8_of: Callable[..., onnx.ModelProto],
) -> dict[tuple[str, str], Path]:
    """The bundled network in three precisions for two targets, each with its probe."""
    source = read_onnx(ef.predictor.BUNDLED_ONNX)
    folder = tmp_path_factory.mktemp("probes")
    pictures = make_probe(source.graph, source.spec, "fp32").images(source.spec.input_size)
    made = {}
    for precision, target in KINDS:
        graph = source.graph
        if precision == "int8":
            left_out: frozenset[str] = frozenset()
            if target == "gpu":
                graph, left_out = lay_out_for_gpu(graph)
            graph = int8_of(graph, pictures, exclude=left_out, target=target)
        if precision == "fp16" or (precision, target) == ("int8", "gpu"):
            graph = to_fp16(graph)
        path = folder / f"{precision}-{target}.onnx"
        probe = make_probe(graph, source.spec, precision)
        record = {"precision": precision, "target": target}
        write_onnx(graph, path, source.spec, record, probe)
        made[precision, target] = path
    return made


def install(monkeypatch: pytest.MonkeyPatch, wrong: Path) -> None:
    """Let ONNX Runtime load one file in the place of every other."""
    load = OnnxBackend._load

    def other(self: OnnxBackend, *arguments: object) -> object:
        path, self.path = self.path, wrong
        try:
            return load(self, *arguments)
        finally:
            self.path = path

    monkeypatch.setattr(OnnxBackend, "_load", other)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("threads", [1, 2])
def test_right_engine_passes(files, kind, threads):
    release = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    if kind == ("int8", "gpu") and release < (1, 30):  # which truncate, as Python 3.10's newest
        with pytest.raises(ef.ProbeError, match="update onnxruntime"):
            ef.load(files[kind], threads=threads)
        return
    with ef.load(files[kind], threads=threads) as predictor:
        assert predictor.checked.difference < predictor.checked.tolerance / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_right_engines_never_fail(files):
    """A thousand loads over precisions, targets and thread counts."""
    for number in range(1000):
        with ef.load(files[KINDS[number % 6]], threads=1 + number // 6 % 2) as predictor:
            assert predictor.checked.passed


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_truncating_kernel_is_caught(files, target, tmp_path, monkeypatch):
    """Also where few layers are rounded, so that it moves the logits little."""
    file = read_onnx(files["int8", target])
    wrong = shift_rounding(to_fp32(file.graph), TRUNCATION)
    write_onnx(wrong, tmp_path / "wrong.onnx", file.spec, file.provenance)
    install(monkeypatch, tmp_path / "wrong.onnx")
    with pytest.raises(ef.ProbeError, match="of their spread"):
        ef.load(files["int8", target])


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("fault", ["other weights", "swapped channels"])
def test_other_network_is_caught(files, kind, fault, tmp_path, monkeypatch):
    file = read_onnx(files[kind])
    graph = onnx.ModelProto()
    graph.CopyFrom(file.graph)
    if fault == "other weights":
        first = max(graph.graph.initializer, key=lambda weight: weight.ByteSize())
        values = onnx.numpy_helper.to_array(first)
        first.CopyFrom(onnx.numpy_helper.from_array(np.flip(values, 0).copy(), first.name))
    else:
        flip = onnx.numpy_helper.from_array(np.array([2, 1, 0]), "flip")
        graph.graph.initializer.append(flip)
        for node in graph.graph.node:
            node.input[:] = ["flipped" if name == "image" else name for name in node.input]
        graph.graph.node.insert(
            0, onnx.helper.make_node("Gather", ["image", "flip"], ["flipped"], axis=3)
        )
    write_onnx(graph, tmp_path / "wrong.onnx", file.spec, file.provenance)
    install(monkeypatch, tmp_path / "wrong.onnx")
    with pytest.raises(ef.ProbeError, match="of their spread"):
        ef.load(files[kind])


def test_gpu_file_is_judged_by_an_emulation_where_the_cpu_is_wrong(files, tmp_path, monkeypatch):
    path = files["int8", "gpu"]
    file = read_onnx(path)
    images = file.probe.images(file.spec.input_size)
    logits = emulate(file.graph, file.spec)(images)[0]
    wrong = shift_rounding(to_fp32(file.graph), TRUNCATION)
    write_onnx(wrong, tmp_path / "wrong.onnx", file.spec, file.provenance)
    install(monkeypatch, tmp_path / "wrong.onnx")
    monkeypatch.setenv("EFFICIENTFACE_CHECK", "0")  # for programs, not for the verification
    found = verify_artifact(path, logits, TestSet(images, None, "probe"), "int8")
    assert not found.problems and found.max_difference < 1e-6
    assert "an emulation in FP32, since onnx:cpu, onnxruntime" in found.runner
    # A file for CPUs is not: what it is for computes it wrongly.
    truncated = shift_rounding(to_fp32(read_onnx(files["int8", "cpu"]).graph), TRUNCATION)
    write_onnx(truncated, tmp_path / "wrong.onnx", file.spec, file.provenance)
    cpu = verify_artifact(files["int8", "cpu"], logits, TestSet(images, None, "x"), "int8")
    assert cpu.status == "FAILED" and "probe" in cpu.reason


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_probe_is_small(files, kind):
    file = read_onnx(files[kind])
    (text,) = [x.value for x in file.graph.metadata_props if x.key == "efficientface.probe"]
    assert len(text) < 100_000
    assert (file.probe.pixels[..., 0] != file.probe.pixels[..., 2]).mean() > 0.9


def test_float_input(model_files: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    file = read_onnx(model_files["onnx-float"])
    probe = make_probe(file.graph, file.spec, "fp32")
    write_onnx(file.graph, tmp_path / "float.onnx", file.spec, {}, probe)
    with ef.load(tmp_path / "float.onnx") as predictor:
        assert predictor.checked.passed


def test_what_is_not_finite_has_no_probe(files):
    graph = onnx.ModelProto()
    graph.CopyFrom(read_onnx(files["fp32", "cpu"]).graph)
    last = graph.graph.initializer[-1]
    for weight in graph.graph.initializer:
        if weight.name.endswith("bias"):
            last = weight
    values = np.full_like(onnx.numpy_helper.to_array(last), np.nan)
    last.CopyFrom(onnx.numpy_helper.from_array(values, last.name))
    assert make_probe(graph, read_onnx(files["fp32", "cpu"]).spec, "fp32") is None
