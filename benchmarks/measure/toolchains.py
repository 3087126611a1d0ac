"""What one would pick instead of this toolkit, each in the best setting that its makers document.

A toolchain is opened for one kind of work and gives a function from pictures to logits. The
normalisation is part of that function, done the way that the toolchain offers.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from benchmarks.measure.networks import DEPLOY, STRAIGHT, Network, open_session
from efficientface_deploy import load
from efficientface_deploy.artifact import UINT8_INPUT
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_export.graph.trace import UInt8Model

Infer = Callable[[UInt8Array], Float32Array]


_CONVERSION_SECONDS = 120
_LOGITS = "logits"


class UnavailableError(Exception):
    """A toolchain that cannot take part here; says why, and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call does: ``batch`` pictures on ``threads`` CPU threads."""

    threads: int
    batch: int

    @property
    def name(self) -> str:
        """E.g. ``batch 1, 2 threads``."""
        return f"batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


Open = Callable[[Network, Work, contextlib.ExitStack], Infer]


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A way to run a network.

    Attributes:
        name: In tables.
        library: Its family, for ``--libraries``.
        open: Opens a network for a kind of work; what must be closed goes on the stack. The first
            call may compile.
        setting: What it is told, where that is documented, and why so.
        needs: Modules that must be importable.
        graph: What it is given: torch's export or ours.
        precision: ``fp32``, or ``own`` for what the library rounds to by default.
        batches: True: for batches alone; False: for single pictures alone; None: for both.
    """

    name: str
    library: str
    open: Open
    setting: str
    needs: tuple[str, ...] = ()
    graph: str = STRAIGHT
    precision: str = "fp32"
    batches: bool | None = None

    def takes(self, work: Work) -> bool:
        """Whether it is meant for this work."""
        return self.batches in (None, work.batch > 1)

    def require_packages(self) -> None:
        """Raise :class:`UnavailableError` where a package is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise UnavailableError(
                f"no {' and no '.join(missing)} here; pip install 'efficientface-deploy[peers]'"
            )


def one_by_one(infer: Infer, work: Work, stack: contextlib.ExitStack) -> Infer:
    """Run a batch as single pictures, one on each thread; ``infer`` must be thread-safe."""
    if work.batch == 1:
        return infer
    pool = stack.enter_context(ThreadPoolExecutor(work.threads))

    def infer_all(pictures: UInt8Array) -> Float32Array:
        return np.concatenate(list(pool.map(infer, pictures[:, None])))  # N x (1, S, S, 3)

    return infer_all


def open_ours(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """This toolkit, as one embeds it: its export, through its runtime, all checks included."""
    path = network.onnx(DEPLOY)
    predictor = stack.enter_context(load(path, backend="onnx:cpu", threads=work.threads))
    return lambda pictures: predictor.infer(pictures)[0]


def open_ours_one_by_one(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """The same, shared by as many threads as there are, each with a picture of its own."""
    single = Work(threads=1, batch=1)
    return one_by_one(open_ours(network, single, stack), work, stack)


def open_eager(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """PyTorch as the published test script has it: evaluation mode, no gradients, NCHW floats."""
    module, normalise = network.module, _TensorNormalise(network.spec)

    def infer(pictures: UInt8Array) -> Float32Array:
        with torch.no_grad():
            planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
            logits: Tensor = module(normalise(planes))
        return np.asarray(logits.numpy())

    return infer


def open_channels_last(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """PyTorch with the channels of a pixel side by side, as they are in the picture."""
    # A copy: the network's own layout is what the others are given.
    module: Any = copy.deepcopy(network.module)
    module.to(memory_format=torch.channels_last)
    normalise = _TensorNormalise(network.spec)

    def infer(pictures: UInt8Array) -> Float32Array:
        with torch.no_grad():
            planes = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (N, 3, S, S), NHWC in memory
            logits: Tensor = module(normalise(planes))
        return np.asarray(logits.numpy())

    return infer


def open_compiled(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """PyTorch compiled by inductor for this very shape, normalisation included."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UnavailableError(
            f"no C++ compiler {compiler!r} here, which inductor needs; install g++"
        )
    torch._dynamo.reset()
    compiled = torch.compile(UInt8Model(network.module, network.spec).eval(), dynamic=False)

    def infer(pictures: UInt8Array) -> Float32Array:
        with torch.no_grad():
            logits: Tensor = compiled(torch.from_numpy(pictures))[0]
        return np.asarray(logits.numpy())

    return infer


