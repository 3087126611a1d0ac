"""What a run's folder holds: the options, the state to go on from, and the result."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.files import atomic_path, remove_temporaries, write_text
from efficientface_deploy.models import save_checkpoint
from efficientface_deploy.workbench.dataset import class_frequencies
from efficientface_deploy.workbench.environment import made_by
from efficientface_deploy.workbench.workspace import make_and_lock
from training.trainer.config import CONFIG, Job, TrainerState
from training.trainer.distributed import Distributed
from training.trainer.label_store import STORE
from training.trainer.sureness import PRECISION
from training.trainer.tracking import CURVES, METRICS

# By which formula a view's random numbers are drawn: 1 was torchvision's, picture by picture.
VIEWS = 2


@contextlib.contextmanager
def lock(job: Job, dist: Distributed) -> Iterator[None]:
    """Make the run's folder and keep other trainings out of it; one that stays empty goes again.

    Raises:
        CheckpointError: With ``--resume``, there is no run to go on with, or its file is damaged.
        ConfigError: The folder cannot be written, holds another run, or one is at work in it.
    """
    out = job.config.out
    if job.config.resume:
        _read_state(job, torch.device("cpu"))
    elif job.state.exists() or job.result.exists():
        fix = "add --resume to go on with it" if job.state.exists() else "remove it"
        raise ConfigError(out, "a new folder", "another run", f"choose another --out, or {fix}")
    if not dist.is_main_process:
        yield
        return
    with make_and_lock(out, "training"):
        written = (job.state.name, job.result.name, CONFIG, METRICS, CURVES, STORE)
        remove_temporaries(out, *written)  # of a run that was killed
        yield


def save_config(job: Job) -> None:
    """Write down the run's options."""
    write_text(job.config.out / CONFIG, json.dumps(job.settings(), indent=2, default=str) + "\n")


def save_state(job: Job, parts: dict[str, Any], state: TrainerState, processes: int) -> None:
    """Write what a run goes on from, atomically.

    Args:
        job: The run.
        parts: Objects with ``state_dict``, by name.
        state: How far it is.
        processes: How many train together.
    """
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {
        "identity": job.identity(),
        "progress": dataclasses.asdict(state),
        "processes": processes,
        "views": VIEWS,
        "made_by": made_by(),
    }
    encoded = io.BytesIO()  # torch reports a full disk as an error of its own, not as OSError
    torch.save(content, encoded)
    with atomic_path(job.state) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def restore_state(
    job: Job, parts: dict[str, Any], device: torch.device
) -> tuple[TrainerState, int, int]:
    """Put a run back to where :func:`save_state` left it.

    Returns:
        How far it is, how many processes trained it, and by which formula its views were drawn.

    Raises:
        CheckpointError: There is no such run, or its file is damaged.
        ConfigError: It was started with other options, images or another teacher.
    """
    content = _read_state(job, device)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return TrainerState(**content["progress"]), content["processes"], content.get("views", 1)


def _read_state(job: Job, device: torch.device) -> dict[str, Any]:
    """What :func:`save_state` wrote, of this very job."""
    if not job.state.is_file():
        raise CheckpointError(job.state, "a run to go on with", "none", "leave --resume out")
    try:
        content: dict[str, Any] = torch.load(job.state, map_location=device, weights_only=True)
        started_with: dict[str, str] = content["identity"]
        TrainerState(**content["progress"])
        int(content["processes"])
    except Exception as error:  # noqa: BLE001 - torch fails on damaged files in many ways
        found = f"a damaged file ({type(error).__name__})"
        fix = "start again in a new folder"
        raise CheckpointError(job.state, "the state of a run", found, fix) from None
    now = job.identity()
    if "labels" not in started_with:  # a version that did not look at them
        now.pop("labels", None)
    if changed := [name for name in now if _given(now, name) != _given(started_with, name)]:
        wanted = "the options, images, labels and teacher that the run was started with"
        fix = f"repeat those in {job.config.out / CONFIG} on the same data, or choose another --out"
        raise ConfigError(job.config.out, wanted, "others for " + ", ".join(changed), fix)
    return content


def _given(identity: Mapping[str, str], name: str) -> str | None:
    """An option's value; None where it is left out, as a version says it that does not know it."""
    value = identity.get(name)
    return None if value in ("None", "False", "()") else value


def save_result(
    job: Job,
    model: nn.Module,
    record: dict[str, Any],
    sure_above: float | None = None,
) -> None:
    """Write the network with how it was made and its spec, the class frequencies in it.

    Args:
        job: The run.
        model: The network.
        record: How it was made.
        sure_above: From :func:`fit_threshold`, where it is known.
    """
    shares = class_frequencies(job.dataset.split("train"), job.spec.num_classes)
    precision = None if sure_above is None else PRECISION
    spec = job.spec.replace(
        class_frequencies=shares, sure_above=sure_above, sure_precision=precision
    )
    save_checkpoint(job.result, model, spec, json.dumps(record, default=str))


def provenance(job: Job, state: TrainerState) -> dict[str, Any]:
    """How the network that is saved now was made, ready for JSON."""
    return {
        "kind": job.kind,
        "dataset": job.dataset.name,
        "data_hash": job.inputs["images"],
        "select": job.recipe.select,
        "epoch": state.epoch,
        "epochs": job.recipe.epochs,
        "metrics": state.history[-1],
        "recipe": dataclasses.asdict(job.recipe),
        "config": dataclasses.asdict(job.config),
        "seed": job.config.seed,
        **made_by(),
    }
