"""FER+: FER-2013's images with the votes of ten people (Barsoum et al. 2016)."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficientface_deploy.command import option
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.workbench.dataset import read_csv
from training.datasets.archive import Place, open_source, open_text, read
from training.datasets.common import Box, Face, Preparation, PrepareConfig, Published, describe

# Columns of FER+'s label.csv after name and box (Barsoum et al. 2016); its order is not ours.
FERPLUS_COLUMNS = (
    *("Neutral", "Happiness", "Surprise", "Sadness", "Anger", "Disgust", "Fear", "Contempt"),
    *("unknown", "NF"),
)
_CLASS_COLUMNS = 8  # the rest, unknown and NF (no face), are no expressions
FERPLUS_FOLDERS = {"train": "FER2013Train", "validation": "FER2013Valid", "test": "FER2013Test"}
# Images that the public FER+ code keeps under each protocol.
FERPLUS_COUNTS = {
    ("train", "majority"): 25_045,
    ("validation", "majority"): 3_191,
    ("train", "probability"): 27_947,
    ("validation", "probability"): 3_508,
}
LABEL_FILE = "label.csv"
PROTOCOLS = ("majority", "probability")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FerPlusConfig(PrepareConfig):
    """Options of ``training.prepare ferplus``."""

    source: Path = option(
        help="ferplus.zip or the folder that holds FER2013Train and so on", first=True
    )
    protocol: str = option(
        "majority",
        choices=PROTOCOLS,
        help="which images of train are kept, and what their votes become",
    )


def prepare_ferplus(config: FerPlusConfig) -> Preparation:
    """FER+ from its native layout.

    The images of ``train`` are chosen by ``config.protocol``; ``validation`` and ``test`` always by
    ``majority``, the protocol under which accuracy is reported.
    """
    description = describe(
        "ferplus",
        "FER-2013 images with the labels of ten people (Barsoum et al. 2016)",
        "labels: MIT (Microsoft, FER+); images: FER-2013, research use",
        name=f"FER+ ({config.protocol})",
        prepared_with={"protocol": config.protocol},
    )
    labels = description["labels"]
    protocols = {"train": config.protocol, "validation": "majority", "test": "majority"}

    @contextlib.contextmanager
    def faces() -> Iterator[list[Face]]:
        with open_source(
            config.source,
            [f"{FERPLUS_FOLDERS['train']}/{LABEL_FILE}"],
            expected="FER2013Train/label.csv and its images",
            fix="make FER+ with the public FERPlus repository's script, then give its data folder",
        ) as source:
            yield [
                face
                for split, folder in FERPLUS_FOLDERS.items()
                if (source / folder / LABEL_FILE).is_file()
                for face in _faces_of_split(source / folder, split, protocols[split], labels)
            ]

    published = {
        split: Published(FERPLUS_COUNTS[split, protocol], under=f"{protocol} protocol")
        for split, protocol in protocols.items()
        if (split, protocol) in FERPLUS_COUNTS
    }
    # A protocol may leave no image of a rare class.
    return Preparation(description, faces, published, votes=True, every_class=False)


def majority_label(votes: Sequence[int]) -> int | None:
    """FER+'s majority protocol.

    Args:
        votes: Ten counts in the order of :data:`FERPLUS_COLUMNS`.

    Returns:
        The column that more than half of the votes agree on, single votes left out; None when
        there is none, or when it is unknown or NF (no face).
    """
    kept = _without_single_votes(votes)
    top = int(kept.argmax())
    if kept[top] * 2 <= kept.sum() or top >= _CLASS_COLUMNS:
        return None
    return top


def probability_votes(votes: Sequence[int]) -> list[int] | None:
    """FER+'s probability protocol.

    Args:
        votes: Ten counts in the order of :data:`FERPLUS_COLUMNS`.

    Returns:
        Ten counts with only the largest columns kept, until they hold three quarters of the
        votes, three columns at most and none from unknown or NF on; None when these come first or
        what was kept holds no more than half of the votes.
    """
    left = _without_single_votes(votes)
    total = left.sum()
    taken = np.zeros_like(left)
    columns = 0
    while taken.sum() < 0.75 * total and columns < 3:
        largest = left.max()
        # Equal columns are taken together: there is no reason to prefer one.
        equal = [int(column) for column in np.flatnonzero(left == largest)]
        faces = [column for column in equal if column < _CLASS_COLUMNS]
        taken[faces] = largest
        left[equal] = 0
        columns += len(faces)
        if len(faces) < len(equal):  # unknown or NF came
            break
    if columns > 3 or taken.sum() * 2 <= total:
        return None
    kept: list[int] = taken.tolist()
    return kept


def _without_single_votes(votes: Sequence[int]) -> np.ndarray[Any, Any]:
    counts = np.asarray(votes)
    return np.where(counts > 1, counts, 0)


def _faces_of_split(
    folder: Place, split: str, protocol: str, labels: Sequence[str]
) -> Iterator[Face]:
    order = [FERPLUS_COLUMNS.index(label) for label in labels]  # by name, never by position
    for name, box, votes in _read_rows(folder):
        kept = _kept_votes(votes, protocol)
        if kept is not None:
            class_votes = [kept[column] for column in order]
            label = int(np.argmax(class_votes))
            content = functools.partial(read, folder / name)
            yield Face(name, split, label, content, class_votes, box)


def _kept_votes(votes: list[int], protocol: str) -> list[int] | None:
    if protocol == "probability":
        return probability_votes(votes)
    if majority_label(votes) is None:
        return None
    kept: list[int] = _without_single_votes(votes).tolist()
    return kept


def _read_rows(folder: Place) -> list[tuple[str, Box, list[int]]]:
    """Name, box and ten votes of every row of the folder's label.csv."""
    with open_text(folder / LABEL_FILE) as file:
        try:
            return [_read_row(row) for _, row in read_csv(file)]
        except (ValueError, csv.Error) as error:  # of a row, or of what is no text or no CSV
            wanted = 'rows of: name, "(left, top, right, bottom)", ten vote counts'
            where, fix = f"{folder.name}/{LABEL_FILE}", "take label.csv from FER+ unchanged"
            raise DatasetError(where, wanted, str(error), fix) from None


def _read_row(row: list[str]) -> tuple[str, Box, list[int]]:
    try:
        left, top, right, bottom = (int(edge) for edge in row[1].strip("() ").split(","))
        votes = [int(value) for value in row[2:]]
        if len(votes) != len(FERPLUS_COLUMNS) or min(votes) < 0:
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(",".join(row)[:80]) from None
    return Path(row[0]).name, (left, top, right, bottom), votes
