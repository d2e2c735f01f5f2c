"""Tar shards with an index as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.arrays import parse_npy
from pipelines.decode.limits import MOST_PIXELS
from pipelines.files import read_regular
from pipelines.names import utf8
from pipelines.runtime import InputError
from pipelines.storage.batch_read import RandomAccessFile, max_open_files, raise_file_limit, read_ranges
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.manifest import (
    CHECKSUMS,
    HEAD_BYTES,
    INDEX,
    INDEX_DTYPE,
    KEYS,
    MANIFEST,
    Manifest,
    Shard,
    is_converted,
)
from pipelines.storage.source import KeyTable

_CHUNK = 1 << 22  # bytes hashed at a time
_LARGEST_INDEX = 1 << 40  # bytes


def can_open(path: Path) -> bool:
    """A folder with converted data or an unfinished conversion."""
    return path.is_dir() and is_converted(path)


def open_path(path: Path, *, progress: Callable[[int], None] | None = None) -> ShardSource:
    """Open converted data; `progress` is not used."""
    del progress
    return ShardSource(path)


class ShardSource:
    """Images in tar shards. Implements `Source`.

    Opening checks the format version, the checksums of the index, and size and first 4 KiB of every shard. Opening a
    shard for its first image checks these again. `read` checks that the shard was not truncated. `verify` reads
    everything. An open shard may be replaced or deleted: the old file is still read.
    """

    def __init__(self, folder: Path) -> None:
        """Open converted data; raises InputError if it is unfinished, damaged, or of another version."""
        self.location = folder
        self.manifest = self._load_manifest()
        self.classes = tuple(map(utf8, self.manifest.classes))
        self.fingerprint = self.manifest.fingerprint
        rows = self._load_checked(INDEX)  # [len]
        if rows.dtype != INDEX_DTYPE or rows.shape != (self.manifest.count,):
            raise damaged(folder / INDEX, f"has {rows.dtype} {rows.shape} for {self.manifest.count} images")
        _check_rows(folder / INDEX, rows, self.manifest)
        self._keys = KeyTable(blob=self._load_checked(KEYS), ends=rows["key_end"])
        try:
            self._keys.check()
        except ValueError as error:
            raise damaged(folder / KEYS, f"does not fit the index ({error})") from error
        self.facts = ImageFacts.of(
            self.manifest.count,
            damage=self.manifest.damage,
            checksums=self._checksums(),
            value_range=self.manifest.value_range,
        )
        self._check_shards()
        self._shard = rows["shard"]
        self._offset = rows["offset"]
        self._files: list[RandomAccessFile | None] = [None] * len(self.manifest.shards)
        self.nbytes: npt.NDArray[np.int64] = rows["size"]
        self.labels: npt.NDArray[np.int64] = rows["label"].astype(np.int64)
        self.sizes: npt.NDArray[np.int64] = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
        """int64 [len, 2]: (height, width) of each image in pixels, EXIF orientation applied."""

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Encoded image: read-only uint8 [bytes].

        Raises:
            InputError: the shard was truncated since it was opened, or is missing or replaced when first needed.
            OSError: it cannot be opened or read.
        """
        number = int(self._shard[index])
        file = self._file(number)
        data = file.read(offset=int(self._offset[index]), size=int(self.nbytes[index]))
        if data is None:
            shard = self.manifest.shards[number]
            raise damaged(self.location / shard.name, f"was cut short to {file.nbytes} of {shard.bytes} bytes")
        return data

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded images; see `ReadsBatches`. Raises as `read`."""
        index = np.asarray(indices, dtype=np.int64)
        numbers = self._shard[index].tolist()
        files = {number: self._file(number) for number in dict.fromkeys(numbers)}
        return read_ranges([files[number].descriptor for number in numbers], self._offset[index], self.nbytes[index])

    def will_need(self, indices: Sequence[int]) -> None:
        """See `ReadsAhead`; neighbouring images are one request."""
        index = np.asarray(indices, dtype=np.int64)
        for number in dict.fromkeys(self._shard[index].tolist()):
            here = index[self._shard[index] == number]
            self._file(number).will_need(self._offset[here], self.nbytes[here])

    def key(self, index: int) -> str:
        """Stem of the tar member, e.g. ``n01440764/n01440764_10026``."""
        return utf8(self._keys[index])

    def close(self) -> None:
        """Release the open shards; threads that are reading may finish. Reading opens them again."""
        self._files = [None] * len(self._files)

    def verify(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Read every shard and compare checksums.

        Args:
            progress: called with the number of bytes read so far.
        """
        done = 0
        for shard in self.manifest.shards:
            digest = hashlib.sha256()
            with (self.location / shard.name).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done)
            if digest.hexdigest() != shard.sha256:
                raise damaged(self.location / shard.name, "does not have the checksum in the manifest")

    def _load_manifest(self) -> Manifest:
        return Manifest.load(self.location)

    def _check_shards(self) -> None:
        limit, shards = max_open_files(), self.manifest.shards
        if limit is not None and len(shards) > limit:
            raise InputError(
                f"{self.location} has {len(shards)} shards but this process may keep only {limit} of them open: "
                "raise the hard limit on open files (ulimit -Hn), or convert again with a larger --shard-size."
            )
        for shard in shards:
            _open_checked(self.location / shard.name, shard)

    def _content(self, name: str) -> bytes:
        """The content of one of the index files."""
        return read_regular(self.location / name, most=_LARGEST_INDEX)  # not mapped, see `batch_read`

    def _checksums(self) -> npt.NDArray[np.uint32] | None:
        """CRC-32 of each image, uint32 [len]; None in data converted by an earlier version."""
        if CHECKSUMS not in self.manifest.sha256:
            return None
        sums = self._load_checked(CHECKSUMS)
        if sums.dtype != np.uint32 or sums.shape != (self.manifest.count,):
            raise damaged(self.location / CHECKSUMS, f"has {sums.dtype} {sums.shape}")
        return sums

    def _file(self, number: int) -> RandomAccessFile:
        # No lock: it is harmless if two threads open the same shard, and a lock would not survive a fork.
        file = self._files[number]
        if file is None:
            shard = self.manifest.shards[number]
            file = _open_checked(self.location / shard.name, shard)
            raise_file_limit(file.descriptor)
            self._files[number] = file
        return file

    def _load_checked(self, name: str) -> npt.NDArray[Any]:
        path = self.location / name
        try:
            content = self._content(name)
            array = parse_npy(content)
        except FileNotFoundError:
            raise damaged(path, "is missing") from None
        except ValueError as error:
            raise damaged(path, f"cannot be read as an array ({error})") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.sha256.get(name):
            raise damaged(path, f"does not have the checksum in {MANIFEST}")
        return array


