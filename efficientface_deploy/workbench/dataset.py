"""Prepared data sets: the one reader for training, calibration, verification and benchmarks.

A data set is a folder in the published layout, ``{train,validation,test}/{0..C-1}/*.jpg`` (``val``
and ``valid`` are validation too), and, where ``training.prepare`` made it, two files beside the
images: ``dataset.json`` (name, class names, preset, face crop, source, licence) and
``manifest.csv`` (path, split, label, and one column of votes per class where people voted).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientface_deploy.errors import DatasetError, SpecError, printable, system_words
from efficientface_deploy.files import is_left_behind, read_json, read_lines
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_deploy.vision.folder import describe_files, is_picture
from efficientface_deploy.vision.preprocess import to_model_input

SPLITS = ("train", "validation", "test")
SPLIT_FOLDERS = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid"), "validation")
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
    samples = _scan(root, spec.labels)
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


def read_csv(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file as spreadsheets write it, with the number of each row's last line.

    A byte-order mark, carriage returns, blank lines and rows of empty cells are no content.

    Args:
        lines: From :func:`read_lines`, of a file opened with ``newline=""``.

    Raises:
        csv.Error: It is no CSV.
        UnicodeError: It is no text.
    """
    lines = iter(lines)
    reader = csv.reader(itertools.chain([next(lines, "").removeprefix("\ufeff")], lines))
    for row in reader:
        if any(map(str.strip, row)):
            yield reader.line_num, row


def read_table(
    lines: Iterable[str],
) -> tuple[list[str], Iterator[tuple[int, dict[str, str | None]]]]:
    """The columns of a CSV file with a row of names, and its other rows by name.

    Args:
        lines: See :func:`read_csv`.

    Returns:
        The names, and the number of each row's last line with its cells; None for those missing.
    """
    rows = read_csv(lines)
    _, columns = next(rows, (0, []))
    zipped = itertools.zip_longest
    return columns, ((at, dict(zipped(columns, row[: len(columns)]))) for at, row in rows)


