"""Hostile inputs."""

from __future__ import annotations

import random
from pathlib import Path

from fuzz_targets import TARGETS, damage, seeds
from row import Row


def run(scale: float, seed: int, folder: Path) -> list[Row]:
    """Pictures with a little damage."""
    rng = random.Random(seed)
    corpus, count = seeds("image"), round(1000 * scale)
    for _ in range(count):
        TARGETS["image"](damage(rng.choice(corpus), rng))
    return [Row("inputs", "pictures", tried=count, right=count)]
