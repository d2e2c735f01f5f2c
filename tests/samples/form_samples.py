"""A few images as a folder, and what their conversion gives, to compare the other forms of the same images with."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.storage import open_source

CLASSES = ("bird", "cat", "dog")


class Item(NamedTuple):
    """One image: its file name, encoded bytes and class name."""

    name: str
    data: bytes
    label: str


def encoded(seed: int, form: str = "JPEG", size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def items(count: int = 9, *, first: int = 0) -> list[Item]:
    """Images of three classes, JPEGs and PNGs."""
    return [
        Item(f"{n:03d}.{'png' if n % 4 == 3 else 'jpg'}", encoded(n, "PNG" if n % 4 == 3 else "JPEG"), CLASSES[n % 3])
        for n in range(first, first + count)
    ]


def as_folder(root: Path, images: list[Item]) -> Path:
    for item in images:
        path = root / item.label / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
    return root


def contents(folder: Path) -> set[tuple[bytes, str]]:
    """(bytes, class name) of every image of converted data or a folder."""
    source = open_source(folder)
    names = (*source.classes, "")
    return {(source.read(n).tobytes(), names[source.labels[n]]) for n in range(len(source))}


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def pixels(folder: Path) -> set[tuple[bytes, str]]:
    """(pixels, class name) of every image of converted data, decoded by Pillow."""
    return {(pixels_of(data).tobytes(), label) for data, label in contents(folder)}


Make = Callable[[Path, list[Item]], Path]
