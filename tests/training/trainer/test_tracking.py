from __future__ import annotations

import contextlib
import csv
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from training import plots
from training.trainer import tracking
from training.trainer.tracking import EpochProgress

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test winds."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(tracking.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_log_gets_a_plain_line_now_and_then(clock, capsys):
    with EpochProgress(epoch=1, epochs=4, steps=100, batch_size=8) as shown:
        for step in range(1, 101):
            clock.now += 1
            shown.update(step, loss=2 / step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # after 30, 60 and 90 seconds
    assert lines[0] == "epoch 2/4, step 30/100: loss 0.0667, 8 images/s, 4 min left"
    assert lines[2].endswith("step 90/100: loss 0.0222, 8 images/s, 4 min left")  # 210 s


ON_A_TERMINAL = """
import time
from training import plots
from training.trainer import tracking
from training.trainer.tracking import EpochProgress
tracking.LOG_SECONDS = 0
with EpochProgress(epoch=0, epochs=1, steps=50, batch_size=8) as shown:
    time.sleep(0.05)
    shown.update(10, loss=1.5)
    time.sleep(0.3)
print("done")
"""


def test_terminal_gets_one_live_line():
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-c", ON_A_TERMINAL]
    process = subprocess.Popen(command, stdout=slave, cwd=ROOT, env=environment)
    os.close(slave)
    with open(master, "rb", buffering=0) as terminal:
        seen = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while chunk := terminal.read(4096):
                seen += chunk
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    line = r" epoch 1/1, step 10/50: loss 1\.5000, \d+ images/s, \d+ s left"
    assert re.search(line, text)
    assert not re.search(r"[^ ]epoch 1/1, step", text)  # no plain line, which has no bar before it
    shown, _, after = text.rpartition("\x1b[2K")  # erased before what follows
    assert re.search(line, shown) and after.strip().endswith("done") and "epoch" not in after


def test_tensorboard_has_scalars_and_the_views(make_job, fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(epochs=2, tensorboard=True)
    fit(job)
    events = EventAccumulator(str(job.config.out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"loss", "accuracy", "macro_f1", "learning_rate"}
    with (job.config.out / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    with Image.open(io.BytesIO(events.Images("views")[0].encoded_image_string)) as sheet:
        assert sheet.size == (8 * 32, 2 * 32)  # sixteen views


def test_without_matplotlib_all_but_the_plot_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "is_installed", lambda name: name != "matplotlib")
    tracker = tracking.Tracker(tmp_path, "a run", "holdout", tensorboard=False)
    assert (
        "note: there will be no curves.png: matplotlib is not installed" in capsys.readouterr().out
    )
    tracker.add_epoch([{"epoch": 1, "loss": 0.5}])
    tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_curves_are_drawn_now_and_then_and_at_the_end(tmp_path, monkeypatch, clock):
    drawn = []
    monkeypatch.setattr(plots, "plot_curves", lambda out, history, *_: drawn.append(len(history)))
    tracker = tracking.Tracker(tmp_path, "a run", "holdout", tensorboard=False)
    for epoch in range(1, 9):
        tracker.add_epoch([{"epoch": number, "loss": 0.5} for number in range(epoch)])
        clock.now += 10
    tracker.close()
    tracker.close()
    assert drawn == [1, 4, 7, 8]
