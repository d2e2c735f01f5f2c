"""Plain files as a source: a folder of images or a text list of them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage.cache import load_index, save_index
from pipelines.storage.index import IMAGE_EXTENSIONS, FileIndex
from pipelines.storage.listing import index_list
from pipelines.storage.random_access import RandomAccessFile, most_at_once
from pipelines.storage.scan import scan_folder
from pipelines.storage.source import fingerprint
from pipelines.storage.together import read_files, will_read_files

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
