"""efficientface-annotate: killed and gone on with, nothing is lost and nothing is double."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.errors import EfficientFaceError
from efficientface_deploy.predictor import BUNDLED_ONNX
from tests.test_imports import ROOT

pq = pytest.importorskip("pyarrow.parquet")

from efficientface_deploy.batch import cli  # noqa: E402 - pyarrow may be missing
from efficientface_deploy.workbench.workspace import lock_folder  # noqa: E402

COMMAND = [sys.executable, "-m", "efficientface_deploy.batch.cli"]


@pytest.fixture
def make_manifest(photo, tmp_path):
    """A manifest of any length that names two photographs and, each tenth row, a missing one."""
    for name, pixels in {"a": photo, "b": photo[:, ::-1]}.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{name}.png")

    def make(count):
        names = ("gone.png" if n % 10 == 9 else "ab"[n % 2] + ".png" for n in range(count))
        path = tmp_path / f"{count}.csv"
        path.write_text("path\n" + "".join(f"{name}\n" for name in names))
        return path

    return make


def start(*arguments, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        **options,
    )


def parts(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_whole(out: Path, count: int) -> None:
    """Every picture is there once, in its place, and those that are missing say so."""
    rows = pq.read_table(out).to_pylist()
    assert sorted(row["picture"] for row in rows) == list(range(count))
    assert all((row["label"] is None) == (row["picture"] % 10 == 9) for row in rows)
    assert all((row["error"] is None) == (row["picture"] % 10 != 9) for row in rows)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_set_is_annotated(workers, make_manifest, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(make_manifest(100)), "--out", str(out), "--workers", str(workers)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"100 pictures, 90 faces, 10 unreadable, in {out}" in printed.out
    assert "100 of 100 pictures, " in printed.err
    assert_whole(out, 100)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert cli.main(arguments) == 0  # nothing is left to do
    said = "going on: 100 pictures are done already; 10 unreadable ones of them are not tried again"
    assert said in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("part-*")} == before


def test_a_lost_or_damaged_part_is_made_again(make_manifest, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(make_manifest(100)), "--out", str(out), "--shard", "25"]
    assert cli.main(arguments) == 0
    first, second, *_ = sorted(out.glob("part-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-30])
    assert cli.main(arguments) == 0
    assert "going on: 50 pictures are done already" in capsys.readouterr().out
    assert_whole(out, 100)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_job_is_gone_on_with(workers, make_manifest, tmp_path):
    """SIGKILL at random moments, until a run comes to its end."""
    count, out, chance = 400 * workers, tmp_path / "out", random.Random(workers)
    arguments = [make_manifest(count), "--out", out, "--shard", 10, "--workers", workers]
    for _ in range(2 * workers):
        process, wanted = start(*arguments), parts(out) + chance.randrange(1, 9)
        while parts(out) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() / 50)
        children = children_of(process.pid)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert wanted <= parts(out) < count // 10
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a worker outlives its job"
            time.sleep(0.05)
    said, _ = start(*arguments).communicate()
    assert f"{count} pictures, {count * 9 // 10} faces, {count // 10} unreadable" in said
    assert_whole(out, count)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_job_in_one_line(make_manifest, tmp_path):
    out = tmp_path / "out"
    arguments = [make_manifest(2000), "--out", out, "--shard", 10, "--workers", 2]
    process = start(*arguments)
    while not parts(out) and process.poll() is None:
        time.sleep(0.01)
    workers = [
        child
        for child in children_of(process.pid)
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 2
    assert "error: --workers: expected processes that live to the end, found one that" in said
    assert "Traceback" not in said
    assert start(*arguments).wait() == 0
    assert_whole(out, 2000)


def test_ctrl_c_leaves_whole_parts(make_manifest, tmp_path):
    out = tmp_path / "out"
    process = start(make_manifest(5000), "--out", out, "--shard", 10)
    while not parts(out) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130
    assert "error: interrupted" in said and "Traceback" not in said
    assert 0 < parts(out) < 500
    assert not list(out.glob(".*"))


def test_a_full_disk_is_one_line(make_manifest, tmp_path):
    """No file may grow beyond a limit, which the system tells as it tells of a full disk."""
    out, manifest, size = tmp_path / "out", make_manifest(400), 4_000

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(manifest, "--out", out, "--shard", 200, preexec_fn=limit)
    said, _ = process.communicate()
    assert process.returncode == 2
    assert "expected space for what is written, found file too large; free some" in said
    assert "Traceback" not in said
    assert not parts(out) and not list(out.glob(".*"))


def test_two_jobs_do_not_share_a_folder(make_manifest, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (
        lock_folder(out, "annotation"),
        pytest.raises(EfficientFaceError, match="expected no other annotation at work"),
    ):
        cli.main([str(make_manifest(5)), "--out", str(out)])
    assert not list(out.iterdir())


def test_a_job_of_another_model_is_refused(make_manifest, tmp_path):
    out, manifest = tmp_path / "out", str(make_manifest(20))
    assert cli.main([manifest, "--out", str(out)]) == 0
    job = json.loads((out / "_job.json").read_text())
    (out / "_job.json").write_text(json.dumps({**job, "model_hash": "beef"}))
    with pytest.raises(EfficientFaceError, match="found others for model_hash;"):
        cli.main([manifest, "--out", str(out)])


def test_a_model_may_be_a_link_to_a_file_of_another_name(make_manifest, tmp_path):
    """As in a cache of files by their hashes, which have no suffix."""
    shutil.copy(BUNDLED_ONNX, tmp_path / "0abc")
    (tmp_path / "model.onnx").symlink_to("0abc")
    out, model = tmp_path / "out", str(tmp_path / "model.onnx")
    assert cli.main([str(make_manifest(20)), "--out", str(out), "--model", model]) == 0
    assert_whole(out, 20)


def test_a_source_is_the_same_by_any_spelling(make_manifest, tmp_path, monkeypatch, capsys):
    manifest, out = make_manifest(20), tmp_path / "out"
    assert cli.main([str(manifest), "--out", str(out)]) == 0
    monkeypatch.chdir(manifest.parent)
    assert cli.main([manifest.name, "--out", str(out)]) == 0
    manifest.write_text("path\n" + "another.png\n" * 20)
    with pytest.raises(EfficientFaceError, match="found others for the source;"):
        cli.main([manifest.name, "--out", str(out)])


def test_a_set_without_any_picture_that_can_be_read_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("path\ngone.png\n")
    with pytest.raises(EfficientFaceError, match="expected pictures that can be read, found none"):
        cli.main([str(tmp_path / "a.csv"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-face", "30"], "--min-face: expected a search for faces"),
        (["--model", "gone.onnx"], "expected a model, found no such file"),
        (["--detect", "haar"], "face detector: expected yunet"),
        (["--prior", "x=y"], "prior"),
        (["--prior", "Joy=1"], "prior"),
        (["--column", "photo"], "expected a column photo, found path"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(options, words, make_manifest, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(EfficientFaceError, match=words):
        cli.main([str(make_manifest(5)), "--out", str(out), *options])
    assert not parts(out)


@pytest.mark.slow
def test_faces_are_found(astronaut, yunet_file, tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray(astronaut).save(tmp_path / "set" / "a.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "set" / "b.png")
    out = tmp_path / "out"
    options = ["--out", str(out), "--detect", f"yunet={yunet_file}"]
    assert cli.main([str(tmp_path / "set"), *options]) == 0
    one, none = pq.read_table(out).to_pylist()
    assert one["label"] and one["score"] > 0.8 and 150 < one["left"] < 200
    assert none["face"] is None and none["error"] is None
