from __future__ import annotations

import argparse
import builtins
import importlib
import json
import logging
import os
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torchvision

from efficientface_deploy.artifact import PROVENANCE_KEY, SPEC_KEY, read_safetensors_metadata
from efficientface_deploy.errors import (
    ArtifactError,
    CheckpointError,
    EfficientFaceError,
    SpecError,
)
from efficientface_deploy.models import (
    EfficientFace,
    build_model,
    load_backbone,
    load_checkpoint,
    save_checkpoint,
)
from efficientface_deploy.models.checkpoint import read_weights
from efficientface_deploy.spec import PRESETS, preset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

SPEC = PRESETS["rafdb"].replace(input_size=64)
IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)


@pytest.fixture(scope="module")
def model(make_network):
    return make_network()


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    """The network's weights; a test may change the dictionary but not the tensors."""
    return dict(model.state_dict())


def upstream(
    path: Path, state: dict, prefix: str = "module.", legacy: bool = False, **more
) -> Path:
    """Save as the published training script does."""
    content = {"state_dict": OrderedDict((prefix + key, value) for key, value in state.items())}
    torch.save({**content, **more}, path, _use_new_zipfile_serialization=not legacy)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IMAGES)


def refused(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 700
    return message


# ---- what is accepted


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize(
    ("suffix", "legacy"), [(".pth.tar", False), (".tar", True), (".pth", False), (".pt", True)]
)
def test_published_checkpoint(tmp_path, model, state, prefix, legacy, suffix):
    path = upstream(tmp_path / f"model{suffix}", state, prefix, legacy)
    loaded, spec = load_checkpoint(str(path), preset="affectnet7")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert spec == preset("affectnet7")


def test_state_dict_alone(tmp_path, model, state):
    torch.save(state, tmp_path / "a.pth")
    assert torch.equal(logits(load_checkpoint(tmp_path / "a.pth")[0]), logits(model))


def test_reference_checkpoints(shared):
    for name, classes in (("efficientface_reference", 7), ("ferplus_prototype_96", 8)):
        _, spec = load_checkpoint(shared / f"reference/{name}.pth.tar")
        assert spec.num_classes == classes


def test_without_a_preset_labels_are_numbered(tmp_path, state):
    _, spec = load_checkpoint(upstream(tmp_path / "a.pth.tar", state))
    assert spec.labels == tuple(f"class {index}" for index in range(7))
    assert (spec.name, spec.mean) == ("a.pth.tar", preset("rafdb").mean)


def test_head_of_12666_identities(tmp_path):
    path = upstream(tmp_path / "pretrained.tar", EfficientFace(12_666).state_dict())
    model, spec = load_checkpoint(path)
    assert spec.num_classes == 12_666 and model.fc.out_features == 12_666
    assert "head of 7 classes" in refused(path, preset="rafdb")


def test_checkpoint_without_batch_counts(tmp_path, model, state):
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    loaded, _ = load_checkpoint(upstream(tmp_path / "a.tar", state))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_converted(tmp_path, model, state, dtype):
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    loaded, _ = load_checkpoint(upstream(tmp_path / "a.pth.tar", halves))
    assert loaded.fc.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.fc.weight, model.fc.weight, rtol=1e-2, atol=1e-2)


def test_parameters_with_gradients(tmp_path, model, state):
    state = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}
    loaded, _ = load_checkpoint(upstream(tmp_path / "a.pth.tar", state))
    assert torch.equal(logits(loaded), logits(model))


# ---- safetensors


@pytest.mark.parametrize(
    "spec", [SPEC, SPEC.replace(colour="grey", name="\u00e4\n", preliminary=True)]
)
def test_safetensors_round_trip(tmp_path, model, spec):
    path = tmp_path / "new" / "student.safetensors"
    save_checkpoint(path, model, spec, json.dumps({"epoch": 3}))
    loaded, own = load_checkpoint(path)
    assert own == spec
    assert torch.equal(logits(loaded), logits(model))
    assert read_safetensors_metadata(path)[PROVENANCE_KEY] == '{"epoch": 3}'
    assert os.listdir(path.parent) == ["student.safetensors"]


