"""FFCV's .beton file format, version 2, and the index that mvssl-convert adds to it.

A file is a header, one descriptor per field, one record per sample, pages of data that begin at multiples of the page
size, and the allocation table at its end. All numbers are little-endian. FFCV writes the header's pointer to the table
last, but nothing in the file gives the table's length: FFCV opens a truncated file and returns wrong images. We require
that the table contains every image's pointer and lies in the file.

Our index (keys, class names, upright sizes) lies between the last page and the allocation table, where FFCV does not
look. The image field's descriptor says where, in bytes that FFCV leaves unused. FFCV reads such a file like any other.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.arrays import read_arrays
from pipelines.files import open_regular
from pipelines.runtime import InputError
from pipelines.storage.source import KeyTable

BETON = "images.beton"  # in a folder written by mvssl-convert
VERSION = 2
PAGE_BYTES = 1 << 23  # FFCV's default; must be a power of two
JPEG, RAW = 0, 1  # modes of an image: a JPEG file, or RGB rows

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
INTEGER_KIND, IMAGE_KIND = 1, 2
_EXTENT = np.dtype([("pointer", "<u8"), ("size", "<u8")])
_KINDS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f8"),
    INTEGER_KIND: np.dtype("<i8"),
    IMAGE_KIND: IMAGE,
    3: _EXTENT,  # bytes
    4: np.dtype("<u8"),  # an array
    5: _EXTENT,  # JSON
    6: np.dtype("<u8"),  # a tensor
}
_LABEL_NAMES = ("label", "labels", "target", "class")
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Metadata of a complete .beton file.

    Attributes:
        file_bytes: size of the file.
        head: header and descriptors as in the file.
        images: IMAGE [N].
        nbytes: int64 [N], size of each image's data.
        labels: int64 [N]; None without an IntField.
        arguments: of the image field's descriptor, 1024 bytes; FFCV leaves them zero.
    """

    file_bytes: int
    head: bytes
    images: npt.NDArray[np.void]
    nbytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    arguments: bytes


