"""efficientface-export: checkpoint -> ONNX -> TensorRT engine, each verified.

Without --weights the newest student under runs/ is taken, else the bundled model.
"""

from __future__ import annotations

from collections.abc import Sequence

from efficientface_deploy.command import parse_config, run_command
from efficientface_deploy.workbench.requirements import require_package
from efficientface_export.options import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``efficientface-export``.

    Args:
        argv: Arguments; None takes the command line's.

    Returns:
        The exit code.

    Raises:
        EfficientFaceError: What was asked for could not be delivered.
    """
    prog, description = "efficientface-export", __doc__ or ""
    options = parse_config(ExportConfig, argv, prog=prog, description=description)
    if options.verify is not None:
        from efficientface_export.reverify import verify_command

        return verify_command(options.verify, options.val, options.preset)
    require_package("onnx")
    from efficientface_export.pipeline import export_command

    return export_command(options)


def entry_point() -> None:
    """Console script: runs :func:`main` and turns errors into one line and an exit code."""
    run_command(main)


if __name__ == "__main__":
    entry_point()
