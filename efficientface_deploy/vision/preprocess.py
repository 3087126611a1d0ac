"""Image to model input: the only place of the project that resizes or normalises.

An artifact takes what :func:`to_model_input` returns, uint8 RGB of the model's size, and has the
normalisation in its graph; :func:`normalise` is the same arithmetic for PyTorch and for artifacts
exported with ``--float-input``.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import stat
from pathlib import Path
from typing import IO, Any, Union

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from efficientface_deploy.errors import ImageError, system_words, words_of
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.colour import to_srgb

ImageSource = Union[
    str, "os.PathLike[str]", bytes, bytearray, IO[bytes], Image.Image, npt.NDArray[Any]
]
UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

# Decoders that we let touch foreign bytes; every further one is more code to attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

# A small file can claim to hold gigabytes. Pillow warns from this size on; we refuse.
MAX_PIXELS = 89_478_485
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits, not compressed
MOST_PIXELS = f"{MAX_PIXELS // 1_000_000} million pixels"

# Each scan of a JPEG goes over all its pixels again, in 30 bytes if there is nothing to change: a
# small file can keep a decoder busy for hours. Cameras and optimisers write about ten.
_MAX_SCANS_OF_PIXELS = 16 * MAX_PIXELS
_JPEG, _JPEG_SCAN = b"\xff\xd8", 0xDAFF  # the marker of a scan, FF DA, as a number

# ITU-R BT.601 luma, as Pillow's mode "L" and OpenCV's COLOR_RGB2GRAY have it; sums to one, so a
# grey picture passes unchanged.
LUMA = (0.299, 0.587, 0.114)

_SCALE_IT = "convert it to 8-bit RGB with the range you mean"

# Largest values of what 16 bits may hold; the darkest real picture of the next kind would be black.
_RANGES_OF_GREY = (255, 4095, 65535)

# Mean ink of black, of 255, below which a CMYK picture is surely right, or else surely inverted.
_LITTLE_BLACK = 64

# What is no path: https://..., s3://..., file://..., a picture in a text.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:(//|image/)", re.IGNORECASE)

# How files of pictures begin; not all of them can be read.
_MAGIC = {
    **{b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF"},
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    **{b"8BPS": "Photoshop", b"\0\0\0\x0cjP  ": "JPEG 2000", b"\0\0\0\x0cJXL ": "JPEG XL"},
}
_VIDEO = re.compile(rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)  # MP4, Matroska, AVI
_BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)}

# Tags of a TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SUBFILE, _REDUCED = 254, 1

# Brands of the container that phones write.
_AVIF, _HEIC = {b"avif", b"avis"}, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}

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


def load_image(source: ImageSource) -> Image.Image:
    """Decode any accepted image to 8-bit RGB, upright.

    What a file leaves open is decided so:

    - 16-bit grey that holds no more than 255, or 4095, holds 8 or 12 bits, as cameras and scanners
      store them, and is stretched from that; a true 16-bit picture as dark would come out black.
    - A TIFF's white-is-zero is heeded, also with 16 bits, where Pillow does not.
    - CMYK in a JPEG with Adobe's marker is stored inverted. Without the marker both are found, so
      the ink of black decides, of which a photograph has little; what it leaves open is refused.
    - An ICC profile is applied where it is not sRGB's; a log says where it cannot be.

    Args:
        source: A path; the bytes of an image file; a file opened for bytes, which is read from its
            start where it can be; a PIL image; or an array, uint8, of shape (H, W, 3) in RGB order
            (not OpenCV's BGR), or (H, W) or (H, W, 1) in grey.

    Returns:
        A PIL image of mode RGB. EXIF rotation is applied, transparency is laid over white, grey of
        more than 8 bits is scaled, of an animation or several pages the first is taken.

    Raises:
        ImageError: The image is missing, empty, truncated, closed, too large, of a format outside
            :data:`FORMATS` (AVIF and HEIC are read where this Python has their decoders), or an
            array of another shape or type.
    """
    return _to_rgb(_load(source))


def picture_kind(start: bytes) -> str | None:
    """The format of a picture by the first 64 bytes of its file, None for what is no picture."""
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:2] == b"BM" and start[14:18] in _BMP_HEADERS:
        return "BMP"
    if start[4:8] == b"ftyp":  # also of MP4
        end = min(int.from_bytes(start[:4], "big"), 64)
        brands = {start[8:12], *(start[at : at + 4] for at in range(16, end, 4))}
        return "AVIF" if brands & _AVIF else "HEIC" if brands & _HEIC else None
    return None


def resize(image: Image.Image, spec: ModelSpec) -> UInt8Array:
    """Resize an image to the model's square input.

    Args:
        image: PIL image of mode RGB, or L: grey is resized once, not in three equal channels.
        spec: Gives ``input_size`` and the filter.

    Returns:
        uint8 array (input_size, input_size, 3), RGB, 0 to 255.
    """
    side = (spec.input_size, spec.input_size)
    if image.size != side:
        # Pillow's filters are antialiased when they shrink, as the published evaluation's are.
        image = image.resize(side, _FILTERS[spec.resize])
    return np.array(_to_rgb(image), dtype=np.uint8)  # (S, S, 3)


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
    return resize(_load(source), spec)


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


def _load(source: ImageSource) -> Image.Image:
    """As :func:`load_image`, of mode RGB or, where the picture is grey, L."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _flat(source, "PIL image")
    if isinstance(source, (bytes, bytearray)):
        return _decode(bytes(source), "image bytes")
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        if _ADDRESS.match(name) and not os.path.exists(name):
            fix = "download or decode it, and give a file's path or the bytes"
            raise ImageError(name, "an image file", "an address", fix)
        return _decode(_read(Path(name)), str(source))
    if hasattr(source, "read"):
        opened = getattr(source, "name", None)  # a number where it was opened by descriptor
        name = opened if isinstance(opened, str) else "image file"
        return _decode(_read_file(source, name), name)
    expected = "a path, bytes, a file, a PIL image or a uint8 array"
    fix = "convert it to one of these, e.g. numpy.asarray(image)"
    raise ImageError("image", expected, type(source).__name__, fix)


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


def _read_file(file: IO[bytes], name: str) -> bytes:
    """What an open file holds, from its start where it can be wound back, as Pillow reads it."""
    expected = "a file opened for reading bytes"
    fix = 'open it with mode "rb", and label it before it is closed'
    parts, count = [], 0
    try:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        while part := file.read(1 << 20):  # a pipe or socket gives less than it is asked for
            if not isinstance(part, (bytes, bytearray)):
                raise ImageError(name, expected, f"one that gives {type(part).__name__}", fix)
            parts.append(part)
            count += len(part)
            _check_bytes(count, name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ImageError(name, expected, words_of(error), fix) from None
    return b"".join(parts)


def _check_bytes(count: int, name: str) -> None:
    if count > MAX_BYTES:
        raise _too_large(name, f"{MAX_BYTES // 1_000_000} MB", f"{count // 1_000_000} MB")


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(name, "an image", "an empty file", "copy the file again")
    _check_bytes(len(data), name)
    try:
        image = _open(data, name)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name, MOST_PIXELS, "more") from None
    except UnidentifiedImageError:  # whose words are an address in memory
        raise _damaged(name, ValueError("nothing that its decoder knows")) from None
    except Exception as error:  # noqa: BLE001 - decoders fail on foreign bytes in many ways
        raise _damaged(name, error) from None
    _check_scans(data, image.size, name)
    if getattr(image, "tag_v2", {}).get(_SUBFILE, 0) == _REDUCED:  # DNG, NEF and others
        found, fix = "a raw photograph's preview", "export it as JPEG with the camera's program"
        raise ImageError(name, "a picture", found, fix)
    deep = _is_deep_colour(image, data)
    flat = _flat(image, name)
    if deep and np.asarray(flat).max() < 16:
        # Pillow has kept the upper 8 bits, and there is nothing in them.
        found = "values below 4096, of 12 bits or fewer"
        raise ImageError(name, "colour that fills its 16 bits", found, _SCALE_IT)
    return flat


def _is_deep_colour(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24:26] in (b"\x10\x02", b"\x10\x06")  # bits; RGB, or RGBA
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    return tuple(bits[:3]) == (16, 16, 16)


def _open(data: bytes, name: str) -> Image.Image:
    """The picture, not decoded yet; AVIF and HEIC come last, since few pictures are of them."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        kind = picture_kind(data[:64])
    found, fix = "another kind of file", "convert it to JPEG or PNG"
    if kind == "AVIF":
        if _import("PIL._avif"):
            return Image.open(io.BytesIO(data), formats=("AVIF",))
        found, fix = "AVIF", "pip install 'pillow>=11.3', or convert it to JPEG"
    elif kind == "HEIC":
        if heif := _import("pillow_heif"):
            heif.register_heif_opener()
            return Image.open(io.BytesIO(data), formats=("HEIF",))
        found, fix = "HEIC", "pip install pillow-heif, or convert it to JPEG"
    elif kind is None and _VIDEO.match(data):
        found, fix = "a video", "name it as one, e.g. .mp4, or open it by open_video()"
    elif kind is not None:
        found, fix = f"a {kind} file that Pillow cannot read", "copy it again, or convert it to PNG"
    raise ImageError(name, "an image in " + ", ".join(FORMATS), found, fix)


def _import(module: str) -> Any:
    """A decoder that not every Python has, or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _check_scans(data: bytes, size: tuple[int, int], name: str) -> None:
    """Refuse a JPEG that is meant to keep us busy; the marker cannot occur in compressed data."""
    most = _MAX_SCANS_OF_PIXELS // max(size[0] * size[1], 1)
    if not data.startswith(_JPEG) or len(data) // 2 <= most:
        return
    # From even places and from odd ones: bytes.count takes a twentieth of the decoder's time.
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    scans = sum(int(np.count_nonzero(own == _JPEG_SCAN)) for own in pairs)
    if scans > most:
        found = f"{scans} of {size[0]}x{size[1]} pixels"
        raise ImageError(name, "a JPEG of some ten scans", found, "encode it again")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _flat(image: Image.Image, name: str) -> Image.Image:
    """A decoded picture, upright, of mode RGB or L."""
    _check_size(image.size, name)
    try:
        image.load()
        flat, turn = _convert(image, name), _turn(image)
        if turn is None:
            return flat
        turned = flat.transpose(turn)
        turned.info = {}  # it still names the orientation, and the picture would be turned again
        return turned
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders fail on foreign bytes in many ways
        file = getattr(image, "fp", None)
        waiting = getattr(image, "tile", ()) and (file is None or file.closed)
        if waiting or "closed image" in str(error):
            fix = "label it before it is closed, or call its load() first"
            raise ImageError(name, "an open image", "a closed one", fix) from None
        raise _damaged(name, error) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What undoes the EXIF orientation; a picture whose EXIF is damaged is taken as it lies."""
    try:
        return _TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # noqa: BLE001 - Pillow's EXIF reader fails on foreign bytes in many ways
        return None


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Any mode of Pillow's to RGB, or L where it is grey."""
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not image.has_transparency_data and not profile:
        return image
    if image.mode.startswith("I"):  # "I;16", "I;16B" and, for some 16-bit PNG files, "I"
        flat = _from_16_bit(image, name)
    elif image.mode in ("F", "LAB"):
        found = "floating-point pixels" if image.mode == "F" else "CIE Lab"
        raise ImageError(name, "grey, RGB or CMYK of 8 or 16 bits", found, _SCALE_IT)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*_ALPHA_BACKGROUND, 255))
        grey = image.mode in ("1", "L", "LA")
        flat = Image.alpha_composite(background, rgba).convert("L" if grey else "RGB")
    elif image.mode == "CMYK":
        flat = _as_ink(image, name)
    else:
        flat = image if image.mode in ("L", "RGB") else image.convert("RGB")
    return to_srgb(flat, profile) if profile else flat


