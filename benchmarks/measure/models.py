"""What there is to measure: models, the backends that run them here, and why others are skipped."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, shown_path
from efficientface_deploy.artifact import (
    carries_spec,
    read_safetensors_metadata,
    spec_from_metadata,
)
from efficientface_deploy.backends import REGISTRY, missing_reason, resolve_backend
from efficientface_deploy.errors import ConfigError, EfficientFaceError, install_command
from efficientface_deploy.files import file_hash, find_files
from efficientface_deploy.predictor import BUNDLED_WEIGHTS, Predictor, bundled_model, load

ARTIFACTS = ROOT / "artifacts"

# What a model that cannot run here may raise. Beside our own errors: an installed library whose
# driver or shared object is missing, and a device that is out of memory.
CANNOT_RUN = (EfficientFaceError, ImportError, OSError, RuntimeError)

NO_GRAPHS = ", no CUDA graphs"

_SEARCHED = (".onnx", ".engine", ".safetensors")
# Only here does a number of CPU threads mean anything.
_CPU_BACKENDS = ("onnx:cpu", "torch:cpu")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that could not be measured.

    Attributes:
        backend: The backend; empty where the model itself is at fault.
        model: The model's name; empty where the backend itself is missing.
        reason: Why, and what can be done about it.
    """

    backend: str
    model: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, open on a backend.

    Attributes:
        model: Its name in tables, unique among the models of a run.
        predictor: Runs it.
        threads: CPU threads of one inference; None where the library or a GPU decides.
        preset: What a published checkpoint was trained on.
    """

    model: str
    predictor: Predictor
    threads: int | None
    preset: str | None = None

    @property
    def backend(self) -> str:
        """E.g. ``onnx:cpu``."""
        return self.predictor.backend

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``, as its provenance says; empty where it does not."""
        known = "fp32" if self.backend.startswith("torch") else ""
        return str(self.predictor.provenance.get("precision", known))

    @property
    def on_gpu(self) -> bool:
        """Whether the network runs on an NVIDIA GPU."""
        family, _, device = self.backend.partition(":")
        return family.startswith("trt") or device.startswith(("cuda", "tensorrt"))

    def key(self) -> dict[str, Any]:
        """What tells its rows in a result from others'."""
        names = ("model", "backend", "precision", "threads")
        return {name: getattr(self, name) for name in names}

    def prepare(self) -> None:
        """Set what is global to the process; to be called before each turn."""
        if self.backend == "torch:cpu" and self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)

    def describe(self) -> dict[str, Any]:
        """The model file for a result: name, path, size, hash, spec and precision."""
        path, spec = self.predictor.path, self.predictor.spec
        return {
            "name": self.model,
            "path": shown_path(path),
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
            "network": spec.name,
            "input_size": spec.input_size,
            "classes": spec.num_classes,
            "preliminary": spec.preliminary,
            "precision": self.precision,
        }


# ---- options


