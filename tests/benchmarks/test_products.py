"""The benchmark of products, with small scripts in the products' place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import products as bench
from efficientface_deploy.errors import BackendError, DatasetError

NAMES = tuple(bench.CLASSES)
SEVEN = tuple(name for name in NAMES if name != "Contempt")

# A product that says of each picture what ``words`` has for the folder that it lies in.
SCRIPT = """#!{python}
import json, pathlib, sys
words = {words!r}
for line in sys.stdin:
    pictures = json.loads(line)["pictures"]
    folders = [pathlib.Path(picture).parent.name for picture in pictures]
    labels = [words.get(folder, words["0"]) for folder in folders]
    answer = dict(labels=labels, ns=[2_000_000] * len(labels), cpu_ns=3_000_000 * len(labels))
    answer.update(classes={classes!r}, version="1.0")
    {extra}
    print(json.dumps(answer), flush=True)
"""

Install = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures of each class; four of neutral faces."""
    root = tmp_path / "data"
    for number in range(len(NAMES)):
        folder = root / "validation" / str(number)
        folder.mkdir(parents=True)
        for copy in range(4 if number == 0 else 2):
            Image.fromarray(np.full((48, 48), copy, np.uint8)).save(folder / f"{copy}.png")
    description = {"name": "small", "labels": NAMES, "preset": "ferplus"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Make a product's environment, with a script for its Python."""

    def make(
        name: str, words: Sequence[str], classes: Sequence[str] = SEVEN, extra: str = ""
    ) -> Path:
        python = tmp_path / "environments" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        said = {str(number): word for number, word in enumerate(words)}
        python.write_text(
            SCRIPT.format(python=sys.executable, words=said, classes=list(classes), extra=extra)
        )
        python.chmod(0o755)
        return python.parent.parent

    (tmp_path / "environments").mkdir()
    return make


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Callable[..., dict[str, Any]]:
    def call(**options: Any) -> dict[str, Any]:
        few = {"starts": 1, "rounds": 3, **options}
        config = bench.ProductsConfig(environments=tmp_path / "environments", data=data, **few)
        return bench.run(config)

    return call


def test_one_command_measures_everything(
    install: Install, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("efficientface-deploy", [name.upper() for name in NAMES], NAMES)
    folder = install("fer", ["happy", "happy", "surprise", "sad", "angry", "disgust", "fear"])
    (folder / "lib").mkdir()
    (folder / "lib" / "weights").write_bytes(bytes(3_000_000))
    (folder / "lib" / "pip-23.2" / "deep").mkdir(parents=True)
    (folder / "lib" / "pip-23.2" / "deep" / "file").write_bytes(bytes(5_000_000))
    out = tmp_path / "out"
    options = ["--data", str(data), "--starts", "1", "--rounds", "3", "--out", str(out)]
    assert bench.main([str(tmp_path / "environments"), *options]) == 0
    result = json.loads((out / "products.json").read_text())
    ours, other = result["cases"]
    assert (ours["product"], other["product"]) == ("efficientface-deploy", "fer")
    assert result["data"]["images"] == 18
    assert ours["accuracy"] == 1 and ours["lacks"] == "" and "difference" not in ours
    # Four neutral pictures are called happy, and the two of contempt cannot be right.
    assert other["accuracy"] == pytest.approx(12 / 18)
    assert other["common_images"] == ours["common_images"] == 16
    assert other["common_accuracy"] == pytest.approx(12 / 16)
    assert other["lacks"] == "Contempt"
    assert other["difference"]["value"] == pytest.approx(-6 / 18)
    low, high = other["accuracy_interval"]
    assert low < other["accuracy"] < high
    # Neutral and contempt are never said; happy is also said of six others.
    assert other["macro_f1"] == pytest.approx((0 + 4 / 10 + 5 + 0) / 8)
    assert other["images_per_second"] == pytest.approx(500) and other["cpu_ms"] == 3
    assert other["calls"] == 3 * 64
    assert 3_000_000 < other["install_bytes"] < 3_100_000
    assert other["first_label_seconds"] > 0
    absent = {row["model"]: row["reason"] for row in result["absent"]}
    assert list(absent) == ["face-api", "emotiefflib", "deepface", "opencv-zoo"]
    assert absent["deepface"] == "no folder deepface among the environments"
    shown = capsys.readouterr().out
    assert "66.67" in shown and "Contempt" in shown and "opencv-zoo" in shown
    assert "FER-2013" in (out / "products.md").read_text()


def test_a_product_lacks_its_weights_or_its_interpreter(
    install: Install, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    install("fer", SEVEN)
    install("emotiefflib", SEVEN)
    (tmp_path / "environments" / "face-api").mkdir()
    (tmp_path / "environments" / "efficientface-deploy").mkdir()
    absent = {row["model"]: row["reason"] for row in run(node="no-such-node")["absent"]}
    assert absent["emotiefflib"] == "no .emotiefflib/enet_b0_8_best_vgaf.onnx in its folder"
    assert absent["face-api"] == "no no-such-node to run it"
    assert "python.exe to run it" in absent["efficientface-deploy"]


FAULTS = {
    "labels.pop()": "answered 0 labels and 1 times for 1 pictures",
    "answer['ns'] = []": "answered 1 labels and 0 times for 1 pictures",
    "labels[0] = 'bored'": "says 'bored', which is none of Neutral, Happiness",
    "answer['classes'] = ['calm']": "says 'calm', which is none of",
    "del answer['labels']": """answered '{"ns":""",
    "answer = 7": "answered '7'",
    "labels[0] = None": "answered '{",
    "raise MemoryError('too small')": "its process ended with 1: MemoryError: too small",
    "sys.exit(3)": "its process ended with 3: no word",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_product_that_fails_is_one_line(
    fault: str, install: Install, run: Callable[..., dict[str, Any]]
) -> None:
    install("efficientface-deploy", NAMES, NAMES)
    install("fer", SEVEN, extra=fault)
    result = run()
    assert [row["product"] for row in result["cases"]] == ["efficientface-deploy"]
    reason = next(row["reason"] for row in result["absent"] if row["model"] == "fer")
    assert FAULTS[fault] in reason and "\n" not in reason


@pytest.mark.parametrize("pictures", [4, 64], ids=["labels", "turns"])
def test_a_product_may_fail_late(
    pictures: int,
    install: Install,
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_PART", 7)  # 7, 7 and 4 of the 18 pictures
    install("efficientface-deploy", NAMES, NAMES)
    install("fer", SEVEN, extra=f"if len(pictures) == {pictures}: sys.exit('no memory Error')")
    result = run()
    assert [row["product"] for row in result["cases"]] == ["efficientface-deploy"]
    reasons = {row["model"]: row["reason"] for row in result["absent"]}
    assert reasons["fer"] == "its process ended with 1: no memory Error"


def test_a_product_that_hangs_is_ended(
    install: Install, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_TIMEOUT", 0.3)
    install("fer", SEVEN, extra="import time; time.sleep(60)")
    with pytest.raises(BackendError, match="fer: its process ended with -9"):
        run()


def test_without_a_product_nothing_is_written(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(BackendError, match="a product that runs, found efficientface-deploy: no"):
        bench.main(["none", "--data", str(data), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_set_of_other_classes_is_refused(
    data: Path, run: Callable[..., dict[str, Any]], install: Install
) -> None:
    description = {"name": "seven", "labels": SEVEN, "preset": "rafdb"}
    (data / "dataset.json").write_text(json.dumps(description))
    (data / "validation" / "7").rename(data / "unused")
    with pytest.raises(DatasetError, match="expected the classes Neutral, Happiness"):
        run()


def test_few_pictures_are_of_all_classes(
    install: Install, run: Callable[..., dict[str, Any]]
) -> None:
    install("efficientface-deploy", NAMES, NAMES)
    confusion = np.array(run(pictures=9)["cases"][0]["confusion"])
    assert confusion.sum() == 9 and (confusion.diagonal() > 0).all()


@pytest.mark.parametrize(
    ("word", "name"),
    [("happy", "Happiness"), ("Fear", "Fear"), ("DISGUSTED", "Disgust"), ("calm", None)],
)
def test_words_are_taken_by_name(word: str, name: str | None) -> None:
    assert bench.class_of(word) == name
