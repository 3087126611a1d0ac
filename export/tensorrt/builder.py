"""ONNX file to TensorRT engine; needs neither torch nor onnxruntime.

The network is strongly typed: the graph's types are the engine's, and the builder decides nothing
about precision. So the network is compared with the graph before the build; what the builder's log
then says of the finished engine may be less, but not something else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from efficientface_deploy.artifact import write_sidecar
from efficientface_deploy.backends.tensorrt.cuda import open_cuda
from efficientface_deploy.backends.tensorrt.library import (
    LIBRARIES,
    check_gpu,
    compute_capabilities,
    load_library,
    make_logger,
    rebuild_command,
    sm_number,
    version_of,
)
from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import BackendError, ConfigError, ExportError
from efficientface_deploy.files import atomic_path, file_hash, write_text
from efficientface_deploy.probe import Probe
from efficientface_deploy.spec import ModelSpec
from efficientface_export.graph.io import read_onnx
from efficientface_export.tensorrt.build_log import (
    EngineCost,
    Layer,
    builder_fix,
    builder_reason,
    engine_cost,
    parse_layers,
    parser_reason,
)
from efficientface_export.tensorrt.checks import (
    check_batch,
    check_log,
    check_network,
    check_scheme,
    check_turing,
)
from efficientface_export.tensorrt.options import (
    CURRENT,
    SUFFIXES,
    EngineKind,
    EngineOptions,
    bad_option,
)

# Takes the phase that the builder is in, and the share of the whole build that is done, 0 to 1.
OnProgress = Callable[[str, float], None]

# The oldest GPU that TensorRT for RTX targets when nothing is asked of it: Ampere.
_OLDEST_BY_DEFAULT = "sm80"

# A Jetson's GPU has no memory of its own: what the builder takes, the system lacks.
_JETSON_WORKSPACE_MIB = 1024


def available(kind: EngineKind) -> str | None:
    """Why engines cannot be built here; None when they can.

    TensorRT times its kernels and needs a GPU to build; TensorRT for RTX does not.

    Args:
        kind: ``trt`` or ``trt-rtx``.
    """
    try:
        module = load_library(kind)
        if kind == "trt":
            open_cuda().compute_capability()
        _Build(module, kind)
    except BackendError as error:
        return f"{error.subject}: {error.found}; {error.fix}"
    return None


def check_targets(kind: EngineKind, names: Sequence[str]) -> None:
    """Refuse compute capabilities that the library does not build for.

    Raises:
        ConfigError: One is unknown, or not to be chosen.
        BackendError: The library is missing or too old.
    """
    _targets(load_library(kind), kind, names)


def default_workspace_mib(root: Path = Path("/")) -> int | None:
    """Scratch memory that a build may plan for when nothing is said, in MiB; None: all there is.

    Args:
        root: Of the file system in which a Jetson is recognised by NVIDIA's release file or by
            the name of the board.
    """
    model = root / "proc" / "device-tree" / "model"
    jetson = (root / "etc" / "nv_tegra_release").is_file()
    with contextlib.suppress(OSError):
        jetson = jetson or b"Jetson" in model.read_bytes()
    return _JETSON_WORKSPACE_MIB if jetson else None


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine in memory, and what its builder said of it.

    Attributes:
        kind: ``trt`` or ``trt-rtx``.
        parent: The ONNX file that it was built of.
        plan: The serialised engine.
        layers: All layers of the finished engine, in order.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        version: That library's version.
        compute_capabilities: GPUs it runs on: ``sm86``, or ``sm121+`` for that and newer.
        precisions: Number of convolutions per precision in the graph, which the strongly typed
            network has too.
        seen_precisions: The same in the builder's log, which may say nothing of them.
        build_seconds: Time from parsing to the serialised engine.
        options: What it was built with.
        parent_sha256: Of the ONNX file.
    """

    kind: EngineKind
    parent: Path
    plan: bytes = dataclasses.field(repr=False)
    layers: tuple[Layer, ...] = dataclasses.field(repr=False)
    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    precisions: dict[str, int]
    seen_precisions: dict[str, int]
    build_seconds: float
    options: EngineOptions
    parent_sha256: str

    @property
    def cost(self) -> EngineCost | None:
        """Kernels of one inference, and the bytes that they move; None where the log is silent."""
        return engine_cost(self.layers)

    @property
    def kernels(self) -> int | None:
        """Number of kernels that one inference launches; None where the log does not say."""
        return self.cost.kernels if self.cost else None

    @property
    def size(self) -> int:
        """Bytes of the plan."""
        return len(self.plan)

    def write(
        self,
        path: Path,
        spec: ModelSpec,
        provenance: Mapping[str, Any],
        probe: Probe | None = None,
    ) -> None:
        """Write the engine with its sidecar; a failure leaves both as they were.

        Args:
            path: ``*.engine`` for ``trt``, ``*.rtx.engine`` for ``trt-rtx``.
            spec: The model's.
            provenance: Of the ONNX file, and what is to be said beside it.
            probe: What that file must give, and so the engine.
        """
        record = self._record(str(provenance.get("precision", "fp32")))
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.plan)
            # Before the engine takes its name: a pair of different builds is refused by its hash.
            sidecar = {**provenance, "engine": record}
            write_sidecar(path, spec, sidecar, None if probe is None else probe.record())

    def _record(self, precision: str) -> dict[str, Any]:
        """What the sidecar says of the engine."""
        options, parent = self.options, Path(self.parent.name)
        targets = options.compute_capabilities
        return {
            "sha256": hashlib.sha256(self.plan).hexdigest(),
            "library": self.library,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "kernels": self.kernels,
            "bytes_moved": self.cost.bytes_moved if self.cost else None,
            "precisions": self.precisions,
            "seen_precisions": self.seen_precisions,
            "max_batch": options.max_batch,
            "opt_batch": options.opt_batch,
            "workspace_mib": options.workspace_mib,
            "tf32": False,
            "build_seconds": self.build_seconds,
            "parent": parent.name,
            "parent_sha256": self.parent_sha256,
            "rebuild": rebuild_command(
                self.kind,
                parent,
                options.max_batch,
                precision=precision,
                compute_capabilities=targets,
            ),
        }


