"""Hostile inputs: every kind of file, line and request that the product takes from others.

A case is drawn from (seed, group, number): ``python tests/campaign/inputs.py GROUP NUMBER SEED``
tries one alone, and keeps its files. It counts as right if the product answers, as refused if it
says in one line what is wrong; anything else fails: see ``trial``.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import random
import socket
import struct
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python then looks for modules in this folder only
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

import av
import fuzz_targets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz_targets import damage
from PIL import Image
from row import Row
from trial import Group, command, in_a_child, run_group, try_case

from benchmarks.report import __main__ as report
from efficientface_deploy import cli, load, open_video
from efficientface_deploy.artifact import SPEC_KEY, external_files, read_onnx_metadata
from efficientface_deploy.batch import cli as annotate
from efficientface_deploy.batch.source import find_pictures
from efficientface_deploy.models import EfficientFace, load_checkpoint, save_checkpoint
from efficientface_deploy.spec import PRESETS
from efficientface_deploy.vision.preprocess import load_image
from efficientface_deploy.web import server
from efficientface_deploy.workbench.dataset import iterate_batches, read_dataset
from efficientface_export import cli as export
from efficientface_export.verification.reference import read_reference
from training import compare, evaluate, explain, prepare, student, teacher

SPEC = PRESETS["rafdb"].replace(input_size=32, name="campaign")
HUGE = (0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**70, 1e308, float("nan"), float("inf"), 10**5000)
TEXTS = (
    *("", " ", "\0", "a\nb", "\x1b[31mred\x1b[0m", "\u202eexe", "\udcff", "é" * 300, "x" * 5000),
    *("../../secret/x", "/etc/passwd", "secret/../../x", "con", "-", "--", "%s%n", "$(touch x)"),
    *("http://127.0.0.1:9/x.jpg", "file:///etc/passwd", "\ufeffBOM", "NaN", "1e999", "-0", "²"),
)
NAMES = (
    *(
        "a\nb.jpg",
        "\x1b[31m.jpg",
        "a b.jpg",
        "-n.jpg",
        "é.jpg",
        "\u202egpj.jpg",
        "x" * 250 + ".jpg",
    ),
    *("a.JPG", ".jpg", "a.jpg.exe", "\udcff.jpg", "'; rm -rf ~.jpg", "{0}.jpg", "%d.jpg", "*.jpg"),
)


# ---- what is drawn


def draw_json(value: Any, rng: random.Random) -> str:
    """A JSON text with one to three hostile values in the place of others, or damaged as text."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _replace_one(value, rng)
    text = json.dumps(value)
    match rng.randrange(12):
        case 0:
            return damage(text.encode(), rng).decode("latin-1")
        case 1:
            return "[" * rng.choice((500, 100_000)) + text
        case 2:
            return '{"a":' * 50_000 + "1" + "}" * 50_000
        case 3:
            return text[: rng.randrange(len(text))]
        case 4:
            return "\ufeff" + text
        case _:
            return text


def _replace_one(value: Any, rng: random.Random) -> Any:
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = _replace_one(value[key], rng)
        return value
    return rng.choice(
        (*HUGE[:-1], *TEXTS[:14], None, True, [], {}, [[]], [value] * 3, {"a": value}, -5, 0.5)
    )


def write_json(path: Path, value: Any, rng: random.Random) -> None:
    """Write what :func:`draw_json` gives, in UTF-8 as a rule."""
    encoding = rng.choice(("utf-8",) * 8 + ("utf-16", "latin-1", "utf-8-sig"))
    path.write_bytes(draw_json(value, rng).encode(encoding, "replace"))


def special_file(path: Path, rng: random.Random) -> None:
    """No usual file: a folder, a pipe, a link to nowhere, to itself, to a device, a sparse one."""
    path.unlink(missing_ok=True)
    match rng.randrange(8):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to("nowhere")
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to("/dev/zero")
        case 5:
            path.symlink_to("/proc/self/mem")
        case 6:
            with path.open("wb") as file:
                file.truncate(rng.choice((5 << 30, 1 << 42)))
        case 7:
            path.write_bytes(b"")


