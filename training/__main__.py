"""Train EfficientFace, and look at what came of it; python -m training lists the commands."""

from __future__ import annotations

from collections.abc import Sequence

from efficientface_deploy.command import Usage, choose_command, run_command
from efficientface_deploy.errors import ConfigError

COMMANDS = {
    "prepare": "turn a published data set, or your own, into the layout that all commands read",
    "teacher": "train a label distribution generator (LDG)",
    "face_weights": "make weights that know faces, for an LDG to start from",
    "student": "train EfficientFace",
    "evaluate": "score a model on a data set",
    "explain": "show which parts of a face speak for a class",
    "compare": "set trainings side by side",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training``: lists the commands, each a module of its own."""
    usage = Usage("python -m training", __doc__ or "", "--help")
    name, _ = choose_command(argv, COMMANDS, usage)
    typed = f"python -m training.{name}"
    raise ConfigError("python -m training", "a point before the command", name, f"type {typed}")


if __name__ == "__main__":
    run_command(main)
