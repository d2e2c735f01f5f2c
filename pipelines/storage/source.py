"""The contract of a storage: encoded images by index."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.image_facts import facts_of


class Source(Protocol):
    """Encoded images (JPEG, PNG, ...) by index, always in the same order for the same data.

    Reading is thread-safe and works after a fork.
    """

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [len]: class of each image, -1 if it has none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label, as `utf8` writes them; () if the data set is unlabelled."""

    @property
    def nbytes(self) -> npt.NDArray[np.int64]:
        """int64 [len]: size of each encoded image in bytes when the data was indexed."""

    @property
    def fingerprint(self) -> str:
        """Hash of keys, labels, sizes and class names; it does not depend on the location."""

    @property
    def location(self) -> Path:
        """Path of the data, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded bytes of one image: uint8 [bytes]; do not write to them.

        Raises:
            OSError: this image cannot be read (missing, disk error); others may be readable.
            InputError: the storage is damaged; the message names the file.
        """

    def key(self, index: int) -> str:
        """Name of one image for messages: the path relative to the folder, or the stem of the tar member; `utf8`."""

    def close(self) -> None:
        """Release open files. Arrays returned by `read` stay valid."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source with read-ahead."""

    def will_need(self, indices: Sequence[int]) -> None:
        """Ask the operating system to start reading images into the page cache; callable from any thread.

        Raises:
            OSError, InputError: as `read`, which will raise them again.
        """


@runtime_checkable
class ReadsBatches(Protocol):
    """A source that reads a batch in one call, acquiring the GIL once per batch instead of once per image."""

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded bytes of these images, as `read`; None where it failed, so that `read` has to name the error."""


class SubsetSource:
    """Some images of another source, in a given order; labels and class names do not change."""

    def __init__(self, source: Source, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self.indices = np.asarray(indices, dtype=np.int64)
        if not len(self.indices) or np.min(self.indices) < 0 or np.max(self.indices) >= len(source):
            raise InputError(
                f"The subset of {source.location} has {len(self.indices)} images but must name one or more of its "
                f"{len(source)} images by index from 0: correct the indices."
            )
        self._source = source
        self.location = source.location
        self.labels = source.labels[self.indices]
        self.classes = source.classes
        self.nbytes = source.nbytes[self.indices]
        self.facts = facts_of(source).subset(self.indices)
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + self.indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """See `Source`."""
        return self._source.read(int(self.indices[index]))

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """See `ReadsBatches`."""
        source = self._source
        return source.read_batch(self._original(indices)) if isinstance(source, ReadsBatches) else [None] * len(indices)

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`."""
        if isinstance(self._source, ReadsAhead):
            self._source.will_need(self._original(indices))

    def key(self, index: int) -> str:
        """See `Source`."""
        return self._source.key(int(self.indices[index]))

    def close(self) -> None:
        """See `Source`."""
        self._source.close()

    def _original(self, indices: Sequence[int]) -> list[int]:
        original: list[int] = self.indices[np.asarray(indices, dtype=np.int64)].tolist()
        return original


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyTable:
    """An immutable sequence of strings in two arrays, without a Python object per string.

    Attributes:
        blob: uint8 [bytes], all strings concatenated, in UTF-8 with ``surrogateescape`` (file names may not be UTF-8).
        ends: int64 [len], end of each string in `blob`.
    """

    blob: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> KeyTable:
        """Pack `strings`."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        lengths = np.fromiter((len(piece) for piece in encoded), dtype=np.int64, count=len(encoded))
        return cls(blob=np.frombuffer(b"".join(encoded), dtype=np.uint8), ends=np.cumsum(lengths))

    @classmethod
    def checked(cls, blob: npt.NDArray[Any], ends: npt.NDArray[Any]) -> KeyTable:
        """The table of two arrays from a file; raises as `check`."""
        table = cls(blob=blob, ends=ends)
        table.check()
        return table

    def check(self) -> None:
        """Check strings from a file.

        Raises:
            ValueError: the arrays have other types, or an end is beyond the bytes or before the previous one.
        """
        if self.blob.dtype != np.uint8 or self.blob.ndim != 1 or self.ends.dtype.kind != "i" or self.ends.ndim != 1:
            raise ValueError(f"names are {self.blob.dtype} {self.blob.shape} with ends {self.ends.dtype}")
        starts = np.concatenate([[0], self.ends[:-1]])
        wrong = np.flatnonzero((self.ends < starts) | (self.ends > len(self.blob)))
        if len(wrong):
            raise ValueError(f"the name of entry {wrong[0]} ends at byte {self.ends[wrong[0]]} of {len(self.blob)}")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index > 0 else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def file_name(key: str) -> str:
    """A key of a `KeyTable` as the operating system's functions want it, also where their encoding is not UTF-8."""
    if sys.getfilesystemencoding() == "utf-8":
        return key
    return os.fsdecode(key.encode("utf-8", "surrogateescape"))


def check_columns(count: int, classes: int, *, nbytes: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    """Check sizes and labels of `count` images from a file.

    Raises:
        ValueError: they are not int64 [count], a size is negative, or a label is not of one of the classes, nor -1.
    """
    for name, column, low, high in (("size", nbytes, 0, 1 << 62), ("label", labels, -1, classes - 1)):
        if column.dtype != np.int64 or column.shape != (count,):
            raise ValueError(f"there are {column.dtype} {list(column.shape)} {name}s for {count} images")
        wrong = np.flatnonzero((column < low) | (column > high))
        if len(wrong):
            raise ValueError(f"the {name} of entry {wrong[0]} is {column[wrong[0]]}")


def fingerprint(
    keys: KeyTable, *, labels: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], classes: tuple[str, ...]
) -> str:
    """SHA-256 (64 hex digits) of keys, labels, sizes and class names."""
    digest = hashlib.sha256(f"{len(keys)}\0{len(classes)}\0".encode())
    digest.update("\0".join(classes).encode("utf-8", "surrogateescape"))
    for array in (keys.ends, labels, nbytes):
        digest.update(np.ascontiguousarray(array, dtype="<i8").data)
    digest.update(np.ascontiguousarray(keys.blob).data)
    return digest.hexdigest()
