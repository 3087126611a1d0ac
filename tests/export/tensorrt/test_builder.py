"""Engines from the real compiler of TensorRT for RTX, which needs no GPU to build."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from onnx import TensorProto, helper, numpy_helper
from tensorrt_stand_in import VERSIONS, Library

from efficientface_deploy import load
from efficientface_deploy.artifact import PROVENANCE_KEY, SPEC_KEY, read_sidecar, sidecar_path
from efficientface_deploy.backends.tensorrt import backend
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    EfficientFaceError,
    ExportError,
    install_command,
)
from efficientface_deploy.files import file_hash
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalisation
from efficientface_export.graph.io import read_onnx, write_onnx
from efficientface_export.graph.precision import to_fp16
from efficientface_export.tensorrt import builder as engine_module
from efficientface_export.tensorrt.builder import (
    available,
    build_engine,
    build_progress,
    default_workspace_mib,
)
from efficientface_export.tensorrt.options import EngineOptions
from tests.engines import unusable, write_engine

SIDE = 64
SM89 = EngineOptions(max_batch=8, compute_capabilities=("sm89",))


def make_graph(spec: ModelSpec, precision: str = "fp32", batch: int | str = "N") -> Any:
    """Three convolutions between the picture and the logits, as our exporter lays a graph out."""
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}.get(
        precision, TensorProto.FLOAT
    )
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    random = np.random.default_rng(0)
    scale, offset = normalisation(spec)
    weights = {
        "scale": scale.reshape(1, 1, 1, 3),
        "offset": offset.reshape(1, 1, 1, 3),
        "w1": random.standard_normal((16, 3, 3, 3)) * 0.2,
        "w2": random.standard_normal((16, 1, 3, 3)) * 0.3,
        "w3": random.standard_normal((len(spec.labels), 16, 1, 1)) * 0.3,
        "b1": random.standard_normal(16) * 0.1,
        "b3": random.standard_normal(len(spec.labels)),
    }
    initialisers = [numpy_helper.from_array(v.astype(dtype), k) for k, v in weights.items()]

    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=kind),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["normalised"]),
        helper.make_node("Transpose", ["normalised"], ["x"], perm=[0, 3, 1, 2]),
    ]

    def convolve(data: str, weight: str, bias: list[str], output: str, **attributes: Any) -> None:
        inputs = [data, weight]
        if precision == "int8":
            for tensor, step in ((data, 0.05), (weight, 0.01)):
                names = [f"{tensor}_step", f"{tensor}_zero", f"{tensor}_q", f"{tensor}_dq"]
                initialisers.append(numpy_helper.from_array(np.float32(step), names[0]))
                initialisers.append(numpy_helper.from_array(np.int8(0), names[1]))
                nodes.append(helper.make_node("QuantizeLinear", [tensor, *names[:2]], [names[2]]))
                nodes.append(
                    helper.make_node("DequantizeLinear", [names[2], *names[:2]], [names[3]])
                )
            inputs = [f"{data}_dq", f"{weight}_dq"]
        nodes.append(helper.make_node("Conv", [*inputs, *bias], [output], output, **attributes))

    convolve("x", "w1", ["b1"], "y1", pads=[1] * 4, strides=[2, 2])
    nodes.append(helper.make_node("Relu", ["y1"], ["r1"]))
    convolve("r1", "w2", [], "y2", pads=[1] * 4, group=16)
    convolve("y2", "w3", ["b3"], "y3")
    nodes += [
        helper.make_node("GlobalAveragePool", ["y3"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, SIDE, SIDE, 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, len(spec.labels)])
        for name in ("logits", "probabilities")
    ]
    graph = helper.make_graph(nodes, "test", [image], outputs, initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def save(model: Any, path: Path, spec: ModelSpec | None, **provenance: Any) -> Path:
    onnx.checker.check_model(model)
    if spec is not None:
        metadata = {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: json.dumps(provenance)}
        helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


@pytest.fixture
def onnx_file(tmp_path: Path, spec: ModelSpec) -> Callable[..., Path]:
    """Write the test network in a precision."""

    def write(precision: str = "fp32", **changes: Any) -> Path:
        path = tmp_path / f"model-{precision}.onnx"
        return save(make_graph(spec, precision, **changes), path, spec, precision=precision)

    return write


@pytest.fixture
def rtx() -> types.ModuleType:
    """The real compiler."""
    module: types.ModuleType = pytest.importorskip(
        "tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError
    )
    return module


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_has_the_graphs_precision(
    rtx: types.ModuleType, onnx_file: Callable[..., Path], precision: str
) -> None:
    engine = build_engine(onnx_file(precision), "trt-rtx", SM89)
    assert engine.precisions == engine.seen_precisions == {precision: 3}
    assert 4 <= engine.kernels <= 20
    assert engine.kernels < len(engine.layers), "shape calls are no kernels"
    assert engine.cost.bytes_moved > engine.cost.constants > 0
    assert engine.size == len(engine.plan) > 1000
    assert (engine.library, engine.version) == ("tensorrt_rtx", rtx.__version__)
    assert engine.compute_capabilities == ("sm89",)
    assert engine.build_seconds > 0
    assert len(repr(engine)) < 500, "megabytes of plan stay out of messages"


def gpus_in_header(plan: bytes) -> set[str]:
    """What the header of an engine says, by its bits (seen with 1.7.1; NVIDIA does not say)."""
    names = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "newer")
    return {name for bit, name in enumerate(names) if plan[32] >> bit & 1}


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        ((), ("sm80", "sm86", "sm89", "sm120", "sm121+")),
        (("sm121",), ("sm121",)),
        (("sm75",), ("sm75",)),
        (("sm86", "sm89", "sm86"), ("sm86", "sm89")),
    ],
)
def test_record_of_the_gpus_is_what_the_engine_says(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    asked: tuple[str, ...],
    recorded: tuple[str, ...],
) -> None:
    """There is no bit for 8.7, 9.0, 10.x and 11.0, which "8.0 and newer" would include."""
    engine = build_engine(onnx_file("fp16"), "trt-rtx", EngineOptions(compute_capabilities=asked))
    assert engine.compute_capabilities == recorded
    if not rtx.__version__.startswith("1.7.1"):
        pytest.skip("the header's layout is known for 1.7.1 alone")
    said = {name.removesuffix("+") for name in recorded}
    newer = {"newer"} if recorded[-1].endswith("+") else set()
    assert gpus_in_header(engine.plan) == said | newer


def test_several_targets_and_a_workspace(
    rtx: types.ModuleType, onnx_file: Callable[..., Path]
) -> None:
    options = EngineOptions(workspace_mib=256, compute_capabilities=("sm86", "sm89", "sm86"))
    engine = build_engine(onnx_file("fp16"), "trt-rtx", options)
    assert engine.compute_capabilities == ("sm86", "sm89")
    assert engine.precisions == {"fp16": 3}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_turing_is_explained_before_the_build(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    """Of these the compiler fails on the first two, and silently builds FP16 from the third."""
    monkeypatch.setattr(engine_module, "_Build", lambda *_: pytest.fail("the build began"))
    path, both = onnx_file(precision), EngineOptions(compute_capabilities=("sm86", "sm75"))
    with pytest.raises(ExportError, match=rf"an FP16 graph for sm75.*found 3 {precision} conv"):
        build_engine(path, "trt-rtx", both)


def test_int8_for_a_cpu_is_refused_before_the_build(
    rtx: types.ModuleType, onnx_file: Callable[..., Path], spec: ModelSpec
) -> None:
    path = onnx_file("int8")
    graph = onnx.load(path)
    zeros = {n.input[2] for n in graph.graph.node if n.op_type == "QuantizeLinear"}
    for weight in graph.graph.initializer:
        if weight.name in zeros:
            weight.CopyFrom(numpy_helper.from_array(np.array(128, dtype=np.uint8), weight.name))
    onnx.save(graph, path)
    with pytest.raises(ExportError, match=r"expected INT8 for a GPU.*--target gpu"):
        build_engine(path, "trt-rtx", SM89)


def test_graph_that_the_parser_refuses(
    rtx: types.ModuleType, tmp_path: Path, spec: ModelSpec
) -> None:
    model = make_graph(spec)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "nobody"
    del model.graph.node[0].attribute[:]
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    with pytest.raises(ExportError, match=r"Unheard node: .*Plugin not found") as caught:
        build_engine(save(model, tmp_path / "foreign.onnx", spec), "trt-rtx", SM89)
    assert "\n" not in str(caught.value)


def test_mixed_types_are_refused_rather_than_cast(
    rtx: types.ModuleType, tmp_path: Path, spec: ModelSpec
) -> None:
    """Strong typing: a graph half FP16 is an error, not an engine of some precision."""
    model = make_graph(spec, "fp16")
    model.graph.node[0].attribute[0].i = TensorProto.FLOAT
    path = tmp_path / "mixed.onnx"
    metadata = {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: "{}"}
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"Mul node: .*must have same input types") as caught:
        build_engine(path, "trt-rtx", SM89)
    assert "catchCudaError" not in str(caught.value), "the cause, not its echo"


@pytest.fixture
def gemm_file(tmp_path: Path, spec: ModelSpec) -> Path:
    """FP32 with a matrix product, which the compiler cannot do on SM75."""
    model = make_graph(spec)
    weight = numpy_helper.from_array(np.eye(7, 7, dtype=np.float32) + 1, "fc")
    model.graph.initializer.append(weight)
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.output[0] = "before"
    index = list(model.graph.node).index(flatten) + 1
    model.graph.node.insert(
        index, helper.make_node("Gemm", ["before", "fc"], ["flat"], "classifier")
    )
    return save(model, tmp_path / "gemm.onnx", spec)


@pytest.fixture
def turing_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler fail where the exporter would not have asked it."""
    monkeypatch.setattr(engine_module, "check_turing", lambda *_: None)


