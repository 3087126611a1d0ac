"""Save NASA's portrait of Eileen Collins (public domain), as scikit-image ships it.

python examples/portrait.py portrait.jpg
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image
from skimage import data

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.files import atomic_path
from efficientface_deploy.workbench.workspace import make_folder


@dataclasses.dataclass(frozen=True)
class PortraitConfig:
    """Options of ``python examples/portrait.py``."""

    file: Path = option(Path("portrait.jpg"), positional=True, metavar="FILE", help="JPEG to write")


def main() -> None:
    """Write the photograph, 512x512."""
    config = parse_config(
        PortraitConfig,
        None,
        prog="python examples/portrait.py",
        description=__doc__ or "",
        example="portrait.jpg",
    )
    if config.file.is_dir():
        raise ConfigError(config.file, "a file's name", "a folder", "name a file in it")
    make_folder(config.file.parent, "FILE")
    with atomic_path(config.file) as temporary:
        Image.fromarray(data.astronaut()).save(temporary, "JPEG", quality=95)
    print(f"saved {config.file}")


if __name__ == "__main__":
    run_command(main)
