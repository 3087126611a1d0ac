from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from efficientface_deploy.command import run_command
from efficientface_deploy.models import LabelDistributionGenerator, save_checkpoint
from efficientface_deploy.spec import preset
from efficientface_deploy.vision.preprocess import normalise, to_model_input
from efficientface_deploy.workbench.dataset import read_dataset
from training import explain as module
from training.explain import Explanation, caption, explain, heat_maps

LABELS = preset("rafdb").labels


@pytest.fixture(scope="module")
def ldg() -> LabelDistributionGenerator:
    """A ResNet-18 whose batch norms have seen something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LabelDistributionGenerator(7, "resnet18").train()
        for _ in range(3):
            model(torch.randn(8, 3, 96, 96))
    return model.eval()


@pytest.fixture
def networks(make_network, ldg):
    student = make_network()
    return {"efficientface": (student, student.conv5), "ldg": (ldg, ldg.backbone.layer4)}


def by_hand(model, layer, image, target):
    """Grad-CAM of one image by hooks alone: equations 1 and 2 of Selvaraju et al. 2017."""
    kept = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output: kept.update(features=output)),
        layer.register_full_backward_hook(lambda _, __, grads: kept.update(gradient=grads[0])),
    ]
    model(image[None])[0, target].backward()
    for hook in hooks:
        hook.remove()
    weights = kept["gradient"][0].mean(dim=(1, 2))  # (K,)
    coarse = torch.relu(torch.einsum("k,khw->hw", weights, kept["features"][0]))
    size = tuple(image.shape[1:])
    fine = torch.nn.functional.interpolate(coarse[None, None], size, mode="bilinear")[0, 0]
    return (fine / fine.max() if fine.max() > 0 else fine).detach().numpy()


@pytest.mark.parametrize("kind", ["efficientface", "ldg"])
def test_maps_are_grad_cam_by_hand(kind, networks):
    model, layer = networks[kind]
    torch.manual_seed(1)
    batch = torch.nn.functional.interpolate(torch.randn(6, 3, 6, 6), (96, 96), mode="bilinear")
    targets = torch.tensor([0, 1, 2, 3, 4, 6])
    found = heat_maps(model, batch, targets)
    assert found.shape == (6, 96, 96) and found.dtype == np.float32
    for image, target, heat in zip(batch, targets, found, strict=True):
        expected = by_hand(model, layer, image, target)
        np.testing.assert_allclose(heat, expected, atol=2e-4)
    assert sum(heat.max() == pytest.approx(1) for heat in found) >= 3  # most maps are not empty
    assert max(heat.std() for heat in found) > 0.1


def test_no_evidence_is_a_zero_map_and_not_nan(make_network):
    model = make_network()
    with torch.no_grad():
        model.fc.weight[2] = 0  # nothing that conv5 sees speaks for class 2
    heat = heat_maps(model, torch.randn(1, 3, 64, 64), torch.tensor([2]))
    assert not heat.any()


@pytest.mark.parametrize("target", [None, 5])
def test_prediction_and_explained_class(target, make_network, spec, face_set):
    model = make_network()
    samples = read_dataset(face_set).split("test")[::5]
    faces = [(sample.path.name, to_model_input(sample.path, spec)) for sample in samples]
    batch = torch.from_numpy(normalise(np.stack([image for _, image in faces]), spec))
    with torch.no_grad():
        probabilities = model(batch).softmax(dim=1)
    for row, found in enumerate(explain(model, spec, faces, target)):
        best = int(probabilities[row].argmax())
        shown = best if target is None else target
        assert (found.name, found.label) == (faces[row][0], LABELS[best])
        assert found.confidence == pytest.approx(float(probabilities[row, best]))
        assert found.explained == LABELS[shown]
        assert found.explained_probability == pytest.approx(float(probabilities[row, shown]))
        np.testing.assert_array_equal(found.image, faces[row][1])
        expected = by_hand(model, model.conv5, batch[row], shown)
        np.testing.assert_allclose(found.heat, expected, atol=2e-4)


# ---- Captions ----------------------------------------------------------------------------------


def face(heat: np.ndarray, **changes) -> Explanation:
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    fields = {"label": "Anger", "confidence": 0.8, "explained": "Anger"}
    fields |= {"explained_probability": 0.8, **changes}
    return Explanation("faces/a.png", image, heat.astype(np.float32), **fields)


@pytest.mark.parametrize(
    ("changes", "heat", "expected"),
    [
        ({}, 1, "Anger 0.80"),
        ({"explained": "Fear", "explained_probability": 0.02}, 1, "Anger 0.80; shown: Fear 0.02"),
        ({}, 0, "Anger 0.80 (nothing speaks for it)"),
    ],
)
def test_caption(changes, heat, expected):
    assert caption(face(np.full((32, 32), heat), **changes)) == expected


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def faces(face_set, tmp_path):
    """Five faces, one with a name that would be a formula, and one that is none."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for number, sample in enumerate(read_dataset(face_set).split("test")[:4]):
        (folder / f"face{number}.jpg").write_bytes(sample.path.read_bytes())
    (folder / "face$\\frac{.jpg").write_bytes(sample.path.read_bytes())
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def run(weights, images, out, *options) -> int:
    arguments = ["--weights", weights, "--images", *images, "--out", out, *options]
    return module.main([str(argument) for argument in arguments])


