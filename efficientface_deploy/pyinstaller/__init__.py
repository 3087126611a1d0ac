"""What PyInstaller asks an installed package for, by its entry point ``pyinstaller40``."""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """The folder of our hook."""
    return [str(Path(__file__).parent)]
