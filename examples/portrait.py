"""Save the face of NASA's portrait of Eileen Collins (public domain), as scikit-image ships it."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from skimage import data

# Left, top, right, bottom of the face, cut as FER+ cuts: brows to chin with a margin.
FACE = (172, 62, 276, 166)


def main() -> None:
    """Write the crop to the path that is given."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "portrait.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.astronaut()).crop(FACE).save(path, quality=95)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
