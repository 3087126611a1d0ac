"""Every command of docs/checkpoints.md, on checkpoints of the published form with random weights.

The page itself is parsed, so that it and these tests cannot drift apart. Results are compared with
torchvision's ResNet and our EfficientFace, the weights loaded by hand; the labels and the
normalisation are written out here once more.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import efficientface_deploy as ef
from efficientface_deploy.models import EfficientFace, LabelDistributionGenerator, load_checkpoint
from efficientface_export import cli as export
from training import evaluate, explain, prepare, student, teacher

PAGE = (Path(__file__).resolve().parents[1] / "docs/checkpoints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]

SEVEN = ("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger")
AFFECTNET = ((0.55391484, 0.43522123, 0.3821877), (0.24837189, 0.21625527, 0.20221159))
# Preset: folder, labels, (mean, std).
DATA = {
    "rafdb": (
        "RAF-DB",
        SEVEN,
        ((0.57535914, 0.44928582, 0.40079932), (0.20735591, 0.18981615, 0.18132027)),
    ),
    "caers": (
        "CAER-S",
        SEVEN,
        ((0.35964426, 0.22359873, 0.19040863), (0.15188067, 0.11678473, 0.1103445)),
    ),
    "affectnet7": ("AffectNet-7", SEVEN, AFFECTNET),
    "affectnet8": ("AffectNet-8", (*SEVEN, "Contempt"), AFFECTNET),
}
# File: architecture, classes.
CHECKPOINTS = {
    "MS-Celeb-1M-ResNet18": ("resnet18", 12_666),
    "MS-Celeb-1M-ResNet50": ("resnet50", 12_666),
    "MS-Celeb-1M-EfficientFace": ("efficientface", 12_666),
    **{f"LDG-{name}": ("resnet50", len(labels)) for name, labels, _ in DATA.values()},
    **{
        f"EfficientFace-{name}": ("efficientface", len(labels)) for name, labels, _ in DATA.values()
    },
}
IMAGENET = "resnet18-f37072fd.pth"  # as torchvision's: tensors by name and nothing around them

# One step at the smallest size; the weights stay where they were, so that they can be compared.
SHORT = ["--input-size", "32", "--epochs", "1", "--batch-size", "14", "--workers", "0"]
SHORT += ["--learning-rate", "1e-12"]
MAINS = {
    "training.teacher": (teacher.main, SHORT),
    "training.student": (student.main, SHORT),
    "training.evaluate": (evaluate.main, []),
    "training.explain": (explain.main, []),
    "efficientface-export": (export.main, ["--input-size", "32"]),
}
# The long ones are much alike: those of AffectNet-8, with its eighth class, are always run.
SLOW = [
    line
    for line in COMMANDS
    if "affectnet8" not in line and re.search("-export|--teacher|/LDG-|resnet50", line)
]


def build(architecture: str, classes: int) -> torch.nn.Module:
    """The plain network."""
    if architecture == "efficientface":
        return EfficientFace(classes)
    return getattr(torchvision.models, architecture)(num_classes=classes)


@torch.no_grad()
def lively_network(architecture: str, faces: torch.Tensor) -> torch.nn.Module:
    """Random weights with batch norms that have seen faces; gives features, having no head."""
    model = build(architecture, 2).train()
    model.fc = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain average over what follows
    model(faces)
    return model.eval()


def lively_head(features: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
    """A head whose logits differ from face to face and favour no class."""
    weight = torch.randn(classes, features.shape[1])
    logits = features @ weight.T  # (N, C)
    scale = 2 / logits.std(dim=0)
    return {"fc.weight": weight * scale[:, None], "fc.bias": -logits.mean(dim=0) * scale}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the page's commands name."""
    root = tmp_path_factory.mktemp("published")
    face_set = tmp_path_factory.mktemp("data") / "faces"
    arguments = ["synthetic", "--train", "56", "--test", "28", "--size", "48"]
    assert prepare.main([*arguments, "--out", str(face_set)]) == 0
    for folder, labels, _ in DATA.values():
        for split, count in (("train", 3), ("test", 1)):
            for label in range(len(labels)):
                target = root / folder / split / str(label)
                target.mkdir(parents=True)
                faces = sorted((face_set / split / str(label % 7)).iterdir())
                first = count if label == 7 else 0  # Contempt borrows other neutral faces
                for path in faces[first : first + count]:
                    shutil.copy(path, target)
    (root / "checkpoints").mkdir()
    batches = {
        folder: read_faces(root / folder, preset, 224) for preset, (folder, _, _) in DATA.items()
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        architectures = {architecture for architecture, _ in CHECKPOINTS.values()}
        networks = {name: lively_network(name, batches["RAF-DB"]) for name in sorted(architectures)}
        for name, (architecture, classes) in CHECKPOINTS.items():
            faces = batches.get(name.partition("-")[2], batches["RAF-DB"][:2])
            head = lively_head(networks[architecture](faces), classes)
            state = {**networks[architecture].state_dict(), **head}
            content = {
                "epoch": 30,
                "state_dict": {f"module.{key}": value for key, value in state.items()},
                "best_acc": torch.tensor(88.36),
            }
            torch.save(content, root / f"checkpoints/{name}.pth.tar")
        state = networks["resnet18"].state_dict()
        head = {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.zeros(1000)}
        torch.save({**state, **head}, root / "checkpoints" / IMAGENET)
    return root


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def parse(line: str) -> tuple[str, dict[str, str], list[str]]:
    """Program, options by name, arguments."""
    program, *arguments = shlex.split(line)
    if program == "python":
        assert arguments.pop(0) == "-m"
        program = arguments.pop(0)
    names, values = arguments[::2], arguments[1::2]
    assert all(name.startswith("--") for name in names), line
    return program, dict(zip(names, values, strict=True)), arguments


def state_of(path: str) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    state = content.get("state_dict", content)
    return {key.removeprefix("module."): value for key, value in state.items()}


def plain_network(path: str) -> torch.nn.Module:
    """The network with a checkpoint's weights, loaded by hand."""
    model = build(*CHECKPOINTS[Path(path).name.removesuffix(".pth.tar")])
    model.load_state_dict(state_of(path))
    return model.eval()


def read_faces(folder: str | Path, preset: str, size: int) -> torch.Tensor:
    """A test split as the published code reads it, (N, 3, size, size), in the order of classes."""
    paths = sorted(Path(folder, "test").glob("*/*.jpg"))
    mean, std = (torch.tensor(values)[:, None, None] for values in DATA[preset][2])
    batch = []
    for path in paths:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        batch.append((pixels - mean) / std)
    return torch.stack(batch)


def logits_of(model: torch.nn.Module, batch: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(batch).numpy()


def expected_logits(weights: str, preset: str, size: int) -> np.ndarray:
    """The plain network's for the preset's test split, an image per class."""
    batch = read_faces(DATA[preset][0], preset, size)
    return logits_of(plain_network(weights), batch)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


# ---- The page ------------------------------------------------------------------------------------


def test_page_names_every_checkpoint_and_uses_each():
    table = re.findall(r"^\| `([\w-]+)\.pth\.tar` \| (\S+) \| ([\d,]+) ", PAGE, re.MULTILINE)
    found = {
        name: (network.replace("-", "").lower(), int(classes.replace(",", "")))
        for name, network, classes in table
    }
    assert found == CHECKPOINTS and len(found) == 11
    for name in CHECKPOINTS:
        assert any(f"checkpoints/{name}.pth.tar" in line for line in COMMANDS), name
    assert len(COMMANDS) == 21 and len(SLOW) == 10


def test_page_gives_the_normalisations():
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| ([\d., ]+) \| ([\d., ]+) \|$", PAGE, re.MULTILINE)
    found = {
        name: (int(classes), *(tuple(map(float, text.split(","))) for text in texts))
        for name, classes, *texts in rows
    }
    assert found == {name: (len(labels), *norm) for name, (_, labels, norm) in DATA.items()}


# ---- Its commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow) if line in SLOW else line for line in COMMANDS],
)
def test_command(line, here, caplog, monkeypatch):
    program, options, arguments = parse(line)
    main, extra = MAINS[program]
    folder, labels, _ = DATA[options["--preset"]]
    assert options.get("--data", folder) == folder
    inferred, queried = record_predictors(monkeypatch), record_ldgs(monkeypatch)
    with caplog.at_level("INFO"):
        assert main([*arguments, *extra]) == 0
    out = Path(options["--out"])
    if program in ("training.teacher", "training.student"):
        check_training(program, options, labels, out, caplog.text)
        check_teacher(options, queried)
    elif program == "training.evaluate":
        check_evaluation(options, labels, out, inferred)
    elif program == "training.explain":
        assert (out / "sheet-001.png").is_file()
    else:
        check_export(options, labels, out)


def record_predictors(monkeypatch) -> list[np.ndarray]:
    """The logits that predictors give."""
    inferred = []
    infer = ef.Predictor.infer

    def recording(self, images):
        output = infer(self, images)
        inferred.append(output[0])
        return output

    monkeypatch.setattr(ef.Predictor, "infer", recording)
    return inferred


def record_ldgs(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What LDGs are given, and what they answer."""
    queried = []
    forward = LabelDistributionGenerator.forward

    def recording(self, image):
        logits = forward(self, image)
        if not self.training:
            queried.append((image.clone(), logits.clone()))
        return logits

    monkeypatch.setattr(LabelDistributionGenerator, "forward", recording)
    return queried


def check_training(program, options, labels, out, log):
    """The backbone was the checkpoint's, the head was not, and the labels are right."""
    name = program.partition(".")[2]
    model, spec = load_checkpoint(out / f"{name}.safetensors")
    assert spec.labels == labels
    assert (spec.mean, spec.std) == DATA[options["--preset"]][2]
    assert "took the backbone; the head starts anew" in log
    trained = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
    weights = [key for key, value in state_of(options["--init"]).items() if value.ndim == 4]
    assert len(weights) >= 20
    published = state_of(options["--init"])
    for key in weights:
        torch.testing.assert_close(trained[key], published[key], atol=1e-7, rtol=1e-4)
    assert trained["fc.weight"].shape[0] == len(labels)


def check_teacher(options, queried):
    """The LDG was queried at its own size and answered as the plain ResNet does."""
    if "--teacher" not in options:
        return
    images, logits = next(pair for pair in queried if len(pair[0]) == 14)
    assert images.shape == (14, 3, 224, 224)
    expected = logits_of(plain_network(options["--teacher"]), images[:3])
    assert_close(logits[:3].numpy(), expected)


def check_evaluation(options, labels, out, inferred):
    expected = expected_logits(options["--weights"], options["--preset"], 224)
    assert_close(np.concatenate(inferred), expected)
    figures = json.loads((out / "evaluation.json").read_text())
    assert [row["label"] for row in figures["classes"]] == list(labels)
    matrix = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(matrix, (np.arange(len(labels)), expected.argmax(axis=1)), 1)
    assert figures["confusion_matrix"] == matrix.tolist()
    assert matrix.any(axis=0).sum() > 1  # else the order of labels would not show


def check_export(options, labels, out):
    preset = options["--preset"]
    paths = sorted(Path(DATA[preset][0], "test").glob("*/*.jpg"))
    with ef.load(out / "efficientface-fp32-cpu.onnx") as predictor:
        assert predictor.spec.labels == labels
        found, _ = predictor.infer(np.stack([predictor.preprocess(path) for path in paths]))
    assert_close(found, expected_logits(options["--weights"], preset, 32))


def test_python(here, capsys):
    shutil.copy(next(Path("RAF-DB/test/1").iterdir()), "face.jpg")
    (code,) = PYTHON
    exec(code, {})
    mean, std = (torch.tensor(values)[:, None, None] for values in DATA["rafdb"][2])
    resized = Image.open("face.jpg").convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    batch = ((torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - mean) / std)[None]
    model = plain_network("checkpoints/EfficientFace-RAF-DB.pth.tar")
    assert capsys.readouterr().out == SEVEN[int(logits_of(model, batch).argmax())] + "\n"


def test_pre_trained_checkpoint_is_no_model_to_evaluate(here):
    line = "--weights checkpoints/MS-Celeb-1M-EfficientFace.pth.tar --preset rafdb --data RAF-DB"
    with pytest.raises(ef.EfficientFaceError, match=r"found 12666 classes; .*--init"):
        evaluate.main(line.split())
