from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch

from efficientface_deploy.errors import ConfigError, DatasetError, ImageError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import load_image, to_model_input
from efficientface_deploy.workbench.dataset import Sample, read_dataset
from training.trainer.augmentation import AUGMENTATIONS, crop_randomly, uniforms
from training.trainer.distributed import Distributed
from training.trainer.loader import (
    Batch,
    BatchOrder,
    Renderer,
    TrainingImages,
    TrainingLoader,
    choose_samples,
    hold_out,
)

BATCH = 8
CPU = torch.device("cpu")
ALONE = Distributed(CPU)


@pytest.fixture
def dataset(face_set):
    return read_dataset(face_set)


@pytest.fixture
def spec(dataset) -> ModelSpec:
    return dataset.spec.replace(input_size=32)


@pytest.fixture(params=sorted(AUGMENTATIONS))
def images(request, dataset, spec) -> TrainingImages:
    return make_images(dataset, spec, request.param)


def make_images(dataset, spec, name: str = "mild", seed: int = 3, **options) -> TrainingImages:
    return TrainingImages(dataset.split("train"), spec, name, seed, **options)


# ---- TrainingImages ------------------------------------------------------------------------------


def views_of(images: TrainingImages, *keys: tuple[int, int]) -> list[np.ndarray]:
    """Pixels of views by (view, index), float32 (C, S, S), 0 to 255."""
    render = Renderer(images, CPU)
    return [render.views(images.batch(view, [index]))[0].numpy() for view, index in keys]


def test_view_depends_on_seed_view_and_index_alone(images, dataset, spec, request):
    name = request.node.callspec.params["images"]
    keys = [(0, 0), (0, 5), (1, 5), (7, 0)]
    first = views_of(images, *keys)
    few = TrainingImages(dataset.split("train")[:6], spec, name, 3)  # fewer, in another order
    for view, other in zip(first, reversed(views_of(few, *reversed(keys))), strict=True):
        np.testing.assert_array_equal(view, other)
    together = Renderer(images, CPU).views(images.batch(0, [5, 3, 0]))
    np.testing.assert_allclose(together[2], first[0], atol=1e-3)
    np.testing.assert_allclose(together[0], first[1], atol=1e-3)
    reseeded = views_of(make_images(dataset, spec, name, seed=5), *keys)
    assert any(not np.array_equal(*pair) for pair in zip(reseeded, first, strict=True))


def test_every_view_is_another_picture(images, spec):
    views = views_of(images, *((epoch, 2) for epoch in range(6)))
    plain = to_model_input(images.samples[2].path, spec).transpose(2, 0, 1).astype(np.float32)
    found = {view.tobytes() for view in views}
    if images.augmentation == "flip":
        assert found == {plain.tobytes(), plain[:, :, ::-1].tobytes()}
    else:
        assert len(found | {plain.tobytes()}) == 7
    assert all(view.shape == (3, 32, 32) and view.dtype == np.float32 for view in views)
    # Changed, but the same face: no view is nearer to noise than to the picture or its mirror.
    mirrored = plain[:, :, ::-1]
    for view in views:
        likeness = [np.corrcoef(view.ravel(), p.ravel())[0, 1] for p in (plain, mirrored)]
        assert max(likeness) > 0.2


