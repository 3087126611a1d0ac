"""efficientface-predict: label the faces in pictures, videos and from a camera.

Without --faces a picture should show one face, cut as the model's training pictures were.
"""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import predict

    predict()

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from efficientface_deploy.command import log_told, option, parse_config
from efficientface_deploy.download import Download
from efficientface_deploy.errors import BackendError, ConfigError, ImageError, printable
from efficientface_deploy.files import atomic_path, check_new_folder
from efficientface_deploy.predictor import FacePrediction, Prediction, Predictor, load
from efficientface_deploy.prior import parse_prior
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.detectors import open_detector, search_options
from efficientface_deploy.vision.draw import draw_faces
from efficientface_deploy.vision.faces import FaceDetector
from efficientface_deploy.vision.folder import STANDARD_INPUT, find_images
from efficientface_deploy.vision.preprocess import load_image
from efficientface_deploy.vision.search import MAX_SIDE, MIN_SCORE
from efficientface_deploy.vision.steady import TIME_CONSTANT, Event, Events
from efficientface_deploy.vision.video import (
    VIDEO_SUFFIXES,
    Video,
    is_stream,
    open_video,
    without_password,
    write_video,
)
from efficientface_deploy.vision.yunet import WEIGHTS

_JPEG_QUALITY = 90
_LONGEST_STEM = 200  # bytes; a file being written has a longer name, of 255 at most

