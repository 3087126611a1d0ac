from __future__ import annotations

import io
import itertools
import os
import random
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from efficientface_deploy.errors import ImageError
from efficientface_deploy.spec import PRESETS
from efficientface_deploy.vision import preprocess
from efficientface_deploy.vision.preprocess import (
    MAX_PIXELS,
    load_image,
    normalisation,
    normalise,
    resize,
    to_model_input,
)

DATA = Path(__file__).parents[2] / "data"
SMALL = PRESETS["rafdb"].replace(input_size=32)

# What undoes each EXIF orientation, by the standard's own words: where row 0 and column 0 are.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_array(source: object) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(source: object) -> str:
    """The one-line message that a source is refused with."""
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


def image_or_error(data: bytes) -> None:
    """Any other exception is the failure."""
    try:
        image = load_image(data)
    except ImageError:
        return
    assert image.mode == "RGB" and min(image.size) > 0


# ---- numbers


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
def test_golden_resize(pixels, filter_name):
    golden = np.load(DATA / f"golden_{filter_name}_32.npy")
    np.testing.assert_array_equal(to_model_input(pixels, SMALL.replace(resize=filter_name)), golden)


def test_golden_normalisation():
    image = np.array([[[[0, 128, 255], [10, 20, 30]]]], dtype=np.uint8)
    expected = [[-2.774742, -2.585619], [0.277505, -1.953756], [3.304654, -1.561614]]
    np.testing.assert_allclose(normalise(image, SMALL)[0, :, 0], expected, atol=1e-6)


def test_golden_grey_normalisation():
    image = np.array([[[[0, 128, 255], [10, 20, 30], [77, 77, 77]]]], dtype=np.uint8)
    values = normalise(image, PRESETS["ferplus"])[0, :, 0]
    # 0.299 R + 0.587 G + 0.114 B = 104.206, 18.15, 77
    expected = (np.array([104.206, 18.15, 77]) / 255 - 0.50697356) / 0.25423586
    np.testing.assert_allclose(values, [expected] * 3, rtol=1e-5)


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name].colour == "rgb"])
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
def test_equals_torchvision(photo, preset, filter_name):
    transforms = pytest.importorskip("torchvision.transforms")
    spec = PRESETS[preset].replace(resize=filter_name)
    mode = transforms.InterpolationMode(filter_name)
    reference = transforms.Compose(
        [
            transforms.Resize((224, 224), interpolation=mode, antialias=True),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )(Image.fromarray(photo))
    ours = normalise(to_model_input(photo, spec)[None], spec)[0]
    np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=2e-6)


def test_shrinking_is_antialiased():
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(to_model_input(stripes, SMALL)) <= 4  # each pixel sees as much of both


def test_grey_spec_leaves_a_grey_picture_unchanged(pixels):
    spec = PRESETS["ferplus"].replace(input_size=32)
    grey = np.repeat(pixels[..., :1], 3, axis=-1)
    image = to_model_input(grey, spec)
    values = normalise(image[None], spec)
    np.testing.assert_allclose(
        values, normalise(image[None], spec.replace(colour="rgb")), atol=3e-6
    )


def test_normalisation_is_scale_and_offset():
    scale, offset = normalisation(SMALL)
    np.testing.assert_allclose(255 * scale + offset, (1 - np.array(SMALL.mean)) / SMALL.std, 1e-6)
    assert scale.dtype == offset.dtype == np.float32


def test_shapes_types_and_layout(pixels):
    image = to_model_input(pixels, SMALL)
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    batch = normalise(np.stack([image] * 3), SMALL)
    assert (batch.shape, batch.dtype) == ((3, 3, 32, 32), np.float32)
    assert batch.flags.c_contiguous
    assert normalise(np.zeros((0, 32, 32, 3), np.uint8), SMALL).shape == (0, 3, 32, 32)


def test_image_of_the_right_size_is_not_resampled():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_model_input(image, SMALL), image)
    assert resize(Image.fromarray(image), SMALL).flags.writeable


