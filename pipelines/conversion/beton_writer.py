"""Writes a .beton file section by section, without FFCV, so that FFCV can read it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.conversion.destination import Destination, unfinished
from pipelines.conversion.image_check import QUALITY, CheckedImage, as_jpeg
from pipelines.conversion.shard_state import Merged, ShardState, merged_checksums
from pipelines.decode.pillow import decode_one
from pipelines.files import naming, publish
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
    ppm_header,
    record_dtype,
)
from pipelines.storage.manifest import BETON_FORMAT, Shard
from pipelines.storage.source import KeyTable

PIXELS = "rgb"  # extension of an image stored as pixels
_MAX_SIDE = 0xFFFF  # the format has 16 bits for it
_BUFFER = 1 << 22
_RECORD = record_dtype((IMAGE_KIND, INTEGER_KIND))
_HEAD_BYTES = HEADER.itemsize + 2 * FIELD.itemsize


class BetonFormat:
    """One .beton file; every shard is a section of it, after the previous one. Implements `Format`."""

    def __init__(
        self, destination: Destination, *, classes: tuple[str, ...], capacity: int, page: int, quality: int | None
    ) -> None:
        """Plan a file for up to `capacity` images of up to `page` bytes each; for `quality` see `adapt_to_ffcv`."""
        self._destination = destination
        self._classes = classes
        self._start = -(-(_HEAD_BYTES + capacity * _RECORD.itemsize) // page) * page  # of the data
        self._page = page
        self._quality = quality
        self._unfinished = unfinished(destination.beton)

    def load(self, count: int) -> list[ShardState | None]:
        """States from the first on, up to one that is missing or reaches beyond the file."""
        size = self._unfinished.stat().st_size if self._unfinished.is_file() else 0
        found: list[ShardState | None] = [None] * count
        for number in range(count):
            state = ShardState.load(self._destination.state(number))
            if state is None or (state.shard is not None and state.shard.bytes > size):
                break
            found[number] = state
        return found

    def adapt(self, image: CheckedImage) -> CheckedImage:
        """See `adapt_to_ffcv`."""
        return adapt_to_ffcv(image, page=self._page, quality=self._quality)

    def writer(self, number: int, before: Sequence[ShardState | None]) -> BetonWriter:
        """A section after those of `before`."""
        del number
        finished = [state for state in before if state is not None]
        count = sum(len(state.rows) for state in finished)
        return BetonWriter(self._unfinished, start=self._end(finished), count=count, page=self._page)

    def merge(self, states: Sequence[ShardState]) -> Merged:
        """Read everything back, write index and header, check the complete file, and rename it."""
        for state in states:
            if state.shard is not None and not reads_back(self._unfinished, state.rows, state.shard):
                raise InputError(
                    f"{self._unfinished} does not contain what was written to it: check the disk, and convert again "
                    "with --overwrite."
                )
        rows = np.concatenate([state.rows for state in states])
        index = BetonIndex(
            keys=KeyTable.of(key for state in states for key in state.keys),
            classes=self._classes,
            sizes=np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64),
            checksums=merged_checksums(states),
        )
        _complete(self._unfinished, end=self._end(states), page=self._page, nbytes=rows["size"].tolist(), index=index)
        written = BetonSource(self._unfinished)
        if len(written) != len(rows) or not np.array_equal(written.labels, rows["label"]):
            raise InputError(f"{self._unfinished} is not as it was written: check the disk, and convert again.")
        written.close()
        publish(self._unfinished, self._destination.beton)
        return Merged(format=BETON_FORMAT, summary=f"in {BETON}")

    def _end(self, states: Sequence[ShardState]) -> int:
        """End of these shards' data."""
        return max((state.shard.bytes for state in states if state.shard is not None), default=self._start)


class BetonWriter:
    """Writes one section of the file, which has no header before it is complete and so is not mistaken for one."""

    def __init__(self, path: Path, *, start: int, count: int, page: int) -> None:
        """Truncate a file of `count` images at byte `start` and append to it."""
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

    def add(self, key: str, image: CheckedImage, *, label: int) -> int:
        """Append an image and return its offset; its key goes into the index later."""
        del key
        size = image.data.nbytes
        if self._position % self._page + size > self._page:  # an image must not cross a page
            self._position += -self._position % self._page
        record = np.zeros((), _RECORD)
        record["f0"]["mode"] = RAW if image.extension == PIXELS else JPEG
        record["f0"]["height"], record["f0"]["width"] = _stored_size(image)
        record["f0"]["pointer"] = offset = self._position
        record["f1"] = label
        with naming(self._path):
            self._file.seek(offset)
            self._file.write(image.data.data)
        self._digest.update(image.data.data)
        self._position += size
        self._records.append(record)
        return offset

    def finish(self) -> Shard:
        """Write the records and sync; `bytes` is the end of the section, `sha256` that of its images."""
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
        """Close the file; the next attempt overwrites this section."""
        with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
            self._file.close()


