"""Lists the files of a zip that may come from anybody: every number in it is checked before it is used.

Python's zipfile keeps an object of about a kilobyte for each member and reads what their sizes say.
"""

from __future__ import annotations

import bz2
import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipelines.runtime import InputError
from pipelines.storage.forms.base import unreadable
from pipelines.storage.forms.blobs import FileBlob, largest_unpacked

_END, _ENTRY, _LOCAL = struct.Struct("<4s4H2LH"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_LOCATOR, _END64 = struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_LONGEST_COMMENT = 1 << 16
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_METHODS = {1: "shrink", 6: "implode", 9: "Deflate64", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd", 99: "AES"}
_ENCRYPTED, _UTF8 = 1, 1 << 11
_FULL, _FULL16 = 0xFFFFFFFF, 0xFFFF
_MOST_LISTING = 1 << 33  # bytes of the central directory


class Entry(NamedTuple):
    """A file in a zip."""

    name: str
    offset: int
    stored: int
    size: int
    crc: int
    method: int
    encrypted: bool


def zip_entries(path: Path, blob: FileBlob) -> Iterator[Entry]:
    """The files of a zip, without its folders.

    Raises:
        InputError: it is truncated or damaged, or its numbers lie.
    """
    size = path.stat().st_size
    count, length, start, shift = _directory(path, blob, size)
    data, at, seen = memoryview(blob.read(length, start)), 0, 0
    if len(data) < length:
        raise _damaged(path, "its list of files is cut short")
    while at < length:
        if length - at < _ENTRY.size or bytes(data[at : at + 4]) != b"PK\1\2":
            raise _damaged(path, f"its list of files is damaged at byte {start + at}")
        fields = _ENTRY.unpack_from(data, at)
        flags, method, crc, stored, full = fields[3], fields[4], fields[7], fields[8], fields[9]
        lengths = fields[10:13]
        at += _ENTRY.size
        raw = bytes(data[at : at + lengths[0]])
        extra = bytes(data[at + lengths[0] : at + lengths[0] + lengths[1]])
        at += sum(lengths)
        if at > length:
            raise _damaged(path, "the name of a file is longer than its list of files")
        full, stored, offset = _large(path, extra, [full, stored, fields[16]])
        seen += 1
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437", "surrogateescape" if flags & _UTF8 else "strict")
        if offset + shift + _LOCAL.size + stored > start:
            raise _damaged(path, f"{name[:200]!r} lies beyond its end")
        if not name.endswith("/"):
            yield Entry(name, offset + shift, stored, full, crc, method, bool(flags & _ENCRYPTED))
    if seen != count:
        raise _damaged(path, f"it lists {seen:,} files and says {count:,}")


def _directory(path: Path, blob: FileBlob, size: int) -> tuple[int, int, int, int]:
    """Files, bytes and start of the central directory, and how far all offsets are shifted by data in front."""
    tail_at = max(0, size - _LONGEST_COMMENT - _END.size)
    tail = blob.read(size - tail_at, tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise _damaged(path, "its list of files, which is at the end, is missing")
    _, disk, _, _, count, length, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if disk not in (0, _FULL16):
        raise InputError(
            f"{path} is a part of a zip in several files: join them first (zip -s 0 {path.name} --out all.zip)."
        )
    locator = blob.read(_LOCATOR.size, end - _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator[:4] == b"PK\6\7" and len(locator) == _LOCATOR.size:
        at64 = _LOCATOR.unpack(locator)[2]
        record = blob.read(_END64.size, at64)
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise _damaged(path, "its list of files is missing")
        count, length, start = _END64.unpack(record)[7:]
        end = at64
    shift = end - length - start
    if shift < 0 or length > _MOST_LISTING:
        raise _damaged(path, "its list of files is larger than it")
    return count, length, start + shift, shift


def _large(path: Path, extra: bytes, values: list[int]) -> list[int]:
    """Size, stored size and offset, of which the ones that do not fit 32 bits are in the extra field."""
    if _FULL not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = [n for (n,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            try:
                return [numbers.pop(0) if value == _FULL else value for value in values]
            except IndexError:
                break
        at += 4 + length
    raise _damaged(path, "the size of a file is missing")


def check_entry(path: Path, entry: Entry) -> None:
    """Check that an image can be unpacked.

    Raises:
        InputError: it is encrypted, or compressed by a method that is not read here.
    """
    if entry.encrypted or entry.method == 99:
        raise InputError(
            f"{path} is encrypted ({entry.name[:200]!r}): unpack it with its password (7z x {path.name}) and give the "
            "folder."
        )
    if entry.method not in (_STORED, _DEFLATED, _BZIP2):
        raise InputError(
            f"{path} is compressed with {_METHODS.get(entry.method, f'method {entry.method}')} "
            f"({entry.name[:200]!r}), which cannot be read in place: unpack it and give the folder."
        )


def read_entry(blob: FileBlob, *, offset: int, stored: int, size: int, crc: int, method: int) -> bytes:
    """The content of a file in a zip.

    Raises:
        OSError: it is damaged, or is larger than it says.
    """
    start = data_start(blob, offset)
    if start < 0:
        raise unreadable("its header in the zip is damaged")
    data = blob.read(stored, start)
    if len(data) < stored:
        raise unreadable("the zip ends before it")
    try:
        if method == _DEFLATED:
            unpacker = zlib.decompressobj(-15)
            data = unpacker.decompress(data, size + 1)
        elif method == _BZIP2:
            data = bz2.BZ2Decompressor().decompress(data, size + 1)
    except (zlib.error, OSError, ValueError) as error:
        raise unreadable(f"it cannot be unpacked ({error})") from None
    if len(data) != size:
        raise unreadable(
            f"it unpacks to {'more' if len(data) > size else 'fewer'} than the {size:,} bytes that it says"
        )
    if zlib.crc32(data) != crc:
        raise unreadable("its checksum in the zip is wrong")
    return data


def read_whole(path: Path, blob: FileBlob, entry: Entry) -> bytes:
    """The content of a list, a table or a file of many images.

    Raises:
        InputError: it unpacks to far more than it is.
        OSError: as `read_entry`.
    """
    if entry.size > largest_unpacked(entry.stored):
        raise _damaged(path, f"{entry.name[:200]!r} would unpack from {entry.stored:,} to {entry.size:,} bytes")
    return read_entry(
        blob, offset=entry.offset, stored=entry.stored, size=entry.size, crc=entry.crc, method=entry.method
    )


def data_start(blob: FileBlob, offset: int) -> int:
    """Where the data of the file begin whose header is at `offset`; -1 if there is no header."""
    head = blob.read(_LOCAL.size, offset)
    if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        return -1
    fields = _LOCAL.unpack(head)
    return offset + _LOCAL.size + int(fields[9]) + int(fields[10])


def overlapping(offsets: list[int], stored: list[int]) -> bool:
    """Whether files share bytes, as in a zip bomb."""
    order = sorted(range(len(offsets)), key=offsets.__getitem__)
    ends = ((offsets[a] + _LOCAL.size + stored[a], offsets[b]) for a, b in itertools.pairwise(order))
    return any(end > start for end, start in ends)


def _damaged(path: Path, why: str) -> InputError:
    parts = re.sub(r"\.(0\d\d|part\d+|[a-z]\d\d)$", "", path.name)
    if parts != path.name:
        return InputError(f"{path} is a part of a zip in several files: join them first (cat {parts}.* > all.zip).")
    return InputError(f"{path} is truncated or damaged ({why}): download it again.")