def write_zip(path: Path, members: dict[str, bytes], rng: random.Random) -> None:
    """A zip archive; often with members that no data set has, or damaged."""
    members = dict(members)
    kind = rng.randrange(10)
    if kind < 3:
        members[rng.choice(("../../secret/x.jpg", "/tmp/secret.jpg", *NAMES[:5]))] = b"x"
    method = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name.encode(errors="replace").decode(), content)
        if kind == 3 and rng.random() < 0.3:  # a bomb, in the place of a file that is read
            with archive.open(rng.choice(list(members)), "w", force_zip64=True) as file:
                for _ in range(rng.choice((300, 800))):
                    file.write(bytes(1 << 20))
        if kind == 4:
            link = zipfile.ZipInfo(rng.choice(list(members)) + "2.jpg")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    if kind > 7:
        path.write_bytes(damage_end(path.read_bytes(), rng))


def damage_end(data: bytes, rng: random.Random) -> bytes:
    """Damage within the last or the first bytes, where archives and weights have their tables."""
    cut = min(len(data), rng.choice((100, 600, 4000)))
    if rng.random() < 0.5:
        return data[:-cut] + damage(data[-cut:], rng)
    return damage(data[:cut], rng) + data[cut:]


# ---- valid files


def make_seeds(folder: Path) -> None:
    """Write valid files of each kind."""
    for number, data in enumerate(fuzz_targets.seeds("image")):
        (folder / f"image-{number}").write_bytes(data)
    for number, data in enumerate(fuzz_targets.seeds("onnx")):
        (folder / f"{number}.onnx").write_bytes(data)
    (folder / "sidecar.json").write_bytes(*fuzz_targets.seeds("sidecar"))
    row, column = np.mgrid[0:48, 0:48]
    pixels = np.stack([row * 5, column * 5, row + column], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "face.jpg")
    for suffix, codec in {"mp4": "mpeg4", "avi": "mjpeg", "mkv": "mpeg4", "flv": "flv"}.items():
        with av.open(str(folder / f"video.{suffix}"), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 48, 48
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    torch.manual_seed(0)
    model = EfficientFace(SPEC.num_classes).eval()
    save_checkpoint(folder / "model.safetensors", model, SPEC)
    for name, new in {"new.pth.tar": True, "old.pth.tar": False}.items():
        content = {"state_dict": model.state_dict(), "epoch": 3}
        torch.save(content, folder / name, _use_new_zipfile_serialization=new)


# ---- pictures


@functools.cache
def _predictor() -> Any:
    return load(threads=1)


def picture(rng: random.Random, seeds: Path, here: Path) -> None:
    """Bytes of a picture with damage, to its label."""
    data = (seeds / f"image-{rng.randrange(24)}").read_bytes()
    match rng.randrange(8):
        case 0:
            data = rng.randbytes(rng.randrange(3000))
        case 1:
            data = data[: rng.randrange(len(data))]
        case 2:
            data += rng.randbytes(100) + data
        case 3:
            data = _with_huge_size(data, rng)
        case _:
            data = damage(data, rng)
    prediction = _predictor()(data)
    assert np.isfinite(list(prediction.probabilities.values())).all()


def _with_huge_size(data: bytes, rng: random.Random) -> bytes:
    """Two or four bytes of its header exchanged for those of a huge number."""
    at = rng.randrange(4, min(len(data), 200))
    number = rng.choice((0x7FFF, 0xFFFF, 30000, 0x7FFFFFFF, 0xFFFFFFFF, 89_478_486, 0))
    packed = struct.pack(rng.choice("<>") + ("I" if number > 0xFFFF else "H"), number)
    return data[:at] + packed + data[at + len(packed) :]


def picture_file(rng: random.Random, seeds: Path, here: Path) -> None:
    """Files and folders with odd names and contents, to the command's lines."""
    for name in rng.sample(NAMES, rng.choice((1, 1, 3))):
        path = here / name
        with contextlib.suppress(OSError):
            path.write_bytes((seeds / "face.jpg").read_bytes())
            match rng.randrange(12):
                case 0 | 1 | 2:
                    special_file(path, rng)
                case 3:
                    Image.new(rng.choice("L1"), (rng.choice((9000, 20000)),) * 2).save(path, "PNG")
    names = [os.fspath(one) for one in here.iterdir()]
    given = rng.choice(([os.fspath(here)], names or ["none"], [*names, "", "\udcff", "x\0y"]))
    extra = rng.choice(([], ["--json"], ["--draw", "out"]))
    command(cli.main, [*given, *extra, "--threads", "1"])


def array(rng: random.Random, seeds: Path, here: Path) -> None:
    """What a program may pass by mistake instead of a picture."""
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 7, 48)) for _ in range(rng.randrange(5)))
    kind = rng.choice(("u1", "u1", "u1", "f4", "f8", "i8", "b1", "c8", "U1", "O", "M8[s]", "u2"))
    value: Any = np.zeros(shape, kind)
    if kind == "f4":
        value = value + rng.choice((np.nan, np.inf, -1, 300))
    match rng.randrange(8):
        case 0:
            value = rng.choice(
                (None, 5, 0.5, [], {}, object(), "", b"", "\0", Path("."), io.BytesIO())
            )
        case 1:
            value = io.StringIO("text")
        case 2:
            value = value[::-1] if value.ndim else value
        case 3:
            value = Image.new(rng.choice(("1", "L", "P", "RGBA", "CMYK", "F", "I", "HSV")), (9, 9))
    call = rng.choice((_predictor(), lambda one: _predictor().predict_batch([one, one])))
    call(value)


