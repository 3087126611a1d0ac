from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.prior import adjust, log_ratios, parse_prior
from efficientface_deploy.spec import PRESETS

LABELS = ("a", "b=c", "d")
SPEC = PRESETS["rafdb"].replace(labels=LABELS, class_frequencies=(0.5, 0.4, 0.1))
PATH = Path("folder/model.onnx")


def test_bayes_rule():
    """Of 100 pictures like this one, 30 were a; where a is ten times as rare, it is 3 of 73."""
    logits = np.log(np.array([[0.3, 0.6, 0.1], [0.05, 0.05, 0.9]], np.float32))
    prior = {"a": 0.05, "b=c": 0.4, "d": 0.1}
    adjusted, probabilities = adjust(logits, log_ratios(prior, SPEC, PATH))
    np.testing.assert_allclose(probabilities[0], np.array([3, 60, 10]) / 73, rtol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert adjusted.dtype == probabilities.dtype == np.float32
    powers = np.exp(adjusted)
    np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), probabilities, rtol=1e-5)


def test_uniform_is_the_same_weight_for_all():
    expected = log_ratios("uniform", SPEC, PATH)
    for weight in (1e-300, 1, np.float32(7), 1e300):
        found = log_ratios(dict.fromkeys(LABELS, weight), SPEC, PATH)
        np.testing.assert_array_equal(found, expected)


def test_the_trainings_own_changes_nothing():
    own = dict(zip(LABELS, SPEC.class_frequencies, strict=True))
    assert np.ptp(log_ratios(own, SPEC, PATH)) < 1e-6


def test_class_without_weight_never_comes_however_sure_the_network_is():
    logits = np.array([[500.0, -500, -501]], np.float32)
    ratios = log_ratios({"a": 0, "b=c": 1, "d": 1}, SPEC, PATH)
    _, probabilities = adjust(logits, ratios)
    assert probabilities[0, 0] == 0 and probabilities.sum() == pytest.approx(1)
    assert probabilities[0, 1] > probabilities[0, 2] / 4 > 0


WRONG = [
    ("even", "uniform, or a weight for each label, found 'even'"),
    (3, "uniform, or a weight for each label, found 3"),
    ([1, 1, 1], r"a weight for each label, found \[1, 1, 1\]"),
    ({}, "a weight for each label, found none for a, b=c, d"),
    ({"a": 1, "d": 1}, "found none for b=c"),
    ({"a": 1, "b=c": 1, "d": 1, "e": 1}, r"labels of the model \(a, b=c, d\), found e"),
    *(
        ({"a": 1, "b=c": weight, "d": 1}, f"weights of 0 or more, found {shown} for b=c")
        for weight, shown in [
            *((-1, "-1"), (math.nan, "nan"), (math.inf, "inf"), ("1", "'1'"), (None, "None")),
            *((True, "True"), (10**400, "10{39}"), ([1], r"\[1\]")),
        ]
    ),
    (dict.fromkeys(LABELS, 0), "a weight above 0, found 0 for all labels"),
]


@pytest.mark.parametrize(("prior", "said"), WRONG)
def test_bad_prior_is_one_line(prior, said):
    with pytest.raises(ConfigError, match=f"^prior: expected .*{said}.*; give uniform, or ") as bad:
        log_ratios(prior, SPEC, PATH)
    assert str(bad.value).isprintable() and len(str(bad.value)) < 300


def test_file_that_does_not_say_how_often_classes_came():
    with pytest.raises(ConfigError, match=r"of the training in model\.onnx, found none; leave it"):
        log_ratios("uniform", SPEC.replace(class_frequencies=None), PATH)


def test_on_a_command_line():
    assert parse_prior("uniform") == "uniform"
    assert parse_prior("a=1,b=c=2e-1, d=0") == {"a": 1, "b=c": 0.2, "d": 0}
    assert parse_prior("Joy, mild=1,a, b, c=2") == {"Joy, mild": 1, "a, b, c": 2}


@pytest.mark.parametrize("text", ["", "even", "a", "a=", "=1", "a=1,", "a=x", "a=1,a=2"])
def test_text_that_is_no_prior(text):
    with pytest.raises(ConfigError, match=r"^prior: expected uniform, or LABEL=WEIGHT for each"):
        parse_prior(text)
