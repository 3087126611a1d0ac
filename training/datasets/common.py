"""What a source hands to ``training.prepare``: a description, and images that are not read yet."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from efficientface_deploy.command import option
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.dataset import SPLITS
from training.datasets.archive import Place, children, folders, is_folder, read

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image, pixels."""

_FIX = "mend the folders, or check --source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options that all data sets share."""

    out: Path = option(help="folder to make", first=True)
    overwrite: bool = option(False, help="replace a data set that is there")


@dataclasses.dataclass(frozen=True)
class Face:
    """One image on its way into a prepared data set.

    Attributes:
        name: File name.
        split: train, validation or test.
        label: Index into the labels.
        read: Gives the image file's bytes; none when the source has no such file.
        votes: Mass of each class, or None.
        box: Part of the image that shows the face, or None for all.
        clip: Cut a box that reaches beyond the image at the image's edge, rather than refuse it.
    """

    name: str
    split: str
    label: int
    read: Callable[[], bytes]
    votes: Sequence[float] | None = None
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
        faces: Opens the source for a while, and lists its images.
        published: Counts to compare with, by split.
        votes: Whether every image comes with votes.
        every_class: Whether each split must have images of each class.
    """

    description: dict[str, Any]
    faces: Callable[[], AbstractContextManager[Sequence[Face]]]
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    votes: bool = False
    every_class: bool = True


def describe(preset_name: str, source: str, licence: str, **changes: Any) -> dict[str, Any]:
    """Content of ``dataset.json`` for a data set with a preset's labels.

    Args:
        preset_name: Which preset fits it.
        source: Where its images come from.
        licence: What they may be used for.
        changes: What is otherwise than the preset says; ``prepared_with`` are the options that
            decide the content.
    """
    spec = preset(preset_name)
    return {
        "name": spec.name,
        "labels": list(spec.labels),
        "preset": preset_name,
        "face_crop": spec.face_crop,
        "source": source,
        "licence": licence,
        "prepared_with": {},
    } | changes


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
        if missing := [name for index, name in enumerate(labels) if not counts[split, index]]:
            wanted, found = f"images of each class in {split}", "none of " + ", ".join(missing)
            fix = "check that --source is complete and fully unpacked"
            raise DatasetError(subject, wanted, found, fix)


def list_images(source: Place, splits: Mapping[str, str], classes: Sequence[str]) -> list[Face]:
    """Every image of ``source/{split}/{class}/``, whole.

    Args:
        source: The folder that holds the splits.
        splits: Name of each split's folder; each must be there.
        classes: Names of the classes' folders, in the order of the labels, in NFC.

    Raises:
        DatasetError: A split or a class is missing or empty, there are other class folders, or
            folders inside a class.
    """
    listed = []
    for split, name in splits.items():
        for label, folder in enumerate(_class_folders(source / name, classes)):
            for image in _images_of_class(folder):
                listed.append(Face(image.name, split, label, functools.partial(read, image)))
    return listed


def class_name(folder: Place) -> str:
    """A class folder's name as people type it: macOS writes an accent apart from its letter."""
    return unicodedata.normalize("NFC", folder.name)


def _class_folders(split: Place, classes: Sequence[str]) -> list[Place]:
    """The folder of each class."""
    inside = folders(split) if is_folder(split) else None
    found = {class_name(folder): folder for folder in inside or ()}
    problems = ["no such folder"] if inside is None else []
    if found and (missing := [name for name in classes if name not in found]):
        problems.append("no " + ", ".join(missing))
    if foreign := [name for name in found if name not in classes]:
        problems.append("also " + ", ".join(foreign))
    if len(found) < len(inside or ()):
        problems.append("two folders of one name")
    if problems or not found:
        wanted = "class folders " + ", ".join(classes)
        raise DatasetError(split, wanted, "; ".join(problems) or "none", _FIX)
    return [found[name] for name in classes]


def _images_of_class(folder: Place) -> list[Place]:
    images = children(folder)
    if nested := [child.name for child in images if is_folder(child)]:
        found = "folder " + ", ".join(nested[:5])
        raise DatasetError(folder, "images alone", found, "move its images up, and remove it")
    if not images:
        raise DatasetError(folder, "images", "an empty folder", _FIX)
    return images