# ---- videos


def video(rng: random.Random, seeds: Path, here: Path) -> None:
    """A damaged video, or a text that would make FFmpeg open others, to its frames."""
    path = here / f"video.{rng.choice(('mp4', 'avi', 'mkv', 'flv'))}"
    data = (seeds / path.name).read_bytes()
    secret = here.parent / "secret" / "secret.jpg"
    match rng.randrange(8):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            data = b"".join(_with_huge_size(data[i : i + 200], rng) for i in range(0, 600, 200))
        case 2:
            data = damage(damage(data, rng), rng)
        case 3:
            text = rng.choice(
                (
                    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
                    "ffconcat version 1.0\nfile {}\n",
                    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 9 RTP/AVP 96\n",
                    "<MPD><BaseURL>file://{}</BaseURL></MPD>",
                )
            )
            data = text.format(secret).encode()
        case _:
            data = damage_end(damage(data, rng), rng)
    path.write_bytes(data)
    if rng.random() < 0.05:
        special_file(path, rng)
    with open_video(path) as frames:
        for frame in frames:
            assert frame.dtype == np.uint8 and frame.ndim == 3


# ---- models


def onnx_model(rng: random.Random, seeds: Path, here: Path) -> None:
    """An ONNX file with damage or with what only an attacker puts in it, to a label."""
    import onnx
    from onnx import helper

    data = (seeds / f"{rng.randrange(3)}.onnx").read_bytes()
    path = here / "model.onnx"
    kind = rng.randrange(10)
    if kind < 4:
        model = onnx.load_from_string(data)
        weight = model.graph.initializer[0]
        if kind == 0:
            weight.data_location = onnx.TensorProto.EXTERNAL
            weight.ClearField("raw_data")
            name = rng.choice(("../secret/secret.bin", "/etc/passwd", "weights", *TEXTS[:5]))
            with contextlib.suppress(ValueError, UnicodeError):
                for key in rng.sample(("location", "offset", "length", "basepath"), 3):
                    weight.external_data.add(key=key, value=name)
        elif kind == 1:
            spec = draw_json(json.loads(SPEC.to_json()), rng).encode(errors="replace").decode()
            helper.set_model_props(model, {SPEC_KEY: spec})
        elif kind == 2:
            key = rng.choice(("provenance", "probe"))
            value = {"precision": "fp32", "tuned": {"threads": 1}, "schema": 1, "side": 4}
            value |= {"pixels": "AAAA", "logits": [[0.0] * 7], "tolerance": 0.1}
            text = draw_json(value, rng).encode(errors="replace").decode()
            helper.set_model_props(model, {SPEC_KEY: SPEC.to_json(), f"efficientface.{key}": text})
        else:
            model.graph.node[0].op_type = rng.choice(("EPContext", "Loop", "", "x" * 1000))
        data = model.SerializeToString()
    elif kind == 4:  # parts in parts, and fields without end
        for _ in range(rng.choice((3, 90, 5000))):
            data = b"\x3a" + _varint(len(data)) + data
        data += b"location"
    elif kind == 5:
        count = rng.choice((3000,) * 9 + (300_000,))
        data = rng.choice((b"\x70\x00", b"\x3a\x00", b"\xa2\x01\x00")) * count + data
    elif kind == 6:
        data = b"\x72" + _varint(rng.choice((2**31, 2**62, 2**69))) + data
    else:
        data = damage(data, rng)
    path.write_bytes(data)
    if rng.random() < 0.03:
        special_file(path, rng)
    for read in (read_onnx_metadata, external_files):
        read(path)
    with load(path, threads=1) as predictor:
        predictor(np.zeros((48, 48, 3), np.uint8))


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def sidecar(rng: random.Random, seeds: Path, here: Path) -> None:
    """What lies beside an engine."""
    data = (seeds / "sidecar.json").read_bytes()
    path = here / "model.engine"
    path.write_bytes(rng.choice((fuzz_targets.PLAN,) * 4 + (b"", b"other", rng.randbytes(99))))
    beside = here / "model.engine.json"
    if rng.random() < 0.5:
        write_json(beside, json.loads(data), rng)
    else:
        beside.write_bytes(damage(data, rng))
    if rng.random() < 0.05:
        special_file(rng.choice((path, beside)), rng)
    if rng.random() < 0.3:
        with load(path, backend=rng.choice(("auto", "trt", "trt-rtx"))):
            return
    fuzz_targets.use_sidecar(path)


