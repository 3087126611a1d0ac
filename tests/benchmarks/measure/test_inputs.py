from __future__ import annotations

import io

import numpy as np
from PIL import Image

from benchmarks.measure.inputs import input_bytes, make_batches, make_jpegs
from efficientface_deploy.workbench.environment import l2_bytes


def test_inputs_rotate_and_exceed_the_cache() -> None:
    batches = make_batches(32, 2, seed=0)
    assert len(batches) >= 4
    assert sum(batch.nbytes for batch in batches) >= input_bytes() >= 2 * l2_bytes()
    assert all(batch.shape == (2, 32, 32, 3) and batch.dtype == np.uint8 for batch in batches)
    assert all(batch.flags.c_contiguous for batch in batches)
    assert len({batch.tobytes() for batch in batches}) == len(batches)
    assert len(make_batches(32, 8192, seed=0)) == 4
    assert len(make_batches(32, 2, 0, 3)) == 3

    jpegs = make_jpegs(seed=0)
    assert len(set(jpegs)) == len(jpegs)
    assert make_jpegs(seed=0) == jpegs
    with Image.open(io.BytesIO(jpegs[0])) as image:
        assert (image.format, image.size) == ("JPEG", (224, 224))
