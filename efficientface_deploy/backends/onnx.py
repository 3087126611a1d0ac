"""ONNX Runtime: CPU, CUDA, TensorRT, TensorRT for RTX and OpenVINO through one session."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import (
    FEATURES,
    FLOAT_INPUT,
    OUTPUTS,
    PROBE_KEY,
    UINT8_INPUT,
    external_files,
    provenance_from_metadata,
    read_onnx_input,
    read_onnx_metadata,
    spec_from_metadata,
)
from efficientface_deploy.backends.base import Backend, Output, import_library
from efficientface_deploy.cpus import default_threads, has_bf16
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.files import file_hash
from efficientface_deploy.probe import Probe
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: ONNX Runtime's name of it.
        install: The packages that bring it.
        plugin: Module of the package that brings it as a plugin, for an onnxruntime that was
            built without it.
        device: What the plugin runs on.
        whole_graph: Whether it is an error that it leaves a part of the graph to the CPU. CUDA
            leaves some on purpose.
    """

    name: str
    install: str
    plugin: str = ""
    device: str = ""
    whole_graph: bool = False


_OPENVINO = Provider(
    "OpenVINOExecutionProvider",
    "onnxruntime-ep-openvino beside onnxruntime, or onnxruntime-openvino in its place",
    plugin="onnxruntime_ep_openvino",
    device="an Intel processor",
    whole_graph=True,
)
BF16 = "openvino-bf16"  # rounds to BF16, whatever the file's precision; never taken by default

PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": Provider(
        "TensorrtExecutionProvider", "onnxruntime-gpu and tensorrt", whole_graph=True
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "onnxruntime 1.24 or newer with onnxruntime-ep-nv-tensorrt-rtx (for CUDA 13) or "
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        device="an NVIDIA GPU with its driver",
        whole_graph=True,
    ),
    "openvino": _OPENVINO,
    BF16: _OPENVINO,
}

# Batches that the engines of TensorRT's providers are built for: smallest, best, largest. Without
# them the provider builds again, for minutes, when a batch is smaller or larger than all before.
_BATCHES = {"min": 1, "opt": 1, "max": 32}

# Optimisations of ONNX Runtime's that mishandle Q/DQ pairs whose scales are FP16 (1.32, CPU). The
# first quantises biases with the product of two scales, which FP16 cannot hold: on FER+ it moved
# probabilities by 0.4 and changed 6 % of the labels. The second makes QLinearConcat, which takes
# FP32 scales alone, so that the file does not load. Without Q/DQ pairs they have nothing to do, and
# with FP32 scales they are wanted.
_UNSAFE_FOR_FP16_SCALES = ["WeightBiasQuantization", "QDQSelectorActionTransformer"]


