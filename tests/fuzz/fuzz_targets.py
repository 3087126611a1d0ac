"""What is fuzzed: bytes of others on their way into the runtime.

Each target takes any bytes and returns when they were used or refused with an error of ours, one
printable line. Whatever else comes out is a finding. ``fuzz.py`` lets atheris choose the bytes;
``test_fuzz_targets.py`` runs the seeds and a few damaged ones in the normal suite.

What torch reads of a checkpoint is not here (see ``tests/efficientface_deploy/models``), nor what
TensorRT makes of a plan.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from efficientface_deploy import load
from efficientface_deploy.artifact import (
    PROVENANCE_KEY,
    SPEC_KEY,
    provenance_from_metadata,
    read_safetensors_metadata,
    read_sidecar,
    sidecar_path,
    spec_from_metadata,
    write_sidecar,
)
from efficientface_deploy.backends.tensorrt.backend import EngineRecord
from efficientface_deploy.errors import EfficientFaceError
from efficientface_deploy.files import file_hash
from efficientface_deploy.spec import PRESETS, ModelSpec
from efficientface_deploy.vision.preprocess import to_model_input

SPEC = PRESETS["rafdb"].replace(input_size=32, name="fuzz")
PLAN = b"plan"
MAX_LENGTH = 4096  # holds every seed; longer inputs are slower and find little more

_TEMPORARY = tempfile.TemporaryDirectory(prefix="efficientface-fuzz-")  # goes with the process
_FOLDER = Path(_TEMPORARY.name)


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    """Let what is refused properly pass."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about tags that it does not know
            yield
    except EfficientFaceError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1500, message


def image(data: bytes) -> None:
    """An image file's bytes, to the model's input."""
    with only_our_errors():
        array = to_model_input(data, SPEC)
        assert array.shape == (32, 32, 3) and array.dtype == np.uint8


def onnx(data: bytes) -> None:
    """An ONNX file's bytes, to a label."""
    path = _FOLDER / "model.onnx"
    path.write_bytes(data)
    with only_our_errors(), load(path, threads=1) as predictor:
        side = predictor.spec.input_size
        prediction = predictor(np.zeros((side, side, 3), np.uint8))
        assert list(prediction.probabilities) == list(predictor.spec.labels)
        assert np.isfinite(list(prediction.probabilities.values())).all()


def safetensors(data: bytes) -> None:
    """A safetensors file's bytes, to its spec and provenance."""
    path = _FOLDER / "model.safetensors"
    path.write_bytes(data)
    with only_our_errors():
        use_safetensors(path)


def use_safetensors(path: Path) -> None:
    """What is read of a safetensors file without its tensors."""
    metadata = read_safetensors_metadata(path)
    provenance_from_metadata(metadata, path)
    check_spec(spec_from_metadata(metadata, path))


def sidecar(data: bytes) -> None:
    """The bytes beside an engine, to its spec and record."""
    path = _FOLDER / "model.engine"
    path.write_bytes(PLAN)
    sidecar_path(path).write_bytes(data)
    with only_our_errors():
        use_sidecar(path)


def use_sidecar(path: Path) -> None:
    """What is read beside an engine before it is loaded."""
    spec, provenance, _ = read_sidecar(path)
    check_spec(spec)
    record = EngineRecord.from_provenance(provenance, path)
    record.covers("sm86")
    record.runs_with("10.3.0")


def check_spec(spec: ModelSpec) -> None:
    """What is taken can be written, and read again."""
    assert ModelSpec.from_json(spec.to_json()) == spec


TARGETS: dict[str, Callable[[bytes], None]] = {
    "image": image,
    "onnx": onnx,
    "safetensors": safetensors,
    "sidecar": sidecar,
}


def seeds(target: str) -> list[bytes]:
    """Small valid inputs of a target, one of each kind."""
    makers = {
        "image": _images,
        "onnx": _models,
        "safetensors": _checkpoints,
        "sidecar": _sidecars,
    }
    return makers[target]()


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


def _images() -> list[bytes]:
    row, column = np.mgrid[0:12, 0:10]
    pixels = np.stack([row * 20, column * 25, row * column], axis=-1).astype(np.uint8)
    colour = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [colour.rotate(180)]}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ink = _encode(colour.convert("CMYK"), "JPEG")
    marker = ink.index(b"Adobe") - 4
    return [
        _encode(colour, "JPEG", icc_profile=profile),
        ink[:marker] + ink[marker + 16 :],
        _encode(colour, "JPEG"),
        _encode(colour, "JPEG", progressive=True, exif=exif),
        ink,
        _encode(colour, "PNG", exif=exif),
        _encode(colour.convert("RGBA"), "PNG"),
        _encode(colour.convert("LA"), "PNG"),
        _encode(colour.convert("P"), "PNG", transparency=b"\x00\x80\xff"),
        _encode(colour.convert("1"), "PNG"),
        _encode(deep, "PNG"),
        _encode(colour, "PNG", **frames),
        _encode(colour, "WEBP"),
        _encode(colour.convert("RGBA"), "WEBP", lossless=True),
        _encode(colour, "WEBP", **frames),
        _encode(colour, "GIF", **frames),
        _encode(colour, "BMP"),
        _encode(colour.convert("P"), "BMP"),
        _encode(colour, "TIFF", exif=exif),
        _encode(colour, "TIFF", compression="tiff_lzw"),
        _encode(colour, "TIFF", compression="tiff_adobe_deflate"),
        _encode(colour.convert("1"), "TIFF", compression="group4"),
        _encode(deep, "TIFF"),
        _encode(Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF"),
    ]


def _encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _models() -> list[bytes]:
    """A graph that takes the mean of each channel; with and without provenance.

    The last one says "location", so that the search for other files goes through it.
    """
    from onnx import TensorProto, helper, numpy_helper

    classes = SPEC.num_classes
    weight = np.linspace(-0.02, 0.02, 3 * classes, dtype=np.float32).reshape(3, classes)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", classes])
        for name in ("logits", "probabilities")
    ]
    picture = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 32, 32, 3])
    weights = [numpy_helper.from_array(weight, "weight")]
    graph = helper.make_graph(nodes, "means", [picture], outputs, weights)
    found = []
    for provenance in ({}, {PROVENANCE_KEY: json.dumps({"precision": "int8", "target": "cpu"})}):
        opsets = [helper.make_opsetid("", 13)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        helper.set_model_props(model, {SPEC_KEY: SPEC.to_json(), **provenance})
        found.append(model.SerializeToString())
    model.graph.doc_string = "location"
    found.append(model.SerializeToString())
    return found


def _checkpoints() -> list[bytes]:
    metadata = {SPEC_KEY: SPEC.to_json(), PROVENANCE_KEY: json.dumps({"epoch": 3})}
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [{"__metadata__": metadata, "fc.weight": tensor}, {"fc.weight": tensor}]
    texts = [json.dumps(header).encode() for header in headers]
    return [len(text).to_bytes(8, "little") + text + bytes(8) for text in texts]


def _sidecars() -> list[bytes]:
    path = _FOLDER / "seed.engine"
    path.write_bytes(PLAN)
    record = {
        "sha256": file_hash(path),
        "library": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": ["sm86", "sm89+"],
        "parent": "model.onnx",
        "max_batch": 4,
    }
    return [write_sidecar(path, SPEC, {"precision": "fp16", "engine": record}).read_bytes()]
