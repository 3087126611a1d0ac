"""Students trained on some of a data set's pictures, by the command that users type."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.dataset import DESCRIPTION, MANIFEST, Dataset, Sample


def train(folder: Path, dataset: Dataset, samples: Sequence[Sample], *options: str) -> Path:
    """Train a student, unless that was done in this folder; a training that was broken off goes on.

    Args:
        folder: Of the training and its data set.
        dataset: All of the pictures.
        samples: Those to train on.
        options: More of ``python -m training.student``.

    Returns:
        Its checkpoint, of the last epoch.

    Raises:
        ConfigError: The training fails.
    """
    data, out = folder / "data", folder / "run"
    done = out / "student.safetensors"
    if (folder / "done").exists():
        return done
    subset(dataset, samples, data, own_names="--init" in options)
    command = [sys.executable, "-m", "training.student", "--data", str(data), "--out", str(out)]
    command += ["--select", "last", "--no-tensorboard", "--workers", "0", *options]
    if (out / "last.pt").exists():
        command.append("--resume")
    code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
    if code:
        fix = "see its error above"
        raise ConfigError(" ".join(command[1:]), "a training", f"exit status {code}", fix)
    (folder / "done").touch()
    return done


def subset(
    dataset: Dataset, samples: Sequence[Sample], folder: Path, *, own_names: bool = False
) -> None:
    """A data set with some of the pictures, by its own manifest and links to the folders.

    Args:
        dataset: All of the pictures.
        samples: Some of them.
        folder: Where the new data set is to be.
        own_names: Give the classes other names, so that no last layer fits them, and leave out the
            votes, which have the classes' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = json.loads((dataset.root / DESCRIPTION).read_text(encoding="utf-8"))
    if own_names:
        description["labels"] = [f"my {label}" for label in description["labels"]]
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    kept = {sample.path.relative_to(dataset.root).as_posix() for sample in samples}
    with (dataset.root / MANIFEST).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = ["path", "split", "label"] if own_names else list(reader.fieldnames or ())
        rows = [row for row in reader if row["path"] in kept]
    with (folder / MANIFEST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for split in {path.partition("/")[0] for path in kept}:
        if not (folder / split).exists():
            (folder / split).symlink_to((dataset.root / split).resolve())
