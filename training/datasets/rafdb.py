"""RAF-DB, basic expressions: the official list file and the official aligned images."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from efficientface_deploy.command import option
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.progress import track
from training.datasets.archive import (
    Place,
    describe_content,
    first_with,
    open_place,
    open_source,
    open_text,
    read,
)
from training.datasets.common import Face, Preparation, Published, check_every_class

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


@dataclasses.dataclass(frozen=True)
class RafDbConfig:
    """Options of ``training.prepare rafdb``."""

    source: Path = option(help="RAF-DB's folder basic (with EmoLabel and Image), or a zip of it")
    out: Path = option(help="folder to make")
    overwrite: bool = option(False, help="replace a data set that is there")


@dataclasses.dataclass(frozen=True)
class _Listed:
    """One line of the list file."""

    split: str
    label: int
    file: str


def prepare_rafdb(config: RafDbConfig) -> Preparation:
    """RAF-DB from its official files: the aligned images, unpacked or still in ``aligned.zip``."""
    spec = preset("rafdb")
    description = {
        "name": "RAF-DB",
        "labels": list(spec.labels),
        "preset": "rafdb",
        "face_crop": spec.face_crop,
        "source": "RAF-DB, basic expressions, aligned images (Li, Deng, Du 2017)",
        "licence": "non-commercial research, by agreement with the authors of RAF-DB",
        "prepared_with": {},
    }

    def faces() -> Iterator[Face]:
        with open_source(
            config.source,
            [LIST_FILE],
            expected=f"{LIST_FILE} and {IMAGE_FOLDER} of RAF-DB",
            fix="give RAF-DB's folder basic, as its authors send it",
        ) as source:
            listed = _read_list(source / LIST_FILE, spec.labels)
            counts = Counter((line.split, line.label) for line in listed)
            check_every_class(counts, spec.labels, source / LIST_FILE)
            with _open_images(source, [line.file for line in listed]) as images:
                for line in track(listed, "RAF-DB", len(listed)):
                    content = read(images / line.file)
                    yield Face(line.file, line.split, line.label, None, content)

    published = {
        split: Published(sum(counts), dict(zip(RAFDB_CLASSES, counts, strict=True)))
        for split, counts in RAFDB_COUNTS.items()
    }
    return Preparation(description, faces, published)


def _read_list(place: Place, labels: Sequence[str]) -> list[_Listed]:
    order = [labels.index(name) for name in RAFDB_CLASSES]  # by name, never by position
    numbers = {str(number): label for number, label in enumerate(order, start=1)}
    listed = []
    with open_text(place) as file:
        for row, line in enumerate(file, start=1):
            fields = line.split()
            if not fields:
                continue
            match = _NAME.fullmatch(fields[0])
            if match is None or len(fields) != 2 or fields[1] not in numbers:
                raise DatasetError(
                    f"{place} line {row}",
                    "a line like train_00001.jpg 5, with a label from 1 to 7",
                    " ".join(fields)[:80],
                    "take the list from RAF-DB unchanged",
                )
            aligned = fields[0].replace(".jpg", "_aligned.jpg")
            listed.append(_Listed(match[1], numbers[fields[1]], aligned))
    if not listed:
        raise DatasetError(place, "lines", "none", "take the list from RAF-DB unchanged")
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
    return DatasetError(
        where, f"{IMAGE_FOLDER}/train_00001_aligned.jpg and the other aligned images", found, fix
    )
