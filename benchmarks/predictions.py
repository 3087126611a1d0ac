"""The predictions of an accuracy run, kept beside its JSON so that another run can be compared.

``predictions.npz``: the hash of the image list, the images' paths within the data set, their
labels, and for each model its class and, as float16, its probabilities for every image.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report.result import Result
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import atomic_path
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.metrics import Interval, paired_accuracy_difference

NAME = "predictions.npz"

# Before the names of models, apart from the file's own arrays.
_CLASSES = "classes: "
_PROBABILITIES = "probabilities: "


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What models said of the same images.

    Attributes:
        images_sha256: Hash of the image list, as the result has it.
        images: N paths within the data set.
        labels: Integers (N,).
        classes: Model and backend -> most probable class, uint8 (N,).
        probabilities: Model and backend -> float16 (N, C).
    """

    images_sha256: str
    images: Sequence[str]
    labels: npt.NDArray[np.int64]
    classes: Mapping[str, npt.NDArray[np.uint8]]
    probabilities: Mapping[str, npt.NDArray[np.float16]]


@dataclasses.dataclass(frozen=True)
class Paired:
    """Accuracy of a run minus an older one's on the same images.

    Attributes:
        value: -1 to 1.
        interval: 95 %.
        changed: Images that get another label now.
    """

    value: float
    interval: Interval
    changed: int


def keep(
    images_sha256: str,
    images: Sequence[str],
    labels: npt.NDArray[np.integer[Any]],
    probabilities: Mapping[str, Float32Array],
) -> Predictions:
    """What is kept of a run.

    Args:
        images_sha256: Hash of the image list.
        images: N paths within the data set.
        labels: Integers (N,).
        probabilities: Model and backend -> float32 (N, C).
    """
    return Predictions(
        images_sha256,
        images,
        labels.astype(np.int64),
        # Rounded probabilities can be equal where the real ones are not: the class is kept too.
        {name: values.argmax(axis=1).astype(np.uint8) for name, values in probabilities.items()},
        {name: values.astype(np.float16) for name, values in probabilities.items()},
    )


def write_predictions(path: Path, kept: Predictions) -> None:
    """Write a run's predictions as ``predictions.npz``, atomically."""
    arrays: dict[str, Any] = {_CLASSES + name: own for name, own in kept.classes.items()}
    arrays |= {_PROBABILITIES + name: own for name, own in kept.probabilities.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            images_sha256=np.array(kept.images_sha256),
            images=np.array(kept.images),
            labels=kept.labels,
            **arrays,
        )


def read_predictions(path: Path) -> Predictions:
    """Read what :func:`write_predictions` wrote.

    Raises:
        ArtifactError: The file is missing, truncated or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = Predictions(
                str(stored["images_sha256"]),
                stored["images"].tolist(),
                stored["labels"],
                _named(stored, _CLASSES),
                _named(stored, _PROBABILITIES),
            )
            arrays: list[Any] = [
                found.images,
                *found.classes.values(),
                *found.probabilities.values(),
            ]
            if found.labels.ndim != 1 or {len(own) for own in arrays} != {len(found.labels)}:
                raise ValueError("arrays of different length")
            return found
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            path,
            "predictions of benchmarks/accuracy.py",
            f"something else or a truncated file ({error})",
            "copy it again, or measure again",
        ) from None


def read_beside(result_path: Path, result: Result) -> Predictions | None:
    """The predictions that lie beside a result; None where none do, or those of other images.

    Raises:
        ArtifactError: They cannot be read.
    """
    path = result_path.parent / NAME
    if not path.is_file():
        return None
    found = read_predictions(path)
    return found if found.images_sha256 == result["data"].get("images_sha256") else None


def paired_difference(old: Predictions, new: Predictions, key: str) -> Paired | None:
    """How much more accurate a model is than in an older run; None if one of them lacks it.

    Args:
        old: The older run's.
        new: The newer run's.
        key: Model and backend.
    """
    if (
        old.images_sha256 != new.images_sha256
        or not {key} <= old.classes.keys() & new.classes.keys()
    ):
        return None
    before, after = old.classes[key], new.classes[key]  # (N,) each
    found = paired_accuracy_difference(new.labels, before, after)
    return Paired(found.value, found.interval, int((before != after).sum()))


def _named(stored: Any, prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {
        name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)
    }
