"""Turn published data sets into the one layout that every command reads.

``python -m training.prepare ferplus --source ferplus.zip --out data/ferplus``
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficientface_deploy.command import (
    OneLineParser,
    add_options,
    config_from,
    option,
    run_command,
)
from efficientface_deploy.dataset import DESCRIPTION, MANIFEST, SPLITS, VOTES_PREFIX, read_dataset
from efficientface_deploy.errors import ConfigError, DatasetError, ImageError
from efficientface_deploy.preprocess import load_image
from efficientface_deploy.spec import preset
from training.progress import track
from training.synthetic import LABELS as SYNTHETIC_LABELS
from training.synthetic import render_face

# Columns of FER+'s label.csv after name and box (Barsoum et al. 2016); its order is not ours.
FERPLUS_COLUMNS = (
    "Neutral",
    "Happiness",
    "Surprise",
    "Sadness",
    "Anger",
    "Disgust",
    "Fear",
    "Contempt",
    "unknown",
    "NF",
)
_CLASS_COLUMNS = 8  # the rest, unknown and NF (no face), are no expressions
FERPLUS_FOLDERS = {
    "train": "FER2013Train",
    "validation": "FER2013Valid",
    "test": "FER2013Test",
}
# Images that the public FER+ code keeps under each protocol.
FERPLUS_COUNTS = {
    ("train", "majority"): 25_045,
    ("validation", "majority"): 3_191,
    ("train", "probability"): 27_947,
    ("validation", "probability"): 3_508,
}
LABEL_FILE = "label.csv"
_SHOWN = 20  # damaged images that are named one by one
PROTOCOLS = ("majority", "probability")

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class FerPlusConfig:
    """Options of ``training.prepare ferplus``."""

    source: Path = option(help="ferplus.zip or the folder that holds FER2013Train and so on")
    out: Path = option(help="folder to make")
    protocol: str = option(
        "majority",
        choices=PROTOCOLS,
        help="which images of train are kept, and what their votes become",
    )
    overwrite: bool = option(False, help="replace a data set that was prepared differently")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Options of ``training.prepare synthetic``."""

    out: Path = option(help="folder to make")
    train: int = option(1750, minimum=7, help="number of training faces")
    test: int = option(350, minimum=7, help="number of test faces")
    size: int = option(100, minimum=32, help="side of the pictures, pixels")
    seed: int = option(0, minimum=0, help="seed of every face")
    overwrite: bool = option(False, help="replace a data set that was prepared differently")


@dataclasses.dataclass(frozen=True)
class Face:
    """One image on its way into a prepared data set.

    Attributes:
        name: File name.
        split: train, validation or test.
        label: Index into the labels.
        votes: Mass of each class, or None.
        encoded: The image file's bytes; none when the source has no such file.
        box: Part of the image that shows the face, (left, top, right, bottom), or None for all.
    """

    name: str
    split: str
    label: int
    votes: Sequence[float] | None
    encoded: bytes
    box: Box | None = None


def prepare_ferplus(config: FerPlusConfig) -> None:
    """Convert FER+ from its native layout.

    The images of ``train`` are chosen by ``config.protocol``; ``validation`` and ``test`` always by
    ``majority``, the protocol under which accuracy is reported.
    """
    spec = preset("ferplus")
    description = {
        "name": f"FER+ ({config.protocol})",
        "labels": list(spec.labels),
        "preset": "ferplus",
        "face_crop": spec.face_crop,
        "source": "FER-2013 images with the labels of ten people (Barsoum et al. 2016)",
        "licence": "labels: MIT (Microsoft, FER+); images: FER-2013, research use",
        "prepared_with": {"protocol": config.protocol},
    }

    protocols = {"train": config.protocol, "validation": "majority", "test": "majority"}

    def faces() -> Iterator[Face]:
        with open_source(config.source) as source:
            for split, folder in FERPLUS_FOLDERS.items():
                if source.has(f"{folder}/{LABEL_FILE}"):
                    yield from _ferplus_split(source, split, folder, protocols[split])

    counts = write_dataset(config.out, description, faces, overwrite=config.overwrite)
    _compare_with_published(counts, protocols)


