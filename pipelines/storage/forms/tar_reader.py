"""Lists the files of a tar archive that may come from anybody: every number in it is checked before it is used.

Formats: POSIX ustar and pax, and GNU tar with long names. Python's tarfile takes a broken header for the end of the
archive, follows chains of headers by recursion, and reads what their sizes say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

BLOCK, RECORD = 512, 10_240  # bytes
_MAX_PADDING = 1 << 20  # bytes of zeros after the last member: the largest record in use (GNU tar's default: 10 KiB)
_LONGEST_HEADER = 1 << 16  # bytes of a long name or of a member's pax records; names have at most 4,096
_MOST_HEADERS = 8  # in front of a member
_REGULAR, _LINKS = b"0\07", b"12"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL, _SPARSE = b"LKxgS"
_NO_DATA = b"123456"  # links, devices, folders, pipes


class Member(NamedTuple):
    """A file or link in an archive: its name, the first byte of its data in the archive, its size."""

    name: str
    offset: int
    size: int
    is_link: bool = False


class DamagedTarError(ValueError):
    """The archive is truncated or damaged, or its headers lie; says at which byte."""


Read = Callable[[int, int], bytes]
"""Gives up to so many bytes (first) from an offset (second) on, fewer at the end."""
_NO_END = 1 << 62  # of a stream, whose length is known at its end


def tar_members(where: int | Read, *, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yield the files and links of an archive, which lies from byte `start` to byte `end` of an open file.

    Args:
        where: a file descriptor, or what reads a stream.
        start: first byte of the archive.
        end: its end; None: of the file, or unknown.

    Raises:
        DamagedTarError: a header is damaged or lies, a file is sparse, or the end marker is missing.
        OSError: the file cannot be read.
    """
    read = partial(os.pread, where) if isinstance(where, int) else where
    if end is None:
        end = os.fstat(where).st_size if isinstance(where, int) else _NO_END
    position = start
    while True:
        at, named = position, ""
        sizes: list[str] = []
        for _ in range(_MOST_HEADERS):
            block = read(max(0, min(BLOCK, end - position)), position)
            if len(block) == BLOCK and not any(block):
                _check_end(read, position, end)
                return
            kind = _check_header(block, position, first=position == start)
            size = _number(block[124:136], "size", position)
            data = position + BLOCK
            if kind not in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL):
                break
            content = _content(read, data, size, end)
            if kind == _LONG_NAME:
                named = _text(content)
            elif kind == _PAX:
                records = _pax_records(content, position)
                named = records.get("path", named)
                sizes = [records["size"]] if "size" in records else sizes
            position = data + _padded(size)
        else:
            raise DamagedTarError(f"at byte {at} there are more than {_MOST_HEADERS} headers for one file")
        name = named or _name(block)
        if kind == _SPARSE:
            raise DamagedTarError(f"at byte {at} is the sparse file {name[:200]!r}, which cannot be read in place")
        if sizes:
            size = _pax_size(sizes[0], at)
        stored = 0 if kind in _NO_DATA else size
        if data + stored > end:
            raise DamagedTarError(f"at byte {at} is {name[:200]!r} of {size:,} bytes, more than there are")
        if (kind in _REGULAR and not name.endswith("/")) or kind in _LINKS:
            yield Member(name, data, stored, is_link=kind in _LINKS)
        position = data + _padded(stored)


def is_tar_header(block: bytes) -> bool:
    """Whether a block is the header of a member."""
    try:
        _check_header(block, 0, first=True)
    except DamagedTarError:
        return False
    return True


def _check_header(block: bytes, position: int, *, first: bool) -> int:
    """The kind of the header in a block; checks its checksum."""
    if len(block) == BLOCK:
        stored = block[148:156].strip(b" \0")
        blank = block[:148] + b" " * 8 + block[156:]
        signed = sum(blank) - 256 * sum(byte > 127 for byte in blank)  # as some old programs wrote it
        if stored and not stored.strip(b"01234567") and int(stored, 8) in (sum(blank), signed):
            return block[156]
    if first:
        raise DamagedTarError(f"at byte {position} there is no uncompressed tar file")
    raise DamagedTarError(f"at byte {position} there is neither a file nor the end marker")


def _check_end(read: Read, position: int, end: int) -> None:
    """Check that zeros follow from the first block of zeros on, and not too many, as in a download that broke off."""
    rest = read(min(_MAX_PADDING + 1, end - position), position)
    if any(rest[RECORD:]):  # POSIX allows any bytes up to the end of the record
        raise DamagedTarError(f"at byte {position} there is neither a file nor the end marker")
    if len(rest) > _MAX_PADDING:
        raise DamagedTarError(f"from byte {position} on there are only zeros")


def _number(field: bytes, name: str, position: int) -> int:
    """A number of a header: octal digits, or base 256 with the highest bit set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big", signed=False)
        if field[0] == 0xFF or value >= 1 << 62:
            raise DamagedTarError(f"at byte {position} the {name} of a file is negative or too large")
        return value
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise DamagedTarError(f"at byte {position} the {name} of a file is {digits!r}")
    return int(digits or b"0", 8)


def _content(read: Read, position: int, size: int, end: int) -> bytes:
    """The data of a header that precedes a file."""
    if size > _LONGEST_HEADER or position + size > end:
        raise DamagedTarError(f"at byte {position - BLOCK} there is a header of {size:,} bytes")
    return read(size, position)


def _pax_records(content: bytes, position: int) -> dict[str, str]:
    """Pax records, ``LENGTH NAME=VALUE`` with a line break, by name."""
    records, rest = {}, content
    while rest.strip(b"\0"):
        digits, blank, _ = rest[:8].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        name, equals, value = rest[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if length > len(rest) or not equals or rest[length - 1 : length] != b"\n":
            raise DamagedTarError(f"at byte {position} there is a pax header with a wrong length")
        if name.startswith(b"GNU.sparse"):
            raise DamagedTarError(f"at byte {position} is a sparse file, which cannot be read in place")
        records[_text(name)] = value.decode("utf-8", "surrogateescape")
        rest = rest[length:]
    return records


def _pax_size(text: str, position: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise DamagedTarError(f"at byte {position} the size of a file is {text[:50]!r}")
    return int(text)


def _name(block: bytes) -> str:
    """The name in a header, with the prefix of POSIX."""
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
