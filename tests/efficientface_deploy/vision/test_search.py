from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import Face, load
from efficientface_deploy.backends import onnx
from efficientface_deploy.errors import BackendError, ConfigError
from efficientface_deploy.vision.faces import cut_face
from efficientface_deploy.vision.search import Found, merge, suppress

# The face of the astronaut, as it is marked by hand: left, top, right, bottom; eyes by hand too.
FACE = (180, 60, 270, 178)
EYES = ((204, 103), (247, 104))


def overlap(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """Intersection over union."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


def shifted(box: tuple[float, ...], x: float, y: float, scale: float = 1) -> tuple[float, ...]:
    return tuple(scale * edge + by for edge, by in zip(box, (x, y, x, y), strict=True))


@pytest.fixture(params=["yunet_detector", "centerface"])
def detector(request):
    """Each real detector, where it is installed."""
    return request.getfixturevalue(request.param)


# ---- faces


def test_one_face(detector, astronaut):
    (face,) = detector.detect(astronaut)
    assert overlap(face.box, FACE) > 0.85
    assert 0.9 < face.score <= 1
    np.testing.assert_allclose(face.landmarks[:2], EYES, atol=5)
    nose, left, right = face.landmarks[2:]
    assert left[0] < nose[0] < right[0] and nose[1] < min(left[1], right[1])


def test_several_faces_the_most_confident_first(detector, astronaut):
    half = np.asarray(Image.fromarray(astronaut).resize((256, 256)))
    picture = np.zeros((600, 900, 3), np.uint8)
    picture[:512, :512] = astronaut
    picture[300:556, 600:856] = half
    found = detector.detect(picture)
    expected = [FACE, shifted(FACE, 600, 300, 0.5)]
    assert len(found) == 2
    assert sorted(round(max(overlap(f.box, e) for f in found), 1) for e in expected)[0] >= 0.8
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 700), (33, 65), (200, 200)])
@pytest.mark.parametrize("kind", ["black", "noise"])
def test_no_face_is_an_empty_list(detector, shape, kind):
    picture = np.zeros((*shape, 3), np.uint8)
    if kind == "noise":
        picture = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    assert detector.detect(picture) == []


@pytest.mark.parametrize("side", [96, 2900])
def test_small_and_very_large_pictures(detector, astronaut, side):
    picture = np.asarray(Image.fromarray(astronaut).resize((side, side)))
    (face,) = detector.detect(picture)
    assert overlap(face.box, shifted(FACE, 0, 0, side / 512)) > 0.75
    np.testing.assert_allclose(np.array(face.landmarks[:2]) * 512 / side, EYES, atol=12)


def test_threads_share_a_detector(detector, astronaut):
    expected = detector.detect(astronaut)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(detector.detect, [astronaut] * 8)) == [expected] * 8


def test_turned_by_exif(detector, astronaut):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.fromarray(np.rot90(astronaut)).save(data, "PNG", exif=exif)
    with load(threads=1) as predictor:
        (turned,) = predictor.predict_faces(data.getvalue(), detector)
        (upright,) = predictor.predict_faces(astronaut, detector)
    assert turned == upright
    assert upright.prediction.label == "Happiness"


def test_faces_of_ferplus(detector, shared):
    """Real faces of other people, as a mosaic with grey between them."""
    archive = zipfile.ZipFile(shared / "data" / "ferplus.zip")
    names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:2000:250]
    mosaic = Image.new("RGB", (4 * 240, 2 * 240), (110, 110, 110))
    cells = [(240 * (at % 4) + 24, 240 * (at // 4) + 24) for at in range(8)]
    for name, cell in zip(names, cells, strict=True):
        face = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
        mosaic.paste(face.resize((192, 192), Image.Resampling.BICUBIC), cell)
    found = detector.detect(np.asarray(mosaic))
    boxes = [(x, y, x + 192, y + 192) for x, y in cells]
    hits = [max(overlap(box, face.box) for face in found) for box in boxes]
    assert sum(hit > 0.45 for hit in hits) >= 7
    assert len(found) <= 9


# ---- merging


def test_suppress_keeps_the_most_confident_of_those_that_overlap():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 100, 100]], float)
    assert suppress(boxes, np.array([0.6, 0.9, 0.7, 0.8])) == [1, 3, 2]


@pytest.mark.parametrize("seed", range(5))
def test_suppress_leaves_no_two_that_overlap_and_loses_no_other(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 50, (60, 2))
    boxes = np.column_stack([corners, corners + rng.uniform(5, 30, (60, 2))])
    scores = rng.uniform(size=60)
    kept = suppress(boxes, scores)
    pairs = [(one, two) for one in kept for two in kept if one != two]
    assert all(overlap(boxes[one], boxes[two]) < 0.3 for one, two in pairs)
    for lost in set(range(60)) - set(kept):
        surer = [one for one in kept if scores[one] > scores[lost]]
        assert any(overlap(boxes[one], boxes[lost]) >= 0.3 for one in surer)


def found(*rows: tuple[float, ...]) -> Found:
    """Of each row a box, and its score."""
    values = np.array(rows, float).reshape(-1, 5)
    return Found(values[:, :4], values[:, 4], np.zeros((len(values), 5, 2)))


def test_a_part_of_a_face_that_is_too_large_for_a_copy_is_left_out():
    eye, other = (120, 200, 250, 330, 0.95), (700, 0, 760, 80, 0.9)
    fine, coarse = found(eye, other), found((100, 100, 500, 600, 0.8))
    kept = merge([fine, coarse], [300, 1200], 0.5).boxes.tolist()
    assert kept == [[700, 0, 760, 80], [100, 100, 500, 600]]
    # A copy that could have shown the whole is believed.
    assert len(merge([fine, coarse], [600, 1200], 0.5).boxes) == 3
    # So is one beside what may be no face at all.
    assert len(merge([fine, coarse], [300, 1200], 0.85).boxes) == 3


def test_a_face_that_two_copies_show_is_one():
    fine, coarse = found((10, 10, 50, 60, 0.7)), found((12, 9, 52, 61, 0.9))
    assert merge([fine, coarse], [300, 1200], 0.5).boxes.tolist() == [[12, 9, 52, 61]]


# Five heads of a group photograph, as YuNet finds them in it, and what it takes for a face between
# two of them in a copy of an eighth.
HEADS = (
    (314, 238, 408, 362, 0.93),
    (682, 290, 791, 422, 0.92),
    (531, 304, 632, 436, 0.92),
    (211, 60, 306, 174, 0.92),
    (434, 216, 520, 318, 0.92),
)
BETWEEN = (367, 202, 459, 317, 0.67)


@pytest.mark.parametrize("score", [0.67, 0.95, 0.2])
def test_what_a_coarse_copy_shows_between_two_faces_is_none(score):
    coarse = found((690, 286, 789, 410, 0.84), (*BETWEEN[:4], score))
    kept = merge([found(*HEADS), coarse], [586, 2344], 0.5)
    assert sorted(kept.boxes.tolist()) == sorted(list(head[:4]) for head in HEADS)
    middle = found((*BETWEEN[:4], score))
    assert len(merge([found(*HEADS), middle, found()], [586, 2344, 9376], 0.5).boxes) == 5
    assert len(merge([found(*HEADS), found(), middle], [586, 2344, 9376], 0.5).boxes) == 5


def test_a_face_that_only_a_coarse_copy_shows_stays():
    fine, coarse = found(*HEADS), found(BETWEEN)

    def kept(fine: Found, coarse: Found, largest: float = 586, min_score: float = 0.5) -> bool:
        boxes = merge([fine, coarse], [largest, 4 * largest], min_score).boxes.tolist()
        return coarse.boxes[0].tolist() in boxes

    assert not kept(fine, coarse)
    assert kept(fine, coarse, largest=100)  # the finer copy could not have shown it
    assert kept(fine, coarse, min_score=0.95)  # beside what may be no faces at all
    assert kept(coarse, fine)  # a finer copy decides
    assert kept(fine, found((500, 200, 590, 320, 0.6)))  # partly behind two heads
    assert kept(fine, found((300, 230, 420, 375, 0.95)))  # one of the heads, and better
    # A close-up, and what a finer copy takes for a face in it.
    assert kept(found((350, 260, 450, 370, 0.9)), found((250, 150, 520, 500, 0.8)))
    # One head, shown many times over as networks do, is still one.
    again = [(434 + x, 216, 520 + x, 318, 0.9) for x in (-1, 1, 2)]
    assert kept(found(*HEADS[1:], *again), coarse)


# ---- any size


@pytest.mark.parametrize("side", [48, 64, 112, 240, 480, 720, 960, 1500, 4000])
def test_a_portrait_has_one_face_and_one_label_at_every_size(detector, photo, side):
    picture = Image.fromarray(photo).resize((side, side))
    with load(threads=1) as predictor:
        (face,) = predictor.predict_faces(picture, detector)
    assert face.prediction.label == "Happiness" and face.prediction.confidence > 0.9
    assert overlap(face.face.box, (0.07 * side, 0.03 * side, 0.95 * side, side)) > 0.6
    assert not face.small


def test_small_faces_in_twelve_megapixels(detector, astronaut):
    head = Image.fromarray(astronaut[20:240, 120:330])  # the face is 118 pixels high
    picture = Image.new("RGB", (4032, 3024), (90, 110, 100))
    places = [(x, y) for x in range(60, 3900, 300) for y in range(60, 2900, 300)]
    for place in places:
        picture.paste(head.resize((77, 80)), place)  # now 43
    faces = detector.detect(np.asarray(picture))
    boxes = np.array([face.box for face in faces])
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = [(abs(middles - place - (38, 36)) < 20).all(axis=1).any() for place in places]
    assert sum(near) >= 0.95 * len(places)
    assert len(faces) <= 1.05 * len(places)


def test_options(detector, astronaut, monkeypatch):
    half = np.asarray(Image.fromarray(astronaut).resize((128, 128)))
    picture = np.zeros((512, 700, 3), np.uint8)
    picture[:, :512] = astronaut
    picture[:128, 550:678] = half  # a face of 29 pixels beside one of 118

    def count(**options: float) -> int:
        again = type(detector)(**{**detector._options, **options})
        return len(again.detect(picture))

    assert count() == 2
    assert count(min_face=60) == count(max_side=160) == 1
    assert count(min_score=1.0) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"min_score": 1.1},
        {"min_score": "0.5"},
        {"max_side": 0},
        {"min_face": float("nan")},
        {"threads": 0},
        {"threads": 1.5},
    ],
)
def test_option_that_cannot_be(detector, options):
    with pytest.raises(ConfigError, match="number from"):
        type(detector)(**{**detector._options, **options})


def test_backend_that_cannot_be(detector):
    with pytest.raises(BackendError, match="onnx:cpu"):
        type(detector)(**{**detector._options, "backend": "onnx:tpu"})


# ---- turned


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_head_that_lies_or_hangs_is_upright_when_it_is_cut(detector, astronaut, turns):
    picture = np.ascontiguousarray(np.rot90(astronaut, turns))
    with load(threads=1) as predictor:
        (face,) = predictor.predict_faces(picture, detector)
        upright = cut_face(Image.fromarray(astronaut), Face(FACE), predictor.spec)
        cut = cut_face(Image.fromarray(picture), face.face, predictor.spec)
    assert face.prediction.label == "Happiness"
    x, y = np.array(face.face.landmarks).mean(axis=0)
    for _ in range(turns):  # back by quarters
        x, y = 512 - y, x
    np.testing.assert_allclose(
        (x, y), np.mean([*EYES, (223, 125), (203, 142), (241, 144)], axis=0), atol=6
    )
    small = [np.asarray(one.convert("L").resize((16, 16)), float).ravel() for one in (upright, cut)]
    assert np.corrcoef(small)[0, 1] > 0.8


# ---- processes


def test_fork(detector, astronaut):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            detector.detect(astronaut)
        except BackendError as error:
            os.write(tell, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(told, 9999).decode() == (
        f"face detector {detector.name}: expected one that this process opened, found one that was "
        "opened before a fork; open it in the child"
    )
    os.close(told)
    os.close(tell)


@pytest.mark.parametrize("again", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_pickled_it_opens_again(detector, astronaut, again):
    other = again(detector)
    assert other is not detector and repr(other) == repr(detector)
    assert other.detect(astronaut) == detector.detect(astronaut)


def test_waiting_threads_sleep(detector, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    seen = []
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *given, **named: (seen.append(named["sess_options"]), make(*given, **named))[1],
    )
    monkeypatch.setattr(onnx, "default_threads", lambda: 3)
    type(detector)(**{**detector._options, "threads": None})
    assert seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert seen[0].intra_op_num_threads == 3
