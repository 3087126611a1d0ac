"""PyTorch as a backend: what is its own; what all backends do alike is in test_conformance.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from efficientface_deploy import load
from efficientface_deploy.errors import BackendError
from efficientface_deploy.models import load_checkpoint


def test_threads_are_those_of_the_process(model_files: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    try:
        load(model_files["torch"], threads=before + 1).close()
        assert torch.get_num_threads() == before + 1
        load(model_files["torch"]).close()
        assert torch.get_num_threads() == before + 1, "left alone where nobody asks"
    finally:
        torch.set_num_threads(before)


def test_provenance_of_our_files_alone(model_files: dict[str, Path], tmp_path: Path) -> None:
    with load(model_files["torch"]) as predictor:
        assert predictor.provenance == {"epoch": 3}
        weights = load_checkpoint(model_files["torch"])[0].state_dict()
        batch = np.zeros((1, 64, 64, 3), np.uint8)
        expected = predictor.infer(batch)[0]
    torch.save({"state_dict": weights}, tmp_path / "published.pth.tar")
    with load(tmp_path / "published.pth.tar", preset="rafdb") as predictor:
        assert predictor.provenance == {}
        assert predictor.spec.input_size == 224
        assert predictor.infer(np.zeros((1, 224, 224, 3), np.uint8))[0].shape == expected.shape


def test_missing_gpu(model_files: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"torch:cuda: expected a CUDA device.*torch:cpu"):
        load(model_files["torch"], backend="torch:cuda")


def test_gpu_computes_fp32_without_tf32(
    model_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: "cpu")  # there is none here
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        with load(model_files["torch"], backend="torch:cuda"):
            assert not matmul.allow_tf32 and not cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