TOO_SMALL = "too small"  # what is said in place of a label


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Options of ``efficientface-predict``."""

    images: tuple[str, ...] = option(
        help="pictures, folders of pictures, videos, addresses of streams (rtsp://, http://, ...), "
        "camera or camera:NUMBER (until Ctrl-C), or - for one picture on standard input",
        metavar="IMAGE",
        positional=True,
        first=True,
    )
    model: Path | None = option(
        None, help="model file, or accurate; default: the bundled model", first=True
    )
    backend: str = option("auto", help="auto, onnx, onnx:cuda, trt, trt-rtx, torch, ...")
    preset: str | None = option(None, help="what a published checkpoint was trained on")
    threads: int | None = option(None, minimum=1, help="CPU threads for one inference")
    prior: str | None = option(
        None,
        metavar="uniform|LABEL=WEIGHT,...",
        help="how often each class comes here, in the place of how often it came in training",
    )
    faces: bool = option(
        False,
        help=f"find the faces first, by YuNet, which is fetched once ({WEIGHTS.kilobytes} KB)",
        first=True,
    )
    detect: str | None = option(
        None, help="find them by another detector: centerface, yunet or yunet=FILE"
    )
    min_face: float | None = option(
        None,
        metavar="PIXELS",
        minimum=1,
        help="smallest face that is wanted, 28 is usual; a larger number is faster",
    )
    min_score: float = option(MIN_SCORE, minimum=0, maximum=1, help="smallest score of a face")
    max_side: int = option(
        MAX_SIDE,
        metavar="PIXELS",
        minimum=32,
        help="longer side that large pictures are shrunk to for the search",
    )
    draw: Path | None = option(
        None, metavar="DIR", help="new or empty folder for copies with boxes and labels"
    )
    json: bool = option(False, help="print one JSON object a picture or frame")
    events: bool = option(
        False, help="of videos, print from when to when each face has which label, not each frame"
    )
    smooth: float | None = option(
        None,
        metavar="SECONDS",
        minimum=0,
        help="time over which a face's labels in a video are steadied; 0 for each frame's own "
        f"(default: {TIME_CONSTANT})",
    )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is printed of one picture, or of one frame of a video.

    Attributes:
        image: The picture's or video's name as it was given.
        faces: Its faces; without a detector the whole picture is one.
        frame: Place of a frame in its video, from 0; None for a picture.
        seconds: Time of a frame in its video, as the container says.
        latency: Seconds from reading a frame to its labels.
    """

    image: str
    faces: Sequence[FacePrediction]
    frame: int | None = None
    seconds: float | None = None
    latency: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``efficientface-predict``: exit code 2 when a picture could not be read."""
    config = parse_config(
        PredictConfig,
        argv,
        prog="efficientface-predict",
        description=__doc__ or "",
        example="photo.jpg --faces",
    )
    prior = None if config.prior is None else parse_prior(config.prior)
    gallery = Gallery(config.draw, config.images) if config.draw else None
    names = list(find_images(config.images, VIDEO_SUFFIXES))
    check_has_video(config, names)
    detector = _open_detector(config)
    with load(
        config.model,
        backend=config.backend,
        threads=config.threads,
        preset=config.preset,
        prior=prior,
    ) as predictor:
        if detector and predictor.spec.face_crop == "as-is":
            print(
                "note: this model was trained on whole pictures; how its faces are cut is a guess",
                file=sys.stderr,
            )
        table = None if config.json else PredictionTable(predictor.spec)
        checked = predictor.checked or _not_checked(predictor)
        title = f"{predictor}\n{checked}"
        if prior is None:
            title += _legend(predictor.spec)
        if detector is None:
            title += "\neach picture is taken as one face; --faces finds the faces"
        report = Report(table, len(names), title, Events() if config.events else None)
        smooth = TIME_CONSTANT if config.smooth is None else config.smooth
        labeller = Labeller(predictor, detector, gallery, report.tell, smooth)
        for name in names:
            try:
                labeller.label(name)
            except ImageError as error:
                report.tell_unreadable(error)
            except BackendError as error:  # no reader of videos, among pictures that need none
                if len(names) == 1 or Path(name).suffix.lower() not in VIDEO_SUFFIXES:
                    raise
                of_file = BackendError(name, error.expected, error.found, error.fix)
                report.tell_unreadable(of_file)
            report.end_one(name)
        return report.end()


def _open_detector(config: PredictConfig) -> FaceDetector | None:
    """The detector that is asked for; what its weights are fetched from is said."""
    name, search = search_options(config)
    if name is None:
        return None
    with log_told(Download.__module__):
        return open_detector(name, config.threads, **search)


@dataclasses.dataclass(frozen=True)
class Labeller:
    """Labels pictures, videos and cameras.

    Attributes:
        predictor: The model.
        detector: Finds the faces; without one the whole picture is a face.
        gallery: Where to draw; None for nowhere.
        tell: Called with the answer for a picture, or for each frame.
        smooth: Seconds over which labels of videos are steadied; 0 for none.
    """

    predictor: Predictor
    detector: FaceDetector | None
    gallery: Gallery | None
    tell: Callable[[Answer], None]
    smooth: float

    def label(self, name: str) -> None:
        """Label a file, an address, ``camera``, ``camera:NUMBER`` or ``-``.

        Raises:
            ImageError: It cannot be read, or not to its end.
        """
        if is_video(name):
            camera = camera_number(name)
            self._label_frames(name, name if camera is None else camera)
            return
        if name.isdecimal() and not os.path.exists(name):
            fix = f"camera:{name} names a camera"
            raise ImageError(name, "a picture, a video or a camera", "no such file", fix)
        copy = self.gallery.place_for(name, ".jpg") if self.gallery else None
        image = load_image(sys.stdin.buffer if name == STANDARD_INPUT else name)
        faces = self.predictor.predict_faces(image, self.detector)
        if copy:
            with atomic_path(copy) as path:
                _annotated(image, faces).save(path, "JPEG", quality=_JPEG_QUALITY)
        self.tell(Answer(name, faces))

    def _label_frames(self, name: str, source: str | int) -> None:
        shown, failure, count = without_password(name), None, 0
        copy = self.gallery.place_for(shown, ".mp4") if self.gallery else None
        with contextlib.ExitStack() as stack:
            video = stack.enter_context(open_video(source))
            if copy:
                draw = stack.enter_context(write_video(copy, video.rate))
            if video.live:
                stack.enter_context(contextlib.suppress(KeyboardInterrupt))  # its usual end
            policy = "newest" if video.live else "every"
            results = self.predictor.predict_stream(
                video, detector=self.detector, policy=policy, smooth=self.smooth
            )
            stack.enter_context(_drop_outs_told(shown, video))
            try:
                for result in stack.enter_context(contextlib.closing(results)):
                    count += 1
                    if copy:
                        draw(_annotated(result.image, result.faces), result.seconds)
                    self.tell(
                        Answer(shown, result.faces, result.index, result.seconds, result.latency)
                    )
            except ImageError as error:
                if not count:
                    raise
                failure = error  # said when the copy of what could be read is whole
            if not count:
                raise ImageError(shown, "at least one frame", "none", "check the camera")
        if failure:
            raise failure


@contextlib.contextmanager
def _drop_outs_told(name: str, video: Video) -> Iterator[None]:
    """Print each drop-out of a stream as it comes, and their count in the end."""
    try:
        with log_told(Video.__module__):
            yield
    finally:
        if video.dropouts:
            print(f"{name}: drop-outs: {video.dropouts}", file=sys.stderr)


def _legend(spec: ModelSpec) -> str:
    """What the mark of unsure labels means; empty where none is promised."""
    if spec.sure_precision is None:
        return ""
    if spec.sure_above == 1:
        return "\n?: unsure, as all are: the training's images were too few to promise any"
    right = f"{100 * spec.sure_precision:.0f} %"
    return f"\n?: unsure; of the others {right} are right, on pictures like the training's"


def _not_checked(predictor: Predictor) -> str:
    reason = "as asked" if predictor.has_probe else "the file has no probe"
    return f"not checked: {reason}"


def is_video(name: str) -> bool:
    """Whether a name is a video's, a stream's or a camera's."""
    camera = name.partition(":")[0] == "camera"
    return camera or is_stream(name) or Path(name).suffix.lower() in VIDEO_SUFFIXES


