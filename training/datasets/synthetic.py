"""The embedded parametric faces, so that everything can be tried without a download."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from efficientface_deploy.command import option
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.progress import track
from training.datasets.common import Face, Preparation
from training.datasets.face_renderer import LABELS, render_face


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Options of ``training.prepare synthetic``."""

    out: Path = option(help="folder to make")
    train: int = option(1750, minimum=7, help="number of training faces")
    test: int = option(350, minimum=7, help="number of test faces")
    size: int = option(100, minimum=32, help="side of the pictures, pixels")
    seed: int = option(0, minimum=0, help="seed of every face")
    overwrite: bool = option(False, help="replace a data set that is there")


def prepare_synthetic(config: SyntheticConfig) -> Preparation:
    """The embedded synthetic faces, rendered in RAF-DB's layout."""
    spec = preset("rafdb")
    description = {
        "name": "synthetic faces",
        "labels": list(LABELS),
        "preset": "rafdb",
        "face_crop": spec.face_crop,
        "source": "training/datasets/face_renderer.py",
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

    return Preparation(description, faces, votes=True)
