"""A .beton file made by mvssl-convert, for the tests of its reader; FFCV is not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.conversion.command import Convert, convert
from tests.samples.decode_samples import encode, picture

COUNT = 24


def write_jpegs(folder: Path, *, count: int = COUNT) -> list[np.ndarray]:
    """JPEGs of many sizes in two class folders, in the order of their keys; gives their bytes."""
    encoded = []
    for n in range(count):
        path = folder / ("a" if n < count // 2 else "b") / f"{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded.append(encode(picture(20 + 3 * (n % 5), 24 + 5 * (n % 7), n), quality=88))
        path.write_bytes(encoded[-1].tobytes())
    return encoded


def make_beton(base: Path, *, count: int = COUNT) -> tuple[Path, list[np.ndarray]]:
    """A converted images.beton below `base`, and the bytes of its JPEGs."""
    encoded = write_jpegs(base / "src", count=count)
    convert(Convert(src=base / "src", dst=base / "beton", format="beton"))
    return base / "beton" / "images.beton", encoded


def with_pixels(base: Path) -> tuple[Path, np.ndarray]:
    """A converted file of one PNG, which is stored as pixels: uint8 [H, W, 3]."""
    pixels = picture(33, 47)
    (base / "png").mkdir(parents=True)
    Image.fromarray(pixels).save(base / "png" / "x.png")
    convert(Convert(src=base / "png", dst=base / "raw", format="beton"))
    return base / "raw" / "images.beton", pixels
