"""Make the labels of one data set agree with those of another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage.source import Source


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
