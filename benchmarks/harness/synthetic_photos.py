"""Writes synthetic JPEGs, for benchmarks without photos: `python -m benchmarks.harness.synthetic_photos OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from pipelines.runtime import invalid, parse_arguments, run_cli


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write JPEGs of coloured noise, coarse and fine; a view engine's speed does not depend on the content of an image.

    Attributes:
        out: output folder; files of the same names are replaced.
        count: number of images.
        height, width: of each in pixels.
    """

    out: tyro.conf.Positional[Path]
    count: int = 512
    height: int = 375
    width: int = 500

    def __post_init__(self) -> None:
        sizes = (self.count, self.height, self.width)
        if min(sizes) < 1:
            raise invalid("count, height and width", sizes, "1 or more each", "give larger numbers")


def write_photos(arguments: Arguments) -> None:
    """Write the images; the same versions of numpy and Pillow write the same ones."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.count):
        rng = np.random.default_rng([0, number])
        layers = [
            Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
                (arguments.width, arguments.height), Image.Resampling.BICUBIC
            )
            for cells in (4, 16, 64)
        ]
        photo = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.2)
        photo.save(arguments.out / f"{number:05d}.jpg", quality=90)


if __name__ == "__main__":
    run_cli(lambda: write_photos(parse_arguments(Arguments, prog="python -m benchmarks.harness.synthetic_photos")))
