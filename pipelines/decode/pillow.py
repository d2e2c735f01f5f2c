"""Pillow decoder, in threads: the fallback, and the reference for odd encodings."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.decode.base import MAX_PIXELS, Decoded
from pipelines.decode.sniff import sniff

Image.init()
if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()
# Listed, because Pillow would otherwise try all formats, including EPS, which starts another program.
_FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "HEIF")
    if name in Image.OPEN
)
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

    def __init__(self, *, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mvssl-pillow")

    def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
        """Decode N images, uint8 [bytes] each, to pixels on the CPU."""
        del by_pillow
        results = list(self._pool.map(decode_one, encoded))
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


def decode_one(data: np.ndarray) -> np.ndarray | str:
    """Decode one image, uint8 [bytes], to uint8 [H, W, 3], or to the reason why that fails."""
    if data.size == 0:
        return "the file is empty (0 bytes)"
    header = sniff(data)
    if header is not None and header.height * header.width > MAX_PIXELS:
        return _too_large(header.width, header.height)
    try:
        with Image.open(io.BytesIO(data.data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return _too_large(image.width, image.height)
            return _rgb(image)
    except UnidentifiedImageError:
        return f"not an image file of a known format ({data.size} bytes)"
    except Image.DecompressionBombError:
        return f"it has more than the allowed {MAX_PIXELS} pixels"
    except Exception as error:  # Pillow raises many types on broken files: OSError, SyntaxError, struct.error, ...
        message = str(error) or type(error).__name__
        return f"the file is truncated ({data.size} bytes)" if "truncated" in message.lower() else message


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} pixels are more than the allowed {MAX_PIXELS}"


def _rgb(image: Image.Image) -> np.ndarray:
    """Upright 8-bit RGB pixels, uint8 [H, W, 3]."""
    image.load()
    orientation = _orientation(image)  # afterwards: in a PNG it may follow the pixels
    upright = image if orientation is None else image.transpose(_UPRIGHT[orientation])
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        return _deep_gray(upright)
    upright.info.pop("transparency", None)  # dropped like an alpha channel
    return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _orientation(image: Image.Image) -> int | None:
    """The orientation by which Pillow's `exif_transpose` rotates: of EXIF, else of a PNG's raw profile, else of XMP."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in _UPRIGHT else None
    except Exception:  # broken EXIF data must not lose the image
        return None


def _deep_gray(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits to RGB: the high byte of 16, as Pillow itself does for 16-bit colour."""
    values = np.asarray(image)  # [H, W]
    if values.dtype.kind == "f":
        raise ValueError("floating-point pixels have no defined range: convert the file to 8 or 16 bits")
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no defined range: convert the file to 8 or 16 bits")
    gray = (values >> 8).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)  # [H, W, 3]
