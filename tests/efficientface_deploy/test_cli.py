from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy import Face, cli, load, open_video
from efficientface_deploy.cli import main
from efficientface_deploy.errors import BackendError, CheckpointError, ConfigError, ImageError
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.steady import Event
from efficientface_deploy.vision.video import write_video


@pytest.fixture
def face(photo, tmp_path) -> Path:
    """A photograph on disk."""
    path = tmp_path / "faces/face.png"
    path.parent.mkdir()
    Image.fromarray(photo).save(path)
    return path


def lines_of(capsys) -> list[str]:
    """What went to standard output, without the table's header."""
    lines = capsys.readouterr().out.splitlines()
    return lines[1:] if lines[0].startswith("label ") else lines


def names_of(lines: list[str]) -> list[str]:
    return [Path(line.rpartition("  ")[2]).name for line in lines]


class Halves:
    """Finds a face in either half of a picture, none in a black one."""

    def detect(self, image: np.ndarray) -> list[Face]:
        if not image.any():
            return []
        half, height = image.shape[1] / 2, image.shape[0]
        points = tuple((half / 2 + x, height / 2 + y) for x, y in np.eye(5, 2) * 9)
        return [Face((0, 0, half, height), 0.9, points), Face((half, 0, 2 * half, height), 0.8)]