def test_failure_of_the_compiler_names_the_node_and_keeps_the_log(
    rtx: types.ModuleType, gemm_file: Path, tmp_path: Path, turing_unchecked: None
) -> None:
    folder = tmp_path / "out"
    options = EngineOptions(compute_capabilities=("sm75",))
    with pytest.raises(ExportError, match=r"found Gemm node classifier: .*SM75") as caught:
        write_engine(gemm_file, folder / "gemm.rtx.engine", "trt-rtx", options)
    log = folder / "gemm.rtx.engine.log"
    assert str(caught.value).endswith(f"the builder's log is {log}")
    assert files_in(folder) == {log.name}
    lines = log.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("ERROR: ") and "FP32 GEMM" in line for line in lines)
    assert sum(line.startswith("DEBUG: ") for line in lines) > 50, "the verbose log"

    write_engine(gemm_file, folder / "gemm.rtx.engine", "trt-rtx", SM89)
    assert not log.exists(), "a build that succeeds takes back the log of an earlier failure"


def test_failed_build_does_not_change_the_next(
    rtx: types.ModuleType, model_files: dict[str, Path], tmp_path: Path, turing_unchecked: None
) -> None:
    """Left alone, the compiler builds the next engine for SM75, whatever was asked."""
    fp32, fp16 = model_files["onnx"], tmp_path / "fp16.onnx"
    graph, spec, provenance = read_onnx(fp32)[:3]
    write_onnx(to_fp16(graph), fp16, spec, provenance)
    before = build_engine(fp16, "trt-rtx", SM89)
    with pytest.raises(ExportError, match="SM75"):
        build_engine(fp32, "trt-rtx", EngineOptions(compute_capabilities=("sm75",)))
    after = build_engine(fp16, "trt-rtx", SM89)
    assert after.kernels == before.kernels
    assert after.precisions == before.precisions


