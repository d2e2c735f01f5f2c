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
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.decode.base import Decoded
from pipelines.decode.deep import deep_rgb, is_deep, measured
from pipelines.decode.limits import ImageLimits, beyond, beyond_frames, beyond_pixels
from pipelines.decode.sniff import has_end_marker, sniff
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
_DEEP_FORMATS = (b"\x89P", b"II", b"MM", b"P2", b"P3", b"P5", b"P6", b"Pf", b"\0\0", b"\xff\x4f")
DEEP_ENDINGS = (".png", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k")
"""Endings of files that may have more than 8 bits a channel without stating what their values mean."""
DEFAULT_LIMITS = ImageLimits()
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_UNPACKED = ("Decompressed data too large", "MAX_TEXT_MEMORY")  # of Pillow's errors
_PART = 1 << 22  # pixels
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

    def __init__(
        self, *, threads: int, value_range: ValueRange | None = None, limits: ImageLimits | None = None
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mvssl-pillow")
        self._decode = partial(decode_one, value_range=value_range, limits=limits or ImageLimits())

    def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
        """Decode N images, uint8 [bytes] each, to pixels on the CPU."""
        import torch  # not for what converts or checks images

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
    data: np.ndarray,
    *,
    value_range: ValueRange | None = None,
    max_size: int | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray | str:
    """Decode one image, uint8 [bytes], to uint8 [H, W, 3], or to the reason why that fails.

    Args:
        data: the encoded image.
        value_range: of images with more than 8 bits; None if they use 16.
        max_size: the longest side that is wanted. Images of up to twice the limit on pixels are then decoded, and JPEGs
            with more than the limit at a fraction of their size.
        limits: images beyond them fail.
    """
    if data.size == 0:
        return "the file is empty (0 bytes)"
    reduced = max_size is not None
    header = sniff(data)
    if header is not None and not reduced:
        problem = beyond_pixels(header.width, header.height, limits)
        if problem:
            return problem
    try:
        with open_image(data, limits) as image:
            if max_size is not None and image.width * image.height > limits.pixels:
                _reduce(image, max_size, limits)
            problem = beyond_pixels(image.width, image.height, limits, reduced=reduced)
            if problem:
                return problem
            if is_deep(image):
                return deep_rgb(image, partial(open_image, data, limits), _upright, value_range)
            upright = _upright(image)
            upright.info.pop("transparency", None)  # dropped like an alpha channel
            pixels = _pixels(upright if upright.mode == "RGB" else upright.convert("RGB"))
            if image.format in ("JPEG", "MPO") and not has_end_marker(data.tobytes()):
                return "truncated JPEG: the end-of-image marker is missing"  # Pillow notices that of some
            return pixels
    except UnidentifiedImageError:
        return f"not an image file of a known format ({data.size} bytes)"
    except Image.DecompressionBombError:
        return "Pillow does not decode as many pixels as it has: make it smaller beforehand"
    except Exception as error:  # Pillow raises many types on broken files: OSError, SyntaxError, struct.error, ...
        message = str(error) or type(error).__name__
        if any(words in message for words in _UNPACKED):
            return "its text or colour profile unpacks to more than Pillow's limit: remove its metadata"
        return f"the file is truncated ({data.size} bytes)" if "truncated" in message.lower() else message


def measure(data: np.ndarray, *, limits: ImageLimits = DEFAULT_LIMITS, reduced: bool = False) -> Measured | None:
    """The values of an image of more than 8 bits.

    None for other images, for broken ones, those beyond the limits (of twice as many pixels if `reduced`), and files
    that state their range.
    """
    if not may_be_deep(bytes(data[:HEAD_BYTES])):
        return None
    try:
        with open_image(data, limits) as image:
            if not is_deep(image) or beyond_pixels(image.width, image.height, limits, reduced=reduced):
                return None
            return measured(image, partial(open_image, data, limits), _upright)
    except Exception:  # the decoder says what is wrong
        return None


def may_be_deep(head: bytes) -> bool:
    """Whether a file may have more than 8 bits a channel, by its first `HEAD_BYTES` bytes."""
    if head[:2] == b"\x89P":
        return head[24:25] == b"\x10"  # the bits of a PNG
    return head[:2] in _DEEP_FORMATS


def open_image(data: np.ndarray, limits: ImageLimits = DEFAULT_LIMITS) -> Any:
    """Open an image, uint8 [bytes], as `Image.open` does, without its warning about large ones, which have our limit.

    Raises:
        UnidentifiedImageError: it is of none of our formats.
        ValueError: it is beyond a limit, other than that on pixels.
    """
    problem = beyond(data, limits)
    if problem:
        raise ValueError(problem)
    prefix = bytes(data[:16])
    for name in _FORMATS:
        factory, accepts = Image.OPEN[name]
        try:
            if accepts is None or accepts(prefix) is True:
                image: Any = factory(io.BytesIO(data.data), "")
                problem = beyond_frames(image.n_frames, limits) if name == "AVIF" else ""
                if problem:
                    raise ValueError(problem)
                return image
        except (SyntaxError, IndexError, TypeError, struct.error):  # as `Image.open`: perhaps another format
            continue
    raise UnidentifiedImageError("cannot identify the image")


def _reduce(image: Any, size: int, limits: ImageLimits) -> None:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size: its longest side stays 2 * `size`, or else `size`."""
    width, height = image.size
    for side in (2 * size, size):
        fraction = next((n for n in (8, 4, 2) if max(width, height) >= n * side), 1)
        if width * height <= 2 * limits.pixels * fraction**2:
            image.draft(None, (width // fraction, height // fraction))
            return


def _pixels(image: Any) -> np.ndarray:
    """Pixels of an RGB image, uint8 [H, W, 3]: those of a large one in parts, as Pillow holds two copies of each."""
    rows = max(1, _PART // image.width)
    if image.height <= rows:
        return np.asarray(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        pixels[top : top + rows] = image.crop((0, top, image.width, min(image.height, top + rows)))
    return pixels


def upright_pixels(image: Image.Image) -> np.ndarray | Image.Image:
    """Pixels of somebody's image, which is not changed, turned upright: uint8 [H, W, 3] or gray [H, W].

    An image of more than 8 bits is returned as one of Pillow. Raises what Pillow does where the file is broken.
    """
    image.load()
    orientation = _orientation(image)
    upright = image if orientation is None else image.transpose(_UPRIGHT[orientation])
    if upright.mode in _DEEP_MODES:
        return upright
    if upright.mode not in ("L", "RGB"):
        upright = upright.copy()
        upright.info.pop("transparency", None)  # dropped like an alpha channel
        upright = upright.convert("RGB")
    return np.asarray(upright)


def _upright(image: Any) -> Any:
    """The image loaded and turned by its orientation."""
    image.load()
    if image.format == "WEBP":
        image._decoder = image.fp = None  # three more copies of the pixels
    orientation = _orientation(image)  # afterwards: in a PNG it may follow the pixels
    return image if orientation is None else image.transpose(_UPRIGHT[orientation])


def _orientation(image: Any) -> int | None:
    """The orientation by which Pillow's `exif_transpose` rotates: of EXIF, else of a PNG's raw profile, else of XMP."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in _UPRIGHT else None
    except Exception:  # broken EXIF data must not lose the image
        return None
