"""Prepared data sets: the one reader for training, calibration, verification and benchmarks.

A data set is a folder in the published layout, ``{train,validation,test}/{0..C-1}/*.jpg``, and,
where ``training.prepare`` made it, two files beside the images: ``dataset.json`` (name, class
names, preset, face crop, source, licence) and ``manifest.csv`` (path, split, label, and one
column of votes per class where people voted).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientface_deploy.errors import DatasetError, SpecError, system_words
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.preprocess import IMAGE_SUFFIXES, to_model_input

SPLITS = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
MANIFEST = "manifest.csv"
VOTES_PREFIX = "votes_"

_PREPARE = "prepare the data set with python -m training.prepare"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        path: The image file.
        label: Index into the data set's labels.
        votes: How many people (or how much mass) chose each class, in the order of the labels;
            None where nobody voted.
    """

    path: Path
    label: int
    votes: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set, read but not decoded.

    Attributes:
        root: Its folder.
        name: What people call it.
        labels: Class names; a sample's label is an index into them.
        preset: Name of the ModelSpec preset that fits it.
        samples: The images of each split, sorted by path.
        face_crop: How its faces were cut, as :attr:`ModelSpec.face_crop`; empty for the preset's.
    """

    root: Path
    name: str
    labels: tuple[str, ...]
    preset: str
    samples: dict[str, tuple[Sample, ...]]
    face_crop: str = ""

    @property
    def spec(self) -> ModelSpec:
        """The preset's ModelSpec, with this data set's name, labels and crop."""
        spec = preset(self.preset)
        crop = self.face_crop or spec.face_crop
        return spec.replace(labels=self.labels, name=self.name, face_crop=crop)

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of one split.

        Raises:
            DatasetError: The data set has no such split, or it is empty.
        """
        samples = self.samples.get(name, ())
        if not samples:
            have = ", ".join(key for key, value in self.samples.items() if value) or "no images"
            raise DatasetError(
                self.root, f"a {name} split", have, f"choose another split, or {_PREPARE}"
            )
        return samples

    def evaluation_split(self) -> str:
        """``validation`` where there is one, else ``test`` (RAF-DB publishes only that)."""
        return "validation" if self.samples.get("validation") else "test"


def read_dataset(root: str | Path, preset_name: str | None = None) -> Dataset:
    """Read a prepared data set.

    Args:
        root: Its folder.
        preset_name: What the numbered folders mean, for the published layout without
            ``dataset.json``; where the data set says so itself, the two must agree.

    Raises:
        DatasetError: The folder or its files are missing, inconsistent or empty.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(root, "a data set's folder", "none", _PREPARE)
    if (root / DESCRIPTION).is_file():
        return _read_described(root, preset_name)
    if preset_name is None:
        raise DatasetError(
            root,
            f"{DESCRIPTION}, or a preset that says what the numbered folders mean",
            "neither",
            "add --preset (rafdb, affectnet7, affectnet8, caers, ferplus), or "
            + _PREPARE.replace("the data set", "it"),
        )
    spec = preset(preset_name)
    samples = {name: _scan_split(root, name, spec.labels) for name in SPLITS}
    dataset = Dataset(root, spec.name, spec.labels, preset_name, samples)
    return _not_empty(dataset)


def label_distributions(samples: Sequence[Sample], classes: int) -> npt.NDArray[np.float32]:
    """Votes as probabilities.

    Args:
        samples: Images of one split.
        classes: Number of classes C.

    Returns:
        float32 array (N, C), rows sum to one; a sample without votes is one-hot at its label.
    """
    rows = np.zeros((len(samples), classes), dtype=np.float32)
    for row, sample in zip(rows, samples, strict=True):
        if sample.votes is None:
            row[sample.label] = 1
        else:
            votes = np.asarray(sample.votes, dtype=np.float64)
            row[:] = votes / votes.sum()
    return rows


def class_frequencies(samples: Sequence[Sample], classes: int) -> tuple[float, ...] | None:
    """The share of each of C classes among the labels of a training set.

    Returns:
        C positive numbers, one in sum; None where a class has no image.
    """
    counts = np.bincount([sample.label for sample in samples], minlength=classes)
    return tuple((counts / counts.sum()).tolist()) if counts.all() else None


def iterate_batches(
    samples: Sequence[Sample], spec: ModelSpec, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Read images in order, as a model takes them.

    Args:
        samples: The images.
        spec: The model's.
        batch_size: Images of one batch; the last one may be smaller.

    Yields:
        uint8 (B, S, S, 3) RGB and int64 labels (B,).

    Raises:
        ImageError: An image cannot be read.
    """
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        images = np.stack([to_model_input(sample.path, spec) for sample in part])
        yield images, np.array([sample.label for sample in part], dtype=np.int64)


def image_list_hash(samples: Sequence[Sample], root: Path) -> str:
    """SHA-256 over the relative paths and the bytes of the images, in the order given.

    Raises:
        DatasetError: An image is missing.
    """
    digest = hashlib.sha256()
    for sample in samples:
        name = sample.path.relative_to(root).as_posix()
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        try:
            digest.update(hashlib.sha256(sample.path.read_bytes()).digest())
        except OSError as error:
            raise DatasetError(sample.path, "an image", system_words(error), _PREPARE) from None
    return digest.hexdigest()


