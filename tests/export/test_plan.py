"""What a command line means, before anything is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from efficientface_export import plan as plan_module
from efficientface_export.config import ExportConfig
from efficientface_export.plan import Plan, make_plan
from efficientface_export.provenance import Provenance
from efficientface_export.source import Source
from efficientface_export.verify import TestSet, write_reference

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.spec import ModelSpec

SHA = "a" * 64


@pytest.fixture(autouse=True)
def engines_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why each kind of engine cannot be made; both can be, unless a test says otherwise."""
    reasons: dict[str, str | None] = {"trt": None, "trt-rtx": None}
    monkeypatch.setattr(plan_module.engines, "available", lambda kind: reasons[kind])
    return reasons


@pytest.fixture
def make_source(small_spec: ModelSpec) -> Any:
    def make(name: str = "student.safetensors", **record: str) -> Source:
        path = Path(name)
        return Source(
            path,
            small_spec,
            SHA,
            Provenance(record, path),
            trace=lambda _: onnx.ModelProto(),
            lay_out=None if path.suffix == ".onnx" else lambda *_: onnx.ModelProto(),
            infer=None,
        )

    return make


def plan(source: Source, tmp_path: Path, **options: Any) -> Plan:
    return make_plan(ExportConfig(**{"out": tmp_path / "out", **options}), source)


@pytest.mark.parametrize(
    ("options", "engine", "target", "precisions"),
    [
        ({"engine": "onnx"}, "onnx", "cpu", ("fp32",)),
        ({"engine": "onnx", "target": "gpu"}, "onnx", "gpu", ("fp32",)),
        ({"engine": "onnx", "precision": "fp16"}, "onnx", "cpu", ("fp16",)),
        ({"engine": "trt"}, "trt", "gpu", ("fp16",)),
        ({"engine": "trt-rtx"}, "trt-rtx", "gpu", ("fp16",)),
        ({"engine": "trt-rtx", "precision": "fp32"}, "trt-rtx", "gpu", ("fp32",)),
        ({"engine": "auto"}, "trt", "gpu", ("fp16",)),
        ({"engine": "auto", "target": "cpu"}, "onnx", "cpu", ("fp32",)),
        (
            {"engine": "onnx", "precision": "all", "calib": Path("x")},
            "onnx",
            "cpu",
            ("fp32", "fp16", "int8"),
        ),
    ],
)
def test_checkpoint(
    make_source: Any,
    tmp_path: Path,
    options: dict[str, Any],
    engine: str,
    target: str,
    precisions: tuple[str, ...],
) -> None:
    found = plan(make_source(), tmp_path, **options)
    assert found == Plan(tmp_path / "out", engine, target, precisions)


def test_names(make_source: Any, tmp_path: Path) -> None:
    found = plan(make_source(), tmp_path, engine="trt-rtx")
    assert found.onnx_path("fp16").name == "efficientface-fp16-gpu.onnx"
    assert found.engine_path("fp16").name == "efficientface-fp16-gpu.rtx.engine"
    found = plan(make_source(), tmp_path, engine="trt")
    assert found.engine_path("int8").name == "efficientface-int8-gpu.engine"


def test_fp32_onnx_made_for_a_cpu_serves_a_gpu(make_source: Any, tmp_path: Path) -> None:
    source = make_source("model.onnx", precision="fp32", target="cpu")
    assert plan(source, tmp_path, engine="trt").target == "gpu"


def test_lower_precision_is_taken_as_it_is(make_source: Any, tmp_path: Path) -> None:
    source = make_source("model.onnx", precision="int8", target="gpu")
    found = plan(source, tmp_path, engine="trt")
    assert (found.target, found.precisions) == ("gpu", ("int8",))
    assert plan(source, tmp_path, engine="trt", precision="int8", target="gpu") == found


@pytest.mark.parametrize(
    ("kinds", "engine"),
    [({}, "trt"), ({"trt": "no GPU"}, "trt-rtx"), ({"trt": "x", "trt-rtx": "y"}, "onnx")],
)
def test_auto(
    make_source: Any,
    tmp_path: Path,
    engines_here: dict[str, str | None],
    capsys: pytest.CaptureFixture[str],
    kinds: dict[str, str],
    engine: str,
) -> None:
    engines_here.update(kinds)
    assert plan(make_source(), tmp_path, engine="auto").engine == engine
    assert f"engine: {engine}, the best that this machine can make" in capsys.readouterr().out


