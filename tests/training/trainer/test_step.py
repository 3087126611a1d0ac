from __future__ import annotations

import copy

import pytest
import torch

from efficientface_deploy.models import EfficientFace, LabelDistributionGenerator
from training.trainer import step as module
from training.trainer.distributed import Distributed
from training.trainer.loader import Batch, Renderer, TrainingImages, choose_samples
from training.trainer.step import RecordedStep, TrainingStep
from training.trainer.targets import loaded_targets

RATE, SIZE = 0.05, 16


@pytest.fixture
def make_step(make_job):
    """A step of a fresh network on a device, and the first batches of its training."""

    def make(device: str, network=EfficientFace, **changes) -> tuple[TrainingStep, list[Batch]]:
        job = make_job(**{"ema": 0.7} | changes)
        dist = Distributed(torch.device(device))
        samples, _ = choose_samples(job, dist)
        images = TrainingImages(samples, job.spec, job.recipe.augmentation, 0)
        torch.manual_seed(0)
        render = Renderer(images, dist.device)
        step = TrainingStep(job.recipe, job.config, network(7), loaded_targets, render, dist)
        step.forward.train()
        keys = [(0, list(range(start, start + SIZE))) for start in (0, 16, 32)]
        return step, [images.batch(*key).to(dist.device) for key in keys]

    return make


def tensors_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    """All that a step changes, by name."""
    momenta = step.optimizer.state_dict()["state"]
    return {
        **{f"model.{name}": value for name, value in step.model.state_dict().items()},
        **{f"average.{name}": value for name, value in step.ema.module.state_dict().items()},
        **{f"momentum.{name}": state["momentum_buffer"] for name, state in momenta.items()},
    }


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def run(step: TrainingStep, batches: list[Batch]) -> list[float]:
    return [float(step(batch, RATE, done)) for done, batch in enumerate(batches)]


def test_a_step_is_sgd_and_a_moving_average(make_step):
    """Against torch's own, not fused, and the average's formula."""
    step, batches = make_step("cpu")
    model = copy.deepcopy(step.model)
    plain = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=5e-4, nesterov=True)
    average: dict[str, torch.Tensor] = {}
    for done, batch in enumerate(batches):
        before = flat(model)
        loss = step(batch, RATE, done)
        logits = model(step.render(batch))
        expected = -(batch.targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        plain.zero_grad()
        expected.backward()
        plain.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-3, atol=1e-4)
        ours, theirs = flat(step.model), flat(model)
        assert (ours - theirs).norm() < 0.001 * (theirs - before).norm()
        decay = min(0.7, (1 + done) / (10 + done)) if done else 0
        model.load_state_dict(step.model.state_dict())  # rounding grows through batch norm
        for name, value in step.model.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average.get(name, 0) + (1 - decay) * value
    for name, value in average.items():
        torch.testing.assert_close(step.ema.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_recording_leaves_all_as_it_was(make_step, monkeypatch):
    """Whatever warm-up steps do to weights, averages, momenta and random numbers."""
    step, batches = make_step("cpu")
    run(step, batches)
    before = {name: value.clone() for name, value in tensors_of(step).items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def recorded(do, batch):
        for _ in range(3):
            torch.rand(4)
            do(batch)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(module, "RecordedStep", recorded)
    step._record(batches[0])
    assert step.graph is None and torch.equal(torch.get_rng_state(), state)
    for name, value in tensors_of(step).items():
        assert torch.equal(value, before[name]), name


def test_step_that_cannot_be_recorded_says_so_once_and_goes_on(make_step, monkeypatch, capsys):
    expected = run(*make_step("cpu"))
    step, batches = make_step("cpu")
    step.recordable = True  # as on a GPU

    def refuse(do, batch):
        do(batch)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\n\nmore")

    monkeypatch.setattr(module, "RecordedStep", refuse)
    assert run(step, batches) == expected
    said = capsys.readouterr().out
    assert said.startswith("note: a step is no CUDA graph here: CUDA error: operation not")
    assert said.count("\n") == 1


# ---- On a GPU. Ready, and never run: no machine with one was at hand.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("network", "changes"),
    [
        (EfficientFace, {}),
        (EfficientFace, {"amp": "bf16", "augmentation": "strong"}),
        (EfficientFace, {"augmentation": "published", "ema": 0.5}),
        (LabelDistributionGenerator, {"amp": "bf16"}),
    ],
)
def test_recorded_steps_do_what_single_kernels_do(network, changes, make_step, monkeypatch):
    recorded, batches = make_step("cuda", network, **changes)
    found = run(recorded, batches)
    assert isinstance(recorded.graph, RecordedStep)
    plain, _ = make_step("cuda", network, **changes)
    plain.recordable = False
    assert found == pytest.approx(run(plain, batches), rel=0.02)
    assert (
        found[0]
        == pytest.approx(
            float(
                make_step("cpu", network)[0](Batch(*(part.cpu() for part in batches[0])), RATE, 0)
            ),
            rel=0.1,
        )
        or changes
    )


@pytest.mark.gpu
def test_recording_a_step_changes_nothing(make_step):
    step, batches = make_step("cuda")
    run(step, batches[:1])  # recorded, then done once
    plain, _ = make_step("cuda")
    plain.recordable = False
    run(plain, batches[:1])
    for name, value in tensors_of(step).items():
        torch.testing.assert_close(value, tensors_of(plain)[name], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_smaller_last_batch_is_done_without_the_graph(make_step):
    step, batches = make_step("cuda")
    run(step, batches)
    before = {name: value.clone() for name, value in tensors_of(step).items()}
    loss = step(Batch(*(part[:6] for part in batches[0])), RATE, 3)
    assert torch.isfinite(loss)
    assert any(not torch.equal(value, before[name]) for name, value in tensors_of(step).items())


@pytest.mark.gpu
def test_fp16_is_scaled_and_not_recorded(make_step, capsys):
    step, batches = make_step("cuda", amp="fp16")
    assert "note: with --amp fp16 a step is no CUDA graph" in capsys.readouterr().out
    assert all(loss < 5 for loss in run(step, batches)) and step.graph is None


@pytest.mark.gpu
def test_nothing_in_a_step_waits_for_the_device(make_step):
    step, batches = make_step("cuda")
    run(step, batches)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for done in range(5):
            step(batches[0], RATE, done)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on(make_job, make_step, tmp_path):
    """State files hold tensors that go back to where the graph reads them."""
    step, batches = make_step("cuda")
    run(step, batches)
    torch.save({name: part.state_dict() for name, part in step.parts.items()}, tmp_path / "s.pt")
    again, _ = make_step("cuda")
    content = torch.load(tmp_path / "s.pt", map_location="cuda", weights_only=True)
    for name, part in again.parts.items():
        part.load_state_dict(content[name])
    again.restored()
    losses = [float(it(batches[0], RATE, 3)) for it in (step, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    for name, value in tensors_of(step).items():
        torch.testing.assert_close(value, tensors_of(again)[name], rtol=1e-2, atol=1e-3)
