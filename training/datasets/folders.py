"""Your own images and labels: SOURCE/{train,validation,test}/{class name}/*."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from efficientface_deploy.command import option
from efficientface_deploy.errors import ConfigError, DatasetError, printable
from efficientface_deploy.spec import PRESETS
from efficientface_deploy.vision.folder import describe_files
from efficientface_deploy.workbench.dataset import SPLIT_FOLDERS, SPLITS, split_folders
from training.datasets.archive import Place, children, folders, is_folder, open_source
from training.datasets.common import (
    Face,
    Preparation,
    PrepareConfig,
    class_name,
    describe,
    list_images,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldersConfig(PrepareConfig):
    """Options of ``training.prepare folders``."""

    source: Path = option(
        help="folder or zip with train/CLASS/*; validation/CLASS/* and test/CLASS/* if you have it",
        first=True,
    )
    classes: tuple[str, ...] = option(
        (), help="the class folders in the order of the labels (default: sorted by name)"
    )
    preset: str = option(
        "rafdb", choices=tuple(PRESETS), help="whose normalisation and input size fit your images"
    )


def prepare_folders(config: FoldersConfig) -> Preparation:
    """A user's own images, whole and byte for byte.

    Raises:
        ConfigError: ``--classes`` cannot be labels.
        DatasetError: The source is not in this layout, or a class is missing or empty.
    """
    with _open(config.source) as source:
        splits = _splits(source)
        given = tuple(unicodedata.normalize("NFC", name) for name in config.classes)
        classes = given or tuple(sorted({*map(class_name, folders(source / splits["train"]))}))
        _check_labels(classes, source, given=bool(given))
        _name_strays(source, splits.values())
        names = [
            f"{face.split}/{face.label}/{face.name}"
            for face in list_images(source, splits, classes)
        ]
    content = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    name = config.source.resolve()
    description = describe(
        config.preset,
        "folders of images",
        "unknown",
        name=name.stem if name.is_file() else name.name,
        labels=list(classes),
        face_crop="as-is",  # a preset says nothing of how these were cut
        # So that a second call sees whether images came, went, or changed their class.
        prepared_with={"images": content},
    )

    @contextlib.contextmanager
    def faces() -> Iterator[list[Face]]:
        with _open(config.source) as source:
            yield list_images(source, splits, classes)

    return Preparation(description, faces)


def _open(path: Path) -> AbstractContextManager[Place]:
    return open_source(
        path,
        ["train"],
        expected="a folder train, with a folder of images for each class in it",
        fix="sort your images into SOURCE/train/CLASS/",
    )


def _splits(source: Place) -> dict[str, str]:
    """The folder of each split; one of another name would be lost in silence."""
    present = [child.name for child in folders(source)]
    if foreign := [name for name in present if name not in SPLIT_FOLDERS]:
        wanted, found = "no folders but " + ", ".join(SPLITS), ", ".join(foreign[:5])
        fix = "rename it to one of these, or move it elsewhere"
        raise DatasetError(source, wanted, found, fix)
    return split_folders(present, source)


def _name_strays(source: Place, splits: Iterable[str]) -> None:
    """Say which files lie in no class."""
    places = (source, *(source / name for name in splits))
    names = [child.name for place in places for child in children(place) if not is_folder(child)]
    if names:
        print(printable(f"left out {describe_files(names, 'in no class')}"), file=sys.stderr)


def _check_labels(classes: Sequence[str], source: Place, *, given: bool) -> None:
    """Refuse names that no ModelSpec would take as labels.

    Args:
        classes: The names.
        source: Where their folders are.
        given: Whether the names are from the command line.
    """
    name = "--classes"
    if len(set(classes)) != len(classes):
        raise ConfigError(name, "each class once", " ".join(classes), "name each class folder once")
    if given and len(classes) < 2:
        wanted = "two or more names, with spaces between them"
        fix = "give --classes Sadness Happiness ..., or leave it out"
        raise ConfigError(name, wanted, classes[0], fix)
    if len(classes) < 2 or not all(name.strip() and name.isprintable() for name in classes):
        wanted = "two or more classes with printable names"
        fix = "make one folder for each class in train"
        raise DatasetError(source, wanted, ", ".join(classes) or "none", fix)
