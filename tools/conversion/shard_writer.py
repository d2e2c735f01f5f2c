"""Write one standard tar file and know where each image lies in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path

from pipelines.storage.manifest import HEAD_BYTES, Shard
from tools.conversion.files import naming, rename_into_place, temporary_name
from tools.conversion.verify import Checked

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
