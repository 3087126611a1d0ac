from __future__ import annotations

import csv
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efficientface_deploy.artifact import PROVENANCE_KEY, read_safetensors_metadata
from efficientface_deploy.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    EfficientFaceError,
)
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.predictor import BUNDLED_WEIGHTS
from efficientface_deploy.workbench.dataset import read_dataset
from training import student
from training.trainer.label_store import STORE
from training.trainer.loader import Renderer, TrainingImages
from training.trainer.recipe import DEFAULT_STUDENT, FINE_TUNED_STUDENT
from training.trainer.targets import Teacher

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def train_student(face_set: Path, tmp_path: Path):
    """Run the command for one epoch at the smallest size."""

    def run(*options: str) -> Path:
        arguments = ["--data", str(face_set), "--input-size", "32", "--epochs", "1"]
        arguments += ["--batch-size", "16", "--workers", "0", "--select", "last"]
        arguments += ["--no-tensorboard"]
        assert student.main([*arguments, "--out", str(tmp_path / "run"), *options]) == 0
        return tmp_path / "run/student.safetensors"

    return run


# ---- The command ---------------------------------------------------------------------------------


def spy_on_training(monkeypatch) -> list[tuple]:
    """Calls of train() instead of trainings."""
    calls: list[tuple] = []
    monkeypatch.setattr(student, "train", lambda *arguments: calls.append(arguments))
    return calls


def test_student_of_a_teacher(train_student, save_ldg):
    path = train_student("--teacher", str(save_ldg()), "--preliminary")
    model, spec = load_checkpoint(path)
    assert isinstance(model, EfficientFace) and spec.preliminary
    assert (spec.architecture, spec.input_size) == ("efficientface", 32)
    record = json.loads(read_safetensors_metadata(path)[PROVENANCE_KEY])
    assert record["config"]["teacher"][0].endswith("teacher.safetensors")
    assert (path.parent / STORE).is_file()


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("targets", ["ldg", "ldg+votes", "ldg+onehot"])
def test_targets_are_the_teachers_and_the_data_sets(
    targets, views, train_student, save_ldg, face_set, monkeypatch
):
    """Queried in every step or before, the LDG's distribution and its share are the same."""
    calls = spy_on_training(monkeypatch)
    options = ["--targets", targets, "--views", str(views), "--teacher", str(save_ldg())]
    options += ["--ldg-share", "0.25"] if "+" in targets else []
    train_student(*options, "--epochs", "3", "--temperature", "2")
    job, _, images, _, target_function, _ = calls[0]
    assert job.recipe.views == views

    views = images.batch(1, list(range(5)))
    batch = Renderer(images, CPU)(views)
    found = target_function(batch, views.targets)
    samples = images.samples[:5]
    plain = TrainingImages(
        samples, job.spec, images.augmentation, 0, votes=targets.endswith("votes")
    ).targets[0]
    ldg = Teacher(save_ldg(), None, job.spec, CPU)
    softened = (ldg(batch).log() / 2).softmax(dim=1)
    share = 1.0 if targets == "ldg" else 0.25
    expected = share * softened + (1 - share) * torch.from_numpy(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("targets", "votes"), [("onehot", False), ("votes", True)])
def test_targets_of_the_data_set(targets, votes, train_student, monkeypatch):
    calls = spy_on_training(monkeypatch)
    train_student("--targets", targets)
    job, _, images, _, _, _ = calls[0]
    assert job.kind == "student" and job.recipe.views == 0
    assert (images.targets.max(axis=2) < 1).any() == votes


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ([], None),
        (["--amp", "bf16"], torch.bfloat16),
        (["--teacher-amp", "bf16"], torch.bfloat16),
        (["--amp", "bf16", "--teacher-amp", "off"], None),
    ],
)
def test_precision_of_the_teacher(options, precision, train_student, save_ldg, monkeypatch):
    spy_on_training(monkeypatch)
    teachers = []
    monkeypatch.setattr(
        student, "Teacher", lambda *args: teachers.append(args[-1]) or Teacher(*args)
    )
    train_student("--teacher", str(save_ldg()), "--views", "1", *options)
    assert teachers == [precision]


