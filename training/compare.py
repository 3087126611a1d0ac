"""Compare trainings: what differs in their options, how good each is, and what it took."""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.compare", "train,cpu")

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import check_writable, read_json, read_lines, write_text
from efficientface_deploy.predictor import load
from efficientface_deploy.workbench.dataset import Dataset, read_dataset, read_table
from efficientface_deploy.workbench.environment import made_by
from efficientface_deploy.workbench.evaluation import check_labels, labels_of, none_of
from efficientface_deploy.workbench.metrics import paired_accuracy_difference
from efficientface_deploy.workbench.tables import Table, escaped
from training.evaluate import Figures, predict_samples, samples_of, score
from training.trainer.config import CONFIG, FREE_OPTIONS, TrainConfig
from training.trainer.label_store import STORE, seconds_per_view
from training.trainer.loader import HOLDOUT, split_samples
from training.trainer.tracking import METRICS

# What is taken over from an evaluation.
SCORES = (
    *("accuracy", "accuracy_interval", "macro_f1", "macro_f1_interval"),
    *("expected_calibration_error", "mean_kl_from_votes"),
)
# Options that are on unless they are turned off, by --no-NAME.
_ON = {field.name for field in dataclasses.fields(TrainConfig) if field.default is True}


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Options of ``training.compare``."""

    runs: tuple[Path, ...] = option(
        positional=True,
        metavar="RUN",
        help="folders of trainings; the others are compared with the first",
        first=True,
    )
    data: Path = option(help="the prepared data set", first=True)
    preset: str | None = option(None, help="what numbered folders mean, without dataset.json")
    split: str = option(
        HOLDOUT,
        choices=("validation", "test", HOLDOUT),
        help="holdout is the tenth of train that chose the epochs",
    )
    out: Path | None = option(
        None, metavar="DIR", help="write comparison.json and comparison.md there", first=True
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A training's folder.

    Attributes:
        folder: The folder.
        settings: Its options, with the values that stood for those left out.
        weights: The network that it kept.
        history: One row of figures for each epoch.
    """

    folder: Path
    settings: dict[str, Any]
    weights: Path
    history: list[dict[str, float]]

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.folder.resolve().name

    def training_seconds(self, images: int) -> float:
        """How long its steps took, by the rates of its epochs.

        Args:
            images: How many it was trained on.
        """
        if self.settings.get("whole_batches", True):
            images -= images % int(self.settings["batch_size"])
        return sum(images / row["images_per_second"] for row in self.history)

    def store_seconds(self) -> float | None:
        """How long its LDG was queried beforehand: 0 without one, None where no file says."""
        views = min(int(self.settings.get("views", 0)), int(self.settings["epochs"]))
        if views == 0:
            return 0.0
        path = Path(self.settings["store"] or self.folder / STORE)
        seconds = seconds_per_view(path)[:views] if path.is_file() else []
        return sum(seconds) if len(seconds) == views else None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.compare``."""
    config = parse_config(
        CompareConfig,
        argv,
        prog="python -m training.compare",
        description=__doc__ or "",
        example="runs/a runs/b runs/c --data data/ferplus --out runs/comparison",
    )
    check_writable(config.out)
    runs = [read_run(folder) for folder in config.runs]
    _check_seeds(runs, config.split)
    dataset = read_dataset(config.data, config.preset)
    rows = compare(runs, dataset, config.split)
    page = as_markdown(rows, dataset, config.split)
    print(page)
    if config.out is not None:
        content = {"dataset": dataset.name, "split": config.split, "runs": rows, **made_by()}
        write_text(config.out / "comparison.json", json.dumps(content, indent=2) + "\n")
        write_text(config.out / "comparison.md", page + "\n")
        print(f"wrote comparison.json and comparison.md to {config.out}")
    return 0


def read_run(folder: Path) -> Run:
    """A training's folder, with at least one epoch done.

    Raises:
        ConfigError: It is something else.
    """
    weights = [folder / f"{kind}.safetensors" for kind in ("student", "teacher")]
    found = [path for path in weights if path.is_file()]
    try:
        settings = read_json(folder / CONFIG)
        with (folder / METRICS).open(newline="", encoding="utf-8") as file:
            history = [
                {k: float(v or "") for k, v in row.items()}
                for _, row in read_table(read_lines(file))[1]
            ]
        whole = bool(found and history and settings["batch_size"] and settings["epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        wanted = f"the folder of a training: {CONFIG}, {METRICS} and weights"
        fix = "give the --out of training.student or training.teacher, after an epoch"
        content = "a folder without" if folder.is_dir() else "no such folder"
        raise ConfigError(folder, wanted, content, fix)
    return Run(folder, settings, found[0], history)


def compare(runs: Sequence[Run], dataset: Dataset, split: str) -> list[Figures]:
    """One row of figures for each run, ready for JSON.

    Args:
        runs: Trainings; the first is what the others are compared with.
        dataset: What they were trained on.
        split: Whose images they are compared on.
    """
    samples = samples_of(dataset, split, int(runs[0].settings["seed"]))
    truth = labels_of(samples)
    differing = _differing_options(runs)
    rows: list[Figures] = []
    reference = None
    for run in runs:
        with load(run.weights) as predictor:
            check_labels(predictor.spec, dataset)
            probabilities = predict_samples(predictor, samples)
        predicted = probabilities.argmax(axis=1)
        reference = predicted if reference is None else reference
        difference = paired_accuracy_difference(truth, reference, predicted)
        figures = score(probabilities, samples, dataset.labels)
        # Options of steps have no effect in other schedules.
        useless = () if run.settings.get("schedule") == "step" else ("step_epochs", "decay")
        in_effect = [name for name in differing if name not in useless]
        trained_on, _ = split_samples(dataset, run.settings["select"], int(run.settings["seed"]))
        rows.append(
            {
                "run": run.name,
                "options": {name: run.settings.get(name) for name in in_effect},
                "epochs_done": len(run.history),
                "images_per_class": [row["images"] for row in figures["classes"]],
                **{key: figures[key] for key in SCORES if key in figures},
                "difference": difference.value,
                "difference_interval": list(difference.interval),
                "training_seconds": run.training_seconds(len(trained_on)),
                "store_seconds": run.store_seconds(),
            }
        )
    return rows


def as_markdown(rows: Sequence[Figures], dataset: Dataset, split: str) -> str:
    """The rows as a page; of the others' options only what differs from the first's."""
    votes = "mean_kl_from_votes" in rows[0]
    columns = ["run", "options", ">accuracy, %", ">against the first, points", ">macro-F1, %"]
    columns += [">ECE, %", *([">KL, nats"] if votes else []), ">training, min", ">store, min"]
    lines = []
    first = rows[0]["options"]
    for row in rows:
        shown = {k: v for k, v in row["options"].items() if row is rows[0] or v != first.get(k)}
        options = " ".join(_as_option(name, value) for name, value in shown.items())
        difference = _percent(row["difference"], row["difference_interval"], "+.2f")
        store = row["store_seconds"]
        lines.append(
            [
                escaped(row["run"]),
                escaped(options) or "-",
                _percent(row["accuracy"], row["accuracy_interval"], ".2f"),
                "-" if row is rows[0] else difference,
                _percent(row["macro_f1"], row["macro_f1_interval"], ".2f"),
                f"{100 * row['expected_calibration_error']:.2f}",
                *([f"{row['mean_kl_from_votes']:.4f}"] if votes else []),
                f"{row['training_seconds'] / 60:.1f}",
                "-" if store is None else f"{store / 60:.1f}",
            ]
        )
    empty = escaped(none_of(rows[0]["images_per_class"], dataset.labels))
    note = (
        f"{escaped(dataset.name)}, {split}{empty}. In brackets 95 % intervals over images, of a "
        "difference paired by image; they say nothing of how another seed would end. Minutes are "
        "by this machine's clock, and compare only runs that had it to themselves alike."
    )
    return f"{Table(columns, lines).to_markdown()}\n{note}"


def _as_option(name: str, value: object) -> str:
    """As typed: ``--ema 0.9``, ``--no-tensorboard``; ``no --teacher`` where there is none."""
    flag = name.replace("_", "-")
    if value is False and name in _ON:
        return f"--no-{flag}"
    if value is None or value is False or value == []:
        return f"no --{flag}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if value is True:
        return f"--{flag}"
    return f"--{flag} {value}"


def _percent(value: float, interval: Sequence[float], form: str) -> str:
    """A share and its interval in percent: ``88.10 (86.95 to 89.20)``."""
    share, low, high = (format(100 * x, form) for x in (value, *interval))
    return f"{share} ({low} to {high})"


def _check_seeds(runs: Sequence[Run], split: str) -> None:
    """Every run must have kept the same tenth of train out of its training."""
    if split != HOLDOUT:
        return
    for run in runs:
        for name, wanted in (("select", HOLDOUT), ("seed", runs[0].settings["seed"])):
            if run.settings[name] != wanted:
                expected = f"--{name} {wanted}, so that none was trained on the tenth of train"
                fix = "leave the run out, or compare on --split validation"
                raise ConfigError(run.folder, expected, f"--{name} {run.settings[name]}", fix)


def _differing_options(runs: Sequence[Run]) -> list[str]:
    """Options that are not the same in all runs, but for those that change no result."""
    first = runs[0].settings
    return [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if name not in FREE_OPTIONS
        and any(run.settings.get(name) != first.get(name) for run in runs)
    ]
