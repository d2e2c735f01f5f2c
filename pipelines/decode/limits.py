"""Limits on encoded images, examined in their headers before memory or time is spent on them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.checks import between, check_fields

MOST_PIXELS = 1 << 32
"""Above any limit on pixels."""
MOST_CHUNKS = 100_000
"""Of a PNG; they usually have 8 KiB or more, and are read one by one."""
_MOST = 1 << 40  # of every other limit: above all files
_MOST_SIDE = 1_000_000  # pixels; a narrower image has less than a tenth of the pixels allowed
_MOST_SEGMENTS = 1_000_000  # of a JPEG, in and between its scans
_MOST_PARTS = 20_000  # segments and fill bytes of a JPEG's header; Pillow reads them one by one
_MOST_EXIF = 1 << 24  # bytes; Pillow joins EXIF segments in quadratic time
_MOST_HEADER = 1 << 16  # bytes of a PPM's header, with its comments
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG's segments, and its end
_ALONE = frozenset((0xFF, 0x01, *range(0xD0, 0xD8)))  # markers without a length, and fill bytes
_COMMENT = re.compile(rb"#[^\r\n]*")
_TAG_BYTES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8], np.int64)  # of a value, by TIFF type


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Limits on images: those beyond are bad images, whose reason names the limit.

    Attributes:
        bytes: of an encoded image.
        pixels: width times height. An image takes 3 bytes a pixel in memory, and up to 20 while it is decoded.
        scans: passes over a progressive JPEG, or quality layers of a JPEG 2000; the time to decode it grows with them.
        frames: of an animation or pages of a TIFF. Only the first is decoded.
    """

    bytes: int = between(1, _MOST, 1 << 29)
    pixels: int = between(1, MOST_PIXELS, 89_478_485)
    scans: int = between(1, _MOST, 100)
    frames: int = between(1, _MOST, 10_000)

    def __post_init__(self) -> None:
        check_fields(self, prefix="limits.")


def beyond_bytes(count: int, limits: ImageLimits) -> str:
    """Why an image of so many bytes is not decoded; "" if they are within the limit."""
    if count <= limits.bytes:
        return ""
    return f"its {count:,} bytes are more than the allowed {limits.bytes:,}: make it smaller, or raise --limits.bytes"


def beyond_pixels(width: int, height: int, limits: ImageLimits, *, reduced: bool = False) -> str:
    """Why an image of this size is not decoded; "" if it is within the limits, twice as large if `reduced`."""
    if max(width, height) > _MOST_SIDE:
        return f"{width} x {height} pixels have a side of more than the allowed {_MOST_SIDE:,}: cut it into parts"
    limit = limits.pixels * (2 if reduced else 1)
    if width * height <= limit:
        return ""
    smaller = "beforehand" if reduced else "with mvssl-convert --max-size"
    return (
        f"{width} x {height} pixels are more than the allowed {limit:,}: make it smaller {smaller}, or raise "
        "--limits.pixels"
    )


def beyond_frames(count: int, limits: ImageLimits) -> str:
    """Why a file of so many frames is not decoded; "" if they are within the limit."""
    if count <= limits.frames:
        return ""
    return (
        f"its {count:,} frames or more are above the allowed {limits.frames:,}: give its first frame as a file, or "
        "raise --limits.frames"
    )


def beyond_scans(data: np.ndarray, limits: ImageLimits) -> str:
    """Why a JPEG, uint8 [bytes], with so many scans is not decoded; "" if they are within the limit."""
    whole = data.tobytes()
    if whole.count(b"\xff\xda") <= limits.scans:  # also in thumbnails and further images
        return ""
    count, at = 0, 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(whole, at)
        if found is None or found.group() == b"\xff\xd9":
            return _beyond_passes(count, "scans", limits)
        count += found.group() == b"\xff\xda"
        at = found.end() + int.from_bytes(whole[found.end() : found.end() + 2], "big")
    return f"it has more than the allowed {_MOST_SEGMENTS:,} segments: encode it again"


def _beyond_passes(count: int, what: str, limits: ImageLimits) -> str:
    if count <= limits.scans:
        return ""
    return (
        f"its {count:,} {what} are more than the allowed {limits.scans:,}: encode it again with fewer, or raise "
        "--limits.scans"
    )


def beyond(data: np.ndarray, limits: ImageLimits) -> str:
    """Why an encoded image, uint8 [bytes], is not decoded, by its header alone; "" if it is within the limits.

    Pixels are those of formats whose decoders allocate them when a file is opened; `beyond_pixels` is for the others.
    """
    problem = beyond_bytes(data.size, limits)
    if problem or data.size < 32:
        return problem
    head = bytes(data[:12])
    examine = next((examine for magic, examine in _EXAMINED.items() if head.startswith(magic)), None)
    if examine is None:
        examine = _jpeg2000 if b"\xff\x4f\xff\x51" in bytes(data[:4096]) else None
    try:
        return "" if examine is None else examine(data, limits)
    except (struct.error, IndexError):  # cut short: the decoder says so
        return ""


def _jpeg_parts(view: memoryview) -> tuple[int, int]:
    """Segments and fill bytes before the first scan of a JPEG, as far as they are allowed, and bytes of EXIF."""
    at, parts, exif = 2, 0, 0
    while at + 4 <= len(view) and view[at] == 0xFF and view[at + 1] != 0xDA:
        parts += 1
        if parts > _MOST_PARTS:
            break
        if view[at + 1] in _ALONE:
            at += 1 if view[at + 1] == 0xFF else 2
            continue
        size = view[at + 2] << 8 | view[at + 3]
        if view[at + 1] == 0xE1 and bytes(view[at + 4 : at + 8]) == b"Exif":
            exif += size
        at += 2 + size
    return parts, exif


