"""Does an artifact compute what the reference network computes? Measured on real images."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import efficientface_deploy as ef
from efficientface_deploy.artifact import ONNX_SUFFIX
from efficientface_deploy.errors import VerificationError
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench.evaluation import Differences, Scores, run_in_batches, softmax
from efficientface_deploy.workbench.metrics import Interval
from efficientface_deploy.workbench.requirements import is_installed
from efficientface_export.verification.reference import TestSet

# Fewer images decide nothing against an artifact: on a handful, labels that are nearly alike count
# for too much.
_FAILS_FROM = 100


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What an artifact must keep to, compared with the reference.

    Attributes:
        max_difference: Largest difference in any probability.
        min_agreement: Part of the images with the same most probable class. Where all of its
            95 % interval lies below, it is a failure; where the figure does but its interval
            reaches further, that is not decided.
        max_kl: Mean Kullback-Leibler divergence of the probabilities, in nats.
        max_features: Difference of the features as a part of their length, mean of the images.
    """

    max_difference: float
    min_agreement: float
    max_kl: float
    max_features: float

    @property
    def min_images(self) -> int:
        """Images from which on the agreement may be judged: one may then differ."""
        may_differ = 1 - self.min_agreement
        return math.ceil(round(1 / may_differ, 6)) if may_differ > 0 else 1