def test_global_random_numbers_are_left_alone(images):
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    views_of(images, (2, 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("sizes", [{(60, 50), (48, 48)}, {(150, 150)}])
def test_pictures_of_other_sizes_are_cropped_by_who_reads_them(sizes, dataset, spec, tmp_path):
    """The same crop, mirrored where the others are."""
    samples = []
    for number in range(4):
        image = load_image(dataset.split("train")[number].path)
        samples.append(Sample(tmp_path / f"{number}.png", number))
        image.resize(sorted(sizes)[number % len(sizes)]).save(samples[-1].path)
    images = TrainingImages(samples, spec, "published", 0)
    assert images.pictures.keep(CPU) is None
    batch = images.batch(1, [0, 1, 2, 3])
    numbers = uniforms(0, 1, np.arange(4))
    for index, view in enumerate(Renderer(images, CPU).views(batch)):
        image = crop_randomly(load_image(samples[index].path), numbers[index : index + 1], 32)
        expected = np.asarray(image).transpose(2, 0, 1)
        expected = expected[:, :, ::-1] if numbers[index, 0] < 0.5 else expected
        np.testing.assert_array_equal(view, expected)
    with pytest.raises(ConfigError, match="--data-on-device yes: expected pictures of one size"):
        TrainingImages(samples, spec, "published", 0, on_device="yes")


def test_targets_are_labels_or_votes(dataset, spec):
    index, sample = next(
        (i, sample) for i, sample in enumerate(dataset.split("train")) if max(sample.votes) < 0.9
    )
    one_hot = make_images(dataset, spec).batch(0, [index]).targets[0].numpy()
    np.testing.assert_array_equal(one_hot, np.eye(7, dtype=np.float32)[sample.label])
    votes = make_images(dataset, spec, votes=True).batch(0, [index]).targets[0].numpy()
    np.testing.assert_allclose(votes, np.array(sample.votes) / sum(sample.votes), atol=1e-6)
    assert votes.dtype == np.float32


def test_votes_without_votes_are_refused(dataset, spec):
    plain = [Sample(sample.path, sample.label) for sample in dataset.split("train")]
    with pytest.raises(DatasetError, match="column of votes"):
        TrainingImages(plain, spec, "mild", 0, votes=True)


# ---- Order and batches ---------------------------------------------------------------------------


def keys_of(order: BatchOrder, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    order.epoch, order.start = epoch, start
    return [[(view, index) for index in indices] for view, indices in order]


def test_each_epoch_has_its_own_permutation_and_views():
    order = BatchOrder(20, 5, seed=1)
    epochs = [[key for batch in keys_of(order, epoch) for key in batch] for epoch in (0, 1)]
    for epoch, keys in enumerate(epochs):
        assert {view for view, _ in keys} == {epoch}
        assert sorted(index for _, index in keys) == list(range(20))
    indices = [[index for _, index in keys] for keys in epochs]
    assert indices[0] != indices[1] != sorted(indices[1])
    assert keys_of(BatchOrder(20, 5, seed=1), 1) == keys_of(order, 1)
    assert keys_of(BatchOrder(20, 5, seed=2), 1) != keys_of(order, 1)


def test_a_few_views_come_in_turn():
    order = BatchOrder(8, 8, seed=0, views=3)
    views = [keys_of(order, epoch)[0][0][0] for epoch in range(7)]
    assert views == [0, 1, 2, 0, 1, 2, 0]


def test_rest_of_an_epoch():
    order = BatchOrder(23, 4, seed=0)
    whole = keys_of(order, 2)
    assert len(whole) == order.steps == len(order) == 5  # the last three images wait
    assert keys_of(order, 2, start=3) == whole[3:]
    assert len(order) == 2 and order.steps == 5


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_disjoint_parts_of_the_single_processs_batches(ranks):
    alone = keys_of(BatchOrder(40, 12, seed=4), 1)
    shares = [
        keys_of(BatchOrder(40, 12, seed=4, rank=r, world_size=ranks), 1) for r in range(ranks)
    ]
    for step, batch in enumerate(alone):
        parts = [share[step] for share in shares]
        assert [len(part) for part in parts] == [12 // ranks] * ranks
        assert sorted(key for part in parts for key in part) == sorted(batch)


def test_batch_that_the_ranks_cannot_share():
    with pytest.raises(ConfigError, match=r"a multiple of the 2 processes, .*found 5"):
        BatchOrder(20, 5, seed=0, world_size=2)


def test_one_image_for_a_rank_is_no_batch():
    """Batch norm has no statistics of it."""
    with pytest.raises(ConfigError, match=r"with two images or more for each, found 3"):
        BatchOrder(20, 3, seed=0, world_size=3)


@pytest.mark.parametrize(
    ("length", "ranks", "rest"), [(23, 1, 3), (23, 2, 0), (30, 2, 4), (25, 1, 0), (24, 1, 0)]
)
def test_published_code_keeps_the_last_batch(length, ranks, rest):
    """As far as the ranks have equally many of it, and more than one."""
    batch = 4 if rest != 4 else 26
    orders = [
        BatchOrder(length, batch, seed=0, whole=False, rank=r, world_size=ranks)
        for r in range(ranks)
    ]
    epochs = [keys_of(order, 0) for order in orders]
    assert {len(epoch) for epoch in epochs} == {orders[0].steps} == {length // batch + (rest > 0)}
    keys = [key for epoch in epochs for step in epoch for key in step]
    assert len(set(keys)) == len(keys) == orders[0].images == length // batch * batch + rest
    assert {len(epoch[-1]) for epoch in epochs} == {(rest or batch) // ranks}


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_damaged_image_is_one_line_from_a_worker_too(workers, dataset, spec, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [*dataset.split("train")[:7], Sample(broken, 0)]
    images = TrainingImages(samples, spec, "mild", 0, on_device="yes" if workers is None else "no")
    with pytest.raises(ImageError, match=r"^\S*broken\.png: expected an image") as caught:
        batches_of(images, BatchOrder(8, 4, 0), workers or 0)
    assert "Traceback" not in str(caught.value)


def epoch_of(images: TrainingImages, epoch: int, workers: int) -> list[Batch]:
    order = BatchOrder(len(images), BATCH, 5)
    order.epoch = epoch
    return batches_of(images, order, workers)


def batches_of(images: TrainingImages, order: BatchOrder, workers: int) -> list[Batch]:
    with contextlib.closing(TrainingLoader(images, order, workers, CPU)) as loader:
        return list(loader)


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, own, other))


@pytest.mark.parametrize("augmentation", ["published", "mild"])
def test_workers_and_kept_pictures_give_the_same_bits(augmentation, dataset, spec):
    grey = spec.replace(colour="grey")
    for own in (spec, grey):
        images = {on: make_images(dataset, own, augmentation, on_device=on) for on in ("yes", "no")}
        kept = epoch_of(images["yes"], 1, 0)
        assert len(kept) == len(images["yes"]) // BATCH
        for workers in (0, 2):
            assert_same_batches(epoch_of(images["no"], 1, workers), kept)


@pytest.mark.parametrize("on_device", ["yes", "no"])
def test_loader_follows_the_epoch(on_device, dataset, spec):
    images = make_images(dataset, spec, on_device=on_device)
    order = BatchOrder(len(images), BATCH, 5)
    with contextlib.closing(TrainingLoader(images, order, 1, CPU)) as loader:
        for epoch in (0, 1):  # a worker lives on between them
            order.epoch, order.start = epoch, 0
            assert_same_batches(
                list(loader), epoch_of(make_images(dataset, spec), epoch, workers=0)
            )
            order.start = order.steps
            assert list(loader) == []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGBUS])
def test_worker_that_dies_is_one_line(end, dataset, spec, monkeypatch):
    """As by the system when memory runs out, or by itself when /dev/shm is full."""
    images = make_images(dataset, spec, on_device="no")
    monkeypatch.setattr(TrainingImages, "batch", lambda *_: os.kill(os.getpid(), end))
    loader = TrainingLoader(images, BatchOrder(len(images), BATCH, 5), 1, CPU)
    wanted = "--workers 1: expected workers that live .*; add --workers 0"
    with contextlib.closing(loader), pytest.raises(ConfigError, match=wanted):
        list(loader)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_shared_memory_is_one_line(workers, dataset, spec, monkeypatch):
    """torch shares in a thread, whose error nobody hears: the training would wait for ever."""

    def full(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left"
        )

    images = make_images(dataset, spec, on_device="no")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    wanted = f"--workers {workers}: expected room .* in /dev/shm, found unable .*; add --workers 0"
    with pytest.raises(ConfigError, match=wanted):
        batches_of(images, BatchOrder(len(images), BATCH, 5), workers)
    assert len(batches_of(images, BatchOrder(len(images), BATCH, 5), 0)) == 7


def test_a_system_without_queues_is_one_line(dataset, spec, monkeypatch):
    """As without /dev/shm, or with few descriptors: torch would leave half an iterator."""

    def refuse(*_):
        raise OSError(24, "Too many open files")

    images = make_images(dataset, spec, on_device="no")
    monkeypatch.setattr(multiprocessing, "Queue", refuse)
    wanted = "--workers 1: expected queues to them, .*, found .*Too many open files; close other"
    with pytest.raises(ConfigError, match=wanted):
        batches_of(images, BatchOrder(len(images), BATCH, 5), 1)
    assert len(batches_of(images, BatchOrder(len(images), BATCH, 5), 0)) == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_too_few_descriptors_are_refused_before_a_batch_is_lost(workers, dataset, spec):
    resource = pytest.importorskip("resource")
    images = make_images(dataset, spec, on_device="no")
    order = BatchOrder(len(images), BATCH, 5)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(1))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20 * workers, limits[1]))
        with pytest.raises(ConfigError, match=f"--workers {workers}: .*; close other files, or"):
            batches_of(images, order, workers)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 40 * workers, limits[1]))
        assert len(batches_of(images, order, workers)) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_last_batch_is_left_out_when_it_is_not_full(dataset, spec):
    images = make_images(dataset, spec)
    loader = TrainingLoader(images, BatchOrder(len(images), 15, 0), 0, CPU)
    assert [len(batch.pixels) for batch in loader] == [15, 15, 15]  # of 56


