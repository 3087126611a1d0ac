"""Errors of the toolkit: each says what was expected, what was found, and how to fix it."""

from __future__ import annotations

import errno
import os

_MAX_FOUND, _MAX_SUBJECT = 400, 1000  # characters that are shown

_MEMORY_FIX = "free memory, or give this process more (ulimit -v, a container's limit)"
_FILES_FIX = "close other files, or allow more (ulimit -n)"

# What libraries say, in errors of any class, where the system gives no more memory, threads or
# descriptors. Whatever their advice is, or ours for what else may be wrong, this is the cause.
_NO_FILES = "too many open files"
_NO_MEMORY = (
    *("cannot allocate memory", "can't allocate memory", "unable to allocate", "bad_alloc"),
    *("failed to map segment", "failed to launch worker thread", "pthread_create failed"),
)

# What the system refuses a command: what was expected, and what can be done.
_REFUSALS = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), ("a free file descriptor", _FILES_FIX)),
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        ("space for what is written", "free some on that disk, or choose another folder"),
    ),
    errno.EROFS: ("a disk that can be written", "choose another folder, or mount it writable"),
    errno.EIO: ("a disk that works", "check the disk, or choose another folder"),
    errno.ENOMEM: ("enough memory", _MEMORY_FIX),
}


class EfficientFaceError(Exception):
    """Base of every error that the toolkit raises on purpose; the command line exits 2 on it.

    The message is one printable line.

    Args:
        subject: What the error is about: a file, an option, a backend.
        expected: What should have been there.
        found: What was there instead.
        fix: What the user can do about it, as an instruction.
    """

    exit_code = 2

    def __init__(self, subject: object, expected: str, found: str, fix: str) -> None:
        fix = system_fix(found) or fix
        self.subject = str(subject)
        self.expected = expected
        self.found = found
        self.fix = fix
        found = found if len(found) <= _MAX_FOUND else found[:_MAX_FOUND] + "..."
        shown = _without_middle(self.subject)
        super().__init__(printable(f"{shown}: expected {expected}, found {found}; {fix}"))

    def __reduce__(self) -> tuple[object, ...]:
        # Data-loader workers send errors by pickle, which would pass the message alone.
        return type(self), (self.subject, self.expected, self.found, self.fix)


def _without_middle(text: str) -> str:
    """A text that is not too long: what is no path, as a picture in base64, would fill the log."""
    half = _MAX_SUBJECT // 2
    return text if len(text) <= _MAX_SUBJECT else f"{text[:half]}...{text[-half:]}"


def printable(text: str) -> str:
    """A text for one line: what a file holds or is called has no line breaks or control codes.

    Bytes of a file name that are no text are escaped: there is another name with a space.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else " " for char in text)


def words_of(error: object, length: int = 160) -> str:
    """What an error says, on one line: the beginning of it, or its class where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def system_words(error: OSError) -> str:
    """What the system says: ``no space left on device``, and the like."""
    return (error.strerror or type(error).__name__).lower()


def system_fix(error: object) -> str | None:
    """What to do about an error that comes from a system without memory or descriptors; else None.

    Args:
        error: An exception, or what it says.
    """
    if isinstance(error, MemoryError):
        return _MEMORY_FIX
    text = str(error).lower()
    if _NO_FILES in text:
        return _FILES_FIX
    if "shared memory" in text:  # /dev/shm is full, not the memory; who uses it knows what to do
        return None
    return _MEMORY_FIX if any(words in text for words in _NO_MEMORY) else None


def system_line(error: OSError) -> str:
    """One line about what the system refuses, with what can be done where that is known."""
    if error.errno not in _REFUSALS:
        return " ".join(str(error).split()) or type(error).__name__
    expected, fix = _REFUSALS[error.errno]
    subject = error.filename or "the system"
    return str(EfficientFaceError(subject, expected, system_words(error), fix))


def install_command(extra: str) -> str:
    """The command that installs an extra of ours, from where this package was installed."""
    import shlex  # late, as it is needed for errors alone

    return f"pip install {shlex.quote(f'{_origin()}[{extra}]')}"


def _origin() -> str:
    """The folder that this package was installed from, as pip wrote down, or its name."""
    import importlib.metadata  # late, as it takes long
    import json
    from urllib.parse import unquote, urlsplit

    for installed in importlib.metadata.distributions(name="efficientface-deploy"):
        recorded = json.loads(installed.read_text("direct_url.json") or "{}")
        url = urlsplit(recorded.get("url", ""))
        folder = unquote(url.path).removeprefix("/" * (os.name == "nt"))
        if url.scheme == "file" and os.path.isfile(os.path.join(folder, "setup.py")):
            return "." if os.path.realpath(folder) == os.getcwd() else folder
    return "efficientface-deploy"


class ConfigError(EfficientFaceError):
    """An option or an argument has a value that cannot be used."""


class SpecError(EfficientFaceError):
    """A ModelSpec is missing, malformed, or of a schema that this version does not know."""


class ImageError(EfficientFaceError):
    """An image cannot be read or is not what the runtime accepts."""


class DatasetError(EfficientFaceError):
    """A prepared data set is missing, empty or inconsistent."""


class CheckpointError(EfficientFaceError):
    """A training checkpoint cannot be used: unreadable, of another network, or not finite."""


class ArtifactError(EfficientFaceError):
    """An exported file cannot be used: unreadable, foreign, tampered with, or built elsewhere."""


class BackendError(EfficientFaceError):
    """A backend is unknown, not installed, or not able to do what was asked on this machine."""


class ProbeError(BackendError):
    """An engine computes something else than the file that it loaded says it must."""


class ExportError(EfficientFaceError):
    """An export could not deliver what was asked for."""


class VerificationError(EfficientFaceError):
    """An artifact was built but does not compute what the reference computes; exits 1."""

    exit_code = 1
