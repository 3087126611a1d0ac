"""make demo: stopped and started again; what it leaves out; what it says at its end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train --out demo/run"


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "examples/demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo with three commands, which are noted down instead of run; see ``ran``, ``codes``."""
    module = load_demo()
    module.ran, module.codes = [], {}

    def run(line: str, shown: str | None = None) -> int:
        module.ran.append(line)
        return module.codes.get(line, 0)

    commands = [module.Command(line) for line in ("prepare", TRAIN, "export")]
    steps = {("first", 5): commands[:2], ("second", 55): commands[2:]}
    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "STEPS", steps)
    monkeypatch.setattr(module, "conclude", lambda seconds: 0)
    monkeypatch.chdir(tmp_path)
    return module


def test_whole(demo, capsys):
    assert demo.main() == 0
    assert demo.ran == ["prepare", TRAIN, "export"]
    said = capsys.readouterr().out
    assert "about 1.0 minutes" in said
    assert "== 1/2 first (about 5 s)" in said and "== 2/2 second (about 55 s)" in said
    assert said.count("-- took 0 s") == 2
    assert demo.main() == 2
    assert "remove it to run the demo again (rm -r demo)" in capsys.readouterr().out
    assert len(demo.ran) == 3


def test_goes_on_where_it_was_stopped(demo, capsys):
    demo.codes[TRAIN] = 130
    assert demo.main() == 130
    assert "stopped; type make demo again" in capsys.readouterr().out
    state = Path("demo/run/last.pt")
    state.parent.mkdir()
    state.touch()
    demo.ran.clear()
    assert demo.main() == 0
    assert demo.ran == [f"{TRAIN} --resume", "export"]
    assert "$ prepare\ndone before\n" in capsys.readouterr().out


def test_starts_a_command_without_a_state_anew(demo):
    demo.codes[TRAIN] = 1
    assert demo.main() == 1
    demo.codes.clear()
    assert demo.main() == 0
    assert demo.ran == ["prepare", TRAIN, TRAIN, "export"]


def test_foreign_folder_is_left_alone(demo, tmp_path, capsys):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/precious").touch()
    assert demo.main() == 2
    assert not demo.ran and [path.name for path in (tmp_path / "demo").iterdir()] == ["precious"]


def test_what_cannot_be_run_here_is_left_out_with_its_reason(demo, monkeypatch, capsys):
    engine = demo.Command("build", needs="no_such_module", without="it has no wheel for this")
    monkeypatch.setattr(demo, "STEPS", {("only", 1): [engine, demo.Command("time")]})
    assert demo.main() == 0
    assert demo.ran == ["time"]
    assert "$ build\nleft out: it has no wheel for this\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shown", "said", "logged"),
    [(None, "one\ntwo\n", ""), ("^t", "two\n", "one\ntwo\n"), ("x", "", "one\ntwo\n")],
)
def test_what_is_shown_in_part_is_in_the_log(shown, said, logged, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    program = "print('one'); print('two'); raise SystemExit(3)"
    code = load_demo()._run(f'python -c "{program}"', shown)
    assert code == 3 and capfd.readouterr().out == said
    assert Path("demo/log.txt").read_text() == logged


def test_commands_fit_a_terminal_and_can_be_pasted():
    demo = load_demo()
    for (title, seconds), commands in demo.STEPS.items():
        assert len(f"== 1/5 {title} (about {seconds} s)") <= demo.WIDTH
        for command in commands:
            assert len(f"left out: {command.without}") <= demo.WIDTH
            folded = demo._folded(command.line)
            assert max(map(len, folded.splitlines())) <= demo.WIDTH
            script = f"set -- {folded.removeprefix('$ ')}; printf '%s ' \"$@\""
            told = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
            assert told.stdout.split() == command.line.split()


# ---- its end


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo after its last command, whose student has learned enough; see ``scores``."""
    module = load_demo()
    monkeypatch.chdir(tmp_path)
    pixels = np.zeros((16, 16, 3), np.uint8)
    labels = ("Neutral", "Happiness", "Anger")
    for label in range(3):
        folder = module.FACES / "test" / str(label)
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "face.jpg")
    Image.fromarray(pixels).save(module.PORTRAIT)
    module.STUDENT.mkdir()
    (module.STUDENT / "metrics.csv").write_text(
        "epoch,loss,accuracy,macro_f1\n1,2.0,0.3,0.2\n2,1.0,0.9,0.9\n"
    )
    classes = [{"label": label, "recall": 0.9} for label in labels]
    module.scores = {"accuracy": 0.9, "images": 350, "classes": classes}
    module.EVALUATION.mkdir()
    from efficientface_deploy.predictor import bundled_model

    monkeypatch.setattr(module, "INT8", bundled_model())
    return module


@pytest.mark.parametrize(
    ("accuracy", "recall", "code"), [(0.85, 0.6, 0), (0.84, 0.9, 1), (0.95, 0.59, 1)]
)
def test_end(trained, accuracy, recall, code, capsys):
    trained.scores["accuracy"] = accuracy
    trained.scores["classes"][2]["recall"] = recall
    (trained.EVALUATION / "evaluation.json").write_text(json.dumps(trained.scores))
    assert trained.conclude(150.4) == code
    said = capsys.readouterr().out
    assert "Done in 150 s. Of 350 faces that no network has seen, the student tells " in said
    assert f" {100 * accuracy:.0f} % right" in said
    assert f"and {100 * min(recall, 0.9):.0f} % of the class" in said
    assert ("error: student: expected at least 85 % of the faces and 60 %" in said) is bool(code)
    assert said.count("\n") < 20 and max(map(len, said.splitlines())) <= trained.WIDTH
    with Image.open(trained.PICTURE) as picture:
        assert picture.format == "PNG" and picture.width > 1200


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_student_learns(tmp_path, monkeypatch):
    """Its own commands, up to the evaluation on faces that neither network has seen."""
    demo = load_demo()
    monkeypatch.chdir(tmp_path)
    prepare, train = list(demo.STEPS.values())[:2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in prepare + train:
        subprocess.run(demo._resolve(command.line), env=environment, check=True)
    scores = json.loads((demo.EVALUATION / "evaluation.json").read_text())
    assert scores["split"] == "test" and scores["images"] == demo.TEST
    assert scores["accuracy"] >= demo.LEAST_ACCURACY
    assert min(row["recall"] for row in scores["classes"]) >= demo.LEAST_RECALL