def test_precision_that_a_cpu_has_not_is_refused(train_student, save_ldg):
    with pytest.raises(ConfigError, match="--teacher-amp fp16: expected a CUDA device"):
        train_student("--teacher", str(save_ldg()), "--teacher-amp", "fp16", "--device", "cpu")


def losses_of(path: Path) -> list[float]:
    with (path.parent / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_as_many_views_as_epochs_is_the_published_method(train_student, save_ldg, tmp_path):
    """The losses are those of a teacher that is queried in every step."""
    options = ["--recipe", "published", "--teacher", str(save_ldg()), "--epochs", "3"]
    # On a small last batch, batch norm would blow differences of rounding up.
    options += ["--select", "last", "--learning-rate", "0.02", "--batch-size", "28"]
    online = losses_of(train_student(*options, "--views", "0"))
    (tmp_path / "run").rename(tmp_path / "online")
    stored = losses_of(train_student(*options, "--views", "3"))
    assert stored == pytest.approx(online, rel=1e-5) and len(stored) == 3
    (tmp_path / "run").rename(tmp_path / "stored")
    few = losses_of(train_student(*options, "--views", "1"))
    assert few[0] == pytest.approx(online[0], rel=1e-5)
    assert few[2] != pytest.approx(online[2], rel=1e-5)


def test_several_teachers(train_student, save_ldg, student_file, tmp_path):
    """Their mean is stored, and a store of one of them is not theirs."""
    ldg = str(save_ldg())
    store = tmp_path / "store.safetensors"
    options = ["--views", "1", "--store", str(store), "--teacher"]
    path = train_student(*options, ldg, str(student_file), "--teacher-flips")
    record = json.loads(read_safetensors_metadata(path)[PROVENANCE_KEY])
    assert record["config"]["teacher"] == [ldg, str(student_file)]
    (tmp_path / "run").rename(tmp_path / "both")
    with pytest.raises(ArtifactError, match="found others for teacher"):
        train_student(*options, ldg)


def test_store_serves_several_runs_and_longer_ones(train_student, save_ldg, tmp_path, capsys):
    store = tmp_path / "store.safetensors"
    options = ["--teacher", str(save_ldg()), "--store", str(store)]
    train_student(*options, "--views", "1")
    assert "querying the teacher about 1 views of 56 images" in capsys.readouterr().out
    (tmp_path / "run").rename(tmp_path / "first")
    train_student(*options, "--views", "1", "--learning-rate", "0.01")
    assert "querying" not in capsys.readouterr().out
    assert not (tmp_path / "run" / STORE).exists()


def test_folder_of_another_run_is_refused_before_the_teacher_is_queried(
    train_student, save_ldg, capsys
):
    train_student("--targets", "onehot")
    capsys.readouterr()
    with pytest.raises(ConfigError, match="another run"):
        train_student("--teacher", str(save_ldg()))
    assert "querying" not in capsys.readouterr().out


def test_share_above_one(train_student, save_ldg):
    with pytest.raises(ConfigError, match=r"--ldg-share: expected at most 1, found 1\.5"):
        train_student(
            *("--teacher", str(save_ldg())), "--targets", "ldg+votes", "--ldg-share", "1.5"
        )


def test_ldg_without_a_teacher(train_student):
    with pytest.raises(ConfigError, match=r"--teacher: expected an LDG's checkpoint .* found none"):
        train_student()


@pytest.mark.parametrize("targets", ["onehot", "votes"])
def test_teacher_that_would_not_be_queried(targets, train_student, save_ldg):
    with pytest.raises(ConfigError, match=f"--teacher: expected none with --targets {targets}"):
        train_student("--targets", targets, "--teacher", str(save_ldg()))


@pytest.mark.parametrize(
    ("targets", "option", "value"),
    [
        ("votes", "--teacher-amp", "bf16"),
        ("onehot", "--temperature", "2.0"),
        ("votes", "--views", "3"),
        ("votes", "--ldg-share", "0.3"),
        ("ldg", "--ldg-share", "0.3"),
    ],
)
def test_options_without_effect_are_refused(targets, option, value, train_student, save_ldg):
    teacher = ["--teacher", str(save_ldg())] if targets == "ldg" else []
    with pytest.raises(ConfigError, match=f"{option}: expected none with --targets {targets}"):
        train_student("--targets", targets, option, value, *teacher)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--targets", "ldg", "--views", "0"], "found --views 0, which queries it in every step"),
        (["--targets", "votes"], "--store: expected a teacher .* found no teacher"),
    ],
)
def test_store_without_a_use(options, said, train_student, save_ldg, tmp_path):
    teacher = ["--teacher", str(save_ldg())] if "ldg" in options else []
    with pytest.raises(ConfigError, match=said):
        train_student(*options, *teacher, "--store", str(tmp_path / "s.safetensors"))


