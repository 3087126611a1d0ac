"""What one call makes, what of it is there already, and what must not be replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from efficientface_deploy.errors import ConfigError, EfficientFaceError
from efficientface_deploy.workbench.environment import versions
from efficientface_export.graph.io import read_onnx
from efficientface_export.int8.calibration import Calibration
from efficientface_export.int8.qdq import ROUNDINGS
from efficientface_export.options import PRECISIONS, ExportConfig
from efficientface_export.source import Source
from efficientface_export.tensorrt import builder as engines
from efficientface_export.tensorrt.options import SUFFIXES, EngineOptions, Kind
from efficientface_export.verification.reference import stored_parent
from efficientface_export.verification.report import report_header, reports_other_model


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call makes.

    Attributes:
        out: Folder of the artifacts.
        engine: ``onnx``, ``trt`` or ``trt-rtx``: what can be made here.
        target: ``cpu`` or ``gpu``.
        graph: ``plain`` or ``deploy``; what an ONNX source records.
        precisions: In the order in which they are made.
        missing: Why the engine that was asked for cannot be made here; empty when it can.
    """

    out: Path
    engine: str
    target: str
    graph: str
    precisions: tuple[str, ...]
    missing: str = ""

    def onnx_path(self, precision: str) -> Path:
        """``efficientface-{precision}-{target}.onnx``."""
        return self.out / f"efficientface-{precision}-{self.target}.onnx"

    def engine_path(self, precision: str) -> Path:
        """``efficientface-{precision}-{target}.engine`` or ``.rtx.engine``."""
        suffix = SUFFIXES[self.engine]
        return self.out / f"efficientface-{precision}-{self.target}{suffix}"


def make_plan(config: ExportConfig, source: Source) -> Plan:
    """Decide what is made.

    Raises:
        ConfigError: The options contradict each other or the source, or ``--out`` is a file.
    """
    engine, missing = _choose_engine(config)
    _check_engine_options(config, engine, missing)
    target = _choose_target(config, source, engine)
    precisions = _choose_precisions(config, source, engine)
    _check_options(config, source, precisions)
    graph = _choose_graph(config, source, target)
    plan = Plan(config.out, "onnx" if missing else engine, target, graph, precisions, missing)
    if plan.out.exists() and not plan.out.is_dir():
        raise ConfigError(plan.out, "a folder", "a file", "choose another --out")
    return plan


def _choose_engine(config: ExportConfig) -> tuple[str, str]:
    """The engine, and why it cannot be made here."""
    engine = config.engine
    if engine == "auto":
        kinds = SUFFIXES if config.target != "cpu" else ()
        engine = next((kind for kind in kinds if not _why_not(kind)), "onnx")
        print(f"engine: {engine}, the best that this machine can make")
        return engine, ""
    if engine == "onnx":
        return engine, ""
    if config.target == "cpu":
        raise ConfigError(
            "--target cpu",
            f"gpu with --engine {engine}",
            "cpu",
            "leave --target out, or use --engine onnx",
        )
    reason = _why_not(engine)
    return engine, f"--engine {engine} cannot be made here: {reason}" if reason else ""


def _why_not(engine: str) -> str | None:
    """Why an engine cannot be made here; None when it can."""
    return engines.available(cast(Kind, engine))


def _check_engine_options(config: ExportConfig, engine: str, missing: str) -> None:
    """Refuse GPUs and sizes that no builder takes, before anything is made for it."""
    names = config.compute_capabilities
    EngineOptions(max_batch=config.max_batch, compute_capabilities=names)
    if names and engine != "trt-rtx":
        raise ConfigError(
            "--compute-capability",
            "--engine trt-rtx, which alone is told what to build for",
            f"--engine {engine}",
            "leave it out, or use --engine trt-rtx",
        )
    if names and not missing:
        engines.check_targets("trt-rtx", names)


def _choose_target(config: ExportConfig, source: Source, engine: str) -> str:
    if source.precision == "fp32":
        return config.target or ("gpu" if engine != "onnx" else source.target or "cpu")
    if config.target not in (None, source.target):
        raise ConfigError(
            f"--target {config.target}",
            f"{source.target}, which {source.path.name} was made for",
            str(config.target),
            "leave --target out, or give the checkpoint as --weights",
        )
    return source.target


def _choose_precisions(config: ExportConfig, source: Source, engine: str) -> tuple[str, ...]:
    if source.precision != "fp32":
        if config.precision not in (None, source.precision):
            raise ConfigError(
                f"--precision {config.precision}",
                f"{source.precision}, which {source.path.name} is",
                str(config.precision),
                "give the FP32 file or the checkpoint as --weights",
            )
        return (source.precision,)
    if config.precision == "all":
        return PRECISIONS
    return (config.precision or ("fp32" if engine == "onnx" else "fp16"),)


