"""Let atheris look for bytes that the runtime neither uses nor refuses properly.

``python tests/fuzz/fuzz.py image --seconds 60``, or ``make fuzz`` for all targets. It exits 0 when
the time is up; on a finding it prints the traceback, keeps the bytes, and exits otherwise.
``python tests/fuzz/fuzz.py image --replay FILE`` runs one such file again.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

# Coverage guides the search through our code and the Python half of Pillow's decoders.
with atheris.instrument_imports(include=["efficientface_deploy", "PIL"]):
    from fuzz_targets import MAX_LENGTH, TARGETS, seeds
    from PIL import (  # noqa: F401  # noqa: F401
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    from efficientface_deploy.command import option, parse_config, run_command

HANG_SECONDS = 25
MEMORY_MIB = 3000  # the largest picture that is taken needs a third of it


@dataclasses.dataclass(frozen=True)
class FuzzConfig:
    """Options of ``python tests/fuzz/fuzz.py``."""

    target: str = option(positional=True, help="what is fuzzed", choices=tuple(TARGETS))
    seconds: int = option(60, metavar="S", minimum=1, help="how long")
    seed: int = option(0, minimum=0, help="of the search; 0 draws one")
    out: Path = option(Path("build/fuzz"), metavar="DIR", help="folder of corpus and findings")
    replay: Path | None = option(None, metavar="FILE", help="run one file instead")


def main() -> int:
    """Entry point of ``python tests/fuzz/fuzz.py``."""
    config = parse_config(
        FuzzConfig,
        None,
        prog="python tests/fuzz/fuzz.py",
        description=__doc__ or "",
        example="image --seconds 600",
    )
    if config.replay is not None:
        TARGETS[config.target](config.replay.read_bytes())
        print(f"{config.replay}: used, or refused properly")
        return 0
    atheris.Setup(libfuzzer_arguments(config), TARGETS[config.target])
    atheris.Fuzz()  # ends the process
    return 0


def libfuzzer_arguments(config: FuzzConfig) -> list[str]:
    """The command line of libFuzzer; the corpus begins with the seeds."""
    corpus = config.out / config.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(config.target)):
        (corpus / f"seed-{number}").write_bytes(data)
    return [
        sys.argv[0],
        f"-max_total_time={config.seconds}",
        f"-max_len={MAX_LENGTH}",
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={config.out}/{config.target}-",
        f"-seed={config.seed}",
        "-print_final_stats=1",
        str(corpus),
    ]


if __name__ == "__main__":
    run_command(main)
