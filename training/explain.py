"""Show which parts of a face speak for a class: Grad-CAM over the last stage, as PNG sheets."""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.explain", "train,cpu")

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn

from efficientface_deploy.artifact import require_preset
from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError, ImageError
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.folder import find_images
from efficientface_deploy.vision.preprocess import (
    Float32Array,
    UInt8Array,
    normalise,
    to_model_input,
)
from efficientface_deploy.workbench.progress import track
from efficientface_deploy.workbench.workspace import open_workspace
from training.plots import plot_heat_maps

SHEETS = "sheet-*.png"
_LONGEST_NAME = 36


@dataclasses.dataclass(frozen=True)
class ExplainConfig:
    """Options of ``training.explain``."""

    weights: Path = option(help="checkpoint of a student or an LDG", first=True)
    images: tuple[str, ...] = option(
        help="image files, or folders", metavar="IMAGE|DIR", first=True
    )
    out: Path = option(help="folder of the sheets", metavar="DIR", first=True)
    class_: str | None = option(
        None, metavar="NAME", help="explain this class instead of the predicted one"
    )
    per_sheet: int = option(12, minimum=1, help="faces on a sheet")
    preset: str | None = option(None, help="what a published checkpoint was trained on")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a network says about one face, and why.

    Attributes:
        name: The image's file.
        image: What the network was given, uint8 (S, S, 3), RGB.
        heat: How much each place speaks for the explained class, float32 (S, S), 0 to 1; all zero
            where nothing does.
        label: The predicted class.
        confidence: Its probability, 0 to 1.
        explained: The explained class.
        explained_probability: Its probability, 0 to 1.
    """

    name: str
    image: UInt8Array
    heat: Float32Array
    label: str
    confidence: float
    explained: str
    explained_probability: float


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.explain``: exit code 2 when an image was unreadable."""
    config = parse_config(
        ExplainConfig,
        argv,
        prog="python -m training.explain",
        description=__doc__ or "",
        example="--weights runs/student/student.safetensors --images faces --out runs/explained",
    )
    if any(config.out.glob(SHEETS)):  # they would mix with those of this call
        fix = "choose another --out, or remove them"
        raise ConfigError(config.out, "no sheets yet", "those of an earlier run", fix)
    unreadable: list[ImageError] = []
    with open_workspace(config.out, "explanation") as work:
        require_preset(config.weights, config.preset)
        model, spec = load_checkpoint(config.weights, config.preset)
        target = None
        if (name := config.class_) is not None:
            if name not in spec.labels:
                wanted = "one of " + ", ".join(spec.labels)
                raise ConfigError("--class", wanted, repr(name), "choose one of these")
            target = spec.labels.index(name)
        names = list(find_images(config.images))
        sheets = 0
        for faces in _sheets_of_faces(names, spec, config.per_sheet, unreadable):
            sheets += 1
            path = work.scratch / SHEETS.replace("*", f"{sheets:03d}")
            draw_sheet(path, explain(model, spec, faces, target))
        if not sheets:
            first = unreadable[0]
            found = f"none among {len(unreadable)} (the first: {first.subject}, {first.found})"
            wanted = "at least one image that can be read"
            raise ImageError(", ".join(config.images), wanted, found, "give other images")
        work.publish()
    for error in unreadable:
        print(f"error: {error}", file=sys.stderr)
    print(f"faces: {len(names) - len(unreadable)}; sheets: {sheets}; in {config.out}")
    if unreadable:
        print(f"{len(unreadable)} image(s) could not be read", file=sys.stderr)
    return 2 if unreadable else 0


def explain(
    model: nn.Module,
    spec: ModelSpec,
    faces: Sequence[tuple[str, UInt8Array]],
    target: int | None = None,
) -> list[Explanation]:
    """Explain what a network says about some faces.

    Args:
        model: EfficientFace or an LDG, in evaluation mode.
        spec: Its spec.
        faces: Name and uint8 (S, S, 3) of each.
        target: Index of the class to explain; None for the predicted one of each face.
    """
    images = np.stack([image for _, image in faces])  # (N, S, S, 3)
    batch = torch.from_numpy(normalise(images, spec))  # (N, 3, S, S)
    with torch.inference_mode():
        probabilities = model(batch).softmax(dim=1)  # (N, C)
    predicted = probabilities.argmax(dim=1)  # (N,)
    targets = predicted if target is None else torch.full_like(predicted, target)
    heat = heat_maps(model, batch, targets.clone())  # (N, S, S)
    return [
        Explanation(
            name=name,
            image=image,
            heat=heat[row],
            label=spec.labels[int(predicted[row])],
            confidence=float(probabilities[row, predicted[row]]),
            explained=spec.labels[int(targets[row])],
            explained_probability=float(probabilities[row, targets[row]]),
        )
        for row, (name, image) in enumerate(faces)
    ]


def heat_maps(model: nn.Module, batch: torch.Tensor, targets: torch.Tensor) -> Float32Array:
    """Grad-CAM (Selvaraju et al. 2017) over the last stage, as large as the images.

    Args:
        model: EfficientFace or an LDG, in evaluation mode.
        batch: float32 (N, 3, S, S), normalised.
        targets: Class to explain, int64 (N,).

    Returns:
        float32 (N, S, S); the largest value of each map is 1, or the map is zero.
    """
    # Whose output the head averages: conv5, or a ResNet's layer4.
    last_stage = "conv5" if isinstance(model, EfficientFace) else "backbone.layer4"
    coarse = LayerGradCam(model, model.get_submodule(last_stage)).attribute(
        batch, target=targets, relu_attributions=True
    )  # (N, 1, S / 32, S / 32)
    side = (batch.shape[2], batch.shape[3])
    maps = LayerAttribution.interpolate(coarse.detach(), side, "bilinear")[:, 0]  # (N, S, S)
    peak = maps.amax(dim=(1, 2), keepdim=True)
    heat: Float32Array = torch.where(peak > 0, maps / peak, torch.zeros_like(maps)).numpy()
    return heat


def draw_sheet(path: Path, explanations: Sequence[Explanation]) -> None:
    """Draw faces as PNG, each beside itself under its heat map."""
    plot_heat_maps(path, [(title(found), found.image, found.heat) for found in explanations])


def title(explanation: Explanation) -> str:
    """The file's name, shortened, and below it the :func:`caption`."""
    name = Path(explanation.name).name
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
    return f"{name}\n{caption(explanation)}"


def caption(explanation: Explanation) -> str:
    """``Happiness 0.93``, and what is explained where it is another class."""
    text = f"{explanation.label} {explanation.confidence:.2f}"
    if explanation.explained != explanation.label:
        text += f"; shown: {explanation.explained} {explanation.explained_probability:.2f}"
    return text if explanation.heat.any() else text + " (nothing speaks for it)"


def _sheets_of_faces(
    names: Sequence[str], spec: ModelSpec, per_sheet: int, unreadable: list[ImageError]
) -> Iterator[list[tuple[str, UInt8Array]]]:
    """The readable faces, a sheet's worth at a time; errors go to ``unreadable``."""
    faces: list[tuple[str, UInt8Array]] = []
    for name in track(names, "explaining", len(names)):
        try:
            faces.append((name, to_model_input(name, spec)))
        except ImageError as error:
            unreadable.append(error)
        if len(faces) == per_sheet:
            yield faces
            faces = []
    if faces:
        yield faces