def test_store_by_another_name(train_student, save_ldg):
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, found store\.npz"):
        train_student("--teacher", str(save_ldg()), "--store", "store.npz")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume"], "found none; leave --resume out"),
        (["--init", "none.safetensors"], "none.safetensors"),
        (["--batch-size", "64"], "at least one batch of 64 images"),
        (["--sync-batch-norm", "--device", "cpu"], "expected CUDA devices, found a CPU"),
    ],
)
def test_what_cannot_be_is_refused_before_the_teacher_is_queried(
    options, said, train_student, save_ldg, tmp_path, capsys
):
    with pytest.raises(EfficientFaceError, match=said):
        train_student("--teacher", str(save_ldg()), *options)
    assert "querying the teacher" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_missing_teacher(train_student, tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors.*no such file"):
        train_student("--teacher", str(tmp_path / "none.safetensors"))
    assert not (tmp_path / "run").exists()


def test_init_takes_the_backbone_of_a_face_recognition_network(train_student, tmp_path, caplog):
    torch.manual_seed(5)
    pretrained = EfficientFace(12_666).state_dict()
    checkpoint = tmp_path / "ms1m.pth.tar"
    torch.save({"state_dict": {f"module.{k}": v for k, v in pretrained.items()}}, checkpoint)
    options = ["--targets", "onehot", "--init", str(checkpoint), "--learning-rate", "0"]
    with caplog.at_level(logging.INFO):
        path = train_student(*options)
    assert "took the backbone; the head starts anew" in caplog.text
    trained = load_checkpoint(path)[0].state_dict()
    assert trained["fc.weight"].shape == (7, 1024)
    assert torch.equal(trained["conv5.0.weight"], pretrained["conv5.0.weight"])


def test_init_takes_the_head_of_the_same_labels(train_student, student_file, face_set, caplog):
    options = ["--targets", "onehot", "--init", str(student_file), "--learning-rate", "0"]
    with caplog.at_level(logging.INFO):
        path = train_student(*options)
    assert "took backbone and head" in caplog.text
    before, after = (load_checkpoint(file)[0] for file in (student_file, path))
    assert torch.equal(before.fc.weight, after.fc.weight)


def test_init_from_the_bundled_weights(train_student, monkeypatch, caplog):
    """They go on seeing what they have seen; other classes get a new head, steps are smaller."""
    calls = spy_on_training(monkeypatch)
    with caplog.at_level(logging.INFO):
        train_student("--targets", "onehot", "--init", "bundled")
    assert "took the backbone; the head starts anew" in caplog.text
    job, model, *_ = calls[0]
    bundled, seen = load_checkpoint(BUNDLED_WEIGHTS)
    assert (job.spec.colour, job.spec.mean, job.spec.std) == (seen.colour, seen.mean, seen.std)
    assert len(job.spec.labels) == 7 and job.spec.input_size == 32  # as the option says
    assert torch.equal(model.conv5[0].weight, bundled.conv5[0].weight)
    assert job.recipe.learning_rate == FINE_TUNED_STUDENT.learning_rate


@pytest.mark.parametrize(("init", "side"), [("bundled", 112), ("accurate", 160)])
def test_bundled_weights_give_the_input_size(init, side, face_set):
    config = student.StudentConfig(data=face_set, out=face_set / "run", init=Path(init))
    spec = config.model_spec(read_dataset(face_set), "efficientface")
    assert spec.input_size == side


# ---- The last layer alone


@pytest.mark.parametrize("options", [("--init", "bundled"), ("--init", "{}", "--freeze", "yes")])
def test_few_pictures_train_the_last_layer_alone(options, train_student, student_file, capsys):
    """Batch norm's statistics stay as well."""
    start = BUNDLED_WEIGHTS if "bundled" in options else student_file
    path = train_student("--targets", "onehot", *(part.format(start) for part in options))
    before, after = (load_checkpoint(file)[0].state_dict() for file in (start, path))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert (
        "the last layer alone is trained (--freeze no trains all of them)"
        in capsys.readouterr().out
    )


def test_freeze_no_trains_all_layers(train_student):
    path = train_student("--targets", "onehot", "--init", "bundled", "--freeze", "no")
    before, after = (load_checkpoint(file)[0].state_dict() for file in (BUNDLED_WEIGHTS, path))
    assert not any(torch.equal(value, before[name]) for name, value in after.items() if value.ndim)


@pytest.mark.parametrize(
    ("freeze", "init", "images", "frozen"),
    [
        (None, Path("bundled"), student.FEW - 1, True),
        (None, Path("bundled"), student.FEW, False),
        (None, Path("mine.safetensors"), 10, False),
        (None, None, 10, False),
        ("yes", Path("mine.safetensors"), 10**6, True),
        ("no", Path("bundled"), 10, False),
    ],
)
def test_when_to_freeze(freeze, init, images, frozen, tmp_path):
    config = student.StudentConfig(data=tmp_path, out=tmp_path, freeze=freeze, init=init)
    assert config.freezes(images) is frozen


def test_random_weights_are_not_frozen(tmp_path):
    config = student.StudentConfig(data=tmp_path, out=tmp_path, freeze="yes")
    with pytest.raises(ConfigError, match="--freeze yes: expected weights to start from, found"):
        config.freezes(10)


def test_recipe_is_chosen_by_name(train_student, monkeypatch):
    calls = spy_on_training(monkeypatch)
    for options in ((), ("--recipe", "published"), ("--learning-rate", "0.3")):
        train_student("--targets", "onehot", *options)
    recipes = [job.recipe for job, *_ in calls]
    assert [recipe.loss for recipe in recipes] == ["cross-entropy", "published", "cross-entropy"]
    assert [recipe.epochs for recipe in recipes] == [1, 1, 1]
    rates = [recipe.learning_rate for recipe in recipes]
    assert rates == [DEFAULT_STUDENT.learning_rate, 0.1, 0.3]


# ---- Errors as the user sees them ----------------------------------------------------------------


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("training.student", ("--data", "{data}", "--out", "{out}"), "--teacher: expected an LDG"),
        (
            "training.teacher",
            ("--data", "{data}", "--out", "{out}"),
            "one batch of 64 images, found",
        ),
        ("training.prepare", ("ferplus", "--source", "{out}", "--out", "{out}"), "no such file"),
        ("training.evaluate", ("--data", "{data}", "--weights", "{out}"), "{out}"),
    ],
)
def test_error_is_one_line_and_exit_2(module, arguments, said, face_set, tmp_path):
    places = {"data": str(face_set), "out": str(tmp_path / "none")}
    result = run_module(module, *(argument.format(**places) for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and said.format(**places) in result.stderr
    assert result.stdout == "" and not (tmp_path / "none").exists()


def test_damaged_image_ends_the_command_in_one_line(face_set, tmp_path):
    """It is read by a worker, which must neither turn the error into a traceback nor stay."""
    data = Path(shutil.copytree(face_set, tmp_path / "data"))
    for picture in (data / "train/3").iterdir():
        picture.write_bytes(b"no picture")
    options = ("--targets", "onehot", "--input-size", "32", "--batch-size", "8", "--epochs", "1")
    done = run_module(
        "training.student", "--data", str(data), "--out", str(tmp_path / "run"), *options
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {data}/train/3/")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout
