"""Makes one artifact: the graph in a precision, or an engine of it; verified before it is named."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import onnx

from efficientface_deploy.artifact import read_sidecar, sidecar_path, write_sidecar
from efficientface_deploy.preprocess import Float32Array, UInt8Array, normalise

from . import engine as engines
from .calibrate import Calibration
from .config import ExportConfig
from .graph import write_onnx
from .plan import Plan
from .precision import (
    quantise,
    quantised_inputs,
    require_fp16_range,
    require_precision,
    to_fp16,
)
from .provenance import now, versions
from .ranges import activation_limits, tensor_ranges
from .report import Row
from .sensitivity import find_sensitive_layers
from .source import Source
from .verify import TestSet, verify_artifact

# Images on which FP16's range is measured when no calibration set is given.
_RANGE_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """What all artifacts of one call share.

    Attributes:
        config: The options.
        plan: What is made.
        source: The network.
        calibration: Images for INT8, or None where none are needed.
        test_set: Images that artifacts are verified on.
        logits: float32 (N, C), the reference's on them.
    """

    config: ExportConfig
    plan: Plan
    source: Source
    calibration: Calibration | None
    test_set: TestSet
    logits: Float32Array


def make_onnx(job: Job, precision: str) -> tuple[Path, Row]:
    """Make, verify and write one ONNX file; an ONNX source of this precision is only verified.

    Returns:
        The file, and its row; one that failed is called ``*.failed.onnx``.

    Raises:
        EfficientFaceError: It could not be made.
    """
    source, out = job.source, job.plan.out
    if source.is_onnx_in(precision):
        excluded = source.provenance.excluded
        arithmetic = require_precision(source.trace(False), precision, excluded, source.path)
        row = Row.of(source.path, out, precision, arithmetic, source.verify())
        return source.path, row

    path = job.plan.onnx_path(precision)
    graph, details, notes = _convert(job, precision, path)
    provenance = _provenance(job, precision, details)
    with tempfile.TemporaryDirectory(dir=out, prefix=".verifying-") as folder:
        candidate = Path(folder, path.name)
        write_onnx(graph, candidate, source.spec, provenance)
        verification = verify_artifact(candidate, job.logits, job.test_set, precision)
    provenance["verification"] = verification.as_dict()
    _failed(path).unlink(missing_ok=True)
    path = _failed(path) if verification.problems else path
    write_onnx(graph, path, source.spec, provenance)
    return path, Row.of(path, out, precision, details["arithmetic"], verification, notes)


def make_engine(job: Job, parent: Path, precision: str) -> Row:
    """Build and verify one TensorRT engine of an ONNX file.

    Returns:
        Its row; an engine that failed is called ``*.failed.engine``.

    Raises:
        EfficientFaceError: It could not be built.
    """
    config, plan = job.config, job.plan
    path = plan.engine_path(precision)
    options = engines.EngineOptions(
        max_batch=config.max_batch,
        workspace_mib=config.workspace,
        compute_capabilities=config.compute_capabilities,
    )
    kind = cast(engines.Kind, plan.engine)
    with tempfile.TemporaryDirectory(dir=plan.out, prefix=".verifying-") as folder:
        candidate = engines.write_engine(parent, Path(folder, path.name), kind, options)
        spec, provenance = read_sidecar(candidate)
        verification = verify_artifact(candidate, job.logits, job.test_set, precision)
        provenance["verification"] = verification.as_dict()
        write_sidecar(candidate, spec, provenance)
        for old in (_failed(path), sidecar_path(_failed(path))):
            old.unlink(missing_ok=True)
        path = _failed(path) if verification.problems else path
        # An engine and a sidecar of different builds are refused by their hash.
        os.replace(sidecar_path(candidate), sidecar_path(path))
        os.replace(candidate, path)
    built = provenance["engine"]
    note = (
        f"{built['library']} {built['version']} for {', '.join(built['compute_capabilities'])}, "
        f"{built['kernels']} kernels, built in {built['build_seconds']:.1f} s"
    )
    arithmetic = str(provenance.get("arithmetic", ""))
    return Row.of(path, plan.out, precision, arithmetic, verification, [note])


def _failed(path: Path) -> Path:
    """``efficientface-int8-gpu.rtx.engine`` -> ``efficientface-int8-gpu.failed.rtx.engine``."""
    return path.with_name(path.name.replace(".", ".failed.", 1))


def _convert(
    job: Job, precision: str, path: Path
) -> tuple[onnx.ModelProto, dict[str, Any], tuple[str, ...]]:
    """The graph in one precision, what is to be recorded about it, and what to warn about."""
    config, source, calibration = job.config, job.source, job.calibration
    if config.graph == "deploy":
        assert source.lay_out is not None  # the plan sees to it
        graph = source.lay_out(config.float_input, job.plan.target)
    else:
        graph = source.trace(config.float_input)
    details: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if precision != "fp32":
        halves = precision == "fp16" or job.plan.target == "gpu"
        images = calibration.images if calibration else job.test_set.images[:_RANGE_IMAGES]
        ranges = tensor_ranges(graph, _graph_input(job, images))
        if halves:
            tensor, largest = require_fp16_range(ranges, path)
            details["largest_fp32_value"] = {"tensor": tensor, "magnitude": largest}
        if precision == "int8":
            graph, int8_details, notes = _quantise(job, graph, ranges)
            details |= int8_details
        if halves:
            graph = to_fp16(graph)
    excluded = len(details.get("excluded", ()))
    details["arithmetic"] = require_precision(graph, precision, excluded, path)
    return graph, details, notes


def _quantise(
    job: Job, graph: onnx.ModelProto, ranges: Mapping[str, float]
) -> tuple[onnx.ModelProto, dict[str, Any], tuple[str, ...]]:
    """The graph in INT8, what is to be recorded about it, and what to warn about."""
    config, calibration = job.config, job.calibration
    assert calibration is not None  # the plan sees to it
    largest = {name: ranges[name] for name in quantised_inputs(graph)}
    images = _graph_input(job, calibration.images)
    limits = activation_limits(graph, largest, images, config.calib_method)
    details: dict[str, Any] = {
        "calibration": {**calibration.record, "method": config.calib_method},
    }
    notes = calibration.warnings
    excluded = set(config.exclude)
    if config.int8_search:
        weight_bytes = 2 if job.plan.target == "gpu" else 4
        apart = _graph_input(job, calibration.apart)
        search = find_sensitive_layers(graph, limits, apart, excluded, weight_bytes)
        details["search"] = search.record()
        notes += (search.describe(),)
        excluded = excluded.union(search.left_out)
    details["excluded"] = sorted(excluded)
    return quantise(graph, limits, excluded), details, notes


def _graph_input(job: Job, images: UInt8Array) -> npt.NDArray[Any]:
    """Images as the graph takes them."""
    return normalise(images, job.source.spec) if job.config.float_input else images


def _provenance(job: Job, precision: str, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "precision": precision,
        "target": job.plan.target,
        "graph": job.source.provenance.graph or job.config.graph,
        "input": "float32 NCHW normalised" if job.config.float_input else "uint8 NHWC RGB",
        "weights": job.source.weights,
        "parent": {"file": job.source.path.name, "sha256": job.source.sha256},
        **details,
        "versions": versions(),
        "created": now(),
    }
