"""A large set in shards: each is annotated by itself, and is there as a whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from efficientface_deploy.batch.parquet import face_schema, read_marks, write_rows
from efficientface_deploy.batch.source import Pictures
from efficientface_deploy.errors import ArtifactError, ConfigError, ImageError
from efficientface_deploy.files import file_hash, read_json, write_text
from efficientface_deploy.predictor import load
from efficientface_deploy.prior import parse_prior
from efficientface_deploy.vision.detectors import open_detector
from efficientface_deploy.vision.preprocess import ImageSource, UInt8Array, load_image
from efficientface_deploy.vision.search import find_faces

# Hidden from what reads the folder as a data set: pyarrow, Spark, Ray, DuckDB's part-*.parquet.
JOB_FILE, LIST_FILE = "_job.json", "_pictures.parquet"

_CHUNK = 16  # pictures that a thread takes at once: larger batches are no faster on a CPU
_MOST_FACES = 64  # of them in one batch: a crowd must not fill the memory

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides about the answers, so that a folder's shards must agree in it.

    Attributes:
        model: The model file.
        model_hash: Its SHA-256.
        backend: As :func:`load` takes it.
        preset: As :func:`load` takes it.
        prior: As the command takes it.
        detector: As :func:`open_detector` takes it; None takes a picture as a face.
        min_face: Its option.
        min_score: Its option.
        max_side: Its option.
    """

    model: Path
    model_hash: str
    backend: str
    preset: str | None
    prior: str | None
    detector: str | None
    min_face: float | None
    min_score: float
    max_side: int


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a process must know to annotate any shard.

    Attributes:
        pictures: What is annotated.
        options: By what.
        out: The folder of the shards.
        size: Pictures in a shard.
        threads: Threads that decode, search and infer, each a few pictures at a time.
    """

    pictures: Pictures
    options: Options
    out: Path
    size: int
    threads: int

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(-(-self.pictures.count // self.size))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.out / f"part-{shard:05}.parquet"

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change between two runs; the model's and detector's place may."""
        options = dataclasses.asdict(self.options)
        options["model"] = self.options.model.name
        pictures = {"pictures": self.pictures.count, "pictures_hash": self.pictures.digest}
        return {**pictures, "shard": self.size, **options}

    def counts(self, shard: int) -> Counter[str] | None:
        """Of a shard that is done, its pictures, faces and unreadable pictures; else None."""
        marks = read_marks(self.path(shard)) if self.path(shard).exists() else {}
        if marks.get("job") != json.dumps(self.identity):
            return None
        return Counter(json.loads(marks["counts"]))


def begin(job: Job) -> None:
    """Write what a folder is for, or see that it is for this job.

    Raises:
        ConfigError: Another job's shards are there, or other files.
    """
    path = job.out / JOB_FILE
    if not any(job.out.glob("part-*.parquet")):  # no shard is there that another job could spoil
        path.unlink(missing_ok=True)
    if not path.exists():
        names = sorted(one.name for one in job.out.iterdir())
        others = [name for name in names if not name.startswith((".", "_"))]
        if others:
            fix = "choose another --out"
            raise ConfigError(job.out, "an empty folder, or a job's", f"{others[0]}, ...", fix)
        write_text(path, json.dumps(job.identity, indent=1) + "\n")
        return
    try:
        before = dict(read_json(path))
    except (ValueError, TypeError):
        fix = "choose another --out"
        raise ConfigError(path, "what a job writes", "something else", fix) from None
    if changed := [key for key, now in job.identity.items() if before.get(key) != now]:
        found = "others for " + ", ".join(changed).replace("pictures_hash", "the source")
        fix = f"give what {JOB_FILE} says, or choose another --out"
        raise ConfigError(job.out, "what the job that began here was given", found, fix)


