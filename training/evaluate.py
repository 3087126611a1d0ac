"""Score a model on a prepared data set: accuracy, macro-F1, calibration, and every class."""

from __future__ import annotations

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("training.evaluate", "train,cpu")

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from efficientface_deploy.artifact import (
    PROVENANCE_KEY,
    WEIGHTS_SUFFIX,
    read_safetensors_metadata,
    require_preset,
)
from efficientface_deploy.command import option, parse_config
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import check_writable, file_hash, write_text
from efficientface_deploy.models import load_checkpoint, save_checkpoint
from efficientface_deploy.predictor import Predictor, load
from efficientface_deploy.prior import UNIFORM, adjust, log_ratios, parse_prior
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.vision.preprocess import Float32Array, UInt8Array
from efficientface_deploy.workbench.dataset import (
    DESCRIPTION,
    Dataset,
    Sample,
    class_frequencies,
    label_distributions,
    read_dataset,
)
from efficientface_deploy.workbench.evaluation import (
    BATCH,
    BINS,
    Scores,
    check_labels,
    labels_of,
    none_of,
    predict,
    without_nan,
)
from efficientface_deploy.workbench.metrics import (
    IndexArray,
    expected_calibration_error,
    mean_kl,
    share_interval,
)
from efficientface_deploy.workbench.progress import track
from efficientface_deploy.workbench.tables import Table, escaped
from training.plots import plot_confusion, plot_reliability
from training.trainer.augmentation import AUGMENTATIONS
from training.trainer.loader import HOLDOUT, Renderer, TrainingImages, hold_out
from training.trainer.sureness import PRECISION, fit_threshold
from training.trainer.targets import Blend

# How Scores.bootstrap computes its intervals.
INTERVAL = {
    "method": "percentile bootstrap over images",
    "level": 0.95,
    "resamples": 2000,
    "seed": 0,
}
# Figures of confidence, by their names in files: what a reader calls them.
CONFIDENCE = {
    "expected_calibration_error": f"ECE, {BINS} bins",
    "mean_kl_from_votes": "KL from the votes, nats",
}

