"""Images that lie as they are in larger files (tars, stored zips, Arrow files) as a source."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.decode.limits import beyond_bytes
from pipelines.names import utf8
from pipelines.runtime import InputError
from pipelines.storage.batch_read import RandomAccessFile, max_open_files, raise_file_limit, read_ranges
from pipelines.storage.forms.base import Ranges
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.source import KeyTable, fingerprint


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A file as it was when it was indexed: bytes, and modification time in nanoseconds."""

    size: int
    mtime: int


class RangeSource:
    """Images in byte ranges of files. Implements `Source`.

    Opening a file for its first image checks that size and modification time are those of the index; each read checks
    that it was not cut short.
    """

    def __init__(
        self,
        location: Path,
        *,
        keys: KeyTable,
        labels: npt.NDArray[np.int64],
        classes: tuple[str, ...],
        ranges: Ranges,
        stamps: Sequence[Stamp],
    ) -> None:
        """Put an index over files.

        Args:
            location: what the user gave, for messages.
            keys: name of each image.
            labels: int64 [N], -1 for none.
            classes: names by label.
            ranges: where the images lie.
            stamps: of each file of `ranges`.

        Raises:
            InputError: this process may not open so many files.
        """
        limit = max_open_files()
        if limit is not None and len(ranges.paths) > limit:
            raise InputError(
                f"{location} has {len(ranges.paths)} files but this process may keep only {limit} of them open: raise "
                "the hard limit on open files (ulimit -Hn), or convert them with mvssl-convert."
            )
        self.location = location
        self.labels = labels
        self.classes = tuple(map(utf8, classes))
        self.nbytes = ranges.size
        self.facts = ImageFacts.of(len(keys), checksums=ranges.checksums)
        self.fingerprint = fingerprint(keys, labels=labels, nbytes=self.nbytes, classes=self.classes)
        self._keys, self._ranges, self._stamps = keys, ranges, tuple(stamps)
        self._files: list[RandomAccessFile | None] = [None] * len(ranges.paths)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: read-only uint8 [bytes].

        Raises:
            InputError: its file was changed or removed since it was indexed.
            OSError: it cannot be opened or read, or is beyond the limits.
        """
        size = int(self.nbytes[index])
        problem = beyond_bytes(size, self.facts.limits)
        if problem:
            raise OSError(errno.EFBIG, problem)
        number = int(self._ranges.file[index])
        data = self._file(number).read(offset=int(self._ranges.offset[index]), size=size)
        if data is None:
            raise _changed(self._ranges.paths[number], f"ends before {self.key(index)!r}")
        return data

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded images; see `ReadsBatches`. Raises as `read`."""
        index = np.asarray(indices, dtype=np.int64)
        numbers = self._ranges.file[index].tolist()
        files = {number: self._file(number) for number in dict.fromkeys(numbers)}
        sizes = self.nbytes[index]
        small = sizes <= self.facts.limits.bytes
        found = read_ranges(
            [files[number].descriptor for number in numbers], self._ranges.offset[index], np.where(small, sizes, 0)
        )
        return [data if fits else None for data, fits in zip(found, small.tolist(), strict=True)]

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`; neighbouring images are one request."""
        index = np.asarray(indices, dtype=np.int64)
        numbers = self._ranges.file[index]
        for number in dict.fromkeys(numbers.tolist()):
            here = index[numbers == number]
            self._file(number).will_need(self._ranges.offset[here], self.nbytes[here])

    def key(self, index: int) -> str:
        """Name of an image in its archive or table."""
        return utf8(self._keys[index])

    def close(self) -> None:
        """Release the open files; threads that are reading may finish. Reading opens them again."""
        self._files = [None] * len(self._files)

    def _file(self, number: int) -> RandomAccessFile:
        # No lock: it is harmless if two threads open the same file, and a lock would not survive a fork.
        file = self._files[number]
        if file is None:
            path = self._ranges.paths[number]
            file = open_stamped(path, self._stamps[number])
            raise_file_limit(file.descriptor)
            self._files[number] = file
        return file


def open_stamped(path: Path, stamp: Stamp) -> RandomAccessFile:
    """Open a file that is as it was when it was indexed.

    Raises:
        InputError: it is gone or has changed.
    """
    try:
        file = RandomAccessFile(path)
    except FileNotFoundError:
        raise _changed(path, "is missing") from None
    check_stamp(path, stamp, file.stamp)
    return file


def check_stamp(path: Path, stamp: Stamp, now: tuple[int, int]) -> None:
    """Raise InputError unless a file of `now` so many bytes and this modification time is the one that was indexed."""
    if now != (stamp.size, stamp.mtime):
        why = f"has {now[0]:,} bytes, not {stamp.size:,}" if now[0] != stamp.size else "was written again"
        raise _changed(path, why)


def _changed(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} has changed since it was indexed (it {why}): restore it, or start again, so that it is indexed again."
    )
