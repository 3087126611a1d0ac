from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import DatasetError, ImageError, SpecError
from efficientface_deploy.spec import preset
from efficientface_deploy.workbench.dataset import (
    DESCRIPTION,
    MANIFEST,
    Sample,
    class_frequencies,
    image_list_hash,
    iterate_batches,
    label_distributions,
    read_csv,
    read_dataset,
    read_table,
)

LABELS = ("Neutral", "Happiness", "Surprise")
DESCRIBED = {"name": "Toy", "labels": list(LABELS), "preset": "rafdb", "source": "drawn"}
ROWS = [
    {"path": "train/1/b.png", "split": "train", "label": "1"},
    {"path": "train/0/a.png", "split": "train", "label": "0"},
    {"path": "test/2/c.png", "split": "test", "label": "2"},
]
VOTES = [(1, 8, 1), (10, 0, 0), (0, 2.5, 7.5)]
WITH_VOTES = [
    {**row, **{f"votes_{label}": str(vote) for label, vote in zip(LABELS, votes, strict=True)}}
    for row, votes in zip(ROWS, VOTES, strict=True)
]


def draw(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)
    return path


def write_manifest(
    root: Path, rows: list[dict[str, str]], columns: list[str] | None = None
) -> None:
    with (root / MANIFEST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A prepared data set with votes."""
    for value, row in enumerate(ROWS):
        draw(tmp_path / row["path"], 10 * value)
    (tmp_path / DESCRIPTION).write_text(json.dumps(DESCRIBED))
    write_manifest(tmp_path, WITH_VOTES)
    return tmp_path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The published layout, without any file that says what the numbers mean."""
    for name in ("train/0/b.jpg", "train/0/a.JPG", "train/6/c.png", "test/1/d.webp"):
        draw(tmp_path / name)
    return tmp_path


def refused(root: Path, preset_name: str | None = None) -> str:
    with pytest.raises(DatasetError) as caught:
        read_dataset(root, preset_name)
    message = str(caught.value)
    assert message.isprintable()
    return message


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.path.name for sample in samples]


def test_manifest(root):
    dataset = read_dataset(str(root))
    assert (dataset.name, dataset.labels, dataset.preset) == ("Toy", LABELS, "rafdb")
    assert dataset.split("train") == (
        Sample(root / "train/0/a.png", 0, (10.0, 0.0, 0.0)),
        Sample(root / "train/1/b.png", 1, (1.0, 8.0, 1.0)),
    )
    assert dataset.split("test")[0].votes == (0.0, 2.5, 7.5)
    assert dataset.samples["validation"] == ()


def test_manifest_without_votes(root):
    write_manifest(root, ROWS)
    assert [sample.votes for sample in read_dataset(root).split("train")] == [None, None]


def test_votes_are_read_by_name(root):
    columns = ["votes_Surprise", "label", "votes_Neutral", "split", "path", "votes_Happiness"]
    write_manifest(root, WITH_VOTES, columns)
    assert read_dataset(root).split("train")[1].votes == (1.0, 8.0, 1.0)


def test_spec_of_a_data_set(root):
    spec = read_dataset(root).spec
    assert (spec.labels, spec.name, spec.mean) == (LABELS, "Toy", preset("rafdb").mean)


@pytest.mark.parametrize(("said", "crop"), [({}, "aligned"), ({"face_crop": "box"}, "box")])
def test_crop_is_the_data_sets_own_else_the_presets(said, crop, root):
    (root / DESCRIPTION).write_text(json.dumps(DESCRIBED | said))
    assert read_dataset(root).spec.face_crop == crop
    assert preset("rafdb").face_crop == "aligned"


def test_description_without_manifest(root):
    (root / MANIFEST).unlink()
    samples = read_dataset(root).split("train")
    assert [(sample.path.name, sample.label) for sample in samples] == [("a.png", 0), ("b.png", 1)]
    assert samples[0].votes is None


def test_published_layout(published):
    dataset = read_dataset(published, "rafdb")
    assert names(dataset.split("train")) == ["a.JPG", "b.jpg", "c.png"]
    assert [sample.label for sample in dataset.split("train")] == [0, 0, 6]
    assert dataset.labels[6] == "Anger"
    assert dataset.evaluation_split() == "test"
    draw(published / "validation/3/e.jpg")
    assert read_dataset(published, "rafdb").evaluation_split() == "validation"


