"""efficientface-export: checkpoint -> ONNX -> TensorRT engine, each verified.

Without --weights the newest student under runs/ is taken, else the bundled model.
"""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import export

    export()

from collections.abc import Sequence

from efficientface_deploy.command import parse_config
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
    options = parse_config(
        ExportConfig,
        argv,
        prog="efficientface-export",
        description=__doc__ or "",
        example="--engine onnx --precision int8 --calib data/ferplus",
    )
    if options.verify is not None:
        options.check_verify()
        from efficientface_export.reverify import verify_command

        return verify_command(options.verify, options.val, options.preset)
    if options.triton is not None:
        options.check_triton()
        from efficientface_export.triton import triton_command

        return triton_command(
            options.triton, options.weights, options.target, options.max_batch, options.overwrite
        )
    require_package("onnx")
    from efficientface_export.pipeline import export_command

    return export_command(options)
