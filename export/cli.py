"""efficientface-export: checkpoint -> ONNX -> TensorRT engine, each verified.

Without --weights the newest student under runs/ is taken, else the bundled model.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

import efficientface_deploy
from efficientface_deploy.artifact import read_sidecar
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError, ExportError, VerificationError
from efficientface_deploy.spec import PRESETS

from . import engine as engines
from .calibrate import DEFAULT_COUNT, Calibration, load_calibration
from .graph import read_onnx, write_onnx
from .precision import (
    CALIBRATION_METHODS,
    PRECISIONS,
    quantise,
    require_fp16_range,
    require_precision,
    tensor_ranges,
    to_fp16,
)
from .report import Row, make_row, write_report
from .source import Source, open_source
from .verify import (
    TestSet,
    Verification,
    compare,
    load_test_set,
    read_reference,
    run_in_batches,
    verify_artifact,
    write_reference,
)

ENGINES = ("onnx", "trt", "trt-rtx", "auto")
ENGINE_SUFFIXES = {"trt": ".engine", "trt-rtx": ".rtx.engine"}

# Images on which FP16's range is measured when no calibration set is given.
_RANGE_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of ``efficientface-export``."""

    engine: str = option("auto", choices=ENGINES, help="what to make")
    weights: Path | None = option(None, help="checkpoint, or an ONNX file of ours")
    preset: str | None = option(
        None, choices=tuple(PRESETS), help="what a published checkpoint was trained on"
    )
    precision: str | None = option(
        None, choices=(*PRECISIONS, "all"), help="default: fp32 for onnx, fp16 for engines"
    )
    target: str | None = option(
        None,
        choices=("cpu", "gpu"),
        help="with int8 the rest is fp32 for cpu, fp16 for gpu; default: cpu for onnx",
    )
    float_input: bool = option(
        False, help="input float32 (N, 3, S, S), normalised, for toolchains without uint8"
    )
    calib: Path | None = option(None, help="training images, required for int8")
    calib_method: str = option(
        "minmax", choices=CALIBRATION_METHODS, help="how int8 ranges are chosen"
    )
    calib_images: int = option(DEFAULT_COUNT, minimum=1, help="how many calibration images")
    exclude: tuple[str, ...] = option(
        (), help="nodes that int8 leaves in higher precision", metavar="NODE"
    )
    val: Path | None = option(None, help="labelled data set to verify on and score accuracy")
    compute_capability: str = option(
        "", help="GPUs that an RTX engine is for, e.g. sm86,sm89", metavar="SM"
    )
    max_batch: int = option(32, minimum=1, help="largest batch of an engine")
    workspace: int | None = option(
        None, minimum=1, help="memory for building an engine", metavar="MIB"
    )
    out: Path = option(Path("artifacts"), help="folder of the artifacts")
    overwrite: bool = option(False, help="replace files that are there")
    require_verified: bool = option(
        False, help="fail when something cannot be verified on this machine"
    )
    seed: int = option(0, minimum=0, help="of the choice of calibration images")
    verify: Path | None = option(
        None, help="verify this artifact by the verify.npz beside it, and make nothing"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``efficientface-export``."""
    config = parse_config(
        ExportConfig, argv, prog="efficientface-export", description=__doc__ or ""
    )
    if config.verify is not None:
        return verify_command(config, config.verify)
    return export_command(config)


def entry_point() -> None:
    """Console script: runs :func:`main` and turns errors into one line and an exit code."""
    run_command(main)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call makes, decided before anything is written.

    Attributes:
        engine: ``onnx``, ``trt`` or ``trt-rtx``: what can be made here.
        target: ``cpu`` or ``gpu``.
        precisions: In the order in which they are made.
        missing: Why the engine that was asked for cannot be made here; empty when it can.
    """

    engine: str
    target: str
    precisions: tuple[str, ...]
    missing: str = ""

    def onnx_path(self, out: Path, precision: str) -> Path:
        """``efficientface-{precision}-{target}.onnx``."""
        return out / f"efficientface-{precision}-{self.target}.onnx"

    def engine_path(self, out: Path, precision: str) -> Path:
        """``efficientface-{precision}-{target}.engine`` or ``.rtx.engine``."""
        return out / f"efficientface-{precision}-{self.target}{ENGINE_SUFFIXES[self.engine]}"


def export_command(config: ExportConfig) -> int:
    """Make the artifacts that the options ask for, and verify each."""
    source = open_source(config.weights, config.preset)
    print(f"weights: {source.path} ({source.spec.name}, {source.spec.input_size} pixels)")
    plan = make_plan(config, source)
    _refuse_to_overwrite(config, plan, source)
    calibration = _calibration(config, plan, source)
    test_set, logits = source.reference_on(load_test_set(config.val, source.spec, config.preset))

    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for precision in plan.precisions:
        path, row = _make_onnx(config, plan, source, precision, calibration, test_set, logits)
        rows.append(row)
        _print_row(row)
        if plan.engine != "onnx" and not row.verification["problems"]:
            row = _make_engine(config, plan, path, precision, test_set, logits)
            rows.append(row)
            _print_row(row)
    write_reference(config.out, test_set, logits, source.weights["sha256"])
    write_report(config.out, rows, _header(source))
    print(f"report: {config.out / 'report.md'}")
    return _conclude(config, plan, rows)


def make_plan(config: ExportConfig, source: Source) -> Plan:
    """Decide what is made.

    Raises:
        ConfigError: The options contradict each other or the source.
    """
    engine, missing = config.engine, ""
    if engine == "auto":
        engine = next((kind for kind in ENGINE_SUFFIXES if not engines.available(kind)), "onnx")
        print(f"engine: {engine}, the best that this machine can make")
    elif engine in ENGINE_SUFFIXES and (reason := engines.available(engine)):
        missing = f"--engine {engine} cannot be made here: {reason}"
    target = config.target or source.target or ("cpu" if engine == "onnx" else "gpu")

    precision = config.precision
    if precision is None:
        precision = "fp32" if engine == "onnx" else "fp16"
        if source.precision != "fp32":
            precision = source.precision
    precisions = PRECISIONS if precision == "all" else (precision,)
    if source.precision != "fp32" and precisions != (source.precision,):
        raise ConfigError(
            f"--precision {precision}",
            expected=f"{source.precision}, which {source.path.name} is",
            found=precision,
            fix="give the FP32 file or the checkpoint as --weights",
        )
    if source.precision != "fp32" and target != source.target:
        raise ConfigError(
            f"--target {target}",
            expected=f"{source.target}, which {source.path.name} was made for",
            found=target,
            fix="leave --target out, or give the checkpoint as --weights",
        )
    if config.float_input and source.path.suffix == ".onnx":
        raise ConfigError(
            "--float-input",
            expected="a checkpoint as --weights",
            found=source.path.name,
            fix="give the checkpoint that the ONNX file was made from",
        )
    if missing:
        return Plan("onnx", target, precisions, missing)
    return Plan(engine, target, precisions)


def _calibration(config: ExportConfig, plan: Plan, source: Source) -> Calibration | None:
    """The calibration images, where they are needed."""
    needed = "int8" in plan.precisions and source.precision == "fp32"
    if config.calib is None:
        if not needed:
            return None
        raise ConfigError(
            "--calib",
            expected="a folder of training images for INT8",
            found="none",
            fix="give the data set that the network was trained on, e.g. --calib RAF-DB",
        )
    return load_calibration(config.calib, source.spec, config.calib_images, config.seed)


def _make_onnx(
    config: ExportConfig,
    plan: Plan,
    source: Source,
    precision: str,
    calibration: Calibration | None,
    test_set: TestSet,
    logits: Any,
) -> tuple[Path, Row]:
    """Make, verify and write one ONNX file; an ONNX source of this precision is only verified."""
    notes = calibration.warnings if calibration is not None and precision == "int8" else ()
    if source.path.suffix == ".onnx" and source.precision == precision:
        arithmetic = require_precision(source.trace(False), precision, None, source.path)
        verification = verify_artifact(source.path, logits, test_set, precision)
        return source.path, make_row(source.path, precision, arithmetic, verification)

    path = plan.onnx_path(config.out, precision)
    graph, details = _convert(config, plan, source, precision, calibration, test_set, path)
    provenance = _provenance(config, plan, source, precision, details)
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".verifying-") as folder:
        candidate = Path(folder, path.name)
        write_onnx(graph, candidate, source.spec, provenance)
        verification = verify_artifact(candidate, logits, test_set, precision)
    if verification.problems:
        path = path.with_name(path.stem + ".failed.onnx")
    provenance["verification"] = verification.as_dict()
    write_onnx(graph, path, source.spec, provenance)
    return path, make_row(path, precision, details["arithmetic"], verification, notes)


