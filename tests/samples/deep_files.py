"""Files of more than 8 bits a channel, written byte by byte where Pillow cannot write them."""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF 6.0, SampleFormat


def tiff(values: np.ndarray, *, order: Literal["<", ">"] = "<", sample: int = UNSIGNED) -> np.ndarray:
    """An uncompressed TIFF of values [H, W] or [H, W, 3] in a byte order, uint8 [bytes]."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = 8 * values.dtype.itemsize
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1])]
    tags += [(262, 3, [1 if channels == 1 else 2]), (273, 4, [8]), (277, 3, [channels]), (278, 4, [height])]
    tags += [(279, 4, [len(data)]), (339, 3, [sample] * channels)]
    start = 8 + len(data)
    behind, entries = start + 2 + 12 * len(tags) + 4, b""
    extra = b""
    for tag, kind, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", behind + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra
    return np.frombuffer(head + data + directory, np.uint8)


def netpbm(values: np.ndarray, largest: int) -> np.ndarray:
    """A PGM or PPM of uint16 [H, W] or [H, W, 3] that states its largest value, uint8 [bytes]."""
    head = f"P{5 if values.ndim == 2 else 6}\n{values.shape[1]} {values.shape[0]}\n{largest}\n"
    return np.frombuffer(head.encode() + values.astype(">u2").tobytes(), np.uint8)
