"""What PyInstaller cannot see: backends and their libraries are imported by name.

PyTorch is left out for its gigabytes; ``--hidden-import efficientface_deploy.backends.torch`` takes
it along, and ``--hidden-import tritonclient.grpc`` what ``triton+grpc://`` needs.
"""

from __future__ import annotations

from pathlib import Path

import efficientface_deploy
from efficientface_deploy import backends

_weights = Path(efficientface_deploy.__file__).parent / "weights"

hiddenimports = [
    module
    for name, entry in backends.REGISTRY.items()
    if name != "torch" and backends.missing_reason(name) is None
    for module in (f"{backends.__name__}.{entry.module}", entry.package)
    if module  # triton:// needs no package
]
datas = [(str(path), "efficientface_deploy/weights") for path in sorted(_weights.glob("*.onnx"))]
