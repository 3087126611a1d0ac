"""CAER-S: film stills in folders by class name (Lee et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from efficientface_deploy.command import option
from efficientface_deploy.spec import preset
from training.datasets.archive import open_source
from training.datasets.common import Face, Preparation, Published, list_images, read_images

# The folders' names for our labels.
CAERS_FOLDERS = {
    "Neutral": "Neutral",
    "Happiness": "Happy",
    "Sadness": "Sad",
    "Surprise": "Surprise",
    "Fear": "Fear",
    "Disgust": "Disgust",
    "Anger": "Anger",
}
# As the published EfficientFace code employs it: 69,982 in all.
CAERS_COUNTS = {"train": 48_995, "test": 20_987}


@dataclasses.dataclass(frozen=True)
class CaersConfig:
    """Options of ``training.prepare caers``."""

    source: Path = option(help="CAER-S's folder with train and test, or a zip of it")
    out: Path = option(help="folder to make")
    overwrite: bool = option(False, help="replace a data set that is there")


def prepare_caers(config: CaersConfig) -> Preparation:
    """CAER-S from its folders; the whole pictures, as they are."""
    spec = preset("caers")
    description = {
        "name": "CAER-S",
        "labels": list(spec.labels),
        "preset": "caers",
        "face_crop": spec.face_crop,
        "source": "CAER-S (Lee, Kim, Kim, Park, Sohn 2019)",
        "licence": "non-commercial research, by agreement with the authors of CAER",
        "prepared_with": {},
    }

    def faces() -> Iterator[Face]:
        with open_source(
            config.source,
            ["train"],
            expected="folders train and test of CAER-S",
            fix="give the folder that CAER-S.zip unpacks to, or CAER-S.zip itself",
        ) as source:
            class_folders = [CAERS_FOLDERS[label] for label in spec.labels]
            yield from read_images(list_images(source, CAERS_COUNTS, class_folders), "CAER-S")

    published = {split: Published(total) for split, total in CAERS_COUNTS.items()}
    return Preparation(description, faces, published)
