"""The documentation's site: `make docs`. Pages link to each other as they do in the repository.

The source folder is therefore the repository itself: a link to a Markdown file leads to its page,
one to any other file to a copy of it. Warnings are errors (`-W`): a link or an anchor that leads
nowhere, a reference that is not resolved, a public name or a field without a docstring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import efficientface_deploy  # noqa: E402

project = "EfficientFace Deploy"
version = release = efficientface_deploy.__version__
html_title = project

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/results/*/*.md", "**/MODEL_CARD.md", "*.md"]
SHOWN = {"docs", "benchmarks", "efficientface_deploy"}
exclude_patterns = [
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in SHOWN
]
exclude_patterns += ["README.md"]  # the repository's front page; docs/index.md is the site's

_aliases = ("DeviceArray", "Float32Array", "ImageSource", "Prior", "UInt8Array")

highlight_language = "bash"
myst_heading_anchors = 3  # as GitHub makes them
nitpicky = True
# No network is asked for the names of other libraries.
nitpick_ignore_regex = [("py:.*", r"(PIL|collections|numpy|os|pathlib|typing)\..*")]
nitpick_ignore = [("py:class", name) for name in _aliases]  # Sphinx 8 finds no type by this role
autodoc_type_aliases = {name: name for name in _aliases}  # docs/api.rst says what they are
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_ivar = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # index.html, which leads to docs/index.html
html_copy_source = html_show_copyright = False

logger = logging.getLogger(__name__)


class CommandHelp(Directive):
    """What a command's ``--help`` prints: ``.. command-help:: training.prepare rafdb``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Call the module's ``main``, with the arguments behind its name."""
        module, *arguments = self.arguments[0].split()
        os.environ["COLUMNS"] = "90"
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            importlib.import_module(module).main([*arguments, "--help"])
        text = printed.getvalue()
        if "\nexample:\n" not in text:
            raise self.error(f"{self.arguments[0]} --help printed no help")
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def head_result(app: Sphinx, name: str, source: list[str]) -> None:
    """Give a result's page a title, where its command wrote none; pages link to it, no menu."""
    if name.startswith("benchmarks/results/"):
        title = "" if source[0].startswith("# ") else f"# {name.split('/')[2]}\n\n"
        source[0] = f"---\norphan: true\n---\n\n{title}{source[0]}"


def report_missing(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Warn of a public member of ours that has no docstring: autodoc leaves it out in silence."""
    member = obj.fget if isinstance(obj, property) else inspect.unwrap(obj)
    if name.startswith("_") or not (inspect.isroutine(member) or inspect.isclass(member)):
        return None
    if not inspect.getdoc(member):
        logger.warning("%s has no docstring", getattr(member, "__qualname__", name))
    return None


def report_fields(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Warn of a documented name without a docstring, or a dataclass's field that it leaves out."""
    text = "\n".join(lines)
    if not text.strip():
        logger.warning("%s has no docstring", name)
    if what in ("class", "exception") and dataclasses.is_dataclass(obj):
        for field in dataclasses.fields(obj):
            if not field.name.startswith("_") and f"{field.name}:" not in text:
                logger.warning("%s says nothing of its field %s", name, field.name)


def name_aliases(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str, result: str
) -> tuple[str | None, str | None]:
    """Show a type alias within another type by its name, as Sphinx shows it alone."""
    shown = [
        text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
        for text in (arguments, result)
    ]
    return shown[0], shown[1]


def setup(app: Sphinx) -> None:
    """Register what this site adds to Sphinx."""
    app.add_directive("command-help", CommandHelp)
    app.add_lexer("mermaid", TextLexer)  # GitHub draws ARCHITECTURE.md's; its script is not ours
    app.connect("source-read", head_result)
    app.connect("autodoc-skip-member", report_missing)
    app.connect("autodoc-process-docstring", report_fields, priority=400)
    app.connect("autodoc-process-signature", name_aliases)