def _as_ink(image: Image.Image, name: str) -> Image.Image:
    """A CMYK picture whose zero is no ink; Pillow takes every JPEG for one of Adobe's, inverted."""
    if image.format != "JPEG" or "adobe" in image.info:
        return image
    black = float(np.asarray(image.getchannel("K")).mean())
    if black > 255 - _LITTLE_BLACK:
        return image.point(lambda ink: 255 - ink)
    if black > _LITTLE_BLACK:
        expected, found = "a CMYK JPEG that says whether it is inverted", "one that may be either"
        raise ImageError(name, expected, found, "convert it to RGB with the program that made it")
    return image


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey to mode L; also what a TIFF says of itself and Pillow does not heed."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ImageError(name, "16-bit values, 0 to 65535", f"{low} to {high}", _SCALE_IT)
    tags = getattr(image, "tag_v2", {})
    says_12 = 12 in np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 16))
    largest = 4095 if says_12 else next(limit for limit in _RANGES_OF_GREY if high <= limit)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = largest - values
    return Image.fromarray((values / (largest / 255) + 0.5).astype(np.uint8))


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    name, shape = "image array", array.shape
    if array.dtype != np.uint8:
        fix = "convert it, e.g. (array * 255).round().astype('uint8') for values in [0, 1]"
        raise ImageError(name, "dtype uint8, 0 to 255", f"dtype {array.dtype}", fix)
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    grey = array.ndim == 2
    if not grey and not (array.ndim == 3 and shape[2] == 3):
        expected = "shape (H, W, 3) in RGB order, (H, W) or (H, W, 1)"
        fix = "drop the alpha channel, or pass single images rather than a batch"
        raise ImageError(name, expected, f"shape {shape}", fix)
    if 0 in shape:
        fix = "check the crop that made it"
        raise ImageError(name, "at least one pixel", f"shape {shape}", fix)
    _check_size((shape[1], shape[0]), name)
    return Image.fromarray(np.ascontiguousarray(array))  # a copy in RGB, a view in grey


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(name, "at least one pixel", f"{width}x{height}", "check the image")
    if width * height > MAX_PIXELS:
        raise _too_large(name, MOST_PIXELS, f"{width}x{height}")


def _too_large(name: str, most: str, found: str) -> ImageError:
    return ImageError(name, f"at most {most}", found, "shrink it first, or crop the face")


def _damaged(name: str, error: Exception) -> ImageError:
    found = f"a damaged one ({words_of(error, 120)})"
    return ImageError(name, "a complete image", found, "copy or encode the file again")
