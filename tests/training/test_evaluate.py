from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchmetrics.functional import classification as tm

from efficientface_deploy import PRESETS, load
from efficientface_deploy.artifact import SPEC_KEY, read_safetensors_metadata
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ArtifactError, CheckpointError, ConfigError, DatasetError
from efficientface_deploy.models import LabelDistributionGenerator, load_checkpoint, save_checkpoint
from efficientface_deploy.vision.preprocess import normalise, to_model_input
from efficientface_deploy.workbench import evaluation
from efficientface_deploy.workbench.dataset import Sample, read_dataset
from efficientface_deploy.workbench.evaluation import labels_of
from efficientface_deploy.workbench.metrics import confusion_matrix, expected_calibration_error
from training import evaluate
from training.evaluate import as_markdown, predict_samples, score, score_sureness
from training.trainer.loader import hold_out

CLASSES = 7


@pytest.fixture(scope="module")
def probabilities(make_network, face_set) -> torch.Tensor:
    """What plain PyTorch gives for the test split, (28, 7)."""
    spec = read_dataset(face_set).spec.replace(input_size=64)
    samples = read_dataset(face_set).split("test")
    images = np.stack([to_model_input(sample.path, spec) for sample in samples])
    with torch.no_grad():
        return make_network()(torch.from_numpy(normalise(images, spec))).softmax(dim=1)


def run(weights, data, *options) -> int:
    return evaluate.main(["--weights", str(weights), "--data", str(data), *map(str, options)])


def evaluate_json(weights, data, tmp_path, *options):
    out = tmp_path / "out"
    assert run(weights, data, "--out", out, *options) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_figures_are_torchmetrics(
    student_file, probabilities, face_set, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluation, "BATCH", 10)  # 28 images: two whole batches and a rest
    figures = evaluate_json(student_file, face_set, tmp_path)
    samples = read_dataset(face_set).split("test")
    truth = torch.tensor([sample.label for sample in samples])

    def close(value):
        return pytest.approx(value.item(), abs=1e-5)

    assert figures["accuracy"] == close(
        tm.multiclass_accuracy(probabilities, truth, CLASSES, average="micro")
    )
    assert figures["macro_f1"] == close(tm.multiclass_f1_score(probabilities, truth, CLASSES))
    assert figures["expected_calibration_error"] == close(
        tm.multiclass_calibration_error(probabilities, truth, CLASSES, n_bins=15)
    )
    assert [row["label"] for row in figures["classes"]] == list(read_dataset(face_set).labels)
    assert [row["images"] for row in figures["classes"]] == [4] * 7
    predicted = torch.bincount(probabilities.argmax(dim=1), minlength=CLASSES)
    for key, function in (
        ("precision", tm.multiclass_precision),
        ("recall", tm.multiclass_recall),
        ("f1", tm.multiclass_f1_score),
    ):
        expected = function(probabilities, truth, CLASSES, average="none").tolist()
        if key == "precision":  # torchmetrics says 0 of a class that is never predicted
            expected = [x if n else None for x, n in zip(expected, predicted, strict=True)]
        assert [row[key] for row in figures["classes"]] == pytest.approx(expected)
    matrix = tm.multiclass_confusion_matrix(probabilities, truth, CLASSES)
    assert figures["confusion_matrix"] == matrix.tolist()

    votes = torch.tensor([sample.votes for sample in samples])
    floor = probabilities.double().clamp_min(1e-12)  # a network this sure underflows
    terms = torch.special.xlogy(votes, votes) - torch.special.xlogy(votes, floor)
    assert figures["mean_kl_from_votes"] == pytest.approx(terms.sum(dim=1).mean().item(), rel=1e-4)
    assert (figures["images"], figures["split"], figures["largest_class"]) == (28, "test", 4 / 28)
    assert (figures["dataset"], figures["weights"]) == ("synthetic faces", str(student_file))

    out = capsys.readouterr().out
    assert "synthetic faces, test, 28 images" in out
    assert f"| accuracy | {figures['accuracy']:.4f} | " in out


def test_split_is_chosen(student_file, face_set, tmp_path):
    figures = evaluate_json(student_file, face_set, tmp_path, "--split", "train")
    assert (figures["images"], figures["split"]) == (56, "train")
    with pytest.raises(DatasetError, match="a validation split"):
        evaluate_json(student_file, face_set, tmp_path, "--split", "validation")


