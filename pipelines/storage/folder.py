"""Plain files as a source: a folder of images or a text list of them, with a cached index."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.arrays import read_arrays
from pipelines.decode.limits import beyond_bytes
from pipelines.files import cache_folder, cache_folders, parse_json, publish, writable_cache
from pipelines.names import utf8
from pipelines.runtime import InputError, describe_os_error
from pipelines.storage.batch_read import RandomAccessFile, advise_files, max_read_ahead, read_files
from pipelines.storage.file_index import IMAGE_EXTENSIONS, FileIndex, describe_ignored, no_images, scan_folder
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.source import KeyTable, check_columns, file_name, fingerprint
from pipelines.storage.text_list import read_list

FALLBACK = True  # the other storages are folders or files too
_log = logging.getLogger("mvssl.data")
_READ_IN_PLACE = (".tar", ".zip", ".parquet", ".arrow")


def can_open(path: Path) -> bool:
    """Any folder; any other file as a list."""
    return path.is_dir() or path.is_file()


def open_path(path: Path, *, progress: Callable[[int], None] | None = None, use_cache: bool = True) -> FolderSource:
    """Open the folder or list at `path`, using its cached index if there is one.

    Args:
        path: a folder, or a text file that names images.
        progress: called with the number of images found so far, if indexing is needed.
        use_cache: read and write the cached index.
    """
    index = load_index(path) if use_cache else None
    if index is None:
        index = (scan_folder if path.is_dir() else read_list)(path, progress=progress)
        if use_cache:
            save_index(path, index)
    if len(index.keys) == 0:
        raise no_images(index, path)
    packed = {ending: count for ending, count in index.ignored.items() if ending in _READ_IN_PLACE}
    if sum(packed.values()) >= len(index.keys):
        raise InputError(
            f"{path} holds {describe_ignored(packed)} and {len(index.keys):,} images besides but must hold one or the "
            f"other: give the files with a pattern, such as '{path}/*{next(iter(packed))}', or move the images away."
        )
    if index.ignored:
        _log.warning("%s: ignoring files without an image extension: %s", path, describe_ignored(index.ignored))
    empty = np.flatnonzero(index.nbytes == 0)
    if len(empty) == len(index.keys):
        raise InputError(
            f"{path} holds no image that can be read: all {len(empty):,} files are empty, links to nothing or out of "
            f"reach, such as {index.keys[0]}: copy them again, or mount what the links lead to."
        )
    if len(empty):
        what = "%s: %d of %d files are empty or broken links, such as %s"
        _log.warning(what, path, len(empty), len(index.keys), index.keys[int(empty[0])])
    return FolderSource(index, location=path)


class FolderSource:
    """Images in files of their own. Implements `Source`."""

    def __init__(self, index: FileIndex, *, location: Path) -> None:
        self._index = index
        self.location = location
        self.labels = index.labels
        self.classes = tuple(map(utf8, index.classes))
        self.nbytes = index.nbytes
        self.facts = ImageFacts.of(len(index.keys))
        self.fingerprint = fingerprint(index.keys, labels=index.labels, nbytes=index.nbytes, classes=index.classes)

    def __len__(self) -> int:
        return len(self._index.keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Whole file: uint8 [bytes]; empty for an empty file. Raises OSError if the file cannot be read."""
        file = RandomAccessFile(self._path(index))
        problem = beyond_bytes(file.nbytes, self.facts.limits)
        if problem:
            raise OSError(errno.EFBIG, problem)
        data = file.read(offset=0, size=file.nbytes)
        return np.empty(0, dtype=np.uint8) if data is None else data  # it was cut short this moment

    def head(self, index: int, count: int) -> bytes:
        """The first bytes of a file, at most `count`. Raises OSError if it cannot be read."""
        with open(self._path(index), "rb", buffering=0) as file:
            return file.read(count)

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Whole files; see `ReadsBatches`."""
        nbytes = self.nbytes[np.asarray(indices, dtype=np.int64)]
        return read_files([self._path(index) for index in indices], nbytes, limit=self.facts.limits.bytes)

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`."""
        paths = [self._path(index) for index in indices]
        nbytes = self.nbytes[np.asarray(indices, dtype=np.int64)]
        if advise_files(paths, nbytes, limit=max_read_ahead(os.stat(self.location).st_dev)):
            return
        for path in paths:
            with contextlib.suppress(OSError):  # other files may be readable
                file = RandomAccessFile(path)
                file.will_need([0], [file.nbytes])

    def key(self, index: int) -> str:
        """Path relative to the folder (or to the list's folder; absolute if the list says so)."""
        return utf8(self._index.keys[index])

    def close(self) -> None:
        """Does nothing: no file is kept open."""

    def _path(self, index: int) -> str:
        return os.path.join(self._index.root, file_name(self._index.keys[index]))


