"""One frozen dataclass per command, mapped to argparse, and one way for a command to end.

A field becomes an option: ``input_size: int`` is ``--input-size N``; a ``bool`` that is False by
default is a switch; a tuple takes several values; ``option(positional=True)`` has no dashes.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import logging
import math
import os
import signal
import stat
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar

from efficientface_deploy.errors import (
    ConfigError,
    EfficientFaceError,
    system_fix,
    system_line,
    words_of,
)

Config = TypeVar("Config")

_Handler = Callable[[int, FrameType | None], None]

_ESCAPED = "backslashreplace"  # what the encoding of a stream does not have
_READER_GONE = 128 + 13  # what a shell says of a program that SIGPIPE has ended


@dataclasses.dataclass(frozen=True)
class Usage:
    """How a command is typed.

    Attributes:
        prog: The command itself, e.g. ``python -m training.student``.
        description: A docstring; its first paragraph is shown.
        example: Arguments that do something useful.
    """

    prog: str
    description: str
    example: str

    @property
    def typed(self) -> str:
        """The whole example."""
        return f"{self.prog} {self.example}".rstrip()

    @property
    def summary(self) -> str:
        """The description's first paragraph, on one line."""
        return " ".join(self.description.partition("\n\n")[0].split())


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    positional: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    first: bool = False,
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
        first: Whether it is one of the few that ``--help`` shows before the others.
    """
    metadata: dict[str, Any] = dict(help=help, choices=choices, metavar=metavar)
    metadata.update(positional=positional, minimum=minimum, maximum=maximum, first=first)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(
    config_class: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    example: str,
) -> Config:
    """Parse a command line into a config dataclass; ``--help`` and ``--version`` end the process.

    What follows ``--`` are arguments without dashes, whatever they begin with.

    Args:
        config_class: A dataclass whose fields were made by :func:`option`.
        argv: Arguments without the program's name; None reads ``sys.argv``.
        prog: The command as it is typed.
        description: What it does; the first paragraph is shown.
        example: Arguments that do something useful, for ``--help`` and for who gave none.

    Returns:
        An instance of ``config_class``.

    Raises:
        ConfigError: An option is unknown, missing, without a value, or has one that cannot be
            meant.
    """
    usage = Usage(prog, description, example)
    words = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    if not words and any(map(_is_required, fields)):
        raise ConfigError(prog, _required_names(fields), "no arguments", f"type e.g. {usage.typed}")
    parser = _Parser(usage)
    for field in sorted(fields, key=lambda field: not field.metadata["first"]):
        parser.add_field(field, hints[field.name])
    given = parser.read(words)
    values = {
        field.name: _convert(field, hints[field.name], given[field.name], usage)
        for field in fields
        if field.name in given
    }
    if missing := [field for field in fields if _is_required(field) and not values.get(field.name)]:
        raise ConfigError(prog, _required_names(missing), "none", f"type e.g. {usage.typed}")
    return config_class(**values)


def choose_command(
    argv: Sequence[str] | None, commands: Mapping[str, str], usage: Usage
) -> tuple[str, list[str]]:
    """Split a command line at its first word, the name of a command; ``--help`` lists them.

    Args:
        argv: Arguments without the program's name; None reads ``sys.argv``.
        commands: Names, and what each does.
        usage: How they are typed.

    Returns:
        The name, and the arguments that follow it.

    Raises:
        ConfigError: It is none of them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(_version(usage.prog))
        sys.exit(0)
    if words[:1] in (["-h"], ["--help"]):
        width = max(map(len, commands))
        print(f"{usage.summary}\n\nexample:\n  {usage.typed}\n\ncommands, each with --help:")
        print("\n".join(f"  {name:{width}}  {text}" for name, text in commands.items()))
        sys.exit(0)
    expected = "one of " + ", ".join(commands)
    if not words:
        raise ConfigError(usage.prog, expected, "no arguments", f"type e.g. {usage.typed}")
    if words[0] not in commands:
        raise ConfigError(usage.prog, expected, repr(words[0]), _guess(words[0], commands, usage))
    return words[0], words[1:]


