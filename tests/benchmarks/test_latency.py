from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import ROOT, latency
from benchmarks.latency import (
    Work,
    choose_baseline,
    describe,
    main,
    plan_works,
    try_works,
    warnings,
)
from benchmarks.measure.models import Candidate, Skipped
from benchmarks.report import publish
from benchmarks.report.result import COMPUTE, END_TO_END, read_result
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.timing import Samples

MS = 1_000_000
QUICK = ["--seconds", "0.001", "--rounds", "3", "--threads", "1", "--batch", "1,2"]
QUICK += ["--cold", "0", "--no-floor"]


class FakePredictor:
    """Notes what it is given; fails from some batch size on."""

    def __init__(self, backend: str = "onnx:cpu", largest: int = 1000) -> None:
        self.backend = backend
        self.provenance = {"precision": "fp32"}
        self.spec = SimpleNamespace(input_size=32)
        self.largest = largest
        self.batches: list[np.ndarray] = []
        self.images: list[bytes] = []

    def infer(self, images: np.ndarray) -> None:
        if len(images) > self.largest:
            raise RuntimeError("out of memory")
        self.batches.append(images)

    def __call__(self, image: bytes) -> None:
        self.images.append(image)


def candidate(
    model: str, backend: str = "onnx:cpu", threads: int | None = 1, largest: int = 1000
) -> Candidate:
    return Candidate(model, FakePredictor(backend, largest), threads)  # type: ignore[arg-type]


def constant(milliseconds: float) -> Samples:
    return Samples(np.full((3, 4), int(milliseconds * MS)))


def exit_code(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(argv))
    return stop.value.code


def test_every_candidate_gets_every_batch_and_end_to_end() -> None:
    works = plan_works([candidate("a"), candidate("b")], (1, 4), seed=0)
    planned = [(work.candidate.model, work.stage, work.batch) for work in works]
    assert planned == [
        (model, stage, batch)
        for model in "ab"
        for stage, batch in ((COMPUTE, 1), (COMPUTE, 4), (END_TO_END, 1))
    ]
    assert len({work.name for work in works}) == len(works)


def test_each_call_takes_the_next_input() -> None:
    compute, end_to_end = plan_works([candidate("a")], (2,), seed=0)
    for _ in range(3):
        compute.call()
        end_to_end.call()
    predictor = compute.candidate.predictor
    assert isinstance(predictor, FakePredictor)
    assert [batch.shape for batch in predictor.batches] == [(2, 32, 32, 3)] * 3
    assert len({batch.tobytes() for batch in predictor.batches}) == 3
    assert len(set(predictor.images)) == 3


def test_work_that_fails_does_not_spoil_the_rest() -> None:
    works = plan_works([candidate("a", largest=2), candidate("b")], (1, 8), seed=0)
    working, failed = try_works(works)
    assert len(working) == len(works) - 1
    assert [(entry.model, entry.backend) for entry in failed] == [("a", "onnx:cpu")]
    assert failed[0].reason == "compute, batch 8: RuntimeError: out of memory"


def test_the_baseline_is_pytorch_unless_another_is_asked_for() -> None:
    both = [candidate("a.onnx"), candidate("b.safetensors", "torch:cpu")]
    assert choose_baseline(both, None) == "b.safetensors"
    assert choose_baseline(both[:1], None) == "a.onnx"
    half = candidate("0.onnx")
    half.predictor.provenance["precision"] = "fp16"
    assert choose_baseline([half, both[0]], None) == "a.onnx"
    assert choose_baseline([half], None) == "0.onnx"
    assert choose_baseline(both, "a.onnx") == "a.onnx"
    with pytest.raises(ConfigError, match=r"--baseline.*one of a\.onnx, b\.safetensors"):
        choose_baseline(both, "c")


