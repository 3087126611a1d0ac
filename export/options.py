"""What ``efficientface-export`` takes; imports nothing that might not be installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from efficientface_deploy.command import option
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.spec import PRESETS
from efficientface_export.verification.provenance import PRECISIONS

ENGINES = ("onnx", "trt", "trt-rtx", "auto")
TARGETS = ("cpu", "gpu")
GRAPHS = ("plain", "deploy", "wide")
OBJECTIVES = ("latency", "throughput")
ARTIFACTS = Path("artifacts")  # where they go by default; a page alone leaves nothing there
CALIBRATION_METHODS = ("minmax", "entropy", "percentile")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of ``efficientface-export``."""

    engine: str = option("auto", choices=ENGINES, help="what to make", first=True)
    weights: Path | None = option(
        None, help="checkpoint, or an ONNX file of ours; or accurate, bundled", first=True
    )
    preset: str | None = option(
        None, choices=tuple(PRESETS), help="what a published checkpoint was trained on"
    )
    precision: str | None = option(
        None,
        choices=(*PRECISIONS, "all"),
        help="default: fp32 for onnx, fp16 for engines",
        first=True,
    )
    target: str | None = option(
        None,
        choices=TARGETS,
        help="with int8 the rest is fp32 for cpu, fp16 for gpu; default: cpu for onnx",
    )
    graph: str | None = option(
        None,
        choices=GRAPHS,
        help="as PyTorch exports it, laid out anew for the target, or so for a CPU with AVX-512; "
        "default: deploy where there is one",
    )
    input_size: int | None = option(
        None, help="side of the input, pixels; default: what the model was trained at"
    )
    float_input: bool = option(
        False, help="input float32 (N, 3, S, S), normalised, for toolchains without uint8"
    )
    features: bool = option(
        False, help="a third output, what the last layer is given, for Predictor.features"
    )
    calib: Path | None = option(None, help="training images, required for int8", first=True)
    calib_method: str = option(
        "percentile", choices=CALIBRATION_METHODS, help="how int8 ranges are chosen"
    )
    calib_images: int = option(500, minimum=1, help="how many calibration images")
    int8_search: bool = option(
        True, help="measure which layers int8 hurts most, and leave those in higher precision"
    )
    exclude: tuple[str, ...] = option(
        (), help="nodes that int8 leaves in higher precision", metavar="NODE"
    )
    val: Path | None = option(None, help="labelled data set to verify on and score accuracy")
    compute_capability: str = option(
        "", help="GPUs that an RTX engine is for, e.g. sm86,sm89", metavar="SM"
    )
    max_batch: int | None = option(
        None, minimum=1, help="largest batch of an engine, or with --triton; default: 32"
    )
    workspace: int | None = option(
        None, minimum=1, help="memory for building an engine", metavar="MIB"
    )
    tune: str | None = option(
        None,
        choices=OBJECTIVES,
        help="try all graphs, precisions, backends and threads that run here, and deliver the one "
        "file that is fastest and right: for one picture, or for batches of 32",
    )
    tune_seconds: float = option(
        60.0, minimum=1, help="time for measuring, beside making and verifying", metavar="S"
    )
    out: Path = option(ARTIFACTS, help="folder of the artifacts")
    web: Path | None = option(
        None,
        metavar="DIR",
        help="write a page that runs the ONNX file in the browser, for any static host; add --out "
        "to keep the file's report too",
    )
    overwrite: bool = option(False, help="replace files that are there")
    require_verified: bool = option(
        False, help="fail when something cannot be verified on this machine"
    )
    seed: int = option(0, minimum=0, help="of the choice of calibration images")
    verify: Path | None = option(
        None, help="verify this artifact by the verify.npz beside it, and make nothing"
    )
    triton: Path | None = option(
        None,
        help="write a model repository for NVIDIA Triton there, of an exported file (--weights)",
    )

    def check_verify(self) -> None:
        """Refuse options that ``--verify``, which makes nothing, would have to ignore.

        Raises:
            ConfigError: Names the first.
        """
        self._check_alone("--verify, which makes nothing", ("verify", "val", "preset"))

    def check_triton(self) -> None:
        """Refuse options that ``--triton``, which exports nothing, would have to ignore.

        Raises:
            ConfigError: Names the first.
        """
        used = ("triton", "weights", "target", "max_batch", "overwrite")
        self._check_alone("--triton, which takes a file that is exported already", used)

    def _check_alone(self, mode: str, used: tuple[str, ...]) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in used and value != field.default:
                name = "--" + field.name.replace("_", "-")
                fix = f"leave {name} out, or leave {mode.partition(',')[0]} out"
                raise ConfigError(name, f"none with {mode}", str(value), fix)

    @property
    def keeps_artifacts(self) -> bool:
        """Whether files and report are kept, and not only a page that is made of them."""
        return self.web is None or self.out is not ARTIFACTS

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """``sm86,sm89`` as a tuple; empty for the library's default."""
        return tuple(filter(None, self.compute_capability.split(",")))
