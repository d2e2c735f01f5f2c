"""Many short strings in two arrays: 1.3 million paths cost their bytes, not 1.3 million Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
