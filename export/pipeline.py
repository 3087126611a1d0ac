"""What ``efficientface-export`` does: make each artifact, verify it, give it its name, report."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import onnx

from efficientface_deploy.artifact import FLOAT_INPUT
from efficientface_deploy.backends.tensorrt.library import rebuild_command
from efficientface_deploy.command import log_told
from efficientface_deploy.download import Download
from efficientface_deploy.errors import ConfigError, ExportError
from efficientface_deploy.tuned import TUNED_KEY
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.web.files import MODEL_FILE, page_files, read_model, write_site
from efficientface_deploy.workbench.environment import now
from efficientface_deploy.workbench.workspace import Workspace, open_workspace
from efficientface_export.graph.io import OnnxFile, with_features, write_onnx
from efficientface_export.graph.precision import require_fp16_range, require_precision, to_fp16
from efficientface_export.int8.calibration import read_images
from efficientface_export.int8.placement import lay_out_for_gpu
from efficientface_export.int8.qdq import SCHEMES, quantise, quantised_groups
from efficientface_export.int8.ranges import activation_amax, tensor_ranges
from efficientface_export.int8.sensitivity import find_sensitive_layers
from efficientface_export.options import ExportConfig
from efficientface_export.plan import Plan, Step, resolve, to_try
from efficientface_export.source import Source, open_source
from efficientface_export.tensorrt import builder as engines
from efficientface_export.tensorrt.build_log import EngineCost
from efficientface_export.tensorrt.builder import build_progress
from efficientface_export.tensorrt.options import EngineKind
from efficientface_export.tune import (
    File,
    choose,
    measure_candidates,
    pair,
    verify_candidates,
)
from efficientface_export.verification.parity import verify_artifact, wrong_outputs
from efficientface_export.verification.probes import make_probe
from efficientface_export.verification.provenance import Provenance
from efficientface_export.verification.reference import TestSet, write_reference
from efficientface_export.verification.report import (
    MARKDOWN_FILE,
    Report,
    ReportRow,
    failed_name,
    report_header,
)

# Images on which FP16's range is measured when no calibration set is given.
_RANGE_IMAGES = 64

_INTERRUPTED = 130  # exit code, as a shell has it
_SO_FAR = "interrupted before its time: this is the best so far"


def export_command(options: ExportConfig) -> int:
    """Make the artifacts that the options ask for, and verify each.

    Returns:
        0; 130 where Ctrl-C ended ``--tune``, which leaves the best so far.

    Raises:
        VerificationError: An artifact computes something else; it is kept as ``*.failed.*``.
        EfficientFaceError: The options or files are unusable, or the engine that was asked for
            cannot be made here.
    """
    if options.keeps_artifacts:
        return _export(options)
    with tempfile.TemporaryDirectory() as folder:
        return _export(dataclasses.replace(options, out=Path(folder)), kept=False)


def _export(options: ExportConfig, kept: bool = True) -> int:
    """The same, into a folder that is kept or not."""
    source = open_source(options.weights, options.preset, options.input_size)
    size = f"{source.spec.input_size}x{source.spec.input_size}"
    print(f"weights: {source.path} ({source.spec.name}, {size})")
    if note := source.size_note:
        print(f"note: {note}")
    if source.spec.architecture != "efficientface":
        print(f"note: its artifacts are called efficientface, and are a {source.spec.architecture}")
    if options.out.is_file():
        raise ConfigError(options.out, "a folder", "a file", "choose another --out")
    with open_workspace(options.out, "export") as work:
        plan = resolve(options, source)  # here, since what is reused depends on the folder
        page = None if options.web is None else _page()
        data = load_data(plan, source)
        made, tuning, interrupted = (
            _tune(plan, source, data, work) if plan.tuning else ((), None, False)
        )
        rows = _make_all(plan, source, data, work, made, tuning)
    if kept:
        print(f"report: {plan.out / MARKDOWN_FILE}")
    _conclude(plan, rows, kept)
    runnable = [step.path for step, row in rows if row.recommended and not row.verification.not_run]
    if options.web is not None and page is not None:
        write_site({MODEL_FILE: read_model(rows[-1][0].path), **page}, options.web)
        print(f"page: {options.web / 'index.html'}, to be served by any web server")
        runnable = runnable if kept else [options.web / MODEL_FILE]
    if runnable:
        print(f"next: efficientface-predict PICTURE --model {shlex.quote(str(runnable[-1]))}")
    return _INTERRUPTED if interrupted else 0


def _page() -> dict[str, bytes]:
    """The page's files; what they are fetched from is said."""
    with log_told(Download.__module__):
        return page_files()


