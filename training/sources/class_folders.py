"""Images sorted into folders: one for each split, and in it one for each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from efficientface_deploy.errors import DatasetError
from training.progress import track
from training.sources.files import Place, children, folders, read
from training.sources.preparation import Face

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
    raise DatasetError(
        folder,
        expected="class folders " + ", ".join(classes),
        found="; ".join(parts),
        fix=_FIX,
    )


def _images_of_class(folder: Place) -> list[Place]:
    images = children(folder)
    if nested := [child.name for child in images if child.is_dir()]:
        raise DatasetError(
            folder,
            expected="images alone",
            found="folder " + ", ".join(nested[:5]),
            fix="move its images up, and remove it",
        )
    if not images:
        raise DatasetError(folder, expected="images", found="an empty folder", fix=_FIX)
    return images
