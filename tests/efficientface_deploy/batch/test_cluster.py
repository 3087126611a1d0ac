"""Shards on a local Ray cluster, and a cluster that is not there.

``pip install 'efficientface-deploy[ray]'`` first: Ray is not in [dev], for its size.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from efficientface_deploy.errors import ArtifactError, BackendError
from tests.test_imports import ROOT

pq = pytest.importorskip("pyarrow.parquet")

from efficientface_deploy.batch import cluster  # noqa: E402 - pyarrow may be missing
from efficientface_deploy.workbench import requirements  # noqa: E402


def actors_below(pid: int) -> list[int]:
    """Processes of a session's group that Ray runs our actors in."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = path.joinpath("cmdline").read_bytes()
            session = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[3])
        except (OSError, ValueError):
            continue
        if b"ray::" in words and b"ShardActor" in words and session == pid:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_nothing_is_lost(photo, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'efficientface-deploy[ray]'")
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "a.png")
    names = ["gone.png" if n % 10 == 9 else "a.png" for n in range(6000)]
    (tmp_path / "set.csv").write_text("path\n" + "\n".join(names) + "\n")
    out = tmp_path / "out"
    options = ["--shard", "20", "--ray", "local", "--workers", "2", "--threads", "1"]
    command = [sys.executable, "-m", "efficientface_deploy.batch.cli", tmp_path / "set.csv"]
    process = subprocess.Popen(
        [*map(str, command), "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    while len(list(out.glob("part-*"))) < 10 and process.poll() is None:
        time.sleep(0.02)
    actors = actors_below(process.pid)
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "6,000 pictures, 5,400 faces, 600 unreadable" in said
    rows = pq.read_table(out, columns=["picture", "label", "error"]).to_pylist()
    assert sorted(row["picture"] for row in rows) == list(range(6000))
    assert sum(row["error"] is not None for row in rows) == 600


@pytest.mark.parametrize(
    ("address", "found"),
    [("127.0.0.1:9", "Connection refused"), ("cluster", "no address, which is HOST:PORT")],
)
def test_a_cluster_that_is_not_there_is_one_line(address, found, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install 'efficientface-deploy[ray]'")
    with pytest.raises(BackendError, match=f"expected a cluster at {address}, found .*{found}"):
        list(cluster.annotate_on_ray(JOB, [0], address, 1))


class JOB:
    threads = 1


def test_ray_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setattr(requirements, "is_installed", lambda module: False)
    with pytest.raises(BackendError, match=r"expected ray, to work on a cluster, found it is not"):
        list(cluster.annotate_on_ray(JOB, [0], "local", 1))


def test_an_error_of_ours_is_found_behind_rays():
    ours = ArtifactError("model", "this", "that", "copy it")
    outer = RuntimeError("task failed")
    outer.cause = ours
    assert str(cluster._cause(outer)) == str(ours)
    assert "expected every shard to be annotated, found task failed" in str(
        cluster._cause(RuntimeError("task failed"))
    )
