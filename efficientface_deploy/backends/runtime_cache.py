"""What TensorRT for RTX compiled for the GPU at hand, kept beside the engine for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientface_deploy.artifact import atomic_path

_log = logging.getLogger(__name__)


def cache_path(engine: Path) -> Path:
    """``model.rtx.engine`` -> ``model.rtx.engine.cache``."""
    return Path(f"{engine}.cache")


class RuntimeCache:
    """The library's cache of compiled kernels, and its file.

    The file is a convenience: one that cannot be read or written, is damaged, or belongs to
    another engine, release or GPU is passed over with a line in the log. It holds code for the
    GPU, as the engine does, and is trusted as much: keep both where only you can write.

    Args:
        config: The ``IRuntimeConfig`` that contexts are made with.
        path: The file.
        binding: What the kernels belong to: engine, release, GPU.
    """

    def __init__(self, config: Any, path: Path, binding: Mapping[str, str]) -> None:
        self._path = path
        self._binding = dict(binding)
        self._kept = _read(path, self._binding)
        self._cache = config.create_runtime_cache()
        if self._cache is None:
            _log.info("%s: not used, since TensorRT for RTX makes no cache", path)
            return
        if self._kept and not self._cache.deserialize(self._kept):
            _log.info("%s: ignored, since TensorRT for RTX does not take it here", path)
            self._kept = b""
        if not config.set_runtime_cache(self._cache):
            _log.info("%s: not used, since TensorRT for RTX does not take the cache", path)

    def keep(self) -> None:
        """Write the file, if there is anything new to keep."""
        if self._cache is None:
            return
        try:
            serialised = self._cache.serialize()
            content = b"" if serialised is None else bytes(serialised)
            if content and content != self._kept:
                _write(self._path, self._binding, content)
                self._kept = content
        except (OSError, RuntimeError) as error:
            _log.info("%s: not kept (%s)", self._path, error)


def _read(path: Path, binding: Mapping[str, str]) -> bytes:
    """The kernels in the file; empty where there is none that fits."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return b""
    except OSError as error:
        _log.info("%s: ignored (%s)", path, error)
        return b""
    try:
        found = json.loads(head)
    except (ValueError, RecursionError):
        found = None
    if found != _head(binding, content):
        _log.info("%s: ignored, since it is damaged or of another engine, release or GPU", path)
        return b""
    return content


def _write(path: Path, binding: Mapping[str, str], content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(json.dumps(_head(binding, content)).encode() + b"\n" + content)


def _head(binding: Mapping[str, str], content: bytes) -> dict[str, str]:
    """First line of the file: what the kernels belong to, and their own hash."""
    return {**binding, "sha256": hashlib.sha256(content).hexdigest()}
