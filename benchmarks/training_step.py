"""What a training step costs: alone, with stored label distributions, beside its teacher; an LDG's.

``python benchmarks/training_step.py --data data/ferplus --teacher runs/ldg/teacher.safetensors``.
A step is all that an epoch consists of: loading, augmenting, forward, backward, optimiser, moving
average. All take turns in rounds of random order; see
:mod:`efficientface_deploy.workbench.timing`. Beside each stands what it could take at least: its
multiply-adds at the rate of a large matrix product, its bytes at the rate of a large copy.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python then looks for modules in benchmarks/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # above imports that take long, or of what is not installed
    from efficientface_deploy.launch import launch

    launch("benchmarks.training_step", "train,bench")

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report.publish import out_option, run_benchmark
from benchmarks.report.result import new_result
from efficientface_deploy.command import option
from efficientface_deploy.cpus import usable_cpus
from efficientface_deploy.models import EfficientFace, load_checkpoint
from efficientface_deploy.workbench.dataset import read_dataset
from efficientface_deploy.workbench.timing import Call, Samples, measure, speedup
from training.trainer.config import AMP, Job, TrainConfig, TrainerState
from training.trainer.distributed import Distributed, init
from training.trainer.label_store import stored_distributions
from training.trainer.loader import Batch, TrainingImages, choose_samples
from training.trainer.loop import Trainer
from training.trainer.recipe import DEFAULT_STUDENT
from training.trainer.small_maps import SmallMapConv2d, has_amx
from training.trainer.targets import Blend, TargetFunction, Teacher, loaded_targets

BASELINE = "no teacher"


@dataclasses.dataclass(frozen=True)
class TrainingBenchConfig:
    """Options of ``python benchmarks/training_step.py``."""

    data: Path = option(help="a prepared data set", first=True)
    teacher: Path = option(help="the LDG's checkpoint", first=True)
    input_size: int = option(96, help="side of the student's input")
    batch_size: int = option(64, minimum=2, help="images of a step")
    images: int = option(640, minimum=64, help="training images that are used")
    seconds: float = option(20.0, metavar="S", minimum=0.001, help="timed steps for each row")
    rounds: int = option(10, metavar="N", minimum=3, help="turns of each row")
    seed: int = option(0, minimum=0, help="of images and order")
    device: str = option("cpu", choices=("cpu", "cuda"), help="where to compute")
    out: Path | None = out_option()


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what is trained, where the targets come from, and how the step is computed."""

    name: str
    network: str = "student"
    targets: str = "own"
    amp: str = "off"
    threads: int = 1
    on_device: str = "yes"
    workers: int = 0
    channels_last: bool = True
    matrix_products: bool = True
    recorded: bool = True


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case that is ready to be timed.

    Attributes:
        step: Does the next step.
        multiply_adds: Of one step.
        bytes: That its operators read and write.
    """

    step: Call
    multiply_adds: int
    bytes: int


def plan_cases(device: str = "cpu") -> list[Case]:
    """The three sources of targets, and the settings of a device that one may choose."""
    cores, ldg = usable_cpus(), "the LDG's own training"
    if device == "cuda":
        own = Case("bf16", amp="bf16")
        return [
            Case(BASELINE),
            own,
            dataclasses.replace(own, name="bf16, kernel by kernel", recorded=False),
            dataclasses.replace(own, name="bf16, streamed", on_device="no", workers=cores - 1),
            dataclasses.replace(own, name="bf16, teacher in every step", targets="online"),
            Case(f"{ldg}, bf16", "ldg", amp="bf16"),
        ]
    streamed = Case("pictures read in every epoch", on_device="no")
    several = [
        Case(f"{cores} threads", threads=cores),
        dataclasses.replace(streamed, name=f"{streamed.name}, by a worker", workers=1),
    ]
    no_products = Case(f"{ldg}, bf16, no matrix products", "ldg", amp="bf16", matrix_products=False)
    return [
        Case(BASELINE),
        Case("stored distributions", targets="stored"),
        Case("teacher in every step", targets="online"),
        Case("contiguous memory", channels_last=False),
        streamed,
        Case("bf16", amp="bf16"),
        *(several if cores > 1 else []),
        Case(ldg, "ldg"),
        Case(f"{ldg}, bf16", "ldg", amp="bf16"),
        *([no_products] if has_amx() else []),  # elsewhere there are none
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python benchmarks/training_step.py``."""
    example = "--data data/ferplus --teacher runs/ldg/teacher.safetensors"
    return run_benchmark(
        "training_step", TrainingBenchConfig, run, argv, __doc__, example, "training"
    )


