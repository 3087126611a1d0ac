"""ONNX files that are not ours, or not whole, or meant to hurt: one line, and nothing more."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from fuzz_targets import SPEC, seeds

from efficientface_deploy import load
from efficientface_deploy.errors import ArtifactError, BackendError, EfficientFaceError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from efficientface_deploy.artifact import SPEC_KEY  # noqa: E402
from efficientface_deploy.spec import PRESETS  # noqa: E402

pytestmark = pytest.mark.timeout(60)

TRACED = PRESETS["rafdb"].replace(input_size=64)  # of the fixture model_files
PICTURE = np.zeros((32, 32, 3), np.uint8)
HUGE = 1 << 40


@pytest.fixture
def model() -> onnx.ModelProto:
    """A small graph of ours that works."""
    return onnx.load_from_string(seeds("onnx")[0])


@pytest.fixture
def refused(tmp_path, capfd):
    """The line that a file is refused with when it is loaded and run; nothing is printed."""

    def use(
        content: onnx.ModelProto | bytes, kind: type[EfficientFaceError] = ArtifactError
    ) -> str:
        path = tmp_path / "bad.onnx"
        data = content if isinstance(content, bytes) else content.SerializeToString()
        path.write_bytes(data)
        with pytest.raises(kind) as caught, load(path, threads=1) as predictor:
            predictor(PICTURE)
        message = str(caught.value)
        assert "bad.onnx" in message and message.isprintable() and len(message) < 800
        assert capfd.readouterr() == ("", "")
        return message

    return use


def test_the_graph_works_unchanged(model, tmp_path):
    onnx.save(model, tmp_path / "good.onnx")
    with load(tmp_path / "good.onnx") as predictor:
        assert predictor(PICTURE).label in SPEC.labels


def test_opset_that_is_not_known(model, refused):
    model.opset_import[0].version = 99
    message = refused(model)
    assert "Opset 99 is under development" in message and "update onnxruntime" in message
    assert "/onnxruntime_src/" not in message and message.count("bad.onnx") == 1
    del model.opset_import[:]
    assert "Missing opset" in refused(model)


def test_format_that_is_not_known(model, refused):
    model.ir_version = 99
    assert "Unsupported model IR version: 99" in refused(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2),
        ("architecture", "vgg"),
        ("labels", [*SPEC.labels[:-1], SPEC.labels[0]]),
        ("labels", SPEC.labels[1:]),
        ("input_size", 64),
        ("input_size", -32),
        ("mean", [float("nan")] * 3),
        ("std", [0, 1, 1]),
        ("colour", "bgr"),
        ("resize", "nearest"),
        ("face_crop", "tight"),
        ("name", None),
        ("preliminary", "no"),
        ("unknown", 1),
    ],
)
def test_every_field_of_the_spec_is_checked(model, refused, key, value):
    spec = {**json.loads(SPEC.to_json()), key: value}
    helper.set_model_props(model, {SPEC_KEY: json.dumps(spec)})
    message = refused(model, EfficientFaceError)
    assert key in message or "as its spec says" in message


@pytest.mark.parametrize("text", [b"int8", b"image", b"logits"])
def test_text_that_is_not_utf8(refused, text):
    """Found by fuzzing: ONNX Runtime hands out what Python cannot decode."""
    data = seeds("onnx")[1]
    assert text in data
    message = refused(data.replace(text, text[:-1] + b"\x95"), EfficientFaceError)
    assert "UTF-8" in message or "spec says" in message or "can load" in message


def test_error_that_is_not_utf8(model, refused):
    """Found by fuzzing: ONNX Runtime fell back to the CPU and said so on standard output."""
    model.graph.node[0].op_type = "Teleport"
    refused(model.SerializeToString().replace(b"Teleport", b"Telepor\xff"))


def test_file_cut_anywhere(refused):
    data = seeds("onnx")[0]
    for end in range(0, len(data), 11):
        refused(data[:end], EfficientFaceError)


@pytest.mark.parametrize("size", [2 << 30, 1 << 40])
def test_file_of_gigabytes_is_not_read(model, tmp_path, size):
    path = tmp_path / "sparse.onnx"
    onnx.save(model, path)
    os.truncate(path, size)
    with pytest.raises(ArtifactError, match="an ONNX model below 1 GiB"):
        load(path)


@pytest.mark.parametrize("dims", [(HUGE, HUGE), (-1, 7), (3, 8), (0,)])
def test_weights_of_absurd_shape(model, refused, dims):
    model.graph.initializer[0].dims[:] = dims
    refused(model)


@pytest.mark.parametrize("dims", [(HUGE,), (1 << 31,) * 3, (-5,)])
def test_node_that_asks_for_terabytes(model, refused, dims):
    """The size is computed while it runs, so that no check of the file could see it."""
    nodes = [
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Mul", ["batch", "dims"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["kept", "sum"], ["logits"]),
    ]
    weights = [("zero", np.array([0])), ("dims", np.array(dims))]
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in weights)
    (product,) = (node for node in model.graph.node if "logits" in node.output)
    product.output[0] = "kept"
    softmax = model.graph.node.pop()
    model.graph.node.extend([*nodes, softmax])
    assert "to run on onnx:cpu" in refused(model, BackendError)


# ---- weights in other files: refused here, since releases before 1.24 read any file


@pytest.fixture
def no_session(monkeypatch):
    """What is refused is refused before any library opens the file."""

    def opened(*arguments: object, **keywords: object) -> None:
        pytest.fail("a session was made")

    monkeypatch.setattr("onnxruntime.InferenceSession", opened)


def lie_outside(tensor: TensorProto, place: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("missing.bin", "weights in missing.bin, no such file"),
        ("/dev/zero", "weights at '/dev/zero'"),
        ("/etc/passwd", "weights at '/etc/passwd'"),
        ("../../../../../../etc/passwd", "weights at '../../../../../../etc/passwd'"),
        ("below/weights.bin", "weights at 'below/weights.bin'"),
        ("link.bin", "weights in link.bin, a link"),
        ("hard.bin", "weights in hard.bin, a link"),
        ("dead.bin", "weights in dead.bin, no such file"),
        ("folder", "weights in folder, a folder"),
        ("pipe", "weights in pipe, a pipe or device"),
        ("..\\..\\secret", "weights at"),
        ("C:secret", "weights at 'C:secret'"),
        ("*/_ORT_MEM_ADDR_/*", "weights at '*/_ORT_MEM_ADDR_/*'"),  # an address in memory
        ("weights.bin\0.png", "weights at"),
        ("", "weights at ''"),
        (".", "weights at '.'"),
    ],
)
def test_weights_that_lie_elsewhere(model, refused, tmp_path, place, found):
    (tmp_path / "below").mkdir()
    (tmp_path / "folder").mkdir()
    for name in ("below/weights.bin", "plain.bin"):
        (tmp_path / name).write_bytes(bytes(4096))
    (tmp_path / "link.bin").symlink_to("plain.bin")
    (tmp_path / "dead.bin").symlink_to("nowhere")
    os.link(tmp_path / "plain.bin", tmp_path / "hard.bin")
    os.mkfifo(tmp_path / "pipe")
    lie_outside(model.graph.initializer[0], place)
    assert found in refused(model)


def tensor_in(model: onnx.ModelProto, where: str) -> TensorProto:
    """A new tensor somewhere in a model, also where no graph of ours has one."""
    node = model.graph.node.add(op_type="If")
    places = {
        "initialiser": lambda: model.graph.initializer.add(),
        "sparse values": lambda: model.graph.sparse_initializer.add().values,
        "sparse indices": lambda: model.graph.sparse_initializer.add().indices,
        "attribute": lambda: node.attribute.add(name="value").t,
        "list": lambda: node.attribute.add(name="list").tensors.add(),
        "sparse attribute": lambda: node.attribute.add(name="s").sparse_tensor.values,
        "sparse list": lambda: node.attribute.add(name="s").sparse_tensors.add().indices,
        "branch": lambda: node.attribute.add(name="then_branch").g.initializer.add(),
        "branches": lambda: node.attribute.add(name="b").graphs.add().initializer.add(),
        "branch of a branch": lambda: (
            node.attribute.add(name="a")
            .g.node.add(op_type="If")
            .attribute.add(name="b")
            .g.node.add(op_type="Constant")
            .attribute.add(name="value")
            .t
        ),
        "function": lambda: (
            model.functions.add(name="f").node.add(op_type="Constant").attribute.add(name="value").t
        ),
        "default of a function": lambda: (
            model.functions.add(name="f").attribute_proto.add(name="value").t
        ),
        "training": lambda: model.training_info.add().initialization.initializer.add(),
        "training step": lambda: model.training_info.add().algorithm.initializer.add(),
    }
    assert set(places) == set(PLACES)
    return places[where]()


PLACES = (
    *("initialiser", "sparse values", "sparse indices", "attribute", "list", "sparse attribute"),
    *("sparse list", "branch", "branches", "branch of a branch", "function"),
    *("default of a function", "training", "training step"),
)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("where", PLACES)
def test_weights_that_lie_elsewhere_are_found_anywhere(model, refused, where):
    lie_outside(tensor_in(model, where), "../secret")
    assert "weights at '../secret'" in refused(model)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("key", ["basepath", "prepacked_0", "LOCATION", ""])
def test_keys_that_nobody_needs(model, refused, tmp_path, key):
    (tmp_path / "plain.bin").write_bytes(bytes(4096))
    lie_outside(model.graph.initializer[0], "plain.bin")
    model.graph.initializer[0].external_data.add(key=key, value="../secret")
    assert "by an unknown key" in refused(model)


@pytest.mark.usefixtures("no_session")
def test_last_of_two_places_counts_too(model, refused, tmp_path):
    (tmp_path / "plain.bin").write_bytes(bytes(4096))
    lie_outside(model.graph.initializer[0], "plain.bin")
    model.graph.initializer[0].external_data.add(key="location", value="../secret")
    assert "weights at '../secret'" in refused(model)


def test_number_of_a_field_beyond_32_bits(model, refused):
    """ONNX Runtime drops the bits above: such a field is the graph to it, and nothing to others."""
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = len(graph)
    assert size < 1 << 14
    header = bytes([0x80 | (7 << 3 | 2), 0x80, 0x80, 0x80, 0x10, 0x80 | size & 0x7F, size >> 7])
    hidden = model.SerializeToString() + header + graph
    assert onnxruntime.InferenceSession(hidden, providers=["CPUExecutionProvider"]).get_inputs()
    assert "found something else" in refused(hidden)


@pytest.mark.usefixtures("no_session")
def test_part_that_others_compiled(model, refused):
    """An EPContext node names a file with machine code, or holds it."""
    node = model.graph.node.add(op_type="EPContext", domain="com.microsoft")
    node.attribute.add(name="ep_cache_context", s=b"../engine")
    assert "compiled already (EPContext)" in refused(model)


@pytest.mark.usefixtures("no_session")
def test_parts_in_parts_without_end(model, refused):
    graph = model.graph
    for _ in range(60):
        graph = graph.node.add(op_type="If").attribute.add(name="location").g
    assert "more parts in parts" in refused(model)


def test_weights_in_a_file_beside_it_are_read(model, tmp_path):
    expected = PICTURE + 100
    onnx.save(model, tmp_path / "one.onnx")
    weight = model.graph.initializer[0]
    (tmp_path / "weights.bin").write_bytes(weight.raw_data)
    lie_outside(weight, "weights.bin")
    onnx.save(model, tmp_path / "two.onnx")
    with load(tmp_path / "one.onnx") as one, load(tmp_path / "two.onnx") as two:
        assert one(expected) == two(expected)


def test_operator_of_others(model, refused):
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    refused(model)


class Touch:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["onnx", "engine", "rtx.engine", "safetensors", "pth.tar", "pt"])
def test_pickle_under_any_name_is_refused_and_not_run(tmp_path, suffix):
    executed, path = tmp_path / "executed", tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(Touch(executed)))
    with pytest.raises(EfficientFaceError) as caught:
        load(path)
    assert str(caught.value).isprintable() and not executed.exists()
    pickle.loads(path.read_bytes())  # what it would have done
    assert executed.exists()


# ---- graphs of ours that somebody changed


@pytest.fixture
def graph(model_files):
    return onnx.load(model_files["onnx"])


@pytest.fixture
def open_graph(tmp_path):
    def open_(graph) -> str:
        """The error's line for a changed graph."""
        path = tmp_path / "changed.onnx"
        onnx.save(graph, path)
        with pytest.raises(EfficientFaceError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and message.isprintable() and len(message) < 800
        return message

    return open_


def set_metadata(graph, **values: str | None) -> None:
    metadata = {item.key: item.value for item in graph.metadata_props}
    for key, value in values.items():
        metadata["efficientface." + key] = value
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        (None, "efficientface-export, which writes it"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{}", "no architecture"),
        (TRACED.replace(labels=("a", "b")).to_json(), "to 2 logits"),
        (TRACED.replace(labels=(*TRACED.labels, "Contempt")).to_json(), "to 8 logits"),
        (TRACED.replace(input_size=96).to_json(), "(N, 96, 96, 3)"),
        (TRACED.to_json().replace('"rgb"', '"bgr"'), "ModelSpec.colour"),
        (TRACED.to_json().replace('"schema": 1', '"schema": 2'), "ModelSpec.schema"),
        (TRACED.to_json().replace(', "Anger"', ""), "to 6 logits"),
        (TRACED.to_json().replace("{", r'{"\u001b[2J\n": 1, ', 1), "unknown key"),
    ],
)
def test_tampered_onnx_spec(graph, open_graph, spec, hint):
    set_metadata(graph, spec=spec)
    assert hint in open_graph(graph)