def prepare_synthetic(config: SyntheticConfig) -> None:
    """Render the embedded synthetic faces in RAF-DB's layout."""
    spec = preset("rafdb")
    description = {
        "name": "synthetic faces",
        "labels": list(SYNTHETIC_LABELS),
        "preset": "rafdb",
        "face_crop": spec.face_crop,
        "source": "training/synthetic.py",
        "licence": "MIT",
        "prepared_with": {key: getattr(config, key) for key in ("train", "test", "size", "seed")},
    }

    def faces() -> Iterator[Face]:
        total = config.train + config.test
        for index in track(range(total), "rendering", total):
            face = render_face(config.seed, index, config.size)
            split = "train" if index < config.train else "test"
            buffer = io.BytesIO()
            Image.fromarray(face.image).save(buffer, "JPEG", quality=95)
            votes = face.distribution.tolist()
            yield Face(f"face_{index:06d}.jpg", split, face.label, votes, buffer.getvalue())

    write_dataset(config.out, description, faces, overwrite=config.overwrite)


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


def write_dataset(
    out: Path,
    description: dict[str, Any],
    faces: Callable[[], Iterator[Face]],
    *,
    overwrite: bool,
) -> Counter[tuple[str, int]]:
    """Write a prepared data set: whole, or not at all.

    Args:
        out: Its folder; one that was prepared in the same way is left as it is.
        description: Content of ``dataset.json``.
        faces: Called to give the images.
        overwrite: Replace a data set that was prepared differently.

    Returns:
        Number of images for each (split, label).

    Raises:
        DatasetError: ``out`` holds something else, or no image came.
    """
    if out.exists():
        found = _description_of(out)
        if found == description:
            print(f"{out} is there already and was prepared in the same way; nothing to do")
            return _count(out)
        replaceable = found is not None and overwrite
        if not replaceable and (not out.is_dir() or any(out.iterdir())):
            raise DatasetError(
                out,
                expected="a new folder, or a data set prepared in the same way",
                found="another data set" if found is not None else "other files",
                fix="choose another --out" + (" or add --overwrite" if found is not None else ""),
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        counts = _write_files(work, description, faces())
        if not counts:
            raise DatasetError(
                out, expected="images", found="none that can be used", fix="check --source"
            )
        work.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _print_counts(out, description["labels"], counts)
    return counts


def _write_files(
    root: Path, description: dict[str, Any], faces: Iterator[Face]
) -> Counter[tuple[str, int]]:
    labels = description["labels"]
    counts: Counter[tuple[str, int]] = Counter()
    left_out = 0
    with (root / MANIFEST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "label", *(VOTES_PREFIX + label for label in labels)])
        for face in faces:
            try:
                encoded = _cut_face(face)
            except ImageError as error:
                left_out += 1
                if left_out <= _SHOWN:
                    print(f"left out {face.name}: {error.found}", file=sys.stderr)
                continue
            relative = Path(face.split, str(face.label), face.name)
            (root / relative).parent.mkdir(parents=True, exist_ok=True)
            (root / relative).write_bytes(encoded)
            votes = [f"{vote:g}" for vote in face.votes] if face.votes is not None else []
            writer.writerow([relative.as_posix(), face.split, face.label, *votes])
            counts[face.split, face.label] += 1
    if left_out:
        print(f"left out {left_out:,} images in all", file=sys.stderr)
    (root / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return counts


def _cut_face(face: Face) -> bytes:
    """The image file of the face alone; one that shows nothing else is kept byte for byte.

    Raises:
        ImageError: The image is missing or damaged, or the box is not inside it.
    """
    fix = "check --source"
    if not face.encoded:
        raise ImageError(face.name, expected="an image", found="a missing or empty file", fix=fix)
    image = load_image(face.encoded)
    if face.box is None or face.box == (0, 0, *image.size):
        return face.encoded
    left, top, right, bottom = face.box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        size = f"{image.width}x{image.height}"
        raise ImageError(
            face.name, expected=f"a box inside {size}", found=f"box {face.box} in {size}", fix=fix
        )
    buffer = io.BytesIO()
    image.crop(face.box).save(buffer, "PNG")
    return buffer.getvalue()


def _description_of(root: Path) -> dict[str, Any] | None:
    try:
        description: dict[str, Any] = json.loads((root / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return description


def _count(root: Path) -> Counter[tuple[str, int]]:
    splits = read_dataset(root).samples.items()
    return Counter((split, sample.label) for split, samples in splits for sample in samples)


def _print_counts(out: Path, labels: Sequence[str], counts: Counter[tuple[str, int]]) -> None:
    print(f"prepared {out}: {sum(counts.values()):,} images")
    for split in SPLITS:
        per_class = [counts[split, index] for index in range(len(labels))]
        if any(per_class):
            named = ", ".join(f"{label} {n:,}" for label, n in zip(labels, per_class, strict=True))
            print(f"  {split}: {sum(per_class):,} ({named})")


def _compare_with_published(counts: Counter[tuple[str, int]], protocols: dict[str, str]) -> None:
    for split, protocol in protocols.items():
        expected = FERPLUS_COUNTS.get((split, protocol))
        found = sum(n for (name, _), n in counts.items() if name == split)
        if found and expected:
            verdict = "as published" if found == expected else f"published: {expected:,}"
            print(f"  {split}, {protocol} protocol: {found:,} images, {verdict}")


def _ferplus_split(source: Source, split: str, folder: str, protocol: str) -> Iterator[Face]:
    labels = preset("ferplus").labels
    order = [FERPLUS_COLUMNS.index(label) for label in labels]  # by name, never by position
    rows = _read_rows(source.read(f"{folder}/{LABEL_FILE}"), f"{folder}/{LABEL_FILE}")
    for name, box, votes in track(rows, split, len(rows)):
        kept = _kept_votes(votes, protocol)
        if kept is None:
            continue
        class_votes = [kept[column] for column in order]
        label = int(np.argmax(class_votes))
        yield Face(name, split, label, class_votes, source.read(f"{folder}/{name}"), box)


def _kept_votes(votes: list[int], protocol: str) -> list[int] | None:
    if protocol == "probability":
        return probability_votes(votes)
    if majority_label(votes) is None:
        return None
    kept: list[int] = _without_single_votes(votes).tolist()
    return kept


def _read_rows(content: bytes, where: str) -> list[tuple[str, Box, list[int]]]:
    """Name, box and ten votes of every row of a label.csv."""
    try:
        return [_parse_row(row, where) for row in csv.reader(io.StringIO(content.decode()))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _bad_rows(where, f"something else ({error})") from None


def _parse_row(row: list[str], where: str) -> tuple[str, Box, list[int]]:
    try:
        left, top, right, bottom = (int(number) for number in row[1].strip("() ").split(","))
        votes = [int(value) for value in row[2:]]
        if len(votes) != len(FERPLUS_COLUMNS) or min(votes) < 0:
            raise ValueError
    except (ValueError, IndexError):
        raise _bad_rows(where, ",".join(row)[:80] or "an empty row") from None
    return Path(row[0]).name, (left, top, right, bottom), votes


def _bad_rows(where: str, found: str) -> DatasetError:
    return DatasetError(
        where,
        expected='rows of: name, "(left, top, right, bottom)", ten vote counts',
        found=found,
        fix="take label.csv from FER+ unchanged",
    )


class Source:
    """A data set's original files, in a folder or in a zip; paths are relative to its top."""

    def __init__(self, path: Path) -> None:
        self._folder = path if path.is_dir() else None
        self._zip = None if path.is_dir() else zipfile.ZipFile(path)
        # Archives may have a folder around everything; find files by the end of their path.
        self._names = {}
        if self._zip is not None:
            self._names = {
                "/".join(Path(name).parts[-2:]): name
                for name in self._zip.namelist()
                if not name.endswith("/")
            }

    def has(self, name: str) -> bool:
        """Whether a file of this name is there."""
        if self._folder is not None:
            return (self._folder / name).is_file()
        return name in self._names

    def read(self, name: str) -> bytes:
        """Content of a file; empty when it is missing or damaged in the archive."""
        if not self.has(name):
            return b""
        if self._folder is not None:
            return (self._folder / name).read_bytes()
        assert self._zip is not None
        try:
            return self._zip.read(self._names[name])
        except (zipfile.BadZipFile, zlib.error, EOFError):
            return b""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()


def open_source(path: Path) -> Source:
    """Open the folder or zip that ``--source`` names.

    Raises:
        DatasetError: It is neither, or holds no FER+.
    """
    try:
        source = Source(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(
            path,
            expected="a folder or a zip archive",
            found=(getattr(error, "strerror", None) or "something else").lower(),
            fix="check --source",
        ) from None
    if not source.has(f"FER2013Train/{LABEL_FILE}"):
        raise DatasetError(
            path,
            expected="FER2013Train/label.csv and its images",
            found="none",
            fix="make FER+ with the public FERPlus repository's script, then give its data folder",
        )
    return source


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None], str]] = {
    "ferplus": (FerPlusConfig, prepare_ferplus, "FER+, from its native layout"),
    "synthetic": (SyntheticConfig, prepare_synthetic, "the embedded synthetic faces"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.prepare``."""
    parser = OneLineParser("python -m training.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="dataset", required=True)
    for name, (config_class, _, description) in COMMANDS.items():
        add_options(commands.add_parser(name, help=description), config_class)
    namespace = parser.parse_args(argv)
    config_class, prepare, _ = COMMANDS[namespace.dataset]
    config = config_from(config_class, namespace)
    if not config.out.name:
        raise ConfigError("--out", expected="a folder", found=str(config.out), fix="name one")
    prepare(config)
    return 0


if __name__ == "__main__":
    run_command(main)
