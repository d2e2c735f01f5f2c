"""Reads pickles of plain values and arrays; a pickle that wants to run anything else is refused."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.core.multiarray as _multiarray


class RefusedPickleError(ValueError):
    """The pickle is damaged, or holds other things than values and arrays."""


def load_plain(data: bytes | memoryview) -> Any:
    """The value in a pickle of numbers, texts, bytes, lists, tuples, sets, dictionaries and NumPy arrays.

    Texts of Python 2 become ``str``, a character for each byte.

    Raises:
        RefusedPickleError: it is damaged, or names another class or function.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except RefusedPickleError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise RefusedPickleError(f"it is no pickle that can be read ({type(error).__name__})") from None


def _encode(text: str, encoding: str = "latin1", *_: object) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError(f"it wants the encoding {encoding[:50]!r}")
    return text.encode("latin1")


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: str = "C", *_: object) -> Any:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): value
        for core in ("core", "_core")
        for module, name, value in (
            ("multiarray", "_reconstruct", _multiarray._reconstruct),
            ("multiarray", "scalar", _multiarray.scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    **{
        (module, name): value
        for module in ("builtins", "__builtin__")
        for name, value in (("bytearray", bytearray), ("set", set), ("frozenset", frozenset), ("complex", complex))
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RefusedPickleError(f"it wants to use {module[:100]}.{name[:100]}, which could run code") from None
