"""Profiles made here, byte for byte, and the same arithmetic in numpy."""

from __future__ import annotations

import io
import logging
import struct
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from efficientface_deploy.vision import colour
from efficientface_deploy.vision.colour import to_srgb
from efficientface_deploy.vision.preprocess import load_image

# Columns: red, green and blue of each space in XYZ of D50, as their published profiles have them.
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
DISPLAY_P3 = np.array(
    [[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]
)
GAMMA = 2.2
WHITE = (0.9642, 1.0, 0.8249)


def profile_of(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of a display, version 2."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += b"".join(map(fixed, WHITE))
    return header.ljust(128, b"\0") + table + body


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def rgb_profile(primaries: np.ndarray, gamma: float = GAMMA) -> bytes:
    tags = {name: xyz(primaries[:, at]) for at, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)) | {b"wtpt": xyz(WHITE)}
    return profile_of(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    return profile_of(b"GRAY", {b"kTRC": curve(gamma), b"wtpt": xyz(WHITE)})


def encoded_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def encode(image: Image.Image, kind: str, profile: bytes) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, icc_profile=profile)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_display_p3_becomes_srgb(pixels, kind):
    data = encode(Image.fromarray(pixels), kind, rgb_profile(DISPLAY_P3))
    linear = (pixels / 255.0) ** GAMMA
    expected = encoded_srgb(linear @ DISPLAY_P3.T @ np.linalg.inv(SRGB).T)
    found = np.asarray(load_image(data)).astype(float)
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - pixels).max() > 20  # it matters


def test_array_and_file_differ_by_the_profile_alone(pixels):
    data = encode(Image.fromarray(pixels), "PNG", rgb_profile(DISPLAY_P3))
    opened = Image.open(io.BytesIO(data))
    once = load_image(opened)
    np.testing.assert_array_equal(once, load_image(data))
    np.testing.assert_array_equal(load_image(once), once)  # not applied again
    assert "icc_profile" not in once.info
    np.testing.assert_array_equal(opened, pixels)  # nor to the caller's own


def test_grey_of_another_curve(pixels):
    grey = pixels[..., 0]
    found = np.asarray(load_image(encode(Image.fromarray(grey), "PNG", grey_profile(1.5))))
    expected = encoded_srgb((grey / 255.0) ** 1.5)
    assert np.abs(found - expected[..., None]).max() <= 2
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(load_image(encode(deep, "PNG", grey_profile(1.5))), found)


def test_profile_of_srgb_changes_nothing_and_makes_no_copy(pixels):
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(pixels)
    image.info["icc_profile"] = own
    assert to_srgb(image, own) is image
    assert load_image(image) is image


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (b"nonsense", "cannot open profile"),
        (b"\0" * 5000, "cannot open profile"),
        (grey_profile(1.0), "of GRAY, in a picture of RGB"),
        (rgb_profile(DISPLAY_P3)[:200], "cannot"),
        (b"x" * (9 << 20), "bytes"),
    ],
)
def test_profile_that_cannot_be_applied_is_left_out_and_logged(pixels, profile, said, caplog):
    image = Image.fromarray(pixels)
    with caplog.at_level(logging.WARNING, "efficientface_deploy"):
        assert to_srgb(image, profile) is image
        assert to_srgb(image, profile) is image
    (message,) = caplog.messages  # once, though there may be thousands of such pictures
    assert message.startswith("a colour profile is not applied: ") and said in message


def test_pillow_without_littlecms(pixels, caplog, monkeypatch):
    monkeypatch.delattr("PIL.ImageCms")
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    colour._transform.cache_clear()
    data = encode(Image.fromarray(pixels), "PNG", rgb_profile(DISPLAY_P3))
    with caplog.at_level(logging.WARNING, "efficientface_deploy"):
        np.testing.assert_array_equal(load_image(data), pixels)
    assert "not applied" in caplog.text
    colour._transform.cache_clear()


def test_damaged_profiles_never_spoil_a_picture(pixels):
    rng = np.random.default_rng(0)
    image, good = Image.fromarray(pixels), rgb_profile(DISPLAY_P3)
    for _ in range(300):
        damaged = bytearray(good)
        for at in rng.integers(0, len(good), 4):
            damaged[at] = rng.integers(256)
        assert to_srgb(image, bytes(damaged)).size == image.size
