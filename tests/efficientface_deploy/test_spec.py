from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientface_deploy.errors import SpecError
from efficientface_deploy.spec import PRESETS, ModelSpec, preset

SEVEN = ("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger")
# What the published code has: labels, mean, std.
PUBLISHED = {
    "rafdb": (
        SEVEN,
        (0.57535914, 0.44928582, 0.40079932),
        (0.20735591, 0.18981615, 0.18132027),
    ),
    "affectnet7": (
        SEVEN,
        (0.55391484, 0.43522123, 0.3821877),
        (0.24837189, 0.21625527, 0.20221159),
    ),
    "affectnet8": (
        (*SEVEN, "Contempt"),
        (0.55391484, 0.43522123, 0.3821877),
        (0.24837189, 0.21625527, 0.20221159),
    ),
    "caers": (
        SEVEN,
        (0.35964426, 0.22359873, 0.19040863),
        (0.15188067, 0.11678473, 0.1103445),
    ),
}
VALID = json.loads(PRESETS["rafdb"].to_json())
WRONG = {
    "schema": [0, 2, "1", 1.0, True, None, [1]],
    "architecture": ["vgg", "", None, 3, ["efficientface"], {}],
    "labels": [
        [],
        ["one"],
        ["a", "a"],
        ["a", ""],
        ["a", " "],
        ["a", 3],
        ["a", None],
        "ab",
        {"a": 1},
        ["a", "b\nc"],
        ["a", "\x1b[31m"],
        ["a", "\ud800"],
        None,
        [["a"], ["b"]],
    ],
    "input_size": [0, -16, 16, 100, 1040, 10**30, "64", 64.0, True, None, [64]],
    "mean": [
        [],
        [0.5],
        [0.5] * 4,
        [0.5, 0.5, "a"],
        [math.nan] * 3,
        [math.inf, 0, 0],
        0.5,
        "abc",
        [10**400, 0, 0],
        [True, 0, 0],
        None,
        [[0], [0], [0]],
    ],
    "std": [[0.0, 1, 1], [-1, 1, 1], [math.nan] * 3, [math.inf, 1, 1], [1, 1], [10**400, 1, 1]],
    "colour": ["bgr", "RGB", None, 1, []],
    "resize": ["nearest", None, 0],
    "face_crop": ["tight", None, 0],
    "name": [None, 3, ["a"]],
    "preliminary": [0, 1, "yes", None],
    "sure_above": [*(0.5, -0.1, 1.1, math.nan, "0.5", True, [0.5], 10**400)],
    "sure_precision": [*(0.95, -0.1, 1.1, math.inf, "0.5", True, [0.5])],
    "class_frequencies": [
        *([], [1.0], [0.5, 0.5], [1 / 7] * 6, [1 / 6] * 6 + [0], [2 / 7] * 7, "1234567", 1.0),
        *([-1.0] + [2 / 6] * 6, [math.nan] * 7, [True] + [0] * 6, [10**400] * 7, {"a": 1}),
    ],
}
CASES = [(key, value) for key, values in WRONG.items() for value in values]


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_the_published_one(name):
    spec = preset(name)
    assert (spec.labels, spec.mean, spec.std) == PUBLISHED[name]
    assert (spec.input_size, spec.colour, spec.resize) == (224, "rgb", "bilinear")


def test_ferplus_preset_has_the_order_of_its_own_columns():
    spec = preset("ferplus")
    assert spec.labels[:4] == ("Neutral", "Happiness", "Surprise", "Sadness")
    assert spec.labels[4:] == ("Anger", "Disgust", "Fear", "Contempt")
    assert (spec.colour, spec.input_size) == ("grey", 96)
    assert set(spec.mean) == {0.50697356} and set(spec.std) == {0.25423586}


def test_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(SpecError, match=r"rafdb.*'fer2013'"):
        preset("fer2013")


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_exact(name):
    spec = PRESETS[name].replace(
        mean=(0.1, 1 / 3, 5e-324), name="Pr\u00e4z\n\u2028", preliminary=True
    )
    shares = (1 / spec.num_classes,) * spec.num_classes
    spec = spec.replace(class_frequencies=shares, sure_above=0.8, sure_precision=1 - 2e-16)
    text = spec.to_json()
    assert ModelSpec.from_json(text) == spec
    assert "\n" not in text and text.isascii()
    assert ModelSpec.from_json(text).to_json() == text


def test_optional_keys_have_defaults():
    required = ("schema", "architecture", "labels", "input_size", "mean", "std")
    spec = ModelSpec.from_json(json.dumps({key: VALID[key] for key in required}))
    assert (spec.colour, spec.resize, spec.face_crop) == ("rgb", "bilinear", "as-is")
    assert (spec.name, spec.preliminary) == ("", False)


def test_what_is_not_known_is_not_written():
    """A release from before a field refuses what it does not know."""
    unknown = dict.fromkeys(("class_frequencies", "sure_above", "sure_precision"))
    assert not set(unknown) & set(VALID)
    assert ModelSpec.from_json(json.dumps({**VALID, **unknown})) == PRESETS["rafdb"]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_wrong_value_is_refused_by_name(key, value):
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_json(json.dumps({**VALID, key: value}), source="model.onnx")
    message = str(caught.value)
    assert message.startswith("model.onnx: ModelSpec.") and key in message
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize(("key", "value"), CASES)
def test_constructor_refuses_the_same(key, value):
    with pytest.raises(SpecError):
        dataclasses.replace(PRESETS["rafdb"], **{key: tuple(value) if value == [] else value})


def test_number_too_long_to_print_is_refused():
    with pytest.raises(SpecError, match="input_size"):
        PRESETS["rafdb"].replace(input_size=10**5000)


@pytest.mark.parametrize("key", ["schema", "architecture", "labels", "input_size", "mean", "std"])
def test_missing_key_is_named(key):
    fields = {name: value for name, value in VALID.items() if name != key}
    with pytest.raises(SpecError, match=f"found no {key}"):
        ModelSpec.from_json(json.dumps(fields))


def test_unknown_key_is_named():
    with pytest.raises(SpecError, match="unknown key colour_order"):
        ModelSpec.from_json(json.dumps({**VALID, "colour_order": "bgr"}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"spec"',
        "NaN",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        "\0",
    ],
)
def test_text_that_is_no_spec(text):
    with pytest.raises(SpecError):
        ModelSpec.from_json(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def _only_spec_error(text: str) -> None:
    try:
        spec = ModelSpec.from_json(text)
    except SpecError as error:
        assert str(error).isprintable()
    else:
        assert ModelSpec.from_json(spec.to_json()) == spec


@given(st.text())
def test_any_text_gives_a_spec_or_a_spec_error(text):
    _only_spec_error(text)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(VALID)), VALUES, min_size=1))
def test_any_json_gives_a_spec_or_a_spec_error(changes):
    _only_spec_error(json.dumps({**VALID, **changes}))


@given(st.data())
def test_damaged_json_gives_a_spec_or_a_spec_error(data):
    text = PRESETS["rafdb"].to_json()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    _only_spec_error(text[:start] + data.draw(st.text(max_size=3)) + text[end:])
