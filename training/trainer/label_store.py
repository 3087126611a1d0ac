"""Stored label distributions: the teacher is asked once per view, not in every epoch.

The file holds, for each view of each training image, the seed of its augmentation and the LDG's
distribution for it. The pixels are not stored: the seed makes the same view again, bit for bit,
and the file refuses another data set, teacher, augmentation or image library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch

from efficientface_deploy.artifact import read_safetensors_metadata
from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.files import atomic_path, file_hash
from efficientface_deploy.workbench.progress import track
from efficientface_deploy.workbench.workspace import make_folder
from training.trainer.distributed import Ranks
from training.trainer.loader import Batch, TrainingImages, training_loader, view_seed
from training.trainer.targets import Teacher

STORE = "distributions.safetensors"
BINDING_KEY = "efficientface.distributions"
SECONDS_KEY = "efficientface.seconds"
PROBES = 32
_BATCH = 64


def store_binding(
    images: TrainingImages, teacher: Teacher, augmentation: str, data_hash: str
) -> dict[str, str]:
    """What stored distributions are only good for, by name.

    Args:
        images: The images whose views are stored.
        teacher: The LDG.
        augmentation: Its name.
        data_hash: Of the images and their order.
    """
    return {
        "data": data_hash,
        "teacher": file_hash(teacher.path),
        "precision": str(teacher.amp or torch.float32).removeprefix("torch."),
        "augmentation": augmentation,
        "seed": str(images.seed),
        "spec": images.spec.to_json(),
        "pixels": _probe(images),
    }


def stored_distributions(
    path: Path,
    images: TrainingImages,
    teacher: Teacher,
    views: int,
    binding: Mapping[str, str],
    ranks: Ranks,
    workers: int,
) -> np.ndarray:
    """Read an LDG's distributions for every view, asking it for those that are not stored yet.

    The file is written after every view, so that an interrupt costs one view at most.

    Args:
        path: The store, ``*.safetensors``; made, or extended, where views are missing.
        images: N training images.
        teacher: The LDG.
        views: Views of each image.
        binding: From :func:`store_binding`.
        ranks: The processes that share the work.
        workers: Processes that load images.

    Returns:
        float32 (views, N, C).

    Raises:
        ArtifactError: The file is something else, or was made for other data, another teacher or
            another augmentation.
        ConfigError: Its folder cannot be written.
    """
    done = _read_store(path, images, binding) if path.exists() else []
    seconds = seconds_per_view(path) if done else []
    ranks.wait()  # nobody writes before all have read
    if ranks.is_first and len(done) < views:
        make_folder(path.parent, "--store")
        print(f"asking the teacher about {views - len(done)} views of {len(images):,} images")
    for view in range(len(done), views):
        started = time.perf_counter()
        done.append(_ask(images, teacher, view, views, ranks, workers))
        seconds.append(round(time.perf_counter() - started, 1))
        if ranks.is_first:
            _write_store(path, done, images, binding, seconds)
    ranks.wait()
    return np.stack(done[:views])  # (views, N, C)


def _ask(
    images: TrainingImages, teacher: Teacher, view: int, views: int, ranks: Ranks, workers: int
) -> np.ndarray:
    """The distributions of one view of all images, float32 (N, C); each rank asks for its share."""
    keys = [(view, index) for index in range(ranks.rank, len(images), ranks.size)]
    batches = [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]
    answers = []
    with contextlib.closing(training_loader(images, batches, workers)) as loader:
        steps: Iterable[Batch] = loader
        if ranks.is_first:
            steps = track(loader, f"view {view + 1} of {views}", len(batches))
        for batch, _ in steps:
            batch = batch.to(teacher.device, memory_format=torch.channels_last)  # (B, 3, S, S)
            answers.append(teacher(batch).cpu().numpy())  # (B, C)
    parts = ranks.gather(np.concatenate(answers))
    whole = np.empty((len(images), parts[0].shape[1]), dtype=np.float32)  # (N, C)
    for rank, part in enumerate(parts):
        whole[rank :: ranks.size] = part
    return whole


def seconds_per_view(path: Path) -> list[float]:
    """How long the teacher was asked about each view of a store; empty where it does not say."""
    try:
        return [float(x) for x in json.loads(read_safetensors_metadata(path)[SECONDS_KEY])]
    except (KeyError, TypeError, ValueError):
        return []


def _write_store(
    path: Path,
    done: list[np.ndarray],
    images: TrainingImages,
    binding: Mapping[str, str],
    seconds: list[float],
) -> None:
    seeds = [
        [view_seed(images.seed, view, index) for index in range(len(images))]
        for view in range(len(done))
    ]
    content = {
        "distributions": np.stack(done),  # (views, N, C)
        "seeds": np.array(seeds, dtype=np.int64),  # (views, N)
    }
    metadata = {BINDING_KEY: json.dumps(binding), SECONDS_KEY: json.dumps(seconds)}
    encoded = safetensors.numpy.save(content, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded)


def _read_store(path: Path, images: TrainingImages, binding: Mapping[str, str]) -> list[np.ndarray]:
    metadata = read_safetensors_metadata(path)
    try:
        made_for = json.loads(metadata[BINDING_KEY])
        content = safetensors.numpy.load_file(path)
        distributions = content["distributions"]
        shape_fits = distributions.shape[1:] == (len(images), images.spec.num_classes)
    except (KeyError, ValueError, OSError, safetensors.SafetensorError):
        raise ArtifactError(
            path,
            "stored label distributions",
            "something else or a damaged file",
            "give another --store, or remove it",
        ) from None
    if changed := [name for name in binding if made_for.get(name) != binding[name]]:
        raise ArtifactError(
            path,
            "label distributions of these images, this teacher and this augmentation",
            "others for " + ", ".join(changed),
            "give another --store, or remove it to ask the teacher again",
        )
    valid = shape_fits and np.isfinite(distributions).all()
    if not valid or np.abs(distributions.sum(axis=2) - 1).max() > 1e-3:
        raise ArtifactError(
            path,
            f"distributions of {len(images):,} images that sum to one",
            f"shape {distributions.shape} or other sums",
            "remove it to ask the teacher again",
        )
    return list(distributions)


def _probe(images: TrainingImages) -> str:
    """Hash of a few views, which changes when a library renders them otherwise."""
    digest = hashlib.sha256()
    for number, index in enumerate(np.linspace(0, len(images) - 1, PROBES, dtype=int)):
        digest.update(images[number % 4, int(index)][0].tobytes())
    return digest.hexdigest()


def check_store_options(store: Path | None, views: int, asks_teacher: bool) -> None:
    """Refuse ``--store`` where nothing would be stored.

    Raises:
        ConfigError: There is no teacher, or it is asked in every step, or the name ends otherwise.
    """
    if store is not None and not (asks_teacher and views):
        raise ConfigError(
            "--store",
            "a teacher and --views of at least 1",
            "no teacher" if not asks_teacher else "--views 0, which asks it in every step",
            "leave --store out",
        )
    if store is not None and store.suffix != ".safetensors":
        raise ConfigError(
            "--store", "a name that ends in .safetensors", store.name, "give it that ending"
        )
