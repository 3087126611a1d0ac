"""Fixtures of the export's tests: small networks, faces, and one whole export."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest

from efficientface_deploy.command import run_command
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.preprocess import normalise
from efficientface_deploy.workbench.dataset import iterate_batches, read_dataset
from efficientface_export.cli import main
from efficientface_export.int8.qdq import SCHEMES, quantise, quantised_groups
from efficientface_export.int8.ranges import activation_amax, tensor_ranges
from training import prepare
from training.datasets.ferplus import majority_label

if TYPE_CHECKING:
    from efficientface_deploy.models import EfficientFace

SIDE = 64
FERPLUS_TRAIN, FERPLUS_VALIDATION = 120, 300
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def small_spec() -> ModelSpec:
    """Seven labels, colour, 64 pixels."""
    return preset("rafdb").replace(input_size=SIDE, name="test")


@pytest.fixture(scope="session")
def faces(once: Callable[..., Path]) -> Path:
    """A prepared data set of synthetic faces: 105 to train, 14 to test."""

    def fill(folder: Path) -> None:
        arguments = ["synthetic", "--train", "105", "--test", "14", "--size", str(SIDE)]
        with contextlib.redirect_stdout(io.StringIO()):
            assert prepare.main([*arguments, "--out", str(folder / "faces")]) == 0

    return once("export-data", fill) / "faces"


@pytest.fixture(scope="session")
def student(
    make_network: Callable[..., EfficientFace],
    faces: Path,
    small_spec: ModelSpec,
    once: Callable[..., Path],
) -> Path:
    """A checkpoint of ours, ``student.safetensors``."""
    from efficientface_deploy.models import save_checkpoint

    def fill(folder: Path) -> None:
        network = _fit(make_network(side=SIDE), faces, small_spec)
        save_checkpoint(folder / "student.safetensors", network, small_spec)

    return once("export-student", fill) / "student.safetensors"


def _fit(model: EfficientFace, faces: Path, spec: ModelSpec) -> EfficientFace:
    """Make batch norms that fit the faces, and a head that is fitted to them.

    A random head would be as lively, but its logits would be mostly rounding errors in INT8.
    """
    import torch

    samples = read_dataset(faces).split("train")
    pictures, labels = next(iter(iterate_batches(samples, spec, len(samples))))
    pixels = torch.from_numpy(normalise(pictures, spec))
    features: list[torch.Tensor] = []
    hook = model.fc.register_forward_hook(lambda module, given, output: features.append(given[0]))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None  # the plain average over what follows
        model.train()(pixels)
        model.eval()(pixels)
        hook.remove()
        mean = features[-1].mean(dim=0)
        centred = features[-1] - mean  # (N, 1024)
        targets = torch.nn.functional.one_hot(torch.from_numpy(labels), 7).float()
        kernel = centred @ centred.T + 3 * torch.eye(len(samples))  # ridge regression
        weight = torch.linalg.solve(kernel, targets - targets.mean(dim=0)).T @ centred  # (7, 1024)
        weight *= 0.4 / (centred @ weight.T).std()
        model.fc.weight.copy_(weight)
        model.fc.bias.copy_(-weight @ mean)
    return model


@pytest.fixture(scope="session")
def network(student: Path) -> EfficientFace:
    """The network of :func:`student`: random features, and a head that was fitted to the faces."""
    from efficientface_deploy.models import load_checkpoint

    return load_checkpoint(student)[0]


@pytest.fixture(scope="session")
def images(faces: Path, small_spec: ModelSpec) -> np.ndarray:
    """Forty of these faces as the model takes them: uint8 (40, 64, 64, 3)."""
    samples = read_dataset(faces).split("train")  # sorted by class
    chosen = [samples[index] for index in np.linspace(0, len(samples) - 1, 40).astype(int)]
    return next(iter(iterate_batches(chosen, small_spec, 40)))[0]


@pytest.fixture(scope="session")
def exported(student: Path, faces: Path, once: Callable[..., Path]) -> Path:
    """The folder of one export: all precisions for a CPU. Copy it to change it."""
    command = ["--engine", "onnx", "--weights", student, "--precision", "all", "--calib", faces]
    command += ["--no-int8-search"]  # most of a minute, and its own tests
    command += ["--graph", "plain"]  # as anybody's exporter writes it; the other has its own tests

    def fill(folder: Path) -> None:
        out = folder / "artifacts"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert main([*map(str, command), "--out", str(out)]) == 0
        (out / "stdout.txt").write_text(output.getvalue())

    return once("export", fill) / "artifacts"


@pytest.fixture
def artifacts(exported: Path, tmp_path: Path) -> Path:
    """A copy of :func:`exported` that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "artifacts"))


