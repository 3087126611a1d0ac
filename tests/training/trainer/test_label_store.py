from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.vision.preprocess import normalise
from efficientface_deploy.workbench.dataset import read_dataset
from training.trainer import label_store
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.distributed import Ranks
from training.trainer.label_store import check_store_options, store_binding, stored_distributions
from training.trainer.loader import TrainingImages, view_seed
from training.trainer.targets import Teacher

CPU = torch.device("cpu")
VIEWS = 2


@dataclasses.dataclass
class Setting:
    """Everything that a store is made from."""

    images: TrainingImages
    teacher: Teacher
    binding: dict[str, str]

    def get(self, path: Path, views: int = VIEWS, ranks: Ranks | None = None) -> np.ndarray:
        ranks = ranks or Ranks(CPU)
        return stored_distributions(
            path, self.images, self.teacher, views, self.binding, ranks, workers=0
        )


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
        images = TrainingImages(samples, spec, AUGMENTATIONS[augmentation](spec), seed)
        ldg = Teacher(teacher, None, spec, CPU, amp)
        return Setting(images, ldg, store_binding(images, ldg, augmentation, "data"))

    return make


def test_stored_is_what_the_teacher_says_about_each_view(make_setting, tmp_path):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    stored = setting.get(path)
    assert stored.shape == (VIEWS, 14, 7) and stored.dtype == np.float32
    for view in range(VIEWS):
        pixels = np.stack([setting.images[view, index][0] for index in range(14)])
        expected = setting.teacher(torch.from_numpy(normalise(pixels, setting.images.spec)))
        np.testing.assert_allclose(stored[view], expected.numpy(), atol=1e-6)
    assert np.abs(stored[0] - stored[1]).max() > 0.01  # another view, another answer
    seeds = safetensors.numpy.load_file(path)["seeds"]
    assert seeds[1, 5] == view_seed(3, 1, 5)


def test_is_asked_once_and_more_views_are_added(make_setting, tmp_path, monkeypatch):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    asked = []
    ask = label_store._ask
    monkeypatch.setattr(label_store, "_ask", lambda *a: asked.append(a[2]) or ask(*a))
    first = setting.get(path)
    assert np.array_equal(setting.get(path), first)
    assert np.array_equal(setting.get(path, views=1), first[:1])
    more = setting.get(path, views=4)
    assert asked == [0, 1, 2, 3] and np.array_equal(more[:2], first)


def test_interrupt_costs_one_view(make_setting, tmp_path, monkeypatch):
    setting = make_setting()
    path = tmp_path / "store.safetensors"
    ask = label_store._ask

    def interrupted(images, teacher, view, *rest):
        if view == 1:
            raise KeyboardInterrupt
        return ask(images, teacher, view, *rest)

    monkeypatch.setattr(label_store, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setting.get(path)
    monkeypatch.undo()
    assert np.array_equal(setting.get(path)[0], setting.get(path, views=1)[0])
    assert np.array_equal(setting.get(path), setting.get(tmp_path / "other.safetensors"))


def test_folder_that_cannot_be_written_is_refused_before_the_teacher_is_asked(
    make_setting, tmp_path, monkeypatch
):
    monkeypatch.setattr(label_store, "_ask", lambda *_: pytest.fail("asked"))
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
    augmentation = setting.images.augmentation
    setting.images.augmentation = lambda image: augmentation(image).point(lambda value: value ^ 1)
    setting.binding |= store_binding(setting.images, setting.teacher, "mild", "data")
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
    metadata = {label_store.BINDING_KEY: label_store.json.dumps(setting.binding)}
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


def test_ranks_share_the_questions(make_setting, tmp_path, monkeypatch):
    """Each of three asks about its third; together they have what one alone has."""
    setting = make_setting()
    alone = setting.get(tmp_path / "alone.safetensors", views=1)
    parts: dict[int, np.ndarray] = {}
    for rank in range(3):
        monkeypatch.setattr(Ranks, "gather", lambda self, part: parts.update({self.rank: part}))
        with pytest.raises(TypeError):  # no others are there to gather from
            label_store._ask(setting.images, setting.teacher, 0, 1, Ranks(CPU, rank, 3), 0)
    assert [len(parts[rank]) for rank in range(3)] == [5, 5, 4]
    monkeypatch.setattr(Ranks, "gather", lambda self, part: [parts[rank] for rank in range(3)])
    together = label_store._ask(setting.images, setting.teacher, 0, 1, Ranks(CPU, 0, 3), 0)
    np.testing.assert_allclose(together, alone[0], atol=1e-6)


@pytest.mark.parametrize(
    ("store_path", "views", "asks", "said"),
    [
        ("s.safetensors", 0, True, "found --views 0, which asks it in every step"),
        ("s.safetensors", 4, False, "found no teacher"),
    ],
)
def test_store_without_a_use(store_path, views, asks, said):
    with pytest.raises(ConfigError, match=said):
        check_store_options(Path(store_path), views, asks)


def test_store_by_another_name():
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, found store\.npz"):
        check_store_options(Path("store.npz"), 4, True)
    check_store_options(None, 0, False)