def shard_size(out: Path, count: int) -> int:
    """Pictures in a shard: as the job in a folder has it, or what suits their count."""
    try:
        shard = read_json(out / JOB_FILE)["shard"]
        if type(shard) is int and shard > 0:
            return shard
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return max(32, min(1000, -(-count // 16)))


class Annotator:
    """A model, and perhaps a detector, that annotate the shards of a job.

    Args:
        job: The job.

    Raises:
        ArtifactError: The model is another one here, as on another machine of a cluster.
        EfficientFaceError: It cannot be loaded, or the detector cannot.
    """

    def __init__(self, job: Job) -> None:
        options = job.options
        if (found := file_hash(options.model)) != options.model_hash:
            expected = f"the model of this job, {options.model_hash[:12]}"
            raise ArtifactError(options.model, expected, found[:12], "copy it to each machine")
        self._job = job
        # Each thread infers by itself: that keeps all cores busy, whatever takes how long.
        self._predictor = load(
            options.model,
            backend=options.backend,
            preset=options.preset,
            threads=1,
            prior=None if options.prior is None else parse_prior(options.prior),
        )
        self._detector = None
        if options.detector is not None:
            self._detector = open_detector(
                options.detector,
                threads=1,
                min_face=options.min_face,
                min_score=options.min_score,
                max_side=options.max_side,
            )
        self._schema = face_schema(self._predictor.spec.labels)

    def annotate(self, shard: int) -> Counter[str]:
        """Annotate a shard, and write its file.

        Returns:
            How many ``pictures``, ``faces`` and ``unreadable`` pictures it has.
        """
        job = self._job
        start = shard * job.size
        stop = min(start + job.size, job.pictures.count)
        rows = list(self._rows(job.pictures.read(start, stop)))
        pictures = len({row["picture"] for row in rows})
        if pictures != stop - start:
            found, fix = f"{pictures}", "leave it as it is while the job runs"
            raise ConfigError(job.pictures.file, f"{stop - start} pictures", found, fix)
        counts = Counter(
            pictures=pictures,
            faces=sum("label" in row for row in rows),
            unreadable=sum("error" in row for row in rows),
        )
        marks = {"job": json.dumps(job.identity), "counts": json.dumps(counts)}
        write_rows(job.path(shard), rows, self._schema, marks)
        return counts

    def _rows(self, pictures: Iterable[tuple[int, str, ImageSource]]) -> Iterator[Row]:
        """Rows of pictures in their order; threads work a little ahead."""
        pictures = iter(pictures)
        waiting: deque[Future[list[Row]]] = deque()
        with ThreadPoolExecutor(self._job.threads, "efficientface-annotate") as pool:
            try:
                while chunk := list(itertools.islice(pictures, _CHUNK)):
                    waiting.append(pool.submit(self._annotate_chunk, chunk))
                    if len(waiting) > 2 * self._job.threads:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:  # an error, or an interrupt
                for future in waiting:
                    future.cancel()

    def _annotate_chunk(self, pictures: list[tuple[int, str, ImageSource]]) -> list[Row]:
        rows: list[Row] = []
        waiting: list[tuple[Row, UInt8Array]] = []  # each with its input, (S, S, 3)
        for index, name, source in pictures:
            head = {"picture": index, "path": name, "model": self._job.options.model_hash}
            try:
                for row, face in self._find(source):
                    rows.append({**head, **row})
                    if face is not None:
                        waiting.append((rows[-1], face))
                        if len(waiting) == _MOST_FACES:
                            self._label(waiting)
            except ImageError as error:
                rows.append({**head, "error": f"expected {error.expected}, found {error.found}"})
        self._label(waiting)
        return rows

    def _find(self, source: ImageSource) -> Iterator[tuple[Row, UInt8Array | None]]:
        """The faces of a picture, each with the model's input; without one, the picture alone."""
        image, spec = load_image(source), self._predictor.spec
        size = {"width": image.width, "height": image.height}
        faces, inputs = find_faces(image, self._detector, spec)
        if not faces:
            yield size, None
        for number, (face, cut) in enumerate(zip(faces, inputs, strict=True)):
            box = dict(zip(("left", "top", "right", "bottom"), face.box, strict=True))
            row = {**size, "face": number, **box, "score": face.score, "small": face.small}
            yield row, cut

    def _label(self, waiting: list[tuple[Row, UInt8Array]]) -> None:
        """Write what the model says into the rows of faces, which then wait no more."""
        predictions = self._predictor.predict_batch([face for _, face in waiting])
        for (row, _), prediction in zip(waiting, predictions, strict=True):
            row["label"] = None if row["small"] else prediction.label
            row["unsure"] = prediction.unsure
            row.update({f"p_{name}": p for name, p in prediction.probabilities.items()})
        waiting.clear()


@functools.lru_cache(maxsize=1)
def annotator(job: Job) -> Annotator:
    """The one of this process, which loads the model once."""
    return Annotator(job)


def annotate_shard(job: Job, shard: int) -> Counter[str]:
    """Annotate a shard in this process; see :meth:`Annotator.annotate`."""
    return annotator(job).annotate(shard)