def is_beton_name(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends in .beton."""
    return os.fspath(path).lower().endswith(".beton")


def record_dtype(kinds: Sequence[int]) -> np.dtype[Any]:
    """Type of one sample's record for fields of these kinds: "f0", "f1", ..., aligned as in C."""
    return np.dtype([("", _KINDS[kind]) for kind in kinds], align=True)


def page_bytes(largest: int, *, limit: int = 1 << 27) -> int:
    """Page size for images of up to `largest` bytes: FFCV's default or the next power of two, at most `limit`."""
    wanted = max(PAGE_BYTES, 1 << max(0, largest - 1).bit_length())
    return min(wanted, limit)


def read_layout(path: Path) -> Layout:
    """Read and check everything but the pages.

    Images are the first RGBImageField; labels the IntField named label, labels, target or class, else the first one.
    """
    size = path.stat().st_size
    with open_regular(path) as file:
        start = file.read(HEADER.itemsize)
        if len(start) < HEADER.itemsize:
            raise damaged(path, f"has {size} bytes, fewer than a .beton file's header")
        header = np.frombuffer(start, HEADER)[0]
        if int(header["version"]) != VERSION:
            raise InputError(
                f"{path} is of .beton version {header['version']} but this release reads version {VERSION}, that of "
                "FFCV 1.0: write it again with FFCV 1.0 or mvssl-convert --format beton, or check the path."
            )
        table = int(header["allocations"])
        if table == 0:
            raise damaged(path, "is half-written (it has no allocation table yet)")
        if table > size or (size - table) % ALLOCATION.itemsize:
            raise damaged(path, f"was cut short to {size} bytes")
        head = start + file.read(int(header["fields"]) * FIELD.itemsize)
    fields = np.frombuffer(head[HEADER.itemsize :], FIELD, count=(len(head) - HEADER.itemsize) // FIELD.itemsize)
    kinds = fields["kind"].tolist()
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown or IMAGE_KIND not in kinds:
        problem = f"a field of the unknown kind {unknown[0]}" if unknown else "no RGBImageField"
        raise InputError(f"{path} has {problem}: write the file with FFCV's own fields, one of them an RGBImageField.")
    dtype, count = record_dtype(kinds), int(header["samples"])
    if len(head) + count * dtype.itemsize > table:
        raise damaged(path, f"has no room for the {count} samples in its header")
    if count == 0:
        raise InputError(f"{path} holds no images: write it again from data with images.")
    records = np.fromfile(path, dtype, count=count, offset=len(head))
    allocations = np.fromfile(path, ALLOCATION, offset=table)
    image = kinds.index(IMAGE_KIND)
    images = records[f"f{image}"]
    label = _label_field(kinds, [bytes(name).decode("ascii", "replace") for name in fields["name"]])
    return Layout(
        file_bytes=size,
        head=head,
        images=images,
        nbytes=_sizes(path, images, allocations, table),
        labels=None if label is None else records[f"f{label}"].astype(np.int64),
        arguments=fields["arguments"][image].tobytes(),
    )


def class_labels(path: Path, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Class names where the file has none: the labels as text."""
    wrong = np.flatnonzero((labels < -1) | (labels >= _MAX_CLASSES))
    if len(wrong):
        raise InputError(
            f"{path}, sample {wrong[0]}: the label {labels[wrong[0]]} is not between -1 (none) and {_MAX_CLASSES - 1}: "
            "write the file with one IntField named label that counts classes from 0."
        )
    return tuple(str(label) for label in range(int(np.max(labels, initial=-1)) + 1))


def ppm_header(*, height: int, width: int) -> bytes:
    """What `BetonSource` puts in front of raw pixels, so that every decoder reads them."""
    return f"P6\n{width} {height}\n255\n".encode()


def damaged(path: Path, problem: str) -> InputError:
    """The error for a file that cannot be used."""
    return InputError(f"{path} {problem}: restore it from where it was copied, or write it again.")


def _label_field(kinds: Sequence[int], names: Sequence[str]) -> int | None:
    integers = [n for n, kind in enumerate(kinds) if kind == INTEGER_KIND]
    named = [n for n in integers if names[n].lower() in _LABEL_NAMES]
    return next(iter(named or integers), None)


def _sizes(
    path: Path, images: npt.NDArray[np.void], allocations: npt.NDArray[np.void], table: int
) -> npt.NDArray[np.int64]:
    """Size of each image's data, int64 [N], from the allocation at its pointer."""
    order = np.argsort(allocations["pointer"], kind="stable")
    pointers = allocations["pointer"][order]
    at = np.searchsorted(pointers, images["pointer"])
    found = at < len(pointers)
    found[found] = pointers[at[found]] == images["pointer"][found]
    if not found.all():
        missing = np.flatnonzero(~found)
        raise damaged(
            path, f"was cut short or damaged: {len(missing)} images (first: sample {missing[0]}) have no data"
        )
    end = np.uint64(table)
    sizes: npt.NDArray[np.int64] = np.minimum(allocations["size"][order][at], end + np.uint64(1)).astype(np.int64)
    outside = np.minimum(images["pointer"], end).astype(np.int64) + sizes > table
    pixels = 3 * images["width"].astype(np.int64) * images["height"].astype(np.int64)
    wrong = outside | (images["mode"] > RAW) | ((images["mode"] == RAW) & (sizes != pixels))
    if wrong.any():
        raise damaged(path, f"is damaged: the record of sample {np.flatnonzero(wrong)[0]} is impossible")
    return sizes


_MAGIC = b"mvssl\0ix"
_INDEX_VERSION = 1
_POINTER = np.dtype(
    [("magic", "V8"), ("version", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("bytes", "<u8"), ("sha256", "V32")]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BetonIndex:
    """Metadata that FFCV's format has no place for.

    Attributes:
        keys: key of each image.
        classes: class names by label, () if unlabelled.
        sizes: int64 [N, 2], (height, width) of each image in pixels, EXIF orientation applied.
        checksums: uint32 [N], CRC-32 of what `BetonSource.read` returns; None in files of earlier versions.
    """

    keys: KeyTable
    classes: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32] | None = None


def pack_index(index: BetonIndex) -> bytes:
    """The index as bytes, always the same for the same index."""
    classes = KeyTable.of(index.classes)
    file = io.BytesIO()
    sums: dict[str, Any] = {} if index.checksums is None else {"checksums": index.checksums.astype("<u4")}
    np.savez(
        file,
        key_blob=index.keys.blob,
        key_ends=index.keys.ends,
        class_blob=classes.blob,
        class_ends=classes.ends,
        sizes=index.sizes.astype("<i4"),
        **sums,
    )
    return file.getvalue()


def pack_pointer(packed: bytes, *, offset: int, file_bytes: int) -> bytes:
    """Descriptor arguments (1024 bytes) with position and checksum of the packed index and the size of the file."""
    pointer = np.zeros(1, _POINTER)
    pointer["magic"], pointer["version"] = np.void(_MAGIC), _INDEX_VERSION
    pointer["offset"], pointer["size"], pointer["bytes"] = offset, len(packed), file_bytes
    pointer["sha256"] = np.void(hashlib.sha256(packed).digest())
    return pointer.tobytes().ljust(FIELD["arguments"].itemsize, b"\0")


def load_index(path: Path, layout: Layout) -> BetonIndex | None:
    """The index in a file written by mvssl-convert; None in any other."""
    pointer = np.frombuffer(layout.arguments, _POINTER, count=1)[0]
    if pointer["magic"].tobytes() != _MAGIC:
        return None
    if int(pointer["version"]) != _INDEX_VERSION:
        raise InputError(
            f"{path} has an index of version {pointer['version']} but this release reads version {_INDEX_VERSION}: "
            "convert the data again with this release's mvssl-convert, or use the release that wrote it."
        )
    if int(pointer["bytes"]) != layout.file_bytes:
        raise damaged(path, f"has {layout.file_bytes} bytes but must have {pointer['bytes']}")
    if int(pointer["offset"]) + int(pointer["size"]) > layout.file_bytes:
        raise damaged(path, "has an index beyond its end")
    with path.open("rb") as file:
        file.seek(int(pointer["offset"]))
        packed = file.read(int(pointer["size"]))
    if hashlib.sha256(packed).digest() != pointer["sha256"].tobytes():
        raise damaged(path, "has an index with a wrong checksum")
    try:
        data = read_arrays(io.BytesIO(packed))
        keys = KeyTable.checked(data["key_blob"], data["key_ends"])
        classes = KeyTable.checked(data["class_blob"], data["class_ends"])
        sums = data.get("checksums")
        sizes = data["sizes"].astype(np.int64)
        count = len(layout.images)
        good = sums is None or (sums.dtype == np.uint32 and sums.shape == (count,))
        if sizes.shape != (count, 2) or (sizes <= 0).any() or not good:
            raise ValueError("its sizes or checksums are not those of the images")
        return BetonIndex(keys=keys, classes=tuple(classes), sizes=sizes, checksums=sums)
    except (ValueError, KeyError) as error:
        raise damaged(path, f"has an index that cannot be read ({error})") from error


def is_our_beton(path: Path) -> bool:
    """Whether mvssl-convert wrote this file, complete or not."""
    try:
        with open_regular(path) as file:
            return _MAGIC in file.read(HEADER.itemsize + FIELD.itemsize)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