def split_folders(names: Iterable[str], place: object) -> dict[str, str]:
    """Which folder of a data set holds which split: split to name, in the order of the splits.

    Args:
        names: The folders that are there; others than splits' are passed over.
        place: The data set, for the error.

    Raises:
        DatasetError: Two are of one split, such as ``val`` and ``validation``.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(set(names) & set(SPLIT_FOLDERS)):
        found.setdefault(SPLIT_FOLDERS[name], []).append(name)
    for split, folders in found.items():
        if len(folders) > 1:
            fix = "move one of them elsewhere, or their images together"
            raise DatasetError(place, f"one folder for {split}", ", ".join(folders), fix)
    return {split: found[split][0] for split in SPLITS if split in found}


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
    samples = (_read_manifest if (root / MANIFEST).is_file() else _scan)(root, labels)
    name, crop = description["name"], description.get("face_crop", "")
    return _not_empty(Dataset(root, name, labels, description["preset"], samples, crop))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = read_json(path)
        labels = description["labels"]
        labels = tuple(labels) if isinstance(labels, list) else labels
        spec = preset(description["preset"]).replace(labels=labels, name=description["name"])
        spec.replace(face_crop=description.get("face_crop", spec.face_crop))
    except (ValueError, KeyError, TypeError, SpecError) as error:
        raise DatasetError(
            path, "JSON with name, labels and preset", _what_failed(error), _PREPARE
        ) from None
    return description


def _what_failed(error: Exception) -> str:
    if isinstance(error, SpecError):
        return f"{error.subject} {error.found}"
    return "no " + str(error) if isinstance(error, KeyError) else "something else"


def _scan(root: Path, labels: tuple[str, ...]) -> dict[str, tuple[Sample, ...]]:
    """Read ``{train,validation,test}/{0..C-1}/*`` without a manifest."""
    known = {str(index) for index in range(len(labels))}
    folders = [child.name for child in _children(root) if child.is_dir()]
    # Beside the splits there may be anything but another split, which would be lost in silence.
    for name in folders:
        if name not in SPLIT_FOLDERS and known & {child.name for child in _children(root / name)}:
            fix = "rename it to one of these, or move it elsewhere"
            raise DatasetError(root, "splits " + ", ".join(SPLITS), f"a folder {name}", fix)
    samples: dict[str, tuple[Sample, ...]] = dict.fromkeys(SPLITS, ())
    left_out: dict[str, list[str]] = {"no known kind of picture": [], "in no class": []}
    for split, name in split_folders(folders, root).items():
        samples[split] = tuple(_scan_split(root / name, labels, left_out))
    for what, names in left_out.items():
        if names:
            found = describe_files(names, what)
            print(printable(f"note: left out of {root}: {found}"), file=sys.stderr)
    return samples


def _scan_split(
    folder: Path, labels: tuple[str, ...], left_out: dict[str, list[str]]
) -> Iterator[Sample]:
    """The images of a split; the other files go to ``left_out``."""
    known = [str(index) for index in range(len(labels))]
    inside = _children(folder)
    left_out["in no class"] += [child.name for child in inside if not child.is_dir()]
    if foreign := [child.name for child in inside if child.is_dir() and child.name not in known]:
        expected, fix = f"class folders 0 to {len(labels) - 1}", "check --preset, or " + _PREPARE
        raise DatasetError(folder, expected, ", ".join(foreign), fix)
    for label, name in enumerate(known):
        for path in _children(folder / name) if (folder / name).is_dir() else ():
            if is_picture(path):
                yield Sample(path, label)
            elif path.is_dir():
                fix = "move its images up, and remove it"
                raise DatasetError(folder / name, "images alone", f"folder {path.name}", fix)
            else:
                left_out["no known kind of picture"].append(path.name)


def _children(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what the system leaves behind and hidden folders.

    Raises:
        DatasetError: It may not be read.
    """
    try:
        found = sorted(child for child in folder.iterdir() if not is_left_behind(child.name))
    except NotADirectoryError:
        return []
    except OSError as error:
        raise DatasetError(folder, "a folder of images", system_words(error), _PREPARE) from None
    return [child for child in found if not (child.name.startswith(".") and child.is_dir())]


def _read_manifest(root: Path, labels: tuple[str, ...]) -> dict[str, tuple[Sample, ...]]:
    path = root / MANIFEST
    samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    seen: set[Path] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns, rows = read_table(read_lines(file))
            vote_columns = _vote_columns(path, columns, labels)
            for line, row in rows:
                where = f"{path} line {line}"
                sample = _manifest_row(root, row, vote_columns, where, labels)
                split = row["split"] or ""
                if split not in samples:
                    raise DatasetError(where, "split " + ", ".join(SPLITS), repr(split), _PREPARE)
                if sample.path in seen:
                    raise DatasetError(where, "each image once", f"{row['path']} again", _PREPARE)
                seen.add(sample.path)
                samples[split].append(sample)
    except (UnicodeError, csv.Error) as error:
        raise DatasetError(path, "CSV in UTF-8", f"something else ({error})", _PREPARE) from None
    return {
        name: tuple(sorted(part, key=lambda sample: sample.path)) for name, part in samples.items()
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
    row: dict[str, str | None],
    vote_columns: list[str] | None,
    where: str,
    labels: tuple[str, ...],
) -> Sample:
    try:
        label = int(row["label"] or "")
        votes = tuple(float(row[name] or "") for name in vote_columns) if vote_columns else None
    except ValueError:
        raise DatasetError(where, "numbers for label and votes", str(row), _PREPARE) from None
    if not 0 <= label < len(labels):
        raise DatasetError(where, f"a label from 0 to {len(labels) - 1}", str(label), _PREPARE)
    if votes is not None and (min(votes) < 0 or not 0 < sum(votes) < math.inf):
        raise DatasetError(where, "votes >= 0, not all zero", str(votes), _PREPARE)
    relative = Path(row["path"] or "")
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise DatasetError(where, "a path inside the data set", repr(row["path"]), _PREPARE)
    return Sample(root / relative, label, votes)
