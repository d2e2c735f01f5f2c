"""Draw JPEGs of one size in the manner of photos, for benchmarks where there are none: `... draw_photos OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from pipelines.runtime import invalid, run_cli


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw JPEGs of coloured noise, coarse and fine; a view engine's speed does not depend on what is in a picture.

    Attributes:
        out: folder to write them to; files of the same names are replaced.
        count: number of pictures.
        height: of each in pixels.
        width: of each in pixels.
    """

    out: tyro.conf.Positional[Path]
    count: int = 512
    height: int = 375
    width: int = 500

    def __post_init__(self) -> None:
        for name in ("count", "height", "width"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "1 or more", "give a larger number")


def draw_photos(arguments: Arguments) -> None:
    """Write the pictures; the same arguments give the same ones with the same versions of numpy and Pillow."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.count):
        rng = np.random.default_rng([0, number])
        layers = [
            Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
                (arguments.width, arguments.height), Image.Resampling.BICUBIC
            )
            for cells in (4, 16, 64)
        ]
        picture = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.2)
        picture.save(arguments.out / f"{number:05d}.jpg", quality=90)


if __name__ == "__main__":
    run_cli(lambda: draw_photos(tyro.cli(Arguments, prog="python -m benchmarks.measuring.draw_photos")))
