"""Converted data as one .beton file with our index in it.

Write a .beton file part by part, without FFCV, so that stock FFCV reads it.

What FFCV can hold: JPEG files that its decoder turns into RGB, or plain pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.conversion.destination import Destination, naming, rename_into_place, temporary_name
from pipelines.conversion.shard_state import Origin, Part, finish, load_part, write_lists
from pipelines.conversion.verify import QUALITY, Checked, as_jpeg
from pipelines.decode.pillow import decode_one
from pipelines.runtime import InputError
from pipelines.storage.beton import BetonSource
from pipelines.storage.beton_format import (
    ALLOCATION,
    BETON,
    FIELD,
    HEADER,
    IMAGE_KIND,
    INTEGER_KIND,
    JPEG,
    RAW,
    VERSION,
    BetonIndex,
    pack_index,
    pack_pointer,
    record_dtype,
)
from pipelines.storage.manifest import BETON_FORMAT, Shard
from pipelines.storage.source import KeyTable

PIXELS = "rgb"  # extension of an image stored as pixels
_MOST = 0xFFFF  # of a side: the format has 16 bits for it


def stored_size(outcome: Checked) -> tuple[int, int]:
    """(height, width) of the data as FFCV decodes it, which does not apply an EXIF orientation."""
    if outcome.extension == PIXELS:
        return outcome.height, outcome.width
    with Image.open(io.BytesIO(outcome.data.data), formats=("JPEG", "MPO")) as image:
        return image.height, image.width


def suit_ffcv(outcome: Checked, *, page: int, quality: int | None) -> Checked:
    """The image as a .beton file can hold it, in at most `page` bytes.

    A JPEG of gray or RGB passes through. Anything else is stored as upright RGB pixels, which loses nothing, and as a
    JPEG where they are too many for a page (which is put down as a warning). An image that does not fit a page even so
    is bad.

    Args:
        outcome: of the check; may be bad.
        page: bytes.
        quality: of that JPEG; None takes `QUALITY`.
    """
    if outcome.bad:
        return outcome
    if outcome.extension == "jpg" and _is_gray_or_rgb(outcome):
        fits = outcome.data.nbytes <= page
        return outcome if fits else Checked(bad=_too_large(outcome.data.nbytes, page))
    pixels = decode_one(outcome.data)
    if isinstance(pixels, str):  # what was decoded a moment ago
        return Checked(bad=pixels)
    if pixels.nbytes <= page and max(pixels.shape) <= _MOST:
        return dataclasses.replace(outcome, data=np.ascontiguousarray(pixels).reshape(-1), extension=PIXELS)
    quality = quality or QUALITY
    note = f"its pixels do not fit a page of the .beton file: stored as JPEG of quality {quality}"
    encoded = as_jpeg(pixels, quality=quality, warned="; ".join(filter(None, (outcome.warned, note))))
    return encoded if encoded.data.nbytes <= page else Checked(bad=_too_large(encoded.data.nbytes, page))


def _is_gray_or_rgb(outcome: Checked) -> bool:
    with Image.open(io.BytesIO(outcome.data.data), formats=("JPEG", "MPO")) as image:
        return image.mode in ("L", "RGB")


def _too_large(nbytes: int, page: int) -> str:
    return f"its {nbytes} bytes are more than the {page} of a page of the .beton file: make it smaller with --max-size"


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


class BetonForm:
    """Each part is a stretch of the one file, behind the part before it. Meets the `Form` contract."""

    def __init__(
        self, destination: Destination, origin: Origin, *, capacity: int, page: int, quality: int | None
    ) -> None:
        """Leave room for the records of `capacity` images; `page` bytes are the most of one image."""
        self._destination = destination
        self._origin = origin
        self._start = first_page(capacity, page=page)
        self._page = page
        self._quality = quality
        self._temporary = temporary_name(destination.beton)

    def load(self, count: int) -> list[Part | None]:
        """Finished parts from the first on, up to one that is missing or that the file is too short for."""
        size = self._temporary.stat().st_size if self._temporary.is_file() else 0
        found: list[Part | None] = [None] * count
        for number in range(count):
            part = load_part(self._destination.part(number))
            if part is None or (part.shard is not None and part.shard.bytes > size):
                break
            found[number] = part
        return found

    def suit(self, outcome: Checked) -> Checked:
        """A JPEG of gray or RGB as it is, anything else as pixels; see `suit_ffcv`."""
        return suit_ffcv(outcome, page=self._page, quality=self._quality)

    def writer(self, number: int, before: Sequence[Part | None]) -> BetonWriter:
        """A stretch behind the parts before."""
        del number
        finished = [part for part in before if part is not None]
        count = sum(len(part.rows) for part in finished)
        return BetonWriter(self._temporary, start=self._end(finished), count=count, page=self._page)

    def join(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Read everything back, write index and header, check the whole file, and give it its name."""
        write_lists(self._destination, parts, self._origin)
        for part in parts:
            if part.shard is not None and not check_written(self._temporary, part.rows, part.shard):
                raise InputError(
                    f"{self._temporary} does not give back what was written to it: check the disk, and convert again "
                    "with --overwrite."
                )
        rows = np.concatenate([part.rows for part in parts])
        index = BetonIndex(
            keys=KeyTable.of(key for part in parts for key in part.keys),
            classes=self._origin.classes,
            sizes=np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64),
        )
        seal_beton(self._temporary, end=self._end(parts), page=self._page, nbytes=rows["size"].tolist(), index=index)
        written = BetonSource(self._temporary)
        if len(written) != len(rows) or not np.array_equal(written.labels, rows["label"]):
            raise InputError(f"{self._temporary} is not as it was written: check the disk, and convert again.")
        written.close()
        rename_into_place(self._destination.beton)
        return finish(self._destination, parts, self._origin, form=BETON_FORMAT)

    def describe(self, manifest: dict[str, Any]) -> str:
        """The file's name."""
        return f"in {BETON}"

    def _end(self, parts: Sequence[Part]) -> int:
        """Where the data of these parts ends."""
        return max((part.shard.bytes for part in parts if part.shard is not None), default=self._start)
