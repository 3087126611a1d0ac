"""CAER-S: film stills in folders by class name (Lee et al. 2019)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from efficientface_deploy.command import option
from training.datasets.archive import open_source
from training.datasets.common import (
    Face,
    Preparation,
    PrepareConfig,
    Published,
    describe,
    list_images,
)

# The folders that have other names than our labels.
CAERS_FOLDERS = {"Happiness": "Happy", "Sadness": "Sad"}
# As the published EfficientFace code employs it: 69,982 in all.
CAERS_COUNTS = {"train": 48_995, "test": 20_987}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaersConfig(PrepareConfig):
    """Options of ``training.prepare caers``."""

    source: Path = option(help="CAER-S's folder with train and test, or a zip of it", first=True)


def prepare_caers(config: CaersConfig) -> Preparation:
    """CAER-S from its folders; the whole pictures, as they are."""
    description = describe(
        "caers",
        "CAER-S (Lee, Kim, Kim, Park, Sohn 2019)",
        "non-commercial research, by agreement with the authors of CAER",
    )

    @contextlib.contextmanager
    def faces() -> Iterator[list[Face]]:
        with open_source(
            config.source,
            ["train"],
            expected="folders train and test of CAER-S",
            fix="give the folder that CAER-S.zip unpacks to, or CAER-S.zip itself",
        ) as source:
            class_folders = [CAERS_FOLDERS.get(label, label) for label in description["labels"]]
            yield list_images(source, {split: split for split in CAERS_COUNTS}, class_folders)

    published = {split: Published(total) for split, total in CAERS_COUNTS.items()}
    return Preparation(description, faces, published)
