"""Follow the faces of a video, of a stream's address, or of a camera until Ctrl-C.

In the clone: pip install '.[cpu,video]', then python examples/video.py [SOURCE]
"""

from __future__ import annotations

import contextlib
import dataclasses

import efficientface_deploy as ef
from efficientface_deploy.command import option, parse_config, run_command


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be typed."""

    source: str | None = option(
        None, positional=True, help="a video or rtsp://...; without it, the first camera"
    )


def main() -> None:
    """Print a line for each frame."""
    options = parse_config(
        Options, None, prog="python examples/video.py", description=__doc__ or "", example="a.mp4"
    )
    detector = ef.open_detector()  # fetches YuNet once, 233 KB
    with ef.load() as predictor, ef.open_video(options.source or 0) as video:
        # A file is worked through; of a camera only what it shows now is of interest.
        policy = "newest" if video.live else "every"
        results = predictor.predict_stream(video, detector=detector, policy=policy)
        with contextlib.closing(results), contextlib.suppress(KeyboardInterrupt):
            for result in results:
                faces = [f"{found.track} {found.prediction.label}" for found in result.faces]
                latency = f"{result.latency * 1000:5.0f} ms"
                print(f"{result.seconds:8.2f} s {latency}  {', '.join(faces) or 'nobody'}")


if __name__ == "__main__":
    run_command(main)  # an error is one line, and exit code 2
