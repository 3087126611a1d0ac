"""The base class of the backends alone, with a model that counts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from efficientface_deploy.backends import BackendOptions, base
from efficientface_deploy.backends.base import Backend, Output, import_library, import_package
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.spec import PRESETS


class Counting(Backend):
    """Answers with the mean of each image; remembers the batches that it was given."""

    def _open(self) -> None:
        self.spec = PRESETS["rafdb"].replace(input_size=32)
        self.batches: list[int] = []
        self.closed = 0

    def _infer(self, images: np.ndarray) -> Output:
        assert images.flags.c_contiguous and 0 < len(images) <= (self.max_batch or 10**9)
        self.batches.append(len(images))
        logits = np.repeat(images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None], 7, axis=1)
        return Output(logits, np.full_like(logits, 1 / 7))

    def _close(self) -> None:
        self.closed += 1


def counting(max_batch: int | None = None) -> Counting:
    backend = Counting(Path("counting.x"), BackendOptions())
    backend.max_batch = max_batch
    backend.open()
    return backend


def levels(count: int) -> np.ndarray:
    """Images (N, 32, 32, 3) whose mean is their number."""
    return np.repeat(np.arange(count, dtype=np.uint8), 32 * 32 * 3).reshape(count, 32, 32, 3)


@pytest.mark.parametrize(
    ("max_batch", "count", "batches"),
    [
        (None, 50, [50]),
        (8, 8, [8]),
        (8, 9, [8, 1]),
        (8, 20, [8, 8, 4]),
        (1, 3, [1, 1, 1]),
        (8, 0, []),
    ],
)
def test_large_batches_are_split_and_put_together_in_order(max_batch, count, batches):
    backend = counting(max_batch)
    output = backend.infer(levels(count))
    assert backend.batches == batches
    assert output.logits[:, 0].tolist() == list(range(count))
    assert output.probabilities.shape == (count, 7)


def test_a_library_is_given_contiguous_images():
    output = counting(max_batch=2).infer(levels(8)[::-2, :, ::-1])
    assert output.logits[:, 0].tolist() == [7, 5, 3, 1]


def test_close_happens_once():
    backend = counting()
    backend.close()
    backend.close()
    assert backend.closed == 1


def test_failed_open_stays_closed(monkeypatch):
    backend = Counting(Path("a.x"), BackendOptions())
    monkeypatch.setattr(backend, "_open", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        backend.open()
    with pytest.raises(BackendError, match="closed"):
        backend.infer(levels(1))


@pytest.mark.parametrize(
    ("logits", "probabilities", "hint"),
    [
        (np.nan, 0.1, "NaN"),
        (0.1, np.inf, "NaN"),
        (np.zeros((2, 8)), np.zeros((2, 8)), r"\(2, 7\), found \(2, 8\)"),
        (np.zeros((3, 7)), np.zeros((2, 7)), r"\(3, 7\)"),
    ],
)
def test_output_that_cannot_be_right(monkeypatch, logits, probabilities, hint):
    backend = counting()

    def infer(images: np.ndarray) -> Output:
        parts = [
            np.full((2, 7), part, np.float32) if np.isscalar(part) else part
            for part in (logits, probabilities)
        ]
        return Output(*parts)

    monkeypatch.setattr(backend, "_infer", infer)
    with pytest.raises(BackendError, match=hint):
        backend.infer(levels(2))


def test_error_in_one_call_does_not_block_close(monkeypatch):
    backend = counting()
    monkeypatch.setattr(backend, "_infer", lambda images: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        backend.infer(levels(1))
    backend.close()


def test_optional_package_that_is_there_or_names_its_extra():
    assert import_package("json", "subject", "JSON", "x").loads("1") == 1
    with pytest.raises(BackendError, match=r"^subject: expected N, found .*no_such.*\[a,b\]'$"):
        import_package("no_such", "subject", "N", "a,b")


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Makes a package with this code, which can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    return make


# What onnxruntime 1.18 does beside NumPy 2.
OF_NUMPY_1 = """
import sys
sys.stderr.write("A module that was compiled using NumPy 1.x cannot be run in\\n" * 30)
raise ImportError
"""


@pytest.mark.parametrize("way", ["import_library", "import_package"])
def test_library_for_the_other_numpy(make_package, way, capsys):
    make_package("of_numpy_1", OF_NUMPY_1)
    with pytest.raises(BackendError) as caught:
        if way == "import_library":
            import_library("of_numpy_1")
        else:
            import_package("of_numpy_1", "subject", "N", "a")
    assert str(caught.value) == (
        f"of_numpy_1: expected a build for NumPy {np.__version__}, found one for NumPy 1; "
        "pip install 'numpy<2', or a newer of_numpy_1"
    )
    assert capsys.readouterr() == ("", "")


def test_library_that_fails_without_a_word(make_package):
    make_package("silent", "raise ImportError")
    with pytest.raises(ImportError):
        import_library("silent")


def test_what_a_library_prints_is_shown(make_package, capsys):
    make_package("loud", "import sys; print('careful', file=sys.stderr); value = 3")
    assert import_library("loud").value == 3
    assert capsys.readouterr() == ("", "careful\n")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(), OSError()])
def test_error_of_the_system_while_a_model_is_read(error):
    class Failing(Counting):
        def _open(self) -> None:
            raise error

    with pytest.raises(ArtifactError, match=r"^x\.onnx: expected a model file that can be read"):
        Failing(Path("x.onnx"), BackendOptions()).open()


# ---- the end of the program

ENDS = """
import sys, threading, time
import numpy as np
import efficientface_deploy as ef

began = threading.Event()

def work(call):
    while True:
        began.set()
        call()

picture = np.zeros((64, 64, 3), np.uint8)
{call}
threading.Thread(target=work, args=(call,), daemon=True).start()
began.wait()
time.sleep(0.2)  # it is in the library by now, almost all the time
"""


@pytest.mark.parametrize(
    "call",
    [
        "predictor = ef.load(); call = lambda: predictor.infer(np.zeros((1, 112, 112, 3), 'u1'))",
        "found = ef.open_detector('yunet=' + sys.argv[1]); call = lambda: found._run(picture)",
    ],
    ids=["predictor", "detector"],
)
def test_a_daemon_thread_in_the_library_does_not_abort_the_end(call, run_python, yunet_file):
    pytest.importorskip("onnxruntime")
    result = run_python(ENDS.format(call=call), str(yunet_file))
    assert (result.returncode, result.stderr) == (0, "")


def test_what_a_program_does_at_its_exit_may_predict(run_python):
    pytest.importorskip("onnxruntime")
    code = (
        "import atexit, numpy as np\n"
        "atexit.register(lambda: print(predictor(np.zeros((9, 9, 3), np.uint8)).label))\n"
        "import efficientface_deploy as ef; predictor = ef.load()"
    )
    result = run_python(code)
    assert (result.returncode, result.stdout.count("\n"), result.stderr) == (0, 1, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_does_not_wait_for_its_parents_calls(run_python):
    code = (
        "import os, sys\n"
        "from efficientface_deploy.backends import base\n"
        "with base.library_call():\n"
        "    if os.fork() == 0:\n"
        "        sys.exit(3)\n"  # runs what is to be done at exit
        "    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    started = time.monotonic()
    assert run_python(code).returncode == 3
    assert time.monotonic() - started < base._LONGEST_END


def test_a_call_that_hangs_does_not_hold_up_the_end_for_ever(monkeypatch):
    monkeypatch.setattr(base, "_LONGEST_END", 0.01)
    calls = base._Calls()
    with calls.one():
        calls.end()
