"""Making the probe of a file, and computing a graph as it is meant, whatever the engines here do.

The judge is the graph in FP32, on ONNX Runtime without any optimisation: Q/DQ pairs are then pairs
of plain operators, whose FP32 kernels are right in every release that we allow (FP16's
QuantizeLinear truncates before 1.30).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from efficientface_deploy.artifact import FLOAT_INPUT, OUTPUTS
from efficientface_deploy.probe import SIDE, TOLERANCES, Probe, differences, enlarge
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array, normalise
from efficientface_deploy.workbench.requirements import is_installed
from efficientface_export.graph.precision import to_fp32
from efficientface_export.int8.ranges import run_tensors
from efficientface_export.verification.reference import sheet_faces

PICTURES = 2


def make_probe(graph: onnx.ModelProto, spec: ModelSpec, precision: str) -> Probe | None:
    """Pictures and the logits that a graph must give for them.

    Of the bundled sheet's faces those are taken that show best what is to be found out: an exchange
    of red and blue, and a QuantizeLinear that truncates. Their blue is inverted, since faces are
    nearly grey, and a network that sees grey would hardly tell.

    Args:
        graph: The graph of the file, of any precision.
        spec: The model's.
        precision: ``fp32``, ``fp16`` or ``int8``.

    Returns:
        None where nothing here can run the graph, or its logits are not finite.
    """
    if not is_installed("onnxruntime"):
        return None
    faces = [face.resize((SIDE, SIDE), Image.Resampling.BOX) for face in sheet_faces()]
    pixels = np.stack([np.asarray(face) for face in faces])
    pixels[..., 2] = 255 - pixels[..., 2]
    images = enlarge(pixels, spec.input_size)  # (16, S, S, 3)
    infer = emulate(graph, spec)
    expected = infer(images)[0]  # (16, C)
    if not np.isfinite(expected).all():
        return None
    faults = [infer(np.ascontiguousarray(images[..., ::-1]))[0]]
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        faults.append(emulate(truncating(to_fp32(graph)), spec)(images)[0])
    shown = [differences(expected[:, None], fault[:, None]) for fault in faults]  # (16,) each
    chosen = np.sort(np.argsort(np.min(shown, axis=0))[-PICTURES:])
    return Probe(pixels[chosen], expected[chosen], TOLERANCES[precision])


Emulation = Callable[[UInt8Array], tuple[Float32Array, Float32Array]]


def emulate(graph: onnx.ModelProto, spec: ModelSpec) -> Emulation:
    """Compute a graph as it is meant: in FP32, operator by operator.

    Args:
        graph: Of any precision.
        spec: The model's.

    Returns:
        A function from images, uint8 (N, S, S, 3), to logits and probabilities, float32 (N, C).
    """
    exact = to_fp32(graph)
    takes_floats = exact.graph.input[0].name == FLOAT_INPUT

    def infer(images: UInt8Array) -> tuple[Float32Array, Float32Array]:
        fed = normalise(images, spec) if takes_floats else images
        parts = list(run_tensors(exact, OUTPUTS, fed, optimise=False))
        logits, probabilities = (np.concatenate([part[name] for part in parts]) for name in OUTPUTS)
        return logits, probabilities

    return infer


def truncating(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose QuantizeLinear rounds towards zero, as FP16's did before ONNX Runtime 1.30.

    Args:
        graph: FP32 with Q/DQ pairs.

    Returns:
        A new graph: half a step is taken off magnitudes before they are rounded.
    """
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph)
    del wrong.graph.node[:]
    half = numpy_helper.from_array(np.array(0.49999, np.float32), "truncating_half")
    wrong.graph.initializer.append(half)
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear":
            value, scale, *_ = node.input
            names = [f"{node.output[0]}_{part}" for part in ("sign", "step", "half", "less")]
            sign, step, excess, less = names
            wrong.graph.node.extend(
                [
                    helper.make_node("Sign", [value], [sign]),
                    helper.make_node("Mul", [sign, scale], [step]),
                    helper.make_node("Mul", [step, half.name], [excess]),
                    helper.make_node("Sub", [value, excess], [less]),
                ]
            )
            node = onnx.NodeProto.FromString(node.SerializeToString())
            node.input[0] = less
        wrong.graph.node.append(node)
    return wrong