def _not_empty(dataset: Dataset) -> Dataset:
    if not any(dataset.samples.values()):
        raise DatasetError(
            dataset.root,
            f"images in folders {', '.join(SPLITS)}, below them 0 to {len(dataset.labels) - 1}",
            "none",
            _PREPARE,
        )
    return dataset


def _read_described(root: Path, preset_name: str | None) -> Dataset:
    description = _read_description(root / DESCRIPTION)
    if preset_name is not None:
        preset(preset_name)  # a name that is none is the first thing to say
    if preset_name not in (None, description["preset"]):
        raise DatasetError(
            root,
            f"preset {description['preset']}, as its {DESCRIPTION} says",
            f"--preset {preset_name}",
            "leave --preset out",
        )
    labels = tuple(description["labels"])
    if (root / MANIFEST).is_file():
        samples = _read_manifest(root, labels)
    else:
        samples = {name: _scan_split(root, name, labels) for name in SPLITS}
    name, crop = description["name"], description.get("face_crop", "")
    return _not_empty(Dataset(root, name, labels, description["preset"], samples, crop))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        labels = description["labels"]
        labels = tuple(labels) if isinstance(labels, list) else labels
        spec = preset(description["preset"]).replace(labels=labels, name=description["name"])
        spec.replace(face_crop=description.get("face_crop", spec.face_crop))
    except (ValueError, KeyError, TypeError, RecursionError, SpecError) as error:
        raise DatasetError(
            path, "JSON with name, labels and preset", _what_failed(error), _PREPARE
        ) from None
    return description


def _what_failed(error: Exception) -> str:
    if isinstance(error, SpecError):
        return f"{error.subject} {error.found}"
    return "no " + str(error) if isinstance(error, KeyError) else "something else"


def _scan_split(root: Path, split: str, labels: tuple[str, ...]) -> tuple[Sample, ...]:
    """Read ``split/{0..C-1}/*`` without a manifest."""
    folder = root / split
    if not folder.is_dir():
        return ()
    names = {child.name for child in _visible(folder) if child.is_dir()}
    known = {str(index) for index in range(len(labels))}
    if foreign := sorted(names - known):
        raise DatasetError(
            folder,
            f"class folders 0 to {len(labels) - 1}",
            ", ".join(foreign),
            "check --preset, or " + _PREPARE,
        )
    return tuple(
        Sample(path, label)
        for label in range(len(labels))
        if (folder / str(label)).is_dir()
        for path in _visible(folder / str(label))
        if path.suffix.lower() in IMAGE_SUFFIXES
    )


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what macOS and Jupyter leave there."""
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _read_manifest(root: Path, labels: tuple[str, ...]) -> dict[str, tuple[Sample, ...]]:
    path = root / MANIFEST
    samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    seen: set[Path] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            vote_columns = _vote_columns(path, reader.fieldnames or [], labels)
            for row in reader:
                where = f"{path} line {reader.line_num}"
                sample = _manifest_row(root, row, vote_columns, where, labels)
                if row["split"] not in samples:
                    raise DatasetError(
                        where, "split " + ", ".join(SPLITS), repr(row["split"]), _PREPARE
                    )
                if sample.path in seen:
                    raise DatasetError(where, "each image once", row["path"] + " again", _PREPARE)
                seen.add(sample.path)
                samples[row["split"]].append(sample)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(path, "CSV in UTF-8", f"something else ({error})", _PREPARE) from None
    return {
        name: tuple(sorted(rows, key=lambda sample: sample.path)) for name, rows in samples.items()
    }


def _vote_columns(path: Path, columns: Sequence[str], labels: tuple[str, ...]) -> list[str] | None:
    """The columns of votes in the order of the labels; None where there are none."""
    if not {"path", "split", "label"} <= set(columns):
        raise DatasetError(
            path, "columns path, split, label", ", ".join(columns) or "an empty file", _PREPARE
        )
    expected = [VOTES_PREFIX + label for label in labels]
    found = [column for column in columns if column.startswith(VOTES_PREFIX)]
    if found and set(found) != set(expected):
        raise DatasetError(path, "columns " + ", ".join(expected), ", ".join(found), _PREPARE)
    return expected if found else None


def _manifest_row(
    root: Path,
    row: dict[str, str],
    vote_columns: list[str] | None,
    where: str,
    labels: tuple[str, ...],
) -> Sample:
    try:
        label = int(row["label"])
        votes = tuple(float(row[column]) for column in vote_columns) if vote_columns else None
    except (TypeError, ValueError):
        raise DatasetError(where, "numbers for label and votes", str(row), _PREPARE) from None
    if not 0 <= label < len(labels):
        raise DatasetError(where, f"a label from 0 to {len(labels) - 1}", str(label), _PREPARE)
    if votes is not None and (min(votes) < 0 or not 0 < sum(votes) < math.inf):
        raise DatasetError(where, "votes >= 0, not all zero", str(votes), _PREPARE)
    relative = Path(row["path"] or "")
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise DatasetError(where, "a path inside the data set", repr(row["path"]), _PREPARE)
    return Sample(root / relative, label, votes)