def test_fixed_batch_is_refused(rtx: types.ModuleType, onnx_file: Callable[..., Path]) -> None:
    with pytest.raises(ExportError, match=r"batch.* dynamic.*image of shape \(1, 64, 64, 3\)"):
        build_engine(onnx_file(batch=1), "trt-rtx", SM89)


def test_onnx_file_without_a_spec(tmp_path: Path, spec: ModelSpec) -> None:
    path = save(make_graph(spec), tmp_path / "foreign.onnx", None)
    with pytest.raises(ArtifactError, match=r"efficientface\.spec"):
        build_engine(path, "trt-rtx", SM89)


def test_not_onnx_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"hello")
    with pytest.raises(ArtifactError, match="an ONNX model"):
        build_engine(path, "trt-rtx", SM89)


@pytest.mark.parametrize(
    ("name", "said"),
    [("sm87", "Orin"), ("sm90", "H100"), ("sm110", "Thor"), ("sm12", "found sm12;")],
)
def test_gpu_that_rtx_does_not_serve(
    rtx: types.ModuleType, onnx_file: Callable[..., Path], name: str, said: str
) -> None:
    both = EngineOptions(compute_capabilities=("sm86", name))
    with pytest.raises(BackendError, match=rf"sm75, sm80, .*{said}.* use TensorRT there"):
        build_engine(onnx_file(), "trt-rtx", both)


