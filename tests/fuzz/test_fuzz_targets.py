"""The bodies that ``fuzz.py`` drives, without atheris: seeds, and seeds with a little damage."""

from __future__ import annotations

import random

import fuzz_targets
import pytest
from fuzz_targets import MAX_LENGTH, TARGETS, damage, seeds

ROUNDS = {"image": 400, "onnx": 60, "safetensors": 200, "sidecar": 200}

REFUSED = {"image": 1, "safetensors": 1}  # floating-point pixels; no spec


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_taken(target, monkeypatch):
    """But for one or two, so that the search begins behind the first check."""
    refused = []
    error = fuzz_targets.EfficientFaceError.__init__
    monkeypatch.setattr(
        fuzz_targets.EfficientFaceError,
        "__init__",
        lambda self, *a, **k: (refused.append(self), error(self, *a, **k))[1],
    )
    corpus = seeds(target)
    for data in corpus:
        TARGETS[target](data)
    assert len(refused) == REFUSED.get(target, 0) < len(corpus)
    assert all(len(data) <= MAX_LENGTH for data in corpus)


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_seeds_are_used_or_refused_properly(target):
    rng = random.Random(target)
    corpus = seeds(target)
    for _ in range(ROUNDS[target]):
        TARGETS[target](damage(rng.choice(corpus), rng))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 64, b"{}", b"[" * 4000])
def test_bytes_of_nothing(target, data):
    TARGETS[target](data)


@pytest.mark.parametrize("error", [ValueError, MemoryError, RecursionError])
def test_any_other_error_is_a_finding(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(fuzz_targets, "to_model_input", fail)
    with pytest.raises(error):
        fuzz_targets.image(b"")
