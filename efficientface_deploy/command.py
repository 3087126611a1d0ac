"""One frozen dataclass per command, mapped to argparse, and one way for a command to end.

A field becomes an option: ``input_size: int`` is ``--input-size N``; a ``bool`` that is False by
default is a switch; a tuple takes several values; ``option(positional=True)`` has no dashes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

from efficientface_deploy.errors import ConfigError, EfficientFaceError, words_of

Config = TypeVar("Config")

_Handler = Callable[[int, FrameType | None], None]


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    positional: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare a dataclass field as a command-line option.

    Args:
        default: Value when the option is absent; without one the option is required.
        help: One line for ``--help``.
        choices: Accepted values.
        metavar: Name of the value in ``--help``.
        positional: True for an argument without dashes.
        minimum: Smallest accepted number.
        maximum: Largest accepted number.
    """
    metadata: dict[str, Any] = dict(help=help, choices=choices, metavar=metavar)
    metadata.update(positional=positional, minimum=minimum, maximum=maximum)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(
    config_class: type[Config], argv: Sequence[str] | None, *, prog: str, description: str
) -> Config:
    """Parse a command line into a config dataclass.

    Args:
        config_class: A dataclass whose fields were made by :func:`option`.
        argv: Arguments without the program's name; None reads ``sys.argv``.
        prog: Name in the usage line.
        description: First paragraph of ``--help``.

    Returns:
        An instance of ``config_class``.
    """
    parser = OneLineParser(prog=prog, description=description)
    add_options(parser, config_class)
    return config_from(config_class, parser.parse_args(argv))


def add_options(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """Add one option per field of ``config_class`` to ``parser`` (for sub-commands)."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        names, keywords = _argument(field, hints[field.name])
        parser.add_argument(*names, **keywords)


def config_from(config_class: type[Config], namespace: argparse.Namespace) -> Config:
    """Make the config from parsed arguments; reports numbers that cannot be meant.

    Raises:
        ConfigError: A number is outside the range that its option states, or not finite.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        value = getattr(namespace, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            _check_number(field, number)
    return config_class(**values)


def _check_number(field: dataclasses.Field[Any], number: Any) -> None:
    """Refuse a number outside its option's range; anything else passes."""
    name = _option_name(field)
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    if isinstance(number, float) and not math.isfinite(number):
        expected, fix = "a finite number", "a finite value"
    elif minimum is not None and number is not None and number < minimum:
        expected, fix = f"at least {minimum}", "a larger value"
    elif maximum is not None and number is not None and number > maximum:
        expected, fix = f"at most {maximum}", "a smaller value"
    else:
        return
    raise ConfigError(name, expected, str(number), f"give {name} {fix}")


def _option_name(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("positional"):
        return field.name
    return "--" + field.name.rstrip("_").replace("_", "-")


def _argument(field: dataclasses.Field[Any], hint: Any) -> tuple[list[str], dict[str, Any]]:
    """Translate one dataclass field into the arguments of ``add_argument``."""
    metadata = field.metadata
    required = field.default is dataclasses.MISSING
    keywords: dict[str, Any] = {"help": metadata["help"].replace("%", "%%")}
    if not required:
        keywords["default"] = field.default
        if field.default not in (None, (), "") and not isinstance(field.default, bool):
            keywords["help"] += " (default: %(default)s)"

    kind, several = _element_type(hint)
    if kind is bool:
        switch = field.default is False
        keywords["action"] = "store_true" if switch else argparse.BooleanOptionalAction
    else:
        keywords["type"] = kind
        keywords |= {name: metadata[name] for name in ("choices", "metavar") if metadata[name]}
        if several:
            keywords["nargs"] = "+" if required else "*"

    if metadata["positional"]:
        if not several and not required:
            keywords["nargs"] = "?"
        return [field.name], keywords
    if required:
        keywords["required"] = True
    keywords["dest"] = field.name
    return [_option_name(field)], keywords


def _element_type(hint: Any) -> tuple[Callable[[str], Any], bool]:
    """Reduce ``T``, ``T | None`` and ``tuple[T, ...]`` to (T, takes several values)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line: what is wrong and where to look."""

    def error(self, message: str) -> typing.NoReturn:
        """Print one line and exit 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def run_command(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a command to its exit code: 0 done, 1 failed verification, 2 bad input, 130 interrupt.

    An expected error is printed as one line on standard error, never as a traceback. SIGTERM is
    an interrupt like Ctrl-C: what the command was writing is taken away.
    """
    code = 0
    try:
        with signals_handled_by({signal.SIGTERM: _interrupt}):
            code = main() or 0
    except EfficientFaceError as error:
        code = _complain(error, error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted; nothing half-written is left behind", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        pass  # the reader (head, less) went away: no error of ours
    except OSError as error:
        code = _complain(error)  # a full disk, a missing permission: the system says what to do
    flushed = _flush()
    sys.exit(code or flushed)


def _complain(error: BaseException, code: int = 2) -> int:
    print(f"error: {words_of(error, sys.maxsize)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def interrupts_wait() -> Iterator[Sequence[int]]:
    """Let Ctrl-C and SIGTERM wait for the end of the block, and then have their effect.

    For steps that make sense only together, and for libraries that call Python and swallow what
    is raised there.

    Yields:
        The signals that wait, for a block that can end early.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    try:
        with signals_handled_by({signal.SIGINT: hold, signal.SIGTERM: hold}):
            yield held
    finally:
        if held:
            signal.raise_signal(held[0])


@contextlib.contextmanager
def signals_handled_by(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    """Handle signals otherwise for a while; in a thread, which may not, as before."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # only the main thread may
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _flush() -> int:
    """Write out what is buffered; Python itself would complain and exit 120.

    Returns:
        2 when it cannot be written, as to a full disk; 0 otherwise, a reader that went away too.
    """
    try:
        sys.stdout.flush()
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if isinstance(error, BrokenPipeError) else _complain(error)