# ---- accepted sources


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_files_give_their_pixels(pixels, kind, options, tmp_path):
    data = encode(pixels, kind, **options)
    path = tmp_path / "face.bin"  # the content says what it is, not the name
    path.write_bytes(data)
    for source in (data, bytearray(data), path, str(path), Image.open(path)):
        np.testing.assert_array_equal(as_array(source), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_files_are_close(photo, kind):
    difference = as_array(encode(photo, kind, quality=95)).astype(int) - photo
    assert np.abs(difference).mean() < 3


def test_progressive_and_cmyk_jpeg(photo):
    progressive = as_array(encode(photo, "JPEG", quality=95, progressive=True))
    assert np.abs(progressive.astype(int) - photo).mean() < 3
    cmyk = as_array(encode(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - photo).mean() < 8


def test_channels_stay_rgb():
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    for source in (red, encode(red, "PNG"), Image.fromarray(red)):
        assert as_array(source)[4, 4].tolist() == [200, 0, 0]
    assert to_model_input(red, SMALL)[4, 4].tolist() == [200, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_and_one_bit(pixels, kind):
    grey = pixels[..., 0]
    np.testing.assert_array_equal(as_array(encode(grey, kind)), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(as_array(grey), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(as_array(grey[..., None]), np.stack([grey] * 3, -1))
    black_or_white = Image.fromarray(grey > 128)
    assert black_or_white.mode == "1"
    np.testing.assert_array_equal(
        as_array(encode(black_or_white, kind))[..., 1], np.where(grey > 128, 255, 0)
    )


@pytest.mark.parametrize(("largest", "scale"), [(255, 1), (4095, 4095 / 255), (65535, 257)])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_tiff_of_16_bits_equals_tifffile(photo, photometric, largest, scale):
    """8, 12 and 16 bits in 16, whatever zero means, by another reader's values."""
    tifffile = pytest.importorskip("tifffile")
    grey = np.asarray(Image.fromarray(photo).convert("L"), dtype=int)
    assert grey.max() > 250  # the picture has its brightest
    stored = (grey * scale).round().astype(np.uint16)
    stored = largest - stored if photometric == "miniswhite" else stored
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stored, photometric=photometric)
    page = tifffile.TiffFile(io.BytesIO(buffer.getvalue())).pages[0]
    values = page.asarray().astype(float)
    values = largest - values if page.photometric.name == "MINISWHITE" else values
    expected = (values / largest * 255).round()
    np.testing.assert_array_equal(expected, grey)
    np.testing.assert_array_equal(as_array(buffer.getvalue())[..., 0], expected)


def _deep_png(values: np.ndarray) -> bytes:
    height, width, channels = values.shape
    kind = {3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(_chunk, chunks))


def test_deep_colour_that_does_not_fill_its_bits_is_refused(pixels):
    tifffile = pytest.importorskip("tifffile")
    deep = pixels.astype(np.uint16) * 257
    opaque = np.full_like(deep[..., :1], 65535)
    for values, taken in ((deep, True), (deep // 16, False), (deep // 257, False)):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, photometric="rgb")
        with_alpha = np.concatenate([values, opaque], axis=-1)
        for data in (buffer.getvalue(), _deep_png(values), _deep_png(with_alpha)):
            if taken:
                np.testing.assert_array_equal(as_array(data), pixels)
            else:
                assert "expected colour that fills its 16 bits, found values below" in refused(data)


def test_preview_in_a_raw_photograph_is_not_taken_for_it(pixels):
    """A DNG or NEF is a TIFF whose first picture is a small copy."""
    tifffile = pytest.importorskip("tifffile")
    for subfile, taken in ((0, True), (1, False)):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, pixels, photometric="rgb", subfiletype=subfile)
        if taken:
            np.testing.assert_array_equal(as_array(buffer.getvalue()), pixels)
        else:
            assert "found a raw photograph's preview; export it as" in refused(buffer.getvalue())


def _tiff_of_12_bits(values: np.ndarray, photometric: int = 1) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    pixels = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags[279] = len(pixels)
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + pixels


def test_tiff_that_says_12_bits_is_believed(pixels):
    dark = pixels[..., 0] // 4  # as dark as 8 bits would be
    got = as_array(_tiff_of_12_bits(dark.astype(np.uint16)))[..., 0]
    np.testing.assert_array_equal(got, (dark / 4095 * 255).round())
    assert "a TIFF file that Pillow cannot read" in refused(_tiff_of_12_bits(dark, photometric=0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("largest", [255, 4095])
def test_fewer_bits_than_the_file_could_hold(kind, largest):
    values = np.array([[0, 1, largest // 2, largest]], dtype=np.uint16)
    got = as_array(encode(values, kind))[..., 0]
    assert got.tolist() == [[0, round(255 / largest), round(largest // 2 / largest * 255), 255]]
    brighter = np.array([[0, 1, largest // 2, largest + 1]], dtype=np.uint16)
    assert as_array(encode(brighter, kind)).max() == round(
        (largest + 1) / (4095, 65535)[largest > 255] * 255
    )


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("marker", [True, False])
def test_cmyk_jpeg_with_and_without_adobes_marker(photo, marker, inverted):
    """With the marker it is inverted by Adobe's rule; without, the ink of black decides."""
    inks = np.asarray(Image.fromarray(photo).convert("CMYK"))  # by Pillow, without black
    inks = np.concatenate([inks[..., :3], np.full_like(inks[..., :1], 20)], axis=-1)
    paper = np.asarray(Image.fromarray(inks, "CMYK").convert("RGB")).astype(int)
    # Pillow writes what it is given inverted, and the marker.
    data = encode(Image.fromarray(inks if inverted else 255 - inks, "CMYK"), "JPEG", quality=95)
    at = data.index(b"Adobe") - 4
    if not marker:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    negative = marker and not inverted  # a file that lies
    assert (np.abs(as_array(data) - paper).mean() < 3) != negative


def test_cmyk_jpeg_that_may_be_either():
    data = encode(Image.new("CMYK", (16, 16), (0, 0, 0, 120)), "JPEG")
    assert as_array(data)[8, 8, 0] == pytest.approx(135, abs=3)
    at = data.index(b"Adobe") - 4
    message = refused(data[:at] + data[at + 16 :])
    assert "says whether it is inverted, found one that may be either; convert it to" in message


def test_cmyk_tiff_is_never_inverted(photo):
    inks = Image.fromarray(photo).convert("CMYK")
    np.testing.assert_array_equal(as_array(encode(inks, "TIFF")), photo)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 128, 129, 257], [30000, 32768, 65534, 65535]], dtype=np.uint16)
    got = as_array(encode(values, kind))[..., 0]
    assert got.tolist() == [[0, 0, 1, 1], [117, 128, 255, 255]]
    np.testing.assert_array_equal(as_array(Image.fromarray(values))[..., 0], got)


def test_transparency_lies_over_white():
    colour = np.full((4, 4, 4), (200, 100, 0, 255), dtype=np.uint8)
    colour[0, 0, 3], colour[0, 1, 3] = 0, 51  # invisible, and a fifth
    image = as_array(encode(colour, "PNG"))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 1].tolist() == [244, 224, 204]
    assert image[3, 3].tolist() == [200, 100, 0]


def test_grey_with_alpha():
    image = Image.merge("LA", [Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 0)])
    assert as_array(encode(image, "PNG"))[1, 1].tolist() == [255] * 3
    image.putalpha(255)
    assert as_array(encode(image, "PNG"))[1, 1].tolist() == [10] * 3


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_colour_that_means_transparent(mode):
    image = Image.new(mode, (4, 4), 0)
    key = (0, 0, 0) if mode == "RGB" else 0
    assert as_array(encode(image, "PNG"))[1, 1].tolist() == [0] * 3
    assert as_array(encode(image, "PNG", transparency=key))[1, 1].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    result = as_array(encode(image, kind, transparency=0))
    assert result[0, 0].tolist() == [255] * 3
    assert result[1, 1].tolist() == [0, 0, 255]
    if kind == "PNG":  # an alpha for each entry
        result = as_array(encode(image, kind, transparency=b"\xff\x00"))
        assert result[0, 0].tolist() == [255, 0, 0]
        assert result[1, 1].tolist() == [255] * 3


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = as_array(data)[4, 4].tolist()
        assert red > 200 and green < 50 and blue < 50


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "1"]
)
def test_pil_modes(mode):
    assert as_array(Image.new(mode, (5, 4))).shape == (4, 5, 3)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_exif_rotation(pixels, orientation, kind, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(pixels, kind, exif=exif, **options)
    expected = UPRIGHT[orientation](pixels)
    np.testing.assert_array_equal(as_array(data), expected)
    np.testing.assert_array_equal(as_array(Image.open(io.BytesIO(data))), expected)
    np.testing.assert_array_equal(as_array(load_image(data)), expected)  # not turned again


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_of_a_jpeg(pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = as_array(encode(pixels, "JPEG"))
    rotated = as_array(encode(pixels, "JPEG", exif=exif))
    np.testing.assert_array_equal(rotated, UPRIGHT[orientation](plain))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_does_not_spoil_a_good_picture(pixels):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "Camera", b"UNICODE\0x"
    data = bytearray(encode(pixels, "JPEG", exif=exif))
    start = data.find(b"Exif\0\0") + 6
    length = struct.unpack(">H", data[start - 8 : start - 6])[0] - 8
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            damaged[start + rng.randrange(length)] = rng.randrange(256)
        assert as_array(bytes(damaged)).size == pixels.size


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (2, 4, b"top\0"),
        (3, 1, b"\0\0\0\0"),
        (3, 1, b"\0\x09\0\0"),
        (7, 4, b"\6\6\6\6"),
        (9, 1, b"\xff\xff\xff\xff"),
    ],
)
def test_orientation_that_is_none(pixels, kind, count, value):
    entry = struct.pack(">HHI", 0x0112, kind, count) + value
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
    np.testing.assert_array_equal(as_array(encode(pixels, "PNG", exif=exif)), pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", [b"", b"\0", b"II*\0\xff\xff\xff\xff", b"MM\0*" + b"\xff" * 60])
def test_nonsense_exif(pixels, exif):
    data = encode(pixels, "JPEG")
    segment = b"Exif\0\0" + exif
    marker = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    np.testing.assert_array_equal(as_array(data[:2] + marker + data[2:]), as_array(data))


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[::-1],
        lambda array: array[:, ::-1],
        lambda array: array[::2, 1::3],
        lambda array: np.asfortranarray(array),
        lambda array: array[..., ::-1],
        lambda array: array.transpose(1, 0, 2),
        lambda array: np.broadcast_to(array[:1, :1], (7, 9, 3)),
        lambda array: array[:1, :1],
        lambda array: array.astype(">u1"),
    ],
)
def test_strides_of_arrays_do_not_matter(pixels, view):
    array = view(pixels)
    np.testing.assert_array_equal(as_array(array), np.array(array))


def test_read_only_arrays_are_taken_and_nothing_is_written(pixels):
    array = pixels.copy()
    array.flags.writeable = False
    to_model_input(array, SMALL)
    image = Image.fromarray(pixels)
    to_model_input(image, SMALL)
    np.testing.assert_array_equal(np.asarray(image), array)


@settings(max_examples=60)
@given(hnp.arrays(np.uint8, (32, 32, 3)), st.sampled_from(["C", "F", "reversed", "read-only"]))
def test_array_of_the_right_size_is_what_pillow_would_make_of_it(array, layout):
    source = np.asarray(array, order="F" if layout == "F" else "C")
    source = source[::-1, :, ::-1] if layout == "reversed" else source
    source.flags.writeable = layout != "read-only"
    got = to_model_input(source, SMALL)
    np.testing.assert_array_equal(got, resize(load_image(source), SMALL))
    assert got.flags.c_contiguous and got.flags.writeable and got.dtype == np.uint8
    assert type(got) is np.ndarray and not np.shares_memory(got, source)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "LAB"]


@settings(max_examples=150)
@given(st.sampled_from(MODES), st.integers(1, 40), st.integers(1, 40), st.binary(min_size=1))
def test_any_pil_image_becomes_the_models_input(mode, width, height, noise):
    image = Image.frombytes("L", (width, height), (noise * width * height)[: width * height])
    image = image.convert("I;16" if mode == "I;16" else "RGB" if mode != "LA" else "LA")
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode == "LAB":
        image = Image.new("LAB", (width, height), (noise[0], 128, 128))
    elif mode == "HSV":
        image = image.convert("HSV")
    else:
        image = image.convert(mode)
    try:
        array = to_model_input(image, SMALL)
    except ImageError:
        assert mode == "LAB"  # Pillow has no way from LAB to RGB without a profile
    else:
        assert array.shape == (32, 32, 3) and array.dtype == np.uint8


GREY = {
    "array": lambda grey: np.asarray(grey),
    "column of an array": lambda grey: np.asarray(grey)[..., None],
    "pil": lambda grey: grey,
    "jpeg": lambda grey: encode(grey, "JPEG"),
    "turned jpeg": lambda grey: encode(grey, "JPEG", exif=turned(6)),
    "png": lambda grey: encode(grey, "PNG"),
    "see-through png": lambda grey: encode(grey, "PNG", transparency=int(np.asarray(grey)[0, 0])),
    "alpha": lambda grey: encode(Image.merge("LA", (grey, grey.rotate(180))), "PNG"),
    "16 bits": lambda grey: encode(np.asarray(grey).astype(np.uint16) * 257, "PNG"),
    "one bit": lambda grey: encode(grey.convert("1"), "PNG"),
    "palette": lambda grey: encode(grey.convert("P"), "GIF"),
}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", GREY)
@pytest.mark.parametrize("size", [(60, 45), (32, 32), (20, 31)], ids=["larger", "equal", "smaller"])
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
def test_grey_is_resized_once_and_gives_the_same_pixels(photo, kind, size, filter_name):
    """As three equal channels would, to the last bit."""
    source = GREY[kind](Image.fromarray(photo).convert("L").resize(size))
    spec = SMALL.replace(resize=filter_name)
    rgb = load_image(source)
    assert rgb.mode == "RGB"
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    expected = np.asarray(
        rgb if rgb.size == (32, 32) else rgb.resize((32, 32), filters[filter_name])
    )
    got = to_model_input(source, spec)
    np.testing.assert_array_equal(got, expected)
    assert got.flags.writeable and expected.std() > 10
    if isinstance(source, np.ndarray):
        assert not np.shares_memory(got, source)


@settings(max_examples=80)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["bilinear", "bicubic"]), st.data())
def test_flat_picture_stays_flat(width, height, filter_name, data):
    """A resize neither overshoots nor darkens, whatever the size."""
    colour = data.draw(st.tuples(*[st.integers(0, 255)] * 3))
    array = np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))
    got = to_model_input(array, SMALL.replace(resize=filter_name))
    assert (got == colour).all()


@settings(max_examples=60)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=50)))
def test_any_grey_array(array):
    assert to_model_input(array, SMALL).shape == (32, 32, 3)


