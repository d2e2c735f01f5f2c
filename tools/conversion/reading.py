"""Which failures to read an image cost that image, and which stop the conversion."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage import Source

# Short of something that every other read needs too, or the source is no longer the one that was opened.
_FATAL = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC}
_GONE = 100  # unreadable in a row: no data set is like that, a disk that was unmounted or has failed is


def read(source: Source, index: int) -> npt.NDArray[np.uint8] | str:
    """Encoded image, uint8 [bytes], or why just this image cannot be read.

    Raises:
        OSError: no image could be read either.
        InputError: the source is damaged.
    """
    try:
        return source.read(index)
    except FileNotFoundError:
        if not source.location.exists():
            raise
        return "the file does not exist (a broken link?)"
    except OSError as error:
        if error.errno in _FATAL:
            raise
        return f"the file cannot be read: {error.strerror or error}"


class SourceGoneError(InputError):
    """Nothing can be read any more."""


class UnreadableRow:
    """Counts the images in a row that could not be read, and which shards they are in."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._length = 0
        self._in_this_shard = 0
        self._shards: list[int] = []

    def add(self, reason: str) -> None:
        """One more image, in order; `reason` is "" if it could be read.

        Raises:
            SourceGoneError: too many in a row.
        """
        if not reason:
            self._length = self._in_this_shard = 0
            self._shards.clear()
            return
        self._length += 1
        self._in_this_shard += 1
        if self._length >= _GONE:
            raise SourceGoneError(
                f"the source {self._origin} has gone: the last {self._length} images could not be read, because "
                f"{reason}; check that its disk is mounted and readable, and run the same command again (finished "
                "shards are kept)."
            )

    def end_shard(self, number: int) -> None:
        """Planned shard `number` is written."""
        if self._in_this_shard:
            self._shards.append(number)
        self._in_this_shard = 0

    @property
    def shards(self) -> tuple[int, ...]:
        """Written shards that lack images of the row: not finished if the source has gone."""
        return tuple(self._shards)
