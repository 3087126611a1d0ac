"""Files that are fetched once, checked by their hash, and kept in the user's cache.

Nothing is fetched by an import or by loading a model; only what is asked for by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

from efficientface_deploy.errors import BackendError, system_words, words_of
from efficientface_deploy.files import atomic_path

CACHE_VARIABLE = "EFFICIENTFACE_CACHE"
"""Environment variable: the folder for files that were fetched."""

_TIMEOUT = 20.0  # seconds without a byte
_LONGEST = 120.0  # seconds in all, and more for what is larger than this
_LARGE = 10_000_000  # bytes
_CHUNK = 1 << 16

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Download:
    """A file that others publish.

    Attributes:
        name: In the cache.
        url: Where it is.
        sha256: Of its content, in hexadecimal.
        size: Bytes.
    """

    name: str
    url: str
    sha256: str
    size: int

    @property
    def kilobytes(self) -> int:
        """Its size for people: thousands of bytes, rounded."""
        return round(self.size / 1000)


def cache_folder() -> Path:
    """Where files are kept: ``EFFICIENTFACE_CACHE``, else the system's place for a user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "efficientface"


def fetch(wanted: Download, subject: str, instead: str) -> bytes:
    """The content of a file, from the cache or from where it is published.

    Args:
        wanted: The file.
        subject: What needs it, for messages.
        instead: What else one can do, for messages.

    Raises:
        BackendError: It is not in the cache, and cannot be fetched; the error says where it
            belongs, in a folder that is there from then on, and what is in its place. What is
            fetched and cannot be kept is given all the same, with a warning.
    """
    path = cache_folder() / wanted.name
    in_its_place = ""
    try:
        content = path.read_bytes()
        if _sha256(content) == wanted.sha256:
            return content
        in_its_place = f", and {path} has another sha256, {_sha256(content)}"
    except FileNotFoundError:
        pass
    except OSError as error:
        in_its_place = f", and {path} cannot be read: {system_words(error)}"
    _log.warning("fetching %s (%d KB) to %s", wanted.url, wanted.kilobytes, path)
    try:
        content = _download(wanted)
        right = _sha256(content) == wanted.sha256
        found = "" if right else f"{len(content)} bytes with another sha256"
    except Exception as error:  # noqa: BLE001 - of the system, SSL, HTTP and addresses
        found = words_of(error if hasattr(error, "code") else getattr(error, "reason", error))
    if found:
        with contextlib.suppress(OSError):  # then that folder cannot be had, but another file can
            path.parent.mkdir(parents=True, exist_ok=True)
        fix = f"put the file at {path} (sha256 {wanted.sha256}), or {instead}"
        raise BackendError(subject, f"its file from {wanted.url}", found + in_its_place, fix)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        _log.warning("%s: cannot be kept, and is fetched again next time (%s)", path, error)
    return content


def _download(wanted: Download) -> bytes:
    """What is there, one byte longer than wanted at most."""
    import urllib.request  # here, since it loads SSL and more

    longest = _LONGEST * max(1.0, wanted.size / _LARGE)
    deadline = time.monotonic() + longest
    content = bytearray()
    with urllib.request.urlopen(wanted.url, timeout=_TIMEOUT) as response:
        while chunk := response.read1(min(_CHUNK, wanted.size + 1 - len(content))):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"no more than {len(content)} bytes in {longest:.0f} s")
    return bytes(content)


def _sha256(content: bytes) -> str:
    import hashlib  # here, since it loads OpenSSL

    return hashlib.sha256(content).hexdigest()
