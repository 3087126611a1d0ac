"""AffectNet: the first release (CSV lists, whole pictures) and the newer one (cut faces).

Its validation set becomes ``test``: it is what publications report, the published code calls it
so, and no third set is public. An epoch is chosen by a part of ``train``, as everywhere here.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from efficientface_deploy.command import option
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.workbench.dataset import read_csv
from efficientface_deploy.workbench.progress import track
from training.datasets.archive import Place, first_with, open_source, open_text, read
from training.datasets.common import (
    Box,
    Face,
    Preparation,
    PrepareConfig,
    Published,
    check_every_class,
    describe,
)

# AffectNet's numbers, from 0; None, Uncertain and Non-Face are no expressions.
AFFECTNET_CLASSES = (
    *("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger", "Contempt"),
    *("None", "Uncertain", "Non-Face"),
)
# Manually annotated images of the first eight (Mollahosseini, Hasani, Mahoor 2017).
AFFECTNET_TRAIN_COUNTS = (74_874, 134_415, 25_459, 14_090, 6_378, 3_803, 24_882, 3_750)
AFFECTNET_TEST_COUNT = 500

COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
LISTS = {"train": "training.csv", "test": "validation.csv"}
LIST_FOLDER = "Manually_Annotated_file_lists"
IMAGE_FOLDER = "Manually_Annotated_Images"
FOLDERS = {"train": "train_set", "test": "val_set"}
_ANNOTATION = "_exp.npy"
_NO_BOX: Box = (0, 0, 0, 0)  # shows nothing: such a face is reported and left out
_FIX = "take it from AffectNet unchanged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AffectNetConfig(PrepareConfig):
    """Options of ``training.prepare affectnet``."""

    source: Path = option(
        help="AffectNet's folder (with training.csv and the images, or with train_set), or a zip",
        first=True,
    )
    classes: str = option("7", choices=("7", "8"), help="8 is with Contempt")


class _Listed(NamedTuple):
    """One image with an expression: where it is, and where its face is in it (None for all)."""

    path: str
    split: str
    label: int
    box: Box | None


def prepare_affectnet(config: AffectNetConfig) -> Preparation:
    """AffectNet-7 or -8 from either release; faces are cut by their box where they are not yet."""
    description = describe(
        f"affectnet{config.classes}",
        "AffectNet, manually annotated (Mollahosseini, Hasani, Mahoor 2017)",
        "non-commercial research, by agreement with the authors of AffectNet",
        prepared_with={"classes": config.classes},
    )
    labels = description["labels"]

    @contextlib.contextmanager
    def faces() -> Iterator[list[Face]]:
        with open_source(
            config.source,
            [f"{FOLDERS['train']}/annotations", f"{LIST_FOLDER}/{LISTS['train']}", LISTS["train"]],
            expected="training.csv with Manually_Annotated_Images, or train_set with annotations",
            fix="give the folder that AffectNet unpacks to",
        ) as source:
            newer = (source / FOLDERS["train"]).is_dir()
            yield (_faces_cut if newer else _faces_in_pictures)(source, labels)

    counts = dict(zip(AFFECTNET_CLASSES, AFFECTNET_TRAIN_COUNTS, strict=False))
    train = {name: count for name, count in counts.items() if name in labels}
    test = dict.fromkeys(train, AFFECTNET_TEST_COUNT)
    published = {
        split: Published(sum(classes.values()), classes)
        for split, classes in (("train", train), ("test", test))
    }
    return Preparation(description, faces, published)


def _our_label(number: str | int, labels: Sequence[str]) -> int | None:
    """Our label for AffectNet's number, by name; None where it is none of the classes.

    Raises:
        ValueError: AffectNet has no such number.
    """
    index = int(number)
    if not 0 <= index < len(AFFECTNET_CLASSES):
        raise ValueError(f"expression {index}, which is not from 0 to 10")
    name = AFFECTNET_CLASSES[index]
    return labels.index(name) if name in labels else None


def _check_classes(listed: Sequence[_Listed], labels: Sequence[str], source: Place) -> None:
    counts = Counter((image.split, image.label) for image in listed)
    for split in LISTS:
        if not any(image.split == split for image in listed):
            fix = f"copy {LISTS[split]} and its images, or {FOLDERS[split]}, there"
            raise DatasetError(source, f"images for {split}", "none", fix)
    check_every_class(counts, labels, source)


# ---- The first release: lists of pictures with a box for the face


def _faces_in_pictures(source: Place, labels: Sequence[str]) -> list[Face]:
    lists = source / LIST_FOLDER
    if not (lists / LISTS["train"]).is_file():
        lists = source
    listed = [
        image
        for split, name in LISTS.items()
        if (lists / name).is_file()
        for image in _read_csv(lists / name, split, labels)
    ]
    _check_classes(listed, labels, source)
    images = _image_folder(source, [image.path for image in listed])
    faces = []
    for path, split, label, box in listed:
        name = path.replace("/", "_")  # unique, now that the folder's name is part of it
        content = functools.partial(read, images / path)
        faces.append(Face(name, split, label, content, box=box, clip=True))
    return faces


def _image_folder(source: Place, paths: Sequence[str]) -> Place:
    parent = source / "Manually_Annotated"
    candidates = (source / IMAGE_FOLDER, parent / IMAGE_FOLDER, parent, source)
    images = first_with(candidates, paths)
    if images is None:
        wanted = f"the listed pictures, such as {paths[0]}"
        fix = "unpack Manually_Annotated.part01.rar and the other parts there"
        raise DatasetError(source / IMAGE_FOLDER, wanted, "none", fix)
    return images


def _read_csv(place: Place, split: str, labels: Sequence[str]) -> list[_Listed]:
    """The rows that have one of the labels; AffectNet's validation.csv has no header."""
    listed, line = [], 0
    with open_text(place) as file:
        try:
            for at, row in read_csv(file):
                line = at
                if tuple(row) == COLUMNS:
                    continue
                if len(row) != len(COLUMNS):
                    raise ValueError(f"{len(row)} columns")
                label = _our_label(row[COLUMNS.index("expression")], labels)
                if label is not None:
                    listed.append(_Listed(_path_of(row[0]), split, label, _box_of(row[1:5])))
        except UnicodeError:
            raise  # open_text has the words for it
        except (csv.Error, ValueError) as error:
            where, wanted = f"{place} line {line}", "columns " + ", ".join(COLUMNS)
            raise DatasetError(where, wanted, str(error), _FIX) from None
    return listed