def test_too_few_images_for_one_batch():
    with pytest.raises(DatasetError, match="batch of 57 images, found 56"):
        BatchOrder(56, 57, 0)


def test_stored_targets_follow_the_view(dataset, spec):
    stored = np.random.default_rng(0).random((2, 56, 7), dtype=np.float32)
    images = make_images(dataset, spec)
    images.targets = stored
    for view, index in ((0, 0), (1, 0), (1, 55), (2, 3)):
        found = images.batch(view, [index]).targets[0]
        np.testing.assert_array_equal(found, stored[view % 2, index])


# ---- Hold-out ------------------------------------------------------------------------------------


def crowd(counts: dict[int, int], root) -> list[Sample]:
    return [
        Sample(root / f"{label}_{number}.png", label)
        for label, count in counts.items()
        for number in range(count)
    ]


def count_labels(samples: list[Sample]) -> dict[int, int]:
    labels = [sample.label for sample in samples]
    return {label: labels.count(label) for label in sorted(set(labels))}


def test_hold_out_takes_a_tenth_of_every_class(tmp_path):
    samples = crowd({0: 100, 1: 43, 2: 6, 3: 2}, tmp_path)
    rest, held = hold_out(samples, seed=0)
    assert count_labels(held) == {0: 10, 1: 4, 2: 1, 3: 1}
    assert not set(rest) & set(held) and set(rest) | set(held) == set(samples)
    assert rest == [sample for sample in samples if sample in set(rest)]  # the order given
    assert held == [sample for sample in samples if sample in set(held)]


