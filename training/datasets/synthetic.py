"""The embedded parametric faces, so that everything can be tried without a download."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator

from PIL import Image

from efficientface_deploy.command import option
from training.datasets.common import Face, Preparation, PrepareConfig, describe
from training.datasets.face_renderer import face_target, render_face


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig(PrepareConfig):
    """Options of ``training.prepare synthetic``."""

    train: int = option(1750, minimum=7, help="number of training faces", first=True)
    test: int = option(350, minimum=7, help="number of test faces", first=True)
    size: int = option(100, minimum=32, help="side of the pictures, pixels")
    seed: int = option(0, minimum=0, help="seed of every face")
    variation: float = option(
        1.0,
        minimum=0,
        maximum=1,
        help="of light, pose and expression, 0 to 1: with less a network learns sooner",
    )


def prepare_synthetic(config: SyntheticConfig) -> Preparation:
    """The embedded synthetic faces, rendered in RAF-DB's layout."""
    options = {key: getattr(config, key) for key in ("train", "test", "size", "seed")}
    if config.variation < 1:  # a data set of all variation stays the one that it always was
        options["variation"] = config.variation
    source = "training/datasets/face_renderer.py"
    description = describe("rafdb", source, "MIT", name="synthetic faces", prepared_with=options)

    def encoded(index: int) -> bytes:
        buffer = io.BytesIO()
        image = render_face(config.seed, index, config.size, config.variation).image
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    @contextlib.contextmanager
    def faces() -> Iterator[list[Face]]:
        listed = []
        for index in range(config.train + config.test):
            split = "train" if index < config.train else "test"
            label, votes = face_target(config.seed, index, config.variation)
            read = functools.partial(encoded, index)
            listed.append(Face(f"face_{index:06d}.jpg", split, label, read, votes.tolist()))
        yield listed

    return Preparation(description, faces, votes=True)
