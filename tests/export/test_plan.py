"""What a command line means, before anything is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from efficientface_deploy.errors import BackendError, ConfigError
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_export import plan as plan_module
from efficientface_export.graph.io import write_onnx
from efficientface_export.int8.calibration import Calibration
from efficientface_export.options import ExportConfig
from efficientface_export.plan import Plan, resolve
from efficientface_export.source import Source
from efficientface_export.tune import Runner
from efficientface_export.verification.provenance import PRECISIONS, Provenance
from efficientface_export.verification.reference import TestSet, write_reference
from efficientface_export.verification.report import Report, report_header

SHA = "a" * 64


@pytest.fixture(autouse=True)
def engines_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why each kind of engine cannot be made; both can be, unless a test says otherwise."""
    reasons: dict[str, str | None] = {"trt": None, "trt-rtx": None}
    images = Calibration((), (), {"images_sha256": "c" * 64}, ())
    monkeypatch.setattr(plan_module, "choose_calibration", lambda *_: images)
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
            trained_size=small_spec.input_size,
        )

    return make


def plan(source: Source, tmp_path: Path, **options: Any) -> Plan:
    return resolve(ExportConfig(**{"out": tmp_path / "out", **options}), source)


def engine_of(found: Plan) -> str:
    return found.steps[-1].engine


def precisions_of(found: Plan) -> tuple[str, ...]:
    return tuple(found.requests)


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
    assert (engine_of(found), found.target, found.graph, found.missing) == (
        engine,
        target,
        "deploy",
        "",
    )
    assert precisions_of(found) == precisions


@pytest.mark.parametrize(
    ("engine", "precision", "files"),
    [
        ("trt-rtx", "fp16", ["fp16-gpu.onnx", "fp16-gpu.rtx.engine"]),
        ("trt", "int8", ["int8-gpu.onnx", "int8-gpu.engine"]),
        ("onnx", "all", ["fp32-cpu.onnx", "fp16-cpu.onnx", "int8-cpu.onnx"]),
        (
            *("trt", "all"),
            [f"{p}-gpu{end}" for p in ("fp32", "fp16", "int8") for end in (".onnx", ".engine")],
        ),
    ],
)
def test_steps(
    make_source: Any, tmp_path: Path, engine: str, precision: str, files: list[str]
) -> None:
    """An engine comes after its ONNX file."""
    found = plan(make_source(), tmp_path, engine=engine, precision=precision, calib=tmp_path)
    wanted = [tmp_path / "out" / f"efficientface-{name}" for name in files]
    assert [step.path for step in found.steps] == wanted
    assert [step.present for step in found.steps] == [None] * len(files)


def test_a_plan_is_not_changed_afterwards(make_source: Any, tmp_path: Path) -> None:
    found = plan(make_source(), tmp_path, engine="onnx")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.target = "gpu"


def test_features(make_source: Any, tmp_path: Path) -> None:
    """On request, or where an ONNX file has them; files without stay equal to older ones."""
    found = plan(make_source(), tmp_path, engine="onnx", features=True)
    assert found.features and found.requests["fp32"]["features"] is True
    found = plan(make_source(), tmp_path, engine="onnx")
    assert not found.features and "features" not in found.requests["fp32"]
    source = make_source("model.onnx", precision="fp32", target="gpu")
    with pytest.raises(ConfigError, match="--features: expected a checkpoint, or an ONNX file th"):
        plan(source, tmp_path, engine="trt", features=True)
    assert not plan(source, tmp_path, engine="trt").features
    graph = onnx.ModelProto()
    graph.graph.output.add().name = "features"
    source = dataclasses.replace(source, trace=lambda _: graph)
    assert plan(source, tmp_path, engine="trt").features


def test_nothing_to_make(make_source: Any, tmp_path: Path) -> None:
    source = make_source("model.onnx", precision="fp32", target="cpu")
    with pytest.raises(ConfigError, match=r"--engine onnx: .* model\.onnx, an ONNX file in fp32"):
        plan(source, tmp_path, engine="onnx")


def test_fp32_onnx_made_for_a_cpu_serves_a_gpu(make_source: Any, tmp_path: Path) -> None:
    source = make_source("model.onnx", precision="fp32", target="cpu")
    assert plan(source, tmp_path, engine="trt").target == "gpu"


def test_fp32_onnx_keeps_its_target(make_source: Any, tmp_path: Path) -> None:
    source = make_source("model.onnx", precision="fp32", target="gpu")
    assert plan(source, tmp_path, engine="onnx", precision="fp16").target == "gpu"
    assert plan(source, tmp_path, engine="onnx", precision="fp16", target="cpu").target == "cpu"
    silent = make_source("model.onnx", precision="fp32")
    assert plan(silent, tmp_path, engine="onnx", precision="fp16").target == "cpu"


