"""What is exported: a checkpoint of PyTorch's, or an ONNX file of ours (then without torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

import efficientface_deploy as ef
from efficientface_deploy.artifact import file_hash, read_safetensors_metadata, spec_from_metadata
from efficientface_deploy.backends import missing_reason
from efficientface_deploy.errors import ArtifactError, BackendError, EfficientFaceError
from efficientface_deploy.predictor import BUNDLED_WEIGHTS
from efficientface_deploy.preprocess import Float32Array, UInt8Array
from efficientface_deploy.spec import ModelSpec

from .graph import read_onnx
from .verify import TestSet, read_reference, run_in_batches

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class Source:
    """A network to export.

    Attributes:
        path: The file.
        spec: Its spec.
        sha256: Of the file.
        weights: File name and SHA-256 of the checkpoint that it descends from.
        precision: ``fp32``, or what an ONNX file was exported as.
        target: ``cpu`` or ``gpu`` for an ONNX file, empty for a checkpoint.
        trace: Makes the graph; takes whether the input is float.
        reference: Makes the logits that artifacts are compared with: float32 (N, C) of images
            uint8 (N, S, S, 3); None when nothing here can run the network.
    """

    path: Path
    spec: ModelSpec
    sha256: str
    weights: dict[str, str]
    precision: str
    target: str
    trace: Callable[[bool], onnx.ModelProto]
    reference: Callable[[UInt8Array], Float32Array] | None

    def reference_on(self, test_set: TestSet) -> tuple[TestSet, Float32Array]:
        """The test set and the reference's logits on it.

        Where nothing can run the network (on a device without ONNX Runtime), the images and
        logits that were stored beside an ONNX file take the place of the test set.
        """
        if self.reference is not None:
            return test_set, self.reference(test_set.images)
        return read_reference(self.path.parent, self.weights["sha256"])


def open_source(weights: Path | None, preset: str | None) -> Source:
    """Find and open what is to be exported.

    Args:
        weights: ``*.safetensors``, ``*.pth.tar`` or ``*.onnx``; None takes the newest student
            under ``runs/``, else the bundled weights.
        preset: What a published checkpoint was trained on.

    Raises:
        EfficientFaceError: The file is unusable, or it is a checkpoint and torch is missing.
    """
    path = weights if weights is not None else default_weights()
    return _open_onnx(path) if path.suffix == ".onnx" else _open_checkpoint(path, preset)


def default_weights(runs: Path = RUNS) -> Path:
    """The newest student under ``runs/``, by the architecture in its spec; else the bundled one."""
    students = [path for path in runs.rglob("*.safetensors") if _is_student(path)]
    return max(students, key=lambda path: path.stat().st_mtime_ns, default=BUNDLED_WEIGHTS)


def _is_student(path: Path) -> bool:
    try:
        spec = spec_from_metadata(read_safetensors_metadata(path), path)
    except EfficientFaceError:
        return False
    return spec.architecture == "efficientface"


def _open_checkpoint(path: Path, preset: str | None) -> Source:
    if reason := missing_reason("torch"):
        raise BackendError(
            path,
            expected="PyTorch, to export a checkpoint",
            found=reason,
            fix="pip install 'efficientface-deploy[export,cpu]', or give an ONNX file of ours as "
            "--weights",
        )
    import torch

    from efficientface_deploy.models import load_checkpoint
    from efficientface_deploy.preprocess import normalise

    from .trace import trace

    if path.suffix != ".safetensors" and path.is_file() and preset is None:
        raise ArtifactError(
            path,
            expected="--preset, since a published checkpoint does not say what its outputs mean",
            found="none",
            fix="add --preset rafdb, affectnet7, affectnet8, caers or ferplus",
        )
    model, spec = load_checkpoint(path, preset)

    def reference(images: UInt8Array) -> Float32Array:
        def infer(batch: UInt8Array) -> Float32Array:
            with torch.inference_mode():
                logits: Float32Array = model(torch.from_numpy(normalise(batch, spec))).numpy()
            return logits

        return run_in_batches(infer, images)

    sha256 = file_hash(path)
    return Source(
        path=path,
        spec=spec,
        sha256=sha256,
        weights={"file": path.name, "sha256": sha256},
        precision="fp32",
        target="",
        trace=lambda float_input: trace(model, spec, float_input=float_input),
        reference=reference,
    )


def _open_onnx(path: Path) -> Source:
    graph, spec, provenance = read_onnx(path)
    sha256 = file_hash(path)

    def reference(images: UInt8Array) -> Float32Array:
        with ef.load(path) as predictor:
            return run_in_batches(lambda batch: predictor.infer(batch)[0], images)

    return Source(
        path=path,
        spec=spec,
        sha256=sha256,
        weights=_recorded_weights(provenance, path, sha256),
        precision=str(provenance.get("precision", "fp32")),
        target=str(provenance.get("target", "")),
        trace=lambda float_input: graph,
        reference=reference if missing_reason("onnx") is None else None,
    )


def _recorded_weights(provenance: dict[str, Any], path: Path, sha256: str) -> dict[str, str]:
    """The checkpoint that an ONNX file names as its ancestor, else the file itself."""
    recorded = provenance.get("weights")
    if isinstance(recorded, dict) and isinstance(recorded.get("sha256"), str):
        return {"file": str(recorded.get("file", "")), "sha256": recorded["sha256"]}
    return {"file": path.name, "sha256": sha256}
