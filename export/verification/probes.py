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

# Parts of a quantisation step by which values move towards zero before they are rounded: what
# truncation is, and a little, which stands for the other order of summation of a right engine. On
# six networks, CPU and GPU files, such an engine moved the logits of the 16 faces by 0.010 to 0.175
# of their spread, this by 0.015 to 0.205, most on random weights: so a probe knows its own noise.
TRUNCATION = 0.49999
_DISTURBANCE = 0.01
_MARGIN = 2.5  # of the tolerance above that noise
_BELOW_TRUNCATION = 0.6  # the tolerance, where few layers are rounded and truncation moves little


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

    def infer(graph: onnx.ModelProto, images: UInt8Array) -> Float32Array:
        return emulate(graph, spec)(images)[0]  # (16, C)

    exact = to_fp32(graph)
    expected = infer(exact, images)
    if not np.isfinite(expected).all():
        return None
    faults = [infer(exact, np.ascontiguousarray(images[..., ::-1]))]
    rounds = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    if rounds:
        faults.append(infer(shift_rounding(exact, TRUNCATION), images))
    shown = [np.square(fault - expected).mean(axis=1) for fault in faults]  # (16,) each
    chosen = np.sort(np.argsort(np.min(shown, axis=0))[-PICTURES:])
    tolerance = TOLERANCES[precision]
    if rounds:
        disturbed = infer(shift_rounding(exact, _DISTURBANCE), images)
        noise = float(differences(expected[None], disturbed[None])[0])
        wrong = float(differences(expected[None, chosen], faults[1][None, chosen])[0])
        tolerance = max(min(tolerance, _BELOW_TRUNCATION * wrong), _MARGIN * noise)
    return Probe(pixels[chosen], expected[chosen], round(tolerance, 6))


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


def shift_rounding(graph: onnx.ModelProto, steps: float) -> onnx.ModelProto:
    """A graph whose QuantizeLinear takes a part of a step off magnitudes before it rounds them.

    Args:
        graph: FP32 with Q/DQ pairs.
        steps: The part; :data:`TRUNCATION` is what FP16's did before ONNX Runtime 1.30.

    Returns:
        A new graph.
    """
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph)
    del wrong.graph.node[:]
    part = numpy_helper.from_array(np.array(steps, np.float32), "shifted_part")
    wrong.graph.initializer.append(part)
    for original in graph.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type == "QuantizeLinear":
            value, scale, *_ = node.input
            sign, step, excess, less = (f"{node.output[0]}_shifted{at}" for at in range(4))
            wrong.graph.node.extend(
                [
                    helper.make_node("Sign", [value], [sign]),
                    helper.make_node("Mul", [sign, scale], [step]),
                    helper.make_node("Mul", [step, part.name], [excess]),
                    helper.make_node("Sub", [value, excess], [less]),
                ]
            )
            node.input[0] = less
        wrong.graph.node.append(node)
    return wrong