# ---- refused sources


@settings(max_examples=200)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.float32, np.int64, np.bool_, np.complex64, "U2", "M8[s]"]),
        hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    )
)
def test_only_pictures_among_arrays_are_taken(array):
    picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype == np.uint8 and picture and array.size:
        assert as_array(array).shape[:2] == array.shape[:2]
    else:
        assert "image array" in refused(array)


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.zeros((8, 8, 3), np.float32), "dtype float32.*255"),
        (np.full((8, 8, 3), np.nan), "dtype float64"),
        (np.zeros((8, 8, 3), np.int16), "dtype int16"),
        (np.zeros((8, 8, 3), bool), "dtype bool"),
        (np.zeros((8, 8, 3), object), "dtype object"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\).*alpha"),
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\).*batch"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
        (np.array(3, np.uint8), r"shape \(\)"),
        (np.zeros((0, 8, 3), np.uint8), "one pixel.*crop"),
        (np.zeros((8, 0), np.uint8), "one pixel"),
        (np.broadcast_to(np.uint8(0), (100_000, 100_000, 3)), "100000x100000"),
    ],
)
def test_array_is_refused_with_what_was_found(array, hint):
    with pytest.raises(ImageError, match=hint):
        load_image(array)


@pytest.mark.parametrize("source", [None, 3, 2.5, [[1]], ("a", "b"), object(), memoryview(b"abc")])
def test_other_types_are_refused(source):
    assert type(source).__name__ in refused(source)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"", "empty"),
        (b"This is a picture of my cat.\n" * 20, "another kind of file"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "another kind of file"),
        (b"%PDF-1.7\n" + b"\0" * 100, "another kind of file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "another kind of file"),
        (b"\0" * 1000, "another kind of file"),
        (b"\xff\xd8\xff", "image bytes"),
        (b"\x89PNG\r\n\x1a\n", "image bytes"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image bytes"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 500, "found a video"),  # MP4
        (b"\xff\x0a" + b"\0" * 500, "another kind of file"),  # JPEG XL
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94.", "another kind of file"),  # a pickle
    ],
)
def test_bytes_that_are_no_picture(data, hint, tmp_path):
    assert hint in refused(data)
    path = tmp_path / "face.jpg"
    path.write_bytes(data)
    assert refused(path).startswith(f"{path}: ")
    with path.open("rb") as file:
        assert refused(file).startswith(f"{path}: ")


