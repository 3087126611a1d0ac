"""Makes one artifact: the graph in a precision, or an engine of it; verified before it is named."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import onnx

from efficientface_deploy.artifact import FLOAT_INPUT, read_sidecar, sidecar_path, write_sidecar
from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.workbench.environment import now
from efficientface_export.folder import OutputFolder, failed_name
from efficientface_export.graph.io import read_onnx, write_onnx
from efficientface_export.graph.precision import require_fp16_range, require_precision, to_fp16
from efficientface_export.int8.calibration import Calibration
from efficientface_export.int8.qdq import ROUNDINGS, quantise, rounded_groups
from efficientface_export.int8.ranges import activation_limits, tensor_ranges
from efficientface_export.int8.sensitivity import find_sensitive_layers
from efficientface_export.options import ExportConfig
from efficientface_export.plan import Plan, request
from efficientface_export.source import Source
from efficientface_export.tensorrt import builder as engines
from efficientface_export.tensorrt.builder import build_progress
from efficientface_export.tensorrt.options import EngineOptions, Kind
from efficientface_export.verification.parity import Verification, verify_artifact
from efficientface_export.verification.provenance import Provenance
from efficientface_export.verification.reference import TestSet
from efficientface_export.verification.report import Row

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
        folder: Where the artifacts are made.
        reused: Precisions whose ONNX file is there already and is used as it is.
    """

    config: ExportConfig
    plan: Plan
    source: Source
    calibration: Calibration | None
    test_set: TestSet
    logits: Float32Array
    folder: OutputFolder
    reused: frozenset[str] = frozenset()


def make_onnx(job: Job, precision: str) -> tuple[Path, Row]:
    """Make and verify one ONNX file in the folder's scratch; one that is there is only verified.

    Returns:
        Where the file is, or will be when it is published; and its row. One that failed is called
        ``*.failed.onnx``.

    Raises:
        EfficientFaceError: It could not be made.
    """
    source, folder = job.source, job.folder
    path = job.plan.onnx_path(precision)
    if precision in job.reused:
        print(f"{path}: is there already, of the same weights, options and versions; not made anew")
        graph, _, record = read_onnx(path)
        verification = verify_artifact(path, job.logits, job.test_set, precision)
        provenance = Provenance(record, path)
        warnings = job.calibration.warnings if job.calibration and precision == "int8" else ()
        return path, _present_row(job, path, graph, provenance, verification, warnings)
    if source.is_onnx_in(precision):
        graph = source.trace(False)
        return source.path, _present_row(
            job, source.path, graph, source.provenance, source.verify()
        )

    candidate = folder.scratch / path.name
    graph, details, notes = _convert(job, precision, path)
    record = _record(job, precision, details)
    write_onnx(graph, candidate, source.spec, record)
    verification = verify_artifact(candidate, job.logits, job.test_set, precision)
    candidate.unlink()
    record["verification"] = verification.as_dict()
    name = failed_name(path.name) if verification.problems else path.name
    made = folder.scratch / name
    write_onnx(graph, made, source.spec, record)
    provenance = Provenance(record, made)
    row = Row.of(made, folder.scratch, provenance, provenance.arithmetic, verification, notes)
    return path.with_name(name), row


def make_engine(job: Job, parent: Path, precision: str) -> Row:
    """Build and verify one TensorRT engine of an ONNX file, in the folder's scratch.

    Returns:
        Its row; an engine that failed is called ``*.failed.engine``.

    Raises:
        EfficientFaceError: It could not be built.
    """
    config, scratch = job.config, job.folder.scratch
    options = EngineOptions(
        max_batch=config.max_batch,
        workspace_mib=config.workspace,
        compute_capabilities=config.compute_capabilities,
    )
    kind = cast(Kind, job.plan.engine)
    path = scratch / job.plan.engine_path(precision).name
    # The builder tells its log to Python, and swallows an interrupt that is raised there.
    with interrupts_wait(), build_progress(path.name) as progress:
        engines.write_engine(parent, path, kind, options, folder=job.plan.out, progress=progress)
    spec, record = read_sidecar(path)
    verification = verify_artifact(path, job.logits, job.test_set, precision)
    record["verification"] = verification.as_dict()
    write_sidecar(path, spec, record)
    if verification.problems:
        failed = path.with_name(failed_name(path.name))
        os.replace(sidecar_path(path), sidecar_path(failed))
        path = path.replace(failed)
    built = record["engine"]
    note = (
        f"{built['library']} {built['version']} for {', '.join(built['compute_capabilities'])}, "
        f"{built['kernels']} kernels, built in {built['build_seconds']:.1f} s"
    )
    provenance = Provenance(record, path)
    return Row.of(path, scratch, provenance, provenance.arithmetic, verification, [note])


def _present_row(
    job: Job,
    path: Path,
    graph: onnx.ModelProto,
    provenance: Provenance,
    verification: Verification,
    notes: Sequence[str] = (),
) -> Row:
    """The row of an ONNX file that is taken as it is."""
    arithmetic = require_precision(graph, provenance.precision, provenance.excluded, path)
    return Row.of(path, job.plan.out, provenance, arithmetic, verification, notes)


def _convert(
    job: Job, precision: str, path: Path
) -> tuple[onnx.ModelProto, dict[str, Any], tuple[str, ...]]:
    """The graph in one precision, what is to be recorded about it, and what to warn about."""
    config, source, calibration = job.config, job.source, job.calibration
    if job.plan.graph == "deploy" and source.lay_out is not None:
        graph = source.lay_out(config.float_input, job.plan.target)
    else:
        graph = source.trace(config.float_input)
    details: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if precision != "fp32":
        halves = precision == "fp16" or job.plan.target == "gpu"
        images = calibration.images if calibration else job.test_set.images[:_RANGE_IMAGES]
        ranges = tensor_ranges(graph, _graph_input(job, graph, images))
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
    rounding = ROUNDINGS[job.plan.target]
    groups = rounded_groups(graph, rounding)
    largest = {name: ranges[name] for group in groups for name in group.tensors}
    images = _graph_input(job, graph, calibration.images)
    limits = activation_limits(graph, largest, images, config.calib_method)
    details: dict[str, Any] = {}
    notes = calibration.warnings
    excluded = set(config.exclude)
    if config.int8_search:
        weight_bytes = 2 if job.plan.target == "gpu" else 4
        apart = _graph_input(job, graph, calibration.apart)
        search = find_sensitive_layers(graph, limits, rounding, apart, excluded, weight_bytes)
        details["search"] = search.record()
        notes += (search.describe(),)
        excluded = excluded.union(search.left_out)
    details["excluded"] = sorted(excluded)
    return quantise(graph, limits, rounding, excluded), details, notes


def _graph_input(job: Job, graph: onnx.ModelProto, images: UInt8Array) -> npt.NDArray[Any]:
    """Images as the graph takes them."""
    takes_floats = graph.graph.input[0].name == FLOAT_INPUT
    return normalise(images, job.source.spec) if takes_floats else images


def _record(job: Job, precision: str, details: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a file that is made now."""
    return {
        **request(job.config, job.plan, job.source, job.calibration, precision),
        "parent": {"file": job.source.path.name, "sha256": job.source.sha256},
        **details,
        "created": now(),
    }