@pytest.fixture
def student(tmp_path, model) -> Path:
    path = tmp_path / "student.safetensors"
    save_checkpoint(path, model, SPEC)
    return path


def rewrite(path: Path, change, tensors: bytes | None = None) -> Path:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(raw)) + raw + (data[end:] if tensors is None else tensors)
    )
    return path


def set_spec(**changes):
    def change(header):
        fields = {**json.loads(SPEC.to_json()), **changes}
        header["__metadata__"][SPEC_KEY] = json.dumps(fields)

    return change


def test_preset_beside_an_own_spec(student):
    assert load_checkpoint(student, preset="caers")[1] == SPEC  # same labels
    with pytest.raises(ArtifactError, match="leave the preset out"):
        load_checkpoint(student, preset="ferplus")


def test_safetensors_without_a_spec(student, model):
    rewrite(student, lambda header: header.pop("__metadata__"))
    loaded, spec = load_checkpoint(student, preset="rafdb")
    assert spec == preset("rafdb")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"labels": ["a", "b"]}, "2 classes"),
        ({"labels": [str(index) for index in range(8)]}, "8 classes"),
        ({"architecture": "resnet50"}, "resnet50 with 7 classes"),
    ],
)
def test_spec_that_does_not_fit_the_weights(student, changes, hint):
    assert hint in refused(rewrite(student, set_spec(**changes)))


@pytest.mark.parametrize("changes", [{"mean": [0, 0]}, {"extra": 1}, {"schema": 2}, {"labels": 7}])
def test_tampered_spec(student, changes):
    with pytest.raises(SpecError, match=r"student\.safetensors"):
        load_checkpoint(rewrite(student, set_spec(**changes)))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["fc.weight"].update(shape=[1024, 7]),
        lambda header: header["fc.weight"].update(shape=[7, 1025]),
        lambda header: header["fc.weight"].update(shape=[2**40, 2**40]),
        lambda header: header["fc.weight"].update(dtype="F16"),
        lambda header: header["fc.weight"].update(dtype="I32"),
        lambda header: header["fc.weight"].update(dtype="Q7"),
        lambda header: header["fc.weight"].update(data_offsets=[0, 10**12]),
        lambda header: header["fc.weight"].update(data_offsets=[-4, 0]),
        lambda header: header["fc.weight"].pop("shape"),
        lambda header: header.pop("fc.weight"),
        lambda header: header.update({"fc2.weight": header.pop("fc.weight")}),
        lambda header: header.update({"local.conv9_1.weight": header.pop("local.conv1_1.weight")}),
        lambda header: header.update({"conv1.2.weight": header.pop("conv1.0.weight")}),
        lambda header: header["__metadata__"].update({SPEC_KEY: 3}),
        lambda header: header.update(__metadata__="text"),
    ],
)
def test_tampered_header(student, change):
    refused(rewrite(student, change))


def test_what_torch_cannot_map(student, monkeypatch):
    """Its errors are no OSErrors."""

    def refuse(*_, **__):
        raise RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"Too many open files \(24\)\); close other files"):
        load_checkpoint(student)


def test_truncated_safetensors(student):
    data = student.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        student.write_bytes(data[:end])
        refused(student)
    student.write_bytes(data + b"\0")
    refused(student)


def test_mutated_safetensors_give_a_model_or_an_error_of_ours(student):
    data = student.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3, 10))):
            damaged[rng.randrange(20_000)] = rng.randrange(256)
        student.write_bytes(damaged)
        try:
            load_checkpoint(student)
        except EfficientFaceError as error:
            assert str(error).isprintable()


# ---- foreign objects beside the weights


class RecorderMeter:
    """As the published script pickles it, from ``__main__``."""

    def __init__(self, epochs: int) -> None:
        self.total_epoch = epochs
        self.epoch_losses = np.zeros((epochs, 2), dtype=np.float32)
        self.epoch_accuracy = [np.float64(88.4), np.float32(1), np.int64(3)]


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