def test_formats_outside_the_list_are_refused(pixels):
    for kind in ("PPM", "ICO", "PCX", "TGA", "SGI"):
        assert "another kind of file" in refused(encode(pixels, kind))
    assert "a JPEG 2000 file that Pillow cannot read" in refused(encode(pixels, "JPEG2000"))


def test_paths_that_are_no_picture(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.jpg")
    assert "directory" in refused(tmp_path)
    assert "directory" in refused("")
    assert "null" in refused("a\0b").lower()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop")
    assert "too long" in refused("x" * 300)
    refused("http://example.com/face.jpg")


@pytest.mark.timeout(30)
def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "a pipe or device" in refused(tmp_path / "pipe.jpg")
    for device in ("/dev/zero", "/dev/urandom", "/dev/null"):
        assert "a pipe or device" in refused(device)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [800 << 20, 3 << 30, 1 << 40])
def test_file_too_long_to_be_a_picture_is_not_read(tmp_path, size):
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(size)
    assert "at most 715 MB" in refused(path)


def test_bytes_have_the_same_limit_as_a_file(monkeypatch, pixels):
    data = encode(pixels, "PNG")
    monkeypatch.setattr(preprocess, "MAX_BYTES", len(data))
    assert as_array(data).shape == pixels.shape
    assert "at most" in refused(data + b"\0")


