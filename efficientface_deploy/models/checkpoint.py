"""Weights from disk and to disk: our safetensors, and the published ``.pth.tar`` files.

Nothing in a file is ever executed: safetensors holds only numbers, and a ``.pth.tar`` is read by
PyTorch's restricted unpickler.
"""

from __future__ import annotations

import logging
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from efficientface_deploy.artifact import (
    PROVENANCE_KEY,
    SPEC_KEY,
    TORCH_SUFFIXES,
    WEIGHTS_SUFFIX,
    check_preset,
    read_safetensors_metadata,
    spec_from_metadata,
)
from efficientface_deploy.errors import CheckpointError
from efficientface_deploy.files import atomic_path, require_file, why_not_a_file
from efficientface_deploy.models.efficientface import EfficientFace
from efficientface_deploy.models.ldg import LabelDistributionGenerator
from efficientface_deploy.spec import ModelSpec, preset

logger = logging.getLogger(__name__)

_LDG_PREFIX = "backbone."
_ZIP = b"PK\x03\x04"
_FIX = "give a checkpoint of EfficientFace or of an LDG (ResNet-18, -29 or -50)"


def build_model(architecture: str, num_classes: int) -> nn.Module:
    """A network with fresh weights.

    Args:
        architecture: As in :class:`ModelSpec`.
        num_classes: Width of the logits.
    """
    if architecture == "efficientface":
        return EfficientFace(num_classes)
    return LabelDistributionGenerator(num_classes, architecture)


def load_checkpoint(path: str | Path, preset: str | None = None) -> tuple[nn.Module, ModelSpec]:
    """Load a network in evaluation mode, with the spec that says what its outputs mean.

    Args:
        path: ``*.safetensors`` of ours, or a published ``*.pth.tar`` (a dictionary with
            ``state_dict``, with or without the ``module.`` prefix of DataParallel).
        preset: What a published checkpoint was trained on, since it does not say so itself; None
            gives a spec with numbered labels, as many as the head has, and RAF-DB's
            normalisation. Our own files carry their spec; a preset that contradicts it is an
            error.

    Returns:
        The network and its spec.

    Raises:
        CheckpointError: The file is unreadable, truncated, of another network, not finite, or its
            head does not fit the labels.
        ArtifactError: The preset contradicts the file's own spec.
    """
    path = Path(path)
    state, own_spec = read_weights(path)
    architecture = identify_architecture(state, path)
    spec = _resolve_spec(own_spec, preset, architecture, len(state["fc.weight"]), path)
    model = build_model(architecture, spec.num_classes)
    _load_state(model, state, path)
    return model.eval(), spec


def load_backbone(model: nn.Module, spec: ModelSpec, path: str | Path) -> None:
    """Start a network from a checkpoint of the same architecture.

    The head is taken only from a file of ours whose labels are the same; that of weights
    pre-trained on something else (MS-Celeb-1M: 12,666 identities) stays as it was
    initialised. Which of the two happened is logged.

    Args:
        model: Network with fresh weights, changed in place.
        spec: Its spec.
        path: The checkpoint.

    Raises:
        CheckpointError: As :func:`load_checkpoint`, or another architecture.
    """
    path = Path(path)
    state, own_spec = read_weights(path)
    architecture = identify_architecture(state, path)
    if architecture != spec.architecture:
        expected, found = f"weights of {spec.architecture}", f"weights of {architecture}"
        fix = "give a checkpoint of the network that is trained"
        raise CheckpointError(path, expected, found, fix)
    if own_spec is None or own_spec.labels != spec.labels:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        logger.info("%s: took the backbone; the head starts anew", path)
    else:
        logger.info("%s: took backbone and head", path)
    _load_state(model, state, path, head_required=False)


