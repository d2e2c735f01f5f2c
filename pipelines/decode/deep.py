"""Images of more than 8 bits a channel: their values, and whose range is stated by the file itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.value_range import FULL, Measured, ValueRange

_GRAY = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_SWAPPED = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}
_CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000's codestream and of its sizes
_COLOURS = ("RGB", "RGBA", "RGBX")

Opener = Callable[[], Any]
"""Opens the same file once more."""
Loader = Callable[[Image.Image], Image.Image]
"""Loads an image and turns it upright."""


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image, not yet loaded, has more than 8 bits a channel."""
    return image.mode in _GRAY or ";16" in _raw_mode(image) or _wide_ppm(image) or _full_jpeg2000(image)


def deep_rgb(image: Image.Image, reopen: Opener, load: Loader, stated: ValueRange | None) -> NDArray[np.uint8]:
    """Pixels of a deep image, uint8 [H, W, 3].

    Args:
        image: opened, not yet loaded.
        reopen, load: see `Opener` and `Loader`.
        stated: range of the values; one that the file states itself comes first.

    Raises:
        ValueError: no range is stated and the values do not use 16 bits.
    """
    own = _own_range(image)
    value_range = own or stated
    if image.mode in _GRAY:
        values = _gray_values(image, load)
        value_range = value_range or _checked(Measured.of(values))
        return np.repeat(value_range.scaled(values)[:, :, None], 3, axis=2)
    raw_mode, ppm = _raw_mode(image), _tile(image)[0] == "ppm"
    upright = load(image)
    upright.info.pop("transparency", None)  # dropped like an alpha channel
    high = np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    if own is not None or value_range == FULL or (value_range is None and high.max() >= 64):
        return high  # Pillow has scaled the values, or kept their high byte
    wide = _colour_values(high, raw_mode, ppm, reopen, load)
    if wide is None:
        raise ValueError("its 16-bit values cannot be read in full: convert the file to 8 bits")
    return (value_range or _checked(Measured.of(wide))).scaled(wide)


def measured(image: Image.Image, reopen: Opener, load: Loader) -> Measured | None:
    """The values of a deep image, opened and not yet loaded; None if the file states their range itself."""
    if _own_range(image) is not None:
        return None
    if image.mode in _GRAY:
        return Measured.of(_gray_values(image, load))
    raw_mode, ppm = _raw_mode(image), _tile(image)[0] == "ppm"
    high = np.asarray(load(image).convert("RGB"))
    wide = _colour_values(high, raw_mode, ppm, reopen, load)
    return Measured(low=0, high=int(high.max()) << 8, kind="16-bit") if wide is None else Measured.of(wide)


def _checked(values: Measured) -> ValueRange:
    problem = values.problem()
    if problem:
        raise ValueError(problem)
    return FULL


def _own_range(image: Image.Image) -> ValueRange | None:
    """The range that a file states: the largest value of PGM and PPM, the bits of JPEG 2000 and packed TIFF."""
    codec, arguments = _tile(image)
    if codec in ("ppm", "ppm_plain"):  # Pillow scales the values
        return FULL if int(arguments[1]) < 0xFFFF else None
    if image.format == "JPEG2000":  # Pillow shifts values of other bits
        return None if _full_jpeg2000(image) else FULL
    return ValueRange(low=0, high=0xFFF) if arguments[:1] == ("I;12",) else None


def _gray_values(image: Image.Image, load: Loader) -> NDArray[Any]:
    """Values of a gray image, [H, W]."""
    unsigned = _raw_mode(image).startswith("I;32") and not _raw_mode(image).endswith("S")
    values = np.asarray(load(image))
    return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values


def _colour_values(
    high: NDArray[np.uint8], raw_mode: str, ppm: bool, reopen: Opener, load: Loader
) -> NDArray[np.uint16] | None:
    """Colours in full, uint16 [H, W, 3], given their high bytes; None where Pillow has no way to the low bytes."""
    if ppm:
        with reopen() as again:
            again.fp.seek(again.tile[0].offset)
            raw = again.fp.read(2 * high.size)
        return np.frombuffer(raw, ">u2").reshape(high.shape).astype(np.uint16)
    mode, _, kind = raw_mode.partition(";")
    low_mode = "RGBA" if raw_mode == "LA;16B" else f"{mode};{_SWAPPED[kind]}" if kind in _SWAPPED else ""
    if not low_mode or mode not in (*_COLOURS, "LA"):
        return None
    with reopen() as again:
        again.tile = [tile._replace(args=_changed(tile.args, low_mode)) for tile in again.tile]
        low = np.asarray(load(again))[..., :3]  # Pillow takes the other byte of each value
    if mode == "LA":
        low = np.repeat(low[..., 1:2], 3, axis=2)
    values: NDArray[np.uint16] = high.astype(np.uint16) << 8 | low
    return values


def _changed(arguments: Any, raw_mode: str) -> Any:
    """A tile's arguments with another raw mode."""
    return (raw_mode, *arguments[1:]) if isinstance(arguments, tuple) else raw_mode


def _raw_mode(image: Image.Image) -> str:
    _, arguments = _tile(image)
    return str(arguments[0]) if arguments else ""


def _wide_ppm(image: Image.Image) -> bool:
    """Whether it is a PPM, binary or plain, of 16-bit colours whose largest value says nothing."""
    codec, arguments = _tile(image)
    return codec in ("ppm", "ppm_plain") and image.mode == "RGB" and int(arguments[1]) == 0xFFFF


def _full_jpeg2000(image: Image.Image) -> bool:
    """Whether it is a JPEG 2000 of 16 bits, which say as little as those of a PNG (ISO 15444-1, A.5.1)."""
    file: Any = getattr(image, "fp", None)
    if image.format != "JPEG2000" or file is None:
        return False
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    start = data.find(_CODESTREAM)
    return start >= 0 and data[start + 42 : start + 43] == b"\x0f"


def _tile(image: Image.Image) -> tuple[str, tuple[Any, ...]]:
    """Codec and arguments of the first tile."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return "", ()
    codec, _, _, arguments = tiles[0]
    return codec, arguments if isinstance(arguments, tuple) else (arguments,)
