"""Shards on a Ray cluster: one annotator for each actor, and a killed actor is replaced."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from efficientface_deploy.batch.job import Annotator, Job
from efficientface_deploy.errors import BackendError, EfficientFaceError, words_of
from efficientface_deploy.workbench.requirements import require_package

LOCAL = "local"

_KNOCK_SECONDS = 10


class ShardActor:
    """What an actor holds: a loaded model; Ray Data calls it with some shards' numbers.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._annotator = Annotator(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Annotate shards: a batch with ``shard`` in, their counts out."""
        counts = [self._annotator.annotate(int(shard)) for shard in batch["shard"]]
        names = ("pictures", "faces", "unreadable")
        return {name: [one[name] for one in counts] for name in names}


def annotate_on_ray(
    job: Job, shards: Sequence[int], address: str, workers: int
) -> Iterator[Counter[str]]:
    """Annotate shards on a cluster, whose machines share the source and the output folder.

    Args:
        job: The job.
        shards: Their numbers.
        address: Of the cluster, as ``ray.init`` takes it; ``local`` starts one on this machine.
        workers: Actors, each with the job's threads.

    Yields:
        The counts of each shard, as it is done.

    Raises:
        BackendError: Ray is missing, or there is no such cluster.
        EfficientFaceError: As of an annotator.
    """
    require_package("ray", "--ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)

    _connect(ray, address, job.threads * workers)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards))
        done = rows.map_batches(
            ShardActor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=job.threads,
        )
        for row in done.iter_rows():
            yield Counter({name: int(value) for name, value in row.items()})
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, cpus: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            _knock(address)
            ray.init(address=address, **quiet)
    except Exception as error:  # noqa: BLE001 - a time-out, a refusal, a wrong version, ...
        fix = "start one by ray start --head, check the address, or give --ray local"
        raise BackendError("--ray", f"a cluster at {address}", words_of(error), fix) from None


def _knock(address: str) -> None:
    """See that anything listens there: Ray itself tries for minutes.

    Raises:
        OSError: Nothing does.
        ValueError: It is no address.
    """
    if address != "auto":
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not (colon and port.isdecimal()):
            raise ValueError("no address, which is HOST:PORT, ray://HOST:PORT, auto or local")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _cause(error: BaseException) -> EfficientFaceError:
    """Ours where an actor raised one; else what Ray says."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EfficientFaceError):
            return type(cause)(cause.subject, cause.expected, cause.found, cause.fix)
        cause = getattr(cause, "cause", None) or cause.__cause__
    fix = "run the same command again: it goes on from there"
    return BackendError("--ray", "every shard to be annotated", words_of(error), fix)
