"""Small files that would take much memory or time to decode, by what is large in them."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from tests.samples.decode_samples import encode, picture


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _huffman(table: int, symbol: int) -> bytes:
    """A table with one code, 0."""
    return _segment(0xC4, bytes([table, 1, *[0] * 15, symbol]))


def _bits(codes: str) -> bytes:
    """The data of a scan."""
    codes += "1" * (-len(codes) % 8)
    return int(codes, 2).to_bytes(len(codes) // 8, "big").replace(b"\xff", b"\xff\0")


def gray_jpeg(height: int, width: int, *, scans: int, progressive: bool = True) -> bytes:
    """A gray JPEG of one colour with so many scans; each goes through all blocks (ITU T.81)."""
    blocks = (height + 7) // 8 * ((width + 7) // 8)
    frame = struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0)
    start = b"\xff\xd8" + _segment(0xDB, bytes([0, *[1] * 64])) + _segment(0xC2 if progressive else 0xC0, frame)
    if not progressive:
        first = _huffman(0, 0) + _huffman(0x10, 0)
        scan = _segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + _bits("00" * blocks)
        return start + first + scan * scans + b"\xff\xd9"
    first = _segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + _bits("0" * blocks)  # no difference
    runs = "".join("0" + f"{0x3FFF:014b}" for _ in range(blocks // 0x7FFF))  # end-of-band runs of 32,767 blocks
    runs += "".join("0" + f"{0:014b}" for _ in range((blocks % 0x7FFF) // 0x4000))
    runs += "0" * 15 if blocks % 0x4000 else ""
    other = _segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + _bits(runs)
    return start + _huffman(0, 0) + first + _huffman(0x10, 0xE0) + other * (scans - 1) + b"\xff\xd9"


def animated(kind: str, frames: int, size: tuple[int, int] = (12, 16)) -> bytes:
    """An animation, or pages, of different frames."""
    images = [Image.fromarray(picture(*size, seed)) for seed in range(frames)]
    return encode(images[0], kind, save_all=True, append_images=images[1:]).tobytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    data = encode(picture(12, 16), "PNG").tobytes()
    return data[:33] + chunks + data[33:]


def tiff_of(entries: bytes, *, next_page: int = 0, rest: bytes = b"") -> bytes:
    """A gray TIFF of one pixel whose directory has more entries, given as in the file."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    own = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    count = len(tags) + len(entries) // 12
    return b"II*\0" + struct.pack("<IH", 8, count) + own + entries + struct.pack("<I", next_page) + rest


def tiff_pages(count: int) -> bytes:
    """A TIFF of so many pages of one pixel."""
    page = len(tiff_of(b"")) - 8
    pages = [tiff_of(b"", next_page=8 + page * (n + 1) if n + 1 < count else 0)[8:] for n in range(count)]
    return tiff_of(b"")[:8] + b"".join(pages)


def overlapping_tags(count: int) -> bytes:
    """A TIFF whose tags, so many, all are the whole file."""
    length = len(tiff_of(bytes(12 * count)))
    return tiff_of(b"".join(struct.pack("<HHII", 40000 + n, 7, length - 8, 8) for n in range(count)))


def layered_jpeg2000(layers: int) -> bytes:
    """A JPEG 2000 that says it has so many quality layers."""
    data = encode(picture(40, 50), "JPEG2000").tobytes()
    at = data.index(b"\xff\x52") + 6
    return data[:at] + struct.pack(">H", layers) + data[at + 2 :]
