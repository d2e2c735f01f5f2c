"""FFCV's file format, version 2: what lies where in a .beton file, and how to tell a whole file from a damaged one.

A file is a header, one descriptor for each field, one record for each sample, pages of data that begin at multiples of
the page size, and to its end the table of allocations. All numbers are little-endian. FFCV writes the header's pointer
to that table last, but nothing in the file says how long it must be: a file cut short opens in FFCV and gives wrong
images. Here every image's pointer must be found in the table, and the table in the file.

What mvssl-convert adds to a .beton file so that one file is all: keys, class names and upright sizes.

The index lies between the last page and the table of allocations, where FFCV does not look; the bytes of the image
field's descriptor that FFCV leaves unused say where. Stock FFCV reads such a file like any other.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.runtime import InputError
from pipelines.storage.source import KeyTable

VERSION = 2
PAGE_BYTES = 1 << 23  # FFCV's default, and a power of two as it must be
JPEG, RAW = 0, 1  # modes of an image: a whole JPEG file, or RGB rows one behind the other

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
_OTHER_LABELS = "write the file with one IntField named label"


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """What a whole .beton file says of its samples.

    Attributes:
        file_bytes: of the file.
        head: header and descriptors, as they lie in the file.
        images: IMAGE [N].
        nbytes: int64 [N], size of each image's data.
        numbers: int64 [N], the integer field that holds labels; None if there is none.
        arguments: of the image field's descriptor, 1024 bytes; FFCV leaves them zero.
    """

    file_bytes: int
    head: bytes
    images: npt.NDArray[np.void]
    nbytes: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64] | None
    arguments: bytes


def record_dtype(kinds: Sequence[int]) -> np.dtype[Any]:
    """Type of one sample's record, for fields of these kinds: "f0", "f1", ..., aligned as in C."""
    return np.dtype([("", _KINDS[kind]) for kind in kinds], align=True)


def read_layout(path: Path) -> Layout:
    """Read and check everything but the pages.

    The images are the first RGBImageField; the labels the IntField named label, labels, target or class, else the
    first.

    Raises:
        InputError: not a .beton file, another version, half-written, cut short, damaged, or without images.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
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
        what = f"a field of the unknown kind {unknown[0]}" if unknown else "no RGBImageField"
        raise InputError(f"{path} has {what}: write the file with FFCV's own fields, an RGBImageField among them.")
    dtype, count = record_dtype(kinds), int(header["samples"])
    if len(head) + count * dtype.itemsize > table:
        raise damaged(path, f"has no room for the {count} samples that its header promises")
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
        numbers=None if label is None else records[f"f{label}"].astype(np.int64),
        arguments=fields["arguments"][image].tobytes(),
    )


def class_labels(path: Path, numbers: npt.NDArray[np.int64], *, most: int = 1_000_000) -> tuple[str, ...]:
    """Class names of labels that are numbers: the numbers themselves.

    Raises:
        InputError: one is below -1, or so large that it can be no class.
    """
    wrong = np.flatnonzero((numbers < -1) | (numbers >= most))
    if len(wrong):
        raise InputError(
            f"{path}, sample {wrong[0]}: the label {numbers[wrong[0]]} is not between -1 (none) and {most - 1}: "
            f"{_OTHER_LABELS} that counts classes from 0."
        )
    return tuple(str(label) for label in range(int(np.max(numbers, initial=-1)) + 1))


def damaged(path: Path, what: str) -> InputError:
    """The error for a file that cannot be relied on."""
    return InputError(f"{path} {what}: restore it from where it was copied, or write it again.")


def page_bytes(largest: int, *, most: int = 1 << 27) -> int:
    """Page size for data whose largest image has `largest` bytes: FFCV's own or the next power of two, up to `most`."""
    wanted = max(PAGE_BYTES, 1 << max(0, largest - 1).bit_length())
    return min(wanted, most)


def is_beton_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name counts as FFCV's."""
    return os.fspath(path).lower().endswith(".beton")