class OnnxBackend(Backend):
    """Runs ``*.onnx`` files of ours; sessions of ONNX Runtime are thread-safe."""

    def _open(self) -> None:
        onnxruntime = import_library("onnxruntime")
        metadata = read_onnx_metadata(self.path)
        external_files(self.path)  # refuses what a library would read elsewhere
        self.spec = spec_from_metadata(metadata, self.path)
        self.provenance = provenance_from_metadata(metadata, self.path)
        self.probe = Probe.from_text(metadata.get(PROBE_KEY), self.path, self.spec.num_classes)
        device = self.options.device or "cpu"
        plugin_devices = find_provider(device)
        session = self._load(device, plugin_devices)
        try:
            self._check_signature(session)
        except UnicodeDecodeError:  # protobuf's texts are not checked before they are strings here
            fix = "copy the file again, or export the model again"
            raise ArtifactError(self.path, "names in UTF-8", "other bytes", fix) from None
        if len(session.get_outputs()) > len(OUTPUTS):
            self.feature_size = session.get_outputs()[-1].shape[1]
        self._input_name = session.get_inputs()[0].name
        self._session: Any = session
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong we raise, and print nothing
        self.name = f"onnx:{device}"
        self.rounding = "bf16" if device == BF16 else ""
        self.library = f"onnxruntime {onnxruntime.__version__}"
        self.instead = _instead(device)

    def _load(self, device: str, plugin_devices: list[Any]) -> Any:
        keywords: dict[str, Any] = {}
        # Only such files have INT8 convolutions in an FP32 graph.
        if (self.provenance.get("precision"), self.provenance.get("target")) != ("int8", "cpu"):
            keywords["disabled_optimizers"] = _UNSAFE_FOR_FP16_SCALES
        model: str | bytes = str(self.path)
        if not str(self.path).isprintable() and not external_files(self.path):
            model = self.path.read_bytes()  # its name may be no UTF-8
        try:
            return open_session(
                model,
                device,
                plugin_devices,
                threads=self.options.threads,
                settings=self._settings(device),
                **keywords,
            )
        except SessionError as error:
            expected = "an ONNX model that this onnxruntime can load"
            fix = "export the model again, or update onnxruntime"
            raise ArtifactError(self.path, expected, str(error), fix) from None

    def _settings(self, device: str) -> dict[str, str]:
        """The provider's options; what is not set here is as the provider has it."""
        if device == "cuda":
            # TF32 would round an FP32 file's products to ten bits. The default search times every
            # algorithm again for each batch size, and the first face of a size would wait for it.
            return {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        if PROVIDERS[device] is _OPENVINO:
            # The file's precision is what runs: by itself it takes BF16 where the CPU has it.
            settings = {"INFERENCE_PRECISION_HINT": "bf16" if device == BF16 else "f32"}
            made = self.provenance.get("precision"), self.provenance.get("target")
            if made == ("int8", "gpu") and self.spec.colour == "grey":
                # OpenVINO 2026.4 computes INT8 files for GPUs wrongly by its own INT8 where the
                # network sees grey (four tried of four), and wrongly without it where it sees
                # colour (three of three); those for CPUs it wants as they are.
                settings["LP_TRANSFORMS_MODE"] = "NO"
            if (threads := self.options.threads or default_threads()) is not None:
                settings["INFERENCE_NUM_THREADS"] = str(threads)
            return {"load_config": json.dumps({"CPU": settings})}
        if device in ("tensorrt", "tensorrt-rtx"):
            self.max_batch = _BATCHES["max"]
            if device == "tensorrt":
                # The provider allows TF32 and has no option against it (onnxruntime issue 26029);
                # NVIDIA's libraries read this when they are first used. Who set it, knows why.
                os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
            return self._tensorrt_settings("trt" if device == "tensorrt" else "nv")
        return {}

    def _tensorrt_settings(self, prefix: str) -> dict[str, str]:
        """Batches, and where compiled engines are kept; precision is the file's alone."""
        side = self.spec.input_size
        name = read_onnx_input(self.path)
        item = f"3x{side}x{side}" if name == FLOAT_INPUT else f"{side}x{side}x3"
        settings = {
            f"{prefix}_profile_{which}_shapes": f"{name}:{batch}x{item}"
            for which, batch in _BATCHES.items()
        }
        folder = _cache_folder(self.path)
        if folder is None:
            return settings
        if prefix == "nv":
            return {**settings, "nv_runtime_cache_path": str(folder)}
        kept = {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}
        return {**settings, **kept, "trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}

    def _check_signature(self, session: Any) -> None:
        """Refuse a graph whose inputs and outputs are not those that its spec promises."""
        side, classes = self.spec.input_size, self.spec.num_classes
        signatures = {
            UINT8_INPUT: ("tensor(uint8)", [side, side, 3]),
            FLOAT_INPUT: ("tensor(float)", [3, side, side]),
        }
        inputs, outputs = session.get_inputs(), session.get_outputs()
        names = tuple(output.name for output in outputs)
        widths = [list(output.shape[1:]) for output in outputs]
        valid = (
            len(inputs) == 1
            and inputs[0].name in signatures
            and (inputs[0].type, list(inputs[0].shape[1:])) == signatures[inputs[0].name]
            and not isinstance(inputs[0].shape[0], int)  # N is dynamic
            and names in (OUTPUTS, (*OUTPUTS, FEATURES))
            and all(output.type == "tensor(float)" for output in outputs)
            and widths[: len(OUTPUTS)] == [[classes]] * len(OUTPUTS)
            and all(len(width) == 1 and type(width[0]) is int for width in widths)
        )
        if not valid:
            described = [f"{node.name} {node.type} {node.shape}" for node in inputs + outputs]
            expected = f"uint8 image (N, {side}, {side}, 3) to {classes} logits and probabilities"
            fix = "export the model again with efficientface-export"
            found = "; ".join(described)[:200]
            raise ArtifactError(self.path, f"{expected}, as its spec says", found, fix)

    def _infer(self, images: UInt8Array) -> Output:
        return Output(*self._run(OUTPUTS, images))

    def _features(self, images: UInt8Array) -> Float32Array:
        (features,) = self._run((FEATURES,), images)
        return features

    def _run(self, outputs: tuple[str, ...], images: UInt8Array) -> list[Float32Array]:
        takes_floats = self._input_name == FLOAT_INPUT
        feed = {self._input_name: normalise(images, self.spec) if takes_floats else images}
        try:
            values: list[Float32Array] = self._session.run(outputs, feed, self._run_options)
            return values
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class of error per status
            expected = f"a batch of {len(images)} to run on {self.name}"
            found = f"{type(error).__name__} ({_first_line(error)})"
            fix = "give smaller batches, or export the model again"
            raise BackendError(self.path.name, expected, found, fix) from None

    def _close(self) -> None:
        self._session = None


class SessionError(Exception):
    """What ONNX Runtime says of a model that it cannot load."""


def find_provider(device: str) -> list[Any]:
    """Make an execution provider ready.

    Args:
        device: A key of :data:`PROVIDERS`.

    Returns:
        Its devices, where it is a plugin; else nothing.

    Raises:
        BackendError: It is not here.
    """
    import onnxruntime

    if device == BF16 and not has_bf16():
        found, fix = "one without", "choose onnx:openvino, which computes in the file's precision"
        raise BackendError(f"backend onnx:{device}", "a CPU that computes in BF16", found, fix)
    if device in ("cuda", "tensorrt"):
        _preload_cuda()
    plugin_devices = _plugin_devices(device)
    name = PROVIDERS[device].name
    if not plugin_devices and name not in onnxruntime.get_available_providers():
        raise _missing_provider(device, "one which this onnxruntime was not built with")
    return plugin_devices


def open_session(
    model: str | bytes,
    device: str,
    plugin_devices: list[Any],
    *,
    threads: int | None = None,
    settings: dict[str, str] | None = None,
    **keywords: Any,
) -> Any:
    """A session on the provider that is asked for, and on no other.

    Args:
        model: Path or content of an ONNX file.
        device: A key of :data:`PROVIDERS`.
        plugin_devices: From :func:`find_provider`.
        threads: On the CPU; None takes the CPUs that this process may use.
        settings: The provider's options.
        **keywords: Further arguments of the session.

    Raises:
        BackendError: The provider cannot be started.
        SessionError: The CPU's provider cannot load the model.
    """
    import onnxruntime

    provider = PROVIDERS[device]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong we raise; 1.18 would print it, too
    # By itself it counts the machine's cores, of which a container may have one.
    if (threads := threads or default_threads()) is not None:
        options.intra_op_num_threads = threads
    # Threads that wait by spinning: for a picture every 10 ms they took 14 ms of the CPU where
    # sleeping ones took 3, without a measurable difference in speed (benchmarks/runtime.py).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider.whole_graph:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    keywords["enable_fallback"] = 0  # no second try on the CPU
    if plugin_devices:
        options.add_provider_for_devices(plugin_devices, settings or {})
    else:
        keywords["providers"] = [(provider.name, settings or {})]
    try:
        session = onnxruntime.InferenceSession(model, sess_options=options, **keywords)
    except Exception as error:  # noqa: BLE001 - onnxruntime has a class of error per status
        found = f"{type(error).__name__} ({_first_line(error)})"
        if device == "cpu":
            raise SessionError(found) from None
        raise _missing_provider(device, found) from None
    # A GPU provider that cannot start is replaced by the CPU without an error.
    if provider.name not in session.get_providers():
        raise _missing_provider(device, "one which could not be started on this machine")
    return session


_registered: set[str] = set()


def _preload_cuda() -> None:
    """Load the CUDA and cuDNN that pip installed, which ONNX Runtime does not find by itself."""
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):  # it came with 1.21
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            onnxruntime.preload_dlls()
    except Exception as error:  # noqa: BLE001 - the session that needs them says what is missing
        said.write(_first_line(error))
    if said.getvalue():
        _log.debug("CUDA for ONNX Runtime: %s", said.getvalue().strip())


def _plugin_devices(device: str) -> list[Any]:
    """The devices of a provider that comes as a plugin; none where its package is not installed.

    Raises:
        BackendError: The package is there, and does not work or has no device on this machine.
    """
    import onnxruntime

    provider = PROVIDERS[device]
    if not provider.plugin or importlib.util.find_spec(provider.plugin) is None:
        return []
    if not hasattr(onnxruntime, "get_ep_devices"):
        raise _missing_provider(device, f"onnxruntime {onnxruntime.__version__}, without plugins")
    try:
        plugin = importlib.import_module(provider.plugin)
        # Registered for the whole process, once; where it finds no device it is not listed after.
        known = (*onnxruntime.get_available_providers(), *_registered)
        if provider.name not in known:
            _load_cuda_runtime(Path(plugin.get_library_path()).parent)
            onnxruntime.register_execution_provider_library(
                plugin.get_ep_name(), plugin.get_library_path()
            )
            _registered.add(provider.name)
    except Exception as error:  # noqa: BLE001 - onnxruntime has a class of error per status
        raise _missing_provider(device, f"a plugin that fails ({_first_line(error)})") from None
    kinds = onnxruntime.OrtHardwareDeviceType
    kind = kinds.CPU if provider is _OPENVINO else kinds.GPU
    for found in onnxruntime.get_ep_devices():
        if (found.ep_name, found.device.type) == (provider.name, kind):
            return [found]
    built_in = provider.name in onnxruntime.get_available_providers()
    if built_in and provider.name not in _registered:
        return []
    found = f"its plugin, which wants {provider.device} and finds none on this machine"
    raise _missing_provider(device, found)


def _load_cuda_runtime(folder: Path) -> None:
    """Load the CUDA runtime that a plugin brings, and does not find by itself (NVIDIA's 0.5.0)."""
    for library in folder.glob("libcudart.so.*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _cache_folder(path: Path) -> Path | None:
    """Where engines compiled from a file are kept: bound to its bytes and ONNX Runtime's release.

    Returns:
        ``model.onnx.cache/<hash>-<version>``, or None where it cannot be written.
    """
    import onnxruntime

    name = f"{file_hash(path)[:16]}-{onnxruntime.__version__}"
    folder = path.with_name(f"{path.name}.cache") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.info("%s: compiled engines are not kept (%s)", folder, error)
        return None
    if not os.access(folder, os.W_OK):
        _log.info("%s: compiled engines are not kept, since it cannot be written", folder)
        return None
    return folder


def _missing_provider(device: str, found: str) -> BackendError:
    provider = PROVIDERS[device]
    fix = f"install {provider.install} and its drivers, or choose onnx:cpu"
    return BackendError(f"backend onnx:{device}", provider.name, found, fix)


def _instead(device: str) -> str:
    """What to do where a provider computes a file wrongly."""
    if device != "cpu":
        return "choose onnx:cpu, or export the model in another precision or for another --target"
    # Before 1.30 FP16's QuantizeLinear truncates; on ARM, 1.23 sums FP16 wrongly and 1.32 does not.
    newer = "update onnxruntime (1.32 is right with each kind of file)"
    return f"{newer}, or export the model for --target cpu, or in another precision"


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its status, our path, and the place in its own source."""
    line = (str(error).strip() or "no message").splitlines()[0]
    line = line.rpartition("with error: ")[2]  # "Failed to load library <path> with error: ..."
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", line)
    return re.sub(r"/onnxruntime_src/\S+:\d+ .*?\) ", "", line)[:160]
