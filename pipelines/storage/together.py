"""Many images read in one call without Python's lock.

Read one by one, each file hands the lock over several times, and each time the training thread waits to get it back:
a tenth of a millisecond and more. Python's part in a batch is then the names of its files.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.c_library import load_library

READERS = 8
"""Threads that read: they wait for disks and networks, not for cores."""

_SOURCE = Path(__file__).with_name("together.c")
_PIECE = np.dtype(
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
"""What is read, as together.c takes it."""


def read_files(paths: Sequence[str], nbytes: NDArray[np.int64]) -> list[NDArray[np.uint8] | None]:
    """Read whole files.

    Args:
        paths: of the files.
        nbytes: int64 [N], how long each is thought to be.

    Returns:
        uint8 [bytes] each; None for one that cannot be read so and has to be read by itself, which says why: it is
        longer than thought, cannot be opened or read, or there is no C compiler here.
    """
    pieces = np.zeros(len(paths), dtype=_PIECE)
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
    pieces = np.zeros(len(descriptors), dtype=_PIECE)
    pieces["descriptor"], pieces["offset"], pieces["size"] = descriptors, offset, size
    data = _read(pieces, heads)
    whole = zip(data, size.tolist(), heads or (b"",) * len(data), strict=True)
    return [None if one is None or len(one) < len(head) + count else _frozen(one) for one, count, head in whole]


def will_read_files(paths: Sequence[str], nbytes: NDArray[np.int64], *, most: int) -> bool:
    """Let the system begin to read files into memory, `most` bytes a time; False if that cannot be done in C."""
    library = load_library(_SOURCE)
    if isinstance(library, str):
        return False
    pieces = np.zeros(len(paths), dtype=_PIECE)
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
