"""Does an artifact compute what the reference network computes? Measured on real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import efficientface_deploy as ef
from efficientface_deploy.errors import VerificationError
from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.evaluation import Differences, Scores, run_in_batches, softmax
from efficientface_deploy.workbench.metrics import (
    Interval,
)
from efficientface_export.verification.reference import TestSet

# Agreement on a handful of images moves in steps that are too coarse to judge by.
MINIMUM_FOR_AGREEMENT = 100


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What an artifact must keep to, compared with the reference.

    Attributes:
        max_difference: Largest difference in any probability.
        min_agreement: Part of the images with the same most probable class; judged by the upper
            end of its 95 % interval, so that chance on few images fails nothing.
        max_kl: Mean Kullback-Leibler divergence of the probabilities, in nats.
    """

    max_difference: float
    min_agreement: float
    max_kl: float


# FP32: float rounding in another order of summation. FP16: its 11 bits over some 70 layers, ten
# times what was measured on FER+ (0.004). INT8: single images may move; labels and the mean must
# not (measured on FER+: agreement 0.988 and KL 0.0016 with all layers in INT8, better with the
# search: docs/int8.md; random features under a fitted head gave KL 0.03).
THRESHOLDS = {
    "fp32": Threshold(max_difference=5e-5, min_agreement=0.999, max_kl=1e-6),
    "fp16": Threshold(max_difference=0.05, min_agreement=0.998, max_kl=1e-3),
    "int8": Threshold(max_difference=0.75, min_agreement=0.98, max_kl=0.05),
}


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float | None": (float, int, type(None)),
    "Interval | None": (list, tuple, type(None)),
    "tuple[str, ...]": (list, tuple),
}


