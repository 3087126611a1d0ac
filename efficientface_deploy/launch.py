"""The start of every command, before anything is imported that takes long or may be missing."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, NoReturn

_OURS = ("efficientface_deploy", "efficientface_export", "training", "benchmarks")


def launch(module: str, extras: str, *, ends_with_reader: bool = False) -> NoReturn:
    """Import a command's module and run its ``main``, as :func:`run_command` runs it.

    Ctrl-C ends the imports as it ends the command, and a package that is missing is one line.
    A module that is run as a script calls this above its other imports.

    Args:
        module: Its name.
        extras: What brings all packages that it needs, e.g. ``cpu,export``.
        ends_with_reader: As of :func:`run_command`.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:  # until run_command says what Ctrl-C does
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from efficientface_deploy.command import run_command

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command(lambda: _run(module, extras), ends_with_reader=ends_with_reader)


def predict() -> NoReturn:
    """The console script ``efficientface-predict``."""
    launch("efficientface_deploy.cli", "cpu", ends_with_reader=True)


def export() -> NoReturn:
    """The console script ``efficientface-export``."""
    launch("efficientface_export.cli", "export,cpu")


def web() -> NoReturn:
    """The console script ``efficientface-web``."""
    launch("efficientface_deploy.web.server", "cpu")


def annotate() -> NoReturn:
    """The console script ``efficientface-annotate``."""
    launch("efficientface_deploy.batch.cli", "cpu,batch")


def _run(module: str, extras: str) -> Any:
    from efficientface_deploy.errors import BackendError, install_command, system_fix, words_of

    try:
        return importlib.import_module(module).main()
    except ImportError as error:
        package, cause = (error.name or "").partition(".")[0], error
        while isinstance(cause.__cause__, ImportError):  # NumPy says a page about it
            cause = cause.__cause__
        if system_fix(cause):
            package = ""  # it is no fault of the package
        elif package in _OURS or package in sys.stdlib_module_names:
            raise  # a defect of ours
        found = "it is not installed"
        if not isinstance(error, ModuleNotFoundError):
            found = f"one that cannot be imported ({words_of(cause)})"
        expected = f"the package {package}" if package else "packages that can be imported"
        raise BackendError(module, expected, found, install_command(extras)) from None
