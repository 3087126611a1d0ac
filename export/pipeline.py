"""What ``efficientface-export`` does: make artifacts, verify each, and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficientface_deploy.backends.tensorrt.library import rebuild_command
from efficientface_deploy.errors import ArtifactError, ConfigError, ExportError
from efficientface_export.folder import open_folder
from efficientface_export.int8.calibration import Calibration, load_calibration
from efficientface_export.int8.sensitivity import SEARCH_IMAGES
from efficientface_export.make import Job, make_engine, make_onnx
from efficientface_export.options import ExportConfig
from efficientface_export.plan import Plan, check_folder, make_plan
from efficientface_export.source import Source, open_source
from efficientface_export.verification.parity import wrong_outputs
from efficientface_export.verification.reference import read_reference, write_reference
from efficientface_export.verification.report import MARKDOWN_FILE, Row, report_header, write_report


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
    if source.spec.architecture != "efficientface":
        print(f"note: its artifacts are called efficientface, and are a {source.spec.architecture}")
    plan = make_plan(config, source)
    _check_something_to_make(plan, source)
    rows: list[Row] = []
    made: list[Path] = []
    with open_folder(plan.out) as folder:
        calibration = _calibration(config, plan, source)
        reused = check_folder(config, plan, source, calibration)
        reference = source.reference(config.val, config.preset)
        job = Job(config, plan, source, calibration, *reference, folder, reused)
        for precision in plan.precisions:
            path, row = make_onnx(job, precision)
            made.append(path)
            _publish(rows, row, job)
            if plan.engine != "onnx" and not row.verification.problems:
                _publish(rows, make_engine(job, path, precision), job)
    print(f"report: {plan.out / MARKDOWN_FILE}")
    _conclude(config, plan, rows, made)
    return 0


def _check_something_to_make(plan: Plan, source: Source) -> None:
    """Refuse to make an ONNX file of one that is what was asked for.

    Raises:
        ConfigError: Nothing would be made.
    """
    if plan.engine == "onnx" and not plan.missing and source.is_onnx_in(plan.precisions[-1]):
        raise ConfigError(
            "--engine onnx",
            "a checkpoint, or another --precision than the file's",
            f"{source.path}, an ONNX file in {source.precision}",
            f"use it as it is (--verify {source.path} checks it); for a checkpoint "
            "pip install 'efficientface-deploy[export,cpu]'",
        )


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


def _publish(rows: list[Row], row: Row, job: Job) -> None:
    """Give an artifact its name, with its reference and the report; then what follows may fail."""
    rows.append(row)
    source, folder = job.source, job.folder
    if not _has_reference(job):
        write_reference(folder.scratch, job.test_set, job.logits, source.weights["sha256"])
    header = report_header(source.weights, source.spec)
    write_report(folder.path, rows, header, into=folder.scratch)
    folder.publish()
    print(row.describe(), flush=True)


def _has_reference(job: Job) -> bool:
    """Whether the folder's own ``verify.npz`` serves: of this model, and nobody asks for another.

    It may hold a data set's images, where a later call without ``--val`` has synthetic ones.
    """
    if job.config.val is not None or job.config.overwrite:
        return False
    try:
        read_reference(job.folder.path, job.source.spec, job.source.weights["sha256"])
    except ArtifactError:
        return False
    return True


def _conclude(config: ExportConfig, plan: Plan, rows: Sequence[Row], made: Sequence[Path]) -> None:
    """Say what is missing of what was asked for, by an error."""
    if failed := [row.file for row in rows if row.verification.problems]:
        fix = f"see {plan.out / MARKDOWN_FILE}; try --precision fp32, --exclude, or another --calib"
        raise wrong_outputs(failed, fix)
    unverified = [row.file for row in rows if row.verification.not_run]
    if unverified and config.require_verified:
        raise ExportError(
            ", ".join(unverified),
            "verification, as --require-verified asks",
            "no backend here that can run it",
            "verify it on the device with efficientface-export --verify FILE",
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
            "an engine",
            "the ONNX file only: " + ", ".join(map(str, made)),
            "finish with one of the commands above",
        )


def _finish(kind: str, weights: Path, config: ExportConfig, precision: str) -> str:
    """The command that makes the engine of an ONNX file that is there."""
    targets = config.compute_capabilities if kind == "trt-rtx" else ()
    return rebuild_command(
        kind, weights, config.max_batch, precision=precision, compute_capabilities=targets
    )
