"""Every decision of one call: what is made of what, where, and what is there already."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from efficientface_deploy.errors import (
    ArtifactError,
    ConfigError,
    EfficientFaceError,
    install_command,
)
from efficientface_deploy.files import check_new_folder
from efficientface_deploy.tuned import TUNED_KEY
from efficientface_deploy.workbench.environment import versions
from efficientface_export.graph.io import OnnxFile, read_onnx
from efficientface_export.int8.calibration import Calibration, choose_calibration
from efficientface_export.int8.qdq import SCHEMES
from efficientface_export.int8.sensitivity import SEARCH_IMAGES
from efficientface_export.options import ExportConfig
from efficientface_export.source import Source
from efficientface_export.tensorrt import builder as engines
from efficientface_export.tensorrt.options import SUFFIXES, EngineKind, EngineOptions
from efficientface_export.tune import FEWEST_SECONDS, File, Runner, find_runners, pair
from efficientface_export.verification.provenance import PRECISIONS
from efficientface_export.verification.reference import read_reference, stored_parent
from efficientface_export.verification.report import report_header, reports_other_model


@dataclasses.dataclass(frozen=True)
class Step:
    """One artifact.

    Attributes:
        engine: ``onnx``, ``trt`` or ``trt-rtx``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        path: Where it is to be, or is.
        present: What an ONNX file holds that is used as it is; None for one that is made.
    """

    engine: str
    precision: str
    path: Path
    present: OnnxFile | None = None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What ``--tune`` chooses among, beside the precisions of the steps.

    Attributes:
        objective: ``latency`` or ``throughput``.
        seconds: For measuring.
        graphs: ``deploy``, ``wide``, ``plain``.
        runners: What runs the files.
        absent: What is not among the candidates, and why.
    """

    objective: str
    seconds: float
    graphs: tuple[str, ...]
    runners: tuple[Runner, ...]
    absent: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call makes; nothing below it sees the options.

    Attributes:
        out: Folder of the artifacts.
        asked: The engine that was asked for.
        target: ``cpu`` or ``gpu``.
        graph: ``plain``, ``deploy`` or ``wide``; what an ONNX source records.
        missing: Why the engine that was asked for cannot be made here; empty when it can.
        float_input: Whether the graph takes float32 (N, 3, S, S), normalised.
        features: Whether the graph gives features, too.
        calibration: Images for INT8's ranges; None where none are given.
        calib_method: How ranges are chosen from them.
        exclude: Layers that INT8 leaves out in any case.
        int8_search: Whether layers that INT8 hurts most are searched for, and left out.
        engine_options: How engines are built.
        val: Labelled data set to verify on, or None.
        preset: What its numbered folders mean.
        keeps_reference: Whether the folder's own ``verify.npz`` stays.
        require_verified: Whether what cannot be verified here is an error.
        requests: What decides the content of an ONNX file, for each precision, as its provenance
            records it. Files of equal requests, and of one spec, are equal.
        steps: The artifacts in order; an engine comes after its ONNX file.
        tuning: How one of them is chosen; None where all are wanted.
    """

    out: Path
    asked: str
    target: str
    graph: str
    missing: str
    float_input: bool
    features: bool
    calibration: Calibration | None
    calib_method: str
    exclude: frozenset[str]
    int8_search: bool
    engine_options: EngineOptions
    val: Path | None
    preset: str | None
    keeps_reference: bool
    require_verified: bool
    requests: Mapping[str, Mapping[str, Any]]
    steps: tuple[Step, ...]
    tuning: Tuning | None = None

    def laid_out(self, graph: str) -> Plan:
        """The same with files of another graph."""
        requests = {name: {**request, "graph": graph} for name, request in self.requests.items()}
        return dataclasses.replace(self, graph=graph, requests=requests)


def resolve(options: ExportConfig, source: Source) -> Plan:
    """Decide what is made.

    Without ``--overwrite`` an ONNX file that is there is used as it is when it is what would be
    made; nothing else that is there is touched.

    Raises:
        ConfigError: The options contradict each other or the source, a file is in the way, or the
            folder's artifacts are of another model.
        DatasetError: The calibration set is unusable.
    """
    asked, missing = _choose_engine(options)
    engine_options = _engine_options(options, asked, missing)
    engine = "onnx" if missing else asked
    target = _choose_target(options, source, asked)
    precisions = _choose_precisions(options, source, asked)
    graph = _choose_graph(options, source, target)
    if graph == "wide" and "int8" in precisions:
        fix = "leave --graph out (INT8 has no blocks to widen), or give --precision fp32 or fp16"
        raise ConfigError("the graph wide", "FP32 or FP16", "INT8", fix)
    _check_options(options, source, precisions)
    tuning = _choose_tuning(options, source, engine, target, graph, precisions, missing)
    if options.web is not None:
        _check_web(options, engine, precisions)
    elif engine == "onnx" and not missing and not tuning and source.is_onnx_in(precisions[-1]):
        raise _nothing_to_make(source)
    calibration = _choose_calibration(options, source, precisions)
    requests = {
        precision: _request(options, source, target, graph, calibration, precision)
        for precision in precisions
    }
    if not options.overwrite:
        _check_model(options.out, source)
    steps = []
    for precision in precisions:
        stem = options.out / f"efficientface-{precision}-{target}"
        steps.append(_onnx_step(options, source, Path(f"{stem}.onnx"), requests[precision]))
        if engine != "onnx":
            path = Path(f"{stem}{SUFFIXES[engine]}")
            if path.exists() and not options.overwrite:
                raise _in_the_way(path, "an earlier export")
            steps.append(Step(engine, precision, path))
    return Plan(
        out=options.out,
        asked=options.engine,
        target=target,
        graph=graph,
        missing=missing,
        float_input=options.float_input,
        features=options.features or source.gives_features,
        calibration=calibration,
        calib_method=options.calib_method,
        exclude=frozenset(options.exclude),
        int8_search=options.int8_search,
        engine_options=engine_options,
        val=options.val,
        preset=options.preset,
        keeps_reference=_keeps_reference(options, source),
        require_verified=options.require_verified,
        requests=requests,
        steps=tuple(steps),
        tuning=tuning,
    )


def _choose_engine(options: ExportConfig) -> tuple[str, str]:
    """The engine, and why it cannot be made here."""
    engine = options.engine
    if engine == "auto":
        kinds = [*SUFFIXES] if options.target != "cpu" and options.web is None else []
        if options.tune:  # among what runs here, and TensorRT for RTX compiles without a GPU
            kinds = kinds[: kinds.index("trt") + 1] if kinds else []
        engine = next((kind for kind in kinds if not _why_not(kind)), "onnx")
        print(f"engine: {engine}, the best that this machine can make")
        return engine, ""
    if engine == "onnx":
        return engine, ""
    if options.target == "cpu":
        fix = "leave --target out, or use --engine onnx"
        raise ConfigError("--target cpu", f"gpu with --engine {engine}", "cpu", fix)
    reason = _why_not(engine)
    return engine, f"--engine {engine} cannot be made here: {reason}" if reason else ""


def _why_not(engine: str) -> str | None:
    """Why an engine cannot be made here; None when it can."""
    return engines.available(cast(EngineKind, engine))


def _engine_options(options: ExportConfig, engine: str, missing: str) -> EngineOptions:
    """Refuse GPUs and sizes that no builder takes, before anything is made for it."""
    names = options.compute_capabilities
    found = EngineOptions(
        max_batch=options.max_batch or EngineOptions.max_batch,
        workspace_mib=options.workspace,
        compute_capabilities=names,
    )
    if names and engine != "trt-rtx":
        expected = "--engine trt-rtx, which alone is told what to build for"
        fix = "leave it out, or use --engine trt-rtx"
        raise ConfigError("--compute-capability", expected, f"--engine {engine}", fix)
    if names and not missing:
        engines.check_targets("trt-rtx", names)
    return found


def _choose_target(options: ExportConfig, source: Source, engine: str) -> str:
    if source.precision == "fp32":
        return options.target or ("gpu" if engine != "onnx" else source.target or "cpu")
    if options.target not in (None, source.target):
        expected = f"{source.target}, which {source.path.name} was made for"
        fix = "leave --target out, or give the checkpoint as --weights"
        raise ConfigError(f"--target {options.target}", expected, str(options.target), fix)
    return source.target


def _choose_precisions(options: ExportConfig, source: Source, engine: str) -> tuple[str, ...]:
    asked = options.precision
    if source.precision != "fp32":
        if asked not in (None, source.precision):
            expected = f"{source.precision}, which {source.path.name} is"
            fix = "give the FP32 file or the checkpoint as --weights"
            raise ConfigError(f"--precision {asked}", expected, str(asked), fix)
        return (source.precision,)
    if asked == "all":
        return PRECISIONS
    if options.tune and asked is None:
        return PRECISIONS if options.calib else ("fp32", "fp16")
    return (asked or ("fp32" if engine == "onnx" else "fp16"),)


def _check_options(options: ExportConfig, source: Source, precisions: tuple[str, ...]) -> None:
    """Refuse what would have to be ignored."""
    resized = options.input_size is not None
    for name, given in (("--float-input", options.float_input), ("--input-size", resized)):
        if given and source.is_onnx:
            fix = "give the checkpoint that the ONNX file was made from"
            raise ConfigError(name, "a checkpoint as --weights", source.path.name, fix)
    if options.features and source.is_onnx and not source.gives_features:
        expected = "a checkpoint, or an ONNX file that has them, as --weights"
        fix = "give the checkpoint that the ONNX file was made from"
        raise ConfigError("--features", expected, source.path.name, fix)
    quantises = "int8" in precisions and source.precision == "fp32"
    if quantises and options.calib is None:
        fix = "give the data set that the network was trained on, e.g. --calib RAF-DB"
        raise ConfigError("--calib", "a folder of training images for INT8", "none", fix)
    if options.calib is not None and precisions == ("fp32",):
        expected = "--precision int8, fp16 or all, whose ranges are measured on it"
        raise ConfigError("--calib", expected, "fp32", "leave --calib out, or add --precision int8")
    if "sm75" in options.compute_capabilities and {*precisions} - {"fp16"}:
        expected = "--precision fp16 for sm75, all that TensorRT for RTX has there"
        fix = "leave sm75 out, or use --precision fp16"
        raise ConfigError("--compute-capability", expected, ", ".join(precisions), fix)
    if options.exclude and not quantises:
        expected = "--precision int8, and an FP32 source"
        raise ConfigError("--exclude", expected, ", ".join(precisions), "leave --exclude out")


def _check_web(options: ExportConfig, engine: str, precisions: tuple[str, ...]) -> None:
    """Refuse what a browser does not run, or not well."""
    fix = "leave --web out, or export what the page needs by another call"
    for name, given, expected in (
        ("--float-input", options.float_input, "none with --web, whose page gives uint8 pixels"),
        ("--engine", engine != "onnx", "onnx with --web"),
        # WebAssembly has no arithmetic for FP16.
        ("--precision", precisions not in (("fp32",), ("int8",)), "fp32 or int8 with --web"),
    ):
        if given:
            found = {"--engine": engine, "--precision": ", ".join(precisions)}.get(name, "given")
            raise ConfigError(name, expected, found, fix)
    assert options.web is not None
    check_new_folder(options.web, "--web", options.overwrite)


def _choose_graph(options: ExportConfig, source: Source, target: str) -> str:
    """The graph's layout: an ONNX file keeps its own, and only EfficientFace has several."""
    name, asked = source.path.name, options.graph
    if source.is_onnx:
        if asked is not None:
            fix = "leave --graph out: the file keeps the graph that it has"
            raise ConfigError(f"--graph {asked}", "a checkpoint as --weights", name, fix)
        graph = source.provenance.graph
        if graph != "plain" and source.target != target:
            print(f"note: {name} is laid out for a {source.target}, not for a {target}")
        return graph
    if source.lay_out is not None:
        if asked == "wide" and target != "cpu":
            fix = "use --graph deploy, whose layout is the target's"
            raise ConfigError("--graph wide", "--target cpu", f"--target {target}", fix)
        return asked or "deploy"
    if asked not in (None, "plain"):
        expected = "an EfficientFace checkpoint as --weights"
        found = f"{name}, {source.spec.architecture}"
        raise ConfigError(f"--graph {asked}", expected, found, "leave --graph out")
    return "plain"


