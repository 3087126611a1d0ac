"""The choice of ``--tune``: by timings that are made up, and by short real ones."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientface_deploy import predictor
from efficientface_deploy.backends import onnx as onnx_module
from efficientface_deploy.errors import BackendError, ExportError
from efficientface_deploy.workbench.timing import Samples
from efficientface_export import tune
from efficientface_export.tensorrt.build_log import EngineCost
from efficientface_export.tune import (
    Candidate,
    File,
    Runner,
    choose,
    find_runners,
    flaw,
    measure_candidates,
    pair,
    verify_candidates,
)
from efficientface_export.verification.parity import Verification
from tests.export.outputs import FP16, FP32

GOOD = Verification(runner="onnx:cpu", images=3000, agreement=1.0, agreement_interval=(0.999, 1.0))
CPU, OPENVINO, BF16 = "onnx:cpu", "onnx:openvino", "onnx:openvino-bf16"


def candidate(
    milliseconds: float | None,
    precision: str = "fp32",
    graph: str = "deploy",
    backend: str = CPU,
    threads: int | None = 1,
    noise: float = 0.002,
    cost: EngineCost | None = None,
    **changes: Any,
) -> Candidate:
    """One that takes so long, more or less, in ten rounds of five calls."""
    file = File(graph, precision, Path(f"{precision}-{graph}"), None, cost)
    samples = None
    if milliseconds is not None:
        wave = np.repeat(1 + noise * np.linspace(-1, 1, 10)[:, None], 5, axis=1)
        samples = Samples((wave * milliseconds * 1e6).astype(np.int64))
    verification = dataclasses.replace(GOOD, **changes)
    return Candidate(file, Runner(backend, threads), verification, samples=samples)


class TestChoice:
    @pytest.mark.parametrize(
        "other",
        [
            {"precision": "int8"},
            {"precision": "fp16"},
            {"backend": OPENVINO},
            {"threads": 2},
            {"graph": "plain"},
        ],
    )
    def test_the_fastest_but_within_the_noise_the_simpler(self, other: dict[str, Any]) -> None:
        simple = candidate(2.0)
        best, record = choose([candidate(1.5, **other), simple], "latency")
        assert best is not simple and "the fastest that is right" in record["reason"]
        near = candidate(1.98, **other)
        best, record = choose([near, simple], "latency")
        assert best is simple
        assert f"{near} is no faster beyond the noise (1.01 [" in record["reason"]
        wild = candidate(1.9, noise=0.4, **other)  # faster by its median, which decides nothing
        assert choose([wild, simple], "latency")[0] is simple

    def test_precision_goes_before_backend_and_threads(self) -> None:
        simple = candidate(2.0, backend=OPENVINO, threads=8, graph="plain")
        assert choose([candidate(2.0, "fp16"), candidate(2.0, "int8"), simple], "latency")[0] is (
            simple
        )
        ours = candidate(2.0, threads=8)
        assert choose([simple, ours, candidate(2.0, "fp16")], "latency")[0] is ours

    @pytest.mark.parametrize(
        ("flawed", "why"),
        [
            ({"problems": ("KL 0.2 > 0.05",)}, "FAILED: KL 0.2 > 0.05"),
            ({"not_run": "no device"}, "cannot be verified here: no device"),
            ({"undecided": ("agreement 0.97 < 0.98 on 60 images",)}, "not decided: agreement"),
            ({"accuracy_difference": -0.02, "accuracy_interval": (-0.03, -0.01)}, "accuracy -0.0"),
            ({"images": 16}, "agreement not decided by 16 images, needs 50: give --val"),
        ],
    )
    def test_the_fastest_that_is_wrong_is_not_taken(self, flawed: Any, why: str) -> None:
        fast = candidate(1.0, "int8", **flawed)
        slow = candidate(2.0)
        assert flaw(fast, [fast, slow]).startswith(why)
        best, record = choose([fast, slow], "latency")
        assert best is slow
        assert [row["verdict"][: len(why)] for row in record["candidates"]] == [why, "chosen"]

    @pytest.mark.parametrize(
        "right",
        [
            {"accuracy_difference": -0.01, "accuracy_interval": (-0.02, 0.001)},
            {"images": 50},
        ],
    )
    def test_what_may_be_chance_is_no_flaw(self, right: Any) -> None:
        fast = candidate(1.0, "int8", **right)
        assert choose([fast, candidate(2.0)], "latency")[0] is fast

    def test_int8_alone_needs_no_comparison(self) -> None:
        """A file that is INT8 already: only backend and threads are open."""
        fast = candidate(1.0, "int8", threads=2, images=16)
        assert choose([candidate(2.0, "int8", images=16), fast], "latency")[0] is fast

    def test_bf16_is_named_and_never_taken(self) -> None:
        fast, slow = candidate(1.0, backend=BF16), candidate(2.0)
        best, record = choose([fast, slow], "latency")
        assert best is slow
        assert record["candidates"][0]["verdict"] == "only where asked for by name"
        (note,) = record["notes"]
        assert "bf16 (deploy graph)" in note and "0.50 [0.50, 0.50]" in note
        assert f"load(FILE, backend='{BF16}')" in note
        assert choose([candidate(3.0, backend=BF16), slow], "latency")[1]["notes"] == []

    def test_nothing_is_right(self) -> None:
        wrong = candidate(1.0, problems=("KL 1 > 0.05",))
        with pytest.raises(ExportError, match=r"--tune: expected .*, found fp32: FAILED: KL 1"):
            choose([wrong], "latency")

    def test_record(self) -> None:
        slow = candidate(4.0, noise=0)
        best, record = choose([slow, candidate(2.0, noise=0)], "throughput", ["int8: made later"])
        assert (record["objective"], record["batch"]) == ("throughput", 32)
        assert record["notes"] == ["int8: made later"]
        assert [row["p50_ms"] for row in record["candidates"]] == [2.0, 4.0]
        assert [row["times"] for row in record["candidates"]] == [1.0, 2.0]
        assert record["reason"] == f"{best}: 2 [2, 2] ms, the fastest that is right"
        assert str(best) == "fp32 (deploy graph) by onnx:cpu, 1 thread"

    def test_a_noisy_machine_is_told(self) -> None:
        busy = candidate(2.0)
        assert busy.samples is not None
        busy.samples = dataclasses.replace(busy.samples, other_cpus=1.0)
        (note,) = choose([busy, candidate(4.0)], "latency")[1]["notes"]
        assert note == "1 of 2 are noisy: tune again when the machine is idle"


def engine(precision: str, kernels: int, moved: int | None, **changes: Any) -> Candidate:
    cost = EngineCost(kernels, moved, 0 if moved is not None else None)
    options = {"backend": "trt-rtx", "threads": None, "cost": cost, **changes}
    return candidate(None, precision, **options)


class TestEstimate:
    @pytest.mark.parametrize(
        ("objective", "graph"), [("latency", "deploy"), ("throughput", "plain")]
    )
    def test_one_picture_waits_for_launches_and_a_batch_for_memory(
        self, objective: str, graph: str
    ) -> None:
        engines = [engine("fp16", 79, 8), engine("fp16", 100, 7, graph="plain")]
        best, record = choose([*engines, engine("fp32", 80, 15)], objective)
        assert (best.precision, best.file.graph) == ("fp16", graph)
        assert record["machine"] == "none, by the builder's log"
        assert "an estimate" in record["reason"] and "an estimate" in record["notes"][-1]
        assert all(row["p50_ms"] is None for row in record["candidates"])

    @pytest.mark.parametrize(
        ("kernels", "moved", "taken"), [(118, 5, False), (79, 9, False), (79, 7, True)]
    )
    def test_int8_of_more_kernels_or_bytes_is_never_taken(
        self, kernels: int, moved: int, taken: bool
    ) -> None:
        """As the report says of an engine: :meth:`EngineCost.exceeds`, of the least in FP16."""
        fp16, int8 = engine("fp16", 79, 8), engine("int8", kernels, moved)
        candidates = [engine("fp16", 100, 6, graph="plain"), fp16, int8]
        best, record = choose(candidates, "latency")
        assert best is (int8 if taken else fp16)
        (verdict,) = [row["verdict"] for row in record["candidates"] if row["precision"] == "int8"]
        less = f"{int8.file.cost} where fp16 has {fp16.file.cost}"
        assert verdict == ("chosen" if taken else less)

    def test_a_log_without_bytes(self) -> None:
        engines = [engine("fp32", 80, None), engine("fp16", 79, None)]
        assert choose(engines, "latency")[0].precision == "fp16"


class TestCandidates:
    @pytest.mark.parametrize(
        ("objective", "cpus", "threads"),
        [
            *(("latency", 1, [1]), ("latency", 2, [1, 2]), ("latency", 8, [1, 2, 8])),
            *(("throughput", 1, [1]), ("throughput", 8, [2, 8])),
        ],
    )
    def test_threads(
        self, objective: str, cpus: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tune, "usable_cpus", lambda: cpus)
        runners, _ = find_runners(objective, "onnx", "cpu")
        assert [runner for runner in runners if runner.backend == CPU] == [
            Runner(CPU, count) for count in threads
        ]

    def test_providers_that_are_not_here_say_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def find(device: str) -> list[Any]:
            if device == "openvino-bf16":
                raise BackendError(device, "a CPU that computes in BF16", "one without", "choose")
            return []

        monkeypatch.setattr(onnx_module, "find_provider", find)
        runners, absent = find_runners("throughput", "onnx", "cpu")
        assert {runner.backend for runner in runners} == {CPU, OPENVINO}
        assert absent == ["onnx:openvino-bf16: one without"]
        assert find_runners("latency", "onnx", "gpu")[0][0] == Runner("onnx:cuda", None)
        assert find_runners("latency", "trt", "gpu") == ([Runner("trt", None)], [])

    def test_bf16_is_a_way_to_run_fp32(self) -> None:
        files = [File("deploy", precision, Path(precision)) for precision in ("fp32", "int8")]
        found = pair(files, [Runner(CPU, 1), Runner(BF16, 1)])
        assert [one.precision for one in found] == ["fp32", "bf16", "int8"]

    def test_each_file_is_verified_once_on_a_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def verify(path: Path, logits: Any, images: Any, precision: str, backend: str = "auto"):
            asked.append((path.name, precision, backend))
            return Verification(not_run="no GPU") if backend == "trt" else GOOD

        monkeypatch.setattr(tune, "verify_artifact", verify)
        files = [File("deploy", "fp32", Path("a"))]
        candidates = pair(files, [Runner(CPU, 1), Runner(CPU, 2), Runner(BF16, 2)])
        verify_candidates(candidates, None, None)  # type: ignore[arg-type]
        assert asked == [("a", "fp32", CPU), ("a", "bf16", BF16)]
        assert [one.verification for one in candidates] == [GOOD] * 3
        (engine,) = pair([File("deploy", "fp16", Path("e"), Path("p"))], [Runner("trt", None)])
        verify_candidates([engine], None, None)  # type: ignore[arg-type]
        assert asked[2:] == [("e", "fp16", "trt"), ("p", "fp16", "auto")]
        assert (engine.runs, engine.verification) == (False, GOOD)


class TestMeasurement:
    @pytest.fixture
    def two(self, exported: Path) -> list[Candidate]:
        files = [
            File("plain", name, exported / file) for name, file in (("fp32", FP32), ("fp16", FP16))
        ]
        return pair(files, [Runner(CPU, 1)])

    @pytest.fixture
    def sizes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many images each call had."""
        found: list[int] = []
        infer = predictor.Predictor.infer

        def counted(self: Any, images: Any) -> Any:
            found.append(len(images))
            return infer(self, images)

        monkeypatch.setattr(predictor.Predictor, "infer", counted)
        return found

    @pytest.mark.parametrize(("objective", "batch"), [("latency", 1), ("throughput", 32)])
    def test_it_takes_turns_until_its_time_is_over(
        self, two: list[Candidate], images: np.ndarray, sizes: list[int], objective: str, batch: int
    ) -> None:
        shares: list[float] = []
        ticks = iter(range(1000))  # a second each time that it is asked

        def tell(name: str, share: float) -> None:
            shares.append(share)

        given = two, objective, 2, images[:7]
        assert not measure_candidates(*given, tell, lambda: next(ticks))
        # Asked at the start, and from the third round on.
        assert [len(one.samples.durations_ns) for one in two if one.samples] == [4, 4]
        assert set(sizes) == {batch}
        assert shares == sorted(shares) and len(shares) == 10 and 0 <= shares[-1] < 1

    def test_an_interrupt_leaves_what_can_be_compared(
        self, two: list[Candidate], images: np.ndarray
    ) -> None:
        asked = 0

        def clock() -> float:
            nonlocal asked
            asked += 1
            if asked == 2:  # after the third round
                signal.raise_signal(signal.SIGINT)
            return 0

        assert measure_candidates(two, "latency", 0.2, images, None, clock)
        assert [len(one.samples.durations_ns) for one in two if one.samples] == [4, 4]

    def test_an_interrupt_before_that_ends_the_command(
        self, two: list[Candidate], images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(infer: Any, batches: Any) -> Any:
            return lambda: signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(tune, "in_turn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_candidates(two, "latency", 0.2, images)
