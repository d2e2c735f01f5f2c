"""Converted data as tar shards with an index.

Write one standard tar file and know where each image lies in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.conversion.destination import Destination, naming, rename_into_place, temporary_name, write_whole
from pipelines.conversion.shard_state import Origin, Part, finish, load_part, write_lists
from pipelines.conversion.verify import Checked
from pipelines.storage.manifest import FORMAT, HEAD_BYTES, INDEX, KEYS, Shard
from pipelines.storage.source import KeyTable

_BUFFER = 1 << 22


class ShardWriter:
    """A tar file under a temporary name; the same members give the same bytes on every machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_name(path)
        self._digest = hashlib.sha256()
        self._head = b""
        self._position = 0
        self._count = 0
        self._file = self._temporary.open("wb", buffering=_BUFFER)

    def add(self, key: str, outcome: Checked, *, label: int) -> int:
        """Append the image as ``<key>.<extension>`` and, unless `label` is -1, ``<key>.cls``.

        Returns:
            Byte offset of the image in the tar file.
        """
        offset = self._member(f"{key}.{outcome.extension}", outcome.data.tobytes())
        if label >= 0:
            self._member(f"{key}.cls", str(label).encode())
        self._count += 1
        return offset

    def finish(self) -> Shard:
        """Close the archive, sync it and give it its name."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._position + end) % tarfile.RECORDSIZE))
        with naming(self._temporary):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            rename_into_place(self._path)
        return Shard(
            name=self._path.name,
            count=self._count,
            bytes=self._position,
            sha256=self._digest.hexdigest(),
            head=hashlib.sha256(self._head).hexdigest(),
        )

    def discard(self) -> None:
        """Remove the unfinished file: on a full disk its space is needed."""
        with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _member(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mode = 0o644
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self._position
        self._write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, content: bytes) -> None:
        with naming(self._temporary):
            self._file.write(content)
        self._digest.update(content)
        self._position += len(content)
        if len(self._head) < HEAD_BYTES:
            self._head = (self._head + content)[:HEAD_BYTES]


class TarForm:
    """Each part is a shard of its own. Meets the `Form` contract."""

    def __init__(self, destination: Destination, origin: Origin) -> None:
        self._destination = destination
        self._origin = origin

    def load(self, count: int) -> list[Part | None]:
        """Parts whose shard is there in full."""
        return [self._load(number) for number in range(count)]

    def suit(self, outcome: Checked) -> Checked:
        """A tar file holds anything."""
        return outcome

    def writer(self, number: int, before: Sequence[Part | None]) -> ShardWriter:
        """A shard under a temporary name."""
        del before
        return ShardWriter(self._destination.shard(number))

    def join(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Write the index over all shards, and the manifest."""
        write_lists(self._destination, parts, self._origin)
        kept = [part for part in parts if part.shard is not None]
        rows = np.concatenate([part.rows for part in kept])
        keys = KeyTable.of(key for part in kept for key in part.keys)
        rows["shard"] = np.repeat(np.arange(len(kept)), [len(part.rows) for part in kept])
        rows["key_end"] = keys.ends
        sha256 = {}
        for name, array in ((INDEX, rows), (KEYS, keys.blob)):
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            write_whole(self._destination.folder / name, file.getvalue())
            sha256[name] = hashlib.sha256(file.getvalue()).hexdigest()
        shards = [part.shard for part in kept if part.shard is not None]
        return finish(self._destination, parts, self._origin, form=FORMAT, shards=shards, sha256=sha256)

    def describe(self, manifest: dict[str, Any]) -> str:
        """How many shards."""
        return f"in {len(manifest['shards'])} shard(s)"

    def _load(self, number: int) -> Part | None:
        part = load_part(self._destination.part(number))
        if part is None or part.shard is None:
            return part
        path = self._destination.folder / part.shard.name
        return part if path.is_file() and path.stat().st_size == part.shard.bytes else None
