from __future__ import annotations

import contextlib
import dataclasses
import random

import numpy as np
import pytest
import torch

from efficientface_deploy.errors import ConfigError, DatasetError, ImageError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import normalise, to_model_input
from efficientface_deploy.workbench.dataset import Sample, read_dataset
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.distributed import Distributed
from training.trainer.loader import (
    BatchOrder,
    TrainingImages,
    TrainingLoader,
    choose_samples,
    hold_out,
)

BATCH = 8
ALONE = Distributed(torch.device("cpu"))


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


def test_item_depends_on_epoch_index_and_seed_alone(images, dataset, spec, request):
    name = request.node.callspec.params["images"]
    keys = [(0, 0), (0, 5), (1, 5), (7, 0)]
    first = {key: images[key][0] for key in keys}
    other = make_images(dataset, spec, name)
    for number, key in enumerate(reversed(keys)):  # another object, order and global state
        torch.manual_seed(number)
        np.testing.assert_array_equal(other[key][0], first[key])
    reseeded = make_images(dataset, spec, name, seed=4)
    assert not np.array_equal(reseeded[0, 0][0], first[0, 0])


def test_every_view_is_another_picture(images, spec):
    views = [images[epoch, 2][0] for epoch in range(6)]
    plain = to_model_input(images.samples[2].path, spec)
    found = {view.tobytes() for view in views}
    if images.augmentation == "flip":
        assert found == {plain.tobytes(), plain[:, ::-1].tobytes()}
    else:
        assert len(found | {plain.tobytes()}) == 7
    assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in views)
    # Changed, but the same face: no view is nearer to noise than to the picture or its mirror.
    for view in views:
        centred = view.astype(float) - view.mean()
        likeness = [np.corrcoef(centred.ravel(), p.ravel())[0, 1] for p in (plain, plain[:, ::-1])]
        assert max(likeness) > 0.2


def test_global_random_numbers_are_left_alone(images):
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    images[2, 3]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_targets_are_labels_or_votes(dataset, spec):
    index, sample = next(
        (i, sample) for i, sample in enumerate(dataset.split("train")) if max(sample.votes) < 0.9
    )
    one_hot = make_images(dataset, spec)[0, index][1]
    np.testing.assert_array_equal(one_hot, np.eye(7, dtype=np.float32)[sample.label])
    votes = make_images(dataset, spec, votes=True)[0, index][1]
    np.testing.assert_allclose(votes, np.array(sample.votes) / sum(sample.votes), atol=1e-6)
    assert votes.dtype == np.float32


def test_votes_without_votes_are_refused(dataset, spec):
    plain = [Sample(sample.path, sample.label) for sample in dataset.split("train")]
    with pytest.raises(DatasetError, match="column of votes"):
        TrainingImages(plain, spec, "mild", 0, votes=True)


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_batch_is_normalised_as_the_runtime_does(colour, dataset, spec):
    images = make_images(dataset, spec.replace(colour=colour))
    items = [images[0, index] for index in range(4)]
    batch, targets = images.collate(items)
    expected = normalise(np.stack([image for image, _ in items]), images.spec)
    np.testing.assert_array_equal(batch.numpy(), expected)
    assert batch.shape == (4, 3, 32, 32) and batch.dtype == torch.float32
    assert targets.shape == (4, 7) and torch.equal(targets.sum(dim=1), torch.ones(4))


# ---- Order and batches ---------------------------------------------------------------------------


def keys_of(order: BatchOrder, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    order.epoch, order.start = epoch, start
    return list(order)


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


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_one_line_from_a_worker_too(workers, dataset, spec, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [*dataset.split("train")[:7], Sample(broken, 0)]
    images = TrainingImages(samples, spec, "mild", 0)
    with (
        contextlib.closing(TrainingLoader(images, BatchOrder(8, 4, 0), workers)) as loader,
        pytest.raises(ImageError, match=r"^\S*broken\.png: expected an image") as caught,
    ):
        list(loader)
    assert "Traceback" not in str(caught.value)


def epoch_of(images: TrainingImages, epoch: int, workers: int) -> list[tuple[torch.Tensor, ...]]:
    order = BatchOrder(len(images), BATCH, 5)
    order.epoch = epoch
    return [tuple(part.clone() for part in b) for b in TrainingLoader(images, order, workers)]


def test_workers_give_the_same_bits(dataset, spec):
    images = make_images(dataset, spec)
    runs = [epoch_of(images, 1, workers) for workers in (0, 2)]
    assert len(runs[0]) == len(images) // BATCH
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_worker_follows_the_epoch(dataset, spec):
    images = make_images(dataset, spec)
    order = BatchOrder(len(images), BATCH, 5)
    loader = TrainingLoader(images, order, workers=1)
    for epoch in (0, 1):  # the worker lives on between them
        order.epoch = epoch
        expected = epoch_of(make_images(dataset, spec), epoch, workers=0)
        for ours, theirs in zip(loader, expected, strict=True):
            assert torch.equal(ours[0], theirs[0])


def test_last_batch_is_left_out_when_it_is_not_full(dataset, spec):
    images = make_images(dataset, spec)
    loader = TrainingLoader(images, BatchOrder(len(images), 15, 0), workers=0)
    assert [len(batch) for batch, _ in loader] == [15, 15, 15]  # of 56


def test_too_few_images_for_one_batch():
    with pytest.raises(DatasetError, match="batch of 57 images, found 56"):
        BatchOrder(56, 57, 0)


def test_stored_targets_follow_the_view(dataset, spec):
    stored = np.random.default_rng(0).random((2, 56, 7), dtype=np.float32)
    images = make_images(dataset, spec)
    images.targets = stored
    for view, index in ((0, 0), (1, 0), (1, 55), (2, 3)):
        np.testing.assert_array_equal(images[view, index][1], stored[view % 2, index])


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
