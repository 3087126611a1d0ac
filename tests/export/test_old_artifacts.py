"""Artifacts that were exported before this layout of the code: they load, verify, and serve."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

import efficientface_deploy as ef
from efficientface_export.graph.io import read_onnx
from tests.export.outputs import FP16, FP32, INT8, Run, names, one_line, report

OLD = Path(__file__).resolve().parents[1] / "data" / "made-at-43ba709.zip"
FILES = [f"artifacts/{FP32}", "artifacts/efficientface-fp16-gpu.onnx", f"int8/{INT8}"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of them, to change."""
    with zipfile.ZipFile(OLD) as archive:
        wanted = ("artifacts/", "int8/", "faces/")
        archive.extractall(
            tmp_path / "old", [name for name in archive.namelist() if name.startswith(wanted)]
        )
    return tmp_path / "old"


@pytest.mark.parametrize("name", FILES)
def test_they_load_and_compute_what_is_stored_beside_them(old: Path, name: str) -> None:
    with np.load((old / name).parent / "verify.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    with ef.load(old / name, threads=1) as predictor:
        found = predictor.infer(images)[0]
    assert (found.argmax(axis=1) == logits.argmax(axis=1)).mean() >= 15 / 16


@pytest.mark.parametrize("name", FILES)
def test_they_verify(old: Path, exit_code: Run, name: str) -> None:
    before = (old / name).read_bytes()
    code, output, error = exit_code("--verify", old / name)
    assert (code, error) == (0, "")
    mark = "??" if "int8" in name else "ok"  # 15 of 16 labels, of which 98 % are wanted
    assert output.startswith(f"[{mark}] {Path(name).name}: ") and "  [ok] parity: " in output
    assert "probe" not in output
    assert (old / name).read_bytes() == before


def test_fp16_of_an_old_fp32_file(old: Path, tmp_path: Path, exit_code: Run) -> None:
    source, out = old / "artifacts" / FP32, tmp_path / "out"
    command = ("--engine", "onnx", "--weights", source, "--precision", "fp16", "--out", out)
    code, output, _ = exit_code(*command, "--val", old / "faces")
    assert code == 0
    assert f"[ok] {FP16}: " in output
    record, parent = read_onnx(out / FP16).provenance, read_onnx(source).provenance
    assert (record["weights"], record["graph"]) == (parent["weights"], parent["graph"])


def test_the_same_folder(old: Path, exit_code: Run) -> None:
    """Rows of the old report stay with their files; one that other versions made is in the way."""
    folder = old / "artifacts"
    before = set(report(folder)) & names(folder)
    command = ["--engine", "onnx", "--weights", folder / FP32, "--out", folder]
    command += ["--val", old / "faces"]
    assert exit_code(*command, "--precision", "fp16", "--target", "cpu")[0] == 0
    assert set(report(folder)) == before | {FP16}
    code, _, error = exit_code(*command, "--precision", "fp16", "--target", "gpu")
    assert code == 2
    assert "an earlier export of other versions; add --overwrite" in one_line(error)
    assert not [name for name in names(folder) if name.startswith(".")]
