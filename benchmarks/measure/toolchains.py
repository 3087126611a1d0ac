"""What one would pick instead of this toolkit, each in the best setting that its makers document.

A toolchain is opened for one kind of work and gives a function from pictures to logits. The
normalisation is part of that function, done the way that the toolchain offers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure.networks import DEPLOY, STRAIGHT, Network
from benchmarks.measure.sessions import Infer, open_infer
from efficientface_deploy import load
from efficientface_deploy.artifact import OUTPUTS, UINT8_INPUT
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench.requirements import missing_reason
from efficientface_export.graph.trace import UInt8Model

_CONVERSION_SECONDS = 120


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


# Opens a network for a kind of work, by torch's export or ours where a file is needed. The first
# call may compile.
Open = Callable[[Network, str, Work], Infer]


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A way to run a network.

    Attributes:
        name: In tables.
        library: Its family, for ``--libraries``.
        opener: Opens it.
        setting: What it is told, where that is documented, and why so.
        needs: Modules that must be importable.
        graph: What it is given: torch's export or ours.
        precision: ``fp32``, or ``own`` for what the library rounds to by default.
        batches_only: Whether it is no use for single pictures.
        one_by_one: Whether a batch is run as single pictures, one on each thread; what it opens
            must be thread-safe.
    """

    name: str
    library: str
    opener: Open
    setting: str
    needs: tuple[str, ...] = ()
    graph: str = STRAIGHT
    precision: str = "fp32"
    batches_only: bool = False
    one_by_one: bool = False

    def takes(self, work: Work) -> bool:
        """Whether it is meant for this work."""
        return work.batch > 1 or not self.batches_only

    def open(self, network: Network, work: Work) -> Infer:
        """A function from pictures to logits.

        Raises:
            UnavailableError: A package or a compiler is missing, or a converter failed.
        """
        if reason := missing_reason(*self.needs):
            raise UnavailableError(reason)
        if not self.one_by_one or work.batch == 1:
            return self.opener(network, self.graph, work)
        return one_by_one(self.opener(network, self.graph, Work(1, 1)), work.threads)


def one_by_one(infer: Infer, threads: int) -> Infer:
    """Run a batch as single pictures, one on each thread; ``infer`` must be thread-safe."""
    pool = ThreadPoolExecutor(threads)  # its threads end with it

    def infer_all(pictures: UInt8Array) -> Float32Array:
        return np.concatenate(list(pool.map(infer, pictures[:, None])))  # N x (1, S, S, 3)

    return infer_all


def open_ours(network: Network, graph: str, work: Work) -> Infer:
    """This toolkit, as one embeds it: its export, through its runtime, all checks included."""
    path = network.onnx(graph)
    predictor = load(path, backend="onnx:cpu", threads=work.threads)
    return lambda pictures: predictor.infer(pictures)[0]