@dataclasses.dataclass(frozen=True)
class Data:
    """The images of one call.

    Attributes:
        calibration: uint8 (N, S, S, 3), RGB, that ranges are measured on.
        held_out: uint8 (M, S, S, 3), others, that the search measures on.
        test_set: Images that artifacts are verified on.
        logits: float32 (K, C), the reference's on them.
    """

    calibration: UInt8Array
    held_out: UInt8Array
    test_set: TestSet
    logits: Float32Array


def load_data(plan: Plan, source: Source) -> Data:
    """Read all images, before anything is made, and let the reference answer.

    Raises:
        EfficientFaceError: A data set is unusable, or nothing here runs the reference.
    """
    chosen = plan.calibration
    if chosen is not None:
        record = chosen.record
        print(f"calibration: {record['count']} images of {record['dataset']} ({record['split']})")
        images = read_images(chosen.chosen, source.spec)
        held_out = read_images(chosen.held_out, source.spec)
    test_set, logits = source.reference(plan.val, plan.preset, features=plan.features)
    if chosen is None:
        images, held_out = test_set.images[:_RANGE_IMAGES], test_set.images[:0]
    return Data(images, held_out, test_set, logits)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact that is made, or there already, and not verified yet.

    Attributes:
        file: The graph that it holds or was built of, the spec, and its provenance.
        notes: What to say of it: warnings, and what an engine was built with and for.
        write: Writes it with its provenance, that of now; None for a file that is there already.
        cost: Kernels and bytes of an engine, where its builder says them.
        recommended: Whether it is to be taken; an engine in INT8 that costs more than in FP16 is
            not.
    """

    file: OnnxFile
    notes: tuple[str, ...]
    write: Callable[[Path, dict[str, Any]], None] | None
    cost: EngineCost | None = None
    recommended: bool = True

    def save(self, path: Path) -> None:
        """Write it as it is."""
        assert self.write is not None  # not one that is there already
        self.write(path, dict(self.file.provenance))


Made = Sequence[tuple[Step, Artifact]]
"""An artifact to deliver, last, and what it was made of."""


def _tune(
    plan: Plan, source: Source, data: Data, work: Workspace
) -> tuple[Made, dict[str, Any], bool]:
    """Make all candidates, verify and measure them, and take the best; publishes nothing.

    Returns:
        What is to be delivered, for the report how it was chosen, and whether Ctrl-C ended it.
    """
    assert plan.tuning is not None
    objective, seconds = plan.tuning.objective, plan.tuning.seconds
    notes = list(plan.tuning.absent)
    with tempfile.TemporaryDirectory(dir=work.scratch) as folder:
        made = dict(_make_files(plan, source, data, Path(folder), notes))
        candidates = pair([*made], plan.tuning.runners)
        print(f"tune: verifying {len(candidates)} candidates", flush=True)
        verify_candidates(candidates, data.test_set, data.logits)
        running = [one for one in candidates if one.runs and not one.verification.problems]
        interrupted = False
        if running:
            print(f"tune: measuring {len(running)} in turns, {seconds:g} s", flush=True)
            given = running, objective, seconds, data.test_set.images
            with build_progress("tune") as progress:
                interrupted = measure_candidates(*given, progress)
    if interrupted:
        notes.append(_SO_FAR)
    best, record = choose(candidates, objective, notes)
    print("\n".join(["tune: " + record["reason"], *("  " + note for note in record["notes"])]))
    *before, (step, artifact) = made[best.file]
    names = ("objective", "machine", "batch", "reason")
    tuned = {**best.runner._asdict(), **{name: record[name] for name in names}}
    file = artifact.file._replace(provenance={**artifact.file.provenance, TUNED_KEY: tuned})
    return [*before, (step, dataclasses.replace(artifact, file=file))], record, interrupted


def _make_files(
    plan: Plan, source: Source, data: Data, folder: Path, notes: list[str]
) -> Iterator[tuple[File, Made]]:
    """Each file that ``--tune`` tries, with the steps to it; what cannot be made is noted."""
    assert plan.tuning is not None
    layouts = {graph: plan.laid_out(graph) for graph in plan.tuning.graphs}
    converters = {graph: Converter(layout, source, data) for graph, layout in layouts.items()}
    for graph, precision in to_try(layouts, plan.requests):
        print(f"tune: making {precision}, {graph} graph", flush=True)
        layout, converter = layouts[graph], converters[graph]
        made: list[tuple[Step, Artifact]] = []
        paths: list[Path] = []
        try:
            for step in (step for step in plan.steps if step.precision == precision):
                if step.engine == "onnx":
                    artifact = make_onnx(step, layout, source, converter)
                else:
                    artifact = make_engine(step, layout, artifact.file, paths[-1])
                paths.append(folder / graph / step.path.name)
                paths[-1].parent.mkdir(exist_ok=True)
                artifact.save(paths[-1])
                made.append((step, artifact))
        except ExportError as error:  # another precision may do
            notes.append(f"{precision}, {graph} graph: {error}")
            continue
        parent = paths[-2] if len(paths) > 1 else None
        yield File(graph, precision, paths[-1], parent, artifact.cost), made


def _make_all(
    plan: Plan,
    source: Source,
    data: Data,
    work: Workspace,
    made: Made = (),
    tuning: dict[str, Any] | None = None,
) -> list[tuple[Step, ReportRow]]:
    """Make, verify and publish one artifact after the other; what follows may fail."""
    if not plan.keeps_reference:
        write_reference(work.scratch, data.test_set, data.logits, source.weights["sha256"])
    report = Report(plan.out, report_header(source.weights, source.spec))
    converter = Converter(plan, source, data)
    rows: list[tuple[Step, ReportRow]] = []
    fp16 = None
    steps: Sequence[tuple[Step, Artifact | None]] = made or [(step, None) for step in plan.steps]
    for step, artifact in steps:
        if step.engine != "onnx" and rows[-1][1].verification.problems:
            continue
        if artifact is None and step.engine == "onnx":
            artifact = parent = make_onnx(step, plan, source, converter)
        elif artifact is None:
            artifact = make_engine(step, plan, parent.file, rows[-1][0].path)
            if step.precision == "fp16":
                fp16 = artifact.cost
            elif step.precision == "int8" and artifact.cost:
                fp16 = fp16 or _cost_in_fp16(step, plan, source, converter)
                artifact = _compared(artifact, fp16)
        row = verify(step, artifact, source, data, work)
        if made and artifact is made[-1][1]:
            row = dataclasses.replace(row, tuning=tuning)
        report.add(row)
        report.write(work.scratch)
        work.publish(failed_name)
        print(row.describe(), flush=True)
        rows.append((step, row))
    return rows


def make_onnx(step: Step, plan: Plan, source: Source, converter: Converter) -> Artifact:
    """An ONNX file; one that is there is used as it is.

    Raises:
        EfficientFaceError: It could not be made.
    """
    path, present = step.path, step.present
    if present is not None and plan.tuning is not None:  # the same, and what it is tuned to

        def copy(path: Path, record: dict[str, Any]) -> None:
            write_onnx(present.graph, path, present.spec, record, present.probe)

        return Artifact(present, (), copy)
    if present is not None:
        notes: tuple[str, ...] = ()
        if path != source.path:
            same = "of the same weights, options and versions; not made anew"
            print(f"{path}: is there already, {same}")
            notes = (
                plan.calibration.warnings if plan.calibration and step.precision == "int8" else ()
            )
        return Artifact(present, notes, None)
    graph, details, notes = converter.convert(step.precision, path)
    record = {
        **plan.requests[step.precision],
        "parent": {"file": source.path.name, "sha256": source.sha256},
        **details,
        "created": now(),
    }

    probe = make_probe(graph, source.spec, step.precision)

    def write(path: Path, record: dict[str, Any]) -> None:
        write_onnx(graph, path, source.spec, record, probe)

    return Artifact(OnnxFile(graph, source.spec, record, probe), notes, write)


def make_engine(step: Step, plan: Plan, parent: OnnxFile, path: Path) -> Artifact:
    """A TensorRT engine of the ONNX file at ``path``.

    Raises:
        EfficientFaceError: It could not be built.
    """
    with build_progress(step.path.name) as progress:
        engine = engines.build_engine(
            path,
            cast(EngineKind, step.engine),
            plan.engine_options,
            graph=parent.graph,
            folder=plan.out,
            progress=progress,
        )
    note = (
        f"{engine.library} {engine.version} for {', '.join(engine.compute_capabilities)}, "
        f"{engine.cost or 'an unknown number of kernels'}, built in {engine.build_seconds:.1f} s"
    )

    # An engine computes the same graph as its ONNX file, which may be older than probes are.
    probe = parent.probe or make_probe(parent.graph, parent.spec, step.precision)

    def write(path: Path, record: dict[str, Any]) -> None:
        engine.write(path, parent.spec, record, probe)

    return Artifact(parent, (note,), write, engine.cost)


def _cost_in_fp16(
    step: Step, plan: Plan, source: Source, converter: Converter
) -> EngineCost | None:
    """What an engine of the same network costs in FP16, by a build that is thrown away.

    None where nobody can say it, or where it would take minutes: TensorRT times its kernels.
    """
    if step.engine != "trt-rtx" or source.precision != "fp32":
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp16.onnx"
        graph, _, _ = converter.convert("fp16", path)
        write_onnx(graph, path, source.spec, {"precision": "fp16"})
        return engines.build_engine(path, "trt-rtx", plan.engine_options, graph=graph).cost


def _compared(artifact: Artifact, fp16: EngineCost | None) -> Artifact:
    """An engine in INT8 that also says what FP16 costs."""
    if fp16 is None or artifact.cost is None:
        return artifact
    note, recommended = f"in FP16: {fp16}", not artifact.cost.exceeds(fp16)
    if not recommended:
        advice = "not recommended, take the engine in FP16"
        note = f"INT8 has {artifact.cost}, FP16 {fp16}: {advice}"
    return dataclasses.replace(artifact, notes=(*artifact.notes, note), recommended=recommended)


def verify(
    step: Step, artifact: Artifact, source: Source, data: Data, work: Workspace
) -> ReportRow:
    """Compare an artifact with the reference, and finish what is to be published of it.

    Returns:
        Its row; an artifact that failed is called ``*.failed.*``.
    """
    file, precision = artifact.file, step.precision
    if artifact.write is None:
        path, folder = step.path, work.path
        provenance = Provenance(file.provenance, path)
        if path == source.path:
            verification = source.verify()
        else:
            verification = verify_artifact(path, data.logits, data.test_set, precision)
        arithmetic = require_precision(file.graph, precision, provenance.excluded, path)
    else:
        path, folder = work.scratch / step.path.name, work.scratch
        record = dict(file.provenance)
        artifact.write(path, record)
        verification = verify_artifact(path, data.logits, data.test_set, precision)
        record["verification"] = verification.as_dict()
        if verification.problems:
            for written in folder.glob(f"{path.name}*"):  # a sidecar too
                written.unlink()
            path = path.with_name(failed_name(path.name))
        artifact.write(path, record)
        provenance = Provenance(record, path)
        arithmetic = provenance.arithmetic
    notes = (*artifact.notes, source.size_note) if source.size_note else artifact.notes
    row = ReportRow.of(path, folder, provenance, arithmetic, verification, notes)
    return dataclasses.replace(row, recommended=artifact.recommended)


class Converter:
    """Brings the FP32 graph of one call into other precisions; it is made and measured once.

    Args:
        plan: Says how.
        source: Gives the graph.
        data: Images to measure on.
    """

    def __init__(self, plan: Plan, source: Source, data: Data) -> None:
        self.plan = plan
        self.source = source
        self.data = data

    @functools.cached_property
    def graph(self) -> onnx.ModelProto:
        """FP32."""
        if self.plan.graph != "plain" and self.source.lay_out is not None:
            layout = "wide" if self.plan.graph == "wide" else self.plan.target
            graph = self.source.lay_out(self.plan.float_input, layout)
        else:
            graph = self.source.trace(self.plan.float_input)
        wanted = self.plan.features and not self.source.gives_features
        return with_features(graph) if wanted else graph

    @functools.cached_property
    def ranges(self) -> dict[str, float]:
        """Largest magnitude of every tensor of it."""
        return tensor_ranges(self.graph, self._fed(self.data.calibration))

    def convert(
        self, precision: str, path: Path
    ) -> tuple[onnx.ModelProto, dict[str, Any], tuple[str, ...]]:
        """The graph in one precision, what is to be recorded about it, and what to warn about.

        Args:
            precision: ``fp32``, ``fp16`` or ``int8``.
            path: The file, for errors.

        Raises:
            ExportError: The precision does not hold the network.
        """
        graph = self.graph
        details: dict[str, Any] = {}
        notes: tuple[str, ...] = ()
        halves = precision == "fp16" or (precision == "int8" and self.plan.target == "gpu")
        if halves:
            tensor, largest = require_fp16_range(self.ranges, path)
            details["largest_fp32_value"] = {"tensor": tensor, "magnitude": largest}
        if precision == "int8":
            graph, int8_details, notes = self._quantise()
            details |= int8_details
        if halves:
            graph = to_fp16(graph)
        excluded = len(details.get("excluded", ()))
        details["arithmetic"] = require_precision(graph, precision, excluded, path)
        return graph, details, notes

    def _quantise(self) -> tuple[onnx.ModelProto, dict[str, Any], tuple[str, ...]]:
        """The graph in INT8, what is to be recorded about it, and what to warn about."""
        plan, graph = self.plan, self.graph
        assert plan.calibration is not None  # the plan sees to it
        scheme = SCHEMES[plan.target]
        excluded = set(plan.exclude)
        if plan.target == "gpu":
            graph, costly = lay_out_for_gpu(graph)
            excluded.update(costly)
        groups = quantised_groups(graph, scheme, excluded)
        largest = {name: self.ranges[name] for group in groups for name in group.tensors}
        images = self._fed(self.data.calibration)
        amax = activation_amax(graph, largest, images, plan.calib_method)
        details: dict[str, Any] = {}
        notes = plan.calibration.warnings
        if plan.int8_search:
            weight_bytes = 2 if plan.target == "gpu" else 4
            held_out = self._fed(self.data.held_out)
            search = find_sensitive_layers(graph, amax, scheme, held_out, excluded, weight_bytes)
            details["search"] = search.record()
            notes += (search.describe(),)
            excluded = excluded.union(search.left_out)
        details["excluded"] = sorted(excluded)
        return quantise(graph, amax, scheme, excluded), details, notes

    def _fed(self, images: UInt8Array) -> npt.NDArray[Any]:
        """Images as the graph takes them."""
        takes_floats = self.graph.graph.input[0].name == FLOAT_INPUT
        return normalise(images, self.source.spec) if takes_floats else images


def _conclude(plan: Plan, rows: Sequence[tuple[Step, ReportRow]], kept: bool) -> None:
    """Say what is missing of what was asked for, by an error."""
    if failed := [row.file for _, row in rows if row.verification.problems]:
        see = f"see {plan.out / MARKDOWN_FILE}" if kept else "add --out to keep it and its report"
        raise wrong_outputs(failed, f"{see}; try --precision fp32, --exclude, or another --calib")
    unverified = [row for _, row in rows if row.verification.status != "verified"]
    if unverified and plan.require_verified:
        names, first = ", ".join(row.file for row in unverified), unverified[0].verification
        expected = "verification, as --require-verified asks"
        found, fix = first.reason, "give more images with --val"
        if first.not_run:
            found = "no backend here that can run it"
            fix = "verify it on the device with efficientface-export --verify FILE"
        raise ExportError(names, expected, found, fix)
    if plan.missing:
        print(plan.missing)
        for step, _ in rows:
            print(f"  on the device, with {step.path.name} and verify.npz beside it:")
            print("    " + _finish("trt", Path(step.path.name), plan, step.precision))
            print("  for RTX, on any machine:")
            print("    " + _finish("trt-rtx", step.path.absolute(), plan, step.precision))
        found = "the ONNX file only: " + ", ".join(str(step.path) for step, _ in rows)
        fix = "finish with one of the commands above"
        raise ExportError(f"--engine {plan.asked}", "an engine", found, fix)


def _finish(kind: str, weights: Path, plan: Plan, precision: str) -> str:
    """The command that makes the engine of an ONNX file that is there."""
    options = plan.engine_options
    targets = options.compute_capabilities if kind == "trt-rtx" else ()
    command = rebuild_command(
        kind, weights, options.max_batch, precision=precision, compute_capabilities=targets
    )
    return f"{command} --out {shlex.quote(str(weights.parent))}"  # beside it
