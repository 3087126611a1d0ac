"""Hostile inputs."""

from __future__ import annotations

import random
from pathlib import Path

from fuzz_targets import TARGETS, damage, seeds
from row import Row


def run(scale: float, seed: int, folder: Path) -> list[Row]:
    """Valid files with a little damage."""
    rng, rows = random.Random(seed), []
    for name, target in TARGETS.items():
        corpus, count = seeds(name), round(100 * scale)
        for _ in range(count):
            target(damage(rng.choice(corpus), rng))
        rows.append(Row("inputs", name, tried=count, right=count))
    return rows
