"""RAF-DB, basic expressions: the official list file and the official aligned images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from efficientface_deploy.command import option
from efficientface_deploy.errors import DatasetError
from training.datasets.archive import (
    Place,
    describe_content,
    first_with,
    open_place,
    open_source,
    open_text,
    read,
)
from training.datasets.common import (
    Face,
    Preparation,
    PrepareConfig,
    Published,
    check_every_class,
    describe,
)

# RAF-DB numbers its classes from 1, in this order, which is not ours.
RAFDB_CLASSES = ("Surprise", "Fear", "Disgust", "Happiness", "Sadness", "Anger", "Neutral")
# Images of each class, in the same order (Li, Deng, Du 2017, basic set).
RAFDB_COUNTS = {
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
LIST_FILE = "EmoLabel/list_patition_label.txt"  # so it is spelt
IMAGE_FOLDER = "Image/aligned"
IMAGE_ARCHIVE = "Image/aligned.zip"

_NAME = re.compile(r"(train|test)_\d+\.jpg", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RafDbConfig(PrepareConfig):
    """Options of ``training.prepare rafdb``."""

    source: Path = option(
        help="RAF-DB's folder basic (with EmoLabel and Image), or a zip of it", first=True
    )


def prepare_rafdb(config: RafDbConfig) -> Preparation:
    """RAF-DB from its official files: the aligned images, unpacked or still in ``aligned.zip``."""
    description = describe(
        "rafdb",
        "RAF-DB, basic expressions, aligned images (Li, Deng, Du 2017)",
        "non-commercial research, by agreement with the authors of RAF-DB",
    )

    @contextlib.contextmanager
    def faces() -> Iterator[list[Face]]:
        with open_source(
            config.source,
            [LIST_FILE],
            expected=f"{LIST_FILE} and {IMAGE_FOLDER} of RAF-DB",
            fix="give RAF-DB's folder basic, as its authors send it",
        ) as source:
            labels = description["labels"]
            listed = _read_list(source / LIST_FILE, labels)
            counts = Counter((split, label) for _, split, label in listed)
            check_every_class(counts, labels, source / LIST_FILE)
            with _open_images(source, [file for file, _, _ in listed]) as images:
                yield [
                    Face(file, split, label, functools.partial(read, images / file))
                    for file, split, label in listed
                ]

    published = {
        split: Published(sum(counts), dict(zip(RAFDB_CLASSES, counts, strict=True)))
        for split, counts in RAFDB_COUNTS.items()
    }
    return Preparation(description, faces, published)


def _read_list(place: Place, labels: Sequence[str]) -> list[tuple[str, str, int]]:
    """Aligned file, split and label of every line."""
    order = [labels.index(name) for name in RAFDB_CLASSES]  # by name, never by position
    numbers = {str(number): label for number, label in enumerate(order, start=1)}
    fix = "take the list from RAF-DB unchanged"
    listed = []
    with open_text(place) as file:
        for row, line in enumerate(file, start=1):
            fields = line.split()
            if not fields:
                continue
            match = _NAME.fullmatch(fields[0])
            if match is None or len(fields) != 2 or fields[1] not in numbers:
                wanted = "a line like train_00001.jpg 5, with a label from 1 to 7"
                raise DatasetError(f"{place} line {row}", wanted, " ".join(fields)[:80], fix)
            aligned = fields[0].replace(".jpg", "_aligned.jpg")
            listed.append((aligned, match[1], numbers[fields[1]]))
    if not listed:
        raise DatasetError(place, "lines", "none", fix)
    return listed


@contextlib.contextmanager
def _open_images(source: Place, files: Sequence[str]) -> Iterator[Place]:
    """The folder of the aligned images."""
    folder = source / IMAGE_FOLDER
    if images := first_with((folder, folder / "aligned"), files):
        yield images
        return
    archive = source / IMAGE_ARCHIVE
    if not archive.is_file():
        raise _no_images(source, "none", f"copy or unpack {IMAGE_ARCHIVE} there")
    if not isinstance(archive, Path):  # reading a zip inside a zip would take hours
        raise _no_images(source, f"{IMAGE_ARCHIVE} inside the zip", "unpack the outer zip")
    with open_place(archive) as top:
        images = first_with((top, top / "aligned", top / IMAGE_FOLDER), files)
        if images is None:
            raise _no_images(archive, describe_content(top), "take aligned.zip from RAF-DB")
        yield images


def _no_images(where: Place, found: str, fix: str) -> DatasetError:
    wanted = f"{IMAGE_FOLDER}/train_00001_aligned.jpg and the other aligned images"
    return DatasetError(where, wanted, found, fix)
