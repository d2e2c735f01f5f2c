"""The index of a folder or list: what `scan` and `listing` make, `cache` keeps and `folder` reads from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage.keys import KeyTable

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: a known extension in any case, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


@dataclass(frozen=True, kw_only=True, eq=False)
class FileIndex:
    """Every image of a folder or list.

    Attributes:
        root: the folder that relative keys start from.
        keys: path of each image, relative to `root` (or absolute, where a list says so), sorted or in the list's order.
        nbytes: int64 [len], file sizes; 0 for files that could not be looked at (the decoder names them).
        labels: int64 [len], -1 where there is none.
        classes: class names by label, () if unlabelled.
        watched: absolute paths whose change makes this index stale (every folder seen, and the list).
        watched_mtime: int64 [len(watched)], their modification times in nanoseconds, taken before they were read.
    """

    root: Path
    keys: KeyTable
    nbytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    watched: KeyTable
    watched_mtime: npt.NDArray[np.int64]