def test_what_systems_leave_behind_is_no_image(published, capsys):
    for name in ("train/0/._a.JPG", "train/0/Thumbs.db"):
        (published / name).write_bytes(b"x")
    (published / "train/.ipynb_checkpoints").mkdir()
    (published / "train/.git").mkdir()
    (published / "train/.DS_Store").write_bytes(b"x")
    assert len(read_dataset(published, "rafdb").split("train")) == 3
    assert capsys.readouterr().err == ""


def test_every_format_is_read_and_nothing_is_left_out_in_silence(published, capsys):
    for name in ("1.tif", "2.GIF", "3.jfif", "4.jpe", "5.bmp"):
        (published / "train/0" / name).write_bytes(b"not read yet")
    draw(published / "train/0/6.png").rename(published / "train/0/no suffix")
    (published / "train/0/7.heic").write_bytes(b"x")  # refused by name where it is read
    for name in ("train/0/notes.txt", "train/0/clip.mp4", "train/labels.csv", "test/a.jpg"):
        (published / name).write_bytes(b"x")
    assert len(read_dataset(published, "rafdb").split("train")) == 3 + 7
    assert capsys.readouterr().err.splitlines() == [
        f"note: left out of {published}: 2 file(s), no known kind of picture: clip.mp4, notes.txt",
        f"note: left out of {published}: 2 file(s), in no class: labels.csv, a.jpg",
    ]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_of_validation(published, name):
    draw(published / name / "3/e.jpg")
    dataset = read_dataset(published, "rafdb")
    assert names(dataset.split("validation")) == ["e.jpg"]
    assert dataset.evaluation_split() == "validation"
    draw(published / "validation/3/e.jpg")
    assert "one folder for validation, found val" in refused(published, "rafdb")


@pytest.mark.parametrize("name", ["dev", "Validation", "training"])
def test_split_of_another_name_is_not_lost(published, name):
    (published / "runs/7").mkdir(parents=True)  # anything else may be there
    assert len(read_dataset(published, "rafdb").split("train")) == 3
    draw(published / name / "3/e.jpg")
    said = f"expected splits train, validation, test, found a folder {name}; rename it"
    assert said in refused(published, "rafdb")


def test_folder_in_a_class_is_not_lost(published):
    draw(published / "train/0/deep/a.png")
    assert "expected images alone, found folder deep" in refused(published, "rafdb")


def test_closed_folder_of_a_class(published, monkeypatch):
    iterdir = Path.iterdir

    def refuse(path: Path):
        if path.name == "6":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "train/6: expected a folder of images, found permission denied" in refused(
        published, "rafdb"
    )


# ---- CSV


@pytest.mark.parametrize(
    "spreadsheet",
    [
        lambda text: text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n\n",
        lambda text: text + ",,,\n , ,\n",
        lambda text: "\n" + text.replace("\n", "\n\n"),
        lambda text: "\ufeff\r\n" + text.replace("\n", "\r\n") + "\r\n",
    ],
)
def test_csv_as_spreadsheets_write_it(spreadsheet, root):
    text = 'name,box\n"a.png","(1, 2)"\n"b, c.png",\n'
    lines = io.StringIO(spreadsheet(text), newline="")
    rows = [["name", "box"], ["a.png", "(1, 2)"], ["b, c.png", ""]]
    assert [row for _, row in read_csv(lines)] == rows
    manifest = spreadsheet((root / MANIFEST).read_text())
    (root / MANIFEST).write_bytes(manifest.encode())
    assert len(read_dataset(root).split("train")) == 2


def test_table_with_short_and_long_rows():
    columns, rows = read_table(["a,b\n", "1\n", "1,2,3\n"])
    assert columns == ["a", "b"]
    assert list(rows) == [(2, {"a": "1", "b": None}), (3, {"a": "1", "b": "2"})]
    assert read_table([])[0] == []


def test_byte_order_mark_of_a_spreadsheet(root):
    for name in (MANIFEST, DESCRIPTION):
        text = (root / name).read_text(encoding="utf-8")
        (root / name).write_text(text, encoding="utf-8-sig")
    assert len(read_dataset(root).split("train")) == 2


# ---- refused


def test_missing_folder(tmp_path):
    assert "training.prepare" in refused(tmp_path / "none")
    assert "folder" in refused(draw(tmp_path / "file.png"))


