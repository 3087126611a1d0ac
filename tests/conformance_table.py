"""Run the conformance suite and write its table: backend by test, passed, or skipped and why.

A backend that is skipped has not been run, whatever it may do elsewhere.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from efficientface_deploy.command import option, parse_config, run_command  # noqa: E402
from efficientface_deploy.files import check_writable, write_text  # noqa: E402
from efficientface_deploy.workbench.environment import (  # noqa: E402
    describe_machine,
    describe_software,
)
from efficientface_deploy.workbench.tables import Table  # noqa: E402

SUITE = ROOT / "tests" / "efficientface_deploy" / "backends" / "test_conformance.py"


class Outcomes:
    """A plugin of pytest that keeps what became of each test of each backend.

    Attributes:
        outcomes: (test, backend) -> outcomes of its cases.
        reasons: Why a backend was skipped.
    """

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self.reasons: dict[str, str] = {}
        self._backends: dict[str, str] = {}  # node -> backend

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            if "subject" in parameters:
                self._backends[item.nodeid] = parameters["subject"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        backend = self._backends.get(report.nodeid)
        if backend is None or (report.when != "call" and report.passed):
            return
        test = report.nodeid.rpartition("::")[2].partition("[")[0]
        self.outcomes[test, backend].append(report.outcome)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons.setdefault(backend, report.longrepr[2].removeprefix("Skipped: "))

    def to_markdown(self, head: str) -> str:
        tests = list(dict.fromkeys(test for test, _ in self.outcomes))
        backends = list(dict.fromkeys(self._backends.values()))
        skipped = [name for name in backends if self._all_outcomes(name) == {"skipped"}]
        run = [name for name in backends if name not in skipped]
        rows = [
            [_words(test), *(_cell(self.outcomes[test, backend]) for backend in run)]
            for test in tests
        ]
        reasons = [[name, _plain(self.reasons.get(name, ""))] for name in skipped]
        parts = [
            head + "\n",
            Table(["test", *run], rows).to_markdown(),
            "Skipped as a whole, and so not run here:\n",
            Table(["backend", "why"], reasons).to_markdown(),
        ]
        return "\n".join(parts)

    def _all_outcomes(self, backend: str) -> set[str]:
        of_it = (found for (_, name), found in self.outcomes.items() if name == backend)
        return set().union(*of_it)


def _words(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def _cell(outcomes: list[str]) -> str:
    """``passed 12``, or every outcome with its count."""
    counts = collections.Counter(outcomes)
    return ", ".join(f"{outcome} {count}" for outcome, count in counts.items()) or "-"


def _plain(reason: str) -> str:
    """One line without the paths of the machine and without what would end a table's cell."""
    words = re.sub(r"/\S+/", "", " ".join(reason.split()))
    return words.replace("|", "/")


def _head() -> str:
    machine: dict[str, Any] = describe_machine()
    software = describe_software()
    packages = ", ".join(f"{name} {version}" for name, version in software["packages"].items())
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    return f"""# Conformance

Every backend through the same tests (`tests/efficientface_deploy/backends/test_conformance.py`);
each cell has the number of its cases. Made by `python tests/conformance_table.py
docs/conformance.md` on {datetime.now().date().isoformat()}.

Machine: {machine["cpu"]}, {machine["usable_cpus"]} CPUs, {gpus}.
Software: Python {software["python"]}, {packages}.

A stand-in is an engine's real path through our code, over the recorded API of a TensorRT release
(`tests/tensorrt_api/`); ONNX Runtime computes, on a GPU of host memory. It shows that our calls are
allowed and in a right order, and nothing of what TensorRT computes or how fast.
Triton's stand-in gives the answers that a real server was seen to give; "tritonserver" is one."""


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """Options of ``python tests/conformance_table.py``."""

    page: Path = option(positional=True, help="the Markdown file to write")


def main() -> int:
    """Write the table to the path given; the suite's exit code."""
    config = parse_config(
        TableConfig,
        None,
        prog="python tests/conformance_table.py",
        description=__doc__ or "",
        example="docs/conformance.md",
    )
    check_writable(config.page.parent, "PAGE")
    outcomes = Outcomes()
    code = pytest.main(["-q", "--no-header", "--tb=short", "-r", "fE", str(SUITE)], [outcomes])
    write_text(config.page, outcomes.to_markdown(_head()))
    return int(code)


if __name__ == "__main__":
    run_command(main)
