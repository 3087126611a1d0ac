"""Folders, saved states, interrupts and going on."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from efficientface_deploy.errors import CheckpointError, ConfigError
from efficientface_deploy.models import load_checkpoint
from efficientface_deploy.models.checkpoint import read_weights
from efficientface_deploy.workbench.dataset import read_dataset
from training.trainer import checkpointing, loop
from training.trainer.checkpointing import lock
from training.trainer.config import Job
from training.trainer.distributed import Distributed
from training.trainer.loop import InterruptError
from training.trainer.tracking import METRICS, Tracker

ROOT = Path(__file__).resolve().parents[3]
STEPS = 3  # 56 images, 7 held out, batches of 16


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_same_run(ours: Job, theirs: Job) -> None:
    """Kept weights, last weights, average, momenta and figures, bit for bit."""
    assert_same_bits(read_weights(ours.result)[0], read_weights(theirs.result)[0])
    states = [torch.load(job.state, weights_only=True) for job in (ours, theirs)]
    for part in ("model", "average"):
        assert_same_bits(states[0][part], states[1][part])
    momenta = [state["optimizer"]["state"] for state in states]
    for one, other in zip(*(momentum.values() for momentum in momenta), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    rows = [state["progress"]["history"] for state in states]
    for one, other in zip(*rows, strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}


class At:
    """The batch's own targets until a step, in which something happens."""

    def __init__(self, step: int, event) -> None:
        self.step, self.event = step, event
        self.calls = 0

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.step:
            self.event()
        return targets


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    """Ends a training as SIGKILL does: nothing is saved on the way out."""


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder for one uninterrupted run that several tests look at; made by the first."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def make_run(make_job):
    """Jobs of three epochs with a moving average."""
    return lambda **changes: make_job(**{"ema": 0.7} | changes)


@pytest.fixture
def whole(make_run, fit, finished) -> Job:
    """A finished job."""
    job = make_run(out=finished)
    if not finished.exists():
        fit(job)
    return job


# ---- Going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signalled", [ctrl_c, pytest.param(terminate, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [1, STEPS, 2 * STEPS + 2])
def test_interrupt_saves_the_step_and_resume_gives_the_same_bits(
    step, signalled, make_run, fit, whole
):
    broken = make_run()
    where = f"epoch {(step - 1) // STEPS + 1} after step {(step - 1) % STEPS + 1}"
    with pytest.raises(InterruptError, match=f"an interrupt in {where}; add --resume") as caught:
        fit(broken, At(step, signalled))
    assert caught.value.exit_code == 130
    later = At(999, kill)
    fit(make_run(resume=True), later)
    assert later.calls == 3 * STEPS - step  # nothing is done twice
    assert_same_run(broken, whole)


@pytest.mark.parametrize("save_minutes", [0, 5])
@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS + 3])
def test_kill_at_any_step_and_resume_give_the_same_bits(step, save_minutes, make_run, fit, whole):
    broken = make_run(save_minutes=save_minutes)
    with pytest.raises(Killed):
        fit(broken, At(step, kill))
    later = At(999, kill)
    fit(make_run(resume=True), later)
    lost = 1 if save_minutes == 0 else (step - 1) % STEPS + 1
    assert later.calls == 3 * STEPS - step + lost
    assert_same_run(broken, whole)


def test_kill_between_weights_and_state(make_run, fit, whole, monkeypatch):
    broken = make_run()
    save, saved = checkpointing.save_state, []

    def killed_at_the_second(*arguments):
        if len(saved) == 1:
            raise Killed
        saved.append(save(*arguments))

    monkeypatch.setattr(checkpointing, "save_state", killed_at_the_second)
    with pytest.raises(Killed):
        fit(broken)
    monkeypatch.undo()
    fit(make_run(resume=True))
    assert_same_run(broken, whole)