def build_engine(
    onnx_path: str | Path,
    kind: EngineKind,
    options: EngineOptions | None = None,
    *,
    graph: onnx.ModelProto | None = None,
    folder: Path | None = None,
    progress: OnProgress | None = None,
) -> BuiltEngine:
    """Build an engine from one of our ONNX files, in the graph's precision.

    Ctrl-C and SIGTERM end the build at its next step.

    Args:
        onnx_path: ``*.onnx``, its batch dynamic.
        kind: ``trt`` for the GPU in this machine, or ``trt-rtx``.
        options: Batch sizes, workspace, targets.
        graph: What the file holds, where somebody has read it already.
        folder: Where the builder's verbose log stays if it fails, as ``*.engine.log``, and where
            TensorRT keeps its timings of kernels for the next build (that for RTX has none); None
            keeps neither.
        progress: Is told how far the build is; it must not raise.

    Returns:
        The engine, in memory.

    Raises:
        ArtifactError: The file is not an ONNX file of ours.
        BackendError: The library is missing or too old, or there is no GPU where one is needed.
        ConfigError: A compute capability is unknown or not to be chosen.
        ExportError: The library does not parse or build the graph, or built another precision.
        KeyboardInterrupt: Ctrl-C was pressed meanwhile.
    """
    onnx_path = Path(onnx_path)
    options = options or EngineOptions()
    if options.workspace_mib is None and kind == "trt":
        options = dataclasses.replace(options, workspace_mib=default_workspace_mib())
    if graph is None:
        graph = read_onnx(onnx_path).graph
    module = load_library(kind)
    targets = _targets(module, kind, options.compute_capabilities)
    built_for = _built_for(module, kind, options.compute_capabilities)
    check_batch(graph, onnx_path)
    check_scheme(graph, onnx_path)
    check_turing(graph, kind, built_for, onnx_path)
    timings = folder / f"tensorrt-{built_for[0]}.timings" if folder and kind == "trt" else None

    start = time.perf_counter()
    build = _Build(module, kind)
    log = folder / f"{onnx_path.stem}{SUFFIXES[kind]}.log" if folder else None
    # The interpreter would raise an interrupt in whatever callback the library makes next, and an
    # exception that passes through the library ends the process.
    with build.log_kept(log), interrupts_wait() as interrupts:
        build.parse(onnx_path)
        precisions = check_network(graph, build.count_precisions(), onnx_path)
        build.configure(options, targets, _make_monitor(module, progress, interrupts))
        if timings:
            build.read_timings(timings)
        plan = build.serialise(onnx_path, graph)
        if timings:
            build.write_timings(timings)
        seconds = time.perf_counter() - start
        layers = parse_layers([text for _, text in build.logger.records])
        seen = check_log(graph, layers, onnx_path)
    return BuiltEngine(
        kind=kind,
        parent=onnx_path,
        plan=plan,
        layers=layers,
        library=module.__name__,
        version=version_of(module),
        compute_capabilities=built_for,
        precisions=precisions,
        seen_precisions=seen,
        build_seconds=round(seconds, 2),
        options=options,
        parent_sha256=file_hash(onnx_path),
    )


