"""Run from a clone: see README.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shown_path(path: Path) -> str:
    """A path as a result may tell it: within the repository, or the file's name alone."""
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else path.name
