"""Reads single images or whole batches from files, without the GIL and without mapping them.

Files are read instead of mapped: a truncated file or a failing disk then raises an error in the read. In mapped memory
it would be a SIGBUS in whatever library touches the bytes. The copy takes hundredths of a millisecond per image.

Reading files one by one hands the GIL over several times per file, and each time the training thread waits a tenth of a
millisecond or more to get it back. The batch functions therefore make one C call per batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import resource
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.c_library import load_library

READERS = 8
"""Reader threads: they wait for disks and networks, not for cores."""
_SOURCE = Path(__file__).with_name("batch_read.c")
_REQUEST = np.dtype(
    [
        ("path", np.uint64),
        ("descriptor", np.int64),
        ("offset", np.int64),
        ("size", np.int64),
        ("buffer", np.uint64),
        ("count", np.int64),
    ],
    align=True,
)  # same layout as Request in batch_read.c


def read_files(
    paths: Sequence[str], nbytes: NDArray[np.int64], *, limit: int = 1 << 62
) -> list[NDArray[np.uint8] | None]:
    """Read whole files.

    Args:
        paths: N file names.
        nbytes: int64 [N], expected sizes.
        limit: bytes of the largest file to read.

    Returns:
        uint8 [bytes] for each; None if it is longer than expected, cannot be opened or read, or there is no C compiler.
        Reading such a file by itself names the error.
    """
    requests, names = _requests_of(paths)
    sizes = np.where(nbytes > limit, 0, nbytes)
    requests["size"] = sizes + 1  # one byte more shows that a file has grown, or is above the limit
    data = _read(requests)
    del names
    return [None if one is None or len(one) > size else one for one, size in zip(data, sizes.tolist(), strict=True)]


def read_ranges(
    descriptors: Sequence[int], offset: ArrayLike, size: NDArray[np.int64], *, heads: Sequence[bytes] = ()
) -> list[NDArray[np.uint8] | None]:
    """Read ranges of open files.

    Args:
        descriptors: N open files.
        offset: int [N], in bytes.
        size: int64 [N], in bytes.
        heads: N byte strings to put in front of the data; () for none.

    Returns:
        Read-only uint8 [head + size] for each; None where `RandomAccessFile.read` has to name the error.
    """
    requests = np.zeros(len(descriptors), dtype=_REQUEST)
    requests["descriptor"], requests["offset"], requests["size"] = descriptors, offset, size
    data = _read(requests, heads)
    for one in data:
        if one is not None:
            one.flags.writeable = False
    expected = zip(data, size.tolist(), heads or (b"",) * len(data), strict=True)
    return [None if one is None or len(one) < len(head) + count else one for one, count, head in expected]


def advise_files(paths: Sequence[str], nbytes: NDArray[np.int64], *, limit: int) -> bool:
    """Start reading files into the page cache, `limit` bytes per request; False without a C compiler."""
    library = load_library(_SOURCE)
    if isinstance(library, str):
        return False
    requests, names = _requests_of(paths)
    requests["size"] = nbytes
    library.advise(ctypes.c_void_p(requests.ctypes.data), ctypes.c_int64(len(requests)), ctypes.c_int64(limit))
    del names
    return True


def _requests_of(paths: Sequence[str]) -> tuple[NDArray[np.void], object]:
    """Requests [N] with addresses of the file names, valid while the second object lives."""
    names = np.frombuffer(os.fsencode("\0".join((*paths, ""))), dtype=np.uint8)
    ends = np.flatnonzero(names == 0).astype(np.uint64)  # [N]
    requests = np.zeros(len(paths), dtype=_REQUEST)
    requests["path"] = names.ctypes.data + np.concatenate(([0], ends + 1))[:-1].astype(np.uint64)
    return requests, names


def _read(requests: NDArray[np.void], heads: Sequence[bytes] = ()) -> list[NDArray[np.uint8] | None]:
    """Head and available bytes of each request; None if it failed."""
    library = load_library(_SOURCE)
    if isinstance(library, str):
        return [None] * len(requests)
    head_size = np.array([len(head) for head in heads] or 0, dtype=np.int64)  # [N] or []
    room = requests["size"] + head_size
    starts = np.cumsum(room) - room
    buffer = np.empty(int(room.sum()), dtype=np.uint8)  # one allocation: numpy uses huge pages for it
    for start, head in zip(starts.tolist(), heads, strict=False):
        buffer[start : start + len(head)] = np.frombuffer(head, dtype=np.uint8)
    requests["buffer"] = buffer.ctypes.data + starts + head_size
    address = ctypes.c_void_p(requests.ctypes.data)
    library.read_requests(address, ctypes.c_int64(len(requests)), ctypes.c_int64(READERS))
    ends = starts + head_size + requests["count"]
    return [
        buffer[start:end] if count >= 0 else None
        for start, end, count in zip(starts.tolist(), ends.tolist(), requests["count"].tolist(), strict=True)
    ]


class RandomAccessFile:
    """A file that many threads read at any offset; it is closed with the last reference to it.

    Works after a fork: the file position is not used.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file; raises OSError, also if it is no regular file, whose data may never come."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:  # the module `os` may be gone at exit
        if hasattr(self, "descriptor"):  # else opening failed
            _close(self.descriptor)

    @property
    def nbytes(self) -> int:
        """Current size of the file."""
        return os.fstat(self.descriptor).st_size

    @property
    def stamp(self) -> tuple[int, int]:
        """Current size in bytes, and time of the last modification in nanoseconds."""
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, *, offset: int, size: int, head: bytes = b"") -> NDArray[np.uint8] | None:
        """`head` and the bytes at `offset`: read-only uint8 [len(head) + size]; None if the file is too short.

        Raises:
            OSError: the disk or network fails.
        """
        data = np.empty(len(head) + size, dtype=np.uint8)
        data[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        rest, at = data.data[len(head) :], offset
        while rest:  # one call reads at most 2 GiB
            count = os.preadv(self.descriptor, [rest], at)
            if count == 0:
                return None
            rest, at = rest[count:], at + count
        data.flags.writeable = False
        return data

    def will_need(self, offset: ArrayLike, size: ArrayLike) -> None:
        """Start reading ranges into the page cache, if the system supports that.

        Args:
            offset, size: of each range, in bytes: int [N].
        """
        if not hasattr(os, "posix_fadvise"):
            return
        limit = max_read_ahead(os.fstat(self.descriptor).st_dev)
        ranges = merge_ranges(np.asarray(offset, dtype=np.int64), np.asarray(size, dtype=np.int64), limit=limit)
        for start, end in ranges:
            os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


_MAX_READ_AHEAD = 1 << 20  # bytes; longer requests gain nothing
_DEFAULT_READ_AHEAD = 1 << 17  # bytes, Linux's default window
_MAX_GAP = 1 << 16  # bytes read along rather than starting a new range


def merge_ranges(
    offset: NDArray[np.int64], size: NDArray[np.int64], *, limit: int = _MAX_READ_AHEAD
) -> Iterator[tuple[int, int]]:
    """Sorted (start, end) of at most `limit` bytes that cover ranges of a file, merged over gaps of up to 64 KiB.

    Args:
        offset, size: of each range, in bytes: int64 [N].
    """
    order = np.argsort(offset, kind="stable")
    start = end = 0
    for next_start, next_end in zip(offset[order].tolist(), (offset + size)[order].tolist(), strict=True):
        if end > start and next_start - end <= _MAX_GAP:
            end = max(end, next_end)
        else:
            yield from _split(start, end, limit)
            start, end = next_start, next_end
    yield from _split(start, end, limit)


def _split(start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, limit):
        yield at, min(at + limit, end)


@functools.lru_cache(maxsize=64)
def max_read_ahead(device: int) -> int:
    """Bytes that Linux reads ahead per call; it silently drops the rest of a longer request.

    The larger of the device's read-ahead window and its largest request; Linux's default window if neither is known.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    found = []  # KiB
    for name in (
        f"/sys/class/bdi/{number}/read_ahead_kb",
        f"/sys/dev/block/{number}/queue/max_sectors_kb",
        f"/sys/dev/block/{number}/../queue/max_sectors_kb",  # the disk of a partition
    ):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    return min(max(4, *found) << 10 if found else _DEFAULT_READ_AHEAD, _MAX_READ_AHEAD)


_SPARE_FILES = 256  # for the rest of the process: libraries, logs, sockets, image files


def max_open_files() -> int | None:
    """How many shards may stay open, with some descriptors to spare; None if there is no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else max(1, hard - _SPARE_FILES)


def raise_file_limit(descriptor: int) -> None:
    """Raise the soft limit on open files (often 1024) if few are left above `descriptor`, which was just opened.

    The system hands out the lowest free descriptor, so its number tells how many are in use. If the limit cannot be
    raised, opening a later file fails with the system's own error.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or descriptor + _SPARE_FILES < soft:
        return
    wanted = 2 * (descriptor + _SPARE_FILES)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below the hard one
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
