"""Execution providers: what was asked for runs, as it was asked for, or the error says why not."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from efficientface_deploy import load
from efficientface_deploy.backends import REGISTRY, BackendOptions
from efficientface_deploy.backends import onnx as onnx_module
from efficientface_deploy.backends.onnx import PROVIDERS, OnnxBackend
from efficientface_deploy.errors import BackendError
from efficientface_deploy.files import file_hash
from efficientface_deploy.probe import TOLERANCES
from efficientface_export.graph.io import read_onnx, write_onnx


def test_every_device_has_a_provider() -> None:
    assert tuple(PROVIDERS) == REGISTRY["onnx"].devices


def provider_error(path: Path, device: str) -> str:
    with pytest.raises(BackendError) as caught:
        load(path, backend=f"onnx:{device}")
    message = str(caught.value)
    assert message.startswith(f"backend onnx:{device}: expected {PROVIDERS[device].name}, found ")
    assert f"install {PROVIDERS[device].install} and its drivers" in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx", "openvino"])
def test_provider_that_is_not_here(model_files, device):
    provider = PROVIDERS[device]
    there = provider.name in onnxruntime.get_available_providers()
    if there or (provider.plugin and importlib.util.find_spec(provider.plugin)):
        pytest.skip(f"this onnxruntime has {device}")
    with pytest.raises(BackendError, match=f"onnx:{device}.*choose onnx:cpu"):
        load(model_files["onnx"], backend=f"onnx:{device}")


# --- sessions that only record how they are made --------------------------------------------------


class Recorded:
    """The arguments of the last session, which then runs on the CPU."""

    options: Any
    providers: list[tuple[str, dict[str, str]]]
    keywords: dict[str, Any]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """ONNX Runtime that has every provider, and gives each graph to the CPU."""
    seen = Recorded()
    make = onnxruntime.InferenceSession

    class Session:
        def __init__(self, path: str, sess_options: Any = None, providers: Any = (), **kw: Any):
            seen.options, seen.providers, seen.keywords = sess_options, list(providers), kw
            self._session = make(path, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [name for name, _ in seen.providers] + ["CPUExecutionProvider"]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    names = [provider.name for provider in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for provider in PROVIDERS.values():
        if provider.plugin:  # one that is installed stays out of it
            monkeypatch.setitem(sys.modules, provider.plugin, None)
    return seen


def copy_of(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    return copy


def test_waiting_threads_sleep(model_files: dict[str, Path], recorded: Recorded) -> None:
    load(model_files["onnx"], threads=2).close()
    key = "session.intra_op.allow_spinning"
    assert recorded.options.get_session_config_entry(key) == "0"
    assert recorded.options.intra_op_num_threads == 2


def test_options_of_cuda(model_files: dict[str, Path], recorded: Recorded) -> None:
    with load(model_files["onnx"], backend="onnx:cuda") as predictor:
        assert predictor.backend == "onnx:cuda"
    settings = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert recorded.providers == [("CUDAExecutionProvider", settings)]
    assert recorded.keywords["enable_fallback"] == 0


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", 1), ("tensorrt", 1), ("openvino", 0), ("cpu", 0)]
)
def test_cuda_of_pip_is_loaded_before_it_is_needed(
    model_files: dict[str, Path],
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
    expected: int,
) -> None:
    calls = []

    def preload() -> None:
        if not hasattr(recorded, "options"):  # there is no session yet
            calls.append(device)
        print("Failed to load libcublas.so.13")
        raise RuntimeError("no such directory")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    load(model_files["onnx"], backend=f"onnx:{device}").close()
    assert len(calls) == expected
    assert capsys.readouterr() == ("", "")


def test_onnxruntime_before_it_loads_cuda(
    model_files: dict[str, Path], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(onnxruntime, "preload_dlls", raising=False)
    load(model_files["onnx"], backend="onnx:cuda").close()


@pytest.mark.parametrize(
    ("file", "item"), [("onnx", "image:{}x64x64x3"), ("onnx-float", "input:{}x3x64x64")]
)
def test_options_of_tensorrt(
    model_files: dict[str, Path], recorded: Recorded, tmp_path: Path, file: str, item: str
) -> None:
    path = copy_of(model_files[file], tmp_path)
    with load(path, backend="onnx:tensorrt") as predictor:
        assert predictor._backend.max_batch == 32, "larger ones would have it build anew"
    folder = tmp_path / f"{path.name}.cache" / f"{file_hash(path)[:16]}-{onnxruntime.__version__}"
    assert folder.is_dir()
    ((name, settings),) = recorded.providers
    assert name == "TensorrtExecutionProvider"
    assert settings == {
        "trt_profile_min_shapes": item.format(1),
        "trt_profile_opt_shapes": item.format(1),
        "trt_profile_max_shapes": item.format(32),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    entry = recorded.options.get_session_config_entry("session.disable_cpu_ep_fallback")
    assert entry == "1", "a graph that TensorRT does not take as a whole is an error"


def test_options_of_tensorrt_for_rtx(
    model_files: dict[str, Path], recorded: Recorded, tmp_path: Path
) -> None:
    path = copy_of(model_files["onnx"], tmp_path)
    with load(path, backend="onnx:tensorrt-rtx"):
        pass
    ((name, settings),) = recorded.providers
    assert name == "NvTensorRTRTXExecutionProvider"
    assert settings["nv_profile_max_shapes"] == "image:32x64x64x3"
    assert settings["nv_runtime_cache_path"].startswith(f"{path}.cache/")


def test_large_batches_are_split_for_tensorrt(
    model_files: dict[str, Path], recorded: Recorded, tmp_path: Path
) -> None:
    path = copy_of(model_files["onnx"], tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    with load(path, backend="onnx:tensorrt") as split:
        found = split.infer(images)[1]
    with load(path) as whole:
        np.testing.assert_allclose(found, whole.infer(images)[1], atol=1e-5)


def test_engines_are_not_kept_where_nothing_can_be_written(
    model_files: dict[str, Path],
    recorded: Recorded,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = copy_of(model_files["onnx"], tmp_path)
    (tmp_path / f"{path.name}.cache").write_text("a file in its place")
    with caplog.at_level(logging.INFO), load(path, backend="onnx:tensorrt"):
        pass
    assert "trt_engine_cache_path" not in recorded.providers[0][1]
    assert "compiled engines are not kept" in caplog.text
    (tmp_path / f"{path.name}.cache").unlink()
    monkeypatch.setattr(onnx_module.os, "access", lambda path, mode: False)  # tests may be root
    with load(path, backend="onnx:tensorrt"):
        pass
    assert "trt_engine_cache_path" not in recorded.providers[0][1]


@pytest.mark.parametrize("threads", [None, 3])
@pytest.mark.parametrize(("device", "hint"), [("openvino", "f32"), ("openvino-bf16", "bf16")])
def test_options_of_openvino(
    model_files: dict[str, Path],
    recorded: Recorded,
    threads: int | None,
    device: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_module, "has_bf16", lambda: True)
    with load(model_files["onnx"], backend=f"onnx:{device}", threads=threads) as predictor:
        assert predictor.backend == f"onnx:{device}"
    ((_, settings),) = recorded.providers
    expected = {"INFERENCE_PRECISION_HINT": hint}
    expected |= {} if threads is None else {"INFERENCE_NUM_THREADS": "3"}
    assert json.loads(settings["load_config"]) == {"CPU": expected}


def test_bf16_is_allowed_what_it_rounds(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "has_bf16", lambda: True)
    allowed = []
    for device in ("openvino", "openvino-bf16"):
        with load(backend=f"onnx:{device}") as predictor:
            assert predictor.checked is not None
            allowed.append(predictor.checked.tolerance)
    assert allowed == [TOLERANCES["fp32"], TOLERANCES["bf16"]]


def test_bf16_needs_a_cpu_that_has_it(
    model_files: dict[str, Path], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "has_bf16", lambda: False)
    with pytest.raises(BackendError, match="a CPU that computes in BF16, found one without"):
        load(model_files["onnx"], backend="onnx:openvino-bf16")


def test_a_provider_that_is_built_in_needs_no_plugin(
    model_files: dict[str, Path], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin that lies beside it might have no device here."""
    monkeypatch.setattr(onnx_module, "_registered", set())
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", types.ModuleType("empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    with load(model_files["onnx"], backend="onnx:openvino") as predictor:
        assert predictor.backend == "onnx:openvino"


