"""Images for INT8 calibration: which, how many, and a record of both."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficientface_deploy.errors import DatasetError, ImageError, printable
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.folder import describe_files, read_folder
from efficientface_deploy.vision.preprocess import UInt8Array, load_image
from efficientface_deploy.workbench.dataset import (
    DESCRIPTION,
    SPLIT_FOLDERS,
    Sample,
    image_list_hash,
    iterate_batches,
    read_dataset,
)

FEW = 100  # too few for stable ranges

_HELD_OUT = ("test", "validation")
_SHOWN = 20  # images that cannot be read and are named one by one


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Images that ranges are measured on.

    Attributes:
        chosen: Those images.
        held_out: Others of the same choice, to measure what the ranges gave.
        record: Where they come from, for the provenance: data set, split, counts, seed and hashes.
        warnings: What a careful user should know about the choice.
    """

    chosen: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    record: dict[str, Any]
    warnings: tuple[str, ...]


def choose_calibration(
    root: Path, count: int, seed: int = 0, held_out: int = 0, labels: Sequence[str] = ()
) -> Calibration:
    """A seeded choice of training images, as the classes come.

    As many of each class gave no better ranges: docs/int8.md. What cannot be read is named, counted
    and left out.

    Args:
        root: A prepared data set, a data set's folder with ``train/``, or any folder of images.
        count: How many images, fewer when there are fewer.
        seed: Of the choice.
        held_out: How many more to hold out, at most a third of all.
        labels: The model's classes: a data set of others is not what it was trained on.

    Raises:
        DatasetError: The folder is missing, or holds no images or too few to hold any out.
    """
    samples, split, classes, refused = _find_images(root)
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    held_out = min(held_out, max(1, len(samples) // 3)) if held_out else 0
    readable, unreadable = _readable(samples, order, count + held_out)
    unreadable += refused
    if not readable:
        fix = "give images that can be read"
        raise DatasetError(root, "images for calibration", f"none ({unreadable[0].found})", fix)
    if held_out and len(readable) < 3:
        fix = "give more images, or add --no-int8-search"
        expected = "images for calibration and others to judge by"
        raise DatasetError(root, expected, f"{len(readable)} in all", fix)
    if len(readable) < count + held_out:
        held_out = min(held_out, len(readable) // 3)
        count = min(count, len(readable) - held_out)
    chosen, others = (
        tuple(samples[index] for index in sorted(part))
        for part in (readable[:count], readable[count : count + held_out])
    )
    notes = []
    if unreadable:
        for error in unreadable[:_SHOWN]:
            print(f"left out {error.subject}: {error.found}", file=sys.stderr)
        notes.append(f"left out {len(unreadable)} images or folders in {root} that cannot be read")
    if len(chosen) < FEW:
        notes.append(f"only {len(chosen)} calibration images in {root}; give {FEW} or more")
    if split in _HELD_OUT:
        notes.append(f"calibrated on a {split} split ({root}); its accuracy is then not unseen")
    if labels and classes and {*labels} != {*classes}:
        notes.append(f"{root} has other classes than the model; give what it was trained on")
    record = {
        "dataset": root.resolve().name,
        "split": split,
        "count": len(chosen),
        "seed": seed,
        "images_sha256": image_list_hash(chosen, root),
    }
    if others:
        record["apart"] = {"count": len(others), "images_sha256": image_list_hash(others, root)}
    return Calibration(chosen, others, record, tuple(notes))


def read_images(samples: Sequence[Sample], spec: ModelSpec) -> UInt8Array:
    """Images, uint8 (N, S, S, 3), RGB, by the runtime's preprocessing.

    Raises:
        ImageError: One of them cannot be read.
    """
    none = np.zeros((0, spec.input_size, spec.input_size, 3), dtype=np.uint8)
    return np.concatenate([none, *(batch for batch, _ in iterate_batches(samples, spec, 100))])


def _readable(
    samples: Sequence[Sample], order: Sequence[int], wanted: int
) -> tuple[list[int], list[ImageError]]:
    """The first images that can be read, as indices in this order, and what cannot before them."""
    readable: list[int] = []
    unreadable: list[ImageError] = []
    for index in order:
        if len(readable) == wanted:
            break
        try:
            load_image(samples[index].path)
            readable.append(index)
        except ImageError as error:
            unreadable.append(error)
    return readable, unreadable


def _find_images(root: Path) -> tuple[list[Sample], str, tuple[str, ...], list[ImageError]]:
    """All images that may be chosen, in a fixed order.

    Returns:
        The images, their split, its classes if it says, and the folders that may not be read.
    """
    if os.path.isfile(root / DESCRIPTION):
        dataset = read_dataset(root)
        return list(dataset.split("train")), "train", tuple(dataset.labels), []
    folder = root / "train" if os.path.isdir(root / "train") else root
    content = read_folder(folder)
    others = [path.name for path in content.others]
    found = "a folder that may not be read"
    refused = [
        ImageError(path, "images", found, "check its permissions") for path in content.closed
    ]
    if not content.pictures and not (refused and os.path.isdir(root)):
        found = "no images in it" if os.path.isdir(root) else "no such folder"
        found = describe_files(others) if others else found
        fix = "give the training images, e.g. --calib RAF-DB"
        raise DatasetError(root, "a folder of images for calibration", found, fix)
    if others:
        print(printable(f"note: left out of {folder}: {describe_files(others)}"), file=sys.stderr)
    split = "train" if folder != root else _split_of(root)
    return [Sample(path, 0) for path in content.pictures], split, (), refused


def _split_of(root: Path) -> str:
    """The split that a folder, given by itself, is or lies in: ``RAF-DB/test``, ``RAF-DB/test/3``.

    A folder named test is a split where there is a train folder beside it.
    """
    for folder in (root.resolve(), *root.resolve().parents):
        if folder.name in SPLIT_FOLDERS and os.path.isdir(folder.parent / "train"):
            return SPLIT_FOLDERS[folder.name]
    inside = {split for name, split in SPLIT_FOLDERS.items() if os.path.isdir(root / name)}
    return next((split for split in _HELD_OUT if split in inside), "unknown")
