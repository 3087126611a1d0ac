"""efficientface-predict: label images of faces from the command line.

Give pictures that show one face each, cut as the model's training pictures were.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.dataset import IMAGE_SUFFIXES
from efficientface_deploy.errors import ImageError
from efficientface_deploy.predictor import Prediction, Predictor, load

STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Options of ``efficientface-predict``."""

    images: tuple[str, ...] = option(
        help="image files, folders, or - for one image on standard input",
        metavar="IMAGE",
        positional=True,
    )
    model: Path | None = option(None, help="model file; default: the bundled model")
    backend: str = option("auto", help="auto, onnx, onnx:cuda, trt, trt-rtx, torch, ...")
    preset: str | None = option(None, help="what a published checkpoint was trained on")
    threads: int | None = option(None, minimum=1, help="CPU threads for one inference")
    json: bool = option(False, help="print one JSON object a line")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``efficientface-predict``: exit code 2 when an image could not be read."""
    config = parse_config(
        PredictConfig, argv, prog="efficientface-predict", description=__doc__ or ""
    )
    unreadable = 0
    with load(
        config.model, backend=config.backend, threads=config.threads, preset=config.preset
    ) as predictor:
        if not config.json:
            print(predictor, file=sys.stderr)
        for name in find_images(config.images):
            try:
                prediction = predict_one(predictor, name)
            except ImageError as error:
                unreadable += 1
                print(f"error: {error}", file=sys.stderr)
                continue
            print(as_json(name, prediction) if config.json else as_line(name, prediction))
    if unreadable:
        print(f"{unreadable} image(s) could not be read", file=sys.stderr)
    return 2 if unreadable else 0


def entry_point() -> None:
    """Console script: runs :func:`main` and turns errors into one line and an exit code."""
    run_command(main)


def find_images(names: Sequence[str]) -> Iterator[str]:
    """The files that names stand for; a folder stands for every image below it, sorted.

    Raises:
        ImageError: A folder holds no images.
    """
    for name in names:
        path = Path(name)
        if name == STANDARD_INPUT or not path.is_dir():
            yield name
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ImageError(
                path,
                expected="images (" + ", ".join(IMAGE_SUFFIXES) + ")",
                found="none in this folder",
                fix="give another folder",
            )
        yield from map(str, found)


def predict_one(predictor: Predictor, name: str) -> Prediction:
    """Label one file, or the image on standard input."""
    if name == STANDARD_INPUT:
        return predictor(sys.stdin.buffer.read())
    return predictor(name)


def as_line(name: str, prediction: Prediction) -> str:
    """``face.jpg: Happiness 0.93 (Neutral 0.05, Surprise 0.01)``."""
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    others = ", ".join(f"{label} {probability:.2f}" for label, probability in ranked[1:3])
    return f"{name}: {prediction.label} {prediction.confidence:.2f} ({others})"


def as_json(name: str, prediction: Prediction) -> str:
    """One line of JSON with the file's name and all probabilities."""
    return json.dumps({"image": name, **dataclasses.asdict(prediction)})


if __name__ == "__main__":
    entry_point()
