"""Trains a few steps and writes down what every rank saw; run by test_distributed.py.

``torchrun --nproc_per_node 2 distributed_script.py DATA OUT DEATH`` or without torchrun. ``DEATH``
is the step in which rank 1 kills itself, 0 for never. A run that is in OUT already is gone on with.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from efficientface_deploy.models import EfficientFace
from efficientface_deploy.workbench.dataset import read_dataset
from training.trainer import loop
from training.trainer.checkpointing import lock
from training.trainer.config import Job, TrainConfig
from training.trainer.distributed import init
from training.trainer.loader import TrainingImages, choose_samples
from training.trainer.recipe import DEFAULT_STUDENT
from training.trainer.targets import loaded_targets


class FixedNorms(EfficientFace):
    """EfficientFace whose batch norms do not look at the batch, of which a rank has only a part."""

    def train(self, mode: bool = True) -> FixedNorms:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.Module.train(module, False)
        return self


def main() -> None:
    torch.set_num_threads(1)
    data, out, death = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    options = {"epochs": 2, "batch_size": 12, "learning_rate": 0.05, "augmentation": "mild"}
    options |= {"input_size": 32, "workers": 0, "tensorboard": False, "save_minutes": 0}
    config = TrainConfig(data, out, resume=(out / "last.pt").exists(), **options)
    dataset = read_dataset(data)
    spec = config.model_spec(dataset, "efficientface")
    job = Job("student", spec, config.change(DEFAULT_STUDENT), dataset, config)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    with init("cpu") as dist, lock(job, dist):
        samples, selection = choose_samples(job, dist)
        images = TrainingImages(samples, spec, "mild", 0)
        torch.manual_seed(dist.rank)  # the first rank's weights must reach the others
        model = FixedNorms(7).double()
        evaluated = []
        evaluate = loop.Trainer.evaluate
        loop.Trainer.evaluate = lambda *a: evaluated.append(evaluate(*a)) or evaluated[-1]

        def targets_of(batch: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
            if len(seen) + 1 == death and dist.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            seen.append((batch.clone(), weights.clone()))
            return loaded_targets(batch, loaded)

        state = loop.train(job, model, images, selection, targets_of, dist)
        torch.save(
            {
                "batches": [batch for batch, _ in seen],
                "weights": [weights for _, weights in seen],
                "labels": [torch.from_numpy(labels) for _, labels in evaluated],
                "logits": [torch.from_numpy(logits) for logits, _ in evaluated],
                "history": state.history,
                "selection": [sample.label for sample in selection],
            },
            out.parent / f"{out.name}-rank{dist.rank}.pt",
        )


if __name__ == "__main__":
    main()