def save_checkpoint(
    path: str | Path, model: nn.Module, spec: ModelSpec | None, provenance: str = "{}"
) -> None:
    """Write weights with their spec as safetensors, atomically.

    Args:
        path: Target, ``*.safetensors``.
        model: EfficientFace or an LDG.
        spec: Its spec; None for weights that know something else than expressions.
        provenance: JSON text about how it was made.
    """
    state = {
        key.removeprefix(_LDG_PREFIX): value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    metadata = {PROVENANCE_KEY: provenance}
    if spec is not None:
        metadata[SPEC_KEY] = spec.to_json()
    encoded = safetensors.torch.save(state, metadata)
    with atomic_path(path) as temporary:  # a full disk is an OSError here, which commands report
        temporary.write_bytes(encoded)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], ModelSpec | None]:
    """Read tensors by name, prefixes of wrappers removed, and the spec where the file has one.

    Raises:
        CheckpointError: The file is missing, of another kind, or damaged.
    """
    path = Path(path)
    if (reason := why_not_a_file(path)) is not None:
        raise CheckpointError(path, "a checkpoint", reason, "check the path")
    spec = None
    if path.suffix == WEIGHTS_SUFFIX:
        state, spec = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        state = _read_torch(path)
    else:
        found = f"suffix {path.suffix or 'none'}"
        fix = "rename it if it is one of these, or give another file"
        raise CheckpointError(path, "a .safetensors or .pth.tar file", found, fix)
    held = path.stat().st_size
    for key, value in state.items():
        if value.is_nested or value.layout != torch.strided or value.device.type != "cpu":
            found = f"{key} as {value.layout} on {value.device.type}"
            raise CheckpointError(path, "dense tensors", found, _FIX)
        # One number can stand for any count of them: torch.zeros(1).expand(2**40) does.
        if value.numel() * value.element_size() > held:
            found = f"{key} of shape {tuple(value.shape)} in a file of {held:,} bytes"
            raise CheckpointError(path, "tensors as large as the file", found, _FIX)
    return state, spec


def identify_architecture(state: Mapping[str, Tensor], path: str | Path) -> str:
    """Tell EfficientFace and the ResNets apart by their parameter names.

    Raises:
        CheckpointError: It is none of them.
    """
    if {"local.conv1_1.weight", "modulator.channel_att.gate_c.gate_c_fc_0.weight"} <= set(state):
        architecture = "efficientface"
    elif "layer5.0.conv2.weight" in state:
        architecture = "resnet29"
    elif "layer4.2.conv3.weight" in state and "layer3.5.conv3.weight" in state:
        architecture = "resnet50"
    elif "layer4.1.conv2.weight" in state and "layer1.0.conv3.weight" not in state:
        architecture = "resnet18"
    else:
        architecture = ""
    head = state.get("fc.weight")
    if not architecture or head is None or head.ndim != 2 or len(head) < 2:
        expected = "weights of EfficientFace, ResNet-18, -29 or -50"
        first = ", ".join(list(state)[:3]) or "no tensors"
        raise CheckpointError(path, expected, f"another network ({first}, ...)", _FIX)
    return architecture


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], ModelSpec | None]:
    require_file(path, "a safetensors file")
    try:
        if str(path).isprintable():
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:  # a name that may be no UTF-8, which the library does not take
            metadata = read_safetensors_metadata(path)
            state = safetensors.torch.load(path.read_bytes())
    # RuntimeError: torch's, which maps the file, where the system refuses it
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        found, fix = f"a damaged one ({error})", "copy it again, or train it again"
        raise CheckpointError(path, "a complete safetensors file", found, fix) from None
    spec = spec_from_metadata(metadata, path) if SPEC_KEY in metadata else None
    return state, spec


