from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from efficientface_deploy.artifact import PROVENANCE_KEY, read_safetensors_metadata
from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.models import LabelDistributionGenerator, load_checkpoint
from training import teacher
from training.trainer.targets import loaded_targets


@pytest.fixture
def train_teacher(face_set: Path, tmp_path: Path):
    """Run the command for one epoch of ResNet-18 at the smallest size."""

    def run(*options: str) -> Path:
        arguments = ["--data", str(face_set), "--arch", "resnet18", "--input-size", "32"]
        arguments += ["--epochs", "1", "--batch-size", "16", "--workers", "0", "--select", "last"]
        arguments += ["--no-tensorboard"]
        assert teacher.main([*arguments, "--out", str(tmp_path / "run"), *options]) == 0
        return tmp_path / "run/teacher.safetensors"

    return run


def test_teacher_is_an_ldg_with_the_data_sets_spec(train_teacher, capsys):
    path = train_teacher()
    model, spec = load_checkpoint(path)
    assert isinstance(model, LabelDistributionGenerator)
    assert (spec.architecture, spec.input_size, spec.name) == ("resnet18", 32, "synthetic faces")
    assert spec.labels[0] == "Neutral" and spec.num_classes == 7
    record = json.loads(read_safetensors_metadata(path)[PROVENANCE_KEY])
    assert (record["kind"], record["config"]["arch"]) == ("teacher", "resnet18")
    assert record["recipe"]["loss"] == "cross-entropy"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("teacher: resnet18 at 32x32 on 56 images of synthetic faces")
    assert lines[-1] == f"teacher: {path}"


@pytest.mark.parametrize(("options", "votes"), [((), False), (("--votes",), True)])
def test_targets(options, votes, train_teacher, monkeypatch):
    calls = []
    monkeypatch.setattr(teacher, "train", lambda *arguments: calls.append(arguments))
    train_teacher(*options)
    _, _, images, selection, target_function, _ = calls[0]
    assert target_function is loaded_targets and selection == []
    assert (images.targets.max(axis=2) < 1).any() == votes  # people do not always agree


def test_init_takes_the_backbone_of_a_face_recognition_network(train_teacher, tmp_path, caplog):
    torch.manual_seed(5)
    pretrained = LabelDistributionGenerator(12_666, "resnet18").backbone.state_dict()
    checkpoint = tmp_path / "ms1m.pth.tar"
    torch.save({"state_dict": {f"module.{k}": v for k, v in pretrained.items()}}, checkpoint)
    with caplog.at_level(logging.INFO):
        path = train_teacher("--init", str(checkpoint), "--learning-rate", "0")
    assert "took the backbone; the head starts anew" in caplog.text
    trained = load_checkpoint(path)[0].backbone.state_dict()
    assert trained["fc.weight"].shape == (7, 512)
    assert torch.equal(trained["layer4.1.conv2.weight"], pretrained["layer4.1.conv2.weight"])


def test_init_from_another_network(train_teacher, student_file):
    with pytest.raises(
        CheckpointError, match="weights of resnet18, found weights of efficientface"
    ):
        train_teacher("--init", str(student_file))


def test_size_that_no_network_has(train_teacher):
    with pytest.raises(ConfigError, match=r"--input-size: expected a multiple of 16"):
        train_teacher("--input-size", "50")