def test_holdout_is_the_trainings_tenth(student_file, face_set, tmp_path):
    figures = evaluate_json(student_file, face_set, tmp_path, "--split", "holdout", "--seed", "3")
    expected = hold_out(read_dataset(face_set).split("train"), 3)[1]
    assert (figures["images"], figures["split"]) == (len(expected), "holdout")
    counts = [row["images"] for row in figures["classes"]]
    assert counts == np.bincount([sample.label for sample in expected]).tolist()


@pytest.fixture
def trained_with(student_file, tmp_path):
    """The student with a record of how it was trained."""

    def save(**record) -> Path:
        model, spec = load_checkpoint(student_file)
        save_checkpoint(tmp_path / "trained.safetensors", model, spec, json.dumps(record))
        return tmp_path / "trained.safetensors"

    return save


def test_holdout_is_that_of_the_files_own_training(trained_with, face_set, tmp_path):
    weights = trained_with(select="holdout", seed=3)
    figures = evaluate_json(weights, face_set, tmp_path, "--split", "holdout")
    expected = hold_out(read_dataset(face_set).split("train"), 3)[1]
    counts = [row["images"] for row in figures["classes"]]
    assert counts == np.bincount([sample.label for sample in expected]).tolist()


@pytest.mark.parametrize(
    ("record", "options", "fix"),
    [
        ({"select": "holdout", "seed": 3}, ["--seed", "0"], "leave --seed out"),
        ({"select": "last", "seed": 0}, [], "choose another --split"),
        ({"select": "validation", "seed": 0}, ["--seed", "0"], "choose another --split"),
    ],
)
def test_holdout_that_was_trained_on_is_refused(
    record, options, fix, trained_with, face_set, tmp_path
):
    with pytest.raises(ConfigError, match=f"not trained on, found a model of --select .*{fix}"):
        evaluate_json(trained_with(**record), face_set, tmp_path, "--split", "holdout", *options)


@pytest.mark.parametrize("folded", [False, True])
def test_temperature_that_was_left_out_is_tried(
    folded, student_file, make_network, face_set, tmp_path, capsys, probabilities
):
    spec = read_dataset(face_set).spec.replace(input_size=64)
    weights = tmp_path / "teacher.safetensors"
    record = {"calibration": {"temperature": 2.5, "folded": folded}}
    save_checkpoint(weights, make_network(), spec, json.dumps(record))
    figures = evaluate_json(weights, face_set, tmp_path)
    assert ("temperature" in figures) != folded
    assert ("| ECE, 15 bins, at temperature 2.500 | " in capsys.readouterr().out) != folded
    if not folded:
        labels = np.array([sample.label for sample in read_dataset(face_set).split("test")])
        scaled = (probabilities.log() / 2.5).softmax(dim=1).numpy()
        found = figures["scaled"]["expected_calibration_error"]
        assert found == pytest.approx(expected_calibration_error(scaled, labels), abs=1e-5)
        assert found != figures["expected_calibration_error"]


# ---- Another prior, and what is written into a checkpoint ---------------------------------------


