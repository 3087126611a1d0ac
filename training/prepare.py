"""Turn published data sets, or your own, into the one layout that every command reads."""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.prepare", "train,cpu")

import contextlib
import csv
import errno
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from efficientface_deploy.command import Usage, choose_command, interrupts_wait, parse_config
from efficientface_deploy.errors import (
    ConfigError,
    DatasetError,
    ImageError,
    printable,
    system_words,
)
from efficientface_deploy.files import make_folder, read_json
from efficientface_deploy.vision.preprocess import load_image
from efficientface_deploy.workbench.dataset import (
    DESCRIPTION,
    MANIFEST,
    SPLITS,
    VOTES_PREFIX,
    read_dataset,
)
from efficientface_deploy.workbench.progress import track
from efficientface_deploy.workbench.workspace import make_and_lock
from training.datasets.affectnet import AffectNetConfig, prepare_affectnet
from training.datasets.caers import CaersConfig, prepare_caers
from training.datasets.common import Face, Preparation, Published, check_every_class
from training.datasets.ferplus import FerPlusConfig, prepare_ferplus
from training.datasets.folders import FoldersConfig, prepare_folders
from training.datasets.rafdb import RafDbConfig, prepare_rafdb
from training.datasets.synthetic import SyntheticConfig, prepare_synthetic

Counts = Counter[tuple[str, int]]
"""Number of images for each (split, label)."""

_SHOWN = 20  # damaged images that are named one by one
_CHECK = "check --source"
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO)  # another user's, or where a disk fails
_JPEG_START = b"\xff\xd8\xff"

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Preparation], str]] = {
    "rafdb": (RafDbConfig, prepare_rafdb, "RAF-DB (basic), from its official files"),
    "ferplus": (FerPlusConfig, prepare_ferplus, "FER+, from its native layout"),
    "affectnet": (AffectNetConfig, prepare_affectnet, "AffectNet, either release"),
    "caers": (CaersConfig, prepare_caers, "CAER-S, from its class folders"),
    "folders": (FoldersConfig, prepare_folders, "your own images, a folder for each class"),
    "synthetic": (SyntheticConfig, prepare_synthetic, "the embedded synthetic faces"),
}


def write_dataset(out: Path, preparation: Preparation, *, overwrite: bool) -> Counts:
    """Write a prepared data set: whole, or not at all.

    Args:
        out: Its folder; one that was prepared in the same way is left as it is.
        preparation: What to write.
        overwrite: Replace a data set that is there.

    Returns:
        Number of images for each (split, label).

    Raises:
        ConfigError: Another process prepares it.
        DatasetError: ``out`` holds something else, no image came, or none of some class.
    """
    description = preparation.description
    if out.exists():
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = read_json(out / DESCRIPTION)
        if found == description and not overwrite:
            print(
                f"{out} is there already and was prepared in the same way; nothing to do "
                "(add --overwrite to prepare it again)"
            )
            splits = read_dataset(out).samples.items()
            return Counter((split, sample.label) for split, samples in splits for sample in samples)
        replaceable = found is not None and overwrite
        if not replaceable and (not out.is_dir() or any(out.iterdir())):
            content, also = "other files", ""
            if found is not None:
                content, also = "another data set", " or add --overwrite"
            wanted = "a new folder, or a data set prepared in the same way"
            raise DatasetError(out, wanted, content, "choose another --out" + also)
    make_folder(out.parent)
    work = out.with_name(f".{out.name}.preparing")  # its name finds it again after a kill
    with make_and_lock(work, "preparation"):
        new, before = work / "new", work / "before"
        try:
            if before.exists() and not out.exists():  # killed between the two renames below
                before.rename(out)
            for left in (new, before):
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir()
            counts = _write_files(new, preparation)
            if not counts:
                raise DatasetError(out, "images", "none that can be used", "check --source")
            if preparation.every_class:
                check_every_class(counts, description["labels"], out)
            with interrupts_wait():
                if out.exists():
                    out.rename(before)
                try:
                    new.rename(out)
                except OSError:
                    if before.exists():
                        before.rename(out)
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    _print_counts(out, description["labels"], counts)
    return counts