class _Build:
    """One run of a builder, and the log that it writes.

    Args:
        module: TensorRT or TensorRT for RTX.
        kind: ``trt`` or ``trt-rtx``, for errors.

    Raises:
        BackendError: The builder does not start on this machine.
    """

    def __init__(self, module: Any, kind: str) -> None:
        self.module = module
        self.kind = kind
        self.logger = make_logger(module)
        try:
            self._builder = module.Builder(self.logger)
            flag = int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            self._network = self._builder.create_network(1 << flag)
            self._config = self._builder.create_builder_config()
        except (RuntimeError, TypeError) as error:  # "factory function returned nullptr"
            found = self.logger.first_error() or str(error)
            expected = f"{LIBRARIES[kind].label} to start"
            fix = "check the GPU and its driver with nvidia-smi"
            raise BackendError(f"engine {kind}", expected, found, fix) from None

    def parse(self, path: Path) -> None:
        """Read the ONNX file into the network.

        Raises:
            ExportError: The parser does not take it.
        """
        parser = self.module.OnnxParser(self._network, self.logger)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            reason = parser_reason(errors[0]) if errors else self.logger.first_error()
            expected = f"a graph that the ONNX parser of {self.module.__name__} takes"
            fix = "export the ONNX file again with this version, or keep to --engine onnx"
            raise ExportError(path, expected, reason or "no reason given", fix)

    def count_precisions(self) -> dict[str, int]:
        """Number of convolutions in the network per precision.

        A convolution is INT8 where DEQUANTIZE layers give its data and its weights: the parser
        keeps the pairs of the graph, and the builder fuses them. Constant weights are no tensor.
        """
        kinds, types = self.module.LayerType, self.module.DataType
        names = {types.FLOAT: "fp32", types.HALF: "fp16", types.BF16: "bf16"}
        network = [self._network.get_layer(index) for index in range(self._network.num_layers)]
        dequantised = {
            layer.get_output(0).name for layer in network if layer.type == kinds.DEQUANTIZE
        }
        counts: Counter[str] = Counter()
        for layer in network:
            if layer.type == kinds.CONVOLUTION:
                tensors = [layer.get_input(index) for index in range(layer.num_inputs)][:2]
                data = tensors[0].dtype
                quantised = [tensor and tensor.name in dequantised for tensor in tensors]
                precision = "int8" if quantised == [True, True] else names.get(data, data.name)
                counts[precision] += 1
        return dict(sorted(counts.items()))

    def configure(self, options: EngineOptions, targets: Sequence[Any], monitor: Any) -> None:
        """Set monitor, verbosity, workspace, targets and the dynamic batch's profile."""
        config, module = self._config, self.module
        config.progress_monitor = monitor
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        if options.workspace_mib is not None:
            workspace = module.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(workspace, options.workspace_mib << 20)
        # TF32 would round the inputs of FP32 convolutions to 10 bits; in TensorRT it is on.
        config.clear_flag(module.BuilderFlag.TF32)
        if targets:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                if not config.set_compute_capability(target, index):
                    expected = f"{LIBRARIES[self.kind].label} to build for {target.name.lower()}"
                    fix = "leave it out of --compute-capability"
                    found = self.logger.first_error() or "a refusal"
                    raise BackendError("--compute-capability", expected, found, fix)

        image = self._network.get_input(0)
        item = tuple(image.shape)[1:]  # (S, S, 3)
        profile = self._builder.create_optimization_profile()
        sizes = (1, options.opt_batch, options.max_batch)
        profile.set_shape(image.name, *((size, *item) for size in sizes))
        config.add_optimization_profile(profile)

    def read_timings(self, path: Path) -> None:
        """Take an earlier build's timings, if there are any that this library takes.

        Those of another release, of another GPU, or of a damaged file are not an error: kernels
        are then timed anew.
        """
        stored = path.read_bytes() if path.is_file() else b""
        for content in (stored, b""):
            cache = self._config.create_timing_cache(content)
            if cache is not None and self._config.set_timing_cache(cache, False):
                return

    def write_timings(self, path: Path) -> None:
        """Keep what this build timed, and what it knew before."""
        cache = self._config.get_timing_cache()
        if cache is not None:
            with atomic_path(path) as temporary:
                temporary.write_bytes(bytes(cache.serialize()))

    def serialise(self, path: Path, graph: onnx.ModelProto) -> bytes:
        """Build; the plan's bytes.

        Raises:
            ExportError: The builder failed.
        """
        before = len(self.logger.records)
        plan = self._builder.build_serialized_network(self._network, self._config)
        if plan is None:
            self._flush_failure()
            expected = f"a graph that {self.module.__name__} {version_of(self.module)} builds"
            records = self.logger.records[before:]
            found, fix = builder_reason(records, graph), builder_fix(records, graph)
            raise ExportError(path, expected, found, fix)
        return bytes(plan)

    @contextlib.contextmanager
    def log_kept(self, path: Path | None) -> Iterator[None]:
        """Leave the verbose log at ``path`` if an export error ends the block, and name it there.

        A block that succeeds removes the log of an earlier failure.
        """
        try:
            yield
        except ExportError as error:
            if path is None:
                raise
            lines = (
                f"{logging.getLevelName(level)}: {text}" for level, text in self.logger.records
            )
            write_text(path, "\n".join(lines) + "\n")
            fix = f"{error.fix}; the builder's log is {path}"
            raise ExportError(error.subject, error.expected, error.found, fix) from None
        if path is not None:
            path.unlink(missing_ok=True)

    def _flush_failure(self) -> None:
        """Build something of no use, so that the next real build is what it would have been.

        After a build for SM75 that failed, TensorRT for RTX 1.7 treats the next one of the process
        as if it were for SM75, whatever its target: EfficientFace in FP16 for SM89 then takes 134
        kernels instead of 99, without a word.
        """
        if self.kind == "trt":
            return
        other = _Build(self.module, self.kind)
        data = other._network.add_input("data", self.module.DataType.FLOAT, (1,))
        other._network.mark_output(other._network.add_identity(data).get_output(0))
        other._builder.build_serialized_network(other._network, other._config)