@pytest.fixture(scope="session")
def graph(exported: Path) -> onnx.ModelProto:
    """The FP32 graph of :func:`student`."""
    return onnx.load(exported / "efficientface-fp32-cpu.onnx")


@pytest.fixture(scope="session")
def int8_of() -> Callable[..., onnx.ModelProto]:
    """Gives INT8 of a graph, with ranges of some images, as a kind of processor wants it."""

    def convert(
        graph: onnx.ModelProto,
        images: np.ndarray,
        method: str = "minmax",
        exclude: Iterable[str] = (),
        target: str = "gpu",
    ) -> onnx.ModelProto:
        ranges, scheme = tensor_ranges(graph, images), SCHEMES[target]
        names = [name for group in quantised_groups(graph, scheme) for name in group.tensors]
        amax = activation_amax(graph, {name: ranges[name] for name in names}, images, method)
        return quantise(graph, amax, scheme, exclude)

    return convert


@pytest.fixture(scope="session")
def int8(
    graph: onnx.ModelProto, images: np.ndarray, int8_of: Callable[..., onnx.ModelProto]
) -> onnx.ModelProto:
    """:func:`graph` in INT8 for a GPU."""
    return int8_of(graph, images)


@pytest.fixture(scope="session")
def traced(network: EfficientFace, once: Callable[..., Path]) -> Callable[..., onnx.ModelProto]:
    """The network's graph for a spec; it takes ten seconds."""
    from efficientface_export.graph.trace import trace

    def graph(name: str, spec: ModelSpec, **options: Any) -> onnx.ModelProto:
        def fill(folder: Path) -> None:
            onnx.save(trace(network, spec, **options), folder / "graph.onnx")

        return onnx.load(once(name, fill) / "graph.onnx")

    return graph


@pytest.fixture(scope="session")
def grey_graph(traced: Callable[..., onnx.ModelProto], small_spec: ModelSpec) -> onnx.ModelProto:
    """The same network for a grey spec."""
    return traced("grey-graph", small_spec.replace(colour="grey"))


@pytest.fixture(scope="session")
def float_graph(traced: Callable[..., onnx.ModelProto], small_spec: ModelSpec) -> onnx.ModelProto:
    """The same network with ``--float-input``."""
    return traced("float-graph", small_spec, float_input=True)


@pytest.fixture(scope="session")
def prototype(shared: Path) -> Path:
    """Real weights, trained on FER+ at 96 pixels, in the published form."""
    return shared / "reference" / "ferplus_prototype_96.pth.tar"


@pytest.fixture(scope="session")
def ferplus(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of FER+ in the published layout: 120 images to train, 300 to validate."""
    root = tmp_path_factory.mktemp("ferplus")
    parts = (
        ("train", "FER2013Train", FERPLUS_TRAIN),
        ("validation", "FER2013Valid", FERPLUS_VALIDATION),
    )
    with zipfile.ZipFile(shared / "data" / "ferplus.zip") as archive:
        for split, folder, count in parts:
            for name, label in _majority_labels(archive, folder)[:count]:
                target = root / split / str(label) / Path(name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    return root


def _majority_labels(archive: zipfile.ZipFile, folder: str) -> list[tuple[str, int]]:
    listing = next(name for name in archive.namelist() if name.endswith(f"{folder}/label.csv"))
    rows = csv.reader(io.StringIO(archive.read(listing).decode()))
    labelled = [(row[0], majority_label([int(float(votes)) for votes in row[2:]])) for row in rows]
    parent = listing.removesuffix("label.csv")
    return [(parent + name, label) for name, label in labelled if label is not None]


@pytest.fixture
def exit_code(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``efficientface-export`` to its exit code; gives it, stdout and stderr."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: main([str(argument) for argument in arguments]))
        output = capsys.readouterr()
        return int(str(stop.value.code)), output.out, output.err

    return run


@pytest.fixture
def run_without(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``efficientface-export`` in a process where some packages are not installed."""

    def run(missing: tuple[str, ...], *arguments: Any) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        code = (
            "import sys\n"
            f"sys.modules.update(dict.fromkeys({missing!r}))\n"
            "from efficientface_deploy.launch import export\n"
            "export()\n"
        )
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": ""},
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def infer() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Run a graph, as it is or as a path, in ONNX Runtime: logits and probabilities."""

    def run(
        model: onnx.ModelProto | Path, images: np.ndarray, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        content = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            content, settings, providers=["CPUExecutionProvider"], **options
        )
        logits, probabilities = session.run(None, {session.get_inputs()[0].name: images})
        return logits, probabilities

    return run