def weights_of(path: Path) -> bytes:
    """All of a safetensors file behind its header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_prior_scores_the_same_probabilities_anew(
    student_file, face_set, tmp_path, capsys, probabilities
):
    spec, frequencies = read_dataset(face_set).spec, np.array([1, 1, 1, 2, 2, 2, 3]) / 12
    weights = tmp_path / "student.safetensors"
    given = spec.replace(input_size=64, class_frequencies=tuple(frequencies))
    save_checkpoint(weights, load_checkpoint(student_file)[0], given)
    figures = evaluate_json(weights, face_set, tmp_path, "--prior", "uniform")
    labels = np.array([sample.label for sample in read_dataset(face_set).split("test")])
    expected = confusion_matrix(labels, (probabilities.numpy() / frequencies).argmax(axis=1), 7)
    assert figures["prior"]["confusion_matrix"] == expected.tolist() != figures["confusion_matrix"]
    assert figures == {**evaluate_json(weights, face_set, tmp_path), "prior": figures["prior"]}
    page = capsys.readouterr().out
    assert "| value | 95 % interval | value, uniform prior | 95 % interval |" in page
    accuracy, adjusted = figures["accuracy"], figures["prior"]["accuracy"]
    row = rf"\| accuracy \| {accuracy:.4f} \| .* \| {adjusted:.4f} \| .* \|\n"
    assert re.search(row, page)
    with load(weights, prior="uniform") as predictor:  # the same road as a user's
        assert predictor.spec.class_frequencies == tuple(frequencies)
        paths = [sample.path for sample in read_dataset(face_set).split("test")]
        found = [predictor.spec.labels.index(p.label) for p in predictor.predict_batch(paths)]
    assert confusion_matrix(labels, np.array(found), 7).tolist() == expected.tolist()


def test_fit_changes_the_spec_alone(trained_with, face_set, tmp_path, capsys):
    weights = trained_with(select="holdout", seed=3)
    before, metadata = weights_of(weights), read_safetensors_metadata(weights)
    figures = evaluate_json(weights, face_set, tmp_path, "--fit")
    assert figures["split"] == "holdout"
    assert f"into {weights}" in capsys.readouterr().out
    after = read_safetensors_metadata(weights)
    spec, own = (json.loads(data.pop(SPEC_KEY)) for data in (after, metadata))
    assert (spec.pop("sure_above"), spec.pop("sure_precision")) == (1, 0.95)
    assert figures["sureness"]["promised"] == 0.95  # the figures are those of the new spec
    assert spec.pop("class_frequencies") == pytest.approx([1 / 7] * 7)
    assert (weights_of(weights), after, spec) == (before, metadata, own)


def test_views_of_the_images_are_scored(trained_with, face_set, tmp_path):
    """flip: half of them as they are, half mirrored, the same at every call."""
    weights = trained_with(select="holdout", seed=3)
    samples = read_dataset(face_set).split("test")
    with load(weights) as predictor:
        plain = predict_samples(predictor, samples)
        faces = [ImageOps.mirror(Image.open(sample.path).convert("RGB")) for sample in samples]
        mirrored = np.array(
            [list(p.probabilities.values()) for p in predictor.predict_batch(faces)]
        )
        views = predict_samples(predictor, samples, "flip")
        assert np.array_equal(views, predict_samples(predictor, samples, "flip"))
    same, turned = (np.abs(views - other).max(axis=1) < 1e-4 for other in (plain, mirrored))
    assert np.all(same | turned) and not same.all() and not turned.all()
    figures = evaluate_json(weights, face_set, tmp_path, "--augmentation", "photo")
    assert figures["augmentation"] == "photo"
    page = (tmp_path / "out/evaluation.md").read_text()
    assert "a random view of each (photo)" in page


def test_sure_labels(tmp_path):
    """Two of three above 0.7; of class b one that is right, of class c none at all."""
    probabilities = np.array(
        [[0.9, 0.1, 0], [0.8, 0.2, 0], [0.6, 0.4, 0], [0.25, 0.75, 0]], np.float32
    )
    samples = [Sample(tmp_path, label) for label in (0, 1, 0, 1)]
    spec = PRESETS["rafdb"].replace(labels=("a", "b", "c"))
    curve = score_sureness(probabilities, labels_of(samples), spec)["curve"]
    assert set(score_sureness(probabilities, labels_of(samples), spec)) == {"curve"}
    kept = {row["above"]: (row["labels"], row["share"], row["right"]) for row in curve}
    assert kept[0.0] == (4, 1, 0.75) and kept[0.7] == (3, 0.75, 2 / 3)
    assert kept[0.85] == (1, 0.25, 1) and kept[0.95] == (0, 0, None)
    spec = spec.replace(sure_above=0.7, sure_precision=0.9)
    figures = score_sureness(probabilities, labels_of(samples), spec)
    found = [(r["label"], r["labels"], r["share"], r["right"]) for r in figures["classes"]]
    assert found == [("a", 2, 2 / 3, 0.5), ("b", 1, 1, 1), ("c", 0, None, None)]
    assert figures["all"]["right"] == 2 / 3 and figures["all"]["labels"] == 3
    named = {**score(probabilities, samples, spec.labels), **NAMES, "sureness": figures}
    page = as_markdown(json.loads(json.dumps(named, allow_nan=False)))
    assert "a confidence above 0.70, of which 90 % are promised to be right:" in page
    assert "| b | 1 | 1.0000 | 1.0000 | " in page and "| c | 0 | - | - |  |" in page
    assert "| 0.70 | 3 | 0.7500 | 0.6667 | " in page and "| all | 3 | 0.7500 | 0.6667 |" in page


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("student.safetensors", ["--augmentation", "photo"], "images as they are, found photo; l"),
        ("student.safetensors", ["--split", "validation"], "the tenth of train, found --split v"),
        ("student.onnx", [], r"a \.safetensors file, found student\.onnx; fit the checkpoint, and"),
    ],
)
def test_fit_that_cannot_be_is_refused_before_the_work(name, options, said, tmp_path):
    with pytest.raises(ConfigError, match=f"^--fit: expected {said}"):
        run(tmp_path / name, tmp_path / "no data set", "--fit", *options)


def test_fit_on_images_that_were_trained_on(trained_with, face_set):
    weights = trained_with(select="last", seed=0)
    before = weights.read_bytes()
    with pytest.raises(ConfigError, match="images that the model was not trained on"):
        run(weights, face_set, "--fit")
    assert weights.read_bytes() == before


def test_other_labels_are_refused(face_set, make_network, tmp_path):
    labels = read_dataset(face_set).labels
    spec = read_dataset(face_set).spec.replace(input_size=64, labels=labels[::-1])
    save_checkpoint(tmp_path / "turned.safetensors", make_network(), spec)
    with pytest.raises(DatasetError, match=r"the model's labels: Anger, .* found Neutral, "):
        evaluate_json(tmp_path / "turned.safetensors", face_set, tmp_path)
    assert not (tmp_path / "out").exists()


def test_class_without_images_and_samples_without_votes(tmp_path):
    samples = [Sample(tmp_path, 0), Sample(tmp_path, 2), Sample(tmp_path, 2)]
    probabilities = np.eye(3, dtype=np.float32)[[0, 2, 0]]
    figures = score(probabilities, samples, ("a", "b", "c"))
    assert figures["classes"] == [
        {"label": "a", "images": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)},
        {"label": "b", "images": 0, "precision": None, "recall": None, "f1": None},
        {"label": "c", "images": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)},
    ]
    assert "mean_kl_from_votes" not in figures
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    named = {**figures, **NAMES}
    page = as_markdown(named)
    assert "| b | 0 | - | - | - |" in page and "KL" not in page
    assert "faces, test, 3 images, none of b. Always the largest class" in page
    assert "| accuracy | 0.6667 | " in page and "Always the largest class: 0.6667." in page


NAMES = {
    "weights": "runs/a_b*c.onnx",
    "weights_sha256": "0" * 64,
    "model": "Predictor('a_b*c.onnx')",
    "dataset": "some <b>|faces",
    "split": "test",
}


def test_names_from_files_cannot_break_the_page(tmp_path):
    samples = [Sample(tmp_path, 0), Sample(tmp_path, 1)]
    labels = ("a|b", "$\\frac{")  # a table's bar; a formula that matplotlib could not set
    figures = {**score(np.eye(2, dtype=np.float32), samples, labels), **NAMES}
    evaluate.write_evaluation(tmp_path / "out", figures)
    page = (tmp_path / "out/evaluation.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| a\\|b")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 6
    assert r"# Evaluation of a\_b\*c.onnx" in page and r"\<b\>\|faces" in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


FILES = {"evaluation.json", "evaluation.md", "confusion.png", "reliability.png"}


def test_out_holds_page_and_plots(student_file, face_set, tmp_path, capsys):
    figures = evaluate_json(student_file, face_set, tmp_path)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == FILES  # no temporary file is left
    for name in ("confusion.png", "reliability.png"):
        with Image.open(out / name) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 400
    page = (out / "evaluation.md").read_text()
    low, high = figures["accuracy_interval"]
    assert f"| accuracy | {figures['accuracy']:.4f} | {low:.4f} to {high:.4f} |" in page
    assert page.count("\n| ") == 3 + 4 + 7 + 10  # heads, figures, classes, the curve
    assert "(confusion.png)" in page and "(reliability.png)" in page
    assert f"wrote evaluation.json, evaluation.md and two plots to {out}" in capsys.readouterr().out
    assert sum(figures["reliability"]["count"]) == 28
    assert figures["weights_sha256"] == hashlib.sha256(student_file.read_bytes()).hexdigest()
    # The same figures again, into the same folder.
    assert evaluate_json(student_file, face_set, tmp_path) == figures


def test_nothing_is_written_without_out(student_file, face_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(student_file, face_set) == 0
    assert list(tmp_path.iterdir()) == []


# ---- Every kind of model file --------------------------------------------------------------------


def test_exported_file_scores_as_its_checkpoint(model_files, face_set, tmp_path):
    expected = evaluate_json(model_files["torch"], face_set, tmp_path / "torch")
    onnx = evaluate_json(model_files["onnx"], face_set, tmp_path / "onnx")
    assert onnx["confusion_matrix"] == expected["confusion_matrix"]
    assert onnx["mean_kl_from_votes"] == pytest.approx(expected["mean_kl_from_votes"], abs=1e-4)
    assert "onnx:cpu" in onnx["model"]


def test_published_layout_and_checkpoint_by_preset(make_network, face_set, tmp_path):
    """Without dataset.json and without a spec the preset says everything."""
    bare = tmp_path / "RAF-DB"
    shutil.copytree(face_set / "test", bare / "test")
    model = make_network()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    published = tmp_path / "published.pth.tar"
    torch.save({"epoch": 3, "best_acc": torch.tensor(88.0), "state_dict": state}, published)

    figures = evaluate_json(published, bare, tmp_path, "--preset", "rafdb")
    spec = PRESETS["rafdb"]
    truth, predicted = [], []
    for path in sorted((bare / "test").glob("*/*.jpg")):
        batch = torch.from_numpy(normalise(to_model_input(path, spec)[None], spec))
        with torch.no_grad():
            predicted.append(int(model(batch).argmax()))
        truth.append(int(path.parent.name))
    expected = np.zeros((7, 7), dtype=int)
    np.add.at(expected, (truth, predicted), 1)
    assert figures["confusion_matrix"] == expected.tolist()
    assert figures["dataset"] == "RAF-DB" and "mean_kl_from_votes" not in figures

    with pytest.raises(ArtifactError, match="--preset, since this checkpoint does not say"):
        run(published, bare)
    with pytest.raises(CheckpointError, match="8 classes for preset affectnet8, found 7"):
        run(published, bare, "--preset", "affectnet8")


def test_a_checkpoint_of_another_data_set_with_the_same_labels(make_network, face_set, tmp_path):
    """Cross-database evaluation: dataset.json names the classes, the preset is the checkpoint's."""
    published = tmp_path / "affectnet.pth.tar"
    torch.save({"state_dict": make_network().state_dict()}, published)
    figures = evaluate_json(published, face_set, tmp_path, "--preset", "affectnet7")
    assert "AffectNet-7" in figures["model"] and figures["dataset"] == "synthetic faces"


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_ldg_is_scored(architecture, face_set, tmp_path):
    spec = read_dataset(face_set).spec.replace(architecture=architecture, input_size=32)
    torch.manual_seed(0)
    ldg = LabelDistributionGenerator(7, architecture).train()
    ldg(torch.randn(16, 3, 32, 32))  # batch norms that have seen something
    save_checkpoint(tmp_path / "teacher.safetensors", ldg.eval(), spec)
    figures = evaluate_json(tmp_path / "teacher.safetensors", face_set, tmp_path)
    samples = read_dataset(face_set).split("test")
    images = np.stack([to_model_input(sample.path, spec) for sample in samples])
    with torch.no_grad():
        predicted = ldg(torch.from_numpy(normalise(images, spec))).argmax(dim=1).numpy()
    truth = np.array([sample.label for sample in samples])
    assert figures["accuracy"] == np.mean(predicted == truth)


# ---- Bad input -----------------------------------------------------------------------------------


def test_preset_that_contradicts_the_file(model_files, face_set, tmp_path):
    for kind in ("torch", "onnx"):
        with pytest.raises(
            ArtifactError, match=r"labels Neutral.*found preset ferplus.*leave the preset"
        ):
            run(model_files[kind], face_set, "--preset", "ferplus", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused_before_the_work(student_file, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ConfigError, match="a folder that can be written, found a file"):
        run(student_file, tmp_path / "no data set", "--out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_unreadable_image_is_named_and_nothing_is_written(student_file, face_set, tmp_path, capsys):
    shutil.copytree(face_set, tmp_path / "data")
    victim = read_dataset(tmp_path / "data").split("test")[3].path
    victim.write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run(student_file, tmp_path / "data", "--out", tmp_path / "out"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and victim.name in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
