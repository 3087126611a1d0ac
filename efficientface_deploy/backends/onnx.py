"""ONNX Runtime: CPU, CUDA, TensorRT and OpenVINO through one session."""

from __future__ import annotations

import re
from typing import Any

from efficientface_deploy.artifact import (
    FLOAT_INPUT,
    OUTPUTS,
    UINT8_INPUT,
    provenance_from_metadata,
    require_file,
    spec_from_metadata,
)
from efficientface_deploy.backends.base import Backend, Output
from efficientface_deploy.errors import ArtifactError, BackendError
from efficientface_deploy.preprocess import UInt8Array, normalise

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_PACKAGES = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu and tensorrt",
    "openvino": "onnxruntime-openvino",
}


# Optimisations of ONNX Runtime's that mishandle Q/DQ pairs whose scales are FP16 (1.32, CPU). The
# first quantises biases with the product of two scales, which FP16 cannot hold: on FER+ it moved
# probabilities by 0.4 and changed 6 % of the labels. The second makes QLinearConcat, which takes
# FP32 scales alone, so that the file does not load.
_UNSAFE_FOR_FP16_SCALES = ["WeightBiasQuantization", "QDQSelectorActionTransformer"]


class OnnxBackend(Backend):
    """Runs ``*.onnx`` files of ours; sessions of ONNX Runtime are thread-safe."""

    def _open(self) -> None:
        import onnxruntime

        require_file(self.path, "an ONNX model")
        device = self.options.device or "cpu"
        provider = PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise _missing_provider(device, "which this onnxruntime was not built with")
        # Without Q/DQ pairs these optimisations have nothing to do, and with FP32 scales they are
        # wanted; but what the file is stands in its metadata, which only a session can read.
        session = self._load(provider, disabled_optimizers=_UNSAFE_FOR_FP16_SCALES)
        # A GPU provider that cannot start is replaced by the CPU without an error.
        if provider not in session.get_providers():
            raise _missing_provider(device, "which could not be started on this machine")
        self._read(session)
        if self._has_fp32_scales():
            session = self._load(provider)
        self._takes_floats = session.get_inputs()[0].name == FLOAT_INPUT
        self._input_name = session.get_inputs()[0].name
        self._session: Any = session
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong we raise, and print nothing
        self.name = f"onnx:{device}"

    def _read(self, session: Any) -> None:
        """Spec and provenance from the metadata, and whether the graph is what they say."""
        try:
            metadata = session.get_modelmeta().custom_metadata_map
            self.spec = spec_from_metadata(metadata, self.path)
            self.provenance = provenance_from_metadata(metadata, self.path)
            self._check_signature(session)
        except UnicodeDecodeError:  # protobuf's texts are not checked before they are strings here
            raise ArtifactError(
                self.path,
                expected="metadata and names in UTF-8",
                found="other bytes",
                fix="copy the file again, or export the model again",
            ) from None

    def _load(self, provider: str, **keywords: Any) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; what matters of them we raise ourselves
        if self.options.threads is not None:
            options.intra_op_num_threads = self.options.threads
        try:
            return onnxruntime.InferenceSession(
                str(self.path),
                sess_options=options,
                providers=[provider],
                enable_fallback=0,  # to another provider, with a note on standard output
                **keywords,
            )
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class of error per status
            raise ArtifactError(
                self.path,
                expected="an ONNX model that this onnxruntime can load",
                found=f"{type(error).__name__} ({_first_line(error)})",
                fix="export the model again, or update onnxruntime",
            ) from None

    def _has_fp32_scales(self) -> bool:
        """Whether the file's INT8 convolutions sit in an FP32 graph."""
        kind = (self.provenance.get("precision"), self.provenance.get("target"))
        return kind == ("int8", "cpu")

    def _check_signature(self, session: Any) -> None:
        """Refuse a graph whose inputs and outputs are not those that its spec promises."""
        side, classes = self.spec.input_size, self.spec.num_classes
        signatures = {
            UINT8_INPUT: ("tensor(uint8)", [side, side, 3]),
            FLOAT_INPUT: ("tensor(float)", [3, side, side]),
        }
        inputs, outputs = session.get_inputs(), session.get_outputs()
        valid = (
            len(inputs) == 1
            and inputs[0].name in signatures
            and (inputs[0].type, list(inputs[0].shape[1:])) == signatures[inputs[0].name]
            and not isinstance(inputs[0].shape[0], int)  # N is dynamic
            and tuple(output.name for output in outputs) == OUTPUTS
            and all(output.type == "tensor(float)" for output in outputs)
            and all(list(output.shape[1:]) == [classes] for output in outputs)
        )
        if not valid:
            described = [f"{node.name} {node.type} {node.shape}" for node in inputs + outputs]
            raise ArtifactError(
                self.path,
                expected=f"uint8 image (N, {side}, {side}, 3) to {classes} logits and "
                "probabilities, as its spec says",
                found="; ".join(described)[:200],
                fix="export the model again with efficientface-export",
            )

    def _infer(self, images: UInt8Array) -> Output:
        feed: Any = normalise(images, self.spec) if self._takes_floats else images
        try:
            logits, probabilities = self._session.run(
                OUTPUTS, {self._input_name: feed}, self._run_options
            )
        except Exception as error:  # noqa: BLE001 - onnxruntime has a class of error per status
            raise BackendError(
                self.path.name,
                expected=f"a batch of {len(images)} to run on {self.name}",
                found=f"{type(error).__name__} ({_first_line(error)})",
                fix="give smaller batches, or export the model again",
            ) from None
        return Output(logits, probabilities)

    def _close(self) -> None:
        self._session = None


def _missing_provider(device: str, found: str) -> BackendError:
    return BackendError(
        f"backend onnx:{device}",
        expected=PROVIDERS[device],
        found=f"a provider {found}",
        fix=f"install {_PACKAGES[device]} and its drivers, or choose onnx:cpu",
    )


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its status, our path, and the place in its own source."""
    line = (str(error).strip() or "no message").splitlines()[0]
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", line)
    return re.sub(r"/onnxruntime_src/\S+:\d+ .*?\) ", "", line)[:160]
