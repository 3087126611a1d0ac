from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import training_step as bench
from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.workbench.dataset import read_dataset
from efficientface_deploy.workbench.timing import Samples
from training.trainer import small_maps
from training.trainer.small_maps import use_matrix_products


@pytest.fixture(scope="module")
def setting(prepare_faces):
    """A small data set and a teacher for it."""
    data = prepare_faces(140)
    spec = read_dataset(data).spec.replace(architecture="resnet18", input_size=32)
    teacher = data.with_name("teacher.safetensors")
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
    assert {row["on_device"] for row in rows.values()} == {"yes", "no"}
    assert not rows["contiguous memory"]["channels_last"]
    assert {(row["network"], row["amp"]) for row in rows.values()} == {
        (network, amp) for network in ("student", "ldg") for amp in ("off", "bf16")
    }
    assert sum(not row["matrix_products"] for row in rows.values()) == 1
    assert rows[bench.BASELINE]["cost"]["value"] == 1
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2000 / row["p50_ms"])
        assert row["calls"] >= 3 and row["cost"]["low"] <= row["cost"]["high"]
        limits = row["limits"]
        larger = max(limits["arithmetic_ms"], limits["memory_ms"])
        assert 0 < limits["reached"] == pytest.approx(larger / row["p50_ms"])
    ldg, student = rows["the LDG's own training"], rows[bench.BASELINE]
    assert ldg["multiply_adds"] > 3 * student["multiply_adds"] > 0
    online = rows["teacher in every step"]["multiply_adds"]
    assert online == pytest.approx(student["multiply_adds"] + ldg["multiply_adds"] / 3, rel=0.03)
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


def test_cases_of_a_gpu_are_its_own():
    cases = {case.name: case for case in bench.plan_cases("cuda")}
    assert not cases["bf16, kernel by kernel"].recorded
    assert {case.on_device for case in cases.values()} == {"yes", "no"}
    assert any(case.targets == "online" for case in cases.values())


def test_traffic_is_what_operators_read_and_write():
    """Views move nothing; what is expanded is read once."""
    ones = torch.ones(10, 10)  # 400 bytes
    with bench.TrafficCounter() as traffic:
        ones.view(100).expand(5, 100)
    assert traffic.bytes == 0
    with bench.TrafficCounter() as traffic:
        ones + ones.view(100)[:10].expand(10, 10)  # the expanded one lies in 400 bytes too
    assert traffic.bytes == 3 * 400
    weight = torch.ones(4, 3, requires_grad=True)
    with bench.TrafficCounter() as traffic:
        (torch.ones(2, 4) @ weight).sum().backward()
    assert traffic.bytes > 32 + 48 + 24  # the product alone, without what goes backward
