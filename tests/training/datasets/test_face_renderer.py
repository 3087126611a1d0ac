"""The synthetic faces: determinism, known targets, action units, and no shortcut to the label."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.datasets import face_renderer
from training.datasets.face_renderer import (
    ACTION_UNITS,
    LABELS,
    Geometry,
    Identity,
    Scene,
    SyntheticFace,
    action_unit_levels,
    draw,
    draw_distribution,
    face_geometry,
    render_face,
)

ROOT = Path(__file__).resolve().parents[3]
COUNT = 1400
# Mean colours of three faces; the second wears glasses.
MEANS = ((117.41, 117.37, 94.84), (149.84, 124.2, 96.06), (151.27, 134.81, 142.2))


@pytest.fixture(scope="module")
def rendered() -> tuple[list[SyntheticFace], np.ndarray]:
    """Faces, and for each what render_face drew for it beside the expression, (COUNT, numbers)."""
    drawn: list[float] = []

    def spy(kind, rng):
        result = draw(kind, rng)
        for value in dataclasses.astuple(result):
            drawn.extend(value if isinstance(value, tuple) else (value,))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(face_renderer, "draw", spy)
        faces = [render_face(3, index, 48) for index in range(COUNT)]
    return faces, np.array(drawn, dtype=float).reshape(COUNT, -1)


@pytest.fixture(scope="module")
def faces(rendered) -> list[SyntheticFace]:
    return rendered[0]


@pytest.fixture(scope="module")
def labels(faces: list[SyntheticFace]) -> np.ndarray:
    return np.array([face.label for face in faces])


@pytest.fixture
def identity() -> Identity:
    return draw(Identity, np.random.default_rng(0))


def show(identity: Identity, *units: int) -> Geometry:
    """The face with exactly these units at full level."""
    levels = dict.fromkeys(action_unit_levels(np.zeros(7)), 0.0)
    return face_geometry(identity, levels | dict.fromkeys(units, 1.0))


def express(identity: Identity, name: str) -> Geometry:
    return show(identity, *ACTION_UNITS[name])


# ---- Determinism -------------------------------------------------------------------------------


def test_same_bits_in_any_order():
    forward = [render_face(5, index).image for index in range(6)]
    backward = [render_face(5, index).image for index in reversed(range(6))]
    for first, second in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(first, second)


def test_same_bits_in_another_process():
    program = (
        "import sys; from training.datasets.face_renderer import render_face as r;"
        "sys.stdout.buffer.write(r(5, 9, 64).image.tobytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout == render_face(5, 9, 64).image.tobytes()


def test_numpy_integers_are_the_same_arguments():
    face = render_face(np.int64(5), np.int32(9), np.int16(48))
    np.testing.assert_array_equal(face.image, render_face(5, 9, 48).image)


@pytest.mark.parametrize(("seed", "index"), [(6, 9), (5, 16), (9, 5)])
def test_other_seeds_and_indices_give_other_faces(seed, index):
    assert not np.array_equal(render_face(seed, index).image, render_face(5, 9).image)


def test_global_random_state_is_neither_used_nor_touched():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = render_face(0, 0).image
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(1)
    np.testing.assert_array_equal(render_face(0, 0).image, first)


# ---- Pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 48, 64, 100, 224])
def test_sizes(size):
    face = render_face(0, 1, size)
    assert face.image.shape == (size, size, 3)
    assert face.image.dtype == np.uint8
    assert face.image.std() > 10


def test_another_size_is_the_same_face():
    small, large = render_face(0, 3, 50), render_face(0, 3, 200)
    reduced = large.image.reshape(50, 4, 50, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - small.image).mean() < 8
    assert np.abs(reduced - render_face(0, 10, 50).image).mean() > 20
    np.testing.assert_array_equal(small.distribution, large.distribution)


def test_pictures_vary_and_are_seldom_saturated(faces):
    stack = np.stack([face.image for face in faces])
    assert stack.std(axis=0).min() > 15  # no pixel is constant
    assert np.isin(stack, (0, 255)).mean() < 0.05


def test_pictures_are_those_of_the_first_version():
    """The demo's and the benchmarks' figures are of these; Pillow and numpy may round otherwise."""
    means = [render_face(3, index, 48).image.mean(axis=(0, 1)).tolist() for index in (0, 6, 12)]
    assert means == [pytest.approx(list(mean), abs=0.5) for mean in MEANS]


def test_less_variation_is_nearer_to_the_middle_of_every_range():
    for index in range(14):
        _, identity, scene, distribution, _ = face_renderer._draw_face(0, index, 1.0)
        label, same, half, clear, _ = face_renderer._draw_face(0, index, 0.5)
        assert same == identity and half.background == scene.background
        assert half.rotation == pytest.approx(scene.rotation / 2)
        assert half.exposure - 0.89 == pytest.approx((scene.exposure - 0.89) / 2)
        assert (half.right, half.down) == pytest.approx((scene.right / 2, scene.down / 2))
        assert clear.sum() == pytest.approx(1) and clear.argmax() == label == index % 7
        assert 1 - clear[label] == pytest.approx((1 - distribution[label]) / 2)
        pure = render_face(0, index, 48, 0.0)
        assert pure.distribution.tolist() == np.eye(7)[label].tolist()


@pytest.mark.parametrize("variation", [-0.1, 1.1, float("nan")])
def test_variation_outside_its_range_is_refused(variation):
    with pytest.raises(ValueError, match="variation: expected a number from 0 to 1"):
        render_face(0, 0, 48, variation)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, 0, 100), "seed"),
        ((0, -1, 100), "index"),
        ((0, 0, 31), "size"),
        ((0, 0, 1025), "size"),
        ((0.5, 0, 100), "seed"),
        ((0, "1", 100), "index"),
        ((0, 0, 100.0), "size"),
        ((True, 0, 100), "seed"),
        ((None, 0, 100), "seed"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer .*, found "):
        render_face(*arguments)


# ---- Targets -----------------------------------------------------------------------------------


def test_distributions_sum_to_one_and_their_argmax_is_the_label(faces):
    for face in faces:
        assert face.distribution.shape == (7,)
        assert face.distribution.dtype == np.float32
        assert face.distribution.min() >= 0
        assert face.distribution.sum() == pytest.approx(1, abs=1e-6)
        best, second = np.sort(face.distribution)[[-1, -2]]
        assert face.distribution[face.label] == best
        assert best - second > 0.05


def test_classes_are_balanced(labels):
    assert np.bincount(labels, minlength=7).tolist() == [COUNT // 7] * 7


def test_pure_faces_and_blends(faces):
    shown = np.array([(face.distribution[1:] > 0).sum() for face in faces])
    label = np.array([face.label for face in faces])
    assert set(shown[label == 0]) == {0, 1}  # neutral: nothing, or something faint
    assert set(shown[label > 0]) == {1, 2}
    assert 0.22 < (shown[label > 0] == 2).mean() < 0.34


def test_every_pair_is_blended():
    rng = np.random.default_rng(0)
    pairs = set()
    for label in [1, 2, 3, 4, 5, 6] * 300:
        expressions = np.flatnonzero(draw_distribution(rng, label)[1:]) + 1
        if len(expressions) == 2:
            pairs.add((label, *(other for other in expressions.tolist() if other != label)))
    assert len(pairs) == 30


def test_levels_are_sums_of_intensities():
    distribution = np.array([0.1, 0.0, 0.3, 0.6, 0.0, 0.0, 0.0])  # sadness 0.3, surprise 0.6
    levels = action_unit_levels(distribution)
    assert levels[1] == pytest.approx(0.9)  # both raise the inner brow
    assert levels[15] == levels[4] == pytest.approx(0.3)
    assert levels[26] == pytest.approx(0.6)
    assert levels[12] == levels[9] == 0


def test_neutral_moves_nothing():
    assert set(action_unit_levels(np.eye(7)[0]).values()) == {0.0}


def test_action_units_cover_the_labels():
    assert tuple(ACTION_UNITS) == LABELS
    signatures = {frozenset(units) for units in ACTION_UNITS.values()}
    assert len(signatures) == len(LABELS)


# ---- Action units ------------------------------------------------------------------------------

# Each measure is of one geometry, y pointing down.
MEASURES = {
    "inner brow height": lambda g: -g.brow[0, 1],
    "outer brow height": lambda g: -g.brow[8, 1],
    "brow distance": lambda g: g.brow[:, 0].min(),
    "eye opening": lambda g: (g.lower_lid - g.upper_lid)[:, 1].max(),
    "upper lid height": lambda g: -g.upper_lid[:, 1].min(),
    "lower lid height": lambda g: -g.lower_lid[:, 1].max(),
    "nose height": lambda g: -g.nostril[:, 1].mean(),
    "corner height": lambda g: -g.upper_lip[1][-1, 1],
    "mouth width": lambda g: np.ptp(g.upper_lip[0][:, 0]),
    "mouth opening": lambda g: (g.lower_lip[0] - g.upper_lip[1])[:, 1].max(),
    "lower lip height": lambda g: -g.lower_lip[1][:, 1].max(),
    "lip thickness": lambda g: (g.upper_lip[1] - g.upper_lip[0])[:, 1].max(),
    "chin height": lambda g: -g.outline[:, 1].max(),
}


@pytest.mark.parametrize(
    ("unit", "measure", "sign"),
    [
        (1, "inner brow height", +1),
        (2, "outer brow height", +1),
        (4, "inner brow height", -1),
        (4, "brow distance", -1),
        (5, "upper lid height", +1),
        (6, "lower lid height", +1),
        (7, "eye opening", -1),
        (9, "nose height", +1),
        (12, "corner height", +1),
        (12, "mouth width", +1),
        (15, "corner height", -1),
        (16, "lower lip height", -1),
        (16, "mouth opening", +1),
        (20, "mouth width", +1),
        (23, "lip thickness", -1),
        (23, "mouth width", -1),
        (26, "mouth opening", +1),
        (26, "chin height", -1),
    ],
)
def test_a_unit_moves_what_facs_says(identity, unit, measure, sign):
    change = MEASURES[measure](show(identity, unit)) - MEASURES[measure](show(identity))
    assert sign * change > 0.015


def test_every_unit_changes_the_geometry(identity):
    rest = show(identity)
    for unit in action_unit_levels(np.zeros(7)):
        moved = show(identity, unit)
        same = [
            np.array_equal(getattr(rest, field.name), getattr(moved, field.name))
            for field in dataclasses.fields(Geometry)
            if field.name != "creases"
        ]
        assert not all(same), unit


def test_expressions_differ_as_people_read_them(identity):
    face = {name: express(identity, name) for name in LABELS}
    corner, inner, opening = (
        MEASURES[name] for name in ("corner height", "inner brow height", "mouth opening")
    )
    assert corner(face["Happiness"]) > corner(face["Neutral"]) > corner(face["Sadness"])
    assert inner(face["Sadness"]) > inner(face["Neutral"]) > inner(face["Anger"])
    assert opening(face["Surprise"]) > 0.2 > opening(face["Anger"])
    width = MEASURES["mouth width"]
    assert width(face["Fear"]) > width(face["Neutral"]) > width(face["Surprise"])
    # Oblique brows in grief, the reverse in anger.
    outer = MEASURES["outer brow height"]
    assert inner(face["Sadness"]) > outer(face["Sadness"])
    assert inner(face["Anger"]) < outer(face["Anger"])


def test_movement_grows_with_intensity(identity):
    corners = []
    for intensity in (0.0, 0.3, 0.6, 1.0):
        distribution = (1 - intensity) * np.eye(7)[0] + intensity * np.eye(7)[1]
        geometry = face_geometry(identity, action_unit_levels(distribution))
        corners.append(MEASURES["corner height"](geometry))
    assert corners == sorted(corners)
    assert corners[1] - corners[0] > 0.02


def test_iris_stays_between_the_lids():
    for seed in range(20):
        identity = draw(Identity, np.random.default_rng(seed))
        for name in LABELS:
            face = express(identity, name)
            assert (face.lower_lid[:, 1] >= face.upper_lid[:, 1]).all()
            for disc in (face.iris, face.pupil):
                top = np.interp(disc[:, 0], *face.upper_lid.T)
                bottom = np.interp(disc[:, 0], *face.lower_lid.T)
                assert (disc[:, 1] >= top - 1e-9).all()
                assert (disc[:, 1] <= bottom + 1e-9).all()


# ---- No shortcut -------------------------------------------------------------------------------


def test_nuisance_is_independent_of_the_label(rendered, labels):
    nuisance = rendered[1]
    assert nuisance.shape[1] > len(dataclasses.fields(Scene)) + len(dataclasses.fields(Identity))
    overall = nuisance.mean(axis=0)
    error = nuisance.std(axis=0) / np.sqrt(COUNT / 7)
    for label in range(7):
        z = (nuisance[labels == label].mean(axis=0) - overall) / error
        # About 350 comparisons: 4.5 standard errors are not reached by chance.
        assert np.abs(z).max() < 4.5


def test_overall_colour_does_not_tell_the_class(faces, labels):
    """Nearest class mean over the picture's mean colour, its border's and its contrast."""
    features = []
    for face in faces:
        pixels = face.image.astype(float)
        border = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)])
        features.append([*pixels.mean(axis=(0, 1)), *border.mean(axis=0), pixels.std()])
    table = np.array(features)
    table = (table - table.mean(axis=0)) / table.std(axis=0)
    half = COUNT // 2
    means = np.stack([table[:half][labels[:half] == label].mean(axis=0) for label in range(7)])
    distance = ((table[half:, None] - means) ** 2).sum(axis=2)
    # Chance is 0.143; its standard error over 700 faces is 0.013.
    assert (distance.argmin(axis=1) == labels[half:]).mean() < 0.143 + 4 * 0.0133


@pytest.mark.slow
def test_a_network_learns_what_a_linear_probe_cannot():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def load(seed, count):
        faces = [render_face(seed, index, 64) for index in range(count)]
        images = np.stack([face.image for face in faces]).astype(np.float32) / 255 - 0.5
        targets = np.stack([face.distribution for face in faces])
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 4, torch.from_numpy(targets)

    images, targets = load(1, 2000)
    test_images, test_targets = load(2, 1000)

    def accuracy(logits):
        return (logits.argmax(dim=1) == test_targets.argmax(dim=1)).float().mean().item()

    def probe():
        """Multinomial logistic regression on 32 x 32 colour pixels; its better penalty of two."""
        small, test_small = (
            functional.interpolate(x, (32, 32), mode="area").flatten(1)
            for x in (images, test_images)
        )
        scores = []
        for penalty in (1e-2, 1e-1):
            layer = torch.nn.Linear(small.shape[1], 7)
            torch.nn.init.zeros_(layer.weight)
            optimiser = torch.optim.LBFGS(
                layer.parameters(), max_iter=100, line_search_fn="strong_wolfe"
            )

            def loss(layer=layer, optimiser=optimiser, penalty=penalty):
                optimiser.zero_grad()
                value = functional.cross_entropy(layer(small), targets.argmax(dim=1))
                value = value + penalty * layer.weight.square().sum()
                value.backward()
                return value

            optimiser.step(loss)
            scores.append(accuracy(layer(test_small)))
        return max(scores)

    def network():
        """Four convolutions, four epochs on the label distributions."""
        layers, previous = [], 3
        for width in (24, 48, 96, 128):
            layers += [
                torch.nn.Conv2d(previous, width, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(width),
                torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
            ]
            previous = width
        model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 16, 7))
        epochs, batch = 4, 50
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, 2e-3, total_steps=epochs * len(images) // batch, pct_start=0.2
        )
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(batch):
                mirror = torch.rand(len(chosen), 1, 1, 1) < 0.5
                x = torch.where(mirror, images[chosen].flip(3), images[chosen])
                loss = functional.cross_entropy(model(x), targets[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        model.eval()
        with torch.no_grad():
            return accuracy(model(test_images))

    torch.manual_seed(0)
    linear, learned = probe(), network()
    print(f"linear probe {linear:.3f}, network {learned:.3f}")
    assert 0.143 < linear <= 0.50
    assert learned >= 0.75
    assert learned - linear >= 0.30
