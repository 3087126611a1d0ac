from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import efficientface_deploy as ef
from efficientface_deploy.command import (
    Usage,
    choose_command,
    interrupts_wait,
    option,
    parse_config,
    run_command,
)
from efficientface_deploy.errors import ConfigError, ImageError, VerificationError


@dataclasses.dataclass(frozen=True)
class Config:
    images: tuple[Path, ...] = option((), positional=True, help="images")
    out: Path = option(Path("runs"), help="folder", first=True)
    engine: str = option("onnx", choices=("onnx", "trt"), help="engine")
    epochs: int = option(1, minimum=1, help="passes, 100 % of the data")
    rate: float = option(0.1, minimum=0, help="learning rate")
    seed: int = option(0, help="seed")
    teacher: Path | None = option(None, help="teacher")
    size: int | None = option(None, minimum=32, help="side", metavar="N")
    overwrite: bool = option(False, help="replace")
    flip: bool = option(True, help="flip")
    exclude: tuple[str, ...] = option((), help="nodes")
    batch: tuple[int, ...] = option((1, 8), minimum=1, help="batches")
    share: float = option(0.5, minimum=0, maximum=1, help="part")
    lambda_: float = option(1.5, help="a Python keyword")


@dataclasses.dataclass(frozen=True)
class Required:
    source: Path = option(positional=True, help="source")
    out: Path = option(help="folder")
    other: Path | None = option(None, positional=True, help="another")
    sizes: tuple[int, ...] = option((), choices=(1, 2), help="sizes")


def parse(*argv: str, config=Config):
    description = "What it does.\n\nAnd ``how``."
    return parse_config(config, argv, prog="prog", description=description, example="a --out b")


def test_defaults():
    assert parse() == Config()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["a.png", "b.png"], "images", (Path("a.png"), Path("b.png"))),
        (["--out", "x"], "out", Path("x")),
        (["--engine", "trt"], "engine", "trt"),
        (["--epochs", "3"], "epochs", 3),
        (["--rate", "0"], "rate", 0.0),
        (["--rate=1e-3"], "rate", 0.001),
        (["--seed", "-4"], "seed", -4),
        (["--teacher", "t.safetensors"], "teacher", Path("t.safetensors")),
        (["--size", "64"], "size", 64),
        (["--exclude", "a", "b", "--exclude", "c"], "exclude", ("a", "b", "c")),
        (["--batch", "4", "--batch", "2"], "batch", (4, 2)),
        (["--overwrite"], "overwrite", True),
        (["--flip"], "flip", True),
        (["--no-flip"], "flip", False),
        (["--exclude", "a", "b"], "exclude", ("a", "b")),
        (["--exclude"], "exclude", ()),
        (["--batch", "4"], "batch", (4,)),
        (["--lambda", "2"], "lambda_", 2.0),
    ],
)
def test_option_reaches_its_field(argv, field, value):
    config = parse(*argv)
    assert getattr(config, field) == value
    assert dataclasses.replace(config, **{field: getattr(Config(), field)}) == Config()


def test_required_and_optional_positionals():
    assert parse("a", "--out", "b", config=Required) == Required(Path("a"), Path("b"))
    assert parse("a", "c", "--out", "b", config=Required).other == Path("c")
    assert parse("a", "--out", "b", "--sizes", "2", "1", config=Required).sizes == (2, 1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--engine", "tflite"], "--engine: expected one of onnx, trt, found 'tflite'; "),
        (["--engine", "onx"], r"found 'onx'; did you mean onnx\? "),
        (["--epochs", "many"], "--epochs: expected a whole number, found 'many'; "),
        (["--epochs", "1.5"], "--epochs: expected a whole number, found '1.5'; "),
        (["--rate", "fast"], "--rate: expected a number, found 'fast'; "),
        (["--batch", "1", "x"], "--batch: expected a whole number, found 'x'; "),
        (["--out"], "--out: expected a value, found none; "),
        (["--rate=--"], "--rate: expected a value, found '--'; "),
        (["--out=--"], "--out: expected a value, found '--'; "),
        (["--out", ""], "--out: expected a path, found an empty text; "),
        (["--unknown"], "--unknown: expected an option of prog, found none of this name; "),
        (["--epoch5=3"], "--epoch5: expected an option of prog, found none of this name; did you"),
        (["-seed", "3"], r"did you mean --seed\? "),
        (["--e", "3"], "prog: expected .*--e could match --engine, --epochs, --exclude; "),
        (["--flip=yes"], "--flip.*'yes'; "),
    ],
)
def test_bad_argument_is_one_line(argv, said, capsys):
    with pytest.raises(ConfigError, match=f"^.*{said}.*see prog --help$"):
        parse(*argv)
    assert capsys.readouterr() == ("", "")  # nothing of argparse's own


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "prog: expected SOURCE, --out, found no arguments; type e.g. prog a --out b"),
        (["a"], "prog: expected --out, found none; type e.g. prog a --out b"),
        (["--out", "b"], "prog: expected SOURCE, found none; type e.g. prog a --out b"),
        (["a", "b", "c", "--out", "d"], "c: expected no more arguments for prog, found this one; "),
    ],
)
def test_arguments_too_few_or_too_many(argv, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        parse(*argv, config=Required)


def test_arguments_may_stand_before_and_after_options():
    assert parse("a", "--out", "x", "b").images == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("argv", "images", "out"),
    [
        (["--", "-a.png"], ["-a.png"], "runs"),
        (["a", "--out", "x", "--", "--out", "-b"], ["a", "--out", "-b"], "x"),
        (["a", "--", "b", "--"], ["a", "b", "--"], "runs"),
        (["a", "--"], ["a"], "runs"),
    ],
)
def test_what_follows_two_dashes_is_no_option(argv, images, out):
    config = parse(*argv)
    assert (config.images, config.out) == (tuple(map(Path, images)), Path(out))


