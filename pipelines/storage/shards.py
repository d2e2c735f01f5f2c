"""Tar shards with an index as a source: any image at any time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.batch_read import RandomAccessFile, make_room, most_open_files, read_parts
from pipelines.storage.manifest import HEAD_BYTES, INDEX, INDEX_DTYPE, KEYS, MANIFEST, Manifest, Shard, is_ours
from pipelines.storage.source import KeyTable

_CHUNK = 1 << 22  # bytes hashed at a time


class ShardSource:
    """Images in tar shards. Meets the `Source` contract.

    What is checked: at open, the format version, the checksums of the index, and of every shard that it is there, its
    size and its first 4 KiB (the shard's once more when it is opened for its first image); at `read`, that the shard
    has not become shorter. `verify` reads everything. Replacing or deleting an open shard is safe: the old file is
    still read. One cut short in place is named by the next `read`.
    """

    def __init__(self, folder: Path) -> None:
        """Open the converted data in `folder`.

        Raises:
            InputError: unfinished, another version, a file missing, cut short, swapped or damaged, or more shards
                than files may be open.
            OSError: a file cannot be read.
        """
        self.location = folder
        self.manifest = Manifest.load(folder)
        self.classes = self.manifest.classes
        self.fingerprint = self.manifest.fingerprint
        rows = self._load_checked(INDEX)  # [len]
        blob: npt.NDArray[np.uint8] = self._load_checked(KEYS)
        if rows.dtype != INDEX_DTYPE or rows.shape != (self.manifest.count,):
            raise _damaged(folder / INDEX, f"has {rows.dtype} {rows.shape} for {self.manifest.count} images")
        most = most_open_files()
        if most is not None and len(self.manifest.shards) > most:
            raise InputError(
                f"{folder} has {len(self.manifest.shards)} shards but this process may keep only {most} of them open: "
                "raise the hard limit on open files (ulimit -Hn), or convert again with a larger --shard-size."
            )
        for shard in self.manifest.shards:
            _open_checked(folder / shard.name, shard)
        self._shard = rows["shard"]
        self._offset = rows["offset"]
        self._keys = KeyTable(blob=blob, ends=rows["key_end"])
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
            InputError: the shard has become shorter since it was opened, or is not there or another one when it is
                needed first.
            OSError: it cannot be opened or read.
        """
        number = int(self._shard[index])
        # No lock: two threads that open the same shard at once do no harm, and a lock would not survive a fork.
        file = self._files[number] or self._open(number)
        data = file.read(offset=int(self._offset[index]), size=int(self.nbytes[index]))
        if data is None:
            shard, left = self.manifest.shards[number], file.nbytes
            raise _damaged(self.location / shard.name, f"was cut short to {left} of {shard.bytes} bytes")
        return data

    def read_together(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """Encoded images; None for those that `read` has to be asked for. Raises as `read`."""
        index = np.asarray(indices, dtype=np.int64)
        numbers = self._shard[index].tolist()
        files = {number: self._files[number] or self._open(number) for number in dict.fromkeys(numbers)}
        return read_parts([files[number].descriptor for number in numbers], self._offset[index], self.nbytes[index])

    def will_need(self, indices: Sequence[int]) -> None:
        """Let the operating system begin to read images into memory: what lies side by side in one piece."""
        index = np.asarray(indices, dtype=np.int64)
        for number in dict.fromkeys(self._shard[index].tolist()):
            here = index[self._shard[index] == number]
            file = self._files[number] or self._open(number)
            file.will_read(self._offset[here], self.nbytes[here])

    def key(self, index: int) -> str:
        """Stem of the tar member, e.g. ``n01440764/n01440764_10026``."""
        return self._keys[index]

    def close(self) -> None:
        """Let go of the open shards, which threads that read may still end with. Reading opens them again."""
        self._files = [None] * len(self._files)

    def verify(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Read every shard and compare checksums.

        Args:
            progress: called with the number of bytes read so far.

        Raises:
            InputError: a shard's bytes are not those that were converted; it is named.
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
                raise _damaged(self.location / shard.name, "does not have the checksum in the manifest")

    def _open(self, number: int) -> RandomAccessFile:
        shard = self.manifest.shards[number]
        file = _open_checked(self.location / shard.name, shard)
        make_room(file.descriptor)
        self._files[number] = file
        return file

    def _load_checked(self, name: str) -> npt.NDArray[Any]:
        path = self.location / name
        try:
            content = path.read_bytes()  # not mapped, for the same reason as the images
            array = np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
        except (ValueError, EOFError):
            raise _damaged(path, "cannot be read as an array") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.sha256.get(name):
            raise _damaged(path, f"does not have the checksum in {MANIFEST}")
        return array


def _open_checked(path: Path, shard: Shard) -> RandomAccessFile:
    """Open a shard whose size and first bytes are those that were converted."""
    try:
        file = RandomAccessFile(path)
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    if file.nbytes != shard.bytes:
        raise _damaged(path, f"has {file.nbytes} bytes but must have {shard.bytes}")
    head = file.read(offset=0, size=min(HEAD_BYTES, shard.bytes))
    if head is None or hashlib.sha256(head.data).hexdigest() != shard.head:
        raise _damaged(path, "has other contents than the manifest says (swapped with another shard?)")
    return file


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}: restore it from where it was copied, or convert again with --overwrite.")


def claims(path: Path) -> bool:
    """A folder with converted data, or with a conversion in progress."""
    return path.is_dir() and is_ours(path)


def open(path: Path, *, progress: Callable[[int], None] | None = None) -> ShardSource:
    """Open converted data; see `ShardSource`. `progress` is not used: opening reads the index only."""
    del progress
    return ShardSource(path)
