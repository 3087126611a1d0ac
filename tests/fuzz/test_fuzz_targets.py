"""The bodies that ``fuzz.py`` drives, without atheris: seeds, and seeds with a little damage."""

from __future__ import annotations

import random

import fuzz_targets
import pytest
from fuzz_targets import MAX_LENGTH, TARGETS, seeds

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


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, taken out or doubled."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 2, 6))):
        at = rng.randrange(len(damaged) + 1)
        match rng.randrange(4):
            case 0:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                damaged[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff"))
            case 2:
                del damaged[at : at + rng.randrange(1, 12)]
            case 3:
                damaged[at:at] = damaged[at : at + rng.randrange(1, 40)]
    return bytes(damaged)