def _write_files(root: Path, preparation: Preparation) -> Counts:
    labels = preparation.description["labels"]
    counts: Counts = Counter()
    twice = Repeated()
    excluded = 0
    with (
        preparation.faces() as faces,
        (root / MANIFEST).open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        vote_columns = [VOTES_PREFIX + label for label in labels] if preparation.votes else []
        writer.writerow(["path", "split", "label", *vote_columns])
        for face in track(faces, preparation.description["name"], len(faces)):
            try:
                relative, digest = _write_image(root, face)
            except ImageError as error:
                excluded += 1
                if excluded <= _SHOWN:
                    where = f"{face.split}, {labels[face.label]}"
                    fix = "" if error.fix == _CHECK else f"; {error.fix}"
                    line = f"left out {error.subject} ({where}): {error.found}{fix}"
                    print(printable(line), file=sys.stderr)
                continue
            votes = [f"{vote:g}" for vote in face.votes] if face.votes is not None else []
            writer.writerow([relative.as_posix(), face.split, face.label, *votes])
            counts[face.split, face.label] += 1
            twice.add(digest, face, relative.as_posix())
    twice.tell()
    if excluded:
        print(f"left out {excluded:,} images in all", file=sys.stderr)
    text = json.dumps(preparation.description, indent=2)
    (root / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return counts


class Repeated:
    """Names and counts pictures that come again, byte for byte, in another split or class.

    Such a picture makes a score better than it is, or contradicts itself; the publication's counts
    have it, so it stays.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[str, int, str]] = {}
        self._found: Counter[str] = Counter()

    def add(self, digest: bytes, face: Face, path: str) -> None:
        """Note a picture, and name it where the first of its content is elsewhere."""
        split, label, first = self._first.setdefault(digest, (face.split, face.label, path))
        kinds = {"split": split != face.split, "class": label != face.label}
        self._found.update(kind for kind, differs in kinds.items() if differs)
        if any(differs and self._found[kind] <= _SHOWN for kind, differs in kinds.items()):
            print(f"the same picture: {first} and {path}", file=sys.stderr)

    def tell(self) -> None:
        """Say how many there are in all."""
        for kind, count in sorted(self._found.items()):
            print(f"pictures that are in another {kind} too: {count:,}", file=sys.stderr)


def _write_image(root: Path, face: Face) -> tuple[Path, bytes]:
    """Write one image, and return its path relative to the data set, and its content's digest.

    Raises:
        ImageError: It is missing or damaged, its box shows nothing, or its name cannot be used.
    """
    if not face.name.isprintable():  # the manifest is a text file
        raise _unusable(ascii(face.name), "a printable name", "a name that cannot be printed")
    name, encoded = _cut_face(face)
    relative = Path(face.split, str(face.label), name)
    if (root / relative).exists():
        raise _unusable(name, "a name of its own", f"a second image of this name in {face.split}")
    (root / relative).parent.mkdir(parents=True, exist_ok=True)
    (root / relative).write_bytes(encoded)
    return relative, hashlib.blake2b(encoded, digest_size=16).digest()


def _cut_face(face: Face) -> tuple[str, bytes]:
    """Name and content of the face's own image file; unless it is cut, byte for byte the source's.

    Raises:
        ImageError: The image is missing or damaged, or the box is not inside it.
    """
    try:
        encoded = face.read()
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise _unusable(face.name, "an image", system_words(error)) from None
    if not encoded:
        raise _unusable(face.name, "an image", "a missing or empty file")
    try:
        image = load_image(encoded)
    except ImageError as error:
        fix = _CHECK if error.found.startswith("a damaged one") else error.fix
        raise ImageError(face.name, error.expected, error.found, fix) from None
    if face.box is None:
        return face.name, encoded
    left, top, right, bottom = face.box
    if face.clip:
        left, top = max(left, 0), max(top, 0)
        right, bottom = min(right, image.width), min(bottom, image.height)
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        size = f"{image.width}x{image.height}"
        raise _unusable(face.name, f"a box inside {size}", f"box {face.box} in {size}")
    if (left, top, right, bottom) == (0, 0, *image.size):
        return face.name, encoded
    suffix, cut = _encode(image.crop((left, top, right, bottom)), like=encoded)
    return Path(face.name).stem + suffix, cut


def _encode(image: Image.Image, like: bytes) -> tuple[str, bytes]:
    """Suffix and content of an image file: JPEG where the source was, else lossless."""
    buffer = io.BytesIO()
    if like.startswith(_JPEG_START):
        # As PNG, the faces of a set like AffectNet would need several times its own space.
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        return ".jpg", buffer.getvalue()
    image.save(buffer, "PNG")
    return ".png", buffer.getvalue()


def _unusable(name: str, expected: str, found: str) -> ImageError:
    return ImageError(name, expected, found, _CHECK)


def _print_counts(out: Path, labels: Sequence[str], counts: Counts) -> None:
    print(f"prepared {out}: {sum(counts.values()):,} images")
    for split in SPLITS:
        per_class = {label: counts[split, index] for index, label in enumerate(labels)}
        if total := sum(per_class.values()):
            named = ", ".join(f"{label} {count:,}" for label, count in per_class.items())
            print(f"  {split}: {total:,} ({named})")


def _compare_with_published(
    counts: Counts, labels: Sequence[str], published: Mapping[str, Published]
) -> None:
    """Say where the counts differ from the publication's: a remark, for there can be reasons."""
    for split, expected in published.items():
        found = {label: counts[split, index] for index, label in enumerate(labels)}
        total = sum(found.values())
        if not total:
            continue
        what = f"{split}, {expected.under}" if expected.under else split
        different = "; ".join(
            f"{label} {found[label]:,}, published: {number:,}"
            for label, number in expected.classes.items()
            if found[label] != number
        )
        same = total == expected.total and not different
        verdict = "as published" if same else f"published: {expected.total:,}"
        print(f"  {what}: {total:,} images, {verdict}" + (f" ({different})" if different else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.prepare``."""
    prog = "python -m training.prepare"
    usage = Usage(prog, __doc__ or "", "ferplus --source ferplus.zip --out data/ferplus")
    described = {name: description for name, (_, _, description) in COMMANDS.items()}
    name, words = choose_command(argv, described, usage)
    config_class, prepare, description = COMMANDS[name]
    source = f"--source {name}.zip " if "source" in config_class.__annotations__ else ""
    config = parse_config(
        config_class,
        words,
        prog=f"{prog} {name}",
        description=description,
        example=f"{source}--out data/{name}",
    )
    if not config.out.name:
        raise ConfigError("--out", "a folder", str(config.out), "name one")
    preparation = prepare(config)
    counts = write_dataset(config.out, preparation, overwrite=config.overwrite)
    _compare_with_published(counts, preparation.description["labels"], preparation.published)
    return 0
