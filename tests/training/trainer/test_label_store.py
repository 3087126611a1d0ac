from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch

from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.workbench.dataset import read_dataset
from training.trainer import label_store
from training.trainer.distributed import Distributed
from training.trainer.label_store import stored_distributions
from training.trainer.loader import Renderer, TrainingImages
from training.trainer.targets import Teacher

CPU = torch.device("cpu")
VIEWS = 2


@dataclasses.dataclass
class Setting:
    """Everything that a store is made from."""

    images: TrainingImages
    teacher: Teacher

    def get(self, path: Path, views: int = VIEWS) -> np.ndarray:
        alone = Distributed(CPU)
        return stored_distributions(path, self.images, self.teacher, views, "data", alone, 0)


@pytest.fixture
def make_setting(face_set, teacher_file):
    def make(
        augmentation: str = "mild",
        seed: int = 3,
        teacher: Path = teacher_file,
        amp: torch.dtype | None = None,
        **changes,
    ):
        dataset = read_dataset(face_set)
        spec = dataset.spec.replace(**{"input_size": 32} | changes)
        samples = dataset.split("train")[::4]
        images = TrainingImages(samples, spec, augmentation, seed)
        return Setting(images, Teacher(teacher, None, spec, CPU, amp))

    return make


def test_stored_is_what_the_teacher_says_about_each_view(make_setting, tmp_path):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    stored = setting.get(path)
    assert stored.shape == (VIEWS, 14, 7) and stored.dtype == np.float32
    for view in range(VIEWS):
        batch = setting.images.batch(view, list(range(14)))
        expected = setting.teacher(Renderer(setting.images, CPU)(batch))
        np.testing.assert_allclose(stored[view], expected.numpy(), atol=1e-6)
    assert np.abs(stored[0] - stored[1]).max() > 0.01  # another view, another answer


def test_is_queried_once_and_more_views_are_added(make_setting, tmp_path, monkeypatch):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    queried = []
    query = label_store.query
    monkeypatch.setattr(label_store, "query", lambda *a: queried.append(a[2]) or query(*a))
    first = setting.get(path)
    assert np.array_equal(setting.get(path), first)
    assert np.array_equal(setting.get(path, views=1), first[:1])
    more = setting.get(path, views=4)
    assert queried == [0, 1, 2, 3] and np.array_equal(more[:2], first)


def test_interrupt_costs_one_view(make_setting, tmp_path, monkeypatch):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    query = label_store.query

    def interrupted(images, teacher, view, *rest):
        if view == 1:
            raise KeyboardInterrupt
        return query(images, teacher, view, *rest)

    monkeypatch.setattr(label_store, "query", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setting.get(path)
    monkeypatch.undo()
    assert np.array_equal(setting.get(path)[0], setting.get(path, views=1)[0])
    assert np.array_equal(setting.get(path), setting.get(tmp_path / "other.safetensors"))


def test_folder_that_cannot_be_written_is_refused_before_the_teacher_is_queried(
    make_setting, tmp_path, monkeypatch
):
    monkeypatch.setattr(label_store, "query", lambda *_: pytest.fail("queried"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: expected a folder .* choose another --store"):
        make_setting().get(tmp_path / "file" / "store.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"augmentation": "strong"}, "augmentation, pixels"),
        ({"seed": 4}, "seed, pixels"),
        ({"input_size": 64}, "spec, pixels"),
    ],
)
def test_store_of_other_views_is_refused(change, named, make_setting, tmp_path):
    path = tmp_path / "store.safetensors"
    make_setting().get(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=f"others for {named}; give another --store"):
        make_setting(**change).get(path)
    assert path.read_bytes() == before


def test_store_of_another_teacher_is_refused(make_setting, teacher_file, face_set, tmp_path):
    path = tmp_path / "store.safetensors"
    make_setting().get(path)
    other = tmp_path / "teacher.safetensors"
    spec = read_dataset(face_set).spec.replace(architecture="resnet18", input_size=48)
    save_checkpoint(other, LabelDistributionGenerator(7, "resnet18"), spec)
    with pytest.raises(ArtifactError, match="others for teacher;"):
        make_setting(teacher=other).get(path)


def test_changed_pixels_are_noticed(make_setting, tmp_path, monkeypatch):
    """As when another version of an image library draws otherwise."""
    path = tmp_path / "store.safetensors"
    setting = make_setting()
    setting.get(path)
    read = setting.images.pictures.read
    monkeypatch.setattr(setting.images.pictures, "read", lambda *args: read(*args) ^ 1)
    with pytest.raises(ArtifactError, match="others for pixels;"):
        setting.get(path)


def test_answers_in_another_precision_are_refused(make_setting, tmp_path):
    path = tmp_path / "store.safetensors"
    whole = make_setting().get(path)
    mixed = make_setting(amp=torch.bfloat16)
    with pytest.raises(ArtifactError, match="others for precision;"):
        mixed.get(path)
    difference = np.abs(mixed.get(tmp_path / "bf16.safetensors") - whole).max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("damage", ["text", "truncated", "checkpoint", "shape", "sums"])
def test_damaged_store(damage, make_setting, teacher_file, tmp_path):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    setting.get(path)
    content = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as store:
        metadata = store.metadata()
    if damage == "text":
        path.write_text("distributions")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "checkpoint":
        shutil.copy(teacher_file, path)
    elif damage == "shape":
        content["distributions"] = content["distributions"][:, :3].copy()
        safetensors.numpy.save_file(content, path, metadata)
    else:
        content["distributions"] *= 2
        safetensors.numpy.save_file(content, path, metadata)
    with pytest.raises(ArtifactError, match=r"store\.safetensors: expected .* found"):
        setting.get(path)


def test_ranks_share_the_queries(make_setting, tmp_path, monkeypatch):
    """Each of three does its third; together they have what one alone has."""
    setting = make_setting()
    alone = setting.get(tmp_path / "alone.safetensors", views=1)
    parts: dict[int, np.ndarray] = {}
    for rank in range(3):
        monkeypatch.setattr(Distributed, "gather", lambda d, part: parts.update({d.rank: part}))
        with pytest.raises(TypeError):  # no others are there to gather from
            label_store.query(setting.images, setting.teacher, 0, 1, Distributed(CPU, rank, 3), 0)
    assert [len(parts[rank]) for rank in range(3)] == [5, 5, 4]
    monkeypatch.setattr(Distributed, "gather", lambda *_: [parts[rank] for rank in range(3)])
    together = label_store.query(setting.images, setting.teacher, 0, 1, Distributed(CPU, 0, 3), 0)
    np.testing.assert_allclose(together, alone[0], atol=1e-6)