@pytest.fixture
def halves(monkeypatch) -> list[tuple[object, ...]]:
    """Stands in for the detector; holds what it was asked for with."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        cli, "open_detector", lambda *given, **options: (asked.append(given), Halves())[1]
    )
    return asked


def probabilities_of(capsys) -> dict[str, float]:
    """Of the one face of the first picture, printed as JSON."""
    (found,) = json.loads(lines_of(capsys)[0])["faces"]
    return found["probabilities"]


# ---- pictures


def test_row_has_the_predictors_answer(face, capsys):
    assert main([str(face)]) == 0
    with load() as predictor:
        prediction = predictor(face)
    (line,) = lines_of(capsys)
    assert not prediction.unsure
    first = [prediction.label, f"{prediction.confidence:.2f}"]
    assert line.split()[:2] == first
    assert line.split()[-2:] == ["0,0,104,104", str(face)]


def test_unsure_labels_are_marked(face, capsys):
    with Image.open(face) as image:
        image.rotate(180).save(face.parent / "turned.png")
    with load() as predictor:
        sure, unsure = predictor.predict_batch([face, face.parent / "turned.png"])
    assert unsure.unsure and not sure.unsure
    assert main([str(face.parent)]) == 0
    captured = capsys.readouterr()
    _, *rows = captured.out.splitlines()
    assert [row.split()[1] for row in rows] == [
        f"{sure.confidence:.2f}",
        f"{unsure.confidence:.2f}?",
    ]
    assert "?: unsure; of the others 95 % are right, on pictures like the" in captured.err
    assert main([str(face.parent), "--json"]) == 0
    records = map(json.loads, capsys.readouterr().out.splitlines())
    assert [record["faces"][0]["unsure"] for record in records] == [False, True]


def test_model_that_promises_nothing(face, model_spec, make_network, tmp_path, capsys):
    models = pytest.importorskip("efficientface_deploy.models")
    path = tmp_path / "model.safetensors"
    models.save_checkpoint(path, make_network(), model_spec.replace(sure_above=1))
    assert main([str(face), "--model", str(path)]) == 0
    captured = capsys.readouterr()
    assert "?: unsure, as all are" in captured.err
    assert captured.out.splitlines()[1].split()[1].endswith("?")


def test_prior(face, capsys):
    assert main([str(face), "--prior", "uniform", "--json"]) == 0
    with load(prior="uniform") as predictor:
        prediction = predictor(face)
    (found,) = json.loads(lines_of(capsys)[0])["faces"]
    assert found["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
    assert found["unsure"] is None
    weights = ",".join(f"{label}={int(label == 'Fear')}" for label in preset("ferplus").labels)
    assert main([str(face), "--prior", weights]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:2] == ["Fear", "1.00"]
    assert "own prior" in captured.err and "unsure" not in captured.err


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ("even", "expected uniform, or LABEL=WEIGHT for each label once, found 'even'; give"),
        ("Fear=1", "expected a weight for each label, found none for Neutral, "),
    ],
)
def test_prior_that_cannot_be(prior, said, face, capsys):
    with pytest.raises(ConfigError, match=f"^prior: {said}"):
        main([str(face), "--prior", prior])
    assert capsys.readouterr().out == ""


def test_table_is_aligned(face, capsys, halves):
    Image.new("RGB", (40, 20)).save(face.parent / "black.png")
    assert main([str(face.parent), "--detect", "any"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert [row.index(str(face.parent)) for row in rows] == [header.index("image")] * 3
    assert rows[0].startswith("no face ")
    assert names_of(rows) == ["black.png", "face.png", "face.png"]


def test_json_has_every_class(face, capsys):
    assert main([str(face), "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert set(record) == {"image", "faces"} and record["image"] == str(face)
    (found,) = record["faces"]
    assert set(found["probabilities"]) == set(preset("ferplus").labels)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert (found["box"], found["score"], found["landmarks"]) == ([0, 0, 104, 104], None, None)
    assert captured.err == ""  # nothing but JSON


def test_json_of_faces(face, capsys, halves):
    Image.new("RGB", (40, 20)).save(face.parent / "black.png")
    assert main([str(face.parent), "--json", "--detect", "yunet=FILE", "--threads", "1"]) == 0
    black, photo = map(json.loads, lines_of(capsys))
    assert halves == [("yunet=FILE", 1)]
    assert black["faces"] == []
    assert [found["box"] for found in photo["faces"]] == [[0, 0, 52, 104], [52, 0, 104, 104]]
    assert [found["score"] for found in photo["faces"]] == [0.9, 0.8]
    assert len(photo["faces"][0]["landmarks"]) == 5
    assert photo["faces"][1]["landmarks"] is None


def test_folder_stands_for_its_images_in_order(face, capsys):
    for name in ("b.jpg", "a.jpg"):
        Image.open(face).save(face.parent / name)
    (face.parent / "notes.txt").write_text("no image")
    (face.parent / ".DS_Store").write_bytes(b"x")
    assert main([str(face.parent)]) == 0
    captured = capsys.readouterr()
    assert names_of(captured.out.splitlines()[1:]) == ["a.jpg", "b.jpg", "face.png"]
    assert (
        f"note: left out of {face.parent}: 1 file(s), no known kind of picture: notes.txt\n"
        in captured.err
    )
    assert ".DS_Store" not in captured.err


def test_folder_names_what_it_cannot_read(face, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    (face.parent / "IMG_1.HEIC").write_bytes(heic)
    assert main([str(face.parent)]) == 2
    captured = capsys.readouterr()
    assert names_of(captured.out.splitlines()[1:]) == ["face.png"]
    assert "IMG_1.HEIC: expected" in captured.err and "pip install pillow-heif" in captured.err
    assert "1 of 2 pictures, videos or cameras could not be read" in captured.err


def test_name_with_a_line_break_stays_in_its_row(face, capsys):
    face.rename(face.parent / "two\nlines\x1b[31m.png")
    assert main([str(face.parent)]) == 0
    (row,) = lines_of(capsys)
    assert row.endswith("two lines [31m.png")


def test_standard_input(face, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(face.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["-"]) == 0
    assert names_of(lines_of(capsys)) == ["-"]


def test_unreadable_image_does_not_stop_the_others(face, capsys):
    bad = face.parent / "a.jpg"
    bad.write_bytes(b"no image")
    assert main([str(face.parent), str(face.parent / "missing.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2 and str(face) in captured.out
    assert str(bad) in captured.err and "missing.png" in captured.err
    assert "2 of 3 pictures, videos or cameras could not be read" in captured.err


def test_folder_to_draw_in_that_cannot_be_written(face):
    with pytest.raises(ConfigError, match=r"/proc/x: expected a folder that can be .*--draw"):
        main([str(face), "--draw", "/proc/x"])


def test_empty_folder(tmp_path):
    with pytest.raises(ImageError, match="none in this folder"):
        main([str(tmp_path)])


def test_model_of_whole_pictures_says_that_a_cut_is_a_guess(face, halves, make_network, capsys):
    from efficientface_deploy.models import save_checkpoint

    checkpoint = face.parent.parent / "caers.safetensors"
    save_checkpoint(checkpoint, make_network(), preset("caers").replace(input_size=64))
    assert main([str(face), "--model", str(checkpoint), "--detect", "any"]) == 0
    assert "is a guess" in capsys.readouterr().err
    assert main([str(face), "--model", str(checkpoint)]) == 0
    assert "is a guess" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("err", "out", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_progress_only_where_a_terminal_would_show_nothing_else(
    face, capsys, monkeypatch, err, out, shown
):
    Image.open(face).save(face.parent / "b.png")
    monkeypatch.setattr("sys.stderr.isatty", lambda: err)
    monkeypatch.setattr("sys.stdout.isatty", lambda: out)
    assert main([str(face.parent)]) == 0
    assert ("1/2" in capsys.readouterr().err) == shown


# ---- detectors


def test_faces_takes_no_value_and_swallows_no_path(face, halves, capsys):
    assert main(["--faces", str(face)]) == main([str(face), "--faces"]) == 0
    assert halves == [("yunet", None)] * 2
    assert names_of(lines_of(capsys)[:2]) == ["face.png"] * 2


def test_options_of_the_detector(face, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        cli, "open_detector", lambda *_, **given: (asked.update(given), Halves())[1]
    )
    options = ["--min-face", "40", "--min-score", "0.7", "--max-side", "900"]
    assert main([str(face), "--detect", "centerface", *options]) == 0
    assert asked == {"min_face": 40, "min_score": 0.7, "max_side": 900}
    for name, value in zip(options[::2], options[1::2], strict=True):
        with pytest.raises(ConfigError, match=f"{name}: expected a search for faces.*--faces"):
            main([str(face), name, value])


def test_title_says_how_faces_are_found(face, capsys, halves):
    assert main([str(face)]) == 0
    assert "--faces finds the faces" in capsys.readouterr().err
    assert main([str(face), "--faces"]) == 0
    assert "--faces" not in capsys.readouterr().err


def test_what_is_fetched_is_said(face, capsys, monkeypatch):
    def open_detector(*_: object, **options: object) -> Halves:
        logging.getLogger("efficientface_deploy.download").warning("fetching it")
        return Halves()

    monkeypatch.setattr(cli, "open_detector", open_detector)
    assert main([str(face), "--faces"]) == 0
    assert main([str(face), "--faces"]) == 0
    assert capsys.readouterr().err.count("fetching it") == 2  # once each time


def test_small_face_has_no_label(face, capsys, halves, tmp_path):
    Image.open(face).resize((30, 15)).save(face)  # halves of 15x15
    assert main([str(face), "--faces", "--draw", str(tmp_path / "drawn")]) == 0
    first, _ = lines_of(capsys)
    assert first.split()[:3] == ["too", "small", "0,0,15,15"]
    assert main([str(face), "--faces", "--json"]) == 0
    (record,) = map(json.loads, lines_of(capsys))
    for found in record["faces"]:
        assert found["small"] and found["label"] is None and found["confidence"] is None


# ---- annotated copies


def test_draw_leaves_the_picture_and_writes_a_copy(face, halves, tmp_path, capsys):
    before = face.read_bytes()
    assert main([str(face), "--detect", "any", "--draw", str(tmp_path / "new/drawn")]) == 0
    assert face.read_bytes() == before
    (copy,) = (tmp_path / "new/drawn").iterdir()
    assert copy.name == "face.png.jpg"
    difference = np.abs(np.asarray(Image.open(copy)).astype(int) - np.asarray(Image.open(face)))
    assert difference[:, 50:54].mean() > 20  # the edge between the two boxes
    assert difference[30:75, 60:90].mean() < 5  # inside a box


def test_pictures_of_one_name_each_have_their_copy(face, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(face, tmp_path / name)
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main([*folders, "--draw", str(tmp_path / "drawn")]) == 0
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == [
        *("face.png-2.jpg", "face.png.jpg")
    ]


def test_copies_lie_in_folders_as_their_pictures_do(face, tmp_path, monkeypatch):
    """So that it can be told which is whose; a number alone would be another picture's name."""
    monkeypatch.chdir(tmp_path)
    for place in ("in/face.png", "in/a/face.png", "in/a/b/face.png", "in/face-2.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(face, tmp_path / place)
    expected = ["a/b/face.png.jpg", "a/face.png.jpg", "face-2.png.jpg", "face.png.jpg"]
    for number, source in enumerate(("in", "./in/", tmp_path / "in")):
        drawn = tmp_path / f"drawn{number}"
        assert main([str(source), "--draw", str(drawn)]) == 0
        files = [path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file()]
        assert sorted(map(Path.as_posix, files)) == expected
    assert main(["in/a/face.png", "--draw", "alone"]) == 0
    assert [path.name for path in Path("alone").iterdir()] == ["face.png.jpg"]


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["a/nhn.mkv", "a/nhn.mp4"], ["nhn.mkv.mp4", "nhn.mp4"]),
        (["a.MP4", "a.mp4"], ["a.mp4", "a-2.mp4"]),
        (["rtsp://me:***@host/live?x=1", "http://host:80"], ["live-x-1.mp4", "host-80.mp4"]),
        (["camera", "camera:1"], ["camera.mp4", "camera-1.mp4"]),
        (["-"], ["stdin.mp4"]),
    ],
)
def test_names_of_copies(names, places, tmp_path):
    gallery = cli.Gallery(tmp_path / "drawn")
    assert [gallery.place_for(name, ".mp4").name for name in names] == places


