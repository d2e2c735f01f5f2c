"""Bytes by offset, of plain files and of compressed ones, which are unpacked as they are read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import threading
import zlib
from collections import deque
from pathlib import Path
from typing import IO, Any, Protocol, cast

from pipelines.files import decode_text, open_regular
from pipelines.runtime import InputError
from pipelines.storage.forms.look import HEAD, File
from pipelines.storage.remote_objects import RemoteObject

_CHUNK = 1 << 20  # bytes unpacked at a time
_SMALL, _LARGEST_RATIO = 1 << 28, 100
"""Bytes that a file may always unpack to, and times its packed bytes: images hardly get smaller."""
_WINDOW = 1 << 26  # bytes kept behind what was read last; more if readers go back further
_PACKED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}


class Blob(Protocol):
    """Bytes by offset; callable from several threads."""

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer at the end.

        Raises:
            OSError: they cannot be read.
            InputError: the compressed data are damaged.
        """

    def close(self) -> None:
        """Close the file."""


class FileBlob:
    """A file as it is, on a disk or at a URL. Implements `Blob`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = None if isinstance(path, RemoteObject) else open_regular(path)

    def read(self, size: int, offset: int) -> bytes:
        """See `Blob`."""
        if self._file is None:
            assert isinstance(self.path, RemoteObject)
            return self.path.read_at(offset, size)
        data = os.pread(self._file.fileno(), size, offset)
        while 0 < len(data) < size:  # more than 2 GiB, or a signal
            more = os.pread(self._file.fileno(), size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """See `Blob`."""
        if isinstance(self.path, RemoteObject):
            self.path.release()
        if self._file is not None:
            self._file.close()


class PackedBlob:
    """A compressed file as if it were unpacked. Implements `Blob`.

    Reading goes forward; what lies up to a window behind costs nothing, and what lies further behind starts again.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        self._kind = kind
        self._lock = threading.Lock()
        self._window = _WINDOW
        self._file: IO[bytes] | None = None
        self._chunks: deque[bytes] = deque()
        self._start = self._end = self._most = 0  # of the chunks; bytes that the file may unpack to

    def read(self, size: int, offset: int) -> bytes:
        """See `Blob`."""
        with self._lock:
            if self._file is None or offset < self._start:
                if self._file is not None and self._start - offset <= self._window:
                    self._window *= 2  # readers are further apart than it holds
                self._restart()
            while self._end < offset + size:
                chunk = self._next()
                if not chunk:
                    break
                self._chunks.append(chunk)
                self._end += len(chunk)
                while self._end - self._start > self._window and self._start + len(self._chunks[0]) <= offset:
                    self._start += len(self._chunks.popleft())
            return self._cut(offset, min(offset + size, self._end))

    def _cut(self, first: int, last: int) -> bytes:
        pieces, at = [], self._start
        for chunk in self._chunks:
            if at + len(chunk) > first and at < last:
                pieces.append(chunk[max(0, first - at) : last - at])
            at += len(chunk)
            if at >= last:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _restart(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = open_packed(self._path, self._kind)
        self._chunks.clear()
        self._start = self._end = 0
        self._most = largest_unpacked(self._path.stat().st_size)

    def _next(self) -> bytes:
        assert self._file is not None
        if self._end > self._most:
            raise damaged(self._path, f"it unpacks to more than {self._most:,} bytes")
        try:
            return self._file.read(_CHUNK)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
            raise damaged(self._path, str(error)) from None
        except OSError as error:
            if error.errno is None:  # bz2 has no error of its own
                raise damaged(self._path, str(error)) from None
            raise

    def close(self) -> None:
        """See `Blob`."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._chunks.clear()
        if isinstance(self._path, RemoteObject):
            self._path.release()


def damaged(path: Path, why: str) -> InputError:
    """The error for a file that cannot be unpacked."""
    return InputError(f"{path} is truncated or damaged ({why.rstrip('. ')}): download it again.")


def text_of(path: Path, data: bytes) -> str:
    """Text of a small file, as `decode_text`; InputError if it is damaged."""
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise damaged(path, f"it has a text that is no {error.encoding.upper()}") from None


def largest_unpacked(size: int) -> int:
    """Bytes that packed data of so many bytes may unpack to; what is beyond is a bomb."""
    return max(_SMALL, _LARGEST_RATIO * size)


def gunzip(data: bytes) -> bytes:
    """The content of a .gz file in memory; ValueError if it is damaged, or unpacks to far more than it is."""
    unpacker, most = zlib.decompressobj(31), largest_unpacked(len(data))
    try:
        content = unpacker.decompress(data, most)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not unpacker.eof:
        raise ValueError(f"it is cut short, or unpacks to more than {most:,} bytes")
    return content


def packing(file: File) -> str:
    """How a file is compressed: "gz", "bz2", "xz", "zst", or ""."""
    return next((kind for magic, kind in _PACKED.items() if file.head.startswith(magic)), "")


def open_packed(path: Path, kind: str) -> IO[bytes]:
    """The unpacked bytes of a file, in order."""
    if kind == "zst":
        raise InputError(f"{path} is compressed with zstd, which cannot be read in place: unpack it with zstd -d.")
    opener: Any = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind]
    return cast(IO[bytes], opener(path.reader() if isinstance(path, RemoteObject) else path, "rb"))


def open_blob(file: File) -> FileBlob | PackedBlob:
    """The bytes of a file, unpacked if it is compressed."""
    kind = packing(file)
    return PackedBlob(file.path, kind) if kind else FileBlob(file.path)


def unpacked_head(file: File) -> bytes:
    """The first bytes of a file, unpacked if it is compressed; b"" if they cannot be unpacked."""
    kind = packing(file)
    if not kind or kind == "zst":
        return file.head
    try:
        with open_packed(file.path, kind) as opened:
            return opened.read(HEAD)
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError):
        return b""