def test_published_layout_needs_a_preset(published):
    assert "--preset" in refused(published)


def test_unknown_preset(published):
    with pytest.raises(SpecError, match="'rafdb2'"):
        read_dataset(published, "rafdb2")


@pytest.mark.parametrize("folder", ["7", "07", "happy", "-1", "1 "])
def test_foreign_class_folder(published, folder):
    draw(published / "train" / folder / "x.jpg")
    message = refused(published, "rafdb")
    assert folder.strip() in message and "0 to 6" in message and "--preset" in message


def test_folder_without_images(tmp_path):
    assert "found none" in refused(tmp_path, "rafdb")
    (tmp_path / "train" / "0").mkdir(parents=True)
    assert "found none" in refused(tmp_path, "rafdb")


def test_preset_that_contradicts_the_description(root):
    message = refused(root, "ferplus")
    assert "rafdb" in message and "ferplus" in message
    assert read_dataset(root, "rafdb").preset == "rafdb"


def test_missing_and_unknown_split(root):
    with pytest.raises(DatasetError, match="validation split, found train, test"):
        read_dataset(root).split("validation")
    with pytest.raises(DatasetError, match="dev"):
        read_dataset(root).split("dev")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"label": "3"}, "0 to 2"),
        ({"label": "-1"}, "0 to 2"),
        ({"label": "1.0"}, "numbers"),
        ({"label": ""}, "numbers"),
        ({"label": "Happiness"}, "numbers"),
        ({"label": "9" * 5000}, "numbers"),
        ({"votes_Neutral": "-1"}, "votes >= 0"),
        ({"votes_Neutral": "nan"}, "votes >= 0"),
        ({"votes_Surprise": "nan"}, "votes >= 0"),
        ({"votes_Neutral": "inf"}, "votes >= 0"),
        ({"votes_Neutral": "1e308", "votes_Surprise": "1e308"}, "votes >= 0"),
        ({"votes_Neutral": "many"}, "numbers"),
        ({"votes_Neutral": ""}, "numbers"),
        ({f"votes_{label}": "0" for label in LABELS}, "not all zero"),
        ({"path": "../a.png"}, "inside the data set"),
        ({"path": "train/../../a.png"}, "inside the data set"),
        ({"path": "/etc/passwd"}, "inside the data set"),
        ({"path": ""}, "inside the data set"),
        ({"path": "."}, "inside the data set"),
        ({"path": "train/0/a.png"}, "each image once"),
        ({"path": "train/0/./a.png", "split": "test"}, "each image once"),
        ({"split": "dev"}, "'dev'"),
        ({"split": ""}, "''"),
    ],
)
def test_bad_row_is_refused_with_its_line(root, changes, hint):
    write_manifest(root, [*WITH_VOTES[1:], {**WITH_VOTES[0], **changes}])
    message = refused(root)
    assert hint in message and f"{MANIFEST} line 4" in message


@pytest.mark.parametrize("row", ["train/1/b.png", "train/1/b.png,train", "train/1/b.png,train,1"])
def test_row_that_is_cut_short(root, row):
    lines = (root / MANIFEST).read_text().splitlines()
    (root / MANIFEST).write_text("\n".join([lines[0], row]))
    assert "line 2" in refused(root)


@pytest.mark.parametrize("missing", ["path", "split", "label"])
def test_missing_column(root, missing):
    write_manifest(root, WITH_VOTES, [name for name in WITH_VOTES[0] if name != missing])
    assert "columns path, split, label" in refused(root)


def test_votes_for_other_classes_are_not_ignored(root):
    write_manifest(root, WITH_VOTES, [name for name in WITH_VOTES[0] if name != "votes_Surprise"])
    assert "votes_Surprise" in refused(root)
    rows = [{**row, "votes_Contempt": "1"} for row in WITH_VOTES]
    write_manifest(root, rows)
    assert "votes_Contempt" in refused(root)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"path,split,label\n\xff,train,0\n", b"a\0b", b"\n\n"]
)
def test_manifest_that_is_no_csv(root, content):
    (root / MANIFEST).write_bytes(content)
    assert MANIFEST in refused(root)


def test_manifest_field_of_a_megabyte(root):
    write_manifest(root, [{**WITH_VOTES[0], "path": "x" * 1_000_000}])
    assert MANIFEST in refused(root)


