"""Each toolchain computes what PyTorch computes, or says why it cannot."""

from __future__ import annotations

import ctypes
import sys
import time

import numpy as np
import pytest

from benchmarks.measure import toolchains
from benchmarks.measure.inputs import make_batches
from benchmarks.measure.networks import STRAIGHT, relative_difference
from benchmarks.measure.toolchains import TOOLCHAINS, UnavailableError, Work
from benchmarks.peers import reference_logits

pytestmark = pytest.mark.usefixtures("threads_as_before")

CONVERTED = [
    one
    for one in TOOLCHAINS
    # torch.compile takes minutes on a busy machine; pnnx misreads the stand-in's Gather.
    if one.name != "torch.compile" and not (one.library == "ncnn" and one.graph == STRAIGHT)
]


@pytest.mark.parametrize("toolchain", CONVERTED, ids=lambda one: one.name)
@pytest.mark.parametrize("work", [Work(1, 1), Work(2, 3)], ids=lambda work: work.name)
def test_real_toolchains_compute_what_pytorch_computes(toolchain, work, network):
    for package in toolchain.needs:
        pytest.importorskip(package, reason=f"{package} is not installed")
    if not toolchain.takes(work):
        pytest.skip("is for batches alone")
    first, second = make_batches(32, work.batch, 0, 2)
    infer = toolchain.open(network, work)
    kept = infer(first)
    found = infer(second)  # the first answer must not change
    limit = 1e-4 if toolchain.precision == "fp32" else 0.2
    assert relative_difference(kept, reference_logits(network, first)) < limit
    assert relative_difference(found, reference_logits(network, second)) < limit


@pytest.mark.slow
def test_compiled_pytorch_computes_the_same(network):
    (pictures,) = make_batches(32, 1, 0, 1)
    found = toolchains.open_compiled(network, STRAIGHT, Work(1, 1))(pictures)
    assert relative_difference(found, reference_logits(network, pictures)) < 1e-4


def test_no_compiler_is_said(network, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match="install g"):
        toolchains.open_compiled(network, STRAIGHT, Work(1, 1))


def test_a_picture_to_each_thread_keeps_the_order():
    def infer(pictures):
        time.sleep(0.02 if pictures[0, 0] == 0 else 0)
        return pictures.astype(np.float32)

    pictures = np.arange(6, dtype=np.uint8)[:, None]
    found = toolchains.one_by_one(infer, 2)(pictures)
    assert found.tolist() == pictures.tolist()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no such operator\\nGatherND')", "exit code 1: GatherND"),
        ("print('done')", "exit code 0: done"),  # says so, and wrote nothing
        ("import os; os.abort()", "exit code -6: it said nothing"),
    ],
)
def test_a_converter_that_writes_nothing_is_said(code, reason, tmp_path):
    command = [sys.executable, "-c", code]
    with pytest.raises(UnavailableError, match=reason):
        toolchains._run_converter(command, tmp_path, tmp_path / "model.bin")


def test_what_libraries_print_does_not_reach_standard_output(capfd):
    print("before")
    with toolchains.native_output_to_stderr():
        ctypes.CDLL(None).puts(b"using high precision")
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == "using high precision\n"
