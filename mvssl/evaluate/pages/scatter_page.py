"""The map of features: a scatter of their projections with a thumbnail of every point, in one page without network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvssl.evaluate.pages.gallery import Gallery, jpeg, jpeg_uri, render_page
from mvssl.evaluate.projection import Projection

SPRITE_BYTES = 6_000_000
"""Largest size of all thumbnails together, as JPEG; in the page they take a third more."""
MOST_POINTS = 20_000
"""Largest number of points of a page; its names take at most 4 MB."""
_TILES = (96, 80, 64, 48, 40, 32, 24, 16)  # edges of a thumbnail
_PIXELS = 12_000_000  # of all thumbnails: browsers show pictures of this size on phones too
_QUALITIES = (80, 65, 50, 35)
_UNIT = 10_000  # of coordinates


def scatter_page(
    gallery: Gallery,
    projections: Mapping[str, Projection],
    *,
    about: list[str],
    progress: Callable[[int], None] | None = None,
) -> str:
    """The page as HTML.

    Args:
        gallery: the images, at most `MOST_POINTS`.
        projections: points [N, 2] by the name of the projection; the first one is shown first.
        about: lines below the title.
        progress: called with the number of thumbnails just made.
    """
    rows = list(range(len(gallery)))
    sprite, tile, columns = make_sprite(gallery.thumbnails(rows, progress=progress))
    classes = sorted(set(gallery.classes) - {""})
    number = {name: n for n, name in enumerate(classes)} | {"": -1}
    data = {
        "names": gallery.keys,
        "classes": classes,
        "labels": [number[name] for name in gallery.classes],
        "tile": tile,
        "columns": columns,
        "projections": [
            {"name": name, "about": described(name, projection), "points": unit_square(projection.points).tolist()}
            for name, projection in projections.items()
        ],
    }
    return render_page(
        "scatter.html.j2",
        title="Map of features",
        about=[*about, f"Each point is one of {gallery.described}."],
        data=as_script_data(data),
        sprite=jpeg_uri(sprite),
        projections=list(projections),
        labelled=gallery.labelled,
    )


def directions(features: Tensor) -> Tensor:
    """Features [N, D] of length 1: what cosine similarity, and so kNN, compares."""
    return F.normalize(features.float(), dim=1)


def described(name: str, projection: Projection) -> str:
    """A projection in words."""
    if projection.explained:
        shares = " and ".join(f"{100 * share:.1f} %" for share in projection.explained)
        return f"{name} of the normalised features: {shares} of their variance."
    return f"{name} of the features, by cosine distance: neighbours stay near; distances between groups mean little."


def unit_square(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Points [N, 2] in units of 1 / 10,000 of the square around them, int64, with y upwards as in plots."""
    low, high = points.min(axis=0), points.max(axis=0)
    side = float((high - low).max()) or 1.0
    scaled = (points - (low + high) / 2) / side + 0.5
    scaled[:, 1] = 1 - scaled[:, 1]
    whole: NDArray[np.int64] = np.rint(scaled * _UNIT).astype(np.int64)
    return whole


def make_sprite(tiles: list[Image.Image]) -> tuple[bytes, int, int]:
    """All thumbnails side by side as one JPEG of at most `SPRITE_BYTES`.

    Returns:
        The JPEG, the edge of a thumbnail, and the number of columns.
    """
    columns = max(1, math.ceil(math.sqrt(len(tiles))))
    encoded, edge = b"", _TILES[-1]
    for edge in (edge for edge in _TILES if edge * edge * len(tiles) <= _PIXELS or edge == _TILES[-1]):
        sheet = Image.new("RGB", (columns * edge, math.ceil(len(tiles) / columns) * edge))
        for number, tile in enumerate(tiles):
            fitted = tile.resize((edge, edge), Image.Resampling.LANCZOS, reducing_gap=2.0)
            sheet.paste(fitted, (number % columns * edge, number // columns * edge))
        for quality in _QUALITIES:
            encoded = jpeg(sheet, quality=quality)
            if len(encoded) <= SPRITE_BYTES:
                return encoded, edge, columns
    return encoded, edge, columns


def as_script_data(value: Any) -> Markup:
    """JSON that stands in a script element of a page: `<`, `>` and `&` are escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
