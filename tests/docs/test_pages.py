"""The documentation: links lead somewhere, and the commands that it shows can be typed.

`make docs` checks more, and needs Sphinx.
"""

from __future__ import annotations

import importlib
import re
import shlex
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

from benchmarks.report import publish
from efficientface_deploy.command import parse_config
from efficientface_deploy.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "efficientface_deploy" / "weights" / "MODEL_CARD.md",
]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"\s]+)\"")
SCRIPTS = {
    "efficientface-export": "efficientface_export.cli",
    "efficientface-annotate": "efficientface_deploy.batch.cli",
    "efficientface-predict": "efficientface_deploy.cli",
    "efficientface-web": "efficientface_deploy.web.server",
}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its code."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"`[^`]+`", lambda code: code[0].translate(str.maketrans("[]()", "    ")), text)


def anchors(path: Path) -> list[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: list[str] = []
    kept = string.ascii_lowercase + string.digits + "-_ "
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", path.read_text("utf-8")), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = "".join(letter for letter in words if letter in kept).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return found


def links(path: Path) -> Iterator[str]:
    """What a page links to within the repository."""
    for parts in LINK.findall(prose(path)):
        target = "".join(parts)
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_a_file_and_a_heading_of_the_repository(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(ROOT), f"{named(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{named(page)}: {link}"


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n\n`[a](b)` [c\nd](e.md#f) ![g](h.png)\n```\n[i](j)\n```\n## K (l)\n"
    )
    assert list(links(page)) == ["e.md#f", "h.png"]
    assert anchors(page) == ["one-two", "k-l"]


def test_pages_that_code_and_text_name_are_there() -> None:
    folders = ("benchmarks", "efficientface_deploy", "examples", "export", "tests", "training")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *PAGES, ROOT / "Makefile", ROOT / "setup.py"]:
        for name in re.findall(r"(?<![\w/.-])docs/[\w/-]+\.\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{named(path)}: {name}"


class Command(NamedTuple):
    """A command line of a page: the module behind it, and its arguments."""

    module: str
    arguments: Sequence[str]


def read_command(line: str) -> Command | None:
    """A line of a page as a command of ours; None for any other."""
    words = shlex.split(line, comments=True)
    for sign in ("|", ">"):
        if sign in words:
            part = words.index(sign)
            words = words[part + 1 :] if sign == "|" else words[:part]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"]:
        words = ["python", *words[words.index("-m") :]]
    if not words:
        return None
    program = Path(words[0]).name
    if program in SCRIPTS:
        return Command(SCRIPTS[program], words[1:])
    if program == "python" and words[1:2] == ["-m"]:
        module = words[2] + ".__main__" * (ROOT / words[2].replace(".", "/")).is_dir()
        return Command(module, words[3:])
    if program == "python" and words[1:2] and words[1].endswith(".py"):
        return Command(words[1][:-3].replace("/", "."), words[2:])
    return None


def commands_of(page: Path) -> Iterator[tuple[str, Command]]:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("", "sh", "bash", "console"):
            for line in code.splitlines():
                if (command := read_command(line)) is not None:
                    yield line, command


class ParsedError(Exception):
    """Raised when a command line was understood, in place of what the command would do."""


def check_command(command: Command) -> None:
    """Parse the command line as the command does.

    Raises:
        ConfigError: It is not understood.
    """

    def stop(*arguments: Any, **keywords: Any) -> None:
        parse_config(*arguments, **keywords)
        raise ParsedError

    module = importlib.import_module(command.module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParsedError):
        for parsing in (module, publish):  # publish parses for the benchmarks
            patch.setattr(parsing, "parse_config", stop, raising=parsing is publish)
        module.main(command.arguments)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_of_the_pages_have_the_options_that_are_shown(page: Path) -> None:
    for line, command in commands_of(page):
        try:
            check_command(command)
        except ConfigError as error:
            pytest.fail(f"{named(page)}: {line}: {error}")


def test_every_kind_of_command_is_read() -> None:
    found = {command.module for page in PAGES for _, command in commands_of(page)}
    trainings = {f"training.{name}" for name in ("prepare", "teacher", "student", "evaluate")}
    assert trainings | set(SCRIPTS.values()) | {"benchmarks.report.__main__"} <= found


def test_an_unknown_option_is_seen() -> None:
    command = read_command("OMP_NUM_THREADS=1 torchrun -m training.student --data a --out b --no")
    assert command == ("training.student", ["--data", "a", "--out", "b", "--no"])
    with pytest.raises(ConfigError, match="ambiguous option: --no"):
        check_command(command)


def manifests() -> list[str]:
    """The Kubernetes objects that pages show."""
    fences = [fence for page in PAGES for fence in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [code for language, code in fences if language == "yaml" and "apiVersion:" in code]


def check_manifest(text: str) -> None:
    kubernetes_validate.validate(
        yaml.safe_load(text), kubernetes_validate.latest_version(), strict=True
    )


def test_kubernetes_takes_the_manifests() -> None:
    assert manifests()
    for text in manifests():
        check_manifest(text)


@pytest.mark.parametrize("right, wrong", [("replicas: 3", "replicas: three"), ("Port", "Prt")])
def test_a_wrong_manifest_is_seen(right: str, wrong: str) -> None:
    text = manifests()[0].replace(right, wrong)
    with pytest.raises(kubernetes_validate.ValidationError):
        check_manifest(text)