def _guess(word: str, known: Iterable[str], usage: Usage) -> str:
    """What to do about a word that is not known: name the one that looks most like it."""
    close = difflib.get_close_matches(word, list(known), 1)
    return (f"did you mean {close[0]}? " if close else "") + f"see {usage.prog} --help"


# ---- from fields to arguments


class _Parser(argparse.ArgumentParser):
    """Sorts words to options. Defaults and conversion are not its; it complains by ConfigError."""

    def __init__(self, usage: Usage) -> None:
        example = f"{usage.summary}\n\nexample:\n  {usage.typed}"
        super().__init__(
            prog=usage.prog,
            usage=argparse.SUPPRESS,  # of twenty options nobody reads it; the example says more
            description=example.replace("%", "%%"),
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, max_help_position=28
            ),
            argument_default=argparse.SUPPRESS,
            add_help=False,
            exit_on_error=False,
        )
        self._usage = usage
        self._first = self.add_argument_group("what matters most")
        self._others = self.add_argument_group("also")

    def add_field(self, field: dataclasses.Field[Any], hint: Any) -> None:
        """Add the option that a field declares."""
        names, keywords = _argument(field, hint)
        group = self._first if field.metadata["first"] else self._others
        group.add_argument(*names, **keywords)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The text given for each field; fields that nothing was given for are left out.

        Raises:
            ConfigError: A word belongs to no option, or an option lacks its value.
        """
        self._others.add_argument("-h", "--help", action="help", help="show this, and exit")
        version = _version(self.prog)
        self._others.add_argument(
            "--version", action="version", version=version, help="show the version, and exit"
        )
        see = f"see {self.prog} --help"
        try:
            namespace, rest = self.parse_known_intermixed_args(_protected(words))
        except argparse.ArgumentError as error:
            expected, name = "a use that --help shows", error.argument_name or self.prog
            found = error.message
            if found.startswith("expected "):  # one argument
                expected, found = "a value", "none"
            raise ConfigError(name, expected, found, see) from None
        for name in (word.partition("=")[0] for word in rest if word.startswith("-")):
            fix = _guess(name, self._option_string_actions, self._usage)
            if os.path.lexists(name):
                fix = f"before the names of files that begin with a dash type --, as in: -- {name}"
            raise ConfigError(name, f"an option of {self.prog}", "none of this name", fix)
        if rest:
            found = rest[0].removeprefix(_NO_OPTION)
            raise ConfigError(found, f"no more arguments for {self.prog}", "this one", see)
        return {name: _unprotected(value) for name, value in vars(namespace).items()}

    def _print_message(self, message: str, file: Any = None) -> None:
        file.write(message)  # argparse's own is silent about a full disk

    def error(self, message: str) -> typing.NoReturn:
        """Say what is wrong as every other error is said."""
        raise ConfigError(
            self.prog, "options as --help shows them", message, f"see {self.prog} --help"
        )


_NO_OPTION = "\0"  # which no argument of a process can hold


def _protected(words: Sequence[str]) -> list[str]:
    """The words without ``--``; what follows it is marked, or argparse would take it for options.

    It drops ``--`` and then parses the rest again, where it intermixes options and arguments.
    """
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], *(_NO_OPTION + word for word in words[at + 1 :])]


def _unprotected(value: Any) -> Any:
    if isinstance(value, list):
        return [_unprotected(one) for one in value]
    return value.removeprefix(_NO_OPTION) if isinstance(value, str) else value


def _version(prog: str) -> str:
    package = sys.modules[__package__]  # imported by now; by name it would be a circle
    return f"{prog} {package.__version__}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _required_names(fields: Iterable[dataclasses.Field[Any]]) -> str:
    return ", ".join(_option_name(field) for field in fields if _is_required(field))


def _option_name(field: dataclasses.Field[Any]) -> str:
    if field.metadata["positional"]:
        return field.metadata["metavar"] or field.name.upper()
    return "--" + field.name.rstrip("_").replace("_", "-")


def _argument(field: dataclasses.Field[Any], hint: Any) -> tuple[list[str], dict[str, Any]]:
    """Translate one dataclass field into the arguments of ``add_argument``."""
    metadata, default = field.metadata, field.default
    kind, several = _element_type(hint)
    text = metadata["help"]
    if _is_required(field):
        text += " (required)"
    elif default not in (None, (), "") and not isinstance(default, bool):
        text += f" (default: {default})"
    keywords: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind is bool:
        switch = default is False
        keywords["action"] = "store_true" if switch else argparse.BooleanOptionalAction
    else:
        choices = metadata["choices"] and f"{{{','.join(map(str, metadata['choices']))}}}"
        name = field.name.rstrip("_").upper()
        name = name if metadata["positional"] else _METAVARS.get(kind, name)
        keywords["metavar"] = metadata["metavar"] or choices or name
        if several:
            keywords["nargs"] = "*"
            if not metadata["positional"]:
                keywords["action"] = "extend"  # given twice it has the values of both
        elif metadata["positional"]:
            keywords["nargs"] = "?"
    if metadata["positional"]:
        return [field.name], keywords
    return [_option_name(field)], {**keywords, "dest": field.name}


_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


def _element_type(hint: Any) -> tuple[Callable[[str], Any], bool]:
    """Reduce ``T``, ``T | None`` and ``tuple[T, ...]`` to (T, takes several values)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