def test_copy_under_a_name_is_never_of_another(face, tmp_path, capsys):
    """What cannot be read keeps its name."""
    (tmp_path / "bad").mkdir()
    bad = tmp_path / "bad/face.png"
    bad.write_bytes(b"no picture")
    assert main([str(bad), str(face), "--draw", str(tmp_path / "drawn")]) == 2
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["face.png-2.jpg"]


def test_unsure_labels_are_drawn_with_their_mark(face, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(cli, "draw_faces", lambda image, faces: (drawn.extend(faces), image)[1])
    with Image.open(face) as image:
        image.rotate(180).save(face)
    assert main([str(face), "--draw", str(tmp_path / "drawn")]) == 0
    ((_, text, _),) = drawn
    assert re.fullmatch(r"\w+ 0\.\d\d\?", text)


@pytest.mark.parametrize("stem", ["a" * 251, "\u20ac" * 83, "new\nline", os.fsdecode(b"\xff")])
def test_draw_under_names_that_file_systems_take(face, tmp_path, stem):
    picture = face.rename(face.parent / f"{stem}.png")
    assert main([str(picture), "--draw", str(tmp_path / "drawn")]) == 0
    (copy,) = (tmp_path / "drawn").iterdir()
    assert Image.open(copy).size == (104, 104) and picture.name.startswith(copy.stem[:60])


def test_draw_into_a_folder_that_holds_something(face):
    with pytest.raises(ConfigError, match="a new or an empty folder"):
        main([str(face), "--draw", str(face.parent)])
    with pytest.raises(ConfigError, match="a new or an empty folder"):
        main([str(face), "--draw", str(face)])


# ---- videos and cameras


@pytest.fixture
def clip(photo, tmp_path) -> Path:
    """Six frames of a face, of which the last two are black; 10 a second."""
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with write_video(path, 10) as write:
        for factor in (1, 1, 1, 1, 0, 0):
            write(Image.fromarray(photo * np.uint8(factor)))
    return path


def test_video_has_an_answer_for_each_frame(clip, capsys, halves):
    assert main([str(clip), "--json", "--detect", "any"]) == 0
    records = list(map(json.loads, lines_of(capsys)))
    assert [record["frame"] for record in records] == list(range(6))
    assert [record["seconds"] for record in records] == pytest.approx(np.arange(6) / 10)
    assert all(record["latency"] > 0 for record in records)
    assert [len(record["faces"]) for record in records][:4] == [2] * 4


def test_video_in_a_folder_where_nothing_reads_videos(face, capsys, monkeypatch):
    def refuse(source):
        raise BackendError("video", "a reader", "none", "pip install 'efficientface-deploy[video]'")

    monkeypatch.setattr(cli, "open_video", refuse)
    (face.parent / "a.mp4").write_bytes(b"x")
    assert main([str(face.parent)]) == 2
    captured = capsys.readouterr()
    assert names_of(captured.out.splitlines()[1:]) == ["face.png"]
    said = f"error: {face.parent / 'a.mp4'}: expected a reader, found none; pip install"
    assert said in captured.err
    assert "1 of 2 pictures, videos or cameras could not be read" in captured.err
    with pytest.raises(BackendError):
        main([str(face.parent / "a.mp4")])


def test_folder_of_a_video_and_a_picture(clip, face, capsys):
    shutil.copy(clip, face.parent / "b.MP4")
    assert main([str(face.parent)]) == 0
    assert len(lines_of(capsys)) == 6 + 1


def test_video_in_the_table_and_drawn(clip, face, capsys, tmp_path):
    assert main([str(clip), str(face), "--draw", str(tmp_path / "drawn")]) == 0
    names = names_of(lines_of(capsys))
    assert names == [*(f"clip.mp4 #{at} {at / 10:.2f} s face 1" for at in range(6)), "face.png"]
    with open_video(tmp_path / "drawn/clip.mp4") as video:
        assert len(list(video)) == 6


def test_times_are_the_containers_and_so_are_the_copys(photo, tmp_path, capsys):
    pytest.importorskip("av")
    times = [0.0, 0.1, 0.5, 2.0, 2.04]
    with write_video(tmp_path / "clip.mp4", 25) as write:
        for seconds in times:
            write(Image.fromarray(photo), seconds)
    assert main([str(tmp_path / "clip.mp4"), "--json", "--draw", str(tmp_path / "drawn")]) == 0
    records = list(map(json.loads, lines_of(capsys)))
    assert [record["seconds"] for record in records] == pytest.approx(times, abs=1e-4)
    with open_video(tmp_path / "drawn/clip.mp4") as video:
        copied = [frame.seconds for frame in video.timed()]
    assert copied == pytest.approx(times, abs=1e-4)


def test_json_of_a_video_has_tracks_and_raw_probabilities(clip, capsys, halves):
    assert main([str(clip), "--json", "--detect", "any"]) == 0
    records = list(map(json.loads, lines_of(capsys)))
    assert [[found["track"] for found in one["faces"]] for one in records[:4]] == [[1, 2]] * 4
    for found in records[3]["faces"]:
        assert set(found["raw"]) == set(found["probabilities"])
    assert main([str(clip), "--json", "--detect", "any", "--smooth", "0"]) == 0
    (found, _) = json.loads(lines_of(capsys)[0])["faces"]
    assert "raw" not in found and found["track"] == 1


def test_events(clip, face, capsys, halves):
    assert main([str(clip), "--detect", "any", "--events"]) == 0
    lines = capsys.readouterr().out.splitlines()
    with load() as predictor:
        first = predictor.predict_faces(face, Halves())
    labels = [one.prediction.label for one in first]
    assert lines == [
        f"face {at + 1}: {label} from 0.0 s to 0.3 s" for at, label in enumerate(labels)
    ]
    assert main([str(clip), "--detect", "any", "--events", "--json"]) == 0
    events = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [one.pop("end") for one in events] == pytest.approx([0.3, 0.3])
    assert events == [
        {"image": str(clip), "track": at + 1, "label": label, "start": 0.0}
        for at, label in enumerate(labels)
    ]


def test_a_number_alone_is_no_camera(face, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["0", str(face)]) == 2
    assert "error: 0: expected a picture, a video or a camera, found no such file; camera:0" in (
        capsys.readouterr().err
    )
    shutil.copy(face, "7")
    assert main(["7"]) == 0


@pytest.mark.parametrize("options", [["--events"], ["--smooth", "0.2"], ["--smooth", "0"]])
def test_options_of_videos_without_a_video(options, face):
    said = rf"^{options[0]}: expected a video, .* found pictures alone; leave {options[0]} out$"
    for pictures in ([face], [face.parent], [face, "-"]):
        with pytest.raises(ConfigError, match=said):
            main([*map(str, pictures), *options])


def test_events_of_several_and_of_a_picture(clip, face, capsys):
    assert main([str(clip), str(face), str(clip), "--events"]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) >= 2 and all(line.startswith(f"{clip}: face 1: ") for line in lines)
    assert f"error: {face}: expected a video, a stream or a camera, since" in captured.err


def test_event_of_one_frame(clip, face, capsys, monkeypatch):
    monkeypatch.setattr(cli.Events, "update", lambda *_: [Event(1, "Anger", 0.9, 0.9)])
    assert main([str(clip), "--events"]) == 0
    assert capsys.readouterr().out.startswith("face 1: Anger at 0.9 s\n")


def test_events_of_a_video_without_a_face(clip, capsys, halves):
    black = clip.with_name("black.mp4")
    with write_video(black, 10) as write:
        for _ in range(3):
            write(Image.new("RGB", (104, 104)))
    assert main([str(clip), str(black), "--faces", "--events"]) == 0
    captured = capsys.readouterr()
    assert captured.out and str(black) not in captured.out
    assert captured.err.splitlines()[-1] == f"{black}: no face in 3 frames"
    assert captured.err.count("no face") == 1


def test_damaged_video_is_read_as_far_as_it_goes(clip, capsys, tmp_path):
    content = bytearray(clip.read_bytes())
    end = content.index(b"moov") - 4  # of what FFmpeg calls mdat, the frames
    content[end - 100 : end] = bytes(100)
    clip.write_bytes(content)
    assert main([str(clip), "--json", "--draw", str(tmp_path / "drawn")]) == 2
    captured = capsys.readouterr()
    frames = len(captured.out.splitlines())
    assert 0 < frames <= 6
    said = (
        f"error: {clip}: expected all 6 frames, found {frames} frames that can be read, damage at "
    )
    assert captured.err.startswith(said) and captured.err.count("\n") == 1
    with open_video(tmp_path / "drawn/clip.mp4") as video:  # the copy of these is whole
        assert len(list(video)) == frames


def test_video_that_is_none_is_counted_like_a_picture(face, capsys, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 99)
    assert main([str(tmp_path / "bad.mp4"), str(tmp_path / "missing.avi"), str(face)]) == 2
    captured = capsys.readouterr()
    assert "a video that FFmpeg can read" in captured.err and "no such file" in captured.err
    assert "2 of 3 pictures, videos or cameras could not be read" in captured.err
    assert names_of(captured.out.splitlines()[1:]) == ["face.png"]


class Camera:
    """Gives a few frames; then its user presses Ctrl-C, or it is unplugged."""

    rate = 25.0
    live = True
    dropouts = 0

    def __init__(self, frames: list[np.ndarray], interrupted: bool) -> None:
        self.frames = frames
        self.interrupted = interrupted
        self.closed = False

    def __iter__(self):
        yield from self.frames
        if self.interrupted:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)  # by now the main thread is told

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@pytest.fixture
def camera(monkeypatch, photo):
    """Plug a camera in; holds the numbers by which it was asked for."""

    def plug(count: int, interrupted: bool) -> tuple[Camera, list[object]]:
        made, asked = Camera([photo] * count, interrupted), []
        monkeypatch.setattr(cli, "open_video", lambda source: (asked.append(source), made)[1])
        return made, asked

    return plug


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "number"), [("camera", 0), ("camera:2", 2)])
def test_camera_until_ctrl_c(camera, capsys, name, number):
    plugged, asked = camera(1, True)
    assert main([name, "--json"]) == 0
    assert plugged.closed and asked == [number]
    records = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(record["image"], record["frame"]) for record in records] in ([(name, 0)], [])
    assert not [t for t in threading.enumerate() if "efficientface" in t.name]


