"""The files of the page: ours, a model, the face detector, and ONNX Runtime Web."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from efficientface_deploy.artifact import (
    UINT8_INPUT,
    external_files,
    free_sizes,
    read_onnx_input,
    read_onnx_metadata,
    spec_from_metadata,
)
from efficientface_deploy.download import Download, fetch
from efficientface_deploy.errors import ArtifactError
from efficientface_deploy.files import atomic_path, require_file
from efficientface_deploy.predictor import model_file
from efficientface_deploy.vision.yunet import YuNet, read_weights

FILE_VARIABLE = "EFFICIENTFACE_ORT_WEB"
"""Environment variable: npm's archive of onnxruntime-web, in place of the one that is fetched."""

RUNTIME = Download(
    name="onnxruntime-web-1.30.0.tgz",
    url="https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz",
    # npm's own integrity of the same bytes: sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzc
    # V7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==
    sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
    size=33_106_585,
)
RUNTIME_FILES = (  # the smallest bundle for WASM alone, and the one that has WebGPU beside it
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "ort.webgpu.min.mjs",
    *("ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
)
"""What of the archive's folder ``package/dist`` the page may load."""

_STATIC = Path(__file__).parent / "static"
_LARGEST = 64 * 1024 * 1024  # bytes of one file in the archive


MODEL_FILE = "model.onnx"
"""What the model is called in the folder."""


def page_files(
    detector: str | Path | None = None, runtime: str | Path | None = None
) -> dict[str, bytes]:
    """Every file of the page but the model, by its path in the folder that is served.

    Args:
        detector: YuNet's model file; None takes that of ``EFFICIENTFACE_YUNET``, else the cache's,
            where it is fetched once.
        runtime: npm's archive of onnxruntime-web; None takes that of ``EFFICIENTFACE_ORT_WEB``,
            else the cache's, where it is fetched once.

    Raises:
        ArtifactError: A file cannot be used.
        BackendError: A file is not in the cache and cannot be fetched.
    """
    page = {path.name: path.read_bytes() for path in sorted(_STATIC.iterdir())}
    path, weights = read_weights(detector)
    try:
        # ONNX Runtime Web takes pictures of the declared size alone, and has no way to change it.
        page["yunet.onnx"] = free_sizes(weights, YuNet.input_name)
    except ValueError as error:
        fix = "take face_detection_yunet_2023mar.onnx from OpenCV's model zoo"
        raise ArtifactError(path, "a YuNet model file", str(error), fix) from None
    page.update(_read_runtime(runtime or os.environ.get(FILE_VARIABLE) or None))
    page["ort/LICENSE"] = page.pop("ort-license.txt")
    return page


def read_model(path: str | Path | None = None) -> bytes:
    """A model that a browser can run.

    Args:
        path: ``*.onnx`` of ours with uint8 input; None and ``accurate`` take a bundled model.

    Raises:
        ArtifactError: It is none.
    """
    path = model_file(path, "onnx")
    spec_from_metadata(read_onnx_metadata(path), path)
    if (name := read_onnx_input(path)) != UINT8_INPUT:
        found = f"one with the input {name!r}"
        fix = "export it without --float-input"
        raise ArtifactError(path, f"a model with the input {UINT8_INPUT!r}", found, fix)
    if beside := external_files(path):
        fix = "export it again with efficientface-export"
        raise ArtifactError(path, "a model in one file", f"weights in {beside[0].name}", fix)
    return path.read_bytes()


def write_site(site: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of a page into a folder, each whole or not at all, ``index.html`` last."""
    for name in sorted(site, key=lambda name: (name == "index.html", name)):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(site[name])


def _read_runtime(file: str | Path | None) -> dict[str, bytes]:
    """ONNX Runtime Web's files and their licence, read by name: nothing else is unpacked."""
    if file is None:
        give = f"name npm's archive by {FILE_VARIABLE}"
        content, name = fetch(RUNTIME, "ONNX Runtime Web", give), RUNTIME.name
    else:
        path = require_file(file, "npm's archive of onnxruntime-web")
        content, name = path.read_bytes(), str(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            found = dict(_members(archive))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise _no_archive(name, str(error) or type(error).__name__) from None
    if missing := sorted({f"ort/{one}" for one in RUNTIME_FILES} - set(found)):
        raise _no_archive(name, f"no {missing[0].removeprefix('ort/')} in it")
    return found


def _members(archive: tarfile.TarFile) -> list[tuple[str, bytes]]:
    wanted = {f"package/dist/{name}": name for name in RUNTIME_FILES}
    members = []
    for member in archive:
        if member.name not in wanted:
            continue
        if not member.isfile() or member.size > _LARGEST:
            raise ValueError(f"{member.name}, which is no file of its kind")
        file = archive.extractfile(member)
        assert file is not None  # it is a file
        members.append((f"ort/{wanted[member.name]}", file.read()))
    return members


def _no_archive(name: str, found: str) -> ArtifactError:
    fix = f"take {RUNTIME.url}"
    return ArtifactError(name, "npm's archive of onnxruntime-web", found, fix)
