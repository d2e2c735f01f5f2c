"""A corpus of images of all formats and of reproducible damage to them, for tests that decoders agree."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, features

from tests.samples.decode_samples import encode, picture, with_orientation

SIZE = (61, 83)
"""Height and width of every image of the corpus."""


def originals() -> dict[str, bytes]:
    """Undamaged images by a name that says what they are."""
    image = Image.fromarray(picture(*SIZE))
    jpeg: dict[str, dict[str, Any]] = {
        "baseline": {},
        "progressive": {"progressive": True},
        "restart markers": {"restart_marker_blocks": 3},
        "progressive with restart markers": {"progressive": True, "restart_marker_rows": 1},
        "optimised": {"optimize": True, "subsampling": 1, "quality": 60},
        "4:4:4": {"subsampling": 0},
    }
    files = {f"JPEG {name}": encode(image, **options).tobytes() for name, options in jpeg.items()}
    files["JPEG gray"] = encode(image.convert("L")).tobytes()
    files["JPEG progressive gray"] = encode(image.convert("L"), progressive=True).tobytes()
    files["JPEG CMYK"] = encode(image.convert("CMYK")).tobytes()
    files["JPEG rotated"] = with_orientation(encode(image), 6).tobytes()
    files["JPEG RGB"] = encode(image, keep_rgb=True).tobytes()
    files["JPEG with a profile"] = encode(image, icc_profile=bytes(3000)).tobytes()
    plain = files["JPEG baseline"]
    for kind, marker in (("arithmetic", 0xC9), ("lossless", 0xC3), ("extended", 0xC1)):
        files[f"JPEG said to be {kind}"] = plain.replace(b"\xff\xc0", bytes([0xFF, marker]), 1)
    at = plain.index(b"\xff\xc0") + 4
    files["JPEG said to have 12 bits"] = plain[:at] + b"\x0c" + plain[at + 1 :]
    files["MPO"] = encode(image, "MPO", save_all=True, append_images=[image]).tobytes()
    files["PNG"] = encode(image, "PNG").tobytes()
    files["PNG palette"] = encode(image.quantize(17), "PNG").tobytes()
    files["PNG 16 bit gray"] = encode(Image.fromarray(picture(*SIZE)[..., 0].astype(np.uint16) * 257), "PNG").tobytes()
    files["APNG"] = encode(image, "PNG", save_all=True, append_images=[image.rotate(180)]).tobytes()
    files["WebP"] = encode(image, "WEBP").tobytes()
    files["WebP lossless"] = encode(image, "WEBP", lossless=True).tobytes()
    files["WebP animated"] = encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)]).tobytes()
    files["GIF"] = encode(image.quantize(64), "GIF").tobytes()
    files["GIF animated"] = encode(image.quantize(64), "GIF", save_all=True, append_images=[image.rotate(9)]).tobytes()
    for compression in (None, "tiff_deflate", "tiff_lzw", "packbits", "jpeg"):
        files[f"TIFF {compression}"] = encode(image, "TIFF", compression=compression).tobytes()
    files["BMP"] = encode(image, "BMP").tobytes()
    files["PPM"] = encode(image, "PPM").tobytes()
    files["TGA"] = encode(image, "TGA", compression="tga_rle").tobytes()
    if features.check("jpg_2000"):
        files["JPEG 2000"] = encode(image, "JPEG2000").tobytes()
    if features.check("avif"):
        files["AVIF"] = encode(image, "AVIF", speed=10).tobytes()
    return files


def mutated(data: bytes, seed: int) -> bytes:
    """A damaged copy: bits or bytes changed, cut, doubled, inserted or zeroed, a marker or length changed, or several.

    Half of the damage is in the first 700 bytes, where headers are.
    """
    rng = np.random.default_rng(seed)
    for _ in range(int(rng.integers(1, 3))):
        most = len(data) if rng.random() < 0.5 else min(len(data), 700)
        at, count = int(rng.integers(2, most)), int(rng.integers(1, 40))
        random = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
        kind = int(rng.integers(10))
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + random[:1] + data[at + 1 :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[at + count :]
        elif kind == 4:
            data = data[:at] + random + data[at:]
        elif kind == 5:
            data = data[: at + count] + data[at:]
        elif kind == 6:
            data = data[:at] + bytes(count) + data[at + count :]
        elif kind == 7:
            data = data[:at] + b"\xff\xd9"
        elif kind == 8:
            data = _changed_marker(data, rng)
        else:
            data = data[:at] + struct.pack(">H", int(rng.choice([0, 1, 255, 32767, 65535]))) + data[at + 2 :]
        if len(data) < 8:
            break
    return data


def _changed_marker(data: bytes, rng: np.random.Generator) -> bytes:
    """One marker of a JPEG removed with its segment, repeated, or replaced by another; else unchanged."""
    places = [at for at in range(2, len(data) - 3) if data[at] == 0xFF and data[at + 1] not in (0, 0xFF)]
    if not places:
        return data
    at = int(rng.choice(places))
    end = min(len(data), at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
    kind = int(rng.integers(4))
    if kind == 0:
        return data[:at] + data[end:]
    if kind == 1:
        return data[:end] + data[at:]
    if kind == 2:
        return data[: at + 1] + bytes([int(rng.integers(0xC0, 0xFF))]) + data[at + 2 :]
    return data[:at] + bytes([0xFF, int(rng.integers(1, 0xFF))]) + data[at:]


def opened_by_pillow(data: bytes) -> np.ndarray:
    """Pixels, uint8 [H, W, 3], as Pillow alone decodes them without our code."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
