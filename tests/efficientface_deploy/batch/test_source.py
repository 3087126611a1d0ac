"""The pictures of a folder, a manifest and Parquet files, in an order that stays."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import EfficientFaceError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from efficientface_deploy.batch.source import find_pictures  # noqa: E402 - pyarrow may be missing
from efficientface_deploy.vision.preprocess import load_image  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Pictures of one grey each, 0 to 4, with a manifest and Parquet files that name them."""
    folder = tmp_path / "set"
    (folder / "in").mkdir(parents=True)
    names = ["a.png", "b.png", "in/c.png", "in/d.png", "in/e.png"]
    for grey, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(folder / name)
    contents = [(folder / name).read_bytes() for name in names]
    (tmp_path / "set.csv").write_text("\ufeffid,file\n" + "".join(f"7,set/{n}\n" for n in names))
    paths = [str(folder / name) for name in names]
    pq.write_table(pa.table({"path": paths}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"image": contents}), tmp_path / "bytes.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("source", ["set", "set.csv", "paths.parquet", "bytes.parquet"])
def test_the_same_pictures_come_from_every_source(source, folder, tmp_path):
    pictures = find_pictures(tmp_path / source, None, tmp_path / "list")
    again = find_pictures(tmp_path / source, None, tmp_path / "list")
    assert pictures == again and pictures.count == 5
    found = list(pictures.read(1, 4))
    assert [index for index, _, _ in found] == [1, 2, 3]
    assert [load_image(one).getpixel((0, 0))[0] for _, _, one in found] == [1, 2, 3]


@pytest.mark.parametrize("source", ["set", "set.csv", "paths.parquet", "bytes.parquet"])
def test_another_set_has_another_digest(source, folder, tmp_path):
    before = find_pictures(tmp_path / source, None, tmp_path / "list")
    if source == "set":
        (folder / "b.png").rename(folder / "f.png")
    elif source == "set.csv":
        (tmp_path / source).write_text("file\nset/a.png\n")
    elif source == "paths.parquet":
        pq.write_table(pa.table({"path": ["a"]}), tmp_path / source)
    else:
        pq.write_table(pa.table({"image": [b"another"]}), tmp_path / source)
    assert find_pictures(tmp_path / source, None, tmp_path / "list").digest != before.digest


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text_is_read(folder, tmp_path):
    odd = os.fsencode(folder) + b"/in/\xff.png"
    os.rename(folder / "in" / "e.png", odd)
    _, name, path = next(find_pictures(folder, None, tmp_path / "list").read(4, 5))
    assert load_image(path).getpixel((0, 0))[0] == 4
    assert name.endswith("\\udcff.png")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"name\na.jpg\n", "a column image or bytes or path or file, found name; name it"),
        ("a.csv", b"", "expected a column .*, found none"),
        ("a.csv", b"path\n", "expected pictures, found none"),
        ("a.csv", b"path\n\xff\xfe\n", "expected a manifest, found 'utf-8' codec"),
        ("a.csv", b"path\n" + bytes(2 << 20), "expected a manifest, found a line of more than"),
        ("a.csv", None, "expected a manifest, found no such file"),
        ("a.txt", b"a.jpg\n", "expected a folder, a manifest .*, found another kind of file"),
        ("nowhere", None, "found no such file"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EfficientFaceError, match=words):
        find_pictures(tmp_path / name, None, tmp_path / "list")