# Confidences that the curve of precision by coverage is shown at.
CURVE = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Options of ``training.evaluate``."""

    weights: Path = option(help="checkpoint or exported model", first=True)
    data: Path = option(help="a prepared data set", first=True)
    split: str | None = option(
        None,
        choices=("train", "validation", "test", HOLDOUT),
        help="default: validation where there is one, else test; holdout is the tenth of train "
        "that chose the epochs of the training",
    )
    seed: int | None = option(
        None, minimum=0, help="of the training, for --split holdout; default: what the file says"
    )
    preset: str | None = option(
        None,
        help="what a published checkpoint was trained on, and what numbered folders mean, without "
        "dataset.json",
    )
    augmentation: str | None = option(
        None,
        choices=tuple(AUGMENTATIONS),
        help="score a random view of each image, the same at every call: how the model holds on "
        "pictures that are turned, dim or, with photo, out of focus and compressed",
    )
    prior: str | None = option(
        None,
        metavar="uniform|LABEL=WEIGHT,...",
        help="score the same probabilities under this prior, too",
    )
    fit: bool = option(
        False,
        help="write into --weights what a training writes at its end, measured on the tenth of "
        "train that chose its epochs: class frequencies, and the threshold of sure labels",
    )
    out: Path | None = option(
        None,
        metavar="DIR",
        help="write evaluation.json, evaluation.md, confusion.png and reliability.png there",
        first=True,
    )

    def check_fit(self) -> None:
        """Refuse options under which nothing could be fitted or written.

        Raises:
            ConfigError: Names the first.
        """
        if not self.fit:
            return
        if self.augmentation is not None:
            fix = "leave --augmentation out, or --fit"
            raise ConfigError("--fit", "images as they are", self.augmentation, fix)
        if self.split not in (None, HOLDOUT):
            fix = "leave --split out, or --fit"
            raise ConfigError("--fit", "the tenth of train", f"--split {self.split}", fix)
        if self.weights.suffix != WEIGHTS_SUFFIX:
            fix = "fit the checkpoint, and export it again"
            raise ConfigError("--fit", f"a {WEIGHTS_SUFFIX} file", self.weights.name, fix)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m training.evaluate``."""
    config = parse_config(
        EvaluateConfig,
        argv,
        prog="python -m training.evaluate",
        description=__doc__ or "",
        example="--weights runs/student/student.safetensors --data data/ferplus "
        "--out runs/evaluation",
    )
    check_writable(config.out)
    config.check_fit()
    prior = None if config.prior is None else parse_prior(config.prior)
    require_preset(config.weights, config.preset)
    # Where a data set says itself what its classes are, the preset is the checkpoint's.
    described = (config.data / DESCRIPTION).is_file()
    dataset = read_dataset(config.data, None if described else config.preset)
    split = HOLDOUT if config.fit else config.split or dataset.evaluation_split()
    with load(config.weights, preset=config.preset) as predictor:
        check_labels(predictor.spec, dataset)
        spec = predictor.spec
        if config.fit:
            shares = class_frequencies(dataset.split("train"), spec.num_classes)
            spec = spec.replace(class_frequencies=shares)
        ratios = None if prior is None else log_ratios(prior, spec, config.weights)
        seed = holdout_seed(predictor, config.seed) if split == HOLDOUT else 0
        samples = samples_of(dataset, split, seed)
        probabilities = predict_samples(predictor, samples, config.augmentation)
        model, provenance = repr(predictor), predictor.provenance
    if config.fit:
        limit = fit_threshold(probabilities, labels_of(samples))
        spec = spec.replace(sure_above=limit, sure_precision=PRECISION)
    figures = {
        "weights": str(config.weights),
        "weights_sha256": file_hash(config.weights),
        "model": model,
        "dataset": dataset.name,
        "split": split,
        "augmentation": config.augmentation,
        **score(probabilities, samples, dataset.labels),
        "sureness": score_sureness(probabilities, labels_of(samples), spec),
    }
    if ratios is not None:
        logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))  # but for a constant
        own = score(adjust(logits, ratios)[1], samples, dataset.labels)
        name = UNIFORM if prior == UNIFORM else "own"
        figures["prior"] = {"name": name, "asked": config.prior, **own}
    calibration = provenance.get("calibration", {})
    if not calibration.get("folded", True):  # found, and left out of the weights, as for an LDG
        temperature = float(calibration["temperature"])
        scaled = Blend(temperature)(torch.from_numpy(probabilities), torch.empty(0)).numpy()
        figures["temperature"] = temperature
        figures["scaled"] = score_confidence(scaled, samples)
    print(as_markdown(figures))
    if config.fit:
        write_spec(config.weights, spec)
        print(f"wrote class frequencies and the threshold of sure labels into {config.weights}")
    if config.out is not None:
        write_evaluation(config.out, figures)
        print(f"wrote evaluation.json, evaluation.md and two plots to {config.out}")
    return 0


def samples_of(dataset: Dataset, split: str, seed: int) -> Sequence[Sample]:
    """A split, or the tenth of train that a training with this seed held out."""
    return hold_out(dataset.split("train"), seed)[1] if split == HOLDOUT else dataset.split(split)


def holdout_seed(predictor: Predictor, given: int | None) -> int:
    """The seed with which a training held out a tenth of train.

    Args:
        predictor: The model, which may say how it was trained.
        given: What the user says.

    Raises:
        ConfigError: It was trained on those images.
    """
    record = predictor.provenance
    select, seed = record.get("select"), record.get("seed", 0)
    if select is None:  # it does not say
        return int(seed if given is None else given)
    if select != HOLDOUT or given not in (None, seed):
        wanted = "images that the model was not trained on"
        fix = "leave --seed out" if select == HOLDOUT else "choose another --split"
        found = f"a model of --select {select} --seed {seed}"
        raise ConfigError("--split holdout", wanted, found, fix)
    return int(seed)


def predict_samples(
    predictor: Predictor, samples: Sequence[Sample], augmentation: str | None = None
) -> Float32Array:
    """Probabilities float32 (N, C) of the samples, or of a random view of each, in order."""
    spec = predictor.spec

    def infer(images: UInt8Array) -> Float32Array:
        return predictor.infer(images)[1]

    if augmentation is None:
        return predict(infer, samples, spec, "evaluating")
    images = TrainingImages(samples, spec, augmentation, seed=0)
    render = Renderer(images, torch.device("cpu"))
    parts, starts = [], range(0, len(samples), BATCH)
    for start in track(starts, "evaluating", len(starts)):
        batch = images.batch(0, range(start, min(start + BATCH, len(samples))))
        views = render.views(batch).round().to(torch.uint8).permute(0, 2, 3, 1)  # (N, S, S, C)
        parts.append(infer(views.expand(-1, -1, -1, 3).contiguous().numpy()))
    return np.concatenate(parts)


