"""A small prepared data set and short trainings, shared by the tests of training."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.command import run_command
from efficientface_deploy.models import EfficientFace, LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.dataset import Dataset, read_dataset
from training import prepare
from training.trainer.checkpointing import lock
from training.trainer.config import Job, TrainConfig
from training.trainer.distributed import Distributed
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.loop import train
from training.trainer.recipe import Recipe
from training.trainer.targets import TargetFunction, loaded_targets


@pytest.fixture(autouse=True)
def cpu_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """No GPU for training, though ``auto`` would take one: results are the same on CPUs alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("gpu"):
            yield
            return
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes of their own
        yield


RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    learning_rate=0.02,
    weight_decay=5e-4,
    schedule="one-cycle",
    loss="cross-entropy",
    augmentation="mild",
    nesterov=True,
)


@pytest.fixture(scope="session")
def face_set(once: Callable[..., Path]) -> Path:
    """Prepared synthetic faces: eight of each class to train on, four to test."""

    def fill(folder: Path) -> None:
        arguments = ["synthetic", "--train", "56", "--test", "28", "--size", "48"]
        assert prepare.main([*arguments, "--out", str(folder / "faces")]) == 0

    return once("training-data", fill) / "faces"


@pytest.fixture(scope="session")
def ldg() -> LabelDistributionGenerator:
    """A ResNet-18 that tells its inputs apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LabelDistributionGenerator(7, "resnet18")
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(8, 3, 48, 48))
            model.backbone.fc.weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="session")
def student_file(
    face_set: Path,
    make_network: Callable[..., EfficientFace],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Checkpoint of a lively network for the data set."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_checkpoint(path, make_network(), read_dataset(face_set).spec.replace(input_size=64))
    return path


@pytest.fixture(scope="session")
def teacher_file(
    face_set: Path, ldg: LabelDistributionGenerator, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Checkpoint of the LDG for the data set."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    spec = read_dataset(face_set).spec.replace(architecture="resnet18", input_size=48)
    save_checkpoint(path, ldg, spec)
    return path


@pytest.fixture
def save_ldg(ldg: LabelDistributionGenerator, tmp_path: Path) -> Callable[..., Path]:
    """Write the LDG with a changed spec."""

    def save(**changes: Any) -> Path:
        spec = preset("rafdb").replace(architecture="resnet18", input_size=64, **changes)
        save_checkpoint(tmp_path / "teacher.safetensors", ldg, spec)
        return tmp_path / "teacher.safetensors"

    return save


@pytest.fixture
def make_job(face_set: Path, tmp_path: Path) -> Callable[..., Job]:
    """A student's job; keywords change its recipe or its options."""

    def make(**changes: Any) -> Job:
        changes = {"out": tmp_path / "run", "input_size": 32, "workers": 0} | changes
        changes = {"tensorboard": False} | changes
        options = {field.name for field in dataclasses.fields(TrainConfig)}
        of_recipe = {name: changes.pop(name) for name in set(changes) - options}
        config = TrainConfig(data=face_set, **changes)
        recipe = config.change(dataclasses.replace(RECIPE, **of_recipe))
        dataset = read_dataset(face_set)
        spec = config.model_spec(dataset, "efficientface")
        return Job("student", spec, recipe, dataset, config)

    return make


@pytest.fixture
def fit() -> Callable[..., Path]:
    """Do a job with a fresh EfficientFace."""

    def fit(
        job: Job, target_function: TargetFunction = loaded_targets, votes: bool = False
    ) -> Path:
        dist = Distributed(torch.device("cpu"))
        with lock(job, dist):
            samples, selection = choose_samples(job, dist)
            name, seed = job.recipe.augmentation, job.config.seed
            images = TrainingImages(samples, job.spec, name, seed, votes=votes)
            torch.manual_seed(job.config.seed)
            model = EfficientFace(job.spec.num_classes)
            train(job, model, images, selection, target_function, dist)
        return job.result

    return fit


# ---- Data sets in their native layouts


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """An image file of noise; each seed gives another."""

    def encode(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
        random = np.random.default_rng(seed)
        # Coarse, so that JPEG keeps what a test compares.
        coarse = random.integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse.repeat(10, axis=0).repeat(10, axis=1)).save(buffer, kind)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def as_folder() -> Callable[[Path, dict[str, bytes]], Path]:
    """Write files, relative path to content, into a folder."""

    def write(root: Path, files: dict[str, bytes]) -> Path:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root

    return write


@pytest.fixture(scope="session")
def as_zip() -> Callable[[Path, dict[str, bytes]], Path]:
    """Write files, relative path to content, into a zip archive."""

    def write(path: Path, files: dict[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path

    return write


@pytest.fixture(params=["folder", "wrapped folder", "zip", "wrapped zip"])
def lay_out(
    request: pytest.FixtureRequest,
    as_folder: Callable[[Path, dict[str, bytes]], Path],
    as_zip: Callable[[Path, dict[str, bytes]], Path],
    tmp_path: Path,
) -> Callable[[dict[str, bytes]], Path]:
    """Write a source in each way in which people have it."""

    def write(files: dict[str, bytes]) -> Path:
        if "wrapped" in request.param:
            files = {f"download/set/{name}": data for name, data in files.items()}
            files["__MACOSX/download/set/._x"] = b"what macOS adds"
        if "folder" in request.param:
            return as_folder(tmp_path / "source", files)
        return as_zip(tmp_path / "source.zip", files)

    return write


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """All files of a folder: relative path to content."""

    def read(root: Path) -> dict[str, bytes]:
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }

    return read


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Dataset]:
    """Run ``training.prepare`` into ``tmp_path/out`` and read what it made."""

    def run(command: str, source: Path, *options: str) -> Dataset:
        out = tmp_path / "out"
        arguments = [command, "--source", str(source), "--out", str(out), *options]
        assert prepare.main(arguments) == 0
        return read_dataset(out)

    return run


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``training.prepare`` as a user does; the one line that it refuses with, exit code 2."""

    def run(command: str, source: Path, *options: str) -> str:
        before = sorted(tmp_path.iterdir())
        arguments = [command, "--source", str(source), "--out", str(tmp_path / "out"), *options]
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: prepare.main(arguments))
        assert caught.value.code == 2
        assert sorted(tmp_path.iterdir()) == before  # nothing half-written
        *reports, error = capsys.readouterr().err.splitlines()
        assert all(report.startswith("left out ") for report in reports)
        assert error.startswith("error: ")
        return error

    return run


@pytest.fixture
def labelled() -> Callable[[Dataset, str], dict[str, str]]:
    """File name to label's name, of every image of a split."""

    def read(dataset: Dataset, split: str) -> dict[str, str]:
        samples = dataset.samples[split]
        return {sample.path.name: dataset.labels[sample.label] for sample in samples}

    return read