def _choose_tuning(
    options: ExportConfig,
    source: Source,
    engine: str,
    target: str,
    graph: str,
    precisions: tuple[str, ...],
    missing: str,
) -> Tuning | None:
    """What ``--tune`` chooses among.

    Raises:
        ConfigError: There is no choice, or no time for it.
    """
    seconds = options.tune_seconds
    if options.tune is None:
        if seconds != type(options).tune_seconds:
            raise ConfigError("--tune-seconds", "--tune", "none", "add --tune latency")
        return None
    if options.web is not None:
        fix = "make the page by another call"
        raise ConfigError("--tune", "none with --web, whose page a browser runs", "both", fix)
    if missing:
        raise ConfigError(f"--tune {options.tune}", "an engine", missing, "use --engine onnx")
    graphs: tuple[str, ...] = (graph,)
    if source.lay_out is not None and options.graph is None:
        graphs = ("deploy", "wide", "plain") if target == "cpu" else ("deploy", "plain")
    runners, absent = find_runners(options.tune, engine, target)
    if "int8" not in precisions and source.precision == "fp32" and options.precision is None:
        absent.append("int8: made with --calib alone")
    files = [File(one, precision, Path()) for one, precision in to_try(graphs, precisions)]
    if (count := len(pair(files, runners))) < 2:
        found = f"{count or 'none'}" + (f" ({'; '.join(absent)})" if absent else "")
        fix = "leave --tune, --graph or --precision out"
        raise ConfigError(f"--tune {options.tune}", "two candidates or more", found, fix)
    if seconds < (least := count * FEWEST_SECONDS):
        expected = f"{least:g} seconds or more for {count} candidates"
        fix = "give more, or fewer candidates by --graph and --precision"
        raise ConfigError("--tune-seconds", expected, f"{seconds:g}", fix)
    return Tuning(options.tune, seconds, graphs, tuple(runners), tuple(absent))