@pytest.mark.parametrize("provenance", ["", "[]", "{", "3"])
def test_tampered_onnx_provenance(graph, open_graph, provenance):
    set_metadata(graph, provenance=provenance)
    assert "efficientface.provenance" in open_graph(graph)


def test_onnx_without_provenance(graph, tmp_path):
    set_metadata(graph, provenance=None)
    onnx.save(graph, tmp_path / "a.onnx")
    with load(tmp_path / "a.onnx") as predictor:
        assert predictor.provenance == {}


def small_graph(inputs, outputs, nodes):
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", 19)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    set_metadata(model, spec=TRACED.to_json())
    return model


def tensor(name: str, kind: int, *shape: int | str):
    return onnx.helper.make_tensor_value_info(name, kind, shape)


FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        (FLOAT, "image", ("N", 64, 64, 3)),
        (UINT8, "pixels", ("N", 64, 64, 3)),
        (UINT8, "image", ("N", 3, 64, 64)),
        (UINT8, "image", (1, 64, 64, 3)),
        (UINT8, "image", ("N", "H", "W", 3)),
        (UINT8, "image", (64,)),
    ],
)
def test_onnx_with_other_inputs(open_graph, kind, name, shape):
    zeros = onnx.helper.make_node("Cast", ["shape"], ["count"], to=FLOAT)
    nodes = [
        onnx.helper.make_node("Shape", [name], ["shape"]),
        zeros,
        onnx.helper.make_node("Identity", ["count"], ["logits"]),
        onnx.helper.make_node("Identity", ["count"], ["probabilities"]),
    ]
    outputs = [tensor("logits", FLOAT, "n"), tensor("probabilities", FLOAT, "n")]
    message = open_graph(small_graph([tensor(name, kind, *shape)], outputs, nodes))
    assert "as its spec says" in message and f"found {name} tensor" in message