def _path_of(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.name or not text.isprintable():
        raise ValueError(f"path {text!r}")
    return path.as_posix()


def _box_of(columns: Sequence[str]) -> Box:
    try:
        left, top, width, height = (int(float(column)) for column in columns)
    except (ValueError, OverflowError):  # NULL, where nobody marked a face
        return _NO_BOX
    return left, top, left + width, top + height


# ---- The newer release: cut faces, and a file for each annotation


def _faces_cut(source: Place, labels: Sequence[str]) -> list[Face]:
    listed = [
        image
        for split, folder in FOLDERS.items()
        if (source / folder / "annotations").is_dir()
        for image in _read_annotations(source / folder / "annotations", split, labels)
    ]
    _check_classes(listed, labels, source)
    return [
        Face(
            image.path,
            image.split,
            image.label,
            functools.partial(read, source / FOLDERS[image.split] / "images" / image.path),
        )
        for image in listed
    ]


def _read_annotations(folder: Place, split: str, labels: Sequence[str]) -> list[_Listed]:
    """The images whose file holds the number of one of the labels, as a number or its digits."""
    names = sorted(child.name for child in folder.iterdir() if child.name.endswith(_ANNOTATION))
    listed = []
    for name in track(names, f"labels of {split}", len(names)):
        try:
            number = np.load(io.BytesIO(read(folder / name)), allow_pickle=False).item()
            label = _our_label(number, labels)
        except Exception as error:  # noqa: BLE001 - numpy fails on foreign bytes in many ways
            found = str(error)[:120] or type(error).__name__
            raise DatasetError(folder / name, "one number from 0 to 10", found, _FIX) from None
        if label is not None:
            listed.append(_Listed(name.removesuffix(_ANNOTATION) + ".jpg", split, label, None))
    return listed