def to_try(graphs: Iterable[str], precisions: Iterable[str]) -> list[tuple[str, str]]:
    """The files that ``--tune`` makes, as graph and precision: INT8 has no blocks to widen."""
    pairs = itertools.product(graphs, precisions)
    return [pair for pair in pairs if pair != ("wide", "int8")]


def _nothing_to_make(source: Source) -> ConfigError:
    return ConfigError(
        "--engine onnx",
        "a checkpoint, or another --precision than the file's",
        f"{source.path}, an ONNX file in {source.precision}",
        f"use it as it is (--verify {source.path} checks it); for a checkpoint "
        + install_command("export,cpu"),
    )


def _choose_calibration(
    options: ExportConfig, source: Source, precisions: tuple[str, ...]
) -> Calibration | None:
    if options.calib is None:
        return None
    held_out = SEARCH_IMAGES if options.int8_search and "int8" in precisions else 0
    labels = source.spec.labels
    return choose_calibration(options.calib, options.calib_images, options.seed, held_out, labels)


def _request(
    options: ExportConfig,
    source: Source,
    target: str,
    graph: str,
    calibration: Calibration | None,
    precision: str,
) -> dict[str, Any]:
    """One of :attr:`Plan.requests`."""
    made = "float32 NCHW normalised" if options.float_input else "uint8 NHWC RGB"
    decided: dict[str, Any] = {
        "precision": precision,
        "target": target,
        "graph": graph,
        "input": source.provenance.input or made,
        "weights": source.weights,
        "versions": versions(),
    }
    if options.features or source.gives_features:
        decided["features"] = True
    if source.size_note:
        decided["trained_size"] = source.trained_size
    if precision == "int8" and calibration is not None:
        decided["calibration"] = {**calibration.record, "method": options.calib_method}
        decided["exclude"] = sorted(set(options.exclude))
        decided["int8_search"] = options.int8_search
        decided["rounding"] = dataclasses.asdict(SCHEMES[target])
    return decided


