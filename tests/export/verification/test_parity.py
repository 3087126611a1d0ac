"""Verification: the thresholds, the test set, and the reference stored beside an artifact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efficientface_deploy as ef
from efficientface_deploy.workbench.evaluation import softmax
from efficientface_export.verification.parity import (
    THRESHOLDS,
    Verification,
    compare,
    score_artifact,
    verify_artifact,
)
from efficientface_export.verification.provenance import PRECISIONS
from efficientface_export.verification.reference import TestSet

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((200, 7)).astype(np.float32) * 2
BLANK = TestSet(np.zeros((200, 64, 64, 3), dtype=np.uint8), None, "nothing")
PARENT = "f" * 64


def judge(probabilities: np.ndarray, precision: str, test_set: TestSet = BLANK) -> Verification:
    count = len(probabilities)
    return compare(
        probabilities.astype(np.float32), LOGITS[:count], test_set, precision, "onnx:cpu"
    )


class TestThresholds:
    @pytest.mark.parametrize("precision", THRESHOLDS)
    def test_the_same_passes(self, precision: str) -> None:
        found = judge(softmax(LOGITS), precision)
        assert found.problems == ()
        assert found.status == "verified"
        assert (found.max_difference, found.agreement) == (0, 1)
        assert (found.images, found.runner, found.source) == (200, "onnx:cpu", "nothing")

    @pytest.mark.parametrize(
        ("precision", "harmless", "harmful"),
        [("fp32", 1e-6, 3e-4), ("fp16", 2e-3, 0.3), ("int8", 0.1, 1.5)],
    )
    def test_noise(self, precision: str, harmless: float, harmful: float) -> None:
        noise = np.random.default_rng(1).standard_normal(LOGITS.shape)
        assert judge(softmax(LOGITS + harmless * noise), precision).problems == ()
        found = judge(softmax(LOGITS + harmful * noise), precision)
        assert found.status == "FAILED"
        assert found.problems

    @pytest.mark.parametrize(
        ("precision", "harmless", "harmful"),
        [("fp32", 1e-5, 1e-3), ("fp16", 1e-3, 0.1), ("int8", 0.1, 0.8)],
    )
    def test_features(self, precision: str, harmless: float, harmful: float) -> None:
        right = np.abs(np.random.default_rng(1).standard_normal((200, 64))).astype(np.float32)
        given = dataclasses.replace(BLANK, features=right)
        for size, fails in ((harmless, False), (harmful, True), (np.nan, True)):
            features = (right * (1 + size)).astype(np.float32)
            found = compare(softmax(LOGITS), LOGITS, given, precision, "onnx:cpu", features)
            assert found.features == pytest.approx(size, rel=1e-2, nan_ok=True)
            assert found.exceeds("features") == fails == bool(found.problems)
        assert judge(softmax(LOGITS), precision, given).features is None

    def test_one_image_is_enough_for_fp32_and_fp16(self) -> None:
        probabilities = softmax(LOGITS)
        probabilities[7] = np.roll(probabilities[7], 1)
        for precision in ("fp32", "fp16"):
            (difference, *_) = judge(probabilities, precision).problems
            assert difference.startswith("difference ")

    def test_wrong_labels(self) -> None:
        """Classes in another order: the best-known mistake of all."""
        found = judge(np.roll(softmax(LOGITS), 1, axis=1), "int8")
        assert len(found.problems) == 3
        assert found.agreement is not None and found.agreement < 0.3

    @pytest.mark.parametrize(("changed", "problems"), [(1, 0), (30, 1)])
    def test_agreement_is_judged_by_what_chance_allows(self, changed: int, problems: int) -> None:
        """200 images, the two best classes of some swapped by a hair: 99.5 % and 85 %."""
        logits = np.zeros((200, 7), dtype=np.float32)
        logits[:, 3] = 1e-4
        probabilities = softmax(logits)
        probabilities[:changed, 4] = probabilities[0, 3] + 1e-5
        found = compare(probabilities, logits, BLANK, "fp16", "x")
        assert found.agreement == 1 - changed / 200
        assert found.agreement_interval is not None
        low, high = found.agreement_interval
        assert low < found.agreement < high
        assert len(found.problems) == problems

    def test_agreement_of_a_handful_is_not_judged(self) -> None:
        flat = np.full((16, 7), 1 / 7) + np.eye(7)[RANDOM.integers(0, 7, 16)] * 1e-3
        flat /= flat.sum(axis=1, keepdims=True)
        logits = np.zeros((16, 7), dtype=np.float32)
        found = compare(flat.astype(np.float32), logits, BLANK, "fp16", "x")
        assert found.agreement is not None and found.agreement < 0.5
        assert found.problems == ()
        assert found.status == "not decided"  # never verified beside a figure below its bound
        assert "needs at least 500" in found.reason

    @pytest.mark.parametrize(
        ("precision", "images", "differing", "status"),
        [
            ("int8", 16, 0, "verified"),  # but for the agreement, which is a question
            ("int8", 16, 3, "not decided"),
            ("int8", 49, 1, "not decided"),
            ("int8", 50, 1, "verified"),
            ("int8", 350, 8, "not decided"),  # 0.9771 [0.9556, 0.9884]
            ("int8", 350, 14, "FAILED"),
            ("fp32", 999, 0, "verified"),
        ],
    )
    def test_agreement_is_verified_failed_or_a_question(
        self, precision: str, images: int, differing: int, status: str
    ) -> None:
        # Two classes nearly alike, so that a label moves while difference and KL stay small.
        logits = np.tile(np.array([[2.0, 1.99999, 0.0]], np.float32), (images, 1))
        moved = logits.copy()
        moved[:differing] = moved[:differing, [1, 0, 2]]
        blank = TestSet(np.zeros((images, 1, 1, 3), np.uint8), None, "blank")
        found = compare(softmax(moved), logits, blank, precision, "x")
        assert found.status == status
        assert bool(found.undecided) == (status == "not decided" or images in (16, 999))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity divided by infinity
    @pytest.mark.parametrize("precision", THRESHOLDS)
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_finite(self, precision: str, bad: float) -> None:
        probabilities = softmax(LOGITS)
        probabilities[3, 2] = bad
        assert judge(probabilities, precision).status == "FAILED"

    def test_scores(self) -> None:
        labels = LOGITS.argmax(axis=1)
        labels[:50] = (labels[:50] + 1) % 7
        found = judge(softmax(LOGITS), "fp32", dataclasses.replace(BLANK, labels=labels))
        assert found.accuracy == 0.75
        assert found.macro_f1 is not None and 0.6 < found.macro_f1 < 0.9
        assert judge(softmax(LOGITS), "fp32").accuracy is None

    def test_accuracy_is_compared_image_by_image(self) -> None:
        """Three images fewer than the reference has right, and the interval of that difference."""
        probabilities = softmax(LOGITS)
        probabilities[:3] = np.roll(probabilities[:3], 1, axis=1)
        test_set = dataclasses.replace(BLANK, labels=LOGITS.argmax(axis=1))
        found = judge(probabilities, "int8", test_set)
        assert found.accuracy_difference == -0.015
        assert found.accuracy_interval is not None
        assert -0.05 < found.accuracy_interval[0] < -0.015 < found.accuracy_interval[1] < 0.01
        assert found.difference_text.startswith("-0.0150 [-0.0")
        assert found.agreement_text == "0.9850 [0.9568, 0.9949]"
        assert judge(probabilities, "int8").difference_text == ""


class TestVerification:
    def test_round_trip(self) -> None:
        test_set = dataclasses.replace(BLANK, labels=LOGITS.argmax(axis=1))
        found = judge(softmax(LOGITS + 1), "fp16", test_set)
        content = json.loads(json.dumps(found.as_dict()))
        assert content["status"] == "verified"
        assert Verification.from_dict(content) == found

    def test_not_run(self) -> None:
        found = Verification(not_run="no GPU")
        assert found.status == "built, not verified here"
        assert found.reason == "no GPU"

    @pytest.mark.parametrize("figure", ["difference", "KL", "agreement"])
    def test_exceeds(self, figure: str) -> None:
        found = Verification(problems=(f"{figure} 1 > 0",))
        assert [name for name in ("difference", "KL", "agreement") if found.exceeds(name)] == [
            figure
        ]


class TestArtifact:
    def reference(self, exported: Path, images: np.ndarray, infer: Any) -> tuple[Any, TestSet]:
        logits, _ = infer(exported / "efficientface-fp32-cpu.onnx", images)
        return logits, TestSet(images, np.zeros(len(images), dtype=np.int64), "forty faces")

    def test_good(self, exported: Path, images: np.ndarray, infer: Any) -> None:
        logits, test_set = self.reference(exported, images, infer)
        for precision in PRECISIONS:
            path = exported / f"efficientface-{precision}-cpu.onnx"
            found = verify_artifact(path, logits, test_set, precision)
            assert found.problems == ()
            assert found.status == "verified"
            assert (found.runner, found.images) == ("onnx:cpu", 40)
            assert found.accuracy == score_artifact(path, test_set).accuracy

    def test_worse_than_its_name(self, exported: Path, images: np.ndarray, infer: Any) -> None:
        logits, test_set = self.reference(exported, images, infer)
        path = exported / "efficientface-int8-cpu.onnx"
        assert verify_artifact(path, logits, test_set, "fp32").status == "FAILED"

    def test_nan_is_a_failed_verification(
        self, exported: Path, images: np.ndarray, infer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The runtime raises on NaN; here that is a verdict, not an error."""
        logits, test_set = self.reference(exported, images, infer)
        from efficientface_deploy.backends.base import Output
        from efficientface_deploy.backends.onnx import OnnxBackend

        bad = np.full((64, 7), np.nan, dtype=np.float32)
        monkeypatch.setattr(
            OnnxBackend, "_infer", lambda self, batch: Output(bad[: len(batch)], bad[: len(batch)])
        )
        path = exported / "efficientface-fp16-cpu.onnx"
        found = verify_artifact(path, logits, test_set, "fp16")
        assert found.status == "FAILED"
        assert found.problems == ("probe: NaN or infinity instead of finite outputs",)

    def test_nothing_runs_it_here(
        self, exported: Path, images: np.ndarray, infer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logits, test_set = self.reference(exported, images, infer)

        def missing(path: Path, **_: Any) -> None:
            raise ef.BackendError("backend onnx", expected="x", found="not installed", fix="y")

        monkeypatch.setattr(ef, "load", missing)
        found = verify_artifact(exported / "efficientface-fp16-cpu.onnx", logits, test_set, "fp16")
        assert found.status == "built, not verified here"
        assert found.not_run == "backend onnx: not installed"
        assert found.max_difference is None
