"""FFCV's .beton files as a source, read without FFCV: any image at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage.batch_read import RandomAccessFile, make_room, read_parts
from pipelines.storage.beton_format import BETON, RAW, class_labels, damaged, is_beton_name, load_index, read_layout
from pipelines.storage.manifest import BETON_FORMAT, format_of
from pipelines.storage.source import KeyTable, fingerprint


class BetonSource:
    """Images in a .beton file, of mvssl-convert or of FFCV's own writer. Meets the `Source` contract.

    JPEG samples are the bytes as they lie in the file. Samples of pixels get a PPM header in front, which every decoder
    takes. What is checked: at open, that the file is whole (see `read_layout`) and the checksum of our index; at
    `read`, that the file has not become shorter. Replacing or deleting the open file is safe: the old one is still
    read. FFCV's own files hold neither keys nor class names: keys are sample numbers, classes are labels.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at `path`.

        Raises:
            InputError: half-written, cut short, damaged, of another version, or without images.
            OSError: the file cannot be read.
        """
        self.location = path
        layout = read_layout(path)
        index = load_index(path, layout)
        count = len(layout.images)
        numbers = np.full(count, -1, dtype=np.int64) if layout.numbers is None else layout.numbers
        if index is None:
            self._keys = KeyTable.of(f"{n:09d}" for n in range(count))
            self.classes = class_labels(path, numbers)
            sizes = np.stack([layout.images["height"], layout.images["width"]], axis=1).astype(np.int64)
        else:
            self._keys, self.classes, sizes = index.keys, index.classes, index.sizes
            if len(index.keys) != count or len(sizes) != count:
                raise damaged(path, f"has keys for {len(index.keys)} of {count} images")
            if not -1 <= int(np.min(numbers)) <= int(np.max(numbers)) < len(index.classes):
                raise damaged(path, f"has labels that are not among its {len(index.classes)} classes")
        self.labels = numbers
        self.nbytes = layout.nbytes
        self.sizes = sizes
        """int64 [len, 2]: (height, width) of each image in pixels; EXIF orientation applied where we converted."""
        self.fingerprint = fingerprint(self._keys, labels=self.labels, nbytes=self.nbytes, classes=self.classes)
        self._bytes, self._head = layout.file_bytes, layout.head
        self._offset = layout.images["pointer"].astype(np.int64)
        self._images = layout.images
        self._file: RandomAccessFile | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: read-only uint8 [bytes]: a JPEG's bytes, or pixels as a PPM file.

        Raises:
            InputError: the file has become shorter since it was opened, or is not there or another one when the first
                image is read.
            OSError: it cannot be opened or read.
        """
        # No lock: two threads that open the file at once do no harm, and a lock would not survive a fork.
        file = self._file or self._open()
        data = file.read(offset=int(self._offset[index]), size=int(self.nbytes[index]), head=self._head_of(index))
        if data is None:
            left = file.nbytes
            raise damaged(self.location, f"was cut short to {left} of {self._bytes} bytes")
        return data

    def read_together(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded images; None for those that `read` has to be asked for. Raises as `read`."""
        index = np.asarray(indices, dtype=np.int64)
        file = self._file or self._open()
        raw = (self._images["mode"][index] == RAW).any()
        heads = [self._head_of(n) for n in indices] if raw else []
        return read_parts([file.descriptor] * len(index), self._offset[index], self.nbytes[index], heads=heads)

    def will_need(self, indices: Sequence[int]) -> None:
        """Let the operating system begin to read images into memory: what lies side by side in one piece."""
        index = np.asarray(indices, dtype=np.int64)
        file = self._file or self._open()
        file.will_read(self._offset[index], self.nbytes[index])

    def key(self, index: int) -> str:
        """The key that mvssl-convert gave, or the sample's number in FFCV's own files."""
        return self._keys[index]

    def close(self) -> None:
        """Let go of the open file, which threads that read may still end with. Reading opens it again."""
        self._file = None

    def _head_of(self, index: int) -> bytes:
        """What makes pixels a PPM file."""
        image = self._images[index]
        return b"" if image["mode"] != RAW else f"P6\n{image['width']} {image['height']}\n255\n".encode()

    def _open(self) -> RandomAccessFile:
        try:
            file = RandomAccessFile(self.location)
        except FileNotFoundError:
            raise damaged(self.location, "is missing") from None
        head = file.read(offset=0, size=len(self._head))
        if file.nbytes != self._bytes or head is None or head.tobytes() != self._head:
            raise damaged(self.location, "is no longer the file that was opened")
        make_room(file.descriptor)
        self._file = file
        return file


def claims(path: Path) -> bool:
    """A file named .beton, or a folder that mvssl-convert filled with one."""
    if path.is_dir():
        return (path / BETON).is_file() or format_of(path) == BETON_FORMAT
    return path.is_file() and is_beton_name(path)


def open(path: Path, *, progress: Callable[[int], None] | None = None) -> BetonSource:
    """Open the file, or the one in the folder; see `BetonSource`. `progress` is not used: only an index is read."""
    del progress
    where = path / BETON if path.is_dir() else path
    if not where.exists():
        raise damaged(where, "is missing")
    return BetonSource(where)
