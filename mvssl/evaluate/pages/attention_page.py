"""The page and the picture of attention or activation maps, as overlays on the images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.attention import FeatureMaps, MapKind, feature_maps
from mvssl.evaluate.features import center_crops
from mvssl.evaluate.pages.gallery import data_uri, evenly, pictures, render_page
from mvssl.evaluate.session import Session
from pipelines.names import NAME, visible
from pipelines.runtime import InputError
from pipelines.storage.source import Source

MOST_HEADS = 16
"""Attention heads that are shown one by one."""
_LARGE, _SMALL, _GAP, _TEXT = 224, 112, 8, 18  # pixels
_FAINTEST, _STRONGEST = 0.25, 0.8  # opacity of an overlay
_COLOURS = "inferno"
_FINE = 6  # cells
_CAPTION = 36  # characters, of which the font has those of ASCII


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedImages:
    """Some images and their maps.

    Attributes:
        pictures: the centre crops, RGB.
        keys: names of the images, `visible`.
        classes: class names, `visible`; "" without a label.
        maps: where the backbone looks in each.
    """

    pictures: list[Image.Image]
    keys: list[str]
    classes: list[str]
    maps: FeatureMaps


def map_images(
    session: Session,
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    *,
    images: int,
    kind: MapKind = "auto",
) -> MappedImages:
    """Maps of some images of a source, evenly spaced; those that cannot be decoded are left out.

    Raises:
        InputError: no image can be decoded, or the backbone has no such maps.
    """
    shown: list[Image.Image] = []
    found: list[int] = []
    maps: list[FeatureMaps] = []
    with closing(center_crops(session, source, evaluation, evenly(len(source), images))) as batches:
        for views, index, _ in batches:
            with session.autocasting():
                maps.append(feature_maps(backbone, views, kind=kind))
            shown += pictures(views)
            found += index.tolist()
    joined = FeatureMaps(
        kind=maps[0].kind,
        about=maps[0].about,
        mean=torch.cat([one.mean for one in maps]),
        heads=torch.cat([one.heads for one in maps]),
    )
    finite = joined.mean.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        key = source.key(found[int((~finite).nonzero()[0])])
        raise InputError(f"The maps of {key} are not finite (NaN or infinite): the weights have diverged.")
    labels = source.labels[found].tolist()
    return MappedImages(
        pictures=shown,
        keys=[visible(source.key(n), 4 * NAME) for n in found],
        classes=[visible(source.classes[label], 4 * NAME) if label >= 0 else "" for label in labels],
        maps=joined,
    )


def overlay(picture: Image.Image, heat: Tensor, size: int) -> Image.Image:
    """A picture of `size` pixels with a map [h, w] in colour over it, from its smallest to its largest value."""
    base = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    low, high = float(heat.min()), float(heat.max())
    scaled = (heat - low) / (high - low) if high > low else torch.zeros_like(heat)
    field = Image.fromarray(scaled.numpy().astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    strength: NDArray[np.float64] = np.asarray(field, dtype=np.float64).clip(0, 1)
    colours = matplotlib.colormaps[_COLOURS](strength)[..., :3]
    opacity = (_FAINTEST + (_STRONGEST - _FAINTEST) * strength)[..., None]
    return Image.fromarray(np.rint(255 * (base * (1 - opacity) + colours * opacity)).astype(np.uint8))


def attention_page(mapped: MappedImages, *, about: list[str]) -> str:
    """The page as HTML; `about` are the lines below its title."""
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(mapped.pictures):
        heads = mapped.maps.heads[number, :MOST_HEADS]
        rows.append(
            {
                "key": mapped.keys[number],
                "class_name": mapped.classes[number],
                "picture": data_uri(picture.resize((_LARGE, _LARGE), Image.Resampling.BICUBIC)),
                "mean": data_uri(overlay(picture, mapped.maps.mean[number], _LARGE)),
                "heads": [data_uri(overlay(picture, head, _SMALL)) for head in heads],
            }
        )
    count, (height, width) = mapped.maps.heads.shape[1], mapped.maps.mean.shape[-2:]
    first = f"{mapped.maps.about}; a grid of {height} x {width}"
    if min(height, width) < _FINE:
        first += " (a larger --resize and --crop of mvssl-eval attention gives a finer one)"
    heads_are = f"The large map is the mean over {count} heads; " if count else ""
    shown = f"the {min(count, MOST_HEADS)} small ones are heads. " if count else ""
    return render_page(
        "attention.html.j2",
        title="Attention maps" if mapped.maps.kind == "attention" else "Activation maps",
        about=[
            *about,
            f"{first[0].upper()}{first[1:]}.",
            f"{heads_are}{shown}Every map has its own scale, from dark (its smallest value) to bright (its largest).",
        ],
        rows=rows,
    )


def attention_picture(mapped: MappedImages) -> Image.Image:
    """One row for each image: the image, its map, and the map of each head."""
    count = min(mapped.maps.heads.shape[1], MOST_HEADS)
    columns, step = 2 + count, _SMALL + _GAP
    sheet = Image.new("RGB", (_GAP + columns * step, _GAP + _TEXT + len(mapped.pictures) * (step + _TEXT)), "white")
    pen = ImageDraw.Draw(sheet)
    heads = ["image", "mean" if count else "norm", *(f"head {n + 1}" for n in range(count))]
    for column, name in enumerate(heads):
        pen.text((_GAP + column * step, _GAP // 2), name, fill="black")
    for number, picture in enumerate(mapped.pictures):
        y = _GAP + _TEXT + number * (step + _TEXT)
        shown = [mapped.maps.mean[number], *mapped.maps.heads[number, :count]]
        tiles = [picture.resize((_SMALL, _SMALL), Image.Resampling.BICUBIC)]
        tiles += [overlay(picture, one, _SMALL) for one in shown]
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_GAP + column * step, y))
        name = mapped.classes[number] or mapped.keys[number]
        pen.text(
            (_GAP, y + _SMALL + 1), visible(name, _CAPTION).encode("ascii", "backslashreplace").decode(), fill="black"
        )
    return sheet
