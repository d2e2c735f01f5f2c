"""Keep the index of a folder or list between runs, and notice when it is stale.

The cache lies in the user's cache folder and not beside the data: data sets are often shared or read-only, and a file
beside the images would change the very folder that is watched.

An index is stale when the modification time of any folder in it (or of the list) has changed: that is every image
added, removed or renamed. A file overwritten in place is not noticed, and need not be: only its size is out of date.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pipelines.cache_folder import cache_folder
from pipelines.storage.index import IMAGE_EXTENSIONS, FileIndex
from pipelines.storage.keys import KeyTable

_VERSION = zlib.crc32(repr((2, IMAGE_EXTENSIONS)).encode())  # other endings, other files
_SETTLED_NS = 2_000_000_000  # coarsest modification times of common file systems (FAT, some NFS servers): 2 s


def cache_file(path: Path) -> Path:
    """The cache file for the folder or list at `path`."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    return cache_folder() / f"index-{name}.npz"


def load_index(path: Path) -> FileIndex | None:
    """The cached index of the folder or list at `path`, or None where there is none, or a stale or damaged one."""
    try:
        with np.load(cache_file(path), allow_pickle=False) as data:
            if int(data["version"]) != _VERSION:
                return None
            index = FileIndex(
                root=Path(KeyTable(blob=data["root"], ends=np.array([len(data["root"])]))[0]),
                keys=KeyTable(blob=data["key_blob"], ends=data["key_ends"]),
                nbytes=data["nbytes"],
                labels=data["labels"],
                classes=tuple(KeyTable(blob=data["class_blob"], ends=data["class_ends"])),
                watched=KeyTable(blob=data["watched_blob"], ends=data["watched_ends"]),
                watched_mtime=data["watched_mtime"],
            )
        fresh = all(
            os.stat(watched).st_mtime_ns == mtime
            for watched, mtime in zip(index.watched, index.watched_mtime.tolist(), strict=True)
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: the caller indexes again
    return index if fresh else None


def save_index(path: Path, index: FileIndex) -> bool:
    """Cache `index`; says whether it did. A cache that cannot be written is no error: the next run indexes again.

    Data changed within the last two seconds is not cached: a change right after could leave the modification time as
    it is, and would never be noticed.
    """
    if time.time_ns() - int(np.max(index.watched_mtime, initial=0)) < _SETTLED_NS:
        return False
    classes = KeyTable.of(index.classes)
    target = cache_file(path)
    temporary = None
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(
                file,
                version=np.int64(_VERSION),
                root=KeyTable.of([str(index.root)]).blob,
                key_blob=index.keys.blob,
                key_ends=index.keys.ends,
                nbytes=index.nbytes,
                labels=index.labels,
                class_blob=classes.blob,
                class_ends=classes.ends,
                watched_blob=index.watched.blob,
                watched_ends=index.watched.ends,
                watched_mtime=index.watched_mtime,
            )
        temporary.replace(target)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return False
    return True
