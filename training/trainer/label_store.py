"""Stored label distributions: the teacher is queried once per view, not in every epoch.

The file holds the LDG's distribution for each view of each training image. The pixels are not
stored: seed, view and index make the same view again, and the file refuses another data set,
teacher or augmentation, and an image library that draws a few views, its probes, otherwise.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch

from efficientface_deploy.artifact import read_safetensors_metadata
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import atomic_path, make_folder
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.progress import track
from training.trainer.distributed import Distributed
from training.trainer.loader import Batch, Renderer, TrainingImages, TrainingLoader
from training.trainer.targets import Ensemble, Teacher

STORE = "distributions.safetensors"
BINDING_KEY = "efficientface.distributions"
SECONDS_KEY = "efficientface.seconds"
PROBES = 32
_SAME_PIXEL = 0.1  # of 255: more than a device's rounding, less than another decoder's
_BATCH = 64


def stored_distributions(
    path: Path,
    images: TrainingImages,
    teacher: Teacher | Ensemble,
    views: int,
    data_hash: str,
    dist: Distributed,
    workers: int,
) -> np.ndarray:
    """Read an LDG's distributions for every view, querying it for those that are not stored yet.

    The file is written after every view, so that an interrupt costs one view at most.

    Args:
        path: The store, ``*.safetensors``; made, or extended, where views are missing.
        images: N training images.
        teacher: The LDG.
        views: Views of each image.
        data_hash: Of the images and their order.
        dist: The processes that share the work.
        workers: Processes that load images.

    Returns:
        float32 (views, N, C).

    Raises:
        ArtifactError: The file is something else, or was made for other data, another teacher or
            another augmentation.
        ConfigError: Its folder cannot be written.
    """
    binding = _binding(images, teacher, data_hash)
    done = _read_store(path, images, binding) if path.exists() else []
    seconds = seconds_per_view(path) if done else []
    dist.barrier()  # nobody writes before all have read
    if dist.is_main_process and len(done) < views:
        make_folder(path.parent, "--store")
        print(f"querying the teacher about {views - len(done)} views of {len(images):,} images")
    for view in range(len(done), views):
        started = time.perf_counter()
        done.append(query(images, teacher, view, views, dist, workers))
        seconds.append(round(time.perf_counter() - started, 1))
        if dist.is_main_process:
            _write_store(path, done, images, binding, seconds)
    dist.barrier()
    return np.stack(done[:views])  # (views, N, C)


def query(
    images: TrainingImages,
    teacher: Teacher | Ensemble,
    view: int,
    views: int,
    dist: Distributed,
    workers: int,
) -> np.ndarray:
    """The distributions of one view of all images, float32 (N, C); each rank does its share."""
    indices = list(range(dist.rank, len(images), dist.world_size))
    keys = [(view, indices[start : start + _BATCH]) for start in range(0, len(indices), _BATCH)]
    distributions = []
    loader = TrainingLoader(images, keys, workers, teacher.device, dist.world_size)
    with contextlib.closing(loader):
        steps: Iterable[Batch] = loader
        if dist.is_main_process:
            steps = track(loader, f"view {view + 1} of {views}", len(keys))
        for batch in steps:
            distributions.append(teacher(loader.render(batch)).cpu().numpy())  # (B, C)
    parts = dist.gather(np.concatenate(distributions))
    whole = np.empty((len(images), parts[0].shape[1]), dtype=np.float32)  # (N, C)
    for rank, part in enumerate(parts):
        whole[rank :: dist.world_size] = part
    return whole


def seconds_per_view(path: Path) -> list[float]:
    """How long the teacher was queried for each view of a store; empty where it does not say."""
    try:
        return [float(x) for x in json.loads(read_safetensors_metadata(path)[SECONDS_KEY])]
    except (KeyError, TypeError, ValueError):
        return []


def _binding(images: TrainingImages, teacher: Teacher | Ensemble, data_hash: str) -> dict[str, str]:
    """What stored distributions are only good for, by name."""
    return {
        "data": data_hash,
        "teacher": teacher.digest,
        "precision": str(teacher.amp or torch.float32).removeprefix("torch."),
        "augmentation": images.augmentation,
        "seed": str(images.seed),
        "spec": images.spec.to_json(),
    }


def _probes(images: TrainingImages) -> Float32Array:
    """Every few pixels of a few views, (PROBES, ...): another library draws them otherwise."""
    render = Renderer(images, torch.device("cpu"))
    step = images.spec.input_size // 16
    views = []
    for number, index in enumerate(np.linspace(0, len(images) - 1, PROBES, dtype=int)):
        batch = images.batch(number % 4, [int(index)])
        views.append(render.views(batch)[0, :, ::step, ::step].numpy())
    return np.stack(views)


def _write_store(
    path: Path,
    done: list[np.ndarray],
    images: TrainingImages,
    binding: dict[str, str],
    seconds: list[float],
) -> None:
    content = {"distributions": np.stack(done), "probes": _probes(images)}  # (views, N, C)
    metadata = {BINDING_KEY: json.dumps(binding), SECONDS_KEY: json.dumps(seconds)}
    encoded = safetensors.numpy.save(content, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded)


def _read_store(path: Path, images: TrainingImages, binding: dict[str, str]) -> list[np.ndarray]:
    metadata = read_safetensors_metadata(path)
    try:
        made_for = json.loads(metadata[BINDING_KEY])
        content = safetensors.numpy.load_file(path)
        distributions = content["distributions"]  # (views, N, C)
        shape_fits = distributions.shape[1:] == (len(images), images.spec.num_classes)
    except (KeyError, ValueError, OSError, safetensors.SafetensorError):
        wanted, found = "stored label distributions", "something else or a damaged file"
        fix = "give another --store, or remove it"
        raise ArtifactError(path, wanted, found, fix) from None
    changed = [name for name in binding if made_for.get(name) != binding[name]]
    probes, drawn = _probes(images), content.get("probes")
    if drawn is None or drawn.shape != probes.shape or np.abs(drawn - probes).max() > _SAME_PIXEL:
        changed.append("pixels")
    if changed:
        wanted = "label distributions of these images, this teacher and this augmentation"
        fix = "give another --store, or remove it to query the teacher again"
        raise ArtifactError(path, wanted, "others for " + ", ".join(changed), fix)
    valid = shape_fits and np.isfinite(distributions).all()
    if not valid or np.abs(distributions.sum(axis=2) - 1).max() > 1e-3:
        wanted = f"distributions of {len(images):,} images that sum to one"
        found = f"shape {distributions.shape} or other sums"
        raise ArtifactError(path, wanted, found, "remove it to query the teacher again")
    return list(distributions)
