"""A model repository for NVIDIA Triton, from any exported file.

Three models. ``efficientface`` is the network: uint8 images in, logits and probabilities out.
``efficientface_preprocess`` decodes and resizes pictures by our own preprocessing, in Triton's
Python backend. ``efficientface_picture`` is the ensemble of the two: bytes of image files in. In an
ensemble the network's requests of both kinds meet in one queue, so that batches are formed of them
all, and pictures are decoded by as many processes as are asked for, whatever the network runs on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import (
    CHECKPOINT_SUFFIXES,
    ENGINE_SUFFIX,
    FEATURES,
    FLOAT_INPUT,
    ONNX_SUFFIX,
    OUTPUTS,
    PROBE_KEY,
    PROVENANCE_KEY,
    RTX_ENGINE_SUFFIX,
    SPEC_KEY,
    UINT8_INPUT,
    provenance_from_metadata,
    read_onnx_input,
    read_onnx_metadata,
    read_onnx_outputs,
    read_sidecar,
    sidecar_path,
    spec_from_metadata,
)
from efficientface_deploy.command import interrupts_wait
from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.files import require_file
from efficientface_deploy.predictor import model_file
from efficientface_deploy.serving import FILE_KEY, PICTURE
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.workspace import open_workspace
from efficientface_export.tensorrt.options import EngineOptions

NETWORK, PREPROCESS, ENSEMBLE = MODELS = (
    "efficientface",
    "efficientface_preprocess",
    "efficientface_picture",
)
LABELS = "labels.txt"
CONFIG = "config.pbtxt"

QUEUE_DELAY = 1000
"""Microseconds that a request waits for others to share its batch."""

FEATURE_SIZES = {"efficientface": 1024, "resnet18": 512, "resnet29": 256, "resnet50": 2048}
"""What the last layer is given, by the spec's architecture."""


class Symbol(str):
    """A value of an enumeration, which text format writes without quotation marks."""


