"""Write a .beton file part by part, without FFCV, so that stock FFCV reads it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage.beton_format import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE_KIND,
    INTEGER_KIND,
    JPEG,
    RAW,
    VERSION,
    record_dtype,
)
from pipelines.storage.beton_index import BetonIndex, pack_index, pack_pointer
from pipelines.storage.manifest import Shard
from tools.conversion.beton_samples import PIXELS, stored_size
from tools.conversion.files import naming
from tools.conversion.verify import Checked

_BUFFER = 1 << 22
_RECORD = record_dtype((IMAGE_KIND, INTEGER_KIND))
_HEAD_BYTES = HEADER.itemsize + 2 * FIELD.itemsize


def first_page(capacity: int, *, page: int) -> int:
    """Where data begins in a file with room for the records of `capacity` images."""
    return -(-(_HEAD_BYTES + capacity * _RECORD.itemsize) // page) * page


class BetonWriter:
    """One stretch of the temporary file. It has no header before `seal_beton`: nothing takes it for a whole one."""

    def __init__(self, path: Path, *, start: int, count: int, page: int) -> None:
        """Go on at byte `start` (whatever lies behind is cut off) of a file with `count` images."""
        self._path = path
        self._page = page
        self._position = start
        self._count = count
        self._records: list[npt.NDArray[np.void]] = []
        self._digest = hashlib.sha256()
        path.touch()
        self._file = path.open("r+b", buffering=_BUFFER)
        with naming(path):
            self._file.truncate(start)
            self._file.seek(start)

    def add(self, key: str, outcome: Checked, *, label: int) -> int:
        """Append an image; `key` goes into the index, with those of all parts."""
        del key
        size = outcome.data.nbytes
        if self._position % self._page + size > self._page:  # an image lies within one page
            self._position += -self._position % self._page
        record = np.zeros((), _RECORD)
        record["f0"]["mode"] = RAW if outcome.extension == PIXELS else JPEG
        record["f0"]["height"], record["f0"]["width"] = stored_size(outcome)
        record["f0"]["pointer"] = offset = self._position
        record["f1"] = label
        with naming(self._path):
            self._file.seek(offset)
            self._file.write(outcome.data.data)
        self._digest.update(outcome.data.data)
        self._position += size
        self._records.append(record)
        return offset

    def finish(self) -> Shard:
        """Write the records and sync; `bytes` is where the next part goes on, `sha256` that of this part's images."""
        with naming(self._path):
            self._file.seek(_HEAD_BYTES + self._count * _RECORD.itemsize)
            self._file.write(b"".join(record.tobytes() for record in self._records))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return Shard(
            name=self._path.name,
            count=len(self._records),
            bytes=self._position,
            sha256=self._digest.hexdigest(),
            head="",
        )

    def discard(self) -> None:
        """Close the file; what this part has written is overwritten by the next attempt."""
        with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
            self._file.close()


def check_written(path: Path, rows: npt.NDArray[np.void], expected: Shard) -> bool:
    """Whether the images of a part (INDEX_DTYPE [count]) can be read back as they were written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
            file.seek(offset)
            digest.update(file.read(size))
    return digest.hexdigest() == expected.sha256


def seal_beton(path: Path, *, end: int, page: int, nbytes: Sequence[int], index: BetonIndex) -> None:
    """Write index, table of allocations and, when these are on the disk, the header: the file is whole.

    Args:
        path: the temporary file, with all records and data.
        end: of the data.
        page: bytes of a page.
        nbytes: size of each image's data.
        index: our own.
    """
    count = len(nbytes)
    packed = pack_index(index)
    at = end + -end % page  # FFCV reads whole pages
    table = at + len(packed)
    total = table + count * ALLOCATION.itemsize
    with naming(path), path.open("r+b") as file:
        file.truncate(at)
        file.seek(_HEAD_BYTES)
        records = np.frombuffer(file.read(count * _RECORD.itemsize), _RECORD)
        allocations = np.zeros(count, ALLOCATION)
        allocations["sample"] = np.arange(count)
        allocations["pointer"], allocations["size"] = records["f0"]["pointer"], nbytes
        file.seek(at)
        file.write(packed)
        file.write(allocations.tobytes())
        file.flush()
        os.fsync(file.fileno())
        header = np.zeros(1, HEADER)
        header["version"], header["fields"], header["page_size"] = VERSION, 2, page
        header["samples"], header["allocations"] = count, table
        fields = np.zeros(2, FIELD)
        fields["kind"], fields["name"] = (IMAGE_KIND, INTEGER_KIND), (b"image", b"label")
        fields["arguments"][0] = np.void(pack_pointer(packed, offset=at, file_bytes=total))
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes())
        file.flush()
        os.fsync(file.fileno())
