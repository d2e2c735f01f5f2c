"""Some images of a source, as a source.

Make the labels of one data set agree with those of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.source import ReadsAhead, ReadsTogether, Source


def align_labels(source: Source, classes: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Labels of `source` (int64 [len], -1 stays -1) renumbered to `classes`, by class name.

    A val folder that lacks a class of the train folder numbers its classes differently: compare labels only after this.

    Raises:
        InputError: `source` has a class that is not among `classes`.
    """
    if source.classes == classes:
        return source.labels
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in label_of]
    if unknown:
        raise InputError(
            f"{source.location} has the class {unknown[0]!r} ({len(unknown)} such), which is not among the "
            f"{len(classes)} classes of the train split: give both splits the same classes."
        )
    renumbered = np.array([label_of[name] for name in source.classes] + [-1], dtype=np.int64)
    return renumbered[source.labels]  # label -1 picks the last entry: -1


class SubsetSource:
    """Images of another source; see `Source`. Classes keep their numbers, also where none of their images is left."""

    def __init__(self, source: Source, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Take the images with these indices, in this order.

        Raises:
            InputError: there are none, or one does not exist.
        """
        self.indices = np.asarray(indices, dtype=np.int64)
        if not len(self.indices) or np.min(self.indices) < 0 or np.max(self.indices) >= len(source):
            raise InputError(
                f"A subset of {len(self.indices)} images was asked of {source.location} but must name one or more of "
                f"its {len(source)} images by number, from 0."
            )
        self._source = source
        self.location = source.location
        self.labels = source.labels[self.indices]
        self.classes = source.classes
        self.nbytes = source.nbytes[self.indices]
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + self.indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """As the source."""
        return self._source.read(int(self.indices[index]))

    def read_together(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """As the source."""
        source = self._source
        return (
            source.read_together(self._there(indices)) if isinstance(source, ReadsTogether) else [None] * len(indices)
        )

    def will_need(self, indices: Sequence[int]) -> None:
        """As the source."""
        if isinstance(self._source, ReadsAhead):
            self._source.will_need(self._there(indices))

    def key(self, index: int) -> str:
        """As the source."""
        return self._source.key(int(self.indices[index]))

    def close(self) -> None:
        """As the source."""
        self._source.close()

    def _there(self, indices: Sequence[int]) -> list[int]:
        there: list[int] = self.indices[np.asarray(indices, dtype=np.int64)].tolist()
        return there