def _jpeg(data: np.ndarray, limits: ImageLimits) -> str:
    parts, exif = _jpeg_parts(data.data)
    if parts > _MOST_PARTS:
        return f"its header has more than the allowed {_MOST_PARTS:,} segments: encode it again"
    if exif > _MOST_EXIF:
        return f"its EXIF data have {exif:,} bytes, more than the allowed {_MOST_EXIF:,}: remove them"
    return beyond_scans(data, limits)


def _png(data: np.ndarray, limits: ImageLimits) -> str:
    view, at = data.data, 8
    for _ in range(MOST_CHUNKS):
        if at + 12 > len(view):
            return ""
        size, kind = struct.unpack_from(">I4s", view, at)
        if kind == b"acTL":
            return beyond_frames(struct.unpack_from(">I", view, at + 8)[0], limits)
        if kind == b"IEND":
            return ""
        at += 12 + size
    return f"it has more than the allowed {MOST_CHUNKS:,} chunks: encode it again"


def _webp(data: np.ndarray, limits: ImageLimits) -> str:
    view, kind = data.data, bytes(data[8:16])
    if kind == b"WEBPVP8 ":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", view, 26))
    elif kind == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", view, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"WEBPVP8X":
        width, height = (int.from_bytes(view[at : at + 3], "little") + 1 for at in (24, 27))
    else:
        return ""
    return beyond_pixels(width, height, limits, reduced=True) or beyond_frames(_webp_frames(view, limits), limits)


def _webp_frames(view: memoryview, limits: ImageLimits) -> int:
    at, frames = 12, 0
    while at + 8 <= len(view) and frames <= limits.frames and len(view) > 24 * limits.frames:
        kind, size = struct.unpack_from("<4sI", view, at)
        frames += kind == b"ANMF"
        at += 8 + size + size % 2
    return frames


def _gif(data: np.ndarray, limits: ImageLimits) -> str:
    view, frames = data.data, 0
    if len(view) <= 12 * limits.frames:  # too small for so many
        return ""
    at = 13 + _gif_colours(view[10])
    while at < len(view) and frames <= limits.frames:
        if view[at] == 0x2C:  # an image
            frames += 1
            at += 11 + _gif_colours(view[at + 9])
        elif view[at] == 0x21:  # an extension
            at += 2
        else:
            break
        while at < len(view) and view[at]:
            at += 1 + view[at]
        at += 1
    return beyond_frames(frames, limits)


def _gif_colours(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 6 << (flags & 7) if flags & 0x80 else 0


def _tiff(data: np.ndarray, limits: ImageLimits) -> str:
    """Also the sizes that the tags of the first page claim: Pillow reads each of them, though they may overlap."""
    view = data.data
    order = "<" if view[0] == 0x49 else ">"
    big = 43 in (view[2], view[3])
    word, number = (f"{order}Q", f"{order}Q") if big else (f"{order}I", f"{order}H")
    entry = np.dtype([("tag", f"{order}u2"), ("type", f"{order}u2"), ("count", f"{order}u{8 if big else 4}")])
    step = 20 if big else 12
    (at,) = struct.unpack_from(word, view, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen and len(seen) <= limits.frames:
        (count,) = struct.unpack_from(number, view, at)
        first = at + struct.calcsize(number)
        if first + step * count > len(view):
            break
        if not seen:
            rows = np.frombuffer(view[first : first + step * count], np.uint8).reshape(count, step)
            tags = np.ascontiguousarray(rows[:, : entry.itemsize]).view(entry).ravel()
            claimed = tags["count"].astype(np.float64) * _TAG_BYTES[np.minimum(tags["type"], len(_TAG_BYTES) - 1)]
            if claimed.sum() > 4 * len(view) + 4096:
                return f"its tags claim {int(claimed.sum()):,} bytes but the file has {len(view):,}: save it again"
        seen.add(at)
        if first + step * count + struct.calcsize(word) > len(view):
            break
        (at,) = struct.unpack_from(word, view, first + step * count)
    return beyond_frames(len(seen), limits)


def _ppm(data: np.ndarray, limits: ImageLimits) -> str:
    del limits
    head = bytes(data[:_MOST_HEADER])
    if head[1:2] in b"1234567fF" and data.size > _MOST_HEADER and len(_COMMENT.sub(b" ", head).split(None, 4)) < 4:
        return f"its header has more than the allowed {_MOST_HEADER:,} bytes: save it again"
    return ""


def _jpeg2000(data: np.ndarray, limits: ImageLimits) -> str:
    """Quality layers by the first COD marker (ITU T.800, A.6.1)."""
    view = data.data
    at = bytes(data[:4096]).index(b"\xff\x4f\xff\x51") + 2
    while at + 8 <= len(view) and view[at] == 0xFF and view[at + 1] != 0x90:
        if view[at + 1] == 0x52:
            return _beyond_passes(view[at + 6] << 8 | view[at + 7], "quality layers", limits)
        at += 2 + (view[at + 2] << 8 | view[at + 3])
    return ""


_EXAMINED: dict[bytes, Callable[[np.ndarray, ImageLimits], str]] = {
    b"\xff\xd8": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"GIF8": _gif,
    b"II": _tiff,
    b"MM": _tiff,
    b"P": _ppm,
}
