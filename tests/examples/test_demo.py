"""make demo: stopped and started again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train --out demo/run"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo with three commands, which are noted down instead of run; see ``ran``, ``codes``."""
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "examples/demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran, module.codes = [], {}

    def run(command: str) -> int:
        module.ran.append(command)
        return module.codes.get(command, 0)

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "COMMANDS", {"first": ["prepare", TRAIN], "second": ["export"]})
    monkeypatch.chdir(tmp_path)
    return module


def test_whole(demo, capsys):
    assert demo.main() == 0
    assert demo.ran == ["prepare", TRAIN, "export"]
    assert demo.main() == 2
    assert "remove it to run the demo again (rm -r demo)" in capsys.readouterr().out
    assert len(demo.ran) == 3


def test_goes_on_where_it_was_stopped(demo, capsys):
    demo.codes[TRAIN] = 130
    assert demo.main() == 130
    assert "ended with exit code 130; make demo goes on" in capsys.readouterr().out
    state = Path("demo/run/last.pt")
    state.parent.mkdir()
    state.touch()
    demo.ran.clear()
    assert demo.main() == 0
    assert demo.ran == [f"{TRAIN} --resume", "export"]
    assert "(done before) $ prepare" in capsys.readouterr().out


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
