"""A training run: its options, what it is to do, and what its folder holds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.files import atomic_path, write_text
from efficientface_deploy.models import save_checkpoint
from efficientface_deploy.workbench.environment import made_by
from efficientface_deploy.workbench.workspace import empty_folders_removed, lock_folder, make_folder
from training.trainer.config import CONFIG, Job, Progress
from training.trainer.distributed import Ranks


def check_folder(job: Job) -> None:
    """Refuse a folder that holds another run, or with ``--resume`` one that this cannot go on with.

    Raises:
        CheckpointError: There is no run to go on with, or its file is damaged.
        ConfigError: There is another run.
    """
    out = job.config.out
    if job.config.resume:
        _read_state(job, torch.device("cpu"))
    elif job.state.exists() or job.result.exists():
        raise ConfigError(
            out,
            "a new folder",
            "another run",
            "choose another --out, or "
            + ("add --resume to go on with it" if job.state.exists() else "remove it"),
        )


@contextlib.contextmanager
def claim_folder(job: Job, ranks: Ranks) -> Iterator[None]:
    """Make the run's folder and keep other trainings out of it; one that stays empty goes again.

    Raises:
        CheckpointError: As :func:`check_folder`.
        ConfigError: The folder cannot be written, holds another run, or one is at work in it.
    """
    check_folder(job)
    if not ranks.is_first:
        yield
        return
    out = job.config.out
    with empty_folders_removed(out):
        make_folder(out)
        with lock_folder(out, "training"):
            yield


def start_run(job: Job) -> None:
    """Write down the run's options."""
    write_text(job.config.out / CONFIG, json.dumps(job.settings(), indent=2, default=str) + "\n")


def save_state(job: Job, parts: dict[str, Any], progress: Progress, processes: int) -> None:
    """Write what a run goes on from, atomically.

    Args:
        job: The run.
        parts: Objects with ``state_dict``, by name.
        progress: How far it is.
        processes: How many train together.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {
        "identity": job.identity(),
        "progress": dataclasses.asdict(progress),
        "processes": processes,
        "made_by": made_by(),
    }
    encoded = io.BytesIO()  # torch reports a full disk as an error of its own, not as OSError
    torch.save(state, encoded)
    with atomic_path(job.state) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def restore_state(job: Job, parts: dict[str, Any], device: torch.device) -> tuple[Progress, int]:
    """Put a run back to where :func:`save_state` left it.

    Returns:
        How far it is, and how many processes trained it.

    Raises:
        CheckpointError: There is no such run, or its file is damaged.
        ConfigError: It was started with other options, images or another teacher.
    """
    state = _read_state(job, device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return Progress(**state["progress"]), state["processes"]


def _read_state(job: Job, device: torch.device) -> dict[str, Any]:
    """What :func:`save_state` wrote, of this very job."""
    if not job.state.is_file():
        raise CheckpointError(job.state, "a run to go on with", "none", "leave --resume out")
    try:
        state: dict[str, Any] = torch.load(job.state, map_location=device, weights_only=True)
        started_with: dict[str, str] = state["identity"]
        Progress(**state["progress"])
        int(state["processes"])
    except Exception as error:  # noqa: BLE001 - torch fails on damaged files in many ways
        raise CheckpointError(
            job.state,
            "the state of a run",
            f"a damaged file ({type(error).__name__})",
            "start again in a new folder",
        ) from None
    now = job.identity()
    if changed := [name for name in now if now[name] != started_with.get(name)]:
        raise ConfigError(
            job.config.out,
            "the options, images and teacher that the run was started with",
            "others for " + ", ".join(changed),
            f"repeat those in {job.config.out / CONFIG}, or choose another --out",
        )
    return state


def save_result(job: Job, model: nn.Module, record: dict[str, Any]) -> None:
    """Write the network with its spec and how it was made."""
    save_checkpoint(job.result, model, job.spec, json.dumps(record, default=str))


def provenance(job: Job, progress: Progress) -> dict[str, Any]:
    """How the network that is saved now was made, ready for JSON."""
    return {
        "kind": job.kind,
        "dataset": job.dataset.name,
        "data_hash": job.inputs["images"],
        "select": job.recipe.select,
        "epoch": progress.epoch,
        "epochs": job.recipe.epochs,
        "metrics": progress.history[-1],
        "recipe": dataclasses.asdict(job.recipe),
        "config": dataclasses.asdict(job.config),
        "seed": job.config.seed,
        **made_by(),
    }