def adapt_to_ffcv(image: CheckedImage, *, page: int, quality: int | None) -> CheckedImage:
    """The image as FFCV can decode it, in at most `page` bytes.

    A gray or RGB JPEG passes through. Any other image is stored as upright RGB pixels, without loss, or with a warning
    as JPEG if the pixels do not fit a page. An image that still does not fit is bad.

    Args:
        image: a checked image; may be bad.
        page: bytes.
        quality: of that JPEG; None for `QUALITY`.
    """
    if image.bad:
        return image
    if image.extension == "jpg" and _is_gray_or_rgb(image):
        return image if image.data.nbytes <= page else CheckedImage(bad=_too_large(image.data.nbytes, page))
    pixels = decode_one(image.data, value_range=image.value_range, limits=image.limits)
    if isinstance(pixels, str):
        return CheckedImage(bad=pixels)
    if pixels.nbytes <= page and max(pixels.shape) <= _MAX_SIDE:
        data, head = np.ascontiguousarray(pixels).reshape(-1), ppm_header(height=pixels.shape[0], width=pixels.shape[1])
        return dataclasses.replace(image, data=data, head=head, extension=PIXELS)
    quality = quality or QUALITY
    note = f"its pixels do not fit a page of the .beton file: stored as JPEG of quality {quality}"
    encoded = as_jpeg(pixels, quality=quality)
    if encoded.data.nbytes > page:
        return CheckedImage(bad=_too_large(encoded.data.nbytes, page))
    warned = "; ".join(filter(None, (image.warned, note)))
    return encoded if encoded.bad else dataclasses.replace(encoded, warned=warned, damage=image.damage)


def _is_gray_or_rgb(image: CheckedImage) -> bool:
    with Image.open(io.BytesIO(image.data.data), formats=("JPEG", "MPO")) as opened:
        return opened.mode in ("L", "RGB")


def _stored_size(image: CheckedImage) -> tuple[int, int]:
    """(height, width) as FFCV decodes it, which ignores the EXIF orientation."""
    if image.extension == PIXELS:
        return image.height, image.width
    with Image.open(io.BytesIO(image.data.data), formats=("JPEG", "MPO")) as opened:
        return opened.height, opened.width


def _too_large(nbytes: int, page: int) -> str:
    return f"its {nbytes} bytes are more than the {page} of a page of the .beton file: make it smaller with --max-size"


def reads_back(path: Path, rows: npt.NDArray[np.void], expected: Shard) -> bool:
    """Whether the images of a section (INDEX_DTYPE [count]) on disk have the checksum of those written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
            file.seek(offset)
            digest.update(file.read(size))
    return digest.hexdigest() == expected.sha256


def _complete(path: Path, *, end: int, page: int, nbytes: Sequence[int], index: BetonIndex) -> None:
    """Write index and allocation table and, once these are on disk, the header that makes the file valid.

    Args:
        path: the unfinished file, with all records and data.
        end: of the data.
        page: bytes of a page.
        nbytes: size of each image's data.
        index: our index.
    """
    count = len(nbytes)
    packed = pack_index(index)
    at = end + -end % page  # FFCV reads whole pages
    table = at + len(packed)
    with naming(path), path.open("r+b") as file:
        file.truncate(at)
        file.seek(_HEAD_BYTES)
        records = np.frombuffer(file.read(count * _RECORD.itemsize), _RECORD)
        allocations = np.zeros(count, ALLOCATION)
        allocations["sample"] = np.arange(count)
        allocations["pointer"], allocations["size"] = records["f0"]["pointer"], nbytes
        file.seek(at)
        file.write(packed + allocations.tobytes())
        file.flush()
        os.fsync(file.fileno())
        header = np.zeros(1, HEADER)
        header["version"], header["fields"], header["page_size"] = VERSION, 2, page
        header["samples"], header["allocations"] = count, table
        fields = np.zeros(2, FIELD)
        fields["kind"], fields["name"] = (IMAGE_KIND, INTEGER_KIND), (b"image", b"label")
        file_bytes = table + allocations.nbytes
        fields["arguments"][0] = np.void(pack_pointer(packed, offset=at, file_bytes=file_bytes))
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes())