def test_lower_precision_is_taken_as_it_is(make_source: Any, tmp_path: Path) -> None:
    source = make_source("model.onnx", precision="int8", target="gpu")
    found = plan(source, tmp_path, engine="trt")
    assert (found.target, precisions_of(found)) == ("gpu", ("int8",))
    again = plan(source, tmp_path, engine="trt", precision="int8", target="gpu")
    assert (again.target, precisions_of(again)) == ("gpu", ("int8",))
    onnx_step, engine = found.steps
    assert (onnx_step.path, engine.path.name) == (source.path, "efficientface-int8-gpu.engine")
    assert onnx_step.present is not None


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
    assert engine_of(plan(make_source(), tmp_path, engine="auto")) == engine
    assert f"engine: {engine}, the best that this machine can make" in capsys.readouterr().out


def test_missing_engine_becomes_its_onnx_file(
    make_source: Any, tmp_path: Path, engines_here: dict[str, str | None]
) -> None:
    engines_here["trt"] = "tensorrt is not installed"
    found = plan(make_source(), tmp_path, engine="trt")
    assert (engine_of(found), found.target, precisions_of(found)) == ("onnx", "gpu", ("fp16",))
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


class TestWeb:
    """``--web``, the page with the ONNX file that is made or given."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"engine": "trt"}, "--engine: expected onnx with --web, found trt"),
            ({"engine": "onnx", "precision": "fp16"}, "--precision: expected fp32 or int8"),
            ({"engine": "onnx", "precision": "all", "calib": Path("x")}, "--precision: .* found f"),
            ({"engine": "onnx", "float_input": True}, "--float-input: expected none with --web"),
        ],
    )
    def test_refused(
        self, make_source: Any, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            plan(make_source(), tmp_path, web=tmp_path / "web", **options)

    def test_a_folder_that_is_not_empty(self, make_source: Any, tmp_path: Path) -> None:
        (tmp_path / "web").mkdir()
        (tmp_path / "web/thesis.txt").touch()
        with pytest.raises(ConfigError, match="--web: expected a new or an empty folder"):
            plan(make_source(), tmp_path, web=tmp_path / "web")
        assert plan(make_source(), tmp_path, web=tmp_path / "web", overwrite=True)

    def test_it_takes_onnx_where_engines_can_be_made(
        self, make_source: Any, tmp_path: Path
    ) -> None:
        found = plan(make_source(), tmp_path, web=tmp_path / "web")
        assert (engine_of(found), precisions_of(found)) == ("onnx", ("fp32",))

    def test_an_onnx_file_is_used_as_it_is(self, make_source: Any, tmp_path: Path) -> None:
        source = make_source("model.onnx", precision="int8", target="cpu")
        found = plan(source, tmp_path, web=tmp_path / "web", engine="onnx")
        assert [step.path for step in found.steps] == [source.path]


class TestComputeCapability:
    """Refused before anything is made."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"engine": "onnx"}, "expected --engine trt-rtx, .* found --engine onnx"),
            ({"engine": "trt"}, "expected --engine trt-rtx, .* found --engine trt"),
            ({"engine": "auto"}, "expected --engine trt-rtx, .* found --engine trt"),
            ({"engine": "trt-rtx", "compute_capability": "sm86,current"}, "current alone"),
            ({"engine": "trt-rtx", "compute_capability": "SM86"}, "found SM86"),
        ],
    )
    def test_refused(
        self, make_source: Any, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        pytest.importorskip("tensorrt_rtx")
        with pytest.raises(ConfigError, match=f"--compute-capability: .*{message}"):
            plan(make_source(), tmp_path, **{"compute_capability": "sm86", **options})

    def test_a_card_that_the_library_does_not_serve(self, make_source: Any, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        with pytest.raises(BackendError, match=r"sm86, .*found sm87 \(Jetson Orin\); use TensorRT"):
            plan(make_source(), tmp_path, engine="trt-rtx", compute_capability="sm87,sm86")

    def test_known(self, make_source: Any, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        options = {"engine": "trt-rtx", "compute_capability": "sm86,sm89"}
        assert engine_of(plan(make_source(), tmp_path, **options)) == "trt-rtx"

    def test_without_the_library(
        self, make_source: Any, tmp_path: Path, engines_here: dict[str, str | None]
    ) -> None:
        """The command that finishes the job elsewhere takes them along."""
        engines_here["trt-rtx"] = "tensorrt_rtx is not installed"
        found = plan(make_source(), tmp_path, engine="trt-rtx", compute_capability="sm87")
        assert (engine_of(found), bool(found.missing)) == ("onnx", True)


class TestFolder:
    """What is there already is used, left alone, or in the way."""

    @pytest.fixture
    def check(self, tmp_path: Path, make_source: Any) -> Any:
        """Gives the precisions whose ONNX file is used as it is."""

        def run(source: Source | None = None, **options: Any) -> set[str]:
            config = ExportConfig(**{"out": tmp_path, "engine": "trt", **options})
            steps = resolve(config, source or make_source()).steps
            return {step.precision for step in steps if step.present is not None}

        return run

    @pytest.fixture
    def put(
        self, tmp_path: Path, make_source: Any, graph: onnx.ModelProto, small_spec: ModelSpec
    ) -> Any:
        """Write the ONNX file that a call would make, with changes to its record."""

        def write(made: str = "fp16", spec: ModelSpec = small_spec, **changes: Any) -> Path:
            config = ExportConfig(out=tmp_path, engine="trt", precision=made, calib=tmp_path)
            found = resolve(config, make_source())
            path = found.steps[0].path
            write_onnx(graph, path, spec, {**found.requests[made], **changes, "created": "then"})
            return path

        return write

    def test_empty(self, check: Any) -> None:
        assert check() == set()

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_the_file_that_would_be_made_is_used(
        self, check: Any, put: Any, precision: str, tmp_path: Path
    ) -> None:
        put(precision, weights={"file": "renamed.safetensors", "sha256": SHA})
        assert check(precision=precision, calib=tmp_path) == {precision}
        assert check(precision=precision, calib=tmp_path, overwrite=True) == set()

    @pytest.mark.parametrize(
        ("changes", "difference"),
        [
            ({"weights": {"file": "student.safetensors", "sha256": "b" * 64}}, "weights"),
            ({"weights": None}, "weights"),
            ({"precision": "fp32"}, "precision"),
            ({"target": "cpu"}, "target"),
            ({"graph": "plain"}, "graph"),
            ({"input": "float32 NCHW normalised"}, "input"),
            ({"versions": {"onnx": "1.0"}}, "versions"),
            ({"spec": preset("affectnet7").replace(input_size=64)}, "labels or input size"),
        ],
    )
    def test_another_file_is_in_the_way(
        self, check: Any, put: Any, changes: dict[str, Any], difference: str
    ) -> None:
        path = put(**changes)
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=f"an earlier export of other {difference}; add --ov"):
            check()
        assert check(overwrite=True) == set()
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("options", "difference"),
        [
            ({"calib_method": "entropy"}, "calibration"),
            ({"exclude": ("a",)}, "exclude"),
            ({"int8_search": False}, "int8_search"),
        ],
    )
    def test_int8_of_other_ranges_is_in_the_way(
        self, check: Any, put: Any, options: dict[str, Any], difference: str, tmp_path: Path
    ) -> None:
        put("int8")
        with pytest.raises(ConfigError, match=f"an earlier export of other {difference}; add"):
            check(precision="int8", calib=tmp_path, **options)

    @pytest.mark.parametrize(
        "name", ["efficientface-fp16-gpu.onnx", "efficientface-fp16-gpu.engine"]
    )
    def test_foreign_file_is_in_the_way(self, check: Any, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("x")
        with pytest.raises(ConfigError, match=rf"{name}: .*an earlier export.*; add --overwrite"):
            check()
        check(overwrite=True)
        check(engine="onnx")  # makes another file

    def test_source_itself_is_not_in_the_way(
        self, check: Any, make_source: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "efficientface-fp16-gpu.onnx"
        path.write_text("x")
        assert check(make_source(str(path), precision="fp16", target="gpu")) == {"fp16"}

    def test_artifacts_of_other_weights(self, check: Any, tmp_path: Path) -> None:
        """One verify.npz serves a folder: two networks in it could not both be verified."""
        test_set = TestSet(np.zeros((2, 64, 64, 3), dtype=np.uint8), None, "x")
        write_reference(tmp_path, test_set, np.zeros((2, 7), dtype=np.float32), SHA)
        check()
        write_reference(tmp_path, test_set, np.zeros((2, 7), dtype=np.float32), "b" * 64)
        with pytest.raises(ConfigError, match=r"artifacts of the same weights, .* or none"):
            check()
        check(overwrite=True)

    def test_artifacts_of_another_use_of_the_weights(
        self, check: Any, small_spec: ModelSpec, tmp_path: Path
    ) -> None:
        """The same weights at another size, or as another preset."""
        weights = {"file": "student.safetensors", "sha256": SHA}
        Report(tmp_path, report_header(weights, small_spec)).write(tmp_path)
        check()
        other = report_header(weights, small_spec.replace(input_size=96))
        Report(tmp_path, other).write(tmp_path)
        with pytest.raises(ConfigError, match="labels and input size, or none"):
            check()


@pytest.mark.parametrize("graph", ["plain", "deploy", "wide"])
def test_an_onnx_file_keeps_its_graph(make_source: Any, tmp_path: Path, graph: str) -> None:
    source = make_source("model.onnx", precision="fp32", target="cpu", graph=graph)
    assert plan(source, tmp_path, engine="onnx", precision="fp16").graph == graph
    with pytest.raises(ConfigError, match=r"--graph .*: expected a checkpoint as --weights"):
        plan(source, tmp_path, engine="onnx", graph=graph)


def test_a_graph_for_the_other_target_is_noted(make_source: Any, tmp_path: Path, capsys) -> None:
    source = make_source("model.onnx", precision="fp32", target="cpu", graph="deploy")
    found = plan(source, tmp_path, engine="onnx", precision="fp16", target="gpu")
    assert found.target == "gpu"
    assert "note: model.onnx is laid out for a cpu, not for a gpu" in capsys.readouterr().out


def test_deploy_is_the_default_of_a_checkpoint(make_source: Any, tmp_path: Path) -> None:
    assert plan(make_source(), tmp_path, engine="onnx").graph == "deploy"
    assert plan(make_source(), tmp_path, engine="onnx", graph="plain").graph == "plain"


def test_wide_is_for_floats_on_a_cpu(make_source: Any, tmp_path: Path) -> None:
    assert plan(make_source(), tmp_path, engine="onnx", graph="wide").graph == "wide"
    with pytest.raises(ConfigError, match=r"--graph wide: expected --target cpu, found --target g"):
        plan(make_source(), tmp_path, engine="onnx", graph="wide", target="gpu")
    int8 = {"precision": "int8", "calib": Path("faces")}
    with pytest.raises(ConfigError, match=r"the graph wide: expected FP32 or FP16, found INT8"):
        plan(make_source(), tmp_path, engine="onnx", graph="wide", **int8)
    source = make_source("model.onnx", precision="fp32", target="cpu", graph="wide")
    with pytest.raises(ConfigError, match=r"the graph wide: expected FP32 or FP16, found INT8"):
        plan(source, tmp_path, engine="onnx", **int8)


def test_an_ldg_has_the_plain_graph_alone(make_source: Any, tmp_path: Path) -> None:
    ldg = dataclasses.replace(make_source(), lay_out=None)
    assert plan(ldg, tmp_path, engine="onnx").graph == "plain"
    for graph in ("deploy", "wide"):
        expected = rf"--graph {graph}: expected an EfficientFace checkpoint"
        with pytest.raises(ConfigError, match=expected):
            plan(ldg, tmp_path, engine="onnx", graph=graph)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("graph", ["plain", "deploy"])
def test_int8_of_both_graphs_for_both_targets(
    make_source: Any, tmp_path: Path, graph: str, target: str
) -> None:
    options = {"graph": graph, "target": target, "precision": "int8", "calib": Path("faces")}
    found = plan(make_source(), tmp_path, engine="onnx", **options)
    assert (found.target, precisions_of(found)) == (target, ("int8",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "onnx", "calib": Path("x")}, "--calib: expected --precision int8, fp16 or all"),
        (
            {"engine": "trt-rtx", "compute_capability": "sm75,sm89", "precision": "int8"},
            "--compute-capability: expected --precision fp16 for sm75",
        ),
        (
            {"engine": "trt-rtx", "compute_capability": "sm75", "precision": "all"},
            "--compute-capability: expected --precision fp16 for sm75",
        ),
    ],
)
def test_what_would_be_ignored_or_refused_later_is_refused_now(
    make_source: Any, tmp_path: Path, options: dict[str, Any], said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(plan_module.engines, "check_targets", lambda *_: None)
    with pytest.raises(ConfigError, match=f"^{said}"):
        plan(make_source(), tmp_path, **{"calib": Path("x"), **options})


def test_calibration_serves_fp16_and_sm75_fp16(make_source: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(plan_module.engines, "check_targets", lambda *_: None)
    options = {"engine": "trt-rtx", "compute_capability": "sm75", "calib": Path("x")}
    assert precisions_of(plan(make_source(), tmp_path, **options)) == ("fp16",)


class TestTuning:
    @pytest.fixture(autouse=True)
    def two_runners(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine of two threads and no other provider."""

        def find(objective: str, engine: str, target: str) -> tuple[list[Runner], list[str]]:
            if engine != "onnx":
                return [Runner(engine, None)], []
            return [Runner("onnx:cpu", 1), Runner("onnx:cpu", 2)], ["onnx:openvino: not here"]

        monkeypatch.setattr(plan_module, "find_runners", find)

    @pytest.mark.parametrize(
        ("options", "engine", "graphs", "precisions"),
        [
            ({}, "trt", ("deploy", "plain"), ("fp32", "fp16")),
            ({"engine": "onnx"}, "onnx", ("deploy", "wide", "plain"), ("fp32", "fp16")),
            (
                {"engine": "onnx", "calib": Path("x")},
                "onnx",
                ("deploy", "wide", "plain"),
                PRECISIONS,
            ),
            ({"engine": "onnx", "target": "gpu"}, "onnx", ("deploy", "plain"), ("fp32", "fp16")),
            ({"engine": "onnx", "graph": "plain"}, "onnx", ("plain",), ("fp32", "fp16")),
            (
                {"engine": "onnx", "precision": "fp32"},
                "onnx",
                ("deploy", "wide", "plain"),
                ("fp32",),
            ),
            ({"engine": "trt", "calib": Path("x")}, "trt", ("deploy", "plain"), PRECISIONS),
        ],
    )
    def test_candidates(
        self,
        make_source: Any,
        tmp_path: Path,
        options: dict[str, Any],
        engine: str,
        graphs: tuple[str, ...],
        precisions: tuple[str, ...],
    ) -> None:
        found = plan(make_source(), tmp_path, tune="latency", **options)
        assert found.tuning is not None
        assert (engine_of(found), found.tuning.graphs) == (engine, graphs)
        assert precisions_of(found) == precisions
        named = [text for text in found.tuning.absent if text.startswith("int8")]
        assert bool(named) == ("int8" not in precisions and "precision" not in options)

    def test_auto_takes_what_runs_here(
        self, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TensorRT for RTX compiles without a GPU, and then nothing could be measured."""
        reasons = {"trt": "no GPU", "trt-rtx": None}
        monkeypatch.setattr(plan_module.engines, "available", reasons.get)
        assert engine_of(plan(make_source(), tmp_path, engine="auto")) == "trt-rtx"
        assert engine_of(plan(make_source(), tmp_path, engine="auto", tune="latency")) == "onnx"

    def test_an_onnx_file_is_written_anew(self, make_source: Any, tmp_path: Path) -> None:
        """With what it is tuned to; without --tune there would be nothing to make."""
        source = make_source("model.onnx", precision="int8", target="cpu")
        found = plan(source, tmp_path, engine="onnx", tune="latency")
        (step,) = found.steps
        assert step.present is not None and step.path != source.path
        assert found.tuning is not None and len(found.tuning.graphs) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tune_seconds": 5.0}, "--tune-seconds: expected --tune, found none; add --tune"),
            (
                {"tune": "latency", "tune_seconds": 1.5},
                "--tune-seconds: expected 2.4 seconds or more for 12 candidates, found 1.5",
            ),
            (
                {"tune": "latency", "web": Path("site")},
                "--tune: expected none with --web, whose page a browser runs, found both; make",
            ),
            (
                {"tune": "latency", "engine": "trt", "precision": "fp16", "graph": "plain"},
                "--tune latency: expected two candidates or more, found 1; leave",
            ),
        ],
    )
    def test_bad_input(
        self, make_source: Any, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            plan(make_source(), tmp_path, **{"engine": "onnx", **options})
        assert str(caught.value).startswith(message)

    def test_no_runner(
        self, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan_module, "find_runners", lambda *given: ([], ["onnx:cuda: none"]))
        with pytest.raises(ConfigError, match=r"found none \(onnx:cuda: none; int8: made with"):
            plan(make_source(), tmp_path, engine="onnx", target="gpu", tune="latency")

    def test_an_engine_that_cannot_be_built(
        self, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan_module.engines, "available", lambda kind: "no GPU")
        with pytest.raises(ConfigError, match=r"expected an engine, found .*no GPU; use"):
            plan(make_source(), tmp_path, engine="trt", tune="latency")

    def test_files_in_the_way(self, make_source: Any, tmp_path: Path) -> None:
        """Whichever is delivered, it is not known before."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "efficientface-fp16-cpu.onnx").touch()
        with pytest.raises(ConfigError, match="found an earlier export; add --overwrite"):
            plan(make_source(), tmp_path, engine="onnx", tune="latency")
