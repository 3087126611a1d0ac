"""What a source hands to ``training.prepare``: a description and a stream of images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from efficientface_deploy.dataset import SPLITS
from efficientface_deploy.errors import DatasetError

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
                expected=f"images of each class in {split}",
                found="none of " + ", ".join(missing),
                fix="check that --source is complete and fully unpacked",
            )