def test_missing_engine_becomes_its_onnx_file(
    make_source: Any, tmp_path: Path, engines_here: dict[str, str | None]
) -> None:
    engines_here["trt"] = "tensorrt is not installed"
    found = plan(make_source(), tmp_path, engine="trt")
    assert (found.engine, found.target, found.precisions) == ("onnx", "gpu", ("fp16",))
    assert found.missing == "--engine trt cannot be made here: tensorrt is not installed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "trt", "target": "cpu"}, "--target cpu: expected gpu with --engine trt"),
        ({"engine": "onnx", "precision": "int8"}, "--calib: expected a folder of training images"),
        ({"engine": "onnx", "precision": "all"}, "--calib"),
        ({"engine": "onnx", "exclude": ("a",)}, "--exclude: expected --precision int8"),
    ],
)
def test_contradictions(
    make_source: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(make_source(), tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, "--precision fp32: expected int8, which model.onnx is"),
        ({"precision": "all", "calib": Path("x")}, "--precision all: expected int8"),
        ({"target": "cpu"}, "--target cpu: expected gpu, which model.onnx was made for"),
        ({"float_input": True}, "--float-input: expected a checkpoint"),
        ({"input_size": 96}, "--input-size: expected a checkpoint"),
        ({"exclude": ("a",)}, "--exclude"),
    ],
)
def test_contradictions_with_an_onnx_file(
    make_source: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    source = make_source("model.onnx", precision="int8", target="gpu")
    with pytest.raises(ConfigError, match=message):
        plan(source, tmp_path, engine="onnx", **options)


def test_out_is_a_file(make_source: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="out: expected a folder, found a file"):
            plan(make_source(), tmp_path, engine="onnx", overwrite=overwrite)


@pytest.mark.parametrize("name", ["efficientface-fp16-gpu.onnx", "efficientface-fp16-gpu.engine"])
def test_earlier_export(make_source: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("x")
    with pytest.raises(ConfigError, match=rf"{name}: .*an earlier export; add --overwrite"):
        plan(make_source(), tmp_path, engine="trt")
    assert plan(make_source(), tmp_path, engine="trt", overwrite=True).engine == "trt"
    assert plan(make_source(), tmp_path, engine="onnx").engine == "onnx"  # makes another file


def test_source_itself_is_not_in_the_way(make_source: Any, tmp_path: Path) -> None:
    path = tmp_path / "out" / "efficientface-fp16-gpu.onnx"
    path.parent.mkdir()
    path.write_text("x")
    source = make_source(str(path), precision="fp16", target="gpu")
    assert plan(source, tmp_path, engine="trt").engine == "trt"


def test_artifacts_of_other_weights(make_source: Any, tmp_path: Path) -> None:
    """One verify.npz serves a folder: two networks in it could not both be verified."""
    out = tmp_path / "out"
    out.mkdir()
    test_set = TestSet(np.zeros((2, 64, 64, 3), dtype=np.uint8), None, "x")
    write_reference(out, test_set, np.zeros((2, 7), dtype=np.float32), SHA)
    assert plan(make_source(), tmp_path, engine="onnx").engine == "onnx"
    write_reference(out, test_set, np.zeros((2, 7), dtype=np.float32), "b" * 64)
    with pytest.raises(ConfigError, match="artifacts of the same weights, or none"):
        plan(make_source(), tmp_path, engine="onnx")
    assert plan(make_source(), tmp_path, engine="onnx", overwrite=True).engine == "onnx"
    shutil.rmtree(out)


def test_deploy_graph_of_an_onnx_file(make_source, tmp_path):
    source = make_source("model.onnx", precision="fp32", target="cpu")
    with pytest.raises(ConfigError, match=r"--graph deploy: expected an EfficientFace checkpoint"):
        plan(source, tmp_path, engine="onnx", graph="deploy")
    assert plan(make_source(), tmp_path, engine="onnx", graph="deploy").target == "cpu"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("graph", ["plain", "deploy"])
def test_int8_of_both_graphs_for_both_targets(
    make_source: Any, tmp_path: Path, graph: str, target: str
) -> None:
    options = {"graph": graph, "target": target, "precision": "int8", "calib": Path("faces")}
    found = plan(make_source(), tmp_path, engine="onnx", **options)
    assert (found.target, found.precisions) == (target, ("int8",))