def beside_the_weights(model: EfficientFace) -> dict[str, object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    return {
        "recorder": RecorderMeter(5),
        "optimizer": optimizer.state_dict(),
        "arrays": [np.arange(4), np.array(["a", "b"]), np.array([1.5], dtype=">f8"), np.bool_(1)],
        "options": argparse.Namespace(lr=0.1, data=Path("/data")),
        "best": torch.tensor(88.4),
        "things": [Slots(), {1, 2}, b"bytes", 1j, 10**30, None, slice(1, 2), int, len],
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("name", ["recorder", "optimizer", "arrays", "options", "best", "things"])
def test_objects_beside_the_weights_are_left_alone(tmp_path, make_network, state, name, legacy):
    before = set(torch.serialization.get_safe_globals())
    more = {name: beside_the_weights(make_network())[name]}
    loaded, _ = load_checkpoint(upstream(tmp_path / "a.pth.tar", state, legacy=legacy, **more))
    assert torch.equal(loaded.fc.weight, state["fc.weight"])
    assert set(torch.serialization.get_safe_globals()) == before


class Calls:
    """Pickles as a call that the unpickler is to make."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


SPY = """
import builtins, pathlib
pathlib.Path({marker!r}).touch()
class Payload:
    def __init__(self): pathlib.Path({marker!r}).touch()
    def __setstate__(self, state): pathlib.Path({marker!r}).touch()
    def __reduce__(self): return (Payload, (), {{"state": 1}})
def payload(*arguments): pathlib.Path({marker!r}).touch()
"""


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that exists once a module ``spy`` was imported or its code run."""
    path = tmp_path / "executed"
    (tmp_path / "spy.py").write_text(SPY.format(marker=str(path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("spy", None)


def attacks(marker: Path) -> dict[str, object]:
    spy = importlib.import_module("spy")
    code = f"open({str(marker)!r}, 'w')"
    result = {
        "os.system": Calls(os.system, f"touch {marker}"),
        "exec": Calls(builtins.exec, code),
        "eval": Calls(builtins.eval, code),
        "open": Calls(builtins.open, str(marker), "w"),
        "subprocess": Calls(subprocess.Popen, ["touch", str(marker)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "import": Calls(importlib.import_module, "spy"),
        "torch.load": Calls(torch.load, str(marker)),
        "class": spy.Payload(),
        "function": Calls(spy.payload, 1),
        "function itself": spy.payload,
    }
    return result


ATTACKS = ["os.system", "exec", "eval", "open", "subprocess", "getattr", "import", "torch.load"]
ATTACKS += ["class", "function", "function itself"]


@pytest.mark.parametrize(
    ("place", "legacy"),
    [("beside", False), ("inside", False), ("alone", False), ("beside", True), ("alone", True)],
)
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_a_checkpoint_is_executed(tmp_path, state, marker, name, place, legacy):
    attack = attacks(marker)[name]
    path = tmp_path / "evil.pth.tar"
    if place == "alone":
        torch.save(attack, path, _use_new_zipfile_serialization=not legacy)
    elif place == "beside":
        upstream(path, state, legacy=legacy, attack=attack)
    else:
        upstream(path, {**state, "attack": attack}, legacy=legacy)
    del sys.modules["spy"]
    marker.unlink()

    # What it would do where it is trusted; without this the test could not fail.
    if name in ("class", "exec", "open", "import"):
        torch.load(path, weights_only=False)
        assert marker.exists()
        sys.modules.pop("spy", None)
        marker.unlink()

    try:
        loaded, _ = load_checkpoint(path)
    except CheckpointError:
        assert place == "alone" or name in ("os.system", "getattr")
    else:
        assert torch.equal(loaded.fc.weight, state["fc.weight"])
    assert not marker.exists()
    assert "spy" not in sys.modules


# ---- what is refused


@pytest.mark.parametrize("suffix", [".pth.tar", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"just text\n" * 50,
        b"\x00" * 4096,
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\x00" * 18,
        b"\x80\x02}q\x00.",
        b"\x80\x04\x95",
        b"<html>Google Drive - Quota exceeded</html>",
    ],
)
def test_file_of_another_kind(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
def test_truncated_checkpoint(tmp_path, state, legacy):
    path = upstream(tmp_path / "a.pth.tar", state, legacy=legacy)
    data = path.read_bytes()
    for end in (1, 3, 4, 30, 500, 5_000, len(data) // 2, len(data) - 100, len(data) - 1):
        path.write_bytes(data[:end])
        assert "damaged" in refused(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
def test_mutated_checkpoint_gives_a_model_or_an_error_of_ours(tmp_path, state, legacy):
    path = upstream(tmp_path / "a.pth.tar", state, legacy=legacy, recorder=RecorderMeter(2))
    data = path.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3, 10))):
            damaged[rng.randrange(30_000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except EfficientFaceError as error:
            assert str(error).isprintable()


def test_paths(tmp_path, state):
    assert "no such file" in refused(tmp_path / "missing.pth.tar")
    (tmp_path / "unpacked.pth.tar").mkdir()
    assert "a folder" in refused(tmp_path / "unpacked.pth.tar")
    path = upstream(tmp_path / "model.onnx", state)
    assert "suffix .onnx" in refused(path)
    assert "suffix none" in refused(path.rename(tmp_path / "model"))


def test_real_tar_archive(tmp_path, state):
    """What users make of a ``.tar`` that their desktop unpacked."""
    upstream(tmp_path / "data.pkl", state)
    path = tmp_path / "repacked.pth.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "data.pkl", "data.pkl")
    assert "never unpack" in refused(path)


def test_another_network(tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "a.pth")
    assert "another network (features.0.0.weight" in refused(tmp_path / "a.pth")
    torch.save(torchvision.models.shufflenet_v2_x1_0().state_dict(), tmp_path / "b.pth")
    assert "another network (conv1.0.weight" in refused(tmp_path / "b.pth")


def test_state_of_a_training(tmp_path, model):
    """What lies beside the weights, and is not them."""
    state = {"model": model.state_dict(), "identity": {}, "progress": {"step": 3}}
    torch.save(state, tmp_path / "last.pt")
    message = refused(tmp_path / "last.pt")
    assert "the state from which --resume goes on; give the student.safetensors" in message


def test_whole_pickled_model(tmp_path, model):
    torch.save(model, tmp_path / "a.pth")
    assert "a pickled object" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [3, [1], {}, {"state_dict": 3}, {"state_dict": {}}, {1: 2}])
def test_checkpoint_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


def test_one_number_that_stands_for_many_fills_no_memory(tmp_path, state):
    weight = torch.zeros(1, 1024).expand(2**30, 1024)  # a head of a billion classes: 4 TB
    for legacy in (False, True):
        path = upstream(tmp_path / "a.pth", {**state, "fc.weight": weight}, legacy=legacy)
        assert "fc.weight of shape (1073741824, 1024) in a file of" in refused(path)


def test_packed_checkpoint_is_not_unpacked(tmp_path, state):
    upstream(tmp_path / "a.pth", state)
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert "packed, which PyTorch never does" in refused(tmp_path / "b.pth")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archive(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    assert "foreign" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"conv1.0.weight": torch.zeros(29, 3, 5, 5)}, "conv1.0.weight (29, 3, 5, 5) instead of"),
        ({"fc.bias": torch.zeros(8)}, "fc.bias (8,) instead of (7,)"),
        ({"fc.weight": torch.zeros(7)}, "another network"),
        ({"fc.weight": torch.zeros(1, 1024)}, "another network"),
        ({"fc.weight": torch.full((7, 1024), torch.nan)}, "NaN or infinity in fc.weight"),
        ({"conv5.1.running_var": torch.full((1024,), torch.inf)}, "in conv5.1.running_var"),
        ({"fc.weight": torch.full((7, 1024), 1e300, dtype=torch.float64)}, "NaN or infinity"),
        ({"extra.weight": torch.zeros(3)}, "unknown extra.weight"),
        ({"conv1.0.weight": None}, "no conv1.0.weight"),
        ({"fc.bias": None}, "no fc.bias"),
        ({"fc.weight": None}, "another network"),
        ({"fc.weight": torch.zeros(7, 1024, dtype=torch.complex64)}, "torch.complex64"),
        ({"fc.weight": torch.zeros(7, 1024, dtype=torch.int8)}, "torch.int8"),
        ({"fc.weight": torch.zeros(7, 1024).to_sparse()}, "torch.sparse_coo"),
        ({"fc.weight": torch.zeros(7, 1024, device="meta")}, "on meta"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, state, changes, hint):
    state = {key: value for key, value in {**state, **changes}.items() if value is not None}
    assert hint in refused(upstream(tmp_path / "a.pth.tar", state))


def test_number_of_problems_is_told(tmp_path, state):
    for key in [key for key in state if key.startswith("stage4.")]:
        del state[key]
    assert "no stage4.0.branch1.0.weight and 69 more" in refused(upstream(tmp_path / "a.pt", state))


def test_torchs_advice_to_load_unsafely_is_not_passed_on(tmp_path, state):
    path = upstream(tmp_path / "a.pth.tar", state, attack=Calls(os.system, "true"))
    message = refused(path)
    assert "posix.system" in message
    assert "weights_only" not in message and "trusted" not in message


def test_unknown_preset(tmp_path, state):
    with pytest.raises(SpecError, match="'imagenet'"):
        load_checkpoint(upstream(tmp_path / "a.pth.tar", state), preset="imagenet")


# ---- starting from a checkpoint


def is_head(key: str) -> bool:
    return key.startswith("fc.")


def start_from(path: Path, spec=SPEC) -> tuple[dict, dict]:
    """A fresh network's state before and after it took over a checkpoint."""
    fresh = build_model(spec.architecture, spec.num_classes)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    load_backbone(fresh, spec, path)
    return before, dict(fresh.state_dict())


@pytest.mark.parametrize("classes", [12_666, 7])
def test_foreign_head_is_left(tmp_path, caplog, make_network, classes):
    source = make_network(classes).state_dict()
    with caplog.at_level(logging.INFO):
        before, after = start_from(upstream(tmp_path / "pretrained.tar", source))
    for key, value in after.items():
        assert torch.equal(value, before[key] if is_head(key) else source[key]), key
    assert "the head starts anew" in caplog.text


def test_head_of_the_same_labels_is_taken(student, state, caplog):
    with caplog.at_level(logging.INFO):
        _, after = start_from(student)
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert "took backbone and head" in caplog.text


def test_head_of_other_labels_is_left(student, state):
    reordered = SPEC.replace(labels=SPEC.labels[::-1])
    before, after = start_from(student, reordered)
    assert torch.equal(after["fc.weight"], before["fc.weight"])
    assert torch.equal(after["conv1.0.weight"], state["conv1.0.weight"])


def test_pretrained_ldg(tmp_path):
    source = torchvision.models.resnet18(num_classes=12_666)
    spec = SPEC.replace(architecture="resnet18")
    before, after = start_from(upstream(tmp_path / "a.tar", source.state_dict()), spec)
    for key, value in source.state_dict().items():
        if not is_head(key):
            assert torch.equal(after["backbone." + key], value)
    assert torch.equal(after["backbone.fc.weight"], before["backbone.fc.weight"])


def test_another_architecture(student):
    spec = SPEC.replace(architecture="resnet18")
    with pytest.raises(
        CheckpointError, match="weights of resnet18, found weights of efficientface"
    ):
        load_backbone(build_model("resnet18", 7), spec, student)


def test_failed_start_leaves_the_network_as_it_was(tmp_path, state):
    state["conv5.0.weight"] = torch.full_like(state["conv5.0.weight"], torch.nan)
    path = upstream(tmp_path / "a.tar", state)
    fresh = EfficientFace(7)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match="NaN"):
        load_backbone(fresh, SPEC, path)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_read_weights_drops_the_wrapper_and_keeps_the_rest(tmp_path, state):
    weights, spec = read_weights(upstream(tmp_path / "a.tar", state))
    assert spec is None
    assert weights.keys() == state.keys()
