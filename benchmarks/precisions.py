"""The bundled model in the other precisions, exported for a measurement of their speed.

INT8 needs training images for its ranges. The embedded synthetic faces serve here: how long a layer
takes does not depend on its ranges, and no layer is left in higher precision. What such a file
answers means nothing; for accuracy, export with real faces and give the files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ROOT
from benchmarks.measure.models import Absent, find_models
from efficientface_deploy.predictor import BUNDLED_WEIGHTS

NAMES = ("efficientface-fp16-cpu.onnx", "efficientface-int8-cpu.onnx")
NOTE = (
    "the INT8 file was calibrated on synthetic faces, for its time alone: its answers mean nothing"
)

_NEEDED = ("torch", "onnx", "onnxruntime", "onnxscript", "rich")
_IMAGES = 140


@contextlib.contextmanager
def default_models() -> Iterator[tuple[list[Path], list[Absent], list[str]]]:
    """The models to time when none is named; what was exported for it is gone at the end.

    Yields:
        The bundled models with those under ``artifacts/``, or with FP16 and INT8 made now where
        nothing lies there; what could not be made; what a reader must know of them.
    """
    found = find_models(())
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if len(found) > len(find_models((), artifacts=False)):
        yield found, [], []
    elif missing:
        reason = f"needs {', '.join(missing)}; pip install 'efficientface-deploy[export]'"
        yield found, [Absent("", name, reason) for name in NAMES], []
    else:
        with tempfile.TemporaryDirectory() as folder:
            made, absent = export(Path(folder))
            yield [*found, *made], absent, [NOTE] if made else []


def export(folder: Path) -> tuple[list[Path], list[Absent]]:
    """Export FP16 and INT8 for a CPU by the two commands that a user would type."""
    faces, out = folder / "faces", folder / "artifacts"
    prepare = ["-m", "training.prepare", "synthetic", "--train", str(_IMAGES), "--test", "7"]
    make = ["-m", "efficientface_export.cli", "--engine", "onnx", "--precision", "all"]
    make += ["--weights", str(BUNDLED_WEIGHTS), "--calib", str(faces), "--no-int8-search"]
    print("exporting the bundled model in FP16 and INT8", file=sys.stderr)
    for arguments in ([*prepare, "--out", str(faces)], [*make, "--out", str(out)]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            return [], [Absent("", name, f"export: {lines[-1]}") for name in NAMES]
    return [out / name for name in NAMES], []
