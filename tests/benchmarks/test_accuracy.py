from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import main
from benchmarks.report.compare import read_predictions
from benchmarks.report.result import read_result
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ConfigError, ImageError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.spec import preset

ARGUMENTS = ["--backends", "onnx:cpu,torch:cpu", "--preset", "rafdb"]


@pytest.fixture
def evaluate(colour_data: Path, tmp_path: Path) -> Callable[..., dict]:
    def run(*models: Path, extra: tuple[str, ...] = ()) -> dict:
        out = tmp_path / "out"
        given = [*map(str, models), "--data", str(colour_data), *ARGUMENTS, *extra]
        assert main([*given, "--out", str(out)]) == 0
        return read_result(out / "accuracy.json")

    return run


LABELS = preset("rafdb").labels


def swapped(colours: np.ndarray) -> np.ndarray:
    """The same network with classes 2 and 3 mistaken for each other."""
    return colours[[0, 1, 3, 2, 4, 5, 6]]


def test_models_side_by_side(
    make_onnx: Callable[..., Path],
    colours: np.ndarray,
    evaluate: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = make_onnx("fp32.onnx", precision="fp32")
    bad = make_onnx("int8.onnx", colours=swapped(colours), precision="int8")
    result = evaluate(good, bad)
    first, second = result["rows"]
    # 21 images, one in a wrong folder; the other model mistakes two classes of three images.
    assert first["accuracy"] == pytest.approx(20 / 21)
    assert second["accuracy"] == pytest.approx(14 / 21)
    assert (first["agreement"], first["mean_kl"]) == (1.0, 0.0)
    assert second["agreement"] == pytest.approx(15 / 21)
    assert second["mean_kl"] > 0.1 and second["max_probability_difference"] > 0.1
    # Class 0: two images, both found. Class 1: four, of which one is not of its colour.
    assert first["recall"] == pytest.approx([1, 3 / 4, 1, 1, 1, 1, 1])
    f1 = [2 * 2 / (2 * 2 + 1), 2 * 3 / (2 * 3 + 1), 1, 1, 1, 1, 1]
    assert first["macro_f1"] == pytest.approx(np.mean(f1))
    assert np.array(first["confusion"]).sum() == 21
    assert first["confusion"][1] == [1, 3, 0, 0, 0, 0, 0]
    assert [row["precision"] for row in result["rows"]] == ["fp32", "int8"]
    assert result["reference"] == "fp32.onnx on onnx:cpu"
    assert result["data"]["split"] == "test"
    assert result["data"]["images"] == 21
    assert result["data"]["images_per_class"] == [2, 4, 3, 3, 3, 3, 3]
    printed = capsys.readouterr().out
    assert "95.24" in printed and "66.67" in printed and "Macro-F1" in printed


def test_class_without_images_is_named(
    make_onnx: Callable[..., Path], colour_data: Path, evaluate: Callable[..., dict]
) -> None:
    shutil.rmtree(colour_data / "test/4")
    found = evaluate(make_onnx("fp32.onnx", precision="fp32"))["warnings"]
    assert f"images of each class, none of {LABELS[4]}: no score speaks of those" in found


def test_rows_have_intervals_and_every_class(
    make_onnx: Callable[..., Path], colours: np.ndarray, evaluate: Callable[..., dict]
) -> None:
    bad = make_onnx("int8.onnx", colours=swapped(colours), precision="int8")
    first, second = evaluate(make_onnx("fp32.onnx", precision="fp32"), bad)["rows"]
    low, high = first["accuracy_interval"]
    assert low < 20 / 21 < high <= 1
    low, high = first["macro_f1_interval"]
    assert low < first["macro_f1"] <= high
    assert first["difference"]["value"] == 0
    assert second["difference"]["value"] == pytest.approx(-6 / 21)
    assert second["difference"]["interval"][1] < 0
    assert second["agreement_interval"][0] < 15 / 21 < second["agreement_interval"][1]
    # Class 2 is never said of its own images: F1 0; precision of a class that is said is known.
    assert second["f1"][2] == 0 and second["precision_per_class"][0] == pytest.approx(2 / 3)


def test_predictions_are_kept_and_a_second_run_compares_image_by_image(
    make_onnx: Callable[..., Path],
    colours: np.ndarray,
    evaluate: Callable[..., dict],
    colour_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate(make_onnx("a.onnx"))
    kept = read_predictions(tmp_path / "out" / "predictions.npz")
    assert kept["images"][:3].tolist() == ["test/0/0-0.png", "test/0/0-1.png", "test/1/0-2.png"]
    assert (kept["labels"] == kept["classes: a.onnx on onnx:cpu"]).sum() == 20
    capsys.readouterr()
    worse = str(make_onnx("a.onnx", colours=swapped(colours)))
    old = str(tmp_path / "out" / "accuracy.json")
    given = [worse, "--data", str(colour_data), *ARGUMENTS, "--out", str(tmp_path / "new")]
    assert main([*given, "--compare", old]) == 0
    printed = capsys.readouterr().out
    assert "New minus old accuracy" in printed and "-28.57" in printed
    assert "regression: a.onnx on onnx:cpu" in printed
    assert "a.onnx is another file now" in printed


def test_labels_are_matched_by_name(
    make_onnx: Callable[..., Path], colours: np.ndarray, evaluate: Callable[..., dict]
) -> None:
    order = [3, 0, 6, 1, 5, 2, 4]
    other = tuple(LABELS[index] for index in order)
    same = make_onnx("same.onnx", precision="fp32")
    reordered = make_onnx("reordered.onnx", labels=other, colours=colours[order])
    result = evaluate(same, reordered)
    first, second = result["rows"]
    assert first["accuracy"] == second["accuracy"] == pytest.approx(20 / 21)
    assert second["agreement"] == 1.0


def test_a_model_with_other_labels_is_left_out_and_said(
    make_onnx: Callable[..., Path], evaluate: Callable[..., dict]
) -> None:
    stranger = make_onnx("stranger.onnx", labels=tuple("abcdefg"))
    result = evaluate(make_onnx("a.onnx"), stranger)
    assert [row["model"] for row in result["rows"]] == ["a.onnx"]
    (entry,) = [entry for entry in result["absent"] if entry["model"]]
    assert entry["model"] == "stranger.onnx"
    assert entry["reason"].startswith("labels: expected those of RAF-DB (Neutral")


def test_the_reference_is_pytorch_where_there_is_one(
    make_onnx: Callable[..., Path], student: Path, evaluate: Callable[..., dict]
) -> None:
    result = evaluate(make_onnx("a.onnx", precision="fp32"), student)
    assert result["reference"] == "student.safetensors on torch:cpu"
    assert result["rows"][1]["agreement"] == 1.0


def test_published_checkpoint_is_read_with_the_preset(
    make_onnx: Callable[..., Path], student: Path, evaluate: Callable[..., dict], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    model, _ = load_checkpoint(student)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "published.pth.tar")
    result = evaluate(tmp_path / "published.pth.tar", make_onnx("a.onnx"))
    assert [row["model"] for row in result["rows"]] == ["published.pth.tar", "a.onnx"]
    row = result["rows"][0]
    assert (row["network"], row["input_size"], row["backend"]) == ("RAF-DB", 224, "torch:cpu")


def test_an_image_that_cannot_be_read_is_named(
    make_onnx: Callable[..., Path], colour_data: Path, tmp_path: Path
) -> None:
    broken = colour_data / "test" / "3" / "3-1.png"
    broken.write_bytes(b"no picture")
    argv = [str(make_onnx("a.onnx")), "--data", str(colour_data), *ARGUMENTS]
    with pytest.raises(ImageError, match=r"3-1\.png"):
        main([*argv, "--out", str(tmp_path / "out")])


def test_a_model_that_fails_does_not_spoil_the_rest(
    make_onnx: Callable[..., Path], colours: np.ndarray, evaluate: Callable[..., dict]
) -> None:
    broken = make_onnx("nan.onnx", colours=colours * np.nan)
    result = evaluate(broken, make_onnx("a.onnx"))
    assert [row["model"] for row in result["rows"]] == ["a.onnx"]
    (entry,) = [entry for entry in result["absent"] if entry["model"]]
    assert (entry["model"], "NaN" in entry["reason"]) == ("nan.onnx", True)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--split", "train"], "expected a train split, found test"),
        (["--preset", "ferplus"], "none (a.onnx: labels: expected those of FER+"),
        (["--preset", "nonsense"], "preset: expected one of rafdb"),
        (["--data", "/nowhere"], "/nowhere: expected a data set's folder"),
        (["--compare", "/nowhere.json"], "/nowhere.json: expected a benchmark's result"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    extra: list[str],
    message: str,
    make_onnx: Callable[..., Path],
    colour_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(make_onnx("a.onnx")), "--data", str(colour_data), *ARGUMENTS, *extra]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*given, "--out", str(tmp_path / "out")]))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["latency", "runtime"])
def test_result_of_another_kind_is_refused_before_the_work(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"schema": 2, "kind": kind, "machine": {}}))
    monkeypatch.setattr("benchmarks.accuracy.run", None)
    with pytest.raises(ConfigError, match=f"--compare: .*found {kind} and accuracy"):
        main(["--data", "anywhere", "--compare", str(old), "--out", str(tmp_path / "out")])