@pytest.mark.parametrize(
    ("precision", "target", "colour", "own_int8"),
    [
        ("int8", "gpu", "grey", False),
        ("int8", "gpu", "rgb", True),
        ("int8", "cpu", "grey", True),
        ("fp16", "gpu", "grey", True),
    ],
)
def test_openvinos_own_int8(
    model_files: dict[str, Path],
    recorded: Recorded,
    tmp_path: Path,
    precision: str,
    target: str,
    colour: str,
    own_int8: bool,
) -> None:
    file = read_onnx(model_files["onnx"])
    made = {"precision": precision, "target": target}
    write_onnx(file.graph, tmp_path / "model.onnx", file.spec.replace(colour=colour), made)
    with load(tmp_path / "model.onnx", backend="onnx:openvino"):
        pass
    ((_, settings),) = recorded.providers
    assert ("LP_TRANSFORMS_MODE" in settings["load_config"]) is not own_int8


@pytest.mark.parametrize("own", [None, "1"])
def test_tensorrt_is_told_no_tf32(
    model_files: dict[str, Path],
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", own or "")  # so that it is restored
    if own is None:
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    with load(copy_of(model_files["onnx"], tmp_path), backend="onnx:tensorrt"):
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == (own or "0")


def test_provider_that_gives_way_to_the_cpu(
    model_files: dict[str, Path], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Any = onnxruntime.InferenceSession
    monkeypatch.setattr(make, "get_providers", lambda self: ["CPUExecutionProvider"])
    assert "could not be started" in provider_error(model_files["onnx"], "cuda")


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "openvino"])
def test_provider_that_fails(
    model_files: dict[str, Path], recorded: Recorded, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("libcudnn.so.9: cannot open shared object file\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    message = provider_error(model_files["onnx"], device)
    assert "RuntimeError (libcudnn.so.9: cannot open shared object file)" in message


# --- plugins --------------------------------------------------------------------------------------


takes_plugins = pytest.mark.skipif(
    not hasattr(onnxruntime, "get_ep_devices"),
    reason=f"onnxruntime {onnxruntime.__version__} takes no plugins",
)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """NVIDIA's package as it is, with a library that does not load."""
    module = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.get_ep_name = lambda: "NvTensorRTRTXExecutionProvider"  # type: ignore[attr-defined]
    module.get_library_path = lambda: str(tmp_path / "plugin.so")  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(onnx_module, "_registered", set())
    return module


@takes_plugins
def test_plugin_that_does_not_load(
    model_files: dict[str, Path], plugin: types.ModuleType, tmp_path: Path
) -> None:
    """The real onnxruntime says so."""
    message = provider_error(model_files["onnx"], "tensorrt-rtx")
    assert "a plugin that fails (" in message
    assert f"{tmp_path}/plugin.so: cannot open shared object file" in message
    (tmp_path / "libcudart.so.12.9").write_bytes(b"no library")
    assert "libcudart.so.12.9" in provider_error(model_files["onnx"], "tensorrt-rtx")


@takes_plugins
def test_plugin_without_a_gpu(
    model_files: dict[str, Path], plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = []
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *pair: registered.append(pair)
    )
    for _ in range(2):  # onnxruntime refuses to register a plugin again
        message = provider_error(model_files["onnx"], "tensorrt-rtx")
        assert "its plugin, which wants an NVIDIA GPU with its driver and finds none" in message
    ((name, path),) = registered
    assert (name, Path(path).name) == ("NvTensorRTRTXExecutionProvider", "plugin.so")


def test_onnxruntime_that_knows_no_plugins(
    model_files: dict[str, Path], plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(onnxruntime, "get_ep_devices", raising=False)  # as 1.18 is
    assert "without plugins" in provider_error(model_files["onnx"], "tensorrt-rtx")


@takes_plugins
def test_plugin_is_given_its_first_device(
    plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another provider's, not one of another kind."""
    kinds = onnxruntime.OrtHardwareDeviceType

    def device(name: str, kind: Any) -> Any:
        return types.SimpleNamespace(ep_name=name, device=types.SimpleNamespace(type=kind))

    name = "NvTensorRTRTXExecutionProvider"
    there = [device("X", kinds.GPU), device(name, kinds.CPU), device(name, kinds.GPU)]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [*there, device(name, kinds.GPU)])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name])
    assert onnx_module._plugin_devices("tensorrt-rtx") == [there[2]]


def needs(module: str) -> Callable[..., Any]:
    missing = importlib.util.find_spec(module) is None
    package = module.replace("_", "-")
    return pytest.mark.skipif(missing, reason=f"needs {package}: pip install {package}")


@needs("onnxruntime_ep_nv_tensorrt_rtx")
def test_real_plugin_of_nvidia_without_a_driver(model_files: dict[str, Path]) -> None:
    try:
        message = provider_error(model_files["onnx"], "tensorrt-rtx")
    except pytest.fail.Exception:
        pytest.skip("this machine has a GPU")
    assert "libcuda" in message or "finds none on this machine" in message


@needs("onnxruntime_ep_openvino")
def test_real_plugin_of_intel(model_files: dict[str, Path]) -> None:
    """It runs the graph as a whole, in the file's precision, and again in the same process."""
    try:
        onnx_module._plugin_devices("openvino")
    except BackendError as error:
        if "which wants an Intel processor and finds none" not in str(error):
            raise
        pytest.skip("onnxruntime-ep-openvino has no device here: it wants an Intel processor")
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    with load(model_files["onnx"]) as reference:
        expected = reference.infer(images)[1]
    for _ in range(2):
        backend = OnnxBackend(model_files["onnx"], BackendOptions("openvino", threads=1))
        with backend:
            assert backend.name == "onnx:openvino"
            assert backend._session.get_providers()[0] == "OpenVINOExecutionProvider"
            output = backend.infer(images)
        np.testing.assert_allclose(output.probabilities, expected, atol=1e-4)