def check_has_video(config: PredictConfig, names: Sequence[str]) -> None:
    """Refuse options that pictures alone would have to ignore.

    Raises:
        ConfigError: Names the first.
    """
    for name, given in (("--events", config.events), ("--smooth", config.smooth is not None)):
        if given and not any(map(is_video, names)):
            expected = "a video, a stream or a camera among what is given"
            raise ConfigError(name, expected, "pictures alone", f"leave {name} out")


def camera_number(name: str) -> int | None:
    """0 for ``camera``, 2 for ``camera:2``, None for what is no camera.

    Raises:
        ImageError: It is ``camera:`` and no number.
    """
    kind, _, number = name.partition(":")
    if kind != "camera":
        return None
    if not (number or "0").isdecimal():
        raise ImageError(name, "camera or camera:NUMBER", repr(number), "give e.g. camera:0")
    return int(number or "0")


def as_json(answer: Answer) -> str:
    """One line of JSON: the name, and every face with its box and all probabilities.

    A face too small to be judged has no label. One of a video has its track too, and where its
    label is steady the frame's own, ``raw``.
    """
    record = {key: value for key, value in vars(answer).items() if value is not None}
    del record["faces"]  # they come last
    faces = []
    for found in answer.faces:
        row = {**vars(found.prediction), **vars(found.face), "small": found.small}
        if found.small:
            row["label"] = row["confidence"] = None
        if found.track is not None:
            row["track"] = found.track
        if found.raw is not None:
            row["raw"] = found.raw.probabilities
        faces.append(row)
    return json.dumps({**record, "faces": faces})