def test_folder_and_files_become_sheets(student_file, faces, tmp_path, capsys, monkeypatch):
    drawn = []
    draw_sheet = module.draw_sheet
    monkeypatch.setattr(
        module, "draw_sheet", lambda path, found: (drawn.append(found), draw_sheet(path, found))
    )
    out = tmp_path / "out"
    images = [faces, faces / "face0.jpg", tmp_path / "missing.png"]
    assert run(student_file, images, out, "--per-sheet", 4) == 2
    printed = capsys.readouterr()
    assert printed.out == f"faces: 6; sheets: 2; in {out}\n"
    first, second, count = printed.err.splitlines()
    assert "damaged.jpg" in first and "missing.png" in second
    assert count == "2 image(s) could not be read"
    assert [len(sheet) for sheet in drawn] == [4, 2]
    assert [found.name for sheet in drawn for found in sheet].count(str(faces / "face0.jpg")) == 2
    assert {path.name for path in out.iterdir()} == {"sheet-001.png", "sheet-002.png"}
    for path in out.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and image.width > 300


def test_all_readable_ends_with_0(student_file, faces, tmp_path):
    assert run(student_file, [faces / "face0.jpg"], tmp_path / "out") == 0


def test_interrupt_leaves_no_sheets(student_file, faces, tmp_path, monkeypatch):
    draw_sheet = module.draw_sheet

    def interrupted(path, found):
        draw_sheet(path, found)
        if path.name == "sheet-002.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "draw_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(student_file, [faces], tmp_path / "out", "--per-sheet", 2)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(student_file, [faces], tmp_path / "out", "--per-sheet", 2) == 2


def test_class_and_published_checkpoint(ldg, faces, tmp_path, monkeypatch):
    """An LDG as published, at its preset's size, for a class that is not the predicted one."""
    drawn = []
    monkeypatch.setattr(module, "draw_sheet", lambda path, found: drawn.extend(found))
    state = {f"module.{key}": value for key, value in ldg.backbone.state_dict().items()}
    published = tmp_path / "ldg.pth.tar"
    torch.save({"state_dict": state, "epoch": 1}, published)
    options = ("--preset", "affectnet7", "--class", "Disgust")
    assert (
        run(published, [faces / "face0.jpg", faces / "face1.jpg"], tmp_path / "out", *options) == 0
    )
    assert [found.explained for found in drawn] == ["Disgust"] * 2
    spec = preset("affectnet7")
    for found in drawn:
        image = to_model_input(found.name, spec)
        np.testing.assert_array_equal(found.image, image)
        batch = torch.from_numpy(normalise(image[None], spec))
        expected = by_hand(ldg, ldg.backbone.layer4, batch[0], 5)
        np.testing.assert_allclose(found.heat, expected, atol=2e-4)


def test_bad_input_is_one_line_and_exit_2(
    student_file, model_files, make_network, faces, spec, tmp_path, capsys
):
    published = tmp_path / "published.pth.tar"
    torch.save({"state_dict": make_network().state_dict()}, published)
    nameless = tmp_path / "eight.safetensors"
    save_checkpoint(nameless, make_network(), spec)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/sheet-001.png").write_bytes(b"precious")
    good, out = faces / "face0.jpg", tmp_path / "out"
    cases = [
        ((student_file, [faces / "damaged.jpg", "gone.png"], out), "none among 2 (the first: "),
        ((student_file, [tmp_path / "empty"], out), "none in this folder"),
        ((student_file, [good], out, "--class", "Joy"), "--class: expected one of Neutral, "),
        ((student_file, [good], out, "--per-sheet", 0), "--per-sheet: expected at least 1"),
        ((published, [good], out), "--preset, since this checkpoint does not say"),
        ((published, [good], out, "--preset", "ferplus"), "8 classes for preset ferplus, found 7"),
        ((nameless, [good], out, "--preset", "ferplus"), "leave the preset out"),
        ((model_files["onnx"], [good], out), "expected a .safetensors or .pth.tar file"),
        ((tmp_path / "gone.safetensors", [good], out), "gone.safetensors: expected a checkpoint"),
        ((student_file, [good], tmp_path / "file"), "a folder that can be written, found a file"),
        ((student_file, [good], tmp_path / "earlier"), "those of an earlier run"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            run_command(lambda arguments=arguments: run(*arguments))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error, error
        assert error.count("\n") == 1
        assert not out.exists()
    assert (tmp_path / "earlier/sheet-001.png").read_bytes() == b"precious"