# ---- from words to values

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


def _convert(field: dataclasses.Field[Any], hint: Any, given: Any, usage: Usage) -> Any:
    """The value of a field from what was typed.

    Raises:
        ConfigError: It has none of that kind, or one that is outside the option's range.
    """
    kind, several = _element_type(hint)
    if kind is bool:
        return given
    if not several and not isinstance(given, str):  # argparse gives [] for --name=--
        raise ConfigError(_option_name(field), "a value", "'--'", f"see {usage.prog} --help")
    values = tuple(_value(field, kind, text, usage) for text in (given if several else [given]))
    return values if several else values[0]


def _value(
    field: dataclasses.Field[Any], kind: Callable[[str], Any], text: str, usage: Usage
) -> Any:
    name, choices = _option_name(field), field.metadata["choices"]
    if not text and (kind is Path or field.metadata["positional"]):
        raise ConfigError(name, "a path", "an empty text", f"see {usage.prog} --help")
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(name, _KINDS[kind], repr(text), f"see {usage.prog} --help") from None
    if choices and value not in choices:
        known = [str(choice) for choice in choices]
        expected = "one of " + ", ".join(known)
        raise ConfigError(name, expected, repr(text), _guess(text, known, usage))
    _check_number(field, value)
    return value


def _check_number(field: dataclasses.Field[Any], number: Any) -> None:
    """Refuse a number outside its option's range; anything else passes."""
    name = _option_name(field)
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    if isinstance(number, float) and not math.isfinite(number):
        expected, fix = "a finite number", "a finite value"
    elif minimum is not None and number < minimum:
        expected, fix = f"at least {minimum}", "a larger value"
    elif maximum is not None and number > maximum:
        expected, fix = f"at most {maximum}", "a smaller value"
    else:
        return
    raise ConfigError(name, expected, str(number), f"give {name} {fix}")


# ---- the end of a command


def run_command(
    main: Callable[[], int | None], *, ends_with_reader: bool = False
) -> typing.NoReturn:
    """Run a command to its exit code: 0 done, 1 failed verification, 2 bad input, 130 interrupt.

    An expected error is printed as one line on standard error, never as a traceback. SIGTERM is
    an interrupt like Ctrl-C: what the command was writing is taken away. Text that the terminal's
    encoding does not have is escaped.

    Args:
        main: The command.
        ends_with_reader: What becomes of a command whose output nobody reads any more, as after
            ``| head -1``: it ends with 141, as a shell has it, where its output is its product. By
            default its product is files, and it goes on without a word.
    """
    with _safe_streams(ends_with_reader) as nowhere:
        try:
            code: int | str | None = _exit_code(_refuse if ends_with_reader and nowhere else main)
        except SystemExit as end:  # of --help
            code = end.code
        flushed = _flush()
    sys.exit(code or flushed)


