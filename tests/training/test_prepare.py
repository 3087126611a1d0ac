from __future__ import annotations

from pathlib import Path

import pytest

from efficientface_deploy.errors import ConfigError, DatasetError
from efficientface_deploy.workbench.workspace import make_and_lock
from training import prepare
from training.datasets import synthetic as synthetic_source
from training.datasets.face_renderer import render_face

# ---- The folder that is made ---------------------------------------------------------------------


def synthetic(out: Path, *options: str) -> None:
    arguments = ["synthetic", "--train", "14", "--test", "7", "--size", "32", *options]
    assert prepare.main([*arguments, "--out", str(out)]) == 0


def test_same_preparation_twice_does_nothing(tmp_path, capsys):
    out = tmp_path / "faces"
    synthetic(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    synthetic(out)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_foreign_files_are_never_replaced(content, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        with pytest.raises(DatasetError, match=r"other files; choose another --out$"):
            synthetic(tmp_path, *options)
        with pytest.raises(DatasetError, match="other files"):
            synthetic(tmp_path / "mine.txt", *options)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_prepared_folder_that_was_damaged_is_reported(tmp_path):
    synthetic(tmp_path / "faces")
    (tmp_path / "faces/manifest.csv").write_text("nonsense")
    with pytest.raises(DatasetError, match=r"manifest\.csv"):
        synthetic(tmp_path / "faces")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_preparation_leaves_things_as_they_were(
    error, existing, content, tmp_path, monkeypatch
):
    if existing:
        synthetic(tmp_path / "faces")
    before = content(tmp_path)

    def fail_later(seed: int, index: int, size: int, variation: float):
        if index == 9:
            raise error
        return render_face(seed, index, size, variation)

    monkeypatch.setattr(synthetic_source, "render_face", fail_later)
    with pytest.raises((KeyboardInterrupt, OSError)):
        synthetic(tmp_path / "faces", "--seed", "1", "--overwrite")
    assert content(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == int(existing)


@pytest.mark.parametrize("seed", ["0", "1"])
def test_overwrite_replaces_what_is_there(seed, tmp_path):
    """Also what was prepared in the same way: its source may have been incomplete."""
    out = tmp_path / "faces"
    synthetic(out)
    lost = next(out.rglob("*.jpg"))
    lost.unlink()
    synthetic(out, "--seed", seed, "--overwrite")
    assert len(list(out.rglob("*.jpg"))) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_replaced_folder_comes_back_where_the_new_one_cannot_be_moved(
    content, tmp_path, monkeypatch
):
    synthetic(tmp_path / "faces")
    before, rename = content(tmp_path), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        synthetic(tmp_path / "faces", "--seed", "1", "--overwrite")
    assert content(tmp_path) == before


def test_next_run_clears_what_a_killed_one_had_begun(tmp_path):
    out = tmp_path / "faces"
    for name in ("new", "before"):
        (tmp_path / ".faces.preparing" / name / "train").mkdir(parents=True)
    synthetic(out)
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]
    assert not (out / "before").exists()


def test_data_set_that_a_kill_left_aside_comes_back(content, tmp_path, monkeypatch):
    """Killed between the two renames of --overwrite; the next run fails."""
    synthetic(tmp_path / "faces")
    kept, aside = content(tmp_path), tmp_path / ".faces.preparing"
    aside.mkdir()
    (tmp_path / "faces").rename(aside / "before")
    monkeypatch.setattr(prepare, "_write_files", lambda *_: {})
    with pytest.raises(DatasetError, match="found none that can be used"):
        synthetic(tmp_path / "faces", "--seed", "1")
    assert content(tmp_path) == kept


def test_one_preparation_at_a_time(tmp_path):
    work = tmp_path / ".faces.preparing"
    with (
        make_and_lock(work, "preparation"),
        pytest.raises(ConfigError, match="expected no other preparation"),
    ):
        (work / "new").mkdir()
        synthetic(tmp_path / "faces")
    assert (work / "new").is_dir()  # the other's


def test_folder_is_readable_by_others(tmp_path):
    synthetic(tmp_path / "faces")
    assert (tmp_path / "faces").stat().st_mode & 0o777 == 0o755


# ---- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["imagenet"], ["ferplus", "--out", "x"], ["synthetic", "--out"]]
)
def test_usage_errors_are_one_line(arguments):
    with pytest.raises(ConfigError, match=r"python -m training\.prepare"):
        prepare.main(arguments)


def test_options_that_cannot_be_meant(tmp_path):
    with pytest.raises(ConfigError, match="--train: expected at least 7, found 3"):
        prepare.main(["synthetic", "--train", "3", "--out", str(tmp_path / "faces")])
    with pytest.raises(ConfigError, match="--out"):
        prepare.main(["synthetic", "--out", "/"])