def write_spec(path: Path, spec: ModelSpec) -> None:
    """Give a checkpoint of ours another spec; weights and provenance stay as they are."""
    provenance = read_safetensors_metadata(path).get(PROVENANCE_KEY, "{}")
    save_checkpoint(path, load_checkpoint(path)[0], spec, provenance)


def score(probabilities: Float32Array, samples: Sequence[Sample], labels: Sequence[str]) -> Figures:
    """All figures of one evaluation, ready for JSON: what is not defined is None.

    Args:
        probabilities: float32 (N, C).
        samples: N samples with their labels and, where people voted, votes.
        labels: C class names.
    """
    scores = Scores.of(labels_of(samples), probabilities)
    counts = scores.confusion.sum(axis=1).tolist()
    columns = zip(labels, counts, *scores.per_class.values(), strict=True)
    return {
        "images": scores.images,
        "accuracy": scores.accuracy,
        "accuracy_interval": list(scores.bootstrap.accuracy),
        "macro_f1": scores.macro_f1,
        "macro_f1_interval": list(scores.bootstrap.macro_f1),
        "interval": INTERVAL,
        "largest_class": max(counts) / scores.images,
        **score_confidence(probabilities, samples),
        "classes": [
            {"label": label, "images": count, "precision": precision, "recall": recall, "f1": f1}
            for label, count, precision, recall, f1 in columns
        ],
        "confusion_matrix": scores.confusion.tolist(),
        "reliability": {
            "confidence": without_nan(scores.reliability.confidence),
            "accuracy": without_nan(scores.reliability.accuracy),
            "count": scores.reliability.count.tolist(),
        },
    }


def score_confidence(probabilities: Float32Array, samples: Sequence[Sample]) -> dict[str, float]:
    """How far probabilities float32 (N, C) are from accuracy and, where people voted, from them."""
    error = expected_calibration_error(probabilities, labels_of(samples), BINS)
    figures = {"expected_calibration_error": error}
    if samples[0].votes is not None:
        votes = label_distributions(samples, probabilities.shape[1])
        figures["mean_kl_from_votes"] = mean_kl(votes, probabilities)
    return figures


def score_sureness(probabilities: Float32Array, labels: IndexArray, spec: ModelSpec) -> Figures:
    """How many labels are left above a confidence, and how many of these are right.

    Args:
        probabilities: float32 (N, C).
        labels: Integers (N,).
        spec: The model's, perhaps without a threshold.

    Returns:
        ``curve``, by confidence; with a threshold, ``classes``, by label, and ``all`` too.
    """
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = predicted == labels

    def row(among: npt.NDArray[np.bool_], limit: float) -> Figures:
        sure = among & (confidence > limit)
        total, count, hits = (int(np.sum(mask)) for mask in (among, sure, sure & right))
        return {
            "labels": count,
            "share": count / total if total else None,
            "right": hits / count if count else None,
            "right_interval": share_interval(hits, count) if count else None,
        }

    every = np.ones(len(labels), dtype=bool)
    curve = [{"above": limit, **row(every, limit)} for limit in CURVE]
    if spec.sure_above is None:
        return {"curve": curve}
    classes = [
        {"label": label, **row(predicted == index, spec.sure_above)}
        for index, label in enumerate(spec.labels)
    ]
    promise = {"above": spec.sure_above, "promised": spec.sure_precision}
    return {"curve": curve, **promise, "all": row(every, spec.sure_above), "classes": classes}