def test_hold_out_is_seeded(tmp_path):
    samples = crowd({0: 50, 1: 50}, tmp_path)
    assert hold_out(samples, 1) == hold_out(samples, 1)
    assert hold_out(samples, 1)[1] != hold_out(samples, 2)[1]


def test_hold_out_leaves_a_class_something_to_learn_from(tmp_path):
    rest, held = hold_out(crowd({0: 20, 1: 1}, tmp_path), seed=0)
    assert count_labels(rest) == {0: 18, 1: 1}
    assert count_labels(held) == {0: 2}


# ---- Which images --------------------------------------------------------------------------------


def test_selection_decides_what_is_trained_on(make_job):
    train = set(make_job().dataset.split("train"))
    rest, held = choose_samples(make_job(select="holdout"), ALONE)
    assert set(rest) | set(held) == train and len(held) == 7
    rest, chosen = choose_samples(make_job(select="test"), ALONE)
    assert set(rest) == train and chosen == list(make_job().dataset.split("test"))
    assert choose_samples(make_job(select="last"), ALONE) == (rest, [])
    with pytest.raises(DatasetError, match="a validation split"):
        choose_samples(make_job(select="validation"), ALONE)


def test_class_without_images_is_named(make_job):
    job = make_job(select="last")
    without = tuple(s for s in job.dataset.split("train") if s.label not in (2, 5))
    dataset = dataclasses.replace(job.dataset, samples={"train": without})
    with pytest.raises(ConfigError, match="of every class, found none of Sadness, Disgust; add"):
        choose_samples(dataclasses.replace(job, dataset=dataset), ALONE)
