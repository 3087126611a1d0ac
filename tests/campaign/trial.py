"""Cases in a process of their own, one after the other: what came of each, its time, its memory.

A child is forked for a group of cases. It ends with the group, with the first case that hangs or
kills it, and another goes on behind that one. In it, code that a file brings along is caught when
it unpickles by name, starts a program, opens a connection, or touches a file outside its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from row import Row

from benchmarks.measure.processes import memory_kb
from efficientface_deploy.command import run_command
from efficientface_deploy.errors import EfficientFaceError

_MEGABYTE = 1 << 20
_ADDRESS_SPACE = 12 << 30  # bytes; beyond it a case fails instead of the machine
_HANGS = 6  # times the bound in CPU seconds: a case that waits so long will never end
_LONGEST = 6000  # characters of a line that is clear: the system names the longest path whole

_RUN = ("pickle.find_class", "os.system", "os.exec", "os.spawn", "os.posix_spawn")
_CHANGE = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_OWN_PROGRAMS = ("git",)  # that describe_commit asks


class Refused(Exception):  # noqa: N818 - no error
    """A command ended with exit code 2, and said why in one line."""


class Outcome(NamedTuple):
    """Of one case: ``right``, ``refused``, or else what failed; its CPU seconds; its memory."""

    verdict: str
    seconds: float
    peak_mb: float


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of one kind.

    Attributes:
        what: Name.
        share: Cases at scale 1.
        attempt: Tries one case: it is given what draws, valid files, and a folder for its own. It
            returns after a right answer, and raises what the product raises.
        within_s: CPU seconds that a case may take.
        within_mb: Memory that the process may have.
    """

    what: str
    share: int
    attempt: Callable[[random.Random, Path, Path], None]
    within_s: float = 20
    within_mb: float = 1500


def run_group(group: Group, scale: float, seed: int, seeds: Path, folder: Path) -> Row:
    """Try the cases of a group.

    Args:
        group: The group.
        scale: Of their number.
        seed: Of all that is drawn.
        seeds: Valid files.
        folder: For what the cases write.
    """
    count = max(1, round(group.share * scale))
    found: list[Outcome] = []
    while len(found) < count:
        found += _run_cases(group, range(len(found), count), seed, seeds, folder)
    verdicts = [outcome.verdict for outcome in found]
    failures = tuple(
        f"{verdict} (python tests/campaign/inputs.py {group.what!r} {number} {seed})"
        for number, verdict in enumerate(verdicts)
        if verdict not in ("right", "refused")
    )
    return Row(
        "inputs",
        group.what,
        tried=count,
        right=verdicts.count("right"),
        refused=verdicts.count("refused"),
        failures=failures,
        slowest_s=max(outcome.seconds for outcome in found),
        within_s=group.within_s,
        peak_mb=max(outcome.peak_mb for outcome in found),
        within_mb=group.within_mb,
    )


def _run_cases(group: Group, numbers: range, seed: int, seeds: Path, folder: Path) -> list[Outcome]:
    """Outcomes of the first of these cases: of all, or up to one that ends its process."""
    read, write = os.pipe()
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            os.close(read)
            _be_a_child(folder)
            with os.fdopen(write, "w") as pipe:
                for number in numbers:
                    outcome = try_case(group, number, seed, seeds, folder)
                    print(json.dumps(outcome), file=pipe, flush=True)
        finally:
            os._exit(0)
    os.close(write)
    found: list[Outcome] = []
    ended = "ended its process"
    with os.fdopen(read, "rb", buffering=0) as pipe:
        waiting = b""
        while len(found) < len(numbers):
            if not select.select([pipe], [], [], _HANGS * group.within_s)[0]:
                ended = f"hung for {_HANGS * group.within_s:g} s"
                break
            if not (part := pipe.read(1 << 16)):
                break
            *lines, waiting = (waiting + part).split(b"\n")
            found += [Outcome(*json.loads(line)) for line in lines]
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if len(found) < len(numbers):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        died = f"{ended} ({signal.Signals(number).name})" if number else ended
        found.append(Outcome(died, group.within_s, 0))
    return found