# FP32: float rounding in another order of summation. FP16: its 11 bits over some 70 layers, ten
# times what was measured on FER+ (0.004). INT8: single images may move; labels and the mean must
# not (measured on FER+: agreement 0.988 and KL 0.0016 with all layers in INT8, better with the
# search: docs/int8.md; random features under a fitted head gave KL 0.03). Features on FER+: 3e-7,
# 7e-4 and 0.03; random ones in FP16: 0.02. BF16, in which no file is but OpenVINO can compute, has
# 8 bits: on FER+ 0.05, agreement 0.9994 and KL 4e-5.
THRESHOLDS = {
    "fp32": Threshold(max_difference=5e-5, min_agreement=0.999, max_kl=1e-6, max_features=1e-4),
    "bf16": Threshold(max_difference=0.25, min_agreement=0.995, max_kl=1e-3, max_features=0.1),
    "fp16": Threshold(max_difference=0.05, min_agreement=0.998, max_kl=1e-3, max_features=0.05),
    "int8": Threshold(max_difference=0.75, min_agreement=0.98, max_kl=0.05, max_features=0.5),
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
        undecided: What these images are too few for; empty when all is decided.
        probe: What the artifact's probe showed; empty where it has none.
        features: See :class:`Threshold`; None where it has none, or they are not known.
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
    undecided: tuple[str, ...] = ()
    probe: str = ""
    features: float | None = None

    @property
    def status(self) -> str:
        """``verified``, ``FAILED``, ``not decided`` or ``built, not verified here``.

        Not decided is what has a figure below its bound that may be chance; too few images for
        one of the figures leave it to the others.
        """
        if self.not_run:
            return "built, not verified here"
        if self.problems:
            return "FAILED"
        return "not decided" if any(" < " in text for text in self.undecided) else "verified"

    @property
    def reason(self) -> str:
        """What is wrong or not decided, or why it was not run; empty when all is verified."""
        return self.not_run or "; ".join(self.problems or self.undecided)

    def exceeds(self, figure: str) -> bool:
        """Whether ``difference``, ``KL``, ``agreement`` or ``features`` is among the problems."""
        return any(problem.startswith(figure + " ") for problem in self.problems)

    @property
    def agreement_text(self) -> str:
        """Agreement with its interval, ``0.9940 [0.9906, 0.9962]``; empty when it was not run."""
        return with_interval(self.agreement, self.agreement_interval, ".4f")

    @property
    def difference_text(self) -> str:
        """Accuracy minus the reference's with its interval; empty where labels are unknown."""
        return with_interval(self.accuracy_difference, self.accuracy_interval, "+.4f")

    def as_dict(self) -> dict[str, Any]:
        """For reports and provenance."""
        return {"status": self.status, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Verification:
        """Read back what :meth:`as_dict` made.

        Raises:
            TypeError: It is something else.
        """
        values: dict[str, Any] = {
            "undecided": (),
            "probe": "",
            "features": None,
        }  # which older reports lack
        values |= {name: value for name, value in fields.items() if name != "status"}
        for field in dataclasses.fields(cls):
            if not isinstance(values.get(field.name), _FIELD_TYPES[str(field.type)]):
                raise TypeError(field.name)
        for name in ("agreement_interval", "accuracy_interval"):
            if values.get(name) is not None:
                low, high = map(float, values[name])
                values[name] = low, high
        for name in ("problems", "undecided"):
            values[name] = tuple(map(str, values[name]))
        return cls(**values)


def number(value: float | None, form: str) -> str:
    """A figure as text; empty when there is none."""
    return "" if value is None else format(value, form)


def with_interval(value: float | None, interval: Interval | None, form: str) -> str:
    """A figure with its interval as text; empty when there is none."""
    if value is None or interval is None:
        return number(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def compare(
    probabilities: Float32Array,
    reference_logits: Float32Array,
    test_set: TestSet,
    precision: str,
    runner: str,
    features: Float32Array | None = None,
) -> Verification:
    """Compare an artifact's probabilities with those of the reference's logits.

    Args:
        probabilities: float32 (N, C), the artifact's.
        reference_logits: float32 (N, C), PyTorch's.
        test_set: The images that both saw.
        precision: Chooses the thresholds.
        runner: What ran the artifact.
        features: float32 (N, F), the artifact's, where the test set has the reference's.
    """
    found = Differences.of(softmax(reference_logits), probabilities, test_set.labels)
    images, agreement, kl = len(probabilities), found.agreement, found.mean_kl
    threshold, interval = THRESHOLDS[precision], found.agreement_interval
    problems = []
    # Written so that NaN counts as a problem.
    if not found.largest <= threshold.max_difference:
        problems.append(f"difference {found.largest:.2g} > {threshold.max_difference:g}")
    if not kl <= threshold.max_kl:
        problems.append(f"KL {kl:.2g} > {threshold.max_kl:g}")
    difference = None
    if features is not None and test_set.features is not None:
        difference = features_difference(test_set.features, features)
        if not difference <= threshold.max_features:
            problems.append(f"features {difference:.2g} > {threshold.max_features:g}")
    undecided = []
    is_below = not agreement >= threshold.min_agreement
    figure = f"agreement {agreement:.4f} {'<' if is_below else 'of'} {threshold.min_agreement:g}"
    enough = images >= min(_FAILS_FROM, threshold.min_images)
    if enough and not interval[1] >= threshold.min_agreement:
        problems.append(figure)
    elif images < threshold.min_images:
        undecided.append(f"{figure} on {images} images, needs at least {threshold.min_images}")
    elif is_below:
        undecided.append(f"{figure} on {images} images, perhaps by chance")
    verification = Verification(
        runner=runner,
        images=images,
        source=test_set.source,
        max_difference=found.largest,
        agreement=agreement,
        agreement_interval=interval,
        kl=kl,
        problems=tuple(problems),
        undecided=tuple(undecided),
        features=difference,
    )
    if test_set.labels is None or found.accuracy is None:
        return verification
    scores = Scores.of(test_set.labels, probabilities)
    return dataclasses.replace(
        verification,
        accuracy=scores.accuracy,
        accuracy_difference=found.accuracy.value,
        accuracy_interval=found.accuracy.interval,
        macro_f1=scores.macro_f1,
    )


def features_difference(reference: Float32Array, features: Float32Array) -> float:
    """Mean length of the difference by that of the reference's, of features (N, F)."""
    lengths = np.linalg.norm(reference, axis=1)
    return float(np.mean(np.linalg.norm(features - reference, axis=1) / np.maximum(lengths, 1e-6)))


def verify_artifact(
    path: Path,
    reference_logits: Float32Array,
    test_set: TestSet,
    precision: str,
    backend: str = "auto",
) -> Verification:
    """Run an artifact through the runtime that users embed, and compare.

    Args:
        path: ``*.onnx`` or ``*.engine``.
        reference_logits: float32 (N, C), PyTorch's on ``test_set``.
        test_set: The images.
        precision: Chooses the thresholds.
        backend: What runs it, as for :func:`load`.

    Returns:
        The comparison; when no backend here can run the file, one that says why.
    """
    try:
        with _open_runner(path, backend) as runner:
            try:
                probabilities = run_in_batches(runner.infer, test_set.images)
                features = None
                if runner.features is not None and test_set.features is not None:
                    features = run_in_batches(runner.features, test_set.images)
            except ef.BackendError as error:  # NaN, above all
                return _wrong(runner.name, test_set, f"{error.found} instead of {error.expected}")
            given = reference_logits, test_set, precision, runner.name
            found = compare(probabilities, *given, features)
            return dataclasses.replace(found, probe=runner.probe)
    except ef.ProbeError as error:
        return _wrong(error.subject, test_set, f"probe: {error.found}")
    except ef.BackendError as error:
        return Verification(not_run=f"{error.subject}: {error.found}", source=test_set.source)


def _wrong(runner: str, test_set: TestSet, problem: str) -> Verification:
    """The verification of what gives no outputs, or others than its own probe says."""
    count, source = len(test_set.images), test_set.source
    return Verification(runner=runner, images=count, source=source, problems=(problem,))


def wrong_outputs(names: Sequence[str], fix: str) -> VerificationError:
    """The error that ends a command after artifacts that failed."""
    expected = "outputs like the reference network's"
    return VerificationError(", ".join(names), expected, "others", fix)


def score_artifact(path: Path, test_set: TestSet) -> Scores:
    """Scores of an artifact on a labelled test set.

    Raises:
        BackendError: Nothing here can run it.
    """
    assert test_set.labels is not None
    with _open_runner(path) as runner:
        return Scores.of(test_set.labels, run_in_batches(runner.infer, test_set.images))


@dataclasses.dataclass(frozen=True)
class _Runner:
    """What runs an artifact.

    Attributes:
        name: For people.
        infer: Probabilities, float32 (N, C), of images, uint8 (N, S, S, 3).
        probe: What the artifact's probe showed; empty where it has none.
        features: As ``infer``, the artifact's features; None where it has none.
    """

    name: str
    infer: Callable[[UInt8Array], Float32Array]
    probe: str
    features: Callable[[UInt8Array], Float32Array] | None = None


@contextlib.contextmanager
def _open_runner(path: Path, backend: str = "auto") -> Iterator[_Runner]:
    """The runtime that users embed; where it computes a GPU's file wrongly here, an emulation.

    Raises:
        ProbeError: What runs the artifact here computes it wrongly, or the artifact is wrong.
        BackendError: Nothing here can run it.
    """
    try:
        predictor = ef.load(path, backend=backend, check=True)  # whatever the environment says
    except ef.ProbeError as error:
        yield _emulator(path, error)
        return
    with predictor:
        checked = predictor.checked
        probe = "" if checked is None else _near(checked.difference, checked.tolerance)
        features = None if predictor.feature_size is None else predictor.features
        yield _Runner(predictor.backend, lambda batch: predictor.infer(batch)[1], probe, features)


def _emulator(path: Path, error: ef.ProbeError) -> _Runner:
    """The judge of a GPU's file that the CPU here computes wrongly.

    Raises:
        ProbeError: The file is for the engine that failed, or it does not give what it says.
    """
    if path.suffix != ONNX_SUFFIX or not is_installed("onnx"):
        raise error
    from efficientface_export.graph.io import read_onnx
    from efficientface_export.verification.probes import emulate

    file = read_onnx(path)
    if file.provenance.get("target") != "gpu" or file.probe is None:
        raise error
    infer = emulate(file.graph, file.spec)
    difference = file.probe.difference(infer(file.probe.images(file.spec.input_size))[0])
    if not difference <= file.probe.tolerance:
        raise error
    name = f"an emulation in FP32, since {error.subject} computes this file wrongly"
    return _Runner(name, lambda batch: infer(batch)[1], _near(difference, file.probe.tolerance))


def _near(difference: float, tolerance: float) -> str:
    return f"its logits but for {difference:.1g} of their spread (at most {tolerance:g})"