@pytest.mark.parametrize("epoch", [1, 3])
def test_kill_between_state_and_figures(epoch, make_run, fit, whole, monkeypatch):
    """Of the last epoch nothing is done again: its row must be written all the same."""
    broken, add = make_run(), Tracker.add_epoch

    def killed(tracker, history):
        if len(history) == epoch:
            (broken.config.out / ".last.pt.a1b2c3d4.pt").touch()  # and of a save that was begun
            raise Killed
        add(tracker, history)

    monkeypatch.setattr(Tracker, "add_epoch", killed)
    with pytest.raises(Killed):
        fit(broken)
    monkeypatch.undo()
    fit(make_run(resume=True))
    assert_same_run(broken, whole)
    with (broken.config.out / METRICS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert not list(broken.config.out.glob(".*"))


def test_kill_before_the_temperature_is_in_the_weights(make_run, fit, whole, monkeypatch):
    broken = make_run()
    monkeypatch.setattr(loop, "calibrate", lambda *_: kill())
    with pytest.raises(Killed):
        fit(broken)
    monkeypatch.undo()
    fit(make_run(resume=True))
    assert_same_run(broken, whole)


def test_finished_run_has_nothing_left_to_do(make_run, fit, whole, tmp_path):
    shutil.copytree(whole.config.out, tmp_path / "copy")
    again = make_run(out=tmp_path / "copy", resume=True)
    assert fit(again, At(1, kill)).read_bytes() == whole.result.read_bytes()


def test_folder_of_another_run_is_refused(make_run, fit, whole, tmp_path):
    shutil.copytree(whole.config.out, tmp_path / "copy")
    job = make_run(out=tmp_path / "copy")
    with pytest.raises(ConfigError, match="another run; choose another --out, or add --resume"):
        fit(job)
    job.state.unlink()  # the weights alone are worth as much
    with pytest.raises(ConfigError, match="another run; choose another --out, or remove it"):
        fit(job)
    assert job.result.read_bytes() == whole.result.read_bytes()


def test_resume_without_a_run(make_run, fit):
    job = make_run(resume=True)
    with pytest.raises(CheckpointError, match=r"last\.pt: .* found none; leave --resume out"):
        fit(job)
    assert not job.config.out.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"epochs": 2}, "epochs"),
        ({"learning_rate": 0.2}, "learning_rate"),
        ({"loss": "published"}, "loss"),
        ({"augmentation": "strong"}, "augmentation"),
        ({"ema": 0.9}, "ema"),
        ({"select": "last"}, "select"),
        ({"input_size": 48}, "input_size, spec"),
        ({"init": Path("other.pth.tar")}, "init"),
    ],
)
def test_resume_with_other_options_is_refused(change, named, make_run, fit, whole):
    with pytest.raises(ConfigError, match=f"others for {named}; repeat those in .*config.json"):
        fit(make_run(**{"out": whole.config.out, "resume": True} | change))


def test_run_may_move_and_change_its_workers(make_run, fit, whole, tmp_path):
    shutil.copytree(whole.config.out, tmp_path / "moved")
    fit(make_run(out=tmp_path / "moved", resume=True, workers=1, device="cpu", save_minutes=1))


def test_run_goes_on_where_its_images_lie_elsewhere(make_run, fit, whole, face_set, tmp_path):
    """As on another machine."""
    data = Path(shutil.copytree(face_set, tmp_path / "mounted"))
    shutil.copytree(whole.config.out, tmp_path / "moved")
    job = make_run(out=tmp_path / "moved", resume=True)
    config = dataclasses.replace(job.config, data=data)
    fit(dataclasses.replace(job, dataset=read_dataset(data), config=config))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other"])
def test_damaged_state_is_reported(damage, make_run, fit, whole):
    job = make_run(resume=True)
    shutil.copytree(whole.config.out, job.config.out)
    data = {"truncated": job.state.read_bytes()[:5000], "text": b"weights", "empty": b""}
    if damage == "other":
        torch.save({"weights": torch.zeros(2)}, job.state)
    else:
        job.state.write_bytes(data[damage])
    with pytest.raises(CheckpointError, match=r"last\.pt: .* damaged file .* new folder"):
        fit(job)


def test_other_images_are_refused(make_run, fit, whole, face_set, tmp_path):
    """Of the same number and names: their content has changed."""
    data = Path(shutil.copytree(face_set, tmp_path / "data"))
    pictures = sorted((data / "train").rglob("*.jpg"))
    shutil.copy(pictures[1], pictures[0])
    job = make_run(resume=True)
    shutil.copytree(whole.config.out, job.config.out)
    job = dataclasses.replace(job, dataset=read_dataset(data))
    with pytest.raises(ConfigError, match=r"images, labels and teacher .* others for images"):
        fit(job)


def test_other_votes_are_refused(make_run, fit, whole, face_set, tmp_path):
    data = Path(shutil.copytree(face_set, tmp_path / "data"))
    manifest = data / "manifest.csv"
    once, twice = (f",train,0,{votes},0,0,0,0,0" for votes in ("1,0", "0.9,0.1"))
    assert once in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(once, twice))
    job = make_run(resume=True)
    shutil.copytree(whole.config.out, job.config.out)
    job = dataclasses.replace(job, dataset=read_dataset(data))
    with pytest.raises(ConfigError, match=r"found others for labels; "):
        fit(job)


def test_other_number_of_processes_is_said(make_run, fit, whole, capsys):
    job = make_run(resume=True)
    shutil.copytree(whole.config.out, job.config.out)
    state = torch.load(job.state, weights_only=True)
    torch.save({**state, "processes": 2}, job.state)
    fit(job)
    assert "note: begun by 2 processes, now 1: batch norm sees" in capsys.readouterr().out