UINT8, FP32, STRING = map(Symbol, ("TYPE_UINT8", "TYPE_FP32", "TYPE_STRING"))
KINDS = {"cpu": Symbol("KIND_CPU"), "gpu": Symbol("KIND_GPU")}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file, as a repository needs to know it.

    Attributes:
        path: Where it is.
        backend: Triton's that runs it: ``onnxruntime``, ``tensorrt``, or ``python`` with our own
            runtime, where the other two cannot.
        filename: Its name in the repository.
        metadata: Spec, provenance and probe as an ONNX file holds them.
        spec: The spec.
        provenance: How it was made.
        features: Whether it has that output, too.
    """

    path: Path
    backend: str
    filename: str
    metadata: Mapping[str, str]
    spec: ModelSpec
    provenance: Mapping[str, Any]
    features: bool

    @property
    def target(self) -> str:
        """``cpu`` or ``gpu``, what it was made for."""
        if self.path.name.endswith(ENGINE_SUFFIX):
            return "gpu"
        return "gpu" if self.provenance.get("target") == "gpu" else "cpu"

    @property
    def profile(self) -> int | None:
        """The largest batch that an engine was built for; None where there is no limit."""
        size = self.provenance.get("engine", {}).get("max_batch")
        return size if type(size) is int else None


def read_artifact(path: Path) -> Artifact:
    """Read what a file says of itself, and choose what runs it.

    Raises:
        ArtifactError: It is not an exported file of ours, or takes floats.
    """
    require_file(path, "an exported file")
    if path.name.endswith(ENGINE_SUFFIX):
        spec, made, probe = read_sidecar(path)
        rtx = path.name.endswith(RTX_ENGINE_SUFFIX)
        metadata = {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: json.dumps(made)}
        if probe is not None:
            metadata[PROBE_KEY] = json.dumps(probe)
        # Triton has no backend for TensorRT for RTX.
        backend = "python" if rtx else "tensorrt"
        name = f"model{RTX_ENGINE_SUFFIX}" if rtx else "model.plan"
        features = made.get("features") is True
        return Artifact(path, backend, name, metadata, spec, made, features)
    if path.name.endswith(CHECKPOINT_SUFFIXES):
        fix = f"export it first: efficientface-export --engine onnx --weights {path}"
        raise ArtifactError(path, "an exported file", "a checkpoint", fix)
    metadata = read_onnx_metadata(path)
    spec, made = spec_from_metadata(metadata, path), provenance_from_metadata(metadata, path)
    if read_onnx_input(path) == FLOAT_INPUT:
        fix = "export it again without --float-input"
        raise ArtifactError(path, f"the input {UINT8_INPUT}, uint8", "one that takes floats", fix)
    # These need two of ONNX Runtime's optimisations turned off, for which Triton has no setting.
    unsafe = (made.get("precision"), made.get("target")) == ("int8", "gpu")
    kept = {key: metadata[key] for key in (SPEC_KEY, PROVENANCE_KEY, PROBE_KEY) if key in metadata}
    backend = "python" if unsafe else "onnxruntime"
    features = FEATURES in read_onnx_outputs(path)
    return Artifact(path, backend, f"model{ONNX_SUFFIX}", kept, spec, made, features)


def triton_command(
    out: Path, path: Path | None, target: str | None, max_batch: int | None, overwrite: bool
) -> int:
    """Write a repository, and say how it is served.

    Args:
        out: Its folder.
        path: The exported file; None and ``accurate`` take a bundled model.
        target: ``cpu`` or ``gpu``, where the network runs; None goes by the file.
        max_batch: Largest batch; None takes an engine's own, else 32.
        overwrite: Whether to replace a repository of ours that is there.

    Returns:
        0.

    Raises:
        EfficientFaceError: The file cannot be served so, or something is in the way.
    """
    artifact = read_artifact(model_file(path, "onnx"))
    write_repository(out, artifact, target=target, max_batch=max_batch, overwrite=overwrite)
    print(f"wrote {out}: {', '.join(MODELS)}, from {artifact.path}")
    print(f"  {NETWORK} runs in Triton's backend {artifact.backend}")
    if artifact.backend == "tensorrt":
        made = artifact.provenance.get("engine", {})
        print(f"  take an image of Triton with TensorRT {made.get('version', '(unknown)')}")
    print(f"  tritonserver --model-repository {out}")
    print(f'  efficientface_deploy.load("triton://localhost:8000/{NETWORK}")')
    return 0


def write_repository(
    out: Path,
    artifact: Artifact,
    *,
    target: str | None = None,
    max_batch: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the three models, all or none.

    Args:
        out: The repository's folder; models of others in it stay as they are.
        artifact: The file.
        target: As for :func:`triton_command`, as the others.
        max_batch: Largest batch.
        overwrite: Whether to replace our models that are there.

    Raises:
        ConfigError: Models are there, an engine was built for other batches or cannot run on a
            CPU, or the folder cannot be written.
    """
    target, size = _choose_target(artifact, target), _choose_batch(artifact, max_batch)
    present = [name for name in MODELS if (out / name).exists()]
    if present and not overwrite:
        found = f"{', '.join(present)} of an earlier export"
        fix = "add --overwrite, or choose another --triton"
        raise ConfigError(out, "no model of these names yet", found, fix)
    with open_workspace(out, "triton", "--triton") as work:
        _write_network(work.scratch / NETWORK, artifact, target, size)
        _write_preprocess(work.scratch / PREPROCESS, artifact, size)
        _write_ensemble(work.scratch / ENSEMBLE, artifact, size)
        with interrupts_wait():
            for name in present:  # a folder cannot take the place of one that is not empty
                os.replace(out / name, work.scratch / f".old-{name}")
            for name in MODELS:
                os.replace(work.scratch / name, out / name)


def _choose_target(artifact: Artifact, asked: str | None) -> str:
    if asked == "cpu" and artifact.path.name.endswith(ENGINE_SUFFIX):
        fix = "leave --target out, or serve an ONNX file"
        raise ConfigError("--target cpu", "gpu with an engine", artifact.path.name, fix)
    return asked or artifact.target


def _choose_batch(artifact: Artifact, asked: int | None) -> int:
    profile = artifact.profile
    if asked is not None and profile not in (None, asked):
        expected = f"{profile}, which is the largest batch of {artifact.path.name}"
        fix = f"leave it out, or build the engine again with --max-batch {asked}"
        raise ConfigError("--max-batch", expected, str(asked), fix)
    return asked or profile or EngineOptions.max_batch


# ---- the models


def _write_network(folder: Path, artifact: Artifact, target: str, max_batch: int) -> None:
    spec = artifact.spec
    config = _head(NETWORK, max_batch) | {
        "backend": artifact.backend,
        "input": [_image(spec)],
        "output": _outputs(artifact, LABELS),
        "dynamic_batching": {
            "preferred_batch_size": _preferred(max_batch),
            "max_queue_delay_microseconds": QUEUE_DELAY,
        },
        "instance_group": [{"count": 1, "kind": KINDS[target]}],
        # The first batch of a size makes a GPU's libraries choose their kernels.
        "model_warmup": [_warm_up(size, spec) for size in sorted({1, max_batch})],
        "parameters": _parameters(artifact.metadata),
    }
    if artifact.backend == "python":
        config["parameters"] += _parameters({FILE_KEY: artifact.filename})
    else:
        config["default_model_filename"] = artifact.filename
    if artifact.backend == "onnxruntime" and target == "gpu":
        # By itself the CUDA provider times every algorithm anew for each size of batch.
        config["parameters"] += _parameters({"cudnn_conv_algo_search": "1"})
    _write_model(folder, config, "RuntimeModel" if artifact.backend == "python" else None)
    (folder / LABELS).write_text("\n".join(spec.labels) + "\n", encoding="utf-8")
    file = folder / "1" / artifact.filename
    shutil.copyfile(artifact.path, file)
    if artifact.path.name.endswith(ENGINE_SUFFIX):
        # Our runtime needs it; Triton's own backend does not, but it says what the plan is.
        shutil.copyfile(sidecar_path(artifact.path), sidecar_path(file))


