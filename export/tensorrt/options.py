"""What can be asked of an engine's build, and what is refused before it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from efficientface_deploy.errors import ConfigError

EngineKind = Literal["trt", "trt-rtx"]

SUFFIXES: dict[str, str] = {"trt": ".engine", "trt-rtx": ".rtx.engine"}
CURRENT = "current"  # the GPU that is here


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        max_batch: Largest batch that the engine takes; larger ones are split by the runtime.
        opt_batch: Batch that kernels are chosen for. One by default: an edge application has a
            face or two in a picture, and waits for each.
        workspace_mib: Scratch memory that the builder may plan for; None lets it take what is
            there, but no more than 1 GiB on a Jetson.
        compute_capabilities: GPUs to build for, e.g. ``("sm86", "sm89")``, or ``("current",)``
            for the one that is here; for TensorRT for RTX alone, whose default is Ampere and
            newer of those that it serves: no Jetson, no H100.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_batch: int = 32
    opt_batch: int = 1
    workspace_mib: int | None = None
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no builder could do."""
        if self.max_batch < 1:
            raise bad_option("--max-batch", "at least 1", str(self.max_batch))
        if not 1 <= self.opt_batch <= self.max_batch:
            raise bad_option("opt_batch", f"1 to {self.max_batch}", str(self.opt_batch))
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise bad_option("--workspace", "at least 1 MiB", str(self.workspace_mib))
        if CURRENT in self.compute_capabilities and len(self.compute_capabilities) > 1:
            found = ",".join(self.compute_capabilities)
            raise bad_option("--compute-capability", f"{CURRENT} alone, or a list", found)


def bad_option(option: str, expected: str, found: str) -> ConfigError:
    """The error of a value that no builder takes."""
    return ConfigError(option, expected, found, "change it accordingly")
