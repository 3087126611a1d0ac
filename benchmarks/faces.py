"""From the frame to the labels: speed and accuracy with each face detector.

``python benchmarks/faces.py PHOTOS`` from a clone. ``PHOTOS`` is a folder or a zip of photographs
that show one face each, with ``labels.csv`` (``file,label``; a label of the bundled model, in any
case). Everything runs on one thread.

* *speed*: from a decoded frame, an array, to the labels of the two faces in it. The frames are
  photographs of the set, shrunk, before a blurred one;
* *photographs*: how many faces are not found, and how many labels are right, beside those of the
  whole pictures; a face that is not found counts as wrong;
* *squares*: the side of the square that is cut, by the box's. What is chosen by the first half of
  the photographs, every other one, is to be judged by the second.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.faces", "cpu,bench")

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.errors import BackendError, DatasetError
from efficientface_deploy.predictor import Predictor, load
from efficientface_deploy.vision.detectors import open_detector
from efficientface_deploy.vision.faces import BOX_SCALE, Face, FaceDetector, cut_face
from efficientface_deploy.vision.preprocess import UInt8Array, load_image, resize
from efficientface_deploy.workbench.timing import in_turn, measure

# Frames' sizes, and the most milliseconds that one may take: 50 and 80 a second.
FRAMES = {"1280x720": (1280, 720, 20.0), "640x360": (640, 360, 12.5)}
SCALES = (0.9, 0.95, 1.0, BOX_SCALE, 1.08, 1.12, 1.2, 1.3)

_MOST_NOT_FOUND = 0.005
_SHOWN = 8  # frames that take turns
_BATCH = 32

Row = dict[str, Any]
Photograph = tuple[Image.Image, str]
BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class FacesConfig:
    """Options of ``python benchmarks/faces.py``."""

    photos: Path = option(
        positional=True, metavar="PHOTOS", help="folder or zip with labels.csv", first=True
    )
    detectors: tuple[str, ...] = option(
        ("yunet", "centerface"), metavar="NAME", help="as --detect takes them", first=True
    )
    seconds: float = option(4.0, metavar="S", minimum=0.001, help="timed calls for each row")
    rounds: int = option(10, metavar="N", minimum=3, help="turns of each row")
    seed: int = option(0, minimum=0, help="of the order")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/faces.py``."""
    return run_benchmark("faces", FacesConfig, run, argv, __doc__, "photos.zip")


