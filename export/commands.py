"""The two things that ``efficientface-export`` does: make artifacts, or verify one again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import read_sidecar
from efficientface_deploy.backends.tensorrt import rebuild_command
from efficientface_deploy.errors import ExportError, VerificationError

from .calibrate import Calibration, load_calibration
from .config import ExportConfig
from .graph import read_onnx
from .make import Job, make_engine, make_onnx
from .plan import Plan, make_plan
from .precision import require_precision
from .provenance import Provenance, now, versions
from .report import MARKDOWN_FILE, Row, write_report
from .sensitivity import SEARCH_IMAGES
from .source import Source, open_source
from .verify import (
    load_test_set,
    read_reference,
    score_artifact,
    verify_artifact,
    write_reference,
)


def export_command(config: ExportConfig) -> int:
    """Make the artifacts that the options ask for, and verify each.

    Returns:
        0.

    Raises:
        VerificationError: An artifact computes something else; it is kept as ``*.failed.*``.
        EfficientFaceError: The options or files are unusable, or the engine that was asked for
            cannot be made here.
    """
    source = open_source(config.weights, config.preset, config.input_size)
    size = f"{source.spec.input_size}x{source.spec.input_size}"
    print(f"weights: {source.path} ({source.spec.name}, {size})")
    plan = make_plan(config, source)
    calibration = _calibration(config, plan, source)
    job = Job(config, plan, source, calibration, *source.reference(config.val, config.preset))

    plan.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    made: list[Path] = []
    for precision in plan.precisions:
        path, row = make_onnx(job, precision)
        made.append(path)
        _add(rows, row, job)
        if plan.engine != "onnx" and not row.verification.problems:
            _add(rows, make_engine(job, path, precision), job)
    print(f"report: {plan.out / MARKDOWN_FILE}")
    _conclude(config, plan, rows, made)
    return 0


def verify_command(config: ExportConfig, path: Path) -> int:
    """Verify one artifact later, perhaps on another machine, by its reference outputs.

    Returns:
        0.

    Raises:
        VerificationError: It computes something else.
        EfficientFaceError: A file is unusable, or nothing here can run the artifact.
    """
    if path.suffix == ".onnx":
        graph, spec, record = read_onnx(path)
        provenance = Provenance(record, path)
        require_precision(graph, provenance.precision, provenance.excluded, path)
    else:
        spec, record = read_sidecar(path)
        provenance = Provenance(record, path)
    weights = provenance.weights or {}
    test_set, logits = read_reference(path.parent, spec, weights.get("sha256"))
    verification = verify_artifact(path, logits, test_set, provenance.precision)
    row = Row.of(path, path.parent, provenance.precision, provenance.arithmetic, verification)
    print(row.describe())
    if verification.problems:
        raise _wrong_outputs([row.file], "export it again")
    if verification.not_run:
        raise ExportError(
            path,
            expected="a backend that can run it",
            found=verification.not_run,
            fix="verify it on the machine that it was built for",
        )
    if config.val is not None:
        labelled = load_test_set(config.val, spec, config.preset)
        scores = score_artifact(path, labelled)
        print(
            f"     {labelled.source}: accuracy {scores['accuracy']:.4f}, "
            f"macro-F1 {scores['macro_f1']:.4f}"
        )
    return 0


def _calibration(config: ExportConfig, plan: Plan, source: Source) -> Calibration | None:
    if config.calib is None:
        return None
    apart = SEARCH_IMAGES if config.int8_search and "int8" in plan.precisions else 0
    calibration = load_calibration(
        config.calib, source.spec, config.calib_images, config.seed, apart
    )
    record = calibration.record
    print(f"calibration: {record['count']} images of {record['dataset']} ({record['split']})")
    return calibration


def _add(rows: list[Row], row: Row, job: Job) -> None:
    """Report an artifact as soon as it is there: what comes next may fail."""
    rows.append(row)
    print(row.describe(), flush=True)
    write_reference(job.plan.out, job.test_set, job.logits, job.source.weights["sha256"])
    write_report(job.plan.out, rows, _header(job.source))


def _header(source: Source) -> dict[str, Any]:
    spec = source.spec
    return {
        "weights": source.weights["file"],
        "weights_sha256": source.weights["sha256"],
        "model": f"{spec.architecture}, {spec.name}, {spec.num_classes} classes, "
        f"{spec.input_size}x{spec.input_size}" + (", preliminary" if spec.preliminary else ""),
        "versions": versions(),
        "created": now(),
    }


def _conclude(config: ExportConfig, plan: Plan, rows: Sequence[Row], made: Sequence[Path]) -> None:
    """Say what is missing of what was asked for, by an error."""
    if failed := [row.file for row in rows if row.verification.problems]:
        fix = f"see {plan.out / MARKDOWN_FILE}; try --precision fp32, --exclude, or another --calib"
        raise _wrong_outputs(failed, fix)
    unverified = [row.file for row in rows if row.verification.not_run]
    if unverified and config.require_verified:
        raise ExportError(
            ", ".join(unverified),
            expected="verification, as --require-verified asks",
            found="no backend here that can run it",
            fix="verify it on the device with efficientface-export --verify FILE",
        )
    if plan.missing:
        print(plan.missing)
        for path, precision in zip(made, plan.precisions, strict=True):
            print(f"  on the device, with {path.name} and verify.npz beside it:")
            print("    " + _finish("trt", Path(path.name), config, precision))
            print("  for RTX, on any machine:")
            print("    " + _finish("trt-rtx", path, config, precision))
        raise ExportError(
            f"--engine {config.engine}",
            expected="an engine",
            found="the ONNX file only: " + ", ".join(map(str, made)),
            fix="finish with one of the commands above",
        )


def _finish(kind: str, weights: Path, config: ExportConfig, precision: str) -> str:
    """The command that makes the engine of an ONNX file that is there."""
    targets = config.compute_capabilities if kind == "trt-rtx" else ()
    return rebuild_command(
        kind, weights, config.max_batch, precision=precision, compute_capabilities=targets
    )


def _wrong_outputs(names: Sequence[str], fix: str) -> VerificationError:
    return VerificationError(
        ", ".join(names),
        expected="outputs like the reference network's",
        found="others",
        fix=fix,
    )