@dataclasses.dataclass(frozen=True)
class Verification:
    """One artifact compared with the reference.

    Attributes:
        runner: What ran it, e.g. ``onnx:cpu``; empty when nothing here could.
        images: Number of images.
        source: Where they come from.
        max_difference: See :class:`Threshold`; None when it was not run.
        agreement: See :class:`Threshold`.
        agreement_interval: Its 95 % interval.
        kl: See :class:`Threshold`.
        accuracy: Part of the images with the right label, where labels are known.
        accuracy_difference: That minus the reference's, on the same images.
        accuracy_interval: The 95 % interval of this difference.
        macro_f1: Macro-averaged F1, where labels are known.
        problems: What exceeded its threshold; empty when the artifact is right.
        not_run: Why nothing here could run it; empty when it was run.
    """

    runner: str = ""
    images: int = 0
    source: str = ""
    max_difference: float | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None
    kl: float | None = None
    accuracy: float | None = None
    accuracy_difference: float | None = None
    accuracy_interval: Interval | None = None
    macro_f1: float | None = None
    problems: tuple[str, ...] = ()
    not_run: str = ""

    @property
    def status(self) -> str:
        """``verified``, ``FAILED`` or ``built, not verified here``."""
        if self.not_run:
            return "built, not verified here"
        return "FAILED" if self.problems else "verified"

    @property
    def reason(self) -> str:
        """What is wrong, or why it was not run; empty when it is verified."""
        return self.not_run or "; ".join(self.problems)

    def exceeds(self, figure: str) -> bool:
        """Whether ``difference``, ``KL`` or ``agreement`` is among the problems."""
        return any(problem.startswith(figure + " ") for problem in self.problems)

    @property
    def agreement_text(self) -> str:
        """Agreement with its interval, ``0.9940 [0.9906, 0.9962]``; empty when it was not run."""
        return _with_interval(self.agreement, self.agreement_interval, ".4f")

    @property
    def difference_text(self) -> str:
        """Accuracy minus the reference's with its interval; empty where labels are unknown."""
        return _with_interval(self.accuracy_difference, self.accuracy_interval, "+.4f")

    def as_dict(self) -> dict[str, Any]:
        """For reports and provenance."""
        return {"status": self.status, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Verification:
        """Read back what :meth:`as_dict` made.

        Raises:
            TypeError: It is something else.
        """
        values = {name: value for name, value in fields.items() if name != "status"}
        for field in dataclasses.fields(cls):
            if not isinstance(values.get(field.name), _FIELD_TYPES[str(field.type)]):
                raise TypeError(field.name)
        for name in ("agreement_interval", "accuracy_interval"):
            if values.get(name) is not None:
                low, high = map(float, values[name])
                values[name] = low, high
        return cls(**{**values, "problems": tuple(map(str, values["problems"]))})


def number(value: float | None, form: str) -> str:
    """A figure as text; empty when there is none."""
    return "" if value is None else format(value, form)


def _with_interval(value: float | None, interval: Interval | None, form: str) -> str:
    if value is None or interval is None:
        return number(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def compare(
    probabilities: Float32Array,
    reference_logits: Float32Array,
    test_set: TestSet,
    precision: str,
    runner: str,
) -> Verification:
    """Judge an artifact's probabilities by the reference's logits.

    Args:
        probabilities: float32 (N, C), the artifact's.
        reference_logits: float32 (N, C), PyTorch's.
        test_set: The images that both saw.
        precision: Chooses the thresholds.
        runner: What ran the artifact.
    """
    reference = softmax(reference_logits)
    threshold = THRESHOLDS[precision]
    apart = Differences.of(reference, probabilities, test_set.labels)
    images, agreement, kl = len(reference), apart.agreement, apart.mean_kl

    problems = []
    # Written so that NaN counts as a problem.
    if not apart.largest <= threshold.max_difference:
        problems.append(f"difference {apart.largest:.2g} > {threshold.max_difference:g}")
    if not kl <= threshold.max_kl:
        problems.append(f"KL {kl:.2g} > {threshold.max_kl:g}")
    if (
        images >= MINIMUM_FOR_AGREEMENT
        and not apart.agreement_interval[1] >= threshold.min_agreement
    ):
        problems.append(f"agreement {agreement:.4f} < {threshold.min_agreement:g}")

    verification = Verification(
        runner=runner,
        images=images,
        source=test_set.source,
        max_difference=apart.largest,
        agreement=agreement,
        agreement_interval=apart.agreement_interval,
        kl=kl,
        problems=tuple(problems),
    )
    if test_set.labels is None or apart.accuracy is None:
        return verification
    scores = Scores.of(test_set.labels, probabilities)
    return dataclasses.replace(
        verification,
        accuracy=scores.accuracy,
        accuracy_difference=apart.accuracy.value,
        accuracy_interval=apart.accuracy.interval,
        macro_f1=scores.macro_f1,
    )


def verify_artifact(
    path: Path, reference_logits: Float32Array, test_set: TestSet, precision: str
) -> Verification:
    """Run an artifact through the runtime that users embed, and compare.

    Args:
        path: ``*.onnx`` or ``*.engine``.
        reference_logits: float32 (N, C), PyTorch's on ``test_set``.
        test_set: The images.
        precision: Chooses the thresholds.

    Returns:
        The comparison; when no backend here can run the file, one that says why.
    """
    try:
        predictor = ef.load(path)
    except ef.BackendError as error:
        return Verification(not_run=f"{error.subject}: {error.found}", source=test_set.source)
    with predictor:
        try:
            probabilities = _probabilities(predictor, test_set)
        except ef.BackendError as error:  # NaN, above all
            return Verification(
                runner=predictor.backend,
                images=len(test_set.images),
                source=test_set.source,
                problems=(f"{error.found} instead of {error.expected}",),
            )
        return compare(probabilities, reference_logits, test_set, precision, predictor.backend)


def wrong_outputs(names: Sequence[str], fix: str) -> VerificationError:
    """The error that ends a command after artifacts that failed."""
    return VerificationError(
        ", ".join(names), "outputs like the reference network's", "others", fix
    )


def score_artifact(path: Path, test_set: TestSet) -> dict[str, float]:
    """``accuracy`` and ``macro_f1`` of an artifact on a labelled test set.

    Raises:
        BackendError: Nothing here can run it.
    """
    assert test_set.labels is not None
    with ef.load(path) as predictor:
        scores = Scores.of(test_set.labels, _probabilities(predictor, test_set))
    return {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


def _probabilities(predictor: ef.Predictor, test_set: TestSet) -> Float32Array:
    return run_in_batches(lambda batch: predictor.infer(batch)[1], test_set.images)
