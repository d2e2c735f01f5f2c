"""Bytes out of a memory-mapped file, without a copy."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt


def mapped_bytes(mapped: mmap.mmap, *, offset: int, size: int) -> npt.NDArray[np.uint8]:
    """Read-only uint8 [size] at `offset`; the disk is told to fetch it now, so that a batch's reads go out together."""
    read_ahead(mapped, offset=offset, size=size)
    return np.frombuffer(mapped, dtype=np.uint8, count=size, offset=offset)


def read_ahead(mapped: mmap.mmap, *, offset: int, size: int) -> None:
    """Let the operating system begin to read bytes of a mapped file into memory; returns at once."""
    start = offset - offset % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_WILLNEED, start, offset + size - start)