def comma_list(text: str) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names in a comma list.

    Raises:
        ConfigError: One of them is not known.
    """
    wanted = comma_list(text)
    for name in wanted:
        if name not in known:
            fix = "choose among these, with commas between"
            raise ConfigError(option, ", ".join(known), repr(name), fix)
    return wanted


def positive_integers(text: str, option: str) -> tuple[int, ...]:
    """``"1,8,32"`` -> ``(1, 8, 32)``, each once, in the order given.

    Raises:
        ConfigError: Something else than whole numbers from 1 on.
    """
    parts = comma_list(text)
    if not parts or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        expected = "whole numbers from 1 on, with commas between"
        raise ConfigError(option, expected, repr(text), f"e.g. {option} 1,8,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def choose_backends(text: str) -> tuple[str, ...]:
    """The backends to measure, each with its device: ``onnx:cpu``, ``trt``, ...

    Args:
        text: Names with commas between; a name without a device means all of its devices, an empty
            text all backends.

    Raises:
        ConfigError: There is no such backend.
    """
    known = [
        f"{name}:{device}" if device else name
        for name, entry in REGISTRY.items()
        for device in entry.devices or ("",)
    ]
    wanted = choose(text, list(dict.fromkeys([*known, *REGISTRY])), "--backends")
    return tuple(
        name for name in known if not wanted or name in wanted or name.partition(":")[0] in wanted
    )


# ---- model files


def find_models(given: Sequence[Path]) -> list[Path]:
    """The models to measure.

    Args:
        given: Files, and folders to search; where there are none, the bundled models and what lies
            under ``artifacts/``.
    """
    sources = given or [bundled_model("torch"), bundled_model("onnx"), ARTIFACTS]
    paths = [path for source in sources for path in _files_of(source)]
    if not given and (count := len(_files_of(ARTIFACTS))):
        where = shown_path(ARTIFACTS)
        print(f"models: the bundled ones, and the {count} in {where}/", file=sys.stderr)
    return list({path.resolve(): path for path in paths}.values())


def _files_of(source: Path) -> list[Path]:
    """The file itself, or the models in a folder; no teachers and no half-written files."""
    if not os.path.isdir(source):
        return [] if source == ARTIFACTS else [source]
    files, closed = find_files(source, _SEARCHED)
    for folder in closed:
        print(f"left out {folder}: a folder that may not be read", file=sys.stderr)
    return [path for path in files if not path.name.startswith(".") and not _is_teacher(path)]


def _is_teacher(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        spec = spec_from_metadata(read_safetensors_metadata(path), path)
    except EfficientFaceError:
        return False  # opening the file will say what is wrong with it
    return spec.architecture != "efficientface"


EXPORTED = ("efficientface-fp16-cpu.onnx", "efficientface-int8-cpu.onnx")
EXPORTED_NOTE = (
    "the INT8 file was calibrated on synthetic faces, for its time alone: its answers mean nothing"
)


@contextlib.contextmanager
def default_models() -> Iterator[tuple[list[Path], list[Skipped], list[str]]]:
    """The models to time when none is named; what was exported for it is gone at the end.

    INT8 needs training images for its ranges. The embedded synthetic faces serve here: how long a
    layer takes does not depend on its ranges, and no layer is left in higher precision. What such
    a file answers means nothing; for accuracy, export with real faces and give the files.

    Yields:
        The bundled models with those under ``artifacts/``, or with FP16 and INT8 made now where
        nothing lies there; what could not be made; what a reader must know of them.
    """
    found = find_models(())
    if _files_of(ARTIFACTS):
        yield found, [], []
        return
    with tempfile.TemporaryDirectory() as folder:
        made, skipped = export(Path(folder))
        yield [*found, *made], skipped, [EXPORTED_NOTE] if made else []


def export(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """Export FP16 and INT8 for a CPU by the two commands that a user would type."""
    faces, out = folder / "faces", folder / "artifacts"
    prepare = ["-m", "training.prepare", "synthetic", "--train", "140", "--test", "7"]
    make = ["-m", "efficientface_export.cli", "--engine", "onnx", "--precision", "all"]
    make += ["--weights", str(BUNDLED_WEIGHTS), "--calib", str(faces), "--no-int8-search"]
    print("models: the bundled ones, and their FP16 and INT8, exported now", file=sys.stderr)
    for arguments in ([*prepare, "--out", str(faces)], [*make, "--out", str(out)]):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            return [], [Skipped("", name, f"export: {lines[-1]}") for name in EXPORTED]
    return [out / name for name in EXPORTED], []


# ---- open models


@contextlib.contextmanager
def open_candidates(
    paths: Sequence[Path],
    backends: Sequence[str],
    threads: Sequence[int | None] = (None,),
    preset: str | None = None,
    *,
    without_graphs: bool = False,
) -> Iterator[tuple[list[Candidate], list[Skipped]]]:
    """Open every model on every backend that runs it here; close them all at the end.

    Args:
        paths: Model files.
        backends: From :func:`choose_backends`.
        threads: Numbers of CPU threads; a model on a CPU is opened once for each.
        preset: What published checkpoints were trained on, which they do not say themselves.
        without_graphs: Whether to open an engine a second time without CUDA graphs.

    Yields:
        What opened, in the order of ``paths``, and what did not.
    """
    names = _display_names(paths)
    opened: list[Candidate] = []
    skipped = [Skipped(name, "", reason) for name in backends if (reason := _missing(name))]
    present = [name for name in backends if name not in {entry.backend for entry in skipped}]
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                family = resolve_backend(path)[0]
                published = None if carries_spec(path) else preset
            except EfficientFaceError as error:
                skipped.append(Skipped("", names[path], one_line(error)))
                continue
            for backend in (name for name in present if name.partition(":")[0] == family):
                counts = threads if backend in _CPU_BACKENDS else (None,)
                variants: list[tuple[str, dict[str, Any]]] = [
                    (names[path], {"threads": count, "preset": published}) for count in counts
                ]
                if without_graphs and backend.startswith("trt"):
                    variants.append((names[path] + NO_GRAPHS, {"cuda_graphs": False}))
                try:
                    for name, options in variants:
                        predictor = stack.enter_context(load(path, backend=backend, **options))
                        count = options.get("threads")
                        opened.append(Candidate(name, predictor, count, published))
                except CANNOT_RUN as error:
                    skipped.append(Skipped(backend, names[path], one_line(error)))
        seen = {candidate.backend for candidate in opened} | {entry.backend for entry in skipped}
        for backend in present:
            if backend not in seen:
                suffixes = ", ".join(REGISTRY[backend.partition(":")[0]].suffixes)
                skipped.append(Skipped(backend, "", f"none of the models is for it ({suffixes})"))
        yield opened, skipped


def choose_reference(candidates: Sequence[Candidate]) -> Candidate:
    """The first PyTorch model, else the first in FP32, else the first."""
    torch = [entry for entry in candidates if entry.backend.startswith("torch")]
    fp32 = [entry for entry in candidates if entry.precision == "fp32"]
    return [*torch, *fp32, *candidates][0]


def require_candidates(candidates: Sequence[object], skipped: Sequence[Skipped]) -> None:
    """Stop where nothing is left to measure.

    Raises:
        ConfigError: Names the model or the backend that fell out first, and why.
    """
    if candidates:
        return
    reasons = [
        f"{entry.model or entry.backend}: {entry.reason}"
        for entry in sorted(skipped, key=_says_less)
    ]
    found = f"none ({reasons[0]})" if reasons else "none"
    fix = "give model files, or make one with efficientface-export --engine onnx"
    raise ConfigError("models", "one that runs on this machine", found, fix)


def _says_less(entry: Skipped) -> tuple[bool, bool]:
    """Sorts what a file is at fault for before a device that is missing, and then a backend."""
    return not entry.model, entry.backend not in ("", *_CPU_BACKENDS)


def one_line(error: BaseException) -> str:
    """An error's text on one line, led by its class unless the error is ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EfficientFaceError) else f"{type(error).__name__}: {text}"


def _missing(backend: str) -> str | None:
    """Why a backend's package is not here, with what installs it."""
    name = backend.partition(":")[0]
    reason = missing_reason(name)
    extra = REGISTRY[name].extra
    return reason and f"{reason}; {install_command(extra)}"


def _display_names(paths: Sequence[Path]) -> dict[Path, str]:
    """File names; where two files have the same, with as many folders as tell them apart."""
    parts = {path: path.resolve().parts for path in paths}
    names = {}
    for path in paths:
        others = [own for own in parts.values() if own != parts[path]]
        length = 1
        while any(own[-length:] == parts[path][-length:] for own in others):
            length += 1
        names[path] = "/".join(parts[path][-length:])
    return names