class Report:
    """Prints answers as they come, and how far the work is where nothing else shows it.

    Args:
        table: Lays the answers out; None for JSON.
        total: Pictures and videos in all.
        title: What answers, said before the first answer of a table.
        events: Joins the frames' labels, where these are to be printed; None for each answer.

    Attributes:
        done: How many of them are done.
    """

    def __init__(
        self, table: PredictionTable | None, total: int, title: str, events: Events | None = None
    ) -> None:
        self.done = 0
        self._table = table
        self._total = total
        self._unreadable = 0
        self._title = title
        self._events = events
        self._frames = self._faces = 0  # of a video whose events are printed

    def tell(self, answer: Answer) -> None:
        """Print an answer, or the events that ended before it.

        Raises:
            ImageError: Events are to be printed, and a picture has none.
        """
        if self._events and answer.seconds is None:
            expected = "a video, a stream or a camera, since --events was given"
            raise ImageError(answer.image, expected, "a picture", "leave --events out")
        if self._table and self._title:
            print(self._title, file=sys.stderr)
            if not self._events:
                print(self._table.header())
            self._title = ""
        if self._events and answer.seconds is not None:
            judged = [one for one in answer.faces if not one.small]
            self._frames, self._faces = self._frames + 1, self._faces + len(judged)
            labels = {one.track or 0: one.prediction.label for one in judged}
            self._print_events(answer.image, self._events.update(answer.seconds, labels))
        else:
            text = "\n".join(self._table.rows(answer)) if self._table else as_json(answer)
            print(text, flush=answer.frame is not None)  # who reads a camera's wants it now
        frame = "" if answer.frame is None else f", frame {answer.frame}"
        self._show_progress(f"{self.done}/{self._total}{frame}")

    def end_one(self, name: str) -> None:
        """A picture or video is done: print the events that end with it, or that it had none."""
        if self._events:
            shown = without_password(name)
            self._print_events(shown, self._events.end())
            if self._frames and not self._faces:
                self._show_progress("")
                print(printable(f"{shown}: no face in {self._frames} frames"), file=sys.stderr)
            self._frames = self._faces = 0
        self.done += 1

    def _print_events(self, name: str, events: Sequence[Event]) -> None:
        for one in events:
            prefix = f"{name}: " if self._total > 1 else ""
            start, end = f"{one.start:.1f} s", f"{one.end:.1f} s"
            when = f"at {start}" if start == end else f"from {start} to {end}"
            text = f"face {one.track}: {one.label} {when}"
            line = prefix + text if self._table else json.dumps({"image": name, **vars(one)})
            print(line, flush=True)

    def tell_unreadable(self, error: ImageError | BackendError) -> None:
        """Name a file that cannot be read, and count it."""
        self._unreadable += 1
        self._show_progress("")
        print(f"error: {error}", file=sys.stderr)

    def end(self) -> int:
        """The command's exit code, after the count of unreadable files."""
        self._show_progress("")
        if self._unreadable and self._total > 1:
            counted = f"{self._unreadable} of {self._total}"
            print(f"{counted} pictures, videos or cameras could not be read", file=sys.stderr)
        return 2 if self._unreadable else 0

    def _show_progress(self, text: str) -> None:
        """Replace a terminal's last line, unless the answers themselves appear there."""
        if sys.stderr.isatty() and not sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class PredictionTable:
    """Rows of a table as they come, in columns as wide as the model's labels; names are last.

    Args:
        spec: The model's.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._width = max(map(len, (*spec.labels, TOO_SMALL)))

    def header(self) -> str:
        """The columns' names."""
        return self._row("label", "prob", "next best", "box", "image")

    def rows(self, answer: Answer) -> list[str]:
        """A row for each face, or one that says that there is none."""
        name = printable(answer.image)
        if answer.seconds is not None:
            name += f" #{answer.frame} {answer.seconds:.2f} s"
        rows = []
        for found in answer.faces:
            prediction = found.prediction
            box = ",".join(f"{edge:.0f}" for edge in found.face.box)
            if found.small:
                rows.append(self._row(TOO_SMALL, "", "", box, name))
                continue
            ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
            others = ", ".join(f"{label} {probability:.2f}" for label, probability in ranked[1:3])
            where = name if found.track is None else f"{name} face {found.track}"
            rows.append(self._row(prediction.label, _confidence(prediction), others, box, where))
        return rows or [self._row("no face", "", "", "", name)]

    def _row(self, label: str, probability: str, others: str, box: str, name: str) -> str:
        next_best = 2 * self._width + len(" 0.00,  0.00")
        return f"{label:{self._width}}  {probability:5}  {others:{next_best}}  {box:>19}  {name}"


class Gallery:
    """A folder for annotated copies.

    Args:
        folder: New or empty, so that nothing of anybody's is replaced.
        sources: What the pictures come from; of a folder, the folders in it are kept.

    Raises:
        ConfigError: It holds something, is no folder, or cannot be written.
    """

    def __init__(self, folder: Path, sources: Sequence[str] = ()) -> None:
        check_new_folder(folder, "--draw")
        self._folder = folder
        self._sources = [Path(source) for source in sources if os.path.isdir(source)]
        self._given: set[Path] = set()  # also to what then could not be read: its copy is no other

    def place_for(self, name: str, suffix: str) -> Path:
        """Where a copy is to be: the whole name, then the copy's suffix where that differs.

        It is as deep in its folder as the picture in the one that was given. Only a name that is
        given already, as to pictures of one name that were named themselves, gets a number.
        """
        stem = "stdin" if name == STANDARD_INPUT else re.sub(r'[:?*"<>|&=]', "-", Path(name).name)
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
        stem = os.fsdecode(os.fsencode(stem)[:_LONGEST_STEM])
        folder = self._folder / self._below_source(Path(name))
        path, number = folder / f"{stem}{suffix}", 1
        while path in self._given or path.exists():
            number += 1
            path = folder / f"{stem}-{number}{suffix}"
        self._given.add(path)
        return path

    def _below_source(self, path: Path) -> Path:
        """The folders between a picture and the folder that was given, if one was."""
        above = (source for source in self._sources if path.is_relative_to(source))
        return next((path.relative_to(source).parent for source in above), Path())


def _confidence(prediction: Prediction) -> str:
    """With the mark of an unsure label."""
    return f"{prediction.confidence:.2f}{'?' if prediction.unsure else ''}"


def _annotated(image: Image.Image, faces: Sequence[FacePrediction]) -> Image.Image:
    texts = [
        TOO_SMALL if one.small else f"{one.prediction.label} {_confidence(one.prediction)}"
        for one in faces
    ]
    tracks = [one.track for one in faces]
    return draw_faces(image, zip([one.face for one in faces], texts, tracks, strict=True))
