"""Our commands on systems as they are: other users' folders, odd names and encodings, no network.

Each is run in a process of its own, so that nothing is pretended.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientface_deploy.predictor import BUNDLED_ONNX

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def run(
    *command: object, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*prefix, sys.executable, *map(os.fspath, command)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=200,
        check=False,
    )


PREDICT = ("-m", "efficientface_deploy.cli")
EXPORT = ("-m", "efficientface_export.cli", "--weights", BUNDLED_ONNX)


def write_face(path: Path, shade: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    row, column = np.mgrid[0:60, 0:60]
    pixels = np.stack([row * 3, column * 4, (row + column + shade) % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def write_reference_face(path: Path, index: int) -> None:
    """One of the faces that the export is verified on: good ranges for INT8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(ROOT / "export/verification/reference_faces.png") as sheet:
        side = sheet.width // 4
        left, top = index % 4 * side, index // 4 * side
        sheet.crop((left, top, left + side, top + side)).save(path)


# ---- a dependency's telemetry

LOAD_AND_PREDICT = """
import sys
import efficientface_deploy as ef
with ef.load(threads=1) as predictor:
    print(predictor(sys.argv[1]).label)
"""


def allowed(*prefix: str) -> bool:
    if shutil.which(prefix[0]) is None:
        return False
    return subprocess.run([*prefix, "true"], capture_output=True).returncode == 0


@pytest.fixture
def homes(tmp_path: Path) -> dict[str, str]:
    """Folders of a user who has nothing yet."""
    found = {}
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        found[name] = str(tmp_path / name)
    return {**found, "XDG_CACHE_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has imported us; a new one has not."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)


@pytest.mark.usefixtures("without_telemetry")
def test_predicting_writes_nothing_and_needs_no_network(
    homes: dict[str, str], tmp_path: Path
) -> None:
    prefix = ("unshare", "--net")
    if not allowed(*prefix):
        pytest.skip("needs the right to make a network namespace (unshare --net)")
    face = write_face(tmp_path / "face.png")
    done = run("-c", LOAD_AND_PREDICT, face, prefix=prefix, **homes)
    assert (done.returncode, done.stderr) == (0, b"")
    for name in ("HOME", "TMPDIR"):
        assert list(Path(homes[name]).rglob("*")) == []


@pytest.mark.usefixtures("without_telemetry")
def test_predicting_opens_nothing_to_write_and_connects_to_nobody(
    homes: dict[str, str], tmp_path: Path
) -> None:
    """Anywhere: by what the system is asked for."""
    calls = "trace=openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,connect,sendto,bind"
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "-qq", "-e", calls, "-o", str(trace))
    if not allowed(*prefix):
        pytest.skip("needs strace, and the right to use it")
    done = run("-c", LOAD_AND_PREDICT, write_face(tmp_path / "face.png"), prefix=prefix, **homes)
    assert done.returncode == 0
    lines = trace.read_text(errors="replace").splitlines()
    assert any("efficientface-ferplus.onnx" in line for line in lines)  # it is traced
    read_only = re.compile(r" open(at)?\(.*O_RDONLY")
    harmless = re.compile(r'"/dev/(null|tty)"|"/proc/|^\d+ (\+\+\+|---)| resumed>')
    assert [
        line for line in lines if not read_only.search(line) and not harmless.search(line)
    ] == []


@pytest.mark.slow
def test_openvino_is_measured_without_its_telemetry(homes: dict[str, str]) -> None:
    pytest.importorskip("openvino")
    code = "from benchmarks.measure.toolchains import import_openvino; import_openvino().Core()"
    done = run("-c", code, **homes)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(Path(homes["HOME"]).rglob("*")) == []


@pytest.mark.usefixtures("without_telemetry")
@pytest.mark.parametrize("home", ["missing", "read-only"])
def test_home_that_cannot_be_written(home: str, tmp_path: Path) -> None:
    place = "/proc/self" if home == "read-only" else str(tmp_path / "none")
    done = run("-c", LOAD_AND_PREDICT, write_face(tmp_path / "face.png"), HOME=place)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_the_user_says_of_telemetry_stays() -> None:
    code = "import os, efficientface_deploy; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run("-c", code, ORT_DISABLE_TELEMETRY="0").stdout.strip() == b"0"


# ---- what another user has closed


@pytest.fixture
def as_user() -> Sequence[str]:
    """What makes a process one that the system's permissions bind, root as it may be here."""
    if os.getuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
    if not allowed(*prefix):
        pytest.skip("is run as root, and needs setpriv to be bound by permissions")
    return prefix


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:  # before tmp_path goes
    """Takes all rights to files and folders away, until the test ends."""
    paths: list[Path] = []

    def close(path: Path) -> Path:
        paths.append(path)
        path.chmod(0)
        return path

    yield close
    for path in reversed(paths):
        path.chmod(0o755)


