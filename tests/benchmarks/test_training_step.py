from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import training_step as bench
from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.workbench.dataset import read_dataset
from efficientface_deploy.workbench.timing import Samples
from training import prepare
from training.trainer import small_maps
from training.trainer.small_maps import use_matrix_products


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A small data set and a teacher for it."""
    folder = tmp_path_factory.mktemp("setting")
    data = folder / "faces"
    sizes = ["--train", "140", "--test", "7", "--size", "32"]
    prepare.main(["synthetic", *sizes, "--out", str(data)])
    spec = read_dataset(data).spec.replace(architecture="resnet18", input_size=32)
    teacher = folder / "teacher.safetensors"
    save_checkpoint(teacher, LabelDistributionGenerator(7, "resnet18"), spec)
    return data, teacher


@pytest.mark.slow
def test_result_has_every_way_to_get_targets(setting, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "has_amx", lambda: True)
    # PyTorch's second thread is very slow where others use the CPU too.
    monkeypatch.setattr(bench, "usable_cpus", lambda: 1)
    data, teacher = setting
    arguments = ["--data", str(data), "--teacher", str(teacher), "--input-size", "32"]
    arguments += ["--batch-size", "2", "--images", "64", "--seconds", "0.001", "--rounds", "3"]
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "training.json").read_text())
    rows = {row["name"]: row for row in result["cases"]}
    assert {row["targets"] for row in rows.values()} == {"own", "stored", "online"}
    assert {row["workers"] for row in rows.values()} == {0, 1}
    assert not rows["contiguous memory"]["channels_last"]
    assert {(row["network"], row["amp"]) for row in rows.values()} == {
        (network, amp) for network in ("student", "ldg") for amp in ("off", "bf16")
    }
    assert sum(not row["matrix_products"] for row in rows.values()) == 1
    assert rows[bench.BASELINE]["cost"]["value"] == 1
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2000 / row["p50_ms"])
        assert row["calls"] >= 3 and row["cost"]["low"] <= row["cost"]["high"]
    assert result["machine"] and result["software"]
    assert "teacher in every step" in capsys.readouterr().out


def test_library_convolutions_are_put_back(monkeypatch):
    monkeypatch.setattr(small_maps, "has_amx", lambda: True)
    model = LabelDistributionGenerator(7, "resnet18")
    kinds = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    use_matrix_products(model, torch.device("cpu"), torch.bfloat16)
    assert [type(module) for module in model.modules()] != kinds
    bench.use_library_convolutions(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys


def test_cost_is_a_steps_time_by_the_baselines(setting):
    samples = {
        bench.BASELINE: Samples(np.full((3, 4), 2_000_000)),
        "stored distributions": Samples(np.full((3, 4), 3_000_000)),
    }
    row = bench.describe(bench.Case("stored distributions", targets="stored"), samples, 10)
    assert row["cost"]["value"] == pytest.approx(1.5)
    assert row["images_per_second"] == pytest.approx(10 / 0.003)