def test_argument_too_many_after_two_dashes_is_named_as_it_was_typed():
    with pytest.raises(ConfigError, match=r"^-c: expected no more arguments for prog, found this"):
        parse("--out", "d", "--", "a", "b", "-c", config=Required)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--rate", "-0.1"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--rate", "inf"], "--rate"),
        (["--lambda", "nan"], "--lambda"),
        (["--size", "31"], "--size"),
        (["--batch", "8", "0"], "--batch"),
        (["--share", "1.5"], "--share"),
    ],
)
def test_number_that_cannot_be_meant(argv, name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        parse(*argv)


def test_bounds_are_named_and_may_be_reached():
    assert (parse("--share", "0").share, parse("--share", "1").share) == (0, 1)
    with pytest.raises(ConfigError, match=r"at most 1, found 1\.01; give --share a smaller value"):
        parse("--share", "1.01")
    with pytest.raises(ConfigError, match=r"at least 0, found -1\.0; give --share a larger value"):
        parse("--share", "-1")


def test_help_shows_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for shown in (
        "100 % of the data (default: 1)",
        "seed (default: 0)",
        "engine (default: onnx)",
        "folder (default: runs)",
        "--size N",
        "--no-flip",
        "What it does.",
    ):
        assert shown in text
    assert "None" not in text and "``" not in text


def test_help_begins_with_an_example_and_what_matters_most(capsys):
    with pytest.raises(SystemExit):
        parse("-h")
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks[:2] == ["What it does.", "example:\n  prog a --out b"]
    first, also = (block.splitlines() for block in blocks[2:])
    assert (first[0], len(first)) == ("what matters most:", 2) and "--out PATH" in first[1]
    assert also[0] == "also:" and "--engine {onnx,trt}" in "".join(also)


@pytest.mark.parametrize("config", [Config, Required])
def test_version_is_shown_without_what_is_required(config, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version", config=config)
    assert (caught.value.code, capsys.readouterr().out) == (0, f"prog {ef.__version__}\n")


# ---- commands of a command

COMMANDS = {"rafdb": "one data set", "ferplus": "another"}


def choose(*argv: str) -> tuple[str, list[str]]:
    return choose_command(argv, COMMANDS, Usage("prog", "What it does.", "rafdb --out b"))


def test_first_word_is_the_command():
    assert choose("ferplus", "--out", "x") == ("ferplus", ["--out", "x"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "found no arguments; type e.g. prog rafdb --out b"),
        (["ferpuls"], "found 'ferpuls'; did you mean ferplus? see prog --help"),
        (["--out", "x"], "found '--out'; see prog --help"),
    ],
)
def test_no_such_command(argv, said):
    with pytest.raises(ConfigError, match=r"^prog: expected one of rafdb, ferplus, ") as caught:
        choose(*argv)
    assert said in str(caught.value)


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        choose("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "  rafdb    one data set\n  ferplus  another\n" in text and "prog rafdb --out b" in text


def test_version_of_several_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        choose("--version")
    assert (caught.value.code, capsys.readouterr().out) == (0, f"prog {ef.__version__}\n")


# ---- the end of a command


def finish(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") <= 1
    return caught.value.code, err


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_returned_code(value, code, capsys):
    assert finish(lambda: value, capsys) == (code, "")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ImageError("a", "b", "c\nd", "e"), 2, "a: expected b, found c d; e"),
        (VerificationError("a", "b", "c", "e"), 1, "a: expected b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/out/x"), 2, "/out/x: expected space for what is"),
        (OSError(24, "Too many open files"), 2, "expected a free file descriptor, found too many"),
        (OSError(30, "Read-only file system", "x"), 2, "x: expected a disk that can be written, f"),
        (PermissionError(), 2, "PermissionError"),
        (PermissionError(13, "No", "x"), 2, "[Errno 13] No: 'x'"),
        (
            MemoryError(),
            2,
            "the system: expected what this command needs of it, found MemoryError;",
        ),
        (RuntimeError("x.cpp:127: can't allocate memory"), 2, "127: can't allocate memory; free "),
        (RuntimeError("unable to open file: Too many open files (24)"), 2, "(ulimit -n)"),
    ],
)
def test_error_is_one_line_and_its_code(error, code, text, capsys):
    got, err = finish(failing(error), capsys)
    assert got == code
    assert err.startswith("error: ") and text in err


