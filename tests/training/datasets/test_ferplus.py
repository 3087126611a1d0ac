from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import DatasetError
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.dataset import Dataset, read_dataset
from training import prepare
from training.datasets import common
from training.datasets.ferplus import (
    FERPLUS_COLUMNS,
    FERPLUS_COUNTS,
    majority_label,
    probability_votes,
)

NEUTRAL, HAPPINESS, SURPRISE, SADNESS, ANGER, DISGUST, FEAR, CONTEMPT, UNKNOWN, NO_FACE = range(10)


def row(**votes: int) -> list[int]:
    """Ten counts from names of columns."""
    return [votes.get(column, 0) for column in FERPLUS_COLUMNS]


def public_code(votes: list[int], mode: str) -> list[int] | None:
    """The loop of the public FER+ code (Barsoum et al. 2016), column by column."""
    left = [0 if vote < 2 else vote for vote in votes]
    total, emotion = sum(left), [0] * 10
    if mode == "majority":
        if max(left) > 0.5 * total:
            emotion[left.index(max(left))] = max(left)
    else:
        part, count, valid = 0, 0, True
        while part < 0.75 * total and count < 3 and valid:
            largest = max(left)
            for column in range(10):
                if left[column] == largest:
                    emotion[column] = largest
                    left[column] = 0
                    part += largest
                    count += 1
                    if column >= 8:
                        valid = False
                        if sum(emotion) > largest:
                            emotion[column] = 0
                            count -= 1
                        break
        if sum(emotion) <= 0.5 * total or count > 3:
            return None
    top = emotion.index(max(emotion))
    return emotion if max(emotion) > 0 and top < 8 else None


# ---- The protocols -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "label"),
    [
        (row(Happiness=10), HAPPINESS),
        (row(Anger=6, Sadness=4), ANGER),
        (row(Anger=5, Sadness=5), None),  # half is not more than half
        (row(Anger=4, Sadness=3, Fear=3), None),
        (row(Anger=4, Sadness=3, Fear=1, Neutral=1, Disgust=1), ANGER),  # 4 of 7: single votes out
        (row(Anger=2, **dict.fromkeys(FERPLUS_COLUMNS[:4], 1)), ANGER),
        (row(**dict.fromkeys(FERPLUS_COLUMNS, 1)), None),  # nothing but single votes
        (row(unknown=6, Neutral=4), None),
        (row(NF=10), None),
        (row(unknown=4, Neutral=6), NEUTRAL),
        (row(Contempt=6, unknown=4), CONTEMPT),
        (row(), None),
    ],
)
def test_majority(votes, label):
    assert majority_label(votes) == label
    expected = public_code(votes, "majority")
    assert (label is None) == (expected is None)


@pytest.mark.parametrize(
    ("votes", "kept"),
    [
        (row(Happiness=10), row(Happiness=10)),
        (row(Anger=6, Sadness=2, Fear=1, Neutral=1), row(Anger=6)),  # 6 of 8 are three quarters
        (row(Anger=6, Sadness=3, Fear=1), row(Anger=6, Sadness=3)),
        (row(Anger=4, Sadness=3, Fear=3), row(Anger=4, Sadness=3, Fear=3)),  # the tie together
        (row(Anger=4, Sadness=2, Fear=2, Neutral=2), None),  # four columns by ties
        (row(Anger=3, Sadness=3, Fear=2, Neutral=2), None),
        (row(Anger=5, Sadness=5), row(Anger=5, Sadness=5)),
        (row(**dict.fromkeys(FERPLUS_COLUMNS, 1)), None),  # nothing but single votes
        (row(unknown=6, Neutral=4), None),  # unknown first
        (row(NF=4, Neutral=3, Fear=3), None),
        (row(Neutral=6, unknown=4), row(Neutral=6)),  # unknown later is not taken, and ends it
        (row(Neutral=5, unknown=3, Fear=2), None),  # what was taken is half of the votes
        (row(Neutral=4, Fear=4, NF=2), row(Neutral=4, Fear=4)),
        (row(Neutral=5, unknown=5), None),  # tied with unknown: half of the votes
        (row(Neutral=3, Fear=3, unknown=3), row(Neutral=3, Fear=3)),  # tied, but two thirds
        (row(), None),
    ],
)
def test_probability(votes, kept):
    assert probability_votes(votes) == kept
    assert public_code(votes, "probability") == kept