def test_path_of_bytes(tmp_path, pixels):
    (tmp_path / "face.png").write_bytes(encode(pixels, "PNG"))
    (entry,) = os.scandir(os.fsencode(tmp_path))
    np.testing.assert_array_equal(as_array(entry), pixels)


def _jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan, of some 30 bytes, comes again and again."""
    data = encode(Image.new("RGB", (side, side), (120, 130, 140)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


@pytest.mark.timeout(30)
def test_jpeg_of_endless_scans_is_refused_before_it_is_unpacked():
    data = _jpeg_of_scans(2000, 20_000)  # 620 kB and minutes of work
    assert "20000 of 2000x2000 pixels" in refused(data)


@pytest.mark.parametrize("comment", [b"", b"x", b"xx"])
def test_scans_are_counted_wherever_they_begin(photo, monkeypatch, comment):
    data = encode(photo, "JPEG", progressive=True, comment=comment)
    scans = data.count(b"\xff\xda")
    assert scans > 5
    pixels = photo.shape[0] * photo.shape[1]
    monkeypatch.setattr(preprocess, "_MAX_SCANS_OF_PIXELS", scans * pixels - 1)
    assert f"{scans} of " in refused(data)
    monkeypatch.setattr(preprocess, "_MAX_SCANS_OF_PIXELS", scans * pixels)
    to_model_input(data, SMALL)


def test_jpeg_of_many_scans_is_read_where_it_is_small(photo):
    assert as_array(_jpeg_of_scans(64, 500)).shape == (64, 64, 3)
    assert as_array(encode(photo, "JPEG", progressive=True)).shape == photo.shape


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"IDAT"])
def test_chunk_that_unpacks_to_much_more(name):
    """64 MB of zeros in 64 kB, as a text, a profile, or more pixels than there are."""
    bomb = (b"" if name == b"IDAT" else b"a\0\0") + zlib.compress(b"\0" * (64 << 20))
    good = _png(4, 4)
    at = good.find(b"IDAT") - 4
    image_or_error(good[:at] + _chunk(name, bomb) + good[at:])


def test_floating_point_tiff(pixels):
    data = encode(Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF")
    assert "floating-point" in refused(data)


@pytest.mark.parametrize("value", [-1, 70_000])
def test_integers_outside_16_bits(value):
    assert str(value) in refused(Image.new("I", (4, 4), value))


def test_cie_lab_tiff():
    assert "CIE Lab" in refused(encode(Image.new("LAB", (4, 4)), "TIFF"))


def test_empty_pil_image():
    assert "0x7" in refused(Image.new("RGB", (0, 7)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF"])
@pytest.mark.parametrize("how", ["close", "with", "loaded", "file", "memory"])
def test_closed_pil_image(pixels, tmp_path, how, kind):
    path = tmp_path / "a"
    path.write_bytes(encode(pixels, kind))
    if how == "with":
        with Image.open(path) as image:
            pass
    elif how == "file":
        with path.open("rb") as file:
            image = Image.open(file)
    else:
        image = Image.fromarray(pixels) if how == "memory" else Image.open(path)
        if how == "loaded":
            image.load()
        image.close()
    message = refused(image)
    assert "expected an open image, found a closed one; label it before it is closed" in message


def test_picture_that_was_loaded_before_its_file_was_closed(pixels, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(pixels, "PNG"))
    with Image.open(path) as image:
        image.load()
    np.testing.assert_array_equal(as_array(image), pixels)


class Trickle(io.RawIOBase):
    """Gives a few bytes at a time and cannot be wound back, as a socket."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        part, self.data = self.data[:7], self.data[7:]
        buffer[: len(part)] = part
        return len(part)


