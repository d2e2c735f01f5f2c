"""Reads .npy and .npz files whose headers may lie: what they say is checked before memory is allocated for it."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.files import open_regular, read_regular

_HEADER_BYTES = 1 << 14  # numpy refuses headers of more than 10,000 bytes
_LONGEST_AXIS = 1 << 60
_MOST_ENTRIES = 100
_SMALL = 1 << 24  # bytes that an archive may always unpack to
_LARGEST_RATIO = 100  # names, sizes and labels of images are compressed to a tenth
_LARGEST_FILE = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a .npy file says of its array; `offset` is the first byte of its values."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(content: bytes | memoryview) -> Header:
    """The header of a .npy file, of which these are the first bytes or all; ValueError if there is none."""
    file = io.BytesIO(content[:_HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings(action="ignore"):  # Python's parser complains about texts in it
            shape, fortran, dtype = read(file)
        good = not dtype.hasobject and dtype.itemsize > 0 and all(0 <= length < _LONGEST_AXIS for length in shape)
    except Exception as error:  # Python's parser, which numpy uses, raises many types
        raise ValueError("it is no array of numpy") from error
    if not good:
        raise ValueError(f"it holds {dtype} {shape}, no array of numbers")
    return Header(dtype=dtype, shape=shape, fortran=fortran, offset=file.tell())


def parse_npy(content: bytes) -> NDArray[Any]:
    """The array of a .npy file; ValueError if it is none, holds Python objects, or has other bytes than it says."""
    header = parse_header(content)
    found = len(content) - header.offset
    if found != header.nbytes:
        raise ValueError(f"it has {found:,} bytes for {header.dtype} {list(header.shape)}")
    flat = np.frombuffer(content, np.uint8, offset=header.offset) if found else np.empty(0, np.uint8)
    try:
        return flat.copy().view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
    except (ValueError, TypeError, OverflowError) as error:  # axes that numpy cannot have, beside an empty one
        raise ValueError(f"it has the shape {list(header.shape)}") from error


def read_header(path: Path) -> Header:
    """The header of a .npy file whose values are not read.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no .npy file, or has other bytes than its header says.
    """
    with open_regular(path) as file:
        header = parse_header(file.read(_HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
    if size != header.offset + header.nbytes:
        raise ValueError(f"it has {size - header.offset:,} bytes for {header.dtype} {list(header.shape)}")
    return header


def read_npy(path: Path) -> NDArray[Any]:
    """The array in a .npy file; raises as `read_header`."""
    return parse_npy(read_regular(path, most=_LARGEST_FILE))


def read_arrays(file: Path | IO[bytes]) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, unpacks to far more than it is, or an array is as `parse_npy` refuses it.
    """
    if isinstance(file, Path):
        file = io.BytesIO(read_regular(file, most=_LARGEST_FILE))
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if len(entries) > _MOST_ENTRIES or unpacked > max(_SMALL, _LARGEST_RATIO * size):
                raise ValueError(f"its {len(entries)} entries would unpack from {size:,} to {unpacked:,} bytes")
            return {entry.filename.removesuffix(".npy"): parse_npy(archive.read(entry)) for entry in entries}
    except ValueError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many types
        raise ValueError(str(error) or type(error).__name__) from error
