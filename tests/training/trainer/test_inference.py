from __future__ import annotations

import numpy as np
import torch

from efficientface_deploy.vision.preprocess import normalise, to_model_input
from training.trainer.inference import infer_with


def test_network_sees_what_the_runtime_gives_it(make_job, make_network):
    job = make_job(input_size=64)
    model = make_network().train()
    samples = job.dataset.split("test")
    images = np.stack([to_model_input(sample.path, job.spec) for sample in samples])
    logits = infer_with(model, job.spec, torch.device("cpu"))(images)
    assert logits.dtype == np.float32 and not model.training
    with torch.no_grad():
        expected = model(torch.from_numpy(normalise(images, job.spec)))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_other_dtypes_are_computed_in(make_job, make_network):
    job = make_job(input_size=64)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    logits = infer_with(make_network().double(), job.spec, torch.device("cpu"))(images)
    assert logits.shape == (2, 7) and logits.dtype == np.float32