@pytest.mark.timeout(60)
def test_camera_that_gives_nothing(camera, capsys):
    camera(0, False)
    assert main(["camera"]) == 2
    assert "at least one frame" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_drop_outs_are_told_and_counted(camera, capsys):
    plugged, _ = camera(3, False)

    def frames():
        yield plugged.frames[0]
        plugged.dropouts = 2
        logging.getLogger("efficientface_deploy.vision.video").warning("camera: drop-out 2")
        yield plugged.frames[0]

    plugged.__class__ = type("Dropping", (Camera,), {"__iter__": lambda self: frames()})
    assert main(["camera", "--json"]) == 0
    assert capsys.readouterr().err.splitlines() == ["camera: drop-out 2", "camera: drop-outs: 2"]


def test_address_is_a_stream_and_its_password_stays_ours(camera, capsys, tmp_path):
    pytest.importorskip("av")
    _, asked = camera(1, False)
    address = "rtsp://me:secret@host:554/live"
    assert main([address, "--json", "--draw", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert asked == [address] and "secret" not in captured.out + captured.err
    assert json.loads(captured.out)["image"] == "rtsp://me:***@host:554/live"
    assert [path.name for path in tmp_path.iterdir()] == ["live.mp4"]


@pytest.mark.parametrize("name", ["camera.jpg", "cameras", "./camera", "./camera:x"])
def test_file_that_is_no_camera(name):
    assert cli.camera_number(name) is None


@pytest.mark.parametrize("name", ["camera:x", "camera:-1"])
def test_camera_without_a_number(name, capsys):
    assert main([name]) == 2
    captured = capsys.readouterr()  # neither the model nor the table's head before the error
    said = f"error: {name}: expected camera or camera:NUMBER, found '{name[7:]}'; "
    assert captured.out == "" and captured.err.startswith(said) and captured.err.count("\n") == 1


# ---- models


def test_backend_that_is_none(face):
    with pytest.raises(BackendError):
        main([str(face), "--backend", "abacus"])


def test_published_checkpoint_with_its_preset(face, make_network, tmp_path, capsys):
    import torch

    network = make_network()
    checkpoint = tmp_path / "published.pth.tar"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, checkpoint
    )
    options = [str(face), "--model", str(checkpoint), "--json"]
    assert main([*options, "--preset", "rafdb"]) == 0
    assert tuple(probabilities_of(capsys)) == preset("rafdb").labels
    assert main(options) == 0  # numbered, since nothing says what they mean
    assert "class 0" in probabilities_of(capsys)
    with pytest.raises(CheckpointError, match="8 classes for preset affectnet8, found 7"):
        main([*options, "--preset", "affectnet8"])


def test_bundled_model_with_another_preset(face):
    with pytest.raises(Exception, match="leave the preset out"):
        main([str(face), "--preset", "rafdb"])


def test_photo_is_what_the_array_is(face, photo, capsys):
    """A file and the same pixels in memory give one answer."""
    assert main([str(face), "--json"]) == 0
    with load() as predictor:
        expected = predictor(np.array(photo)).probabilities
    assert probabilities_of(capsys) == pytest.approx(expected, abs=1e-6)
