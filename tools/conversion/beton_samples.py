"""What FFCV can hold: JPEG files that its decoder turns into RGB, or plain pixels."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from pipelines.decode.pillow import decode_one
from tools.conversion.verify import QUALITY, Checked, as_jpeg

PIXELS = "rgb"  # extension of an image stored as pixels
_MOST = 0xFFFF  # of a side: the format has 16 bits for it


def stored_size(outcome: Checked) -> tuple[int, int]:
    """(height, width) of the data as FFCV decodes it, which does not apply an EXIF orientation."""
    if outcome.extension == PIXELS:
        return outcome.height, outcome.width
    with Image.open(io.BytesIO(outcome.data.data), formats=("JPEG", "MPO")) as image:
        return image.height, image.width


def suit_ffcv(outcome: Checked, *, page: int, quality: int | None) -> Checked:
    """The image as a .beton file can hold it, in at most `page` bytes.

    A JPEG of gray or RGB passes through. Anything else is stored as upright RGB pixels, which loses nothing, and as a
    JPEG where they are too many for a page (which is put down as a warning). An image that does not fit a page even so
    is bad.

    Args:
        outcome: of the check; may be bad.
        page: bytes.
        quality: of that JPEG; None takes `QUALITY`.
    """
    if outcome.bad:
        return outcome
    if outcome.extension == "jpg" and _is_gray_or_rgb(outcome):
        fits = outcome.data.nbytes <= page
        return outcome if fits else Checked(bad=_too_large(outcome.data.nbytes, page))
    pixels = decode_one(outcome.data)
    if isinstance(pixels, str):  # what was decoded a moment ago
        return Checked(bad=pixels)
    if pixels.nbytes <= page and max(pixels.shape) <= _MOST:
        return dataclasses.replace(outcome, data=np.ascontiguousarray(pixels).reshape(-1), extension=PIXELS)
    quality = quality or QUALITY
    note = f"its pixels do not fit a page of the .beton file: stored as JPEG of quality {quality}"
    encoded = as_jpeg(pixels, quality=quality, warned="; ".join(filter(None, (outcome.warned, note))))
    return encoded if encoded.data.nbytes <= page else Checked(bad=_too_large(encoded.data.nbytes, page))


def _is_gray_or_rgb(outcome: Checked) -> bool:
    with Image.open(io.BytesIO(outcome.data.data), formats=("JPEG", "MPO")) as image:
        return image.mode in ("L", "RGB")


def _too_large(nbytes: int, page: int) -> str:
    return f"its {nbytes} bytes are more than the {page} of a page of the .beton file: make it smaller with --max-size"