def test_protocols_agree_with_the_public_loop_on_any_votes():
    random = np.random.default_rng(0)
    for people in (3, 10, 12):
        for votes in random.multinomial(people, random.dirichlet([0.3] * 10, 800)).tolist():
            label = majority_label(votes)
            expected = public_code(votes, "majority")
            assert label == (None if expected is None else int(np.argmax(expected))), votes
            assert probability_votes(votes) == public_code(votes, "probability"), votes


def test_published_counts_on_the_real_votes(shared):
    archive = shared / "data/ferplus.zip"
    if not archive.is_file():
        pytest.skip(f"needs FER+: {archive} is not there")
    with zipfile.ZipFile(archive) as source:
        for split, folder in (("train", "FER2013Train"), ("validation", "FER2013Valid")):
            text = source.read(f"ferplus/{folder}/label.csv").decode()
            votes = [[int(count) for count in line[2:]] for line in csv.reader(io.StringIO(text))]
            found = {
                "majority": sum(majority_label(row) is not None for row in votes),
                "probability": sum(probability_votes(row) is not None for row in votes),
            }
            assert found == {name: FERPLUS_COUNTS[split, name] for name in found}
    assert FERPLUS_COUNTS == {
        ("train", "majority"): 25_045,
        ("validation", "majority"): 3_191,
        ("train", "probability"): 27_947,
        ("validation", "probability"): 3_508,
    }


# ---- FER+ ----------------------------------------------------------------------------------------

WHOLE = "(0, 0, 48, 48)"