def test_empty_manifest(root):
    write_manifest(root, WITH_VOTES[:1])
    lines = (root / MANIFEST).read_text().splitlines()
    (root / MANIFEST).write_text(lines[0] + "\n")
    assert "found none" in refused(root)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"[" * 100_000]
    + [
        json.dumps({key: value for key, value in DESCRIBED.items() if key != missing}).encode()
        for missing in ("name", "labels", "preset")
    ]
    + [
        json.dumps({**DESCRIBED, key: value}).encode()
        for key, value in [
            ("name", 3),
            ("name", None),
            ("labels", "abc"),
            ("labels", []),
            ("labels", ["a"]),
            ("labels", ["a", "a"]),
            ("labels", ["a", 3]),
            ("labels", {"a": 0, "b": 1}),
            ("labels", None),
            ("preset", "imagenet"),
            ("preset", None),
            ("preset", ["rafdb"]),
            ("face_crop", "tight"),
            ("face_crop", None),
        ]
    ],
)
def test_bad_description(root, content):
    (root / DESCRIPTION).write_bytes(content)
    assert f"{DESCRIPTION}: expected JSON with name, labels and preset" in refused(root)


@pytest.mark.parametrize(
    ("name", "said"), [(DESCRIPTION, "expected JSON"), (MANIFEST, "a line of")]
)
def test_file_of_zeros_without_end(root, name, said):
    with (root / name).open("r+b") as file:
        file.truncate(1 << 40)
    message = refused(root)
    assert name in message and said in message


# ---- distributions, hash, batches


def test_class_frequencies_are_shares_of_labels():
    samples = [Sample(Path("x"), label, votes=(9, 0, 1)) for label in (0, 2, 2, 1, 2)]
    assert class_frequencies(samples, 3) == (0.2, 0.2, 0.6)
    assert class_frequencies(samples, 4) is None


def test_label_distributions():
    samples = [
        Sample(Path("a"), 1, (1, 8, 1)),
        Sample(Path("b"), 2),
        Sample(Path("c"), 0, (1e-300, 0, 3e-300)),  # below float32
        Sample(Path("d"), 0, (1e300, 0, 1e300)),  # above it
    ]
    rows = label_distributions(samples, 3)
    assert rows.dtype == np.float32
    expected = [[0.1, 0.8, 0.1], [0, 0, 1], [0.25, 0, 0.75], [0.5, 0, 0.5]]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert label_distributions([], 7).shape == (0, 7)


def test_image_list_hash_sees_order_names_and_content(root):
    samples = read_dataset(root).split("train")
    first = image_list_hash(samples, root)
    assert len(first) == 64 and first == image_list_hash(list(samples), root)
    assert first != image_list_hash(samples[::-1], root)
    assert first != image_list_hash(samples[:1], root)
    draw(root / "train/0/a.png", 99)
    changed = image_list_hash(samples, root)
    assert changed != first
    (root / "train/0/a.png").rename(root / "train/0/z.png")
    renamed = [Sample(root / "train/0/z.png", 0), samples[1]]
    assert image_list_hash(renamed, root) not in (first, changed)


def test_image_list_hash_does_not_see_where_the_data_set_lies(root, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(root, copy)
    hashes = {image_list_hash(read_dataset(at).split("train"), at) for at in (root, copy)}
    assert len(hashes) == 1


def test_image_list_hash_of_a_missing_image(root):
    samples = read_dataset(root).split("test")
    samples[0].path.unlink()
    with pytest.raises(DatasetError, match=r"c\.png: expected an image, found no such file"):
        image_list_hash(samples, root)


def test_batches_come_in_order(root):
    spec = preset("rafdb").replace(input_size=32)
    samples = read_dataset(root).split("train") + read_dataset(root).split("test")
    batches = list(iterate_batches(samples, spec, 2))
    assert [images.shape for images, _ in batches] == [(2, 32, 32, 3), (1, 32, 32, 3)]
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2]]
    assert [int(images[0, 0, 0, 0]) for images, _ in batches] == [10, 20]
    assert list(iterate_batches([], spec, 2)) == []


def test_batch_with_a_missing_image(root):
    samples = read_dataset(root).split("train")
    samples[1].path.unlink()
    with pytest.raises(ImageError, match=r"b\.png"):
        list(iterate_batches(samples, preset("rafdb"), 8))
