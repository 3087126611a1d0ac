"""A real tritonserver without a GPU: out of the wheel ``nvidia-pytriton``, unpacked into a cache.

The wheel holds tritonserver 2.51 and its Python backend, and neither of NVIDIA's backends for ONNX
and engines. Its Python backend reads NumPy's arrays as NumPy 1 laid them out: with NumPy 2 it
gives empty tensors, or crashes. A stub process does not read PYTHONPATH, but it does look for
modules in the folder that the server was started in: so NumPy 1 lies there. A stub outlives a
server that is killed, so that its process group is ended with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "efficientface-tests"
START_SECONDS, STOP_SECONDS = 90, 20


class Server(NamedTuple):
    """A server that answers.

    Attributes:
        process: It.
        http: Port.
        grpc: Port.
        metrics: Port.
    """

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    metrics: int


def unpack() -> Path:
    """The wheels' files, in the cache; skips the test where they cannot be had."""
    from filelock import FileLock  # here, as in conftest.py

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = CACHE / f"tritonserver-2.51-python{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not folder.is_dir():
            made = folder.with_suffix(".part")
            shutil.rmtree(made, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", str(made), *WHEELS]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
                pytest.skip(f"tritonserver cannot be had: {said}")
            for wheel in made.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(made)
                wheel.unlink()
            home = made / "pytriton" / "tritonserver"
            stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
            if not stub.is_file():
                pytest.skip(f"nvidia-pytriton has no Python backend for Python {version}")
            shutil.copy(stub, home / "backends" / "python")
            for file in (home / "bin" / "tritonserver", home / "backends" / "python" / stub.name):
                file.chmod(0o755)
            made.rename(folder)
    return folder


@contextlib.contextmanager
def serve(repository: Path, folder: Path) -> Iterator[Server]:
    """Start the server with a repository, on loopback ports; its log lies in ``folder``."""
    unpacked = unpack()
    home = unpacked / "pytriton" / "tritonserver"
    cwd = folder / "cwd"
    cwd.mkdir(parents=True)
    for name, at in (
        ("numpy", unpacked / "numpy"),
        ("numpy.libs", unpacked / "numpy.libs"),
        ("efficientface_deploy", ROOT / "efficientface_deploy"),
    ):
        (cwd / name).symlink_to(at)
    ports = free_ports(3)
    command = [str(home / "bin" / "tritonserver"), "--model-repository", str(repository)]
    command += ["--backend-directory", str(home / "backends"), "--exit-timeout-secs", "5"]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address", "127.0.0.1", f"--{name}-port", str(port)]
    log = folder / "tritonserver.log"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, ports[0], log)
        yield Server(process, *ports)
    finally:
        stop(process)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"tritonserver does not start:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and whatever of its processes outlives it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)
    end = time.monotonic() + STOP_SECONDS
    while processes_of(process) and time.monotonic() < end:
        time.sleep(0.05)


def processes_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Ids of the processes of a server's group, without those that have ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == process.pid and fields[0] != "Z":
                    found.append(int(folder.name))
    return found