def test_open_files(pixels, tmp_path):
    data = encode(pixels, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    used = io.BytesIO(data)
    used.read()  # as by a web framework that looked at it
    with (
        (tmp_path / "a.png").open("rb") as buffered,
        (tmp_path / "a.png").open("rb", buffering=0) as raw,
    ):
        for file in (io.BytesIO(data), used, buffered, raw, Trickle(data)):
            np.testing.assert_array_equal(as_array(file), pixels)
            assert not file.closed


def test_open_files_that_give_no_picture(pixels, tmp_path, monkeypatch):
    assert "an empty file" in refused(io.BytesIO())
    assert "found one that gives str; open it with" in refused(io.StringIO("text"))
    file = io.BytesIO(b"x")
    file.close()
    assert "closed file" in refused(file)
    with (tmp_path / "out").open("wb") as writing:
        assert "expected a file opened for reading bytes" in refused(writing)
    monkeypatch.setattr(preprocess, "MAX_BYTES", 10)
    assert "at most" in refused(io.BytesIO(encode(pixels, "PNG")))


def test_avif_where_pillow_has_its_decoder(photo, monkeypatch):
    pytest.importorskip("PIL._avif")
    data = encode(photo, "AVIF", quality=95)
    assert np.abs(as_array(data).astype(int) - photo).mean() < 3
    monkeypatch.setitem(sys.modules, "PIL._avif", None)
    assert "found AVIF; pip install 'pillow>=11.3', or convert it to JPEG" in refused(data)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "found HEIC; pip install pillow-heif, or convert it to JPEG" in refused(HEIC)


def test_heic_with_a_stand_in_for_its_package(pixels, monkeypatch):
    """What pillow-heif does for us: it registers a decoder with Pillow."""
    from PIL import ImageFile

    class HeifImageFile(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size = "RGB", pixels.shape[1::-1]

        def load(self):
            self.im = Image.fromarray(pixels).im
            return Image.Image.load(self)

    package = types.SimpleNamespace(
        register_heif_opener=lambda: Image.register_open("HEIF", HeifImageFile)
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    np.testing.assert_array_equal(as_array(HEIC), pixels)


def test_real_heic(photo):
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(photo)).save(buffer, quality=95)
    assert np.abs(as_array(buffer.getvalue()).astype(int) - photo).mean() < 3


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        *((b"II+\0" + bytes(60), "TIFF"), (b"BM" + bytes(12) + b"\x28\0\0\0", "BMP")),
        *((b"BMW,3\nAudi,4\nOpel,9\n", None), (b"RIFF\0\0\0\0WAVE", None), (b"", None)),
        *((b"\0\0\0\x20ftypisom", None), (b"\xff\xff\xff\xffftypavif", "AVIF")),
        *((b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "AVIF"), (HEIC, "HEIC")),
    ],
)
def test_picture_kind(data, kind):
    assert preprocess.picture_kind(data[:64]) == kind
    if kind is not None:
        refused(data)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", body)
        + _chunk(b"IEND", b"")
    )


