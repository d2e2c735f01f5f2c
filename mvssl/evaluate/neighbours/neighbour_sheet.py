"""A picture of images with their nearest neighbours: what a backbone takes for alike."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from pipelines.storage.source import Source

_TILE, _GAP, _EDGE, _TEXT = 96, 6, 3, 14
_SAME, _OTHER, _PLAIN = (38, 139, 70), (200, 55, 55), (170, 170, 170)


def write_sheet(
    path: Path,
    queries: Source,
    bank: Source,
    *,
    asked: Sequence[int],
    nearest: NDArray[np.int64],
    cosine: NDArray[np.float32],
    same: NDArray[np.bool_] | None,
) -> None:
    """Draw one row for each query: the image, then its neighbours with their cosine, the nearest first.

    Args:
        path: the PNG to write.
        queries: where the queries are from.
        bank: where the neighbours are from.
        asked: R indices of queries.
        nearest: int64 [R, k], indices of neighbours.
        cosine: float32 [R, k].
        same: bool [R, k], whether the labels agree (green or red edge); None without labels.
    """
    step = _TILE + _GAP
    width = step * (nearest.shape[1] + 1) + 3 * _GAP
    sheet = Image.new("RGB", (width, (step + _TEXT) * len(asked) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, query in enumerate(asked):
        y = _GAP + row * (step + _TEXT)
        sheet.paste(_tile(queries, query), (_GAP, y))
        for column, (other, value) in enumerate(zip(nearest[row].tolist(), cosine[row].tolist(), strict=True)):
            x = 3 * _GAP + (column + 1) * step - _GAP
            colour = _PLAIN if same is None else _SAME if same[row, column] else _OTHER
            pen.rectangle((x - _EDGE, y - _EDGE, x + _TILE + _EDGE - 1, y + _TILE + _EDGE - 1), fill=colour)
            sheet.paste(_tile(bank, other), (x, y))
            pen.text((x, y + _TILE + _EDGE), f"{value:.2f}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    sheet.save(aside, format="PNG")
    aside.replace(path)


def _tile(source: Source, index: int) -> Image.Image:
    """The centre of an image, upright."""
    with Image.open(io.BytesIO(source.read(index).tobytes())) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (_TILE, _TILE))
