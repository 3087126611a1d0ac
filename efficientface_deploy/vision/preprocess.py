"""Image to model input: the only place of the project that resizes or normalises.

An artifact takes what :func:`to_model_input` returns, uint8 RGB of the model's size, and has the
normalisation in its graph; :func:`normalise` is the same arithmetic for PyTorch and for artifacts
exported with ``--float-input``.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from efficientface_deploy.errors import ImageError, system_words, words_of
from efficientface_deploy.files import find_files
from efficientface_deploy.spec import ModelSpec

ImageSource = Union[str, "os.PathLike[str]", bytes, bytearray, Image.Image, npt.NDArray[Any]]
UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

# Decoders that we let touch foreign bytes; every further one is more code to attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of what a folder is searched for
STANDARD_INPUT = "-"

# A small file can claim to hold gigabytes. Pillow warns from this size on; we refuse.
MAX_PIXELS = 89_478_485
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits, not compressed
_MOST_PIXELS = f"{MAX_PIXELS // 1_000_000} million pixels"

# Each scan of a JPEG goes over all its pixels again, in 30 bytes if there is nothing to change: a
# small file can keep a decoder busy for hours. Cameras and optimisers write about ten.
_MAX_SCANS_OF_PIXELS = 16 * MAX_PIXELS
_JPEG, _JPEG_SCAN = b"\xff\xd8", b"\xff\xda"

# ITU-R BT.601 luma, as Pillow's mode "L" and OpenCV's COLOR_RGB2GRAY have it; sums to one, so a
# grey picture passes unchanged.
LUMA = (0.299, 0.587, 0.114)

_SCALE_IT = "convert it to 8-bit RGB with the range you mean"

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ALPHA_BACKGROUND = (255, 255, 255)

# What undoes each EXIF orientation. Pillow's exif_transpose also writes the EXIF block again, which
# fails on the odd tags of real cameras.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def find_images(names: Sequence[str]) -> Iterator[str]:
    """The files that names stand for; a folder stands for every picture below it, sorted.

    A folder that may not be read is given itself, for :func:`load_image` to refuse.

    Raises:
        ImageError: A folder holds no pictures.
    """
    for name in names:
        if name == STANDARD_INPUT or not os.path.isdir(name):
            yield name
            continue
        found, refused = find_files(Path(name), IMAGE_SUFFIXES)
        if not found and not refused:
            expected = "images (" + ", ".join(IMAGE_SUFFIXES) + ")"
            raise ImageError(name, expected, "none in this folder", "give another folder")
        yield from map(str, (*found, *refused))


def load_image(source: ImageSource) -> Image.Image:
    """Decode any accepted image to 8-bit RGB, upright.

    Args:
        source: A path; the bytes of an image file; a PIL image; or an array, uint8, of shape
            (H, W, 3) in RGB order (not OpenCV's BGR) or (H, W) in grey.

    Returns:
        A PIL image of mode RGB. EXIF rotation is applied, transparency is laid over white, 16-bit
        grey is scaled to 8 bits, of an animation the first frame is taken.

    Raises:
        ImageError: The image is missing, empty, truncated, too large, of a format outside
            :data:`FORMATS`, or an array of another shape or type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "PIL image")
    if isinstance(source, (bytes, bytearray)):
        return _decode(bytes(source), "image bytes")
    if isinstance(source, (str, os.PathLike)):
        return _decode(_read(Path(os.fsdecode(source))), str(source))
    expected = "a path, bytes, a PIL image or a uint8 array"
    fix = "convert it to one of these, e.g. numpy.asarray(image)"
    raise ImageError("image", expected, type(source).__name__, fix)


def resize(image: Image.Image, spec: ModelSpec) -> UInt8Array:
    """Resize an RGB image to the model's square input.

    Args:
        image: PIL image of mode RGB.
        spec: Gives ``input_size`` and the filter.

    Returns:
        uint8 array (input_size, input_size, 3), RGB, 0 to 255.
    """
    side = (spec.input_size, spec.input_size)
    if image.size != side:
        # Pillow's filters are antialiased when they shrink, as the published evaluation's are.
        image = image.resize(side, _FILTERS[spec.resize])
    return np.array(image, dtype=np.uint8)  # (S, S, 3)


def to_model_input(source: ImageSource, spec: ModelSpec) -> UInt8Array:
    """Any accepted image to what an artifact takes.

    Args:
        source: See :func:`load_image`.
        spec: The model's.

    Returns:
        uint8 array (input_size, input_size, 3), RGB, 0 to 255.

    Raises:
        ImageError: See :func:`load_image`.
    """
    fitting = (spec.input_size, spec.input_size, 3)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape == fitting:
        return np.array(source, order="C")  # what Pillow would make of it, less its copies
    return resize(load_image(source), spec)