def as_markdown(figures: Figures) -> str:
    """The figures as a page, without plots."""
    # As the model is, and under another prior where one was asked for.
    parts = [figures, *([figures["prior"]] if "prior" in figures else [])]
    names = ["", f", {figures['prior']['name']} prior"] if "prior" in figures else [""]

    def row(key: str, name: str) -> list[str]:
        cells = [name]
        for part in parts:
            low, high = part[f"{key}_interval"]
            cells += [f"{part[key]:.4f}", f"{low:.4f} to {high:.4f}"]
        return cells

    rows = [row("accuracy", "accuracy"), row("macro_f1", "macro-F1")]
    for key, name in CONFIDENCE.items():
        if key in figures:
            rows.append([name, *(cell for part in parts for cell in (f"{part[key]:.4f}", ""))])
    rows += [
        [f"{CONFIDENCE[key]}, at temperature {figures['temperature']:.3f}", f"{value:.4f}"]
        + [""] * (2 * len(parts) - 1)
        for key, value in figures.get("scaled", {}).items()
    ]
    classes = []
    for found in zip(*(part["classes"] for part in parts), strict=True):
        shares = [own[key] for own in found for key in ("precision", "recall", "f1")]
        shown = ["-" if share is None else f"{share:.4f}" for share in shares]
        classes.append((escaped(found[0]["label"]), found[0]["images"], *shown))
    data = f"{figures['dataset']}, {figures['split']}, {figures['images']:,} images"
    if figures.get("augmentation"):
        data += f", a random view of each ({figures['augmentation']})"
    found = figures["classes"]
    data += none_of([row["images"] for row in found], [row["label"] for row in found])
    interval = figures["interval"]
    level = f">{100 * interval['level']:.0f} % interval"
    scores = Table(("", *(c for name in names for c in (f">value{name}", level))), rows)
    columns = (f">{key}{name}" for name in names for key in ("precision", "recall", "F1"))
    per_class = Table(("class", ">images", *columns), classes)
    sureness = sureness_tables(figures["sureness"], level) if "sureness" in figures else []
    return "\n".join(
        (
            f"# Evaluation of {escaped(Path(figures['weights']).name)}\n",
            f"{escaped(figures['model'])}, sha256 `{figures['weights_sha256'][:12]}`, on "
            f"{escaped(data)}. Always the largest class: {figures['largest_class']:.4f}.\n",
            scores.to_markdown(),
            f"Intervals: {interval['method']}, {interval['resamples']} resamples, "
            f"seed {interval['seed']}.\n",
            per_class.to_markdown(),
            "`-`: not defined, since the class is never predicted (precision) or has no images "
            "(recall).",
            *sureness,
        )
    )


def sureness_tables(figures: Figures, level: str) -> list[str]:
    """What :func:`score_sureness` found, as Markdown."""

    def cells(row: Figures) -> list[str]:
        share = "-" if row["share"] is None else f"{row['share']:.4f}"
        if row["right"] is None:
            return [str(row["labels"]), share, "-", ""]
        low, high = row["right_interval"]
        return [str(row["labels"]), share, f"{row['right']:.4f}", f"{low:.4f} to {high:.4f}"]

    columns = (">labels", ">share", ">right", level)
    rows = [[f"{row['above']:.2f}", *cells(row)] for row in figures["curve"]]
    page = ["", Table((">confidence above", *columns), rows).to_markdown()]
    if "promised" in figures:
        rows = [[escaped(row["label"]), *cells(row)] for row in figures["classes"]]
        rows.append(["all", *cells(figures["all"])])
        promised = f"{100 * figures['promised']:.0f} %"
        said = f"Sure are labels of a confidence above {figures['above']:.2f}, of which "
        said += f"{promised} are promised to be right:\n"
        if figures["above"] >= 1:
            said = f"No label is sure: the training's images were too few to promise {promised}.\n"
        page.append(said)
        page.append(Table(("sure label", *columns), rows).to_markdown())
    return page


def write_evaluation(folder: Path, figures: Figures) -> None:
    """Write ``evaluation.json``, ``evaluation.md``, ``confusion.png`` and ``reliability.png``."""
    labels = [row["label"] for row in figures["classes"]]
    error = figures["expected_calibration_error"]
    plot_confusion(folder / "confusion.png", figures["confusion_matrix"], labels)
    plot_reliability(folder / "reliability.png", figures["reliability"], error)
    plots = "![Confusion matrix](confusion.png)\n\n![Reliability](reliability.png)\n"
    write_text(folder / "evaluation.md", f"{as_markdown(figures)}\n\n{plots}")
    write_text(folder / "evaluation.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
