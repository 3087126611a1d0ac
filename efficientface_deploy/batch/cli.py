"""efficientface-annotate: label the faces of a large set of pictures, into Parquet files.

What is done is kept: the same command goes on where it was killed.
"""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import annotate

    annotate()

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from efficientface_deploy.batch.cluster import annotate_on_ray
from efficientface_deploy.batch.job import (
    JOB_FILE,
    LIST_FILE,
    Job,
    Options,
    annotate_shard,
    begin,
    shard_size,
)
from efficientface_deploy.batch.source import find_pictures
from efficientface_deploy.command import log_told, option, parse_config
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.download import Download
from efficientface_deploy.errors import BackendError, ImageError
from efficientface_deploy.files import file_hash, remove_temporaries, require_file
from efficientface_deploy.predictor import model_file
from efficientface_deploy.prior import parse_prior
from efficientface_deploy.vision.detectors import open_detector, search_options
from efficientface_deploy.vision.search import MAX_SIDE, MIN_SCORE
from efficientface_deploy.workbench.progress import Rate
from efficientface_deploy.workbench.requirements import require_package
from efficientface_deploy.workbench.workspace import open_workspace

Counts = Generator[Counter[str], None, None]


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """Options of ``efficientface-annotate``."""

    source: Path = option(
        help="folder of pictures, manifest (.csv) or Parquet file of paths or of pictures",
        metavar="SOURCE",
        positional=True,
        first=True,
    )
    out: Path = option(
        help="folder for the Parquet files; one that this command has begun is gone on with",
        metavar="DIR",
        first=True,
    )
    faces: bool = option(False, help="find the faces first, by YuNet", first=True)
    model: Path | None = option(
        None, help="model file, or accurate; default: the bundled model", first=True
    )
    workers: int = option(1, minimum=1, help="processes; with --ray actors")
    threads: int | None = option(
        None, minimum=1, help="threads of each (default: the CPUs that we may use, shared)"
    )
    ray: str | None = option(
        None, metavar="local|ADDRESS", help="work on a Ray cluster; its machines share the files"
    )
    column: str | None = option(None, metavar="NAME", help="column of the pictures or their paths")
    shard: int | None = option(
        None, minimum=1, metavar="PICTURES", help="pictures a file (default: by their count)"
    )
    backend: str = option("auto", help="auto, onnx, onnx:cuda, trt, trt-rtx, torch, ...")
    preset: str | None = option(None, help="what a published checkpoint was trained on")
    prior: str | None = option(
        None, metavar="uniform|LABEL=WEIGHT,...", help="how often each class comes here"
    )
    detect: str | None = option(None, help="another detector: centerface, yunet or yunet=FILE")
    min_face: float | None = option(
        None, metavar="PIXELS", minimum=1, help="smallest face that is wanted"
    )
    min_score: float = option(MIN_SCORE, minimum=0, maximum=1, help="smallest score of a face")
    max_side: int = option(
        MAX_SIDE, metavar="PIXELS", minimum=32, help="longer side of a picture for the search"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``efficientface-annotate``."""
    config = parse_config(
        AnnotateConfig,
        argv,
        prog="efficientface-annotate",
        description=__doc__ or "",
        example="photos/ --out annotations --faces",
    )
    require_package("pyarrow", "efficientface-annotate")
    if config.ray is not None:
        require_package("ray", "--ray")
    options = _options(config)
    with open_workspace(config.out, "annotation") as work:
        fresh = work.scratch / LIST_FILE
        pictures = find_pictures(config.source.absolute(), config.column, fresh)
        size = config.shard or shard_size(config.out, pictures.count)
        threads = config.threads or max(1, usable_cpus() // config.workers)
        job = Job(pictures, options, config.out.resolve(), size, threads)
        begin(job)
        if not pictures.bytes:
            os.replace(fresh, job.out / LIST_FILE)
            pictures = dataclasses.replace(pictures, file=job.out / LIST_FILE)
        else:
            pictures = dataclasses.replace(pictures, file=pictures.file.absolute())
        total = _annotate(dataclasses.replace(job, pictures=pictures), config)
    print(
        f"{total['pictures']:,} pictures, {total['faces']:,} faces, "
        f"{total['unreadable']:,} unreadable, in {config.out}"
    )
    if total["unreadable"] == total["pictures"]:
        fix = f"see the column error in {config.out}"
        raise ImageError(config.source, "pictures that can be read", "none", fix)
    return 0


def _annotate(job: Job, config: AnnotateConfig) -> Counter[str]:
    """Do the shards that are missing, and give the counts of all."""
    remove_temporaries(job.out, "part-*", JOB_FILE)  # of a run that was killed
    known = {shard: counts for shard in job.shards if (counts := job.counts(shard)) is not None}
    missing = [shard for shard in job.shards if shard not in known]
    total: Counter[str] = sum(known.values(), Counter())
    if known:
        done = f"{total['pictures']:,} pictures are done already"
        if total["unreadable"]:
            done += f"; {total['unreadable']:,} unreadable ones of them are not tried again"
        print(f"going on: {done}", flush=True)
    rate = Rate("pictures", job.pictures.count, total["pictures"])
    with contextlib.closing(_run(job, missing, config)) as results:
        for counts in results:
            total += counts
            rate.tell(total["pictures"])
    return total


def _run(job: Job, shards: Sequence[int], config: AnnotateConfig) -> Counts:
    if not shards:
        return
    if config.ray is not None:
        yield from annotate_on_ray(job, shards, config.ray, config.workers)
    elif config.workers == 1:
        yield from (annotate_shard(job, shard) for shard in shards)
    else:
        yield from _in_processes(job, shards, config.workers)


def _in_processes(job: Job, shards: Sequence[int], workers: int) -> Counts:
    context = multiprocessing.get_context("spawn")  # a fork would not survive ONNX Runtime
    pool = ProcessPoolExecutor(workers, context, initializer=_be_a_worker)
    try:
        waiting: set[Future[Counter[str]]] = set()
        remaining = iter(shards)
        while True:
            for shard in remaining:
                waiting.add(pool.submit(annotate_shard, job, shard))
                if len(waiting) > 2 * workers:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        found = "one that was killed, perhaps for want of memory"
        fix = "run the same command again: it goes on from there; fewer --workers need less memory"
        raise BackendError("--workers", "processes that live to the end", found, fix) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _be_a_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _options(config: AnnotateConfig) -> Options:
    """What decides about the answers; the model, the detector and the prior are tried."""
    detector, search = search_options(config)
    if detector is not None:
        with log_told(Download.__module__):
            open_detector(detector, threads=1, **search)  # fetches what all workers need
    if config.prior is not None:
        parse_prior(config.prior)
    model = model_file(config.model, config.backend).absolute()
    return Options(
        model=require_file(model, "a model"),
        model_hash=file_hash(model),
        backend=config.backend,
        preset=config.preset,
        prior=config.prior,
        detector=detector,
        **search,
    )