def _convert(
    config: ExportConfig,
    plan: Plan,
    source: Source,
    precision: str,
    calibration: Calibration | None,
    test_set: TestSet,
    path: Path,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph in one precision, and what is to be recorded about it."""
    graph = source.trace(config.float_input)
    details: dict[str, Any] = {}
    measured = calibration.images if calibration is not None else test_set.images[:_RANGE_IMAGES]
    inputs = _graph_inputs(config, source, measured)
    if precision == "fp16" or (precision == "int8" and plan.target == "gpu"):
        tensor, largest = require_fp16_range(tensor_ranges(graph, inputs), path)
        details["largest_fp32_value"] = {"tensor": tensor, "magnitude": largest}
    if precision == "int8":
        assert calibration is not None
        graph = quantise(graph, inputs, config.calib_method, config.exclude)
        details["calibration"] = {**calibration.record, "method": config.calib_method}
        details["excluded"] = list(config.exclude)
    if "largest_fp32_value" in details:
        graph = to_fp16(graph)
    details["arithmetic"] = require_precision(graph, precision, len(config.exclude), path)
    return graph, details


def _graph_inputs(config: ExportConfig, source: Source, images: Any) -> Any:
    """Images as the graph takes them."""
    if not config.float_input:
        return images
    from efficientface_deploy.preprocess import normalise

    return normalise(images, source.spec)


def _make_engine(
    config: ExportConfig, plan: Plan, parent: Path, precision: str, test_set: TestSet, logits: Any
) -> Row:
    """Build and verify one TensorRT engine from a verified ONNX file."""
    path = plan.engine_path(config.out, precision)
    options = engines.EngineOptions(
        max_batch=config.max_batch,
        workspace_mib=config.workspace,
        compute_capabilities=tuple(filter(None, config.compute_capability.split(","))),
    )
    engines.write_engine(parent, path, plan.engine, options, overwrite=config.overwrite)
    _, provenance = read_sidecar(path)
    built = provenance["engine"]
    verification = verify_artifact(path, logits, test_set, precision)
    note = (
        f"{built['library']} {built['version']} for {', '.join(built['compute_capabilities'])}, "
        f"{built['kernels']} kernels, built in {built['build_seconds']:.1f} s"
    )
    return make_row(path, precision, provenance["arithmetic"], verification, [note])


def verify_command(config: ExportConfig, path: Path) -> int:
    """Verify one artifact later, perhaps on another machine, by its reference outputs."""
    if path.suffix == ".onnx":
        _, spec, provenance = read_onnx(path)
    else:
        spec, provenance = read_sidecar(path)
    precision = str(provenance.get("precision", "fp32"))
    weights = provenance.get("weights", {}).get("sha256")
    test_set, logits = read_reference(path.parent, weights)
    results = [verify_artifact(path, logits, test_set, precision)]
    if config.val is not None:
        results.append(_score(path, config, spec))
    for verification in results:
        _print_row(make_row(path, precision, str(provenance.get("arithmetic", "")), verification))
    if results[0].problems:
        raise _failed([path.name])
    if results[0].not_run:
        raise ExportError(
            path,
            expected="a backend that can run it",
            found=results[0].not_run,
            fix="verify it on the machine that it was built for",
        )
    return 0


def _score(path: Path, config: ExportConfig, spec: Any) -> Verification:
    """Accuracy on a labelled set; its reference is the artifact itself."""
    test_set = load_test_set(config.val, spec, config.preset)
    with efficientface_deploy.load(path) as predictor:
        images = test_set.images
        logits = run_in_batches(lambda batch: predictor.infer(batch)[0], images)
        probabilities = run_in_batches(lambda batch: predictor.infer(batch)[1], images)
        return compare(probabilities, logits, test_set, "int8", predictor.backend)


def _refuse_to_overwrite(config: ExportConfig, plan: Plan, source: Source) -> None:
    paths = [plan.onnx_path(config.out, precision) for precision in plan.precisions]
    if plan.engine != "onnx":
        paths += [plan.engine_path(config.out, precision) for precision in plan.precisions]
    taken = [path for path in paths if path.exists() and path != source.path]
    if any(path.resolve() == source.path.resolve() for path in paths):
        taken = [path for path in taken if path.resolve() != source.path.resolve()]
    if taken and not config.overwrite:
        raise ConfigError(
            taken[0],
            expected="no such file yet",
            found="an earlier export",
            fix="add --overwrite, or choose another --out",
        )
    if config.out.exists() and not config.out.is_dir():
        raise ConfigError(
            config.out, expected="a folder", found="a file", fix="choose another --out"
        )


def _provenance(
    config: ExportConfig, plan: Plan, source: Source, precision: str, details: dict[str, Any]
) -> dict[str, Any]:
    return {
        "precision": precision,
        "target": plan.target,
        "graph": "plain",
        "input": "float32 NCHW normalised" if config.float_input else "uint8 NHWC RGB",
        "weights": source.weights,
        "parent": {"file": source.path.name, "sha256": source.sha256},
        **details,
        "versions": _versions(),
        "created": _now(),
    }


def _header(source: Source) -> dict[str, Any]:
    spec = source.spec
    return {
        "weights": source.weights["file"],
        "weights_sha256": source.weights["sha256"],
        "model": f"{spec.architecture}, {spec.name}, {spec.num_classes} classes, "
        f"{spec.input_size}x{spec.input_size}" + (", preliminary" if spec.preliminary else ""),
        "versions": _versions(),
        "created": _now(),
    }


def _versions() -> dict[str, str]:
    versions = {
        "efficientface_deploy": efficientface_deploy.__version__,
        "python": platform.python_version(),
    }
    for package in ("torch", "onnx", "onnxruntime", "onnxconverter-common"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _print_row(row: Row) -> None:
    result = row.verification
    mark = {"verified": "ok", "FAILED": "FAILED"}.get(result["status"], "--")
    line = f"[{mark}] {row.file}: {row.bytes / 1e6:.2f} MB, {row.arithmetic}; {result['status']}"
    if result["images"]:
        line += (
            f" on {result['source']} by {result['runner']}: largest difference "
            f"{result['max_difference']:.2g}, agreement {result['agreement']:.4f}, "
            f"KL {result['kl']:.2g}"
        )
    if result["accuracy"] is not None:
        line += f", accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}"
    if detail := result["not_run"] or "; ".join(result["problems"]):
        line += f" ({detail})"
    print(line)
    for note in row.notes:
        print(f"     {note}")


def _conclude(config: ExportConfig, plan: Plan, rows: list[Row]) -> int:
    """The exit code: a failed verification, an engine that could not be made, or success."""
    if failed := [row.file for row in rows if row.verification["problems"]]:
        raise _failed(failed)
    unverified = [row.file for row in rows if row.verification["not_run"]]
    if unverified and config.require_verified:
        raise ExportError(
            ", ".join(unverified),
            expected="verification, as --require-verified asks",
            found="no backend here that can run it",
            fix="verify it on the device with efficientface-export --verify FILE",
        )
    if plan.missing:
        made = plan.onnx_path(config.out, plan.precisions[0])
        print(
            f"{plan.missing}\n"
            f"  on the device:   efficientface-export --weights {made.name} --engine trt\n"
            f"  for RTX, here:   efficientface-export --weights {made} --engine trt-rtx"
        )
        raise ExportError(
            f"--engine {config.engine}",
            expected="an engine",
            found=f"the verified {made} only",
            fix="finish with one of the commands above",
        )
    return 0


def _failed(names: list[str]) -> VerificationError:
    return VerificationError(
        ", ".join(names),
        expected="outputs like the reference network's",
        found="others",
        fix="see report.md; try --precision fp32, --exclude, or more calibration images",
    )


if __name__ == "__main__":
    entry_point()
