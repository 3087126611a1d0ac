"""Follow the faces of a video file, or of a camera until Ctrl-C.

pip install 'efficientface-deploy[cpu,detect]', then: python examples/video.py [FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import efficientface_deploy as ef
from efficientface_deploy.command import option, parse_config, run_command


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be typed."""

    file: Path | None = option(None, positional=True, help="a video; without it, the first camera")


def main() -> None:
    """Print a line for each frame."""
    options = parse_config(
        Options, None, prog="python examples/video.py", description=__doc__ or "", example="a.mp4"
    )
    # A file is worked through; of a camera only what it shows now is of interest.
    source, policy = (options.file, "every") if options.file else (0, "newest")
    detector = ef.open_detector("centerface")
    with ef.load() as predictor, ef.open_video(source) as video:
        results = predictor.predict_stream(video, detector=detector, policy=policy)
        with contextlib.closing(results), contextlib.suppress(KeyboardInterrupt):
            for result in results:
                labels = ", ".join(found.prediction.label for found in result.faces)
                print(f"{result.index:6} {result.latency * 1000:5.0f} ms  {labels or 'nobody'}")


if __name__ == "__main__":
    run_command(main)  # an error is one line, and exit code 2
