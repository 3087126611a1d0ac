"""Interpreters of this machine, for environments of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from efficientface_deploy.errors import BackendError


def find_python(version: str) -> Path:
    """An interpreter of this version: on the path, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = shutil.which(f"python{version}")
    found = [Path(on_path)] if on_path else []
    for path in (*sorted(root.glob(f"versions/{version}.*/bin/python")), *found):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    fix = "install it, or give --python an interpreter"
    raise BackendError(f"Python {version}", "one on the path or under pyenv", "none", fix)