def _check_rows(path: Path, rows: npt.NDArray[np.void], manifest: Manifest) -> None:
    """Refuse an index that leads outside of the shards or classes; INDEX_DTYPE [len]."""
    sizes = np.array([shard.bytes for shard in manifest.shards] or [0], dtype=np.int64)
    shard = np.clip(rows["shard"], 0, len(sizes) - 1)
    allowed = {
        "shard": (rows["shard"] >= 0) & (rows["shard"] < len(manifest.shards)),
        "offset": (rows["offset"] >= 0) & (rows["offset"] <= sizes[shard]),
        "size": (rows["size"] > 0) & (rows["size"] <= sizes[shard] - np.minimum(rows["offset"], sizes[shard])),
        "height": (rows["height"] > 0) & (rows["height"] < MOST_PIXELS >> 2),
        "width": (rows["width"] > 0) & (rows["width"].astype(np.int64) * rows["height"] <= MOST_PIXELS),
        "label": (rows["label"] >= -1) & (rows["label"] < max(len(manifest.classes), 0)),
    }
    for name, good in allowed.items():
        if not good.all():
            entry = int(np.flatnonzero(~good)[0])
            raise damaged(path, f"has the {name} {rows[name][entry]} in entry {entry}")


def _open_checked(path: Path, shard: Shard) -> RandomAccessFile:
    """Open a shard if it has the size and the first bytes in the manifest."""
    try:
        file = RandomAccessFile(path)
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    if file.nbytes != shard.bytes:
        raise damaged(path, f"has {file.nbytes} bytes but must have {shard.bytes}")
    head = file.read(offset=0, size=min(HEAD_BYTES, shard.bytes))
    if head is None or hashlib.sha256(head.data).hexdigest() != shard.head:
        raise damaged(path, "has other contents than the manifest says (swapped with another shard?)")
    return file


def damaged(path: Path, problem: str) -> InputError:
    """The error of a damaged file of converted data."""
    return InputError(f"{path} {problem}: restore it from where it was copied, or convert again with --overwrite.")
