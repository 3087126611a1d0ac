"""Your own images and labels: SOURCE/{train,validation,test}/{class name}/*."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from efficientface_deploy.command import option
from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.spec import PRESETS
from efficientface_deploy.workbench.dataset import SPLITS
from training.datasets.archive import Place, folders, open_source
from training.datasets.common import Face, Listed, Preparation, list_images, read_images


@dataclasses.dataclass(frozen=True)
class FoldersConfig:
    """Options of ``training.prepare folders``."""

    source: Path = option(
        help="folder or zip with train/CLASS/*, and validation/CLASS/*, test/CLASS/* if you have it"
    )
    out: Path = option(help="folder to make")
    classes: tuple[str, ...] = option(
        (), help="the class folders in the order of the labels (default: sorted by name)"
    )
    preset: str = option(
        "rafdb", choices=tuple(PRESETS), help="whose normalisation and input size fit your images"
    )
    overwrite: bool = option(False, help="replace a data set that is there")


def prepare_folders(config: FoldersConfig) -> Preparation:
    """A user's own images, whole and byte for byte.

    Raises:
        ConfigError: ``--classes`` cannot be labels.
        DatasetError: The source is not in this layout, or a class is missing or empty.
    """
    with _open(config.source) as source:
        splits = _splits(source)
        classes = config.classes or tuple(child.name for child in folders(source / "train"))
        _check_labels(classes, source, given=bool(config.classes))
        listed = list_images(source, splits, classes)
    description = {
        "name": _name(config.source.resolve()),
        "labels": list(classes),
        "preset": config.preset,
        "face_crop": "as-is",  # a preset says nothing of how these were cut
        "source": "folders of images",
        "licence": "unknown",
        # So that a second call sees whether images came, went, or changed their class.
        "prepared_with": {"images": _hash_of_names(listed)},
    }

    def faces() -> Iterator[Face]:
        with _open(config.source) as source:
            yield from read_images(list_images(source, splits, classes), "images")

    return Preparation(description, faces)


def _open(path: Path) -> AbstractContextManager[Place]:
    return open_source(
        path,
        ["train"],
        expected="a folder train, with a folder of images for each class in it",
        fix="sort your images into SOURCE/train/CLASS/",
    )


def _name(source: Path) -> str:
    return source.stem if source.is_file() else source.name


def _splits(source: Place) -> list[str]:
    """The splits that are there; a folder of another name would be lost in silence."""
    found = [child.name for child in folders(source)]
    if foreign := [name for name in found if name not in SPLITS]:
        raise DatasetError(
            source,
            "no folders but " + ", ".join(SPLITS),
            ", ".join(foreign[:5]),
            "rename it to one of these, or move it elsewhere",
        )
    return [split for split in SPLITS if split in found]


def _check_labels(classes: Sequence[str], source: Place, *, given: bool) -> None:
    """Refuse names that no ModelSpec would take as labels.

    Args:
        classes: The names.
        source: Where their folders are.
        given: Whether the names are from the command line.
    """
    if len(set(classes)) != len(classes):
        raise ConfigError(
            "--classes", "each class once", " ".join(classes), "name each class folder once"
        )
    if given and len(classes) < 2:
        raise ConfigError(
            "--classes",
            "two or more names, with spaces between them",
            classes[0],
            "give --classes Sadness Happiness ..., or leave it out",
        )
    if len(classes) < 2 or not all(name.strip() and name.isprintable() for name in classes):
        raise DatasetError(
            source,
            "two or more classes with printable names",
            ", ".join(classes) or "none",
            "make one folder for each class in train",
        )


def _hash_of_names(listed: Sequence[Listed]) -> str:
    names = (f"{image.split}/{image.label}/{image.place.name}" for image in listed)
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
