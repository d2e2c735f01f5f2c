"""An open file that is read at any place, from many threads at once.

Its bytes are read, not mapped: a file that is cut short, or a disk that fails, is an error of the read then. Mapped, it
would be a signal (SIGBUS) in whatever library touches the bytes, which kills the process without a word. The copy takes
hundredths of a millisecond an image, in the threads that read, and a slow disk's time is seen where it is spent.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_PIECE = 1 << 20  # bytes, at most: longer pieces gain nothing
_USUAL = 1 << 17  # bytes of Linux's read-ahead window
_GAP = 1 << 16  # bytes of other things that are read along rather than begin a new piece


class RandomAccessFile:
    """A file open for reading until nobody refers to it, so that a thread that reads can end with it.

    Works after a fork: the file's own position is not used.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file; raises OSError."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # it could be opened
            os.close(self.descriptor)

    @property
    def nbytes(self) -> int:
        """How long the file is now."""
        return os.fstat(self.descriptor).st_size

    def read(self, *, offset: int, size: int, head: bytes = b"") -> npt.NDArray[np.uint8] | None:
        """`head` and the bytes at `offset`: read-only uint8 [len(head) + size]; None if the file ends before.

        Raises:
            OSError: the disk or network fails.
        """
        data = np.empty(len(head) + size, dtype=np.uint8)
        data[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        rest, at = data.data[len(head) :], offset
        while rest:  # one call gives at most 2 GiB
            count = os.preadv(self.descriptor, [rest], at)
            if count == 0:
                return None
            rest, at = rest[count:], at + count
        data.flags.writeable = False
        return data

    def will_read(self, offset: npt.ArrayLike, size: npt.ArrayLike) -> None:
        """Let the system begin to read these parts into memory, each place where it lies; not every system can.

        Args:
            offset, size: of each part, in bytes: int [N].
        """
        if not hasattr(os, "posix_fadvise"):
            return
        most = most_at_once(os.fstat(self.descriptor).st_dev)
        for start, end in pieces(np.asarray(offset, dtype=np.int64), np.asarray(size, dtype=np.int64), most=most):
            os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


def pieces(
    offset: npt.NDArray[np.int64], size: npt.NDArray[np.int64], *, most: int = _PIECE
) -> Iterator[tuple[int, int]]:
    """(start, end) of few pieces of a file that hold these parts, from its beginning on.

    Parts that lie side by side (with gaps of up to `_GAP` bytes) are one piece, of at most `most` bytes.

    Args:
        offset, size: of each part, in bytes: int64 [N].
    """
    order = np.argsort(offset, kind="stable")
    start = end = 0
    for begin, stop in zip(offset[order].tolist(), (offset + size)[order].tolist(), strict=True):
        if end > start and begin - end <= _GAP:
            end = max(end, stop)
        else:
            yield from _split(start, end, most)
            start, end = begin, stop
    yield from _split(start, end, most)


def _split(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, most):
        yield at, min(at + most, end)


@functools.lru_cache(maxsize=64)
def most_at_once(device: int) -> int:
    """Bytes that Linux reads ahead at one call, the rest of which it drops without a word.

    The larger of the device's read-ahead window and its largest request; the usual window where neither is told.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    found = []  # KiB
    for name in (
        f"/sys/class/bdi/{number}/read_ahead_kb",
        f"/sys/dev/block/{number}/queue/max_sectors_kb",
        f"/sys/dev/block/{number}/../queue/max_sectors_kb",  # of a partition's disk
    ):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    return min(max(4, *found) << 10 if found else _USUAL, _PIECE)
