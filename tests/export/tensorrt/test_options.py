"""What can be asked of a build."""

from __future__ import annotations

from typing import Any

import pytest

from efficientface_deploy.errors import ConfigError
from efficientface_export.tensorrt.options import EngineOptions


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch": 0},
        {"opt_batch": 0},
        {"max_batch": 4, "opt_batch": 5},
        {"workspace_mib": 0},
        {"compute_capabilities": ("current", "sm86")},
    ],
)
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EngineOptions(**changes)


def test_what_is_asked_of_a_build_by_default() -> None:
    options = EngineOptions()
    assert (options.max_batch, options.opt_batch) == (32, 1)
    assert options.workspace_mib is None and options.compute_capabilities == ()