def _label_field(kinds: Sequence[int], names: Sequence[str]) -> int | None:
    integers = [n for n, kind in enumerate(kinds) if kind == INTEGER_KIND]
    named = [n for n in integers if names[n].lower() in _LABEL_NAMES]
    return next(iter(named or integers), None)


def _sizes(
    path: Path, images: npt.NDArray[np.void], allocations: npt.NDArray[np.void], table: int
) -> npt.NDArray[np.int64]:
    """Size of each image's data, int64 [N], from the allocation that its pointer names."""
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
        raise damaged(path, f"is damaged: what it says of sample {np.flatnonzero(wrong)[0]} cannot be true")
    return sizes


BETON = "images.beton"  # in a folder that mvssl-convert wrote
_MAGIC = b"mvssl\0ix"
_VERSION = 1
_POINTER = np.dtype(
    [("magic", "V8"), ("version", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("bytes", "<u8"), ("sha256", "V32")]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BetonIndex:
    """What FFCV's own format has no place for.

    Attributes:
        keys: of each image.
        classes: class names by label, () if unlabelled.
        sizes: int64 [N, 2], (height, width) of each image in pixels, EXIF orientation applied.
    """

    keys: KeyTable
    classes: tuple[str, ...]
    sizes: npt.NDArray[np.int64]


def pack_index(index: BetonIndex) -> bytes:
    """The index as bytes, the same ones for the same index."""
    classes = KeyTable.of(index.classes)
    file = io.BytesIO()
    np.savez(
        file,
        key_blob=index.keys.blob,
        key_ends=index.keys.ends,
        class_blob=classes.blob,
        class_ends=classes.ends,
        sizes=index.sizes.astype("<i4"),
    )
    return file.getvalue()


def pack_pointer(packed: bytes, *, offset: int, file_bytes: int) -> bytes:
    """Descriptor arguments (1024 bytes) that say where the packed index lies, and how large the whole file is."""
    pointer = np.zeros(1, _POINTER)
    pointer["magic"], pointer["version"] = np.void(_MAGIC), _VERSION
    pointer["offset"], pointer["size"], pointer["bytes"] = offset, len(packed), file_bytes
    pointer["sha256"] = np.void(hashlib.sha256(packed).digest())
    return pointer.tobytes().ljust(FIELD["arguments"].itemsize, b"\0")


def load_index(path: Path, layout: Layout) -> BetonIndex | None:
    """The index in a file that mvssl-convert wrote; None in any other.

    Raises:
        InputError: cut short, damaged, or written by a later release.
    """
    pointer = np.frombuffer(layout.arguments, _POINTER, count=1)[0]
    if pointer["magic"].tobytes() != _MAGIC:
        return None
    if int(pointer["version"]) != _VERSION:
        raise InputError(
            f"{path} has an index of version {pointer['version']} but this release reads version {_VERSION}: convert "
            "the data again with this release's mvssl-convert, or use the release that made it."
        )
    if int(pointer["bytes"]) != layout.file_bytes:
        raise damaged(path, f"has {layout.file_bytes} bytes but must have {pointer['bytes']}")
    with path.open("rb") as file:
        file.seek(int(pointer["offset"]))
        packed = file.read(int(pointer["size"]))
    if hashlib.sha256(packed).digest() != pointer["sha256"].tobytes():
        raise damaged(path, "has an index without its checksum")
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as data:
            return BetonIndex(
                keys=KeyTable(blob=data["key_blob"], ends=data["key_ends"]),
                classes=tuple(KeyTable(blob=data["class_blob"], ends=data["class_ends"])),
                sizes=data["sizes"].astype(np.int64),
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, f"has an index that cannot be read ({error})") from error


def is_our_beton(path: Path) -> bool:
    """Whether mvssl-convert wrote this file, whole or not."""
    try:
        with path.open("rb") as file:
            return _MAGIC in file.read(HEADER.itemsize + FIELD.itemsize)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