def _make_monitor(module: Any, progress: OnProgress | None, interrupts: Sequence[int]) -> Any:
    """An ``IProgressMonitor`` that tells ``progress``, and ends the build at an interrupt.

    TensorRT calls it from several threads, and its header asks that the calls be safe to make.
    """
    base: Any = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._phases: dict[str, tuple[int, int]] = {}  # those that run: done, of how many
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                _, steps = self._phases.get(phase_name, (0, step + 1))
                self._phases[phase_name] = (step + 1, steps)
                if progress is not None:
                    progress(phase_name, self._share())
            return not interrupts

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _share(self) -> float:
            share = 0.0
            for done, steps in reversed(self._phases.values()):  # a phase is a step of the last
                share = min((done + share) / max(steps, 1), 1.0)
            return share

    return Monitor()


def _targets(module: Any, kind: str, names: Sequence[str]) -> list[Any]:
    """The library's own values for ``sm86``, ...; empty for its default."""
    if not names:
        return []
    if kind == "trt":
        expected = "none with --engine trt, which builds for the GPU that is here"
        fix = "leave it out, or build with --engine trt-rtx"
        raise ConfigError("--compute-capability", expected, ",".join(names), fix)
    known = [CURRENT, *compute_capabilities(module)]
    for name in names:
        if name not in known:
            if re.fullmatch(r"sm\d+", name):
                check_gpu(module, kind, name)
            raise bad_option("--compute-capability", ", ".join(known), name)
    return [getattr(module.ComputeCapability, name.upper()) for name in dict.fromkeys(names)]


def _built_for(module: Any, kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """What an engine of these options will run on.

    Raises:
        BackendError: It is to run on the GPU that is here, and there is none that would do.
    """
    if kind == "trt" or CURRENT in names:
        gpu = open_cuda().compute_capability()
        check_gpu(module, kind, gpu)
        return (gpu,)
    if names:
        return tuple(dict.fromkeys(names))
    # What the header of such an engine says (seen with 1.7.1): Ampere and newer of those that the
    # library names, and what is newer than all of them. 8.7, 9.0, 10.x and 11.0 are not among them.
    *older, newest = compute_capabilities(module)
    oldest = sm_number(_OLDEST_BY_DEFAULT)
    return (*(name for name in older if sm_number(name) >= oldest), f"{newest}+")


_ERASE = "\r\x1b[K"


@contextlib.contextmanager
def build_progress(what: str) -> Iterator[OnProgress | None]:
    """Show a build on standard error while it lasts, if somebody watches.

    Args:
        what: What is built, for people.

    Yields:
        What :func:`build_engine` takes as ``progress``; None where nobody watches.
    """
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda phase, share: _write(f"{_ERASE}{what}: {share:.0%}, {phase.lower()}")
    finally:
        _write(_ERASE)


def _write(text: str) -> None:
    """Write what may be lost: a terminal that went away must not end a build."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
