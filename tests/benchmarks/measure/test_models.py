from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measure import models as module
from benchmarks.measure.models import (
    EXPORTED,
    EXPORTED_NOTE,
    Candidate,
    Skipped,
    choose_backends,
    default_models,
    find_models,
    open_candidates,
    positive_integers,
    require_candidates,
)
from efficientface_deploy.errors import ConfigError, install_command
from efficientface_deploy.predictor import BUNDLED_ONNX, BUNDLED_WEIGHTS
from efficientface_deploy.spec import ModelSpec


@pytest.mark.parametrize(
    ("text", "numbers"), [("1,8,32", (1, 8, 32)), (" 4 , 2,", (4, 2)), ("2,2,1", (2, 1))]
)
def test_comma_lists_of_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert positive_integers(text, "--batch") == numbers


@pytest.mark.parametrize("text", ["", ",", "0", "1,x", "-1", "1.5", "1 8", "²"])
def test_bad_comma_lists_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--threads: expected whole numbers"):
        positive_integers(text, "--threads")


def test_backends_are_chosen_by_name_or_name_and_device() -> None:
    everything = choose_backends("")
    assert {"onnx:cpu", "onnx:cuda", "trt", "trt-rtx", "torch:cpu"} <= set(everything)
    assert choose_backends("torch,onnx:cpu") == ("onnx:cpu", "torch:cpu", "torch:cuda")
    assert choose_backends("trt") == ("trt",)
    with pytest.raises(ConfigError, match=r"--backends.*'onnx:tpu'"):
        choose_backends("onnx:tpu")


def test_without_models_the_bundled_ones_and_artifacts_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_onnx: Callable[..., Path]
) -> None:
    found = make_onnx("artifacts/run/a.onnx")
    monkeypatch.setattr(module, "ARTIFACTS", tmp_path / "artifacts")
    assert find_models(()) == [BUNDLED_WEIGHTS, BUNDLED_ONNX, found]
    monkeypatch.setattr(module, "ARTIFACTS", tmp_path / "none")
    assert find_models(()) == [BUNDLED_WEIGHTS, BUNDLED_ONNX]


def test_a_folder_gives_its_models_but_no_teachers(
    tmp_path: Path, student: Path, tiny_spec: ModelSpec
) -> None:
    from efficientface_deploy.models import save_checkpoint
    from efficientface_deploy.models.checkpoint import build_model

    teacher = tiny_spec.replace(architecture="resnet18")
    save_checkpoint(tmp_path / "ldg.safetensors", build_model("resnet18", 7), teacher)
    engine = tmp_path / "deep" / "model.rtx.engine"
    engine.parent.mkdir()
    for path in (engine, tmp_path / ".half.onnx", tmp_path / "notes.txt"):
        path.write_bytes(b"x")
    assert find_models([tmp_path]) == [engine, student]
    # Asked for by name, it is measured; asked for twice, it is measured once.
    ldg = tmp_path / "ldg.safetensors"
    assert find_models([ldg, ldg]) == [ldg]


def test_what_opens_and_what_does_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_onnx: Callable[..., Path],
    student: Path,
) -> None:
    reasons = {"trt": "tensorrt is not installed"}
    monkeypatch.setattr(module, "missing_reason", reasons.get)
    good = make_onnx("good.onnx", precision="fp16")
    broken, foreign = tmp_path / "broken.onnx", tmp_path / "model.tflite"
    broken.write_bytes(b"nonsense")
    paths = [good, broken, foreign, tmp_path / "gone.onnx", student]
    backends = ("onnx:cpu", "torch:cpu", "trt", "trt-rtx")
    with open_candidates(paths, backends, (1, 2)) as (opened, skipped):
        assert [(entry.model, entry.backend, entry.threads) for entry in opened] == [
            ("good.onnx", "onnx:cpu", 1),
            ("good.onnx", "onnx:cpu", 2),
            ("student.safetensors", "torch:cpu", 1),
            ("student.safetensors", "torch:cpu", 2),
        ]
        assert [entry.precision for entry in opened] == ["fp16", "fp16", "fp32", "fp32"]
    by_key = {(entry.backend, entry.model): entry.reason for entry in skipped}
    assert set(by_key) == {
        ("trt", ""),
        ("onnx:cpu", "broken.onnx"),
        ("", "model.tflite"),
        ("onnx:cpu", "gone.onnx"),
        ("trt-rtx", ""),
    }
    assert install_command("trt") in by_key["trt", ""]
    assert "no such file" in by_key["onnx:cpu", "gone.onnx"]
    assert "none of the models" in by_key["trt-rtx", ""]
    assert not any("\n" in reason for reason in by_key.values())


def test_a_library_that_cannot_be_imported_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, make_onnx: Callable[..., Path]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ImportError("libcudart.so.12:\n cannot open shared object file")

    monkeypatch.setattr(module, "load", load)
    with open_candidates([make_onnx("a.onnx")], ("onnx:cpu",)) as (opened, skipped):
        reason = "ImportError: libcudart.so.12: cannot open shared object file"
        assert (opened, skipped) == ([], [Skipped("onnx:cpu", "a.onnx", reason)])


def test_models_are_closed_at_the_end(make_onnx: Callable[..., Path]) -> None:
    with open_candidates([make_onnx("a.onnx")], ("onnx:cpu",)) as (opened, _):
        predictor = opened[0].predictor
    with pytest.raises(Exception, match="close"):
        predictor.infer(None)  # type: ignore[arg-type]


def test_models_of_one_name_are_told_apart(make_onnx: Callable[..., Path]) -> None:
    paths = [make_onnx("x/m.onnx"), make_onnx("y/m.onnx"), make_onnx("y/n.onnx")]
    with open_candidates(paths, ("onnx:cpu",)) as (opened, _):
        names = [entry.model for entry in opened]
    assert names == ["x/m.onnx", "y/m.onnx", "n.onnx"]