def run(config: TrainingBenchConfig) -> dict[str, Any]:
    """Measure, and give the result as a JSON object."""
    cases = plan_cases(config.device)
    with tempfile.TemporaryDirectory() as folder, init(config.device) as dist:
        ready = {case.name: prepare(case, config, dist, Path(folder)) for case in cases}
        keys = {case.name: (case.threads, case.amp) for case in cases}
        before = {key: measure_rates(dist.device, *key) for key in set(keys.values())}
        threads = {case.name: case.threads for case in cases}
        samples = measure(
            {name: measured.step for name, measured in ready.items()},
            seconds=config.seconds,
            rounds=config.rounds,
            seed=config.seed,
            before_turn=lambda name: torch.set_num_threads(threads[name]),
            machine_clock=lambda: None,  # to it, the workers that load images are others
        )
        after = {key: measure_rates(dist.device, *key) for key in before}
    rows = []
    for case in cases:
        own, key = ready[case.name], keys[case.name]
        # The better of two: what else the machine does can only lower a peak.
        arithmetic, memory = map(max, before[key], after[key])
        row = describe(case, samples, config.batch_size)
        limits = {
            "arithmetic_ms": 1e3 * own.multiply_adds / arithmetic,
            "memory_ms": 1e3 * own.bytes / memory,
        }
        reached = max(limits.values()) / row["p50_ms"]
        counts = {"multiply_adds": own.multiply_adds, "bytes": own.bytes}
        row |= {name: value // config.batch_size for name, value in counts.items()}
        rows.append({**row, "limits": {**limits, "reached": reached}})
    return {**new_result("training", config), "baseline": BASELINE, "cases": rows}


def prepare(case: Case, config: TrainingBenchConfig, dist: Distributed, folder: Path) -> Measured:
    """A training, counted and ready for its next step."""
    dataset = read_dataset(config.data)
    torch.manual_seed(config.seed)
    if case.network == "ldg":
        model, own = load_checkpoint(config.teacher)
    else:
        own = dataset.spec.replace(architecture="efficientface", input_size=config.input_size)
        model = EfficientFace(own.num_classes)
    options = TrainConfig(
        config.data,
        folder,
        input_size=own.input_size,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=case.workers,
        data_on_device=case.on_device,
        channels_last=case.channels_last,
        amp=case.amp,
    )
    spec = options.model_spec(dataset, own.architecture)
    recipe = dataclasses.replace(options.change(DEFAULT_STUDENT), epochs=1_000, views=1)
    job = Job("teacher" if case.network == "ldg" else "student", spec, recipe, dataset, options)
    samples = choose_samples(job, dist)[0][:: len(dataset.split("train")) // config.images + 1]
    images = TrainingImages(
        samples, spec, recipe.augmentation, config.seed, on_device=case.on_device
    )
    targets = target_function(case, config, images, job, dist, folder)
    trainer = Trainer(job, model, images, targets, dist)
    if not case.matrix_products:
        use_library_convolutions(model)
    trainer.step.forward.train()
    if not case.recorded:
        trainer.step.recordable = False
    batches = endless(trainer)
    with FlopCounterMode(display=False) as counter, TrafficCounter() as traffic:
        trainer.step.do(next(batches))

    def step() -> None:
        float(trainer.train_step(next(batches), TrainerState()))  # which waits for the device

    return Measured(step, counter.get_total_flops() // 2, traffic.bytes)


class TrafficCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what operators read and write; a view reads nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = tree_leaves((args, kwargs, result))
            for tensor in filter(torch.is_tensor, tensors):
                # An expanded tensor is as large as what it repeats.
                self.bytes += min(tensor.nbytes, tensor.untyped_storage().nbytes())
        return result


def measure_rates(device: torch.device, threads: int, amp: str) -> tuple[float, float]:
    """Multiply-adds and bytes a second of PyTorch's own large matrix product and copy."""
    torch.set_num_threads(threads)
    side, size = (8192, 2**30) if device.type == "cuda" else (1536, 2**28)
    left, right = torch.rand(2, side, side, device=device).to(AMP[amp] or torch.float32)
    product, source = torch.empty_like(left), torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    arithmetic = shortest(lambda: torch.mm(left, right, out=product), device)
    memory = shortest(lambda: target.copy_(source), device)
    return side**3 / arithmetic, 2 * size / memory


def shortest(call: Callable[[], object], device: torch.device, tries: int = 7) -> float:
    """Seconds of the shortest of some calls."""
    durations = []
    for _ in range(tries):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - started)
    return min(durations)


def target_function(
    case: Case,
    config: TrainingBenchConfig,
    images: TrainingImages,
    job: Job,
    dist: Distributed,
    folder: Path,
) -> TargetFunction:
    """The source of a step's targets; stored distributions are computed now."""
    if case.targets == "own":
        return loaded_targets
    teacher = Teacher(config.teacher, None, job.spec, dist.device, AMP[case.amp])
    blend = Blend()
    if case.targets == "online":
        return lambda batch, own: blend(teacher(batch), own)
    data_hash = images.content_hash(job.dataset.root)
    path = folder / "store.safetensors"
    images.targets = stored_distributions(path, images, teacher, 1, data_hash, dist, 0)
    return loaded_targets


def use_library_convolutions(model: nn.Module) -> None:
    """Undo :func:`training.trainer.small_maps.use_matrix_products`, in place."""
    for module in model.modules():
        if type(module) is SmallMapConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # of the same parameters


def endless(trainer: Trainer) -> Iterator[Batch]:
    """The batches of one epoch after another."""
    while True:
        yield from trainer.loader
        trainer.order.epoch += 1


def describe(case: Case, samples: dict[str, Samples], batch_size: int) -> dict[str, Any]:
    """One row of the result."""
    own = samples[case.name]
    return {
        **dataclasses.asdict(case),
        **own.figures(),
        "images_per_second": 1000 * batch_size / own.p50_ms,
        "cost": speedup(own, samples[BASELINE]),  # above 1: costs more than the baseline
    }