def png(value: int, size: tuple[int, int] = (48, 48)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


# Name, box, votes, content (None: there is no such file).
TRAIN = [
    ("fer0.png", WHOLE, row(Happiness=9, Neutral=1), png(0)),
    ("fer1.png", WHOLE, row(Anger=6, Sadness=4), png(10)),
    ("fer2.png", WHOLE, row(Anger=5, Sadness=5), png(20)),  # under probability alone
    ("fer3.png", WHOLE, row(unknown=8, Fear=2), png(30)),
    ("fer4.png", "(4, 6, 36, 40)", row(Fear=10), png(40)),
    ("fer5.png", WHOLE, row(Disgust=10), png(50)[:200]),  # damaged
    ("fer6.png", WHOLE, row(Contempt=10), None),
    ("fer7.png", "(0, 0, 48, 49)", row(Surprise=10), png(70)),  # a box that is not in the image
]
VALID = [
    ("fer8.png", WHOLE, row(Neutral=7, Sadness=3), png(80)),
    ("fer9.png", WHOLE, row(Anger=5, Sadness=5), png(90)),
]


def label_csv(rows) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([name, box, *votes] for name, box, votes, _ in rows)
    return text.getvalue()


def native(**splits) -> dict[str, bytes]:
    """The files of FER+ as published: relative path to content."""
    files = {}
    for folder, rows in splits.items():
        files[f"{folder}/label.csv"] = label_csv(rows).encode()
        files |= {f"{folder}/{name}": data for name, _, _, data in rows if data is not None}
    return files


@pytest.fixture(params=["folder", "zip", "nested zip"])
def source(request, as_folder, as_zip, tmp_path) -> Path:
    files = native(FER2013Train=TRAIN, FER2013Valid=VALID)
    if request.param == "folder":
        return as_folder(tmp_path / "ferplus", files)
    prefix = "data/ferplus/" if request.param == "nested zip" else ""
    return as_zip(tmp_path / "ferplus.zip", {prefix + name: data for name, data in files.items()})


def ferplus(source: Path, out: Path, *options: str) -> Dataset:
    arguments = ["ferplus", "--source", str(source), "--out", str(out), *options]
    assert prepare.main(arguments) == 0
    return read_dataset(out)


def summary(dataset: Dataset, split: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Of every image: its label's name and the votes that are not zero."""
    return {
        sample.path.name: (
            dataset.labels[sample.label],
            {n: v for n, v in zip(dataset.labels, sample.votes, strict=True) if v},
        )
        for sample in dataset.samples[split]
    }


def test_ferplus(source, tmp_path, capsys):
    dataset = ferplus(source, tmp_path / "out")
    assert summary(dataset, "train") == {
        "fer0.png": ("Happiness", {"Happiness": 9}),  # without the single vote
        "fer1.png": ("Anger", {"Anger": 6, "Sadness": 4}),
        "fer4.png": ("Fear", {"Fear": 10}),
    }
    assert summary(dataset, "validation") == {"fer8.png": ("Neutral", {"Neutral": 7, "Sadness": 3})}
    assert (dataset.name, dataset.preset) == ("FER+ (majority)", "ferplus")
    assert dataset.labels == preset("ferplus").labels

    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "left out fer5.png (train, Disgust): a damaged one ("
        + output.err.partition("damaged one (")[2].split("\n")[0],
        "left out fer6.png (train, Contempt): a missing or empty file",
        "left out fer7.png (train, Surprise): box (0, 0, 48, 49) in 48x48",
        "left out 3 images in all",
    ]
    assert "train: 3 (Neutral 0, Happiness 1, " in output.out
    assert "train, majority protocol: 3 images, published: 25,045" in output.out


def test_probability_protocol_is_for_train_alone(source, tmp_path):
    dataset = ferplus(source, tmp_path / "out", "--protocol", "probability")
    train = summary(dataset, "train")
    assert set(train) == {"fer0.png", "fer1.png", "fer2.png", "fer4.png"}
    assert train["fer2.png"] == ("Sadness", {"Anger": 5, "Sadness": 5})
    assert set(summary(dataset, "validation")) == {"fer8.png"}


def test_pixels(source, tmp_path):
    dataset = ferplus(source, tmp_path / "out")
    by_name = {sample.path.name: sample.path for sample in dataset.split("train")}
    assert by_name["fer0.png"].read_bytes() == png(0)  # all face: byte for byte
    whole = np.asarray(Image.open(io.BytesIO(png(40))))
    cut = np.asarray(Image.open(by_name["fer4.png"]).convert("L"))
    np.testing.assert_array_equal(cut, whole[6:40, 4:36])


def test_columns_are_matched_by_name(source, tmp_path, monkeypatch):
    spec = preset("ferplus")
    turned = spec.replace(labels=spec.labels[::-1])
    monkeypatch.setattr(common, "preset", lambda name: turned)
    dataset = ferplus(source, tmp_path / "out")
    assert dataset.labels[0] == "Contempt"
    assert summary(dataset, "train")["fer1.png"] == ("Anger", {"Anger": 6, "Sadness": 4})


def test_manifest_has_forward_slashes_and_named_votes(source, tmp_path):
    ferplus(source, tmp_path / "out")
    lines = (tmp_path / "out/manifest.csv").read_text().splitlines()
    assert lines[0] == "path,split,label," + ",".join(
        f"votes_{x}" for x in preset("ferplus").labels
    )
    assert lines[1] == "train/1/fer0.png,train,1,0,9,0,0,0,0,0,0"


def test_damaged_member_of_an_archive_is_left_out(as_zip, tmp_path, capsys):
    archive = as_zip(tmp_path / "ferplus.zip", native(FER2013Train=TRAIN[:2]))
    data = archive.read_bytes()
    assert data.count(TRAIN[0][3]) == 1
    archive.write_bytes(data.replace(TRAIN[0][3], bytes(len(TRAIN[0][3]))))  # its checksum fails
    assert set(summary(ferplus(archive, tmp_path / "out"), "train")) == {"fer1.png"}
    assert "left out fer0.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spreadsheet",
    [
        lambda text: "\ufeff" + text,
        lambda text: text + "\r\n",
        lambda text: text.replace("\r\n", "\n") + "\n\n",
        lambda text: "\ufeff" + text + "," * 11 + "\r\n",
    ],
)
def test_label_csv_after_a_spreadsheet(spreadsheet, as_folder, tmp_path):
    files = native(FER2013Train=TRAIN[:2], FER2013Valid=VALID)
    for name in ("FER2013Train/label.csv", "FER2013Valid/label.csv"):
        files[name] = spreadsheet(files[name].decode()).encode()
    dataset = ferplus(as_folder(tmp_path / "ferplus", files), tmp_path / "out")
    assert set(summary(dataset, "train")) == {"fer0.png", "fer1.png"}
    assert set(summary(dataset, "validation")) == {"fer8.png"}


