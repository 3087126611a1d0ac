"""Follow the faces of a video file, or of a camera until Ctrl-C.

pip install 'efficientface-deploy[cpu,detect]', then: python examples/video.py [FILE]
"""

from __future__ import annotations

import contextlib
import sys

import efficientface_deploy as ef


def main(file: str | None = None) -> None:
    """Print a line for each frame; without a file, of the first camera."""
    # A file is worked through; of a camera only what it shows now is of interest.
    source, policy = (file, "every") if file else (0, "newest")
    detector = ef.open_detector("centerface")
    with ef.load() as predictor, ef.open_video(source) as video:
        results = predictor.predict_stream(video, detector=detector, policy=policy)
        with contextlib.closing(results), contextlib.suppress(KeyboardInterrupt):
            for result in results:
                labels = ", ".join(found.prediction.label for found in result.faces)
                print(f"{result.index:6} {result.latency * 1000:5.0f} ms  {labels or 'nobody'}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python examples/video.py [FILE]")
    try:
        main(*sys.argv[1:])
    except ef.EfficientFaceError as error:  # no such file, no camera
        sys.exit(f"error: {error}")
