from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from efficientface_deploy.dataset import Sample, read_dataset
from efficientface_deploy.errors import DatasetError
from efficientface_deploy.models import save_checkpoint
from efficientface_deploy.preprocess import normalise, to_model_input
from training import evaluate
from training.evaluate import as_text, score

CLASSES = 7


@pytest.fixture(scope="module")
def probabilities(make_network, face_set) -> torch.Tensor:
    """What plain PyTorch gives for the test split, (28, 7)."""
    spec = read_dataset(face_set).spec.replace(input_size=64)
    samples = read_dataset(face_set).split("test")
    images = np.stack([to_model_input(sample.path, spec) for sample in samples])
    with torch.no_grad():
        return make_network()(torch.from_numpy(normalise(images, spec))).softmax(dim=1)


def evaluate_json(student_file, face_set, tmp_path, *options):
    path = tmp_path / "figures.json"
    arguments = [
        "--weights",
        str(student_file),
        "--data",
        str(face_set),
        "--json",
        str(path),
        *options,
    ]
    assert evaluate.main(arguments) == 0
    return json.loads(path.read_text())


def test_figures_are_torchmetrics(
    student_file, probabilities, face_set, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "BATCH", 10)  # 28 images: two whole batches and a rest
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
    recall = tm.multiclass_recall(probabilities, truth, CLASSES, average="none")
    assert list(figures["recall"].values()) == pytest.approx(recall.tolist())
    assert list(figures["recall"]) == list(read_dataset(face_set).labels)
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
    assert f"accuracy          {figures['accuracy']:.4f}" in out


def test_split_is_chosen(student_file, face_set, tmp_path):
    figures = evaluate_json(student_file, face_set, tmp_path, "--split", "train")
    assert (figures["images"], figures["split"]) == (56, "train")
    with pytest.raises(DatasetError, match="a validation split"):
        evaluate_json(student_file, face_set, tmp_path, "--split", "validation")


def test_other_labels_are_refused(face_set, make_network, tmp_path):
    labels = read_dataset(face_set).labels
    spec = read_dataset(face_set).spec.replace(input_size=64, labels=labels[::-1])
    save_checkpoint(tmp_path / "turned.safetensors", make_network(), spec)
    with pytest.raises(DatasetError, match=r"the model's labels: Anger, .* found Neutral, "):
        evaluate_json(tmp_path / "turned.safetensors", face_set, tmp_path)
    assert not (tmp_path / "figures.json").exists()


def test_class_without_images_and_samples_without_votes(tmp_path):
    samples = [Sample(tmp_path, 0), Sample(tmp_path, 2), Sample(tmp_path, 2)]
    probabilities = np.eye(3, dtype=np.float32)[[0, 2, 0]]
    figures = score(probabilities, samples, ("a", "b", "c"))
    assert figures["recall"] == {"a": 1.0, "b": None, "c": 0.5}
    assert "mean_kl_from_votes" not in figures
    assert json.loads(json.dumps(figures)) == figures
    text = as_text(figures)
    assert "recall b          none here" in text and "KL" not in text
    assert "accuracy          0.6667   (always the largest class: 0.6667)" in text
