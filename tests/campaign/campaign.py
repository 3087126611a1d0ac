"""Try what can go wrong, many times, and count: hostile inputs, faults, hours of use.

``python tests/campaign/campaign.py --out DIR``, or ``make campaign``; it exits 1 if a case failed.
A part is a module beside this one with ``run(scale, seed, folder)``, which gives its rows.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python then looks for modules in this folder only
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option, run_command
from efficientface_deploy.errors import BackendError

PARTS = ("inputs", "faults", "soak")


@dataclasses.dataclass(frozen=True)
class CampaignConfig:
    """Options of ``python tests/campaign/campaign.py``."""

    part: tuple[str, ...] = option(PARTS, help="what is tried", choices=PARTS, first=True)
    scale: float = option(1.0, minimum=0.001, help="of the number of cases", first=True)
    seed: int = option(0, minimum=0, help="of all that is drawn")
    out: Path | None = out_option()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python tests/campaign/campaign.py``."""

    def failed(result: dict[str, Any]) -> bool:
        return any(row["failures"] for row in result["rows"])

    example, folder = "--part inputs --scale 0.05", "tests/campaign"
    return run_benchmark(
        "campaign", CampaignConfig, run, argv, __doc__, example, folder=folder, failed=failed
    )


def run(config: CampaignConfig) -> dict[str, Any]:
    """Run the parts, and give the result as a JSON object."""
    result = new_result("campaign", config)
    rows = []
    for part in dict.fromkeys(config.part):
        with tempfile.TemporaryDirectory(prefix=f"efficientface-{part}-") as folder:
            rows += _load(part).run(config.scale, config.seed, Path(folder))
    return {**result, "rows": [dataclasses.asdict(row) for row in rows]}


def _load(part: str) -> Any:
    """The module of a part, which uses most of what ``[dev]`` installs."""
    try:
        return importlib.import_module(part)
    except ModuleNotFoundError as error:
        expected, found = f"the package {error.name}", "it is not installed"
        raise BackendError(f"--part {part}", expected, found, "run make campaign") from None


if __name__ == "__main__":
    run_command(main)