# ---- checkpoints


class Evil:
    """What a pickle brings along: a call that leaves a file in the folder that is watched."""

    def __init__(self, rng: random.Random, secret: Path) -> None:
        target = f"{secret}/canary"
        self._call = rng.choice(
            (
                (os.system, (f"touch {target}",)),
                (open, (target, "w")),
                (exec, (f"open({target!r}, 'w')",)),
                (os.mkdir, (target,)),
                (torch.save, ({}, target)),
                (torch.load, (target,)),
                (np.save, (target, np.zeros(1))),
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def checkpoint(rng: random.Random, seeds: Path, here: Path) -> None:
    """A published checkpoint, damaged or with code in it, to a network."""
    source = seeds / rng.choice(("new.pth.tar", "old.pth.tar"))
    path = here / rng.choice(("model.pth.tar", "model.pth", "model.pt"))
    new = rng.random() < 0.5
    kind = rng.randrange(6)
    if kind < 3:
        path.write_bytes(damage_end(source.read_bytes(), rng))
    elif kind == 3:
        evil = Evil(rng, here.parent / "secret")
        state: Any = {"state_dict": {"fc.weight": torch.zeros(7, 4), "evil": evil}}
        torch.save(rng.choice((evil, state, [evil])), path, _use_new_zipfile_serialization=new)
    elif kind == 4:
        torch.save(_odd_tensors(rng), path, _use_new_zipfile_serialization=new)
    else:
        torch.save({"state_dict": {"fc.weight": torch.zeros(7, 4)}}, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        chosen = rng.choice(list(members))
        members[chosen] = rng.choice(
            (bytes(60 << 20), b"(" * 10**6, b"\x80\x02]" * 10**5, b"", b".")
        )
        with zipfile.ZipFile(path, "w", rng.choice((0, 8))) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    load_checkpoint(path, rng.choice((None, "rafdb", "ferplus")))


def _odd_tensors(rng: random.Random) -> Any:
    weight = torch.zeros(7, 1024)
    odd = rng.choice(
        (
            weight.to_sparse(),
            weight.expand(10**6, 7, 1024),
            weight[:1].expand(10**7, 1024),
            torch.zeros(1).expand(2**40),
            torch.zeros(7, 0),
            torch.full((7, 1024), float("nan")),
            weight.to(rng.choice((torch.float16, torch.int8, torch.complex64, torch.bool))),
            torch.empty(7, 1024, device="meta"),
            torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
            torch.nested.nested_tensor([weight, weight]),
        )
    )
    names = ("fc.weight", "local.conv1_1.weight", "layer4.1.conv2.weight", "x" * 5000, "a\nb")
    state: Any = {rng.choice(names): odd, "fc.weight": odd, "module.fc.bias": rng.choice((odd, 5))}
    return rng.choice(({"state_dict": state}, state, [state], odd, None, {"state_dict": [1]}))


def safetensors(rng: random.Random, seeds: Path, here: Path) -> None:
    """A safetensors file whose header lies."""
    data = (seeds / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    path = here / "model.safetensors"
    match rng.randrange(5):
        case 0:
            data = rng.choice((0, 1, 2**40, 2**63, size + 1)).to_bytes(8, "little") + data[8:]
        case 1:
            header = draw_json(json.loads(header), rng).encode("utf-8", "replace")
            data = len(header).to_bytes(8, "little") + header + body
        case 2:
            content = json.loads(header)
            content["__metadata__"][SPEC_KEY] = draw_json(json.loads(SPEC.to_json()), rng)
            header = json.dumps(content).encode("utf-8", "replace")
            data = len(header).to_bytes(8, "little") + header + body
        case _:
            data = damage_end(data, rng)
    path.write_bytes(data)
    if rng.random() < 0.03:
        special_file(path, rng)
    fuzz_targets.use_safetensors(path)
    load_checkpoint(path, rng.choice((None, "rafdb")))


def reference(rng: random.Random, seeds: Path, here: Path) -> None:
    """``verify.npz``, which lies beside an exported file."""
    arrays: dict[str, Any] = {
        "images": np.zeros((2, 32, 32, 3), np.uint8),
        "logits": np.zeros((2, 7), np.float32),
        "source": "x",
        "parent": "y",
    }
    odd = (np.zeros((2, 7), "U9"), np.array(5), np.zeros((0, 7)), np.zeros((2, 7, 2)), "\0")
    path = here / "verify.npz"
    if rng.random() < 0.5:
        arrays[rng.choice(list(arrays))] = rng.choice(odd)
    if rng.random() < 0.1:
        arrays["logits"] = np.array([Evil(rng, here.parent / "secret")], dtype=object)
    np.savez_compressed(path, **arrays)
    if rng.random() < 0.1:
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
            archive.open("features.npy", "w") as file,
        ):
            for _ in range(300):
                file.write(bytes(1 << 20))
    if rng.random() < 0.5:
        path.write_bytes(damage_end(path.read_bytes(), rng))
    read_reference(here, SPEC, "y")


# ---- data sets


def data_set(rng: random.Random, seeds: Path, here: Path) -> None:
    """A prepared data set with hostile descriptions, manifests and names, to its pixels."""
    root = here / "data"
    for index in range(2):
        (folder := root / "train" / str(index)).mkdir(parents=True)
        (folder / "a.jpg").write_bytes((seeds / "face.jpg").read_bytes())
    description = {"name": "x", "labels": list(SPEC.labels), "preset": "rafdb", "face_crop": "box"}
    columns = ["path", "split", "label", *(f"votes_{label}" for label in SPEC.labels)]
    rows = [[f"train/{i}/a.jpg", "train", str(i), *["1"] * len(SPEC.labels)] for i in range(2)]
    (root / "dataset.json").write_text(json.dumps(description))
    match rng.randrange(5):
        case 0:
            write_json(root / "dataset.json", description, rng)
        case 1:
            write_csv(root / "manifest.csv", columns, rows, rng)
        case 2:
            special_file(root / rng.choice(("dataset.json", "manifest.csv", "train/0/a.jpg")), rng)
        case 3:
            with contextlib.suppress(OSError, ValueError):
                (root / "train" / rng.choice(("0", "1", "9", "x")) / rng.choice(NAMES)).write_text(
                    "x"
                )
        case 4:
            (
                root / rng.choice(("val", "validation", "test", ".git", "\x1b[31m", "train/a\nb"))
            ).mkdir()
            (root / "valid").symlink_to(rng.choice((".", "/", "train")))
    found = read_dataset(root, rng.choice((None, "rafdb", "ferplus", "\0")))
    for _ in iterate_batches(found.split("train"), SPEC, 8):
        pass


def write_csv(path: Path, columns: list[str], rows: list[list[str]], rng: random.Random) -> None:
    """A CSV file with hostile cells, separators or encodings."""
    rows = [list(row) for row in rows] * rng.choice((1, 1, 2))
    cells = (*TEXTS, *map(str, HUGE[:-1]), "9" * 5000, "=cmd|' /C calc'!A0", "../../secret/x.jpg")
    for _ in range(rng.randrange(4)):
        row = rng.choice((columns := list(columns), *rows))
        row[rng.randrange(len(row))] = rng.choice(cells)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=rng.choice(",,,;\t"), escapechar="\\")
    writer.writerows([columns, *rows])
    content = text.getvalue()
    match rng.randrange(20):
        case 0:
            content = content[: rng.randrange(len(content))] + '"' + "x" * 200_000
        case 1:
            content = content.replace("\r\n", rng.choice(("\r", "\n\n", "\0\n", "\x85")))
        case 2:
            content = "\ufeff" + content
        case 3:
            content = "," * 100_000 + content
    encoding = rng.choice(("utf-8",) * 20 + ("latin-1", "utf-16", "utf-32"))
    path.write_bytes(
        content.encode(encoding, "surrogatepass" if encoding != "latin-1" else "replace")
    )


def manifest(rng: random.Random, seeds: Path, here: Path) -> None:
    """A manifest or a Parquet file for efficientface-annotate, to its pictures' bytes."""
    (here / "a.jpg").write_bytes((seeds / "face.jpg").read_bytes())
    rows = [["a.jpg", "x"], ["b.jpg", "y"]]
    if rng.random() < 0.5:
        path = here / "list.csv"
        write_csv(path, ["path", "note"], rows, rng)
    else:
        path = here / "list.parquet"
        _write_parquet(path, rng)
        if rng.random() < 0.6:
            path.write_bytes(damage_end(path.read_bytes(), rng))
    if rng.random() < 0.05:
        special_file(path, rng)
    if rng.random() < 0.1:
        command(annotate.main, [os.fspath(path), "--out", "out", "--threads", "1"])
        return
    pictures = find_pictures(path, rng.choice((None, None, "image", "\0")), here / "paths.parquet")
    for _, name, source in pictures.read(0, min(pictures.count, 100)):
        assert name.isprintable()
        load_image(source)


def _write_parquet(path: Path, rng: random.Random) -> None:
    texts = rng.sample(TEXTS, 3)
    texts = [text.encode(errors="replace").decode() for text in texts]
    large = pa.array([bytes(rng.choice((1, 20 << 20)))])
    values = rng.choice(
        (
            pa.array(["a.jpg", *texts, None]),
            pa.array([b"\xff\xfe", b"x", b"", None]),
            pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe\xfd"]).buffers()),
            pa.array([1, 2, 3]),
            pa.array([{"bytes": b"x", "path": "y"}] * 3),
            pa.array([{"bytes": 5, "path": "y"}] * 3),
            pa.array([[b"x"]] * 3),
            pa.DictionaryArray.from_arrays(pa.array([0] * 1000), large),  # a bomb
            pa.array(["a.jpg"] * 3).dictionary_encode(),
            pa.array([{"bytes": {"bytes": b"x"}}] * 3),
        )
    )
    name = rng.choice(("path", "image", "bytes", "image", "a.b", "\x1b[31m", "x" * 3000))
    pq.write_table(
        pa.table({name: values}), path, compression=rng.choice(("zstd", "none", "snappy"))
    )


def archive(rng: random.Random, seeds: Path, here: Path) -> None:
    """A data set as its makers publish it, in a zip archive, to a prepared one."""
    jpeg = (seeds / "face.jpg").read_bytes()
    kind = rng.choice(("ferplus", "folders", "rafdb", "affectnet", "caers"))
    members: dict[str, bytes] = {}
    if kind == "ferplus":
        rows = [["a.png", "(0, 0, 48, 48)", *["0"] * 4, "10", *["0"] * 5]] * 2
        for folder in ("FER2013Train", "FER2013Valid"):
            write_csv(here / "x.csv", rows[0], rows, rng)
            members |= {f"{folder}/label.csv": (here / "x.csv").read_bytes()}
            members |= {f"{folder}/a.png": jpeg}
    elif kind == "rafdb":
        text = "train_00001.jpg 5\ntest_0001.jpg 3\n" + rng.choice(
            ("", *TEXTS[4:9], "x 1", "a b c")
        )
        name = rng.choice(("list_patition_label.txt", "EmoLabel/list_patition_label.txt"))
        members = {
            name: text.encode(errors="replace"),
            "Image/aligned/train_00001_aligned.jpg": jpeg,
        }
        members["Image/aligned/test_0001_aligned.jpg"] = damage(jpeg, rng)
    elif kind == "affectnet":
        members = {f"{s}/images/{i}.jpg": jpeg for s in ("train_set", "val_set") for i in range(7)}
        for split in ("train_set", "val_set"):
            for i in range(7):
                saved = io.BytesIO()
                value: Any = rng.choice(
                    (np.array(str(i)), np.array(i), np.array([i]), np.array("²"))
                )
                np.save(saved, value)
                if rng.random() < 0.2:
                    saved = io.BytesIO()
                    evil = np.array([Evil(rng, here.parent / "secret")], dtype=object)
                    np.save(saved, evil, allow_pickle=True)
                members[f"{split}/annotations/{i}_exp.npy"] = damage(saved.getvalue(), rng)
    else:
        classes = SPEC.labels if kind == "folders" else ("Anger", "Disgust", "Fear", "Happy", "Sad")
        members = {f"train/{name}/{i}.jpg": jpeg for name in classes for i in range(2)}
        members |= {f"test/{name}/{rng.choice(NAMES)}": damage(jpeg, rng) for name in classes}
    path = here / "source.zip"
    write_zip(path, members, rng)
    if rng.random() < 0.05:
        special_file(path, rng)
    words = [kind, "--source", os.fspath(path), "--out", os.fspath(here / "out")]
    command(prepare.main, words)
    read_dataset(here / "out")


# ---- other files, lines and requests


@functools.cache
def _results() -> list[Any]:
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def result(rng: random.Random, seeds: Path, here: Path) -> None:
    """A benchmark's result, shown or compared."""
    write_json(here / "a.json", rng.choice(_results()), rng)
    (here / "b.json").write_text(json.dumps(rng.choice(_results())))
    if rng.random() < 0.05:
        special_file(here / "a.json", rng)
    words = rng.choice((["a.json"], ["a.json", "--compare", "b.json"], ["b.json", "a.json"]))
    command(report.main, words)


# Commands, and words with which they end before they work: a folder or file that is not there.
COMMANDS: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (cli.main, ("none.jpg",)),
    (annotate.main, ("none", "--out", "out")),
    (export.main, ("--weights", "none.safetensors", "--out", "out")),
    (student.main, ("--data", "none", "--out", "out")),
    (teacher.main, ("--data", "none", "--out", "out")),
    (evaluate.main, ("--data", "none", "--weights", "none.onnx")),
    (compare.main, ("none", "--data", "none")),
    (explain.main, ("--images", "none", "--weights", "none.onnx", "--out", "out")),
    (prepare.main, ("folders", "--source", "none", "--out", "out")),
    (report.main, ("none.json",)),
)


def option_line(rng: random.Random, seeds: Path, here: Path) -> None:
    """A command's words with hostile values for its options."""
    main, base = rng.choice(COMMANDS)
    words = list(base)
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([*words[:1], "--help"] if main is prepare.main else ["--help"])
    names = [word for word in shown.getvalue().split() if word.startswith("--")]
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(names).strip(",].")
        if name in ("--help", "--docs"):
            continue
        value = rng.choice((*TEXTS, *map(str, HUGE[:-1]), "9" * 5000, "0", "2", "auto", "none"))
        words[rng.randrange(len(words) + 1) : 0] = rng.choice(
            ([name, value], [f"{name}={value}"], [name])
        )
    if rng.random() < 0.2:
        words[rng.randrange(len(words))] = rng.choice(TEXTS)
    command(main, words)


@functools.cache
def _address() -> tuple[str, int]:
    served = server.open_server({"index.html": b"<p>", "a/b.js": bytes(200_000)})
    threading.Thread(target=served.serve_forever, daemon=True).start()
    return server.HOST, served.server_port


def request(rng: random.Random, seeds: Path, here: Path) -> None:
    """Bytes that reach efficientface-web's port; it must go on to serve its page."""
    path = rng.choice(
        (
            "/",
            "/index.html",
            "/a/b.js",
            "/../secret",
            "//x",
            "http://[",
            "*",
            "/%2e%2e/",
            "/\x00",
            "é",
        )
    )
    head = (
        f"{rng.choice(('GET', 'HEAD', 'POST', 'PUT', 'OPTIONS', 'X' * 9000))} {path} HTTP/1.1\r\n"
    )
    lines = ("Host: evil.example", "If-None-Match: *", "Content-Length: -1", "A: " + "x" * 70_000)
    for line in rng.sample((*lines, "Expect: 100-continue", "Range: bytes=9-1", ": x", "\x00"), 3):
        head += line + "\r\n"
    data = (head + rng.choice(("\r\n", "Connection: close\r\n\r\n", ""))).encode("latin-1")
    data = rng.choice((data, data, damage(data, rng), rng.randbytes(300), b"\n" * 5000))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        with socket.create_connection(_address(), timeout=5) as connection:
            connection.sendall(data)
            if rng.random() < 0.7:  # else it goes away at once
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while connection.recv(1 << 16):
                        pass
        with socket.create_connection(_address(), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"<p>")
    assert not errors.getvalue(), errors.getvalue()[-300:]


GROUPS = (
    Group("pictures", 2300, picture),
    Group("picture files", 200, picture_file),
    Group("arrays", 500, array),
    Group("videos", 600, video),
    Group("ONNX files", 1100, onnx_model),
    Group("engines", 600, sidecar),
    Group("safetensors", 700, safetensors),
    Group("checkpoints", 600, checkpoint),
    Group("references", 200, reference),
    Group("data sets", 800, data_set),
    Group("manifests", 700, manifest),
    Group("archives", 400, archive),
    Group("results", 300, result),
    Group("option lines", 600, option_line),
    Group("web requests", 400, request),
)


def run(scale: float, seed: int, folder: Path) -> list[Row]:
    """Try all groups.

    Args:
        scale: 1 is 10,000 cases.
        seed: Of all that is drawn.
        folder: For what is written.
    """
    (seeds := folder / "seeds").mkdir()
    os.environ["TMPDIR"] = os.fspath(folder)
    in_a_child(lambda: make_seeds(seeds))
    rows = []
    for group in GROUPS:
        rows.append(run_group(group, scale, seed, seeds, folder))
        print(f"{group.what}: {rows[-1].tried}, {len(rows[-1].failures)} failed", file=sys.stderr)
    return rows


def replay(what: str, number: int, seed: int) -> None:
    """Try one case in this process, and say what came of it and where its files are."""
    folder = Path.cwd() / "build" / "campaign"
    (seeds := folder / "seeds").mkdir(parents=True, exist_ok=True)
    in_a_child(lambda: make_seeds(seeds))
    (group,) = (group for group in GROUPS if group.what == what)
    print(try_case(group, number, seed, seeds, folder, keep=True))


if __name__ == "__main__":
    replay(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