def _write_preprocess(folder: Path, artifact: Artifact, max_batch: int) -> None:
    config = _head(PREPROCESS, max_batch) | {
        "backend": "python",
        "input": [_picture()],
        "output": [_image(artifact.spec)],
        "instance_group": [{"count": 2, "kind": KINDS["cpu"]}],  # each is a process
        "parameters": _parameters({SPEC_KEY: artifact.spec.to_json()}),
    }
    _write_model(folder, config, "PreprocessModel")


def _write_ensemble(folder: Path, artifact: Artifact, max_batch: int) -> None:
    outputs = _outputs(artifact, "")
    names = [output["name"] for output in outputs]
    config = _head(ENSEMBLE, max_batch) | {
        "platform": "ensemble",
        "input": [_picture()],
        "output": outputs,
        "ensemble_scheduling": {
            "step": [
                _step(PREPROCESS, [PICTURE], [UINT8_INPUT]),
                _step(NETWORK, [UINT8_INPUT], names),
            ]
        },
    }
    _write_model(folder, config)


def _write_model(folder: Path, config: Mapping[str, Any], python: str | None = None) -> None:
    (folder / "1").mkdir(parents=True)  # the version; an ensemble's is empty
    (folder / CONFIG).write_text(text_format(config), encoding="utf-8")
    if python is not None:
        code = f"from efficientface_deploy.serving import {python} as TritonPythonModel\n"
        (folder / "1" / "model.py").write_text(code + '\n__all__ = ["TritonPythonModel"]\n')


def _head(name: str, max_batch: int) -> dict[str, Any]:
    newest = {"latest": {"num_versions": 1}}
    return {"name": name, "max_batch_size": max_batch, "version_policy": newest}


def _image(spec: ModelSpec) -> dict[str, Any]:
    side = spec.input_size
    return {"name": UINT8_INPUT, "data_type": UINT8, "dims": [side, side, 3]}


def _picture() -> dict[str, Any]:
    return {"name": PICTURE, "data_type": STRING, "dims": [1]}


def _outputs(artifact: Artifact, labels: str) -> list[dict[str, Any]]:
    """Of the network, or of the ensemble, which takes the network's labels."""
    sizes = dict.fromkeys(OUTPUTS, artifact.spec.num_classes)
    if artifact.features:
        sizes[FEATURES] = FEATURE_SIZES[artifact.spec.architecture]
    outputs = [{"name": name, "data_type": FP32, "dims": [size]} for name, size in sizes.items()]
    if labels:
        outputs[1]["label_filename"] = labels
    return outputs


def _preferred(max_batch: int) -> list[int]:
    """Sizes that are sent off at once: the powers of two from 4, and the largest."""
    return sorted({size for size in (4, 8, 16, 32, 64) if size < max_batch} | {max_batch})


def _warm_up(size: int, spec: ModelSpec) -> dict[str, Any]:
    side = spec.input_size
    value = {"data_type": UINT8, "dims": [side, side, 3], "zero_data": True}
    inputs = [{"key": UINT8_INPUT, "value": value}]
    return {"name": f"batch of {size}", "batch_size": size, "inputs": inputs}


def _step(model: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    maps = {"input_map": inputs, "output_map": outputs}
    same = {field: [{"key": name, "value": name} for name in maps[field]] for field in maps}
    return {"model_name": model, "model_version": -1, **same}


def _parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": text}} for key, text in values.items()]


# ---- protobuf's text format


def text_format(message: Mapping[str, Any], indent: str = "") -> str:
    """A message as protobuf's text format; a list is a repeated field, or a map of its entries."""
    lines = []
    for name, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{text_format(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) and type(value) is str else str(value)


def _quoted(text: str) -> str:
    """Bytes that are not plain ASCII as octal escapes, which every parser reads alike."""
    plain = set(range(32, 127)) - set(b'"\\')
    return '"' + "".join(chr(x) if x in plain else f"\\{x:03o}" for x in text.encode()) + '"'