# The index is cached in the user's cache folder: data sets are often shared or read-only, and a file among the images
# would change the folder's modification time. An index is stale if the modification time of any folder in it (or of
# the list) has changed, that is, if an image was added, removed or renamed. Overwriting a file in place is not noticed,
# and its size is then out of date: `forget_changed_index` looks, at the start of a training.

_VERSION = zlib.crc32(
    repr((4, IMAGE_EXTENSIONS)).encode()
)  # other extensions find other files, other rules other labels
_THREADS, _CHUNK = 8, 1024  # concurrent stat calls, files of a chunk: hides the latency of network file systems
_MTIME_RESOLUTION = 2_000_000_000  # nanoseconds; FAT and some NFS servers have 2 s


def cache_file(path: Path) -> Path:
    """The cache file for the folder or list at `path`."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    return cache_folder() / f"index-{name}.npz"


def load_index(path: Path) -> FileIndex | None:
    """The cached index of the folder or list at `path`; None if it is missing, stale or damaged."""
    cache = cache_file(path)
    indices = (_load(path, folder / cache.name) for folder in cache_folders(cache.parent))
    return next((index for index in indices if index is not None), None)


def _load(path: Path, cache: Path) -> FileIndex | None:
    """The index of `path` in a cache file; None if it is missing, stale or damaged, or leads out of the folder."""
    try:
        data = read_arrays(cache)
        if data["version"].tolist() != _VERSION:
            return None
        index = FileIndex(
            root=Path(file_name(KeyTable.checked(data["root"], np.array([data["root"].size]))[0])),
            keys=KeyTable.checked(data["key_blob"], data["key_ends"]),
            nbytes=data["nbytes"],
            labels=data["labels"],
            classes=tuple(KeyTable.checked(data["class_blob"], data["class_ends"])),
            watched=KeyTable.checked(data["watched_blob"], data["watched_ends"]),
            watched_mtime=data["watched_mtime"],
            ignored=_counts(parse_json(data["ignored"].tobytes())),
        )
        check_columns(len(index.keys), len(index.classes), nbytes=index.nbytes, labels=index.labels)
        inside = not path.is_dir() or (index.root == Path(os.path.abspath(path)) and not _leaves_root(index.keys))
        mtimes = zip(index.watched, index.watched_mtime.tolist(), strict=True)
        fresh = inside and all(os.stat(file_name(watched)).st_mtime_ns == mtime for watched, mtime in mtimes)
    except (OSError, ValueError, KeyError):
        return None
    return index if fresh else None


def _counts(value: Any) -> dict[str, int]:
    """Numbers by name; ValueError for anything else."""
    if not isinstance(value, dict) or not all(type(count) is int for count in value.values()):
        raise ValueError("it has no numbers of ignored files")
    return value


def _leaves_root(keys: KeyTable) -> bool:
    """Whether a key of a folder's index leads out of the folder."""
    return any(key.startswith("/") or f"/{key}/".find("/../") >= 0 for key in keys)


def forget_changed_index(path: Path) -> None:
    """Delete the cached index of the folder or list at `path` if the size of a file is no longer the one in it."""
    index = load_index(path)
    if index is None:
        return

    def changed(start: int) -> bool:
        for number in range(start, min(start + _CHUNK, len(index.keys))):
            try:
                size = os.stat(os.path.join(index.root, file_name(index.keys[number]))).st_size
            except OSError:
                size = 0  # as in the index
            if size != index.nbytes[number]:
                return True
        return False

    with ThreadPoolExecutor(_THREADS) as pool:
        stale = any(pool.map(changed, range(0, len(index.keys), _CHUNK)))
    if stale:
        with contextlib.suppress(OSError):
            cache_file(path).unlink()


def save_index(path: Path, index: FileIndex) -> None:
    """Cache `index`; a warning says so if that is not possible.

    Data changed in the last two seconds is not cached: a further change might not change the modification time.
    """
    if time.time_ns() - int(np.max(index.watched_mtime, initial=0)) < _MTIME_RESOLUTION:
        return
    classes = KeyTable.of(index.classes)
    target = cache_file(path)
    try:
        target = writable_cache(target.parent) / target.name
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several ranks may write at once
            temporary = Path(folder) / target.name
            np.savez(
                temporary,
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
                ignored=np.frombuffer(json.dumps(index.ignored).encode(), dtype=np.uint8),
            )
            publish(temporary, target)
    except OSError as error:
        _log.warning("%s is indexed at every start: its index is not cached: %s", path, describe_os_error(error))
