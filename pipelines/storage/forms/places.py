"""Files of a data set of known names: in a folder, compressed one by one, or in a tar or zip; and records in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runtime import InputError
from pipelines.storage.forms.base import unreadable
from pipelines.storage.forms.blobs import (
    Blob,
    FileBlob,
    PackedBlob,
    damaged,
    gunzip,
    open_blob,
    packing,
    unpacked_head,
)
from pipelines.storage.forms.look import File, Look
from pipelines.storage.forms.tar_reader import BLOCK, DamagedTarError, is_tar_header, tar_members
from pipelines.storage.forms.zip_reader import check_entry, read_whole, zip_entries

_ZIP = b"PK\3\4"
_CHUNK = 1 << 20


class BytesBlob:
    """Bytes in memory. Implements `Blob`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int, offset: int) -> bytes:
        """See `Blob`."""
        return self._data[offset : offset + size]

    def close(self) -> None:
        """See `Blob`."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a file is.

    Attributes:
        name: of the file, with the folders below what was given, without the ending of its compression.
        path: of the file or archive on disk, for messages.
        blob: holds it.
        offset: of its first byte.
        size: bytes.
    """

    name: str
    path: Path
    blob: Blob
    offset: int
    size: int

    @property
    def base(self) -> str:
        """The name without folders."""
        return self.name.rpartition("/")[2]

    def read(self, size: int | None = None, offset: int = 0) -> bytes:
        """Some bytes, or all of them; raises InputError if they are not there."""
        wanted = self.size - offset if size is None else size
        data = self.blob.read(wanted, self.offset + offset)
        if len(data) < wanted:
            raise damaged(self.path, f"{self.name} ends after {offset + len(data):,} bytes")
        return data

    def md5(self) -> str:
        """MD5 of the content, in hex digits: the checksum that publishers of data sets give."""
        digest = hashlib.md5(usedforsecurity=False)
        for at in range(0, self.size, _CHUNK):
            digest.update(self.read(min(_CHUNK, self.size - at), at))
        return digest.hexdigest()

    def whole(self, start: int, stride: int, what: str) -> int:
        """The number of records of `stride` bytes from `start` on; raises InputError if there is a part of one."""
        count, rest = divmod(self.size - start, stride)
        if rest or count < 1:
            raise InputError(
                f"{self.path}{'' if self.base in self.path.name else f' ({self.name})'} has {self.size:,} bytes, which "
                f"are no whole number of {what} of {stride:,} bytes: download it again."
            )
        return count


def find_places(look: Look, pattern: re.Pattern[str]) -> list[Place]:
    """The files whose name without folders (and without ``.gz``, ...) matches, in tars and zips too."""
    found: list[Place] = []
    texts = [(name, path) for name, path in look.texts.items() if pattern.fullmatch(name.rpartition("/")[2])]
    for name, path in texts:
        found.append(Place(name=name, path=path, blob=FileBlob(path), offset=0, size=path.stat().st_size))
    for file in look.files:
        if file.head.startswith(_ZIP):
            found.extend(_in_zip(file, pattern))
        elif is_tar_header((unpacked_head(file) if packing(file) else file.head)[:BLOCK]):
            found.extend(_in_tar(file, pattern))
        else:
            kind = packing(file)
            name = file.name.removesuffix(f".{kind}") if kind else file.name
            if pattern.fullmatch(name.rpartition("/")[2]):
                blob = open_blob(file)
                size = _length(blob) if isinstance(blob, PackedBlob) else file.size
                found.append(Place(name=name, path=file.path, blob=blob, offset=0, size=size))
    return found


def _length(blob: PackedBlob) -> int:
    """Bytes of an unpacked file; reads all of it, up to the checksum."""
    size = 0
    while data := blob.read(_CHUNK, size):
        size += len(data)
    return size


def _in_tar(file: File, pattern: re.Pattern[str]) -> list[Place]:
    blob = open_blob(file)
    found, end = [], 0
    try:
        for member in tar_members(blob.read, end=None if isinstance(blob, PackedBlob) else file.size):
            if pattern.fullmatch(member.name.rpartition("/")[2]) and not member.is_link:
                place = Place(name=member.name, path=file.path, blob=blob, offset=member.offset, size=member.size)
                found.append(place)
            end = member.offset + member.size
    except DamagedTarError as error:
        raise damaged(file.path, str(error)) from None
    if isinstance(blob, PackedBlob):
        while data := blob.read(_CHUNK, end):  # to the checksum
            end += len(data)
    return found


def _in_zip(file: File, pattern: re.Pattern[str]) -> list[Place]:
    blob, found = FileBlob(file.path), []
    for entry in zip_entries(file.path, blob):
        name = entry.name.removesuffix(".gz")
        if not pattern.fullmatch(name.rpartition("/")[2]):
            continue
        check_entry(file.path, entry)
        try:
            data = read_whole(file.path, blob, entry)
            if name != entry.name:
                data = gunzip(data)
        except (OSError, ValueError) as error:
            raise damaged(file.path, f"{entry.name[:200]}: {error}") from None
        found.append(Place(name=name, path=file.path, blob=BytesBlob(data), offset=0, size=len(data)))
    return found


def first_member(file: File) -> str:
    """The name of the first file in a tar, compressed or not; "" if it is none."""
    head = unpacked_head(file) if packing(file) else file.head
    if not is_tar_header(head[:BLOCK]):
        return ""
    blob = open_blob(file)
    try:
        return next((member.name for member in tar_members(blob.read, end=None)), "")
    except (DamagedTarError, InputError):
        return ""
    finally:
        blob.close()


class RecordReader:
    """Reads records of one size, such as pixels behind a label."""

    def __init__(
        self,
        places: list[tuple[Place, int]],
        *,
        start: int,
        stride: int,
        decode: Callable[[bytes], Any],
    ) -> None:
        """Read from several files.

        Args:
            places: files, and the number of records in each.
            start: byte of the first record.
            stride: bytes of a record.
            decode: pixels of a record.
        """
        self._places = places
        self._start, self._stride, self._decode = start, stride, decode

    def read(self, row: int) -> Any:
        """See `Reader`."""
        for place, count in self._places:
            if row < count:
                at = place.offset + self._start + row * self._stride
                data = place.blob.read(self._stride, at)
                if len(data) < self._stride:
                    raise unreadable("the file ends before it")
                return self._decode(data)
            row -= count
        raise IndexError(row)

    def close(self) -> None:
        """See `Reader`."""
        for place, _ in self._places:
            place.blob.close()


def check_published(place: Place, md5: str) -> None:
    """Compare a file that has as many images as the published one with its checksum.

    Raises:
        InputError: the checksum is another one.
    """
    found = place.md5()
    if found != md5:
        where = "" if place.base in place.path.name else f" ({place.name})"
        raise InputError(
            f"{place.path}{where} has the MD5 {found} but the published file of so many images has {md5}: download it "
            "again."
        )