def _bombs(side: int) -> dict[str, bytes]:
    small = np.zeros((16, 16, 3), np.uint8)
    jpeg = bytearray(encode(small, "JPEG"))
    at = jpeg.find(b"\xff\xc0") + 5  # start of frame: length, precision, then height and width
    jpeg[at : at + 4] = struct.pack(">HH", side, side)
    bmp = bytearray(encode(small, "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    gif = bytearray(encode(small, "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    webp = bytearray(encode(small, "WEBP", lossless=True))
    at = webp.find(b"VP8L") + 9  # fourteen bits of width and of height, each less one
    largest = min(side, 16_384) - 1
    webp[at : at + 4] = struct.pack("<I", largest | largest << 14)
    return {
        "png": _png(side, side),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "webp": bytes(webp),
        "tiff": encode(small, "TIFF")
        .replace(
            struct.pack("<HHIHH", 0x100, 4, 1, 16, 0), struct.pack("<HHII", 0x100, 4, 1, side * 9)
        )
        .replace(
            struct.pack("<HHIHH", 0x101, 4, 1, 16, 0), struct.pack("<HHII", 0x101, 4, 1, side)
        ),
    }


# Pillow warns between its limit and twice that; both are refused.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 50_000])
@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "gif", "tiff", "webp"])
def test_bomb_is_refused_before_it_is_unpacked(kind, side, monkeypatch):
    data = _bombs(side)[kind]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    message = refused(data)
    assert "89 million pixels" in message


