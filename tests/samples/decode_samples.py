"""Encoded images made in memory, and a source that holds them, for the tests of decoders and loader."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import missing_dali
from pipelines.decode.ffcv import missing_ffcv

needs_ffcv_library = pytest.mark.skipif(missing_ffcv() is not None, reason=f"FFCV: {missing_ffcv()}")
needs_dali = pytest.mark.skipif(missing_dali() is not None, reason=f"DALI cannot be imported: {missing_dali()}")
"""DALI is installed on Linux; elsewhere Pillow alone is tested."""


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with some texture, uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + y / 11 + seed), np.cos(x / 5 + seed), np.sin(y / 6 - x / 9 + 2 * seed)]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    return (128 + 100 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> np.ndarray:
    """Encode with Pillow: uint8 [bytes]."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def jpegs(count: int) -> list[np.ndarray]:
    """JPEGs of many sizes and subsamplings."""
    return [
        encode(picture(20 + 7 * (n % 5), 24 + 5 * (n % 7), n), subsampling=n % 3, quality=85, progressive=n % 4 == 0)
        for n in range(count)
    ]


def png16(values: np.ndarray) -> np.ndarray:
    """A 16-bit colour PNG, which Pillow cannot write, from uint16 [H, W, 3]; see the PNG specification, section 5."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return np.frombuffer(b"\x89PNG\r\n\x1a\n" + body, np.uint8)


def with_orientation(jpeg: np.ndarray, orientation: int, order: str = "II") -> np.ndarray:
    """The JPEG with an EXIF segment that holds nothing but the orientation."""
    mark = "<" if order == "II" else ">"
    tiff = order.encode() + struct.pack(f"{mark}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    segment = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff
    data = jpeg.tobytes()
    return np.frombuffer(data[:2] + segment + data[2:], np.uint8)


def refused_jpeg() -> np.ndarray:
    """A JPEG without its Huffman tables, which looks plain but which no decoder accepts."""
    data = encode(picture(40, 50)).tobytes()
    return np.frombuffer(data[: data.index(b"\xff\xc4")] + data[-300:], np.uint8)


def only_dalis_jpeg() -> np.ndarray:
    """A JPEG with a stray marker in the middle of its scan: DALI decodes it, Pillow does not."""
    data = encode(picture(61, 83)).tobytes()
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return np.frombuffer(data[:middle] + b"\xff\xc4" + data[middle:], np.uint8)


def only_pillows_jpeg() -> np.ndarray:
    """A JPEG with two stray bytes after its frame header: Pillow skips them, DALI refuses it."""
    data = encode(picture(61, 83)).tobytes()
    after = data.index(b"\xff\xc0") + 19
    return np.frombuffer(data[:after] + b"\0\0" + data[after:], np.uint8)


class MemorySource:
    """A source of encoded images in memory that counts how often each is read."""

    classes = ("even", "odd")
    fingerprint = "memory"
    location = Path("memory")

    def __init__(self, encoded: list[np.ndarray]) -> None:
        self._encoded = encoded
        self.labels = np.arange(len(encoded), dtype=np.int64) % 2
        self.nbytes = np.array([data.size for data in encoded], dtype=np.int64)
        self.reads = [0] * len(encoded)

    def __len__(self) -> int:
        return len(self._encoded)

    def read(self, index: int) -> np.ndarray:
        self.reads[index] += 1
        return self._encoded[index]

    def key(self, index: int) -> str:
        return f"image{index}.jpg"

    def close(self) -> None:
        pass


def half_jpeg(seed: int = 0) -> np.ndarray:
    """A JPEG cut at half that ends with an end marker: decoders paint the rest gray."""
    data = encode(picture(64, 64, seed), subsampling=0).tobytes()
    return np.frombuffer(data[: (data.index(b"\xff\xda") + len(data)) // 2] + b"\xff\xd9", np.uint8)
