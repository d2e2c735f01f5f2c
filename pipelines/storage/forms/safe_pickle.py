"""Reads pickles of plain values and arrays; a pickle that wants to run anything else is refused."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections import OrderedDict
from typing import Any

import numpy as np

_MOST_TUPLES = 10_000  # Python overflows its stack in the hash of tuples in tuples; a batch of CIFAR has five
_DTYPE = re.compile(r"[|<>=]?(b1|\?|[iuf][1248]|c(8|16)|[SUVa]\d{1,9})")


class RefusedPickleError(ValueError):
    """The pickle is damaged, or holds other things than values and arrays."""


def load_plain(data: bytes | memoryview) -> Any:
    """The value in a pickle of numbers, texts, bytes, lists, tuples, sets, dictionaries and NumPy arrays.

    Texts of Python 2 become ``str``, a character for each byte.

    Raises:
        RefusedPickleError: it is damaged, names another class or function, or says more values than it holds.
    """
    data = bytes(data)
    try:
        _check_codes(data)
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except RefusedPickleError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise RefusedPickleError(f"it is no pickle that can be read ({type(error).__name__})") from None


def plain_dtype(text: Any) -> np.dtype[Any]:
    """The type of numbers or texts of fixed length that NumPy writes so; RefusedPickleError for any other."""
    if isinstance(text, bytes):
        text = text.decode("latin1")
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise RefusedPickleError(f"it has arrays of the type {str(text)[:50]!r}")
    return np.dtype(text)


def _check_codes(data: bytes) -> None:
    """Check what the unpickler does not: numbers that it takes memory for, and how deep tuples can be nested."""
    tuples = 0
    for code, argument, _ in pickletools.genops(data):
        tuples += code.name.startswith("TUPLE") or code.name == "FROZENSET"
        if tuples > _MOST_TUPLES or (code.name.endswith("PUT") and not 0 <= int(argument or 0) <= len(data)):
            raise RefusedPickleError("it is no pickle of images and labels")


def _encode(text: str, encoding: str = "latin1", *_: object) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError(f"it wants the encoding {encoding[:50]!r}")
    return text.encode("latin1")


def _bytearray(content: bytes | str = b"", *encoding: str) -> bytearray:
    if isinstance(content, str):
        return bytearray(_encode(content, *encoding))
    if not isinstance(content, (bytes, bytearray)):
        raise RefusedPickleError("it wants memory for bytes that it does not hold")
    return bytearray(content)


class _DType:
    """What a pickle says of a dtype; NumPy believes it all."""

    def __init__(self, text: Any, *_: object) -> None:
        self.kind = plain_dtype(text)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("|", "<", ">", "=") or state[2] is not None or state[3] is not None:
            raise RefusedPickleError("it has arrays of a type with fields")
        self.kind = self.kind.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array that takes no more values than its pickle holds."""

    def __new__(cls, *_: object) -> _Array:
        raise RefusedPickleError("it wants memory for an array that it does not hold")

    def __setstate__(self, state: Any) -> None:
        *_, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if math.prod(shape) * dtype.kind.itemsize != len(raw):
            raise RefusedPickleError(f"it has {len(raw):,} bytes for an array {list(shape)}")
        super().__setstate__((1, shape, dtype.kind, bool(fortran), bytes(raw)))  # type: ignore[arg-type]


def _reconstruct(*_: object) -> _Array:
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _scalar(dtype: _DType, content: bytes | str) -> Any:
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype.kind)[0]


def _from_buffer(buffer: Any, dtype: _DType, shape: Any, order: str = "C", *_: object) -> Any:
    return np.frombuffer(buffer, dtype=dtype.kind).reshape(shape, order="F" if order == "F" else "C")


class Picture:
    """What a pickle says of an image of Pillow, whatever file that came from; its values are read by `pixels`."""

    _state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def pixels(self) -> np.ndarray[Any, Any]:
        """uint8 [H, W] or [H, W, 3 or 4]; RefusedPickleError if there are not as many values as it says."""
        try:
            _, mode, (width, height), palette, content = self._state[:5]
            bands = {"L": 1, "P": 1, "RGB": 3, "RGBA": 4}[mode]
            values = np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, np.uint8)
            pixels = values.reshape((height, width) if bands == 1 else (height, width, bands))
            if mode == "P":
                return np.array(palette, dtype=np.uint8).reshape(-1, 3)[pixels]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise RefusedPickleError(f"it has an image of Pillow that cannot be read ({error!r})") from None
        return pixels


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{
        (f"numpy.{core}.{module}", name): value
        for core in ("core", "_core")
        for module, name, value in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    **{
        (module, name): value
        for module in ("builtins", "__builtin__")
        for name, value in (
            *(("bytearray", _bytearray), ("bytes", lambda: b"")),
            *(("set", set), ("frozenset", frozenset), ("complex", complex)),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("PIL.") and (name == "Image" or name.endswith("ImageFile")):
            return Picture
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RefusedPickleError(f"it wants to use {module[:100]}.{name[:100]}, which could run code") from None
