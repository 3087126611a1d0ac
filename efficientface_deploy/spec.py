"""ModelSpec: everything that must travel with a network so that nobody has to guess it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from efficientface_deploy.errors import ConfigError, SpecError

SCHEMA_VERSION = 1

ARCHITECTURES = ("efficientface", "resnet18", "resnet29", "resnet50")
COLOURS = ("rgb", "grey")
RESIZE_FILTERS = ("bilinear", "bicubic")
FACE_CROPS = ("as-is", "box", "aligned")

SIZE_MULTIPLE = 16
"""EfficientFace halves the picture four times before its quadrants stop being whole."""

_SMALLEST = {"resnet29": 112}  # its last step finds 3x3 positions

Triple = tuple[float, float, float]  # a number for each channel of RGB


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a network expects and what its outputs mean.

    Attributes:
        architecture: ``efficientface`` (a student), or ``resnet18``, ``resnet29`` or ``resnet50``
            (an LDG).
        labels: Class names in the order of the logits.
        input_size: Side of the square input, pixels, a multiple of 16.
        mean: Per-channel mean of RGB in [0, 1], subtracted after scaling by 1/255.
        std: Per-channel standard deviation of RGB in [0, 1], divided by after the mean.
        colour: ``rgb``, or ``grey`` for a network that sees luminance in all three channels.
        resize: Filter of the antialiased resize to ``input_size``; aspect is not kept.
        face_crop: What a training image showed, so that a detector can cut alike: ``as-is``
            (whole image), ``box`` (a detector's box), ``aligned`` (warped by landmarks).
        name: Data set and network, for people to read.
        preliminary: True for weights that are meant to be replaced by better ones.
        class_frequencies: Share of each class in the training set, in the order of the labels;
            None where the file does not say.
        sure_above: Probability above which a label is sure, 0 to 1; 1 where none ever is, None
            where the file does not say.
        sure_precision: How many of the sure labels are to be right, 0 to 1; None as before.
        schema: Version of this form; a file with another one is refused.
    """

    architecture: str
    labels: tuple[str, ...]
    input_size: int
    mean: Triple
    std: Triple
    colour: str = "rgb"
    resize: str = "bilinear"
    face_crop: str = "as-is"
    name: str = ""
    preliminary: bool = False
    class_frequencies: tuple[float, ...] | None = None
    sure_above: float | None = None
    sure_precision: float | None = None
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Refuse a spec that no network could have.

        Raises:
            SpecError: A field has the wrong type or a value out of its range.
        """
        if not _is_int(self.schema) or self.schema != SCHEMA_VERSION:
            raise _bad("schema", f"{SCHEMA_VERSION}", self.schema, "update efficientface-deploy")
        for field, known in (
            ("architecture", ARCHITECTURES),
            ("colour", COLOURS),
            ("resize", RESIZE_FILTERS),
            ("face_crop", FACE_CROPS),
        ):
            value = getattr(self, field)
            if value not in known:
                raise _bad(field, "one of " + ", ".join(known), value)
        self._check_labels()
        size, smallest = self.input_size, _SMALLEST.get(self.architecture, 32)
        if not _is_int(size) or size % SIZE_MULTIPLE or not smallest <= size <= 1024:
            raise _bad("input_size", f"a multiple of 16 between {smallest} and 1024", size)
        self._check_normalisation()
        if not isinstance(self.name, str) or not isinstance(self.preliminary, bool):
            raise _bad("name/preliminary", "a text and a boolean", (self.name, self.preliminary))
        self._check_class_frequencies()
        for field in ("sure_above", "sure_precision"):
            value = getattr(self, field)
            if value is not None and not (_is_finite(value) and 0 <= value <= 1):
                raise _bad(field, "a number from 0 to 1", value)
        if (self.sure_above is None) != (self.sure_precision is None):
            raise _bad("sure_above/sure_precision", "both or none", (self.sure_above,))

    def _check_labels(self) -> None:
        labels = self.labels
        texts = isinstance(labels, tuple) and all(
            isinstance(x, str) and x.strip() and x.isprintable() for x in labels
        )
        if not texts or len(labels) < 2 or len(set(labels)) != len(labels):
            raise _bad("labels", "two or more different, non-empty, printable names", labels)

    def _check_normalisation(self) -> None:
        for field in ("mean", "std"):
            values = getattr(self, field)
            numbers = isinstance(values, tuple) and all(_is_finite(x) for x in values)
            if not numbers or len(values) != 3:
                raise _bad(field, "three finite numbers", values)
        if min(self.std) <= 0:
            raise _bad("std", "three positive numbers", self.std)

    def _check_class_frequencies(self) -> None:
        shares = self.class_frequencies
        if shares is None:
            return
        numbers = isinstance(shares, tuple) and all(_is_finite(x) for x in shares)
        if not numbers or len(shares) != self.num_classes or not _are_shares(shares):
            raise _bad("class_frequencies", "a positive share for each label, one in sum", shares)

    @property
    def num_classes(self) -> int:
        """Number of classes, the width of the logits."""
        return len(self.labels)

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def resized(self, size: int, architecture: str | None = None) -> ModelSpec:
        """A copy for another input size, which a user asks for, and for another network.

        Raises:
            ConfigError: The network cannot have the size.
        """
        try:
            return self.replace(input_size=size, architecture=architecture or self.architecture)
        except SpecError as error:
            fix = "give another --input-size"
            raise ConfigError("--input-size", error.expected, error.found, fix) from None

    def to_json(self) -> str:
        """The spec as one line of JSON, keys sorted, floats exact.

        What is None is left out, so that older releases read it too.
        """
        fields = dataclasses.asdict(self)
        known = {key: value for key, value in fields.items() if value is not None}
        return json.dumps(known, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: object = "model spec") -> ModelSpec:
        """Read a spec back.

        Args:
            text: JSON written by :meth:`to_json`.
            source: File that the text came from, for the error.

        Raises:
            SpecError: Not JSON, not an object, a missing or unknown key, a value out of range.
        """

        def bad(expected: str, found: str) -> SpecError:
            return SpecError(source, expected, found, _REMAKE)

        try:
            fields = json.loads(text)
        except (ValueError, RecursionError, TypeError):
            raise bad("a ModelSpec as JSON", "text that is not JSON") from None
        if not isinstance(fields, dict):
            raise bad("a ModelSpec as JSON", type(fields).__name__)
        known = {field.name for field in dataclasses.fields(cls)}
        required = {"schema", "architecture", "labels", "input_size", "mean", "std"}
        if unknown := sorted(set(fields) - known):
            raise bad("keys of a ModelSpec", "unknown key " + ", ".join(unknown))
        if missing := sorted(required - set(fields)):
            raise bad("all keys of a ModelSpec", "no " + ", ".join(missing))
        for key in ("labels", "mean", "std", "class_frequencies"):
            if isinstance(fields.get(key), list):
                fields[key] = tuple(fields[key])
        try:
            return cls(**fields)
        except SpecError as error:
            subject = f"{source}: {error.subject}"
            raise SpecError(subject, error.expected, error.found, error.fix) from None


_REMAKE = "export or train the model again with this version"


def _bad(field: str, expected: str, found: object, fix: str = _REMAKE) -> SpecError:
    try:
        shown = repr(found)
    except ValueError:  # Python prints no integer of more than 4300 digits
        shown = f"{type(found).__name__} with a huge number"
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return SpecError(f"ModelSpec.{field}", expected, shown, fix)


def _are_shares(values: tuple[float, ...]) -> bool:
    return min(values) > 0 and abs(sum(values) - 1) < 1e-3


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


# Order of the published EfficientFace code, which is not RAF-DB's own numbering (1 Surprise, ...).
_SEVEN = ("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger")
# Order of the columns in FER+ (Barsoum et al. 2016), without unknown and NF.
_FERPLUS = ("Neutral", "Happiness", "Surprise", "Sadness", "Anger", "Disgust", "Fear", "Contempt")

# Mean and standard deviation of each channel, of the published EfficientFace code; FER+: measured
# on its train split (luminance of 28,386 faces), the same for all since the pictures are grey.
_RAFDB = (0.57535914, 0.44928582, 0.40079932), (0.20735591, 0.18981615, 0.18132027)
_AFFECTNET = (0.55391484, 0.43522123, 0.3821877), (0.24837189, 0.21625527, 0.20221159)
_CAERS = (0.35964426, 0.22359873, 0.19040863), (0.15188067, 0.11678473, 0.1103445)
_GREY = (0.50697356, 0.50697356, 0.50697356), (0.25423586, 0.25423586, 0.25423586)


def _student(
    name: str, labels: tuple[str, ...], normalisation: tuple[Triple, Triple], face_crop: str
) -> ModelSpec:
    mean, std = normalisation
    return ModelSpec("efficientface", labels, 224, mean, std, face_crop=face_crop, name=name)


#: What was published with each data set, by its name; see :func:`preset`.
PRESETS: dict[str, ModelSpec] = {
    "rafdb": _student("RAF-DB", _SEVEN, _RAFDB, "aligned"),
    "affectnet7": _student("AffectNet-7", _SEVEN, _AFFECTNET, "box"),
    "affectnet8": _student("AffectNet-8", (*_SEVEN, "Contempt"), _AFFECTNET, "box"),
    "caers": _student("CAER-S", _SEVEN, _CAERS, "as-is"),
    "ferplus": _student("FER+", _FERPLUS, _GREY, "box").replace(input_size=96, colour="grey"),
}


def preset(name: str) -> ModelSpec:
    """The spec of a data set by name.

    Args:
        name: One of :data:`PRESETS`.

    Raises:
        SpecError: There is no such preset.
    """
    if name not in PRESETS:
        fix = "choose one of these, or read a checkpoint that carries its own spec"
        raise SpecError("preset", "one of " + ", ".join(PRESETS), repr(name), fix)
    return PRESETS[name]
