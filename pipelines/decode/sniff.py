"""Reads an image header in microseconds: which decoder can handle it, its size and its EXIF orientation."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.decode.limits import ImageLimits, beyond_bytes, beyond_pixels, beyond_scans

_FRAME = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive Huffman frames (ITU T.81, table B.1)
_NO_FRAME = frozenset(
    (0x01, *range(0xD0, 0xD8), 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xD8, 0xD9, 0xDA)
)
_PNG = b"\x89PNG\r\n\x1a\n"
_SCAN, _PROGRESSIVE = 0xDA, 0xC2
_MOST_SEGMENTS = 2000  # before the first scan, fill bytes included; Pillow decodes the others
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_TURNED = re.compile(rb'tiff:Orientation(?:="|>)[2-8]')
_ORIENTATION = 0x0112  # EXIF 2.32, section 4.6.4
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # of a value, by TIFF type
_SHORT = 3
_segment: Callable[[memoryview, int], tuple[int, int, int]] = struct.Struct(">BBH").unpack_from
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}  # byte order


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Header of an image.

    Attributes:
        height, width: in pixels, before any EXIF rotation.
        plain: whether it is a complete 8-bit gray or YCbCr Huffman JPEG, whose orientation is stated once and as EXIF
            wants it, which all decoders treat alike.
        upright: whether a plain image needs no rotation.
        scans: whether it is a JPEG that may have several scans.
    """

    height: int
    width: int
    plain: bool
    upright: bool = False
    scans: bool = False

    def within(self, limits: ImageLimits, data: np.ndarray) -> bool:
        """Whether the image, uint8 [bytes] with this header, is within the limits."""
        if beyond_bytes(data.size, limits) or beyond_pixels(self.width, self.height, limits):
            return False
        return not (self.scans and beyond_scans(data, limits))


def sniff(data: np.ndarray) -> Header | None:
    """Read the header of an encoded image, uint8 [bytes]; None unless it is a valid JPEG or PNG."""
    view = data.data
    if len(view) >= 24 and bytes(view[:8]) == _PNG:
        return Header(height=_big(view, 20, 4), width=_big(view, 16, 4), plain=False)
    if len(view) < 4 or view[0] != 0xFF or view[1] != 0xD8:
        return None
    return _jpeg(view)


def has_end_marker(jpeg: bytes) -> bool:
    """Whether an end-of-image marker follows the first scan of a JPEG (one in an EXIF thumbnail does not count)."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker < 0xD8:  # a fill byte, or a marker without a length
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:
            break
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg.rfind(b"\xff\xd9", at) > 0


def _big(view: memoryview, at: int, count: int) -> int:
    return int.from_bytes(view[at : at + count], "big")


def _jpeg(view: memoryview) -> Header | None:
    """Walk the segments up to the first scan."""
    at, last, stored_rgb, frame, rest = 2, len(view) - 20, False, 0, _MOST_SEGMENTS
    metadata: list[bytes] = []  # EXIF and XMP may also follow the frame header
    while at < last:
        ff, marker, size = _segment(view, at)
        rest -= 1
        if not rest:
            return None
        if ff != 0xFF or marker == _SCAN:
            break
        if marker == 0xFF:  # a fill byte before the marker
            at += 1
            continue
        if marker == 0xE1:
            metadata.append(bytes(view[at + 4 : at + 2 + size]))
        elif marker in _FRAME:
            if frame:
                return None
            frame = at
        elif marker in _NO_FRAME:
            return None
        elif marker == 0xEE and bytes(view[at + 4 : at + 9]) == b"Adobe" and view[at + 15] == 0:
            stored_rgb = True  # transform 0: no YCbCr
        at += 2 + size
    if not frame:
        return None
    height, width, parts = _big(view, frame + 5, 2), _big(view, frame + 7, 2), view[frame + 9]
    ycbcr = parts == 3 and not stored_rgb and view[frame + 10] != 0x52  # a first component named "R" means RGB
    # A file without end marker is truncated or has trailing bytes: Pillow finds out which.
    complete = view[-2] == 0xFF and view[-1] == 0xD9
    orientation = _agreed_orientation(metadata) if metadata else 1
    plain = complete and view[frame + 4] == 8 and height > 0 and width > 0 and (parts == 1 or ycbcr)
    at_once = at < last and view[at + 1] == _SCAN and view[at + 4] == parts  # all components in the first scan
    scans = view[frame + 1] == _PROGRESSIVE or not at_once
    return Header(
        height=height, width=width, plain=plain and orientation is not None, upright=orientation == 1, scans=scans
    )


def _agreed_orientation(metadata: list[bytes]) -> int | None:
    """The orientation, 1 to 8, by a JPEG's APP1 segments; None where decoders disagree and Pillow is the reference."""
    exif = [segment for segment in metadata if segment[:4].lower() == b"exif"]
    orientation: int | None = 0
    if exif:
        orientation = _ifd_orientation(exif[0]) if len(exif) == 1 and exif[0].startswith(_EXIF) else None
    if orientation == 0:  # Pillow then takes XMP's, DALI does not
        turned = any(segment.startswith(_XMP) and _XMP_TURNED.search(segment) for segment in metadata)
        orientation = None if turned else 1
    return orientation


def _ifd_orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8, in an EXIF segment; 0 if it has none; None unless its first directory is well-formed."""
    tiff = exif[len(_EXIF) :]
    order = _TIFF.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * count]
    if len(entries) < 12 * count or len(tiff) < start + 6 + 12 * count:  # the offset of the next directory follows
        return None
    found = 0
    for tag, kind, values, place in struct.iter_unpack(f"{order}HHII", entries):
        if tag == _ORIENTATION:
            value = place if order == "<" else place >> 16 if not place & 0xFFFF else 0
            if found or kind != _SHORT or values != 1 or not 1 <= value <= 8:
                return None
            found = value
            continue
        size = values * _BYTES.get(kind, len(tiff))
        if size > 4 and place + size > len(tiff):  # Pillow stops reading here
            return None
    return found
