"""The index of a folder or list: what `scan` and `listing` make, `cache` keeps and `folder` reads from."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage.keys import KeyTable

_ALWAYS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".jp2", ".j2k", ".avif")
_WITH_PLUGIN = (".heic", ".heif")
IMAGE_EXTENSIONS = _ALWAYS + (_WITH_PLUGIN if importlib.util.find_spec("pillow_heif") else ())
"""Endings of files that are images, in any case. Those of HEIC need the package pillow_heif."""


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
        left_out: number of other files by ending, where the folder was just read; {} for an index from the cache.
    """

    root: Path
    keys: KeyTable
    nbytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    watched: KeyTable
    watched_mtime: npt.NDArray[np.int64]
    left_out: dict[str, int] = field(default_factory=dict)
