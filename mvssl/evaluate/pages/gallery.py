"""The images of a page: features, names and thumbnails, from cached features or in one pass over some images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.feature_store import DONE
from mvssl.evaluate.features import cached_features, center_crops, is_cached
from mvssl.evaluate.session import EvalSession, Session
from mvssl.monitor.report import templates
from pipelines.decode.pillow import decode_one
from pipelines.names import visible
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source, SubsetSource
from pipelines.views.reference import normalize

TILE = 112
"""Edge of a thumbnail in pixels."""
_LONGEST_KEY = 160  # characters
_THREADS = 4
_BLANK = (200, 200, 200)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """N images.

    Attributes:
        features: float [N, D].
        keys: their names, `visible`.
        classes: the class of each by name, `visible`; "" without a label.
        thumbnail: RGB picture of a row, with an edge of `TILE` pixels or another one; grey if it cannot be read.
        total: images of the data set that they are from.
        left_out: images that were taken too but cannot be decoded.
        where: the data set, for people.
    """

    features: Tensor
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    thumbnail: Callable[[int], Image.Image]
    total: int
    where: str
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labelled(self) -> bool:
        """Whether any of the images has a label."""
        return any(self.classes)

    @property
    def described(self) -> str:
        """How many images of which data set, e.g. "5,000 of the 1,281,167 images of DATA, evenly spaced"."""
        images = f"{self.total:,} images of {self.where}" if self.total != 1 else f"one image of {self.where}"
        bad = f" ({self.left_out:,} that cannot be decoded left out)" if self.left_out else ""
        return f"{len(self):,} of the {images}, evenly spaced{bad}" if self.is_sample else f"the {images}{bad}"

    @property
    def is_sample(self) -> bool:
        """Whether there are images in the data set that were not taken."""
        return len(self) + self.left_out < self.total

    def thumbnails(self, rows: list[int], *, progress: Callable[[int], None] | None = None) -> list[Image.Image]:
        """Thumbnails of some rows, made in threads; `progress` is called with the number just made."""
        made = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for picture in pool.map(self.thumbnail, rows):
                made.append(picture)
                if progress is not None:
                    progress(1)
        return made


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` numbers from 0 on, evenly spaced, int64 ascending."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def cached_gallery(session: EvalSession, source: Source, name: str, *, most: int) -> Gallery:
    """At most `most` images of a source, evenly spaced, with their cached features; missing ones are computed.

    The features of all images are taken if an earlier evaluation has computed them.

    Raises:
        InputError: as `cached_features`.
    """
    total, where = len(source), str(source.location)
    if total > most and not is_cached(session, source, name):
        source = SubsetSource(source, evenly(total, most))
    store = cached_features(session, source, name)
    done = np.flatnonzero(store.state == DONE)
    rows = done[evenly(len(done), most)]
    keys, classes = _named(source, rows)
    evaluation = session.loaded.evaluation

    def thumbnail(row: int) -> Image.Image:
        return read_tile(source, int(rows[row]), evaluation)

    values = torch.from_numpy(np.asarray(store.values[rows])).float().to(session.device)
    bad = len(store.state) - len(done)
    return Gallery(
        features=values,
        keys=keys,
        classes=classes,
        thumbnail=thumbnail,
        total=total,
        where=where,
        left_out=bad if len(rows) == len(done) else 0,
    )


def embedded_gallery(
    session: Session, backbone: nn.Module, source: Source, evaluation: Evaluation, *, most: int
) -> Gallery:
    """At most `most` images of a source, evenly spaced, with features and thumbnails of one pass; nothing is cached.

    Raises:
        InputError: no image can be decoded.
    """
    tiles: dict[int, Image.Image] = {}
    values: list[Tensor] = []
    found: list[int] = []
    was_training = backbone.training
    backbone.eval()
    try:
        with closing(center_crops(session, source, evaluation, evenly(len(source), most))) as batches:
            for views, index, _ in batches:
                with torch.no_grad(), session.autocasting():
                    values.append(backbone(views).float())
                for pixels in pictures(views):
                    tiles[len(tiles)] = pixels.resize((TILE, TILE), Image.Resampling.BILINEAR)
                found += index.tolist()
    finally:
        backbone.train(was_training)
    keys, classes = _named(source, np.array(found, dtype=np.int64))
    return Gallery(
        features=torch.cat(values),
        keys=keys,
        classes=classes,
        thumbnail=tiles.__getitem__,
        total=len(source),
        where=str(source.location),
        left_out=min(most, len(source)) - len(found),
    )


def _named(source: Source, rows: NDArray[np.int64]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys and class names of some images, as a page shows them."""
    names = [visible(name, _LONGEST_KEY) for name in source.classes]
    labels = source.labels[rows].tolist()
    keys = tuple(visible(source.key(row), _LONGEST_KEY) for row in rows.tolist())
    return keys, tuple(names[label] if label >= 0 else "" for label in labels)


def pictures(views: Tensor) -> list[Image.Image]:
    """RGB pictures of normalised views [B, 3, S, S]."""
    pixels = normalize.undo(views).permute(0, 2, 3, 1).cpu().numpy()  # uint8 [B, S, S, 3]
    return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def read_tile(source: Source, index: int, evaluation: Evaluation, size: int = TILE) -> Image.Image:
    """The centre crop of an image, upright, RGB [size, size]; grey if it cannot be read any more."""
    facts = facts_of(source)
    try:
        pixels = decode_one(source.read(index), value_range=facts.value_range, limits=facts.limits)
    except OSError:
        pixels = ""
    if isinstance(pixels, str):
        return Image.new("RGB", (size, size), _BLANK)
    bleed = max(0.0, (1 - evaluation.crop / evaluation.resize) / 2)
    return ImageOps.fit(Image.fromarray(pixels), (size, size), bleed=min(bleed, 0.49))


def data_uri(picture: Image.Image, *, quality: int = 82) -> Markup:
    """A picture as the address of a JPEG inside a page."""
    return jpeg_uri(jpeg(picture, quality=quality))


def jpeg_uri(data: bytes) -> Markup:
    """A JPEG as an address inside a page."""
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(data).decode()}")


def jpeg(picture: Image.Image, *, quality: int) -> bytes:
    """A picture as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


@cache
def _environment() -> Environment:
    """The templates of this package, with the settings of the report's."""
    folder = Path(__file__).parent
    return templates().overlay(loader=FileSystemLoader(folder))


def render_page(template: str, *, title: str, about: list[str], **context: Any) -> str:
    """One of the templates here as a self-contained page.

    Args:
        template: such as neighbours.html.j2.
        title: of the page.
        about: lines below it: which backbone, which images.
        context: what else the template needs.
    """
    return _environment().get_template(template).render(title=title, about=about, **context)
