"""The contract of a storage: encoded images by index.

Many short strings in two arrays: 1.3 million paths cost their bytes, not 1.3 million Python objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyTable:
    """An immutable sequence of strings.

    Attributes:
        blob: uint8 [bytes], the UTF-8 of all strings one behind the other (file names that are not UTF-8 survive
            through ``surrogateescape``).
        ends: int64 [len], where each string ends in `blob`.
    """

    blob: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> KeyTable:
        """Pack `strings`."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        lengths = np.fromiter((len(piece) for piece in encoded), dtype=np.int64, count=len(encoded))
        return cls(blob=np.frombuffer(b"".join(encoded), dtype=np.uint8), ends=np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index > 0 else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Source(Protocol):
    """Encoded images (JPEG, PNG, ... as they lie on disk) by index, in an order that never changes for the same data.

    Reading is safe from several threads at once and after a fork.
    """

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [len]: class of each image, -1 where there is none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; () if the data set is unlabelled."""

    @property
    def nbytes(self) -> npt.NDArray[np.int64]:
        """int64 [len]: size of each encoded image in bytes, as it was when the data was indexed."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data set: a hash of keys, labels and sizes. The same wherever the data lies."""

    @property
    def location(self) -> Path:
        """Where the data lies, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded bytes of one image: uint8 [bytes], to be read only.

        Raises:
            OSError: this image cannot be read (gone, disk error); the others may well be.
            InputError: the storage is damaged; the message names the file.
        """

    def key(self, index: int) -> str:
        """Name of one image for messages: the path relative to the folder, or the stem of the tar member."""

    def close(self) -> None:
        """Let go of open files. Arrays given by `read` stay valid."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can be told what is read soon."""

    def will_need(self, indices: Sequence[int]) -> None:
        """Let the operating system begin to read images into memory; may be called from any thread.

        Raises:
            OSError, InputError: as `read`, which will say so again.
        """


@runtime_checkable
class ReadsTogether(Protocol):
    """A source that can read many images in one call, which takes Python's lock once and not once an image."""

    def read_together(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded bytes of these images, as `read`; None for each that `read` has to be asked for, which says why."""


def fingerprint(
    keys: KeyTable, *, labels: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], classes: tuple[str, ...]
) -> str:
    """SHA-256 (64 hex digits) over keys, labels, sizes and class names."""
    digest = hashlib.sha256(f"{len(keys)}\0{len(classes)}\0".encode())
    digest.update("\0".join(classes).encode("utf-8", "surrogateescape"))
    for array in (keys.ends, labels, nbytes):
        digest.update(np.ascontiguousarray(array, dtype="<i8").data)
    digest.update(np.ascontiguousarray(keys.blob).data)
    return digest.hexdigest()
