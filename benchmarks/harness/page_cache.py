"""The page cache: drops files from it, and tells how much of them it holds (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.runtime import InputError
from pipelines.storage.source import Source


def files_of(source: Source) -> list[Path]:
    """The files that hold a source's images, and everything else in its folder."""
    where = source.location
    if where.is_dir():
        return sorted(path for path in where.rglob("*") if path.is_file())
    listed = [where.parent / source.key(index) for index in range(len(source))]  # a text list names files
    return [where, *(path for path in listed if path.is_file())]


def drop(paths: Iterable[Path]) -> None:
    """Drop these files from the page cache. Pages that a process has mapped and touched stay.

    Raises:
        InputError: the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise InputError("--cold needs posix_fadvise, which this system has not: leave it out.")
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_fraction(paths: Sequence[Path]) -> float:
    """Fraction of the files' pages that are in memory, by mincore(2)."""
    resident = pages = 0
    for path in paths:
        size = path.stat().st_size
        if size:
            here = _resident_pages(path, size)
            resident += sum(here)
            pages += len(here)
    return resident / pages if pages else 0.0


def _resident_pages(path: Path, size: int) -> list[int]:
    """1 for each page of the file that is in memory, else 0."""
    count = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)  # ACCESS_COPY, because ctypes asks for a buffer that it may write
        found = (ctypes.c_ubyte * count)()
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found)
        del start  # or the map could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    return [page & 1 for page in found]
