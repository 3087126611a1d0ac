"""What an artifact is compared with: images, and PyTorch's logits for them."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import atomic_path, why_not_a_file
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, resize
from efficientface_deploy.workbench.dataset import iterate_batches, read_dataset
from efficientface_deploy.workbench.evaluation import check_labels, labels_of, none_of

REFERENCE_FILE = "verify.npz"
STORED_IMAGES = 16

_MAX_BYTES = 1 << 28  # unpacked; sixteen pictures of 1024 pixels are 50 MB

_COPY_REFERENCE = f"copy the {REFERENCE_FILE} that was exported with it"
_SHEET = Path(__file__).parent / "reference_faces.png"
_SHEET_ROWS, _SHEET_COLUMNS = 4, 4


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Images that artifacts are verified on.

    Attributes:
        images: uint8 (N, S, S, 3), RGB.
        labels: int64 (N,), or None where nobody knows them.
        source: Where they come from.
        features: The reference's for them, float32 (N, F); None where they are not compared.
    """

    images: UInt8Array
    labels: npt.NDArray[np.int64] | None
    source: str
    features: Float32Array | None = None

    __test__ = False  # the name begins like a test's


def load_test_set(root: Path | None, spec: ModelSpec, preset: str | None = None) -> TestSet:
    """Images to verify on: a data set's evaluation split, or 16 faces that ship with the tool.

    Args:
        root: A prepared data set, or None.
        spec: The model's.
        preset: What numbered folders mean, for a data set that does not say.

    Raises:
        DatasetError: The data set is unusable, or its labels are not the model's.
    """
    if root is None:
        return TestSet(_bundled_faces(spec), None, "16 synthetic faces")
    dataset = read_dataset(root, preset)
    check_labels(spec, dataset)
    split = dataset.evaluation_split()
    samples = dataset.split(split)
    images = np.concatenate([batch for batch, _ in iterate_batches(samples, spec, 256)])
    labels = labels_of(samples)
    empty = none_of(np.bincount(labels, minlength=len(dataset.labels)).tolist(), dataset.labels)
    source = f"{dataset.name}, {split}, {len(images):,} images{empty}"
    return TestSet(images, labels, source)


def _bundled_faces(spec: ModelSpec) -> UInt8Array:
    return np.stack([resize(face, spec) for face in sheet_faces()])


def sheet_faces() -> list[Image.Image]:
    """The sixteen faces of the sheet (``training.datasets.face_renderer``)."""
    sheet = Image.open(_SHEET).convert("RGB")
    width, height = sheet.width // _SHEET_COLUMNS, sheet.height // _SHEET_ROWS
    return [
        sheet.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for y in range(_SHEET_ROWS)
        for x in range(_SHEET_COLUMNS)
    ]


def write_reference(folder: Path, test_set: TestSet, logits: Float32Array, parent: str) -> None:
    """Write ``verify.npz``: a few images and PyTorch's logits, to verify again on the device.

    Args:
        folder: Where the artifacts are.
        test_set: Some of its images, evenly spread, are kept.
        logits: float32 (N, C), PyTorch's.
        parent: SHA-256 of the weights that made the logits.
    """
    count, total = min(STORED_IMAGES, len(logits)), len(logits)
    kept = np.linspace(0, total - 1, count).round().astype(int)  # sets are sorted by class
    source = test_set.source if count == total else f"{count} of {test_set.source}"
    buffer = io.BytesIO()
    arrays = {"images": test_set.images[kept], "logits": logits[kept]}
    if test_set.features is not None:
        arrays["features"] = test_set.features[kept]
    np.savez_compressed(buffer, source=source, parent=parent, **arrays)
    with atomic_path(folder / REFERENCE_FILE) as temporary:
        temporary.write_bytes(buffer.getvalue())


def stored_parent(folder: Path) -> str | None:
    """SHA-256 of the weights that ``verify.npz`` is of; None when there is no usable one."""
    try:
        return _read_archive(folder / REFERENCE_FILE)[1]
    except ArtifactError:
        return None


def read_reference(
    folder: Path, spec: ModelSpec, parent: str | None
) -> tuple[TestSet, Float32Array]:
    """Read ``verify.npz``.

    Args:
        folder: Where the artifact is.
        spec: The artifact's.
        parent: SHA-256 of the weights that the artifact descends from, if it says so.

    Raises:
        ArtifactError: The file is missing, damaged, or of another model.
    """
    path = folder / REFERENCE_FILE
    arrays, own_parent = _read_archive(path)
    if parent is not None and parent != own_parent:
        wanted = f"reference outputs of the weights {parent[:12]}..."
        raise ArtifactError(path, wanted, f"those of {own_parent[:12]}...", _COPY_REFERENCE)
    wanted = _shapes((spec.input_size, spec.input_size, 3), spec.num_classes)
    found = _shapes(arrays["images"].shape[1:], arrays["logits"].shape[1])
    if found != wanted:
        raise ArtifactError(path, wanted, found, _COPY_REFERENCE)
    test_set = TestSet(arrays["images"], None, str(arrays["source"]), arrays.get("features"))
    return test_set, arrays["logits"].astype(np.float32)


def _shapes(image: tuple[int, ...], logits: int) -> str:
    return f"images of shape {image} and {logits} logits"


def _read_archive(path: Path) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """The arrays of ``verify.npz``, and the hash of the weights that it is of."""
    expected = "reference outputs"
    if (reason := why_not_a_file(path)) is not None:
        raise ArtifactError(path, expected, reason, _COPY_REFERENCE)
    try:
        with zipfile.ZipFile(path) as archive:  # a small file may say that it holds gigabytes
            if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
                raise ValueError("too large")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "logits", "source", "parent")}
            if "features" in file.files:
                arrays["features"] = file["features"].astype(np.float32)
        images, logits = arrays["images"], arrays["logits"]
        features = arrays.get("features", logits)
        valid = (
            images.dtype == np.uint8
            and images.ndim == 4
            and logits.ndim == 2
            and logits.dtype.kind == "f"
            and len(logits) == len(images) > 0
            and (features.ndim, len(features)) == (2, len(images))
        )
    except Exception:  # noqa: BLE001 - numpy fails on damaged archives in many ways
        valid = False
    if not valid:
        raise ArtifactError(path, expected, "a damaged file", _COPY_REFERENCE)
    return arrays, str(arrays["parent"])
