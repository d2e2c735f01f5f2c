"""An open file that is read at any place, from many threads at once.

Its bytes are read, not mapped: a file that is cut short, or a disk that fails, is an error of the read then. Mapped, it
would be a signal (SIGBUS) in whatever library touches the bytes, which kills the process without a word. The copy takes
hundredths of a millisecond an image, in the threads that read, and a slow disk's time is seen where it is spent.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt


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

    def will_read(self, *, offset: int = 0, size: int = 0) -> None:
        """Let the system begin to read bytes (size 0: all to the end) into memory; not every system can."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
