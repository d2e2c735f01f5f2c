"""Checks an image by decoding it completely, and encodes it again if that is asked for."""

from __future__ import annotations

import dataclasses
import io
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.decode.damage import find_damage
from pipelines.decode.limits import ImageLimits
from pipelines.decode.pillow import decode_one
from pipelines.value_range import ValueRange

QUALITY = 95  # of re-encoded JPEGs: the loss is below that of the views' resize
_MAGIC = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"BM", "bmp"),
    (b"II", "tif"),
    (b"MM", "tif"),
    (b"P", "ppm"),
    (b"GIF8", "gif"),
)


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """Result for one image.

    Attributes:
        data: uint8 [bytes] to store; empty if the image is bad.
        head: put in front of `data` when the image is read.
        height, width: pixels, EXIF orientation applied.
        extension: by content, not by name (ImageNet has a PNG called .JPEG).
        bad: why the image cannot be used, or "".
        unread: whether it is bad because its bytes could not be read.
        warned: warnings about an image that decodes, or "".
        value_range: of the stored image, if it has more than 8 bits.
        limits: that it was checked against.
        damage: what `find_damage` says about an image that decodes, None if nothing; also in `warned`.
    """

    data: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    head: bytes = b""
    height: int = 0
    width: int = 0
    extension: str = ""
    bad: str = ""
    unread: bool = False
    warned: str = ""
    damage: str | None = None
    value_range: ValueRange | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def checksum(self) -> int:
        """CRC-32 of what a source will read."""
        return zlib.crc32(self.data.data, zlib.crc32(self.head))


def check_image(
    data: npt.NDArray[np.uint8],
    *,
    max_size: int | None,
    quality: int | None = None,
    strict: bool = False,
    value_range: ValueRange | None = None,
    limits: ImageLimits | None = None,
    log: WarningLog,
) -> CheckedImage:
    """Decode an encoded image completely, as training would, and return the bytes to store.

    Args:
        data: uint8 [bytes].
        max_size: longest side in pixels; a larger image is turned upright, scaled down (Lanczos) and encoded as JPEG of
            `quality` or `QUALITY`. None: no limit.
        quality: JPEG quality at which every image is encoded again, upright. None: bytes pass through.
        strict: an image that is damaged but decodes is bad.
        value_range: of images with more than 8 bits; None if they use 16.
        limits: images beyond them are bad; None for the defaults.
        log: collects this thread's warnings.
    """
    limits = limits or ImageLimits()
    log.take()
    pixels = decode_one(data, value_range=value_range, max_size=max_size, limits=limits)  # [H, W, 3]
    warned = log.take()
    if isinstance(pixels, str):
        return CheckedImage(bad=pixels)
    damage = find_damage([data]).get(0)
    if damage:
        text = f"damaged: {damage}"
        if strict:
            return CheckedImage(bad=text)
        warned = "; ".join(filter(None, (warned, text)))
    stored = _stored(data, pixels, max_size=max_size, quality=quality, most=limits.pixels)
    if stored.bad:
        return stored
    return dataclasses.replace(stored, warned=warned, damage=damage, value_range=value_range, limits=limits)


def _stored(
    data: npt.NDArray[np.uint8], pixels: npt.NDArray[np.uint8], *, max_size: int | None, quality: int | None, most: int
) -> CheckedImage:
    """The bytes to store of an image and its pixels, uint8 [H, W, 3], of which at most `most` are stored."""
    height, width = pixels.shape[:2]
    scale = 1.0 if max_size is None else min(1.0, max_size / max(height, width))
    if round(scale * height) * round(scale * width) > most:
        return CheckedImage(
            bad=f"{width} x {height} pixels become more than the allowed {most:,}: give a smaller --max-size"
        )
    if scale == 1.0 and quality is None:
        return CheckedImage(data=data, height=height, width=width, extension=_extension(data[:12].tobytes()))
    if scale < 1.0:
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(Image.fromarray(pixels).resize(small, Image.Resampling.LANCZOS))
    return as_jpeg(pixels, quality=quality or QUALITY)


def as_jpeg(pixels: npt.NDArray[np.uint8], *, quality: int) -> CheckedImage:
    """Encode uint8 [H, W, 3]; an image with a side above 65,535, JPEG's limit, is bad."""
    encoded = io.BytesIO()
    try:
        Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    except OSError as error:
        return CheckedImage(bad=f"it cannot be encoded as JPEG: {error}")
    stored = np.frombuffer(encoded.getvalue(), dtype=np.uint8)
    height, width = pixels.shape[:2]
    return CheckedImage(data=stored, height=height, width=width, extension="jpg")


def _extension(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if content.startswith(magic)), "img")


class WarningLog:
    """Collects Python warnings per thread; ``warnings.catch_warnings`` is not thread-safe."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect the warnings of all threads."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            warnings.showwarning = lambda message, *_, **__: self._messages().append(str(message))
            yield

    def take(self) -> str:
        """This thread's warnings since the last call."""
        messages = self._messages()
        text = "; ".join(dict.fromkeys(messages))
        messages.clear()
        return text

    def _messages(self) -> list[str]:
        if not hasattr(self._local, "messages"):
            self._local.messages = []
        messages: list[str] = self._local.messages
        return messages
