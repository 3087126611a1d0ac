"""Sort a folder of photos: how many faces of each expression, and the happiest picture.

pip install 'efficientface-deploy[cpu,detect]', then: python examples/photos.py FOLDER
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import efficientface_deploy as ef

SUFFIXES = (".jpg", ".jpeg", ".png")


def main(folder: str) -> None:
    """Count the expressions in the JPEG and PNG files of a folder."""
    pictures = [path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES]
    if not pictures:
        sys.exit(f"error: {folder}: expected a folder of JPEG or PNG files, found none")
    counts: Counter[str] = Counter()
    happiest, most = None, 0.0
    detector = ef.open_detector("centerface")
    with ef.load() as predictor:
        for path in sorted(pictures):
            try:
                faces = predictor.predict_faces(path, detector)
            except ef.EfficientFaceError as error:
                print(f"left out: {error}")
                continue
            counts.update(found.prediction.label for found in faces)
            joy = sum(found.prediction.probabilities["Happiness"] for found in faces)
            if joy > most:
                happiest, most = path, joy
    for label, number in counts.most_common():
        print(f"{number:5} {label}")
    print(f"happiest picture: {happiest}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/photos.py FOLDER")
    main(sys.argv[1])