class _Inert:
    """Stands in for every class that a published checkpoint names, and does nothing.

    The published training script pickled its metric recorder beside the weights. The restricted
    unpickler would refuse the whole file; with this in the class's place the weights can be read
    while none of the file's code is ever looked up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _foreign_names(path: Path) -> Collection[str]:
    """Classes and functions that a checkpoint's pickle names, read without executing it."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.filelist):
                    raise ValueError("packed, which PyTorch never does")  # and may fill the memory
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # The format of PyTorch before 1.6, which the published code allows: pickles of a magic
        # number, a version, a platform and the content, then the storages.
        file.seek(0)
        operations = (item for _ in range(4) for item in pickletools.genops(file))
        names = [str(argument) for code, argument, _ in operations if code.name == "GLOBAL"]
    pairs = [(module, name) for module, _, name in (text.partition(" ") for text in names)]
    # Such pickles give the standard library the names that it had in Python 2.
    pairs += [
        NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        for module, name in pairs
    ]
    return set(map(".".join, pairs))


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        foreign = _foreign_names(path)
        placeholders: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch fails on damaged files in many ways
        # Around its unpickler's own words torch advises to load the file unsafely.
        text = str(error).partition("Check the documentation of torch.load")[0]
        for advice in ("from a trusted source.", "WeightsUnpickler error:"):
            text = text.rpartition(advice)[2]
        expected = "a PyTorch checkpoint (never unpack or repack a .pth.tar)"
        words = " ".join(text.split())[:100] or type(error).__name__
        found = f"a damaged or foreign file ({words})"
        raise CheckpointError(path, expected, found, "download it again") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        found = "a pickled object" if isinstance(content, _Inert) else type(content).__name__
        raise CheckpointError(path, "a dictionary with state_dict", found, _FIX)
    if {"identity", "progress"} <= state.keys():
        found = "the state from which --resume goes on"
        fix = "give the student.safetensors or teacher.safetensors beside it"
        raise CheckpointError(path, "weights", found, fix)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {str(key).removeprefix("module."): value for key, value in tensors.items()}


def _resolve_spec(
    own: ModelSpec | None, preset_name: str | None, architecture: str, classes: int, path: Path
) -> ModelSpec:
    if own is not None:
        if (own.architecture, own.num_classes) != (architecture, classes):
            expected = f"{own.architecture} with {own.num_classes} classes, as its spec says"
            fix = "the file was changed after it was written; get the original"
            raise CheckpointError(path, expected, f"{architecture} with {classes}", fix)
        check_preset(path, own, preset_name)
        return own
    if preset_name is None:
        labels = tuple(f"class {index}" for index in range(classes))
        return preset("rafdb").replace(labels=labels, architecture=architecture, name=path.name)
    wanted = preset(preset_name)
    if wanted.num_classes != classes:
        expected = f"a head of {wanted.num_classes} classes for preset {preset_name}"
        fix = (
            "choose the preset that it was trained with; to train on from it, give it as --init "
            "to training.student or training.teacher"
        )
        raise CheckpointError(path, expected, f"{classes} classes", fix)
    return wanted.replace(architecture=architecture)


def _load_state(
    model: nn.Module, state: dict[str, Tensor], path: Path, *, head_required: bool = True
) -> None:
    prefix = "" if isinstance(model, EfficientFace) else _LDG_PREFIX
    own = model.state_dict()
    state = {prefix + key: value for key, value in state.items()}

    known = {key: value for key, value in state.items() if key in own}
    problems = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in known.items()
        if value.shape != own[key].shape
    ]
    problems += [
        f"{key} as {value.dtype}"
        for key, value in known.items()
        if value.is_floating_point() != own[key].is_floating_point()
    ]
    problems += [f"unknown {key}" for key in state if key not in own]
    # Old checkpoints do not count batches; nothing at inference reads the count.
    problems += [
        f"no {key}"
        for key in own
        if key not in state
        and not key.endswith("num_batches_tracked")
        and (head_required or not key.startswith(prefix + "fc."))
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        expected = f"all weights of {type(model).__name__}"
        raise CheckpointError(path, expected, problems[0] + more, _FIX)
    state = {key: value.to(own[key].dtype) for key, value in state.items()}
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            found = f"NaN or infinity in {key.removeprefix(prefix)}"
            fix = "take a checkpoint from before the training diverged"
            raise CheckpointError(path, "finite weights", found, fix)
    model.load_state_dict({**own, **state})
