"""What is exported: a checkpoint of PyTorch's, or an ONNX file of ours (then without torch)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

import efficientface_deploy as ef
from efficientface_deploy.artifact import (
    CHECKPOINT_SUFFIXES,
    ENGINE_SUFFIX,
    FEATURES,
    ONNX_SUFFIX,
    WEIGHTS_SUFFIX,
    check_preset,
    describe_file,
    read_safetensors_metadata,
    require_preset,
    spec_from_metadata,
)
from efficientface_deploy.backends import missing_reason
from efficientface_deploy.backends.base import broken_package
from efficientface_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    EfficientFaceError,
    install_command,
)
from efficientface_deploy.files import file_hash, find_files
from efficientface_deploy.predictor import BUNDLED_ONNX, BUNDLED_WEIGHTS, model_file
from efficientface_deploy.probe import Probe
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.workbench.evaluation import Infer, run_in_batches
from efficientface_deploy.workbench.requirements import require_package
from efficientface_export.graph.channel_layout import PROFILES
from efficientface_export.graph.efficientface import deploy_graph
from efficientface_export.graph.io import read_onnx
from efficientface_export.graph.precision import require_precision
from efficientface_export.verification.parity import Verification, verify_artifact
from efficientface_export.verification.provenance import Provenance
from efficientface_export.verification.reference import (
    REFERENCE_FILE,
    TestSet,
    load_test_set,
    read_reference,
)

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class Source:
    """A network to export.

    Attributes:
        path: The file.
        spec: Its spec.
        sha256: Of the file.
        provenance: What an ONNX file says of its making; empty for a checkpoint.
        trained_size: Side of the input that the network was trained at, pixels.
        trace: The graph, not to be changed; takes whether the input is float.
        lay_out: The graph laid out anew; takes whether the input is float, and the profile's
            name. None where there is none: for an ONNX file, or an LDG.
        infer: Logits, float32 (N, C), of any number of images uint8 (N, S, S, 3); None when
            nothing here can run the network.
        probe: What an ONNX file must give; None where it does not say, and for a checkpoint.
        features: As ``infer``, what the last layer is given, float32 (N, F); None where nothing
            here can run the network, and for an ONNX file without them.
    """

    path: Path
    spec: ModelSpec
    sha256: str
    provenance: Provenance
    trained_size: int
    trace: Callable[[bool], onnx.ModelProto]
    lay_out: Callable[[bool, str], onnx.ModelProto] | None
    infer: Infer | None
    probe: Probe | None = None
    features: Infer | None = None

    @property
    def gives_features(self) -> bool:
        """Whether it is an ONNX file with the output ``features``."""
        outputs = self.trace(False).graph.output if self.is_onnx else ()
        return any(value.name == FEATURES for value in outputs)

    @property
    def is_onnx(self) -> bool:
        """Whether it is an ONNX file rather than a checkpoint."""
        return self.path.suffix == ONNX_SUFFIX

    @property
    def precision(self) -> str:
        """``fp32``, or what an ONNX file was exported as."""
        return self.provenance.precision

    @property
    def target(self) -> str:
        """``cpu`` or ``gpu`` for an ONNX file, empty for a checkpoint."""
        return self.provenance.target

    @property
    def weights(self) -> dict[str, str]:
        """File name and SHA-256 of the checkpoint that it is or descends from."""
        return self.provenance.weights or {"file": self.path.name, "sha256": self.sha256}

    @property
    def size_note(self) -> str:
        """What to say of an input of another size than the network was trained at; else empty."""
        side, trained = self.spec.input_size, self.trained_size
        if side == trained:
            return ""
        return (
            f"trained at {trained}x{trained}, made for {side}x{side}, which may ruin its accuracy: "
            "score it with --val, for the comparison with PyTorch cannot tell"
        )

    def is_onnx_in(self, precision: str) -> bool:
        """Whether it is an ONNX file of this precision, which is then taken as it is."""
        return self.is_onnx and self.precision == precision

    def reference(
        self, val: Path | None, preset: str | None, *, features: bool = False
    ) -> tuple[TestSet, Float32Array]:
        """Images, and the logits on them that artifacts are compared with.

        They come from the FP32 network where it can be run. For an ONNX file of lower precision,
        and on a device without ONNX Runtime, those stored beside it take their place.

        Args:
            val: A labelled data set, or None.
            preset: What its numbered folders mean.
            features: Whether the reference's features are wanted, too.

        Raises:
            ConfigError: ``val`` is given where nothing can run the FP32 network.
        """
        if self.precision != "fp32" or self.infer is None:
            if val is not None:
                expected = "a checkpoint or an FP32 ONNX file, and a runtime that runs it"
                fix = f"leave --val out; score it with --verify {self.path} --val {val}"
                raise ConfigError("--val", expected, f"{self.path.name} ({self.precision})", fix)
            if self.infer is None or (self.path.parent / REFERENCE_FILE).is_file():
                return read_reference(self.path.parent, self.spec, self.weights["sha256"])
        test_set = load_test_set(val, self.spec, preset)
        if features and self.features is not None:
            found = self.features(test_set.images)
            test_set = dataclasses.replace(test_set, features=found)
        return test_set, self.infer(test_set.images)

    def verify(self) -> Verification:
        """Compare an ONNX file, which is taken as it is, with what is stored beside it."""
        folder = self.path.parent
        if not (folder / REFERENCE_FILE).is_file():
            return Verification(not_run=f"no {REFERENCE_FILE} beside it")
        test_set, logits = read_reference(folder, self.spec, self.weights["sha256"])
        return verify_artifact(self.path, logits, test_set, self.precision)


def open_source(
    weights: Path | None, preset: str | None = None, input_size: int | None = None
) -> Source:
    """Find and open what is to be exported.

    Args:
        weights: ``*.safetensors``, ``*.pth.tar`` or ``*.onnx``; ``accurate`` is the larger bundled
            model; None takes the newest student under ``runs/``, else the bundled model.
        preset: What a published checkpoint was trained on.
        input_size: Side of the input for a checkpoint; None for what it was trained at.

    Raises:
        EfficientFaceError: The file is unusable, or it is a checkpoint and torch is missing.
    """
    backend = "onnx" if missing_reason("torch") else "torch"
    path = default_weights() if weights is None else model_file(weights, backend)
    _require_weights(path)
    if path.suffix == ONNX_SUFFIX:
        return _open_onnx(path, preset)
    return _open_checkpoint(path, preset, input_size)


def default_weights(runs: Path | None = None) -> Path:
    """The newest student under ``runs/``, by the architecture in its spec; else the bundled model.

    Without torch the bundled ONNX file takes the place of the bundled checkpoint.
    """
    found, closed = find_files(RUNS if runs is None else runs, (WEIGHTS_SUFFIX,))
    for folder in closed:
        print(f"note: {folder} may not be read; students in it are not looked at")
    # A hidden one is half-written: a training run may be going on.
    students = [path for path in found if not path.name.startswith(".") and _is_student(path)]
    if students:
        return max(students, key=lambda path: path.stat().st_mtime_ns)
    return BUNDLED_ONNX if missing_reason("torch") else BUNDLED_WEIGHTS


def _is_student(path: Path) -> bool:
    try:
        spec = spec_from_metadata(read_safetensors_metadata(path), path)
    except EfficientFaceError:
        return False
    return spec.architecture == "efficientface"


def _require_weights(path: Path) -> None:
    """Refuse what is neither a checkpoint nor an ONNX file, by what it is."""
    found = describe_file(path)
    if found in ("a checkpoint", "an ONNX file"):
        return
    suffixes = (ONNX_SUFFIX, *CHECKPOINT_SUFFIXES)
    if not os.path.isfile(path):
        fix = "check the path"
    elif path.name.endswith((ENGINE_SUFFIX, ENGINE_SUFFIX + ".json")):
        fix = "give the ONNX file or the checkpoint that the engine was made from"
    elif path.name.endswith(suffixes):
        fix = "copy it again, or give another file"
    else:
        fix = "give a file that ends in " + ", ".join(suffixes)
    raise ArtifactError(path, "a checkpoint or an ONNX file of ours", found, fix)


def _open_checkpoint(path: Path, preset: str | None, input_size: int | None) -> Source:
    if reason := missing_reason("torch"):
        fix = f"{install_command('export,cpu')}, or give an ONNX file of ours as --weights"
        raise BackendError(path, "PyTorch, to export a checkpoint", reason, fix)
    require_package("onnxscript")
    try:
        import torch

        from efficientface_deploy.models import load_checkpoint
        from efficientface_export.graph.trace import trace
    except (ImportError, OSError, RuntimeError) as error:  # torch and torchvision that do not fit
        fix = "install torch and torchvision of one release, in a new environment"
        raise broken_package("PyTorch", error, fix) from None

    # First whether it is a network of ours at all: a preset makes no other file usable.
    model, spec = load_checkpoint(path, preset)
    require_preset(path, preset)
    trained_size = spec.input_size
    if input_size is not None:
        spec = spec.resized(input_size)

    network: Any = model  # an EfficientFace or an LDG

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> Infer:
        @torch.inference_mode()
        def infer(batch: UInt8Array) -> Float32Array:
            found: Float32Array = function(torch.from_numpy(normalise(batch, spec))).numpy()
            return found

        return lambda images: run_in_batches(infer, images)

    def graph(float_input: bool) -> onnx.ModelProto:
        return trace(model, spec, float_input=float_input)

    def deploy(float_input: bool, profile: str) -> onnx.ModelProto:
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        return deploy_graph(weights, spec, PROFILES[profile], float_input=float_input)

    return Source(
        path=path,
        spec=spec,
        sha256=file_hash(path),
        provenance=Provenance({}, path),
        trained_size=trained_size,
        trace=graph,
        lay_out=deploy if spec.architecture == "efficientface" else None,
        infer=run(network),
        features=run(network.features),
    )


def _open_onnx(path: Path, preset: str | None) -> Source:
    file = read_onnx(path)
    graph, spec, provenance = file.graph, file.spec, file.provenance
    check_preset(path, spec, preset)
    made = Provenance(provenance, path)
    require_precision(graph, made.precision, made.excluded, path)  # other tools keep the metadata

    def infer(images: UInt8Array) -> Float32Array:
        with ef.load(path) as predictor:
            return run_in_batches(lambda batch: predictor.infer(batch)[0], images)

    def features(images: UInt8Array) -> Float32Array:
        with ef.load(path) as predictor:
            return run_in_batches(predictor.features, images)

    runs = missing_reason("onnx") is None
    has_features = any(value.name == FEATURES for value in graph.graph.output)

    return Source(
        path=path,
        spec=spec,
        sha256=file_hash(path),
        provenance=made,
        trained_size=made.trained_size or spec.input_size,
        trace=lambda float_input: graph,
        lay_out=None,
        infer=infer if runs else None,
        probe=file.probe,
        features=features if runs and has_features else None,
    )
