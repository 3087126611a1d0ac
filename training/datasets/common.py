"""What a source hands to ``training.prepare``: a description and a stream of images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from efficientface_deploy.errors import DatasetError
from efficientface_deploy.workbench.dataset import SPLITS
from efficientface_deploy.workbench.progress import track
from training.datasets.archive import Place, children, folders, read

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Face:
    """One image on its way into a prepared data set.

    Attributes:
        name: File name.
        split: train, validation or test.
        label: Index into the labels.
        votes: Mass of each class, or None.
        encoded: The image file's bytes; none when the source has no such file.
        box: Part of the image that shows the face, (left, top, right, bottom), or None for all.
        clip: Cut a box that reaches beyond the image at the image's edge, rather than refuse it.
    """

    name: str
    split: str
    label: int
    votes: Sequence[float] | None
    encoded: bytes
    box: Box | None = None
    clip: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
    """How many images a split has by its publication.

    Attributes:
        total: Images of the split.
        classes: Images of each class by name, where they are published.
        under: What the numbers hold for, such as a protocol.
    """

    total: int
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    under: str = ""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A data set that can be written.

    Attributes:
        description: Content of ``dataset.json``.
        faces: Called to give the images, one at a time.
        published: Counts to compare with, by split.
        votes: Whether every image comes with votes.
        every_class: Whether each split must have images of each class.
    """

    description: dict[str, Any]
    faces: Callable[[], Iterator[Face]]
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    votes: bool = False
    every_class: bool = True


def check_every_class(
    counts: Counter[tuple[str, int]], labels: Sequence[str], subject: object
) -> None:
    """Refuse splits in which a class has no image.

    Args:
        counts: Number of images for each (split, label).
        labels: Class names.
        subject: What is refused, for the error.

    Raises:
        DatasetError: A split has images, but none of some class.
    """
    present = {split for (split, _), count in counts.items() if count}
    for split in (name for name in SPLITS if name in present):
        missing = [label for index, label in enumerate(labels) if not counts[split, index]]
        if missing:
            raise DatasetError(
                subject,
                f"images of each class in {split}",
                "none of " + ", ".join(missing),
                "check that --source is complete and fully unpacked",
            )


_FIX = "mend the folders, or check --source"


@dataclasses.dataclass(frozen=True)
class Listed:
    """One image, not read yet."""

    place: Place
    split: str
    label: int


def list_images(source: Place, splits: Iterable[str], classes: Sequence[str]) -> list[Listed]:
    """Every image of ``source/{split}/{class}/``.

    Args:
        source: The folder that holds the splits.
        splits: Names of the splits' folders; each must be there.
        classes: Names of the classes' folders, in the order of the labels.

    Raises:
        DatasetError: A split or a class is missing or empty, there are other class folders, or
            folders inside a class.
    """
    listed = []
    for split in splits:
        _check_classes(source / split, classes)
        for label, name in enumerate(classes):
            images = _images_of_class(source / split / name)
            listed += [Listed(image, split, label) for image in images]
    return listed


def read_images(listed: Sequence[Listed], what: str) -> Iterator[Face]:
    """The listed images, one at a time, as they are; ``what`` names them while it lasts."""
    for image in track(listed, what, len(listed)):
        yield Face(image.place.name, image.split, image.label, None, read(image.place))


def _check_classes(folder: Place, classes: Sequence[str]) -> None:
    found = [child.name for child in folders(folder)] if folder.is_dir() else None
    if found is not None and set(found) == set(classes):
        return
    missing = [name for name in classes if name not in (found or ())]
    foreign = [name for name in found or () if name not in classes]
    parts = ["no such folder"] if found is None else []
    if found is not None and missing:
        parts.append("no " + ", ".join(missing))
    if foreign:
        parts.append("also " + ", ".join(foreign))
    raise DatasetError(folder, "class folders " + ", ".join(classes), "; ".join(parts), _FIX)


def _images_of_class(folder: Place) -> list[Place]:
    images = children(folder)
    if nested := [child.name for child in images if child.is_dir()]:
        raise DatasetError(
            folder,
            "images alone",
            "folder " + ", ".join(nested[:5]),
            "move its images up, and remove it",
        )
    if not images:
        raise DatasetError(folder, "images", "an empty folder", _FIX)
    return images