def test_a_row_holds_the_samples_figures() -> None:
    work = plan_works([candidate("a")], (8,), seed=0)[0]
    durations = (np.arange(1, 101) * MS).reshape(4, 25)
    row = describe(work, [work], {work.name: Samples(durations)}, "a")
    assert row["p50_ms"] == pytest.approx(50.5)
    assert row["p90_ms"] == pytest.approx(90.1)
    assert row["p95_ms"] == pytest.approx(95.05)
    assert row["p99_ms"] == pytest.approx(99.01)
    assert (row["min_ms"], row["calls"]) == (1.0, 100)
    assert row["images_per_second"] == pytest.approx(8 * 100 / 5.05)
    assert row["round_medians_ms"] == [13, 38, 63, 88]
    assert row["busy"] is True
    assert row["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_speedups_compare_the_same_work_and_threads() -> None:
    candidates = [
        candidate("torch", "torch:cpu", 1),
        candidate("torch", "torch:cpu", 2),
        candidate("onnx", "onnx:cpu", 1),
        candidate("onnx", "onnx:cpu", 2),
        candidate("engine", "trt", None),
    ]
    works = [work for work in plan_works(candidates, (1,), seed=0) if work.stage == COMPUTE]
    times = dict(zip((work.name for work in works), (40, 30, 20, 10, 1), strict=True))
    samples = {name: constant(time) for name, time in times.items()}
    rows = [describe(work, works, samples, "torch") for work in works]
    # The engine has no CPU threads: it meets PyTorch with the most.
    assert [row["speedup"]["value"] for row in rows] == [1, 1, 2, 3, 30]
    other = Work(candidates[2], COMPUTE, 8, lambda: None)
    assert describe(other, [other], {other.name: constant(1)}, "torch")["speedup"] is None


def test_warnings_tell_of_a_noisy_machine_and_of_few_calls() -> None:
    quiet = Samples(np.full((4, 50), MS))
    noisy = Samples(np.full((4, 50), MS) * np.arange(1, 5)[:, None])
    assert warnings({"quiet": quiet}) == []
    (warning,) = warnings({"quiet": quiet, "noisy": noisy})
    assert "1 of 2 rows are noisy" in warning and "4.0 x" in warning
    (warning,) = warnings({"few": Samples(np.full((3, 3), MS))})
    assert "fewer than 100 calls" in warning


def test_measures_prints_and_writes(
    make_onnx: Callable[..., Path],
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nonsense")
    models = [make_onnx("model.onnx", precision="int8"), student, broken]
    threads = torch.get_num_threads()
    try:
        backends = ["--backends", "onnx:cpu,torch:cpu"]  # whatever else is installed
        assert main([*map(str, models), *QUICK, *backends, "--out", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "latency.json",
        "latency.md",
        "latency.png",
    }
    assert (tmp_path / "out/latency.png").read_bytes().startswith(b"\x89PNG")

    result = read_result(tmp_path / "out/latency.json")
    assert [(row["model"], row["stage"], row["batch"]) for row in result["cases"]] == [
        (model, stage, batch)
        for model in ("model.onnx", "student.safetensors")
        for stage, batch in ((COMPUTE, 1), (COMPUTE, 2), (END_TO_END, 1))
    ]
    for row in result["cases"]:
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert (row["threads"], len(row["round_medians_ms"])) == (1, 3) and row["calls"] >= 3
    assert {row["model"]: row["precision"] for row in result["cases"]} == {
        "model.onnx": "int8",
        "student.safetensors": "fp32",
    }
    assert result["baseline"] == "student.safetensors"
    assert [model["name"] for model in result["models"]] == ["model.onnx", "student.safetensors"]
    assert result["config"]["batch"] == "1,2"
    assert result["machine"] and result["software"] and "commit" in result["git"]
    absent = {(entry["backend"], entry["model"]) for entry in result["absent"]}
    assert ("onnx:cpu", "broken.onnx") in absent

    printed = capsys.readouterr().out
    for text in ("model.onnx", "torch:cpu", "compute, batch 2", "end to end", "broken.onnx"):
        assert text in printed


def test_cold_start_roofline_and_profile_stand_in_the_result(
    make_onnx: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peak = {"threads": 1, "format": "fp32", "multiply_adds_per_second": 2.1e9}
    peak |= {"by": "onnxruntime", "tried": {"onnxruntime": 2.1e9}}
    monkeypatch.setattr("benchmarks.measure.roofline.measure_arithmetic", lambda threads: [peak])
    argv = [
        str(make_onnx("a.onnx", precision="fp32")),
        "--backends",
        "onnx:cpu",
        "--seconds",
        "0.001",
    ]
    argv += ["--rounds", "3", "--threads", "1", "--batch", "1,4", "--cold", "2", "--profile"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    result = read_result(tmp_path / "latency.json")
    first, second, last = result["cases"]
    # A Gemm of 3 by 7, at 2.1 G multiply-adds a second: 10 ns an image.
    assert first["floor"]["ms"] == pytest.approx(21 / 2.1e9 * 1e3)
    assert second["floor"]["distance"] == pytest.approx(second["p50_ms"] / (4 * 1e-5))
    assert last["floor"]["multiply_adds"] == 21
    assert result["models"][0]["multiply_adds"] == 21
    assert result["ceilings"]["arithmetic"][0]["by"] == "onnxruntime"
    (cold,) = result["cold"]
    assert cold["runs"] == 2 and 0 < cold["min_ms"] <= cold["p50_ms"] <= cold["max_ms"]
    (profiled,) = result["profiles"]
    assert {row["kind"] for row in profiled["kinds"]} >= {"the rest", "Transpose and Cast"}
    printed = capsys.readouterr().out
    for text in ("Cold start", "peak memory", "Profile by kind", "x roofline", "p95"):
        assert text in printed


def test_without_models_the_bundled_ones_are_taken_with_their_notes(
    make_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def default_models() -> Iterator[object]:
        absent = [Skipped("", "int8.onnx", "export: no")]
        yield [make_onnx("a.onnx")], absent, ["its answers mean nothing"]

    monkeypatch.setattr(latency, "default_models", default_models)
    assert main([*QUICK, "--backends", "onnx:cpu", "--out", str(tmp_path / "out")]) == 0
    result = read_result(tmp_path / "out" / "latency.json")
    assert [model["name"] for model in result["models"]] == ["a.onnx"]
    assert "its answers mean nothing" in result["warnings"]
    assert {"backend": "", "model": "int8.onnx", "reason": "export: no"} in result["absent"]
    assert result["ceilings"] is None and result["cases"][0]["floor"] is None


def test_without_out_the_result_goes_to_a_folder_of_its_own(
    make_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "default_folder", lambda result: tmp_path / result["kind"])
    assert main([str(make_onnx("a.onnx")), *QUICK, "--backends", "onnx:cpu"]) == 0
    assert read_result(tmp_path / "latency/latency.json")["absent"] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "1,zwei"], "--batch: expected whole numbers"),
        (["--threads", "0"], "--threads: expected whole numbers"),
        (["--backends", "tpu"], "--backends: expected onnx:cpu"),
        (["--rounds", "1"], "--rounds: expected at least 3"),
        (["missing.onnx"], "models: expected one that runs on this machine, found none"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code([*argv, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["latency", "accuracy"])
def test_runs_as_script_and_as_module_from_anywhere(name: str, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--help"]
    module = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    for command, folder in ((script, tmp_path), (module, ROOT)):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"benchmarks/{name}.py" in done.stdout


def test_needs_no_torch_for_an_onnx_model(
    make_onnx: Callable[..., Path], tmp_path: Path, run_python: Callable[..., object]
) -> None:
    code = (
        "import json, sys\n"
        "from benchmarks.latency import main\n"
        "main(json.loads(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules"
    )
    argv = [str(make_onnx("a.onnx")), *QUICK, "--backends", "onnx", "--out", str(tmp_path / "o")]
    done = run_python(code, json.dumps(argv))
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