def test_an_epochs_time_is_that_of_all_its_parts(make_run, fit):
    """Also when it was stopped after its last step, so that nothing of it is left to do."""
    job = make_run()
    with pytest.raises(InterruptError):
        fit(job, At(STEPS, ctrl_c))
    before = torch.load(job.state, weights_only=True)["progress"]["seconds"]
    fit(make_run(resume=True))
    first = torch.load(job.state, weights_only=True)["progress"]["history"][0]
    assert first["images_per_second"] == pytest.approx(16 * STEPS / before)


def test_state_says_what_made_it(whole):
    state = torch.load(whole.state, weights_only=True)
    assert state["made_by"]["versions"]["torch"] == torch.__version__
    assert len(state["identity"]["images"]) == 64 and "git_commit" in state["made_by"]


# ---- One training in a folder --------------------------------------------------------------------


def test_second_training_is_refused(make_run, fit):
    """Before the first has written anything that could be seen."""
    message = "expected no other training at work in this folder"
    with (
        lock(make_run(), Distributed(torch.device("cpu"))),
        pytest.raises(ConfigError, match=message),
    ):
        fit(make_run())


def test_second_resume_is_refused(make_run, fit, whole):
    job = make_run(resume=True)
    shutil.copytree(whole.config.out, job.config.out)
    with (
        lock(job, Distributed(torch.device("cpu"))),
        pytest.raises(ConfigError, match="expected no other training at work in this folder"),
    ):
        fit(job)


def test_folder_that_stays_empty_goes_again(make_run, tmp_path):
    job = make_run(out=tmp_path / "a" / "b")
    with pytest.raises(Killed), lock(job, Distributed(torch.device("cpu"))):
        assert job.config.out.is_dir()
        raise Killed
    assert not (tmp_path / "a").exists()


# ---- The command, killed for real ----------------------------------------------------------------


def start(face_set: Path, out: Path, *options: str, limit_kib: int | None = None):
    command = [sys.executable, "-m", "training.student", "--data", str(face_set), "--out", str(out)]
    command += ["--targets", "onehot", "--input-size", "32", "--batch-size", "8", *options]
    if limit_kib is not None:  # no file may grow beyond it, as on a full disk
        command = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "bash", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_sigkill_at_any_moment(face_set, tmp_path):
    """Killed again and again after a random time, the run ends with the bits of a whole one."""
    options = ("--epochs", "6", "--workers", "1", "--save-minutes", "0", "--no-tensorboard")
    assert start(face_set, tmp_path / "whole", *options).wait(timeout=200) == 0
    broken, dice = tmp_path / "broken", random.Random(0)
    for attempt in range(3):
        resume = ["--resume"] if attempt else []
        process = start(face_set, broken, *options, *resume)
        before = (broken / "last.pt").stat().st_mtime if attempt else 0
        wait_for(broken / "last.pt", process)
        while (broken / "last.pt").stat().st_mtime == before and process.poll() is None:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(face_set, broken, *options, "--resume")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    names = ("student.safetensors", "last.pt")
    ours, theirs = ([folder / name for name in names] for folder in (broken, tmp_path / "whole"))
    assert_same_bits(read_weights(ours[0])[0], read_weights(theirs[0])[0])
    states = [torch.load(path, weights_only=True) for path in (ours[1], theirs[1])]
    assert_same_bits(states[0]["model"], states[1]["model"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "number"),
    [
        pytest.param("0", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("1", signal.SIGINT, marks=pytest.mark.slow),
        ("1", signal.SIGTERM),
    ],
)
def test_signal_to_all_processes(workers, number, face_set, tmp_path):
    """As a terminal, ``timeout``, a batch system or torchrun sends it: workers get it too."""
    out = tmp_path / "run"
    options = ("--epochs", "500", "--workers", workers, "--save-minutes", "0", "--no-tensorboard")
    process = start(face_set, out, *options)
    try:
        wait_for(out / "student.safetensors", process)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert stderr.startswith(f"error: {out}: expected 500 epochs, found an interrupt in epoch ")
    assert "add --resume to go on from there" in stderr
    assert stderr.count("\n") == 1 and "Traceback" not in stdout
    torch.load(out / "last.pt", weights_only=True)
    load_checkpoint(out / "student.safetensors")
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("limit_kib", "what"),
    [pytest.param(3000, "student.safetensors", marks=pytest.mark.slow), (7000, "last.pt")],
)
def test_full_disk(limit_kib, what, face_set, tmp_path):
    """The weights of 5 MB or the state of 10 do not fit: one line, and nothing half-written."""
    out = tmp_path / "run"
    options = ("--epochs", "2", "--workers", "0", "--no-tensorboard")
    process = start(face_set, out, *options, limit_kib=limit_kib)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "found file too large; free some" in stderr
    assert not (out / what).exists()
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