def open_eager(network: Network, graph: str, work: Work) -> Infer:
    """PyTorch as the published test script has it: evaluation mode, no gradients, NCHW floats."""
    mean = torch.tensor(network.spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(network.spec.std).view(1, 3, 1, 1)

    def infer(pictures: UInt8Array) -> Float32Array:
        with torch.no_grad():
            planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
            logits: Tensor = network.module(planes.float().div_(255).sub_(mean).div_(std))
        return np.asarray(logits.numpy())

    return infer


def open_compiled(network: Network, graph: str, work: Work) -> Infer:
    """PyTorch compiled by inductor for this very shape, normalisation included."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        reason = f"no C++ compiler {compiler!r} here, which inductor needs; install g++"
        raise UnavailableError(reason)
    torch._dynamo.reset()
    compiled = torch.compile(UInt8Model(network.module, network.spec).eval(), dynamic=False)

    def infer(pictures: UInt8Array) -> Float32Array:
        with torch.no_grad():
            logits: Tensor = compiled(torch.from_numpy(pictures))[0]
        return np.asarray(logits.numpy())

    return infer


def open_onnxruntime(network: Network, graph: str, work: Work) -> Infer:
    """ONNX Runtime with all its optimisations."""
    return open_infer(network.onnx(graph), work.threads)


def import_openvino() -> Any:
    """OpenVINO without its telemetry: it reports its own import, where that package is there."""
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def open_openvino(network: Network, graph: str, work: Work, precision: str | None = "f32") -> Infer:
    """OpenVINO for one request at a time; precision None leaves that to the library."""
    openvino = import_openvino()
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": work.threads}
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(str(network.onnx(graph)), "CPU", config)
    request = compiled.create_infer_request()

    def infer(pictures: UInt8Array) -> Float32Array:
        # The output's memory belongs to the request: copied, as one would before the next call.
        found = request.infer([pictures], share_inputs=True, share_outputs=True)
        return np.array(found[0])

    return infer


def open_ncnn(network: Network, graph: str, work: Work, rounded: bool = False) -> Infer:
    """Ncnn, which has no batches; ``rounded`` leaves pnnx and ncnn their FP16."""
    import ncnn
    import pnnx

    spec, side = network.spec, network.spec.input_size
    folder = network.folder / f"ncnn-{graph}-{'fp16' if rounded else 'fp32'}"
    param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
    if not weights.exists():
        folder.mkdir(parents=True)
        shutil.copy(network.onnx(graph, float_input=True), folder / "model.onnx")
        options = [f"inputshape=[1,3,{side},{side}]f32", f"fp16={int(rounded)}"]
        _run_converter([pnnx.EXEC_PATH, "model.onnx", *options], folder, weights)
    net = ncnn.Net()
    net.opt.num_threads = work.threads
    if not rounded:
        for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
            setattr(net.opt, f"use_{name}", False)
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise UnavailableError("ncnn could not load what pnnx wrote")
    mean, scale = [255 * value for value in spec.mean], [1 / (255 * value) for value in spec.std]

    def infer(pictures: UInt8Array) -> Float32Array:
        image = ncnn.Mat.from_pixels(pictures[0], ncnn.Mat.PixelType.PIXEL_RGB, side, side)
        image.substract_mean_normalize(mean, scale)
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return np.array(extractor.extract("out0")[1])[None]  # (1, C)

    return infer


def open_mnn(network: Network, graph: str, work: Work) -> Infer:
    """MNN by its module interface, normalisation in the graph."""
    import MNN

    path = network.folder / f"{graph}.mnn"
    if not path.exists():
        # By the converter's own function: the package's command installs another one by pip.
        code = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
        options = ["-f", "ONNX", "--modelFile", network.onnx(graph), "--MNNModel", path]
        command = [sys.executable, "-c", code, *map(str, options), "--bizCode", "MNN"]
        _run_converter(command, network.folder, path)
    config = {"backend": "CPU", "numThread": work.threads, "precision": "high"}
    runtime = MNN.nn.create_runtime_manager((config,))
    names = [UINT8_INPUT], list(OUTPUTS[:1])
    module = MNN.nn.load_module_from_file(str(path), *names, runtime_manager=runtime)
    plain, uint8 = MNN.expr.NCHW, MNN.expr.uint8  # dimensions in the order of the ONNX file

    def infer(pictures: UInt8Array) -> Float32Array:
        image = MNN.expr.const(pictures, list(pictures.shape), plain, uint8)
        return np.array(module.forward([image])[0].read())

    return infer


def _run_converter(command: list[str], folder: Path, result: Path) -> None:
    """Convert in a process of its own, which may crash.

    Raises:
        UnavailableError: It did not write its result.
    """
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_CONVERSION_SECONDS
    )
    if done.returncode or not result.exists():
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UnavailableError(f"its converter failed with exit code {done.returncode}: {last}")


# ---- the toolchains, each as its makers document it

_OPENVINO = "https://docs.openvino.ai/2025/openvino-workflow/running-inference/optimize-inference"
_HINTS = f"{_OPENVINO}/high-level-performance-hints.html"
_NCNN = (
    "https://github.com/Tencent/ncnn/blob/master/docs/how-to-use-and-FAQ/openmp-best-practice.md"
)

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
        open_ours,
        "one predictor with threads=1, shared by N threads of the application",
        graph=DEPLOY,
        batches_only=True,
        one_by_one=True,
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
_GIVEN_ONE = (
    EAGER,
    Toolchain(
        "torch.compile",
        "pytorch",
        open_compiled,
        "inductor's default mode, dynamic=False (https://docs.pytorch.org/docs/stable/generated/"
        "torch.compile.html); max-autotune and freezing were not faster when tried by hand",
    ),
    ONNXRUNTIME,
    Toolchain(
        "ONNX Runtime, a picture to each thread",
        "onnxruntime",
        open_onnxruntime,
        "one session with intra_op_num_threads=1, shared by N threads of the application",
        batches_only=True,
        one_by_one=True,
    ),
)
_GIVEN_BOTH = (
    Toolchain(
        "OpenVINO",
        "openvino",
        open_openvino,
        "PERFORMANCE_HINT=LATENCY, INFERENCE_NUM_THREADS=N, inputs and outputs shared "
        f"({_HINTS}); INFERENCE_PRECISION_HINT=f32, so that it computes what the others do",
        needs=("openvino",),
    ),
    Toolchain(
        "OpenVINO, its default precision",
        "openvino",
        functools.partial(open_openvino, precision=None),
        "as OpenVINO, without INFERENCE_PRECISION_HINT: bf16 where the CPU has instructions for it "
        f"({_OPENVINO}/precision-control.html)",
        needs=("openvino",),
        precision="own",
    ),
    Toolchain(
        "ncnn",
        "ncnn",
        open_ncnn,
        "by pnnx with fp16=0, opt.use_fp16_* and opt.use_bf16_storage off; opt.num_threads=N for "
        f"one picture ({_NCNN}); ncnn has no batches: a picture to each thread, faster than N "
        "threads for each",
        needs=("ncnn", "pnnx"),
        one_by_one=True,
    ),
    Toolchain(
        "ncnn, its default precision",
        "ncnn",
        functools.partial(open_ncnn, rounded=True),
        "as ncnn, with pnnx's and ncnn's defaults: fp16 weights and storage where the CPU can",
        needs=("ncnn", "pnnx"),
        precision="own",
        one_by_one=True,
    ),
    Toolchain(
        "MNN",
        "mnn",
        open_mnn,
        "nn.load_module_from_file with numThread=N, precision=high "
        "(https://github.com/alibaba/MNN/blob/2.6.3/docs/pymnn/Interpreter.md); converted by "
        "_tools.mnnconvert, without the command around it, which installs and asks for telemetry",
        needs=("MNN",),
    ),
)
_GIVEN_OURS = [
    dataclasses.replace(one, name=f"{one.name}, our graph", graph=DEPLOY) for one in _GIVEN_BOTH
]
TOOLCHAINS = (*OURS, *_GIVEN_ONE, *_GIVEN_BOTH, *_GIVEN_OURS)


@contextmanager
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