def _be_a_child(folder: Path) -> None:
    """Limit this process, silence what libraries print, and watch what it does."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    faulthandler.disable()  # pytest's has a descriptor of its own
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    sys.addaudithook(_watch(folder))


_seen: list[str] = []  # what was caught in the case that runs


def _watch(folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    inside = (os.fspath(folder), os.devnull, "/proc/self/", "/dev/shm/")

    def is_outside(path: Any) -> bool:
        if not isinstance(path, (str, bytes)):
            return False  # a descriptor, which was opened before
        return not os.path.abspath(os.fsdecode(path)).startswith(inside)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        caught = event in _RUN
        if event == "subprocess.Popen":
            caught = os.path.basename(os.fsdecode(args[0])) not in _OWN_PROGRAMS
        elif event == "socket.connect":
            caught = not (isinstance(args[1], tuple) and args[1][0] == "127.0.0.1")
        elif event == "open":
            caught = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and is_outside(args[0])
            caught = caught or "secret" in str(args[0])
        elif event in _CHANGE:
            caught = is_outside(args[1 if event in ("os.link", "os.symlink") else 0])
        if caught:
            _seen.append(f"{event} {args!r}"[:200])

    return hook


def try_case(
    group: Group, number: int, seed: int, seeds: Path, folder: Path, *, keep: bool = False
) -> Outcome:
    """Try one case in this process; ``keep`` its files, and print the traceback."""
    rng = random.Random(f"{seed} {group.what} {number}")
    here = Path(tempfile.mkdtemp(dir=folder, prefix="case-"))
    (outside := folder / "secret").mkdir(exist_ok=True)
    before = sorted(os.listdir(outside))
    _seen.clear()
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak of the memory anew
    start = time.process_time()  # others use the cores too
    try:
        os.chdir(here)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group.attempt(rng, seeds, here)
        verdict = "right"
    except (Refused, EfficientFaceError, OSError) as error:
        text = str(error)
        named = not isinstance(error, OSError) or error.filename  # commands print both as they are
        verdict = "refused" if named and _is_clear(text) else f"not one clear line: {text[:200]!r}"
    except BaseException as error:  # noqa: BLE001 - it is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        verdict = f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
        if keep:
            traceback.print_exc()
    seconds = time.process_time() - start
    peak = _peak_mb()
    if sorted(os.listdir(outside)) != before:
        verdict = "wrote outside its folder"
        shutil.rmtree(outside)
    if _seen:
        verdict = f"did what it must not: {_seen[0]}"
    if seconds > group.within_s and verdict in ("right", "refused"):
        verdict = f"took {seconds:.1f} s"
    if peak > group.within_mb and verdict in ("right", "refused"):
        verdict = f"took {peak:.0f} MB"
    if not keep:
        shutil.rmtree(here, ignore_errors=True)
    return Outcome(verdict, seconds, peak)


def _is_clear(message: str) -> bool:
    return message.isprintable() and 0 < len(message) < _LONGEST


def _peak_mb() -> float:
    held = memory_kb("VmHWM")
    assert held is not None, "needs Linux's /proc"
    return held * 1024 / 1e6


def command(main: Callable[[Sequence[str]], int | None], words: Sequence[str]) -> str:
    """Run a command in this process as its user would, and give what it prints.

    Raises:
        Refused: It ended with 2, or a verification with 1.
        AssertionError: It ended otherwise, or said anything that is not a clear line.
    """
    output, errors = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            run_command(lambda: main(words))
        except SystemExit as end:
            code = end.code
    lines = errors.getvalue().splitlines()
    assert code in (0, 1, 2), f"exit {code}"
    for line in (*lines, *output.getvalue().splitlines()):
        assert line.isprintable(), f"a line with control characters: {line[:200]!r}"
    complaints = [line for line in lines if line.startswith("error: ")]
    assert bool(complaints) == (code != 0), f"exit {code}, and it says {lines[-3:]}"
    assert not any(line.startswith("Traceback") for line in lines), lines[-1]
    unnamed = [line for line in complaints if line.startswith("error: [Errno") and "'" not in line]
    assert not unnamed, f"no name of a file: {unnamed[0]}"
    if code:
        raise Refused(max(complaints, key=len))
    return output.getvalue()


def in_a_child(function: Callable[[], object]) -> None:
    """Call a function in a forked process: what starts threads would not survive later forks."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:  # noqa: BLE001 - said here, for nothing above would
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert not status, "valid files could not be made"