# ---- what is there already


def _check_model(out: Path, source: Source) -> None:
    """One ``verify.npz`` serves a folder: two models in it could not both be verified."""
    header = report_header(source.weights, source.spec)
    others = stored_parent(out) not in (None, source.weights["sha256"])
    if others or reports_other_model(out, header):
        expected = "artifacts of the same weights, labels and input size, or none"
        fix = "add --overwrite, or choose another --out"
        raise ConfigError(out, expected, "artifacts of others", fix)


def _onnx_step(
    options: ExportConfig, source: Source, path: Path, request: Mapping[str, Any]
) -> Step:
    """The step of an ONNX file: made, or used as it is."""
    precision = request["precision"]
    if options.tune and path.exists() and not options.overwrite:
        raise _in_the_way(path, "an earlier export")
    if source.is_onnx_in(precision):
        present = OnnxFile(source.trace(False), source.spec, source.provenance.record, source.probe)
        return Step("onnx", precision, path if options.tune else source.path, present)
    if options.overwrite or not path.exists():
        return Step("onnx", precision, path)
    try:
        present = read_onnx(path)
    except EfficientFaceError:
        raise _in_the_way(path, "an earlier export of other making") from None
    if differing := _differences(present, source, request):
        raise _in_the_way(path, f"an earlier export of other {', '.join(differing)}")
    return Step("onnx", precision, path, present)


def _differences(found: OnnxFile, source: Source, wanted: Mapping[str, Any]) -> list[str]:
    """In what an ONNX file differs from the one that would be made; empty when in nothing."""
    weights = found.provenance.get("weights")
    sha256 = weights.get("sha256") if isinstance(weights, dict) else None  # its name says nothing
    record = {**found.provenance, "weights": {**wanted["weights"], "sha256": sha256}}
    # The last two are recorded only where there are some.
    keys = dict.fromkeys([*wanted, "features", TUNED_KEY])
    differing = [key for key in keys if record.get(key) != wanted.get(key)]
    return differing + (["labels or input size"] if found.spec != source.spec else [])


def _in_the_way(path: Path, found: str) -> ConfigError:
    return ConfigError(path, "no such file yet", found, "add --overwrite, or choose another --out")


def _keeps_reference(options: ExportConfig, source: Source) -> bool:
    """Whether the folder's own ``verify.npz`` serves: of this model, and nobody asks for another.

    It may hold a data set's images, where a later call without ``--val`` has synthetic ones.
    """
    if options.val is not None or options.overwrite:
        return False
    try:
        kept, _ = read_reference(options.out, source.spec, source.weights["sha256"])
    except ArtifactError:
        return False
    return kept.features is not None or not (options.features or source.gives_features)