@pytest.mark.parametrize("gpu", ["sm87", "sm90"])
def test_current_gpu_that_rtx_does_not_serve(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    gpu: str,
) -> None:
    here = types.SimpleNamespace(compute_capability=lambda: gpu)
    monkeypatch.setattr(engine_module, "open_cuda", lambda: here)
    with pytest.raises(BackendError, match=rf"found {gpu} .* use TensorRT there"):
        build_engine(onnx_file(), "trt-rtx", EngineOptions(compute_capabilities=("current",)))


def test_tests_on_a_gpu_that_rtx_does_not_serve_are_skipped(
    rtx_library: Library, fake_cuda: FakeCuda
) -> None:
    for fake_cuda.capability, reason in (("sm90", "use TensorRT there"), ("sm89", "None")):
        assert reason in str(unusable("trt-rtx"))


def test_target_that_the_library_refuses(
    rtx_library: Library, onnx_file: Callable[..., Path]
) -> None:
    rtx_library.failing["IBuilderConfig.set_compute_capability"] = ["no compiler for it"]
    with pytest.raises(BackendError, match=r"build for sm89, found no compiler for it; leave it"):
        build_engine(onnx_file(), "trt-rtx", SM89)


@pytest.mark.parametrize("name", ["SM86", "none", "", "sm122"])
def test_unknown_compute_capability(
    rtx: types.ModuleType, onnx_file: Callable[..., Path], name: str
) -> None:
    with pytest.raises(ConfigError, match=r"sm75.*sm86"):
        build_engine(onnx_file(), "trt-rtx", EngineOptions(compute_capabilities=(name,)))


# --- files ---------------------------------------------------------------------------------------


def test_sidecar_is_complete(
    rtx: types.ModuleType, onnx_file: Callable[..., Path], tmp_path: Path, spec: ModelSpec
) -> None:
    parent = onnx_file("fp16")
    path = tmp_path / "out" / "model.rtx.engine"
    assert write_engine(parent, path, "trt-rtx", SM89) == path
    assert files_in(path.parent) == {"model.rtx.engine", "model.rtx.engine.json"}

    read_spec, provenance, _ = read_sidecar(path)
    assert read_spec == spec
    assert provenance["precision"] == "fp16", "the ONNX file's own provenance"
    record = provenance["engine"]
    assert 4 <= record.pop("kernels") <= 20
    assert record.pop("bytes_moved") > spec.input_size**2 * 3
    assert record.pop("build_seconds") > 0
    assert record == {
        "sha256": file_hash(path),
        "library": "tensorrt_rtx",
        "version": rtx.__version__,
        "compute_capabilities": ["sm89"],
        "precisions": {"fp16": 3},
        "seen_precisions": {"fp16": 3},
        "max_batch": 8,
        "opt_batch": 1,
        "workspace_mib": None,
        "tf32": False,
        "parent": "model-fp16.onnx",
        "parent_sha256": file_hash(parent),
        "rebuild": "efficientface-export --weights model-fp16.onnx --engine trt-rtx "
        "--max-batch 8 --compute-capability sm89",
    }


@pytest.mark.parametrize("existing", [False, True])
def test_failed_build_leaves_everything_as_it_was(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
) -> None:
    folder = tmp_path / "out"
    path = folder / "model.rtx.engine"
    parent = onnx_file("fp16")
    if existing:
        write_engine(parent, path, "trt-rtx", SM89)
    before = {file.name: file.read_bytes() for file in folder.glob("*")}

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(engine_module, "write_sidecar", fail)
    with pytest.raises(OSError, match="No space"):
        write_engine(parent, path, "trt-rtx", SM89)
    with pytest.raises(ExportError):
        write_engine(onnx_file(batch=1), path, "trt-rtx", SM89)
    assert {file.name: file.read_bytes() for file in folder.glob("*")} == before


# --- TensorRT 10 and 11, by their recorded API ---------------------------------------------------

every_release = pytest.mark.parametrize("library", VERSIONS, indirect=True)