def test_another_users_folder_among_the_pictures(as_user, closed, tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        write_face(tmp_path / "in" / name)
    closed(tmp_path / "in/b")
    closed(tmp_path / "in/c/3.png")
    done = run(*PREDICT, tmp_path / "in", prefix=as_user)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 2
    assert "a/1.png" in out and len(out.splitlines()) == 2
    for name in ("b", "c/3.png"):
        assert f"{tmp_path}/in/{name}: expected an image file, found permission denied" in err
    assert "2 of 3 pictures, videos or cameras could not be read" in err


def test_folder_of_another_user_given_by_name(as_user, closed, tmp_path: Path) -> None:
    """Nothing below it can be seen, and the others are labelled."""
    face = write_face(tmp_path / "1.png")
    inside = write_face(tmp_path / "private/deeper/2.png")
    closed(tmp_path / "private")
    names = [face, tmp_path / "private", inside.parent, inside]
    done = run(*PREDICT, *names, prefix=as_user)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2
    assert b"3 of 4 pictures, videos or cameras could not be read" in done.stderr
    assert done.stderr.count(b"found permission denied") == 3


@pytest.mark.parametrize("where", ["file", "folder", "parent"])
@pytest.mark.parametrize(
    "name",
    [
        "model.onnx",
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        pytest.param("model.pth.tar", marks=pytest.mark.slow),
    ],
)
def test_model_that_may_not_be_read(as_user, closed, where: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / name
    path.parent.mkdir(parents=True)
    shutil.copy(BUNDLED_ONNX, path)
    closed({"file": path, "folder": path.parent, "parent": path.parent.parent}[where])
    code = (
        "import sys, efficientface_deploy as ef\n"
        "try: ef.load(sys.argv[1])\n"
        "except ef.EfficientFaceError as error: print(error)"
    )
    done = run("-c", code, path, prefix=as_user)
    assert done.stderr == b""
    assert b"found permission denied; check the path" in done.stdout


def test_calibration_leaves_out_what_may_not_be_read(as_user, closed, tmp_path: Path) -> None:
    for index in range(12):
        write_reference_face(tmp_path / f"faces/{index % 2}/{index}.png", index)
    write_face(tmp_path / "faces/closed/1.png")
    closed(tmp_path / "faces/closed")
    closed(tmp_path / "faces/0/4.png")
    options = ("--engine", "onnx", "--precision", "int8", "--no-int8-search")
    calib = ("--calib", tmp_path / "faces", "--out", tmp_path / "out")
    done = run(*EXPORT, *options, *calib, prefix=as_user)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert f"left out {tmp_path}/faces/0/4.png: permission denied" in err
    assert f"left out {tmp_path}/faces/closed: a folder that may not be read" in err
    assert "calibration: 11 images" in out and "left out 2 images or folders" in out


def test_prepare_leaves_out_what_may_not_be_read(as_user, closed, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for index in range(6):
            write_face(tmp_path / f"mine/{split}/{'ab'[index % 2]}/{index}.png", 20 * index)
    closed(tmp_path / "mine/train/a/2.png")
    command = ("-m", "training.prepare", "folders", "--source", tmp_path / "mine")
    done = run(*command, "--out", tmp_path / "out", prefix=as_user)
    assert done.returncode == 0, done.stderr
    assert b"left out 2.png (train, a): permission denied\n" in done.stderr
    assert b"left out 1 images in all" in done.stderr
    assert b"11 images" in done.stdout


# ---- a file system without modes


def test_export_to_a_file_system_that_refuses_modes(tmp_path: Path) -> None:
    calls = "chmod,fchmod,fchmodat,fchmodat2"
    prefix = ("strace", "-f", "-qq", "-e", f"inject={calls}:error=EPERM", "-o", "/dev/null")
    if not allowed(*prefix):
        calls = "chmod,fchmod,fchmodat"
        prefix = ("strace", "-f", "-qq", "-e", f"inject={calls}:error=EPERM", "-o", "/dev/null")
    if not allowed(*prefix):
        pytest.skip("needs strace, and the right to use it")
    options = ("--engine", "onnx", "--precision", "fp16", "--out", tmp_path / "out")
    done = run(*EXPORT, *options, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/efficientface-fp16-cpu.onnx").is_file()
    refused = run("-c", f"import os; os.chmod({str(tmp_path)!r}, 0o755)", prefix=prefix)
    assert b"PermissionError" in refused.stderr  # it is refused


# ---- names and encodings

ODD = "caf\udce9 \u4e2d"  # a byte that is no UTF-8, and a letter that cp1252 does not have


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of that name."""
    try:
        (tmp_path / ODD).mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes names in UTF-8 alone")
    return tmp_path / ODD


ENCODINGS = ("ascii", "cp1252", "utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("json", [False, True])
def test_predict_names_of_any_bytes(encoding: str, json: bool, odd: Path, tmp_path: Path) -> None:
    write_face(odd / "1.png")
    (odd / "2.png").write_bytes(b"no picture")
    write_face(odd / f"{ODD}.png")
    options = ["--json"] if json else []
    done = run(*PREDICT, odd, "--draw", tmp_path / "drawn", *options, PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == (2 if json else 3)
    assert done.stdout.count(rb"\udce9") == 3
    assert b"Traceback" not in done.stderr and done.stderr.count(b"error: ") == 1
    assert rb"caf\udce9" in done.stderr
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {"1.png.jpg", f"{ODD}.png.jpg"}


@pytest.mark.parametrize(
    "name", ["model.onnx", pytest.param("model.safetensors", marks=pytest.mark.slow)]
)
def test_model_in_a_folder_of_any_bytes(name: str, odd: Path, tmp_path: Path) -> None:
    shutil.copy(BUNDLED_ONNX.with_suffix(Path(name).suffix), odd / name)
    face = write_face(tmp_path / "1.png")
    done = run(*PREDICT, face, "--model", odd / name, PYTHONIOENCODING="ascii")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


def test_export_between_folders_of_any_bytes(odd: Path) -> None:
    model = Path(shutil.copy(BUNDLED_ONNX, odd / f"{ODD}.onnx"))
    for index in range(12):
        write_reference_face(odd / "faces" / f"{ODD}{index}.png", index)
    command = ("-m", "efficientface_export.cli", "--weights", model, "--engine", "onnx")
    options = ("--precision", "all", "--no-int8-search", "--calib", odd / "faces")
    done = run(*command, *options, "--out", odd / "out", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (odd / "out").iterdir()}
    assert {"efficientface-int8-cpu.onnx", "report.md", "report.json", "verify.npz"} <= made
    verify = ("-m", "efficientface_export.cli", "--verify", odd / "out/efficientface-int8-cpu.onnx")
    done = run(*verify, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def test_prepare_names_of_any_bytes(odd: Path) -> None:
    for split in ("train", "test"):
        for index in range(6):
            write_face(odd / f"mine/{split}/{'ab'[index % 2]}/{index}.png", 20 * index)
    write_face(odd / f"mine/train/a/{ODD}.png")
    command = ("-m", "training.prepare", "folders", "--source", odd / "mine")
    done = run(*command, "--out", odd / "out", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"12 images" in done.stdout
    assert rb"left out 'caf\udce9 \u4e2d.png'" in done.stderr


VIDEO = """
import sys
from PIL import Image
import efficientface_deploy as ef
from efficientface_deploy.vision.yunet import YuNet
from efficientface_deploy.vision.video import write_video
with write_video(sys.argv[1] + "/video.mp4", 5) as write:
    for shade in (10, 100, 200):
        write(Image.new("RGB", (64, 64), (shade,) * 3))
with ef.open_video(sys.argv[1] + "/video.mp4") as video:
    print(len(list(video)))
try:
    YuNet(sys.argv[1] + "/model.onnx")  # another network: what is said is of its outputs
except ef.EfficientFaceError as error:
    print(error)
print("done")
"""


def test_videos_and_detectors_in_a_folder_of_any_bytes(odd: Path) -> None:
    """OpenCV 5.0 ends the process by a segmentation fault when a name is no UTF-8."""
    pytest.importorskip("av")
    shutil.copy(BUNDLED_ONNX, odd / "model.onnx")
    done = run("-c", VIDEO, odd, PYTHONIOENCODING="ascii:backslashreplace")
    lines = done.stdout.split()
    assert (done.returncode, lines[0], lines[-1]) == (0, b"3", b"done"), done.stderr


# ---- readers that go away


def run_without_a_reader(*command: object) -> tuple[int, bytes]:
    """Exit code and errors of a command whose output is read for one byte and then no more."""
    line = [sys.executable, "-u", *map(os.fspath, command)]
    reader, writer = os.pipe()
    process = subprocess.Popen(line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    _, err = process.communicate(timeout=200)
    return process.returncode, err


def test_export_goes_on_without_a_reader(tmp_path: Path) -> None:
    options = ("--engine", "onnx", "--precision", "fp16", "--out", tmp_path / "out")
    assert run_without_a_reader(*EXPORT, *options) == (0, b"")
    assert (tmp_path / "out/efficientface-fp16-cpu.onnx").is_file()


def test_predict_ends_with_its_reader_and_says_so(tmp_path: Path) -> None:
    face = write_face(tmp_path / "1.png")
    code, err = run_without_a_reader(*PREDICT, *[face] * 2000)
    assert code == 141
    assert b"Traceback" not in err and b"error" not in err
