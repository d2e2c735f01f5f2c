"""Plain files as a source: a folder of images or a text list of them.

Index a folder of images, nested or flat, with ``os.scandir`` on several threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.batch_read import RandomAccessFile, most_at_once, read_files, will_read_files
from pipelines.storage.file_index import IMAGE_EXTENSIONS, FileIndex, index_list, is_image_name, load_index, save_index
from pipelines.storage.source import KeyTable, fingerprint

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


_log = logging.getLogger("mvssl.data")
ASKED_LAST = True  # a converted form lies in a folder or file too: whoever knows it goes first


class FolderSource:
    """Images in files of their own. Meets the `Source` contract."""

    def __init__(self, index: FileIndex, *, location: Path) -> None:
        self._index = index
        self.location = location
        self.labels = index.labels
        self.classes = index.classes
        self.nbytes = index.nbytes
        self.fingerprint = fingerprint(index.keys, labels=index.labels, nbytes=index.nbytes, classes=index.classes)

    def __len__(self) -> int:
        return len(self._index.keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Whole file: uint8 [bytes]; empty for an empty file. Raises OSError if the file cannot be read."""
        return np.fromfile(self._path(index), dtype=np.uint8)

    def read_together(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Whole files; None for those that `read` has to be asked for."""
        return read_files([self._path(index) for index in indices], self.nbytes[np.asarray(indices, dtype=np.int64)])

    def will_need(self, indices: Sequence[int]) -> None:
        """Let the operating system begin to read files into memory."""
        paths = [self._path(index) for index in indices]
        nbytes, most = self.nbytes[np.asarray(indices, dtype=np.int64)], most_at_once(os.stat(self.location).st_dev)
        if will_read_files(paths, nbytes, most=most):
            return
        for path in paths:
            with contextlib.suppress(OSError):  # the other files may well be there
                file = RandomAccessFile(path)
                file.will_read([0], [file.nbytes])

    def key(self, index: int) -> str:
        """Path relative to the folder (or to the list's folder; absolute where the list says so)."""
        return self._index.keys[index]

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, index: int) -> str:
        return os.path.join(self._index.root, self._index.keys[index])


def claims(path: Path) -> bool:
    """Any folder, and any other file as a list."""
    return path.is_dir() or path.is_file()


def open(path: Path, *, progress: Callable[[int], None] | None = None, use_cache: bool = True) -> FolderSource:
    """Index (or take the cached index of) the folder or list at `path`.

    Args:
        path: a folder, or a text file that names images.
        progress: called with the number of images found so far, if indexing is needed.
        use_cache: read and write the cached index.

    Raises:
        InputError: no images there, or the list is wrong.
        OSError: a folder cannot be read.
    """
    index = load_index(path) if use_cache else None
    if index is None:
        index = (scan_folder if path.is_dir() else index_list)(path, progress=progress)
        if use_cache:
            save_index(path, index)
    if len(index.keys) == 0:
        wanted = ", ".join(IMAGE_EXTENSIONS)
        raise InputError(
            f"{path} holds no images: give a folder with files ending in {wanted} (at any depth), a text list of such "
            "files, or data converted with mvssl-convert."
        )
    if index.left_out:
        endings = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in index.left_out.items())
        _log.warning("%s: files that are no images by their ending are left out: %s", path, endings)
    return FolderSource(index, location=path)
