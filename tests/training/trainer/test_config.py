from __future__ import annotations

import dataclasses

import pytest
import torch

from efficientface_deploy.errors import ConfigError
from training.trainer.config import check_amp
from training.trainer.recipe import DEFAULT_STUDENT


def test_options_change_the_recipe(make_job):
    config = make_job().config
    assert config.change(DEFAULT_STUDENT) == DEFAULT_STUDENT
    changes = {"epochs": 4, "learning_rate": 0.0, "ema": 0.0, "select": "last", "weight_decay": 0.0}
    changes |= {"schedule": "step", "step_epochs": 2}
    assert dataclasses.replace(config, **changes).change(DEFAULT_STUDENT) == dataclasses.replace(
        DEFAULT_STUDENT, **changes
    )


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_steps_of_a_schedule_without_any_are_refused(make_job, schedule):
    config = dataclasses.replace(make_job().config, step_epochs=2, schedule=schedule)
    with pytest.raises(ConfigError, match=f"none with the schedule {schedule}, found 2; leave it"):
        config.change(DEFAULT_STUDENT)


@pytest.mark.parametrize("size", [7, 33, 2048])
def test_input_size_that_the_network_cannot_have(size, make_job):
    job = make_job()
    config = dataclasses.replace(job.config, input_size=size)
    with pytest.raises(
        ConfigError, match=f"--input-size: expected a multiple of 16 .* found {size}; give another"
    ):
        config.model_spec(job.dataset, "efficientface")


def test_smallest_input_is_that_of_the_network_which_is_trained(make_job):
    """FER+ is prepared for 96x96, which is too small for a ResNet-29."""
    job = make_job()
    dataset = dataclasses.replace(job.dataset, preset="ferplus")
    chosen = dataclasses.replace(job.config, input_size=112).model_spec(dataset, "resnet29")
    assert (chosen.architecture, chosen.input_size) == ("resnet29", 112)
    with pytest.raises(ConfigError, match=r"--input-size: .* 112 and 1024, found 96; give"):
        dataclasses.replace(job.config, input_size=None).model_spec(dataset, "resnet29")


def test_fp16_needs_a_gpu():
    check_amp("--amp", "fp16", torch.device("cuda"))
    with pytest.raises(ConfigError, match="--amp fp16: expected a CUDA device, found a CPU"):
        check_amp("--amp", "fp16", torch.device("cpu"))


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_needs_a_gpu_that_has_it(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    check_amp("--amp", "bf16", torch.device("cpu"))
    if has:
        check_amp("--amp", "bf16", torch.device("cuda"))
        return
    wanted = "--amp bf16: expected a GPU of compute capability 8.0 or newer, found Tesla T4; give"
    with pytest.raises(ConfigError, match=wanted):
        check_amp("--amp", "bf16", torch.device("cuda"))