def test_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_exit_of_help_passes(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: parse("--help"))
    assert caught.value.code == 0


# ---- standard streams

BROKEN_PIPE = """
import os, sys
from pathlib import Path
from efficientface_deploy.command import run_command
reader, writer = os.pipe()
os.dup2(writer, int(sys.argv[1]))
os.close(reader)
def main():
    stream = (None, sys.stdout, sys.stderr)[int(sys.argv[1])]
    for _ in range(int(sys.argv[2])):
        print("x" * 1000, file=stream)
    print("x", file=stream, flush=True)
    Path(sys.argv[4]).write_text("done")
    return 1
run_command(main, ends_with_reader=sys.argv[3] == "ends")
"""


@pytest.mark.parametrize("lines", ["0", "1000"])  # less than a buffer, and more
@pytest.mark.parametrize(("stream", "kind"), [("1", "goes on"), ("2", "goes on"), ("2", "ends")])
def test_work_goes_on_without_a_reader(stream, kind, lines, run_python, tmp_path):
    result = run_python(BROKEN_PIPE, stream, lines, kind, str(tmp_path / "file"))
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize("lines", ["0", "1000"])
def test_command_whose_output_is_its_product_ends_with_its_reader(lines, run_python, tmp_path):
    result = run_python(BROKEN_PIPE, "1", lines, "ends", str(tmp_path / "file"))
    assert (result.returncode, result.stderr) == (141, "")
    assert not (tmp_path / "file").exists()


def test_other_pipe_that_breaks_is_an_error(capsys):
    code, err = finish(failing(BrokenPipeError(32, "Broken pipe")), capsys)
    assert code == 2 and "Broken pipe" in err


PRINTS = """
import sys
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import ConfigError
def main():
    print("caf\\u00e9 \\udcff", flush=True)
    raise ConfigError("\\u4e2d", "a", "b", "c")
run_command(main)
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"caf\\xe9"), ("cp1252", b"caf\xe9"), ("utf-8", "caf\u00e9".encode())],
)
@pytest.mark.parametrize("to_a_pipe", [True, False])
def test_text_that_the_encoding_does_not_have_is_escaped(encoding, shown, to_a_pipe, tmp_path):
    out = subprocess.PIPE if to_a_pipe else (tmp_path / "out").open("wb")
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], stdout=out, stderr=subprocess.PIPE, env=environment
    )
    printed = done.stdout if to_a_pipe else (tmp_path / "out").read_bytes()
    assert printed.rstrip() == shown + b" \\udcff"
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr


CLOSED = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
if sys.argv[1] == "absent":
    sys.stdin = sys.stdout = sys.stderr = None
from pathlib import Path
from efficientface_deploy.command import run_command
def main():
    with Path(sys.argv[2]).open("w") as file:
        assert file.fileno() > 2
        os.write(1, b"what a library prints")
        print("text")
        print("text", file=sys.stderr)
        assert sys.stdin.read() == "" and not sys.stdout.isatty() and not sys.stderr.isatty()
        file.write("content")
    os.system("echo from a child")
    return 3
run_command(main)
"""


