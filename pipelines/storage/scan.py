"""Index a folder of images, nested or flat, with ``os.scandir`` on several threads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.storage.index import FileIndex, is_image_name
from pipelines.storage.keys import KeyTable

_NO_DATA = ("lost+found", "@eaDir")  # the file system's own, unreadable for users; thumbnails made by NAS devices
_THREADS = 8  # folders read at once: hides the latency of network file systems


@dataclass(frozen=True)
class _Folder:
    path: str  # absolute
    prefix: str  # relative to the root, "" or ending in "/"
    ancestors: frozenset[tuple[int, int]]  # (device, inode) of the folders above: links that lead back are not followed


@dataclass
class _Listing:
    folder: _Folder
    mtime: int = 0
    images: list[tuple[str, int]] = field(default_factory=list)
    folders: list[_Folder] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def scan_folder(root: Path, *, progress: Callable[[int], None] | None = None) -> FileIndex:
    """Index every image below `root`, sorted by relative path; links are followed, hidden names and
    folders of the file system left out (see `is_data_folder`).

    Labels are the first folder level: the sorted names of those folders in which images lie. Images directly in
    `root` have no label (-1).

    Args:
        root: the folder.
        progress: called with the number of images found so far.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[tuple[str, int]] = []
    watched: list[tuple[str, int]] = []
    left_out: Counter[str] = Counter()
    level = [_Folder(os.path.abspath(root), "", frozenset())]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            below: list[_Folder] = []
            for listing in pool.map(_list_folder, level):
                watched.append((listing.folder.path, listing.mtime))
                found.extend(listing.images)
                left_out.update(listing.left_out)
                below.extend(listing.folders)
                if progress is not None and listing.images:
                    progress(len(found))
            level = below
    found.sort()
    firsts = [key.partition("/")[0] if "/" in key else None for key, _ in found]
    classes = tuple(sorted({first for first in firsts if first is not None}))
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    label_of[None] = -1
    return FileIndex(
        root=Path(os.path.abspath(root)),
        keys=KeyTable.of(key for key, _ in found),
        nbytes=np.array([size for _, size in found], dtype=np.int64),
        labels=np.array([label_of[first] for first in firsts], dtype=np.int64),
        classes=classes,
        watched=KeyTable.of(path for path, _ in watched),
        watched_mtime=np.array([mtime for _, mtime in watched], dtype=np.int64),
        left_out=dict(left_out.most_common()),
    )


def is_data_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a folder (or a link to one) that may hold images: not hidden, no ``lost+found``."""
    if entry.name.startswith(".") or entry.name in _NO_DATA:
        return False
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _list_folder(folder: _Folder) -> _Listing:
    status = os.stat(folder.path)  # before the listing: a change while we read makes the index stale
    identity = (status.st_dev, status.st_ino)
    listing = _Listing(folder, status.st_mtime_ns)
    if identity in folder.ancestors:
        return listing
    ancestors = folder.ancestors | {identity}
    with os.scandir(folder.path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_data_folder(entry):
                listing.folders.append(_Folder(entry.path, f"{folder.prefix}{entry.name}/", ancestors))
            elif is_image_name(entry.name):
                listing.images.append((folder.prefix + entry.name, _size(entry)))
            else:
                listing.left_out.append(os.path.splitext(entry.name)[1].lower())
    return listing


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a broken link: stays in the index, so that it is named instead of silently left out
        return 0
