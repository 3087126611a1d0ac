"""torchrun with gloo: what several ranks do together is what one does alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.models import load_checkpoint
from training.trainer import distributed
from training.trainer.distributed import Distributed, init

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests/training/distributed_script.py"
STEPS = 8  # 49 images in batches of 12, two epochs
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(face_set, once) -> Path:
    """Where one process alone and two ranks have trained."""

    def fill(folder: Path) -> None:
        alone = run(sys.executable, str(SCRIPT), str(face_set), str(folder / "alone"), "0")
        assert alone.returncode == 0, alone.stderr
        both = run(*TORCHRUN, "2", str(SCRIPT), str(face_set), str(folder / "two"), "0")
        assert both.returncode == 0, both.stderr
        assert both.stdout.count("epoch 1/2:") == 1  # one rank prints

    return once("ranks", fill)


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, dict]:
    """What one process alone and each of two ranks wrote down."""
    load_checkpoint(folder / "two/student.safetensors")
    files = {"alone": "alone-rank0.pt", "first": "two-rank0.pt", "second": "two-rank1.pt"}
    return {name: torch.load(folder / file, weights_only=True) for name, file in files.items()}


def pictures(batch: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in batch]


@pytest.mark.slow
def test_ranks_see_disjoint_parts_of_the_same_batches(runs):
    for step in range(STEPS):
        first, second, alone = (
            pictures(runs[name]["batches"][step]) for name in ("first", "second", "alone")
        )
        assert len(first) == len(second) == 6
        assert sorted(first + second) == sorted(alone)  # disjoint: the twelve are all different
        assert len(set(alone)) == 12


def test_ranks_hold_the_same_weights_after_every_step(runs):
    for step in range(STEPS):
        assert torch.equal(runs["first"]["weights"][step], runs["second"]["weights"][step])
    moved = runs["first"]["weights"][-1] - runs["first"]["weights"][0]
    assert moved.abs().max() > 1e-3


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(runs):
    for step in range(STEPS):
        ours, alone = (runs[name]["weights"][step] for name in ("first", "alone"))
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-12)
    for ours, alone in zip(runs["first"]["history"], runs["alone"]["history"], strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], abs=1e-12)
        assert ours["accuracy"] == alone["accuracy"]


def test_every_image_of_the_selection_is_evaluated_once(runs):
    for name in ("first", "second"):
        for labels, logits in zip(runs[name]["labels"], runs[name]["logits"], strict=True):
            assert sorted(labels.tolist()) == sorted(runs["alone"]["selection"])
            assert logits.shape == (7, 7)
    for ours, alone in zip(runs["first"]["logits"], runs["alone"]["logits"], strict=True):
        torch.testing.assert_close(ours.sum(dim=0), alone.sum(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_death_of_a_rank_ends_the_job_which_goes_on_from_its_state(
    face_set, folder, runs, tmp_path
):
    out = tmp_path / "died"
    died = run(*TORCHRUN, "2", str(SCRIPT), str(face_set), str(out), "7")
    assert died.returncode != 0
    state = torch.load(out / "last.pt", weights_only=True)
    assert len(state["progress"]["history"]) == 1
    load_checkpoint(out / "student.safetensors")

    resumed = run(*TORCHRUN, "2", str(SCRIPT), str(face_set), str(out), "0")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("epoch 1/2:") == 0  # it did not begin anew
    seen = torch.load(tmp_path / "died-rank0.pt", weights_only=True)
    assert 0 < len(seen["weights"]) < STEPS // 2
    assert torch.equal(seen["weights"][-1], runs["first"]["weights"][-1])
    ours, unbroken = (
        load_checkpoint(path / "student.safetensors")[0].state_dict()
        for path in (out, folder / "two")
    )
    assert all(torch.equal(ours[name], unbroken[name]) for name in unbroken)


@pytest.mark.slow
def test_command_under_torchrun(face_set, tmp_path):
    """The student from a stored teacher, on two ranks; the files are those of one process."""
    common = ["--data", str(face_set), "--input-size", "32", "--epochs", "1", "--workers", "0"]
    common += ["--batch-size", "16", "--no-tensorboard"]
    arguments = ["-m", "training.teacher", "--arch", "resnet18", *common]
    made = run(*TORCHRUN, "2", *arguments, "--out", str(tmp_path / "ldg"))
    assert made.returncode == 0, made.stderr
    arguments = ["-m", "training.student", *common, "--views", "1", "--out", str(tmp_path / "two")]
    arguments += ["--teacher", str(tmp_path / "ldg/teacher.safetensors")]
    made = run(*TORCHRUN, "2", *arguments)
    assert made.returncode == 0, made.stderr
    assert {file.name for file in (tmp_path / "two").iterdir()} == {
        "student.safetensors",
        "distributions.safetensors",
        "last.pt",
        "config.json",
        "metrics.csv",
        "curves.png",
    }


# ---- Without torchrun ----------------------------------------------------------------------------


def test_device(monkeypatch):
    for name in ("auto", "cpu"):
        with init(name) as dist:
            assert dist == Distributed(torch.device("cpu"), 0, 1) and dist.is_main_process
    opened = []
    monkeypatch.setattr(distributed, "_open_cuda", lambda *args: opened.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "cuda"):
        with init(name) as dist:
            assert dist.device == torch.device("cuda")
    with init("cpu") as dist:
        assert dist.device == torch.device("cpu")
    assert opened == [(0, "auto"), (0, "cuda")]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found no NVIDIA driver on your system. Please check"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nUse"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_gpu_that_cannot_be_used_is_one_line_with_the_reason(error, monkeypatch):
    def fail(number):
        raise error

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    wanted = "--device cuda: expected a GPU for PyTorch"
    with pytest.raises(ConfigError, match=wanted) as caught, init("cuda"):
        pass
    message = str(caught.value)
    assert str(error).partition("\n")[0] in message and "give --device cpu" in message
    assert "\n" not in message


def test_one_process_needs_nobody():
    alone = Distributed(torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    assert alone.wrap(model) is model
    assert alone.gather(3) == [3] and alone.sum(0.5, True) == [0.5, 1]
    alone.barrier()
