"""Pillow decoder, in threads: the fallback, and the reference for odd encodings."""

from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.decode.base import MAX_PIXELS, MAX_REDUCED, Decoded
from pipelines.decode.deep import deep_rgb, is_deep, measured
from pipelines.decode.sniff import sniff
from pipelines.value_range import Measured, ValueRange

Image.init()
if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()
# Listed, because Pillow would otherwise try all formats, including EPS, which starts another program.
_FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "HEIF")
    if name in Image.OPEN
)
_DEEP_FORMATS = (b"\x89P", b"II", b"MM", b"P2", b"P3", b"P5", b"P6", b"Pf")  # PNG, TIFF, PGM and PPM
DEEP_ENDINGS = (".png", ".tif", ".tiff", ".pgm", ".ppm", ".pnm")
"""Endings of files that may have more than 8 bits a channel without stating what their values mean."""
HEAD_BYTES = 25  # of a file, for `may_be_deep`
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PillowDecoder:
    """Decodes on the CPU in a thread pool (Pillow releases the GIL while it decodes)."""

    name = "pillow"

    def __init__(self, *, threads: int, value_range: ValueRange | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mvssl-pillow")
        self._decode = partial(decode_one, value_range=value_range)

    def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
        """Decode N images, uint8 [bytes] each, to pixels on the CPU."""
        del by_pillow
        results = list(self._pool.map(self._decode, encoded))
        images = [image for image in results if not isinstance(image, str)]
        flat = np.concatenate([image.reshape(-1) for image in images]) if images else np.empty(0, np.uint8)
        return Decoded(
            pixels=torch.from_numpy(flat),
            sizes=torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).reshape(-1, 2),
            failures={n: reason for n, reason in enumerate(results) if isinstance(reason, str)},
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def decode_one(
    data: np.ndarray, *, value_range: ValueRange | None = None, max_size: int | None = None
) -> np.ndarray | str:
    """Decode one image, uint8 [bytes], to uint8 [H, W, 3], or to the reason why that fails.

    Args:
        data: the encoded image.
        value_range: of images with more than 8 bits; None if they use 16.
        max_size: the longest side that is wanted. Images of up to `MAX_REDUCED` pixels are then decoded, and JPEGs with
            more than `MAX_PIXELS` at a fraction of their size.
    """
    if data.size == 0:
        return "the file is empty (0 bytes)"
    limit = MAX_PIXELS if max_size is None else MAX_REDUCED
    header = sniff(data)
    if header is not None and max_size is None and header.height * header.width > limit:
        return _too_large(header.width, header.height, limit)
    try:
        with open_image(data) as image:
            if max_size is not None and image.width * image.height > MAX_PIXELS:
                _reduce(image, max_size)
            if image.width * image.height > limit:
                return _too_large(image.width, image.height, limit)
            if is_deep(image):
                return deep_rgb(image, partial(open_image, data), _upright, value_range)
            upright = _upright(image)
            upright.info.pop("transparency", None)  # dropped like an alpha channel
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except UnidentifiedImageError:
        return f"not an image file of a known format ({data.size} bytes)"
    except Image.DecompressionBombError:
        return f"it has more pixels than the allowed {limit:,}: {_smaller(limit)}"
    except Exception as error:  # Pillow raises many types on broken files: OSError, SyntaxError, struct.error, ...
        message = str(error) or type(error).__name__
        return f"the file is truncated ({data.size} bytes)" if "truncated" in message.lower() else message


def measure(data: np.ndarray, *, limit: int = MAX_PIXELS) -> Measured | None:
    """The values of an image of more than 8 bits.

    None for other images, for broken ones, those of more than `limit` pixels, and files that state their range.
    """
    if not may_be_deep(bytes(data[:HEAD_BYTES])):
        return None
    try:
        with open_image(data) as image:
            if not is_deep(image) or image.width * image.height > limit:
                return None
            return measured(image, partial(open_image, data), _upright)
    except Exception:  # the decoder says what is wrong
        return None


def may_be_deep(head: bytes) -> bool:
    """Whether a file may have more than 8 bits a channel, by its first `HEAD_BYTES` bytes."""
    if head[:2] == b"\x89P":
        return head[24:25] == b"\x10"  # the bits of a PNG
    return head[:2] in _DEEP_FORMATS


def open_image(data: np.ndarray) -> Any:
    """Open an image, uint8 [bytes], as `Image.open` does, without its warning about large ones, which have our limit.

    Raises:
        UnidentifiedImageError: it is of none of our formats.
    """
    prefix = bytes(data[:16])
    for name in _FORMATS:
        factory, accepts = Image.OPEN[name]
        try:
            if accepts is None or accepts(prefix) is True:
                return factory(io.BytesIO(data.data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # as `Image.open`: perhaps another format
            continue
    raise UnidentifiedImageError("cannot identify the image")


def _reduce(image: Any, size: int) -> None:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size: its longest side stays 2 * `size`, or else `size`."""
    width, height = image.size
    for side in (2 * size, size):
        fraction = next((n for n in (8, 4, 2) if max(width, height) >= n * side), 1)
        if width * height <= MAX_REDUCED * fraction**2:
            image.draft(None, (width // fraction, height // fraction))
            return


def _too_large(width: int, height: int, limit: int) -> str:
    return f"{width} x {height} pixels are more than the allowed {limit:,}: {_smaller(limit)}"


def _smaller(limit: int) -> str:
    """The remedy for an image that is too large."""
    return "make it smaller with mvssl-convert --max-size" if limit == MAX_PIXELS else "make it smaller beforehand"


def _upright(image: Any) -> Any:
    """The image loaded and turned by its orientation."""
    image.load()
    orientation = _orientation(image)  # afterwards: in a PNG it may follow the pixels
    return image if orientation is None else image.transpose(_UPRIGHT[orientation])


def _orientation(image: Any) -> int | None:
    """The orientation by which Pillow's `exif_transpose` rotates: of EXIF, else of a PNG's raw profile, else of XMP."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in _UPRIGHT else None
    except Exception:  # broken EXIF data must not lose the image
        return None