@pytest.mark.parametrize(
    "line",
    [
        "fer0.png",
        'fer0.png,"(0, 0, 48)",1,0,0,0,0,0,0,0,0,0',
        'fer0.png,"(0, 0, 48, x)",1,0,0,0,0,0,0,0,0,0',
        f'fer0.png,"{WHOLE}",1,0,0,0,0,0,0,0,0',  # nine votes
        f'fer0.png,"{WHOLE}",1,0,0,0,0,0,0,0,0,0,7',
        f'fer0.png,"{WHOLE}",1,0,0,0,0,0,0,0,0,-1',
        f'fer0.png,"{WHOLE}",1,0,0,0,0,0,0,0,0,x',
        f'fer0.png,"{WHOLE}",1,0,0,0,0,0,0,0,0,1.5',
        "Image name,Box,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF",
        "fer0.png,\udcff",
    ],
)
def test_rows_that_are_not_ferplus(line, as_folder, tmp_path):
    files = native(FER2013Train=TRAIN[:1])
    files["FER2013Train/label.csv"] += (line + "\n").encode("utf-8", "surrogateescape")
    source = as_folder(tmp_path / "ferplus", files)
    with pytest.raises(DatasetError, match=r"FER2013Train/label.csv: expected rows of: name"):
        ferplus(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ferplus"]


def test_sources_that_are_not_ferplus(as_zip, tmp_path):
    (tmp_path / "text").write_text("no archive")
    (tmp_path / "empty").mkdir()
    other = as_zip(tmp_path / "other.zip", {"readme.txt": b"x"})
    for source in (tmp_path / "none", tmp_path / "text", tmp_path / "empty", other):
        with pytest.raises(DatasetError, match=str(source)):
            ferplus(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_labels_without_images(as_folder, tmp_path, capsys):
    rows = [(f"fer{number}.png", WHOLE, row(Fear=10), None) for number in range(30)]
    source = as_folder(tmp_path / "ferplus", native(FER2013Train=rows))
    with pytest.raises(DatasetError, match=r"out: expected images, found none that can be used"):
        ferplus(source, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "left out 30 images in all"


def test_description_says_where_the_data_come_from(source, tmp_path):
    ferplus(source, tmp_path / "out")
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert {"name", "labels", "preset", "face_crop", "source", "licence"} <= set(description)
    assert description["prepared_with"] == {"protocol": "majority"}


def test_another_preparation_in_the_same_folder(as_folder, content, tmp_path):
    out = tmp_path / "ferplus"
    source = as_folder(tmp_path / "source", native(FER2013Train=TRAIN))
    ferplus(source, out)
    before = content(out)
    with pytest.raises(DatasetError, match="another data set; choose another --out or add --over"):
        ferplus(source, out, "--protocol", "probability")
    assert content(out) == before
    dataset = ferplus(source, out, "--protocol", "probability", "--overwrite")
    assert dataset.name == "FER+ (probability)"
    assert len(list((out / "train").rglob("*.png"))) == 4