def open_onnxruntime(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """ONNX Runtime with all its optimisations on torch's export."""
    session = open_session(onnx.load(network.onnx(STRAIGHT)), work.threads)
    return lambda pictures: np.asarray(session.run([_LOGITS], {UINT8_INPUT: pictures})[0])


def open_onnxruntime_one_by_one(network: Network, work: Work, stack: contextlib.ExitStack) -> Infer:
    """The same, shared by as many threads as there are, each with a picture of its own."""
    single = Work(threads=1, batch=1)
    return one_by_one(open_onnxruntime(network, single, stack), work, stack)


def open_openvino(
    network: Network, work: Work, stack: contextlib.ExitStack, *, graph: str, precision: str | None
) -> Infer:
    """OpenVINO for one request at a time."""
    request = _compile_openvino(network, work, graph, "LATENCY", precision).create_infer_request()

    def infer(pictures: UInt8Array) -> Float32Array:
        # The output's memory belongs to the request: copied, as one would before the next call.
        found = request.infer([pictures], share_inputs=True, share_outputs=True)
        return np.array(found[0])

    return infer


def open_openvino_queue(
    network: Network, work: Work, stack: contextlib.ExitStack, *, graph: str
) -> Infer:
    """OpenVINO for throughput: a request for each picture, as many at once as it finds best."""
    import openvino

    queue = openvino.AsyncInferQueue(_compile_openvino(network, work, graph, "THROUGHPUT", "f32"))
    logits = np.empty((work.batch, network.spec.num_classes), np.float32)  # (N, C)

    def keep(request: Any, index: int) -> None:
        logits[index] = request.get_output_tensor(0).data[0]

    queue.set_callback(keep)

    def infer(pictures: UInt8Array) -> Float32Array:
        for index in range(len(pictures)):
            queue.start_async([pictures[index : index + 1]], index, share_inputs=True)
        queue.wait_all()
        return logits.copy()

    return infer


def open_ncnn(
    network: Network, work: Work, stack: contextlib.ExitStack, *, graph: str, rounded: bool
) -> Infer:
    """Ncnn, which has no batches: the threads share a picture, or have one each."""
    import ncnn

    param, weights = _convert_to_ncnn(network, graph, rounded)
    net = ncnn.Net()
    net.opt.num_threads = work.threads if work.batch == 1 else 1
    if not rounded:
        for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
            setattr(net.opt, f"use_{name}", False)
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise UnavailableError("ncnn could not load what pnnx wrote")
    side, spec = network.spec.input_size, network.spec
    mean, scale = [255 * value for value in spec.mean], [1 / (255 * value) for value in spec.std]

    def infer(pictures: UInt8Array) -> Float32Array:
        image = ncnn.Mat.from_pixels(pictures[0], ncnn.Mat.PixelType.PIXEL_RGB, side, side)
        image.substract_mean_normalize(mean, scale)
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return np.array(extractor.extract("out0")[1])[None]  # (1, C)

    return one_by_one(infer, work, stack)


def open_mnn(network: Network, work: Work, stack: contextlib.ExitStack, *, graph: str) -> Infer:
    """MNN by its module interface, normalisation in the graph."""
    import MNN

    runtime = MNN.nn.create_runtime_manager(
        ({"backend": "CPU", "numThread": work.threads, "precision": "high"},)
    )
    module = MNN.nn.load_module_from_file(
        str(_convert_to_mnn(network, graph)), [UINT8_INPUT], [_LOGITS], runtime_manager=runtime
    )
    plain, uint8 = MNN.expr.NCHW, MNN.expr.uint8  # dimensions in the order of the ONNX file

    def infer(pictures: UInt8Array) -> Float32Array:
        image = MNN.expr.const(pictures, list(pictures.shape), plain, uint8)
        return np.array(module.forward([image])[0].read())

    return infer


OURS = (
    Toolchain(
        "EfficientFace Deploy",
        "ours",
        open_ours,
        "efficientface-export's FP32 graph for a CPU, ef.load(threads=N).infer()",
        graph=DEPLOY,
    ),
    Toolchain(
        "EfficientFace Deploy, a picture to each thread",
        "ours",
        open_ours_one_by_one,
        "one predictor with threads=1, shared by N threads of the application",
        graph=DEPLOY,
        batches=True,
    ),
)

EAGER = Toolchain(
    "PyTorch eager",
    "pytorch",
    open_eager,
    "model.eval(), torch.no_grad(), contiguous float input, as in the published test script",
)

ONNXRUNTIME = Toolchain(
    "ONNX Runtime",
    "onnxruntime",
    open_onnxruntime,
    "torch.onnx.export(dynamo=True), which optimises; ORT_ENABLE_ALL and intra_op_num_threads "
    "(https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html)",
)

_OPENVINO_HINTS = (
    "https://docs.openvino.ai/2025/openvino-workflow/running-inference/optimize-inference/"
    "high-level-performance-hints.html"
)
_OPENVINO_PRECISION = (
    "https://docs.openvino.ai/2025/openvino-workflow/running-inference/optimize-inference/"
    "precision-control.html"
)
_NCNN = (
    "https://github.com/Tencent/ncnn/blob/master/docs/how-to-use-and-FAQ/openmp-best-practice.md"
)


def _given(name: str, graph: str) -> str:
    return name if graph == STRAIGHT else f"{name}, our graph"


def _openvino(graph: str) -> tuple[Toolchain, ...]:
    make = functools.partial(Toolchain, library="openvino", needs=("openvino",), graph=graph)
    return (
        make(
            _given("OpenVINO", graph),
            open=functools.partial(open_openvino, graph=graph, precision="f32"),
            setting="PERFORMANCE_HINT=LATENCY, INFERENCE_NUM_THREADS=N, inputs and outputs shared "
            f"({_OPENVINO_HINTS}); INFERENCE_PRECISION_HINT=f32, so that it computes what the "
            "others do",
        ),
        make(
            _given("OpenVINO, throughput hint", graph),
            open=functools.partial(open_openvino_queue, graph=graph),
            setting="PERFORMANCE_HINT=THROUGHPUT and an AsyncInferQueue of the size that it "
            f"chooses, a request for each picture ({_OPENVINO_HINTS}); f32",
            batches=True,
        ),
        make(
            _given("OpenVINO, its default precision", graph),
            open=functools.partial(open_openvino, graph=graph, precision=None),
            setting="as OpenVINO, without INFERENCE_PRECISION_HINT: bf16 where the CPU has "
            f"instructions for it ({_OPENVINO_PRECISION})",
            precision="own",
        ),
    )


def _ncnn(graph: str) -> tuple[Toolchain, ...]:
    make = functools.partial(Toolchain, library="ncnn", needs=("ncnn", "pnnx"), graph=graph)
    return (
        make(
            _given("ncnn", graph),
            open=functools.partial(open_ncnn, graph=graph, rounded=False),
            setting="by pnnx with fp16=0, opt.use_fp16_* and opt.use_bf16_storage off; "
            f"opt.num_threads=N for one picture ({_NCNN}); ncnn has no batches: a picture to each "
            "thread, faster than N threads for each",
        ),
        make(
            _given("ncnn, its default precision", graph),
            open=functools.partial(open_ncnn, graph=graph, rounded=True),
            setting="as ncnn, with pnnx's and ncnn's defaults: fp16 weights and storage where the "
            "CPU can",
            precision="own",
        ),
    )


def _mnn(graph: str) -> Toolchain:
    return Toolchain(
        _given("MNN", graph),
        "mnn",
        functools.partial(open_mnn, graph=graph),
        "nn.load_module_from_file with numThread=N, precision=high "
        "(https://github.com/alibaba/MNN/blob/2.6.3/docs/pymnn/Interpreter.md); converted by "
        "_tools.mnnconvert, without the command around it, which installs and asks for telemetry",
        needs=("MNN", "_tools"),
        graph=graph,
    )


TOOLCHAINS = (
    *OURS,
    EAGER,
    Toolchain(
        "PyTorch eager, channels last",
        "pytorch",
        open_channels_last,
        "model.to(memory_format=torch.channels_last) "
        "(https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html)",
    ),
    Toolchain(
        "torch.compile",
        "pytorch",
        open_compiled,
        "inductor's default mode, dynamic=False (https://docs.pytorch.org/docs/stable/generated/"
        "torch.compile.html); max-autotune and freezing were not faster when tried by hand",
    ),
    ONNXRUNTIME,
    dataclasses.replace(
        ONNXRUNTIME,
        name="ONNX Runtime, a picture to each thread",
        open=open_onnxruntime_one_by_one,
        setting="one session with intra_op_num_threads=1, shared by N threads of the application",
        batches=True,
    ),
    *_openvino(STRAIGHT),
    *_openvino(DEPLOY),
    *_ncnn(STRAIGHT),
    *_ncnn(DEPLOY),
    _mnn(STRAIGHT),
    _mnn(DEPLOY),
)


@contextlib.contextmanager
def native_output_to_stderr() -> Iterator[None]:
    """Send what libraries print from C to standard error; standard output is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


class _TensorNormalise:
    """Planes, uint8 (N, 3, S, S), to normalised floats, as torchvision's transforms do it."""

    def __init__(self, spec: ModelSpec) -> None:
        self.mean = torch.tensor(spec.mean).view(1, 3, 1, 1)
        self.std = torch.tensor(spec.std).view(1, 3, 1, 1)

    def __call__(self, planes: Tensor) -> Tensor:
        return planes.float().div_(255).sub_(self.mean).div_(self.std)


def _compile_openvino(
    network: Network, work: Work, graph: str, hint: str, precision: str | None
) -> Any:
    import openvino

    config: dict[str, Any] = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": work.threads}
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = precision
    return openvino.Core().compile_model(str(network.onnx(graph)), "CPU", config)


def _convert_to_ncnn(network: Network, graph: str, rounded: bool) -> tuple[Path, Path]:
    import pnnx

    folder = network.folder / f"ncnn-{graph}-{'fp16' if rounded else 'fp32'}"
    param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    if not weights.exists():
        folder.mkdir(parents=True)
        shutil.copy(network.onnx(graph, float_input=True), folder / "model.onnx")
        side = network.spec.input_size
        _run_converter(
            [
                pnnx.EXEC_PATH,
                "model.onnx",
                f"inputshape=[1,3,{side},{side}]f32",
                f"fp16={int(rounded)}",
            ],
            folder,
            weights,
        )
    return param, weights


def _convert_to_mnn(network: Network, graph: str) -> Path:
    """By the converter's own function: the package's command installs another one by pip."""
    path = network.folder / f"{graph}.mnn"
    if not path.exists():
        source = network.onnx(graph)
        code = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
        options = ["-f", "ONNX", "--modelFile", source, "--MNNModel", path, "--bizCode", "MNN"]
        _run_converter([sys.executable, "-c", code, *map(str, options)], network.folder, path)
    return path


def _run_converter(command: list[str], folder: Path, result: Path) -> None:
    """Convert in a process of its own, which may crash.

    Raises:
        UnavailableError: It did not write its result.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_CONVERSION_SECONDS,
        check=False,
    )
    if done.returncode or not result.exists():
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UnavailableError(f"its converter failed with exit code {done.returncode}: {last}")
