"""Formats that records are kept in: protocol buffers, TFRecord's checksum, msgpack."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_LANE = 64  # bytes of a lane of the checksum; lanes are computed side by side
_SHORT = 64  # bytes, below which lanes do not pay
_POLYNOMIAL = 0x82F63B78  # CRC-32C, reversed
_DEEPEST = 16


class DamagedRecordError(ValueError):
    """A record is damaged."""


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DamagedRecordError("it ends in a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise DamagedRecordError("a number has more than 64 bits")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message: a whole number, or bytes (8, 4, or those of a text or message)."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise DamagedRecordError("a field has the number 0")
        if kind == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise DamagedRecordError(f"a field has the type {kind}")
        size, at = varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if size > len(data) - at:
            raise DamagedRecordError("a field is longer than its message")
        yield number, data[at : at + size]
        at += size


def example(data: memoryview) -> dict[str, tuple[str, memoryview]]:
    """Features of a `tf.train.Example` by name: their kind ("bytes", "float" or "int64") and their list, packed."""
    found: dict[str, tuple[str, memoryview]] = {}
    for number, features in fields(data):
        if number != 1 or isinstance(features, int):
            continue
        for kind, entry in fields(features):
            if kind != 1 or isinstance(entry, int):
                continue
            parts = {one: value for one, value in fields(entry) if not isinstance(value, int)}
            name = bytes(parts.get(1, b"")).decode("utf-8", "replace")
            for one, values in fields(parts.get(2, memoryview(b""))):
                if one in (1, 2, 3) and not isinstance(values, int):
                    found[name] = (("bytes", "float", "int64")[one - 1], values)
    return found


def first_bytes(values: memoryview) -> memoryview | None:
    """The first entry of a list of bytes."""
    return next((value for number, value in fields(values) if number == 1 and not isinstance(value, int)), None)


def first_int(values: memoryview) -> int | None:
    """The first entry of a list of int64, packed or not."""
    for number, value in fields(values):
        if number == 1:
            found = value if isinstance(value, int) else varint(value, 0)[0] if len(value) else None
            return None if found is None else found - (1 << 64) if found >> 63 else found
    return None


def masked_crc(data: bytes | memoryview) -> int:
    """The checksum that TFRecord keeps of a part."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli), which Python's libraries lack.

    The data are cut into lanes whose checksums are computed side by side by NumPy; zeros in front do not change a
    checksum that starts from 0, and starting from ones is inverting the first four bytes.
    """
    if len(data) < _SHORT:
        short, steps = 0xFFFFFFFF, _steps()
        for byte in bytes(data):
            short = short >> 8 ^ steps[(short ^ byte) & 0xFF]
        return short ^ 0xFFFFFFFF
    content = np.frombuffer(data, np.uint8).copy()
    content[:4] ^= 0xFF
    padded = np.zeros(-(-len(content) // _LANE) * _LANE, np.uint8)
    padded[len(padded) - len(content) :] = content
    words = np.ascontiguousarray(padded.view("<u4").reshape(-1, _LANE // 4).T)  # [words of a lane, lanes]
    low, high = _word_tables()
    crc = np.zeros(words.shape[1], np.uint32)
    for row in words:
        crc ^= row
        crc = low[crc & 0xFFFF] ^ high[crc >> 16]
    length = _LANE
    while len(crc) > 1:  # each pair of neighbours becomes one
        if len(crc) % 2:
            crc = np.concatenate([np.zeros(1, np.uint32), crc])
        crc = _shifted(crc[::2], length) ^ crc[1::2]
        length *= 2
    return int(crc[0]) ^ 0xFFFFFFFF


@cache
def _table() -> npt.NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@cache
def _word_tables() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """What four zero bytes make of the lower and the upper half of a checksum."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    return _shifted(halves, 4), _shifted(halves << np.uint32(16), 4)


@cache
def _steps() -> list[int]:
    return [int(one) for one in _table()]


def _shifted(crc: npt.NDArray[np.uint32], length: int) -> npt.NDArray[np.uint32]:
    """Checksums as they are after `length` further zero bytes."""
    tables = _zeros(length)
    result: npt.NDArray[np.uint32] = (
        tables[0][crc & 0xFF] ^ tables[1][crc >> 8 & 0xFF] ^ tables[2][crc >> 16 & 0xFF] ^ tables[3][crc >> 24]
    )
    return result


@cache
def _zeros(length: int) -> tuple[npt.NDArray[np.uint32], ...]:
    """Tables of what `length` zero bytes (a power of two of them) make of each byte of a checksum."""
    values = [np.arange(256, dtype=np.uint32) << np.uint32(8 * place) for place in range(4)]
    if length == 1:
        table = _table()
        return tuple(value >> 8 ^ table[value & 0xFF] for value in values)
    return tuple(_shifted(_shifted(value, length // 2), length // 2) for value in values)


def unpack_msgpack(data: bytes | memoryview) -> Any:
    """The value of a msgpack message: numbers, texts, bytes, lists, dictionaries; extensions are their bytes.

    Raises:
        DamagedRecordError: it is damaged, or is followed by other bytes.
    """
    try:
        value, at = _unpack(memoryview(data), 0, 0)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError) as error:
        raise DamagedRecordError(f"it is no msgpack ({type(error).__name__})") from None
    if at != len(data):
        raise DamagedRecordError("it is no msgpack (bytes are left)")
    return value


_SCALARS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_SIZED = {  # (kind, format of the size)
    0xC4: ("bytes", ">B"),
    0xC5: ("bytes", ">H"),
    0xC6: ("bytes", ">I"),
    0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"),
    0xD9: ("text", ">B"),
    0xDA: ("text", ">H"),
    0xDB: ("text", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def _unpack(data: memoryview, at: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise DamagedRecordError("it is nested too deep")
    code, at = data[at], at + 1
    if code < 0x80 or code >= 0xE0:
        return code if code < 0x80 else code - 256, at
    if code in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[code], at
    if code in _SCALARS:
        size = struct.calcsize(_SCALARS[code])
        return struct.unpack_from(_SCALARS[code], data, at)[0], at + size
    if code < 0xC0:
        kind, size = ("map", code & 15) if code < 0x90 else ("list", code & 15) if code < 0xA0 else ("text", code & 31)
    elif 0xD4 <= code <= 0xD8:
        kind, size = "ext", 1 << (code - 0xD4)
    elif code in _SIZED:
        kind, form = _SIZED[code]
        (size,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
    else:
        raise DamagedRecordError("it is no msgpack")
    if kind in ("bytes", "text", "ext"):
        at += kind == "ext"  # its type
        if size > len(data) - at:
            raise DamagedRecordError("a value is longer than the message")
        value = bytes(data[at : at + size])
        return value.decode("utf-8") if kind == "text" else value, at + size
    if size > len(data):
        raise DamagedRecordError("a list is longer than the message")
    items = []
    for _ in range(size * (2 if kind == "map" else 1)):
        item, at = _unpack(data, at, depth + 1)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at