def _check_options(config: ExportConfig, source: Source, precisions: tuple[str, ...]) -> None:
    """Refuse what would have to be ignored."""
    if source.is_onnx:
        for name, given in (
            ("--float-input", config.float_input),
            ("--input-size", config.input_size is not None),
        ):
            if given:
                raise ConfigError(
                    name,
                    "a checkpoint as --weights",
                    source.path.name,
                    "give the checkpoint that the ONNX file was made from",
                )
    quantises = "int8" in precisions and source.precision == "fp32"
    if quantises and config.calib is None:
        raise ConfigError(
            "--calib",
            "a folder of training images for INT8",
            "none",
            "give the data set that the network was trained on, e.g. --calib RAF-DB",
        )
    if config.exclude and not quantises:
        raise ConfigError(
            "--exclude",
            "--precision int8, and an FP32 source",
            ", ".join(precisions),
            "leave --exclude out",
        )


def _choose_graph(config: ExportConfig, source: Source, target: str) -> str:
    """The graph's layout: an ONNX file keeps its own, and only EfficientFace has two."""
    if source.is_onnx:
        if config.graph is not None:
            raise ConfigError(
                f"--graph {config.graph}",
                "a checkpoint as --weights",
                source.path.name,
                "leave --graph out: the file keeps the graph that it has",
            )
        graph = source.provenance.graph
        if graph == "deploy" and source.target != target:
            print(f"note: {source.path.name} is laid out for a {source.target}, not for a {target}")
        return graph
    if source.lay_out is not None:
        return config.graph or "deploy"
    if config.graph == "deploy":
        raise ConfigError(
            "--graph deploy",
            "an EfficientFace checkpoint as --weights",
            f"{source.path.name}, {source.spec.architecture}",
            "leave --graph out",
        )
    return "plain"


def request(
    config: ExportConfig,
    plan: Plan,
    source: Source,
    calibration: Calibration | None,
    precision: str,
) -> dict[str, Any]:
    """What decides the content of an ONNX file, as its provenance records it.

    Files of equal requests, and of one spec, are equal.
    """
    decided: dict[str, Any] = {
        "precision": precision,
        "target": plan.target,
        "graph": plan.graph,
        "input": source.provenance.input
        or ("float32 NCHW normalised" if config.float_input else "uint8 NHWC RGB"),
        "weights": source.weights,
        "versions": versions(),
    }
    if precision == "int8" and calibration is not None:
        decided["calibration"] = {**calibration.record, "method": config.calib_method}
        decided["exclude"] = sorted(set(config.exclude))
        decided["int8_search"] = config.int8_search
        decided["rounding"] = dataclasses.asdict(ROUNDINGS[plan.target])
    return decided


def check_folder(
    config: ExportConfig, plan: Plan, source: Source, calibration: Calibration | None
) -> frozenset[str]:
    """Refuse to replace files, or to mix artifacts of different models in one folder.

    Without ``--overwrite`` an ONNX file that is there is used as it is when it is what would be
    made; nothing else that is there is touched.

    Returns:
        Precisions whose ONNX file is used as it is.

    Raises:
        ConfigError: A file is in the way, or the folder's artifacts are of another model.
    """
    if config.overwrite:
        return frozenset()
    if plan.engine != "onnx":
        for precision in plan.precisions:
            if plan.engine_path(precision).exists():
                raise _in_the_way(plan.engine_path(precision), "an earlier export")
    _check_model(plan, source)
    present = frozenset(
        precision
        for precision in plan.precisions
        if plan.onnx_path(precision).exists() and not source.is_onnx_in(precision)
    )
    for precision in present:
        path = plan.onnx_path(precision)
        wanted = request(config, plan, source, calibration, precision)
        if differing := _differences(path, source, wanted):
            raise _in_the_way(path, f"an earlier export of other {', '.join(differing)}")
    return present


def _check_model(plan: Plan, source: Source) -> None:
    """One ``verify.npz`` serves a folder: two models in it could not both be verified."""
    parent = stored_parent(plan.out)
    header = report_header(source.weights, source.spec)
    if parent not in (None, source.weights["sha256"]) or reports_other_model(plan.out, header):
        raise ConfigError(
            plan.out,
            "artifacts of the same weights, labels and input size, or none",
            "artifacts of others",
            "add --overwrite, or choose another --out",
        )


def _differences(path: Path, source: Source, wanted: Mapping[str, Any]) -> list[str]:
    """In what an ONNX file differs from the one that would be made; empty when in nothing."""
    try:
        _, spec, record = read_onnx(path)
    except EfficientFaceError:
        return ["making"]
    found = {**record, "weights": {**wanted["weights"], **_sha256(record)}}
    differing = [key for key, value in wanted.items() if found.get(key) != value]
    return differing + (["labels or input size"] if spec != source.spec else [])


def _sha256(record: Mapping[str, Any]) -> dict[str, Any]:
    """The hash of the weights in a record; their file's name says nothing."""
    weights = record.get("weights")
    return {"sha256": weights.get("sha256") if isinstance(weights, dict) else None}


def _in_the_way(path: Path, found: str) -> ConfigError:
    return ConfigError(path, "no such file yet", found, "add --overwrite, or choose another --out")
