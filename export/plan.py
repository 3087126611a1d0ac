"""What one call makes, decided before anything is read at length or written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

from efficientface_deploy.errors import ConfigError

from . import engine as engines
from .config import PRECISIONS, ExportConfig
from .source import Source
from .verify import stored_parent


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call makes.

    Attributes:
        out: Folder of the artifacts.
        engine: ``onnx``, ``trt`` or ``trt-rtx``: what can be made here.
        target: ``cpu`` or ``gpu``.
        precisions: In the order in which they are made.
        missing: Why the engine that was asked for cannot be made here; empty when it can.
    """

    out: Path
    engine: str
    target: str
    precisions: tuple[str, ...]
    missing: str = ""

    def onnx_path(self, precision: str) -> Path:
        """``efficientface-{precision}-{target}.onnx``."""
        return self.out / f"efficientface-{precision}-{self.target}.onnx"

    def engine_path(self, precision: str) -> Path:
        """``efficientface-{precision}-{target}.engine`` or ``.rtx.engine``."""
        suffix = engines.SUFFIXES[self.engine]
        return self.out / f"efficientface-{precision}-{self.target}{suffix}"


def make_plan(config: ExportConfig, source: Source) -> Plan:
    """Decide what is made.

    Raises:
        ConfigError: The options contradict each other, the source, or what is in the folder.
    """
    engine, missing = _choose_engine(config)
    target = _choose_target(config, source, engine)
    precisions = _choose_precisions(config, source, engine)
    _check_options(config, source, precisions)
    _check_deploy(config, source)
    plan = Plan(config.out, "onnx" if missing else engine, target, precisions, missing)
    if plan.out.exists() and not plan.out.is_dir():
        raise ConfigError(plan.out, expected="a folder", found="a file", fix="choose another --out")
    if not config.overwrite:
        _check_folder(plan, source)
    return plan


def _choose_engine(config: ExportConfig) -> tuple[str, str]:
    """The engine, and why it cannot be made here."""
    engine = config.engine
    if engine == "auto":
        kinds = engines.SUFFIXES if config.target != "cpu" else ()
        engine = next((kind for kind in kinds if not _why_not(kind)), "onnx")
        print(f"engine: {engine}, the best that this machine can make")
        return engine, ""
    if engine == "onnx":
        return engine, ""
    if config.target == "cpu":
        raise ConfigError(
            "--target cpu",
            expected=f"gpu with --engine {engine}",
            found="cpu",
            fix="leave --target out, or use --engine onnx",
        )
    reason = _why_not(engine)
    return engine, f"--engine {engine} cannot be made here: {reason}" if reason else ""


def _why_not(engine: str) -> str | None:
    """Why an engine cannot be made here; None when it can."""
    return engines.available(cast(engines.Kind, engine))


def _choose_target(config: ExportConfig, source: Source, engine: str) -> str:
    if source.precision == "fp32":
        return config.target or ("cpu" if engine == "onnx" else "gpu")
    if config.target not in (None, source.target):
        raise ConfigError(
            f"--target {config.target}",
            expected=f"{source.target}, which {source.path.name} was made for",
            found=str(config.target),
            fix="leave --target out, or give the checkpoint as --weights",
        )
    return source.target


def _choose_precisions(config: ExportConfig, source: Source, engine: str) -> tuple[str, ...]:
    if source.precision != "fp32":
        if config.precision not in (None, source.precision):
            raise ConfigError(
                f"--precision {config.precision}",
                expected=f"{source.precision}, which {source.path.name} is",
                found=str(config.precision),
                fix="give the FP32 file or the checkpoint as --weights",
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
                    expected="a checkpoint as --weights",
                    found=source.path.name,
                    fix="give the checkpoint that the ONNX file was made from",
                )
    quantises = "int8" in precisions and source.precision == "fp32"
    if quantises and config.calib is None:
        raise ConfigError(
            "--calib",
            expected="a folder of training images for INT8",
            found="none",
            fix="give the data set that the network was trained on, e.g. --calib RAF-DB",
        )
    if config.exclude and not quantises:
        raise ConfigError(
            "--exclude",
            expected="--precision int8, and an FP32 source",
            found=", ".join(precisions),
            fix="leave --exclude out",
        )


def _check_deploy(config: ExportConfig, source: Source) -> None:
    """Refuse a deploy graph where there is none."""
    if config.graph == "deploy" and source.lay_out is None:
        raise ConfigError(
            "--graph deploy",
            expected="an EfficientFace checkpoint as --weights",
            found=f"{source.path.name}, {source.spec.architecture}"
            + (" as ONNX" if source.is_onnx else ""),
            fix="leave --graph out"
            + (": the file keeps the graph that it has" if source.is_onnx else ""),
        )


def _check_folder(plan: Plan, source: Source) -> None:
    """Refuse to replace files, or to mix artifacts of different weights in one folder."""
    paths = [plan.onnx_path(made) for made in plan.precisions if not source.is_onnx_in(made)]
    if plan.engine != "onnx":
        paths += [plan.engine_path(precision) for precision in plan.precisions]
    for path in paths:
        if path.exists():
            raise ConfigError(
                path,
                expected="no such file yet",
                found="an earlier export",
                fix="add --overwrite, or choose another --out",
            )
    parent = stored_parent(plan.out)
    if parent not in (None, source.weights["sha256"]):
        raise ConfigError(
            plan.out,
            expected="artifacts of the same weights, or none",
            found="artifacts of others",
            fix="add --overwrite, or choose another --out",
        )