def test_limit_holds_where_the_application_lifted_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "50000x50000" in refused(_png(50_000, 50_000))


def test_pil_image_over_the_limit():
    image = Image.new("1", (MAX_PIXELS // 1000 + 1, 1000))
    assert "million pixels" in refused(image)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_file_is_refused_wherever_it_ends(pixels, kind):
    data = encode(pixels, kind)
    for end in range(0, len(data) - 32, max(1, len(data) // 150)):
        refused(data[:end])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_file_gives_an_image_or_an_image_error(pixels, kind):
    data = encode(pixels, kind)
    rng = random.Random(kind)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 8, 40))):
            # Headers are where the traps are.
            reach = rng.choice((len(damaged), min(len(damaged), 64)))
            at = rng.randrange(reach)
            match rng.randrange(3):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    damaged[at : at + 4] = rng.choice((b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"))
                case 2:
                    del damaged[at : at + rng.randrange(1, 9)]
        image_or_error(bytes(damaged))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200)
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*"])
    | st.just(b""),
    st.binary(max_size=200),
)
def test_any_bytes_give_an_image_or_an_image_error(magic, data):
    image_or_error(magic + data)


@pytest.mark.parametrize(
    "name",
    [
        *("https://host/face.jpg", "S3://bucket/face.jpg", "file:///tmp/face.jpg"),
        "data:image/jpeg;base64,/9j/" + 9000 * "A",
    ],
)
def test_an_address_is_named_as_it_was_given(name):
    with pytest.raises(ImageError) as caught:
        load_image(name)
    assert str(caught.value).startswith(name[:90])  # a path would have lost a slash
    assert "found an address; download or decode it" in str(caught.value)


def test_a_file_that_is_called_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:").mkdir()
    Image.new("RGB", (8, 8)).save("a:/b.png")
    assert load_image("a://b.png").size == (8, 8)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_video_without_its_suffix_is_called_one(tmp_path, suffix):
    """As an upload is, in a temporary file."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    upload = (tmp_path / f"a{suffix}").rename(tmp_path / "upload")
    with pytest.raises(ImageError, match=r"found a video; name it as one, e\.g\. \.mp4"):
        load_image(upload)