@pytest.mark.parametrize("change", ["input", "outputs", "order", "type", "rank", "fourth"])
def test_onnx_with_another_signature(graph, open_graph, change):
    if change == "input":
        graph.graph.input.append(tensor("extra", FLOAT, 1))
    elif change == "outputs":
        del graph.graph.output[1]
    elif change == "order":
        outputs = list(graph.graph.output)[::-1]
        del graph.graph.output[:]
        graph.graph.output.extend(outputs)
    elif change == "rank":  # of the features
        graph.graph.output[2].CopyFrom(tensor("pool:0", FLOAT, "N", 1024, 1, 1))
        graph.graph.node.add(op_type="Identity", input=["pool:0"], output=["again"])
    elif change == "fourth":
        graph.graph.output.append(tensor("pool:0", FLOAT, "N", 1024, 1, 1))
    else:
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert "as its spec says" in open_graph(graph)


def test_onnx_that_fails_while_it_runs(tmp_path):
    """The declared shape is a promise that a graph may break."""
    nodes = [
        onnx.helper.make_node("Constant", [], ["five"], value_ints=[5, 7]),
        onnx.helper.make_node("Cast", ["image"], ["float"], to=FLOAT),
        onnx.helper.make_node("Reshape", ["float", "five"], ["logits"]),
        onnx.helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    outputs = [tensor("logits", FLOAT, "N", 7), tensor("probabilities", FLOAT, "N", 7)]
    model = small_graph([tensor("image", UINT8, "N", 64, 64, 3)], outputs, nodes)
    onnx.save(model, tmp_path / "broken.onnx")
    with load(tmp_path / "broken.onnx") as predictor, pytest.raises(BackendError) as caught:
        predictor.infer(np.zeros((2, 64, 64, 3), np.uint8))
    assert "broken.onnx" in str(caught.value) and str(caught.value).isprintable()


def test_onnx_with_nan_weights(graph, tmp_path):
    for initializer in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        if values.dtype == np.float32 and values.size == 7 * 1024:
            initializer.CopyFrom(
                onnx.numpy_helper.from_array(np.full_like(values, np.nan), initializer.name)
            )
    onnx.save(graph, tmp_path / "nan.onnx")
    with (
        load(tmp_path / "nan.onnx") as predictor,
        pytest.raises(BackendError, match="finite outputs, found NaN"),
    ):
        predictor.infer(np.zeros((2, 64, 64, 3), np.uint8))


def test_onnx_with_an_unknown_operator(graph, open_graph):
    graph.graph.node[0].op_type = "Teleport"
    assert "an ONNX model that this onnxruntime can load" in open_graph(graph)


def test_truncated_onnx_never_loads(model_files, tmp_path):
    data = model_files["onnx"].read_bytes()
    path = tmp_path / "a.onnx"
    for end in np.linspace(1, len(data) - 1, 12).astype(int):
        path.write_bytes(data[:end])
        with pytest.raises(ArtifactError):
            load(path)
