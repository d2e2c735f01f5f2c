"""Reads an image header in microseconds: which decoder can handle it, and its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FRAME = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive Huffman frames (ITU T.81, table B.1)
_NO_FRAME = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xD8, 0xD9, 0xDA))
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Header of an image.

    Attributes:
        height, width: in pixels, before any EXIF rotation.
        plain: whether it is a complete 8-bit gray or YCbCr Huffman JPEG, which all decoders treat alike.
    """

    height: int
    width: int
    plain: bool


def sniff(data: np.ndarray) -> Header | None:
    """Read the header of an encoded image, uint8 [bytes]; None unless it is a valid JPEG or PNG."""
    view = data.data
    if len(view) >= 24 and bytes(view[:8]) == _PNG:
        return Header(height=_big(view, 20, 4), width=_big(view, 16, 4), plain=False)
    if len(view) < 4 or view[0] != 0xFF or view[1] != 0xD8:
        return None
    return _jpeg(view)


def _big(view: memoryview, at: int, count: int) -> int:
    return int.from_bytes(view[at : at + count], "big")


def _jpeg(view: memoryview) -> Header | None:
    """Walk the segments up to the frame header."""
    at, last, stored_rgb = 2, len(view) - 20, False
    while at < last:
        if view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if marker == 0xFF:  # a fill byte before the marker
            at += 1
            continue
        if marker in _FRAME:
            height, width, parts = _big(view, at + 5, 2), _big(view, at + 7, 2), view[at + 9]
            ycbcr = parts == 3 and not stored_rgb and view[at + 10] != 0x52  # a first component named "R" means RGB
            # A file without end marker is truncated or has trailing bytes: Pillow finds out which.
            complete = view[-2] == 0xFF and view[-1] == 0xD9
            plain = complete and view[at + 4] == 8 and height > 0 and width > 0 and (parts == 1 or ycbcr)
            return Header(height=height, width=width, plain=plain)
        if marker in _NO_FRAME:
            return None
        if marker == 0xEE and bytes(view[at + 4 : at + 9]) == b"Adobe" and view[at + 15] == 0:  # transform 0: no YCbCr
            stored_rgb = True
        at += 2 + _big(view, at + 2, 2)
    return None