@pytest.mark.parametrize("kind", ["closed", "absent"])
def test_closed_streams_lead_nowhere(kind, run_python, tmp_path):
    result = run_python(CLOSED, kind, str(tmp_path / "file"))
    assert result.returncode == 3
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("kind", ["closed", "absent"])
def test_command_whose_output_is_its_product_needs_a_place_for_it(kind, tmp_path):
    code = CLOSED.replace("(0, 1, 2)", "(0, 1)").replace("= sys.stderr", "")
    code = code.replace("run_command(main)", "run_command(main, ends_with_reader=True)")
    words = [sys.executable, "-c", code, kind, str(tmp_path / "file")]
    result = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and not (tmp_path / "file").exists()
    assert result.stderr.startswith("error: standard output: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("lines", ["0", "1000"])
def test_notes_that_cannot_be_written_are_dropped(lines):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    code = """
import sys
from efficientface_deploy.command import run_command
def main():
    for _ in range(int(sys.argv[1])):
        print("x" * 1000, file=sys.stderr)
    print("note", file=sys.stderr)
    print("result")
run_command(main, ends_with_reader=True)
"""
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", code, lines]
        result = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, text=True)
    assert (result.returncode, result.stdout) == (0, "result\n")


def test_streams_are_as_before_after_a_command(capsys):
    before = sys.stdin, sys.stdout, sys.stderr
    finish(lambda: 0, capsys)
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_output_that_cannot_be_written_is_an_error(run_python):
    code = "import sys; sys.stdout = open('/dev/full', 'w')\n"
    code += "from efficientface_deploy.command import run_command\n"
    code += "run_command(lambda: print('x') or int(sys.argv[1]))"
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for returned, expected in (("0", 2), ("1", 1)):
        result = run_python(code, returned)
        assert result.returncode == expected
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", ["", "-u"])
def test_help_that_cannot_be_written_is_an_error(flags, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    words = [*flags.split(), "-m", "efficientface_deploy.cli", "--help"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "no space left" in result.stderr
    assert ("standard output" in result.stderr) == (not flags)


def test_file_that_begins_with_a_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-x.jpg").touch()
    with pytest.raises(ConfigError, match=r"type --, as in: -- -x\.jpg$"):
        parse("-x.jpg")


# ---- interrupts

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_ends_a_command_tidily(number, capsys):
    cleaned = []

    def main() -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    before = [signal.getsignal(each) for each in NUMBERS]
    code, err = finish(main, capsys)
    assert (code, cleaned) == (130, [True])
    assert "interrupted" in err
    assert [signal.getsignal(each) for each in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_interrupts_wait_for_the_end_of_the_block(number, capsys):
    steps = []

    def main() -> None:
        with interrupts_wait():
            signal.raise_signal(number)
            signal.raise_signal(number)
            steps.append("the rest of the block")
        steps.append("what follows it")

    assert finish(main, capsys)[0] == 130
    assert steps == ["the rest of the block"]


def test_interrupt_that_waited_goes_before_an_error():
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        raise ValueError


def in_a_finalizer(number):
    class Object:
        def __del__(self):
            signal.raise_signal(number)

    Object()


def in_a_weak_references_callback(number):
    thing = type("Thing", (), {})()
    watch = weakref.ref(thing, lambda gone: signal.raise_signal(number))
    del thing
    assert watch() is None


def in_a_function_that_c_calls(number):
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(number))()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "where", [in_a_finalizer, in_a_weak_references_callback, in_a_function_that_c_calls]
)
def test_interrupt_where_python_drops_exceptions(where, number, capsys):
    def main() -> None:
        where(number)
        for _ in range(1000):
            time.sleep(0.01)

    hook = sys.unraisablehook
    code, err = finish(main, capsys)
    assert (code, err) == (130, "error: interrupted; nothing half-written is left behind\n")
    assert sys.unraisablehook is hook


def test_other_exceptions_that_python_drops_are_told_as_before(monkeypatch):
    class Object:
        def __del__(self):
            raise ValueError("of a finalizer")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_value))
    with pytest.raises(SystemExit):
        run_command(lambda: Object() and None)
    assert str(told[0]) == "of a finalizer"


def test_block_without_an_interrupt():
    before = [signal.getsignal(each) for each in NUMBERS]
    with interrupts_wait():
        assert [signal.getsignal(each) for each in NUMBERS] != before
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_commands_run_in_threads_too():
    """Where signals cannot be handled."""
    codes = []

    def run() -> None:
        def main() -> int:
            with interrupts_wait():
                return 1

        try:
            run_command(main)
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [1]