def run(config: FacesConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    photographs = read_photographs(config.photos)
    result = {**new_result("faces", config), "absent": []}
    detectors: dict[str, FaceDetector] = {}
    for name in config.detectors:
        kind = name.partition("=")[0]
        try:
            detectors[kind] = open_detector(name, threads=1)
        except BackendError as error:
            result["absent"].append({"backend": kind, "model": "", "reason": str(error)})
    with load(threads=1) as predictor:
        print("measuring speed", file=sys.stderr)
        result["speed"] = measure_speed(config, predictor, detectors, photographs)
        print(f"labelling {len(photographs)} photographs", file=sys.stderr)
        rows, squares = measure_accuracy(predictor, detectors, photographs)
    return {
        **result,
        "photographs": rows,
        "squares": squares,
        "goals": goals(result["speed"], rows),
    }


def read_photographs(source: Path) -> list[Photograph]:
    """The photographs of a set, each with its label.

    Raises:
        DatasetError: It has no ``labels.csv``, or that names nothing.
    """
    with _opened(source) as read:
        try:
            text = read("labels.csv").decode("utf-8-sig")
            rows = [(row["file"], row["label"]) for row in csv.DictReader(io.StringIO(text))]
        except (OSError, KeyError, ValueError):
            rows = []
        if not rows:
            fix = "give a folder or a zip that has it beside the photographs"
            raise DatasetError(source, "labels.csv with the columns file,label", "none", fix)
        return [(load_image(read(name)), label.casefold()) for name, label in rows]


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[Callable[[str], bytes]]:
    """What reads a file of a folder or a zip."""
    if source.is_dir():
        yield lambda name: (source / name).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(source)
    except (OSError, zipfile.BadZipFile) as error:
        fix = "check the path"
        raise DatasetError(source, "a folder or a zip of photographs", str(error), fix) from None
    with archive:
        yield archive.read


# ---- speed


def make_frame(photographs: Sequence[Image.Image], width: int, height: int) -> UInt8Array:
    """Two photographs, shrunk, before a blurred one; uint8 (H, W, 3)."""
    frame = photographs[0].resize((width, height)).filter(ImageFilter.GaussianBlur(height // 20))
    side = round(0.28 * height)
    for number, photograph in enumerate(photographs[:2]):
        place = (width // 6 + number * width // 2, height // 4)
        frame.paste(photograph.resize((side, side)), place)
    return np.asarray(frame)


def measure_speed(
    config: FacesConfig,
    predictor: Predictor,
    detectors: Mapping[str, FaceDetector],
    photographs: Sequence[Photograph],
) -> list[Row]:
    """Times of whole frames; each detector has those in which it finds both faces."""
    rows = []
    for size, (width, height, _) in FRAMES.items():
        pairs = [photographs[at : at + 2] for at in range(0, len(photographs) - 1, 2)]
        frames = [
            make_frame([one for one, _ in pair], width, height) for pair in pairs[: 2 * _SHOWN]
        ]
        parts = {}
        for name, detector in detectors.items():
            found = [frame for frame in frames if len(detector.detect(frame)) == 2][:_SHOWN]
            if found:
                call = lambda frame, own=detector: predictor.predict_faces(frame, own)  # noqa: E731
                parts[name] = in_turn(call, found)
        if not parts:
            continue
        timed = measure(parts, seconds=config.seconds, rounds=config.rounds, seed=config.seed)
        for name, samples in timed.items():
            figures = samples.figures()
            rate = {"frames_per_second": 1000 / figures["p50_ms"]}
            rows.append({"detector": name, "frame": size, **rate, **figures})
    return rows


# ---- accuracy


def measure_accuracy(
    predictor: Predictor,
    detectors: Mapping[str, FaceDetector],
    photographs: Sequence[Photograph],
) -> tuple[list[Row], list[Row]]:
    """Labels of whole pictures and of each detector's faces; and these by the square's side."""
    pictures, labels = zip(*photographs, strict=True)
    whole = right(predictor, pictures, labels)
    rows = [{"detector": "none: whole pictures", **_shares(whole)}]
    squares: list[Row] = []
    for name, detector in detectors.items():
        start = time.process_time()
        found = [detector.detect(np.asarray(one)) for one in pictures]
        seconds = time.process_time() - start
        faces = [next(iter(own), None) for own in found]
        by_scale = {
            scale: right(predictor, _cuts(predictor, pictures, faces, scale), labels)
            for scale in SCALES
        }
        rows.append(
            {
                "detector": name,
                **_shares(by_scale[BOX_SCALE]),
                "not_found": sum(face is None for face in faces) / len(faces),
                "several": sum(len(own) > 1 for own in found),
                "cpu_ms_a_picture": 1000 * seconds / len(faces),
            }
        )
        squares += [{"detector": name, "scale": s, **_shares(own)} for s, own in by_scale.items()]
    return rows, squares


def right(
    predictor: Predictor, pictures: Sequence[Image.Image | None], labels: Sequence[str]
) -> BoolArray:
    """Whether each picture gets its label (N,); None, a face that was not found, does not."""
    found = [at for at, picture in enumerate(pictures) if picture is not None]
    inputs = [resize(picture, predictor.spec) for picture in pictures if picture is not None]
    own = [name.casefold() for name in predictor.spec.labels]
    answers: BoolArray = np.zeros(len(pictures), bool)
    for start in range(0, len(inputs), _BATCH):
        _, probabilities = predictor.infer(np.stack(inputs[start : start + _BATCH]))
        for at, best in zip(found[start:], probabilities.argmax(axis=1), strict=False):
            answers[at] = own[best] == labels[at]
    return answers


def _cuts(
    predictor: Predictor,
    pictures: Sequence[Image.Image],
    faces: Sequence[Face | None],
    scale: float,
) -> list[Image.Image | None]:
    return [
        None if face is None else cut_face(picture, face, predictor.spec, scale=scale)
        for picture, face in zip(pictures, faces, strict=True)
    ]


def _shares(answers: BoolArray) -> Row:
    halves = {"first_half": answers[::2].mean(), "second_half": answers[1::2].mean()}
    return {"accuracy": float(answers.mean()), **{k: float(v) for k, v in halves.items()}}


# ---- goals


def goals(speed: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each goal for YuNet, the default, with what was found."""
    found = [
        (f"milliseconds from a frame of {row['frame']} to two labels", row["p50_ms"], limit)
        for row in speed
        if row["detector"] == "yunet"
        for limit in [FRAMES[row["frame"]][2]]
    ]
    whole = rows[0]["accuracy"]
    for row in rows[1:]:
        if row["detector"] == "yunet":
            found.append(("share of faces not found", row["not_found"], _MOST_NOT_FOUND))
            found.append(("accuracy lost by the detector", whole - row["accuracy"], 0.0))
    return [
        {"name": name, "found": value, "at_most": limit, "met": value <= limit}
        for name, value, limit in found
    ]