@every_release
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_is_built_and_run_from_start_to_end(
    library: Library, onnx_file: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    parent, path = onnx_file(precision), tmp_path / "out" / "model.engine"
    write_engine(parent, path, "trt", EngineOptions(max_batch=4, opt_batch=2, workspace_mib=64))
    assert library.limits == [64 << 20]
    assert files_in(path.parent) == {path.name, sidecar_path(path).name, "tensorrt-sm86.timings"}
    record = read_sidecar(path)[1]["engine"]
    assert (record["library"], record["version"]) == ("tensorrt", library.module.__version__)
    assert (record["precisions"], record["compute_capabilities"]) == ({precision: 3}, ["sm86"])

    images = np.random.default_rng(1).integers(0, 256, (11, SIDE, SIDE, 3), dtype=np.uint8)
    with load(path) as engine, load(parent, backend="onnx:cpu") as reference:
        logits, probabilities = engine.infer(images)
        expected_logits, expected = reference.infer(images)
    assert library.batches == [4, 4, 4, 3], "the second four once more, for their CUDA graph"
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


@every_release
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_precision_is_that_of_the_strongly_typed_network(
    library: Library, onnx_file: Callable[..., Path], precision: str
) -> None:
    library.listing = "Layers:\nBindings:\nimage"
    engine = build_engine(onnx_file(precision), "trt")
    assert (engine.precisions, engine.seen_precisions) == ({precision: 3}, {})


@every_release
def test_log_that_contradicts_the_network(
    library: Library, onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    build_engine(onnx_file("fp16"), "trt", folder=tmp_path)
    (said,) = (text for text in library.said if text.startswith("Layers:"))
    assert ("N/A due to dynamic shapes" in said) == library.module.__version__.startswith("10.")
    library.listing = said.replace("Half", "Float")
    with pytest.raises(ExportError, match=r"3 fp16 conv.* found 3 fp32 in the builder's log"):
        build_engine(onnx_file("fp16"), "trt", folder=tmp_path)


@every_release
def test_network_of_another_precision_is_not_built(
    library: Library, onnx_file: Callable[..., Path]
) -> None:
    graph = read_onnx(onnx_file("fp32")).graph
    for other in ("fp16", "int8"):
        with pytest.raises(ExportError, match=rf"3 fp32 conv.* found 3 {other} after parsing"):
            build_engine(onnx_file(other), "trt", graph=graph)
    assert not library.said, "it was not built"


@every_release
def test_timings_serve_the_next_build(
    library: Library, onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    timings = tmp_path / "tensorrt-sm86.timings"
    for _ in range(2):
        build_engine(onnx_file(), "trt", folder=tmp_path)
    kept = timings.read_bytes()
    assert library.caches == [b"", kept]
    for content in (kept.replace(b"stand-in 1", b"stand-in 9"), b"damaged"):
        library.caches.clear()
        timings.write_bytes(content)
        build_engine(onnx_file(), "trt", folder=tmp_path)
        assert library.caches == [content, b""], "those of another release are none"
        assert timings.read_bytes() == kept


def test_build_without_a_folder_keeps_nothing(
    library: Library, onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    parent = onnx_file()
    before = files_in(tmp_path)
    build_engine(parent, "trt")
    library.failing["Builder.build_serialized_network"] = ["out of luck"]
    with pytest.raises(ExportError, match="out of luck"):
        build_engine(parent, "trt")
    assert files_in(tmp_path) == before
    assert library.caches == []


@every_release
def test_parser_error_names_the_node(
    library: Library, onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    library.parser_errors = [("Assertion failed\nfor two lines", "Conv", "y2"), ("more", "", "")]
    said = "found Conv y2 node: Assertion failed for two lines; .* log is .*model-fp32.engine.log$"
    with pytest.raises(ExportError, match=said):
        build_engine(onnx_file(), "trt", folder=tmp_path)


@every_release
def test_builder_error_names_the_node(library: Library, onnx_file: Callable[..., Path]) -> None:
    library.failing["Builder.build_serialized_network"] = [
        "Error Code 10: Could not find any implementation for node w2 + y2.",
        "Error Code 2: y3 could not either",
    ]
    with pytest.raises(ExportError, match="builds, found Conv node y2: Error Code 10: Could"):
        build_engine(onnx_file(), "trt")


@every_release
def test_progress_grows_with_the_phases(library: Library, onnx_file: Callable[..., Path]) -> None:
    told: list[tuple[str, float]] = []
    build_engine(onnx_file(), "trt", progress=lambda phase, share: told.append((phase, share)))
    assert told == [("Timing tactics", 0.25), ("Building engine", 0.5)]


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads take turns far more often than they usually do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_progress_told_by_several_threads(
    library: Library, onnx_file: Callable[..., Path], busy_interpreter: None
) -> None:
    """An exception there would cancel the build."""
    library.timing_threads = 4
    shares: list[float] = []
    build_engine(onnx_file(), "trt", progress=lambda phase, share: shares.append(share))
    assert len(shares) == 2 + 4 * 200
    assert all(0 < share <= 1 for share in shares)


def interrupt(phase: str, share: float) -> None:
    signal.raise_signal(signal.SIGINT)


def test_interrupt_ends_the_build(
    library: Library, onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    path = tmp_path / "out" / "model.engine"
    with pytest.raises(KeyboardInterrupt):
        write_engine(onnx_file(), path, "trt", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert not path.parent.exists()


def test_interrupt_ends_the_build_of_the_real_compiler(
    rtx: types.ModuleType, onnx_file: Callable[..., Path]
) -> None:
    told: list[float] = []
    build_engine(onnx_file(), "trt-rtx", SM89, progress=lambda phase, share: told.append(share))
    assert len(told) > 10
    assert told[0] < 0.5 < told[-1] <= 1
    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx_file(), "trt-rtx", SM89, progress=interrupt)


def test_build_in_another_thread(library: Library, onnx_file: Callable[..., Path]) -> None:
    """Signals belong to the main thread; a build does not."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(build_engine, onnx_file(), "trt").result().precisions == {"fp32": 3}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("etc/nv_tegra_release", b"# R36 (release), REVISION: 4.3", 1024),
        ("proc/device-tree/model", b"NVIDIA Jetson Orin Nano Developer Kit\0", 1024),
        ("proc/device-tree/model", b"Raspberry Pi 5 Model B\0", None),
        ("etc/os-release", b"Ubuntu", None),
    ],
)
def test_default_workspace(tmp_path: Path, file: str, content: bytes, expected: int | None) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert default_workspace_mib(tmp_path) == expected


@pytest.mark.parametrize(("asked", "expected"), [(None, 1024), (512, 512)])
def test_workspace_on_a_jetson(
    library: Library,
    onnx_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    expected: int,
) -> None:
    monkeypatch.setattr(engine_module, "default_workspace_mib", lambda: 1024)
    path = tmp_path / "model.engine"
    write_engine(onnx_file(), path, "trt", EngineOptions(workspace_mib=asked))
    assert library.limits == [expected << 20]
    assert read_sidecar(path)[1]["engine"]["workspace_mib"] == expected


# --- a line for who watches -----------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(RuntimeError), build_progress("model.engine") as progress:
        assert progress is not None
        progress("Timing tactics", 0.25)
        progress("Building engine", 1.0)
        raise RuntimeError
    assert terminal.getvalue() == (
        "\r\x1b[Kmodel.engine: 25%, timing tactics\r\x1b[Kmodel.engine: 100%, building engine"
        "\r\x1b[K"
    )


def test_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with build_progress("model.engine") as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


def test_terminal_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with build_progress("model.engine") as progress:
        assert progress is not None
        terminal.close()
        progress("Timing tactics", 0.25)


# --- where it cannot be done ---------------------------------------------------------------------


def test_rtx_is_available(rtx: types.ModuleType) -> None:
    assert available("trt-rtx") is None


@pytest.mark.parametrize("kind", ["trt", "trt-rtx"])
def test_missing_library(
    onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    reason = available(kind)
    assert reason is not None
    assert install_command(kind) in reason
    with pytest.raises(BackendError, match="no module named"):
        build_engine(onnx_file(), kind)


def test_tensorrt_8_is_refused(
    onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = types.ModuleType("tensorrt")
    old.__dict__["__version__"] = "8.6.1"
    old.__dict__["NetworkDefinitionCreationFlag"] = types.SimpleNamespace(EXPLICIT_BATCH=0)
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    assert "8.6.1" in str(available("trt"))
    with pytest.raises(BackendError, match="TensorRT 10 or newer"):
        build_engine(onnx_file(), "trt")


def test_builder_that_does_not_start(
    rtx: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(rtx, "Builder", refuse)
    assert "engine trt-rtx: pybind11" in str(available("trt-rtx"))


def test_targets_are_not_for_tensorrt(
    rtx: types.ModuleType, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    with pytest.raises(ConfigError, match="builds for the GPU that is here"):
        build_engine(onnx_file(), "trt", SM89)


def has_gpu() -> bool:
    try:
        engine_module.open_cuda()
    except BackendError:
        return False
    return True


def test_current_gpu_where_there_is_none(
    rtx: types.ModuleType, onnx_file: Callable[..., Path]
) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="CUDA"):
        build_engine(onnx_file(), "trt-rtx", EngineOptions(compute_capabilities=("current",)))


def test_loading_without_a_gpu_is_one_line(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    path = write_engine(onnx_file("fp16"), tmp_path / "model.rtx.engine", "trt-rtx")
    with pytest.raises(BackendError, match=r"CUDA.*machine with an NVIDIA GPU") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "the library's own output stays out of the terminal"


def test_loading_where_the_deserialiser_meets_no_gpu(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were the first check to pass, the library's None and cudaError 35 become one line too."""
    if has_gpu():
        pytest.skip("this machine has a GPU")
    path = write_engine(onnx_file("fp16"), tmp_path / "model.rtx.engine", "trt-rtx")
    monkeypatch.setattr(backend, "open_cuda", _Unchecked)
    with pytest.raises(BackendError, match=r"to load an engine.*cudaError 35"):
        load(path)


class _Unchecked:
    """CUDA that claims a GPU, so that the library is the first to miss it."""

    active = contextlib.nullcontext

    def compute_capability(self) -> str:
        return "sm89"


@pytest.mark.parametrize("change", ["version", "gpu", "plan"])
def test_real_engine_that_does_not_fit(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    tmp_path: Path,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_engine(onnx_file("fp16"), tmp_path / "model.rtx.engine", "trt-rtx", SM89)
    if change == "plan":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif change == "version":
        text = sidecar_path(path).read_text().replace(rtx.__version__, "1.2.0.54")
        sidecar_path(path).write_text(text)
    else:
        nowhere = types.SimpleNamespace(compute_capability=lambda: "sm120")
        monkeypatch.setattr(backend, "open_cuda", lambda: nowhere)
    with pytest.raises(ArtifactError) as caught:
        load(path)
    message = str(caught.value)
    if change != "plan":
        wanted = "sm120" if change == "gpu" else "sm89"
        assert f"{tmp_path}/model-fp16.onnx --engine trt-rtx --max-batch 8" in message
        assert f"--compute-capability {wanted} --out {tmp_path} --overwrite" in message


def test_building_needs_neither_torch_nor_onnxruntime(
    rtx: types.ModuleType,
    onnx_file: Callable[..., Path],
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python(
        "import sys\n"
        "for name in ('torch', 'onnxruntime', 'torchvision'): sys.modules[name] = None\n"
        "from efficientface_export.tensorrt.builder import build_engine\n"
        "print(build_engine(sys.argv[1], 'trt-rtx').kernels)",
        str(onnx_file("fp16")),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert done.stderr == ""


# --- on a GPU ------------------------------------------------------------------------------------

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["trt", "trt-rtx"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_computes_what_onnxruntime_computes(
    onnx_file: Callable[..., Path], tmp_path: Path, kind: Any, precision: str
) -> None:
    if reason := unusable(kind):
        pytest.skip(reason)
    parent = onnx_file(precision)
    path = tmp_path / ("model.engine" if kind == "trt" else "model.rtx.engine")
    targets = ("current",) if kind == "trt-rtx" else ()
    options = EngineOptions(max_batch=4, compute_capabilities=targets)
    try:
        write_engine(parent, path, kind, options)
    except EfficientFaceError as error:
        if precision == "int8":
            pytest.skip(f"this GPU does not do it: {error}")
        raise
    images = np.random.default_rng(1).integers(0, 256, (11, SIDE, SIDE, 3), dtype=np.uint8)
    with load(path) as engine, load(parent, backend="onnx:cpu") as reference:
        for count in (1, 4, 11):
            logits, probabilities = engine.infer(images[:count])
            expected_logits, expected = reference.infer(images[:count])
            tolerance = TOLERANCE[precision]
            np.testing.assert_allclose(probabilities, expected, atol=tolerance)
            np.testing.assert_allclose(logits, expected_logits, atol=10 * tolerance)
