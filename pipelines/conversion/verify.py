"""Check one image by decoding it completely, and make it smaller where that is asked for.

Which failures to read an image cost that image, and which stop the conversion.
"""

from __future__ import annotations

import errno
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.decode.pillow import decode_one
from pipelines.runtime import InputError
from pipelines.storage import Source

# Short of something that every other read needs too, or the source is no longer the one that was opened.
_FATAL = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC}
_GONE = 100  # unreadable in a row: no data set is like that, a disk that was unmounted or has failed is


def read(source: Source, index: int) -> npt.NDArray[np.uint8] | str:
    """Encoded image, uint8 [bytes], or why just this image cannot be read.

    Raises:
        OSError: no image could be read either.
        InputError: the source is damaged.
    """
    try:
        return source.read(index)
    except FileNotFoundError:
        if not source.location.exists():
            raise
        return "the file does not exist (a broken link?)"
    except OSError as error:
        if error.errno in _FATAL:
            raise
        return f"the file cannot be read: {error.strerror or error}"


class SourceGoneError(InputError):
    """Nothing can be read any more."""


class UnreadableRow:
    """Counts the images in a row that could not be read, and which shards they are in."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._length = 0
        self._in_this_shard = 0
        self._shards: list[int] = []

    def add(self, reason: str) -> None:
        """One more image, in order; `reason` is "" if it could be read.

        Raises:
            SourceGoneError: too many in a row.
        """
        if not reason:
            self._length = self._in_this_shard = 0
            self._shards.clear()
            return
        self._length += 1
        self._in_this_shard += 1
        if self._length >= _GONE:
            raise SourceGoneError(
                f"the source {self._origin} has gone: the last {self._length} images could not be read, because "
                f"{reason}; check that its disk is mounted and readable, and run the same command again (finished "
                "shards are kept)."
            )

    def end_shard(self, number: int) -> None:
        """Planned shard `number` is written."""
        if self._in_this_shard:
            self._shards.append(number)
        self._in_this_shard = 0

    @property
    def shards(self) -> tuple[int, ...]:
        """Written shards that lack images of the row: not finished if the source has gone."""
        return tuple(self._shards)


QUALITY = 95  # of re-encoded JPEGs: differences below what the views' resize leaves of them
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
class Checked:
    """The outcome for one image.

    Attributes:
        data: bytes to store, uint8 [bytes]; empty if the image is bad.
        height, width: pixels, EXIF orientation applied.
        extension: by content, not by name (ImageNet has a PNG called .JPEG).
        bad: why the image cannot be used, or "".
        unread: whether it is bad because not even its bytes could be read.
        warned: what the decoder complained about although it decoded every pixel, or "".
    """

    data: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    height: int = 0
    width: int = 0
    extension: str = ""
    bad: str = ""
    unread: bool = False
    warned: str = ""


class WarningLog:
    """Collects Python warnings per thread, because ``warnings.catch_warnings`` is for one thread only."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Take every warning of every thread while the context lasts."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")

            def keep(message: Warning | str, *_: object, **__: object) -> None:
                self._messages().append(str(message))

            warnings.showwarning = keep
            yield

    def take(self) -> str:
        """What this thread was warned of since the last call."""
        messages = self._messages()
        text = "; ".join(dict.fromkeys(messages))
        messages.clear()
        return text

    def _messages(self) -> list[str]:
        if not hasattr(self._local, "messages"):
            self._local.messages = []
        messages: list[str] = self._local.messages
        return messages


def check(data: npt.NDArray[np.uint8], *, max_size: int | None, quality: int | None = None, log: WarningLog) -> Checked:
    """Decode `data` completely, as training would, and say what to store.

    Args:
        data: an encoded image, uint8 [bytes].
        max_size: longest side in pixels; a larger image is turned upright, scaled down (Lanczos) and encoded again
            (JPEG, `QUALITY` unless `quality` is given). None: no image is too large.
        quality: JPEG quality at which every image is encoded again, upright. None: bytes pass through.
        log: where this thread's warnings arrive.
    """
    log.take()
    pixels = decode_one(data)  # [H, W, 3]
    warned = log.take()
    if isinstance(pixels, str):
        return Checked(bad=pixels)
    content = data.tobytes()
    if content.startswith(b"\xff\xd8") and not has_end_marker(content):
        return Checked(bad="truncated JPEG: the end-of-image marker is missing")
    height, width = pixels.shape[:2]
    scale = 1.0 if max_size is None else min(1.0, max_size / max(height, width))
    if scale == 1.0 and quality is None:
        return Checked(data=data, height=height, width=width, extension=_extension(content), warned=warned)
    if scale < 1.0:
        small = Image.fromarray(pixels).resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
        )
        pixels = np.asarray(small)
    return as_jpeg(pixels, quality=quality or QUALITY, warned=warned)


def as_jpeg(pixels: npt.NDArray[np.uint8], *, quality: int, warned: str = "") -> Checked:
    """Encode pixels, uint8 [H, W, 3]; a side above 65,535, which JPEG cannot hold, makes a bad image."""
    encoded = io.BytesIO()
    try:
        Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    except OSError as error:
        return Checked(bad=f"it cannot be encoded as JPEG: {error}")
    stored = np.frombuffer(encoded.getvalue(), dtype=np.uint8)
    height, width = pixels.shape[:2]
    return Checked(data=stored, height=height, width=width, extension="jpg", warned=warned)


def has_end_marker(jpeg: bytes) -> bool:
    """Whether an end-of-image marker follows the first scan of a JPEG (one in an EXIF thumbnail does not count)."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:
            break
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg.rfind(b"\xff\xd9", at) > 0


def _extension(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if content.startswith(magic)), "img")