def _exit_code(main: Callable[[], int | None]) -> int:
    try:
        with signals_handled_by({signal.SIGTERM: _interrupt}), _interrupts_come_again():
            return main() or 0
    except EfficientFaceError as error:
        return _complain(error, error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    except OSError as error:
        return _complain(system_line(error))  # a full disk, a missing permission, ...
    except Exception as error:
        if (fix := system_fix(error)) is None:
            raise  # a defect of ours
        expected = "what this command needs of it"
        return _complain(EfficientFaceError("the system", expected, words_of(error), fix))


def _refuse() -> NoReturn:
    wanted, fix = "a terminal, a file or a pipe for the results", "leave >&- out, or add > FILE"
    raise ConfigError("standard output", wanted, "a closed one", fix)


def _complain(error: object, code: int = 2) -> int:
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


@contextlib.contextmanager
def _interrupts_come_again() -> Iterator[None]:
    """Send an interrupt once more that came where Python drops every exception.

    A signal's handler runs between any two instructions of the main thread: also in a ``__del__``,
    in a weak reference's callback, or in a function that C calls. Nothing leaves these but a line
    "Exception ignored in", and the command would go on.
    """
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # Later, for here it would be dropped again. SIGTERM, for a shell's "&" ignores SIGINT.
            timer = threading.Timer(0.01, _thread.interrupt_main, [signal.SIGTERM])
            timer.daemon = True
            timer.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


# ---- standard streams


class _Outlet(io.FileIO):
    """A stream that may stop taking what is written: that is dropped then, or ends the program."""

    ends_program = False
    dropped_after: type[OSError] = ConnectionError  # a reader that went away, of pipe or socket

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except self.dropped_after:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.ends_program:
                sys.exit(_READER_GONE)
            return len(data)


@contextlib.contextmanager
def _safe_streams(ends_with_reader: bool) -> Iterator[bool]:
    """Standard streams that are there, take any text, and survive their reader.

    Yields:
        Whether standard output was closed.
    """
    closed = set()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed, as by >&-: the next file would get its number, and what is printed.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            closed.add(number)
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _safe_stream(sys.stdout, ends_with_reader=ends_with_reader)
    sys.stderr = _safe_stream(sys.stderr, only_notes=True)
    try:
        yield 1 in closed
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _safe_stream(
    stream: TextIO | None, *, ends_with_reader: bool = False, only_notes: bool = False
) -> TextIO:
    """A stream that survives its reader, and with ``only_notes`` a full disk, too."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's
        return stream
    stream.reconfigure(errors=_ESCAPED)
    try:
        kind = os.fstat(stream.fileno()).st_mode
    except OSError:  # not the system's, as in tests
        return stream
    if not (only_notes or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return stream
    stream.flush()
    outlet = _Outlet(stream.fileno(), "w", closefd=False)
    outlet.ends_program = ends_with_reader
    if only_notes:
        outlet.dropped_after = OSError
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors=_ESCAPED,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _flush() -> int:
    """Write out what is buffered; Python itself would complain and exit 120.

    Returns:
        2 when it cannot be written, as to a full disk; 0 otherwise.
    """
    try:
        sys.stdout.flush()
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "standard output"
        return _complain(system_line(error))


@contextlib.contextmanager
def log_told(name: str) -> Iterator[None]:
    """Print on standard error what a logger says."""
    log, told = logging.getLogger(name), logging.StreamHandler()
    log.addHandler(told)
    try:
        yield
    finally:
        log.removeHandler(told)