def normalise(images: UInt8Array, spec: ModelSpec) -> Float32Array:
    """The arithmetic that every exported graph begins with.

    Args:
        images: uint8 array (N, S, S, 3), RGB, 0 to 255.
        spec: Gives colour, mean and standard deviation.

    Returns:
        float32 array (N, 3, S, S), (x / 255 - mean) / std; for a ``grey`` spec x is the luminance
        in all three channels.
    """
    pixels = images.astype(np.float32)  # (N, S, S, 3)
    if spec.colour == "grey":
        luminance = pixels @ np.asarray(LUMA, dtype=np.float32)  # (N, S, S)
        pixels = np.repeat(luminance[..., None], 3, axis=-1)  # (N, S, S, 3)
    scale, offset = normalisation(spec)
    pixels = pixels * scale + offset
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (N, 3, S, S)


def normalisation(spec: ModelSpec) -> tuple[Float32Array, Float32Array]:
    """Scale and offset, each float32 (3,), with pixel * scale + offset = (pixel/255 - mean)/std."""
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end, a device neither
            if directory := stat.S_ISDIR(status.st_mode):
                os.scandir(path).close()  # one that may not be read says so
            found = "a directory" if directory else "a pipe or device"
            raise ImageError(path, "an image file", found, "give a file, or its bytes")
        _check_bytes(status.st_size, str(path))
        return path.read_bytes()
    except OSError as error:
        raise ImageError(path, "an image file", system_words(error), "check the path") from None
    except ValueError as error:  # a NUL byte in the path
        raise ImageError(repr(path), "a path", str(error), "check the path") from None


def _check_bytes(count: int, name: str) -> None:
    if count > MAX_BYTES:
        raise _too_large(name, f"{MAX_BYTES // 1_000_000} MB", f"{count // 1_000_000} MB")


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(name, "an image", "an empty file", "copy the file again")
    _check_bytes(len(data), name)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(name, _MOST_PIXELS, "more") from None
    except UnidentifiedImageError:
        expected, found = "an image in " + ", ".join(FORMATS), "another kind of file"
        raise ImageError(name, expected, found, "convert it to JPEG or PNG") from None
    except Exception as error:  # noqa: BLE001 - decoders fail on foreign bytes in many ways
        raise _damaged(name, error) from None
    _check_scans(data, image.size, name)
    return _to_rgb(image, name)


def _check_scans(data: bytes, size: tuple[int, int], name: str) -> None:
    """Refuse a JPEG that is meant to keep us busy; the marker cannot occur in compressed data."""
    if not data.startswith(_JPEG):
        return
    scans = data.count(_JPEG_SCAN)
    if scans * size[0] * size[1] > _MAX_SCANS_OF_PIXELS:
        found = f"{scans} of {size[0]}x{size[1]} pixels"
        raise ImageError(name, "a JPEG of some ten scans", found, "encode it again")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.size, name)
    try:
        image.load()
        rgb, turn = _convert(image, name), _turn(image)
        if turn is None:
            return rgb
        turned = rgb.transpose(turn)
        turned.info = {}  # it still names the orientation, and the picture would be turned again
        return turned
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders fail on foreign bytes in many ways
        raise _damaged(name, error) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What undoes the EXIF orientation; a picture whose EXIF is damaged is taken as it lies."""
    try:
        return _TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # noqa: BLE001 - Pillow's EXIF reader fails on foreign bytes in many ways
        return None


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Any mode of Pillow's to RGB."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # "I;16", "I;16B" and, for some 16-bit PNG files, "I"
        return _from_16_bit(np.asarray(image), name)
    if image.mode == "F":
        expected, found = "8 or 16 bits a channel", "floating-point pixels"
        raise ImageError(name, expected, found, _SCALE_IT)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*_ALPHA_BACKGROUND, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(values: npt.NDArray[Any], name: str) -> Image.Image:
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ImageError(name, "16-bit values, 0 to 65535", f"{low} to {high}", _SCALE_IT)
    eight_bit = (values.astype(np.float64) / 257 + 0.5).astype(np.uint8)  # 65535 / 257 = 255
    return Image.fromarray(eight_bit).convert("RGB")


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    name, shape = "image array", array.shape
    if array.dtype != np.uint8:
        fix = "convert it, e.g. (array * 255).round().astype('uint8') for values in [0, 1]"
        raise ImageError(name, "dtype uint8, 0 to 255", f"dtype {array.dtype}", fix)
    grey = array.ndim == 2
    if not grey and not (array.ndim == 3 and shape[2] == 3):
        expected = "shape (H, W, 3) in RGB order or (H, W)"
        fix = "drop the alpha channel, or pass single images rather than a batch"
        raise ImageError(name, expected, f"shape {shape}", fix)
    if 0 in shape:
        fix = "check the crop that made it"
        raise ImageError(name, "at least one pixel", f"shape {shape}", fix)
    _check_size((shape[1], shape[0]), name)
    image = Image.fromarray(np.ascontiguousarray(array))  # a copy in RGB, a view in grey
    return image.convert("RGB") if grey else image


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(name, "at least one pixel", f"{width}x{height}", "check the image")
    if width * height > MAX_PIXELS:
        raise _too_large(name, _MOST_PIXELS, f"{width}x{height}")


def _too_large(name: str, most: str, found: str) -> ImageError:
    return ImageError(name, f"at most {most}", found, "shrink it first, or crop the face")


def _damaged(name: str, error: Exception) -> ImageError:
    found = f"a damaged one ({words_of(error, 120)})"
    return ImageError(name, "a complete image", found, "copy or encode the file again")
