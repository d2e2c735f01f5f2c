"""Writes tar shards, their index and their member names."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipelines.conversion.destination import Destination, unfinished
from pipelines.conversion.image_check import CheckedImage
from pipelines.conversion.shard_state import Merged, ShardState, merged_checksums
from pipelines.files import naming, publish, write_whole
from pipelines.storage.file_index import IMAGE_EXTENSIONS
from pipelines.storage.manifest import CHECKSUMS, FORMAT, HEAD_BYTES, INDEX, KEYS, Shard
from pipelines.storage.source import KeyTable

_BUFFER = 1 << 22


class TarFormat:
    """Tar shards. Implements `Format`."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination

    def load(self, count: int) -> list[ShardState | None]:
        """States of shards whose file has its full size."""
        return [self._load(number) for number in range(count)]

    def adapt(self, image: CheckedImage) -> CheckedImage:
        """The same image: a tar file stores any bytes."""
        return image

    def writer(self, number: int, before: Sequence[ShardState | None]) -> TarWriter:
        """A new tar file."""
        del before
        return TarWriter(self._destination.shard(number))

    def merge(self, states: Sequence[ShardState]) -> Merged:
        """Write the index of all shards."""
        states = [state for state in states if state.shard is not None]
        rows = np.concatenate([state.rows for state in states])
        keys = KeyTable.of(key for state in states for key in state.keys)
        rows["shard"] = np.repeat(np.arange(len(states)), [len(state.rows) for state in states])
        rows["key_end"] = keys.ends
        sha256 = {}
        arrays = {INDEX: rows, KEYS: keys.blob}
        sums = merged_checksums(states)
        if sums is not None:
            arrays[CHECKSUMS] = sums
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            write_whole(self._destination.folder / name, file.getvalue())
            sha256[name] = hashlib.sha256(file.getvalue()).hexdigest()
        shards = [state.shard for state in states if state.shard is not None]
        return Merged(format=FORMAT, shards=shards, sha256=sha256, summary=f"in {len(shards)} shard(s)")

    def _load(self, number: int) -> ShardState | None:
        state = ShardState.load(self._destination.state(number))
        if state is None or state.shard is None:
            return state
        path = self._destination.folder / state.shard.name
        return state if path.is_file() and path.stat().st_size == state.shard.bytes else None


class TarWriter:
    """Writes a tar file under a temporary name; the same members give the same bytes on every machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = unfinished(path)
        self._digest = hashlib.sha256()
        self._head = b""
        self._position = 0
        self._count = 0
        self._file = self._unfinished.open("wb", buffering=_BUFFER)

    def add(self, key: str, image: CheckedImage, *, label: int) -> int:
        """Append the image as ``<key>.<extension>`` and, unless `label` is -1, ``<key>.cls``; returns its offset."""
        offset = self._member(f"{key}.{image.extension}", image.data.tobytes())
        if label >= 0:
            self._member(f"{key}.cls", str(label).encode())
        self._count += 1
        return offset

    def finish(self) -> Shard:
        """Close the archive, sync it and rename it."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._position + end) % tarfile.RECORDSIZE))
        with naming(self._unfinished):
            self._file.close()
        publish(self._unfinished, self._path)
        return Shard(
            name=self._path.name,
            count=self._count,
            bytes=self._position,
            sha256=self._digest.hexdigest(),
            head=hashlib.sha256(self._head).hexdigest(),
        )

    def discard(self) -> None:
        """Remove the unfinished file, whose space a full disk needs."""
        with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
            self._file.close()
        with contextlib.suppress(OSError):
            self._unfinished.unlink()

    def _member(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mode = 0o644
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self._position
        self._write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, content: bytes) -> None:
        with naming(self._unfinished):
            self._file.write(content)
        self._digest.update(content)
        self._position += len(content)
        if len(self._head) < HEAD_BYTES:
            self._head = (self._head + content)[:HEAD_BYTES]


def member_keys(names: Iterable[str]) -> list[str]:
    """Stems of tar members for source keys (relative paths), in order: safe to unpack, unique, fit for WebDataset.

    The image extension, a leading ``/`` and ``..`` are dropped, dots in the last part become underscores (WebDataset
    cuts a name at its first dot), and a repeated stem gets ``_1``, ``_2``, ... appended.
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        stem = _stem(name)
        key, count = stem, 0
        while key in taken:
            count += 1
            key = f"{stem}_{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _stem(name: str) -> str:
    *folders, last = [part for part in name.split("/") if part not in ("", ".", "..")] or ["image"]
    extension = next((ending for ending in IMAGE_EXTENSIONS if last.lower().endswith(ending)), "")
    return "/".join([*folders, last[: len(last) - len(extension)].replace(".", "_") or "image"])