def test_an_engine_is_opened_with_and_without_cuda_graphs_where_they_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened_with: list[dict[str, object]] = []

    class Opened(contextlib.nullcontext):
        backend, provenance = "trt", {"precision": "fp16"}

    def load(path: Path, *, backend: str, threads=None, preset=None, cuda_graphs=True) -> Opened:
        opened_with.append({"backend": backend, "cuda_graphs": cuda_graphs})
        found = Opened()
        found.enter_result = found
        return found

    path = tmp_path / "m.engine"
    path.write_bytes(b"plan")
    monkeypatch.setattr(module, "missing_reason", lambda name: None)
    monkeypatch.setattr(module, "load", load)
    with open_candidates([path], ("trt",), (1, 2), without_graphs=True) as (opened, _):
        assert [(one.model, one.threads) for one in opened] == [
            ("m.engine", None),
            ("m.engine, no CUDA graphs", None),
        ]
    assert [entry["cuda_graphs"] for entry in opened_with] == [True, False]
    with open_candidates([path], ("trt",)) as (opened, _):
        assert len(opened) == 1  # not asked for


@pytest.mark.parametrize(
    ("backend", "on_gpu"),
    [
        ("trt", True),
        ("trt-rtx", True),
        ("onnx:cuda", True),
        ("onnx:tensorrt-rtx", True),
        ("torch:cuda", True),
        ("onnx:cpu", False),
        ("onnx:openvino", False),
    ],
)
def test_what_runs_on_a_gpu(backend: str, on_gpu: bool) -> None:
    predictor = SimpleNamespace(backend=backend)
    assert Candidate("m", predictor, None).on_gpu is on_gpu  # type: ignore[arg-type]


def test_torch_threads_are_set_before_a_turn(student: Path) -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        with open_candidates([student], ("torch:cpu",), (1, 2)) as (opened, _):
            assert torch.get_num_threads() == 2
            opened[0].prepare()
            assert torch.get_num_threads() == 1
            opened[1].prepare()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_description_says_which_file_it_was(make_onnx: Callable[..., Path]) -> None:
    path = make_onnx("a.onnx", precision="int8")
    with open_candidates([path], ("onnx:cpu",)) as (opened, _):
        described = opened[0].describe()
    assert described["name"] == "a.onnx"
    assert described["precision"] == "int8"
    assert described["bytes"] == path.stat().st_size
    assert len(described["sha256"]) == 64
    assert described["input_size"] == 32


@pytest.mark.parametrize(
    ("count", "said"), [(4, "a.onnx: broken"), (3, "a.onnx: no CUDA"), (2, "trt: not installed")]
)
def test_nothing_to_measure_is_an_error_that_says_why(count: int, said: str) -> None:
    skipped = [
        Skipped("trt", "", "not installed"),
        Skipped("onnx:cuda", "", "none of the models is for it"),
        Skipped("onnx:cuda", "a.onnx", "no CUDA"),
        Skipped("onnx:cpu", "a.onnx", "broken"),
    ]
    with pytest.raises(ConfigError, match=rf"none \({said}\)") as error:
        require_candidates([], skipped[:count])
    assert error.value.exit_code == 2


# ---- what is timed when no model is named


@pytest.fixture
def no_artifacts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ARTIFACTS", tmp_path / "artifacts")


@pytest.mark.usefixtures("no_artifacts")
def test_what_lies_under_artifacts_is_taken_and_nothing_is_exported(
    make_onnx: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = make_onnx("artifacts/a.onnx")
    monkeypatch.setattr(module, "export", None)
    with default_models() as (paths, skipped, notes):
        assert (paths, skipped, notes) == ([BUNDLED_WEIGHTS, BUNDLED_ONNX, found], [], [])
    assert capsys.readouterr().err == "models: the bundled ones, and the 1 in artifacts/\n"


@pytest.mark.usefixtures("no_artifacts")
def test_two_commands_make_the_files_which_are_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **keywords: Any) -> Any:
        commands.append(command[1:])
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        for name in EXPORTED:
            (out / name).write_bytes(b"model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    with default_models() as (paths, skipped, notes):
        assert [path.name for path in paths[2:]] == list(EXPORTED)
        assert all(path.is_file() for path in paths)
        assert (skipped, notes) == ([], [EXPORTED_NOTE])
    assert not paths[-1].exists()
    assert [command[1] for command in commands] == ["training.prepare", "efficientface_export.cli"]
    assert "--no-int8-search" in commands[1]
    assert commands[1][commands[1].index("--weights") + 1] == str(BUNDLED_WEIGHTS)


@pytest.mark.usefixtures("no_artifacts")
def test_an_export_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "error: rich: expected ..., found it is not installed; pip install ..."

    def run(command: list[str], **keywords: Any) -> Any:
        return subprocess.CompletedProcess(command, 2, "", f"working\n{missing}\n")

    monkeypatch.setattr(module.subprocess, "run", run)
    with default_models() as (paths, skipped, notes):
        assert paths == [BUNDLED_WEIGHTS, BUNDLED_ONNX]
    assert [entry.model for entry in skipped] == list(EXPORTED)
    assert {entry.reason for entry in skipped} == {f"export: {missing}"}
    assert notes == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_artifacts")
def test_the_real_export_makes_both_files(tmp_path: Path) -> None:
    paths, skipped = module.export(tmp_path)
    assert skipped == []
    assert [path.name for path in paths] == list(EXPORTED)
    assert all(path.stat().st_size > 1e6 for path in paths)
