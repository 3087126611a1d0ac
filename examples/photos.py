"""Sort a folder of photos: how many faces of each expression, and the happiest picture.

In the clone: pip install '.[cpu]', then python examples/photos.py FOLDER
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import efficientface_deploy as ef
from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be typed."""

    folder: Path = option(positional=True, help="folder of JPEG and PNG files")


def main() -> int:
    """Count the expressions in the pictures of a folder; 2 where one could not be read."""
    options = parse_config(
        Options, None, prog="python examples/photos.py", description=__doc__ or "", example="photos"
    )
    pictures = [path for path in options.folder.glob("*") if path.suffix.lower() in SUFFIXES]
    if not pictures:
        fix = "give another folder"
        raise ConfigError(options.folder, "a folder of JPEG or PNG files", "none", fix)
    counts: Counter[str] = Counter()
    happiest, most, damaged = None, 0.0, 0
    detector = ef.open_detector()  # fetches YuNet once, 233 KB
    with ef.load() as predictor:
        for path in sorted(pictures):
            try:
                faces = predictor.predict_faces(path, detector)
            except ef.EfficientFaceError as error:
                print(f"left out: {error}", file=sys.stderr)
                damaged += 1
                continue
            counts.update(found.prediction.label for found in faces)
            joy = sum(found.prediction.probabilities["Happiness"] for found in faces)
            if joy > most:
                happiest, most = path, joy
    for label, number in counts.most_common():
        print(f"{number:5} {label}")
    print(f"happiest picture: {happiest}" if happiest else "no face found")
    return 2 if damaged else 0


if __name__ == "__main__":
    run_command(main)  # an error is one line, and exit code 2
