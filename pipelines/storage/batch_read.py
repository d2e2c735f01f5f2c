"""Many images read in one call without Python's lock.

Read one by one, each file hands the lock over several times, and each time the training thread waits to get it back:
a tenth of a millisecond and more. Python's part in a batch is then the names of its files.

An open file that is read at any place, from many threads at once.

Its bytes are read, not mapped: a file that is cut short, or a disk that fails, is an error of the read then. Mapped, it
would be a signal (SIGBUS) in whatever library touches the bytes, which kills the process without a word. The copy takes
hundredths of a millisecond an image, in the threads that read, and a slow disk's time is seen where it is spent.

The limit on open files (``ulimit -n``): a shard stays open, and often only 1024 may be.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike, NDArray

from pipelines.c_library import load_library

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


_SPARE = 256  # for everything else in the process: libraries, logs, sockets, image files


def make_room(descriptor: int) -> None:
    """Raise this process's soft limit, up to the hard one, if few descriptors are left above the one just opened.

    The system gives out the lowest free descriptor, so that `descriptor` tells how many are in use. Does nothing where
    the limit cannot be raised: then opening fails in the end, with the system's own error.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or descriptor + _SPARE < soft:
        return
    wanted = 2 * (descriptor + _SPARE)
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    except (ValueError, OSError):  # a system with a limit of its own below the hard one (macOS)
        return


def most_open_files() -> int | None:
    """How many files may be kept open with some left to spare; None if there is no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else max(1, hard - _SPARE)


READERS = 8
"""Threads that read: they wait for disks and networks, not for cores."""

_SOURCE = Path(__file__).with_name("batch_read.c")
_PIECE_DTYPE = np.dtype(
    [
        ("path", np.uint64),
        ("descriptor", np.int64),
        ("offset", np.int64),
        ("size", np.int64),
        ("into", np.uint64),
        ("got", np.int64),
    ],
    align=True,
)
"""What is read, as batch_read.c takes it."""


def read_files(paths: Sequence[str], nbytes: NDArray[np.int64]) -> list[NDArray[np.uint8] | None]:
    """Read whole files.

    Args:
        paths: of the files.
        nbytes: int64 [N], how long each is thought to be.

    Returns:
        uint8 [bytes] each; None for one that cannot be read so and has to be read by itself, which says why: it is
        longer than thought, cannot be opened or read, or there is no C compiler here.
    """
    pieces = np.zeros(len(paths), dtype=_PIECE_DTYPE)
    pieces["path"], keep = _names(paths)
    pieces["size"] = nbytes + 1  # one more would be there of a file that has grown
    data = _read(pieces)
    del keep
    return [None if one is None or len(one) > size else one for one, size in zip(data, nbytes.tolist(), strict=True)]


def read_parts(
    descriptors: Sequence[int], offset: ArrayLike, size: NDArray[np.int64], *, heads: Sequence[bytes] = ()
) -> list[NDArray[np.uint8] | None]:
    """Read parts of files that are open.

    Args:
        descriptors: of the files, which must stay open meanwhile.
        offset: int [N], in bytes.
        size: int64 [N], in bytes.
        heads: N, what to put in front of each; () puts nothing there.

    Returns:
        read-only uint8 [head + size] each; None for one that has to be read by itself, which says why.
    """
    pieces = np.zeros(len(descriptors), dtype=_PIECE_DTYPE)
    pieces["descriptor"], pieces["offset"], pieces["size"] = descriptors, offset, size
    data = _read(pieces, heads)
    whole = zip(data, size.tolist(), heads or (b"",) * len(data), strict=True)
    return [None if one is None or len(one) < len(head) + count else _frozen(one) for one, count, head in whole]


def will_read_files(paths: Sequence[str], nbytes: NDArray[np.int64], *, most: int) -> bool:
    """Let the system begin to read files into memory, `most` bytes a time; False if that cannot be done in C."""
    library = load_library(_SOURCE)
    if isinstance(library, str):
        return False
    pieces = np.zeros(len(paths), dtype=_PIECE_DTYPE)
    pieces["path"], keep = _names(paths)
    pieces["size"] = nbytes
    library.will_read(ctypes.c_void_p(pieces.ctypes.data), ctypes.c_int64(len(pieces)), ctypes.c_int64(most))
    del keep
    return True


def _names(paths: Sequence[str]) -> tuple[NDArray[np.uint64], object]:
    """Addresses of the names, [N], valid as long as the second lives."""
    names = np.frombuffer(os.fsencode("\0".join((*paths, ""))), dtype=np.uint8)  # one name behind the other
    ends = np.flatnonzero(names == 0).astype(np.uint64)  # [N]
    return names.ctypes.data + np.concatenate(([0], ends + 1))[:-1].astype(np.uint64), names


def _read(pieces: NDArray[np.void], heads: Sequence[bytes] = ()) -> list[NDArray[np.uint8] | None]:
    """What there is of each piece, behind its head; None for one that cannot be read."""
    library = load_library(_SOURCE)
    if isinstance(library, str):
        return [None] * len(pieces)
    front = np.array([len(head) for head in heads] or 0, dtype=np.int64)  # [N] or []
    room = pieces["size"] + front
    begins = np.cumsum(room) - room
    buffer = np.empty(int(room.sum()), dtype=np.uint8)  # one piece of memory: numpy takes huge pages for it
    for begin, head in zip(begins.tolist(), heads, strict=False):
        buffer[begin : begin + len(head)] = np.frombuffer(head, dtype=np.uint8)
    pieces["into"] = buffer.ctypes.data + begins + front
    library.read_pieces(ctypes.c_void_p(pieces.ctypes.data), ctypes.c_int64(len(pieces)), ctypes.c_int64(READERS))
    ends = begins + front + pieces["got"]
    return [
        buffer[begin:end] if got >= 0 else None
        for begin, end, got in zip(begins.tolist(), ends.tolist(), pieces["got"].tolist(), strict=True)
    ]


def _frozen(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    data.flags.writeable = False
    return data
