"""FFCV's .beton files as a source, read without FFCV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.names import utf8
from pipelines.storage.batch_read import RandomAccessFile, raise_file_limit, read_ranges
from pipelines.storage.beton_format import (
    BETON,
    RAW,
    class_labels,
    damaged,
    is_beton_name,
    load_index,
    ppm_header,
    read_layout,
)
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.manifest import BETON_FORMAT, Manifest, format_of
from pipelines.storage.source import KeyTable, fingerprint


def can_open(path: Path) -> bool:
    """A file named .beton, or a folder written by mvssl-convert --format beton."""
    if path.is_dir():
        return (path / BETON).is_file() or format_of(path) == BETON_FORMAT
    return path.is_file() and is_beton_name(path)


def open_path(path: Path, *, progress: Callable[[int], None] | None = None) -> BetonSource:
    """Open the file, or the one in the folder; `progress` is not used."""
    del progress
    file = path / BETON if path.is_dir() else path
    if not file.exists():
        raise damaged(file, "is missing")
    source = BetonSource(file)
    if path.is_dir() and format_of(path) == BETON_FORMAT:
        manifest = Manifest.load(path, formats=(BETON_FORMAT,))
        if manifest.fingerprint == source.fingerprint:
            source.facts = ImageFacts.of(len(source), damage=manifest.damage, checksums=source.facts.checksums)
    return source


class BetonSource:
    """Images in a .beton file, written by mvssl-convert or by FFCV. Implements `Source`.

    JPEG samples are the bytes in the file. Samples of raw pixels get a PPM header in front, which every decoder reads.
    Opening checks that the file is complete (see `read_layout`) and the checksum of our index; `read` checks that it
    was not truncated since. An open file may be replaced or deleted: the old one is still read. FFCV's own files have
    neither keys nor class names: keys are sample numbers, class names are the labels.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at `path`; raises InputError if it is incomplete, damaged, or of another version."""
        self.location = path
        layout = read_layout(path)
        index = load_index(path, layout)
        count = len(layout.images)
        self.labels = np.full(count, -1, dtype=np.int64) if layout.labels is None else layout.labels
        if index is None:
            self._keys = KeyTable.of(f"{n:09d}" for n in range(count))
            self.classes = class_labels(path, self.labels)
            sizes = np.stack([layout.images["height"], layout.images["width"]], axis=1).astype(np.int64)
        else:
            self._keys, self.classes, sizes = index.keys, index.classes, index.sizes
            if len(index.keys) != count or len(sizes) != count:
                raise damaged(path, f"has keys for {len(index.keys)} of {count} images")
            if not -1 <= int(np.min(self.labels)) <= int(np.max(self.labels)) < len(index.classes):
                raise damaged(path, f"has labels that are not among its {len(index.classes)} classes")
        self.nbytes = layout.nbytes
        self.facts = ImageFacts.of(count, checksums=None if index is None else index.checksums)
        self.sizes = sizes
        """int64 [len, 2]: (height, width) of each image in pixels; EXIF orientation applied in our own files."""
        self.fingerprint = fingerprint(self._keys, labels=self.labels, nbytes=self.nbytes, classes=self.classes)
        self.classes = tuple(map(utf8, self.classes))
        self._file_bytes, self._head = layout.file_bytes, layout.head
        self._offset = layout.images["pointer"].astype(np.int64)
        self._images = layout.images
        self._opened: RandomAccessFile | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: read-only uint8 [bytes], a JPEG file or a PPM file.

        Raises:
            InputError: the file was truncated since it was opened, or is missing or replaced when first needed.
            OSError: it cannot be opened or read.
        """
        file = self._file()
        data = file.read(offset=int(self._offset[index]), size=int(self.nbytes[index]), head=self._ppm_header(index))
        if data is None:
            raise damaged(self.location, f"was cut short to {file.nbytes} of {self._file_bytes} bytes")
        return data

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded images; see `ReadsBatches`. Raises as `read`."""
        index = np.asarray(indices, dtype=np.int64)
        raw = (self._images["mode"][index] == RAW).any()
        heads = [self._ppm_header(n) for n in indices] if raw else []
        file = self._file()
        return read_ranges([file.descriptor] * len(index), self._offset[index], self.nbytes[index], heads=heads)

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`; neighbouring images are one request."""
        index = np.asarray(indices, dtype=np.int64)
        self._file().will_need(self._offset[index], self.nbytes[index])

    def key(self, index: int) -> str:
        """The key given by mvssl-convert, or the sample number in FFCV's own files."""
        return utf8(self._keys[index])

    def close(self) -> None:
        """Release the open file; threads that are reading may finish. Reading opens it again."""
        self._opened = None

    def _ppm_header(self, index: int) -> bytes:
        """Header for raw pixels, b"" for a JPEG."""
        image = self._images[index]
        return b"" if image["mode"] != RAW else ppm_header(height=image["height"], width=image["width"])

    def _file(self) -> RandomAccessFile:
        # No lock: it is harmless if two threads open the file, and a lock would not survive a fork.
        if (opened := self._opened) is not None:
            return opened
        try:
            file = RandomAccessFile(self.location)
        except FileNotFoundError:
            raise damaged(self.location, "is missing") from None
        head = file.read(offset=0, size=len(self._head))
        if file.nbytes != self._file_bytes or head is None or head.tobytes() != self._head:
            raise damaged(self.location, "is no longer the file that was opened")
        raise_file_limit(file.descriptor)
        self._opened = file
        return file
